"""Files of engine runs: `replicas/REPLICA/RUN/{spec.json, pid.json, exit.json, log.*, api_key}` in the state directory.

They are what a new agent finds its engines by. Everything is 0600 in 0700 directories: a spec holds the engine's
environment. All functions block and are called from threads.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from common import limits
from common.errors import NotFound
from common.statedir import write_secret
from common.wire import EnsureReplica
from herder.decoding import UNREADABLE

T = TypeVar("T")
FORGOTTEN_KEPT = 512  # replicas that are gone, whose logs are still kept, as far as the sweep of log_retention.py does
FORGOTTEN_KEPT_S = 14 * 86_400.0  # and for how long, if nothing else is set


class Identity(msgspec.Struct, frozen=True):
    """pid.json: shim and engine, and on which boot."""

    boot_id: str
    shim_pid: int
    shim_ticks: int
    pid: int
    ticks: int


class Spec(msgspec.Struct, frozen=True):
    """What of spec.json is read again: where the engine listens."""

    host: str = ""
    port: int = 0


class Exit(msgspec.Struct, frozen=True):
    """exit.json."""

    exit_code: int | None = None
    error: str = ""
    halted: str = ""  # why the shim ended it by itself
    strays: int = 0


class RunFiles:
    """The folder `replicas` of a state directory."""

    def __init__(self, root: Path, *, forgotten_kept_s: float = FORGOTTEN_KEPT_S) -> None:
        self.root = root
        self._forgotten_kept_s = forgotten_kept_s
        self.lease_path = root.parent / "lease"  # see lease_note.py

    def directory(self, replica: str, run: int) -> Path:
        """A run's folder."""
        return self.root / replica / str(run)

    def mark(self, replica: str, run: int) -> str:
        """What the processes of a run carry in their environment; also tells agents of one machine apart."""
        return str(self.directory(replica, run))

    def find(self, replica: str, back: int) -> Path:
        """The folder of the present run (0) or of one before (1, 2, ...). Raises: NotFound."""
        runs = self.runs(replica)
        if not 0 <= back < len(runs):
            raise NotFound(f"{replica} has no run {back} on this node", runs=len(runs))
        return self.directory(replica, runs[-1 - back])

    def make(self, replica: str, run: int, *, api_key: str) -> tuple[Path, str]:
        """A fresh folder for a run, and the path of its key file ("" without a key). Old runs are removed."""
        directory = self.directory(replica, run)
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(mode=0o700, parents=True)
        for old in self.runs(replica)[: -limits.LOG_RUNS_KEPT - 1]:
            shutil.rmtree(self.directory(replica, old), ignore_errors=True)
        for old in self.runs(replica):
            if old < run:
                _tidy(self.directory(replica, old))
        if not api_key:
            return directory, ""
        write_secret(directory / "api_key", api_key)
        return directory, str(directory / "api_key")

    def write_spec(
        self, directory: Path, argv: tuple[str, ...], env: dict[str, str], host: str, port: int, order: EnsureReplica
    ) -> Path:
        """Writes what the shim reads."""
        stop_after_ms = order.stop_after_ms + limits.SHIM_STOP_SLACK_MS if order.stop_after_ms else 0
        spec = {
            "argv": list(argv),
            "env": env,
            "cwd": str(directory),
            "log_bytes": limits.LOG_BYTES_PER_REPLICA,
            "host": host,
            "port": port,
            "lease": str(self.lease_path),
            "stop_after_ms": stop_after_ms,
            "stop_grace_s": order.stop_grace_s,
        }
        path = directory / "spec.json"
        write_secret(path, json.dumps(spec))
        return path

    def identity(self, replica: str, run: int) -> Identity | None:
        """pid.json, None while there is none."""
        return _read(self.directory(replica, run) / "pid.json", Identity)

    def spec(self, replica: str, run: int) -> Spec | None:
        """spec.json, as far as it is read again."""
        return _read(self.directory(replica, run) / "spec.json", Spec)

    def exit(self, replica: str, run: int) -> Exit | None:
        """exit.json, None while the run goes on."""
        return _read(self.directory(replica, run) / "exit.json", Exit)

    def forget(self, replica: str) -> None:
        """Removes a replica's secrets; its logs stay until enough other replicas were forgotten after it."""
        for run in self.runs(replica):
            _tidy(self.directory(replica, run))
        folder = self.root / replica
        if folder.is_dir():
            (folder / "forgotten").touch(mode=0o600)
        marks = sorted(self.root.glob("*/forgotten"), key=lambda path: path.stat().st_mtime_ns)
        oldest = time.time() - self._forgotten_kept_s
        for mark in marks:
            if mark in marks[:-FORGOTTEN_KEPT] or mark.stat().st_mtime < oldest:
                shutil.rmtree(mark.parent, ignore_errors=True)

    def remember(self, replica: str) -> None:
        """The replica is wanted again."""
        (self.root / replica / "forgotten").unlink(missing_ok=True)

    def unfinished(self) -> list[tuple[str, int]]:
        """Runs that were executed and have no exit.json: (replica, run)."""
        return [
            (path.parent.parent.name, int(path.parent.name))
            for path in sorted(self.root.glob("*/*/pid.json"))
            if path.parent.name.isdigit() and not path.with_name("exit.json").exists()
        ]

    def runs(self, replica: str) -> list[int]:
        """Numbers of the runs that are kept, oldest first."""
        folder = self.root / replica
        if not folder.is_dir():
            return []
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def _tidy(directory: Path) -> None:
    """Leaves of an ended run its logs and how it ended: secrets go, and what the engine left in its folder."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name in ("exit.json", "pid.json") or path.name.startswith("log."):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, *UNREADABLE):
        return None
