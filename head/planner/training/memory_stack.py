"""How a training program allocates: what it keeps for a backward pass, how it holds states, what its peak means.

The formulas of memory.py are the same for all programs; what differs between them is said here, as facts of their code
and not as numbers fitted to their results.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from head.planner.training.layout import TrainingLayout

Measure = Literal["device", "reserved", "allocated"]


class MemoryStack(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of training program.

    states: `mixed` holds a 16-bit copy, gradients and an fp32 master; `fp32_shards` holds fp32 shards and casts what it
    gathers; `pure` trains in the weights' own type. loss_bytes: per logit, at the moment of the loss: the logits in 16
    bits, an fp32 copy, the softmax and gradients, as far as the program keeps them all. measure: what its published
    peaks count: `device` everything on the card (nvidia-smi), `reserved` what the allocator holds, `allocated` tensors.
    """

    name: str
    states: Literal["mixed", "fp32_shards", "pure"] = "mixed"
    operators: Literal["fused", "eager"] = "fused"
    selective: Literal["core_attention", "operators"] = "core_attention"
    loss_bytes: float = 10.0
    releases_gradients: bool = False  # the optimizer steps inside the backward pass, layer by layer
    narrow_gradients: bool = False  # gradients are summed and reduced in 16 bits, whatever the layout says
    keeps_narrow_gradients: bool = False  # 16-bit gradients beside their fp32 sums
    fp32_partition_copies: int = 0  # flat fp32 buffers beside master and moments (gradients, all-gather), sharded
    bucket_elements: float = 0.0  # of a reduce and of a gather bucket
    narrow_inputs: bool = False  # 8-bit products keep their inputs in 8 bits (Transformer Engine)
    gathered_blocks: float = 2.0  # layers of sharded weights that are whole at once: the one in use and the next
    reduces_in_fp32: bool = True
    keeps_gathered: bool = False  # gathered frozen weights stay until the backward pass ends
    keeps_gathered_in_pipeline: bool = False  # weights stay gathered, gradients whole, while micro-batches run
    keeps_stage_outputs: bool = False  # the last stage holds the logits of all its micro-batches
    has_dropout: bool = False
    has_lora_dropout: bool = False
    lora_targets: Literal["all", "attention"] = "all"
    scales_outputs: bool = False  # a learned scale after each product (adapter v2)
    measure: Measure = "device"


STACKS: dict[str, MemoryStack] = {
    stack.name: stack
    for stack in (
        MemoryStack(name="megatron", narrow_inputs=True),
        MemoryStack(name="megatron-bridge", narrow_inputs=True, narrow_gradients=True),
        MemoryStack(name="megatron-2022", has_dropout=True),
        MemoryStack(
            name="deepspeed", keeps_narrow_gradients=True, fp32_partition_copies=1, bucket_elements=5e8, loss_bytes=12.0
        ),
        MemoryStack(
            name="fsdp",
            states="fp32_shards",
            selective="operators",
            loss_bytes=14.0,
            keeps_gathered_in_pipeline=True,
            keeps_stage_outputs=True,
            measure="reserved",
        ),
        MemoryStack(name="llm-foundry", states="fp32_shards", loss_bytes=4.0, measure="reserved"),
        MemoryStack(name="xla", states="fp32_shards", loss_bytes=6.0, gathered_blocks=1.0, reduces_in_fp32=False),
        MemoryStack(
            name="huggingface", states="fp32_shards", operators="eager", loss_bytes=14.0, has_lora_dropout=True
        ),
        MemoryStack(name="torchtune", states="pure", loss_bytes=3.0, measure="allocated"),
        MemoryStack(
            name="torchtune-single", states="pure", loss_bytes=3.0, releases_gradients=True, measure="allocated"
        ),
        MemoryStack(
            name="litgpt",
            states="pure",
            operators="eager",
            loss_bytes=4.0,
            keeps_gathered=True,
            has_lora_dropout=True,
            lora_targets="attention",
            measure="allocated",
        ),
        MemoryStack(
            name="litgpt-adapter",
            states="pure",
            operators="eager",
            loss_bytes=4.0,
            keeps_gathered=True,
            lora_targets="attention",
            measure="allocated",
        ),
        MemoryStack(
            name="litgpt-adapter-v2",
            states="pure",
            operators="eager",
            loss_bytes=4.0,
            keeps_gathered=True,
            scales_outputs=True,
            measure="allocated",
        ),
    )
}


# Other names of the same programs.
ALIASES = {
    "mosaic": "llm-foundry",
    "mosaicml": "llm-foundry",
    "composer": "llm-foundry",
    "lightning": "litgpt",
    "torchtitan": "fsdp",
    "fsdp2": "fsdp",
    "maxtext": "xla",
    "megatron-lm": "megatron",
    "nemo": "megatron-bridge",
    "megatron-deepspeed": "deepspeed",
    "trl": "huggingface",
    "peft": "huggingface",
    "transformers": "huggingface",
    "accelerate": "huggingface",
}


def stack_for(layout: TrainingLayout) -> MemoryStack:
    """The usual program for a layout: FSDP for sharded weights, DeepSpeed for ZeRO-2, else Megatron."""
    if layout.tuning != "full":
        return STACKS["huggingface"]
    if layout.sharding in ("fsdp", "hsdp", "zero3"):
        return STACKS["fsdp"]
    return STACKS["deepspeed" if layout.sharding == "zero2" else "megatron"]


def program_of(stack: MemoryStack | str | None, layout: TrainingLayout) -> MemoryStack:
    """What `stack` means: facts as they are, a name looked up, nothing the usual program for the layout."""
    if isinstance(stack, MemoryStack):
        return stack
    return stack_named(stack or "", layout)


def stack_named(name: str, layout: TrainingLayout) -> MemoryStack:
    """The stack called `name`, its release left out; an unknown or empty name gets the usual one for the layout."""
    plain = name.split("@")[0].strip().lower()
    found = STACKS.get(ALIASES.get(plain, plain))
    if found is None or (found.name.startswith("megatron") and layout.sharding in ("fsdp", "hsdp", "zero3")):
        return stack_for(layout)
    return found
