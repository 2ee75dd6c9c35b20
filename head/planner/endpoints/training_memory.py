"""Memory of a training layout: memory, batchsize."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from common.errors import NothingFits
from head.planner.calibration.quantity import Quantity
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import TopologySummary, topology_summary
from head.planner.endpoints.layouts import (
    GB,
    LayoutQuestion,
    LayoutView,
    MemoryBreakdown,
    layout_view,
    machine_and_layout,
    memory_view,
)
from head.planner.endpoints.questions import Desk, architecture_for
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.serving.engine_step import ServingLayout, device_of, precision_of
from head.planner.serving.memory import activation_peak_bytes, kv_bytes_of_sequence, overhead_bytes, weights_bytes
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import TrainingMemory, estimate_memory
from head.planner.training.step_time import step_seconds

CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)


class MemoryQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """Memory of the fullest GPU. Without training: weights, KV cache and activations of batch_size sequences."""

    training: Annotated[bool, Meta(description="Training; otherwise inference.")] = True


class BatchsizeQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """The largest micro-batch that fits."""

    target_batch: Annotated[
        int, Meta(ge=0, le=1 << 24, description="Sequences of a step to reach by accumulation; 0: none.")
    ] = 0


class MemorySaving(msgspec.Struct, frozen=True, kw_only=True):
    """One change and what it saves, by the same model."""

    technique: str
    savings_gb: float
    difficulty: str
    impact: str


class MemoryDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What the memory is of."""

    model_params_billion: float
    precision: str
    optimizer: str
    gradient_checkpointing: str
    parallelism: dict[str, int]
    fullest_stage: str
    topology_source: str
    accelerator: str
    notes: tuple[str, ...] = ()


class MemoryAnswer(Answer, frozen=True, kw_only=True):
    """Memory of the fullest GPU in GB (1e9 bytes), whether it fits, and what would make it smaller."""

    model: str
    total_memory_gb: float
    memory: Quantity
    capacity_gb: float
    headroom_gb: float
    fits: bool
    verdict: str
    fit_probability: float
    breakdown: dict[str, float]
    details: MemoryDetails
    savings_opportunities: tuple[MemorySaving, ...] = ()


class BatchPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Memory at one micro-batch."""

    batch_size: int
    memory_gb: float
    fits: bool


class RecommendedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What to set: a little below the largest that fits."""

    batch_size: int
    gradient_accumulation: int
    effective_batch_size: int


class BatchsizeAnswer(Answer, frozen=True, kw_only=True):
    """The largest micro-batch whose central estimate fits, and a smaller one that fits with near certainty."""

    model: str
    max_batch_size: int
    memory_at_max_gb: float
    memory_headroom_gb: float
    throughput_estimate_tps: float
    recommended: RecommendedBatch
    search_iterations: int
    memory_curve: tuple[BatchPoint, ...]
    layout: LayoutView
    convention: str
    topology: TopologySummary


def memory(question: MemoryQuestion, desk: Desk) -> MemoryAnswer:
    """The parts, the verdict, and savings that were each computed with the same model."""
    arch = architecture_for(question, desk)
    topology, layout = machine_and_layout(question, desk)
    if not question.training:
        return _inference_memory(question, arch, topology)
    found = estimate_memory(arch, topology, layout, stack=question.stack)
    view = memory_view(found)
    return MemoryAnswer(
        model=arch.name,
        total_memory_gb=view.total,
        memory=found.total,
        capacity_gb=found.capacity_bytes / GB,
        headroom_gb=found.headroom_bytes / GB,
        fits=found.headroom_bytes >= 0,
        verdict=found.verdict,
        fit_probability=found.fit_probability,
        breakdown=_without_total(view),
        details=_details(arch, topology, layout, found.stage),
        savings_opportunities=_savings(arch, topology, layout, found, question.stack),
    )


def _without_total(view: MemoryBreakdown) -> dict[str, float]:
    parts = msgspec.structs.asdict(view)
    del parts["total"]
    return parts


def _details(arch: Architecture, topology: Topology, layout: TrainingLayout, stage: str) -> MemoryDetails:
    return MemoryDetails(
        model_params_billion=count(arch).total / 1e9,
        precision=layout.precision,
        optimizer=layout.optimizer,
        gradient_checkpointing=layout.recompute,
        parallelism={"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "ep": layout.ep},
        fullest_stage=stage,
        topology_source=topology.source,
        accelerator=topology.accelerator.name,
        notes=topology.notes,
    )


def _inference_memory(question: MemoryQuestion, arch: Architecture, topology: Topology) -> MemoryAnswer:
    """Weights, KV cache of batch_size sequences of seq_length, activations and the rest, per rank of tp x pp."""
    ranks = ServingLayout(tp=question.tp, pp=question.pp, ep=question.ep if question.ep <= question.tp else 1)
    precision = precision_of(arch, "" if question.precision == "bf16" else question.precision, "", device_of(topology))
    batch = question.batch_size
    parts = {
        "parameters": weights_bytes(arch, ranks, precision),
        "kv_cache": batch * kv_bytes_of_sequence(arch, ranks, precision, question.seq_length),
        "activations": activation_peak_bytes(
            arch, ranks, batched_tokens=min(8_192, question.seq_length), sequences=batch
        ),
        "context": overhead_bytes(ranks, is_large_gpu=topology.has_scaleup),
    }
    total = math.fsum(parts.values())
    capacity = float(topology.accelerator.visible_bytes)
    layout = TrainingLayout(tp=question.tp, pp=question.pp, precision=question.precision, optimizer="none")
    return MemoryAnswer(
        model=arch.name,
        total_memory_gb=total / GB,
        memory=Quantity(
            value=total,
            unit="bytes",
            low=0.95 * total,
            high=1.08 * total,
            convention="one rank of the engine: weights, KV cache of the batch, activation peak, context",
            calibration="closed forms, 12 vLLM start-up logs",
        ),
        capacity_gb=capacity / GB,
        headroom_gb=(capacity - total) / GB,
        fits=total <= capacity,
        verdict="fits" if total <= capacity else "does_not_fit",
        fit_probability=1.0 if total * 1.08 <= capacity else 0.0 if total * 0.95 > capacity else 0.5,
        breakdown={name: value / GB for name, value in parts.items()},
        details=_details(arch, topology, layout, "whole"),
    )


Change = Callable[[TrainingLayout], TrainingLayout]
_CHANGES: tuple[tuple[str, str, str, Change], ...] = (
    (
        "selective activation recomputation",
        "low",
        "a few per cent more time",
        lambda layout: msgspec.structs.replace(layout, recompute="selective"),
    ),
    (
        "full activation recomputation",
        "low",
        "about a third more compute",
        lambda layout: msgspec.structs.replace(layout, recompute="full"),
    ),
    (
        "half the micro-batch",
        "low",
        "smaller products, more steps of accumulation",
        lambda layout: msgspec.structs.replace(layout, micro_batch=max(1, layout.micro_batch // 2)),
    ),
    (
        "distributed optimizer (ZeRO-1)",
        "low",
        "none: the gradient exchange stays as large",
        lambda layout: msgspec.structs.replace(layout, sharding="zero1"),
    ),
    (
        "fully sharded weights (FSDP, ZeRO-3)",
        "medium",
        "gathers weights twice a micro-batch",
        lambda layout: msgspec.structs.replace(layout, sharding="fsdp"),
    ),
    (
        "8-bit optimizer states",
        "low",
        "check the loss curve",
        lambda layout: msgspec.structs.replace(layout, optimizer="adamw_8bit"),
    ),
    (
        "optimizer in host memory",
        "medium",
        "the PCIe transfer of gradients and weights each step",
        lambda layout: msgspec.structs.replace(layout, offload="optimizer"),
    ),
    (
        "LoRA instead of all weights",
        "medium",
        "trains adapters only",
        lambda layout: msgspec.structs.replace(layout, tuning="lora"),
    ),
)


def _savings(
    arch: Architecture, topology: Topology, layout: TrainingLayout, found: TrainingMemory, stack: str
) -> tuple[MemorySaving, ...]:
    """Every single change that saves at least a hundredth, most first."""
    rows = []
    for technique, difficulty, impact, change in _CHANGES:
        changed = change(layout)
        if changed == layout:
            continue
        saved = (found.parts.total - estimate_memory(arch, topology, changed, stack=stack).parts.total) / GB
        if saved > 0.01 * found.parts.total / GB:
            rows.append(MemorySaving(technique=technique, savings_gb=saved, difficulty=difficulty, impact=impact))
    return tuple(sorted(rows, key=lambda row: -row.savings_gb))


def batchsize(question: BatchsizeQuestion, desk: Desk) -> BatchsizeAnswer:
    """By doubling and halving over the micro-batch: the memory grows with it."""
    arch = architecture_for(question, desk)
    topology, layout = machine_and_layout(question, desk)
    asked: dict[int, TrainingMemory] = {}

    def at(micro: int) -> TrainingMemory:
        if micro not in asked:
            asked[micro] = estimate_memory(arch, topology, _with_micro(layout, micro), stack=question.stack)
        return asked[micro]

    def fits(micro: int) -> bool:
        return at(micro).headroom_bytes >= 0

    if not fits(1):
        total = at(1).parts.total
        raise NothingFits(
            f"{arch.name}: one sequence of {layout.seq} tokens needs {total / GB:.1f} GB of"
            f" {at(1).capacity_bytes / GB:.1f} GB",
            hint="more tensor, pipeline or data parallelism with sharding, recomputation, offload or LoRA",
            breakdown=_without_total(memory_view(at(1))),
            savings=[
                msgspec.structs.asdict(row)
                for row in _savings(arch, topology, _with_micro(layout, 1), at(1), question.stack)
            ],
        )
    low, high = 1, 2
    while high <= CURVE[-1] * 64 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    best, iterations = at(low), len(asked)
    chosen = low
    while chosen > 1 and at(chosen).verdict != "fits":
        chosen = min(chosen - 1, chosen * 19 // 20)
    target = question.target_batch or question.global_batch
    accumulation = max(1, -(-target // (chosen * layout.dp)))
    seconds = step_seconds(arch, topology, _with_micro(layout, low), question.stack)
    return BatchsizeAnswer(
        model=arch.name,
        max_batch_size=low,
        memory_at_max_gb=best.parts.total / GB,
        memory_headroom_gb=best.headroom_bytes / GB,
        throughput_estimate_tps=_with_micro(layout, low).global_batch * layout.seq / seconds,
        recommended=RecommendedBatch(
            batch_size=chosen,
            gradient_accumulation=accumulation,
            effective_batch_size=chosen * accumulation * layout.dp,
        ),
        search_iterations=iterations,
        memory_curve=tuple(
            BatchPoint(batch_size=size, memory_gb=at(size).parts.total / GB, fits=fits(size))
            for size in CURVE
            if size <= max(8, 4 * low)
        ),
        layout=layout_view(_with_micro(layout, low)),
        topology=topology_summary(topology),
        convention="micro-batch of one data-parallel rank; pipelines run as many as they have stages; recommended: "
        "fits with the probability that the verdict `fits` stands for",
    )


def _with_micro(layout: TrainingLayout, micro: int) -> TrainingLayout:
    return msgspec.structs.replace(layout, micro_batch=micro, global_batch=micro * layout.pp * layout.dp)


ENDPOINTS = (
    Endpoint(
        "memory",
        "memory",
        MemoryQuestion,
        MemoryAnswer,
        memory,
        "Memory of the fullest GPU, by part",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("dp", 8), ("sharding", "fsdp")),
        codes=("model_not_found", "not_found", "nothing_fits"),
    ),
    Endpoint(
        "batchsize",
        "batch-size",
        BatchsizeQuestion,
        BatchsizeAnswer,
        batchsize,
        "The largest micro-batch that fits",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("dp", 8), ("sharding", "fsdp")),
        codes=("model_not_found", "not_found", "nothing_fits"),
    ),
)
