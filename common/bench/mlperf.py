"""MLPerf Inference's scenarios `server` and `offline`: the rules that make a run of them valid, checked on our report.

What is checked are the rules of the load, not a submission: no accuracy run, no compliance tests, no audit. A run that
keeps them may be compared with others that do; it is no official result.
Sources: MLCommons inference_policies, inference_rules.adoc, sections 3 (scenarios) and 5 (load generator); LoadGen's
early stopping (`early_stopping.cc`), whose floors are those of `common.bench.metrics.bound_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.bench.metrics import MS, Limit, Window, bound_rank, latencies
from common.bench.outcome import Asked
from common.bench.records import Records
from common.bench.report import Report
from common.bench.verdict import Finding

CODE = "mlperf_rules"
MIN_DURATION_S = 600.0
SERVER_SAMPLES = 270_336
"""Enough for p99 by itself; with fewer, the bound of early stopping must hold."""
OFFLINE_SAMPLES = 24_576
SHARE = 0.99
AT_ONCE_NS = 1_000_000_000
"""Requests that are due within so long of each other are due at one moment."""
RULES = {
    "server": "Poisson arrivals, at least 600 s, every request answered; p99 of TTFT (from the scheduled time) and of "
    "TPOT within their limits: over 270,336 requests as measured, with fewer by the bound that holds with 99 % "
    "confidence (early stopping; not below 662 requests)",
    "offline": "every request due at the start, at least 24,576 requests and 600 s, every request answered; the "
    "figure is the throughput",
}


def findings(scenario: str, asked: Asked, records: Records, report: Report, limits: Sequence[Limit]) -> list[Finding]:
    """The rules that a run breaks, one finding each; empty when it keeps all, or is of no scenario."""
    if scenario == "server":
        broken = [*_server(report), *_complete(asked, records), *_within(records, report, limits)]
    elif scenario == "offline":
        broken = [*_offline(asked, records, report), *_complete(asked, records)]
    else:
        broken = []
    return [Finding(CODE, f"MLPerf {scenario}: {text}") for text in broken]


def _server(report: Report) -> list[str]:
    plan, broken = report.plan, []
    if plan.get("loop") != "open" or plan.get("arrivals") != "poisson":
        broken.append("arrivals are to be poisson (open loop)")
    seconds = report.window["end_s"] - report.window["begin_s"]
    if seconds < MIN_DURATION_S:
        broken.append(f"at least {MIN_DURATION_S:g} s are to be measured, here it was {seconds:.0f} s")
    return broken


def _offline(asked: Asked, records: Records, report: Report) -> list[str]:
    broken = []
    if asked.is_open:
        is_at_once = bool(asked.due_ns) and max(asked.due_ns) - min(asked.due_ns) <= AT_ONCE_NS
    else:
        planned = report.plan.get("planned_requests") or 0
        is_at_once = 0 < planned <= (report.plan.get("concurrency") or 0)
    if not is_at_once:
        broken.append("every request is to be due at the start: arrivals offline, or as much concurrency as requests")
    if len(records) < OFFLINE_SAMPLES:
        broken.append(f"at least {OFFLINE_SAMPLES:,} requests, here it was {len(records):,}")
    last_s = max(records.column("end"), default=0) / 1e9
    if last_s < MIN_DURATION_S:
        broken.append(f"at least {MIN_DURATION_S:g} s, here it was {last_s:.0f} s")
    return broken


def _complete(asked: Asked, records: Records) -> list[str]:
    failed = sum(1 for outcome in records.column("outcome") if outcome)
    # Those of a load node that was lost are in no record: they are missing, too.
    begun = sum(1 for turn in records.column("turn") if turn == 0)
    missing = failed + max(len(asked.due_ns) - begun, records.facts.get("not_sent", 0))
    return [f"every request is to be answered, {missing:,} were not"] if missing else []


def _within(records: Records, report: Report, limits: Sequence[Limit]) -> list[str]:
    """p99 of TTFT and TPOT against their limits."""
    below_ms = {limit.metric: limit.below_ms for limit in limits}
    window = Window(round(report.window["begin_s"] * 1e9), round(report.window["end_s"] * 1e9))
    samples = latencies(records, window)
    broken = []
    for metric, name in (("ttft", "ttft_sched"), ("tpot", "tpot")):
        if metric not in below_ms:
            broken.append(f"slo.{metric} is missing")
            continue
        ranked = sorted(samples[name])
        count = len(ranked)
        rank = -(-count * 99 // 100) if count >= SERVER_SAMPLES else bound_rank(count, SHARE)
        if rank is None or not count:
            broken.append(f"{count:,} samples of {metric} bound no p99; at least 662")
        elif ranked[rank - 1] > below_ms[metric] * MS:
            kind = "p99" if count >= SERVER_SAMPLES else "the bound of p99"
            broken.append(f"{kind} of {metric} is {ranked[rank - 1] / MS:.1f} ms, allowed {below_ms[metric]:g} ms")
    return broken
