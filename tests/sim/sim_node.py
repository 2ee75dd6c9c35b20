"""A node in the simulator: the agent process on its machine, with the real core, and its link to the head.

The machine survives the agent, and so does its ledger. Mover, holder and engines are small models beside this file.
Every batch that becomes durable is looked at: no order of an older head or generation may ever be followed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable

from agent.core import effects as ef
from agent.core import events as ev
from agent.core.events import Event
from agent.core.invariants import check_invariants
from agent.core.objects import CopyTask, Meta, Record, ReplicaTask
from agent.core.state import NEVER_MS, State, load
from agent.core.step import step
from common import limits, wire
from tests.sim.machine import GIB, GPU_BYTES, MEMORY_BYTES, Machine
from tests.sim.sim_engines import EngineModel
from tests.sim.sim_head import SimHead
from tests.sim.sim_runs import RunModel
from tests.sim.sim_store import HolderModel, MoverModel
from tests.sim.world import World


class SimNode:
    """One machine with its agent."""

    def __init__(
        self,
        world: World,
        heads: list[SimHead],
        name: str,
        gpus: int,
        peers: dict[str, SimNode],
        *,
        node_id: str = "",
        protocols: tuple[int, int] = (limits.PROTOCOL_MIN, limits.PROTOCOL),
    ) -> None:
        self.world = world
        self.heads = heads  # the first is the one; others are old processes that still run
        self.head = heads[0]
        self.name = name
        self.node_id = node_id or name
        self.protocols = protocols
        self.peers = peers
        self.machine = Machine(name, gpus, world.faults.disk_gib * GIB, world.faults.dram_gib * GIB)
        self.mover = MoverModel(self)
        self.holder = HolderModel(self)
        self.engines = EngineModel(self)
        self.runs = RunModel(self)
        self.is_gone = False  # powered off for good
        self.refused_with = ""
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
        if self.is_gone:
            return
        self.life += 1
        self.is_up = True
        self._pending.clear()
        self._is_syncing = False
        self.mover.reset()
        self.holder.reset()
        self._wake_at_ms = NEVER_MS
        self._leases.clear()
        self.session_id = ""
        self.state = load(State(), list(self.machine.ledger.values()))
        self.world.note(f"{self.name} agent starts (life {self.life})")
        noted = self.machine.lease_until_ms
        lease_until_ms = self.clock_base_ms + noted if noted else 0
        self.take(ev.AgentStarted(f"{self.name}-boot{self.machine.boot}", "/models", lease_until_ms))
        self.later(self.world.rng.randint(20, 200), "mover", self.mover.start)
        self.later(self.world.rng.randint(10, 100), "holder", self.holder.start)
        self.later(self.world.rng.randint(5, 500), "dial", self._dial)

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
        for process in self.machine.runs.values():
            if process.is_alive:
                process.state, process.ended_ms = "died", self.world.now_ms
        self.machine.lease_until_ms = 0

    def leave(self, deadline_ms: int) -> None:
        """The machine's time ends: the agent says so, and at the deadline the machine goes; later it is back."""
        self.world.note(f"{self.name} leaves in {deadline_ms} ms")
        self._send(wire.Leaving("the allocation ends", deadline_ms))

        def over() -> None:
            if not self.is_gone:
                self.reboot()
                self.world.after(self.world.rng.randint(5_000, 60_000), self.name, self._start_again)

        self.world.after(deadline_ms, "time is over", over)

    def power_off(self) -> None:
        """The machine is gone for good."""
        self.reboot()
        self.is_gone = True

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
                self.later(max(1, wake_ms - self.now_ms), "wake", self._wake)

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
                self.later(self.world.rng.randint(1, 5), "fsync", self._synced)
                return
            self._pending.popleft()
            for effect in effects:
                self._do(effect)

    def _synced(self) -> None:
        if self.world.now_ms < self.ledger_full_until_ms:
            self.later(500, "fsync", self._synced)
            return
        self._is_syncing = False
        records, effects = self._pending.popleft()
        for record in records:
            self._check_order(record)
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

    def _check_order(self, record: Record) -> None:
        """No order goes back, and neither does the highest head seen."""
        held = self.machine.ledger.get((record.kind, record.key))
        match record.body:
            case CopyTask() | ReplicaTask() if isinstance(held, CopyTask | ReplicaTask):
                assert record.body.generation >= held.generation, f"{self.name}: {record} goes back from {held}"
            case Meta() if isinstance(held, Meta):
                assert record.body.max_head_epoch >= held.max_head_epoch, f"{self.name}: {record} goes back"
                assert held.cluster_id in ("", record.body.cluster_id), f"{self.name}: {record} changes cluster"
            case _:
                pass

    def _start_again(self) -> None:
        if not self.is_up:
            self.start()

    def later(self, delay_ms: int, name: str, action: Callable[[], None]) -> None:
        """Runs the action unless this process ends before."""
        life = self.life

        def guarded() -> None:
            if self.is_up and self.life == life:
                action()

        self.world.after(delay_ms, f"{self.name} {name}", guarded)

    # the link
    def _dial(self) -> None:
        if self.session_id:
            return
        if not self.heads[0].is_up or self.is_cut:
            self.later(self.world.rng.randint(200, 3000), "dial", self._dial)
            return
        old = [head for head in self.heads[1:] if head.is_up]
        self.head = self.world.rng.choice(old) if old and self.world.rng.random() < 0.5 else self.heads[0]
        session_id = f"s-{self.name}-{self.life}-{self.seq}-{self.world.now_ms}"
        self.session_id = session_id
        self.is_welcome = False
        life = self.life
        self.head.accept(
            session_id,
            self.node_id,
            lambda session, message: self._network(
                message, lambda arrived: self._arrived(life, session, arrived), False
            ),
            lambda: self.world.after(1, "close", lambda: self._closed(life, session_id)),
        )
        self._send(self._hello(), is_lossless=True)
        self.later(int(limits.HELLO_TIMEOUT_S * 1000), "hello", lambda: self._give_up_hello(session_id))

    def _hello(self) -> wire.Hello:
        gpus = tuple(
            wire.Gpu(index, f"GPU-{self.name}-{index}", "NVIDIA H200", GPU_BYTES) for index in range(self.machine.gpus)
        )
        inventory = wire.Inventory(
            self.name,
            cpus=64,
            cores=32,
            memory_bytes=MEMORY_BYTES,
            dram_budget_bytes=self.machine.dram_bytes,
            disk_budget_bytes=self.machine.disk_bytes,
            gpus=gpus,
            engines={"llamacpp": "1", "command": "1"},
        )
        return wire.Hello(
            *self.protocols,
            self.node_id,
            f"{self.name}-boot{self.machine.boot}",
            f"{self.name}-life{self.life}",
            "0",
            inventory,
            cluster_id=self.state.meta.cluster_id,
            max_head_epoch=self.state.meta.max_head_epoch,
            advertise="127.0.0.1",
            data_port=7001,
            identity=hashlib.sha256(self.node_id.encode()).hexdigest(),  # a twin is a cloned disk: it has the same
        )

    def _give_up_hello(self, session_id: str) -> None:
        if self.session_id == session_id and not self.is_welcome:
            self._hang_up()
            self.later(self.world.rng.randint(200, 3000), "dial", self._dial)

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
            self.later(self.world.rng.randint(200, 3000), "dial", self._dial)

    def _closed(self, life: int, session_id: str) -> None:
        if self.is_up and self.life == life and self.session_id == session_id:
            self.session_id = ""
            self.take(ev.SessionClosed(session_id, "closed by the head"))
            self.later(self.world.rng.randint(200, 3000), "dial", self._dial)

    @property
    def is_cut(self) -> bool:
        """Whether nothing gets through to the head, or back."""
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
            if world.chance(faults.loss) or (isinstance(message, wire.Result) and world.chance(faults.result_loss)):
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
                self.take(ev.SessionOpened(session_id, self.node_id, message))
                self.later(self.world.rng.randint(1, self.interval_ms), "lease", lambda: self._lease(session_id))
            case wire.Ack():
                sent_ms = self._leases.pop(message.seq, None)
                self.interval_ms = message.interval_ms
                if sent_ms is not None:
                    if self.world.now_ms < self.ledger_full_until_ms and self.machine.lease_until_ms:
                        # as the daemon does: a stuck ledger must not let the shims believe that the head is gone
                        self.machine.lease_until_ms = sent_ms + message.lease_ms - self.clock_base_ms
                    self.take(ev.LeaseAcked(sent_ms, message.lease_ms, message.wants_report))
            case wire.Command():
                self._commanded(message)
            case wire.ResultAck():
                self.take(ev.ResultAcked(message.op_id, message.generation))
            case wire.ClockAsk():
                self._send(wire.ClockTold(message.asked_ns, self.boottime_ms * 1_000_000))
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
        self.later(int(self.interval_ms * self.world.rng.uniform(0.9, 1.1)), "lease", lambda: self._lease(session_id))

    def _commanded(self, command: wire.Command) -> None:
        seen, before = self.state.meta.max_head_epoch, self.state.report_seq
        tasks = (dict(self.state.copies), dict(self.state.replicas), dict(self.state.checks))
        self.take(ev.CommandReceived(command))
        if command.head_epoch < seen:
            after = (self.state.copies, self.state.replicas, self.state.checks)
            assert tasks == after, f"{self.name} follows {command} of an older head than {seen} ({before})"

    def peer(self, node: str) -> Machine | None:
        """The machine that serves copies under a node id, if it can be reached now."""
        other = self.peers.get(node)
        is_cut = self.world.now_ms < self.world.cuts.get(frozenset((self.name, node)), 0)
        return other.machine if other is not None and other.is_up and other.mover.is_up and not is_cut else None

    # effects
    def _do(self, effect: ef.Effect) -> None:
        match effect:
            case ef.SendMessage():
                if effect.session_id == self.session_id:
                    self._send(effect.message)
            case ef.CloseSession():
                self.world.note(f"{self.name} ends its session: {effect.code}")
                self.disconnect()
            case ef.AskMover():
                self.mover.ask(effect.request)
            case ef.AskHolder():
                self.holder.ask(effect.request)
            case ef.SpawnReplica():
                self.engines.spawn(effect)
            case ef.AttachReplica():
                self.engines.attach(effect)
            case ef.SignalReplica():
                self.engines.signal(effect)
            case ef.ProbeReplica():
                self.engines.probe(effect)
            case ef.SpawnRun():
                self.runs.spawn(effect)
            case ef.AttachRun():
                self.runs.attach(effect)
            case ef.StartRun():
                self.runs.start(effect)
            case ef.SignalRun():
                self.runs.signal(effect)
            case ef.UploadRun():
                self.runs.upload(effect)
            case ef.ForgetRun():
                self.runs.forget(effect)
            case ef.RunHealthCheck():
                self.engines.check(effect)
            case ef.NoteLease():
                self.machine.lease_until_ms = effect.until_ms - self.clock_base_ms
            case ef.ForgetReplica():
                pass
            case _:
                raise AssertionError(f"unexpected effect {effect}")
