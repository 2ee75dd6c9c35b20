"""The holder of the RAM tier: keeps models resident and locked, and outlives the agent and the mover.

`python -P -m agent.holder --socket PATH --budget BYTES [--tmpfs DIR]`. The socket's directory is made 0700 and the
socket 0600; only the same user (or root) is answered. A second holder on a live socket ends with status 3. Nothing is
held at start: the agent asks again for what it wants. In the default mode the pages are those of the store's own
files, so there is no second copy and engines open the same paths. With `--tmpfs DIR` (a tmpfs, best mounted with
huge=within_size) files are copied there first, for nodes without a disk of their own. Requests and answers:
agent/holder_protocol.py. SIGTERM and `Stop` release everything. A holder whose socket file was removed makes it again;
where it cannot, or another holder listens there, it ends: nobody could ever ask it to let go.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

from agent import holder_protocol as protocol
from agent.probe.host import memory_available_bytes
from agent.residency import MappedSet, pages_bytes, why_not_lock
from common import fsio, ids
from common.errors import Cancelled, HerderError, Internal, MemoryFull, NotFound
from herder.decoding import UNREADABLE

CONNECTIONS = 16
REPORT_S = 0.25
WATCH_S = 30.0
ACCEPT_S = 0.2  # also how soon a stop, or the loss of the socket's file, is noticed
FLOOR_BYTES = 256 << 20  # of available memory (also inside cgroup limits) that is never taken
COPY_BYTES = 16 << 20


class Held:
    """One holding."""

    def __init__(self, key: str, directory: Path, pages: MappedSet) -> None:
        self.key, self.directory, self.pages = key, directory, pages
        self.cancelled = threading.Event()
        self.is_complete = False
        self.done_bytes = 0

    def view(self) -> protocol.Holding:
        """As it is told to the agent."""
        return protocol.Holding(
            self.key,
            str(self.directory),
            self.pages.bytes,
            self.pages.resident_bytes(),
            self.pages.is_locked,
            self.is_complete,
        )


class Holder:
    """All holdings of one process. Thread-safe."""

    def __init__(self, budget_bytes: int, tmpfs: Path | None = None) -> None:
        self.budget_bytes, self.tmpfs = budget_bytes, tmpfs
        self.why_unlocked = why_not_lock()
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._keys: dict[str, threading.Lock] = {}
        self.stopping = threading.Event()

    def hold(self, request: protocol.Hold, stop: threading.Event) -> Held:
        """Makes the files resident. Raises: MemoryFull, NotFound, Cancelled, SourceFailed."""
        with self._lock:
            lock = self._keys.setdefault(request.key, threading.Lock())
        with lock:
            held = self._ready(request)
            if held is None:
                held = self._admit(request)
            try:
                self._populate(held, stop)
            except HerderError:
                self._let_go(request.key)
                raise
            return held

    def progress(self, key: str) -> tuple[int, int]:
        """(done, total) bytes of a holding that is being populated."""
        with self._lock:
            held = self._held.get(key)
        return (held.done_bytes, held.pages.bytes) if held is not None else (0, 0)

    def release(self, key: str) -> None:
        """Lets a holding go; one that is being populated is stopped first."""
        with self._lock:
            held = self._held.get(key)
            lock = self._keys.setdefault(key, threading.Lock())
        if held is not None:
            held.cancelled.set()
        with lock:
            self._let_go(key)

    def _let_go(self, key: str) -> None:
        """Under the key's lock: nobody may be mapping windows into a range that is unmapped."""
        with self._lock:
            held = self._held.pop(key, None)
        if held is not None:
            held.pages.close()
            if self.tmpfs is not None:
                shutil.rmtree(held.directory, ignore_errors=True)

    def release_all(self) -> None:
        """Lets everything go."""
        self.stopping.set()
        for key in list(self._held):
            self.release(key)

    def views(self) -> tuple[protocol.Holding, ...]:
        """All holdings, counted now."""
        with self._lock:
            return tuple(held.view() for _, held in sorted(self._held.items()))

    def used_bytes(self) -> int:
        """RAM promised to holdings."""
        with self._lock:
            return sum(held.pages.page_bytes for held in self._held.values())

    def watch(self) -> None:
        """Reads unlocked pages back that the kernel has taken away, until the end."""
        while not self.stopping.wait(WATCH_S):
            with self._lock:
                weak = [held for held in self._held.values() if held.is_complete and not held.pages.is_locked]
            for held in weak:
                with self._lock:
                    lock = self._keys[held.key]
                with lock, contextlib.suppress(HerderError, OSError):
                    if not held.cancelled.is_set() and held.pages.resident_bytes() < held.pages.bytes:
                        held.pages.populate(held.cancelled, lambda count: None, locks=False)

    def _ready(self, request: protocol.Hold) -> Held | None:
        """The present holding of this key when it is of the same files, else None after letting it go."""
        with self._lock:
            held = self._held.get(request.key)
        if held is None:
            return None
        try:
            wanted = sum(path.stat().st_size for path in _paths(request)) if self.tmpfs is None else held.pages.bytes
        except OSError:
            wanted = -1
        if wanted == held.pages.bytes and (self.tmpfs is not None or str(held.directory) == request.directory):
            return held
        self._let_go(request.key)
        return None

    def _admit(self, request: protocol.Hold) -> Held:
        paths = _paths(request)
        need = sum(pages_bytes(path.stat().st_size) for path in paths)
        self._check_room(need)
        directory = Path(request.directory)
        if self.tmpfs is not None:
            directory, paths = self._copy(self.tmpfs, request, paths)
        pages = MappedSet(paths)
        held = Held(request.key, directory, pages)
        with self._lock:
            used = sum(other.pages.page_bytes for other in self._held.values())
            if used + need <= self.budget_bytes:
                self._held[request.key] = held
                return held
        pages.close()
        self._check_room(need)
        raise MemoryFull("the RAM tier filled up meanwhile", need=need)

    def _check_room(self, need: int) -> None:
        used = self.used_bytes()
        free = max(0, min(self.budget_bytes - used, memory_available_bytes() - FLOOR_BYTES))
        if need > free:
            raise MemoryFull(
                f"{need} bytes are needed and {free} are free in the RAM tier",
                hint="drop copies from this node's dram, or raise its dram budget",
                need=need,
                free=free,
                budget=self.budget_bytes,
                used=used,
            )

    def _copy(self, tmpfs: Path, request: protocol.Hold, paths: list[Path]) -> tuple[Path, list[Path]]:
        target = tmpfs / hashlib.sha256(request.key.encode()).hexdigest()[:32]
        shutil.rmtree(target, ignore_errors=True)
        copies = []
        for path in paths:
            copy = target / path.relative_to(request.directory)
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _copy_file(path, copy)
            copies.append(copy)
        return target, copies

    def _populate(self, held: Held, stop: threading.Event) -> None:
        if held.is_complete and held.pages.resident_bytes() == held.pages.bytes:
            return
        held.done_bytes = 0
        cancelled = _Either(stop, held.cancelled)
        lock = threading.Lock()

        def progress(count: int) -> None:
            with lock:
                held.done_bytes += count

        held.pages.populate(cancelled, progress, locks=not self.why_unlocked or held.pages.page_bytes <= 4 << 20)
        if held.cancelled.is_set():
            raise Cancelled("released meanwhile")
        held.is_complete = True


class _Either(threading.Event):
    """Set when one of two events is."""

    def __init__(self, one: threading.Event, two: threading.Event) -> None:
        super().__init__()
        self._one, self._two = one, two

    def is_set(self) -> bool:
        return self._one.is_set() or self._two.is_set()


def _paths(request: protocol.Hold) -> list[Path]:
    """The files of a request. Raises: NotFound, InvalidPath."""
    directory = Path(request.directory)
    if not directory.is_absolute() or not directory.is_dir():
        raise NotFound(f"{directory}: not a directory here")
    if request.paths:
        paths = [directory / ids.check_relative_path(path) for path in request.paths]
    else:
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise NotFound(f"{missing}: it is not there")
    return paths


def _copy_file(source: Path, target: Path) -> None:
    """Copies into tmpfs, past the page cache where the source allows it, so that RAM is not filled twice."""
    size = source.stat().st_size
    try:
        read_fd = os.open(source, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        read_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    write_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o400)
    buffer = fsio.aligned_buffer(COPY_BYTES)
    try:
        fsio.allocate(write_fd, size)
        offset = 0
        with memoryview(buffer) as view:
            while offset < size:
                count = os.preadv(read_fd, [view], offset)
                if count == 0:
                    raise NotFound(f"{source}: became shorter")
                fsio.Files().pwrite(write_fd, view[:count], offset)
                offset += count
    finally:
        buffer.close()
        os.close(read_fd)
        os.close(write_fd)


class _Session:
    """One connection of an agent."""

    def __init__(self, holder: Holder, channel: socket.socket, stop: threading.Event) -> None:
        self._holder, self._channel, self._stop = holder, channel, stop
        self._sending = threading.Lock()
        self._open: dict[str, threading.Event] = {}

    def run(self) -> None:
        """Until the agent goes."""
        holder = self._holder
        mode = "cache" if holder.tmpfs is None else "tmpfs"
        self._send(protocol.Ready("", os.getpid(), holder.budget_bytes, holder.why_unlocked, mode))
        with contextlib.suppress(OSError, *UNREADABLE), self._channel.makefile("rb") as stream:
            while len(head := stream.read(protocol.LENGTH.size)) == protocol.LENGTH.size:
                length = protocol.LENGTH.unpack(head)[0]
                if length > protocol.FRAME_BYTES:
                    return
                self._dispatch(protocol.requests.decode(stream.read(length)))

    def _dispatch(self, request: protocol.AnyRequest) -> None:
        match request:
            case protocol.Hold():
                if len(self._open) >= 64:
                    self._done(request.token, Internal("too many open requests"))
                    return
                stop = self._open[request.token] = threading.Event()
                threading.Thread(target=self._hold, args=(request, stop), name="hold", daemon=True).start()
            case protocol.Cancel():
                event = self._open.get(request.target)
                if event is not None:
                    event.set()
                self._done(request.token)
            case protocol.Release():
                self._holder.release(request.key)
                self._done(request.token)
            case protocol.List():
                self._done(request.token)
            case protocol.Stop():
                self._holder.release_all()
                self._done(request.token)
                self._stop.set()

    def _hold(self, request: protocol.Hold, stop: threading.Event) -> None:
        ended = threading.Event()
        reporter = threading.Thread(target=self._report, args=(request, ended), daemon=True)
        reporter.start()
        error: HerderError | None = None
        try:
            self._holder.hold(request, stop)
        except HerderError as caught:
            error = caught
        except OSError as caught:
            error = Internal(f"{caught.strerror}: {caught.filename or request.key}")
        except Exception as caught:  # noqa: BLE001 - the border of a request: it must be answered
            error = Internal(f"{type(caught).__name__}: {str(caught)[:200]}")
        ended.set()
        reporter.join()
        self._open.pop(request.token, None)
        self._done(request.token, error)

    def _report(self, request: protocol.Hold, ended: threading.Event) -> None:
        began, last = time.monotonic(), -1
        while not ended.wait(REPORT_S):
            done, total = self._holder.progress(request.key)
            if done != last:
                last = done
                rate = done / max(time.monotonic() - began, 0.001)
                self._send(protocol.Moving(request.token, "loading", done, total, rate))

    def _done(self, token: str, error: HerderError | None = None) -> None:
        info = error.info() if error is not None else None
        holder = self._holder
        self._send(protocol.Done(token, info, holder.views(), holder.used_bytes(), holder.budget_bytes))

    def _send(self, answer: protocol.Answer) -> None:
        with contextlib.suppress(OSError), self._sending:
            self._channel.sendall(protocol.frame(answer))


Mark = tuple[int, int]
"""A file's device and inode."""


def listen(path: Path) -> tuple[socket.socket, Mark | None] | None:
    """The holder's socket and which file it is; None when a live holder has it. Raises: OSError.

    The file is marked before anybody can connect: who has talked to the holder may take its directory away at once.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    listener = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
        else:
            listener.close()
            return None
    listener.bind(str(path))
    path.chmod(0o600)
    mark = _mark(path)
    listener.listen(CONNECTIONS)
    return listener, mark


def serve(holder: Holder, listener: socket.socket, path: Path, mark: Mark | None) -> None:
    """Answers agents until told to stop, or until none could find it any more."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=holder.watch, name="watch", daemon=True).start()
    slots = threading.BoundedSemaphore(CONNECTIONS)
    while not stop.is_set():
        if mark is None or _mark(path) != mark:
            listener.close()
            found = _listen_again(path)
            if found is None:
                break
            listener, mark = found
        listener.settimeout(ACCEPT_S)
        try:
            channel, _ = listener.accept()
        except TimeoutError:
            continue
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] not in (0, os.geteuid()) or not slots.acquire(blocking=False):
            channel.close()
            continue
        channel.settimeout(None)
        threading.Thread(target=_talk, args=(holder, channel, stop, slots), name="agent", daemon=True).start()
    holder.release_all()
    if mark is not None and _mark(path) == mark:
        path.unlink(missing_ok=True)
    listener.close()


def _mark(path: Path) -> Mark | None:
    """Which file lies there; None when none does."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listen_again(path: Path) -> tuple[socket.socket, Mark | None] | None:
    """Our socket's file was removed, so that no agent can find what is held: a new one, with the holdings kept.

    None, and so the end, when another holder has taken its place or the state directory is gone.
    """
    why = "its directory is gone"
    if path.parent.is_dir():
        try:
            found = listen(path)
        except OSError as error:
            why = str(error)
        else:
            if found is not None:
                return found
            why = "another holder has taken its place"
    sys.stderr.write(f"the socket was removed and {why}: the RAM tier is let go\n")
    return None


def _talk(holder: Holder, channel: socket.socket, stop: threading.Event, slots: threading.Semaphore) -> None:
    try:
        with channel:
            _Session(holder, channel, stop).run()
    finally:
        slots.release()


def main() -> int:
    """Runs a holder to its end; 3 when one is there already."""
    parser = argparse.ArgumentParser(prog="agent.holder")
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to listen on")
    parser.add_argument("--budget", type=int, required=True, help="bytes of RAM that may be held")
    parser.add_argument("--tmpfs", type=Path, help="copy into this tmpfs instead of holding the files' own pages")
    options = parser.parse_args()
    if options.tmpfs is not None and fsio.filesystem_name(options.tmpfs) != "tmpfs":
        sys.stderr.write(f"{options.tmpfs} is not a tmpfs: its files would not be in RAM\n")
        return 2
    found = listen(options.socket)
    if found is None:
        return 3
    listener, mark = found
    with contextlib.suppress(OSError):
        os.setsid()  # a signal to the agent's group is not for us
    serve(Holder(options.budget, options.tmpfs), listener, options.socket, mark)
    return 0


if __name__ == "__main__":
    sys.exit(main())
