"""Errors of the serving calibration out of sample: the fit of a fold never saw the rows it is measured on.

Needs numpy. The intervals that ship are the spread of these errors by nearness to the points that were trained on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence

import msgspec

from head.planner.calibration import serving_near as near
from head.planner.calibration import serving_step as step
from head.planner.calibration.serving_fit import Fitted, Prepared, base_tpot, base_ttft, fit, kernel, unique
from head.planner.calibration.serving_rows import ServingRow


class Outcome(msgspec.Struct, frozen=True):
    """One row out of sample: logarithms of predicted over measured, and how near the nearest trained point was."""

    row: ServingRow
    tpot: float
    ttft: float | None
    tpot_physics: float
    similarity: float


def predict(fitted: Fitted, trained: Sequence[Prepared], tested: Sequence[Prepared]) -> list[Outcome]:
    """`fitted` (from `trained`) on rows it has not seen."""
    import numpy as np

    trained = unique(trained)
    covariance, neighbours = kernel(tested, trained)
    tpot = np.clip(covariance @ np.array([point.tpot_weight for _, point in fitted.points]), -0.7, 0.7)
    ttft = np.clip(covariance @ np.array([point.ttft_weight for _, point in fitted.points]), -1.2, 1.2)
    nearest = neighbours.max(1) / near.LOCAL_SD**2
    found = []
    for index, p in enumerate(tested):
        base = base_tpot(fitted.multipliers, p)
        answer = max(base * math.exp(tpot[index]), p.floor_s)
        first = None
        if p.row.ttft_s > 0:
            value = base_ttft(fitted.multipliers, fitted.ttft, p) * math.exp(ttft[index])
            first = math.log(value / p.row.ttft_s)
        found.append(
            Outcome(
                row=p.row,
                tpot=math.log(answer / p.row.tpot_s),
                ttft=first,
                tpot_physics=math.log(base / p.row.tpot_s),
                similarity=float(nearest[index]),
            )
        )
    return found


def cross_validate(rows: Sequence[Prepared], group_of: Callable[[Prepared], Hashable], folds: int) -> list[Outcome]:
    """Every row predicted by a fit that saw no row of its group. folds: 0 leaves out one group at a time."""
    groups = list(dict.fromkeys(group_of(p) for p in rows))
    fold_of = {group: (index * 7919) % folds if folds else index for index, group in enumerate(groups)}
    found: list[Outcome] = []
    for fold in sorted(set(fold_of.values())):
        trained = [p for p in rows if fold_of[group_of(p)] != fold]
        tested = [p for p in rows if fold_of[group_of(p)] == fold]
        found += predict(fit(trained), trained, tested)
    return found


def spreads(outcomes: Sequence[Outcome], quantity: str) -> list[tuple[float, float, float]]:
    """80 % of measured over predicted, by nearness: least similarity, low and high logarithm. Wider when farther."""
    import numpy as np

    chosen = [(o.similarity, -value) for o in outcomes if (value := getattr(o, quantity)) is not None]
    edges = (0.9, 0.7, 0.45, 0.2, 0.05, 0.0)
    found: list[tuple[float, float, float]] = []
    upper = 2.0
    low = high = 0.0
    for edge in edges:
        inside = np.array([value for similarity, value in chosen if edge <= similarity < upper])
        if len(inside) >= 40:
            low = min(low, float(np.quantile(inside, 0.1)))
            high = max(high, float(np.quantile(inside, 0.9)))
        found.append((edge, round(low, 4), round(high, 4)))
        upper = edge
    return found


def accuracy(
    scheme: str, outcomes: Sequence[Outcome], spread: dict[str, list[tuple[float, float, float]]]
) -> list[step.Accuracy]:
    """The errors of one scheme, by mode and quantity."""
    found = []
    for mode in sorted({o.row.mode for o in outcomes}):
        for quantity in ("tpot", "ttft"):
            logs = [
                (o.similarity, v) for o in outcomes if o.row.mode == mode and (v := getattr(o, quantity)) is not None
            ]
            if not logs:
                continue
            errors = [math.expm1(value) for _, value in logs]
            sizes = [abs(error) for error in errors]
            inside = 0
            for similarity, value in logs:
                low, high = step.interval(spread, quantity, mode, similarity)
                inside += low <= -value <= high
            found.append(
                step.Accuracy(
                    scheme=scheme,
                    mode=mode,
                    quantity=quantity,
                    rows=len(sizes),
                    mape=round(statistics.fmean(sizes), 4),
                    median=round(statistics.median(sizes), 4),
                    within_20=round(sum(size < 0.2 for size in sizes) / len(sizes), 4),
                    bias=round(statistics.median(errors), 4),
                    inside_80=round(inside / len(sizes), 4),
                )
            )
    return found
