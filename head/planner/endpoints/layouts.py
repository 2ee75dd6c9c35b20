"""Questions about one training layout: degrees of parallelism, batch, memory savers; and what of it is shown."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
from head.planner.endpoints.questions import Batch, Count, Desk, PlacedQuestion, Tokens, topology_for
from head.planner.hardware.topology import Topology
from head.planner.training.layout import Sharding, TrainingLayout
from head.planner.training.memory import TrainingMemory
from head.planner.training.memory_states import MOMENT_BYTES

GB = 1e9

# The old planner's documents call some settings by other names.
_SHARDING = {"zero-1": "zero1", "zero-2": "zero2", "zero-3": "zero3", "ddp": "none", "full_shard": "fsdp"}
_OPTIMIZERS = {"adamw8bit": "adamw_8bit", "adam8bit": "adamw_8bit", "adam_8bit": "adamw_8bit", "adamw_torch": "adamw"}
_PRECISION = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "half": "fp16"}


class LayoutQuestion(PlacedQuestion, frozen=True, kw_only=True):
    """One training layout. `batch_size` is what each data-parallel rank takes in a step; global_batch overrides it."""

    tp: Annotated[Count, Meta(description="Tensor parallelism.")] = 1
    pp: Annotated[Count, Meta(description="Pipeline stages.")] = 1
    dp: Annotated[int, Meta(ge=0, le=1_048_576, description="Data-parallel ranks; 0: what the GPUs leave.")] = 0
    cp: Annotated[Count, Meta(description="Context parallelism.")] = 1
    ep: Annotated[Count, Meta(description="Expert parallelism, out of dp times cp.")] = 1
    virtual_stages: Annotated[Count, Meta(description="Model chunks per pipeline stage.")] = 1
    batch_size: Annotated[Batch, Meta(description="Sequences of one data-parallel rank in a step.")] = 8
    global_batch: Annotated[int, Meta(ge=0, le=1 << 24, description="Sequences of a step; 0: batch_size x dp.")] = 0
    micro_batch: Annotated[int, Meta(ge=0, le=1 << 20, description="Sequences at once; 0: chosen.")] = 0
    seq_length: Annotated[Tokens, Meta(description="Tokens of a sequence.")] = 2048
    precision: Annotated[str, Meta(max_length=16, description="bf16, fp16, fp8, mxfp8, nvfp4, fp32.")] = "bf16"
    optimizer: Annotated[str, Meta(max_length=32, description="adamw, adamw_8bit, adafactor, lion, sgd, muon, ...")] = (
        "adamw"
    )
    sharding: Annotated[str, Meta(max_length=16, description="none, zero1, zero2, zero3, fsdp, hsdp.")] = "zero1"
    checkpointing: Annotated[
        Literal["", "none", "selective", "full"] | None, Meta(description="Activation recomputation; empty: none.")
    ] = None
    schedule: Annotated[
        Literal["1f1b", "interleaved", "zero_bubble", "gpipe"], Meta(description="Of the pipeline.")
    ] = "1f1b"
    tuning: Annotated[Literal["full", "lora", "qlora"], Meta(description="What is trained.")] = "full"
    lora_rank: Annotated[int, Meta(ge=1, le=4_096, description="Of adapters.")] = 16
    offload: Annotated[
        Literal["none", "optimizer", "optimizer_and_weights", "activations"], Meta(description="What the CPUs hold.")
    ] = "none"
    stack: Annotated[
        str,
        Meta(max_length=64, description="Software: megatron, nemo, deepspeed, fsdp, torchtitan, mosaicml, maxtext."),
    ] = "unknown"


class LayoutView(msgspec.Struct, frozen=True, kw_only=True):
    """A layout in the old planner's words, and ours."""

    name: str
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    sp: bool
    virtual_stages: int
    world_size: int
    global_batch: int
    micro_batch_size: int
    num_micro_batches: int
    gradient_accumulation: int
    effective_batch_size: int
    seq_length: int
    precision: str
    sharding: str
    optimizer: str
    activation_checkpointing: str
    schedule: str
    offload: str


class MemoryBreakdown(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the fullest GPU, in GB of 1e9; the parts sum to the total."""

    parameters: float
    gradients: float
    optimizer_states: float
    activations: float
    logits: float
    communication: float
    context: float
    fragmentation: float
    kv_cache: float = 0.0
    total: float


def sharding_of(word: str) -> Sharding:
    """The sharding that a word means. Raises: InvalidValue."""
    name = _SHARDING.get(word.lower(), word.lower()) or "zero1"
    known = ("none", "zero1", "zero2", "zero3", "fsdp", "hsdp")
    if name not in known:
        raise InvalidValue(f"sharding: {word!r} is not known", field="sharding", known=list(known))
    return name  # type: ignore[return-value]


def precision_of(word: str) -> str:
    """The precision that a word means. Raises: InvalidValue."""
    name = _PRECISION.get(word.lower(), word.lower()) or "bf16"
    known = ("fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4")
    if name not in known:
        raise InvalidValue(f"precision: {word!r} is not known", field="precision", known=list(known))
    return name


def optimizer_of(word: str) -> str:
    """The optimizer that a word means. Raises: InvalidValue."""
    name = _OPTIMIZERS.get(word.lower().replace("-", "_"), word.lower().replace("-", "_")) or "adamw"
    if name not in MOMENT_BYTES:
        raise InvalidValue(
            f"optimizer: {word!r} is not known",
            field="optimizer",
            known=list(MOMENT_BYTES),
            hint="one of " + ", ".join(MOMENT_BYTES),
        )
    return name


def layout_of(question: LayoutQuestion, topology: Topology, *, dp: int = 0) -> TrainingLayout:
    """The layout that a question describes on a machine.

    dp: ranks when the question leaves them open; otherwise what the GPUs leave. Raises: InvalidValue when the degrees
    do not multiply up to GPUs that were asked for, or the batch cannot be divided.
    """
    model_ranks = question.tp * question.pp * question.cp
    ranks = question.dp or dp or max(1, topology.gpus // model_ranks)
    total = question.global_batch or question.batch_size * ranks
    if total % ranks:
        raise InvalidValue(f"global_batch: {total} is not a multiple of dp {ranks}", field="global_batch")
    local = total // ranks
    micro = question.micro_batch or (local if question.pp == 1 else 1)
    if local % micro:
        raise InvalidValue(f"micro_batch: {micro} does not divide the {local} of a rank", field="micro_batch")
    return TrainingLayout(
        tp=question.tp,
        pp=question.pp,
        virtual_stages=question.virtual_stages,
        cp=question.cp,
        ep=question.ep,
        dp=ranks,
        sharding=sharding_of(question.sharding),
        schedule="interleaved" if question.virtual_stages > 1 and question.schedule == "1f1b" else question.schedule,
        global_batch=total,
        micro_batch=micro,
        seq=question.seq_length,
        precision=precision_of(question.precision),
        optimizer=optimizer_of(question.optimizer),
        recompute=question.checkpointing or "none",
        tuning=question.tuning,
        lora_rank=question.lora_rank,
        offload=question.offload,
    )


def machine_and_layout(question: LayoutQuestion, desk: Desk) -> tuple[Topology, TrainingLayout]:
    """The machine, with as many GPUs as the layout takes, and the layout."""
    model_ranks = question.tp * question.pp * question.cp
    wanted = question.gpus or question.mock_gpus or (model_ranks * question.dp if question.dp else 0)
    topology = topology_for(question, desk, gpus=wanted)
    if topology.gpus < model_ranks and not wanted:
        topology = topology_for(question, desk, gpus=model_ranks)
    layout = layout_of(question, topology)
    return topology, layout


def layout_view(layout: TrainingLayout) -> LayoutView:
    """A layout as it is shown."""
    return LayoutView(
        name=layout_name(layout),
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        cp=layout.cp,
        ep=layout.ep,
        sp=layout.has_sequence_parallel and layout.tp > 1,
        virtual_stages=layout.virtual_stages,
        world_size=layout.gpus,
        global_batch=layout.global_batch,
        micro_batch_size=layout.micro_batch,
        num_micro_batches=layout.microbatches,
        gradient_accumulation=layout.microbatches,
        effective_batch_size=layout.global_batch,
        seq_length=layout.seq,
        precision=layout.precision,
        sharding=layout.sharding,
        optimizer=layout.optimizer,
        activation_checkpointing=layout.recompute,
        schedule=layout.schedule,
        offload=layout.offload,
    )


def layout_name(layout: TrainingLayout) -> str:
    """`TP2_PP4_DP8`, with the other degrees where they are used."""
    parts = [f"TP{layout.tp}", f"PP{layout.pp}", f"DP{layout.dp}"]
    parts += [f"{word}{degree}" for word, degree in (("CP", layout.cp), ("EP", layout.ep)) if degree > 1]
    return "_".join(parts)


def memory_view(memory: TrainingMemory) -> MemoryBreakdown:
    """The parts of a memory estimate in GB."""
    parts = memory.parts
    return MemoryBreakdown(
        parameters=parts.weights / GB,
        gradients=parts.gradients / GB,
        optimizer_states=parts.optimizer / GB,
        activations=parts.activations / GB,
        logits=parts.logits / GB,
        communication=parts.buffers / GB,
        context=parts.context / GB,
        fragmentation=parts.fragmentation / GB,
        total=parts.total / GB,
    )
