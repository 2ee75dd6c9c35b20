"""How benchmarks look in tables. Pure: `now_ms` is given."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.bench.figures import changes_told, told
from herder import types
from herder.cli import output, text, views
from herder.cli.command import Globals
from herder.cli.table import Column, clean, width_of

ENDED = ("completed", "failed", "cancelled")
LIST = (
    Column("ID"),
    Column("NAME", shrinks_to=12),
    Column("STATUS"),
    Column("POINTS", is_number=True),
    Column("VERDICT", rank=1),
    Column("MODEL", shrinks_to=10, rank=3),
    Column("AGE", is_number=True),
    Column("TOOK", is_number=True, rank=2),
)
POINTS = (
    Column("POINT", is_number=True),
    Column("LOAD", shrinks_to=14),
    Column("VERDICT"),
    Column("REQ/S", is_number=True),
    Column("TOK/S", is_number=True, rank=1),
    Column("TTFT P50", is_number=True),
    Column("P99", is_number=True),
    Column("TPOT P50", is_number=True, rank=2),
    Column("E2E P99", is_number=True, rank=3),
    Column("MET SLO", is_number=True, rank=5),
    Column("ERRORS", is_number=True, rank=4),
)
RUNS = (
    Column("RUN", shrinks_to=20),
    Column("NODE", shrinks_to=12),
    Column("KIND"),
    Column("STATE"),
    Column("ARTIFACTS", shrinks_to=12, rank=1),
)
COMPARED = (
    Column("FIGURE"),
    Column("FIRST", is_number=True),
    Column("OTHER", is_number=True),
    Column("CHANGE", is_number=True),
    Column("95 % INTERVAL", is_number=True, rank=1),
    Column("VERDICT"),
)
RECIPES = (Column("RECIPE"), Column("PATH", shrinks_to=16, rank=1), Column("DESCRIPTION", shrinks_to=20))
FILES = (Column("FILE", shrinks_to=24), Column("SIZE", is_number=True))
FILES_SHOWN = 12
LOAD_MOST = 36
SENTENCES = 6
WIDTH = 80
ARRIVED = ("ready", "done", "armed", "running")


def point_verdict(point: types.PointView) -> str:
    """The verdict of a point that was judged, else its state."""
    if point.status != "completed":
        return point.status
    if point.is_valid:
        return "valid"
    return "degraded" if set(point.reasons) == {"degraded"} else "invalid"


def list_row(benchmark: types.BenchmarkView, now_ms: int) -> list[str]:
    """A row of LIST."""
    return [
        benchmark.id,
        benchmark.name,
        benchmark.status,
        f"{benchmark.points_done}/{benchmark.points_planned}",
        benchmark.verdict or "-",
        benchmark.model or "-",
        text.age(benchmark.created_ms, now_ms),
        views.span(benchmark.started_ms, benchmark.ended_ms, now_ms),
    ]


def point_row(point: types.PointView) -> list[str]:
    """A row of POINTS."""
    figures = point.figures
    load = changes_told(point.changes) or "as asked"
    return [
        str(point.number),
        f"{load} #{point.repetition + 1}" if point.repetition else load,
        point_verdict(point),
        told(figures.get("req_s")),
        told(figures.get("output_tok_s")),
        ms(figures.get("ttft_p50_ms")),
        ms(figures.get("ttft_p99_ms")),
        ms(figures.get("tpot_p50_ms")),
        ms(figures.get("e2e_p99_ms")),
        share(figures.get("slo_attainment")),
        share(figures.get("error_rate")),
    ]


def points_columns(rows: Sequence[Sequence[str]]) -> tuple[Column, ...]:
    """POINTS for these rows: loads tell points apart, so that figures give way before they are cut; so do errors."""
    longest = max((width_of(row[1]) for row in rows), default=0)
    load = replace(POINTS[1], shrinks_to=max(POINTS[1].shrinks_to, min(longest, LOAD_MOST)))
    has_errors = any(row[-1] not in ("-", "0%") for row in rows)
    errors = replace(POINTS[-1], rank=0 if has_errors else POINTS[-1].rank)
    return (POINTS[0], load, *POINTS[2:-1], errors)


def ms(value: float | None) -> str:
    """Milliseconds in the unit that reads best: `0.85ms`, `24.6ms`, `1.24s`. None: `-`."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{told(value / 1000)}s" if abs(value) >= 999.5 else f"{told(value)}ms"


def share(value: float | None) -> str:
    """Percent. None: `-`."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value * 100:.2f}%" if 0.99 < value < 1 or 0 < value < 0.01 else f"{value * 100:.0f}%"


def shown(
    options: Globals, benchmark: types.BenchmarkView, now_ms: int, files: Sequence[types.BenchmarkFile] | None = None
) -> str:
    """A benchmark with its points, and what is wrong with them."""
    parts = [output.fields(options, _facts(benchmark, now_ms))]
    if benchmark.points:
        rows = [point_row(point) for point in benchmark.points]
        parts.append(output.table(options, points_columns(rows), rows, empty=""))
    if remarks := remarks_of(benchmark):
        parts.append("\n".join(remarks))
    lost = [run for run in benchmark.runs if run.error is not None]
    if lost:
        parts.append("\n".join(f"{run.id} on {run.node} is {run.state}: {_error(run.error)}" for run in lost))
    if files:
        rows = [[file.name, text.size(file.bytes)] for file in files[:FILES_SHOWN]]
        total = text.size(sum(file.bytes for file in files))
        parts.append(output.table(options, FILES, rows, empty=""))
        parts.append(
            f"{text.plural(len(files), 'file')}, {total}; all of them:\n"
            f"herder benchmarks export {benchmark.id} --format all --save FOLDER"
        )
    return "\n\n".join(part for part in parts if part)


def _facts(benchmark: types.BenchmarkView, now_ms: int) -> list[tuple[str, str]]:
    planned = f"{benchmark.points_done} of {benchmark.points_planned}"
    best = benchmark.best
    found = ""
    if best.get("over"):
        load = best.get("load")
        found = "no load met the SLO"
        if load is not None:
            found = f"{best['over']} {told(load)} is the highest that met the SLO"
        found += f": {best['why']}" if best.get("why") else ""
    return [
        ("benchmark", benchmark.id),
        ("name", benchmark.name),
        ("status", benchmark.status),
        ("verdict", benchmark.verdict),
        ("points", planned),
        ("found", found),
        ("note", benchmark.note),
        ("model", benchmark.model),
        ("service", f"{benchmark.service}{_kept(benchmark)}"),
        ("load from", ", ".join(benchmark.load_nodes)),
        ("served on", ", ".join(benchmark.server_nodes)),
        ("by", benchmark.actor),
        ("begun", f"{text.age(benchmark.started_ms, now_ms)} ago" if benchmark.started_ms else ""),
        ("took", views.span(benchmark.started_ms, benchmark.ended_ms, now_ms) if benchmark.started_ms else ""),
        ("recipe", f"sha256 {benchmark.recipe_sha256[:16]}" if benchmark.recipe_sha256 else ""),
        ("error", _error(benchmark.error)),
    ]


def _kept(benchmark: types.BenchmarkView) -> str:
    """That an own service stays, with what ends it."""
    serve = (benchmark.recipe.get("server") or {}).get("serve") or {}
    return ", kept until `herder services delete`" if benchmark.service and serve.get("keep") else ""


def remarks_of(benchmark: types.BenchmarkView) -> list[str]:
    """Why points must not be believed, or failed; equal reasons together, in the words of the first such point."""
    found: dict[str, list[types.PointView]] = {}
    for point in benchmark.points:
        told = point_verdict(point)
        if point.error is not None:
            found.setdefault(f"{told}: {_error(point.error)}", []).append(point)
        elif told in ("invalid", "degraded"):
            lost = f", {share(point.coverage)} of the load was performed" if point.coverage < 1 else ""
            found.setdefault(f"{told}: {', '.join(point.reasons)}{lost}", []).append(point)
        elif point.said:
            found.setdefault(f"{told}, with errors", []).append(point)
    return [
        "\n".join((_with_points(said, [point.number for point in points]), *_sentences(points)))
        for said, points in found.items()
    ]


def _sentences(points: Sequence[types.PointView]) -> list[str]:
    first = points[0]
    lines = [] if first.error is not None else [clean(sentence) for sentence in first.said[:SENTENCES]]
    if lines and len(points) > 1:
        lines = [f"point {first.number}: {line}" for line in lines]
    return [
        textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    ]


def _with_points(said: str, points: Sequence[int]) -> str:
    """The points stand behind the error, not behind its hint."""
    first, *hint = said.split("\n")
    return "\n".join((f"{first} ({_numbers(points)})", *hint))


def _numbers(points: Sequence[int]) -> str:
    told = ", ".join(str(point) for point in points[:12])
    return f"point{'s' if len(points) > 1 else ''} {told}{' ...' if len(points) > 12 else ''}"


def _error(error: types.ErrorDetail | None) -> str:
    return views.error_lines(error) if error is not None else ""


# comparisons
def compared(options: Globals, found: Any) -> str:
    """A common.bench.compare.Comparison as tables."""
    parts = []
    for difference in found.differences:
        label = "DIFFERENT" if difference.is_serious else "differs"
        lines = [f"{label}: {difference.what}"]
        lines += [f"  {name}: {value}" for name, value in zip(found.names, difference.values, strict=True)]
        parts.append("\n".join(lines))
    for load in found.loads:
        head = changes_told(load.changes) or "the load as asked"
        for place in range(1, len(found.names)):
            counts = [max((f.values[at].repetitions for f in load.figures), default=0) for at in (0, place)]
            title = f"{head}: {found.names[0]} and {found.names[place]}\nvalid repetitions: {counts[0]} and {counts[1]}"
            rows = [_compared_row(figure, place) for figure in load.figures]
            parts.append(f"{title}\n{output.table(options, COMPARED, rows, empty='no figures')}")
    parts.append("\n".join(found.remarks))
    if found.loads:
        parts.append(
            "CHANGE is against the first. noise: Welch's t-test at 95 % cannot tell them\n"
            "apart; of twenty figures that do not differ one will still seem to."
        )
    return "\n\n".join(part for part in parts if part)


def _compared_row(figure: Any, place: int) -> list[str]:
    change, interval = figure.change[place], figure.interval[place]
    return [
        figure.name.removesuffix("_ms"),
        _told(figure.unit, figure.values[0].mean),
        _told(figure.unit, figure.values[place].mean),
        "-" if change is None else f"{change:+.1%}",
        "-" if interval is None else f"{interval[0]:+.1%} to {interval[1]:+.1%}",
        _word(figure, place),
    ]


def _told(unit: str, value: float | None) -> str:
    return ms(value) if unit == "ms" else share(value) if unit == "share" else told(value)


def _word(figure: Any, place: int) -> str:
    word, is_better = figure.verdict[place], figure.is_better[place]
    if word == "same":
        return "noise"
    if word == "unknown":
        return "one repetition"
    return word if is_better is None else "better" if is_better else "worse"
