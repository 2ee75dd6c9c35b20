"""A turn: one event handled. Collects records (applied as they are decided) and effects (released when durable).

The agent never takes a turn back: when the ledger cannot be written, the driver keeps records and effects and
tries again, because what the records tell of (an engine ended, a file was published) has happened.
"""

from __future__ import annotations

from typing import Any

from agent.core.effects import Effect, SendMessage
from agent.core.objects import Object, Outcome, Record
from agent.core.state import State, apply
from common import limits, wire
from common.errors import ErrorInfo


class Turn:
    """What one event led to."""

    __slots__ = ("cause", "effects", "now_ms", "records", "state", "touched")

    def __init__(self, state: State, now_ms: int, cause: str) -> None:
        self.state = state
        self.now_ms = now_ms
        self.cause = cause
        self.records: list[Record] = []
        self.effects: list[Effect] = []
        self.touched: dict[tuple[str, str], None] = {}

    def put(self, thing: Object, what: str, *, cause: str = "") -> None:
        """Records the object in its new form."""
        self._record(Record(self.now_ms, what, cause or self.cause, thing.KIND, thing.key, thing))

    def delete(self, kind: str, key: str, what: str, *, cause: str = "") -> None:
        """Records that the object is gone."""
        self._record(Record(self.now_ms, what, cause or self.cause, kind, key, None))

    def touch(self, kind: str, key: str) -> None:
        """Asks for reconciliation of an object whose surroundings changed."""
        self.touched[(kind, key)] = None

    def emit(self, effect: Effect) -> None:
        """Adds an effect, released once the turn's records are durable."""
        self.effects.append(effect)

    def send(self, message: wire.Message) -> None:
        """Sends to the head when a session is open."""
        if self.state.session_id:
            self.emit(SendMessage(self.state.session_id, message))

    def answer(
        self, op_id: str, generation: int, outcome: str, *, error: ErrorInfo | None = None, **fields: Any
    ) -> None:
        """Records how a command ended; `session.tell` says it at the end of the turn, until it is acknowledged."""
        result = wire.Result(op_id, generation, outcome, error=error, **fields)
        self.put(Outcome(result, self.now_ms), f"op_{outcome}", cause=op_id)
        self.state.results_sent_ms.pop(op_id, None)
        if len(self.state.outcomes) > limits.OUTCOMES_KEPT + limits.OUTCOMES_UNACKED:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        """A head that never acknowledges must not fill this node: it will repeat what it still wants."""
        waiting = [outcome for outcome in self.state.outcomes.values() if not outcome.is_acked]
        for outcome in sorted(waiting, key=lambda item: item.at_ms)[: limits.OUTCOMES_UNACKED // 10]:
            self.delete("outcome", outcome.key, "result_given_up")

    def say(self, result: wire.Result) -> None:
        """Sends a result that the ledger holds."""
        if self.state.session_id:
            self.state.results_sent_ms[result.op_id] = self.now_ms
            self.send(result)

    def changed(self) -> None:
        """Notes that what a report says changed without a record."""
        self.state.is_changed = True

    def _record(self, record: Record) -> None:
        apply(self.state, record)
        self.records.append(record)
        self.touched[(record.kind, record.key)] = None
