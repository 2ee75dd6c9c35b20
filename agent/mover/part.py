"""One unfinished file: its private directory, its data, its leaves and its bitmap.

    part/<key>.<instance>.<id>/data     the file, fallocated, written out of order
    part/<key>.<instance>.<id>/leaves   32 bytes per chunk, as they were computed on arrival
    part/<key>.<instance>.<id>/have     the bitmaps (agent/mover/bitmap.py)
    part/<key>.<instance>.<id>/src.json what it is: size, chunk size, blob id if known, the source's validator

A chunk counts only after `land`: hashed, compared with its leaf where the leaf is known, written. Order of a
checkpoint: data and leaves are synced, then the bits. One process writes a part; its threads share this object.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import msgspec

from agent.mover.bitmap import Bitmap
from agent.store import digests
from agent.store.digests import DIGEST_BYTES, chunk_count, chunk_digest
from common import fsio
from common.fsio import Files, align_up
from herder.decoding import UNREADABLE


class PartSource(msgspec.Struct, frozen=True):
    """src.json: what this part is of. A part whose source says something else now is started anew."""

    size: int
    chunk_bytes: int
    blob: str = ""  # known beforehand, when a manifest was given
    sha256: str = ""  # by the source
    validator: str = ""  # strong ETag, or mtime and inode: two fetches with the same one see the same bytes


def finished(directory: Path, source: PartSource) -> tuple[str, bytes] | None:
    """(blob id, leaves) of a part that was linked to its blob before its process died, else None.

    Such a part is never opened again: writing to it would write to the published blob.
    """
    try:
        left = msgspec.json.decode((directory / "src.json").read_bytes(), type=PartSource)
        if left != source or (directory / "data").stat().st_nlink < 2:
            return None
        leaves = (directory / "leaves").read_bytes()
    except (OSError, *UNREADABLE):
        return None
    return digests.blob_id(source.size, leaves), leaves


class Part:
    """An open part. `land` may be called by many threads, each for its own chunk."""

    def __init__(self, directory: Path, source: PartSource, *, mode: str = "buffered", files: Files | None = None):
        self.directory, self.source = directory, source
        self.size, self.chunk_bytes = source.size, source.chunk_bytes
        self.count = chunk_count(self.size, self.chunk_bytes)
        self.files = files or Files()
        self._mode = mode
        self._leaves = bytearray(DIGEST_BYTES * self.count)
        self._known: bytes | None = None
        self._checkpointing = threading.Lock()
        self._unsynced_bytes = 0
        self._fds: list[int] = []
        self.is_allocated = False
        self.is_new = False
        self.cloned_from = ""  # the source whose blocks the data shares since its creation

    # opening and closing
    def create(self, *, allocates: bool = True) -> None:
        """Makes the directory and its files. Raises: OSError (ENOSPC when the file system has no room)."""
        self.is_new = True
        self.directory.mkdir(0o700)
        fsio.write_atomic(self.directory / "src.json", msgspec.json.encode(self.source))
        self._open(os.O_CREAT | os.O_EXCL)
        self.is_allocated = allocates and fsio.allocate(self.data_fd, align_up(self.size))
        self.bitmap.create()
        self.files.sync(self.data_fd)
        self.files.sync_directory(self.directory)
        self.files.sync_directory(self.directory.parent)

    def clone(self, name: str, source_fd: int) -> bool:
        """Shares the blocks of a local source (reflink): its bytes are in the data, and none of them is believed yet.

        False where the file system cannot, or the file is on another one, or of another size. Raises: OSError.
        """
        if not self.size or os.fstat(source_fd).st_size != self.size:
            return False
        os.ftruncate(self.data_fd, 0)  # a clone that ends within a block must end the file
        if fsio.clone(source_fd, self.data_fd) and os.fstat(self.data_fd).st_size == self.size:
            self.cloned_from = name
            return True
        self.is_allocated = fsio.allocate(self.data_fd, align_up(self.size))
        return False

    def resume(self) -> bool:
        """Opens what an earlier process left; False when it is of no use (another source, torn, not ours)."""
        try:
            left = msgspec.json.decode((self.directory / "src.json").read_bytes(), type=PartSource)
            data = self.directory / "data"
            if left != self.source or data.stat().st_nlink > 1:
                return False
            data.chmod(0o600)
            self._open(0)
        except (OSError, *UNREADABLE):
            return False
        if not self.bitmap.load():
            return False
        self.is_allocated = fsio.allocate(self.data_fd, align_up(self.size))
        stored = os.pread(self.leaves_fd, len(self._leaves), 0)
        self._leaves[: len(stored)] = stored
        return True

    def _open(self, flags: int) -> None:
        flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        for name in ("data", "leaves", "have"):
            self._fds.append(os.open(self.directory / name, flags, 0o600))
        self.data_fd, self.leaves_fd, have_fd = self._fds
        self.direct_fd = self.data_fd
        if self._mode == "direct":
            try:
                self.direct_fd = os.open(self.directory / "data", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
                self._fds.append(self.direct_fd)
            except OSError:
                self._mode = "paced"
        self.bitmap = Bitmap(have_fd, self.size, self.chunk_bytes, self.files)

    def close(self) -> None:
        """Closes the files; what was landed since the last checkpoint stays as candidates."""
        while self._fds:
            os.close(self._fds.pop())

    # leaves
    def set_known(self, leaves: bytes) -> None:
        """The digest list, already checked against the blob id: from now on `land` compares."""
        assert len(leaves) == len(self._leaves)
        self._known = leaves
        for index in self.bitmap.missing():
            at = index * DIGEST_BYTES
            self._leaves[at : at + DIGEST_BYTES] = bytes(DIGEST_BYTES)
        for index in range(self.count):
            if self.bitmap.has(index) and self._leaf(self._leaves, index) != self._leaf(leaves, index):
                self.bitmap.clear(index)

    @property
    def has_list(self) -> bool:
        """Whether every chunk is compared on arrival, so that what is here is right whatever else goes wrong."""
        return self._known is not None

    def leaves(self) -> bytes:
        """The digest list as landed; the blob's when every chunk is here."""
        return bytes(self._leaves)

    def recheck(self) -> int:
        """Hashes the chunks that were written but not synced when the last process ended; returns those kept."""
        kept = 0
        buffer = fsio.aligned_buffer(self.chunk_bytes)
        stored = os.pread(self.leaves_fd, len(self._leaves), 0).ljust(len(self._leaves), b"\0")
        for index in self.bitmap.candidates():
            digest = chunk_digest(self.read_chunk(index, buffer))
            if digest == self._leaf(self._known or stored, index):
                self._leaves[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest
                self.bitmap.set(index)
                kept += 1
        if kept:
            self._unsynced_bytes += kept * self.chunk_bytes
            self.checkpoint()
        return kept

    # chunks
    def length(self, index: int) -> int:
        """Bytes of a chunk: all but the last are full."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)

    def write_piece(self, offset: int, buffer: memoryview, length: int) -> None:
        """Writes part of a chunk. With O_DIRECT the buffer is aligned and has room to pad the file's last piece."""
        if self._mode == "direct" and offset % fsio.ALIGN_BYTES == 0 and len(buffer) >= align_up(length):
            padded = align_up(length)
            if padded > length:
                buffer[length:padded] = bytes(padded - length)
            self.files.pwrite(self.direct_fd, buffer[:padded], offset)
            return
        self.files.pwrite(self.data_fd, buffer[:length], offset)
        if self._mode == "paced":
            fsio.start_writeback(self.data_fd, offset, length)

    def land(self, index: int, digest: bytes) -> bool:
        """The chunk's bytes are written and hash to this; False when it is not what the list says."""
        if self._known is not None and digest != self._leaf(self._known, index):
            return False
        at = index * DIGEST_BYTES
        self._leaves[at : at + DIGEST_BYTES] = digest
        self.files.pwrite(self.leaves_fd, digest, at)
        self.bitmap.set(index)
        self._unsynced_bytes += self.length(index)
        return True

    def agrees(self, index: int, digest: bytes) -> bool:
        """Whether a chunk seen again is the one that landed before."""
        return self._leaf(self._leaves, index) == digest

    def read_chunk(self, index: int, buffer: mmap.mmap) -> memoryview:
        """The chunk from disk, past the page cache where that works; short when the file is shorter."""
        offset, wanted = index * self.chunk_bytes, self.length(index)
        view = memoryview(buffer)
        fd, length = (self.direct_fd, align_up(wanted)) if self._mode == "direct" else (self.data_fd, wanted)
        filled = 0
        while filled < wanted:
            count = os.preadv(fd, [view[filled:length]], offset + filled)
            if count == 0:
                break
            filled += count
        return view[: min(filled, wanted)]

    # durability
    @property
    def unsynced_bytes(self) -> int:
        """Landed since the last checkpoint, about."""
        return self._unsynced_bytes

    def checkpoint(self) -> None:
        """Makes everything landed so far trusted after a crash."""
        with self._checkpointing:
            before, snapshot = self._unsynced_bytes, self.bitmap.snapshot()
            self.files.sync_data(self.data_fd)
            self.files.sync_data(self.leaves_fd)
            self.bitmap.checkpoint(snapshot)
            self._unsynced_bytes -= before

    def seal(self) -> tuple[str, bytes]:
        """Cuts the padding, syncs data and returns (blob id, leaves). The part must be complete."""
        assert self.bitmap.is_complete()
        os.ftruncate(self.data_fd, self.size)
        self.checkpoint()
        self.files.sync(self.data_fd)
        leaves = self.leaves()
        return digests.blob_id(self.size, leaves), leaves

    def restart(self) -> None:
        """Forgets every chunk: the source has changed under us."""
        self.bitmap.clear()
        self.cloned_from = ""
        self._unsynced_bytes = 0

    def _leaf(self, leaves: bytes | bytearray, index: int) -> bytes:
        return bytes(leaves[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
