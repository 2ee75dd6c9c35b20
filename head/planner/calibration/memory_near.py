"""The measured peaks that are most like a question, with what the planner says of them.

Distance is over what decides memory: the program, parameters and layers of the model, tokens and states on one GPU, and
whether activations are recomputed. A distance of 1 is about a factor of e in one of them, or another program.
"""

from __future__ import annotations

import math
from functools import cache

import msgspec

from head.planner.calibration.memory_rows import MemoryRow, answer, shipped_rows
from head.planner.calibration.quantity import NearRow
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import TrainingMemory, estimate_memory
from head.planner.training.memory_stack import MemoryStack, program_of

Position = tuple[float, ...]


def explained_memory(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    *,
    stack: MemoryStack | str | None = None,
    rows: int = 3,
) -> TrainingMemory:
    """`estimate_memory` with the nearest measured rows in its total."""
    program = program_of(stack, layout)
    found = estimate_memory(arch, topology, layout, stack=program)
    near = nearest_rows(arch, layout, program.name, rows)
    return msgspec.structs.replace(found, total=msgspec.structs.replace(found.total, near=near))


def nearest_rows(arch: Architecture, layout: TrainingLayout, stack: str, rows: int = 3) -> tuple[NearRow, ...]:
    """The `rows` nearest measured peaks, nearest first, equal distances in the order of the rows."""
    here = _position(count(arch).total, arch, layout)
    measured = []
    for index, (row, place, predicted) in enumerate(_placed()):
        apart = math.dist(here, place) + (0.0 if row.stack == stack else 1.0)
        measured.append((apart, index, row, predicted))
    return tuple(
        NearRow(id=row.id, source=row.source, measured=row.peak_bytes, predicted=predicted, distance=round(apart, 3))
        for apart, _, row, predicted in sorted(measured, key=lambda item: item[:2])[:rows]
    )


@cache
def _placed() -> tuple[tuple[MemoryRow, Position, float], ...]:
    return tuple(
        (row, _position(count(row.architecture).total, row.architecture, row.layout), answer(row).predicted)
        for row in shipped_rows()
        if not row.is_oom
    )


def _position(params: int, arch: Architecture, layout: TrainingLayout) -> Position:
    ranks = layout.dp * layout.cp if layout.sharding in ("zero3", "fsdp", "hsdp") else 1
    return (
        math.log(params),
        math.log(arch.layers),
        math.log(params / (layout.tp * layout.pp * ranks)),
        math.log(layout.micro_batch * layout.seq / layout.cp),
        {"none": 0.0, "selective": 1.0, "full": 2.0}[layout.recompute],
        {"full": 0.0, "lora": 2.0, "qlora": 3.0}[layout.tuning],
    )
