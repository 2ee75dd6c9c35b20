"""What time it is on a node: some questions over its session, and the answer that came back fastest.

The head notes when it asked and when it heard the answer; the node's clock was read somewhere in between. The middle is
the estimate and half of the round trip its bound, whatever the way there and back were like, so the shortest round trip
gives the best of both. Only answers to questions of the same session count, each once.
Source: Cristian, "Probabilistic clock synchronization" (1989).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from common import limits
from common.clock import FineClock, boottime_ns
from common.tasks import Supervisor
from common.telemetry import fields
from common.wire import ClockAsk, ClockTold, Message
from head.core.events import ClockMeasured, Event

log = logging.getLogger(__name__)
SPACING_S = 0.02  # between two questions: a queue that one of them met may be gone for the next
ANSWERS_S = 5.0  # for all answers; what is later would be no good anyway


@dataclass(slots=True)
class _Estimate:
    """One node's clock in the making."""

    node: str
    session_id: str
    asked: dict[int, int] = field(default_factory=dict)  # the question's number -> when it left, Herder time
    answers: int = 0
    best: tuple[int, int] | None = None  # round trip, offset; nanoseconds
    news: asyncio.Event = field(default_factory=asyncio.Event)
    is_lost: bool = False


class Clocks:
    """Measures clocks by request of the core; answers by `ClockMeasured`, or not at all when the node has gone."""

    def __init__(self, clock: FineClock, send: Callable[[str, Message], None], post: Callable[[Event], None]) -> None:
        self._clock = clock
        self._send = send
        self._post = post
        self._running: dict[str, _Estimate] = {}  # by session
        self._tasks = Supervisor("clocks")

    def measure(self, node: str, session_id: str) -> None:
        """Begins; one that is on its way in the same session already is not begun again."""
        if session_id in self._running:
            return
        estimate = self._running[session_id] = _Estimate(node, session_id)
        self._tasks.start(f"clock of {node}", self._measure(estimate))

    def take(self, told: ClockTold, session_id: str) -> None:
        """An answer came. One that nobody waits for, or that came before, is dropped."""
        heard_ns = self._clock.now_ns()
        estimate = self._running.get(session_id)
        asked_ns = estimate.asked.pop(told.asked_ns, None) if estimate is not None else None
        if estimate is None or asked_ns is None or told.boottime_ns < 0:
            return
        estimate.answers += 1
        round_ns = max(0, heard_ns - asked_ns)
        if estimate.best is None or round_ns < estimate.best[0]:
            estimate.best = (round_ns, told.boottime_ns - (asked_ns + heard_ns) // 2)
        if estimate.answers >= limits.CLOCK_ASKS:
            estimate.news.set()

    def session_closed(self, session_id: str) -> None:
        """Nothing more will come from this session."""
        estimate = self._running.get(session_id)
        if estimate is not None:
            estimate.is_lost = True
            estimate.news.set()

    async def close(self) -> None:
        """Ends what is on its way."""
        await self._tasks.close()

    async def _measure(self, estimate: _Estimate) -> None:
        try:
            async with asyncio.timeout(ANSWERS_S):
                await self._ask(estimate)
                await estimate.news.wait()
        except TimeoutError:
            pass  # what has come by now is what there is
        finally:
            self._running.pop(estimate.session_id, None)
        if estimate.is_lost:
            return
        if estimate.best is None:
            log.warning("a node does not tell its time", extra=fields(node=estimate.node))
            return
        round_ns, offset_ns = estimate.best
        self._post(ClockMeasured(estimate.node, estimate.session_id, offset_ns, (round_ns + 1) // 2))

    async def _ask(self, estimate: _Estimate) -> None:
        number = 0
        for _ in range(limits.CLOCK_ASKS):
            if number:
                await asyncio.sleep(SPACING_S)
            if estimate.is_lost:
                return
            number = max(boottime_ns(), number + 1)  # Herder time would not fit into a frame's numbers
            estimate.asked[number] = self._clock.now_ns()
            self._send(estimate.session_id, ClockAsk(number))
