"""Runs the core: one task takes events from one queue, steps, makes the records durable, then releases the effects.

    post(event) -> queue -> step(state, event, now) -> ledger (thread, fsync) -> release(effect)

Several waiting events share one commit. When the ledger cannot be written (a full disk) everything stops here and
the commit is tried again: nothing that was decided is lost, nothing that is not durable leaves. Leases are
renewed outside, so the head still sees a living node.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from agent.core.effects import Effect
from agent.core.events import Event, Ticked
from agent.core.objects import Record
from agent.core.state import NEVER_MS, State
from agent.core.step import step
from agent.ledger import Ledger
from common import limits
from common.clock import Clock
from common.telemetry import fields

log = logging.getLogger(__name__)
BATCH_EVENTS = 256
WAKE_MAX_S = 3_600.0


class Driver:
    """The one owner of the core's state. `release` performs an effect; it must return at once and not raise."""

    def __init__(self, state: State, ledger: Ledger, clock: Clock, release: Callable[[Effect], None]) -> None:
        self.state = state
        self.is_ledger_stuck = False
        self.events_handled = 0
        self.records_written = 0
        self._ledger = ledger
        self._clock = clock
        self._release = release
        self._queue: deque[Event] = deque()
        self._is_waiting = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._timer: asyncio.TimerHandle | None = None
        self._is_tick_queued = False

    @property
    def is_congested(self) -> bool:
        """Whether so much waits that the session with the head should be ended rather than fed."""
        return len(self._queue) >= limits.AGENT_QUEUE_EVENTS

    def post(self, event: Event) -> None:
        """Queues an event; from the loop's thread only."""
        self._queue.append(event)
        self._is_idle.clear()
        self._is_waiting.set()

    async def settled(self) -> None:
        """Waits until every event posted so far is handled and durable."""
        if self._queue:
            self._is_idle.clear()
        await self._is_idle.wait()

    async def run(self) -> None:
        """Handles events until cancelled."""
        while True:
            if not self._queue:
                self._is_idle.set()
                self._is_waiting.clear()
                await self._is_waiting.wait()
            await self._turn()

    async def _turn(self) -> None:
        records: list[Record] = []
        effects: list[Effect] = []
        for _ in range(min(len(self._queue), BATCH_EVENTS)):
            event = self._queue.popleft()
            if isinstance(event, Ticked):
                self._is_tick_queued = False
            turn = step(self.state, event, self._clock.now_ms())
            records += turn.records
            effects += turn.effects
            self.events_handled += 1
        if records:
            await self._write(records)
        for effect in effects:
            self._release(effect)
        self._set_timer()

    async def _write(self, records: list[Record]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._writer, self._ledger.append, records)
                break
            except sqlite3.Error as error:
                if not self.is_ledger_stuck:
                    log.error("the ledger cannot be written; work waits", extra=fields(error=str(error)))
                self.is_ledger_stuck = True
                await asyncio.sleep(limits.LEDGER_RETRY_S)
        if self.is_ledger_stuck:
            self.is_ledger_stuck = False
            log.warning("the ledger can be written again")
        self.records_written += len(records)
        for record in records:
            log.info(record.what, extra=fields(kind=record.kind, key=record.key, cause=record.cause))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.state.wake_ms < NEVER_MS and not self._is_tick_queued:
            delay_s = max(0.0, (self.state.wake_ms - self._clock.now_ms()) / 1000)
            self._timer = asyncio.get_running_loop().call_later(min(delay_s, WAKE_MAX_S), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._is_tick_queued = True
        self.post(Ticked())

    def close(self) -> None:
        """After `run` was cancelled: ends the writer thread once a commit in progress is through."""
        if self._timer is not None:
            self._timer.cancel()
        self._writer.shutdown(wait=True)
