"""The measured training rows most like a question."""

from __future__ import annotations

import heapq
import math

from head.planner.calibration.training_features import rows_by_family
from head.planner.calibration.training_rows import TrainingRow

# Another stack is as far as a change of precision: its rows tell less than those of the stack asked for.
_OTHER_STACK = 3.0


def nearest(
    position: tuple[float, ...], family: str, count: int, extra: tuple[TrainingRow, ...] = ()
) -> list[tuple[TrainingRow, float]]:
    """The `count` fitted rows nearest to `position`, nearest first; other stacks count as farther."""
    found = (
        (math.dist(position, there) + (0.0 if name == family else _OTHER_STACK), row.id, row)
        for name, rows in rows_by_family(extra).items()
        for row, there in rows
    )
    return [(row, distance) for distance, _, row in heapq.nsmallest(count, found, key=lambda item: item[:2])]
