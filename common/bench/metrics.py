"""What the numbers mean: one formula per name, written beside every report, and percentiles with their bounds."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from common.bench.histogram import Histogram, nearest_rank
from common.bench.records import OUTCOME, Records

NS = 1_000_000_000
MS = 1_000_000
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
FORMULAS = {
    "ttft": "t_first - t_sent: first output (content, reasoning or a tool call; never a role, ping or usage event)",
    "ttft_sched": "t_first - t_scheduled: what a user waits who came at the intended time",
    "ttfo": "t_first_output - t_sent: first output that is not reasoning",
    "tpot": "(t_last - t_first) / (n - k1), k1 = tokens of the first piece; undefined for n <= k1; contains no TTFT",
    "icl": "gaps between pieces of an answer (what vLLM calls ITL)",
    "itl": "the same gaps per token: a piece of m tokens counts m times with gap / m",
    "stall": "the longest gap of a request",
    "e2e": "t_last - t_sent",
    "e2e_sched": "t_last - t_scheduled",
    "tail": "t_end - t_last: from the last output to the end of the body",
    "send_delay": "t_sent - t_scheduled",
    "send_lag": "t_acted - t_scheduled: the generator's own part of send_delay, without connecting",
    "connect": "how long opening a new connection took, TLS included",
    "client_lag": "time between the kernel's receive stamp and the read, per read",
    "output_tok_s": "output tokens that arrived in the window / window",
    "input_tok_s": "input tokens of good requests that ended in the window / window",
    "req_s": "good requests that ended in the window / window",
    "goodput_req_s": "good requests of the window that met every limit / window",
    "slo_attainment": "the same requests / requests of the window, failed ones included",
    "error_rate": "requests of the window that failed / requests of the window",
    "p99": "nearest rank over good requests",
    "p99_adjusted": "nearest rank where a failed request counts as infinite; null: infinite",
    "upper_99": "the bound that the true percentile does not exceed with 99 % confidence (binomial order statistic, "
    "MLPerf LoadGen's floors: p90 64, p95 130, p99 662, p99.9 6,636 requests); null below the floor",
}


class Summary(msgspec.Struct, frozen=True):
    """A metric's distribution, in milliseconds."""

    count: int
    mean: float | None = None
    stddev: float | None = None
    min: float | None = None
    max: float | None = None
    percentiles: dict[str, float] = {}
    upper_99: dict[str, float | None] = {}
    adjusted: dict[str, float | None] = {}
    """With every failed request as infinite (null)."""
    is_histogram: bool = False
    """Taken from a histogram: percentiles within 0.4 %."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One service level objective."""

    metric: str
    below_ms: float


def summarize(values_ns: Sequence[int], failed: int = 0) -> Summary:
    """The distribution of exact samples. failed: requests that have no sample because they failed."""
    ranked = sorted(values_ns)
    count = len(ranked)
    adjusted = {name: _at(ranked, count + failed, share) for name, share in PERCENTILES.items()} if failed else {}
    if not count:
        return Summary(0, adjusted=adjusted)
    mean = sum(ranked) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in ranked) / (count - 1)) if count > 1 else 0.0
    bounds = {name: bound_rank(count, share) for name, share in PERCENTILES.items()}
    return Summary(
        count,
        mean / MS,
        spread / MS,
        ranked[0] / MS,
        ranked[-1] / MS,
        {name: ranked[nearest_rank(count, share) - 1] / MS for name, share in PERCENTILES.items()},
        {name: ranked[rank - 1] / MS if rank is not None else None for name, rank in bounds.items()},
        adjusted,
    )


def _at(ranked: Sequence[int], count: int, share: float) -> float | None:
    rank = nearest_rank(count, share) if count else 1
    return ranked[rank - 1] / MS if rank <= len(ranked) else None


def of_histogram(histogram: Histogram) -> Summary:
    """The distribution of a histogram's samples; the spread is not kept in one."""
    if not histogram.count or histogram.min is None or histogram.max is None:
        return Summary(0, is_histogram=True)
    found = {name: histogram.percentile(share) for name, share in PERCENTILES.items()}
    return Summary(
        histogram.count,
        (histogram.mean() or 0) / MS,
        None,
        histogram.min / MS,
        histogram.max / MS,
        {name: value / MS for name, value in found.items() if value is not None},
        is_histogram=True,
    )


def bound_rank(count: int, share: float, confidence: float = 0.99) -> int | None:
    """The rank of the sample that the true percentile does not exceed with such confidence; None for too few samples.

    The number of samples above the true percentile is binomial with count and 1 - share; the bound leaves out the most
    samples that could lie above with at most 1 - confidence, and at least one, as LoadGen demands.
    """
    above = 1 - share
    mean, left = count * above, 1 - confidence
    if mean > 500:
        # Normal approximation with continuity correction; exact sums would take seconds for millions of samples.
        most = math.floor(mean - 2.3263 * math.sqrt(mean * share) - 0.5)
        return count - most
    log_p, log_q = math.log(above), math.log(share)
    total, most = 0.0, -1
    for number in range(count + 1):
        log_choose = math.lgamma(count + 1) - math.lgamma(number + 1) - math.lgamma(count - number + 1)
        total += math.exp(log_choose + number * log_p + (count - number) * log_q)
        if total > left:
            break
        most = number
    return count - most if most >= 1 else None


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a run, in nanoseconds after the start."""

    begin_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.begin_ns) / NS

    def holds(self, at_ns: int) -> bool:
        """Whether a moment lies in it."""
        return self.begin_ns <= at_ns < self.end_ns


def latencies(records: Records, window: Window) -> dict[str, array[int]]:
    """Samples of every per-request metric, of the good requests that were to be sent in the window."""
    names = (
        "ttft", "ttft_sched", "ttfo", "tpot", "stall", "e2e", "e2e_sched", "tail", "send_delay", "send_lag", "connect",
    )  # fmt: skip
    found = {name: array("q") for name in names}
    wanted = (
        "scheduled", "acted", "sent", "first", "first_output", "last", "end", "connect", "chunks", "stall", "output",
        "first_tokens", "outcome",
    )  # fmt: skip
    for row in records.columns(*wanted):
        scheduled, acted, sent, first, first_output, last, end, connect, chunks, stall, output, k1, outcome = row
        if not window.holds(scheduled):
            continue
        if acted >= 0:
            found["send_lag"].append(acted - scheduled)
        if sent >= 0:
            found["send_delay"].append(sent - scheduled)
        if connect:
            found["connect"].append(connect)
        if outcome != 0 or sent < 0:
            continue
        found["e2e"].append(last - sent)
        found["e2e_sched"].append(last - scheduled)
        found["tail"].append(end - last)
        if first < 0:
            continue
        found["ttft"].append(first - sent)
        found["ttft_sched"].append(first - scheduled)
        if first_output >= 0:
            found["ttfo"].append(first_output - sent)
        per_token = tpot_ns(first, last, output if output >= 0 else chunks, k1)
        if per_token is not None:
            found["tpot"].append(per_token)
        if stall >= 0:
            found["stall"].append(stall)
    return found


def tpot_ns(first: int, last: int, tokens: int, first_tokens: int) -> int | None:
    """(t_last - t_first) / (n - k1); None where no token came after the first piece."""
    after = tokens - first_tokens
    return round((last - first) / after) if after > 0 and last > first else None


def good_count(records: Records, window: Window, limits: Sequence[Limit], is_open: bool) -> int:
    """Requests of the window that were good and met every limit. In an open loop times count from the intended send.

    Of an answer in one piece the first output is seen at its end.
    """
    good = 0
    for scheduled, sent, first, last, chunks, output, k1, outcome in records.columns(
        "scheduled", "sent", "first", "last", "chunks", "output", "first_tokens", "outcome"
    ):
        if outcome != OUTCOME["ok"] or not window.holds(scheduled):
            continue
        begun = scheduled if is_open else sent
        values: dict[str, int | None] = {"ttft": (first if first >= 0 else last) - begun, "e2e": last - begun}
        values["tpot"] = tpot_ns(first, last, output if output >= 0 else chunks, k1) if first >= 0 else None
        measured = ((values[limit.metric], limit.below_ms) for limit in limits)
        good += all(value is None or value <= below_ms * MS for value, below_ms in measured)
    return good
