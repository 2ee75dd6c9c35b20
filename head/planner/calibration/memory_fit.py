"""Fits the constants of the memory model to measured peaks, and says how wrong they are.

Six multipliers, each with a prior from what it stands for; residuals are logarithms, so that 10 % over and under weigh
alike; every source has the same say however many rows it has. Errors are of predictions for rows that the fit has not
seen: folds over all rows, and whole sources left out. SciPy is needed here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from head.planner.calibration.memory_rows import MemoryRow, answer
from head.planner.training.memory import MemoryConstants

# name: (prior, spread of the prior). Multipliers are near 1; waste of the allocator 5 to 20 % and a context of 0.5 to
# 1.6 GiB are the ranges of planner.md 2.4, 0.2 to 0.4 GiB per communicator of NCCL buffers likewise.
PRIORS: dict[str, tuple[float, float]] = {
    "activations": (1.0, 0.15),
    "logits": (1.0, 0.2),
    "gathered": (1.0, 0.2),
    "fragmentation": (0.08, 0.06),
    "context_gib": (1.0, 0.3),
    "communicator_gib": (0.3, 0.1),
}
NOISE = 0.06  # of repeated measurements, in the logarithm
FOLDS = 5


class MemoryErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Errors over some rows. mape and median are shares; oom_missed: runs out of memory that were called a fit."""

    name: str
    rows: int
    mape: float
    median: float
    bias: float
    largest: float
    covered: float  # share of rows inside the stated 80 % interval
    ooms: int
    oom_missed: int
    oom_under_capacity: int  # whose central estimate lies under the capacity
    called_impossible: int  # runs that were measured and called `does_not_fit`


def fit(rows: Sequence[MemoryRow]) -> MemoryConstants:
    """Constants for `rows` (those that ran). Raises: ImportError without the extra `planner`."""
    from scipy.optimize import least_squares

    ran = [row for row in rows if not row.is_oom]
    counts: dict[str, int] = {}
    for row in ran:
        counts[row.source] = counts.get(row.source, 0) + 1
    # a source of n rows weighs sqrt(n) rows: more than one, less than n independent ones
    weights = [math.sqrt(1 / math.sqrt(counts[row.source])) for row in ran]
    names = list(PRIORS)

    def residuals(values: Any, /) -> list[float]:
        fitted = _constants(names, values)
        errors = [
            weight * math.log(answer(row, fitted).predicted / row.peak_bytes) / NOISE
            for row, weight in zip(ran, weights, strict=True)
        ]
        return errors + [(value - PRIORS[name][0]) / PRIORS[name][1] for name, value in zip(names, values, strict=True)]

    start = [PRIORS[name][0] for name in names]
    bounds = ([0.0] * len(names), [max(4 * PRIORS[name][0], 0.5) for name in names])
    found = least_squares(residuals, start, bounds=bounds, loss="soft_l1")
    return _constants(names, [float(value) for value in found.x])


def calibrated(rows: Sequence[MemoryRow], calibration: str) -> MemoryConstants:
    """Fitted constants with the spreads that folds and left-out sources show, rounded for shipping."""
    fitted = fit(rows)
    seen, unseen = by_folds(rows), by_sources(rows)
    values = {name: round(getattr(fitted, name), 4) for name in PRIORS}
    return MemoryConstants(
        **values,
        sigma=round(_sigma(seen), 4),
        sigma_unseen=round(max(_sigma(unseen), _sigma(seen)), 4),
        calibration=calibration,
    )


Predictions = list[tuple[MemoryRow, MemoryConstants]]


def by_folds(rows: Sequence[MemoryRow]) -> Predictions:
    """Each row with constants fitted without its fold; folds are by row number, so every source is in each."""
    found: Predictions = []
    for fold in range(FOLDS):
        fitted = fit([row for index, row in enumerate(rows) if index % FOLDS != fold])
        found += [(row, fitted) for index, row in enumerate(rows) if index % FOLDS == fold]
    return found


def by_sources(rows: Sequence[MemoryRow]) -> Predictions:
    """Each row with constants fitted without its source."""
    found: Predictions = []
    for source in sorted({row.source for row in rows}):
        fitted = fit([row for row in rows if row.source != source])
        found += [(row, fitted) for row in rows if row.source == source]
    return found


def errors(name: str, predictions: Predictions, sigma: float) -> MemoryErrors:
    """What `predictions` miss, with intervals of `sigma`."""
    logs, missed, under, impossible, ooms = [], 0, 0, 0, 0
    for row, fitted in predictions:
        given = answer(row, msgspec.structs.replace(fitted, sigma_unseen=sigma))
        if row.is_oom:
            ooms += 1
            missed += given.verdict == "fits"
            under += given.total <= row.capacity_bytes
        else:
            impossible += given.verdict == "does_not_fit"
            logs.append(math.log(given.predicted / row.peak_bytes))
    shares = sorted(abs(math.exp(log) - 1) for log in logs) or [0.0]
    return MemoryErrors(
        name=name,
        rows=len(logs),
        mape=sum(shares) / len(shares),
        median=shares[len(shares) // 2],
        bias=sum(math.exp(log) - 1 for log in logs) / max(len(logs), 1),
        largest=shares[-1],
        covered=sum(abs(log) <= 1.2815515655446004 * sigma for log in logs) / max(len(logs), 1),
        ooms=ooms,
        oom_missed=missed,
        oom_under_capacity=under,
        called_impossible=impossible,
    )


def table(rows: Sequence[MemoryRow], fitted: MemoryConstants) -> list[MemoryErrors]:
    """Cross-validated errors of all rows and of each source, by folds and with the source left out."""
    seen, unseen = by_folds(rows), by_sources(rows)
    found = [
        errors("all, 5 folds", seen, fitted.sigma_unseen),
        errors("all, source unseen", unseen, fitted.sigma_unseen),
    ]
    for source in sorted({row.source for row in rows}):
        for how, predictions in (("5 folds", seen), ("unseen", unseen)):
            mine = [(row, constants) for row, constants in predictions if row.source == source]
            found.append(errors(f"{source[:48]}, {how}", mine, fitted.sigma_unseen))
    return found


def _constants(names: Iterable[str], values: Iterable[float]) -> MemoryConstants:
    return msgspec.structs.replace(MemoryConstants(), **dict(zip(names, values, strict=True)))


def _sigma(predictions: Predictions) -> float:
    """Spread that covers 80 % of the rows when it is taken as normal: robust against a few wild rows."""
    logs = sorted(
        abs(math.log(answer(row, fitted).predicted / row.peak_bytes)) for row, fitted in predictions if not row.is_oom
    )
    return logs[min(len(logs) - 1, math.ceil(0.8 * len(logs)))] / 1.2815515655446004
