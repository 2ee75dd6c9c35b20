"""Where the logs of a node lie: of its engines, its parts of benchmarks, the agent itself, and Slurm's jobs.

A name from outside becomes a path only here. Ids are checked before, and Slurm's files are looked for by their exact
name below the folders that the operator has named, without following links. All functions block.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from agent.run_files import RunFiles
from common import limits
from common.errors import InvalidValue, NotFound
from common.logs.stream import OneLog, Runs

RUN_LOG = "generator.log"
ENDED = (b'"ended"', b'"failed"')  # as status.json says that a run's process has done its work
_ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,158}[a-z0-9])?")
_SLURM_JOB = re.compile(r"\d{1,12}(?:[_+]\d{1,9})?")


class ReplicaRuns:
    """The runs of an engine."""

    def __init__(self, files: RunFiles, replica: str) -> None:
        self._files = files
        self._replica = replica

    def numbers(self) -> list[int]:
        """Those that are kept."""
        return self._files.runs(self._replica)

    def place(self, number: int) -> Path:
        """Its folder of segments."""
        return self._files.directory(self._replica, number)

    def has_ended(self, number: int) -> bool:
        """Whether its shim has written the end, or a later run has begun."""
        place = self.place(number)
        return (place / "exit.json").exists() or not place.exists() or number != max(self.numbers(), default=number)

    def is_over(self) -> bool:
        """Whether the head has forgotten the replica."""
        folder = self._files.root / self._replica
        return not folder.exists() or (folder / "forgotten").exists()


class LogSources:
    """Names and their logs."""

    def __init__(self, files: RunFiles, runs_root: Path, own: Path, slurm_roots: tuple[str, ...]) -> None:
        self._files = files
        self._runs_root = runs_root
        self._own = own
        self._slurm_roots = tuple(Path(root) for root in slurm_roots)

    def find(self, source: str) -> Runs:
        """The runs of a log. Raises: InvalidValue, NotFound."""
        kind, _, name = source.partition(":")
        if kind == "agent" and not name:
            return OneLog(self._own)
        if kind == "slurm":
            return OneLog(self._slurm(name))
        if kind not in ("replica", "run"):
            raise InvalidValue(f"{source[:80]!r} is no log of a node", hint="replica:ID, run:ID, agent or slurm:JOBID")
        if not _ID.fullmatch(name) or ".." in name:
            raise InvalidValue(f"{name[:80]!r} is not an id")
        return ReplicaRuns(self._files, name) if kind == "replica" else self._run(name)

    def _run(self, run: str) -> Runs:
        folder = self._runs_root / run
        if not (folder / RUN_LOG).is_file():
            raise NotFound(f"there is no log of run {run} on this node", hint="the head keeps those of ended runs")
        return OneLog(folder / RUN_LOG, lambda: _has_ended(folder))

    def _slurm(self, job: str) -> Path:
        """The file of a job below one of the roots."""
        if not _SLURM_JOB.fullmatch(job):
            raise InvalidValue(f"{job[:40]!r} is not the id of a Slurm job", hint="as 4711 or 4711_3")
        if not self._slurm_roots:
            raise NotFound(
                "this node has no log roots", hint="logs.roots of its agent names folders with Slurm's files"
            )
        wanted, left = f"slurm-{job}.out", limits.SLURM_LOG_ENTRIES
        for root in self._slurm_roots:
            for folder, folders, names in os.walk(root):
                left -= len(folders) + len(names)
                if wanted in names:
                    path = Path(folder, wanted)
                    if stat.S_ISREG(path.lstat().st_mode):
                        return path
                if len(Path(folder).relative_to(root).parts) >= limits.SLURM_LOG_DEPTH or left <= 0:
                    folders.clear()
        more = "" if left > 0 else "; not every folder was looked into"
        raise NotFound(f"there is no {wanted} below this node's log roots{more}")


def _has_ended(folder: Path) -> bool:
    try:
        said = (folder / "status.json").read_bytes()
    except OSError:
        return False  # not said yet; a folder that is gone is noticed by its log
    return any(word in said for word in ENDED)
