"""The search for the most load that meets the SLO, against servers whose capacity is known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench.recipe import Search, Slo
from common.bench.spec import LoadSpec
from head.core.benchmark_plan import length_s
from head.core.benchmark_search import Decision, Trial, decide, trial, verdict
from head.core.objects import Point

SLO = Slo(ttft=500.0, attainment=0.95, error_rate=0.01)


def searched(search: Search, capacity: float, *, silent_above: float = float("inf")) -> tuple[Decision, list[Trial]]:
    """A whole search against a server that meets the SLO up to `capacity`; above `silent_above` nothing is known."""
    trials: list[Trial] = []
    while (decision := decide(search, trials)).load is not None:
        assert len(trials) < search.max_points, "a search ends"
        passed = None if decision.load > silent_above else decision.load <= capacity
        trials.append(Trial(decision.load, passed, "rate_missed" if passed is None else ""))
    return decision, trials


def point(*, valid: bool = True, reasons: tuple[str, ...] = (), state: str = "completed", **figures: float) -> Point:
    """An ended point."""
    return Point(benchmark="b", number=0, state=state, is_valid=valid, reasons=reasons, figures=figures)


RATES = st.builds(
    Search,
    over=st.just("rate"),
    start=st.floats(0.01, 50),
    most=st.floats(50, 10_000),
    precision=st.floats(0.01, 0.5),
    max_points=st.just(60),
)
CONCURRENCIES = st.builds(
    Search,
    over=st.just("concurrency"),
    start=st.integers(1, 40).map(float),
    most=st.integers(40, 5_000).map(float),
    precision=st.floats(0.01, 0.5),
    max_points=st.just(60),
)


@given(RATES, st.floats(0.001, 20_000))
def test_rate_is_found_to_the_precision(search: Search, capacity: float) -> None:
    """The best load passes, and the server cannot bear more than the precision above it."""
    decision, trials = searched(search, capacity)
    if decision.best is None:
        assert capacity < search.start / 63
        return
    assert decision.best <= capacity
    top = float(f"{search.most:.6g}")
    assert decision.best >= top or capacity < decision.best * (1 + search.precision) * (1 + 1e-6)
    assert len({one.load for one in trials}) == len(trials), "no load is tried twice"
    assert all(0 < one.load <= top for one in trials)


@given(CONCURRENCIES, st.integers(0, 10_000))
def test_concurrency_is_found_in_whole_numbers(search: Search, capacity: int) -> None:
    """As for rates, to one or the precision; only whole numbers are tried."""
    decision, trials = searched(search, capacity)
    assert all(one.load == int(one.load) >= 1 for one in trials)
    if decision.best is None:
        assert capacity < max(1.0, search.start / 63)
        return
    assert decision.best <= capacity
    assert decision.best >= search.most or capacity < decision.best + max(1.0, search.precision * decision.best)


@given(RATES | CONCURRENCIES, st.floats(0.1, 5_000), st.integers(1, 6))
def test_a_search_keeps_its_number_of_points(search: Search, capacity: float, most: int) -> None:
    """It ends after max_points with the best so far."""
    few = Search(**{**{name: getattr(search, name) for name in search.__struct_fields__}, "max_points": most})
    decision, trials = searched(few, capacity)
    assert len(trials) <= most
    assert decision.best == max((one.load for one in trials if one.passed), default=None)
    assert decision.why


@given(RATES, st.floats(1, 5_000), st.floats(1, 5_000))
def test_a_generator_that_cannot_keep_up_ends_the_search(search: Search, capacity: float, silent_above: float) -> None:
    """What says nothing about the server never counts as its limit: the search stops there and says so."""
    decision, trials = searched(search, capacity, silent_above=silent_above)
    if trials[-1].passed is None:
        assert "rate_missed" in decision.why
        assert decision.best == max((one.load for one in trials if one.passed), default=None)
    else:
        assert all(one.passed is not None for one in trials)


def test_loads_double_and_then_halve_the_bracket() -> None:
    """From 1 on a server that bears 11 requests per second."""
    _, trials = searched(Search(start=1, most=1000, precision=0.05), 11)
    assert [one.load for one in trials] == [1, 2, 4, 8, 16, 12, 10, 11, 11.5]


def test_the_most_is_tried_and_not_exceeded() -> None:
    """A server that bears everything."""
    decision, trials = searched(Search(start=30, most=100), 1e9)
    assert [one.load for one in trials] == [30, 60, 100]
    assert decision.best == 100
    assert "most" in decision.why


def test_a_start_that_fails_is_halved() -> None:
    """The start was too high; a lower load is found."""
    decision, _ = searched(Search(start=100, most=1000, precision=0.1), 9)
    assert decision.best is not None
    assert 8 < decision.best <= 9


def test_results_that_contradict_each_other_end_it() -> None:
    """A load that fails below one that passes: nothing more is to be learnt by bisection."""
    decision = decide(Search(start=1, most=100), [Trial(4, False), Trial(8, True)])
    assert decision.load is None
    assert "monotonic" in decision.why


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (point(slo_attainment=0.96, error_rate=0.0), True),
        (point(slo_attainment=0.94, error_rate=0.0), False),
        (point(slo_attainment=0.99, error_rate=0.02), False),
        (point(error_rate=0.0), None),
        (point(valid=False, reasons=("rate_missed",), slo_attainment=0.1, error_rate=0.0), None),
        (point(valid=False, reasons=("late", "drain_timeout"), slo_attainment=0.1, error_rate=0.0), None),
        (point(valid=False, reasons=("drain_timeout",), slo_attainment=0.99, error_rate=0.0), False),
        (point(valid=False, reasons=("no_success",)), False),
        (point(valid=False), None),
        (point(state="failed"), None),
    ],
)
def test_what_a_point_says_of_the_server(ended: Point, expected: bool | None) -> None:
    """Attainment and errors of valid points; invalid ones only where the server is to blame."""
    assert verdict(ended, SLO) is expected


def test_without_limits_only_errors_count() -> None:
    """An SLO of an error rate alone needs no attainment."""
    assert verdict(point(error_rate=0.005), Slo(error_rate=0.01)) is True


@pytest.mark.parametrize(
    ("attainments", "expected"),
    [([0.99, 0.99, 0.5], True), ([0.99, 0.5, 0.5], False), ([0.99, 0.5], False), ([0.99, None, None], True)],
)
def test_the_majority_of_repetitions_counts(attainments: list[float | None], expected: bool) -> None:
    """Of those that say something; a tie fails."""
    points = [
        point(slo_attainment=one, error_rate=0.0) if one is not None else point(valid=False, reasons=("late",))
        for one in attainments
    ]
    assert trial(8.0, points, SLO).passed is expected


def test_no_valid_repetition_says_nothing() -> None:
    """The reason of the last one is told."""
    made = trial(8.0, [point(valid=False, reasons=("late",)), point(valid=False, reasons=("worker_lost",))], SLO)
    assert made.passed is None
    assert made.why == "worker_lost"


class TestLength:
    """How long a run may take before it is given up."""

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"rate": 10, "duration": 20, "warmup": 5, "cooldown": 5}, 30),
            ({"rate": 10, "requests": 400}, 80),
            ({"rate": 10, "peak": 2, "requests": 80, "arrivals": "ramp"}, 80),
            ({"concurrency": 4, "requests": 100}, 1000),
            ({"rate": 10, "requests": 400, "turns": 3}, 1000),
            ({"arrivals": "trace", "trace": "a.jsonl"}, 1000),
            ({"rate": 1, "duration": 5000}, 1000),
        ],
    )
    def test_it_is_known_where_a_schedule_says_it(self, fields: dict[str, Any], expected: float) -> None:
        """Else it may take as long as the whole benchmark."""
        assert length_s(LoadSpec(**fields), 1000) == expected
