"""The driver: everything that happens to the head passes through one queue, one state and one order.

Two tasks: the stepper takes events from the queue and steps them on the state; the committer hands the records to
the journal, one batch at a time, and then lets the effects leave. What a batch is, what may leave early and what is
taken back when the journal refuses stands in `head/pipeline.py`, which knows no clock, thread or loop.

While the journal refuses (disk full), the head reads, renews leases and refuses changes with `state_read_only`; it
probes the journal with a growing delay and goes on by itself once a commit succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from common import backoff, limits
from common.clock import Clock, boottime_ms
from common.errors import ErrorInfo, HerderError, Internal, TimedOut, Unavailable, from_info
from common.tasks import Supervisor
from common.telemetry import fields, ticks
from common.wire import Message
from head.core.effects import (
    Alarm,
    CloseSession,
    Drain,
    Effect,
    EndDrain,
    JudgePoint,
    MeasureClock,
    Refuse,
    RemoveBenchmark,
    Reply,
    Send,
    WriteBenchmark,
)
from head.core.events import Event, ReplicaIdle, RequestEvent, Ticked
from head.core.state import State
from head.core.turn import Turn
from head.feed import Feed
from head.journal import Row
from head.pipeline import Pipeline, Released, Step
from herder.types import StoryLine

log = logging.getLogger(__name__)
SLICE_S = 0.005  # the stepper lets others run after so long
PROBE_BASE_MS = 500
PROBE_CAP_MS = 30_000
SLOW_STEP_S = 0.1
SLOW_COMMIT_MS = 10_000  # a batch with the journal for longer raises an alarm
READ_ONLY_ALARM = "journal_read_only"
SLOW_ALARM = "journal_slow"


class JournalLike(Protocol):
    """What the driver needs of the journal."""

    async def commit(self, rows: Sequence[Row]) -> None:
        """Makes rows durable, all or none. Raises: HerderError."""
        ...

    async def story(self, id: str, *, kind: str = "", before: int = 0, limit: int = ...) -> list[StoryLine]:
        """What happened to an id."""
        ...


class Outlet(Protocol):
    """Where effects for agents leave."""

    def send(self, session_id: str, message: Message) -> None:
        """Sends to a session, if it still is there. Never blocks."""
        ...

    def close_session(self, session_id: str, error: ErrorInfo | None) -> None:
        """Ends a session, if it still is there. Never blocks."""
        ...


class Drainer(Protocol):
    """Who carries requests to engines: the gateway."""

    def drain(self, replica: str, generation: int) -> None:
        """Has `ReplicaIdle` posted once nothing is on its way to the replica. Never blocks."""
        ...

    def end_drain(self, replica: str) -> None:
        """Cuts what is still on its way. Never blocks."""
        ...


BenchEffect = JudgePoint | MeasureClock | RemoveBenchmark | WriteBenchmark


class Performer(Protocol):
    """Who measures clocks, judges points and keeps results: head/bench."""

    def perform(self, effect: BenchEffect) -> None:
        """Begins what the core asks for; its answer is an event. Never blocks."""
        ...


def _core_step(state: State, event: Event, now_ms: int) -> Turn:
    from head.core.step import step  # the whole core; tests of the shell bring a step of their own

    return step(state, event, now_ms)


class Driver:
    """Owns the state. Readers look at `state` after `await durable()`; nobody else writes it."""

    def __init__(
        self,
        state: State,
        journal: JournalLike,
        clock: Clock,
        feed: Feed,
        *,
        step: Step = _core_step,
        rng: random.Random | None = None,
    ) -> None:
        self.state = state
        self.journal = journal
        self.clock = clock
        self.alarms: dict[str, str] = {}  # name -> text of those that are on
        self.counts: Counter[str] = Counter()  # events by type, bugs, timeouts: read by the metrics
        self.step_seconds = 0.0
        self.on_lag: Callable[[int], None] | None = None  # told how late each tick was
        self.drainer: Drainer | None = None  # None: nothing is ever on its way to an engine
        self.performer: Performer | None = None  # None: benchmarks do not go on
        self.last_tick_boottime_ms = boottime_ms()  # when the last tick was handled: what the watchdog looks at
        self.started_boottime_ms = boottime_ms()
        self._feed = feed
        self._pipeline = Pipeline(state, step)
        self._outlet: Outlet | None = None
        self._rng = rng or random.Random()
        self._queue: deque[Event] = deque()
        self._requests: dict[str, asyncio.Future[Reply]] = {}
        self._wake = asyncio.Event()
        self._sealable = asyncio.Event()
        self._waits_for_room: list[Callable[[], None]] = []
        self._room = asyncio.Event()
        self._room.set()
        self._readers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._tick_waits = False
        self._missed_stall_ms = 0
        self._commit_started_ms = 0
        self._probes = 0
        self._is_stopping = False
        self.tasks = Supervisor("driver")

    # what the shell calls

    def start(self, outlet: Outlet, *, with_ticks: bool = True) -> None:
        """Begins to handle events; effects for agents leave through the outlet."""
        self._outlet = outlet
        self.tasks.start("step", self._step_forever(), is_critical=True)
        self.tasks.start("commit", self._commit_forever(), is_critical=True)
        if with_ticks:
            self.tasks.start("tick", self._tick_forever(), is_critical=True)

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Refuses new requests, finishes what was taken, ends."""
        self._is_stopping = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.settled()
        except TimeoutError:
            log.error("stopped with changes undecided", extra=fields(events=len(self._queue)))
        for future in self._requests.values():
            if not future.done():
                future.set_exception(TimedOut("the head stopped before the outcome was known"))
        await self.tasks.close()

    async def submit(self, event: RequestEvent) -> Reply:
        """Handles a request; returns once its records are durable. Raises: HerderError, as the core refused it.

        A cancelled or timed-out caller does not undo the change: its outcome is unknown to that caller.
        """
        if self._is_stopping:
            raise Unavailable("the head is stopping", hint="try again when it is back")
        if max(len(self._requests), len(self._queue)) >= limits.JOURNAL_QUEUE_EVENTS:
            self.counts["refused_full"] += 1
            raise Unavailable("the head has too many changes in hand", hint="try again in a moment")
        if event.request_id in self._requests:
            raise Internal("two requests bear one id", request_id=event.request_id)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._requests[event.request_id] = future
        self._enqueue(event)
        try:
            async with asyncio.timeout(limits.SUBMIT_S):
                return await future
        except TimeoutError:
            self.counts["timed_out"] += 1
            raise TimedOut(
                "the change is still on its way to the disk",
                hint="it may still happen; ask again with the same Idempotency-Key",
            ) from None
        finally:
            self._requests.pop(event.request_id, None)

    def post(self, event: Event) -> None:
        """Hands in an event that wants no answer. Whoever posts much awaits `room()` before."""
        self._enqueue(event)

    def when_room(self, wake: Callable[[], None]) -> None:
        """Calls `wake` once the queue has room again: the sessions' back-pressure."""
        self._room.clear()
        self._waits_for_room.append(wake)

    async def room(self) -> None:
        """Waits while the queue is full."""
        while len(self._queue) >= limits.JOURNAL_QUEUE_EVENTS:
            self._room.clear()
            await self._room.wait()

    async def durable(self) -> None:
        """Waits until all that the state shows now is on the disk, or was taken back."""
        pipeline = self._pipeline
        if pipeline.is_settled:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.append((pipeline.taken, future))
        try:
            async with asyncio.timeout(limits.SUBMIT_S):
                await future
        except TimeoutError:
            raise TimedOut("the journal is too slow to say what is durable", hint="look at the head's disk") from None

    async def settled(self) -> None:
        """Waits until nothing waits: for the start and the end."""
        while self._queue or not self._pipeline.is_settled:  # noqa: ASYNC110 - no event marks a pause in a stream
            await asyncio.sleep(0.002)

    async def story(
        self, id: str, *, kind: str = "", before: int = 0, limit: int = limits.PAGE_ITEMS
    ) -> list[StoryLine]:
        """What happened to an object, or because of a request or job; oldest first."""
        return await self.journal.story(id, kind=kind, before=before, limit=limit)

    def feed(self) -> Feed:
        """The change feed."""
        return self._feed

    @property
    def is_read_only(self) -> bool:
        """Whether changes are refused because the journal cannot be written."""
        return self._pipeline.problem is not None

    @property
    def is_settling(self) -> bool:
        """Whether nodes still get time to come back after the head's start."""
        return self.clock.now_ms() < self.state.settle_until_ms

    @property
    def queue_depth(self) -> int:
        """Events that wait to be stepped."""
        return len(self._queue)

    @property
    def undecided_records(self) -> int:
        """Records on their way to the disk."""
        return self._pipeline.open_records

    @property
    def parked_events(self) -> int:
        """Facts from agents that wait for the journal to write again."""
        return self._pipeline.parked

    # the tasks

    def _enqueue(self, event: Event) -> None:
        self._queue.append(event)
        self._wake.set()

    async def _step_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                self._step_slice()
                await asyncio.sleep(0)

    def _step_slice(self) -> None:
        queue = self._queue
        started = time.perf_counter()
        now = started
        while queue and now - started < SLICE_S:
            event = queue.popleft()
            self._take(event)
            before, now = now, time.perf_counter()
            if now - before > SLOW_STEP_S:
                log.warning("slow step", extra=fields(event=type(event).__name__, ms=round((now - before) * 1000)))
        self.step_seconds += now - started
        if not self._room.is_set() and len(queue) < limits.JOURNAL_QUEUE_EVENTS // 2:
            self._room.set()
            woken, self._waits_for_room = self._waits_for_room, []
            for wake in woken:
                wake()
        if not self._pipeline.is_settled:
            self._sealable.set()

    def _take(self, event: Event) -> None:
        self.counts[type(event).__name__] += 1
        if isinstance(event, Ticked):
            self._tick_waits = False
            self.last_tick_boottime_ms = boottime_ms()
        released = self._pipeline.take(event, self.clock.now_ms())
        if released.bug is not None:
            self.counts["bugs"] += 1
            log.error("a step failed and was taken back", extra=fields(**_summary(event)), exc_info=released.bug)
        self._release(released.effects)

    async def _commit_forever(self) -> None:
        while True:
            if self.is_read_only:
                await self._probe_until_writable()
            rows = self._pipeline.seal()
            if rows is None:
                self._sealable.clear()
                await self._sealable.wait()
                continue
            self._commit_started_ms = boottime_ms()
            try:
                await self.journal.commit(rows)
            except HerderError as error:
                self._on_refused(error)
            else:
                self._on_committed(self._pipeline.committed())
            finally:
                self._commit_started_ms = 0

    def _on_committed(self, released: Released) -> None:
        self._probes = 0
        self._feed.publish(released.records)
        self._release(released.effects)
        self._wake_readers()
        self._retake(released.retaken)
        if SLOW_ALARM in self.alarms:
            self._alarm(Alarm(SLOW_ALARM, "", is_on=False))

    def _on_refused(self, error: HerderError) -> None:
        log.error("the journal refused a batch; changes are refused until it writes again", extra=fields(error=error))
        self._alarm(Alarm(READ_ONLY_ALARM, error.message))
        released = self._pipeline.refused(error)
        self._release(released.effects)
        self._wake_readers()
        self._retake(released.retaken)

    async def _probe_until_writable(self) -> None:
        while True:
            # Counted until a batch is durable: a journal that takes probes and refuses batches is asked ever later.
            self._probes += 1
            delay_ms = backoff.ceiling_ms(self._probes, base_ms=PROBE_BASE_MS, cap_ms=PROBE_CAP_MS)
            await asyncio.sleep(self._rng.uniform(0.5, 1.0) * delay_ms / 1000)
            try:
                await self.journal.commit(())
                break
            except HerderError:
                continue
        log.warning("the journal writes again")
        self._alarm(Alarm(READ_ONLY_ALARM, "", is_on=False))
        self._retake(self._pipeline.recovered())

    def _retake(self, events: list[Event]) -> None:
        """These events come before all others, in their order."""
        if events:
            self._queue.extendleft(reversed(events))
            self._wake.set()

    def _wake_readers(self) -> None:
        while self._readers and self._readers[0][0] <= self._pipeline.decided:
            _, future = self._readers.popleft()
            if not future.done():
                future.set_result(None)

    async def _tick_forever(self) -> None:
        async for lag_ms in ticks(limits.TICK_MS / 1000):
            if self.on_lag is not None:
                self.on_lag(lag_ms)
            if self._commit_started_ms and boottime_ms() - self._commit_started_ms > SLOW_COMMIT_MS:
                self._alarm(Alarm(SLOW_ALARM, "a commit takes longer than 10 s; is the head's disk alive?"))
            if self._tick_waits:
                self._missed_stall_ms += lag_ms  # the queue is behind; one tick at a time is enough
                continue
            self._tick_waits = True
            self.post(Ticked(stall_ms=lag_ms + self._missed_stall_ms))
            self._missed_stall_ms = 0

    # effects

    def _release(self, effects: list[Effect]) -> None:
        for effect in effects:
            try:
                self._release_one(effect)
            except Exception:
                self.counts["bugs"] += 1
                log.exception("an effect could not leave", extra=fields(effect=type(effect).__name__))

    def _release_one(self, effect: Effect) -> None:
        match effect:
            case Send():
                assert self._outlet is not None
                self._outlet.send(effect.session_id, effect.message)
            case Reply():
                future = self._requests.get(effect.request_id)
                if future is not None and not future.done():
                    future.set_result(effect)
            case Refuse():
                future = self._requests.get(effect.request_id)
                if future is not None and not future.done():
                    future.set_exception(from_info(effect.error))
            case CloseSession():
                assert self._outlet is not None
                self._outlet.close_session(effect.session_id, effect.error)
            case Drain():
                if self.drainer is not None:
                    self.drainer.drain(effect.replica, effect.generation)
                else:
                    self.post(ReplicaIdle(effect.replica, effect.generation))
            case EndDrain():
                if self.drainer is not None:
                    self.drainer.end_drain(effect.replica)
            case JudgePoint() | MeasureClock() | RemoveBenchmark() | WriteBenchmark():
                if self.performer is not None:
                    self.performer.perform(effect)
            case Alarm():
                self._alarm(effect)
            case _:
                raise AssertionError(f"no way out for {type(effect).__name__}")

    def _alarm(self, alarm: Alarm) -> None:
        if alarm.is_on:
            if self.alarms.get(alarm.name) != alarm.text:
                log.warning("alarm", extra=fields(alarm=alarm.name, text=alarm.text))
            self.alarms[alarm.name] = alarm.text
            self.counts["alarms"] += 1
        elif self.alarms.pop(alarm.name, None) is not None:
            log.warning("alarm is over", extra=fields(alarm=alarm.name))


def _summary(event: Event) -> dict[str, str | int]:
    """What the log may show of an event: its type and its plain names, never a body that may hold secrets."""
    shown = ("request_id", "actor", "node", "session_id", "model", "service", "job", "key", "replica", "generation")
    values = {name: value for name in shown if isinstance(value := getattr(event, name, None), str | int)}
    return {"event": type(event).__name__, **values}
