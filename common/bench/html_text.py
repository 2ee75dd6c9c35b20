"""The words of a report: what was asked and found, whether to believe it, tables, errors, and how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from common.bench.figures import changes_told, is_number, told, told_figure, told_ms, told_share
from common.bench.html_rows import Group, Row, best_of, bracket_of
from common.bench.markup import Markup, cut, joined, table, tag

REASONS = {
    "degraded": "a load node was lost: only a part of the schedule was performed; nothing was rescaled",
    "failed": "it did not run to its end",
}
LATENCY_ROWS = (
    *("ttft", "ttft_sched", "ttfo", "tpot", "itl", "icl", "stall", "e2e", "e2e_sched", "tail", "send_delay"),
    *("send_lag", "connect"),
)
COLUMNS = (
    ("req_s", "req/s"),
    ("output_tok_s", "tokens/s"),
    ("ttft_p50_ms", "TTFT p50"),
    ("ttft_p99_ms", "TTFT p99"),
    ("tpot_p50_ms", "TPOT p50"),
    ("tpot_p99_ms", "TPOT p99"),
    ("e2e_p50_ms", "E2E p50"),
    ("e2e_p99_ms", "E2E p99"),
    ("error_rate", "errors"),
    ("goodput_req_s", "goodput/s"),
    ("slo_attainment", "met SLO"),
)
TILES = (
    ("req_s", "requests per second"),
    ("output_tok_s", "output tokens per second"),
    ("ttft_p50_ms", "TTFT, median"),
    ("ttft_p99_ms", "TTFT, p99"),
    ("tpot_p50_ms", "TPOT, median"),
    ("e2e_p99_ms", "whole answer, p99"),
    ("goodput_req_s", "requests per second within the SLO"),
    ("error_rate", "of the requests failed"),
)
MAX_NAMED = 12
MAX_SAMPLES = 5
MAX_PARTS = 64
FACTS_BYTES = 60_000


def title_of(benchmark: Mapping[str, Any]) -> str:
    """The benchmark's name."""
    return cut(benchmark.get("name") or benchmark.get("id") or "benchmark", 120)


# one sentence
def sentence(benchmark: Mapping[str, Any], rows: Sequence[Row], groups: Sequence[Group], axis: str) -> str:
    """What was asked and what was found, in one sentence each way."""
    judged = [group for group in groups if any(row.is_judged for row in group.rows)]
    return f"{_asked(benchmark, rows, groups)} {_found(benchmark, judged, axis)}"


def _asked(benchmark: Mapping[str, Any], rows: Sequence[Row], groups: Sequence[Group]) -> str:
    plan = next(((row.report or {}).get("plan") or {} for row in rows if row.report), {})
    recipe = benchmark.get("recipe") or {}
    load = recipe.get("load") or {}
    model = benchmark.get("model") or load.get("model") or plan.get("model")
    whom = f"service {benchmark['service']}" if benchmark.get("service") else plan.get("url") or "the server"
    what = f"{cut(model, 100)} at {cut(whom, 120)}" if model else cut(whom, 120)
    nodes = benchmark.get("load_nodes") or ()
    origin = f" from {len(nodes)} load nodes together" if len(nodes) > 1 else f" from {nodes[0]}" if nodes else ""
    kept = "load"
    if plan.get("loop"):
        article = "an" if plan["loop"] == "open" else "a"
        kept = f"{article} {plan['loop']} loop, {plan.get('schedule') or ''}".strip(", ")
    if len(groups) <= 1:
        return f"{what} was given {cut(kept, 160)}{origin}."
    search = recipe.get("search") or {}
    if search:
        return f"{what} was searched for the highest {search.get('over', 'rate')} that meets its SLO{origin}."
    repeated = max((len(group.rows) for group in groups), default=1)
    times = f", {repeated} times each" if repeated > 1 else ""
    fields = ", ".join(_range_told(name, groups) for name in groups[0].changes)
    return f"{what} was given {len(groups)} different loads{times}{origin}: {cut(fields, 200)}."


def _range_told(name: str, groups: Sequence[Group]) -> str:
    values = list(dict.fromkeys(changes_told({name: group.changes.get(name)}).partition("=")[2] for group in groups))
    if len(values) == 1:
        return f"{name} {values[0]}"
    numbers = [float(value) for group in groups if is_number(value := group.changes.get(name))]
    if len(numbers) == len(groups):
        return f"{name} {min(numbers):g} to {max(numbers):g}"
    return f"{name} {' or '.join(values[:4])}{' or ...' if len(values) > 4 else ''}"


def _found(benchmark: Mapping[str, Any], groups: Sequence[Group], axis: str) -> str:
    believed = [group for group in groups if group.is_valid]
    if not groups:
        return "Nothing was measured yet." if benchmark.get("status") != "failed" else "Nothing was measured."
    if not believed:
        return "None of it may be believed; the reasons stand below."
    recipe = benchmark.get("recipe") or {}
    slo = recipe.get("slo") or {}
    if recipe.get("search") and axis:
        best = benchmark.get("best") or {}
        most, least = bracket_of(groups, axis, slo)
        most = float(best["load"]) if is_number(best.get("load")) else most
        why = cut(best.get("why") or "", 200)
        if most is None:
            return f"No {axis} that was tried met the SLO{f': {why}' if why else ''}."
        above = why or (f"{told(least)} did not" if least is not None else "nothing higher was tried")
        at = next((group for group in believed if group.changes.get(axis) == most), None)
        return f"The highest {axis} that met it is {told(most)}; {above}. There:{_in_short(at)}"
    if len(believed) == 1:
        return f"It answered{_in_short(believed[0])}"
    best, name = best_of(believed)
    if best is None:
        return "Nothing was answered."
    if name == "goodput_req_s":
        peak = max(believed, key=lambda group: group.figure("output_tok_s") or group.figure("req_s") or 0.0)
        return (
            f"Most requests met the SLO with {cut(best.title, 120)}: {told(best.figure(name))} good ones per second,"
            f"{_in_short(best)} Throughput was highest with {cut(peak.title, 120)}: {_rate_of(peak)}."
        )
    return f"Throughput was highest with {cut(best.title, 120)}:{_in_short(best)}"


def _rate_of(group: Group) -> str:
    tokens, rate = group.figure("output_tok_s"), group.figure("req_s")
    return f"{told(tokens)} tokens/s" if tokens else f"{told(rate)} requests/s"


def _in_short(group: Group | None) -> str:
    if group is None:
        return ""
    rate, tokens = group.figure("req_s"), group.figure("output_tok_s")
    parts = []
    if rate is not None:
        parts.append(f"{told(rate)} requests/s{f' ({told(tokens)} tokens/s)' if tokens else ''}")
    first = "ttft" if group.figure("ttft_p50_ms") is not None else "e2e"
    if group.figure(f"{first}_p50_ms") is not None:
        middle, tail = (told_ms(group.figure(f"{first}_{share}_ms")) for share in ("p50", "p99"))
        parts.append(f"{first.upper()} {middle} at the median and {tail} at p99")
    if (errors := group.figure("error_rate")) is not None:
        parts.append("no errors" if errors == 0 else f"{told_share(errors)} errors")
    return f" {', '.join(parts)}." if parts else ""


# verdict
def verdict(benchmark: Mapping[str, Any], rows: Sequence[Row]) -> Markup:
    """Whether to believe it, and every reason why not, first of all."""
    status = str(benchmark.get("status") or "completed")
    judged = [row for row in rows if row.is_judged]
    invalid = [row for row in rows if row.word == "invalid"]
    lost = [row for row in rows if row.word in ("failed", "cancelled")]
    degraded = [row for row in rows if row.is_degraded]
    parts: list[Markup] = []
    if status in ("failed", "cancelled") or benchmark.get("error"):
        error = benchmark.get("error") or {}
        said = ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))
        parts.append(_box("invalid", status.capitalize(), said or f"The benchmark was {status}.", ()))
    elif status != "completed":
        parts.append(_box("open", "Not finished", f"{status}; what is shown is what has been measured so far.", ()))
    if invalid or lost:
        whole = "What was measured" if len(invalid) == len(judged) else f"{len(invalid)} of {len(judged)} points"
        said = f"{whole} must not be believed." if invalid else ""
        if lost:
            said += f" {len(lost)} of {len(rows)} points did not run to their end."
        parts.append(_box("invalid", "Invalid", said.strip(), _reasons_told([*invalid, *lost])))
    if degraded or benchmark.get("is_degraded"):
        items = [_loss_told(row) for row in degraded[:MAX_NAMED]]
        if len(degraded) > MAX_NAMED:
            items.append(f"and {len(degraded) - MAX_NAMED} more points")
        said = "Load was lost on the way. Figures are of what was performed; nothing was rescaled."
        parts.append(_box("degraded", "Degraded", said, items))
    if not parts and judged:
        said = "The generator was on time, read in time, sent what was asked, and lost nothing."
        parts.append(_box("valid", "Valid", said, ()))
    return joined(parts)


def _loss_told(row: Row) -> str:
    found = (row.report or {}).get("reasons") or ()
    said = next((str(one.get("said", "")) for one in found if one.get("code") == "degraded"), "")
    return f"point {row.number}: {said or f'{told_share(row.coverage)} of its schedule was performed'}"


def _box(kind: str, word: str, said: str, items: Iterable[str]) -> Markup:
    listed = [tag("li", cut(item, 500)) for item in items]
    return tag(
        "div",
        tag("b", word, class_="word"),
        tag("p", cut(said, 600)) if said else None,
        tag("ul", listed) if listed else None,
        class_=f"verdict {kind}",
        role="status",
    )


def _reasons_told(rows: Sequence[Row]) -> list[str]:
    """One line per reason with the points that it holds for, and what the first of them said."""
    found: dict[str, tuple[str, list[int]]] = {}
    for row in rows:
        said = {str(one.get("code")): str(one.get("said", "")) for one in (row.report or {}).get("reasons") or ()}
        codes = [code for code in row.reasons if code != "degraded"] or [row.status or "failed"]
        for code in codes:
            about = said.get(code) or row.error or REASONS.get(code, "")
            found.setdefault(code, (about, []))[1].append(row.number)
    return [
        f"{code}{': ' if about else ''}{about} ({_points_told(numbers)})" for code, (about, numbers) in found.items()
    ]


def _points_told(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:MAX_NAMED])
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    return f"point{'s' if len(numbers) > 1 else ''} {shown}{more}"


def warnings(rows: Sequence[Row]) -> Markup:
    """What a reader should know before comparing."""
    found: dict[str, tuple[str, list[int]]] = {}
    for row in rows:
        for one in (row.report or {}).get("warnings") or ():
            found.setdefault(str(one.get("code")), (str(one.get("said", "")), []))[1].append(row.number)
    if not found:
        return Markup("")
    lines = [
        tag("li", tag("b", code), f": {cut(said, 400)} ", tag("span", f"({_points_told(numbers)})", class_="dim"))
        for code, (said, numbers) in found.items()
    ]
    return joined((tag("h2", "What to know before comparing"), tag("ul", lines)))


# numbers
def badge(word: str) -> Markup:
    """A state in its colour."""
    kind = word if word in ("valid", "invalid", "degraded") else "invalid" if word == "failed" else "open"
    return tag("span", word, class_=f"badge {kind}")


def tiles(figures: Mapping[str, float], about: str) -> Markup:
    """The main figures of one point, large."""
    shown = [(name, said) for name, said in TILES if name in figures]
    if not shown:
        return Markup("")
    made = [
        tag("div", tag("b", told_figure(name, figures[name])), tag("span", said), class_="tile") for name, said in shown
    ]
    return joined((tag("h3", about) if about else None, tag("div", made, class_="tiles")))


def points(rows: Sequence[Row], groups: Sequence[Group]) -> Markup:
    """Every point in a line."""
    shown = [(name, title) for name, title in COLUMNS if any(name in row.figures for row in rows)]
    has_repetitions = any(len(group.rows) > 1 for group in groups)
    is_partial = any(row.coverage < 1 for row in rows)
    has_skew = any(row.skew_ms for row in rows)
    heads: list[Any] = ["point", "load", *(["rep."] if has_repetitions else []), "verdict"]
    heads += [title for _, title in shown]
    heads += ["coverage"] if is_partial else []
    heads += ["start skew"] if has_skew else []
    lines = []
    for row in rows:
        name = tag("a", str(row.number), href=f"#point-{row.number}") if row.report is not None else str(row.number)
        load = cut(changes_told(row.changes) or "as asked", 100)
        line: list[Any] = [name, load, *([str(row.repetition + 1)] if has_repetitions else []), badge(row.word)]
        line += [told_figure(figure, row.figures.get(figure)) for figure, _ in shown]
        line += [told_share(row.coverage)] if is_partial else []
        line += [told_ms(row.skew_ms)] if has_skew else []
        lines.append(line)
    return table(heads, lines, numbers_from=len(heads) - len(shown) - is_partial - has_skew)


def latencies(report: Mapping[str, Any]) -> Markup:
    """Every metric of a point, in milliseconds, with its formula at hand."""
    found = report.get("latency") or {}
    formulas = report.get("formulas") or {}
    lines = []
    for name in LATENCY_ROWS:
        summary = found.get(name) or {}
        if not summary.get("count"):
            continue
        shares = summary.get("percentiles") or {}
        bounds = summary.get("upper_99") or {}
        cells = [told(summary.get("mean"))]
        for share in ("p50", "p90", "p95", "p99", "p999"):
            has_bound = summary.get("is_histogram") or bounds.get(share) is not None or share == "p50"
            cells.append(("" if has_bound else "~") + told(shares.get(share)))
        adjusted = summary.get("adjusted") or {}
        if adjusted:
            cells.append("infinite" if adjusted.get("p99") is None else told(adjusted["p99"]))
        else:
            cells.append("")
        label = tag("span", name, title=cut(formulas.get(name, ""), 300))
        lines.append([label, f"{summary['count']:,}", *cells, told(summary.get("min")), told(summary.get("max"))])
    if not lines:
        return Markup("")
    heads = ["ms", "n", "mean", "p50", "p90", "p95", "p99", "p99.9", "p99, failed = infinite", "min", "max"]
    if not any(line[8] for line in lines):
        heads.pop(8)
        lines = [[*line[:8], *line[9:]] for line in lines]
    has_estimates = any(isinstance(cell, str) and cell.startswith("~") for line in lines for cell in line)
    note = tag("p", "~: too few samples for a 99 % bound on this percentile", class_="note") if has_estimates else None
    return joined((table(heads, lines), note))


def parts(report: Mapping[str, Any]) -> Markup:
    """The main figures of each class of requests and of each server, where there were several."""
    made = []
    for name, title in (("classes", "Classes of requests"), ("endpoints", "Servers")):
        found = {key: value for key, value in (report.get(name) or {}).items() if isinstance(value, Mapping)}
        if len(found) < 2:
            continue
        lines = []
        for key, value in list(found.items())[:MAX_PARTS]:
            line: list[Any] = [cut(key, 120), f"{value.get('sent', 0):,}", f"{value.get('failed', 0):,}"]
            for metric in ("ttft", "tpot", "e2e"):
                shares = (value.get(metric) or {}).get("percentiles") or {}
                line += [told_ms(shares.get("p50")), told_ms(shares.get("p99"))]
            lines.append(line)
        heads = ["", "sent", "failed", "TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "p99"]
        more = f", {MAX_PARTS} of {len(found)}" if len(found) > MAX_PARTS else ""
        made.append(joined((tag("h3", f"{title}{more}"), table(heads, lines))))
    return joined(made)


def errors(rows: Sequence[Row]) -> Markup:
    """Failures by kind, with what servers said."""
    counts: dict[str, int] = {}
    samples: dict[str, list[str]] = {}
    where: dict[str, list[int]] = {}
    for row in rows:
        for kind, number in ((row.report or {}).get("errors") or {}).items():
            counts[str(kind)] = counts.get(str(kind), 0) + (number if is_number(number) else 0)  # type: ignore[assignment]
            where.setdefault(str(kind), []).append(row.number)
        for kind, messages in ((row.report or {}).get("error_samples") or {}).items():
            kept = samples.setdefault(str(kind), [])
            kept += [text for text in map(str, messages) if text not in kept][: MAX_SAMPLES - len(kept)]
    if not counts and not samples:
        return Markup("")
    lines = [
        [
            tag("b", cut(kind, 60)),
            f"{counts.get(kind, 0):,}",
            _points_told(where.get(kind, [])) if where.get(kind) else "",
            joined(tag("div", tag("code", cut(text, 400))) for text in samples.get(kind, [])),
        ]
        for kind in dict.fromkeys((*counts, *samples))
    ]
    return joined((tag("h2", "Errors"), table(["kind", "requests", "points", "as said"], lines, numbers_from=9,
                                              class_="text")))  # fmt: skip


# how it was made
def made_of(benchmark: Mapping[str, Any], rows: Sequence[Row]) -> Markup:
    """Recipe, versions, machines, engines, seeds: what must be the same for a comparison."""
    first = _first_report(rows)
    plan, machine = first.get("plan") or {}, first.get("machine") or {}
    seeds = list(dict.fromkeys(str(((row.report or {}).get("plan") or {}).get("seed", "")) for row in rows))
    pairs = [
        ("benchmark", benchmark.get("id")),
        ("by", benchmark.get("actor")),
        ("begun", _when(benchmark.get("started_ms")) or _when_s(first.get("created"))),
        ("ended", _when(benchmark.get("ended_ms"))),
        ("recipe", f"sha256 {benchmark['recipe_sha256']}" if benchmark.get("recipe_sha256") else ""),
        ("service", benchmark.get("service")),
        ("server nodes", ", ".join(map(str, benchmark.get("server_nodes") or ()))),
        ("load nodes", ", ".join(map(str, benchmark.get("load_nodes") or ()))),
        (
            "generator on",
            ", ".join(f"{key} {_fact_told(value)}" for key, value in machine.items() if is_number(value) or value),
        ),
        ("versions", ", ".join(f"{key} {value}" for key, value in (first.get("versions") or {}).items())),
        ("target", plan.get("url")),
        ("sizes", ", ".join(map(str, plan.get("scenarios") or ()))),
        ("seeds", ", ".join(seed for seed in seeds[:20] if seed) + (" ..." if len(seeds) > 20 else "")),
        ("tokens counted by", first.get("token_source")),
        ("window", (first.get("window") or {}).get("rule")),
        ("labels", changes_told(benchmark.get("labels") or {})),
        ("note", benchmark.get("note")),
    ]
    shown = [(tag("dt", name), tag("dd", cut(value, 2000))) for name, value in pairs if value]
    parts = [tag("h2", "How it was made"), tag("dl", shown)]
    for name, title in (("facts", "Engines, flags, machines"), ("recipe", "The recipe, with its defaults")):
        if benchmark.get(name):
            parts.append(_document(title, benchmark[name]))
    if plan:
        parts.append(_document("What the generator was told (first point)", plan))
    return joined(parts)


def _fact_told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_fact_told(entry) for entry in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _first_report(rows: Sequence[Row]) -> Mapping[str, Any]:
    return next((row.report for row in rows if row.report is not None), {})


def _document(title: str, value: Any) -> Markup:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    return tag("details", tag("summary", title), tag("pre", cut(text, FACTS_BYTES)))


def _when(ms: Any) -> str:
    return _when_s(ms / 1000) if is_number(ms) and ms > 0 else ""


def _when_s(seconds: Any) -> str:
    if not is_number(seconds) or not 0 < seconds < 1e11:
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def definitions(rows: Sequence[Row]) -> Markup:
    """The formulas and rules that the numbers were made with."""
    first = _first_report(rows)
    parts = []
    for name, title in (("formulas", "Formulas"), ("rules", "When a point is invalid")):
        found = first.get(name) or {}
        if found:
            entries = [(tag("dt", tag("code", key)), tag("dd", value)) for key, value in found.items()]
            parts.append(tag("details", tag("summary", title), tag("dl", entries)))
    return joined((tag("h2", "Definitions"), *parts)) if parts else Markup("")
