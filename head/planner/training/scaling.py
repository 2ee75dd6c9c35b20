"""Strong and weak scaling of one layout over more GPUs, and the number of GPUs at which efficiency is still good.

Strong scaling keeps the global batch: the same step on more GPUs. Weak scaling keeps the batch of each data-parallel
rank: more tokens in each step. GPUs are added as data-parallel replicas, which is how runs grow; where no more replicas
fit the batch, the point says so instead of a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training import step_time
from head.planner.training.checks import first_failure
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import Verdict, estimate_memory
from head.planner.training.search import StepSeconds

EFFICIENCY_FLOOR = 0.8


class ScalingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One number of GPUs. efficiency: tokens per second and GPU over those of the base, at most 1."""

    gpus: int
    layout: TrainingLayout | None
    step_s: float = 0.0
    tokens_per_s: float = 0.0
    speedup: float = 0.0  # tokens per second over those of the base
    efficiency: float = 0.0
    communication_share: float = 0.0  # of the step's time in exchange and bubble, not overlapped
    memory_verdict: Verdict | None = None
    problem: str = ""  # why there is no number


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """Both curves. optimal_gpus: the most GPUs whose strong efficiency is at least `efficiency_floor`."""

    base_gpus: int
    strong: tuple[ScalingPoint, ...]
    weak: tuple[ScalingPoint, ...]
    optimal_gpus: int
    fastest_gpus: int
    efficiency_floor: float


_EXCHANGE = (
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "pipeline_messages",
    "sharded_parameters",
    "bubble",
    "data_parallel",
)


def scale(
    arch: Architecture,
    topology: Topology,
    base: TrainingLayout,
    gpu_counts: Sequence[int],
    *,
    stack: str = "",
    efficiency_floor: float = EFFICIENCY_FLOOR,
    step_seconds: StepSeconds | None = None,
) -> Scaling:
    """Curves over `gpu_counts` (multiples of the base layout's tp x pp x cp), the base first."""
    counts = sorted({base.gpus, *gpu_counts})
    strong = _curve(arch, topology, base, counts, stack, step_seconds, is_weak=False)
    weak = _curve(arch, topology, base, counts, stack, step_seconds, is_weak=True)
    usable = [point for point in strong if not point.problem and point.gpus >= base.gpus]
    good = [point.gpus for point in usable if point.efficiency >= efficiency_floor]
    return Scaling(
        base_gpus=base.gpus,
        strong=strong,
        weak=weak,
        optimal_gpus=max(good, default=base.gpus),
        fastest_gpus=max(usable, key=lambda point: (point.tokens_per_s, -point.gpus)).gpus if usable else base.gpus,
        efficiency_floor=efficiency_floor,
    )


def _curve(
    arch: Architecture,
    topology: Topology,
    base: TrainingLayout,
    counts: Sequence[int],
    stack: str,
    step_seconds: StepSeconds | None,
    *,
    is_weak: bool,
) -> tuple[ScalingPoint, ...]:
    measured = {count: _point(arch, topology, base, count, stack, step_seconds, is_weak=is_weak) for count in counts}
    start = measured[base.gpus]
    found = []
    for count in counts:
        point = measured[count]
        if not point.problem and not start.problem:
            speedup = point.tokens_per_s / start.tokens_per_s
            # against fewer GPUs than the base, replicas cost less exchange and may be better than it
            efficiency = speedup * base.gpus / count
            point = msgspec.structs.replace(
                point, speedup=speedup, efficiency=min(efficiency, 1.0) if count >= base.gpus else efficiency
            )
        found.append(point)
    return tuple(found)


def _point(
    arch: Architecture,
    topology: Topology,
    base: TrainingLayout,
    count: int,
    stack: str,
    step_seconds: StepSeconds | None,
    *,
    is_weak: bool,
) -> ScalingPoint:
    model_ways = base.tp * base.pp * base.cp
    if count % model_ways:
        return ScalingPoint(gpus=count, layout=None, problem=f"not a multiple of tp x pp x cp = {model_ways}")
    replicas = count // model_ways
    if is_weak:
        if base.global_batch * replicas % base.dp:
            return ScalingPoint(gpus=count, layout=None, problem="the batch of a replica is not whole")
        batch, micro = base.global_batch * replicas // base.dp, base.micro_batch
    else:
        if base.global_batch % replicas:
            return ScalingPoint(
                gpus=count,
                layout=None,
                problem=f"global batch {base.global_batch} does not divide by {replicas} replicas",
            )
        each = base.global_batch // replicas
        batch, micro = base.global_batch, max(size for size in range(1, base.micro_batch + 1) if each % size == 0)
    layout = msgspec.structs.replace(base, dp=replicas, global_batch=batch, micro_batch=micro)
    where = topology.with_gpus(count)
    failed = first_failure(arch, where, layout)
    if failed is not None:
        return ScalingPoint(gpus=count, layout=layout, problem=failed.message)
    memory = estimate_memory(arch, where, layout, stack=stack)
    exchange = 0.0
    if step_seconds is None:
        timed = step_time.estimate(arch, where, layout, stack or "unknown")
        seconds = timed.step_s.value
        exchange = sum(timed.parts[name] for name in _EXCHANGE if name in timed.parts) / seconds
    else:
        seconds = step_seconds(arch, where, layout)
    return ScalingPoint(
        gpus=count,
        layout=layout,
        step_s=seconds,
        tokens_per_s=batch * base.seq / seconds,
        communication_share=min(max(exchange, 0.0), 1.0),
        memory_verdict=memory.verdict,
    )
