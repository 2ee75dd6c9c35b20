"""Where a training configuration lies among the measured ones: a position whose distances mean likeness.

One unit is about a doubling of something that matters much (hidden width, tensor parallel degree) or a change of kind.
"""

from __future__ import annotations

import math
from functools import lru_cache

from head.planner.calibration.training_rows import TrainingRow, shipped_rows
from head.planner.hardware.accelerators import canonical_precision
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.constants import family_of
from head.planner.training.layout import TrainingLayout

FAR = 99.0
Placed = tuple[TrainingRow, tuple[float, ...]]
_WIDTH_STEPS = {"fp4": 3.0, "fp8": 1.5, "int8": 1.5}
_SHARDING_STEPS = {"none": 0.0, "zero1": 0.0, "zero2": 1.0}
_RECOMPUTE_STEPS = {"none": 0.0, "selective": 1.0, "full": 2.0}


def position_of(arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str) -> tuple[float, ...]:
    """Coordinates of a question."""
    experts = [group.feed_forward for group in arch.groups if group.feed_forward.kind == "moe"]
    kinds = {group.attention.kind for group in arch.groups}
    heads = next((group.attention.heads for group in arch.groups if group.attention.heads), 32)
    device = topology.accelerator
    precision = _WIDTH_STEPS.get(canonical_precision(layout.precision), 0.0)
    return (
        math.log2(max(arch.hidden, 1)),
        math.log2(max(arch.layers, 1)),
        math.log2(max((group.feed_forward.width for group in arch.groups), default=1) or 1),
        math.log2(max((part.experts for part in experts), default=1)) / 2,
        math.log2(max((part.active for part in experts), default=1)),
        3.0 * bool(kinds & {"mla", "sparse_mla", "compressed"}),
        3.0 * bool(kinds & {"mamba", "linear"}),
        3.0 * (len({group.attention.window for group in arch.groups}) > 1),
        math.log2(heads),
        _release(stack) * 4.0,
        math.log2(device.peak_flops("fp16") / 1e12) * 2.0,
        math.log2(device.memory_bytes_per_s / 1e12) * 3.0,
        3.0 * (topology.scaleup_gpus > 8),
        precision + (0.7 if layout.precision == "mxfp8" else 0.0),
        math.log2(layout.tp),
        math.log2(layout.pp),
        math.log2(layout.virtual_stages) / 2,
        math.log2(layout.cp),
        math.log2(layout.ep) / 2,
        math.log2(layout.micro_batch),
        math.log2(layout.seq) / 2,
        math.log2(layout.microbatches) / 3,
        math.log2(layout.gpus) / 3,
        _RECOMPUTE_STEPS[layout.recompute],
        _SHARDING_STEPS.get(layout.sharding, 1.5),
        0.0 if layout.tuning == "full" else 2.0,
    )


def _release(stack: str) -> float:
    """The release of a stack in years ("megatron-bridge@26.04" is 26.33); 0 when none is named."""
    year, _, month = stack.partition("@")[2].partition(".")
    if not (year.isdigit() and month.isdigit()):
        return 0.0
    return int(year) + int(month) / 12.0


@lru_cache(maxsize=8)
def rows_by_family(extra: tuple[TrainingRow, ...] = ()) -> dict[str, tuple[Placed, ...]]:
    """Fitted rows with their positions, by stack family: the shipped ones and `extra`."""
    found: dict[str, list[Placed]] = {}
    for row in (*shipped_rows(), *extra):
        if row.is_fitted:
            position = position_of(row.architecture, row.topology(), row.layout, row.stack)
            found.setdefault(family_of(row.stack), []).append((row, position))
    return {family: tuple(rows) for family, rows in found.items()}


def neighbours(
    position: tuple[float, ...], family: str, extra: tuple[TrainingRow, ...] = ()
) -> list[tuple[str, float]]:
    """Id and distance of every fitted row of a stack family."""
    return [(row.id, math.dist(position, there)) for row, there in rows_by_family(extra).get(family, ())]


def distance_to(position: tuple[float, ...], stack: str, extra: tuple[TrainingRow, ...] = ()) -> float:
    """Distance to the nearest fitted row of the same stack family; `FAR` without one."""
    return min((distance for _, distance in neighbours(position, family_of(stack), extra)), default=FAR)
