"""Whether a run's numbers may be believed: reasons that make it invalid, and warnings that do not.

Invalid: the generator was late, or could not keep up reading, or died in part, or did not send what was asked; the run
was interrupted; nothing succeeded. Warned of: what a reader should know before comparing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from common.bench.metrics import MS, NS, Summary, Window
from common.bench.records import Records

LATE_FLOOR_NS = 1_000_000
LATE_SHARE = 0.01
LAG_FLOOR_NS = 2_000_000
LAG_SHARE = 0.05
CPU_SHARE = 0.85
RATE_SHARE = 0.99
TEMPLATE_TOKENS = 64
STEADY_LEAST = 30
STEADY_RISE = 0.25
RULES = {
    "late": "p99 of send_lag > max(1 ms, 1 % of the median e2e); not asked of offline runs",
    "client_limited": "p99 of client_lag > max(2 ms, 5 % of the median tpot), or a worker used over 85 % of a core",
    "rate_missed": "open loop, not offline: fewer than 99 % of the requests due in the window were sent in it",
    "too_many": "more requests than one run may keep: sending ended there",
    "no_socket": "this machine ran out of descriptors or ports",
    "drain_timeout": "requests were cut off because they outlasted the drain time",
    "clock_skew": "the wall clock was set by more than 1 ms during the run",
    "worker_lost": "a process of the generator died",
    "interrupted": "the run was stopped before its end",
    "no_success": "no request of the window was good",
    "steady": "warned of when the time to answer (e2e_sched) rises over the window: slope significant at 95 % (t-test) "
    "and more than 25 % of the mean from end to end, with at least 30 requests",
}


class Finding(msgspec.Struct, frozen=True):
    """One reason or warning: a code for programs, a sentence for people."""

    code: str
    said: str


class Steadiness(msgspec.Struct, frozen=True):
    """Whether times rose over the window."""

    verdict: str
    """steady, rising, falling or unknown (too few requests)."""
    change: float | None = None
    """End of the window against its start, as a share of the mean."""
    t_value: float | None = None


def reasons(
    records: Records,
    latency: Mapping[str, Summary],
    lag: Summary,
    window: Window,
    *,
    planned: int | None,
    sent_in_time: int,
    is_interrupted: bool,
    lost_workers: int,
    is_offline: bool = False,
) -> list[Finding]:
    """Why a run is invalid; empty for a valid one. Of an offline run no request is late: all are due at its start."""
    found: list[Finding] = []
    late_p99 = latency["send_lag"].percentiles.get("p99")
    allowed = max(LATE_FLOOR_NS / MS, LATE_SHARE * latency["e2e"].percentiles.get("p50", 0.0))
    if late_p99 is not None and late_p99 > allowed and not is_offline:
        found.append(
            Finding("late", f"the generator sent late: p99 {late_p99:.2f} ms, allowed {allowed:.2f} ms; more workers?")
        )
    lag_p99 = lag.percentiles.get("p99", 0.0)
    lag_allowed = max(LAG_FLOOR_NS / MS, LAG_SHARE * latency["tpot"].percentiles.get("p50", 0.0))
    busiest = max((worker["cpu_s"] / worker["wall_s"] for worker in records.workers if worker["wall_s"] > 0), default=0)
    if lag_p99 > lag_allowed:
        found.append(
            Finding("client_limited", f"answers were read late: p99 {lag_p99:.2f} ms, allowed {lag_allowed:.2f} ms")
        )
    if busiest > CPU_SHARE:
        found.append(Finding("client_limited", f"a worker used {busiest:.0%} of a core; take more workers"))
    if planned and not is_offline and sent_in_time < RATE_SHARE * planned:
        found.append(Finding("rate_missed", f"{sent_in_time} of {planned} requests were sent in their window"))
    outcomes = counts_of(records)
    if outcomes.get("no_socket"):
        found.append(Finding("no_socket", f"{outcomes['no_socket']} requests found no descriptor or port here"))
    if records.facts.get("too_many"):
        found.append(
            Finding("too_many", f"sending ended after {len(records):,} requests, the most of one run; a shorter one?")
        )
    if cut := records.facts.get("drain_timeouts"):
        found.append(Finding("drain_timeout", f"{cut} requests were cut off; a longer drain lets them end"))
    if steps := records.facts.get("clock_steps"):
        found.append(Finding("clock_skew", f"the wall clock was set {steps} times"))
    if lost_workers:
        found.append(Finding("worker_lost", f"{lost_workers} processes died: their requests are missing"))
    if is_interrupted:
        found.append(Finding("interrupted", f"stopped after {window.end_ns / NS:.1f} s: what is shown is truncated"))
    if not latency["e2e"].count:
        found.append(Finding("no_success", "no request of the window was answered well"))
    return found


def warnings(
    records: Records,
    latency: Mapping[str, Summary],
    steady: Steadiness,
    *,
    prepared: int,
    counted_by: str,
    is_exact: bool,
    counted_as: str,
    is_offline: bool = False,
) -> list[Finding]:
    """What a reader should know."""
    found: list[Finding] = []
    count = latency["e2e"].count
    if 0 < count < 662:
        found.append(Finding("too_few", f"{count} good requests: p99 has no 99 % bound below 662"))
    conversations = sum(1 for turn in records.column("turn") if turn == 0)
    if conversations > prepared > 1:
        found.append(
            Finding("repeated_prompts", f"{prepared} prompts for {conversations} requests: prefix caches may help")
        )
    if steady.verdict == "rising" and steady.change is not None:
        found.append(Finding("not_steady", f"answers took {steady.change:+.0%} longer at the end than at the start"))
    facts = records.facts
    if coalesced := facts.get("coalesced"):
        found.append(Finding("coalesced", f"{coalesced} pieces came in one read with another: their gaps are 0"))
    if mean := facts.get("itl_mean"):
        found.append(Finding("itl_mean", f"{mean} gaps hold several tokens of unknown split: ITL is spread evenly"))
    if counted_as == "chunks":
        found.append(Finding("tokens_are_chunks", "the server told no usage: tokens are pieces of the answer"))
    short = sum(
        1
        for outcome, output, asked in records.columns("outcome", "output", "asked")
        if outcome == 0 and output >= 0 and asked and output != asked
    )
    if is_exact and short:
        found.append(Finding("other_lengths", f"{short} answers were not as long as was asked for"))
    if counted_by == "tokenizer" and (off := _token_mismatch(records)):
        found.append(
            Finding("token_mismatch", f"the server counts {off:+.0%} prompt tokens; is it the same tokenizer?")
        )
    if stale := facts.get("stale_connections"):
        found.append(
            Finding("stale_connections", f"{stale} kept connections were closed by the server as they were used")
        )
    if (held := facts.get("held_back")) and not is_offline:
        found.append(Finding("held_back", f"sending waited {held} times for the limit of requests on their way"))
    return found


def _token_mismatch(records: Records) -> float:
    """How far the server's prompt tokens are from ours when that is more than 10 %; 0 otherwise.

    What its template adds to every prompt, up to TEMPLATE_TOKENS, is no difference.
    """
    pairs = [
        (there, here)
        for there, here in records.columns("input", "counted_input")
        if there > 0 and here > 20
    ]  # fmt: skip
    if not pairs:
        return 0.0
    template = min(max(0, min(there - here for there, here in pairs)), TEMPLATE_TOKENS)
    off = sum(there - template for there, _ in pairs) / sum(here for _, here in pairs) - 1
    return off if abs(off) > 0.1 else 0.0


def counts_of(records: Records) -> dict[str, int]:
    """Requests by outcome."""
    from common.bench.records import OUTCOMES

    found: dict[str, int] = {}
    for outcome in records.column("outcome"):
        name = OUTCOMES[outcome]
        found[name] = found.get(name, 0) + 1
    return found


def steadiness(times: Sequence[float], values: Sequence[float]) -> Steadiness:
    """Whether values rise with time, in seconds: least squares."""
    if len(times) < STEADY_LEAST:
        return Steadiness("unknown")
    middle, mean = statistics.fmean(times), statistics.fmean(values)
    spread = sum((at - middle) ** 2 for at in times)
    if spread == 0 or mean == 0:
        return Steadiness("unknown")
    slope = sum((at - middle) * (value - mean) for at, value in zip(times, values, strict=True)) / spread
    rest = sum((value - mean - slope * (at - middle)) ** 2 for at, value in zip(times, values, strict=True))
    error = math.sqrt(rest / (len(times) - 2) / spread)
    t_value = slope / error if error > 0 else math.copysign(1e9, slope) if slope else 0.0
    change = slope * (max(times) - min(times)) / mean
    # Student's t at 95 % is between 1.96 and 2.05 for 28 degrees of freedom and more.
    is_real = abs(t_value) > 2.05 and abs(change) > STEADY_RISE
    return Steadiness(("rising" if slope > 0 else "falling") if is_real else "steady", change, t_value)


def as_plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """For reports."""
    return [msgspec.to_builtins(finding) for finding in findings]
