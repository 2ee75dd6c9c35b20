"""MLPerf's rules for the scenarios server and offline, each broken alone."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from common.bench import mlperf, report
from common.bench.metrics import Limit
from common.bench.outcome import Asked
from tests.doubles.bench_parts import asked_of, parts_of

LIMITS = (Limit("ttft", 200.0), Limit("tpot", 100.0))


def said(scenario: str, asked: Asked, *, failing: float = 0.0, limits: tuple[Limit, ...] = LIMITS) -> str:
    """All that is broken, in one text."""
    outcome = parts_of(asked, 1, failing=failing)[0]
    found = mlperf.findings(scenario, asked, outcome.records, report.build(asked, outcome), limits)
    assert all(finding.code == "mlperf_rules" for finding in found)
    return " | ".join(finding.said for finding in found)


def server(requests: int = 700, **changes: Any) -> Asked:
    """700 requests in 700 s."""
    return asked_of(requests, rate=changes.pop("rate", 1.0), **changes)


def test_a_server_run_that_keeps_the_rules() -> None:
    """Poisson, long enough, enough samples, within the limits: nothing is said."""
    assert said("server", server()) == ""


@pytest.mark.parametrize(
    ("asked", "limits", "words"),
    [
        (server(plan={"arrivals": "constant"}), LIMITS, "poisson"),
        (server(plan={"loop": "closed"}), LIMITS, "poisson"),
        (server(rate=10.0), LIMITS, "at least 600 s"),
        (server(650), LIMITS, "650 samples of ttft bound no p99"),
        (server(), (Limit("ttft", 200.0),), "slo.tpot is missing"),
        (server(), (Limit("ttft", 60.0), Limit("tpot", 100.0)), "the bound of p99 of ttft"),
    ],
)
def test_a_server_rule_is_broken(asked: Asked, limits: tuple[Limit, ...], words: str) -> None:
    """Each rule is named in what is said, and no other is."""
    text = said("server", asked, limits=limits)
    assert words in text
    assert text.startswith("MLPerf server: ")


def test_ttft_counts_from_the_scheduled_time() -> None:
    """A generator that was late is no excuse: the wait counts."""
    asked = server()
    outcome = parts_of(asked, 1)[0]
    late = 300_000_000
    from common.bench.records import AT, WIDTH

    for at in range(0, len(outcome.records.rows), WIDTH):
        for name in ("acted", "sent", "first", "first_output", "last", "end"):
            outcome.records.rows[at + AT[name]] += late
    found = mlperf.findings("server", asked, outcome.records, report.build(asked, outcome), LIMITS)
    assert any("p99 of ttft" in finding.said for finding in found)


def test_unanswered_requests_break_both() -> None:
    """Every request is to be answered."""
    assert "were not" in said("server", server(), failing=0.01)


def offline(requests: int, *, spread_ns: int = 0, is_open: bool = True, concurrency: int = 0) -> Asked:
    """Everything due at the start."""
    plan = {"loop": "open" if is_open else "closed", "concurrency": concurrency, "planned_requests": requests}
    due = array("q", [spread_ns * number for number in range(requests)]) if is_open else array("q")
    return asked_of(requests, rate=40.0, plan=plan, due_ns=due, is_open=is_open, until_s=None)


def test_an_offline_run_is_due_at_once_and_long() -> None:
    """Arrivals over time are no offline run, and a short one of few requests is none either."""
    text = said("offline", offline(400, spread_ns=10_000_000))
    assert "due at the start" in text
    assert "at least 24,576 requests, here it was 400" in text
    assert "at least 600 s" in text


@pytest.mark.parametrize(("concurrency", "is_broken"), [(400, False), (399, True)])
def test_a_closed_loop_with_all_on_their_way_is_at_once(concurrency: int, is_broken: bool) -> None:
    """As many slots as requests."""
    asked = offline(400, is_open=False, concurrency=concurrency)
    outcome = parts_of(asked_of(400), 1)[0]
    found = mlperf.findings("offline", asked, outcome.records, report.build(asked, outcome), ())
    assert any("due at the start" in finding.said for finding in found) == is_broken


def test_no_scenario_has_no_rules() -> None:
    """A plain benchmark is not judged by them."""
    assert said("", server(10)) == ""


def test_requests_of_a_lost_node_are_missing() -> None:
    """What no part has a record of was not answered."""
    asked = server(1400, rate=2.0)
    outcome = parts_of(asked, 2)[0]
    found = mlperf.findings("server", asked, outcome.records, report.build(asked, outcome), LIMITS)
    assert any("700 were not" in finding.said for finding in found)
