"""A daemon's own log as files: JSON lines in segments below its state directory, read as every other log is.

What goes to standard error stands here too, so that it can be asked for through the API wherever a service manager
keeps the other. A thread writes: a disk that hangs stops neither leases nor requests, it costs lines, and how many is
said once it writes again. Segments are removed by total size and by age. Tokens never get here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import deque
from pathlib import Path

from common.logs.files import end_of, segments
from common.logs.index import ENTRY, STARTS_LINE, SUFFIX
from common.telemetry import LineFormatter

FOLDER = "logs"  # in the state directory
SEGMENTS = 8
INDEX_MS = 50
QUEUE_LINES = 10_000
FLUSH_S = 2.0  # at the end
AGE_CHECK_S = 600.0
_SECRET = re.compile(
    r"\b(hdr_[a-z]+_[A-Za-z0-9-]{1,64}_)[A-Za-z0-9_-]{16,}|\b(hf_)[A-Za-z0-9]{16,}|\b([Bb]earer )[A-Za-z0-9._~+/-]{8,}"
)


class Segments:
    """Appends lines; goes on where an earlier process ended. One writer at a time: the state directory's owner."""

    def __init__(self, folder: Path, *, bytes_max: int, age_max_s: float) -> None:
        self._folder = folder
        self._segment_bytes = max(4_096, bytes_max // SEGMENTS)
        self._bytes_max = bytes_max
        self._age_max_s = age_max_s
        self._offset = 0
        self._start = 0
        self._log = self._index = -1
        self._noted_ms = 0

    def open(self) -> None:
        """Makes the folder and goes on in its last segment. Raises: OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._offset = end_of(self._folder)
        found = segments(self._folder)
        self._begin(found[-1][0] if found else 0)

    def write(self, data: bytes) -> None:
        """Appends whole lines. Raises: OSError; then `reopen` is called before the next."""
        if self._offset > self._start and self._offset - self._start + len(data) > self._segment_bytes:
            self._begin(self._start + os.fstat(self._log).st_size)
            self.sweep()
        now_ms = time.time_ns() // 1_000_000
        if not 0 <= now_ms - self._noted_ms < INDEX_MS:
            self._noted_ms = now_ms
            flag = STARTS_LINE if self._offset == self._start else 0
            os.write(self._index, ENTRY.pack(self._offset, now_ms | flag))
        while data:
            written = os.write(self._log, data)
            self._offset += written
            data = data[written:]

    def sweep(self) -> None:
        """Removes what is too old, or too much; never the present segment."""
        found = segments(self._folder)[:-1]
        oldest_s = time.time() - self._age_max_s
        total = self._segment_bytes
        for _, path in reversed(found):
            with contextlib.suppress(OSError):
                status = path.stat()
                total += status.st_size
                if total > self._bytes_max or status.st_mtime < oldest_s:
                    path.unlink()
                    path.with_name(path.name + SUFFIX).unlink(missing_ok=True)

    def close(self) -> None:
        """Ends."""
        for descriptor in (self._log, self._index):
            if descriptor >= 0:
                os.close(descriptor)
        self._log = self._index = -1

    def _begin(self, start: int) -> None:
        self.close()
        path = self._folder / f"log.{start:015d}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._log = os.open(path, flags, 0o600)
        self._index = os.open(path.with_name(path.name + SUFFIX), flags, 0o600)
        # What a crash left: half an entry, or half a line, which the next must not be glued to.
        os.ftruncate(self._index, os.fstat(self._index).st_size // ENTRY.size * ENTRY.size)
        self._start, self._noted_ms = start, 0
        self._offset = start + os.fstat(self._log).st_size
        if self._offset > start and not _ends_line(path):
            self._offset += os.write(self._log, b"\n")


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class OwnLog(logging.Handler):
    """Hands the records of this process to the thread that writes them."""

    def __init__(self, folder: Path, *, bytes_max: int, age_max_s: float) -> None:
        super().__init__()
        self.setFormatter(LineFormatter(is_json=True))
        self.lost_lines = 0
        self._files = Segments(folder, bytes_max=bytes_max, age_max_s=age_max_s)
        self._lines: deque[bytes] = deque()
        self._news = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._write_all, name="own-log", daemon=True)

    @classmethod
    def start(cls, state_dir: Path, *, bytes_max: int, age_max_s: float) -> OwnLog:
        """Begins to keep what this process logs; `close` ends it."""
        made = cls(state_dir / FOLDER, bytes_max=bytes_max, age_max_s=age_max_s)
        made._thread.start()
        logging.getLogger().addHandler(made)
        return made

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a line; drops it when the disk has not kept up for long."""
        try:
            line = (
                _SECRET.sub(lambda found: f"{found[1] or found[2] or found[3]}...", self.format(record)).encode()
                + b"\n"
            )
        except Exception:  # noqa: BLE001 - as every handler: a record that cannot be formatted harms nobody
            self.handleError(record)
            return
        with self._news:
            if len(self._lines) >= QUEUE_LINES:
                self.lost_lines += 1
            else:
                self._lines.append(line)
                self._news.notify()

    def close(self) -> None:
        """Writes what is queued, for at most FLUSH_S, and ends."""
        logging.getLogger().removeHandler(self)
        with self._news:
            self._is_closing = True
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join(FLUSH_S)
        super().close()

    def _write_all(self) -> None:
        is_open = False
        swept = time.monotonic()
        while True:
            with self._news:
                if not self._lines and not self._is_closing:
                    self._news.wait(AGE_CHECK_S)
                lines = list(self._lines)
                self._lines.clear()
                lost, self.lost_lines = self.lost_lines, 0
                is_ending = self._is_closing and not lines
            if is_ending:
                self._files.close()
                return
            if lost:
                lines.append(_lost_line(lost))
            try:
                if not is_open:
                    self._files.open()
                    self._files.sweep()
                    is_open = True
                for line in lines:
                    self._files.write(line)
                if time.monotonic() - swept > AGE_CHECK_S:
                    swept = time.monotonic()
                    self._files.sweep()
            except OSError:
                is_open = False  # a full disk: opened anew with the next lines
                with self._news:
                    self.lost_lines += len(lines)


def _lost_line(count: int) -> bytes:
    record = logging.LogRecord(
        __name__, logging.WARNING, __file__, 0, f"{count} lines of this log could not be written", None, None
    )
    return LineFormatter(is_json=True).format(record).encode() + b"\n"
