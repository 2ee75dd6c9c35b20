"""Processes of a test: started with a log, signalled, found again by the folder they belong to, and all ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from agent import procs

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
POLL_S = 0.03
TAIL_LINES = 40


def until(condition: Callable[[], T | None], what: str, timeout_s: float = WAIT_S) -> T:
    """Looks until something true is found, and returns it; fails with `what` and the last thing seen."""
    end = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s; last seen: {found!r}"
        time.sleep(POLL_S)


def stays(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Fails when a condition does not hold all through a stretch of time: for what must not happen meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition(), f"{what}: not any more"
        time.sleep(0.1)


def clean_environ() -> dict[str, str]:
    """Our environment without settings of Herder's, so that no daemon of a test meets this machine's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HERDER_", "COLUMNS"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    process = procs.read_process(pid)
    return process is not None and process.state not in "ZX"


def processes_of(folder: Path) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process that names a folder in its command line or environment."""
    wanted = os.fsencode(folder)
    for process in procs.processes():
        if process.pid == os.getpid():
            continue
        place = Path("/proc") / str(process.pid)
        try:
            words = (place / "cmdline").read_bytes()
            if wanted in words or wanted in (place / "environ").read_bytes():
                yield process.pid, words.replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it ended meanwhile, or is another user's


def end_all(folder: Path) -> None:
    """Kills every process that belongs to a folder, again and again until none is left."""

    def none_left() -> bool:
        left = list(processes_of(folder))
        for pid, _ in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended meanwhile
        return not left

    until(none_left, f"the end of all processes of {folder}")


class Daemon:
    """One program that may be started again and again; its output goes to one log."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log_path = log
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        """Starts it; the one before must have ended."""
        assert not self.is_running, f"{self.name} runs already"
        with self.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                cwd=self.log_path.parent,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait_ended(self, timeout_s: float = WAIT_S) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        self.wait_ended()

    def stop(self) -> int:
        """SIGTERM and the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait_ended()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def log(self) -> str:
        """Everything it wrote, over all its lives."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log().splitlines()[-TAIL_LINES:])

    def wait_logged(self, words: str, count: int = 1, timeout_s: float = WAIT_S) -> None:
        """Waits until its log holds the words so many times."""
        until(lambda: self.log().count(words) >= count, f"{words!r} in the log of {self.name}", timeout_s)
