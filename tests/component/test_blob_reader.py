"""Blob bytes on their way to a socket: the same bytes whether they come from the page cache or past it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from agent.mover.blob_reader import DIRECT_READERS, PIECE_BYTES, BlobReader
from agent.residency import is_cached

SIZE = 2 * PIECE_BYTES + 12_345


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A synced file of three pieces, the last one cut."""
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def evict(path: Path) -> None:
    """Takes the file out of the page cache, or skips where the file system is one."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(file.fileno(), 0, PIECE_BYTES):
            pytest.skip("this file system keeps its files in memory, or the kernel does not tell")


def sent(reader: BlobReader, path: Path, offset: int, length: int) -> bytes:
    """What arrives of a range."""
    mine, theirs = socket.socketpair()
    data = bytearray()

    def receive() -> None:
        while piece := theirs.recv(1 << 20):
            data.extend(piece)

    thread = threading.Thread(target=receive)
    thread.start()
    with path.open("rb", buffering=0) as file, reader.begin(mine, file) as sending:
        left = length
        while left:
            count = sending.send(offset, left)
            offset, left = offset + count, left - count
    mine.close()
    thread.join()
    theirs.close()
    return bytes(data)


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (5_000, PIECE_BYTES), (SIZE - 1, 1), (4_096, SIZE - 4_096)])
@pytest.mark.parametrize("is_cold", [True, False])
def test_ranges_arrive_as_they_are(path: Path, offset: int, length: int, is_cold: bool) -> None:
    """Any range arrives byte for byte, aligned or not, up to the cut end, from cache or disk."""
    whole = path.read_bytes()
    if is_cold:
        evict(path)
    assert sent(BlobReader(), path, offset, length) == whole[offset : offset + length]


def test_cold_bytes_do_not_fill_the_page_cache(path: Path) -> None:
    """What was not in the page cache is read past it; what was leaves from it."""
    evict(path)
    reader = BlobReader()
    sent(reader, path, 0, SIZE)
    assert (reader.direct_bytes, reader.cached_bytes) == (SIZE, 0)
    with path.open("rb") as file:
        assert not is_cached(file.fileno(), 0, PIECE_BYTES)
    path.read_bytes()
    sent(reader, path, 0, SIZE)
    assert (reader.direct_bytes, reader.cached_bytes) == (SIZE, SIZE)


def test_no_buffer_free_is_no_error(path: Path) -> None:
    """When all buffers are in use, bytes leave through the page cache; buffers come back with the answer's end."""
    whole = path.read_bytes()
    reader = BlobReader()
    for _ in range(DIRECT_READERS):
        assert reader.buffers.acquire(blocking=False)
    evict(path)
    assert sent(reader, path, 0, SIZE) == whole
    assert reader.cached_bytes == SIZE
    reader.buffers.release()
    evict(path)
    assert sent(reader, path, 0, SIZE) == whole
    assert reader.direct_bytes == SIZE
    assert reader.buffers.acquire(blocking=False)


def test_shortened_file_ends_the_answer(path: Path) -> None:
    """A blob that someone cuts ends the connection instead of sending other bytes."""
    evict(path)
    mine, theirs = socket.socketpair()
    with path.open("rb", buffering=0) as file, BlobReader().begin(mine, file) as sending:
        os.truncate(path, 100)
        with pytest.raises(ConnectionError):
            sending.send(8_192, 4_096)
    mine.close()
    theirs.close()


def test_is_cached_by_mincore(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no cachestat, mincore says the same."""
    monkeypatch.setattr("agent.residency._CACHESTAT", 9_999)
    with path.open("rb") as file:
        file.read()
        assert is_cached(file.fileno(), 0, SIZE)
        evict(path)
        assert not is_cached(file.fileno(), 0, SIZE)
        assert is_cached(file.fileno(), 0, 0)
