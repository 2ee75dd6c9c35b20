"""What runs send to the head: streamed to the disk as it comes, checked, synced, and only then believed.

An upload holds some 1 MiB of memory however large its file is. A few are written at a time, more wait unread (TCP holds
their senders back), and beyond that they are refused and come again. Two uploads of one name are two files until each
is whole; the last one that was whole stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from common import limits
from common.errors import BodyTooLarge, DigestMismatch, InvalidRequest, InvalidValue, SizeMismatch, TimedOut, TooMany
from head.bench.store import Incoming, Store, as_error, check_artifact

PIECE_BYTES = 1_048_576
WRITTEN_AT_ONCE = 16
WAITING = 1_024  # two files of 256 load nodes, and their monitors'
TURN_S = 120.0
PIECE_S = 30.0
BYTES_PER_S = 65_536  # a sender slower than this on average is not waited for
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Announced(NamedTuple):
    """What the headers say is coming."""

    bytes: int
    sha256: str


def announced(headers: Mapping[str, str]) -> Announced:
    """Size and digest of what comes. Raises: InvalidRequest, BodyTooLarge."""
    length, digest = headers.get("Content-Length", ""), headers.get("X-Content-SHA256", "").lower()
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise InvalidRequest("an artifact needs a Content-Length")
    if not _SHA256.fullmatch(digest):
        raise InvalidRequest("an artifact needs its X-Content-SHA256: 64 hex digits")
    if int(length) > limits.ARTIFACT_BYTES:
        raise BodyTooLarge(f"an artifact has at most {limits.ARTIFACT_BYTES} bytes", limit_bytes=limits.ARTIFACT_BYTES)
    return Announced(int(length), digest)


class Uploads:
    """All uploads of the head."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turns = asyncio.Semaphore(WRITTEN_AT_ONCE)
        self.waiting = 0

    async def take(self, benchmark: str, run: str, name: str, coming: Announced, pieces: AsyncIterator[bytes]) -> int:
        """Stores an artifact of a run; returns its bytes once they are on the disk under its name.

        Raises: InvalidName, InvalidValue, TooMany, TimedOut, SizeMismatch, DigestMismatch, DiskFull; nothing is left
        behind then.
        """
        check_artifact(name)
        async with self._turn():
            there = await asyncio.to_thread(self._store.artifacts, benchmark, run)
            if name not in there and len(there) >= limits.ARTIFACTS_PER_RUN:
                raise InvalidValue(f"a run has at most {limits.ARTIFACTS_PER_RUN} artifacts", run=run)
            file = await asyncio.to_thread(self._store.incoming, benchmark, run, name, coming.bytes)
            try:
                return await self._receive(file, coming, pieces)
            except OSError as error:
                raise as_error(error) from None
            finally:
                await asyncio.to_thread(file.discard)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self.waiting >= WAITING:
            raise TooMany("too many artifacts come at once", retry_after_s=5)
        self.waiting += 1
        try:
            async with asyncio.timeout(TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            raise TooMany("too many artifacts come at once", retry_after_s=5) from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _receive(self, file: Incoming, coming: Announced, pieces: AsyncIterator[bytes]) -> int:
        digest, size, held = hashlib.sha256(), 0, bytearray()
        try:
            async with asyncio.timeout(PIECE_S + coming.bytes / BYTES_PER_S):
                async for piece in _in_time(pieces):
                    size += len(piece)
                    if size > coming.bytes:
                        break
                    held += piece
                    if len(held) >= PIECE_BYTES:
                        whole, held = held, bytearray()
                        await asyncio.to_thread(_write, file, digest, whole)
        except TimeoutError:
            raise TimedOut("the artifact came too slowly", hint="send it again") from None
        if size != coming.bytes:
            raise SizeMismatch(f"{coming.bytes} bytes were announced, {size} came", announced=coming.bytes, came=size)
        await asyncio.to_thread(_write, file, digest, held)
        if digest.hexdigest() != coming.sha256:
            raise DigestMismatch("the artifact is not what its X-Content-SHA256 says", hint="send it again")
        await asyncio.to_thread(file.commit)
        return size


async def _in_time(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while True:
        async with asyncio.timeout(PIECE_S):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


def _write(file: Incoming, digest: hashlib._Hash, data: bytearray) -> None:
    digest.update(data)
    file.write(data)
