"""The search for the most load that still meets the SLO: doubling until a load fails, then bisection. Pure.

What failed because of the generator, and not of the server, says nothing about the server: such a point is repeated
once, and when that says nothing either the search ends there and says why. Of several repetitions of one load the
majority of those that say something counts; a tie is a failure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from common.bench.recipe import Search, Slo
from head.core.objects import Point

SERVER_REASONS = frozenset({"no_success", "drain_timeout", "server_changed"})
"""Why a run is invalid when that is the server's doing: it could not answer, or an engine fell and was replaced."""
_LOWEST = 64  # when the start fails, loads down to this fraction of it are tried
ATTEMPTS = 2  # of a point that says nothing


class Trial(msgspec.Struct, frozen=True):
    """One load that was tried. `passed` None: nothing is known of the server at this load, for `why`."""

    load: float
    passed: bool | None
    why: str = ""


class Decision(msgspec.Struct, frozen=True):
    """The load to try next; None when the search has ended, `best` being its result (None: no load met the SLO)."""

    load: float | None
    best: float | None = None
    why: str = ""


def verdict(point: Point, slo: Slo) -> bool | None:
    """Whether the server met the SLO in an ended point; None when the point says nothing about the server."""
    if point.state != "completed":
        return None
    if not point.is_valid:
        return False if point.reasons and SERVER_REASONS.issuperset(point.reasons) else None
    errors, attained = point.figures.get("error_rate"), point.figures.get("slo_attainment")
    if errors is None or (attained is None and slo.texts):
        return None
    return errors <= slo.error_rate and (attained is None or attained >= slo.attainment)


def why_silent(point: Point) -> str:
    """Why a point says nothing about the server, in words."""
    if point.error is not None:
        return point.error.message
    return ", ".join(point.reasons) or f"it was {point.state} and its figures are incomplete"


def trial(load: float, points: Sequence[Point], slo: Slo) -> Trial:
    """What the ended points of one load, all repetitions and attempts, say together."""
    verdicts = [verdict(point, slo) for point in points]
    told = [one for one in verdicts if one is not None]
    if not told:
        return Trial(load, None, why_silent(points[-1]) if points else "it was not tried")
    return Trial(load, 2 * sum(told) > len(told))


def decide(search: Search, trials: Sequence[Trial], *, least: float = 0.0) -> Decision:
    """What follows from the loads tried so far, in their order. `least`: nothing below makes sense (its workers)."""
    passed = [one.load for one in trials if one.passed]
    failed = [one.load for one in trials if one.passed is False]
    best = max(passed, default=None)
    for one in trials:
        if one.passed is None:
            return Decision(None, best, f"at {search.over} {one.load:g} nothing can be said of the server: {one.why}")
    worst = min(failed, default=None)
    floor = _rounded(search, max(least, search.start / _LOWEST))
    if best is not None and worst is not None and best >= worst:
        return Decision(None, best, f"it failed at {worst:g} and passed at {best:g}: results are not monotonic")
    if best is not None and best >= _rounded(search, search.most):
        return Decision(None, best, f"{search.over} {best:g} is the most that was to be tried")
    if best is not None and worst is not None and worst - best <= _bracket(search, best):
        return Decision(None, best, f"it failed at {search.over} {worst:g}")
    if worst is not None and best is None and worst <= floor:
        return Decision(None, None, f"even {search.over} {worst:g} does not meet the SLO")
    if len(trials) >= search.max_points:
        between = f" and failed at {worst:g}" if worst is not None else ""
        met = f"passed at {best:g}" if best is not None else "no load passed"
        return Decision(None, best, f"{search.max_points} loads were tried: {met}{between}")
    return Decision(_next(search, best, worst, floor), best)


def _next(search: Search, best: float | None, worst: float | None, floor: float) -> float:
    """Between the bracket's ends, or beyond the one that is known."""
    if best is None and worst is None:
        return _rounded(search, min(search.start, search.most))
    if worst is None:
        return _rounded(search, min(2 * (best or search.start), search.most))
    if best is None:
        return max(floor, _rounded(search, worst / 2))
    middle = _rounded(search, (best + worst) / 2)
    return middle if best < middle < worst else (best + worst) / 2


def _bracket(search: Search, best: float) -> float:
    """How narrow is narrow enough."""
    wanted = search.precision * best
    return max(1.0, wanted) if search.over == "concurrency" else max(wanted, 1e-6 * best)


def _rounded(search: Search, load: float) -> float:
    """A load that can be had: a whole number of concurrency, six digits of a rate."""
    return float(max(1, int(load))) if search.over == "concurrency" else float(f"{load:.6g}")
