"""Intervals from residuals: what share of rows, left out of the fit, lay how far from their prediction.

Bands are by distance to the nearest row of the same stack, so that a configuration next to measured ones has a narrow
interval and one of an unseen stack the width that leaving out whole sources showed.
"""

from __future__ import annotations

from collections.abc import Sequence

from head.planner.training.constants import Band

# Without any band: what the worst source showed.
_UNKNOWN = Band(distance=float("inf"), low=-0.45, high=0.45, rows=0)
# A generation of accelerators without rows: residuals of the sources that were alone on theirs.
_UNSEEN_GENERATION = 1.4


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed, linear between order statistics. `values` is not empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def bands_of(
    residuals: Sequence[tuple[float, float]],
    edges: Sequence[float],
    coverage: float,
    least_rows: int = 20,
) -> tuple[Band, ...]:
    """Bands from pairs (distance, residual in logarithm).

    Each band holds the residuals between two edges, and is at least as wide as the one before: farther is never surer.
    """
    tail = (1.0 - coverage) / 2.0
    found: list[Band] = []
    below = -1.0
    for edge in edges:
        values = [residual for distance, residual in residuals if below < distance <= edge]
        below = edge
        if len(values) < least_rows:
            continue
        low, high = min(0.0, quantile(values, tail)), max(0.0, quantile(values, 1.0 - tail))
        if found:
            low, high = min(low, found[-1].low), max(high, found[-1].high)
        found.append(Band(distance=edge, low=low, high=high, rows=len(values)))
    return tuple(found)


def band_for(
    bands: Sequence[Band], distance: float, *, is_generation_known: bool = True, site_spread: float = 0.0
) -> Band:
    """The band of a distance; beyond the last one, the last.

    site_spread: half width in logarithm that it has at least, for a cluster that none of the rows came from.
    """
    if not bands:
        return _UNKNOWN
    band = next((band for band in bands if distance <= band.distance), bands[-1])
    wider = 1.0
    if not is_generation_known:
        band, wider = bands[-1], _UNSEEN_GENERATION
    return Band(
        distance=band.distance,
        low=min(band.low * wider, -site_spread),
        high=max(band.high * wider, site_spread),
        rows=band.rows,
    )
