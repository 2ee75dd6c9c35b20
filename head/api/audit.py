"""The audit log: who changed what, or tried to, as JSON lines in `state_dir/audit.log` (0600).

A line holds who, from where, which method and path, the status, the request id and what was changed; never a body,
a token or a query string. Lines are written by one thread in order, so that a slow disk does not stop the loop;
when the queue is full or the disk refuses, the loss is logged and counted, and the log itself says how many.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path

import msgspec

from common import limits

log = logging.getLogger(__name__)


class AuditLine(msgspec.Struct, frozen=True):
    """One request that changed something, or wanted to."""

    at_ms: int
    actor: str  # "name(key id)"; "" when nobody was authenticated
    role: str
    address: str
    method: str
    path: str
    status: int
    request_id: str
    changed: str = ""  # "kind:key"
    code: str = ""  # of the error


class _Lost(msgspec.Struct, frozen=True):
    lost: int


class AuditLog:
    """Appends lines in a thread of its own. `close` writes what is queued."""

    def __init__(
        self, path: Path, *, file_bytes: int = limits.AUDIT_BYTES, files_kept: int = limits.AUDIT_FILES
    ) -> None:
        self.path = path
        self.lost = 0  # lines that did not reach the disk since the start
        self._file_bytes = file_bytes
        self._files_kept = files_kept
        self._queue: queue.Queue[AuditLine | None] = queue.Queue(limits.AUDIT_QUEUE)
        self._unreported = 0
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)

    def start(self) -> None:
        """Begins to write; what was queued before is not lost."""
        self._thread.start()

    def write(self, line: AuditLine) -> None:
        """Queues one line; never blocks and never raises."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._lose("the queue is full")

    def close(self) -> None:
        """Writes what is queued and ends the thread; waits at most 10 s for a disk that hangs."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=5)
            except queue.Full:
                self._lose("the queue is full")
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._append(line)
            except OSError as error:
                self._lose(str(error))

    def _append(self, line: AuditLine) -> None:
        data = msgspec.json.encode(line) + b"\n"
        if self._unreported:
            data = msgspec.json.encode(_Lost(self._unreported)) + b"\n" + data
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and size + len(data) > self._file_bytes:
                self._rotate()
                os.close(descriptor)
                descriptor = os.open(
                    self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                )
                size = 0
            written = os.write(descriptor, data)
            if written < len(data):  # a full disk: take the torn line back
                os.ftruncate(descriptor, size)
                raise OSError("the disk took only a part of the line")
            self._unreported = 0
        finally:
            os.close(descriptor)

    def _rotate(self) -> None:
        """audit.log -> audit.log.1 -> ...; the oldest goes."""
        for number in range(self._files_kept, 0, -1):
            source = self.path.with_name(f"{self.path.name}.{number - 1}") if number > 1 else self.path
            if source.exists():
                source.replace(self.path.with_name(f"{self.path.name}.{number}"))

    def _lose(self, why: str) -> None:
        self.lost += 1
        self._unreported += 1
        if self.lost == 1 or self.lost % 1_000 == 0:
            log.error("audit log: %d lines lost: %s", self.lost, why)
