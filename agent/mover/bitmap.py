"""Which chunks of an unfinished file are here: the file `have` beside its data.

Two bitmaps. *Synced*: data and leaf were made durable before the bit was written, so after any crash the chunk is
good and is not hashed again. *Young*: written (without a sync) as soon as the chunk is in the file; after a crash
these are candidates, each is hashed and compared with its leaf, so a killed process loses nothing and a power cut
loses at most what was never synced. Bits are only ever set while a file grows, so a torn write of the bitmap leaves
each bit either old or new, and both are true. Layout: 64 bytes of header, the synced bits at 4096, the young bits at
the next multiple of 4096.
"""

from __future__ import annotations

import os
import struct
import threading

from agent.store.digests import chunk_count
from common.fsio import Files, align_up

_MAGIC = b"HDRHAVE1"
_HEADER = struct.Struct("<8sQQ")
_BITS_AT = 4096


class Bitmap:
    """`have` of one part, open. Thread-safe. The caller syncs data and leaves before `checkpoint`."""

    def __init__(self, fd: int, size: int, chunk_bytes: int, files: Files) -> None:
        self.count = chunk_count(size, chunk_bytes)
        self._fd, self._files = fd, files
        self._size, self._chunk_bytes = size, chunk_bytes
        self._width = -(-self.count // 8)
        self._young_at = _BITS_AT + align_up(self._width)
        self._lock = threading.Lock()
        self._synced = bytearray(self._width)
        self._have = bytearray(self._width)
        self._young_on_disk = bytearray(self._width)

    def create(self) -> None:
        """Writes an empty bitmap."""
        self._files.pwrite(self._fd, _HEADER.pack(_MAGIC, self._size, self._chunk_bytes), 0)
        os.ftruncate(self._fd, self._young_at + align_up(self._width))
        self._files.sync_data(self._fd)

    def load(self) -> bool:
        """Reads what an earlier process left; False when this is not the bitmap of such a file."""
        header = os.pread(self._fd, _HEADER.size, 0)
        if header != _HEADER.pack(_MAGIC, self._size, self._chunk_bytes):
            return False
        synced = os.pread(self._fd, self._width, _BITS_AT)
        young = os.pread(self._fd, self._width, self._young_at)
        if len(synced) != self._width or len(young) != self._width:
            return False
        self._synced, self._have, self._young_on_disk = bytearray(synced), bytearray(synced), bytearray(young)
        return True

    def has(self, index: int) -> bool:
        """Whether the chunk is in the file and verified."""
        return bool(self._have[index >> 3] & 1 << (index & 7))

    def candidates(self) -> list[int]:
        """Chunks that were written but not known to be synced when the last process ended."""
        return [index for index in range(self.count) if _bit(self._young_on_disk, index) and not self.has(index)]

    def synced_chunks(self) -> list[int]:
        """Chunks that need no second look."""
        return [index for index in range(self.count) if _bit(self._synced, index)]

    def missing(self) -> list[int]:
        """Chunks to fetch."""
        return [index for index in range(self.count) if not self.has(index)]

    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return all(self.has(index) for index in range(self.count))

    def set(self, index: int) -> None:
        """The chunk was verified and written."""
        with self._lock:
            _set(self._have, index)
            if not _bit(self._young_on_disk, index):
                _set(self._young_on_disk, index)
                at = index >> 3
                self._files.pwrite(self._fd, bytes(self._young_on_disk[at : at + 1]), self._young_at + at)

    def snapshot(self) -> bytes:
        """What is had now. Take it, sync data and leaves, then give it to `checkpoint`."""
        with self._lock:
            return bytes(self._have)

    def checkpoint(self, snapshot: bytes) -> None:
        """Makes the chunks of the snapshot trusted after a crash."""
        self._files.pwrite(self._fd, snapshot, _BITS_AT)
        self._files.sync_data(self._fd)
        with self._lock:
            self._synced = bytearray(snapshot)

    def clear(self, index: int | None = None) -> None:
        """Forgets one chunk, or all: durable before anything is written in its place."""
        with self._lock:
            for bits in (self._have, self._synced, self._young_on_disk):
                if index is None:
                    bits[:] = bytes(self._width)
                else:
                    bits[index >> 3] &= ~(1 << (index & 7))
            self._files.pwrite(self._fd, bytes(self._synced), _BITS_AT)
            self._files.pwrite(self._fd, bytes(self._young_on_disk), self._young_at)
            self._files.sync_data(self._fd)


def _bit(bits: bytearray, index: int) -> bool:
    return bool(bits[index >> 3] & 1 << (index & 7))


def _set(bits: bytearray, index: int) -> None:
    bits[index >> 3] |= 1 << (index & 7)
