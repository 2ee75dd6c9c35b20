"""The report of a run: what was asked, what was measured, by which formulas, and whether it may be believed."""

from __future__ import annotations

import math
import os
import platform
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from common.bench import verdict
from common.bench.metrics import (
    FORMULAS,
    MS,
    NS,
    Summary,
    Window,
    good_count,
    latencies,
    of_histogram,
    summarize,
)
from common.bench.outcome import Asked, Outcome
from common.bench.records import GRID_NS, OUTCOMES, SOURCES, WIDTH, Records
from common.bench.verdict import Finding, Steadiness
from herder import __version__

SCHEMA_VERSION = 1
MAX_DETAIL = 200_000  # requests that are written one by one: a kilobyte of memory and text each
ADJUSTED = ("ttft", "ttft_sched", "e2e", "e2e_sched")
"""Latencies in whose percentiles a failed request counts as one that never ended."""


class Throughput(msgspec.Struct, frozen=True):
    """Rates over the window."""

    req_s: float
    output_tok_s: float
    input_tok_s: float
    peak_output_tok_s: float
    """The best second."""


class Goodput(msgspec.Struct, frozen=True):
    """What met the limits."""

    limits_ms: dict[str, float]
    good: int
    goodput_req_s: float
    slo_attainment: float | None


class Second(msgspec.Struct, frozen=True):
    """One second of the run: requests by the second they were due, sent or ended; in flight at its end."""

    at_s: int
    due: int
    sent: int
    ended: int
    failed: int
    in_flight: int
    output_tokens: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    send_lag_max_ms: float | None


class Generator(msgspec.Struct, frozen=True):
    """What the load generator itself did and used."""

    workers: list[dict[str, Any]]
    client_lag: Summary
    reads: int
    connections: int
    coalesced: int
    cpu_us_per_token: float | None


class Report(msgspec.Struct, frozen=True):
    """A run."""

    schema_version: int
    kind: str
    created: float
    versions: dict[str, str]
    machine: dict[str, Any]
    plan: dict[str, Any]
    is_valid: bool
    reasons: list[Finding]
    warnings: list[Finding]
    rules: dict[str, str]
    formulas: dict[str, str]
    window: dict[str, Any]
    counts: dict[str, int]
    errors: dict[str, int]
    error_samples: dict[str, list[str]]
    error_rate: float | None
    token_source: str
    itl_source: str
    input_tokens: int
    output_tokens: int
    throughput: Throughput
    latency: dict[str, Summary]
    goodput: Goodput | None
    steady: Steadiness
    generator: Generator
    classes: dict[str, dict[str, Any]]
    series: list[Second]
    histograms: dict[str, dict[str, Any]]
    endpoints: dict[str, dict[str, Any]] = {}
    """The main figures of each server, where several were asked."""


def window_of(asked: Asked, outcome: Outcome) -> tuple[Window, str]:
    """The measured part, its edges on the grid of 10 ms, and the rule that gave it."""
    begin = math.ceil(asked.warmup_s * NS / GRID_NS) * GRID_NS
    if asked.until_s is not None:
        end, rule = int((asked.until_s - asked.cooldown_s) * NS), "from warm-up to the end of sending less cool-down"
    else:
        last = max(outcome.records.column("end"), default=0)
        end = last + GRID_NS - int(asked.cooldown_s * NS)
        rule = "from warm-up to the last answer less cool-down"
    if outcome.stopped_ns is not None and outcome.stopped_ns < end:
        end, rule = outcome.stopped_ns, "from warm-up to the interruption"
    filled = min((worker["filled_ns"] for worker in outcome.records.workers if "filled_ns" in worker), default=end)
    if filled < end:
        end, rule = filled, "from warm-up to the most requests that a run may keep"
    end = end // GRID_NS * GRID_NS
    return Window(begin, max(end, begin + GRID_NS)), rule


def build(asked: Asked, outcome: Outcome, due_ns: Sequence[int] | None = None) -> Report:
    """The report of a finished run. due_ns: what of the schedule those who are in it had to send; None: all of it."""
    records = outcome.records
    window, rule = window_of(asked, outcome)
    samples = latencies(records, window)
    scheduled, outcomes = records.column("scheduled"), records.column("outcome")
    inside = [code for at, code in zip(scheduled, outcomes, strict=True) if window.holds(at)]
    failed = sum(1 for code in inside if code)
    latency = {name: summarize(values, failed if name in ADJUSTED else 0) for name, values in samples.items()}
    latency |= {"icl": of_histogram(records.icl), "itl": of_histogram(records.itl)}
    lag, steady, token_source = of_histogram(records.lag), _steady(records, window), _main_source(records)
    tokens, counts = sum(records.grid.values()), verdict.counts_of(records)
    mine = asked.due_ns if due_ns is None else due_ns
    reasons = _reasons(asked, outcome, latency, lag, window, mine)
    return Report(
        schema_version=SCHEMA_VERSION,
        kind="herder-bench",
        created=outcome.start_wall_s,
        versions={"herder": __version__, "python": platform.python_version()},
        machine=machine(),
        plan=dict(asked.plan),
        is_valid=not reasons,
        reasons=reasons,
        warnings=verdict.warnings(
            records,
            latency,
            steady,
            prepared=asked.prepared,
            counted_by=asked.counted_by,
            is_exact=asked.is_exact,
            counted_as=token_source,
            is_offline=asked.is_offline,
        ),
        rules=verdict.RULES,
        formulas=FORMULAS,
        window={"begin_s": window.begin_ns / NS, "end_s": window.end_ns / NS, "rule": rule, "run_s": outcome.wall_s},
        counts={
            "sent": len(records),
            "not_sent": records.facts.get("not_sent", 0),
            "in_window": len(inside),
            "good": len(inside) - failed,
            "failed": failed,
        },
        errors={name: counts[name] for name in OUTCOMES[1:] if counts.get(name)},
        error_samples=records.errors,
        error_rate=failed / len(inside) if inside else None,
        token_source=token_source,
        itl_source=_itl_source(records),
        input_tokens=sum(_inputs(row) for row in records.columns("input", "counted_input", "outcome")),
        output_tokens=tokens,
        throughput=throughput(records, window),
        latency=latency,
        goodput=_goodput(asked, records, window, len(inside)),
        steady=steady,
        generator=_generator(records, lag, tokens),
        classes=_parts(asked.classes, "class_id", records, window),
        series=series(records, asked.due_ns),
        histograms=_histograms(records, samples),
        endpoints=_parts(asked.endpoints, "endpoint", records, window),
    )


def _reasons(
    asked: Asked,
    outcome: Outcome,
    latency: Mapping[str, Summary],
    lag: Summary,
    window: Window,
    due_ns: Sequence[int],
) -> list[Finding]:
    """Why the run must not be believed."""
    limit_ns = window.end_ns + verdict.LATE_FLOOR_NS
    return verdict.reasons(
        outcome.records,
        latency,
        lag,
        window,
        planned=sum(1 for at in due_ns if window.holds(at)) if asked.is_open else None,
        sent_in_time=sum(
            1
            for at, acted, turn in outcome.records.columns("scheduled", "acted", "turn")
            if turn == 0 and window.holds(at) and 0 <= acted < limit_ns
        ),
        is_interrupted=outcome.is_interrupted,
        lost_workers=outcome.lost_workers,
        is_offline=asked.is_offline,
    )


def _steady(records: Records, window: Window) -> Steadiness:
    """Whether the good answers of the window took as long at its end as at its beginning."""
    times, values = array("d"), array("d")
    for at, last, code in records.columns("scheduled", "last", "outcome"):
        if code == 0 and window.holds(at):
            times.append(at / NS)
            values.append((last - at) / MS)
    return verdict.steadiness(times, values)


def _generator(records: Records, lag: Summary, tokens: int) -> Generator:
    cpu_s = sum(worker["cpu_s"] for worker in records.workers)
    return Generator(
        records.workers,
        lag,
        records.facts.get("reads", 0),
        records.facts.get("connections", 0),
        records.facts.get("coalesced", 0),
        cpu_s * 1e6 / tokens if tokens else None,
    )


def _inputs(row: tuple[int, ...]) -> int:
    there, here, outcome = row
    return 0 if outcome else there if there >= 0 else here


def throughput(records: Records, window: Window) -> Throughput:
    """Rates over the window, and the best second in it."""
    first, last = window.begin_ns // GRID_NS, window.end_ns // GRID_NS
    inside = {at: tokens for at, tokens in records.grid.items() if first <= at < last}
    per_second: dict[int, int] = {}
    each = NS // GRID_NS
    for at, tokens in inside.items():
        second = (at - first) // each
        per_second[second] = per_second.get(second, 0) + tokens
    ended = inputs = 0
    for end, outcome, there, here in records.columns("end", "outcome", "input", "counted_input"):
        if outcome == 0 and window.holds(end):
            ended += 1
            inputs += there if there >= 0 else here
    tokens = sum(inside.values())
    # A last second that is not whole would not be one.
    peak = max(per_second.values(), default=0) if window.seconds >= 1 else tokens / window.seconds
    return Throughput(ended / window.seconds, tokens / window.seconds, inputs / window.seconds, peak)


def _goodput(asked: Asked, records: Records, window: Window, inside: int) -> Goodput | None:
    if not asked.limits:
        return None
    good = good_count(records, window, asked.limits, asked.is_open and not asked.is_offline)
    named = {limit.metric: limit.below_ms for limit in asked.limits}
    return Goodput(named, good, good / window.seconds, good / inside if inside else None)


def _main_source(records: Records) -> str:
    """Who counted most answers' tokens."""
    counts = [0] * len(SOURCES)
    for source, outcome in records.columns("source", "outcome"):
        if outcome == 0:
            counts[source] += 1
    return SOURCES[counts.index(max(counts))] if any(counts) else "none"


def _itl_source(records: Records) -> str:
    """How gaps were given to tokens: what most of them were."""
    names = {
        "itl_exact": "tokens of every piece known",
        "itl_one_each": "one token in every piece",
        "itl_assumed": "one token in every piece assumed",
        "itl_mean": "mean tokens of a piece",
    }
    best = max(names, key=lambda name: records.facts.get(name, 0))
    return names[best] if records.facts.get(best) else "none"


def _parts(names: Sequence[str], column: str, records: Records, window: Window) -> dict[str, dict[str, Any]]:
    """The main figures of each class or endpoint, where there are several."""
    if len(names) < 2:
        return {}
    parts = [Records() for _ in names]
    rows = records.rows
    for at, number in enumerate(records.column(column)):
        parts[number].rows.extend(rows[at * WIDTH : (at + 1) * WIDTH])
    found: dict[str, dict[str, Any]] = {}
    for name, part in zip(names, parts, strict=True):
        samples = latencies(part, window)
        failed = sum(1 for at, code in part.columns("scheduled", "outcome") if code and window.holds(at))
        found[name] = {"sent": len(part), "failed": failed} | {
            metric: msgspec.to_builtins(summarize(samples[metric])) for metric in ("ttft", "tpot", "e2e")
        }
    return found


def _histograms(records: Records, samples: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Every metric as a histogram that adds up with those of other runs."""
    from common.bench.histogram import Histogram

    made = {"icl": records.icl, "itl": records.itl, "client_lag": records.lag}
    for name in ("ttft", "ttft_sched", "tpot", "e2e", "e2e_sched", "send_lag"):
        made[name] = Histogram()
        made[name].add_all(samples[name])
    return {name: {"unit": "ns"} | histogram.to_wire() for name, histogram in made.items()}


def series(records: Records, due_ns: Sequence[int]) -> list[Second]:
    """The run second by second."""
    last = max(records.column("end"), default=-1) // NS
    if last < 0 or last > 1_000_000:
        return []
    due, sent, ended, failed, change, lag = ([0] * (last + 2) for _ in range(6))
    ttft = [array("q") for _ in range(last + 2)]
    for scheduled, acted, went, first, end, outcome in records.columns(
        "scheduled", "acted", "sent", "first", "end", "outcome"
    ):
        at = min(max(scheduled // NS, 0), last)
        due[at] += 1
        if acted >= 0:
            sent[min(acted // NS, last)] += 1
            change[min(acted // NS, last)] += 1
            change[min(max(end // NS, 0), last)] -= 1
            lag[at] = max(lag[at], acted - scheduled)
        ended[min(max(end // NS, 0), last)] += 1
        failed[min(max(end // NS, 0), last)] += bool(outcome)
        if first >= 0 and went >= 0:
            ttft[at].append(first - went)
    tokens = [0] * (last + 2)
    for place, number in records.grid.items():
        tokens[min(max(place * GRID_NS // NS, 0), last)] += number
    found, flying = [], 0
    for second in range(last + 1):
        flying += change[second]
        times = summarize(ttft[second]).percentiles
        found.append(
            Second(
                second, due[second], sent[second], ended[second], failed[second], flying, tokens[second],
                times.get("p50"), times.get("p99"), lag[second] / MS if due[second] else None,
            )
        )  # fmt: skip
    return found


def machine() -> dict[str, Any]:
    """What the generator ran on."""
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_average": list(os.getloadavg()),
    }


def detail(records: Records) -> list[dict[str, Any]]:
    """Every request, times in milliseconds after the start of the run. Raises: ValueError for too many."""
    if len(records) > MAX_DETAIL:
        raise ValueError(f"{len(records):,} requests; their detail is given for at most {MAX_DETAIL:,}")
    from common.bench.records import COLUMNS

    times = {"scheduled", "acted", "sent", "first", "first_output", "last", "end", "connect", "stall"}
    made = []
    for row in records.columns(*COLUMNS):
        value: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
        for name in times:
            value[f"{name}_ms"] = value[name] / MS if value[name] >= 0 else None
            del value[name]
        value["outcome"], value["source"] = (
            OUTCOMES[row[COLUMNS.index("outcome")]],
            SOURCES[row[COLUMNS.index("source")]],
        )
        made.append(value)
    return made
