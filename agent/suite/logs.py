"""Logs of a suite's parts, gathered into the files that the toolkit wrote: stdout.log, stderr.log, aggregated.jsonl.

A line's time is the one that its program wrote, where it can be read; else the time at which it was seen, and
`time_source` says which. Files are followed by one thread with bounded memory; a file that is not there yet is waited
for, and one that is replaced is read from its new beginning.
"""

from __future__ import annotations

import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

POLL_S = 0.2
MAX_LINE = 1 << 16
MAX_READ = 1 << 20
CATEGORY = {
    "server": "application",
    "client": "benchmark",
    "orchestrator": "benchmark",
    "monitor": "infrastructure",
    "slurm": "system",
}
_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d(?:[.,]\d{1,9})?)(Z|[+-]\d\d:?\d\d)?")
_VLLM = re.compile(r"\b(?:INFO|WARNING|ERROR|DEBUG)\s+(\d\d)-(\d\d) (\d\d:\d\d:\d\d)\b")
_GIN = re.compile(r"(\d{4})/(\d\d)/(\d\d) - (\d\d:\d\d:\d\d)")


@dataclass
class LogSource:
    """Where lines come from."""

    node: str
    component: str
    """server, client, monitor, orchestrator or slurm."""
    container_name: str = ""
    stdout: str = ""
    """A file; empty: `container_NODE.log` of a server, `COMPONENT_NODE.log` of others, in the collector's folder."""
    stderr: str = ""


class BaseLogCollector(ABC):
    """Gathers logs."""

    def __init__(self, config: dict[str, Any], output_dir: Path) -> None:
        self.config = config
        self.output_dir = Path(output_dir)
        self.running = False

    @abstractmethod
    def deploy(self, sources: list[LogSource]) -> bool:
        """Makes ready to collect from sources."""

    @abstractmethod
    def start_collection(self, sources: list[LogSource] | None = None) -> bool:
        """Begins; sources: when they were not given to `deploy`."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it collects."""

    @abstractmethod
    def stop_collection(self) -> dict[str, Any]:
        """Reads what is left and says what was collected."""

    def get_collector_type(self) -> str:
        """Its name."""
        return type(self).__name__.replace("LogCollector", "").lower()

    @classmethod
    def parse_collector_config(cls, recipe_config: Mapping[str, Any]) -> dict[str, Any]:
        """Its part of a recipe. Raises: ValueError."""
        return dict(recipe_config.get("logging") or {})


@dataclass(slots=True)
class _File:
    source: LogSource
    path: Path
    stream: str
    file: BinaryIO | None = None
    inode: int = 0
    rest: bytes = b""
    lines: int = 0


@dataclass(slots=True)
class _Outputs:
    stdout: Any = None
    stderr: Any = None
    aggregated: Any = None
    own: dict[str, Any] = field(default_factory=dict)


class TailerLogCollector(BaseLogCollector):
    """Follows files."""

    def __init__(self, config: dict[str, Any], output_dir: Path) -> None:
        """config: a recipe's `logging`, and `folder` where sources lie when it is not the output folder."""
        super().__init__(config, output_dir)
        outputs = config.get("outputs") or {}
        is_text = config.get("format") == "text"
        self.paths = {
            "stdout": self.output_dir / Path(str(outputs.get("stdout") or "stdout.log")).name,
            "stderr": self.output_dir / Path(str(outputs.get("stderr") or "stderr.log")).name,
            "aggregated": self.output_dir
            / Path(str(outputs.get("aggregated") or "aggregated.jsonl"))
            .with_suffix(".log" if is_text else ".jsonl")
            .name,
        }
        self._is_text = is_text
        self._is_distributed = config.get("aggregation") == "distributed"
        self._has_aggregated = bool(config.get("create_jsonl", True)) and not self._is_distributed
        self._flush_s = float(config.get("flush_interval") or 5.0)
        categories = config.get("categories")
        self._categories = set(CATEGORY.values()) if categories is None else set(categories)
        self._folder = Path(config.get("folder") or self.output_dir)
        self._files: list[_File] = []
        self._out = _Outputs()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._left_out = 0

    @classmethod
    def parse_collector_config(cls, recipe_config: Mapping[str, Any]) -> dict[str, Any]:
        """Its part of a recipe. Raises: ValueError for another kind of collector."""
        found = super().parse_collector_config(recipe_config)
        if found.get("type", "tailer") != "tailer":
            raise ValueError(f"logging.type {found['type']!r}: tailer is the one there is")
        return found

    def deploy(self, sources: list[LogSource]) -> bool:
        """Opens the outputs; sources of categories that are not wanted are left out."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for source in sources:
            if CATEGORY.get(source.component, "application") not in self._categories:
                self._left_out += 1
                continue
            name = "container" if source.component == "server" else source.component
            out = Path(source.stdout) if source.stdout else self._folder / f"{name}_{source.node}.log"
            err = Path(source.stderr) if source.stderr else out.with_suffix(".err")
            self._files += [_File(source, out, "stdout"), _File(source, err, "stderr")]
        if not self._is_distributed:
            self._out.stdout, self._out.stderr = (self.paths[name].open("a") for name in ("stdout", "stderr"))
        if self._has_aggregated:
            self._out.aggregated = self.paths["aggregated"].open("a")
        return True

    def start_collection(self, sources: list[LogSource] | None = None) -> bool:
        """Follows the files in a thread; the flag file `loggers_ready` says that it does."""
        if sources is not None and not self._files:
            self.deploy(sources)
        self.running = True
        self._thread = threading.Thread(target=self._follow, name="suite-logs", daemon=True)
        self._thread.start()
        (self.output_dir / "loggers_ready").touch()
        return True

    def is_ready(self) -> bool:
        """Whether the flag file is there and the thread lives."""
        return (self.output_dir / "loggers_ready").exists() and self.running

    def stop_collection(self) -> dict[str, Any]:
        """Reads every file to its end; counts of lines by file, and what was never there."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
        for one in self._files:
            self._read(one, is_last=True)
            if one.file is not None:
                one.file.close()
        for handle in (self._out.stdout, self._out.stderr, self._out.aggregated, *self._out.own.values()):
            if handle is not None:
                handle.close()
        (self.output_dir / "loggers_ready").unlink(missing_ok=True)
        self.running = False
        counts = {
            stream: sum(one.lines for one in self._files if one.stream == stream) for stream in ("stdout", "stderr")
        }
        missing = sorted({str(one.path) for one in self._files if one.file is None and one.stream == "stdout"})
        return {
            "stdout_lines": counts["stdout"],
            "stderr_lines": counts["stderr"],
            "jsonl_lines": sum(counts.values()) if self._has_aggregated else 0,
            "files_created": [str(path) for path in self._written()],
            "missing": missing,
            "sources_left_out": self._left_out,
        }

    def _written(self) -> Iterable[Path]:
        if self._is_distributed:
            return [Path(handle.name) for handle in self._out.own.values()]
        return [path for name, path in self.paths.items() if name != "aggregated" or self._has_aggregated]

    def _follow(self) -> None:
        since_flush = 0.0
        while not self._stop.wait(POLL_S):
            for one in self._files:
                self._read(one, is_last=False)
            since_flush += POLL_S
            if since_flush >= self._flush_s:
                since_flush = 0.0
                for handle in (self._out.stdout, self._out.stderr, self._out.aggregated, *self._out.own.values()):
                    if handle is not None:
                        handle.flush()

    def _read(self, one: _File, *, is_last: bool) -> None:
        """Takes what has come, at most MAX_READ at a time but for the last."""
        try:
            inode = os.stat(one.path).st_ino
        except OSError:
            inode = 0
        if one.file is not None and inode and inode != one.inode:
            self._drain(one, is_last=True)
            one.file.close()
            one.file = None
        if one.file is None:
            if not inode:
                return
            try:
                one.file, one.inode = one.path.open("rb"), inode
            except OSError:
                return
        self._drain(one, is_last=is_last)

    def _drain(self, one: _File, *, is_last: bool) -> None:
        assert one.file is not None
        while data := one.file.read(MAX_READ):
            *lines, one.rest = (one.rest + data).split(b"\n")
            for line in lines:
                self._take(one, line)
            if len(one.rest) > MAX_LINE:
                self._take(one, one.rest)
                one.rest = b""
            if not is_last:
                break
        if is_last and one.rest:
            self._take(one, one.rest)
            one.rest = b""

    def _take(self, one: _File, line: bytes) -> None:
        text = line[:MAX_LINE].decode(errors="replace").rstrip("\r")
        told = time_of(text)
        stamp = (told or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        one.lines += 1
        shown = f"[{stamp}] [{one.source.node}] [{one.source.component}] {text}\n"
        if self._is_distributed:
            self._own(one).write(shown if self._is_text else self._json(one, stamp, text, told))
            return
        (self._out.stdout if one.stream == "stdout" else self._out.stderr).write(shown)
        if self._out.aggregated is not None:
            self._out.aggregated.write(shown if self._is_text else self._json(one, stamp, text, told))

    def _own(self, one: _File) -> Any:
        """The output of one node's component."""
        name = f"{one.source.component}_{one.source.node}_{one.stream}." + ("log" if self._is_text else "jsonl")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"collected_{name}")
        if name not in self._out.own:
            self._out.own[name] = (self.output_dir / name).open("a")
        return self._out.own[name]

    @staticmethod
    def _json(one: _File, stamp: str, text: str, told: datetime | None) -> str:
        return (
            json.dumps(
                {
                    "timestamp": stamp,
                    "node": one.source.node,
                    "component": one.source.component,
                    "message": text,
                    "stream": one.stream,
                    "category": CATEGORY.get(one.source.component, "application"),
                    "time_source": "line" if told is not None else "read",
                }
            )
            + "\n"
        )


def time_of(line: str) -> datetime | None:
    """The time that a line itself tells, within its first characters; None for none. Without a zone: this machine's."""
    head = line[:120]
    try:
        if (found := _ISO.search(head)) is not None:
            zone = (found[3] or "").replace("Z", "+00:00")
            clock, _, parts = found[2].replace(",", ".").partition(".")
            text = f"{found[1]}T{clock}" + (f".{parts[:6].ljust(6, '0')}" if parts else "") + zone
            return datetime.fromisoformat(text).astimezone(UTC)
        if (found := _GIN.search(head)) is not None:
            return datetime.fromisoformat(f"{found[1]}-{found[2]}-{found[3]}T{found[4]}").astimezone(UTC)
        if (found := _VLLM.search(head)) is not None:
            now = datetime.now().astimezone()
            made = datetime.fromisoformat(f"{now.year}-{found[1]}-{found[2]}T{found[3]}").astimezone(UTC)
            # A line of December that is read in January is of last year.
            return made.replace(year=made.year - 1) if (made - now).days > 1 else made
    except ValueError:
        return None
    return None
