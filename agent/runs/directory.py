"""Directories of runs: `runs/RUN/` in the state directory, through which a run's process and the agent talk.

    about.json     {"run", "generation", "kind"}        whose directory it is; by the agent, first of all
    order.json     what shall be done, with secrets; by the agent, removed once no process will read it
    pid.json       {"boot_id", "pid", "ticks"}          by the agent, once the process is there
    status.json    how far the process is; by the process, whole or not at all
    fire.json      {"start_boottime_ns"}                when an armed load generator shall begin; by the agent
    end.json       {"how": "finish"}                    by the agent
    ticks.jsonl    a line for each second; begun anew when it has grown large; by the process
    generator.log  what the process wrote to stdout and stderr
    load.bin, or monitor.csv, engine.csv, processes.csv what was measured

The process needs no agent to go on and the agent finds it again by these files. Everything is 0600 in 0700
directories. All functions block and are called from threads.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common import limits, wire
from common.errors import ErrorInfo
from common.fsio import write_atomic
from common.statedir import write_secret
from herder.decoding import UNREADABLE

T = TypeVar("T")
LOG = "generator.log"
ARTIFACTS = {"load": ("load.bin", LOG), "monitor": ("monitor.csv", "engine.csv", "processes.csv", LOG)}
LOG_BYTES = 16 << 20  # a longer log is begun anew; what a run has to say fits many times
TICKS_BYTES = 1 << 20
TAIL_BYTES = 64 << 10
LEFTOVER_S = 14 * 86_400


class About(msgspec.Struct, frozen=True):
    """about.json."""

    run: str
    generation: int
    kind: str


class LoadOrder(msgspec.Struct, frozen=True):
    """order.json of a load run. Times are CLOCK_BOOTTIME; 0: none."""

    run: str
    spec: dict[str, Any]
    urls: tuple[str, ...]
    part: int = 0
    parts: int = 1
    spread: str = "round-robin"
    token: str = ""
    stop_boottime_ns: int = 0
    file_roots: tuple[str, ...] = ()
    allow_link_local: bool = False
    ca_file: str = ""
    """What the certificate of a head is checked against; like the client's own below, of loads with a token only."""
    cert_file: str = ""
    key_file: str = ""


class Identity(msgspec.Struct, frozen=True):
    """pid.json."""

    boot_id: str
    pid: int
    ticks: int


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """status.json. state: preparing | armed | running | ended | failed."""

    state: str
    digest: str = ""
    start_boottime_ns: int = 0
    late_ms: int = 0
    error: ErrorInfo | None = None


class Fire(msgspec.Struct, frozen=True):
    """fire.json."""

    start_boottime_ns: int


class RunDirectory:
    """One run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, kind: type[T]) -> T | None:
        """A document; None while there is none that can be read."""
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=kind, strict=False)
        except (OSError, *UNREADABLE):
            return None

    def write(self, name: str, document: object, *, is_durable: bool = False) -> None:
        """Writes a document, whole or not at all; past a reboot only what is durable matters. Raises: OSError."""
        data = msgspec.json.encode(document)
        if is_durable:
            write_atomic(self.path / name, data)
            return
        part = self.path / f".{name}.part"
        part.write_bytes(data)
        part.replace(self.path / name)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).exists()

    def status(self) -> Status | None:
        """How far the process says that it is."""
        return self.read("status.json", Status)

    def artifacts(self, kind: str) -> list[str]:
        """What of the run is to be sent, of what is there."""
        return [name for name in ARTIFACTS[kind] if self.has(name)]

    def ticks(self, offset: int) -> tuple[int, list[wire.RunTick]]:
        """The seconds told since `offset`, and where to go on."""
        try:
            with (self.path / "ticks.jsonl").open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(offset if offset <= size else 0)  # shorter than it was: begun anew
                begin = file.tell()
                data = file.read(TICKS_BYTES)
        except OSError:
            return offset, []
        whole = data[: data.rfind(b"\n") + 1]
        found = []
        for line in whole.splitlines():
            try:
                found.append(msgspec.json.decode(line, type=wire.RunTick))
            except UNREADABLE:
                continue  # cut off by a full disk
        return begin + len(whole), found

    def last_lines(self) -> tuple[str, ...]:
        """The end of the log, cut to a sane length."""
        try:
            with (self.path / LOG).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read(TAIL_BYTES).decode(errors="replace")
        except OSError:
            return ()
        lines = ["".join(char for char in line if char.isprintable()) for line in text.splitlines()]
        return tuple(line[: limits.LAST_LOG_CHARS] for line in lines[-limits.LAST_LOG_LINES :])

    def bound_log(self) -> None:
        """Begins a log anew that has grown beyond all measure."""
        path = self.path / LOG
        try:
            if path.stat().st_size > LOG_BYTES:
                os.truncate(path, 0)  # it is written by appending, so the writer goes on at the front
        except OSError:
            pass  # not there (yet)

    def tidy(self) -> None:
        """Removes what no process reads any more and may hold secrets."""
        (self.path / "order.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "files", ignore_errors=True)


class RunDirectories:
    """The folder `runs` of a state directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def of(self, run: str) -> RunDirectory:
        """A run's directory, whether it is there or not."""
        return RunDirectory(self.root / run)

    def mark(self, run: str) -> str:
        """What the processes of a run carry in their environment; also tells agents of one machine apart."""
        return str(self.root / run)

    def make(self, about: About, order: object) -> RunDirectory:
        """A fresh directory with its order. Raises: OSError."""
        found = self.of(about.run)
        if found.path.exists():
            shutil.rmtree(found.path)
        found.path.mkdir(mode=0o700, parents=True)
        found.write("about.json", about, is_durable=True)
        write_secret(found.path / "order.json", msgspec.json.encode(order).decode())
        return found

    def remove(self, run: str) -> None:
        """Deletes a run's directory. Raises: OSError."""
        path = self.of(run).path
        if path.exists():
            shutil.rmtree(path)

    def names(self) -> list[str]:
        """Runs that have a directory."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []

    def prune(self, known: Collection[str]) -> None:
        """Of directories that no run speaks of the newest stay for a while, without their secrets."""
        strangers = [self.root / name for name in self.names() if name not in known]
        strangers.sort(key=_age_ns)
        oldest = (time.time() - LEFTOVER_S) * 1e9
        for path in strangers:
            if path in strangers[: -limits.RUNS_KEPT] or _age_ns(path) < oldest:
                shutil.rmtree(path, ignore_errors=True)
            else:
                RunDirectory(path).tidy()


def _age_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
