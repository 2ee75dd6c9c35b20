"""The process that stays with one engine: starts it, keeps its output, and writes down how it ended.

Started detached by the agent as `python -I -S shim.py SPEC.json`, it outlives the agent: an agent that is killed or
upgraded finds its engines again through the files here. Standard library only, so that it stays small and cannot be
broken by what the agent has installed.

    spec.json   {"argv", "env", "cwd", "log_bytes", "lease", "stop_after_ms", "stop_grace_s"}   by the agent, 0600
    pid.json    {"boot_id", "shim_pid", "shim_ticks", "pid", "ticks", "started_at"}   once the engine was executed
    log.OFFSET  output, stdout and stderr together; OFFSET is where the segment starts in the run's whole output
    log.OFFSET.at   when that output came: entries of 16 bytes (offset, milliseconds), see common/logs/index.py
    exit.json   {"exit_code", "error", "halted", "strays", "ended_at"}   last of all; exit_code is -N for signal N

The engine has its own process group. The shim is the subreaper of everything below it: whatever the engine leaves
behind when it ends, in whatever session or group, comes back to the shim and is killed before exit.json is written.
SIGTERM, SIGINT and SIGHUP go to the engine's group; the shim itself ends only when nothing is left.

With `stop_after_ms` the engine must not outlive the head's lease by more than that, because the head starts another
one elsewhere once it has passed. The agent sees to it; the shim does where the agent is dead or stuck. `lease` names
the file in which the agent notes until when the lease holds ({"boot_id", "until_boottime_ms", "again"}, the number
twice since it is written in place). What cannot be read renews nothing; at the start the present stands for it. Should
the shim itself be killed, the kernel kills such an engine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SEGMENTS = 4  # a run keeps this many log segments, each a fourth of its log size
SHORT_SEGMENTS = 64  # and at most so many where a full disk cut them short
FULL_MS = 1_000  # after a write that failed, output is lost for so long before the next is tried
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
READ_BYTES = 65_536
INDEX_MS = 50  # output that comes within so long of the last entry of the index gets none of its own
INDEX_ENTRY = struct.Struct("<QQ")
STARTS_LINE = 1 << 63  # in the milliseconds of a segment's first entry: what came before ended with a newline
DRAIN_S = 2.0  # how long output is still read after the last process has ended
EXEC_FAILED = 127
libc = ctypes.CDLL(None)


class Log:
    """The engine's output on disk: segments named by their offset, the oldest removed. Never fails its caller."""

    def __init__(self, directory: str, log_bytes: int) -> None:
        self.directory = directory
        self.segment_bytes = max(4096, log_bytes // SEGMENTS)
        self.offset = 0
        self.names: list[str] = []
        self.descriptor = -1
        self.room = 0
        self.index = -1
        self.index_room = 0  # a segment whose index is full ends early, so that every line keeps its time
        self.noted_ms = -INDEX_MS  # when the last entry was written, monotonic
        self.ends_line = True
        self.full_until_ms = 0  # monotonic; 0: the last write went well

    def write(self, data: bytes) -> None:
        """Appends; a full disk loses new output, not the engine and not what was kept before."""
        while data:
            if self.full_until_ms and time.monotonic_ns() // 1_000_000 < self.full_until_ms:
                self.offset += len(data)  # the next segment's name says what is gone
                self.ends_line = data.endswith(b"\n")
                return
            if self.room <= 0 or self.index_room <= 0:
                self._next()
            self._note()
            piece, data = data[: self.room], data[self.room :]
            self.offset += len(piece)
            self.room -= len(piece)
            self.ends_line = piece.endswith(b"\n")
            try:
                while piece:
                    piece = piece[os.write(self.descriptor, piece) :]
                self.full_until_ms = 0
            except OSError:
                self.room = 0
                self.full_until_ms = time.monotonic_ns() // 1_000_000 + FULL_MS

    def _note(self) -> None:
        """Notes when the output at this offset came; before the output itself, so that none is seen without."""
        now_ms = time.monotonic_ns() // 1_000_000
        if now_ms - self.noted_ms < INDEX_MS:
            return
        self.noted_ms = now_ms
        self.index_room -= INDEX_ENTRY.size
        is_first = self.room == self.segment_bytes
        at_ms = time.time_ns() // 1_000_000 | (STARTS_LINE if is_first and self.ends_line else 0)
        try:
            if os.write(self.index, INDEX_ENTRY.pack(self.offset, at_ms)) != INDEX_ENTRY.size:
                os.ftruncate(self.index, os.fstat(self.index).st_size // INDEX_ENTRY.size * INDEX_ENTRY.size)
        except OSError:
            pass  # the time is not known then

    def _next(self) -> None:
        for descriptor in (self.descriptor, self.index):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self.index = -1
        path = os.path.join(self.directory, f"log.{self.offset:015d}")
        self._drop_old()
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self.names.append(path)
        except OSError:
            pass
        try:
            self.index = os.open(path + ".at", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:
            pass
        self.room = self.segment_bytes
        self.index_room = self._index_bytes
        self.noted_ms = -INDEX_MS

    def _drop_old(self) -> None:
        """Makes room for one more segment, by how full those are that are there: a full disk leaves them short."""
        full = [self._fullness(name) for name in self.names]
        if full and not _size(self.names[-1]):
            full.pop()
            _unlink(self.names.pop())
        while full and (len(full) >= SHORT_SEGMENTS or sum(full) > SEGMENTS - 1):
            del full[0]
            _unlink(self.names.pop(0))

    def _fullness(self, segment: str) -> float:
        return max(_size(segment) / self.segment_bytes, _size(segment + ".at") / self._index_bytes)

    @property
    def _index_bytes(self) -> int:
        return max(4096, self.segment_bytes // 4)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _unlink(segment: str) -> None:
    """Removes a segment and its index."""
    for path in (segment, segment + ".at"):
        try:
            os.unlink(path)
        except OSError:
            pass


def write_json(path: str, value: dict[str, Any]) -> None:
    """Writes a file whole or not at all, durably."""
    part = path + ".part"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat: with the boot id it names a process for ever; 0 when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def start_engine(spec: dict[str, Any], output: int) -> tuple[int, str]:
    """Forks and executes; returns the pid and the reason why it could not be executed ("" when it was)."""
    failure_read, failure_write = os.pipe()
    me = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            if spec.get("stop_after_ms"):
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != me:
                    os._exit(EXEC_FAILED)
            for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(spec["cwd"])
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            os.execvpe(spec["argv"][0], spec["argv"], spec["env"])  # noqa: S606 - a list, no shell
        except BaseException as error:  # noqa: BLE001 - nothing may return into the parent's code from here
            os.write(failure_write, f"{spec['argv'][0]}: {error}".encode()[:500])
        finally:
            os._exit(EXEC_FAILED)
    os.close(failure_write)
    try:
        os.setpgid(pid, pid)  # also here: whoever signals the group next must find it
    except OSError:
        pass  # it has executed already, and did it itself
    reason = b""
    while piece := os.read(failure_read, 500):
        reason += piece
    os.close(failure_read)
    return pid, reason.decode(errors="replace")


def boottime_ms() -> int:
    """Milliseconds since the machine booted, suspend included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def boot_id() -> str:
    """This boot's id."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


class Lease:
    """Until when the engine may run without a renewal by the head; for ever without `stop_after_ms`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.path = str(spec.get("lease") or "")
        self.stop_after_ms = int(spec.get("stop_after_ms") or 0)
        self.boot_id = boot_id()
        # An engine that is started late in a lost lease must not get all of stop_after again.
        self.until_ms = self.noted_ms() or boottime_ms()

    def left_ms(self) -> int:
        """How long the engine may run on as far as is known; the note is read only when that seems to be over."""
        if not self.stop_after_ms:
            return 1 << 62
        left = self.until_ms + self.stop_after_ms - boottime_ms()
        if left <= 0:
            self.until_ms = max(self.until_ms, self.noted_ms())
            left = self.until_ms + self.stop_after_ms - boottime_ms()
        return left

    def noted_ms(self) -> int:
        """What the agent has noted; 0 for nothing that can be read, half written, or of another boot."""
        try:
            with open(self.path) as file:
                note = json.load(file)
            until = int(note["until_boottime_ms"])
            return until if note["boot_id"] == self.boot_id and note["again"] == until else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def children() -> list[int]:
    """Direct children of this process."""
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and parent(name) == me]


def parent(name: str) -> int:
    """Parent of a process, 0 when it is gone."""
    try:
        with open(f"/proc/{name}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


class Shim:
    """One engine's company from start to end."""

    def __init__(self, directory: str, spec: dict[str, Any]) -> None:
        self.directory = directory
        self.spec = spec
        self.log = Log(directory, int(spec["log_bytes"]))
        self.pid = 0
        self.status: int | None = None
        self.strays = 0
        self.lease = Lease(spec)
        self.is_told_to_end = False
        self.halted = ""
        self.kill_at_ms = 0

    def run(self) -> None:
        """Stays until nothing of the engine is left."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in FORWARDED:
            signal.signal(number, self.forward)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        output_read, output_write = os.pipe()
        self.pid, reason = start_engine(self.spec, output_write)
        os.close(output_write)
        if not reason:
            write_json(os.path.join(self.directory, "pid.json"), self.identity())
        poll = select.poll()
        poll.register(wake_read, select.POLLIN)
        poll.register(output_read, select.POLLIN)
        is_open = True
        drained_by = 0.0  # set once the engine has ended
        while self.reap() or drained_by == 0.0 or (is_open and time.monotonic() < drained_by):
            if self.status is not None and drained_by == 0.0:
                drained_by = time.monotonic() + DRAIN_S
            if self.status is None:
                self.watch_lease()
            for descriptor, _ in poll.poll(self.patience_ms() if drained_by == 0.0 else 50):
                data = os.read(descriptor, READ_BYTES)
                if descriptor == wake_read:
                    continue
                self.log.write(data)
                if not data:  # nobody can write any more
                    poll.unregister(output_read)
                    is_open = False
        self.finish(reason)

    def patience_ms(self) -> int:
        """How long to sleep at most while the engine runs."""
        if self.kill_at_ms:
            return max(10, min(1000, self.kill_at_ms - boottime_ms()))
        return max(10, min(1000, self.lease.left_ms()))

    def watch_lease(self) -> None:
        """Ends the engine when no head has been heard of for too long: SIGTERM, and SIGKILL after the grace."""
        if not self.halted and self.lease.left_ms() <= 0:
            self.halted = f"no head for {self.lease.stop_after_ms / 1000:g} s, and no agent that ended it"
            self.kill_at_ms = boottime_ms() + int(float(self.spec.get("stop_grace_s") or 0) * 1000)
            if not self.is_told_to_end:  # for many programs the second signal means: at once
                self.forward(signal.SIGTERM, None)
        elif self.kill_at_ms and boottime_ms() >= self.kill_at_ms:
            self.kill_at_ms = boottime_ms() + 1000
            for child in {self.pid, *children()}:
                try:
                    os.kill(child, signal.SIGKILL)
                except OSError:
                    pass  # ended meanwhile
            self.forward(signal.SIGKILL, None)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on to the engine's group."""
        self.is_told_to_end = True
        if self.pid and self.status is None:
            try:
                os.killpg(self.pid, number)
            except OSError:
                pass  # it is ending

    def reap(self) -> bool:
        """Collects what has ended, kills what the engine left behind; False when nothing is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.pid:
                    self.status = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return False
        if self.status is not None:
            for child in children():
                try:
                    os.kill(child, signal.SIGKILL)
                    self.strays += 1
                except OSError:
                    pass  # ended between the look and the kill
        return True

    def identity(self) -> dict[str, Any]:
        """What the next agent needs to know that this is still the same process."""
        me = os.getpid()
        return {
            "boot_id": boot_id(),
            "shim_pid": me,
            "shim_ticks": start_ticks(me),
            "pid": self.pid,
            "ticks": start_ticks(self.pid),
            "started_at": time.time(),
        }

    def finish(self, reason: str) -> None:
        """Writes how it ended."""
        end = {
            "exit_code": self.status,
            "error": reason,
            "halted": self.halted,
            "strays": self.strays,
            "ended_at": time.time(),
        }
        write_json(os.path.join(self.directory, "exit.json"), end)


def main() -> None:
    """Runs the shim of the spec that the command line names."""
    path = os.path.abspath(sys.argv[1])
    with open(path) as file:
        spec = json.load(file)
    os.umask(0o077)
    os.chdir("/")
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Shim(os.path.dirname(path), spec).run()


if __name__ == "__main__":
    main()
