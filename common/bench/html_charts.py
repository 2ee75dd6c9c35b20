"""The charts of a report's loads beside each other: distributions of latencies, and the curve over a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.bench.figures import is_number, told, told_ms, told_share
from common.bench.histogram import Histogram, bounds_of
from common.bench.html_rows import Group, Row, bracket_of, families_of, load_of
from common.bench.markup import Markup, cut
from common.bench.metrics import MS
from common.bench.plots import COLOURS, Band, Chart, Line, Mark, Rule, Scale, draw, scale_of, thinned

DISTRIBUTIONS = (
    ("ttft", "TTFT", "time to first token"),
    ("tpot", "TPOT", "time per output token after the first"),
    ("itl", "ITL", "gaps between tokens"),
    ("e2e", "E2E", "whole answer"),
)
MARKED = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
OVERLAID = COLOURS


# distributions
def histogram_of(rows: Iterable[Row], name: str) -> Histogram | None:
    """The sum of the rows' histograms of one metric; None without samples or with what cannot be read."""
    whole = Histogram()
    for row in rows:
        data = ((row.report or {}).get("histograms") or {}).get(name)
        if not isinstance(data, Mapping):
            continue
        try:
            whole.merge(Histogram.from_wire(data))
        except (ValueError, KeyError, TypeError, AssertionError):
            return None
    return whole if whole.count else None


def cumulated(histogram: Histogram) -> tuple[list[float], list[float | None]]:
    """(milliseconds, share of samples that are not above): the distribution, bucket by bucket."""
    assert histogram.min is not None
    assert histogram.max is not None
    xs: list[float] = [histogram.min / MS]
    ys: list[float | None] = [0.0]
    seen = 0
    for bucket in sorted(histogram.counts):
        seen += histogram.counts[bucket]
        xs.append(min(max(bounds_of(bucket)[1], histogram.min), histogram.max) / MS)
        ys.append(seen / histogram.count)
    return xs, ys


def distributions(groups: Sequence[Group], *, limits: Mapping[str, Any], vertices: int = 300) -> list[Markup]:
    """Cumulated distributions, up to OVERLAID groups in one chart; one alone with its percentiles marked."""
    shown = _spread_out(groups, OVERLAID)
    made = []
    for name, title, about in DISTRIBUTIONS:
        found = [(group, whole) for group in shown if (whole := histogram_of(group.believed, name)) is not None]
        # ITL of few pieces and TPOT look the same; all four stay so that pages can be compared.
        if not found:
            continue
        lines, marks = [], []
        for place, (group, whole) in enumerate(found):
            xs, ys = cumulated(whole)
            xs, ys = thinned(xs, ys, vertices)
            name = group.title if group.is_valid else f"{group.title} (not to be believed)"
            lines.append(Line(name if len(found) > 1 else title, xs, ys, place))
            if len(found) == 1:
                marks = [
                    Mark(value / MS, share, f"{word} {told_ms(value / MS)}", 0, "drop")
                    for word, share in MARKED
                    if (value := whole.percentile(share)) is not None
                ]
        samples = sum(whole.count for _, whole in found)
        made.append(draw(_distribution(title, about, lines, marks, limits.get(name), samples, len(found) > 1)))
    return made


def _distribution(
    title: str, about: str, lines: list[Line], marks: list[Mark], limit: Any, samples: int, has_legend: bool
) -> Chart:
    low = min(line.xs[0] for line in lines)
    middle = min(_at_share(line, 0.01) for line in lines)
    high = max(line.xs[-1] for line in lines)
    is_log = middle > 0 and high / max(middle, 1e-9) > 8
    values = [value for line in lines for value in line.xs if not is_log or value >= middle / 2]
    if is_number(limit) and float(limit) < high * 3:
        values.append(float(limit))
    # What lies far from 0 would be a wall at the right edge of an axis that begins there.
    x = scale_of(values or [low, high], label="ms", is_log=is_log, from_zero=low < 0.4 * high)
    rules = [Rule("x", float(limit), f"SLO {told_ms(float(limit))}", True)] if is_number(limit) else []
    return Chart(
        title,
        x,
        Scale(0.0, 1.02, False, "share", lambda share: f"{share * 100:.0f} %"),
        lines,
        marks,
        rules,
        height=190,
        unit=f"{about}, {samples:,} samples{', logarithmic' if is_log else ''}",
        has_legend=has_legend,
    )


def _at_share(line: Line, share: float) -> float:
    return next((x for x, y in zip(line.xs, line.ys, strict=True) if y is not None and y >= share), line.xs[-1])


def _spread_out(groups: Sequence[Group], most: int) -> list[Group]:
    """At most so many, the first and the last among them."""
    able = [group for group in groups if any(row.report for row in group.believed)]
    if len(able) <= most:
        return able
    return [able[round(place * (len(able) - 1) / (most - 1))] for place in range(most)]


# the curve over a sweep
def curves(groups: Sequence[Group], axis: str, slo: Mapping[str, Any], is_search: bool) -> list[Markup]:
    """Latency against throughput, speed of one answer against throughput, and how the load was met."""
    families = families_of(groups, axis)
    has_tokens = any(group.figure("output_tok_s") for group in groups)
    across = "output_tok_s" if has_tokens else "req_s"
    label = "output tokens/s of all" if has_tokens else "requests/s"
    first = "ttft" if any(group.figure("ttft_p50_ms") is not None for group in groups) else "e2e"
    made = [_latency_curve(families, across, label, first, slo.get(first))]
    if any(group.figure("tpot_p50_ms") for group in groups):
        made.append(_speed_curve(families, across, label, slo.get("tpot")))
    elif first != "e2e" and any(group.figure("e2e_p50_ms") is not None for group in groups):
        made.append(_latency_curve(families, across, label, "e2e", slo.get("e2e")))
    if axis:
        made.append(_load_curve(families, axis))
        if any(group.figure("slo_attainment") is not None for group in groups):
            made.append(_attainment_curve(families, axis, slo, is_search))
    return [draw(chart) for chart in made]


def _value_lines(
    families: Mapping[str, list[Group]], across: str, names: Sequence[tuple[str, str, bool]], turned: bool = False
) -> tuple[list[Line], list[Mark]]:
    """A line per family and figure through the medians of its points, and every point as a mark.

    names: (figure, word, is dashed). turned: 1000 / value, for times per token that become speeds.
    """
    lines, marks = [], []
    for place, (family, groups) in enumerate(families.items()):
        for figure, word, is_dashed in names:
            pairs = [
                (x, 1000 / y if turned else y)
                for group in groups
                if group.is_valid and (x := group.figure(across)) is not None and (y := group.figure(figure))
            ]
            name = f"{family} {word}".strip()
            lines.append(Line(name, [x for x, _ in pairs], [y for _, y in pairs], place, is_dashed))
            for row in (row for group in groups for row in group.rows):
                here, there = row.figures.get(across), row.figures.get(figure)
                if here is None or not there or not row.is_judged:
                    continue
                value = 1000 / there if turned else there
                said = f"point {row.number}: {_said(row)} {word} {told(value)}"
                marks.append(Mark(here, value, said, place, "dot" if row.word == "valid" else "ring"))
    return lines, marks


def _said(row: Row) -> str:
    from common.bench.figures import changes_told

    return f"{changes_told(row.changes)} ({row.word})".strip()


def _latency_curve(families: Mapping[str, list[Group]], across: str, label: str, metric: str, limit: Any) -> Chart:
    lines, marks = _value_lines(
        families, across, ((f"{metric}_p50_ms", "p50", False), (f"{metric}_p99_ms", "p99", True))
    )
    values = [mark.y for mark in marks] + ([float(limit)] if is_number(limit) else [])
    y = scale_of(values, label="ms", is_log=True)
    return Chart(
        f"{metric.upper()} against throughput",
        scale_of([mark.x for mark in marks], label=label),
        y,
        lines,
        marks,
        [Rule("y", float(limit), f"SLO {told_ms(float(limit))}", True)] if is_number(limit) else [],
        height=240,
        unit="ms, logarithmic; rings: not to be believed",
    )


def _speed_curve(families: Mapping[str, list[Group]], across: str, label: str, limit: Any) -> Chart:
    names = (("tpot_p50_ms", "p50", False), ("tpot_p99_ms", "p99 (slow)", True))
    lines, marks = _value_lines(families, across, names, turned=True)
    bound = 1000 / float(limit) if is_number(limit) and float(limit) > 0 else None
    return Chart(
        "Speed of one answer against throughput",
        scale_of([mark.x for mark in marks], label=label),
        scale_of([mark.y for mark in marks] + ([bound] if bound else [])),
        lines,
        marks,
        [Rule("y", bound, f"SLO {told(bound)} tokens/s", True)] if bound else [],
        height=240,
        unit="tokens/s of one request, 1000 / TPOT",
    )


def _load_curve(families: Mapping[str, list[Group]], axis: str) -> Chart:
    lines, marks = [], []
    loads = [load_of(group, axis) for groups in families.values() for group in groups]
    for place, (family, groups) in enumerate(families.items()):
        pairs = [(load_of(group, axis), group.figure("req_s")) for group in groups if group.is_valid]
        lines.append(Line(family or "answered", [x for x, _ in pairs], [y for _, y in pairs], place))
        for row in (row for group in groups for row in group.rows):
            load, rate = row.changes.get(axis), row.figures.get("req_s")
            if row.is_judged and rate is not None and is_number(load):
                said = f"point {row.number}: {_said(row)} {told(rate)} requests/s"
                marks.append(Mark(float(load), rate, said, place, "dot" if row.word == "valid" else "ring"))
    if axis == "rate" and loads:
        lines.insert(0, Line("asked", [min(loads), max(loads)], [min(loads), max(loads)], 7, True))
    values = [y for line in lines for y in line.ys] + [mark.y for mark in marks]
    unit = "requests/s" if axis == "rate" else "requests on their way"
    return Chart(
        "Answered against asked",
        scale_of(loads, label=f"{axis}, {unit}"),
        scale_of(values),
        lines,
        marks,
        height=200,
        unit="good requests/s",
    )


def _attainment_curve(families: Mapping[str, list[Group]], axis: str, slo: Mapping[str, Any], is_search: bool) -> Chart:
    lines, marks, bands = [], [], []
    for place, (family, groups) in enumerate(families.items()):
        pairs = [(load_of(group, axis), group.figure("slo_attainment")) for group in groups if group.is_valid]
        lines.append(Line(family or "met the SLO", [x for x, _ in pairs], [y for _, y in pairs], place))
        for row in (row for group in groups for row in group.rows):
            load, share = row.changes.get(axis), row.figures.get("slo_attainment")
            if row.is_judged and share is not None and is_number(load):
                said = f"point {row.number}: {_said(row)} {told_share(share)}"
                marks.append(Mark(float(load), share, said, place, "dot" if row.word == "valid" else "ring"))
        if is_search or len(families) == 1:
            most, least = bracket_of(groups, axis, slo)
            if most is not None and least is not None:
                said = f"the answer lies between {told(most)}, which met the SLO, and {told(least)}, which did not"
                bands.append(Band(most, least, said, "bracket"))
    asked = slo.get("attainment")
    return Chart(
        "SLO attainment",
        scale_of([mark.x for mark in marks], label=axis),
        Scale(min(0.0, *(mark.y for mark in marks)) if marks else 0.0, 1.04, False, "share", told_share),
        lines,
        marks,
        [Rule("y", float(asked), f"asked {told_share(float(asked))}", True)] if is_number(asked) else [],
        bands,
        height=200,
        unit="share of the window's requests",
        note=cut(bands[0].label, 200) if bands else "",
    )
