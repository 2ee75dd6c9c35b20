"""Old logs go: those of ended runs, by age and by their size together, the oldest first.

What is never removed: the present run of a replica that the head has not forgotten, ended or not, because its last
lines are what people look for; and a benchmark's run that the agent still holds. A run goes as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from agent.run_files import RunFiles
from common import limits
from common.telemetry import fields

log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """The files of an ended run."""

    path: Path
    bytes: int
    changed_s: float  # wall time


def to_remove(kept: Iterable[Kept], *, bytes_max: int, age_max_s: float, now_s: float) -> list[Kept]:
    """Those that are too old, and of the others the oldest, until the rest is small enough."""
    newest_first = sorted(kept, key=lambda run: run.changed_s, reverse=True)
    removed, total = [], 0
    for run in newest_first:
        if now_s - run.changed_s > age_max_s or total + run.bytes > bytes_max:
            removed.append(run)
            bytes_max = min(bytes_max, total)  # an older run does not stay because it is small
        else:
            total += run.bytes
    return removed


class Retention:
    """Sweeps the runs of a state directory."""

    def __init__(
        self,
        files: RunFiles,
        runs_root: Path,
        *,
        bytes_max: int,
        age_max_s: float,
        held_runs: Callable[[], set[str]],
    ) -> None:
        """held_runs: ids of the benchmark runs that the agent holds."""
        self._files = files
        self._runs_root = runs_root
        self._bytes_max = bytes_max
        self._age_max_s = age_max_s
        self._held_runs = held_runs

    async def run(self) -> None:
        """Sweeps now and then, until cancelled."""
        while True:
            held = self._held_runs()
            try:
                gone = await asyncio.to_thread(self.sweep, held)
            except OSError as error:
                log.warning("old logs could not be removed", extra=fields(error=str(error)))
            else:
                if gone:
                    log.info("old logs removed", extra=fields(runs=len(gone), bytes=sum(run.bytes for run in gone)))
            await asyncio.sleep(limits.LOG_SWEEP_S)

    def sweep(self, held: set[str]) -> list[Kept]:
        """Removes what is too old or too much, and says what that was. Blocks."""
        kept = [*self._ended_replicas(), *self._ended_runs(held)]
        gone = to_remove(kept, bytes_max=self._bytes_max, age_max_s=self._age_max_s, now_s=time.time())
        for run in gone:
            shutil.rmtree(run.path, ignore_errors=True)
            if run.path.parent.parent == self._files.root:
                self._remove_empty(run.path.parent)
        return gone

    def _ended_replicas(self) -> Iterator[Kept]:
        if not self._files.root.is_dir():
            return
        for replica in sorted(os.listdir(self._files.root)):
            numbers = self._files.runs(replica)
            is_forgotten = (self._files.root / replica / "forgotten").exists()
            for number in numbers if is_forgotten else numbers[:-1]:
                place = self._files.directory(replica, number)
                # A run whose shim is still at work has not ended, whatever came after it.
                if (place / "exit.json").exists() or not (place / "pid.json").exists():
                    yield _measured(place)

    def _ended_runs(self, held: set[str]) -> Iterator[Kept]:
        if not self._runs_root.is_dir():
            return
        for path in sorted(self._runs_root.iterdir()):
            if path.is_dir() and not path.is_symlink() and path.name not in held:
                yield _measured(path)

    def _remove_empty(self, folder: Path) -> None:
        """A forgotten replica of which nothing is left."""
        names = os.listdir(folder) if folder.is_dir() else []
        if names == ["forgotten"]:
            shutil.rmtree(folder, ignore_errors=True)


def _measured(place: Path) -> Kept:
    size, changed_s = 0, 0.0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue  # removed meanwhile
            size += status.st_blocks * 512
            changed_s = max(changed_s, status.st_mtime)
    return Kept(place, size, changed_s or place.stat().st_mtime)
