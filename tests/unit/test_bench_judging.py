"""Points are judged: parts become one run, and what is missing is said exactly."""

from __future__ import annotations

import copy
import dataclasses
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.bench import report
from common.bench.histogram import RELATIVE_ERROR, Histogram
from common.bench.outcome import Asked, Outcome, decode, encode
from common.bench.records import AT, WIDTH
from common.errors import NotFound
from head.bench import judging
from head.bench.questions import PartFile
from tests.doubles.bench_parts import asked_of, parts_of

TOLD_BY_ORDER = ("error_samples", "generator", "created", "machine")  # by who was first, or of the processes


def files(count: int, *, without: tuple[int, ...] = ()) -> list[PartFile]:
    """The parts of a point; a path is the part's number."""
    return [
        PartFile(part, f"n{part}", f"bench-1.0.{part}", "" if part in without else str(part), "lost" if part in without
                 else "done")
        for part in range(count)
    ]  # fmt: skip


def merged(asked: Asked, outcomes: list[Outcome], *, without: tuple[int, ...] = ()) -> judging.Merged:
    """The parts, read as a judge reads them: each decoded from its file."""
    kept = [encode(asked, outcome) for outcome in outcomes]
    return judging.merge(files(len(outcomes), without=without), lambda path: decode(kept[int(path)]))


def whole(outcomes: list[Outcome]) -> Outcome:
    """All parts as one generator would have left them: rows in the order of the schedule."""
    one = copy.deepcopy(outcomes[0])
    for outcome in outcomes[1:]:
        one.merge(copy.deepcopy(outcome))
    flat = one.records.rows
    rows = sorted(list(flat[at : at + WIDTH]) for at in range(0, len(flat), WIDTH))
    one.records.rows = array("q", [value for row in rows for value in row])
    return one


class TestMerging:
    """Many parts are one run."""

    @settings(max_examples=15, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        requests=st.integers(8, 300),
        workers=st.integers(1, 3),
        failing=st.sampled_from([0.0, 0.1, 1.0]),
    )
    def test_the_merged_report_is_that_of_all_raw_samples(
        self, seed: int, requests: int, workers: int, failing: float
    ) -> None:
        """Eight parts, merged: every figure, distribution, second and histogram equals that of one generator."""
        asked = asked_of(requests, workers=workers)
        gaps: list[int] = []
        outcomes = parts_of(asked, 8, seed=seed, failing=failing, gaps=gaps)
        plain, figures = judging.judge(merged(asked, outcomes), parts=8)
        one: dict[str, Any] = msgspec.to_builtins(report.build(asked, whole(outcomes)))
        for name in one.keys() - set(TOLD_BY_ORDER) - {"rules", "reasons", "is_valid", "steady"}:
            assert plain[name] == one[name], name
        assert plain["steady"]["change"] == pytest.approx(one["steady"]["change"])  # a sum in another order
        raw = Histogram()
        raw.add_all(gaps)
        assert plain["histograms"]["icl"] == plain["histograms"]["itl"] == {"unit": "ns"} | raw.to_wire()
        assert plain["is_valid"] == one["is_valid"]
        assert figures["coverage"] == 1.0

    def test_percentiles_of_merged_histograms_are_within_the_stated_error(self) -> None:
        """The histogram of eight parts against the exact samples: off by at most RELATIVE_ERROR."""
        asked = asked_of(500)
        plain, _ = judging.judge(merged(asked, parts_of(asked, 8)), parts=8)
        for name in ("ttft", "tpot", "e2e"):
            histogram = Histogram.from_wire(plain["histograms"][name])
            for share, label in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
                exact = plain["latency"][name]["percentiles"][label] * 1e6
                assert histogram.percentile(share) == pytest.approx(exact, rel=RELATIVE_ERROR)

    def test_the_earliest_start_is_the_runs(self) -> None:
        """Parts that wrote their start a little later do not move it."""
        asked = asked_of(16)
        outcomes = parts_of(asked, 4)
        assert merged(asked, outcomes).outcome.start_wall_s == min(outcome.start_wall_s for outcome in outcomes)

    def test_a_part_of_another_schedule_is_missing(self) -> None:
        """What was asked of all must be the same; one that did something else does not count."""
        asked, other = asked_of(40), asked_of(44)
        kept = [encode(asked, parts_of(asked, 2)[0]), encode(other, parts_of(other, 2)[1])]
        found = judging.merge(files(2), lambda path: decode(kept[int(path)]))
        assert [part.part for part in found.came] == [0]
        assert found.missing[0][1] == "its result is of another schedule"

    def test_a_part_that_cannot_be_read_is_missing(self) -> None:
        """A torn or forged file costs its part, not the point."""
        asked = asked_of(40)
        kept = [encode(asked, parts_of(asked, 2)[0]), b"\x81\xa1x"]
        found = judging.merge(files(2), lambda path: decode(kept[int(path)]))
        assert [part.node for part, _ in found.missing] == ["n1"]

    @pytest.mark.parametrize("damage", ["rows", "outcome", "workers", "histogram", "another file"])
    def test_a_part_that_makes_no_sense_is_missing(self, damage: str) -> None:
        """Files of the right form with wrong content: torn rows, unknown outcomes, numbers out of range."""
        asked = asked_of(40)
        good, bad = parts_of(asked, 2)
        lying = asked
        match damage:
            case "rows":
                bad.records.rows.pop()
            case "outcome":
                bad.records.rows[AT["outcome"]] = 99
            case "workers":
                lying = dataclasses.replace(asked, plan={**asked.plan, "workers": 1 << 60})
            case "histogram":
                bad.records.icl.count += 1
        sent = msgspec.msgpack.encode([1]) if damage == "another file" else encode(lying, bad)
        kept = [encode(asked, good), sent]
        found = judging.merge(files(2), lambda path: decode(kept[int(path)]))
        assert [part.node for part, _ in found.missing] == ["n1"]
        plain, _ = judging.judge(found, parts=2)
        assert not plain["is_valid"]

    def test_nothing_came(self) -> None:
        """Without any part there is no report, and the error says what became of them."""
        with pytest.raises(NotFound, match="n0: its run is lost"):
            judging.merge(files(2, without=(0, 1)), decode_nothing)


def decode_nothing(path: str) -> tuple[Asked, Outcome]:
    """Nobody asks for it."""
    raise AssertionError(path)


class TestCoverage:
    """What is missing is counted by the schedule."""

    @pytest.mark.parametrize(
        ("requests", "parts", "workers", "lost"), [(400, 4, 1, (2,)), (103, 3, 2, (0,)), (10, 8, 1, (1, 7))]
    )
    def test_a_lost_part_is_missing_exactly(
        self, requests: int, parts: int, workers: int, lost: tuple[int, ...]
    ) -> None:
        """The requests that were due in the parts that came are exactly those that are there."""
        asked = asked_of(requests, workers=workers)
        outcomes = parts_of(asked, parts)
        plain, figures = judging.judge(merged(asked, outcomes, without=lost), parts=parts)
        there = sum(len(outcome.records) for part, outcome in enumerate(outcomes) if part not in lost)
        assert plain["coverage"]["planned"] == requests
        assert plain["coverage"]["due"] == plain["coverage"]["performed"] == there
        assert figures["coverage"] == pytest.approx(there / requests)
        assert [missing["node"] for missing in plain["coverage"]["missing"]] == [f"n{part}" for part in lost]

    def test_a_lost_part_makes_it_degraded_and_nothing_is_scaled_up(self) -> None:
        """The run is not valid, says why, and its rates are those of what was there."""
        asked = asked_of(400)
        outcomes = parts_of(asked, 4)
        plain, figures = judging.judge(merged(asked, outcomes, without=(3,)), parts=4)
        assert not plain["is_valid"]
        assert [reason["code"] for reason in plain["reasons"]] == ["degraded"], "who was left sent all that was theirs"
        assert plain["counts"]["sent"] == 300
        _, complete = judging.judge(merged(asked, outcomes), parts=4)
        assert figures["output_tok_s"] < 0.8 * complete["output_tok_s"]

    def test_a_closed_loop_counts_requests_or_slots(self) -> None:
        """Without a schedule the parts' requests count; with a time only, their slots."""
        plan = {"loop": "closed", "concurrency": 10, "arrivals": None, "planned_requests": 100}
        asked = asked_of(100, plan=plan, is_open=False, due_ns=array("q"))
        outcomes = parts_of(asked_of(100), 4)
        found = judging.coverage_of(merged(asked, outcomes, without=(0,)), 4)
        assert (found["planned"], found["due"], found["share"]) == (100, 75, 0.75)
        timed = asked_of(100, plan=plan | {"planned_requests": None}, is_open=False, due_ns=array("q"))
        found = judging.coverage_of(merged(timed, outcomes, without=(0,)), 4)
        assert (found["planned"], found["due"], found["share"]) == (None, None, 0.8)  # 2 of 10 slots were n0's

    @pytest.mark.parametrize(("skew_ms", "parts", "is_said"), [(5.0, 2, False), (5.1, 2, True), (50.0, 1, False)])
    def test_clocks_that_may_be_apart_are_said(self, skew_ms: float, parts: int, is_said: bool) -> None:
        """More than 5 ms between load nodes makes a run invalid; one node has nobody to be apart from."""
        asked = asked_of(200)
        plain, _ = judging.judge(merged(asked, parts_of(asked, parts)), parts=parts, skew_ms=skew_ms)
        assert ("clock_skew_between_nodes" in {reason["code"] for reason in plain["reasons"]}) == is_said
        assert plain["skew"]["bound_ms"] == skew_ms


class TestFigures:
    """What lists and searches read."""

    def test_the_main_figures_are_there(self) -> None:
        """Rates, shares and percentiles by name, with the rate that was asked for."""
        asked = asked_of(400, rate=100.0)
        _, figures = judging.judge(merged(asked, parts_of(asked, 2, failing=0.25)), parts=2)
        assert figures["asked_rate"] == pytest.approx(100, rel=0.01)
        assert 0.1 < figures["error_rate"] < 0.4
        wanted = ("req_s", "output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p99_ms", "e2e_p99_ms", "send_lag_p99_ms")
        assert all(figures[name] > 0 for name in wanted)

    def test_what_is_not_known_is_left_out(self) -> None:
        """No limits, no goodput; nothing answered, no latencies."""
        asked = asked_of(20)
        _, figures = judging.judge(merged(asked, parts_of(asked, 2, failing=1.0)), parts=2)
        assert "goodput_req_s" not in figures
        assert "ttft_p50_ms" not in figures
        assert figures["error_rate"] == 1.0

    def test_what_else_is_known_stands_in_the_report(self) -> None:
        """Facts, recipe and point, and the nodes instead of the machine that judged."""
        asked = asked_of(20)
        plain, _ = judging.judge(merged(asked, parts_of(asked, 2)), parts=2, about={"facts": {"head": "1"}})
        assert plain["facts"] == {"head": "1"}
        assert plain["machine"]["nodes"] == ["n0", "n1"]
