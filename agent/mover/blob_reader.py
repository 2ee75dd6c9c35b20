"""How a blob's bytes get from its file to a socket: by sendfile from the page cache, or past it from the disk.

Bytes that are in the page cache leave by sendfile, without a copy. Bytes that are not would, by sendfile, be read
into it first: gigabytes of cache filled with what this node does not need, at the cost of what it does, and of more
CPU than the whole rest of the copy. They are read with O_DIRECT into a buffer of this thread and sent from there. It
is decided anew for every 4 MiB. At most 16 threads do the latter at a time, so that the buffers have a bound; the
others use sendfile, as do file systems without O_DIRECT.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import BinaryIO

from agent.residency import is_cached
from common import fsio

PIECE_BYTES = 4 << 20
DIRECT_READERS = 16


class BlobReader:
    """Shared by all connections of a blob server."""

    def __init__(self) -> None:
        self.buffers = threading.BoundedSemaphore(DIRECT_READERS)
        self.cached_bytes = self.direct_bytes = 0  # sent so far; about, as they are counted without a lock

    def begin(self, connection: socket.socket, file: BinaryIO) -> Sending:
        """For one answer."""
        return Sending(self, connection, file)


class Sending:
    """One answer's body. A context manager."""

    def __init__(self, owner: BlobReader, connection: socket.socket, file: BinaryIO) -> None:
        self._owner, self._connection, self._file = owner, connection, file
        self._direct_fd = -1
        self._view = memoryview(b"")
        self._is_refused = False  # no buffer is free, or the file system has no O_DIRECT

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._owner.buffers.release()

    def send(self, offset: int, left: int) -> int:
        """Sends some bytes from there, at most one piece; returns how many. Raises: OSError."""
        start = offset // fsio.ALIGN_BYTES * fsio.ALIGN_BYTES
        wanted = min(left, PIECE_BYTES - (offset - start))
        if not self._is_refused and not is_cached(self._file.fileno(), start, offset - start + wanted):
            count = self._send_direct(start, offset - start, wanted)
            if count:
                self._owner.direct_bytes += count
                return count
        count = os.sendfile(self._connection.fileno(), self._file.fileno(), offset, wanted)
        if count == 0:
            raise ConnectionError("the blob became shorter")
        self._owner.cached_bytes += count
        return count

    def _send_direct(self, start: int, skip: int, wanted: int) -> int:
        """Reads from an aligned offset and sends what comes after `skip`; 0 when it cannot be done here."""
        if self._direct_fd < 0 and not self._open():
            return 0
        try:
            count = os.preadv(self._direct_fd, [self._view[: fsio.align_up(skip + wanted)]], start)
        except OSError:
            self._is_refused = True  # it let itself be opened only
            return 0
        end = min(count, skip + wanted)
        if end <= skip:
            return 0  # the file became shorter: sendfile says so
        self._connection.sendall(self._view[skip:end])
        return end - skip

    def _open(self) -> bool:
        path = f"/proc/self/fd/{self._file.fileno()}"  # the very file that was opened, whatever its name means now
        self._is_refused = not self._owner.buffers.acquire(blocking=False)
        if self._is_refused:
            return False
        try:
            self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self._is_refused = True
            self._owner.buffers.release()
            return False
        self._view = memoryview(fsio.aligned_buffer(PIECE_BYTES))
        return True
