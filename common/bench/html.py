"""One HTML file with everything that a benchmark found: it opens without a network, on paper, and for decades.

The file holds its style, its charts (SVG) and its numbers (JSON). A content security policy forbids it everything
else. Texts of models, servers and people are escaped by construction (`common.bench.markup`). The script only shows
values under the pointer and hands the JSON out: without it nothing is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from common.bench import html_charts as charts
from common.bench import html_text as words
from common.bench import html_time
from common.bench.figures import changes_told, told, told_ms
from common.bench.html_rows import Group, Row, best_of, groups_of, load_axis, rows_of
from common.bench.html_style import POLICY, SCRIPT, STYLE
from common.bench.markup import Markup, cut, joined, tag
from common.bench.series import bounded

DATA_BYTES = 6_000_000
SAMPLES_KEPT = 2_000
OPEN_POINTS = 2
MAX_DETAILS = 500


def render(benchmark: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], series: Mapping[str, Any]) -> str:
    """The file.

    benchmark: a BenchmarkView as plain data. reports: the points' reports as plain data in order, each with its
    PointView under "point". series: what `common.bench.series.series_of` read, or {}.
    """
    rows = rows_of(benchmark, reports)
    groups = groups_of(rows)
    recipe = benchmark.get("recipe") or {}
    axis = load_axis(groups, str((recipe.get("search") or {}).get("over") or ""))
    title = words.title_of(benchmark)
    body = [
        _head(benchmark, title),
        tag("p", words.sentence(benchmark, rows, groups, axis), class_="lead"),
        words.verdict(benchmark, rows),
        _main_figures(groups),
        _sweep(groups, axis, recipe),
        _table(rows, groups),
        _distributions(groups, recipe),
        words.errors(rows),
        words.warnings(rows),
        _details(rows, series),
        words.made_of(benchmark, rows),
        words.definitions(rows),
        _raw(benchmark, reports, series, title),
    ]
    return _document(title, joined(body))


def of_run(report: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `render` takes, made from one report: of a run that no head knows of, or of one point by itself."""
    plan = report.get("plan") or {}
    name = f"{plan.get('model') or plan.get('api') or 'load'}: {plan.get('schedule') or plan.get('loop') or ''}"
    known = report.get("point")
    coverage = report.get("coverage")
    point: dict[str, Any] = {
        "number": 0, "changes": {}, "repetition": 0, "skew_ms": 0.0,
        "coverage": coverage.get("share", 1.0) if isinstance(coverage, Mapping) else 1.0,
    } | (dict(known) if isinstance(known, Mapping) else {}) | {
        "status": "completed", "is_valid": report.get("is_valid"), "reasons": [], "figures": {},
    }  # fmt: skip
    benchmark: dict[str, Any] = {"name": name.strip(": "), "status": "completed", "points": [point]}
    for part in ("recipe", "recipe_sha256", "facts"):
        if report.get(part):
            benchmark[part] = report[part]
    limits = (report.get("goodput") or {}).get("limits_ms") or {}
    if limits and "recipe" not in benchmark:
        benchmark["recipe"] = {"slo": dict(limits)}
    return benchmark, [dict(report) | {"point": point}]


def _document(title: str, body: Markup) -> str:
    head = joined(
        (
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("title", f"{title} - Herder benchmark"),
            tag("style", Markup(STYLE)),
        )
    )
    shown = joined((tag("main", body), tag("script", Markup(SCRIPT))))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{shown}</body></html>\n'


def _head(benchmark: Mapping[str, Any], title: str) -> Markup:
    about = (benchmark.get("recipe") or {}).get("description") or ""
    return tag(
        "header",
        tag("p", "Herder benchmark", f" {benchmark['id']}" if benchmark.get("id") else "", class_="dim"),
        tag("h1", title),
        tag("p", cut(about, 400), class_="dim") if about else None,
    )


def _main_figures(groups: Sequence[Group]) -> Markup:
    """Large figures: of the only load, or of the best among those to be believed."""
    best, name = best_of([group for group in groups if group.is_valid] or groups)
    if best is None:
        return Markup("")
    figures = {figure: value for figure, _ in words.TILES if (value := best.figure(figure)) is not None}
    said = "most goodput" if name == "goodput_req_s" else "highest throughput"
    told = "" if len(groups) == 1 else f"At the {said}: {cut(best.title, 160)}"
    if not best.is_valid:
        told = f"{told}; not to be believed" if told else "Not to be believed"
    return words.tiles(figures, told)


def _sweep(groups: Sequence[Group], axis: str, recipe: Mapping[str, Any]) -> Markup:
    judged = [group for group in groups if any(row.is_judged for row in group.rows)]
    if len(judged) < 2:
        return Markup("")
    made = charts.curves(judged, axis, recipe.get("slo") or {}, bool(recipe.get("search")))
    return joined((tag("h2", "Throughput and latency"), tag("div", made, class_="charts")))


def _table(rows: Sequence[Row], groups: Sequence[Group]) -> Markup:
    if not rows or (len(rows) == 1 and rows[0].report is not None):
        return Markup("")  # the figures of a single run stand above, large
    return joined((tag("h2", "Points"), words.points(rows, groups)))


def _distributions(groups: Sequence[Group], recipe: Mapping[str, Any]) -> Markup:
    made = charts.distributions(groups, limits=recipe.get("slo") or {})
    if not made:
        return Markup("")
    able = sum(1 for group in groups if any(row.report for row in group.believed))
    note = "Share of the requests (ITL: of the gaps) that took no longer; repetitions are merged, sample by sample."
    if able > charts.OVERLAID:
        note += f" {charts.OVERLAID} of {able} loads are shown, spread evenly; every point has its own below."
    return joined(
        (tag("h2", "How latencies are distributed"), tag("p", note, class_="dim"), tag("div", made, class_="charts"))
    )


def _details(rows: Sequence[Row], series: Mapping[str, Any]) -> Markup:
    """Each point by itself; a few are open from the start."""
    shown = [row for row in rows if row.report is not None][:MAX_DETAILS]
    if not shown:
        return Markup("")
    detail = html_time.detail_for(len(shown))
    made = [_point(row, series, detail, len(shown)) for row in shown]
    note = None
    if len(shown) > html_time.MAX_POINTS_IN_FULL:
        note = tag("p", "There are many points: charts are coarser, and show of many machines the range.", class_="dim")
    return joined((tag("h2", "Point by point" if len(shown) > 1 else "The run"), note, *made))


def _point(row: Row, series: Mapping[str, Any], detail: html_time.Detail, count: int) -> Markup:
    assert row.report is not None
    window = row.report.get("window") or {}
    counts = row.report.get("counts") or {}
    facts = [
        f"{counts.get('sent', 0):,} sent, {counts.get('good', 0):,} good and {counts.get('failed', 0):,} failed of "
        f"{counts.get('in_window', 0):,} in the window",
        f"window {told(window.get('begin_s'))} s to {told(window.get('end_s'))} s",
    ]
    if row.skew_ms:
        facts.append(f"load nodes began within {told_ms(row.skew_ms)} of each other")
    if row.coverage < 1:
        facts.append(f"{row.coverage:.2%} of the schedule was performed")
    group = [Group(row.changes, (row,))]
    inside = [tag("p", "; ".join(facts), class_="dim"), words.latencies(row.report), words.parts(row.report)]
    if count > 1:
        inside.append(
            tag("div", charts.distributions(group, limits={}, vertices=detail.vertices), class_="charts four")
        )
    timeline = html_time.over_time(row, series, detail)
    if timeline:
        inside += [tag("h3", "Over time"), tag("p", "Grey: outside the measured window.", class_="note")]
        inside.append(tag("div", timeline, class_="charts"))
    if count == 1:
        return tag("div", inside, id=f"point-{row.number}")
    return tag(
        "details",
        tag("summary", f"Point {row.number} ", words.badge(row.word), " ", tag("span", _line_of(row), class_="dim")),
        *inside,
        id=f"point-{row.number}",
        open=count <= OPEN_POINTS,
    )


def _line_of(row: Row) -> str:
    figures = row.figures
    parts = [cut(changes_told(row.changes), 100)]
    if row.repetition:
        parts.append(f"repetition {row.repetition + 1}")
    if "req_s" in figures:
        parts.append(f"{told(figures['req_s'])} requests/s")
    for name, title in (("ttft_p50_ms", "TTFT p50"), ("ttft_p99_ms", "p99")):
        if name in figures:
            parts.append(f"{title} {told_ms(figures[name])}")
    return ", ".join(part for part in parts if part)


# data
def _raw(
    benchmark: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], series: Mapping[str, Any], title: str
) -> Markup:
    """The numbers themselves, as JSON within the file."""
    data, left_out = data_of(benchmark, reports, series)
    stem = "".join(char if char.isalnum() and char.isascii() else "-" for char in title)[:60].strip("-") or "benchmark"
    said = "The numbers of this page stand in it as JSON, in the element with the id `data`."
    if left_out:
        said += f" Left out to keep it small: {', '.join(left_out)}; the head keeps everything."
    return joined(
        (
            tag("h2", "Raw data", class_="raw"),
            tag("p", said, class_="dim raw"),
            tag("button", "Save as JSON", type="button", data_of="data", data_name=f"{stem}.json", class_="raw"),
            tag("script", Markup(script_json(data)), type="application/json", id="data"),
            tag("footer", "Made by Herder. Times are UTC."),
        )
    )


def data_of(
    benchmark: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], series: Mapping[str, Any]
) -> tuple[bytes, list[str]]:
    """The JSON that goes into the file, within DATA_BYTES, and what was left out for that."""
    drawn = ("ttft", "tpot", "itl", "e2e")
    steps = (
        ("", None),
        ("histograms that are not drawn", lambda report: _with_histograms(report, drawn)),
        ("all histograms", lambda report: _with_histograms(report, ())),
        ("seconds of the points", lambda report: _with_histograms(report, ()) | {"series": []}),
        ("reports", None),
    )
    kept_series = {
        kind: {name: bounded(columns, SAMPLES_KEPT) for name, columns in (series.get(kind) or {}).items()}
        for kind in ("nodes", "engines")
    }
    left_out: list[str] = []
    made = [_without_repeats(report, reports[0]) if place else dict(report) for place, report in enumerate(reports)]
    for number, (word, change) in enumerate(steps):
        if word:
            left_out.append(word)
        made = [change(report) for report in made] if change else made if not number else []
        for kept, name in ((kept_series, ""), ({}, "samples of machines and engines")):
            data = msgspec.json.encode({"benchmark": benchmark, "reports": made, "series": kept})
            if len(data) <= DATA_BYTES:
                return data, left_out + ([name] if name and any(kept_series.values()) else [])
    return msgspec.json.encode({"benchmark": {"id": benchmark.get("id")}, "reports": []}), ["everything"]


def _without_repeats(report: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the first report says word for word the same."""
    same = ("formulas", "rules", "recipe", "facts", "benchmark", "machine", "versions")
    return {name: value for name, value in report.items() if name not in same or value != first.get(name)}


def _with_histograms(report: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    found = report.get("histograms") or {}
    return dict(report) | {"histograms": {name: found[name] for name in names if name in found}}


def script_json(data: bytes) -> str:
    """JSON that cannot end the element which it stands in: the same document."""
    text = data.decode()
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
