"""What is true of benchmarks now, as pure functions. Imports none of the modules that act on them."""

from __future__ import annotations

from typing import Any

import msgspec

from common.bench.recipe import BenchmarkRecipe
from head.core.objects import Benchmark, Point, Run
from head.core.state import BENCHMARK_ENDED, POINT_ENDED, RUN_ENDED, State

_decoded: dict[str, BenchmarkRecipe] = {}
_DECODED_KEPT = 64


def recipe_of(benchmark: Benchmark) -> BenchmarkRecipe:
    """The benchmark's recipe, typed. It was checked when the benchmark was made and never changes."""
    known = _decoded.get(benchmark.recipe_sha256)
    if known is None:
        known = msgspec.convert(benchmark.recipe, BenchmarkRecipe)
        while len(_decoded) >= _DECODED_KEPT:
            del _decoded[next(iter(_decoded))]
        _decoded[benchmark.recipe_sha256] = known
    return known


def points_of(state: State, benchmark: str) -> list[Point]:
    """The points of a benchmark by number; those that a search has not decided yet are not among them."""
    held = (state.points[key] for key in state.points_by_benchmark.get(benchmark, ()))
    return sorted(held, key=lambda point: point.number)


def runs_of(state: State, benchmark: str) -> list[Run]:
    """The runs that agents still know or shall know: monitors, and the parts of the present point."""
    return [state.runs[key] for key in sorted(state.runs_by_benchmark.get(benchmark, ()))]


def load_runs(state: State, point: Point) -> list[Run]:
    """The runs of a point by part, as far as they are not forgotten."""
    return [state.runs[key] for key in point.runs if key in state.runs]


def current_point(state: State, benchmark: str) -> Point | None:
    """The point that is being run; None between two of them."""
    for point in points_of(state, benchmark):
        if point.state != "pending" and point.state not in POINT_ENDED:
            return point
    return None


def next_point(state: State, benchmark: str) -> Point | None:
    """The first point that has not begun."""
    return next((point for point in points_of(state, benchmark) if point.state == "pending"), None)


def is_ended(benchmark: Benchmark) -> bool:
    """Whether nothing of it will change any more."""
    return benchmark.state in BENCHMARK_ENDED


def points_done(state: State, benchmark: str) -> int:
    """How many points have come to their end; those that were cancelled have not."""
    return sum(point.state in POINT_ENDED and point.state != "cancelled" for point in points_of(state, benchmark))


def note_of(state: State, benchmark: Benchmark) -> str:
    """What it does or waits for, in words."""
    point = current_point(state, benchmark.id) if benchmark.state == "running" else None
    if point is None:
        return benchmark.note
    done = points_done(state, benchmark.id)
    words = f"point {point.number} is {point.state}" + (f": {point.note}" if point.note else "")
    return f"{words}; {done} of {max(benchmark.planned, done)} points are done"


def is_active(run: Run) -> bool:
    """Whether a run may still use its node: it has not ended, or its agent has not confirmed that it is gone."""
    return run.state not in RUN_ENDED or run.desired == "absent"


def summary(state: State, benchmark: Benchmark) -> dict[str, Any]:
    """The figures of an ended benchmark in few words: the best of a search, else of its points in order."""
    points = [point for point in points_of(state, benchmark.id) if point.state == "completed"]
    shown = [{"number": point.number, "changes": point.changes, "figures": point.figures} for point in points[:20]]
    return {"benchmark": benchmark.id, "best": benchmark.best, "points": shown, "is_degraded": benchmark.is_degraded}
