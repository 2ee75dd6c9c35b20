"""Re-hashing what is on disk: for a `Verify` request, and in the background for blobs that look touched.

A blob that fails is taken out of use at once, with every copy that contains it, and becomes an unfinished part that
knows its chunk list and which of its chunks are still good: the next fetch repairs it by fetching the bad chunks only.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

import msgspec

from agent.mover.part import Part, PartSource
from agent.store import publish
from agent.store.catalogue import Blob
from agent.store.digests import DIGEST_BYTES, blob_id, chunk_count, chunk_digest, hex_of
from agent.store.disk import DiskStore
from common import fsio
from common.errors import Cancelled


def hash_blob(
    store: DiskStore, row: Blob, cancelled: threading.Event, progress: Callable[[int], None] = lambda count: None
) -> bytes:
    """The chunk digests of what the blob's file holds now. Raises: Cancelled, OSError."""
    fd = _open(store, row.blob)
    size = os.fstat(fd).st_size
    leaves = bytearray()
    view = memoryview(fsio.aligned_buffer(row.chunk_bytes))
    try:
        for index in range(chunk_count(size, row.chunk_bytes)):
            if cancelled.is_set():
                raise Cancelled("stopped on request")
            offset = index * row.chunk_bytes
            wanted, filled = min(row.chunk_bytes, size - offset), 0
            while filled < wanted:
                count = os.preadv(fd, [view[filled:]], offset + filled)
                if count == 0:
                    break
                filled += count
            leaves += chunk_digest(view[: min(filled, wanted)])
            progress(wanted)
    finally:
        os.close(fd)
    return bytes(leaves)


def check_blob(
    store: DiskStore, row: Blob, cancelled: threading.Event, progress: Callable[[int], None] = lambda count: None
) -> bool:
    """Hashes a blob; a good one is trusted again, a bad one is quarantined. Raises: Cancelled.

    The verdict is of the file that was hashed: one that a drop or a fetch has put in its place meanwhile is left alone.
    """
    before = _inode(store, row.blob)
    leaves: bytes | None = None
    with contextlib.suppress(OSError):  # unreadable sectors, or gone
        leaves = hash_blob(store, row, cancelled, progress)
    with store.changing:
        now = _inode(store, row.blob)
        if store.catalogue.blob(row.blob) is None:
            return False
        if now and now != before:
            return True  # verified on its arrival
        if now and leaves is not None and blob_id(store.layout.blob(row.blob).stat().st_size, leaves) == row.blob:
            store.catalogue.put_blob(publish.describe_blob(store.layout, row.blob, row.chunk_bytes, row.sha256))
            if not store.layout.leaves(row.blob).is_file():
                fsio.make_directories(store.layout.leaves(row.blob).parent)
                fsio.write_atomic(store.layout.leaves(row.blob), leaves, mode=0o444)
            return True
        quarantine(store, row, leaves or b"")
        return False


def _inode(store: DiskStore, blob: str) -> int:
    try:
        return store.layout.blob(blob).stat().st_ino
    except OSError:
        return 0


def quarantine(store: DiskStore, row: Blob, found: bytes) -> list[tuple[str, str]]:
    """Unpublishes a damaged blob and every copy with it; returns those. What is good in it stays for a repair."""
    known = store.leaves(row.blob, row.size, row.chunk_bytes)
    affected = store.catalogue.copies_of(row.blob)
    for model, revision in affected:
        publish.unpublish_copy(store.layout, model, revision, store.trash)
        store.catalogue.remove_copy(model, revision)
    path = store.layout.blob(row.blob)
    store.catalogue.remove_blob(row.blob)
    store.trash.drop_links(path)
    try:
        is_whole = path.stat().st_size == row.size and path.stat().st_nlink == 1
    except FileNotFoundError:
        return affected
    if known is None or not is_whole or not found:
        store.trash.discard(path)
        return affected
    _make_part(store, row, known, found)
    store.layout.leaves(row.blob).unlink(missing_ok=True)
    return affected


def _make_part(store: DiskStore, row: Blob, known: bytes, found: bytes) -> None:
    """Turns the damaged file into an unfinished part whose bitmap has the good chunks."""
    directory = store.layout.new_part(hex_of(row.blob))
    part = Part(directory, PartSource(row.size, row.chunk_bytes, row.blob), mode="buffered")
    store.catalogue.put_part(directory.name, hex_of(row.blob))
    part.create(allocates=False)
    part.files.pwrite(part.leaves_fd, known, 0)
    good = [
        index
        for index in range(part.count)
        if found[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        == known[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
    ]
    store.layout.blob(row.blob).rename(directory / "data")
    (directory / "data").chmod(0o600)
    for index in good:
        part.bitmap.set(index)
    part.checkpoint()
    part.close()
    store.keep_part(directory.name)


def check_suspects(store: DiskStore, cancelled: threading.Event) -> None:
    """Background work after a start: hashes the blobs that do not look as they were left."""
    for blob in store.suspects:
        row = store.catalogue.blob(blob)
        if row is not None and not cancelled.is_set():
            try:
                check_blob(store, msgspec.structs.replace(row, state="good"), cancelled)
            except Cancelled:
                return


def _open(store: DiskStore, blob: str) -> int:
    path = store.layout.blob(blob)
    if store.write_mode == "direct":
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            pass  # this file system took O_DIRECT for writing only: read through the cache
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
