"""Time of a training layout: bottleneck, estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from head.planner.calibration.quantity import Quantity
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layouts import GB, LayoutQuestion, LayoutView, layout_view, machine_and_layout
from head.planner.endpoints.questions import Count, Desk, ModelQuestion, Positive, architecture_for
from head.planner.model.parameters import count
from head.planner.training.memory import estimate_memory
from head.planner.training.step_time import StepTime
from head.planner.training.step_time import estimate as estimate_step

_COMPUTE = ("linear", "experts", "attention", "logits")
_MEMORY = ("memory_traffic", "optimizer")
_COMMUNICATION = (
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "pipeline_messages",
    "sharded_parameters",
    "data_parallel",
)
_SECONDARY_SHARE = 0.15

# Bytes that a checkpoint holds for each parameter: 16-bit weights, fp32 master, both moments.
# Source: BigScience BLOOM-176B, 2.3 TB for 176 billion parameters; planner notes 2.3.
CHECKPOINT_BYTES = 14
WEIGHTS_BYTES = 2
KEPT_CHECKPOINTS = 5

_ADVICE = {
    "compute": "the step is bound by matrix products: fp8 where the accelerator has it, less recomputation",
    "communication": "exchange binds the step: less tensor parallelism, larger micro-batches, a faster network",
    "memory_access": "memory traffic binds the step: fused kernels (torch.compile, flash attention), larger products",
    "bubble": "the pipeline idles: more micro-batches per step, virtual stages, or fewer stages",
    "overhead": "launching kernels binds the step: CUDA graphs or torch.compile, larger micro-batches",
}


class BottleneckQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """What a training step waits for."""


class BottleneckAnswer(Answer, frozen=True, kw_only=True):
    """Shares of the step's time; `time_breakdown` sums to 1 (other: launches), utilisations are in [0, 1]."""

    model: str
    primary_bottleneck: str
    secondary_bottleneck: str | None
    bottleneck_severity: float
    utilization: dict[str, float]
    time_breakdown: dict[str, float]
    parts_s: dict[str, float]
    step_s: Quantity
    tokens_per_s: Quantity
    mfu: Quantity
    hfu: Quantity
    recommendations: tuple[str, ...]
    layout: LayoutView
    topology_source: str
    notes: tuple[str, ...] = ()


class EstimateQuestion(ModelQuestion, frozen=True, kw_only=True):
    """How long a whole training takes and what it costs, at a throughput that is known."""

    tokens: Annotated[Positive, Meta(description="Tokens to train on.")] = 1e12
    throughput: Annotated[Positive, Meta(description="Tokens per second of all GPUs together.")] = 1e5
    gpus: Annotated[Count, Meta(description="GPUs.")] = 8
    gpu_cost: Annotated[float, Meta(ge=0, le=1e6, description="Dollars per GPU and hour.")] = 4.0
    checkpoint_interval: Annotated[float, Meta(ge=1, le=1e18, description="Tokens between checkpoints.")] = 1e9
    gpu_watts: Annotated[float, Meta(ge=0, le=1e5, description="Power of a GPU with its share of the node.")] = 1_000.0


class EstimateTime(msgspec.Struct, frozen=True, kw_only=True):
    """The same time three times."""

    seconds: float
    hours: float
    days: float


class EstimateCost(msgspec.Struct, frozen=True, kw_only=True):
    """Dollars."""

    gpu_hours: float
    estimated_cost: float
    cost_per_gpu: float
    cost_per_million_tokens: float


class EstimateCheckpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Files that a run writes; GB of 1e9 bytes."""

    interval_tokens: float
    num_checkpoints: int
    size_per_checkpoint_gb: float
    weights_only_gb: float
    kept: int
    total_storage_gb: float
    all_kept_gb: float


class EstimateAnswer(Answer, frozen=True, kw_only=True):
    """Time, cost, energy and checkpoints, in parts and, for old clients, flat."""

    model: str
    total_tokens: float
    throughput_tps: float
    num_gpus: int
    time: EstimateTime
    cost: EstimateCost
    checkpoints: EstimateCheckpoints
    energy_mwh: float
    model_flops: float
    model_flops_per_s_per_gpu: float
    chinchilla_tokens: float
    training_time_hours: float
    training_time_days: float
    total_cost_usd: float
    cost_per_gpu_usd: float
    num_checkpoints: int
    checkpoint_size_gb: float
    total_checkpoint_storage_gb: float
    gpu_hourly_cost: float
    convention: str


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts of a step as shares of its time: compute, communication, memory_access, bubble, overhead."""
    total = math.fsum(parts.values()) or 1.0
    sums = {
        "compute": math.fsum(parts[name] for name in _COMPUTE),
        "communication": math.fsum(parts[name] for name in _COMMUNICATION),
        "memory_access": math.fsum(parts[name] for name in _MEMORY),
        "bubble": parts["bubble"],
    }
    found = {name: value / total for name, value in sums.items()}
    found["overhead"] = max(0.0, 1.0 - math.fsum(found.values()))
    return found


def bottleneck(question: BottleneckQuestion, desk: Desk) -> BottleneckAnswer:
    """The largest share, the next one when it matters, and what would help."""
    arch = architecture_for(question, desk)
    topology, layout = machine_and_layout(question, desk)
    step = estimate_step(arch, topology, layout, question.stack)
    memory = estimate_memory(arch, topology, layout, stack=question.stack)
    found = shares(step.parts)
    order = sorted(found, key=lambda name: -found[name])
    return BottleneckAnswer(
        model=arch.name,
        primary_bottleneck=order[0],
        secondary_bottleneck=order[1] if found[order[1]] >= _SECONDARY_SHARE else None,
        bottleneck_severity=found[order[0]],
        utilization={
            "compute": min(1.0, step.hfu.value),
            "memory": min(1.0, memory.parts.total / memory.capacity_bytes),
            "communication": found["communication"],
            "memory_bandwidth": _bandwidth_share(step),
        },
        time_breakdown={"other" if name == "overhead" else name: share for name, share in found.items()},
        parts_s=step.parts,
        step_s=step.step_s,
        tokens_per_s=step.tokens_per_s,
        mfu=step.mfu,
        hfu=step.hfu,
        recommendations=tuple(_ADVICE[name] for name in order[:2] if found[name] >= _SECONDARY_SHARE),
        layout=layout_view(layout),
        topology_source=topology.source,
        notes=(*topology.notes, *step.notes),
    )


def _bandwidth_share(step: StepTime) -> float:
    """Share of the time in which memory traffic is what is waited for."""
    return min(1.0, math.fsum(step.parts[name] for name in _MEMORY) / step.step_s.value)


def estimate(question: EstimateQuestion, desk: Desk) -> EstimateAnswer:
    """Plain arithmetic on the throughput that is given; /recommend and /bottleneck predict throughputs."""
    arch = architecture_for(question, desk)
    counted = count(arch)
    seconds = question.tokens / question.throughput
    hours = seconds / 3_600
    gpu_hours = hours * question.gpus
    cost = gpu_hours * question.gpu_cost
    size = CHECKPOINT_BYTES * counted.total / GB
    number = int(question.tokens // question.checkpoint_interval)
    kept = min(number, KEPT_CHECKPOINTS)
    flops = 6.0 * counted.active_no_input_embedding * question.tokens
    return EstimateAnswer(
        model=arch.name,
        total_tokens=question.tokens,
        throughput_tps=question.throughput,
        num_gpus=question.gpus,
        time=EstimateTime(seconds=seconds, hours=hours, days=hours / 24),
        cost=EstimateCost(
            gpu_hours=gpu_hours,
            estimated_cost=cost,
            cost_per_gpu=cost / question.gpus,
            cost_per_million_tokens=cost / question.tokens * 1e6,
        ),
        checkpoints=EstimateCheckpoints(
            interval_tokens=question.checkpoint_interval,
            num_checkpoints=number,
            size_per_checkpoint_gb=size,
            weights_only_gb=WEIGHTS_BYTES * counted.total / GB,
            kept=kept,
            total_storage_gb=kept * size,
            all_kept_gb=number * size,
        ),
        energy_mwh=gpu_hours * question.gpu_watts / 1e6,
        model_flops=flops,
        model_flops_per_s_per_gpu=flops / seconds / question.gpus,
        chinchilla_tokens=20.0 * counted.total,
        training_time_hours=hours,
        training_time_days=hours / 24,
        total_cost_usd=cost,
        cost_per_gpu_usd=cost / question.gpus,
        num_checkpoints=number,
        checkpoint_size_gb=size,
        total_checkpoint_storage_gb=kept * size,
        gpu_hourly_cost=question.gpu_cost,
        convention=f"FLOPs 6 x active parameters without input embedding, no attention; checkpoints {CHECKPOINT_BYTES}"
        f" bytes a parameter (weights, fp32 master, two moments), the last {KEPT_CHECKPOINTS} kept; Chinchilla 20 N",
    )


ENDPOINTS = (
    Endpoint(
        "estimate",
        "estimate",
        EstimateQuestion,
        EstimateAnswer,
        estimate,
        "Time, cost and checkpoints of a training",
        example=(("model", "llama-3.1-70b"), ("gpus", 64), ("throughput", 60000.0)),
        codes=("model_not_found",),
    ),
    Endpoint(
        "bottleneck",
        "bottleneck",
        BottleneckQuestion,
        BottleneckAnswer,
        bottleneck,
        "What a training step waits for",
        example=(("model", "llama-3.1-70b"), ("gpu", "H100"), ("tp", 4), ("pp", 2), ("dp", 8)),
        codes=("model_not_found", "not_found", "nothing_fits"),
    ),
)
