"""Histograms that add up, percentiles with bounds, and every metric against an example worked by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench import report
from common.bench.histogram import MAX_VALUE, RELATIVE_ERROR, Histogram, bounds_of, bucket_of, nearest_rank
from common.bench.metrics import MS, NS, Limit, Window, bound_rank, good_count, latencies, summarize, tpot_ns
from common.bench.records import COLUMNS, GRID_NS, OUTCOME, Records
from common.bench.report import detail, series, throughput
from common.bench.verdict import Steadiness, reasons, steadiness

VALUES = st.lists(st.integers(0, MAX_VALUE), min_size=1, max_size=200)


@given(st.integers(0, MAX_VALUE))
def test_a_bucket_holds_its_values(value: int) -> None:
    """Bounds enclose the value, and are no wider than stated."""
    low, high = bounds_of(bucket_of(value))
    assert low <= value <= high
    assert (high - low) / 2 <= RELATIVE_ERROR * max(low, 1)


def test_buckets_leave_no_gap() -> None:
    """One bucket begins where the last ends."""
    assert all(bounds_of(at)[1] + 1 == bounds_of(at + 1)[0] for at in range(5_000))


@given(VALUES, VALUES, st.floats(0.001, 1.0))
def test_merged_is_the_whole(one: list[int], two: list[int], share: float) -> None:
    """Merging gives the histogram of all samples, and each percentile is within the stated error of the exact one."""
    first, second, both = Histogram(), Histogram(), Histogram()
    first.add_all(one)
    for value in two:
        second.add(value)
    both.add_all(one + two)
    first.merge(Histogram.from_wire(second.to_wire()))
    assert first.to_wire() == both.to_wire()
    exact = sorted(one + two)[nearest_rank(len(one + two), share) - 1]
    found = both.percentile(share)
    assert found is not None
    assert abs(found - exact) <= RELATIVE_ERROR * exact + 0.5


@given(
    st.lists(
        st.one_of(
            st.integers(-5, 1 << 63),
            st.integers(200, 1 << 25),
            st.tuples(st.integers(8, 62), st.integers(-3, 3), st.integers(0, 127)).map(
                lambda at: (1 << at[0]) + (at[2] << at[0] >> 7) + at[1]  # at the edges of buckets
            ),
        ),
        max_size=60,
    )
)
def test_many_at_once_are_as_one_by_one(values: list[int]) -> None:
    """Values of every size, and those beside the edges of buckets, go to the same buckets."""
    together, each = Histogram(), Histogram()
    together.add_all(values)
    for value in values:
        each.add(value)
    assert together.to_wire() == each.to_wire()


@pytest.mark.parametrize("exponent", range(8, 62))
def test_every_edge_of_a_bucket(exponent: int) -> None:
    """The first and the last value of every bucket of a power of two, counted together."""
    edges = [(1 << exponent) + (step << exponent - 7) + off for step in range(128) for off in (-1, 0, 1)]
    together, each = Histogram(), Histogram()
    together.add_all([value for value in edges if value >= 256])
    for value in edges:
        if value >= 256:
            each.add(value)
    assert together.counts == each.counts


def test_a_histogram_from_elsewhere_is_checked() -> None:
    """Counts that disagree and other widths are refused."""
    good = Histogram()
    good.add(5, 3)
    for change in ({"count": 4}, {"sub_bits": 5}):
        with pytest.raises(ValueError):
            Histogram.from_wire(good.to_wire() | change)


@pytest.mark.parametrize(("share", "floor"), [(0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6_636)])
def test_bounds_begin_at_loadgens_floors(share: float, floor: int) -> None:
    """The least numbers of samples are those of MLPerf's LoadGen."""
    assert bound_rank(floor - 1, share) is None
    assert bound_rank(floor, share) is not None


def test_bounds_cover_the_true_percentile() -> None:
    """In nearly all of many draws the true p90 is not above the bound."""
    rng, above = random.Random(1), 0
    rank = bound_rank(300, 0.9)
    assert rank is not None
    for _ in range(1_000):
        above += sorted(rng.random() for _ in range(300))[rank - 1] < 0.9
    assert above <= 20


def test_the_normal_bound_meets_the_exact_one() -> None:
    """Where sums end and the approximation begins, the two are near."""
    exact, near = bound_rank(49_000, 0.99), bound_rank(51_000, 0.99)
    assert exact is not None
    assert near is not None
    assert abs((49_000 - exact) / 490 - (51_000 - near) / 510) < 0.01


def row(**given: int) -> list[int]:
    """A row, times in milliseconds."""
    times = {"scheduled", "acted", "sent", "first", "first_output", "last", "end", "connect", "stall"}
    base = dict.fromkeys(COLUMNS, -1) | {
        "outcome": 0,
        "connect": 0,
        "first_tokens": 1,
        "asked": 5,
        "class_id": 0,
        "turn": 0,
    }
    base |= {name: value * MS if name in times else value for name, value in given.items()}
    return [base[name] for name in COLUMNS]


GOOD = {"scheduled": 1_000, "acted": 1_001, "sent": 1_002, "first": 1_052, "first_output": 1_072, "last": 1_092,
        "end": 1_095, "chunks": 5, "stall": 20, "output": 5, "input": 7, "counted_input": 6}  # fmt: skip


def records_of(*rows: list[int]) -> Records:
    """Records of rows."""
    records = Records()
    for one in rows:
        records.add(one)
    return records


def test_metrics_of_one_request() -> None:
    """Due at 1000 ms, sent at 1002, reasoning at 1052, words from 1072, the fifth token at 1092, closed at 1095."""
    found = latencies(records_of(row(**GOOD)), Window(0, 5 * NS))
    expected = {"ttft": 50, "ttft_sched": 52, "ttfo": 70, "tpot": 10, "stall": 20, "e2e": 90, "e2e_sched": 92,
                "tail": 3, "send_delay": 2, "send_lag": 1}  # fmt: skip
    assert {name: list(values) for name, values in found.items() if values} == {
        name: [value * MS] for name, value in expected.items()
    }


def test_tpot_is_undefined_for_one_token() -> None:
    """No token behind the first piece: None, never 0; tokens of the first piece do not count."""
    assert tpot_ns(0, 0, 1, 1) is None
    assert tpot_ns(0, 90, 4, 4) is None
    assert tpot_ns(0, 90, 13, 4) == 10


def test_the_window_takes_requests_by_their_intended_time() -> None:
    """What was due before or after is not in the latencies, wherever it ended."""
    rows = [row(**GOOD | {"scheduled": at}) for at in (999, 1_000, 1_999, 2_000)]
    found = latencies(records_of(*rows), Window(NS, 2 * NS))
    assert len(found["e2e"]) == 2


def test_failed_requests_are_infinite_in_the_adjusted_percentiles() -> None:
    """Two good ones and two failed: the adjusted median is the second good one, p90 is infinite."""
    made = summarize([10 * MS, 20 * MS], failed=2)
    assert made.percentiles["p90"] == 20
    assert made.adjusted["p50"] == 20
    assert made.adjusted["p90"] is None


def test_summary_by_hand() -> None:
    """1 to 100 ms: nearest ranks."""
    made = summarize([number * MS for number in range(100, 0, -1)])
    assert (made.count, made.mean, made.min, made.max) == (100, 50.5, 1, 100)
    assert (made.percentiles["p50"], made.percentiles["p90"], made.percentiles["p99"]) == (50, 90, 99)
    assert made.upper_99["p90"] is not None
    assert made.upper_99["p99"] is None


def test_goodput_counts_from_the_intended_time() -> None:
    """In an open loop 52 ms of TTFT break a limit of 51; in a closed loop the 50 ms from sending meet it."""
    records = records_of(row(**GOOD), row(**GOOD | {"outcome": OUTCOME["http_5xx"]}))
    window, limits = Window(0, 5 * NS), [Limit("ttft", 51.0)]
    assert good_count(records, window, limits, is_open=True) == 0
    assert good_count(records, window, limits, is_open=False) == 1
    assert good_count(records, window, [Limit("ttft", 52), Limit("tpot", 10), Limit("e2e", 92)], is_open=True) == 1
    assert good_count(records, window, [Limit("tpot", 9.9)], is_open=True) == 0


def test_the_first_output_of_a_whole_answer_is_its_end() -> None:
    """Without streaming nothing is seen before the end: a limit of TTFT is not met by having no TTFT."""
    whole = GOOD | {"first": -1, "first_output": -1, "chunks": 0, "stall": -1}
    whole = {name: value for name, value in whole.items() if value >= 0}
    records, window = records_of(row(**whole)), Window(0, 5 * NS)
    assert good_count(records, window, [Limit("ttft", 89.0)], is_open=False) == 0
    assert good_count(records, window, [Limit("ttft", 91.0)], is_open=False) == 1


def test_throughput_counts_what_comes_in_the_window() -> None:
    """Tokens by their arrival, requests by their end: 150 of 200 tokens and one of two requests in two seconds."""
    records = records_of(row(**GOOD | {"end": 1_500}), row(**GOOD | {"end": 3_500}))
    records.grid = {50: 20, 100: 50, 299: 100, 300: 30}
    made = throughput(records, Window(NS, 3 * NS))
    assert (made.output_tok_s, made.req_s, made.input_tok_s, made.peak_output_tok_s) == (75, 0.5, 3.5, 100)
    assert GRID_NS == 10_000_000


def test_the_series_adds_up() -> None:
    """Seconds hold what was due, sent, ended in them, and what was on its way at their end."""
    made = series(records_of(row(**GOOD), row(**GOOD | {"acted": 1_500, "sent": 1_500, "end": 2_500})), ())
    assert [(second.due, second.sent, second.ended, second.in_flight) for second in made] == [
        (0, 0, 0, 0), (2, 2, 1, 1), (0, 0, 1, 0),
    ]  # fmt: skip


def judged(records: Records, **more: int) -> list[str]:
    """Codes of why a run is invalid."""
    window = Window(0, 5 * NS)
    latency = {name: summarize(values) for name, values in latencies(records, window).items()}
    facts = {"planned": None, "sent_in_time": 1, "is_interrupted": False, "lost_workers": 0} | more
    return [finding.code for finding in reasons(records, latency, summarize([]), window, **facts)]  # type: ignore[arg-type]


def test_a_late_generator_is_invalid() -> None:
    """1 ms late is allowed, 2 are not; nor a worker that used up its core, lost ones, or unsent requests."""
    assert judged(records_of(row(**GOOD))) == []
    assert judged(records_of(row(**GOOD | {"acted": 1_002}))) == ["late"]
    assert judged(records_of(row(**GOOD)), planned=2) == ["rate_missed"]
    assert judged(records_of(row(**GOOD)), lost_workers=1, is_interrupted=True) == ["worker_lost", "interrupted"]
    busy = records_of(row(**GOOD))
    busy.workers = [{"cpu_s": 9.0, "wall_s": 10.0}]
    assert judged(busy) == ["client_limited"]
    assert judged(records_of(row(**GOOD | {"outcome": OUTCOME["no_socket"]}))) == ["no_socket", "no_success"]


def test_steadiness() -> None:
    """A queue that grows is seen, noise is not, and few points say nothing."""
    rng = random.Random(2)
    times = [at / 10 for at in range(300)]
    assert steadiness(times, [100 + rng.gauss(0, 10) for _ in times]).verdict == "steady"
    assert steadiness(times, [100 + at + rng.gauss(0, 10) for at in range(300)]).verdict == "rising"
    assert steadiness([1.0] * 5, [1.0] * 5) == Steadiness("unknown")


def test_detail_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than can be written one by one are refused with the number."""
    records = records_of(*[row(**GOOD)] * 3)
    assert [value["ttft_ms"] if "ttft_ms" in value else value["outcome"] for value in detail(records)] == ["ok"] * 3
    monkeypatch.setattr(report, "MAX_DETAIL", 2)
    with pytest.raises(ValueError, match="at most 2"):
        detail(records)


def test_records_merge() -> None:
    """Rows behind each other, counts added, over the wire and back."""
    one, two = records_of(row(**GOOD)), records_of(row(**GOOD), row(**GOOD))
    one.grid, two.grid = {1: 2}, {1: 3, 4: 5}
    two.count("reads", 7)
    two.note_error("reset", "gone")
    one.merge(Records.from_wire(two.to_wire()))
    assert (len(one), one.grid, one.facts, one.errors) == (3, {1: 5, 4: 5}, {"reads": 7}, {"reset": ["gone"]})
