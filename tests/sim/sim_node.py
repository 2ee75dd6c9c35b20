"""A node in the simulator: the machine (store, RAM tier, engines), and the agent process on it.

The machine survives the agent, the agent's core is the real one, and its ledger survives crashes. Mover, holder
and engines are small models that answer as `agent/mover/protocol.py`, `agent/holder_protocol.py` and the shell's
events say, with the faults that `Faults` names.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agent import holder_protocol as holder
from agent.core import effects as ef
from agent.core import events as ev
from agent.core.events import Event
from agent.core.invariants import check_invariants
from agent.core.objects import Object, Record
from agent.core.state import NEVER_MS, State, load
from agent.core.step import step
from agent.mover import protocol as mover
from common import errors, limits, wire
from common.errors import ErrorInfo, HerderError
from common.manifest import Manifest, ManifestFile
from tests.sim.sim_head import SimHead
from tests.sim.world import World

GIB = 1 << 30
DISK_BYTES = 100 * GIB
DRAM_BYTES = 40 * GIB
GPU_BYTES = 80 * GIB


def origin_manifest(model: str, revision: str) -> Manifest:
    """What the origin serves for a model: always the same bytes, sized by the name's number."""
    size = (1 + int("0" + "".join(char for char in model if char.isdigit())) % 7) * GIB
    file = ManifestFile("model.gguf", size, _digest(model), 1 << 22)
    return Manifest(model, revision, (file,), _digest(f"manifest of {model}"), "gguf")


def _digest(text: str) -> str:
    return f"b3:{hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}"


@dataclass
class EngineProcess:
    """A running engine."""

    order: wire.EnsureReplica
    run: int
    pid: int
    port: int
    ready_ms: int
    is_hung: bool = False
    ignores_term: bool = False


@dataclass
class Machine:
    """What survives the agent. A reboot clears RAM and engines."""

    boot: int = 1
    store: dict[tuple[str, str], mover.HeldCopy] = field(default_factory=dict)
    parts: dict[tuple[str, str], int] = field(default_factory=dict)
    holdings: dict[str, holder.Holding] = field(default_factory=dict)
    is_holder_up: bool = False
    engines: dict[str, EngineProcess] = field(default_factory=dict)
    ledger: dict[tuple[str, str], Object] = field(default_factory=dict)
    pids: int = 100

    @property
    def used_bytes(self) -> int:
        """Bytes of the store."""
        return sum(copy.size_bytes for copy in self.store.values())


class SimNode:
    """One machine with its agent."""

    def __init__(self, world: World, head: SimHead, name: str, gpus: int, peers: dict[str, SimNode]) -> None:
        self.world = world
        self.head = head
        self.name = name
        self.gpus = gpus
        self.peers = peers
        self.machine = Machine()
        self.state = State()
        self.is_up = False
        self.life = 0
        self.clock_base_ms = world.rng.randint(10**12, 2 * 10**12)  # each agent's Herder time is its own
        self.boot_base_ms = world.rng.randint(0, 10**7)
        self.session_id = ""
        self.is_welcome = False
        self.seq = 0
        self.interval_ms = limits.INTERVAL_FLOOR_MS
        self.ledger_full_until_ms = 0
        self.to_head_cut_until_ms = 0
        self.from_head_cut_until_ms = 0
        self._pending: deque[tuple[list[Record], list[ef.Effect]]] = deque()
        self._is_syncing = False
        self._open: dict[str, mover.Request | holder.Request] = {}
        self._is_mover_up = False
        self._wake_at_ms = NEVER_MS
        self._leases: dict[int, int] = {}

    # process life
    @property
    def now_ms(self) -> int:
        """This agent's Herder time."""
        return self.clock_base_ms + self.world.now_ms

    @property
    def boottime_ms(self) -> int:
        """This machine's CLOCK_BOOTTIME."""
        return self.boot_base_ms + self.world.now_ms

    def start(self) -> None:
        """A new agent process on the machine's ledger."""
        assert not self.is_up
        self.life += 1
        self.is_up = True
        self._pending.clear()
        self._is_syncing = False
        self._open = {}
        self._is_mover_up = False
        self.session_id = ""
        self.state = load(State(), list(self.machine.ledger.values()))
        self.world.note(f"{self.name} agent starts (life {self.life})")
        self.take(ev.AgentStarted(f"{self.name}-boot{self.machine.boot}", "/models"))
        self._later(self.world.rng.randint(20, 200), "mover", self._start_mover)
        self._later(self.world.rng.randint(10, 100), "holder", self._start_holder)
        self._later(self.world.rng.randint(5, 500), "dial", self._dial)

    def crash(self) -> None:
        """kill -9 of the agent; its mover goes with it, holder and engines stay."""
        self.world.note(f"{self.name} agent crashes")
        self.is_up = False
        self.life += 1
        self._hang_up()

    def reboot(self) -> None:
        """Power cut: RAM and engines are gone, the disk stays."""
        self.world.note(f"{self.name} reboots")
        if self.is_up:
            self.crash()
        self.machine.boot += 1
        self.machine.holdings = {}
        self.machine.is_holder_up = False
        self.machine.engines = {}

    def take(self, event: Event) -> None:
        """Something happened to the agent."""
        if not self.is_up:
            return
        turn = step(self.state, event, self.now_ms)
        check_invariants(self.state)
        if turn.records or turn.effects:
            self._pending.append((turn.records, turn.effects))
        self._sync()
        self._wake_later()

    def _wake_later(self) -> None:
        wake_ms = self.state.wake_ms
        if wake_ms < self._wake_at_ms or self._wake_at_ms <= self.now_ms:
            self._wake_at_ms = wake_ms
            if wake_ms < NEVER_MS:
                self._later(max(1, wake_ms - self.now_ms), "wake", self._wake)

    def _wake(self) -> None:
        if self._wake_at_ms <= self.now_ms:
            self._wake_at_ms = NEVER_MS
            self.take(ev.Ticked())

    def _sync(self) -> None:
        """Releases effects in order, each batch after its records are durable."""
        while self._pending and not self._is_syncing:
            records, effects = self._pending[0]
            if records:
                self._is_syncing = True
                self._later(self.world.rng.randint(1, 5), "fsync", self._synced)
                return
            self._pending.popleft()
            for effect in effects:
                self._do(effect)

    def _synced(self) -> None:
        if self.world.now_ms < self.ledger_full_until_ms:
            self._later(500, "fsync", self._synced)
            return
        self._is_syncing = False
        records, effects = self._pending.popleft()
        for record in records:
            if record.body is None:
                self.machine.ledger.pop((record.kind, record.key), None)
            else:
                self.machine.ledger[(record.kind, record.key)] = record.body
        if self.world.chance(self.world.faults.agent_crash_per_s / 20):
            self.crash()
            self.world.after(self.world.rng.randint(100, 5000), self.name, self._start_again)
            return
        for effect in effects:
            self._do(effect)
        self._sync()

    def _start_again(self) -> None:
        if not self.is_up:
            self.start()

    def _later(self, delay_ms: int, name: str, action: Callable[[], None]) -> None:
        life = self.life

        def guarded() -> None:
            if self.is_up and self.life == life:
                action()

        self.world.after(delay_ms, f"{self.name} {name}", guarded)

    # the link
    def _dial(self) -> None:
        if self.session_id:
            return
        if not self.head.is_up or self._is_cut():
            self._later(self.world.rng.randint(200, 3000), "dial", self._dial)
            return
        session_id = f"s-{self.name}-{self.life}-{self.seq}-{self.world.now_ms}"
        self.session_id = session_id
        self.is_welcome = False
        life = self.life
        self.head.accept(
            session_id,
            self.name,
            lambda session, message: self._network(
                message, lambda arrived: self._arrived(life, session, arrived), False
            ),
            lambda: self.world.after(1, "close", lambda: self._closed(life, session_id)),
        )
        self._send(self._hello(), is_lossless=True)
        self._later(int(limits.HELLO_TIMEOUT_S * 1000), "hello", lambda: self._give_up_hello(session_id))

    def _hello(self) -> wire.Hello:
        gpus = tuple(
            wire.Gpu(index, f"GPU-{self.name}-{index}", "NVIDIA H200", GPU_BYTES) for index in range(self.gpus)
        )
        inventory = wire.Inventory(
            self.name,
            cpus=64,
            cores=32,
            memory_bytes=DRAM_BYTES * 2,
            dram_budget_bytes=DRAM_BYTES,
            disk_budget_bytes=DISK_BYTES,
            gpus=gpus,
            engines={"llamacpp": "1", "command": "1"},
        )
        return wire.Hello(
            limits.PROTOCOL_MIN,
            limits.PROTOCOL,
            self.name,
            f"{self.name}-boot{self.machine.boot}",
            f"{self.name}-life{self.life}",
            "0",
            inventory,
            cluster_id=self.state.meta.cluster_id,
            max_head_epoch=self.state.meta.max_head_epoch,
            advertise="127.0.0.1",
            data_port=7001,
        )

    def _give_up_hello(self, session_id: str) -> None:
        if self.session_id == session_id and not self.is_welcome:
            self._hang_up()
            self._later(self.world.rng.randint(200, 3000), "dial", self._dial)

    def _hang_up(self) -> None:
        session_id, self.session_id = self.session_id, ""
        if session_id:
            self.head.hung_up(session_id)
            self.take(ev.SessionClosed(session_id, "hung up"))

    def disconnect(self) -> None:
        """The websocket is cut; both sides notice."""
        if self.session_id:
            self.world.note(f"{self.name} disconnected")
            self._hang_up()
            self._later(self.world.rng.randint(200, 3000), "dial", self._dial)

    def _closed(self, life: int, session_id: str) -> None:
        if self.is_up and self.life == life and self.session_id == session_id:
            self.session_id = ""
            self.take(ev.SessionClosed(session_id, "closed by the head"))
            self._later(self.world.rng.randint(200, 3000), "dial", self._dial)

    def _is_cut(self) -> bool:
        now = self.world.now_ms
        return now < self.to_head_cut_until_ms or now < self.from_head_cut_until_ms

    def _send(self, message: wire.Message, *, is_lossless: bool = False) -> None:
        session_id = self.session_id
        if session_id:
            self._network(message, lambda arrived: self.head.receive(session_id, arrived), True, is_lossless)

    def _network(
        self,
        message: wire.Message,
        deliver: Callable[[wire.Message], None],
        is_to_head: bool,
        is_lossless: bool = False,
    ) -> None:
        """Delays, drops, doubles and reorders frames; every frame passes the real codec."""
        world, faults = self.world, self.world.faults
        decoded = wire.decode(wire.encode(message))
        assert decoded is not None
        copies = 1
        if not is_lossless and not isinstance(message, wire.Welcome):
            if world.chance(faults.loss):
                return
            copies += world.chance(faults.duplicate)
        for _ in range(copies):
            delay_ms = world.rng.randint(*faults.delay_ms)
            if world.chance(faults.reorder):
                delay_ms += world.rng.randint(50, 2000)

            def arrive() -> None:
                cut_ms = self.to_head_cut_until_ms if is_to_head else self.from_head_cut_until_ms
                if world.now_ms >= cut_ms:
                    deliver(decoded)

            world.after(delay_ms, "frame", arrive)

    def _arrived(self, life: int, session_id: str, message: wire.Message) -> None:
        if not self.is_up or self.life != life or self.session_id != session_id:
            return
        match message:
            case wire.Welcome():
                self.is_welcome = True
                self.interval_ms = message.interval_ms
                self.take(ev.SessionOpened(session_id, self.name, message))
                self._later(self.world.rng.randint(1, self.interval_ms), "lease", lambda: self._lease(session_id))
            case wire.Ack():
                sent_ms = self._leases.pop(message.seq, None)
                self.interval_ms = message.interval_ms
                if sent_ms is not None:
                    self.take(ev.LeaseAcked(sent_ms, message.lease_ms, message.wants_report))
            case wire.Command():
                self.take(ev.CommandReceived(message))
            case wire.ResultAck():
                self.take(ev.ResultAcked(message.op_id, message.generation))
            case wire.Refused():
                self.world.note(f"{self.name} refused: {message.error.code}")
            case _:
                raise AssertionError(f"unexpected frame {message}")

    def _lease(self, session_id: str) -> None:
        if self.session_id != session_id:
            return
        if len(self._leases) > 3:  # the head is silent: the session is dead, whatever TCP says
            self._leases.clear()
            self.disconnect()
            return
        self.seq += 1
        self._leases[self.seq] = self.now_ms
        self._send(wire.Lease(self.seq, self.boottime_ms, self.state.digest))
        self._later(int(self.interval_ms * self.world.rng.uniform(0.9, 1.1)), "lease", lambda: self._lease(session_id))

    # effects
    def _do(self, effect: ef.Effect) -> None:
        match effect:
            case ef.SendMessage():
                if effect.session_id == self.session_id:
                    self._send(effect.message)
            case ef.CloseSession():
                self.disconnect()
            case ef.AskMover():
                if self._is_mover_up:
                    self._asked_mover(effect.request)
            case ef.AskHolder():
                if self.machine.is_holder_up:
                    self._asked_holder(effect.request)
            case ef.SpawnReplica():
                self._spawn(effect)
            case ef.AttachReplica():
                engine = self.machine.engines.get(effect.order.replica)
                found = engine if engine is not None and engine.run == effect.run else None
                self._later(self.world.rng.randint(1, 50), "attach", lambda: self._attached(effect, found))
            case ef.SignalReplica():
                self._signal(effect)
            case ef.ProbeReplica():
                self._later(self.world.rng.randint(1, 100), "probe", lambda: self._probe(effect))
            case ef.RunHealthCheck():
                engine = self.machine.engines.get(effect.order.replica) if effect.order is not None else None
                error = None if engine is None or not engine.is_hung else errors.Unhealthy("hung").info()
                checked = ev.HealthChecked(effect.op_id, effect.generation, error)
                self._later(self.world.rng.randint(1, 200), "check", lambda: self.take(checked))
            case ef.ForgetReplica() | ef.NoteLease():
                pass
            case _:
                raise AssertionError(f"unexpected effect {effect}")

    # the mover
    def _start_mover(self) -> None:
        self._is_mover_up = True
        self.take(ev.MoverReady(tuple(self.machine.store.values())))

    def crash_mover(self) -> None:
        """kill -9 of the mover: open requests are gone, parts stay."""
        if self.is_up and self._is_mover_up:
            self.world.note(f"{self.name} mover crashes")
            self._is_mover_up = False
            self._open = {token: ask for token, ask in self._open.items() if not isinstance(ask, mover.Request)}
            self.take(ev.MoverDied("killed"))
            self._later(self.world.rng.randint(100, 1000), "mover", self._start_mover)

    def _asked_mover(self, request: mover.Request) -> None:
        rng = self.world.rng
        match request:
            case mover.Configure():
                self._mover_done(request, 1)
            case mover.Fetch():
                self._open[request.token] = request
                self._later(rng.randint(5, 60), "fetch", lambda: self._fetch(request))
            case mover.Drop():
                self._open[request.token] = request
                self._later(rng.randint(5, 100), "drop", lambda: self._dropped(request))
            case mover.Verify():
                self._open[request.token] = request
                self._later(rng.randint(50, 500), "verify", lambda: self._verified(request))
            case mover.Cancel():
                target = self._open.pop(request.target, None)
                if isinstance(target, mover.Fetch) and request.discard:
                    self.machine.parts.pop((target.model, target.revision), None)
                self._mover_done(request, 1)
                if isinstance(target, mover.Request):
                    self._mover_done(target, 2, error=errors.Cancelled("cancelled"))
            case _:
                raise AssertionError(f"unexpected request {request}")

    def _mover_done(
        self,
        request: mover.Request,
        delay_ms: int,
        *,
        error: HerderError | None = None,
        manifest: Manifest | None = None,
        copies: Sequence[mover.HeldCopy] = (),
    ) -> None:
        done = mover.Done(request.token, error.info() if error is not None else None, manifest, tuple(copies))
        self._later(delay_ms, "mover done", lambda: self.take(ev.MoverDone(done)) if self._is_mover_up else None)

    def _is_open(self, request: mover.Request | holder.Request) -> bool:
        return self._open.get(request.token) is request

    def _fail(self, request: mover.Request, error: HerderError) -> None:
        del self._open[request.token]
        self._mover_done(request, 1, error=error)

    def _fetch(self, request: mover.Fetch) -> None:
        if not self._is_open(request):
            return
        world = self.world
        key = (request.model, request.revision)
        manifest = request.manifest or origin_manifest(*key)
        need = manifest.size_bytes
        others = sum(
            origin_manifest(ask.model, ask.revision).size_bytes
            for ask in self._open.values()
            if isinstance(ask, mover.Fetch) and ask is not request
        )
        free = DISK_BYTES - self.machine.used_bytes - others
        if key not in self.machine.store and need > free:
            self._fail(request, errors.DiskFull(f"{need} bytes do not fit", need=need, free=free))
            return
        if not request.sources:
            self._fail(request, errors.SourceFailed("no source"))
            return
        source = request.sources[0]
        if source.node:
            peer = self.peers.get(source.node)
            if peer is None or key not in peer.machine.store or not peer.is_up:
                self._fail(request, errors.SourceFailed("the peer does not have it", source=source.url))
                return
        if world.chance(world.faults.source_fails):
            self._fail(request, errors.SourceFailed("the source died", source=source.url))
            return
        if source.node and world.chance(world.faults.source_lies):
            self._fail(request, errors.DigestMismatch("the peer sent other bytes", source=source.url))
            return
        self._move(request, manifest)

    def _move(self, request: mover.Fetch, manifest: Manifest) -> None:
        if not self._is_open(request):
            return
        key = (request.model, request.revision)
        done = min(manifest.size_bytes, self.machine.parts.get(key, 0) + GIB)
        self.machine.parts[key] = done
        moving = mover.Moving(request.token, "fetching", done, manifest.size_bytes, 1e9)
        self.take(ev.MoverMoved(moving))
        if done < manifest.size_bytes:
            self._later(self.world.rng.randint(100, 900), "move", lambda: self._move(request, manifest))
            return
        if not self._is_open(request):
            return
        del self._open[request.token]
        del self.machine.parts[key]
        held = mover.HeldCopy(*key, f"/models/{key[0]}@{key[1]}", done, manifest.digest, "gguf", manifest=manifest)
        self.machine.store[key] = held
        self._mover_done(request, 1, manifest=manifest, copies=(held,))

    def _dropped(self, request: mover.Drop) -> None:
        if self._is_open(request):
            key = (request.model, request.revision)
            users = [
                engine for engine in self.machine.engines.values() if (engine.order.model, engine.order.revision) == key
            ]
            assert not users, f"{self.name}: the store drops {key} under a running engine"
            del self._open[request.token]
            self.machine.store.pop(key, None)
            self.machine.parts.pop(key, None)
            self._mover_done(request, 1)

    def _verified(self, request: mover.Verify) -> None:
        if self._is_open(request):
            del self._open[request.token]
            held = self.machine.store.get((request.model, request.revision))
            if held is None:
                self._mover_done(request, 1, error=errors.CopyNotFound("gone"))
            else:
                self._mover_done(request, 1, manifest=held.manifest, copies=(held,))

    # the holder
    def _start_holder(self) -> None:
        self.machine.is_holder_up = True
        self.take(ev.HolderReady(tuple(self.machine.holdings.values())))

    def crash_holder(self) -> None:
        """kill -9 of the holder: the RAM tier is empty."""
        if self.is_up and self.machine.is_holder_up:
            self.world.note(f"{self.name} holder crashes")
            self.machine.is_holder_up = False
            self.machine.holdings = {}
            self._open = {token: ask for token, ask in self._open.items() if not isinstance(ask, holder.Request)}
            self.take(ev.HolderDied("killed"))
            self._later(self.world.rng.randint(100, 1000), "holder", self._start_holder)

    def _asked_holder(self, request: holder.Request) -> None:
        rng = self.world.rng
        match request:
            case holder.Hold():
                self._open[request.token] = request
                self._later(rng.randint(50, 1500), "hold", lambda: self._held(request))
            case holder.Release():
                self._open[request.token] = request
                self._later(rng.randint(1, 50), "release", lambda: self._released(request))
            case holder.Cancel():
                target = self._open.pop(request.target, None)
                self._holder_done(request)
                if isinstance(target, holder.Request):
                    self._holder_done(target, errors.Cancelled("cancelled").info())
            case _:
                raise AssertionError(f"unexpected request {request}")

    def _holder_done(self, request: holder.Request, error: ErrorInfo | None = None) -> None:
        holdings = tuple(self.machine.holdings.values())
        self._later(1, "holder done", lambda: self._holder_said(holder.Done(request.token, error, holdings)))

    def _holder_said(self, done: holder.Done) -> None:
        if self.machine.is_holder_up:
            self.take(ev.HolderDone(done))

    def _held(self, request: holder.Hold) -> None:
        if not self._is_open(request):
            return
        del self._open[request.token]
        copy = next((held for held in self.machine.store.values() if held.directory == request.directory), None)
        used = sum(holding.bytes for key, holding in self.machine.holdings.items() if key != request.key)
        if copy is None:
            self._holder_done(request, errors.NotFound("no such directory").info())
        elif used + copy.size_bytes > DRAM_BYTES:
            self._holder_done(request, errors.MemoryFull("full", need=copy.size_bytes, free=DRAM_BYTES - used).info())
        else:
            size = copy.size_bytes
            self.machine.holdings[request.key] = holder.Holding(request.key, request.directory, size, size, True)
            self._holder_done(request)

    def _released(self, request: holder.Release) -> None:
        if self._is_open(request):
            del self._open[request.token]
            self.machine.holdings.pop(request.key, None)
            self._holder_done(request)

    # engines
    def _spawn(self, effect: ef.SpawnReplica) -> None:
        order = effect.order
        old = self.machine.engines.get(order.replica)
        assert old is None, f"{self.name}: {order.replica} spawned twice (runs {old.run if old else 0}, {effect.run})"
        self.machine.pids += 1
        rng = self.world.rng
        engine = EngineProcess(
            order,
            effect.run,
            self.machine.pids,
            order.port or 20_000 + self.machine.pids,
            self.world.now_ms + rng.randint(200, 4000),
            ignores_term=rng.random() < 0.2,
        )
        self.machine.engines[order.replica] = engine
        self._later(rng.randint(1, 100), "spawned", lambda: self._started(engine))

    def _attached(self, effect: ef.AttachReplica, engine: EngineProcess | None) -> None:
        if engine is None:
            error = errors.EngineFailed("it is gone").info()
            self.take(ev.ReplicaSpawnFailed(effect.order.replica, effect.run, error))
        else:
            self._started(engine)

    def _started(self, engine: EngineProcess) -> None:
        self.take(ev.ReplicaStarted(engine.order.replica, engine.run, engine.pid, engine.pid, "127.0.0.1", engine.port))
        if self.machine.engines.get(engine.order.replica) is not engine:  # ended before it was noticed
            self.take(ev.ReplicaExited(engine.order.replica, engine.run, 1))

    def _signal(self, effect: ef.SignalReplica) -> None:
        engine = self.machine.engines.get(effect.replica)
        if engine is None or engine.run != effect.run:
            self._later(1, "gone", lambda: self.take(ev.ReplicaExited(effect.replica, effect.run, None)))
        elif effect.is_kill or not engine.ignores_term:
            self._later(
                self.world.rng.randint(5, 500), "exit", lambda: self.end_engine(engine, -9 if effect.is_kill else 0)
            )

    def end_engine(self, engine: EngineProcess, exit_code: int) -> None:
        """The process ends; the agent, if it lives, sees it."""
        if self.machine.engines.get(engine.order.replica) is engine:
            del self.machine.engines[engine.order.replica]
            self.take(ev.ReplicaExited(engine.order.replica, engine.run, exit_code, ("last words",)))

    def _probe(self, effect: ef.ProbeReplica) -> None:
        engine = self.machine.engines.get(effect.order.replica)
        if engine is None or engine.run != effect.run:
            error: ErrorInfo | None = errors.EngineNotReady("nobody answers").info()
        elif engine.is_hung:
            error = errors.Unhealthy("no answer in time").info()
        elif self.world.now_ms < engine.ready_ms:
            error = errors.EngineNotReady("loading").info()
        else:
            error = None
        self.take(ev.ReplicaProbed(effect.order.replica, effect.run, error))
