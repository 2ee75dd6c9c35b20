"""A node around the agent's core without any I/O: a ledger in memory, a mover, a holder and engines that obey at once
or when told. Crashes of each part leave exactly what the real part leaves behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent import holder_protocol as holder
from agent.core import effects as fx
from agent.core import events as ev
from agent.core.invariants import check_invariants
from agent.core.objects import Object
from agent.core.state import State, load
from agent.core.step import step
from agent.mover import protocol as mover
from common import wire
from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile

M = TypeVar("M", bound=wire.Message)
WELCOME = wire.Welcome(1, "cluster-1", 1, "session-1", 15_000, 5_000, 0, "a2V5")


def manifest_of(model: str, revision: str, size: int = 100) -> Manifest:
    """A manifest of one file."""
    file = ManifestFile("model.gguf", size, "b3:" + "0" * 64, 1 << 20)
    return Manifest(model, revision, (file,), f"b3:{model}@{revision}", "gguf")


@dataclass
class Process:
    """An engine's process on the made-up machine."""

    run: int
    pid: int
    port: int


@dataclass
class Run:
    """A run's process and directory on the made-up machine. said: what its process wrote last; ended: it is gone."""

    generation: int
    said: ev.RunSaid
    fired_ns: int = 0
    ended: bool = False


@dataclass
class Node:
    """The core with its surroundings. `is_eager`: mover and holder answer at once."""

    is_eager: bool = True
    now_ms: int = 1_000_000
    boot_id: str = "boot-1"
    state: State = field(default_factory=State)
    ledger: dict[tuple[str, str], Object] = field(default_factory=dict)
    store: dict[str, Manifest] = field(default_factory=dict)  # "model@revision" -> what is published
    held: set[str] = field(default_factory=set)  # keys that the holder holds
    processes: dict[str, Process] = field(default_factory=dict)  # replica -> its process
    exits: dict[tuple[str, int], int] = field(default_factory=dict)  # (replica, run) -> exit code, as exit.json
    runs: dict[str, Run] = field(default_factory=dict)  # by run
    run_spawns: list[tuple[str, int]] = field(default_factory=list)  # (run, generation) of every process made
    uploads: dict[str, int] = field(default_factory=dict)  # run -> generation, under way
    mover_asks: dict[str, mover.Request] = field(default_factory=dict)
    holder_asks: dict[str, holder.Request] = field(default_factory=dict)
    effects: list[fx.Effect] = field(default_factory=list)  # since `clear`
    sent: list[wire.Message] = field(default_factory=list)
    lease_until_ms: int = 0
    pids: int = 100
    session_id: str = ""
    epoch: int = 1

    # running the core
    def post(self, event: ev.Event) -> None:
        """One event through the core, then what follows from its effects."""
        turn = step(self.state, event, self.now_ms)
        check_invariants(self.state)
        for record in turn.records:
            if record.body is None:
                self.ledger.pop((record.kind, record.key), None)
            else:
                self.ledger[(record.kind, record.key)] = record.body
        for effect in turn.effects:
            self.effects.append(effect)
            self._perform(effect)

    def start(self) -> Node:
        """A fresh agent process over the ledger: mover and holder come up, no session yet."""
        self.state = load(State(), list(self.ledger.values()))
        self.session_id = ""
        self.mover_asks.clear()
        self.holder_asks.clear()
        self.uploads.clear()
        self.post(ev.AgentStarted(self.boot_id, "/store/models", self.lease_until_ms))
        self.post(ev.MoverReady(self._copies()))
        self.post(ev.HolderReady(self._holdings()))
        return self

    def open(self, epoch: int = 0) -> Node:
        """A session with the head."""
        self.epoch = max(self.epoch, epoch)
        self.session_id = f"session-{len(self.effects)}-{self.now_ms}"
        welcome = wire.Welcome(1, "cluster-1", self.epoch, self.session_id, 15_000, 5_000, 0, "a2V5")
        self.post(ev.SessionOpened(self.session_id, "n1", welcome))
        return self

    def close(self) -> None:
        """The session is cut."""
        self.post(ev.SessionClosed(self.session_id, "cut"))
        self.session_id = ""

    def reboot(self) -> None:
        """Everything volatile is gone."""
        self.boot_id = f"{self.boot_id}x"
        self.processes.clear()
        for run in self.runs.values():
            run.ended = True
        self.held.clear()
        self.lease_until_ms = 0
        self.start()

    def command(self, body: wire.AnyCommand, generation: int, *, op_id: str = "", deadline_ms: int = 0) -> None:
        """A command of the head."""
        name = op_id or op_of(body)
        self.post(ev.CommandReceived(wire.Command(name, generation, self.epoch, "job-1", body, deadline_ms)))

    def ack(self, op_id: str, generation: int) -> None:
        """The head has made a result durable."""
        self.post(ev.ResultAcked(op_id, generation))

    def wait(self, ms: int) -> None:
        """Time passes; the core is woken whenever it asked for it, and probes are answered by healthy engines."""
        until = self.now_ms + ms
        while self.state.wake_ms <= until:
            self.now_ms = max(self.now_ms, self.state.wake_ms)
            self.post(ev.Ticked())
        self.now_ms = until

    # what the parts do
    def finish(self, token: str, error: ErrorInfo | None = None) -> None:
        """The mover or the holder ends a request."""
        if token in self.mover_asks:
            self._finish_mover(self.mover_asks.pop(token), error)
        else:
            self._finish_holder(self.holder_asks.pop(token), error)

    def exit(self, replica: str, code: int = 1) -> None:
        """An engine ends by itself."""
        process = self.processes.pop(replica)
        self.exits[(replica, process.run)] = code
        self.post(ev.ReplicaExited(replica, process.run, code, ("last words",)))

    def probe(self, replica: str, error: ErrorInfo | None = None) -> None:
        """An engine's answer to a probe."""
        self.post(ev.ReplicaProbed(replica, self.processes[replica].run, error, 1 << 20))

    def _perform(self, effect: fx.Effect) -> None:
        match effect:
            case fx.SendMessage():
                if effect.session_id == self.session_id:
                    self.sent.append(effect.message)
            case fx.AskMover():
                self._ask_mover(effect.request)
            case fx.AskHolder():
                self._ask_holder(effect.request)
            case fx.SpawnReplica():
                self.pids += 1
                process = Process(effect.run, self.pids, 20_000 + self.pids)
                assert effect.order.replica not in self.processes, "two processes of one replica"
                self.processes[effect.order.replica] = process
                self._started(effect.order.replica, process)
            case fx.AttachReplica():
                self._attach(effect)
            case fx.NoteLease():
                self.lease_until_ms = effect.until_ms
            case fx.SignalReplica():
                if self.is_eager:
                    self.obey(effect.replica, effect.run)
            case _:
                self._perform_run(effect)

    def _perform_run(self, effect: fx.Effect) -> None:
        match effect:
            case fx.SpawnRun():
                name, generation = effect.order.run, effect.generation
                assert name not in self.runs, "a run is made where one is"
                assert (name, generation) not in self.run_spawns, "a run of one generation is made twice"
                assert effect.order.spec, "a run without its spec"
                self.run_spawns.append((name, generation))
                self.runs[name] = Run(generation, ev.RunSaid(name, generation, "preparing"))
                self.post(ev.RunStarted(name, generation, 100, 7))
            case fx.AttachRun():
                self._attach_run(effect)
            case fx.StartRun():
                run = self.runs.get(effect.run)
                if run is not None and run.generation == effect.generation and not run.fired_ns:
                    run.fired_ns = effect.start_boottime_ns
                    if self.is_eager:
                        self.run_says(effect.run, "running", start_boottime_ns=run.fired_ns)
            case fx.SignalRun():
                if effect.is_kill:
                    self.run_ends(effect.run, exit_code=-9)
                elif self.is_eager:
                    self.run_ends(effect.run, "ended")
            case fx.UploadRun():
                assert effect.run not in self.uploads, "files are sent twice at the same time"
                self.uploads[effect.run] = effect.generation
                if self.is_eager:
                    self.uploaded(effect.run)
            case fx.ForgetRun():
                self.uploads.pop(effect.run, None)
                self.runs.pop(effect.run, None)
                if self.is_eager:
                    self.post(ev.RunForgotten(effect.run))
            case _:
                pass

    def _attach_run(self, effect: fx.AttachRun) -> None:
        run = self.runs.get(effect.run)
        if run is None or run.generation != effect.generation:
            self.post(ev.RunEnded(effect.run, effect.generation, was_there=False))
        elif run.ended:
            self.post(ev.RunEnded(effect.run, effect.generation, run.said, last_log=("last words",)))
        else:
            self.post(ev.RunStarted(effect.run, effect.generation, 100, 7))
            self.post(run.said)

    def run_says(self, name: str, state: str, **told: object) -> None:
        """The process of a run comes further."""
        run = self.runs[name]
        run.said = ev.RunSaid(name, run.generation, state, **told)  # type: ignore[arg-type]
        self.post(run.said)

    def run_ends(self, name: str, state: str = "", error: ErrorInfo | None = None, exit_code: int = 0) -> None:
        """The process of a run ends, having said so (`state`) or not."""
        run = self.runs.get(name)
        if run is None or run.ended:
            return
        run.ended = True
        if state:
            run.said = ev.RunSaid(name, run.generation, state, error=error)
        self.post(ev.RunEnded(name, run.generation, run.said, exit_code, ("last words",)))

    def uploaded(self, name: str, error: ErrorInfo | None = None) -> None:
        """The head has taken a run's files, or will not."""
        generation = self.uploads.pop(name)
        self.post(ev.RunUploaded(name, generation, () if error else ("load.bin",), error))

    def obey(self, replica: str, run: int) -> None:
        """An engine ends because it was told to."""
        process = self.processes.get(replica)
        if process is not None and process.run == run:
            self.exit(replica, -15)

    def _started(self, replica: str, process: Process) -> None:
        self.post(ev.ReplicaStarted(replica, process.run, process.pid, 7, "127.0.0.1", process.port))

    def _attach(self, effect: fx.AttachReplica) -> None:
        replica = effect.order.replica
        process = self.processes.get(replica)
        if process is not None and process.run == effect.run:
            self._started(replica, process)
        else:
            code = self.exits.get((replica, effect.run))
            self.post(ev.ReplicaExited(replica, effect.run, code))

    def _ask_mover(self, request: mover.Request) -> None:
        if isinstance(request, mover.Configure):
            return
        if isinstance(request, mover.Cancel):
            if request.target in self.mover_asks:
                self.finish(request.target, ErrorInfo("cancelled", "cancelled"))
            self.post(ev.MoverDone(mover.Done(request.token)))
            return
        self.mover_asks[request.token] = request
        if self.is_eager:
            self.finish(request.token)

    def _finish_mover(self, request: mover.Request, error: ErrorInfo | None) -> None:
        done = mover.Done(request.token, error)
        if isinstance(request, mover.Fetch) and error is None:
            manifest = request.manifest or manifest_of(request.model, request.revision)
            self.store[f"{request.model}@{request.revision}"] = manifest
            done = mover.Done(request.token, manifest=manifest)
        elif isinstance(request, mover.Drop) and error is None:
            self.store.pop(f"{request.model}@{request.revision}", None)
        self.post(ev.MoverDone(done))

    def _ask_holder(self, request: holder.Request) -> None:
        if isinstance(request, holder.Cancel):
            if request.target in self.holder_asks:
                self.finish(request.target, ErrorInfo("cancelled", "cancelled"))
            self.post(ev.HolderDone(holder.Done(request.token)))
            return
        self.holder_asks[request.token] = request
        if self.is_eager:
            self.finish(request.token)

    def _finish_holder(self, request: holder.Request, error: ErrorInfo | None) -> None:
        if isinstance(request, holder.Hold) and error is None:
            self.held.add(request.key)
        elif isinstance(request, holder.Release):
            self.held.discard(request.key)
        self.post(ev.HolderDone(holder.Done(request.token, error, self._holdings())))

    def kill_mover(self) -> None:
        """The mover dies and comes back."""
        self.mover_asks.clear()
        self.post(ev.MoverDied("killed"))
        self.post(ev.MoverReady(self._copies()))

    def kill_holder(self) -> None:
        """The holder dies with all it held, and another comes."""
        self.holder_asks.clear()
        self.held.clear()
        self.post(ev.HolderDied("killed"))
        self.post(ev.HolderReady(()))

    def _copies(self) -> tuple[mover.HeldCopy, ...]:
        return tuple(
            mover.HeldCopy(m.model, m.revision, f"/store/models/{key}", m.size_bytes, m.digest, m.format, manifest=m)
            for key, m in sorted(self.store.items())
        )

    def _holdings(self) -> tuple[holder.Holding, ...]:
        return tuple(holder.Holding(key, f"/store/models/{key}", 100, 100, True) for key in sorted(self.held))

    # what tests look at
    def take(self, kind: type[M]) -> list[M]:
        """Messages of a kind that were sent since the last look."""
        found = [message for message in self.sent if isinstance(message, kind)]
        self.sent = [message for message in self.sent if not isinstance(message, kind)]
        return found

    def results(self) -> list[tuple[str, int, str, str]]:
        """(op_id, generation, outcome, error code) of the results sent since the last look."""
        return [
            (result.op_id, result.generation, result.outcome, result.error.code if result.error else "")
            for result in self.take(wire.Result)
        ]

    def copy_state(self, key: str) -> str:
        """A copy's state, "" when there is none."""
        task = self.state.copies.get(key)
        return task.state if task is not None else ""

    def replica_state(self, replica: str = "chat-0") -> str:
        """A replica's state, "" when there is none."""
        task = self.state.replicas.get(replica)
        return task.state if task is not None else ""

    def run_state(self, run: str = "b1.0.0") -> str:
        """A run's state, "" when there is none."""
        task = self.state.runs.get(run)
        return task.state if task is not None else ""


def op_of(body: wire.AnyCommand) -> str:
    """The op id that the head gives a command."""
    match body:
        case wire.EnsureCopy() | wire.DropCopy():
            return f"copy:{body.model}@{body.revision}|n1:{body.storage}"
        case wire.EnsureReplica() | wire.StopReplica():
            return f"replica:{body.replica}"
        case wire.EnsureRun():
            return f"run:{body.run}"
        case wire.FireRun():
            return f"fire:{body.run}"
        case wire.EndRun():
            return f"end:{body.run}"
        case _:
            return "check:1"


def ensure_copy(storage: str = "disk", model: str = "org/m", **fields: object) -> wire.EnsureCopy:
    """An order for a copy."""
    source = wire.Source("file:///models/m.gguf")
    return wire.EnsureCopy(model, "main", storage, (source,), **fields)  # type: ignore[arg-type]


def drop_copy(storage: str = "disk", model: str = "org/m") -> wire.DropCopy:
    """An order to be without a copy."""
    return wire.DropCopy(model, "main", storage)


def ensure_replica(replica: str = "chat-0", **fields: object) -> wire.EnsureReplica:
    """An order for an engine."""
    values: dict[str, object] = {
        "service": "chat",
        "model": "org/m",
        "revision": "main",
        "storage": "disk",
        "runtime": "llamacpp",
        "max_restarts": 3,
        **fields,
    }
    return wire.EnsureReplica(replica, **values)  # type: ignore[arg-type]


def ensure_run(run: str = "b1.0.0", kind: str = "load", **fields: Any) -> wire.EnsureRun:
    """An order for a part of a benchmark."""
    values: dict[str, Any] = {
        "spec": {"rate": 1, "duration": 1} if kind == "load" else {"interval": 1, "engines": []},
        "urls": ("http://10.0.0.1:8000",) if kind == "load" else (),
        "token": "secret" if kind == "load" else "",
        **fields,
    }
    return wire.EnsureRun(run, kind, **values)
