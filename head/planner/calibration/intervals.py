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
    floor: float = 0.0,
    least_rows: int = 20,
) -> tuple[Band, ...]:
    """Bands from pairs (distance, residual in logarithm).

    Each band holds the residuals between two edges, and is at least as wide as the one before: farther is never surer.
    floor: what every band has at least on both sides, in logarithm.
    """
    tail = (1.0 - coverage) / 2.0
    found: list[Band] = []
    below = -1.0
    for edge in edges:
        values = [residual for distance, residual in residuals if below < distance <= edge]
        below = edge
        if len(values) < least_rows:
            continue
        low, high = min(-floor, quantile(values, tail)), max(floor, quantile(values, 1.0 - tail))
        if found:
            low, high = min(low, found[-1].low), max(high, found[-1].high)
        found.append(Band(distance=edge, low=low, high=high, rows=len(values)))
    return tuple(found)


def band_for(bands: Sequence[Band], distance: float, *, is_generation_known: bool = True) -> Band:
    """The band of a distance; beyond the last one, the last."""
    if not bands:
        return _UNKNOWN
    band = next((band for band in bands if distance <= band.distance), bands[-1])
    if is_generation_known:
        return band
    return Band(
        distance=band.distance,
        low=bands[-1].low * _UNSEEN_GENERATION,
        high=bands[-1].high * _UNSEEN_GENERATION,
        rows=bands[-1].rows,
    )
