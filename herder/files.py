"""Streams from the head into files: a file appears under its name once it is whole and on the disk."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import BinaryIO

from herder.errors import HerderError

Expect = Callable[[int], None]
OpenStream = Callable[[Expect], AbstractAsyncContextManager[AsyncIterator[bytes]]]


async def write_whole(
    target: Path, open_stream: OpenStream, *, progress: Callable[[int], None] | None = None, mode: int = 0o600
) -> int:
    """Writes a stream to a file; returns its bytes. open_stream: opened with what checks the size that is coming.

    Raises: HerderError `disk_full` when it does not fit, before the first byte where the size is known; OSError.
    """
    partial = target.with_name(f".{target.name}.part")
    done = 0
    try:
        file = await asyncio.to_thread(_open, partial, mode)
        try:
            async with open_stream(lambda size: _check_room(target, size)) as pieces:
                async for piece in pieces:
                    done += await asyncio.to_thread(file.write, piece)
                    if progress:
                        progress(done)
            await asyncio.to_thread(_sync, file)
        finally:
            await asyncio.to_thread(file.close)
        await asyncio.to_thread(partial.replace, target)
    finally:
        partial.unlink(missing_ok=True)
    return done


def _open(path: Path, mode: int) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb")


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.absolute().parent).free
    if size > free:
        raise HerderError(
            "disk_full",
            f"{target.name} has {size} bytes and {target.absolute().parent} has {free} free",
            hint="choose another place, or make room",
        )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
