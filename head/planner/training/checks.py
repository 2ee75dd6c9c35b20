"""Whether a layout is sound for a model on a topology: one list of checks for `validate` and for the search.

A check passes, warns or fails. A layout without a failed check can be recommended; the search recommends no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from common.errors import InvalidValue
from head.planner.hardware.accelerators import GIB
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import TrainingMemory, estimate_memory
from head.planner.training.memory_layers import expert_tensor_ways
from head.planner.training.memory_stack import MemoryStack

Status = Literal["passed", "warning", "failed"]
_SHARDED_WEIGHTS = ("zero3", "fsdp", "hsdp")
MICROBATCHES_PER_STAGE = 4  # under this the bubble of 1F1B is over a fifth


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One check. `predicted` is what the layout asks for, `limit` what there is, in the unit that the message names."""

    name: str
    status: Status
    message: str
    predicted: float | None = None
    limit: float | None = None


def check_layout(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    *,
    stack: MemoryStack | str | None = None,
    memory: TrainingMemory | None = None,
) -> list[Check]:
    """Every check of `layout`, structure first and memory last. `memory` spares its computation when it is known."""
    found = list(structure_checks(arch, topology, layout))
    if all(check.status != "failed" for check in found if check.name in _NEEDED_FOR_MEMORY):
        found.append(memory_check(memory or estimate_memory(arch, topology, layout, stack=stack)))
    return found


def first_failure(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    """The first failed check of structure, or None. For searches: it stops there."""
    return next((check for check in structure_checks(arch, topology, layout) if check.status == "failed"), None)


def is_valid(checks: list[Check]) -> bool:
    """Whether no check failed."""
    return all(check.status != "failed" for check in checks)


def structure_checks(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Iterator[Check]:
    """Everything but memory, one check at a time."""
    for rule in _RULES:
        check = rule(arch, topology, layout)
        if check is not None:
            yield check
            if check.name == "degrees" and check.status == "failed":
                return  # the other rules divide by them


def memory_check(memory: TrainingMemory) -> Check:
    """The verdict on memory as a check: tight is a warning."""
    status: Status = {"fits": "passed", "tight": "warning", "does_not_fit": "failed"}[memory.verdict]  # type: ignore[assignment]
    largest = max(
        ((name, getattr(memory.parts, name)) for name in memory.parts.__struct_fields__), key=lambda item: item[1]
    )
    return Check(
        name="memory_fit",
        status=status,
        message=(
            f"{memory.total.value / GIB:.1f} GiB of {memory.capacity_bytes / GIB:.1f} GiB on the {memory.stage} stage "
            f"(80 % interval {memory.total.low / GIB:.1f} to {memory.total.high / GIB:.1f}), most of it {largest[0]}; "
            f"probability that it fits {memory.fit_probability:.2f}"
        ),
        predicted=memory.total.value,
        limit=memory.capacity_bytes,
    )


def _check(
    name: str, is_good: bool, message: str, predicted: float, limit: float, *, otherwise: Status = "failed"
) -> Check:
    return Check(
        name=name, status="passed" if is_good else otherwise, message=message, predicted=predicted, limit=limit
    )


def _degrees(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check:
    values = (
        layout.tp,
        layout.pp,
        layout.cp,
        layout.ep,
        layout.dp,
        layout.virtual_stages,
        layout.micro_batch,
        layout.global_batch,
        layout.seq,
    )
    return _check("degrees", min(values) >= 1, "every degree, batch and length is at least 1", min(values), 1)


def _gpu_count(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check:
    return _check(
        "gpu_count",
        layout.gpus == topology.gpus,
        f"tp x pp x cp x dp = {layout.tp} x {layout.pp} x {layout.cp} x {layout.dp} = {layout.gpus} "
        f"of {topology.gpus} GPUs",
        layout.gpus,
        topology.gpus,
        otherwise="failed" if layout.gpus > topology.gpus else "warning",
    )


def _tensor_heads(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    heads = {group.attention.heads for group in arch.groups if group.attention.heads}
    if layout.tp == 1 or not heads:
        return None
    bad = [count for count in heads if count % layout.tp]
    return _check(
        "tp_heads", not bad, f"{min(bad or heads)} attention heads over tp {layout.tp}", layout.tp, min(heads)
    )


def _tensor_kv_heads(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    counts = {group.attention.kv_heads for group in arch.groups if group.attention.kv_heads}
    if layout.tp == 1 or not counts:
        return None
    bad = [count for count in counts if count % layout.tp and layout.tp % count]
    copied = [count for count in counts if count < layout.tp]
    message = f"{min(counts)} key/value heads over tp {layout.tp}"
    if copied and not bad:
        return _check("tp_kv_heads", False, f"{message}: copied", layout.tp, min(counts), otherwise="warning")
    return _check("tp_kv_heads", not bad, message, layout.tp, min(counts))


def _tensor_widths(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.tp == 1:
        return None
    widths = {group.feed_forward.width for group in arch.groups if group.feed_forward.kind == "dense"}
    widths |= {group.feed_forward.shared_width for group in arch.groups if group.feed_forward.shared_width}
    widths.add(arch.hidden)
    ways = expert_tensor_ways(layout)
    experts = {group.feed_forward.width for group in arch.groups if group.feed_forward.kind == "moe"}
    bad = [width for width in widths if width % layout.tp] + [width for width in experts if width % ways]
    return _check(
        "tp_widths", not bad, f"widths {sorted(widths | experts)} over tp {layout.tp}", layout.tp, arch.hidden
    )


def _tensor_domain(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.tp == 1:
        return None
    domain = topology.local_gpus
    if topology.has_scaleup and layout.tp > topology.domain_gpus and layout.tp <= domain:
        return _check(
            "tp_domain",
            False,
            f"tp {layout.tp} leaves the scale-up link of {topology.domain_gpus} GPUs",
            layout.tp,
            topology.domain_gpus,
            otherwise="warning",
        )
    is_good = layout.tp <= domain and domain % layout.tp == 0
    return _check(
        "tp_domain", is_good, f"tp {layout.tp} inside {domain} GPUs that are joined directly", layout.tp, domain
    )


def _sequence_split(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.tp == 1 or not layout.has_sequence_parallel:
        return None
    tokens = layout.seq // layout.cp
    return _check(
        "sequence_parallel", tokens % layout.tp == 0, f"{tokens} tokens over tp {layout.tp}", layout.tp, tokens
    )


def _stages(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.pp == 1:
        if layout.virtual_stages > 1:
            return _check("virtual_stages", False, "virtual stages need a pipeline", layout.virtual_stages, 1)
        return None
    slots = arch.layers + (2 if layout.partition == "layers_and_embedding" else 0)
    chunks = layout.pp * layout.virtual_stages
    if chunks > slots:
        return _check("pp_layers", False, f"{arch.layers} layers in {chunks} pipeline chunks", chunks, slots)
    return _check(
        "pp_layers",
        slots % chunks == 0,
        f"{slots} layers and slots in {chunks} equal pipeline chunks",
        chunks,
        slots,
        otherwise="warning",
    )


def _batch(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check:
    each = layout.micro_batch * layout.dp
    return _check(
        "batch",
        layout.global_batch % each == 0,
        f"global batch {layout.global_batch} in steps of micro-batch {layout.micro_batch} x dp {layout.dp}",
        each,
        layout.global_batch,
    )


def _microbatches(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.pp == 1:
        return None
    if layout.virtual_stages > 1 and layout.microbatches % layout.pp:
        return _check(
            "microbatches",
            False,
            f"interleaving needs {layout.microbatches} micro-batches in multiples of pp",
            layout.microbatches,
            layout.pp,
        )
    least = layout.pp * (MICROBATCHES_PER_STAGE if layout.virtual_stages == 1 else 1)
    return _check(
        "microbatches",
        layout.microbatches >= least,
        f"{layout.microbatches} micro-batches for {layout.pp} stages: under {least} much of the pipeline idles",
        layout.microbatches,
        least,
        otherwise="warning",
    )


def _context(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.cp == 1:
        return None
    # causal attention is balanced by giving each rank one piece from the front and one from the back
    is_good = layout.seq % (2 * layout.cp) == 0
    return _check("cp_sequence", is_good, f"{layout.seq} tokens in {2 * layout.cp} pieces", 2 * layout.cp, layout.seq)


def _experts(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    counts = {group.feed_forward.experts for group in arch.groups if group.feed_forward.kind == "moe"}
    if layout.ep == 1:
        return None
    if not counts:
        return _check("ep_experts", False, "expert parallelism needs experts", layout.ep, 0)
    bad = [count for count in counts if count % layout.ep]
    return _check("ep_experts", not bad, f"{max(counts)} experts over ep {layout.ep}", layout.ep, max(counts))


def _expert_ranks(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.ep == 1:
        return None
    ways, ranks = layout.ep * expert_tensor_ways(layout), layout.tp * layout.cp * layout.dp
    return _check("ep_ranks", ranks % ways == 0, f"ep x expert tp = {ways} divides tp x cp x dp = {ranks}", ways, ranks)


def _sharding(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.sharding == "none":
        return None
    if layout.pp > 1 and layout.sharding in ("zero2", "zero3"):
        return _check(
            "sharding",
            False,
            f"{layout.sharding} shards gradients of every micro-batch: it has no pipeline",
            layout.pp,
            1,
        )
    if layout.sharding == "hsdp":
        group, ranks = layout.shard_group or topology.gpus_per_node, layout.dp * layout.cp
        is_good = ranks % min(group, ranks) == 0
        return _check("sharding", is_good, f"shard groups of {group} divide {ranks} ranks", group, ranks)
    if layout.pp > 1 and layout.sharding in _SHARDED_WEIGHTS:
        return _check(
            "sharding", False, "sharded weights stay gathered while a pipeline runs", layout.pp, 1, otherwise="warning"
        )
    ranks = layout.dp * layout.cp
    return _check("sharding", ranks > 1, f"states sharded over {ranks} ranks", ranks, 2, otherwise="warning")


def _precision(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check:
    has_units = topology.accelerator.has_units_for(layout.precision)
    ran = topology.accelerator.compute_precision(layout.precision)
    return _check(
        "precision",
        has_units,
        f"{topology.accelerator.name} computes {layout.precision} as {ran}",
        1,
        1,
        otherwise="warning",
    )


def _offload(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.offload == "none":
        return None
    is_good = layout.offload != "optimizer_and_weights" or layout.sharding in _SHARDED_WEIGHTS or layout.dp == 1
    return _check("offload", is_good, f"offload of {layout.offload} with sharding {layout.sharding}", 1, 1)


def _tuning(arch: Architecture, topology: Topology, layout: TrainingLayout) -> Check | None:
    if layout.tuning == "full":
        return None
    return _check("lora_rank", layout.lora_rank >= 1, f"rank {layout.lora_rank} adapters", layout.lora_rank, 1)


_Rule = Callable[[Architecture, Topology, TrainingLayout], Check | None]
_RULES: tuple[_Rule, ...] = (
    _degrees,
    _gpu_count,
    _tensor_domain,
    _tensor_heads,
    _tensor_kv_heads,
    _tensor_widths,
    _sequence_split,
    _stages,
    _context,
    _experts,
    _expert_ranks,
    _batch,
    _microbatches,
    _sharding,
    _precision,
    _offload,
    _tuning,
)
_NEEDED_FOR_MEMORY = ("degrees",)


def require_sound(values: dict[str, Any]) -> TrainingLayout:
    """A layout from plain values. Raises: InvalidValue for a value that no layout has."""
    try:
        layout = msgspec.convert(values, TrainingLayout)
    except msgspec.ValidationError as exc:
        raise InvalidValue(f"not a layout: {exc}") from exc
    return layout
