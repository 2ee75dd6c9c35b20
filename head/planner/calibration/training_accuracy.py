"""How wrong the step-time model is on rows left out of its fit: one line per way of leaving out, one per source."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from head.planner.calibration.intervals import band_for
from head.planner.calibration.training_fit import Held, Residual, bands, site_spread
from head.planner.training.constants import Band


class ErrorLine(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of a group of rows: mean and median of |predicted - measured| / measured, their mean, and the share of
    rows within 20 %, and inside the stated 80 % interval.
    """

    group: str
    rows: int
    mape: float
    median: float
    bias: float
    within_20: float
    covered: float
    width: float  # mean of (high - low) / 2 over the prediction


def line_of(group: str, residuals: Sequence[Residual], intervals: Iterable[tuple[float, float]]) -> ErrorLine:
    """The errors of `residuals`, with the interval (low, high) in seconds stated for each."""
    errors = [residual.error for residual in residuals]
    sizes = [abs(error) for error in errors]
    bounds = list(intervals)
    inside = [low <= residual.row.step_s <= high for residual, (low, high) in zip(residuals, bounds, strict=True)]
    widths = [(high - low) / 2 / residual.predicted_s for residual, (low, high) in zip(residuals, bounds, strict=True)]
    return ErrorLine(
        group=group,
        rows=len(errors),
        mape=statistics.fmean(sizes),
        median=statistics.median(sizes),
        bias=statistics.fmean(errors),
        within_20=statistics.fmean(size <= 0.2 for size in sizes),
        covered=statistics.fmean(inside),
        width=statistics.fmean(widths),
    )


def interval(residual: Residual, found: Sequence[Band], spread: float) -> tuple[float, float]:
    """Bounds in seconds for a left-out row; `spread` is that between sites, 0 where rows of the same site were seen."""
    band = band_for(found, residual.distance, is_generation_known=residual.is_generation_known, site_spread=spread)
    return residual.predicted_s * math.exp(band.low), residual.predicted_s * math.exp(band.high)


def accuracy(held: Held) -> dict[str, list[ErrorLine]]:
    """Tables by way of leaving out: the total first, then sources. Intervals never saw the row's own source."""
    sources = sorted({residual.row.source for residual in held.sources})
    without = {source: (bands(held, source), site_spread(held, source)) for source in sources}
    whole = (bands(held), 0.0)
    tables = {}
    for name, residuals in (("folds", held.folds), ("models", held.models), ("sources", held.sources)):
        lines = []
        for group in ("all", *sources):
            chosen = [residual for residual in residuals if group in ("all", residual.row.source)]
            stated = [
                interval(residual, *(without[residual.row.source] if name == "sources" else whole))
                for residual in chosen
            ]
            lines.append(line_of(group, chosen, stated))
        tables[name] = lines
    return tables
