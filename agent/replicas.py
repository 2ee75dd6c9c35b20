"""Engines as processes: spawns shims, finds them again, watches them by pidfd, signals, sweeps, probes.

The core decides; this does one thing per effect and answers with one event. Blocking work (files, /proc, spawning)
runs in threads. When this process ends, nothing happens to the engines.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from msgspec.structs import replace

from agent import procs
from agent.core import effects as fx
from agent.core import events as ev
from agent.logs import last_lines
from agent.run_files import RunFiles
from agent.runtimes.base import Runtime, Setting, scrubbed
from agent.runtimes.health import WILDCARDS, GuardedResolver, check_outside, probe
from common import limits, wire
from common.clock import boottime_ms
from common.errors import CopyNotFound, EngineFailed, EngineMissing, ErrorInfo, HerderError, PortTaken
from common.manifest import Manifest
from common.tasks import Supervisor
from common.telemetry import fields

log = logging.getLogger(__name__)
SHIM = Path(__file__).with_name("shim.py")
SPAWN_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 5.0
GPU_TIMEOUT_S = 10.0  # how long a driver may take to give memory back
EXIT_FILE_TIMEOUT_S = 2.0
MEASURE_MS = 15_000
PORT_TRIES = 200


@dataclass(slots=True)
class Engine:
    """A run whose shim is watched."""

    replica: str
    run: int
    shim_pid: int
    shim_ticks: int
    pid: int  # of the engine itself
    ticks: int
    port: int
    is_child: bool = False  # the shim is ours to reap
    pidfd: int = -1
    has_gpus: bool = False
    pids: frozenset[int] = frozenset()  # processes seen, by which GPU memory is looked for after their end
    measured_ms: int = 0
    memory: tuple[int, int] = (0, 0)


class Replicas:
    """The engines of this node."""

    def __init__(
        self,
        files: RunFiles,
        runtimes: dict[str, Runtime],
        post: Callable[[ev.Event], None],
        tasks: Supervisor,
        *,
        engine_host: str = "127.0.0.1",
        advertise: Callable[[], str] = lambda: "",
        gpu_memory: Callable[[list[int]], int] = lambda pids: 0,
        rng: random.Random | None = None,
        ports: tuple[int, int] = limits.PORT_RANGE,
        pass_env: tuple[str, ...] = (),
        allow_link_local: bool = False,
    ) -> None:
        self.engines: dict[str, Engine] = {}  # by replica
        self._files = files
        self._runtimes = runtimes
        self._post = post
        self._tasks = tasks
        self._engine_host = engine_host
        self._advertise = advertise
        self._gpu_memory = gpu_memory
        self._rng = rng or random.Random()
        self._ports = ports
        self._pass_env = pass_env
        self._allow_link_local = allow_link_local
        self._taken: set[int] = set()  # ports given to engines that are starting or running
        self._http: aiohttp.ClientSession | None = None
        self._outside: aiohttp.ClientSession | None = None  # for addresses that people name
        self._sessions: tuple[int, dict[int, list[procs.Process]]] = (-MEASURE_MS, {})

    async def start(self) -> None:
        """Makes what needs a running loop."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.PROBE_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a kept connection would hide a new process
        self._http = aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False)
        resolver = None if self._allow_link_local else GuardedResolver()
        outside = aiohttp.TCPConnector(limit=0, force_close=True, use_dns_cache=False, resolver=resolver)
        self._outside = aiohttp.ClientSession(timeout=timeout, connector=outside, trust_env=False)

    async def close(self) -> None:
        """Stops watching. Engines stay."""
        for engine in list(self.engines.values()):
            self._unwatch(engine)
        for session in (self._http, self._outside):
            if session is not None:
                await session.close()

    def spawn(self, effect: fx.SpawnReplica) -> None:
        """SpawnReplica."""
        self._tasks.start(f"spawn-{effect.order.replica}-{effect.run}", self._spawn(effect))

    def attach(self, effect: fx.AttachReplica) -> None:
        """AttachReplica."""
        self._tasks.start(f"attach-{effect.order.replica}-{effect.run}", self._attach(effect))

    def signal(self, effect: fx.SignalReplica) -> None:
        """SignalReplica."""
        work = self._kill(effect.replica, effect.run) if effect.is_kill else self._terminate(effect)
        self._tasks.start(f"signal-{effect.replica}-{effect.run}", work)

    def probe(self, effect: fx.ProbeReplica) -> None:
        """ProbeReplica."""
        self._tasks.start(f"probe-{effect.order.replica}-{effect.run}", self._probe(effect))

    def check(self, effect: fx.RunHealthCheck) -> None:
        """RunHealthCheck."""
        self._tasks.start(f"check-{effect.op_id}", self._check(effect))

    def forget(self, effect: fx.ForgetReplica) -> None:
        """ForgetReplica."""
        self._tasks.start(f"forget-{effect.replica}", asyncio.to_thread(self._files.forget, effect.replica))

    # starting
    async def _spawn(self, effect: fx.SpawnReplica) -> None:
        order, run = effect.order, effect.run
        port = 0
        try:
            port = self._choose_port(order)
            engine = await asyncio.to_thread(self._start_shim, effect, port)
        except (HerderError, OSError) as error:
            self._taken.discard(port)
            info = error.info() if isinstance(error, HerderError) else EngineFailed(str(error)[:300]).info()
            if isinstance(error, PortTaken | CopyNotFound):  # whoever holds it may be closing; it is fetched again
                info = replace(info, is_retryable=True)
            log.error("an engine did not start", extra=fields(replica=order.replica, run=run, error=info.message))
            self._post(ev.ReplicaSpawnFailed(order.replica, run, info))
            return
        self._watch(engine)
        self._post(ev.ReplicaStarted(order.replica, run, engine.pid, engine.ticks, self._reported_host(), port))

    def _reported_host(self) -> str:
        if self._engine_host not in WILDCARDS:
            return self._engine_host
        return self._advertise() or self._engine_host

    def _choose_port(self, order: wire.EnsureReplica) -> int:
        if order.port:
            if not _is_free(self._engine_host, order.port):
                raise PortTaken(f"port {order.port} is in use on this node", port=order.port)
            self._taken.add(order.port)
            return order.port
        low, high = self._ports
        for _ in range(PORT_TRIES):
            port = self._rng.randint(low, high)
            if port not in self._taken and _is_free(self._engine_host, port):
                self._taken.add(port)
                return port
        raise EngineFailed(f"no free port found in {low}..{high}")

    def _start_shim(self, effect: fx.SpawnReplica, port: int) -> Engine:
        order, run = effect.order, effect.run
        runtime = self._runtimes.get(order.runtime)
        if runtime is None:
            raise EngineMissing(f"this agent has no runtime {order.runtime!r}", known=sorted(self._runtimes))
        check_files(effect.directory, effect.manifest)
        self._files.remember(order.replica)
        directory, key_file = self._files.make(order.replica, run, api_key=order.api_key)
        setting = Setting(order, self._engine_host, port, str(directory), effect.directory, effect.manifest, key_file)
        launch = runtime.launch(setting)
        env = {
            **scrubbed(os.environ, pass_env=self._pass_env),
            **launch.env,
            procs.MARK: self._files.mark(order.replica, run),
        }
        spec = self._files.write_spec(directory, launch.argv, env, self._reported_host(), port, order)
        mark = env[procs.MARK]
        pid = _spawn_shim(spec, directory / "shim.err", mark)
        deadline = time.monotonic() + SPAWN_TIMEOUT_S
        while (identity := self._files.identity(order.replica, run)) is None:
            ended = self._files.exit(order.replica, run)
            if ended is not None:
                _reap(pid, within_s=KILL_TIMEOUT_S)
                raise EngineMissing(f"the engine could not be executed: {ended.error}"[:400])
            if _reap(pid):
                said = (directory / "shim.err").read_text(errors="replace")[-300:]
                raise EngineFailed(f"the shim ended before the engine was executed: {said}")
            if time.monotonic() > deadline:
                procs.kill_all(pid, mark, within_s=KILL_TIMEOUT_S)
                _reap(pid, within_s=KILL_TIMEOUT_S)
                raise EngineFailed(f"the engine was not executed within {SPAWN_TIMEOUT_S:g} s")
            time.sleep(0.005)
        return Engine(
            order.replica,
            run,
            pid,
            identity.shim_ticks,
            identity.pid,
            identity.ticks,
            port,
            is_child=True,
            has_gpus=bool(order.gpu_uuids),
        )

    # finding again
    async def _attach(self, effect: fx.AttachReplica) -> None:
        order, run = effect.order, effect.run
        found = await asyncio.to_thread(self._find_again, effect)
        if found is not None:
            self._taken.add(found.port)
            self._watch(found)
            spec = await asyncio.to_thread(self._files.spec, order.replica, run)
            host = effect.host or (spec.host if spec is not None else "") or self._reported_host()
            self._post(ev.ReplicaStarted(order.replica, run, found.pid, found.ticks, host, found.port))
            return
        if await asyncio.to_thread(self._files.spec, order.replica, run) is None and not effect.pid:
            error = EngineFailed("the agent ended before the engine was started").info()
            self._post(ev.ReplicaSpawnFailed(order.replica, run, error))
            return
        await self._ended(order.replica, run, has_gpus=bool(order.gpu_uuids))

    def _find_again(self, effect: fx.AttachReplica) -> Engine | None:
        """The run's shim, if exactly it is still there. A shim may be so young that it has written nothing yet."""
        order, run = effect.order, effect.run
        deadline = time.monotonic() + EXIT_FILE_TIMEOUT_S
        while (identity := self._files.identity(order.replica, run)) is None:
            is_young = procs.members(0, self._files.mark(order.replica, run))
            if not is_young or time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        spec = self._files.spec(order.replica, run)
        if identity.boot_id != procs.boot_id() or not procs.is_running(identity.shim_pid, identity.shim_ticks):
            return None
        return Engine(
            order.replica,
            run,
            identity.shim_pid,
            identity.shim_ticks,
            identity.pid,
            identity.ticks,
            effect.port or (spec.port if spec is not None else 0),
            has_gpus=bool(order.gpu_uuids),
        )

    async def kill_orphans(self, known: set[str]) -> None:
        """Ends engines that no task speaks of (the ledger was lost): nobody would ever stop them."""
        for replica, run in await asyncio.to_thread(self._files.unfinished):
            if replica in known:
                continue
            mark = self._files.mark(replica, run)
            if await asyncio.to_thread(procs.members, 0, mark):
                log.warning("an engine without an order is ended", extra=fields(replica=replica, run=run))
                await asyncio.to_thread(procs.kill_all, 0, mark, within_s=KILL_TIMEOUT_S)

    # watching
    def _watch(self, engine: Engine) -> None:
        self.engines[engine.replica] = engine
        loop = asyncio.get_running_loop()
        try:
            engine.pidfd = os.pidfd_open(engine.shim_pid)
        except ProcessLookupError:
            self._noticed(engine)
            return
        if not engine.is_child and not procs.is_running(engine.shim_pid, engine.shim_ticks):
            os.close(engine.pidfd)  # another process has the number now
            engine.pidfd = -1
            self._noticed(engine)
            return
        loop.add_reader(engine.pidfd, self._noticed, engine)

    def _unwatch(self, engine: Engine) -> None:
        if engine.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(engine.pidfd)
            os.close(engine.pidfd)
            engine.pidfd = -1

    def _noticed(self, engine: Engine) -> None:
        """The shim has ended. A child is reaped only after the sweep: till then its session's number is taken."""
        self._unwatch(engine)
        work = self._ended(engine.replica, engine.run, has_gpus=engine.has_gpus, session=engine.shim_pid)
        self._tasks.start(f"ended-{engine.replica}-{engine.run}", work)

    async def _ended(self, replica: str, run: int, *, has_gpus: bool, session: int = 0) -> None:
        """Makes sure that nothing of a run is left, and says how it ended."""
        engine = self.engines.get(replica)
        if session and engine is not None and not await asyncio.to_thread(_is_still, session, engine.shim_ticks):
            session = 0
        pids = engine.pids if engine is not None and engine.run == run and has_gpus else frozenset()
        event = await asyncio.to_thread(self._sweep, replica, run, session, pids)
        if engine is not None and engine.run == run and not event.left and not event.gpu_bytes_left:
            del self.engines[replica]
            self._taken.discard(engine.port)
            if engine.is_child:
                _reap(engine.shim_pid)
        self._post(event)

    def _sweep(self, replica: str, run: int, session: int, pids: frozenset[int]) -> ev.ReplicaExited:
        left = procs.kill_all(session, self._files.mark(replica, run), within_s=KILL_TIMEOUT_S)
        deadline = time.monotonic() + GPU_TIMEOUT_S
        while (gpu_bytes := self._gpu_memory(sorted(pids)) if pids else 0) and time.monotonic() < deadline:
            time.sleep(0.2)
        directory = self._files.directory(replica, run)
        ended = self._files.exit(replica, run)
        return ev.ReplicaExited(
            replica,
            run,
            exit_code=ended.exit_code if ended is not None else None,
            last_log=last_lines(directory),
            left=tuple(left),
            gpu_bytes_left=gpu_bytes,
            halted=ended.halted if ended is not None else "",
        )

    # ending
    async def _terminate(self, effect: fx.SignalReplica) -> None:
        engine = self.engines.get(effect.replica)
        if engine is None or engine.run != effect.run:
            return  # it has ended; its ReplicaExited is on the way
        if engine.has_gpus:
            mark = self._files.mark(engine.replica, engine.run)
            members = await asyncio.to_thread(procs.members, engine.shim_pid, mark)
            engine.pids |= {process.pid for process in members}
        try:
            if procs.is_running(engine.shim_pid, engine.shim_ticks):
                os.kill(engine.shim_pid, signal.SIGTERM)  # the shim passes it on to the engine's group
        except ProcessLookupError:
            pass  # ended this moment

    async def _kill(self, replica: str, run: int) -> None:
        """Kills the engine's processes; the shim then writes how it ended, else it is killed too."""
        engine = self.engines.get(replica)
        mark = self._files.mark(replica, run)
        if engine is None or engine.run != run:
            await self._ended(replica, run, has_gpus=False)
            return
        if engine.pidfd < 0:  # the shim has ended before, something was left
            await self._ended(replica, run, has_gpus=engine.has_gpus, session=engine.shim_pid)
            return
        left = await asyncio.to_thread(
            procs.kill_all, engine.shim_pid, mark, within_s=KILL_TIMEOUT_S, keep=engine.shim_pid
        )
        if left:
            log.error("SIGKILL did not end an engine", extra=fields(replica=replica, pids=left))
            return  # stuck in the kernel; the core repeats
        for _ in range(int(EXIT_FILE_TIMEOUT_S / 0.05)):
            if engine.pidfd < 0:
                return
            await asyncio.sleep(0.05)
        if procs.is_running(engine.shim_pid, engine.shim_ticks):
            os.kill(engine.shim_pid, signal.SIGKILL)  # its pidfd then tells

    # asking
    async def _probe(self, effect: fx.ProbeReplica) -> None:
        order = effect.order
        runtime = self._runtimes.get(order.runtime)
        host = "127.0.0.1" if self._engine_host in WILDCARDS else effect.host
        assert self._http is not None
        error = await probe(self._http, runtime, order, host, effect.port, with_canary=effect.with_canary)
        memory, gpu_memory = await self._measure(order.replica, effect.run)
        self._post(ev.ReplicaProbed(order.replica, effect.run, error, memory, gpu_memory))

    async def _measure(self, replica: str, run: int) -> tuple[int, int]:
        """Resident and GPU memory of a run, looked at now and then."""
        engine = self.engines.get(replica)
        now_ms = boottime_ms()
        if engine is None or engine.run != run:
            return 0, 0
        if engine.measured_ms and now_ms - engine.measured_ms < MEASURE_MS:
            return engine.memory
        if now_ms - self._sessions[0] > MEASURE_MS // 2 or engine.shim_pid not in self._sessions[1]:
            self._sessions = (now_ms, await asyncio.to_thread(procs.sessions))
        members = self._sessions[1].get(engine.shim_pid, [])
        resident = sum(process.resident_bytes for process in members)
        pids = [process.pid for process in members]
        engine.pids = frozenset(pids)
        gpu = await asyncio.to_thread(self._gpu_memory, pids) if engine.has_gpus else 0
        engine.measured_ms, engine.memory = now_ms, (resident, gpu)
        return engine.memory

    async def _check(self, effect: fx.RunHealthCheck) -> None:
        assert self._http is not None
        started_ms = boottime_ms()
        error: ErrorInfo | None
        if effect.order is not None:
            health = replace(effect.order.health, timeout_s=effect.timeout_s)
            order = replace(effect.order, health=health)
            host = "127.0.0.1" if self._engine_host in WILDCARDS else effect.host
            runtime = self._runtimes.get(order.runtime)
            error = await probe(self._http, runtime, order, host, effect.port, with_canary=bool(health.canary))
        else:
            assert self._outside is not None
            error = await check_outside(
                self._outside, effect.url, effect.timeout_s, allow_link_local=self._allow_link_local
            )
        detail = {"took_ms": boottime_ms() - started_ms}
        self._post(ev.HealthChecked(effect.op_id, effect.generation, error, detail))


def _spawn_shim(spec: Path, errors_path: Path, mark: str) -> int:
    """Starts a shim in a session of its own, without our files and environment; returns its pid."""
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", str(SHIM), str(spec)],
        {"PATH": os.defpath, procs.MARK: mark},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(errors_path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        ],
        setsid=True,
        setsigmask=(),
    )


def check_files(directory: str, manifest: Manifest | None) -> None:
    """That the model's files are there, at their size: an engine's own complaint would name the wrong culprit.

    Raises: CopyNotFound.
    """
    if not directory:
        return
    if not os.path.isdir(directory):
        raise CopyNotFound(f"{directory} is not there any more")
    for file in manifest.files if manifest is not None else ():
        try:
            size = os.stat(os.path.join(directory, file.path)).st_size
        except OSError as error:
            raise CopyNotFound(f"{file.path} of the copy cannot be read: {error.strerror}") from None
        if size != file.size:
            raise CopyNotFound(f"{file.path} of the copy has {size} bytes, not {file.size}")


def _reap(pid: int, within_s: float = 0.0) -> bool:
    """Collects a child that has ended; False while it runs."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)


def _is_still(session: int, shim_ticks: int) -> bool:
    """Whether a session's number was not given to another leader since."""
    leader = procs.read_process(session)
    return leader is None or leader.start_ticks == shim_ticks


def _is_free(host: str, port: int) -> bool:
    """Whether an engine could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError:
            return False
    return True
