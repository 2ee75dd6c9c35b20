"""What answers of searches share: the base of a search, how its choices are shown, what the old planner called them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.errors import NothingFits
from head.planner.calibration.quantity import Quantity
from head.planner.endpoints.layouts import (
    GB,
    LayoutView,
    MemoryBreakdown,
    layout_name,
    layout_view,
    memory_view,
    optimizer_of,
    precision_of,
)
from head.planner.endpoints.questions import Batch, Desk, PlacedQuestion, Tokens, topology_for
from head.planner.endpoints.serving_search import ServingChoice
from head.planner.endpoints.training_time import shares
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout
from head.planner.training.search import Choice, Dropped, Remedy, SearchResult
from head.planner.training.step_time import StepTime
from head.planner.training.step_time import estimate as estimate_step

Goal = Literal["throughput", "latency", "memory", "efficiency"]
TOP = 5


class SearchQuestion(PlacedQuestion, frozen=True, kw_only=True):
    """What to train, in which batch; the layout is searched."""

    batch_size: Annotated[Batch, Meta(description="Sequences of a step on each GPU's share; see global_batch.")] = 1
    global_batch: Annotated[int, Meta(ge=0, le=1 << 24, description="Sequences of a step; 0: batch_size x GPUs.")] = 0
    seq_length: Annotated[Tokens, Meta(description="Tokens of a sequence.")] = 2048
    precision: Annotated[str, Meta(max_length=16, description="bf16, fp16, fp8, mxfp8, nvfp4, fp32.")] | None = None
    optimizer: Annotated[str, Meta(max_length=32, description="adamw, adamw_8bit, adafactor, lion, sgd, muon, ...")] = (
        "adamw"
    )
    tuning: Annotated[Literal["full", "lora", "qlora"], Meta(description="What is trained.")] = "full"
    lora_rank: Annotated[int, Meta(ge=1, le=4_096, description="Of adapters.")] = 16
    stack: Annotated[
        str,
        Meta(max_length=64, description="Software: megatron, nemo, deepspeed, fsdp, torchtitan, mosaicml, maxtext."),
    ] = ""


class ChoiceAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """What a layout would do; GB are 1e9 bytes. Serving has no step, MFU or probability to fit: they are null."""

    memory_per_gpu_gb: float
    peak_memory_gb: float
    memory_headroom_gb: float
    fits_in_memory: bool
    fit_probability: float | None
    estimated_throughput_tps: float
    throughput: Quantity
    estimated_latency_ms: float
    step_s: Quantity | None
    mfu: Quantity | None
    compute_efficiency: float
    communication_overhead: float
    pipeline_bubble_fraction: float
    bottleneck: str
    cost_per_million_tokens_usd: float | None
    memory: MemoryBreakdown


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """One layout with its reasons. `score` is 100 for the best of the answer, proportional for the others.

    `serving` has the engine's settings and latencies where the question was about inference.
    """

    strategy: LayoutView
    tp: int
    pp: int
    dp: int
    analysis: ChoiceAnalysis
    score: float
    rationale: tuple[str, ...]
    warnings: tuple[str, ...]
    optimizations: tuple[str, ...] = ()
    serving: ServingChoice | None = None


class DroppedView(msgspec.Struct, frozen=True, kw_only=True):
    """Layouts that one check dropped."""

    reason: str
    count: int
    message: str


class SearchedView(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked through: examined = feasible + dropped."""

    examined: int
    feasible: int
    dropped: tuple[DroppedView, ...]
    notes: tuple[str, ...]


class TopologySummary(msgspec.Struct, frozen=True, kw_only=True):
    """The machine of a plan, and where it comes from."""

    source: str
    accelerator: str
    gpus: int
    gpus_per_node: int
    nodes: int
    memory_gb: float
    num_gpus: int
    num_nodes: int
    total_memory_gb: float
    notes: tuple[str, ...]


def topology_summary(topology: Topology) -> TopologySummary:
    """The machine in short; /topology has all of it."""
    return TopologySummary(
        source=topology.source,
        accelerator=topology.accelerator.name,
        gpus=topology.gpus,
        gpus_per_node=topology.gpus_per_node,
        nodes=topology.nodes,
        memory_gb=topology.accelerator.visible_bytes / GB,
        num_gpus=topology.gpus,
        num_nodes=topology.nodes,
        total_memory_gb=topology.gpus * topology.accelerator.visible_bytes / GB,
        notes=topology.notes,
    )


def base_of(question: SearchQuestion, topology: Topology) -> TrainingLayout:
    """What a search starts from: everything but the degrees."""
    return TrainingLayout(
        dp=topology.gpus,
        global_batch=question.global_batch or question.batch_size * topology.gpus,
        seq=question.seq_length,
        precision=precision_of(question.precision or "bf16"),
        optimizer=optimizer_of(question.optimizer),
        tuning=question.tuning,
        lora_rank=question.lora_rank,
    )


def machine_of(question: PlacedQuestion, desk: Desk) -> Topology:
    """The machine of a search."""
    return topology_for(question, desk)


def recommendations(
    arch: Architecture, topology: Topology, choices: Sequence[Choice], stack: str
) -> tuple[Recommendation, ...]:
    """Choices as they are shown, the best with 100 points."""
    best = max((choice.score for choice in choices), default=0.0)
    return tuple(recommendation(arch, topology, choice, stack, best) for choice in choices)


def recommendation(
    arch: Architecture, topology: Topology, choice: Choice, stack: str, best_score: float
) -> Recommendation:
    """One choice with its step's parts."""
    part = topology if choice.gpus == topology.gpus else topology.with_gpus(choice.gpus)
    step = estimate_step(arch, part, choice.layout, stack or "unknown")
    return Recommendation(
        strategy=layout_view(choice.layout),
        tp=choice.layout.tp,
        pp=choice.layout.pp,
        dp=choice.layout.dp,
        analysis=analysis_of(choice, step),
        score=100.0 * choice.score / best_score if best_score > 0 else 0.0,
        rationale=choice.rationale,
        warnings=choice.warnings,
        optimizations=optimizations_of(choice.layout, step, part),
    )


def analysis_of(choice: Choice, step: StepTime) -> ChoiceAnalysis:
    """Memory and time of one choice."""
    found = shares(step.parts)
    return ChoiceAnalysis(
        memory_per_gpu_gb=choice.memory.parts.total / GB,
        peak_memory_gb=choice.memory.total.high / GB,
        memory_headroom_gb=choice.memory.headroom_bytes / GB,
        fits_in_memory=choice.memory.headroom_bytes >= 0,
        fit_probability=choice.memory.fit_probability,
        estimated_throughput_tps=step.tokens_per_s.value,
        throughput=step.tokens_per_s,
        estimated_latency_ms=1e3 * step.step_s.value,
        step_s=step.step_s,
        mfu=step.mfu,
        compute_efficiency=min(1.0, step.mfu.value),
        communication_overhead=found["communication"],
        pipeline_bubble_fraction=found["bubble"],
        bottleneck=step.bottleneck,
        cost_per_million_tokens_usd=choice.cost_usd,
        memory=memory_view(choice.memory),
    )


def optimizations_of(layout: TrainingLayout, step: StepTime, topology: Topology) -> tuple[str, ...]:
    """What is worth trying next, each with the share of the step that it is about."""
    total = math.fsum(step.parts.values())
    found = []
    if layout.precision in ("bf16", "fp16") and topology.accelerator.has_units_for("fp8"):
        share = step.parts["linear"] + step.parts["experts"]
        found.append(f"fp8 products: {share / total:.0%} of the step is matrix products that {layout.precision} runs")
    if step.parts["bubble"] > 0.05 * total:
        found.append(f"virtual stages or more micro-batches: the bubble is {step.parts['bubble'] / total:.0%}")
    if step.parts["launch_wait"] + step.parts["kernel_gaps"] > 0.1 * total:
        found.append("CUDA graphs or torch.compile: launching kernels is over a tenth of the step")
    if step.parts["data_parallel"] + step.parts["sharded_parameters"] > 0.1 * total:
        found.append("overlap gradient exchange and gathers with computing, or accumulate over more micro-batches")
    return tuple(found)


def searched_view(result: SearchResult) -> SearchedView:
    """What was examined and dropped."""
    return SearchedView(
        examined=result.examined,
        feasible=result.feasible,
        dropped=tuple(dropped_view(drop) for drop in result.dropped),
        notes=result.notes,
    )


def dropped_view(drop: Dropped) -> DroppedView:
    """One reason with an example."""
    return DroppedView(reason=drop.reason, count=drop.count, message=f"{layout_name(drop.example)}: {drop.message}")


def require(result: SearchResult) -> Choice:
    """The first choice. Raises: NothingFits, with remedies as questions that /plan/validate answers with valid."""
    try:
        return result.require()
    except NothingFits as error:
        error.details["remedies"] = [remedy_view(remedy) for remedy in result.remedies]
        raise


def remedy_view(remedy: Remedy) -> dict[str, object]:
    """A remedy with the question to ask of /plan/validate, beside the model and the machine."""
    layout = remedy.layout
    asked: dict[str, object] = {
        "gpus": remedy.gpus,
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "cp": layout.cp,
        "ep": layout.ep,
        "global_batch": layout.global_batch,
        "micro_batch": layout.micro_batch,
        "seq_length": layout.seq,
        "precision": layout.precision,
        "optimizer": layout.optimizer,
        "sharding": layout.sharding,
        "checkpointing": layout.recompute,
        "tuning": layout.tuning,
        "lora_rank": layout.lora_rank,
        "offload": layout.offload,
    }
    if remedy.accelerator:
        asked["gpu"] = remedy.accelerator
    return {"name": remedy.name, "message": remedy.message, "gpus": remedy.gpus, "validate": asked}


def remedy_text(remedy: Remedy) -> str:
    """A remedy in one line."""
    return f"{remedy.message} ({layout_name(remedy.layout)}, {remedy.gpus} GPUs)"
