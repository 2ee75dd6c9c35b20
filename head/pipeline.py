"""The order in which turns become durable and their effects leave: the driver's logic without clock, thread or loop.

Events are stepped as they come, each turn applied at once and kept here, `open`, until a batch of turns is sealed
and handed to the journal, `in flight`. While that batch is on its way to the disk later events are stepped on top of
it, so a slow disk delays answers but never the leases:

    take(event) -> effects that may leave now        seal() -> rows for one commit
    committed() -> effects and records of the batch  refused(error) -> answers, after everything was taken back

What may leave at once: effects of a turn without records when nothing undecided lies before it, and acknowledgements
of leases always, because they say nothing about the state. Everything else waits for what it may have been decided
upon: a refusal "already exists" must not be shown when the thing that exists can still be lost.

When the journal refuses a batch, every undecided turn is taken back in reverse order. Requests with records are
refused; events without records are taken again on the state as it now stands; facts from agents that will not be
repeated by themselves are parked, the latest of each, and taken again once the journal writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from common import limits, wire
from common.errors import HerderError, Internal, Unavailable
from head.core import events as ev
from head.core.effects import CloseSession, Effect, Refuse, Send
from head.core.events import Event, RequestEvent
from head.core.records import Record
from head.core.state import State
from head.core.turn import Turn
from head.journal import Row, encode

Step = Callable[[State, Event, int], Turn]
_BUG = "a bug in the head; its log has the details"
OPEN_RECORDS = 20 * limits.JOURNAL_BATCH_RECORDS  # undecided records beyond which new ones are refused


@dataclass(slots=True)
class Released:
    """What may leave, in order. `retaken` are events that have to be taken again, before any other."""

    effects: list[Effect] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    retaken: list[Event] = field(default_factory=list)
    bug: Exception | None = None


@dataclass(slots=True)
class _Undecided:
    """A turn whose effects wait."""

    event: Event
    turn: Turn
    rows: list[Row]
    effects: list[Effect]


class Pipeline:
    """Turns between being decided and being durable."""

    def __init__(self, state: State, step: Step, encode: Callable[[Record], Row] = encode) -> None:
        self.state = state
        self.problem: HerderError | None = None  # set: nothing can be written
        self.taken = 0  # turns that had to wait, ever
        self.decided = 0  # of those: committed or taken back
        self.open_records = 0
        self._step = step
        self._encode = encode
        self._open: list[_Undecided] = []
        self._in_flight: list[_Undecided] = []
        self._parked: dict[tuple[str, ...], Event] = {}

    @property
    def is_settled(self) -> bool:
        """Whether all that the state shows is durable."""
        return not self._open and not self._in_flight

    @property
    def is_in_flight(self) -> bool:
        """Whether a batch is with the journal."""
        return bool(self._in_flight)

    @property
    def parked(self) -> int:
        """Facts that wait for the journal to write again."""
        return len(self._parked)

    def take(self, event: Event, now_ms: int) -> Released:
        """Steps an event. A bug in the step is answered `internal` and given back; the state stays whole."""
        try:
            turn = self._step(self.state, event, now_ms)
        except Exception as error:  # noqa: BLE001 - a bug of ours, given back to be logged
            return Released(effects=_answers(event, Internal(_BUG)), bug=error)
        try:
            rows = [self._encode(record) for record in turn.records]
        except Exception as error:  # noqa: BLE001 - as above: a body that cannot be stored
            turn.rollback()
            return Released(effects=_answers(event, Internal(_BUG)), bug=error)
        if rows and (obstacle := self._obstacle()) is not None:
            turn.rollback()
            return Released(effects=self._put_off(event, obstacle))
        if not rows and self.is_settled:
            return Released(effects=turn.effects)
        now = [] if rows else [effect for effect in turn.effects if _is_ack(effect)]
        later = [effect for effect in turn.effects if not _is_ack(effect)] if now else turn.effects
        if rows or later:
            self._open.append(_Undecided(event, turn, rows, later))
            self.open_records += len(rows)
            self.taken += 1
        return Released(effects=now)

    def seal(self) -> list[Row] | None:
        """The rows of the next batch for the journal; None while one is in flight or nothing waits."""
        if self._in_flight or not self._open:
            return None
        rows: list[Row] = []
        count = 0
        for undecided in self._open:
            if rows and len(rows) + len(undecided.rows) > limits.JOURNAL_BATCH_RECORDS:
                break
            rows += undecided.rows
            count += 1
        self._in_flight, self._open = self._open[:count], self._open[count:]
        return rows

    def committed(self) -> Released:
        """The batch in flight is durable: its effects leave, and those that only waited behind it."""
        while self._open and not self._open[0].rows:
            self._in_flight.append(self._open.pop(0))
        done, self._in_flight = self._in_flight, []
        released = Released()
        for undecided in done:
            released.effects += undecided.effects
            released.records += undecided.turn.records
        self.open_records -= len(released.records)
        self.decided += len(done)
        if self.problem is None and self._parked and self.open_records < OPEN_RECORDS // 2:
            released.retaken = self._unpark()
        return released

    def refused(self, error: HerderError) -> Released:
        """The batch in flight was not written: everything undecided is taken back, newest first."""
        undone = self._in_flight + self._open
        self._in_flight, self._open = [], []
        self.problem = error
        for undecided in reversed(undone):
            undecided.turn.rollback()
        released = Released()
        for undecided in undone:
            if undecided.rows:
                released.effects += self._put_off(undecided.event, error)
            else:
                released.retaken.append(undecided.event)
        self.open_records = 0
        self.decided = self.taken
        return released

    def recovered(self) -> list[Event]:
        """The journal writes again; returns the events to take again."""
        self.problem = None
        return self._unpark()

    def _obstacle(self) -> HerderError | None:
        if self.problem is not None:
            return self.problem
        if self.open_records >= OPEN_RECORDS:
            return Unavailable("the journal is far behind", hint="the head's disk is slow; try again in a moment")
        return None

    def _put_off(self, event: Event, error: HerderError) -> list[Effect]:
        """What becomes of an event whose records cannot be written now."""
        if isinstance(event, RequestEvent):
            return _answers(event, error)
        if isinstance(event, ev.AgentSaidHello):
            return [CloseSession(event.session_id, error.info())]  # the agent tries again with backoff
        key = _parking_place(event)
        if key is None:
            return []
        self._parked.pop(key, None)
        if len(self._parked) >= limits.JOURNAL_QUEUE_EVENTS:
            session_id = getattr(event, "session_id", "")
            return [CloseSession(session_id, error.info())] if session_id else []  # it reports anew when it returns
        self._parked[key] = event
        return []

    def _unpark(self) -> list[Event]:
        events = list(self._parked.values())
        self._parked.clear()
        return events


def _parking_place(event: Event) -> tuple[str, ...] | None:
    """Under what an event is parked, or None when it is repeated by itself (ticks, probes, usage)."""
    match event:
        case ev.AgentReported() | ev.AgentLeaving() | ev.SessionClosed():
            return (type(event).__name__, event.node, event.session_id)
        case ev.ResultReceived():
            return ("ResultReceived", event.node, event.result.op_id)
        case ev.ArtifactStored():
            return ("ArtifactStored", event.run, event.name)
        case ev.PointJudged(error=None):
            return ("PointJudged", event.benchmark, str(event.point))
        case ev.BenchmarkWritten(error=None):
            return ("BenchmarkWritten", event.benchmark)
        case _:  # with an error, as of a full disk: it is asked again
            return None


def _answers(event: Event, error: HerderError) -> list[Effect]:
    return [Refuse(event.request_id, error.info())] if isinstance(event, RequestEvent) else []


def _is_ack(effect: Effect) -> bool:
    return isinstance(effect, Send) and isinstance(effect.message, wire.Ack)
