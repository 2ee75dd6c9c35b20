"""Engines of a simulated node: processes that load, answer, hang, die, ignore SIGTERM and leave things behind."""

from __future__ import annotations

from agent.core import effects as ef
from agent.core import events as ev
from common import errors, limits
from common.errors import ErrorInfo
from tests.sim.machine import EngineProcess
from tests.sim.sim_store import Owner
from tests.sim.world import World


class EngineModel:
    """What the agent's shell does with engines."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    @property
    def _world(self) -> World:
        return self.owner.world

    def spawn(self, effect: ef.SpawnReplica) -> None:
        """A new process; nothing of an older one of this replica may be left."""
        order, machine, rng = effect.order, self.owner.machine, self._world.rng
        old = machine.engines.get(order.replica)
        assert old is None, (
            f"{self.owner.name}: {order.replica} spawned twice (runs {old.run if old else 0}, {effect.run})"
        )
        machine.pids += 1
        faults = self._world.faults
        engine = EngineProcess(
            order,
            effect.run,
            machine.pids,
            order.port or 20_000 + machine.pids,
            self._world.now_ms + rng.randint(200, 4000),
            ignores_term=rng.random() < 0.2,
            leak_ms=rng.randint(1000, 15_000) if self._world.chance(faults.engine_leaks) else 0,
        )
        engine.lease_until_ms = machine.lease_until_ms or self._world.now_ms
        is_broken = order.model in self._world.broken_models
        if is_broken and self._world.broken_models[order.model] == "never ready":
            engine.ready_ms = 1 << 62
        is_port_taken = any(other.port == engine.port for other in machine.engines.values())
        machine.engines[order.replica] = engine
        self.owner.later(rng.randint(1, 100), "spawned", lambda: self.started(engine))
        if is_port_taken or (is_broken and engine.ready_ms < 1 << 62):
            self.owner.later(rng.randint(50, 1000), "exit", lambda: self.end(engine, 1))

    def attach(self, effect: ef.AttachReplica) -> None:
        """Looks for the process that an agent before had started."""
        engine = self.owner.machine.engines.get(effect.order.replica)
        found = engine if engine is not None and engine.run == effect.run else None
        self.owner.later(self._world.rng.randint(1, 50), "attach", lambda: self._attached(effect, found))

    def _attached(self, effect: ef.AttachReplica, engine: EngineProcess | None) -> None:
        if engine is None:
            error = errors.EngineFailed("it is gone").info()
            self.owner.take(ev.ReplicaSpawnFailed(effect.order.replica, effect.run, error))
        else:
            self.started(engine)

    def started(self, engine: EngineProcess) -> None:
        """The shell has seen the process."""
        name = engine.order.replica
        self.owner.take(ev.ReplicaStarted(name, engine.run, engine.pid, engine.pid, "127.0.0.1", engine.port))
        if self.owner.machine.engines.get(name) is not engine:  # ended before it was noticed
            self.owner.take(ev.ReplicaExited(name, engine.run, 1))
        elif engine.leaks_until_ms:
            self.end(engine, 1)

    def signal(self, effect: ef.SignalReplica) -> None:
        """SIGTERM or SIGKILL."""
        engine = self.owner.machine.engines.get(effect.replica)
        if engine is None or engine.run != effect.run:
            self.owner.later(1, "gone", lambda: self.owner.take(ev.ReplicaExited(effect.replica, effect.run, None)))
        elif effect.is_kill or not engine.ignores_term or engine.leaks_until_ms:
            code = -9 if effect.is_kill else 0
            self.owner.later(self._world.rng.randint(5, 500), "exit", lambda: self.end(engine, code))

    def end(self, engine: EngineProcess, exit_code: int) -> None:
        """The process ends; what it leaves behind is seen, and stays for a while."""
        name, machine, now_ms = engine.order.replica, self.owner.machine, self._world.now_ms
        if machine.engines.get(name) is not engine:
            return
        if engine.leak_ms and not engine.leaks_until_ms:
            engine.leaks_until_ms = now_ms + engine.leak_ms
        if now_ms < engine.leaks_until_ms:
            self.owner.take(ev.ReplicaExited(name, engine.run, exit_code, ("last words",), (engine.pid,), 1 << 20))
            return
        del machine.engines[name]
        self.owner.take(ev.ReplicaExited(name, engine.run, exit_code, ("last words",)))

    def watch_leases(self) -> None:
        """What each shim does, with or without an agent: it ends an engine that the head may have given up."""
        machine, now_ms = self.owner.machine, self._world.now_ms
        for engine in list(machine.engines.values()):
            stop_after_ms = engine.order.stop_after_ms
            until_ms = max(engine.lease_until_ms, machine.lease_until_ms)
            is_over = stop_after_ms and now_ms >= until_ms + stop_after_ms + limits.SHIM_STOP_SLACK_MS
            if is_over and not engine.leaks_until_ms:
                self._world.note(f"{self.owner.name} shim of {engine.order.replica} ends it: no lease")
                self.end(engine, -9)

    def probe(self, effect: ef.ProbeReplica) -> None:
        """The engine is asked whether it is well."""
        self.owner.later(self._world.rng.randint(1, 100), "probe", lambda: self._probed(effect))

    def _probed(self, effect: ef.ProbeReplica) -> None:
        engine = self.owner.machine.engines.get(effect.order.replica)
        error: ErrorInfo | None = None
        if engine is None or engine.run != effect.run or engine.leaks_until_ms:
            error = errors.EngineNotReady("nobody answers").info()
        elif engine.is_hung:
            error = errors.Unhealthy("no answer in time").info()
        elif self._world.now_ms < engine.ready_ms:
            error = errors.EngineNotReady("loading").info()
        self.owner.take(ev.ReplicaProbed(effect.order.replica, effect.run, error))

    def check(self, effect: ef.RunHealthCheck) -> None:
        """A person asks, once."""
        engine = self.owner.machine.engines.get(effect.order.replica) if effect.order is not None else None
        error = None if engine is None or not engine.is_hung else errors.Unhealthy("hung").info()
        checked = ev.HealthChecked(effect.op_id, effect.generation, error)
        self.owner.later(self._world.rng.randint(1, 200), "check", lambda: self.owner.take(checked))
