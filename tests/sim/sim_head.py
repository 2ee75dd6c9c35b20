"""A head in the simulator: the real core and the real pipeline over a journal in memory that survives crashes.

Only clock, disk and network are replaced. A crash can fall between any two of: decide, append, fsync, apply,
release; what was not committed is gone, and effects that were not released never leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from common import errors, wire
from common.bench.recipe import BenchmarkRecipe
from common.recipe import Recipe
from head.core import events as ev
from head.core.effects import (
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
from head.core.events import Event
from head.core.invariants import check_invariants
from head.core.objects import KINDS, Meta
from head.core.state import State, restore
from head.core.step import step
from head.journal import Row
from head.pipeline import Pipeline
from head.restore import EPOCH_JUMP, REVISION_JUMP
from tests.sim.sim_gateway import SimGateway
from tests.sim.sim_judge import SimJudge
from tests.sim.world import World

BASE_MS = 1_700_000_000_000


class Watcher:
    """Somebody who sees what leaves the head and what its journal holds."""

    def answered(self, effect: Reply | Refuse) -> None:
        """A request has its answer."""

    def appending(self, row: Row) -> None:
        """A row is about to become durable; the journal still holds what stood there before."""

    def loaded(self, state: State) -> None:
        """A new process has read the journal."""


Deliver = Callable[[str, wire.Message], None]


class MemoryJournal:
    """What a disk would hold: the newest object of each key, and the history."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.revision = 0
        self.stamp_ms = 0
        self.history: list[Row] = []
        self.causes: set[str] = set()

    def append(self, rows: Sequence[Row]) -> None:
        """One commit: all of it or nothing."""
        for row in rows:
            assert row.revision > self.revision, f"revision {row.revision} after {self.revision}"
            assert row.at_ms >= self.stamp_ms, f"the journal's time goes back from {self.stamp_ms}: {row}"
            self.revision, self.stamp_ms = row.revision, row.at_ms
            self.causes.add(row.cause)
            if row.body is None:
                self.objects.pop((row.kind, row.key), None)
            else:
                self.objects[(row.kind, row.key)] = row.body
            self.history.append(row)

    def copied(self) -> MemoryJournal:
        """A backup, or what another process reads from a copied disk."""
        other = MemoryJournal()
        other.objects = dict(self.objects)
        other.revision, other.stamp_ms = self.revision, self.stamp_ms
        return other

    def move_meta(self, epochs: int, revisions: int) -> None:
        """The epoch and the revision jump, as `head/restore.py` does."""
        meta = msgspec.json.decode(self.objects[("meta", "cluster")], type=Meta)
        self.objects[("meta", "cluster")] = msgspec.json.encode(
            msgspec.structs.replace(meta, head_epoch=meta.head_epoch + epochs)
        )
        self.revision += revisions

    def load(self) -> State:
        """The state as a restarted head reads it."""
        state = State()
        for (kind, _), body in self.objects.items():
            restore(state, msgspec.json.decode(body, type=KINDS[kind]))
        state.revision = self.revision
        return state


class SimHead:
    """One head. `sessions` maps session ids to what delivers a message to that agent."""

    def __init__(self, world: World, recipes: dict[str, Recipe], journal: MemoryJournal | None = None) -> None:
        self.world = world
        self.recipes = recipes
        self.benchmark_recipes: dict[str, BenchmarkRecipe] = {}
        self.judge = SimJudge(self)
        self.journal = journal or MemoryJournal()
        self.watchers: list[Watcher] = []
        self.base_ms = BASE_MS
        self.written_ms: list[int] = []  # of every row, in the world's time
        self.sessions: dict[str, tuple[str, Deliver, Callable[[], None]]] = {}
        self.answers: dict[str, Effect] = {}
        self.is_up = False
        self.life = 0
        self.stalled_until_ms = 0
        self.disk_full_until_ms = 0
        self.bugs: list[Exception] = []
        self.starts = 0
        self.check_every = 1  # revisions between two looks at the invariants; big clusters look less often
        self._checked = -1
        self._waiting: list[Event] = []
        self.pipeline = Pipeline(State(), step)
        self.gateway = SimGateway(world, self.take, self.later)

    @property
    def state(self) -> State:
        """The live state."""
        return self.pipeline.state

    @property
    def now_ms(self) -> int:
        """The head's Herder time."""
        return self.base_ms + self.world.now_ms

    def start(self) -> None:
        """A new process on the journal."""
        assert not self.is_up
        self.life += 1
        self.starts += 1
        self.is_up = True
        self.stalled_until_ms = 0
        self.pipeline = Pipeline(self.journal.load(), step)
        self._waiting = []
        self.gateway = SimGateway(self.world, self.take, self.later)
        jump_ms = self.world.faults.clock_jump_ms if self.world.is_hostile and self.starts > 1 else 0
        wall_ms = BASE_MS + self.world.now_ms + self.world.rng.randint(-jump_ms, jump_ms)
        self.base_ms = max(self.journal.stamp_ms, wall_ms) - self.world.now_ms  # as `SystemClock` begins
        self._checked = -1
        for watcher in self.watchers:
            watcher.loaded(self.state)
        self.world.note(f"head starts (life {self.life}, revision {self.journal.revision})")
        secret = bytes([self.life % 256]) * 32
        recipes = self.benchmark_recipes
        self.take(
            ev.HeadStarted(
                "sim-cluster", secret, self.recipes, benchmark_recipes=recipes, gateway_url="http://head", version="sim"
            )
        )
        self.later(1000, "tick", self._tick)

    def start_again(self) -> None:
        """A new process unless one runs."""
        if not self.is_up:
            self.start()

    def crash(self) -> None:
        """kill -9: everything that is not in the journal is gone."""
        self.world.note("head crashes")
        self.is_up = False
        self.life += 1
        sessions, self.sessions = self.sessions, {}
        for _, _, close in sessions.values():
            close()

    def end(self) -> None:
        """No process runs afterwards."""
        if self.is_up:
            self.crash()

    def clone(self) -> SimHead:
        """An old process that goes on with this epoch upon its own copy of the state."""
        journal = self.journal.copied()
        journal.move_meta(-1, 0)
        other = SimHead(self.world, self.recipes, journal)
        other.benchmark_recipes = self.benchmark_recipes
        return other

    def restore(self, backup: MemoryJournal) -> None:
        """`herder-head --restore`, with no head running."""
        assert not self.is_up
        self.world.note(f"a backup of revision {backup.revision} is restored over {self.journal.revision}")
        restored = backup.copied()
        restored.move_meta(EPOCH_JUMP, REVISION_JUMP)
        restored.stamp_ms = max(restored.stamp_ms, BASE_MS + self.world.now_ms)
        restored.history = self.journal.history
        restored.causes = self.journal.causes
        self.journal = restored

    def stall(self, length_ms: int) -> None:
        """SIGSTOP for a while: events pile up."""
        self.world.note(f"head stalls for {length_ms} ms")
        self.stalled_until_ms = self.world.now_ms + length_ms

    def take(self, event: Event) -> None:
        """Something happened to the head."""
        if not self.is_up:
            return
        if self.world.now_ms < self.stalled_until_ms:
            self._waiting.append(event)
            if len(self._waiting) == 1:
                self.later(self.stalled_until_ms - self.world.now_ms, "wake", self._wake)
            return
        released = self.pipeline.take(event, self.now_ms)
        if released.bug is not None:
            self.bugs.append(released.bug)
            raise released.bug
        self._check()
        self._release(released.effects)
        self._commit()

    def _check(self) -> None:
        revision = self.state.revision
        if revision < self._checked or revision >= self._checked + self.check_every:
            self._checked = revision
            check_invariants(self.state)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.take(event)

    def _tick(self) -> None:
        now = self.world.now_ms
        stall_ms = 0
        if now < self.stalled_until_ms:
            stall_ms = self.stalled_until_ms - now
            self.later(stall_ms, "tick", lambda: self._ticked(stall_ms))
            return
        self._ticked(0)

    def _ticked(self, stall_ms: int) -> None:
        self.take(ev.Ticked(stall_ms))
        if self.pipeline.problem is not None and self.world.now_ms >= self.disk_full_until_ms:
            self.world.note("head's disk has room again")
            for event in self.pipeline.recovered():
                self.take(event)
        self.later(1000, "tick", self._tick)

    def _commit(self) -> None:
        rows = self.pipeline.seal()
        if rows is None:
            return
        if not rows:
            self._release(self.pipeline.committed().effects)
            return
        self.later(self.world.rng.randint(1, 6), "fsync", lambda: self._synced(rows))

    def _synced(self, rows: list[Row]) -> None:
        if self.world.now_ms < self.disk_full_until_ms:
            released = self.pipeline.refused(errors.StateReadOnly("the disk is full"))
        else:
            for row in rows:
                for watcher in self.watchers:
                    watcher.appending(row)
                self.journal.append((row,))
                self.written_ms.append(self.world.now_ms)
                self.world.note(f"r{row.revision} {row.what} {row.kind}:{row.key} by {row.cause}")
            if self.world.chance(self.world.faults.head_crash_per_s / 50):
                self.world.note("head crashes between fsync and release")
                self.crash()
                self.world.after(self.world.rng.randint(500, 4000), "head", self.start_again)
                return
            released = self.pipeline.committed()
        self._release(released.effects)
        for event in released.retaken:
            self.take(event)
        self._check()
        self._commit()

    def _release(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply() | Refuse():
                    assert effect.request_id not in self.answers, f"answered twice: {effect}"
                    self.answers[effect.request_id] = effect
                    for watcher in self.watchers:
                        watcher.answered(effect)
                case Drain():
                    self.gateway.drain(effect)
                case EndDrain():
                    self.gateway.end_drain(effect)
                case Send():
                    self.gateway.sending(effect.message)
                    session = self.sessions.get(effect.session_id)
                    if session is not None:
                        session[1](effect.session_id, effect.message)
                case MeasureClock():
                    session = self.sessions.get(effect.session_id)
                    if session is not None:
                        session[1](effect.session_id, wire.ClockAsk(self.world.now_ms))
                case JudgePoint() | WriteBenchmark() | RemoveBenchmark():
                    self.judge.perform(effect)
                case CloseSession():
                    closing = self.sessions.pop(effect.session_id, None)
                    if closing is not None:
                        closing[2]()
                        self.take(ev.SessionClosed(closing[0], effect.session_id, "closed by us"))
                case _:
                    self.world.note(f"head effect {effect}")

    def later(self, delay_ms: int, name: str, action: Callable[[], None]) -> None:
        life = self.life

        def guarded() -> None:
            if self.is_up and self.life == life:
                action()

        self.world.after(delay_ms, f"head {name}", guarded)

    # the network's side
    def accept(self, session_id: str, node: str, deliver: Deliver, close: Callable[[], None]) -> None:
        """A websocket was opened."""
        self.sessions[session_id] = (node, deliver, close)

    def hung_up(self, session_id: str) -> None:
        """The other side is gone and the kernel knows it."""
        session = self.sessions.pop(session_id, None)
        if session is not None:
            self.take(ev.SessionClosed(session[0], session_id, "closed"))

    def receive(self, session_id: str, message: wire.Message) -> None:
        """A frame arrived."""
        session = self.sessions.get(session_id)
        if session is None or not self.is_up:
            return
        node = session[0]
        match message:
            case wire.Hello():
                self.take(ev.AgentSaidHello(session_id, message, "127.0.0.1"))
            case wire.Report():
                self.take(ev.AgentReported(node, session_id, message))
            case wire.Lease():
                self.take(ev.LeaseRenewed(node, session_id, message))
            case wire.Telemetry():
                self.take(ev.TelemetryReceived(node, session_id, message))
            case wire.Progress():
                self.take(ev.ProgressReceived(node, session_id, message))
            case wire.Result():
                self.take(ev.ResultReceived(node, session_id, message))
            case wire.Leaving():
                self.take(ev.AgentLeaving(node, session_id, message))
            case wire.ClockTold():
                self._clock_told(node, session_id, message)
            case _:
                raise AssertionError(f"unexpected frame {message}")

    def _clock_told(self, node: str, session_id: str, told: wire.ClockTold) -> None:
        """As `head/bench/clocks.py`: the middle of the way there and back, and half of it as the bound."""
        there_and_back_ms = self.world.now_ms - told.asked_ns
        middle_ms = self.now_ms - there_and_back_ms / 2
        bound_ns = (there_and_back_ms * 500_000) + 1_000_000  # the world's grain is a millisecond
        offset_ns = told.boottime_ns - int(middle_ms * 1_000_000)
        self.take(ev.ClockMeasured(node, session_id, offset_ns, bound_ns))
