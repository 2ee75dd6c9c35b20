"""Clocks of nodes: the fastest answer counts, its half round trip bounds the error, others' answers do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import limits
from common.wire import ClockAsk, ClockTold, Message
from head.bench import clocks as clocks_module
from head.bench.clocks import Clocks
from head.core.events import ClockMeasured, Event


class ByHand:
    """A clock that the wire moves."""

    def __init__(self) -> None:
        self.ns = 1_800_000_000_000_000_000

    def now_ns(self) -> int:
        """Herder time."""
        return self.ns

    def now_ms(self) -> int:
        """The same in milliseconds."""
        return self.ns // 1_000_000


def measured(answer: Callable[[Clocks, ByHand, ClockAsk, str], None]) -> list[Event]:
    """What is posted after a measurement in which every question is answered so."""

    async def run() -> list[Event]:
        posted: list[Event] = []
        clock = ByHand()

        def send(session_id: str, message: Message) -> None:
            assert isinstance(message, ClockAsk)
            answer(clocks, clock, message, session_id)

        clocks = Clocks(clock, send, posted.append)
        clocks.measure("n1", "ses-1")
        clocks.measure("n1", "ses-1")  # asked for again while it is on its way
        async with asyncio.timeout(10):
            while clocks._running:  # noqa: ASYNC110 - nothing is posted where nothing was heard
                await asyncio.sleep(0.001)
        await clocks.close()
        return posted

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions without pauses; answers that do not come are not waited for long."""
    monkeypatch.setattr(clocks_module, "SPACING_S", 0.0)
    monkeypatch.setattr(clocks_module, "ANSWERS_S", 0.05)


@settings(max_examples=30, deadline=None)
@given(
    ways=st.lists(
        st.tuples(st.integers(0, 50_000_000), st.integers(0, 50_000_000)),
        min_size=limits.CLOCK_ASKS,
        max_size=limits.CLOCK_ASKS,
    ),
    offset_ns=st.integers(-(1 << 60), 0),
)
def test_the_error_is_within_the_bound(ways: list[tuple[int, int]], offset_ns: int) -> None:
    """Whatever the ways there and back take: the estimate is off by at most what it says, of the shortest trip."""
    left = iter(ways)

    def answer(clocks: Clocks, clock: ByHand, asked: ClockAsk, session_id: str) -> None:
        there, back = next(left)
        clock.ns += there
        told = ClockTold(asked.asked_ns, max(0, clock.ns + offset_ns))
        clock.ns += back
        clocks.take(told, session_id)

    (event,) = measured(answer)
    assert isinstance(event, ClockMeasured)
    assert abs(event.offset_ns - offset_ns) <= event.bound_ns
    assert event.bound_ns == (min(there + back for there, back in ways) + 1) // 2


def test_answers_of_others_and_repeats_do_not_count() -> None:
    """Another session, a number that was not asked, a second answer to one question: all dropped."""
    counts = []

    def answer(clocks: Clocks, clock: ByHand, asked: ClockAsk, session_id: str) -> None:
        clock.ns += 1_000_000
        clocks.take(ClockTold(asked.asked_ns, 5), "ses-2")
        clocks.take(ClockTold(asked.asked_ns + 1, 5), session_id)
        clocks.take(ClockTold(asked.asked_ns, clock.ns // 1000), session_id)
        clocks.take(ClockTold(asked.asked_ns, 7), session_id)
        counts.append(asked.asked_ns)

    (event,) = measured(answer)
    assert isinstance(event, ClockMeasured)
    assert len(set(counts)) == limits.CLOCK_ASKS
    assert event.bound_ns == 500_000


def test_some_answers_are_enough() -> None:
    """Lost frames cost nothing but the time to see that they are lost."""

    def answer(clocks: Clocks, clock: ByHand, asked: ClockAsk, session_id: str) -> None:
        clock.ns += 2_000_000
        if clock.ns // 2_000_000 % 2:
            clocks.take(ClockTold(asked.asked_ns, 10), session_id)

    assert [type(event) for event in measured(answer)] == [ClockMeasured]


def test_nothing_is_said_without_an_answer() -> None:
    """A node that does not answer has no clock; the core asks again."""
    assert measured(lambda *_: None) == []


def test_a_session_that_ends_is_not_measured() -> None:
    """Its answers were of a connection that is gone."""

    def answer(clocks: Clocks, clock: ByHand, asked: ClockAsk, session_id: str) -> None:
        clocks.take(ClockTold(asked.asked_ns, 10), session_id)
        clocks.session_closed(session_id)

    assert measured(answer) == []
