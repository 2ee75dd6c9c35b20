"""Charts as inline SVG, drawn from numbers alone: nothing to fetch, nothing to run, text of one size at every width.

A chart is a plot area that takes the width it is given. Lines live in a square of UNITS x UNITS that is stretched to
it; labels and marks are placed by percent, so that they are not. The scales stand in data attributes, from which a
script may read the values back (`Scale.back`); without one the chart is complete.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from common.bench.markup import Markup, escaped

UNITS = 10_000
COLOURS = 8  # classes s0 to s7 in the style sheet
DECADE_TICKS = 9


def tick_told(value: float) -> str:
    """A round value as short as it goes: `0.5`, `20`, `1,500`, `2.5M`."""
    size = abs(value)
    for least, name in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if size >= least:
            return f"{value / (1e3 if name == 'k' else least):.6g}{name}"
    return f"{value:,.6g}"


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: where a value lies on it, and what is written beside it."""

    low: float
    high: float
    is_log: bool = False
    label: str = ""
    format: Callable[[float], str] = tick_told

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        if self.is_log:
            value = max(value, self.low / 1e6)
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def back(self, share: float) -> float:
        """The value that lies there."""
        if self.is_log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis, about so many."""
        return _log_ticks(self.low, self.high, most) if self.is_log else _even_ticks(self.low, self.high, most)


def scale_of(
    values: Iterable[float | None],
    *,
    label: str = "",
    is_log: bool = False,
    from_zero: bool = True,
    format: Callable[[float], str] = tick_told,
) -> Scale:
    """An axis on which all values have room. A log axis leaves out what is not above 0."""
    kept = [value for value in values if value is not None and math.isfinite(value) and (value > 0 or not is_log)]
    if not kept:
        return Scale(0.1, 1.0, True, label, format) if is_log else Scale(0.0, 1.0, False, label, format)
    low, high = min(kept), max(kept)
    if is_log:
        low, high = low / 1.08, high * 1.08
        return Scale(low, high if high > low * 1.5 else low * 1.5, True, label, format)
    if from_zero and low >= 0:
        low = 0.0
    if high <= low:
        high = low + (abs(low) or 1.0)
    room = (high - low) * 0.06
    return Scale(low if low == 0 else low - room, high + room, False, label, format)


def _even_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    digits = 6 - math.floor(math.log10(step))
    return [round(number * step, digits) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in (tuple(range(1, 10)), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1, 5), (1,)):
        found = [
            factor * 10.0**power
            for power in range(begin, end + 1)
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        apart = min((math.log(b / a) for a, b in itertools.pairwise(found)), default=math.inf)
        # Words closer than an eighth of the axis would run into each other on a narrow page.
        if (len(found) <= most and apart >= math.log(high / low) / 8) or factors == (1,):
            break
    if len(found) < 2:
        # Less than a decade, and not at its beginning.
        return [tick for tick in _even_ticks(low, high, 4) if low <= tick <= high]
    every = max(1, math.ceil(len(found) / most))
    return found[::every]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; None breaks it. colour: 0 to COLOURS - 1."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int = 0
    is_dashed: bool = False
    is_faint: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with an explanation. kind: dot, ring (does not count), or drop (a line down to its label)."""

    x: float
    y: float
    label: str
    colour: int = 0
    kind: str = "dot"


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line across the plot at one value, with its name."""

    axis: str
    value: float
    label: str
    is_limit: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the x axis. kind: outside (does not count) or bracket (the answer lies in it)."""

    begin: float
    end: float
    label: str
    kind: str = "outside"


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. group: charts of the same group share their cross hair. note: what a reader must know of it."""

    title: str
    x: Scale
    y: Scale
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    rules: Sequence[Rule] = ()
    bands: Sequence[Band] = ()
    height: int = 150
    group: str = ""
    note: str = ""
    unit: str = ""
    has_legend: bool = field(default=True)


def thinned(xs: Sequence[float], ys: Sequence[float | None], most: int) -> tuple[list[float], list[float | None]]:
    """At most about `most` vertices: of each stretch the least and the greatest, in their order.

    No extreme is lost and nothing is averaged; values between the two of a stretch are not shown,
    nor gaps that are shorter than a stretch.
    """
    count = len(xs)
    if count <= most:
        return list(xs), list(ys)
    buckets = max(1, most // 2)
    out_x: list[float] = []
    out_y: list[float | None] = []
    for bucket in range(buckets):
        part = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        known = [(value, place) for place in part if (value := ys[place]) is not None]
        if not known:
            out_x.append(xs[part[0]])
            out_y.append(None)
            continue
        places = {min(known)[1], max(known, key=lambda pair: (pair[0], -pair[1]))[1]}
        for place in sorted(places):
            out_x.append(xs[place])
            out_y.append(ys[place])
    return out_x, out_y


def path_of(xs: Sequence[float], ys: Sequence[float | None], x: Scale, y: Scale) -> str:
    """The `d` of a curve in UNITS, y downwards, with relative whole steps: short, and exact to half a unit."""
    parts: list[str] = []
    last: tuple[int, int] | None = None
    for at, value in zip(xs, ys, strict=True):
        if value is None or not math.isfinite(value) or not math.isfinite(at):
            last = None
            continue
        here = (round(_held(x.at(at)) * UNITS), round((1 - _held(y.at(value))) * UNITS))
        if last is None:
            # A lone point has no length; a step of nothing lets round caps show it.
            parts.append(f"M{here[0]} {here[1]}h0")
        elif here != last:
            parts.append(f"l{here[0] - last[0]} {here[1] - last[1]}")
        last = here
    return "".join(parts)


def points_of(d: str, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """The vertices of a path that `path_of` wrote, as values: its inverse, within half a unit."""
    import re

    found: list[tuple[float, float]] = []
    here = (0, 0)
    for letter, first, second in re.findall(r"([Ml])(-?\d+) (-?\d+)", d):
        here = (int(first), int(second)) if letter == "M" else (here[0] + int(first), here[1] + int(second))
        found.append((x.back(here[0] / UNITS), y.back(1 - here[1] / UNITS)))
    return found


def _held(share: float) -> float:
    """Within a plot's width of the plot: what lies farther out would only make numbers long."""
    return min(max(share, -1.0), 2.0)


def _percent(share: float) -> str:
    return f"{_held(share) * 100:.2f}".rstrip("0").rstrip(".") + "%"


def draw(chart: Chart) -> Markup:
    """The chart as a <figure>. Every text in it is escaped."""
    named = [line for line in chart.lines if line.name]
    legend = ""
    if chart.has_legend and named:
        entries = "".join(f'<span class="key {_style(line)}">{escaped(line.name)}</span>' for line in named[:24])
        more = f"<span>and {len(named) - 24} more</span>" if len(named) > 24 else ""
        legend = f'<span class="legend">{entries}{more}</span>'
    note = f'<p class="note">{escaped(chart.note)}</p>' if chart.note else ""
    unit = f' <span class="unit">{escaped(chart.unit)}</span>' if chart.unit else ""
    group = f' data-group="{escaped(chart.group)}"' if chart.group else ""
    inside = "".join((_grid(chart), _bands(chart), _curves(chart), _marks(chart), _rules(chart)))
    return Markup(
        f'<figure class="chart"><figcaption><b>{escaped(chart.title)}</b>{unit}{legend}</figcaption>'
        f'<div class="frame"><svg class="plot" width="100%" height="{chart.height}" role="img"'
        f' aria-label="{escaped(_spoken(chart))}" data-x="{_wire(chart.x)}" data-y="{_wire(chart.y)}"'
        f' data-x-label="{escaped(chart.x.label)}"{group}>{inside}</svg></div>{note}</figure>'
    )


def _style(line: Line) -> str:
    return f"s{line.colour % COLOURS}{' dashed' if line.is_dashed else ''}"


def _spoken(chart: Chart) -> str:
    """For those who do not see it."""
    names = ", ".join(line.name for line in chart.lines if line.name)
    return f"{chart.title}{f' of {names[:300]}' if names else ''} over {chart.x.label or 'x'}"


def _wire(scale: Scale) -> str:
    return f"{'log' if scale.is_log else 'lin'} {scale.low!r} {scale.high!r}"


def _grid(chart: Chart) -> str:
    """Lines behind everything as one path, and the axes' words."""
    d, parts = "", []
    for value in chart.y.ticks(max(3, chart.height // 34)):
        share = 1 - chart.y.at(value)
        d += f"M0 {round(_held(share) * UNITS)}h{UNITS}"
        parts.append(
            f'<text class="yt" x="-6" y="{_percent(share)}" dy=".32em">{escaped(chart.y.format(value))}</text>'
        )
    for value in chart.x.ticks(6):
        share = chart.x.at(value)
        d += f"M{round(_held(share) * UNITS)} 0v{UNITS}"
        parts.append(f'<text class="xt" x="{_percent(share)}" y="100%" dy="15">{escaped(chart.x.format(value))}</text>')
    if chart.x.label:
        parts.append(f'<text class="xl" x="100%" y="100%" dy="28">{escaped(chart.x.label)}</text>')
    return _stretched(f'<path class="grid" vector-effect="non-scaling-stroke" d="{d}"/>') + "".join(parts)


def _stretched(paths: str) -> str:
    return (
        f'<svg class="lines" viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" width="100%" height="100%">'
        f"{paths}</svg>"
    )


def _bands(chart: Chart) -> str:
    parts = []
    for band in chart.bands:
        begin, end = (min(max(chart.x.at(value), 0.0), 1.0) for value in (band.begin, band.end))
        if end <= begin:
            continue
        parts.append(
            f'<rect class="{"bracket" if band.kind == "bracket" else "outside"}" x="{_percent(begin)}"'
            f' width="{_percent(end - begin)}" height="100%"><title>{escaped(band.label)}</title></rect>'
        )
    return "".join(parts)


def _curves(chart: Chart) -> str:
    parts = []
    for line in chart.lines:
        style = _style(line) + (" faint" if line.is_faint else "")
        d = path_of(line.xs, line.ys, chart.x, chart.y)
        if d:
            name = f' data-name="{escaped(line.name)}"' if line.name else ""
            parts.append(f'<path class="{style}" vector-effect="non-scaling-stroke"{name} d="{d}"/>')
    if not parts and not chart.marks:
        return '<text class="none" x="50%" y="50%">no samples</text>'
    return _stretched("".join(parts))


def _rules(chart: Chart) -> str:
    parts = []
    for rule in chart.rules:
        share = chart.x.at(rule.value) if rule.axis == "x" else chart.y.at(rule.value)
        if not 0 <= share <= 1:
            continue
        style = "rule limit" if rule.is_limit else "rule"
        if rule.axis == "x":
            at = _percent(share)
            # Near the right edge the name stands on the left of its line.
            side = ' class="rt end" dx="-4"' if share > 0.72 else ' class="rt" dx="4"'
            parts.append(f'<line class="{style}" x1="{at}" x2="{at}" y2="100%"/>')
            parts.append(f'<text{side} x="{at}" y="0" dy="11">{escaped(rule.label)}</text>')
        else:
            at = _percent(1 - share)
            parts.append(f'<line class="{style}" x2="100%" y1="{at}" y2="{at}"/>')
            # Named above the line, below it when there is no room above.
            parts.append(
                f'<text class="rt end" x="100%" dx="-3" y="{at}" dy="{13 if share > 0.9 else -4}">'
                f"{escaped(rule.label)}</text>"
            )
    return "".join(parts)


def _marks(chart: Chart) -> str:
    parts, drops = [], 0
    for mark in chart.marks:
        across, down = chart.x.at(mark.x), 1 - chart.y.at(mark.y)
        if mark.kind == "drop":
            # Each label a line above the one before: under a rising curve there is room for them.
            at, level = _percent(across), _percent(0.94 - 0.12 * drops)
            side = ' class="ft end" dx="-5"' if across > 0.7 else ' class="ft" dx="5"'
            parts.append(f'<line class="drop" x1="{at}" x2="{at}" y1="{_percent(down)}" y2="100%"/>')
            parts.append(f'<text{side} x="{at}" y="{level}">{escaped(mark.label)}</text>')
            drops += 1
        style = f"{'ring' if mark.kind == 'ring' else 'dot'} s{mark.colour % COLOURS}"
        place = f'cx="{_percent(across)}" cy="{_percent(down)}"'
        parts.append(f'<circle class="{style}" {place} r="3.5"><title>{escaped(mark.label)}</title></circle>')
    return "".join(parts)
