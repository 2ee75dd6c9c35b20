"""Weights, gradients and optimizer states on one GPU of one pipeline stage.

Bytes per parameter follow the training program: mixed precision keeps a 16-bit copy, gradients of `grad_bytes` and an
fp32 master with its moments (ZeRO paper, section 3.1: 2 + 2 + 12; Megatron bf16: 2 + 4 + 12); sharded data parallelism
keeps fp32 shards (4 + 4 + 8); pure training keeps everything in the weights' type.
"""

from __future__ import annotations

import msgspec

from head.planner.training.layout import TrainingLayout
from head.planner.training.memory_layers import expert_replicas
from head.planner.training.memory_stack import MemoryStack

# Bytes of optimizer states per trained parameter, without a master copy. Adafactor keeps a row and a column of each
# matrix. Sources: ZeRO 2020 section 3.1; Dettmers et al. 2022 (8-bit blocks with an fp32 scale); Lion (one moment).
MOMENT_BYTES = {
    "adamw": 8.0,
    "adam": 8.0,
    "adamw_bf16": 4.0,
    "adamw_8bit": 2.016,
    "paged_adamw_8bit": 2.016,
    "paged_adamw": 8.0,
    "adafactor": 0.01,
    "sgd": 0.0,
    "sgd_momentum": 4.0,
    "lion": 4.0,
    "lion_8bit": 1.008,
    "muon": 4.0,
}
_WITHOUT_MASTER = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adamw_bf16")
# NF4 weights: half a byte and one fp32 scale for 64 of them (planner.md 2.3; Dettmers et al. 2023).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / 16384
_SHARDED = ("zero3", "fsdp", "hsdp")


class StateBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per parameter held whole on each rank of a data-parallel group, before any sharding."""

    weights: float
    gradients: float
    optimizer: float
    extra_sharded: float = 0.0  # flat fp32 buffers of the program, sharded as the optimizer

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.extra_sharded


class States(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one GPU, and what was moved to the host."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0

    def plus(self, other: States) -> States:
        """Sum, part by part."""
        return States(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
            host=self.host + other.host,
        )


def state_bytes(layout: TrainingLayout, stack: MemoryStack) -> StateBytes:
    """Bytes per trained parameter."""
    moments = MOMENT_BYTES.get(layout.optimizer, 8.0)
    if layout.precision in ("fp32", "tf32"):
        return StateBytes(weights=4.0, gradients=4.0, optimizer=moments)
    if stack.states == "pure" or layout.optimizer in _WITHOUT_MASTER:
        # moments take the weights' type
        narrow = moments / 2 if moments in (4.0, 8.0) and layout.optimizer != "adamw_bf16" else moments
        return StateBytes(weights=2.0, gradients=2.0, optimizer=narrow)
    if stack.states == "fp32_shards":  # also unsharded: autocast casts fp32 weights as they are used
        return StateBytes(weights=4.0, gradients=4.0, optimizer=moments)
    gradients = min(layout.grad_bytes, 2 if stack.narrow_gradients else 4) + (
        2.0 if stack.keeps_narrow_gradients and layout.grad_bytes > 2 else 0.0
    )
    extra = 4.0 * stack.fp32_partition_copies if layout.sharding != "none" else 0.0
    return StateBytes(weights=2.0, gradients=gradients, optimizer=4.0 + moments, extra_sharded=extra)


def shard_ways(layout: TrainingLayout, replicas: int, gpus_per_node: int) -> tuple[int, int, int]:
    """In how many pieces (weights, gradients, optimizer) are cut over `replicas` equal ranks."""
    ways = max(1, replicas)
    if layout.sharding == "hsdp":
        ways = max(1, min(ways, layout.shard_group or gpus_per_node))
    return (
        ways if layout.sharding in _SHARDED else 1,
        ways if layout.sharding in (*_SHARDED, "zero2") else 1,
        ways if layout.sharding != "none" else 1,
    )


def states_of(layout: TrainingLayout, stack: MemoryStack, dense: float, experts: float, gpus_per_node: int) -> States:
    """States of `dense` and `experts` trained parameters held by one rank before data-parallel sharding."""
    total = States()
    for params, replicas in ((dense, layout.dp * layout.cp), (experts, expert_replicas(layout))):
        if params:
            total = total.plus(_one(layout, stack, params, shard_ways(layout, replicas, gpus_per_node)))
    return total


def frozen_states(
    layout: TrainingLayout, matrices: float, tables: float, trained: float, stack: MemoryStack, gpus_per_node: int
) -> States:
    """States of a LoRA: frozen `matrices` (4 bits for qlora) and `tables` (16 bits), and `trained` parameters."""
    weight_ways, grad_ways, optimizer_ways = shard_ways(layout, layout.dp * layout.cp, gpus_per_node)
    narrow = (NF4_DOUBLE_BYTES if layout.has_double_quant else NF4_BYTES) if layout.tuning == "qlora" else 2.0
    frozen = (matrices * narrow + tables * 2.0) / weight_ways
    if layout.precision in ("fp32", "tf32") and layout.tuning == "lora":
        frozen = (matrices + tables) * 4.0 / weight_ways
    # adapters are trained in fp32 unless the whole run is in 16 bits
    each = 2.0 if stack.states == "pure" else 4.0
    optimizer = trained * MOMENT_BYTES.get(layout.optimizer, 8.0) * (0.5 if stack.states == "pure" else 1.0)
    host = 0.0
    if layout.offload == "optimizer_and_weights":
        host, frozen = frozen, 0.0
    if layout.offload in ("optimizer", "optimizer_and_weights"):
        host, optimizer = host + optimizer / optimizer_ways, 0.0
    return States(
        weights=frozen + trained * each / weight_ways,
        gradients=trained * each / grad_ways,
        optimizer=optimizer / optimizer_ways,
        host=host,
    )


def _one(layout: TrainingLayout, stack: MemoryStack, params: float, ways: tuple[int, int, int]) -> States:
    each = state_bytes(layout, stack)
    weights, gradients = params * each.weights / ways[0], params * each.gradients / ways[1]
    gradients = 0.0 if stack.releases_gradients else gradients
    optimizer = params * (each.optimizer + each.extra_sharded) / ways[2]
    if layout.optimizer.startswith("paged_"):
        return States(weights=weights, gradients=gradients, host=optimizer)
    if layout.offload == "optimizer":
        return States(weights=weights, gradients=gradients, host=optimizer)
    if layout.offload == "optimizer_and_weights":
        return States(host=weights + gradients + optimizer)
    return States(weights=weights, gradients=gradients, optimizer=optimizer)
