"""The charts of one point over time: requests second by second, machines and engines on the same axis below them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.bench.figures import is_number, told
from common.bench.html_rows import Row
from common.bench.markup import Markup, cut
from common.bench.plots import Band, Chart, Line, Scale, draw, scale_of, thinned
from common.bench.series import within

MAX_POINTS_IN_FULL = 40
Curve = tuple[str, Sequence[float], Sequence[float | None]]
_PARTS = (
    (re.compile(r"gpu(\d+)_(.+)"), "GPU", "gpu{0}"),
    (re.compile(r"disk_(.+?)_((?:read|write|busy)_.+)"), "Disk", "{0}"),
    (re.compile(r"net_(.+?)_((?:rx|tx)_.+)"), "Network", "{0}"),
)
_FIRST = {
    "GPU util": ("GPU utilisation", "%"),
    "GPU mem_used": ("GPU memory used", "MB"),
    "GPU power_w": ("GPU power", "W"),
    "cpu_percent": ("CPU of the nodes", "%"),
    "ram_used_MB": ("Memory of the nodes", "MB"),
    "GPU temperature_c": ("GPU temperature", "°C"),
}
"""What stands first, in this order, under these names."""
_NOT_DRAWN = frozenset(
    (
        *("elapsed_s", "boottime_ms", "missed_ticks", "loop_ms", "scrape_ms", "ram_used_bytes", "ram_total_bytes"),
        *("ram_available_bytes", "GPU mem_total_bytes", "GPU power_limit_w", "GPU energy_j", "GPU mem_util_percent"),
        *("up",),
    )
)
_CORE = re.compile(r"cpu\d+_percent")


@dataclass(frozen=True, slots=True)
class Detail:
    """How much is drawn of one point: vertices of a line, lines of a chart, charts of machines and of engines beyond
    the main ones."""

    vertices: int = 500
    lines: int = 12
    machines: int = 24
    engines: int = 24


def detail_for(points: int) -> Detail:
    """A file with 500 points must open as well."""
    if points <= 4:
        return Detail()
    return Detail(250) if points <= MAX_POINTS_IN_FULL else Detail(60, 3, 0, 4)


# one point over time
def over_time(row: Row, series: Mapping[str, Any], detail: Detail) -> list[Markup]:
    """What was sent and answered second by second, and machines and engines on the same axis."""
    report = row.report or {}
    seconds = [entry for entry in report.get("series") or () if isinstance(entry, Mapping)]
    window = report.get("window") or {}
    end = max((_num(entry.get("at_s")) or 0.0 for entry in seconds), default=0.0) + 1
    x = Scale(0.0, max(end, 1.0), False, "s after the start")
    bands = []
    begin_s, end_s = _num(window.get("begin_s")), _num(window.get("end_s"))
    if begin_s:
        bands.append(Band(0.0, begin_s, "before the measured window"))
    if end_s is not None and end_s < end:
        bands.append(Band(end_s, x.high, "after the measured window"))
    draws = _Draws(x, bands, f"p{row.number}", detail)
    made = _load_over_time(draws, seconds) if seconds else []
    start = _num(report.get("created"))
    if start:
        made += _machines(draws, series.get("nodes") or {}, start, end)
        made += _engines(draws, series.get("engines") or {}, start, end)
    return [draw(chart) for chart in made]


def _num(value: Any) -> float | None:
    return float(value) if is_number(value) else None


class _Draws:
    """What the charts of one point share."""

    def __init__(self, x: Scale, bands: list[Band], group: str, detail: Detail) -> None:
        self.x, self.bands, self.group, self.detail = x, bands, group, detail

    def chart(
        self, title: str, unit: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float | None]]], **more: Any
    ) -> Chart:
        """One chart; many curves become their least, median and greatest."""
        note = ""
        if more.pop("is_many", True) and len(curves) > self.detail.lines:
            note = f"least, median and greatest of {len(curves)}"
            curves = envelope(curves, self.x.high)
        lines, bucket = [], 0.0
        for place, (name, xs, ys) in enumerate(curves):
            if len(xs) > self.detail.vertices:
                bucket = max(bucket, (xs[-1] - xs[0]) / (self.detail.vertices // 2))
            thin_x, thin_y = thinned(xs, ys, self.detail.vertices)
            lines.append(Line(cut(name, 60), thin_x, thin_y, place, name.endswith("p99")))
        if bucket:
            note = f"{note}; " if note else ""
            note += f"of every {told(bucket)} s the least and the greatest value"
        y = scale_of((value for line in lines for value in line.ys), is_log=more.pop("is_log", False))
        return Chart(title, self.x, more.pop("y", y), lines, (), (), self.bands, 120, self.group, note, unit)


def _load_over_time(draws: _Draws, seconds: Sequence[Mapping[str, Any]]) -> list[Chart]:
    def column(name: str) -> list[float | None]:
        return [_num(entry.get(name)) for entry in seconds]

    # A second's figures stand in its middle; what is in flight is counted at its end.
    middles = [(_num(entry.get("at_s")) or 0.0) + 0.5 for entry in seconds]
    ends = [at + 0.5 for at in middles]
    counts = [(name, middles, column(name)) for name in ("due", "sent", "ended")]
    if any(column("failed")):
        counts.append(("failed", middles, column("failed")))
    made = [draws.chart("Requests", "per second", counts, is_many=False)]
    made.append(draws.chart("In flight", "requests", [("in flight", ends, column("in_flight"))]))
    if any(column("output_tokens")):
        made.append(draws.chart("Output", "tokens/s", [("tokens", middles, column("output_tokens"))]))
    times = [(word, middles, column(f"ttft_{word}_ms")) for word in ("p50", "p99")]
    if any(value is not None for _, _, ys in times for value in ys):
        known = [value for _, _, ys in times for value in ys if value]
        is_log = bool(known) and max(known) / min(known) > 20
        made.append(draws.chart(f"TTFT{', logarithmic' if is_log else ''}", "ms, by second due", times, is_log=is_log))
    return made


def _machines(draws: _Draws, nodes: Mapping[str, Any], start: float, end: float) -> list[Chart]:
    found: dict[str, list[Curve]] = {}
    for node, columns in sorted(nodes.items()):
        part = within(columns, start, start + end)
        for column, values in part.items():
            if column == "t_s" or _CORE.fullmatch(column) or not any(value is not None for value in values):
                continue
            name, whose = column, str(node)
            for pattern, kind, called in _PARTS:
                if match := pattern.fullmatch(column):
                    name, whose = f"{kind} {match[2]}", f"{node} {called.format(match[1])}"
            found.setdefault(name, []).append((whose, part["t_s"], values))
    made = []
    for name, (title, unit) in _FIRST.items():
        if curves := found.pop(name, None):
            made.append(draws.chart(title, unit, curves, **({"y": Scale(0.0, 104.0)} if name == "GPU util" else {})))
    return made + _others(draws, found, "", draws.detail.machines)


def _engines(draws: _Draws, engines: Mapping[str, Any], start: float, end: float) -> list[Chart]:
    found: dict[str, list[Curve]] = {}
    for engine, columns in sorted(engines.items()):
        part = within(columns, start, start + end)
        for column, values in _with_means(part).items():
            if column != "t_s" and any(value is not None for value in values):
                times = part["t_s"][-len(values) :] if values else []
                found.setdefault(column, []).append((str(engine), times, values))
    return _others(draws, found, "Engine: ", draws.detail.engines)


def _with_means(part: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Sums and counts of a histogram become what the mean was between two samples, in milliseconds."""
    made = {name: values for name, values in part.items() if not name.endswith(("_seconds_sum", "_count"))}
    for name, sums in part.items():
        counts = part.get(name.removesuffix("_seconds_sum") + "_count")
        if not name.endswith("_seconds_sum") or counts is None:
            continue
        means: list[float | None] = []
        for place in range(1, len(sums)):
            pairs = (sums[place - 1], sums[place], counts[place - 1], counts[place])
            is_known = all(value is not None for value in pairs)
            means.append(
                (pairs[1] - pairs[0]) * 1000 / (pairs[3] - pairs[2]) if is_known and pairs[3] > pairs[2] else None
            )
        made[f"{name.removesuffix('_seconds_sum')} mean, ms"] = means
    return made


def _others(draws: _Draws, found: Mapping[str, list[Curve]], prefix: str, most: int) -> list[Chart]:
    """A chart for each column that says anything and is not said better by another."""
    made = []
    for name, curves in found.items():
        is_better_there = name.endswith("_total") and f"{name.removesuffix('_total')}_per_s" in found
        if name not in _NOT_DRAWN and not is_better_there and any(value for _, _, ys in curves for value in ys):
            made.append(_column_chart(draws, prefix, name, curves))
    return made[:most]


def _column_chart(draws: _Draws, prefix: str, name: str, curves: Sequence[Curve]) -> Chart:
    """A column as it is; one that only counts up (`_total`) as what it gained per second."""
    for ending, unit in (("_total", "per second"), ("_per_s", "per second"), ("_percent", "%")):
        if name.endswith(ending):
            if ending == "_total":
                curves = [(who, *_gained(xs, ys)) for who, xs, ys in curves]
            return draws.chart(prefix + name.removesuffix(ending).replace("_", " "), unit, curves)
    return draws.chart(prefix + name.replace("_", " "), "", curves)


def _gained(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """Growth per second; a counter that fell was begun anew and has no growth there."""
    out_x: list[float] = []
    out_y: list[float | None] = []
    for place in range(1, len(xs)):
        before, now, lasted = ys[place - 1], ys[place], xs[place] - xs[place - 1]
        if lasted > 0:
            out_x.append(xs[place])
            out_y.append((now - before) / lasted if now is not None and before is not None and now >= before else None)
    return out_x, out_y


def envelope(curves: Sequence[Curve], end: float) -> list[Curve]:
    """The least, the median and the greatest of many curves in stretches of time."""
    stretches = 240
    parts: list[list[float]] = [[] for _ in range(stretches)]
    for _, xs, ys in curves:
        for at, value in zip(xs, ys, strict=True):
            if value is not None and 0 <= at < end:
                parts[int(at / end * stretches)].append(value)
    middles = [(place + 0.5) * end / stretches for place in range(stretches)]
    kept = [(at, part) for at, part in zip(middles, parts, strict=True) if part]
    times = [at for at, _ in kept]
    return [
        ("least", times, [min(part) for _, part in kept]),
        ("median", times, [statistics.median(part) for _, part in kept]),
        ("greatest", times, [max(part) for _, part in kept]),
    ]
