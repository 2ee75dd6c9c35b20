"""Benchmarks as people see them: pure functions from the head's objects to the views of `herder/types.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from common.bench.recipe import BenchmarkRecipe, sha256_of
from head.api.render import error_detail, without_secrets
from head.core import benchmark_facts
from head.core.objects import Benchmark, Part, Point, Run
from head.core.state import BENCHMARK_ENDED, State
from herder import types as api


def benchmark_view(state: State, benchmark: Benchmark, *, is_short: bool = False) -> api.BenchmarkView:
    """A benchmark and how far it is. is_short: as lists show it, without what may be long."""
    points = benchmark_facts.points_of(state, benchmark.id)
    shown = () if is_short else tuple(point_view(point) for point in points)
    return api.BenchmarkView(
        id=benchmark.id,
        name=benchmark.name,
        status=cast(api.BenchmarkState, benchmark.state),
        actor=benchmark.actor,
        recipe_sha256=benchmark.recipe_sha256,
        model=_model(state, benchmark),
        service=benchmark.service,
        points_done=benchmark_facts.points_done(state, benchmark.id),
        points_planned=max(benchmark.planned, len(points)),
        is_valid=benchmark.state == "completed" and bool(points) and all(map(_is_good, points)),
        is_degraded=benchmark.is_degraded,
        note=benchmark_facts.note_of(state, benchmark),
        created_ms=benchmark.created_ms,
        started_ms=benchmark.started_ms or None,
        ended_ms=benchmark.ended_ms or None,
        load_nodes=benchmark.load_nodes,
        server_nodes=benchmark.server_nodes,
        recipe={} if is_short else open_recipe(benchmark.recipe),
        points=shown,
        runs=() if is_short else runs_of(state, benchmark, points),
        best=benchmark.best,
        facts={} if is_short else benchmark.facts,
        labels=_labels(benchmark),
        error=error_detail(benchmark.error),
        verdict=_verdict(benchmark.state, points),
    )


def _verdict(status: str, points: Iterable[Point | api.PointView]) -> api.Verdict:
    """The worst of the points; a point that failed, and none at all, are worse than a lost node."""
    if status != "completed":
        return ""
    found = {"valid" if p.is_valid else "degraded" if set(p.reasons) == {"degraded"} else "invalid" for p in points}
    return "invalid" if "invalid" in found or not found else "degraded" if "degraded" in found else "valid"


def point_view(point: Point) -> api.PointView:
    """One point."""
    return api.PointView(
        number=point.number,
        changes=point.changes,
        repetition=point.repetition,
        status=cast(api.PointState, point.state),
        is_valid=point.is_valid,
        reasons=point.reasons,
        said=point.said,
        coverage=point.figures.get("coverage", point.coverage),  # by the schedule, once it was judged
        skew_ms=point.skew_ms,
        figures=point.figures,
        started_ms=(point.fire_ms or point.started_ms) or None,
        ended_ms=point.ended_ms or None,
        error=error_detail(point.error),
    )


def runs_of(state: State, benchmark: Benchmark, points: list[Point]) -> tuple[api.RunView, ...]:
    """What agents do or did for it: runs that are known, and what is kept of those that are forgotten."""
    known = {run.id: run for run in benchmark_facts.runs_of(state, benchmark.id)}
    found: list[api.RunView] = []
    for parts, kind in ((benchmark.monitor_parts, "monitor"), *((point.parts, "load") for point in points)):
        for number, part in enumerate(parts):
            known.pop(part.run, None)
            found.append(_part_view(part, kind, number, len(parts)))
    found += [run_view(run) for run in known.values()]
    return tuple(sorted(found, key=lambda run: (run.kind, run.id)))


def run_view(run: Run) -> api.RunView:
    """A run that its agent still knows or shall know."""
    return api.RunView(
        id=run.id,
        node=run.node,
        kind="monitor" if run.kind == "monitor" else "load",
        state=run.state,
        part=run.part,
        parts=run.parts,
        artifacts=run.artifacts,
        error=error_detail(run.error),
    )


def _part_view(part: Part, kind: str, number: int, parts: int) -> api.RunView:
    is_monitor = kind == "monitor"
    return api.RunView(
        id=part.run,
        node=part.node,
        kind="monitor" if is_monitor else "load",
        state=part.state,
        part=0 if is_monitor else number,
        parts=1 if is_monitor else parts,
        artifacts=part.artifacts,
        error=error_detail(part.error),
    )


def recipe_view(recipe: BenchmarkRecipe, path: str) -> api.BenchmarkRecipeView:
    """A benchmark recipe of the head."""
    document = open_recipe(msgspec.to_builtins(recipe))
    return api.BenchmarkRecipeView(recipe.name, recipe.description, path, sha256_of(recipe), document)


def as_ended(view: api.BenchmarkView, benchmark: Benchmark, now_ms: int) -> dict[str, Any]:
    """The view as plain data, as it will be once the benchmark has ended: what is kept with the result."""
    plain: dict[str, Any] = msgspec.to_builtins(view)
    if benchmark.state not in BENCHMARK_ENDED:
        ended = "cancelled" if benchmark.is_cancelling else "failed" if benchmark.error else "completed"
        is_valid = ended == "completed" and bool(view.points) and all(point.is_valid for point in view.points)
        plain |= {"status": ended, "ended_ms": now_ms, "is_valid": is_valid, "note": ""}
        plain["verdict"] = _verdict(ended, view.points)
    return plain


def _is_good(point: Point) -> bool:
    return point.state == "completed" and point.is_valid


def _model(state: State, benchmark: Benchmark) -> str:
    """What is asked for: as the load names it, else the service's."""
    load, server = benchmark.recipe.get("load") or {}, benchmark.recipe.get("server") or {}
    service = state.services.get(benchmark.service)
    found = load.get("model") or (server.get("serve") or {}).get("model") or (service.model if service else "")
    return str(found)


def _labels(benchmark: Benchmark) -> dict[str, str]:
    labels = benchmark.recipe.get("labels") or {}
    return {str(name): str(value) for name, value in labels.items()}


def open_recipe(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without passwords in its addresses."""
    return {name: _value(value) for name, value in document.items()}


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return open_recipe(value)
    if isinstance(value, list | tuple):
        return [_value(entry) for entry in value]
    return value
