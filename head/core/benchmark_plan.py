"""Which points a benchmark has: those of its sweep from the beginning, those of a search one after the other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from common.bench import recipe as recipes
from common.bench.recipe import BenchmarkRecipe
from common.bench.spec import LoadSpec
from common.errors import InvalidRecipe
from head.core import benchmark_search
from head.core.benchmark_search import ATTEMPTS, Decision, Trial
from head.core.objects import Point
from head.core.state import POINT_ENDED

_MARGIN = 1.25  # a schedule drawn at random may be so much longer than its mean


def first_points(benchmark: str, recipe: BenchmarkRecipe) -> list[Point]:
    """What is known from the beginning: every repetition of the whole sweep, or the first load of a search.

    A sweep is gone through once for each repetition, so that a drift of the machine meets every point alike.
    Raises: InvalidRecipe when there would be too many.
    """
    sweep = recipes.points_of(recipe)
    if recipe.search is not None:
        most = len(sweep) * recipe.search.max_points * recipe.repetitions
        if most > recipes.MAX_POINTS:
            raise InvalidRecipe(
                f"{len(sweep)} searches of up to {recipe.search.max_points} loads, {recipe.repetitions} times each, "
                f"are {most} points; at most {recipes.MAX_POINTS}",
                hint="less to sweep, fewer repetitions, or a lower search.max_points",
            )
        return following(benchmark, recipe, []) or []
    made: list[Point] = []
    for repetition in range(recipe.repetitions):
        for group, changes in enumerate(sweep):
            made.append(_point(benchmark, recipe, len(made), changes, repetition, group))
    return made


def following(benchmark: str, recipe: BenchmarkRecipe, points: Sequence[Point]) -> list[Point]:
    """The points to add now that these have ended (or begin); none when there is nothing more to run."""
    if any(point.state not in POINT_ENDED for point in points):
        return []
    again = _again(benchmark, recipe, points)
    if again or recipe.search is None:
        return again
    for group, changes in enumerate(recipes.points_of(recipe)):
        decision = decided(recipe, points, group)
        if decision.load is None:
            continue
        changes = changes | {recipe.search.over: _value(recipe, decision.load)}
        number = len(points)
        return [
            _point(benchmark, recipe, number + repetition, changes, repetition, group)
            for repetition in range(recipe.repetitions)
        ]
    return []


def decided(recipe: BenchmarkRecipe, points: Sequence[Point], group: int) -> Decision:
    """How the search in one combination of the sweep stands."""
    search, slo = recipe.search, recipe.slo
    if search is None or slo is None:
        return Decision(None, None, "nothing is searched")
    by_load: dict[float, list[Point]] = {}
    for point in points:
        if point.group == group:
            by_load.setdefault(float(point.changes[search.over]), []).append(point)
    trials: list[Trial] = [benchmark_search.trial(load, tried, slo) for load, tried in by_load.items()]
    least = float(recipe.load.workers) if search.over == "concurrency" else 0.0
    return benchmark_search.decide(search, trials, least=least)


def best_of(recipe: BenchmarkRecipe, points: Sequence[Point]) -> dict[str, Any]:
    """The result of a search: the most load that met the SLO and the figures of a point of it, or none and why.

    With a sweep beside it `groups` has the result of each combination.
    """
    search, slo = recipe.search, recipe.slo
    if search is None or slo is None:
        return {}
    groups = [dict(_best_in_group(recipe, points, group), changes=changes) for group, changes in _groups(recipe)]
    top = max(groups, key=lambda found: -1.0 if found["load"] is None else found["load"])
    return top if len(groups) == 1 else {**top, "groups": groups}


def _best_in_group(recipe: BenchmarkRecipe, points: Sequence[Point], group: int) -> dict[str, Any]:
    assert recipe.search is not None
    assert recipe.slo is not None
    over = recipe.search.over
    decision = decided(recipe, points, group)
    why = decision.why or "the search did not come to its end"
    found: dict[str, Any] = {"over": over, "load": decision.best, "why": why}
    if decision.best is None:
        return found
    passed = [
        point
        for point in points
        if point.group == group
        and float(point.changes[over]) == decision.best
        and benchmark_search.verdict(point, recipe.slo)
    ]
    passed.sort(key=lambda point: (point.figures.get("output_tok_s", point.figures.get("req_s", 0.0)), point.number))
    middle = passed[len(passed) // 2]
    return found | {"load": _value(recipe, decision.best), "point": middle.number, "figures": middle.figures}


def _groups(recipe: BenchmarkRecipe) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(recipes.points_of(recipe))


def _value(recipe: BenchmarkRecipe, load: float) -> float | int:
    return int(load) if recipe.search is not None and recipe.search.over == "concurrency" else load


def _again(benchmark: str, recipe: BenchmarkRecipe, points: Sequence[Point]) -> list[Point]:
    """Points that say nothing are run once more: of a search all such, else those that failed by bad luck."""
    made: list[Point] = []
    tried = {(point.group, point.repetition, _key(point)): point for point in points}  # the last attempt of each
    for point in tried.values():
        if point.attempt + 1 >= ATTEMPTS or point.state == "cancelled":
            continue
        if recipe.search is not None and recipe.slo is not None:
            is_silent = benchmark_search.verdict(point, recipe.slo) is None
        else:
            is_silent = point.state == "failed" and point.error is not None and point.error.is_retryable
        if is_silent:
            fresh = _point(benchmark, recipe, len(points) + len(made), point.changes, point.repetition, point.group)
            made.append(msgspec.structs.replace(fresh, attempt=point.attempt + 1))
    return made


def _key(point: Point) -> bytes:
    return msgspec.json.encode(point.changes, order="sorted")


def _point(
    benchmark: str, recipe: BenchmarkRecipe, number: int, changes: dict[str, Any], repetition: int, group: int
) -> Point:
    """Repetitions have seeds of their own; the points of one repetition share theirs, so that they can be compared."""
    return Point(
        benchmark=benchmark,
        number=number,
        changes=changes,
        repetition=repetition,
        seed=recipe.load.seed + repetition,
        group=group,
    )


def length_s(spec: LoadSpec, most_s: float) -> float:
    """How long a run may send at the most, the drain not counted; `most_s` where only its answers end it."""
    if spec.arrivals == "offline" or spec.turns > 1:
        return most_s
    if spec.until_s is not None:
        return min(spec.until_s, most_s)
    if spec.is_open and spec.rate and spec.requests and spec.trace is None and not spec.steps:
        lowest = min(spec.rate, spec.peak) if spec.peak else spec.rate
        return min(spec.requests / lowest * _MARGIN + 30.0, most_s)
    return most_s
