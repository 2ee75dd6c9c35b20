"""Starting and finding the daemons as processes; nothing of them is imported here.

`herder up` notes what it started in `up.json` of the state folder and holds `up.lock` while it runs in the
foreground. A process id alone proves nothing, because ids are used again: each is kept with the time at which the
process began, in the kernel's ticks since boot.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from herder.decoding import UNREADABLE
from herder.errors import HerderError

RECORD_FILE = "up.json"
LOCK_FILE = "up.lock"
POLL_S = 0.05
AGENT_STOP_S = 30.0
HEAD_STOP_S = 30.0
RELEASE_S = 180.0


class Process(msgspec.Struct, frozen=True):
    """One process, with the boot and the tick at which it began: together they never come again."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this id now. Raises: ProcessLookupError."""
        return cls(pid, start_ticks(pid), boot_id())

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a dead one that nobody has waited for does not."""
        try:
            return self.boot_id == boot_id() and start_ticks(self.pid) == self.start_ticks
        except ProcessLookupError:
            return False

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.is_alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # it ended in between, which is what was wanted


class Record(msgspec.Struct, frozen=True):
    """What `herder up` started. `supervisor`: the `herder up` in the foreground; None when detached."""

    url: str
    node: str
    head: Process
    agent: Process
    supervisor: Process | None = None

    @property
    def alive(self) -> list[str]:
        """Names of the daemons that still run."""
        return [name for name, process in (("head", self.head), ("agent", self.agent)) if process.is_alive]


def start_ticks(pid: int) -> int:
    """When a process began, in ticks since boot. Raises: ProcessLookupError for none and for a zombie.

    Source: proc(5), fields 3 and 22 of /proc/PID/stat; the name in field 2 may hold blanks and brackets.
    """
    try:
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(pid) from None
    if rest[0] in ("Z", "X"):
        raise ProcessLookupError(pid)
    return int(rest[19])


def boot_id() -> str:
    """This boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def argv_of(daemon: str, arguments: Sequence[str]) -> list[str]:
    """How a daemon is run: this Python, and never a module of the present folder."""
    return [sys.executable, "-P", "-m", daemon, *arguments]


def become(daemon: str, arguments: Sequence[str]) -> NoReturn:
    """Turns this process into the daemon."""
    sys.stdout.flush()
    sys.stderr.flush()
    given = [word for word in arguments if word != "--"]
    os.environ["PYTHONSAFEPATH"] = "1"
    os.execv(sys.executable, argv_of(daemon, given))  # noqa: S606 - an argv list; the daemon takes our place


def node_id_of_host() -> str:
    """The host's name as a node id: lower case, odd characters to '-'."""
    text = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower())).strip(".-")
    return text[:63].rstrip(".-") or "node"


def read_record(base: Path) -> Record | None:
    """What was started here; None when nothing was, or the file cannot be read."""
    try:
        return msgspec.json.decode((base / RECORD_FILE).read_bytes(), type=Record)
    except (OSError, *UNREADABLE):
        return None


def write_record(base: Path, record: Record) -> None:
    """Keeps what was started; whole or not at all."""
    partial = base / f".{RECORD_FILE}.part"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    partial.chmod(0o600)
    partial.replace(base / RECORD_FILE)


def take_lock(base: Path) -> int:
    """Becomes the one `herder up` of a state folder; returns the open file. Raises: HerderError `already_running`."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(base / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise already_running(base, read_record(base)) from None
    return fd


def already_running(base: Path, record: Record | None) -> HerderError:
    """The error of a second start."""
    what = f"{' and '.join(record.alive) or 'starting'} at {record.url}" if record else "it is just starting"
    flag = "" if base == _default_base() else f" --state-dir {base}"
    if record is not None and len(record.alive) == 1:
        (left,) = record.alive
        gone = "agent" if left == "head" else "head"
        return HerderError(
            "already_running",
            f"herder is half up in {base}: its {left} runs, its {gone} has ended",
            hint=f"`herder down{flag}`, then `herder up` as before; engines go on meanwhile",
        )
    return HerderError(
        "already_running",
        f"herder is up already in {base}: {what}",
        hint=f"`herder status` shows it, `herder down{flag}` stops it",
    )


def _default_base() -> Path:
    from herder.settings import state_base_dir

    return state_base_dir({key: value for key, value in os.environ.items() if key != "HERDER_STATE_DIR"})


def release(base: Path) -> str:
    """Ends what outlives the agent, engines and RAM tier; what that was, in words. Raises: HerderError."""
    if not (base / "agent").is_dir():
        return ""
    command = argv_of("agent", ["--release", "--state-dir", str(base / "agent")])
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RELEASE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HerderError("timed_out", f"engines and RAM tier were not let go within {RELEASE_S:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise HerderError("agent_failed", said[-1] if said else f"herder-agent ended with {done.returncode}")
    return done.stdout.strip()


def is_port_open(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Looks until it holds, at most so long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_S)
    return True


def stop_process(process: Process, seconds: float) -> bool:
    """SIGTERM, then after `seconds` SIGKILL. Whether it went without force."""
    process.signal(signal.SIGTERM)
    if wait_until(lambda: not process.is_alive, seconds):
        return True
    process.signal(signal.SIGKILL)
    wait_until(lambda: not process.is_alive, 5.0)
    return False
