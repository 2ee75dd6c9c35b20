"""A turn: one event handled. Collects records and effects, applies each record as it is decided, keeps the undo.

Applying at once lets later decisions of the same turn (and of later turns in the same commit) see earlier ones,
so that nothing is reserved twice while a commit is on its way to the disk. The shell releases the effects only
after the records are durable; when the journal refuses them, it calls `rollback` in reverse order of turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.errors import HerderError
from head.core.effects import Effect, Refuse, Reply
from head.core.events import RequestEvent
from head.core.objects import Object
from head.core.records import Record
from head.core.state import State, apply, undo


class Turn:
    """What one event led to. Handlers write through `put`, `delete` and `emit` only."""

    __slots__ = ("_undo", "_undo_volatile", "cause", "effects", "now_ms", "records", "state", "touched")

    def __init__(self, state: State, now_ms: int, cause: str) -> None:
        self.state = state
        self.now_ms = now_ms
        self.cause = cause
        self.records: list[Record] = []
        self.effects: list[Effect] = []
        self.touched: dict[tuple[str, str], None] = {}  # (kind, key) changed and not reconciled yet, in order
        self._undo: list[tuple[Record, Object | None]] = []
        self._undo_volatile: list[Callable[[], None]] = []

    def put(self, thing: Object, what: str, *, cause: str = "", **detail: Any) -> None:
        """Records the object in its new form. `what` is in the past tense."""
        self._record(thing.KIND, thing.key, thing, what, cause, detail)

    def delete(self, kind: str, key: str, what: str, *, cause: str = "", **detail: Any) -> None:
        """Records that the object is gone."""
        self._record(kind, key, None, what, cause, detail)

    def touch(self, kind: str, key: str) -> None:
        """Asks for reconciliation of an object that did not change itself (its surroundings did)."""
        self.touched[(kind, key)] = None

    def emit(self, effect: Effect) -> None:
        """Adds an effect, released once the turn's records are durable."""
        self.effects.append(effect)

    def reply(self, event: RequestEvent, *, reference: str = "", value: object = None) -> None:
        """Answers a request with an object ("kind:key") or a value."""
        self.emit(Reply(event.request_id, reference, value))

    def refuse(self, event: RequestEvent, error: HerderError) -> None:
        """Answers a request with an error."""
        self.emit(Refuse(event.request_id, error.info()))

    def attempt(self, action: Callable[[], object]) -> HerderError | None:
        """Runs a part of the turn that may be refused: a HerderError takes back that part only, and is returned."""
        done, records, effects, volatile = (
            len(self._undo),
            len(self.records),
            len(self.effects),
            len(self._undo_volatile),
        )
        touched = dict(self.touched)
        try:
            action()
        except HerderError as error:
            self._take_back(done, volatile)
            del self.records[records:]
            del self.effects[effects:]
            self.touched = touched
            return error
        return None

    def on_rollback(self, action: Callable[[], None]) -> None:
        """Registers how to take back a volatile fact that holds only if this turn's effects leave (a command sent)."""
        self._undo_volatile.append(action)

    def rollback(self) -> None:
        """Takes back everything; the turn's effects must not be released."""
        self._take_back(0, 0)
        self.records.clear()
        self.effects.clear()
        self.touched.clear()

    def _take_back(self, done: int, volatile: int) -> None:
        for action in reversed(self._undo_volatile[volatile:]):
            action()
        del self._undo_volatile[volatile:]
        for record, before in reversed(self._undo[done:]):
            undo(self.state, record, before)
        del self._undo[done:]

    def next_generation(self) -> int:
        """A fencing number: the revision of the record that will carry it. Grows for ever."""
        return self.state.revision + 1

    def _record(self, kind: str, key: str, body: Object | None, what: str, cause: str, detail: dict[str, Any]) -> None:
        record = Record(self.state.revision + 1, self.now_ms, what, cause or self.cause, kind, key, body, detail)
        self._undo.append((record, apply(self.state, record)))
        self.records.append(record)
        self.touched[(kind, key)] = None
