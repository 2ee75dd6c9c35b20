"""The process of one load run: `python -m agent.runs.runner DIR`. Prepares, waits armed, begins at the given moment.

It has one thread and a session of its own, and talks through the files of DIR alone (directory.py): neither the end
of the agent nor that of the head touches it. It ends by itself when the run is over, when nobody fires it for too
long, and at the order's `stop_boottime_ns`.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from agent import outbound
from agent.loadgen.datasets import KINDS
from agent.loadgen.engine import NS, Tick
from agent.loadgen.order import Aim, Order, order_of, shares_of
from agent.loadgen.run import LEAD_NS, Crew, on_signals
from agent.loadgen.server_tokens import is_server
from agent.loadgen.vector_store import filled
from agent.mover.source_file import open_confined
from agent.runs.directory import TICKS_BYTES, Fire, LoadOrder, RunDirectory, Status
from common import limits, wire
from common.bench import outcome as results
from common.bench.spec import LoadSpec
from common.clock import boottime_ns
from common.errors import (
    Cancelled,
    DiskFull,
    Forbidden,
    HerderError,
    Internal,
    InvalidValue,
    MemoryFull,
    RunFailed,
    TimedOut,
)
from herder.decoding import UNREADABLE

ARMED_LOOK_S = 0.025
CANCEL_NS = 30 * NS  # after `stop_boottime_ns` answers are awaited for so long
_FILES = ("dataset", "tokenizer", "trace", "body", "vectors")


def monotonic_of(at_boottime_ns: int) -> int:
    """A moment of CLOCK_BOOTTIME on CLOCK_MONOTONIC; they differ by the time that the machine was suspended."""
    best_width, offset = 1 << 62, 0
    for _ in range(5):
        before = time.monotonic_ns()
        boottime = boottime_ns()
        after = time.monotonic_ns()
        if after - before < best_width:
            best_width, offset = after - before, boottime - (before + after) // 2
    return at_boottime_ns - offset


def confined(spec: LoadSpec, roots: list[Path], directory: Path) -> LoadSpec:
    """The spec with each of its files opened below a root, and named by what was opened.

    A name that is looked up again could lead elsewhere by then. So each file is reached through a link to our
    descriptor, which has the file's own name, because readers tell formats by it.

    Raises: Forbidden, InvalidValue, SourceNotFound, InvalidSource.
    """
    made: dict[str, str] = {}
    for field in _FILES:
        text = getattr(spec, field)
        if not text or (field == "tokenizer" and is_server(text)):
            continue
        name, colon, kind = text.rpartition(":")
        if field != "dataset" or not colon or kind not in KINDS:
            name, kind = text, ""
        if not roots:
            raise Forbidden(f"{field}: files are off on this node", hint="name the directories in its file_roots")
        if not name.startswith("/") or "\0" in name:
            raise InvalidValue(f"{field}: {name[:80]!r} is not an absolute path on the load nodes")
        descriptor = open_confined(Path(name), roots)
        link = directory / "files" / field / (Path(name).name or "file")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"/proc/self/fd/{descriptor}")
        made[field] = f"{link}:{kind}" if kind else str(link)
    return replace(spec, **made)


def guard_lookups() -> None:
    """From here on no name leads this process to an address that the agent's rules refuse.

    Every connection of a load generator begins with a lookup, of its targets as of a tokenizer's server; what a
    lookup gave is connected to, and not asked for again. Lookups then raise AddressRefused.
    """
    look_up = socket.getaddrinfo

    def checked(*place: Any, **how: Any) -> Any:
        found = look_up(*place, **how)
        for *_, address in found:
            outbound.refuse(str(address[0]))
        return found

    socket.getaddrinfo = checked


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what takes longer, in the main thread. Raises: TimedOut."""

    def over(number: int, frame: object) -> None:
        raise TimedOut(f"not prepared within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Seconds:
    """Gathers what the processes tell each second and writes it down as one line. Never fails its caller."""

    def __init__(self, path: Path, run: str, workers: int) -> None:
        self._run, self._workers = run, workers
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._gathered: dict[int, dict[int, Tick]] = {}  # second -> worker -> what it did

    def take(self, worker: int, tick: Tick) -> None:
        """A worker's last second."""
        second = round(tick.at_s)
        there = self._gathered.setdefault(second, {})
        before = there.get(worker)
        if before is not None:  # the rest after the last whole second
            tick.sent, tick.done, tick.failed = (
                before.sent + tick.sent,
                before.done + tick.done,
                before.failed + tick.failed,
            )
            tick.tokens, tick.ttft_ns = before.tokens + tick.tokens, before.ttft_ns + tick.ttft_ns
        there[worker] = tick
        for other in sorted(self._gathered):
            if len(self._gathered[other]) == self._workers or other < second - 1:
                self._write(other)

    def flush(self) -> None:
        """Writes what has not come together."""
        for second in sorted(self._gathered):
            self._write(second)

    def _write(self, second: int) -> None:
        ticks = list(self._gathered.pop(second).values())
        first_ns = sorted(ns for tick in ticks for ns in tick.ttft_ns)
        line = wire.RunTick(
            self._run,
            round(max(tick.at_s for tick in ticks), 3),
            sent=sum(tick.sent for tick in ticks),
            done=sum(tick.done - tick.failed for tick in ticks),
            failed=sum(tick.failed for tick in ticks),
            in_flight=sum(tick.in_flight for tick in ticks),
            tokens=sum(tick.tokens for tick in ticks),
            ttft_p50_ms=first_ns[len(first_ns) // 2] / 1e6 if first_ns else None,
            ttft_p99_ms=first_ns[len(first_ns) * 99 // 100] / 1e6 if first_ns else None,
        )
        try:
            if os.fstat(self._descriptor).st_size > TICKS_BYTES:
                os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, msgspec.json.encode(line) + b"\n")
        except OSError:
            pass  # seconds may be lost; a full disk is told when the result cannot be written


class Runner:
    """One run from its order to its result."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.status = Status("preparing")
        self.is_told_to_end = False
        self._cancel_ns = 0

    def run(self) -> int:
        """Everything. Returns the exit status."""
        try:
            self._say("preparing")
            self._run()
        except HerderError as error:
            self._fail(error)
        except (ValueError, *UNREADABLE) as error:
            self._fail(InvalidValue(str(error)[:1000]))
        except MemoryError:
            self._fail(MemoryFull("not enough memory on this node for what the run has to keep"))
        except OSError as error:
            self._fail(_as_ours(error))
        except Exception as error:  # noqa: BLE001  # the border of a process: what it was is told
            traceback.print_exc()
            self._fail(Internal(f"{type(error).__name__}: {error}"[:500]))
        return 1 if self.status.state != "ended" else 0

    def _run(self) -> None:
        found = self.directory.read("order.json", LoadOrder)
        if found is None:
            raise Internal("there is no order that can be read")
        if not found.allow_link_local:
            guard_lookups()
        with limited(limits.RUN_PREPARE_MS / 1000):
            order = self._prepare(found)
            shares = shares_of(order)
        count = order.tokenizer.count if order.tokenizer is not None else None
        seconds = Seconds(self.directory.path / "ticks.jsonl", found.run, len(shares))
        with filled(order.spec, order.targets[0]) as left:
            crew = Crew(shares, count_tokens=count, on_tick=seconds.take)
            try:
                with on_signals(lambda: self._stop(crew)):
                    self._arm(crew, order)
                    self._start(crew, self._await_fire(crew, found))
                    measured = crew.finish(lambda: self._look(crew, found))
            finally:
                crew.close()
                seconds.flush()
        measured.said += left
        if measured.lost_workers == len(shares):
            raise RunFailed(f"no process of the load generator came to its end: {'; '.join(measured.said)[:500]}")
        self._keep(order, measured)
        self._say("ended")

    def _prepare(self, found: LoadOrder) -> Order:
        spec = msgspec.convert(found.spec, LoadSpec)
        spec = confined(spec, [Path(root).resolve() for root in found.file_roots], self.directory.path)
        headers = (f"Authorization: Bearer {found.token}",) if found.token else ()
        client = (found.cert_file, found.key_file) if found.cert_file else None
        aim = Aim(found.urls, spread=found.spread, headers=headers, ca_file=found.ca_file or None, client=client)
        return order_of(spec, aim, part=found.part, parts=found.parts)

    def _arm(self, crew: Crew, order: Order) -> None:
        crew.arm()
        self._check_crew(crew)
        self._say("armed", digest=order.digest)

    def _await_fire(self, crew: Crew, order: LoadOrder) -> int:
        """The ordered start, on CLOCK_BOOTTIME."""
        until = boottime_ns() + limits.RUN_ARMED_MS * 1_000_000
        if order.stop_boottime_ns:
            until = min(until, order.stop_boottime_ns)
        while (fire := self.directory.read("fire.json", Fire)) is None:
            crew.hear(ARMED_LOOK_S)
            self._check_crew(crew)
            if self.is_told_to_end or self.directory.has("end.json"):
                raise Cancelled("ended before it began")
            if boottime_ns() > until:
                raise TimedOut("nobody said when to begin")
        return fire.start_boottime_ns

    def _check_crew(self, crew: Crew) -> None:
        if crew.lost:
            said = "; ".join(crew.outcome.said)[:500]
            raise RunFailed(f"{crew.lost} processes of the load generator ended before the start: {said}")

    def _start(self, crew: Crew, asked_ns: int) -> None:
        start_ns = monotonic_of(asked_ns)
        late_ms = 0
        if start_ns < time.monotonic_ns():
            start_ns = time.monotonic_ns() + LEAD_NS
            late_ms = max(1, (start_ns - monotonic_of(asked_ns)) // 1_000_000)
            crew.outcome.said.append(f"it began at once, {late_ms} ms after the ordered start, which had passed")
        crew.start(start_ns)
        begun_ns = asked_ns + start_ns - monotonic_of(asked_ns) if late_ms else asked_ns
        self._say("running", start_boottime_ns=begun_ns, late_ms=late_ms)

    def _look(self, crew: Crew, order: LoadOrder) -> None:
        """Whether it is to end; called all the time while load runs."""
        now = boottime_ns()
        if not self.is_told_to_end and self.directory.has("end.json"):
            self._log("told to finish")
            self._stop(crew)
        if order.stop_boottime_ns and now > order.stop_boottime_ns and not self._cancel_ns:
            self._cancel_ns = now + CANCEL_NS
            crew.outcome.said.append("it ended at its stop_after")
            if not self.is_told_to_end:
                self._stop(crew)
        if self._cancel_ns and now > self._cancel_ns:
            self._cancel_ns = now + CANCEL_NS
            crew.stop()

    def _stop(self, crew: Crew) -> None:
        self.is_told_to_end = True
        crew.stop()

    def _keep(self, order: Order, measured: results.Outcome) -> None:
        data = results.encode(order.asked, measured)
        path = self.directory.path / "load.bin"
        part = path.with_name(".load.bin.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DiskFull(f"{len(data):,} bytes of results cannot be written: {error.strerror}") from None

    def _fail(self, error: HerderError) -> None:
        try:
            self._say("failed", error=error)
        except OSError as trouble:
            self._log(f"and this cannot be written down: {trouble.strerror}")

    def _say(self, state: str, *, error: HerderError | None = None, **told: object) -> None:
        self.status = replace(self.status, state=state, error=error.info() if error is not None else None, **told)
        self._log(f"{state}{f': {error.code}: {error.message}' if error is not None else ''}")
        self.directory.write("status.json", self.status, is_durable=state in ("ended", "failed"))

    def _log(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")
        sys.stderr.flush()


def _as_ours(error: OSError) -> HerderError:
    if isinstance(error, socket.gaierror):
        return InvalidValue(f"{error.filename or 'a host of the run'} has no address here: {error.strerror}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("the run's directory cannot be written: no room")
    name = Path(error.filename).name if isinstance(error.filename, str) else ""
    return RunFailed(f"{name}: {error.strerror}" if name else str(error)[:500])


def main() -> None:
    """Performs the run of the directory that the command line names."""
    os.umask(0o077)
    sys.exit(Runner(Path(sys.argv[1])).run())


if __name__ == "__main__":
    main()
