"""The API's history: what was acknowledged must be there, in journal order, whatever crashed in between.

Each fact that people may set (a model is registered, a label has a value, a key is revoked) is a register. While a
write is on its way the register may show the old or the new value; once it is acknowledged only the new one. What
was asked and never answered may have happened or not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from common.errors import ErrorInfo
from head.core.effects import Refuse, Reply
from head.core.objects import Copy
from head.core.state import State
from head.journal import Row
from tests.sim.sim_head import MemoryJournal, SimHead, Watcher

ANY = "anything"
EVICTED = "copy_evicted"
UNPINNING = frozenset(
    {"copy_unpinned", "copy_pin_ended", "copy_unwanted", "copy_cancelled", "copy_forgotten", "copy_dropped"}
)


@dataclass
class Register:
    """One fact."""

    certain: str
    revision: int = 0  # of the journal when it was acknowledged
    pending: dict[str, str] = field(default_factory=dict)  # request -> value, oldest first

    def allows(self, value: str) -> bool:
        """Whether the fact may show this value now."""
        allowed = {self.certain, *self.pending.values()}
        return ANY in allowed or value in allowed


class History(Watcher):
    """Watches one head through all its lives."""

    def __init__(self, head: SimHead) -> None:
        self.head = head
        self.registers: dict[str, Register] = {}
        self.refusals: Counter[str] = Counter()
        self.unevictable: set[str] = set()  # models without a remote source
        self._facts_of: dict[str, dict[str, str]] = {}  # request -> facts that it sets
        self._keys: dict[str, str] = {}  # request -> idempotency key
        self._bodies: dict[str, str] = {}  # idempotency key -> digest of the body that was acknowledged
        self.references: dict[str, tuple[str, int]] = {}  # idempotency key -> what it was answered with, and when
        self.mismatched: set[str] = set()  # requests that use somebody else's idempotency key
        self.removed_ms: dict[str, int] = {}  # nodes that somebody had forgotten -> when
        head.watchers.append(self)

    # what people do
    def asked(self, request_id: str, facts: dict[str, str], key: str = "", body: str = "") -> None:
        """A request is on its way that would set these facts."""
        for fact, value in facts.items():
            self.registers.setdefault(fact, Register(ANY)).pending[request_id] = value
        self._facts_of[request_id] = facts
        if key:
            self._keys[request_id] = key
            self._bodies.setdefault(request_id, body)

    def forget(self, prefix: str) -> None:
        """Nothing is promised any more of the facts that begin so."""
        for fact in [fact for fact in self.registers if fact.startswith(prefix)]:
            del self.registers[fact]

    def restored(self, backup: MemoryJournal) -> None:
        """What was acknowledged after the backup was made may be gone."""
        for register in self.registers.values():
            if register.revision > backup.revision or register.pending:
                register.certain = ANY
            register.pending.clear()
        self.references = {key: said for key, said in self.references.items() if said[1] <= backup.revision}

    # what the head does
    def answered(self, effect: Reply | Refuse) -> None:
        """An acknowledgement makes its facts certain; a refusal must have left no trace."""
        request_id = effect.request_id
        facts = self._facts_of.pop(request_id, {})
        if request_id in self.mismatched:
            is_told = isinstance(effect, Refuse) and effect.error.code in ("idempotency_mismatch", "state_read_only")
            assert is_told, f"a used Idempotency-Key with another body is answered {effect}"
        if isinstance(effect, Refuse):
            self._refused(request_id, facts, effect.error)
            return
        key = self._keys.get(request_id, "")
        is_replay = bool(key) and request_id not in self.head.journal.causes
        for fact, value in facts.items():
            register = self.registers.get(fact)
            if register is None or request_id not in register.pending:
                continue
            if is_replay:  # said again: it happened then, and others may have changed it since
                del register.pending[request_id]
                continue
            while next(iter(register.pending)) != request_id:
                del register.pending[next(iter(register.pending))]
            del register.pending[request_id]
            register.certain, register.revision = value, self.head.journal.revision
        if key:
            body = self._bodies[request_id]
            first, _ = self.references.setdefault(key, (f"{effect.reference} {body}", self.head.journal.revision))
            assert first == f"{effect.reference} {body}", f"{key} is answered {effect.reference} {body}, was {first}"
        made = next((fact for fact, value in facts.items() if value == "there"), "")
        if made and ":" in effect.reference and not key:
            kind, _, name = effect.reference.partition(":")
            assert (kind, name) in self.head.journal.objects, f"{effect.reference} is acknowledged and not durable"

    def _refused(self, request_id: str, facts: dict[str, str], error: ErrorInfo) -> None:
        self.refusals[error.code] += 1
        for fact in facts:
            if fact in self.registers:
                self.registers[fact].pending.pop(request_id, None)
        assert request_id not in self.head.journal.causes, f"{request_id} was refused ({error}) and left a trace"
        assert error.code != "internal", f"{request_id}: {error}"

    def appending(self, row: Row) -> None:
        """What is evicted may be evicted; a pin is lost only by those who may take it."""
        if row.what == "service_stopped" and f"service:{row.key}" in self.registers:
            self.registers[f"service:{row.key}"].certain = ANY  # by its name or, in a job, by its device
        if row.what == "node_removed":
            self.removed_ms[row.key] = self.head.world.now_ms
        if row.kind != "copy":
            return
        body = self.head.journal.objects.get(("copy", row.key))
        before = msgspec.json.decode(body, type=Copy) if body is not None else None
        if before is None:
            return
        if row.what == EVICTED:
            assert not before.pins, f"{row.key} is pinned and evicted"
            assert before.state == "ready", f"{row.key} is {before.state} and evicted"
            if before.model in self.unevictable and before.device.endswith(":disk"):
                kept = (body for (kind, _), body in self.head.journal.objects.items() if kind == "copy")
                others = [
                    copy.key
                    for copy in (msgspec.json.decode(body, type=Copy) for body in kept)
                    if (copy.model, copy.state, copy.desired) == (before.model, "ready", "present")
                    and copy.device.endswith(":disk")
                    and copy.key != before.key
                ]
                assert others, f"{row.key} was the last copy and is evicted"
        after = msgspec.json.decode(row.body, type=Copy) if row.body is not None else None
        lost = {pin.name for pin in before.pins} - {pin.name for pin in after.pins} if after else {}
        assert not lost or row.what in UNPINNING, f"{row.what} takes the pins {lost} of {row.key}"

    def loaded(self, state: State) -> None:
        """A new process shows everything that was acknowledged."""
        wrong = list(self.broken(state))
        assert not wrong, f"after a start of the head: {wrong[:10]}"

    def broken(self, state: State) -> list[str]:
        """The facts that the state does not show."""
        wrong = []
        for fact, register in self.registers.items():
            value = shown(state, fact)
            if value != ANY and not register.allows(value):
                wrong.append(f"{fact} is {value!r}, acknowledged {register.certain!r}, asked {register.pending}")
        return wrong


def shown(state: State, fact: str) -> str:
    """What the state says of a fact: "there", "gone", or its value."""
    kind, _, key = fact.partition(":")
    match kind:
        case "label":
            node, _, label = key.partition("/")
            return state.nodes[node].labels.get(label, "") if node in state.nodes else ANY
        case "cordon":
            return str(state.nodes[key].is_cordoned) if key in state.nodes else ANY
        case "drain":
            return str(state.nodes[key].drain_deadline_ms > 0) if key in state.nodes else ANY
        case "revoked":
            return str(state.keys[key].is_revoked) if key in state.keys else "gone"
        case "note":
            model = state.models.get(key)
            return str(model.metadata.get("note", "")) if model is not None else ANY
        case "service":
            service = state.services.get(key)
            return "gone" if service is None or service.desired == "stopped" else "there"
        case "model":
            return "gone" if key not in state.models or state.models[key].is_deleting else "there"
        case _:
            return "there" if key in state.table(kind) else "gone"
