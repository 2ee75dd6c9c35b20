"""A run on this machine: processes forked from one that has prepared everything, armed, started together, merged.

The caller must be a process of one thread. Each worker opens its connections and says that it is ready; when all are,
the common start is set ahead on CLOCK_MONOTONIC, which they share: a moment ahead by `run`, at a given time by who
drives a `Crew` itself. A worker that dies leaves a gap that is told, not filled. A worker whose parent dies cancels
what it does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.loadgen.engine import NS, Engine, Share, Tick
from common.bench.outcome import Outcome
from common.bench.records import Records

LEAD_NS = 50_000_000
READY_S = 60.0
_GO, _STOP, _CANCEL = b"G", b"S", b"C"
_LENGTH = struct.Struct("!I")
_START = struct.Struct("!q")


@dataclass(slots=True)
class _Worker:
    pid: int
    control_fd: int
    result_fd: int
    buffer: bytearray = field(default_factory=bytearray)
    is_ready: bool = False
    is_over: bool = False
    is_told: bool = False
    records: Records | None = None


class Crew:
    """The processes of a run, forked when it is made: `arm`, `start`, `finish`, and `close` whatever happened."""

    def __init__(
        self,
        shares: Sequence[Share],
        *,
        count_tokens: Callable[[str], int] | None = None,
        on_tick: Callable[[int, Tick], None] | None = None,
    ) -> None:
        assert shares
        assert threading.active_count() >= 1
        self.outcome = Outcome(Records())
        self.started_ns = 0
        self._on_tick = on_tick
        self._stops = 0
        self._workers: list[_Worker] = []
        for share in shares:
            self._workers.append(_fork(share, count_tokens, self._workers))

    @property
    def lost(self) -> int:
        """How many processes have ended without a word about what they measured."""
        return sum(worker.is_over and worker.records is None for worker in self._workers)

    def arm(self, limit_s: float = READY_S) -> None:
        """Waits until each has opened its connections, or has ended. Raises: TimeoutError."""
        deadline = time.monotonic() + limit_s
        while not all(worker.is_ready or worker.is_over for worker in self._workers):
            if time.monotonic() > deadline:
                raise TimeoutError("the load generator's processes did not get ready")
            self.hear(0.5)

    def start(self, at_ns: int) -> None:
        """Sets the common start, on CLOCK_MONOTONIC."""
        self.started_ns = at_ns
        self.outcome.start_wall_s = time.time() + (at_ns - time.monotonic_ns()) / NS
        self._tell(_GO + _START.pack(at_ns))

    def stop(self) -> None:
        """At first nothing more is sent and answers are awaited; the second time those are cancelled too."""
        self._stops += 1
        outcome = self.outcome
        outcome.is_interrupted = True
        if outcome.stopped_ns is None and self.started_ns:
            outcome.stopped_ns = max(0, time.monotonic_ns() - self.started_ns)
        self._tell(_STOP if self._stops == 1 else _CANCEL)
        if self._stops > 2:
            for worker in self._workers:
                if not worker.is_over:
                    _kill(worker)

    def finish(self, on_turn: Callable[[], None] | None = None) -> Outcome:
        """Listens until all have ended; gives what was measured. on_turn: called twice a second and more often."""
        while not all(worker.is_over for worker in self._workers):
            self.hear(0.5)
            if on_turn is not None:
                on_turn()
        outcome = self.outcome
        outcome.wall_s = max(0.0, (time.monotonic_ns() - self.started_ns) / NS)
        for worker in self._workers:
            if worker.records is None:
                outcome.lost_workers += 1
            else:
                outcome.records.merge(worker.records)
        return outcome

    def hear(self, limit_s: float) -> None:
        """Takes what they say next; returns after `limit_s` at the latest."""
        poll = select.poll()
        by_fd = {worker.result_fd: (number, worker) for number, worker in enumerate(self._workers)}
        for fd, (_, worker) in by_fd.items():
            if not worker.is_over:
                poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(limit_s * 1000):
            number, worker = by_fd[fd]
            data = os.read(fd, 1 << 20)
            if not data:
                worker.is_over = True
                if worker.records is None and not worker.is_told:
                    self.outcome.said.append(_end_of(worker))
                continue
            worker.buffer += data
            for message in _messages(worker.buffer):
                _take(number, worker, message, self._on_tick, self.outcome)

    def close(self) -> None:
        """Ends and collects every process."""
        for worker in self._workers:
            if not worker.is_over:
                _kill(worker)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(worker.pid, 0)
            os.close(worker.control_fd)
            os.close(worker.result_fd)

    def _tell(self, message: bytes) -> None:
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                os.write(worker.control_fd, message)


def run(
    shares: Sequence[Share],
    *,
    count_tokens: Callable[[str], int] | None = None,
    on_tick: Callable[[int, Tick], None] | None = None,
    on_start: Callable[[], None] | None = None,
) -> Outcome:
    """Runs the shares, one process each. The first SIGINT or SIGTERM stops sending and lets answers end, the second
    cancels them. Returns what was measured, also then."""
    crew = Crew(shares, count_tokens=count_tokens, on_tick=on_tick)
    try:
        with on_signals(crew.stop):
            crew.arm()
            crew.start(time.monotonic_ns() + LEAD_NS)
            if on_start is not None:
                on_start()
            return crew.finish()
    finally:
        crew.close()


@contextlib.contextmanager
def on_signals(work: Callable[[], None]) -> Iterator[None]:
    """Does it at SIGINT and SIGTERM, in a main thread; elsewhere nobody would call it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda _, __: work()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end_of(worker: _Worker) -> str:
    """How one has ended that said nothing: its pipe is closed, so that it is gone or about to be."""
    code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
    return f"one was killed by signal {-code}" if code < 0 else f"one exited with code {code}"


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)


def _messages(buffer: bytearray) -> Iterator[dict[str, Any]]:
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        if len(buffer) < _LENGTH.size + length:
            return
        with memoryview(buffer) as view, view[_LENGTH.size : _LENGTH.size + length] as body:
            message = msgspec.msgpack.decode(body, strict=False)
        del buffer[: _LENGTH.size + length]
        yield message


def _take(
    number: int,
    worker: _Worker,
    message: dict[str, Any],
    on_tick: Callable[[int, Tick], None] | None,
    outcome: Outcome,
) -> None:
    match message.get("kind"):
        case "ready":
            worker.is_ready = True
        case "tick" if on_tick is not None:
            on_tick(number, Tick(**message["tick"]))
        case "done":
            worker.records = Records.from_wire(message["records"])
        case "broken":
            worker.is_told = True
            outcome.said.append(str(message["said"]))


def _fork(share: Share, count_tokens: Callable[[str], int] | None, others: Sequence[_Worker]) -> _Worker:
    control_read, control_write = os.pipe2(os.O_CLOEXEC)
    result_read, result_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(control_read)
        os.close(result_write)
        return _Worker(pid, control_write, result_read)
    code = 1
    try:
        os.close(control_write)
        os.close(result_read)
        # Held open here, the pipes of the others would hide from them that the parent has died.
        for other in others:
            os.close(other.control_fd)
            os.close(other.result_fd)
        _work(share, count_tokens, control_read, result_write)
        code = 0
    except BaseException as error:  # noqa: BLE001  # the border of a process: what it was is told to the parent
        with contextlib.suppress(OSError):
            _say(result_write, {"kind": "broken", "said": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(code)
    raise AssertionError("unreachable")


def _say(fd: int, message: dict[str, Any]) -> None:
    body = msgspec.msgpack.encode(message)
    for view in (memoryview(_LENGTH.pack(len(body))), memoryview(body)):
        while view:
            view = view[os.write(fd, view) :]


def _work(share: Share, count_tokens: Callable[[str], int] | None, control_fd: int, result_fd: int) -> None:
    """A worker's life."""
    # Signals to the whole group (Ctrl-C, scancel, timeout) are the parent's to heed; when it dies, its pipe tells.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A pass of the collector over the prepared requests would stop the loop for tens of milliseconds.
    gc.collect()
    gc.freeze()
    gc.disable()
    start_ns: list[int] = []

    def on_control(engine: Engine) -> None:
        data = os.read(control_fd, 1)
        if data == _GO:
            start_ns.append(_START.unpack(os.read(control_fd, _START.size))[0])
        elif data == _STOP:
            engine.stop()
        else:
            engine.cancel()
            engine.epoll.unregister(control_fd)

    engine = Engine(
        share,
        count_tokens=count_tokens,
        control_fd=control_fd,
        on_control=on_control,
        on_tick=lambda tick: _say(result_fd, {"kind": "tick", "tick": _plain(tick)}),
    )
    engine.open_connections()
    _say(result_fd, {"kind": "ready"})
    while not start_ns and not engine.is_stopping:
        engine.wait(1.0)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic_ns()
    records = engine.run(start_ns[0] if start_ns else time.monotonic_ns())
    after, ended = resource.getrusage(resource.RUSAGE_SELF), time.monotonic_ns()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    records.workers.append(
        {
            "cpu_s": cpu_s,
            "wall_s": (ended - began) / NS,
            "rss_bytes": after.ru_maxrss * 1024,
            "descriptors": hard,
            "soft_descriptors": soft,
        }
        | ({"filled_ns": engine.filled_ns - engine.start_ns} if engine.filled_ns is not None else {})
    )
    engine.close()
    if share.counter is not None:
        engine.untold.settle(records, engine.start_ns, share.counter)
    _say(result_fd, {"kind": "done", "records": records.to_wire()})


def _plain(tick: Tick) -> dict[str, Any]:
    return {name: getattr(tick, name) for name in Tick.__slots__}
