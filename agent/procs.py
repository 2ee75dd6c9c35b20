"""Processes of this machine through /proc: identity, members of a run, their memory, and killing what is left.

A process is the same one only if boot id, pid and start ticks agree. What belongs to a run of an engine is known by
two marks: the session of its shim, and the variable HERDER_RUN in the environment, which also finds processes that
made a session of their own. All functions block (briefly) and are called from threads.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MARK = "HERDER_RUN"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


class Process(NamedTuple):
    """A line of /proc/PID/stat, as far as it matters here."""

    pid: int
    state: str
    parent: int
    session: int
    start_ticks: int
    resident_bytes: int


def boot_id() -> str:
    """This boot's id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_process(pid: int) -> Process | None:
    """A process, or None when there is none (any more)."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
        words = text.rpartition(")")[2].split()
        return Process(pid, words[0], int(words[1]), int(words[3]), int(words[19]), int(words[21]) * PAGE_BYTES)
    except (OSError, ValueError, IndexError):
        return None


def is_running(pid: int, start_ticks: int) -> bool:
    """Whether exactly this process is there and is not a zombie."""
    process = read_process(pid)
    return process is not None and process.start_ticks == start_ticks and process.state not in "ZX"


def processes() -> Iterator[Process]:
    """Every process that is not a zombie."""
    for name in os.listdir(_PROC):
        if name.isdigit():
            process = read_process(int(name))
            if process is not None and process.state not in "ZX":
                yield process


def sessions() -> dict[int, list[Process]]:
    """Every process by its session: one look for all engines."""
    found: dict[int, list[Process]] = {}
    for process in processes():
        found.setdefault(process.session, []).append(process)
    return found


def members(session: int, mark: str) -> list[Process]:
    """What belongs to a run: the session of its shim (0: not known), and whatever carries its mark."""
    wanted = f"{MARK}={mark}".encode()
    return [
        process
        for process in processes()
        if (session and process.session == session) or wanted in _environment(process.pid)
    ]


def _environment(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # ended, or another user's: not ours


def kill_all(session: int, mark: str, *, within_s: float, keep: int = 0) -> list[int]:
    """SIGKILL to every member of a run until none is left; returns the pids that are still there after `within_s`.

    keep: pid of the shim, which is left to write its last file; 0: nobody is spared.
    """
    deadline = time.monotonic() + within_s
    while True:
        left = [process for process in members(session, mark) if process.pid != keep]
        if not left or time.monotonic() > deadline:
            return [process.pid for process in left]
        for process in left:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # ended meanwhile
            except PermissionError:
                pass  # changed its user; it stays in `left` and is reported
        time.sleep(0.01)
