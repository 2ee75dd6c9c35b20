"""Runs as processes: makes them, finds them again, reads what they write, ends them, sends what they measured.

The core decides; this does one thing per effect and answers with events. What concerns one run is done one after the
other, blocking work in threads. Files are looked at while runs are there, and never else. When this process ends,
nothing happens to the runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from agent import procs
from agent.core import effects as fx
from agent.core import events as ev
from agent.mover_client import child_env
from agent.runs.directory import LOG, About, Fire, Identity, LoadOrder, RunDirectories, Status
from agent.runs.upload import Uploader
from agent.runtimes.base import scrubbed
from agent.tls import TlsConfig
from common import wire
from common.clock import boottime_ns
from common.errors import DiskFull, ErrorInfo, HerderError, RunFailed
from common.tasks import Supervisor
from common.telemetry import fields

log = logging.getLogger(__name__)
LOOK_S = 0.25
KILL_S = 5.0
READY_S = 20.0  # a monitor has begun by then
MODULES = {"load": ("agent.runs.runner",), "monitor": ("agent.monitor", "--run")}
_PYTHON: tuple[str, ...] = ("PYTHONPATH", "PYTHONSAFEPATH")
REQUIRED = {"load": "load.bin", "monitor": "monitor.csv"}


@dataclass(slots=True)
class Live:
    """A run whose process is watched."""

    run: str
    generation: int
    kind: str
    pid: int
    ticks: int
    is_child: bool
    pidfd: int = -1
    offset: int = 0  # of the seconds read so far
    stamp: tuple[int, int] = (0, 0)  # of the status read last
    error: ErrorInfo | None = None  # why it had to be killed


@dataclass(frozen=True, slots=True)
class Look:
    """What was found in a run's files."""

    status: Status | None
    begin: int  # of the seconds, as Live.offset
    offset: int
    ticks: list[wire.RunTick]


@dataclass(slots=True)
class Totals:
    """What load generators of this agent process did, for /metrics."""

    sent: int = 0
    failed: int = 0
    in_flight: dict[str, int] = field(default_factory=dict)  # by run


class Runs:
    """The runs of this node."""

    def __init__(
        self,
        files: RunDirectories,
        post: Callable[[ev.Event], None],
        tasks: Supervisor,
        uploader: Uploader,
        *,
        send_tick: Callable[[wire.RunTick], None] = lambda tick: None,
        file_roots: tuple[str, ...] = (),
        allow_link_local: bool = False,
        tls: TlsConfig | None = None,
    ) -> None:
        self.live: dict[str, Live] = {}
        self.totals = Totals()
        self._files = files
        self._post = post
        self._tasks = tasks
        self._uploader = uploader
        self._send_tick = send_tick
        self._file_roots = file_roots
        self._allow_link_local = allow_link_local
        self._tls = tls or TlsConfig()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._uploads: dict[str, asyncio.Task[None]] = {}
        self._is_looking = False

    async def start(self, known: Collection[str]) -> None:
        """Ends processes that no run speaks of (the ledger was lost), and removes what they left long ago."""
        for run in await asyncio.to_thread(self._files.names):
            if run in known:
                continue
            if found := await asyncio.to_thread(procs.members, 0, self._files.mark(run)):
                log.warning("a run without an order is ended", extra=fields(run=run, pids=len(found)))
                await self._kill(run)
        await asyncio.to_thread(self._files.prune, known)

    def close(self) -> None:
        """Stops watching. Runs go on."""
        for live in list(self.live.values()):
            self._unwatch(live)

    def perform(self, effect: fx.RunEffect) -> None:
        """Begins what the effect asks; what concerns one run is done in the order in which it was asked for."""
        match effect:
            case fx.SpawnRun():
                self._do(effect.order.run, "spawn", self._spawn(effect))
            case fx.AttachRun():
                self._do(effect.run, "attach", self._attach(effect))
            case fx.StartRun():
                document = Fire(effect.start_boottime_ns)
                self._do(effect.run, "fire", self._write(effect.run, effect.generation, "fire.json", document))
            case fx.SignalRun():
                self._do(effect.run, "signal", self._kill(effect.run) if effect.is_kill else self._finish(effect))
            case fx.UploadRun():
                self._uploads[effect.run] = self._tasks.start(f"run-{effect.run}-upload", self._upload(effect))
            case fx.ForgetRun():
                upload = self._uploads.pop(effect.run, None)
                if upload is not None:
                    upload.cancel()
                self._do(effect.run, "forget", self._forget(effect.run))
            case _:
                log.error("an effect that nobody performs", extra=fields(effect=type(effect).__name__))

    def _do(self, run: str, name: str, work: Coroutine[Any, Any, object]) -> None:
        self._tasks.start(f"run-{run}-{name}", self._in_turn(run, work))

    async def _in_turn(self, run: str, work: Coroutine[Any, Any, object]) -> None:
        """What concerns one run, in the order in which it was asked for."""
        try:
            lock = self._locks.setdefault(run, asyncio.Lock())
            async with lock:
                await work
        finally:
            work.close()  # where it was cancelled before its turn

    # making and finding
    async def _spawn(self, effect: fx.SpawnRun) -> None:
        order = effect.order
        try:
            live = await asyncio.to_thread(self._make, order, effect.generation)
        except (HerderError, OSError) as error:
            info = _info_of(error)
            log.error("a run did not start", extra=fields(run=order.run, error=info.message))
            self._post(ev.RunEnded(order.run, effect.generation, was_there=False, error=info))
            return
        self._post(ev.RunStarted(order.run, effect.generation, live.pid, live.ticks))
        self._watch(live)

    def _make(self, order: wire.EnsureRun, generation: int) -> Live:
        mark = self._files.mark(order.run)
        left = procs.kill_all(0, mark, within_s=KILL_S)
        if left:
            raise RunFailed(f"processes of an earlier run of this name do not end: {left}")
        about = About(order.run, generation, order.kind)
        directory = self._files.make(about, self._order_of(order))
        program = MODULES[order.kind]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", *program, str(directory.path)],
            _environment(mark),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, directory.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE),
        )
        process = procs.read_process(pid)  # a zombie at worst: nobody else collects it
        ticks = process.start_ticks if process is not None else 0
        directory.write("pid.json", Identity(procs.boot_id(), pid, ticks))
        return Live(order.run, generation, order.kind, pid, ticks, is_child=True)

    def _order_of(self, order: wire.EnsureRun) -> object:
        if order.kind == "monitor":
            return {**order.spec, "stop_after_s": order.stop_after_ms / 1000}
        stop_ns = 0
        if order.stop_after_ms:
            stop_ns = boottime_ns() + order.stop_after_ms * 1_000_000
        tls = self._tls if order.token else TlsConfig()  # the gateway's, which is the head's own
        return LoadOrder(
            order.run,
            order.spec,
            order.urls,
            part=order.part,
            parts=order.parts,
            spread=order.spread,
            token=order.token,
            stop_boottime_ns=stop_ns,
            file_roots=self._file_roots,
            allow_link_local=self._allow_link_local,
            ca_file=tls.ca,
            cert_file=tls.cert,
            key_file=tls.key,
        )

    async def _attach(self, effect: fx.AttachRun) -> None:
        run, generation = effect.run, effect.generation
        was_there, live = await asyncio.to_thread(self._find_again, effect)
        if live is not None:
            self._post(ev.RunStarted(run, generation, live.pid, live.ticks))
            self._watch(live)
        elif was_there:
            await self._ended(Live(run, generation, effect.kind, 0, 0, is_child=False))
        else:
            self._post(ev.RunEnded(run, generation, was_there=False))

    def _find_again(self, effect: fx.AttachRun) -> tuple[bool, Live | None]:
        """Whether there are traces of a process of this run, and the process if exactly it is still there."""
        directory = self._files.of(effect.run)
        about = directory.read("about.json", About)
        if about is None or about.generation != effect.generation:
            return False, None
        identity = directory.read("pid.json", Identity)
        if identity is not None and identity.boot_id == procs.boot_id():
            if not procs.is_running(identity.pid, identity.ticks):
                return True, None
            pid, ticks = identity.pid, identity.ticks
        else:  # made by an agent that ended before it could write it down
            found = [one for one in procs.members(0, self._files.mark(effect.run)) if one.pid == one.session]
            if not found:
                return identity is not None or directory.has("status.json"), None
            pid, ticks = found[0].pid, found[0].start_ticks
        offset, _ = directory.ticks(0)
        return True, Live(effect.run, effect.generation, about.kind, pid, ticks, is_child=False, offset=offset)

    # watching
    def _watch(self, live: Live) -> None:
        self.live[live.run] = live
        try:
            live.pidfd = os.pidfd_open(live.pid)
        except ProcessLookupError:
            self._noticed(live)
            return
        if not live.is_child and not procs.is_running(live.pid, live.ticks):
            self._noticed(live)  # another process has the number now
            return
        asyncio.get_running_loop().add_reader(live.pidfd, self._noticed, live)
        if not self._is_looking:
            self._is_looking = True
            self._tasks.start("runs-look", self._look())

    def _unwatch(self, live: Live) -> None:
        if live.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(live.pidfd)
            os.close(live.pidfd)
            live.pidfd = -1

    def _noticed(self, live: Live) -> None:
        self._unwatch(live)
        self._do(live.run, "ended", self._ended(live))

    async def _look(self) -> None:
        """Tells what the processes write, a few times a second, until there are none."""
        try:
            while self.live:
                for live in list(self.live.values()):
                    self._tell(live, await asyncio.to_thread(self._read, live))
                await asyncio.sleep(LOOK_S)
        finally:
            self._is_looking = False

    def _read(self, live: Live) -> Look:
        """The status where it is a new one, and new seconds."""
        directory = self._files.of(live.run)
        status = None
        try:
            found = (directory.path / "status.json").stat()
            stamp = (found.st_ino, found.st_mtime_ns)
        except OSError:
            stamp = (0, 0)
        if stamp not in ((0, 0), live.stamp):
            status = directory.status()
            live.stamp = stamp
        begin = live.offset
        offset, ticks = directory.ticks(begin)
        directory.bound_log()
        return Look(status, begin, offset, ticks)

    def _tell(self, live: Live, look: Look) -> bool:
        """False when another look has told these seconds meanwhile."""
        if self.live.get(live.run) is not live:
            return True  # it has ended while its files were read
        if look.status is not None and look.status.state in ("armed", "running"):
            self._post(_said(live, look.status))
        if live.offset != look.begin:
            return False
        live.offset = look.offset
        for tick in look.ticks:
            self.totals.sent += tick.sent
            self.totals.failed += tick.failed
            self.totals.in_flight[live.run] = tick.in_flight
            self._send_tick(tick)
        return True

    async def _ended(self, live: Live) -> None:
        """Makes sure that nothing of the run's processes is left, and says how it ended."""
        if self.live.get(live.run) is live:
            while not self._tell(live, await asyncio.to_thread(self._read, live)):
                pass
            self.live.pop(live.run, None)
        self.totals.in_flight.pop(live.run, None)
        left, status, last_log = await asyncio.to_thread(self._sweep, live)
        if left:
            log.error("SIGKILL did not end what a run left behind", extra=fields(run=live.run, pids=left))
        said = _said(live, status) if status is not None else None
        exit_code = _reap(live.pid) if live.is_child else None
        self._post(
            ev.RunEnded(live.run, live.generation, said, exit_code=exit_code, last_log=last_log, error=live.error)
        )

    def _sweep(self, live: Live) -> tuple[list[int], Status | None, tuple[str, ...]]:
        left = procs.kill_all(_session_of(live), self._files.mark(live.run), within_s=KILL_S)
        directory = self._files.of(live.run)
        directory.tidy()
        return left, directory.status(), directory.last_lines()

    # telling and ending
    async def _write(self, run: str, generation: int, name: str, document: object) -> None:
        """Tells a process something; one that cannot be told is killed, so that nobody waits for it."""
        directory = self._files.of(run)
        about = await asyncio.to_thread(directory.read, "about.json", About)
        if about is None or about.generation != generation:
            return
        try:
            await asyncio.to_thread(directory.write, name, document)
        except OSError as error:
            live = self.live.get(run)
            if live is not None:
                live.error = _info_of(error)
            await self._kill(run)

    async def _finish(self, effect: fx.SignalRun) -> None:
        await self._write(effect.run, effect.generation, "end.json", {"how": "finish"})
        live = self.live.get(effect.run)
        if live is None or live.kind != "monitor":
            return
        for _ in range(int(READY_S / LOOK_S)):  # SIGTERM before it has a handler would end it without its files
            if live.run not in self.live or live.stamp != (0, 0):
                break
            await asyncio.sleep(LOOK_S)
        if procs.is_running(live.pid, live.ticks):
            os.kill(live.pid, signal.SIGTERM)

    async def _kill(self, run: str, live: Live | None = None) -> list[int]:
        session = _session_of(live or self.live.get(run))
        return await asyncio.to_thread(procs.kill_all, session, self._files.mark(run), within_s=KILL_S)

    async def _forget(self, run: str) -> None:
        live = self.live.pop(run, None)
        self.totals.in_flight.pop(run, None)
        if live is not None:
            self._unwatch(live)
        left = await self._kill(run, live)
        if live is not None and live.is_child:
            _reap(live.pid)
        if not left:
            try:
                await asyncio.to_thread(self._files.remove, run)
            except OSError as error:
                log.error("a run's directory cannot be removed", extra=fields(run=run, error=str(error)))
        self._post(ev.RunForgotten(run, tuple(left)))

    # what it measured
    async def _upload(self, effect: fx.UploadRun) -> None:
        directory = self._files.of(effect.run)
        sent: list[str] = []
        error: ErrorInfo | None = None
        try:
            names = await asyncio.to_thread(directory.artifacts, effect.kind)
            if REQUIRED[effect.kind] not in names:
                raise RunFailed(f"{REQUIRED[effect.kind]} is not there any more")
            for name in names:
                await self._uploader.send(effect.run, directory.path / name)
                sent.append(name)
        except HerderError as failure:
            error = failure.info()
        except OSError as failure:
            error = RunFailed(f"what was measured cannot be read: {failure.strerror}").info()
        self._uploads.pop(effect.run, None)
        self._post(ev.RunUploaded(effect.run, effect.generation, tuple(sent), error))


def _session_of(live: Live | None) -> int:
    """The session of a run's processes; 0 when its number may be another's by now.

    The mark alone misses a process that was just made: to Linux its environment is empty until exec has ended, while
    whoever made it goes on already.
    """
    process = procs.read_process(live.pid) if live is not None else None
    is_same = live is not None and process is not None and process.start_ticks == live.ticks
    return process.session if process is not None and is_same else 0


def _environment(mark: str) -> dict[str, str]:
    """Of the agent's what engines get too, and where our own packages are."""
    ours = child_env()
    kept: dict[str, str] = {name: ours[name] for name in _PYTHON if name in ours}
    return {**scrubbed(os.environ), **kept, procs.MARK: mark}


def _said(live: Live, status: Status) -> ev.RunSaid:
    return ev.RunSaid(
        live.run,
        live.generation,
        status.state,
        digest=status.digest,
        start_boottime_ns=status.start_boottime_ns,
        late_ms=status.late_ms,
        error=status.error,
    )


def _info_of(error: Exception) -> ErrorInfo:
    if isinstance(error, HerderError):
        return error.info()
    return DiskFull(f"the run's directory cannot be written: {getattr(error, 'strerror', None) or error}").info()


def _reap(pid: int) -> int | None:
    """Collects a child that has been killed or has ended; gives its exit code, None when nobody knows it."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found == pid else None
