"""The choice among replicas, the account of their loads, and what the gateway counts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from head.core.service_views import Route
from head.core.state import State
from head.gateway.bodies import Room
from head.gateway.metering import OTHER, SERVICES, Metering
from head.gateway.routing import FAILURE_S, FRESH_S, LeastOutstanding, Loads, Lookup, eligible


def route(number: int) -> Route:
    """One of several replicas."""
    return Route(f"chat-{number}", 1, "chat", f"n{number}", "127.0.0.1", 1000 + number, "", "m")


class TestLeastOutstanding:
    @given(loads=st.lists(st.integers(0, 5), min_size=1, max_size=12), turns=st.integers(0, 30))
    def test_takes_one_of_the_least_busy(self, loads: list[int], turns: int) -> None:
        """Whatever the turn, the choice has no more requests than any other."""
        policy, held = LeastOutstanding(), Loads()
        routes = [route(number) for number in range(len(loads))]
        for chosen, count in zip(routes, loads, strict=True):
            for _ in range(count):
                held.begin(chosen.replica)
        for _ in range(turns + 1):
            choice = policy.choose(routes, held)
        assert held.outstanding.get(choice.replica, 0) == min(loads)

    def test_equals_take_turns(self) -> None:
        """Among idle replicas each gets its share."""
        policy, held = LeastOutstanding(), Loads()
        routes = [route(number) for number in range(3)]
        assert set(Counter(policy.choose(routes, held).replica for _ in range(30)).values()) == {10}

    def test_burst_is_spread_evenly(self) -> None:
        """Requests that come together are laid on all replicas alike."""
        policy, held = LeastOutstanding(), Loads()
        routes = [route(number) for number in range(4)]
        for _ in range(20):
            held.begin(policy.choose(routes, held).replica)
        assert set(held.outstanding.values()) == {5}


class TestLoads:
    def test_ended_requests_leave_nothing(self) -> None:
        """Replicas without requests are not remembered."""
        held = Loads()
        held.begin("a")
        held.begin("a")
        held.end("a")
        assert held.outstanding == {"a": 1}
        held.end("a")
        assert held.outstanding == {}

    def test_failure_is_forgotten(self) -> None:
        """A failure counts for a moment only."""
        held = Loads()
        held.failed("a", 100.0)
        assert held.is_failing("a", 100.0 + FAILURE_S / 2)
        assert not held.is_failing("a", 100.0 + FAILURE_S)
        held.failed("b", 200.0)
        assert set(held.failed_until) == {"b"}


class TestEligible:
    def test_good_ones_come_first(self) -> None:
        """While one is good the others are not considered and no probe is wanted."""
        routes = [route(0), route(1)]
        assert eligible(routes, tried=(), is_good=lambda r: r.replica == "chat-1") == ([routes[1]], False)

    def test_doubtful_ones_want_a_probe(self) -> None:
        """Without a good one the rest are worth a probe."""
        routes = [route(0), route(1)]
        assert eligible(routes, tried={"chat-0"}, is_good=lambda _: False) == ([routes[1]], True)

    def test_nothing_is_tried_twice(self) -> None:
        """When all were tried nothing is left."""
        assert eligible([route(0)], tried={"chat-0"}, is_good=lambda _: True) == ([], False)


class TestLookup:
    def test_is_remembered_until_the_state_changes_or_time_passes(self) -> None:
        """One lookup serves many requests, and never an older state."""
        asked: list[str] = []

        def find(_state: State, name: str) -> list[Route]:
            asked.append(name)
            return [route(0)]

        lookup, state = Lookup(find), State()
        lookup.routes(state, "m", 0.0)
        lookup.routes(state, "m", FRESH_S / 2)
        assert len(asked) == 1
        lookup.routes(state, "m", FRESH_S * 2)
        assert len(asked) == 2
        state.revision += 1
        lookup.routes(state, "m", FRESH_S * 2)
        assert len(asked) == 3

    def test_absence_is_never_remembered(self) -> None:
        """Names that clients invent take no room, and a replica that becomes ready is found at once."""
        answers: list[list[Route]] = [[], [route(0)]]
        lookup = Lookup(lambda _state, _name: answers.pop(0))
        assert lookup.routes(State(), "m", 0.0) == []
        assert lookup.routes(State(), "m", 0.0) == [route(0)]


class TestMetering:
    def test_labels_are_bounded(self) -> None:
        """However many services come and go, their series do not grow without end."""
        metering = Metering(Room(0))
        for number in range(SERVICES + 50):
            metering.count(f"service-{number}", "/v1/completions", "ok", 0.1)
        assert metering.requests[OTHER, "/v1/completions", "ok"] == 50
        assert len(metering.requests) == SERVICES + 1

    def test_histogram_buckets_are_cumulative(self) -> None:
        """A value on a bound counts below it, and the last bucket holds all."""
        metering = Metering(Room(0))
        for seconds in (0.01, 0.02, 1000.0):
            metering.first_token("chat", seconds)
        buckets = dict(metering.ttft["chat"].buckets())
        assert (buckets["0.01"], buckets["0.025"], buckets["300.0"], buckets["+Inf"]) == (1, 2, 2, 3)
