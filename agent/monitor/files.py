"""Files that the monitor writes: whole lines only, a header once, a size limit, and a full disk that is survived.

What cannot be written is taken back to the last whole line, counted and said; the next lines are tried again, so a
disk that has room later goes on with a gap and never with half a row.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent.monitor.columns import ENGINE_COLUMNS, PROCESS_COLUMNS, NodeTable, csv_line, engine_row, process_row
from agent.monitor.engines import EngineSample
from agent.monitor.node import NodeSample

log = logging.getLogger(__name__)
KEEP = 5
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
"""Endings of files whose names say their form."""
STANDARD_OUTPUT = "-"
TAIL_BYTES = 1 << 20  # longer than any line


class Sink(Protocol):
    """Where samples go. Called from the writer's thread only."""

    name: str  # of the file, for people
    lost: int  # rows that could not be written

    def write(self, samples: Sequence[NodeSample]) -> None:
        """Takes samples, in order. Raises: OSError, when some or all of them are lost."""
        ...

    def close(self) -> None:
        """Completes the file. Raises: OSError."""
        ...


class LineFile:
    """A file of whole lines below an optional header; kept as FILE.1, FILE.2, ... beyond its limit."""

    def __init__(
        self, path: Path, *, header: str = "", limit_bytes: int = 0, keep: int = KEEP, is_resumed: bool = False
    ) -> None:
        """path: "-" is the standard output. limit_bytes: 0 is none.

        is_resumed: goes on behind what is there below the same header; otherwise a file that is there is kept as
        FILE.1. Raises: OSError.
        """
        self.path = path
        self._is_stream = str(path) == STANDARD_OUTPUT
        self._header = header.encode()
        self._limit_bytes = limit_bytes
        self._keep = keep
        self._good_bytes = 0
        self._fd = -1
        if not self._is_stream and not (is_resumed and self._resume()) and path.is_file() and path.stat().st_size:
            self._shift()
        self._open()

    def append(self, lines: Sequence[str]) -> None:
        """Writes lines, each with its end: all of them, or none. Raises: OSError."""
        data = "".join(lines).encode()
        is_full = self._limit_bytes and self._good_bytes + len(data) > self._limit_bytes
        if is_full and self._good_bytes > len(self._header):
            os.close(self._fd)
            self._fd = -1
            self._shift()
        self._open()
        self._put(data)

    def close(self) -> None:
        """Closes and syncs. Raises: OSError."""
        if self._fd >= 0:
            try:
                if self._is_regular():
                    os.fsync(self._fd)
            finally:
                os.close(self._fd)
                self._fd = -1

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            if self._is_regular():
                os.ftruncate(self._fd, self._good_bytes)
            raise
        self._good_bytes += len(data)

    def _open(self) -> None:
        """The file is open and begins with the header."""
        if self._fd < 0:
            if self._is_stream:
                self._fd = os.dup(1)
            else:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._good_bytes = os.fstat(self._fd).st_size if self._is_regular() and not self._is_stream else 0
        if self._good_bytes < len(self._header):
            self._put(self._header)

    def _resume(self) -> bool:
        """Goes on with a file that has our header; half a line at its end is cut off."""
        try:
            with self.path.open("rb") as file:
                if not self._header or file.readline() != self._header:
                    return False
                tail_at = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
                file.seek(tail_at)
                whole = tail_at + file.read().rfind(b"\n") + 1
        except OSError:
            return False
        os.truncate(self.path, max(whole, len(self._header)))
        return True

    def _shift(self) -> None:
        """FILE becomes FILE.1, FILE.1 becomes FILE.2, and the oldest goes."""
        for number in range(self._keep, 0, -1):
            newer = self.path.with_name(f"{self.path.name}.{number - 1}") if number > 1 else self.path
            if newer.exists():
                newer.replace(self.path.with_name(f"{self.path.name}.{number}"))

    def _is_regular(self) -> bool:
        return not self._is_stream and stat.S_ISREG(os.fstat(self._fd).st_mode)


class CsvSink:
    """Rows of the node's table."""

    def __init__(
        self, path: Path, table: NodeTable, *, limit_bytes: int = 0, keep: int = KEEP, is_resumed: bool = False
    ) -> None:
        """Raises: OSError."""
        self.name, self.lost = str(path), 0
        self._table = table
        self._file = LineFile(
            path, header=csv_line(table.names), limit_bytes=limit_bytes, keep=keep, is_resumed=is_resumed
        )

    def write(self, samples: Sequence[NodeSample]) -> None:
        _append(self, self._file, [csv_line(self._table.row(sample)) for sample in samples])

    def close(self) -> None:
        self._file.close()


class ProcessSink:
    """One line per process and look at the processes: `processes.csv`."""

    def __init__(self, path: Path, *, limit_bytes: int = 0, keep: int = KEEP, is_resumed: bool = False) -> None:
        """Raises: OSError."""
        self.name, self.lost = str(path), 0
        header = csv_line([name for name, _ in PROCESS_COLUMNS])
        self._file = LineFile(path, header=header, limit_bytes=limit_bytes, keep=keep, is_resumed=is_resumed)
        self._seen: object = None

    def write(self, samples: Sequence[NodeSample]) -> None:
        lines = []
        for sample in samples:
            if sample.processes is not self._seen:  # looked at less often than the node: no look twice
                self._seen = sample.processes
                lines += [csv_line(process_row(sample, process)) for process in sample.processes]
        if lines:
            _append(self, self._file, lines)

    def close(self) -> None:
        self._file.close()


class JsonSink:
    """One JSON object per sample and line, as it was taken: nested, with counters beside rates."""

    def __init__(self, path: Path, *, limit_bytes: int = 0, keep: int = KEEP) -> None:
        """Raises: OSError."""
        self.name, self.lost = str(path), 0
        self._file = LineFile(path, limit_bytes=limit_bytes, keep=keep)

    def write(self, samples: Sequence[NodeSample]) -> None:
        _append(self, self._file, [msgspec.json.encode(sample).decode() + "\n" for sample in samples])

    def close(self) -> None:
        self._file.close()


class EngineLog:
    """One line per look at an engine, written by whichever thread looked; what cannot be written is counted."""

    def __init__(self, path: Path, *, limit_bytes: int = 0, keep: int = KEEP, is_resumed: bool = False) -> None:
        """Raises: OSError."""
        self.lost = 0
        self.error = ""
        self._lock = threading.Lock()
        header = csv_line([name for name, _ in ENGINE_COLUMNS])
        self._file = LineFile(path, header=header, limit_bytes=limit_bytes, keep=keep, is_resumed=is_resumed)

    def take(self, sample: EngineSample) -> None:
        """Writes a look down."""
        with self._lock:
            try:
                self._file.append([csv_line(engine_row(sample))])
                self.error = ""
            except OSError as error:
                self.lost += 1
                if not self.error:
                    log.error("looks at engines cannot be written and are lost: %s", error.strerror)
                self.error = f"{self._file.path}: {error.strerror or error}"

    def close(self) -> None:
        """Completes the file. Raises: OSError."""
        with self._lock:
            self._file.close()


def _append(sink: Sink, file: LineFile, lines: list[str]) -> None:
    try:
        file.append(lines)
    except OSError:
        sink.lost += len(lines)
        raise


def make_sink(
    path: Path, table: NodeTable, *, limit_bytes: int = 0, keep: int = KEEP, is_resumed: bool = False
) -> Sink:
    """The sink that a file's name asks for: .parquet, .jsonl or .ndjson, else CSV. Raises: OSError, ExtraMissing."""
    if path.suffix == ".parquet":
        from agent.monitor.parquet import ParquetSink

        return ParquetSink(path, table)
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonSink(path, limit_bytes=limit_bytes, keep=keep)
    return CsvSink(path, table, limit_bytes=limit_bytes, keep=keep, is_resumed=is_resumed)
