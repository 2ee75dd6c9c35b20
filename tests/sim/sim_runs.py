"""Runs of a simulated node: generators and monitors that outlive the agent, prepare, begin on time, end, die, hand in.

Every process notes what it really did and when, in the world's time; `tests/sim/benchmark_truth.py` compares that with
what the head says of it.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import msgspec

from agent.core import effects as ef
from agent.core import events as ev
from common import errors
from head.core import events as head_events
from tests.sim.machine import RunProcess
from tests.sim.sim_head import SimHead
from tests.sim.sim_store import Owner

_NS = 1_000_000
ARTIFACTS = {"load": ("generator.log", "load.bin"), "monitor": ("engine.csv", "monitor.csv")}


class RunOwner(Owner, Protocol):
    """The node with its clock and its way to the head."""

    head: SimHead

    @property
    def boottime_ms(self) -> int:
        """This machine's CLOCK_BOOTTIME."""
        ...

    @property
    def is_cut(self) -> bool:
        """Whether nothing gets through to the head and back."""
        ...


class RunModel:
    """What the agent's shell does with runs."""

    def __init__(self, owner: RunOwner) -> None:
        self.owner = owner

    def spawn(self, effect: ef.SpawnRun) -> None:
        """A new process; a run of one generation has at most one, ever."""
        owner, rng, order = self.owner, self.owner.world.rng, effect.order
        machine = owner.machine
        old = machine.runs.get(order.run)
        assert old is None or not old.is_alive, f"{owner.name}: {order.run} is spawned over a process"
        assert (order.run, effect.generation) not in machine.spawned, f"{owner.name}: {order.run} is spawned twice"
        machine.spawned.add((order.run, effect.generation))
        process = RunProcess(order, effect.generation)
        machine.runs[order.run] = process
        owner.later(rng.randint(1, 100), "run started", lambda: self._started(process))
        if order.kind == "monitor":
            process.state = "running"
            return
        if owner.world.chance(owner.world.faults.run_fails):
            self._in(process, rng.randint(10, 2_000), lambda: self._end(process, "failed"))
        else:
            self._in(process, rng.randint(100, 5_000), lambda: self._armed(process))

    def attach(self, effect: ef.AttachRun) -> None:
        """Looks for the process that an agent before had started."""
        process = self.owner.machine.runs.get(effect.run)
        self.owner.later(self.owner.world.rng.randint(1, 50), "attach", lambda: self._attached(effect, process))

    def _attached(self, effect: ef.AttachRun, process: RunProcess | None) -> None:
        if process is None or process.generation != effect.generation:
            self.owner.take(ev.RunEnded(effect.run, effect.generation, was_there=False))
        elif process.is_alive:
            self._started(process)
            self._say(process)
        else:
            self._tell_end(process)

    def _started(self, process: RunProcess) -> None:
        if process.is_alive:
            self.owner.take(ev.RunStarted(process.order.run, process.generation, 1, 1))
            self._say(process)
        else:
            self._tell_end(process)

    def _armed(self, process: RunProcess) -> None:
        process.state = "armed"
        process.digest = self._digest(process)
        self._say(process)

    def _digest(self, process: RunProcess) -> str:
        """The same for equal specs, wherever it is made; now and then a node has another file."""
        plain = msgspec.json.encode((process.order.spec, process.order.urls, process.order.spread), order="sorted")
        is_other = self.owner.world.chance(self.owner.world.faults.runs_differ)
        return hashlib.sha256(plain + (self.owner.name.encode() if is_other else b"")).hexdigest()

    def start(self, effect: ef.StartRun) -> None:
        """An armed generator is told its moment, once; one that is over is begun at once."""
        process = self.owner.machine.runs.get(effect.run)
        if process is None or process.generation != effect.generation or process.state != "armed":
            return
        if process.start_boottime_ns:
            return
        process.start_boottime_ns = effect.start_boottime_ns
        wait_ms = effect.start_boottime_ns // _NS - self.owner.boottime_ms
        process.late_ms = max(0, -wait_ms)
        self._in(process, max(0, wait_ms), lambda: self._run(process))

    def _run(self, process: RunProcess) -> None:
        world = self.owner.world
        process.state = "running"
        process.began_ms = world.now_ms
        if process.late_ms:
            process.start_boottime_ns = self.owner.boottime_ms * _NS
        self._say(process)
        length_ms = int(process.order.spec["duration"] * 1000)
        if world.chance(world.faults.run_dies):
            self._in(process, world.rng.randint(0, length_ms), lambda: self._end(process, "died"))
        self._in(process, length_ms + world.rng.randint(0, 1_000), lambda: self._end(process, "ended"))

    def _in(self, process: RunProcess, delay_ms: int, action: object) -> None:
        """The process's own time: goes on without an agent, not over a reboot."""

        def guarded() -> None:
            if process.is_alive and self.owner.machine.runs.get(process.order.run) is process:
                assert callable(action)
                action()

        self.owner.world.after(delay_ms, f"{self.owner.name} run", guarded)

    def signal(self, effect: ef.SignalRun) -> None:
        """Told to finish, or killed."""
        process = self.owner.machine.runs.get(effect.run)
        if process is None or process.generation != effect.generation:
            return
        how = "died" if effect.is_kill else "ended"
        self._in(process, self.owner.world.rng.randint(1, 500), lambda: self._end(process, how))

    def _end(self, process: RunProcess, how: str) -> None:
        process.state = how
        process.ended_ms = self.owner.world.now_ms
        self._tell_end(process)

    def _say(self, process: RunProcess) -> None:
        if process.order.kind == "load" and process.state in ("armed", "running"):
            self.owner.take(self._said(process, process.state))

    def _said(self, process: RunProcess, state: str) -> ev.RunSaid:
        failed = errors.RunFailed("it cannot be prepared").info() if state == "failed" else None
        begun_ns = process.start_boottime_ns if state in ("running", "ended") else 0
        return ev.RunSaid(
            process.order.run, process.generation, state, process.digest, begun_ns, process.late_ms, error=failed
        )

    def _tell_end(self, process: RunProcess) -> None:
        said = None if process.state == "died" else self._said(process, process.state)
        self.owner.take(ev.RunEnded(process.order.run, process.generation, said, 0 if said else -9))

    def upload(self, effect: ef.UploadRun) -> None:
        """Hands the files to the head, again and again until it has them."""
        self.owner.later(self.owner.world.rng.randint(20, 2_000), "upload", lambda: self._upload(effect))

    def _upload(self, effect: ef.UploadRun) -> None:
        owner, head = self.owner, self.owner.head
        if effect.run not in owner.machine.runs:
            return
        if owner.is_cut or not head.is_up or effect.run not in head.state.runs:
            self.upload(effect)
            return
        names, life = ARTIFACTS[effect.kind], head.life
        for name in names:
            head.take(head_events.ArtifactStored(effect.run, effect.generation, name, 1_000))

        def answered() -> None:
            if head.is_up and head.life == life:
                owner.take(ev.RunUploaded(effect.run, effect.generation, names))
            else:
                self.upload(effect)

        owner.later(owner.world.rng.randint(10, 200), "uploaded", answered)

    def forget(self, effect: ef.ForgetRun) -> None:
        """Kills and deletes; now and then something is left after the first SIGKILL."""
        self.owner.later(self.owner.world.rng.randint(1, 300), "forget", lambda: self._forget(effect.run))

    def _forget(self, run: str) -> None:
        world, machine = self.owner.world, self.owner.machine
        process = machine.runs.get(run)
        if process is not None and process.is_alive and world.chance(0.05):
            self.owner.take(ev.RunForgotten(run, left=(1,)))
            return
        if process is not None:
            if process.is_alive:
                process.state, process.ended_ms = "died", world.now_ms
            machine.past_runs.append(machine.runs.pop(run))
        self.owner.take(ev.RunForgotten(run))
