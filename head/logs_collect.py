"""Puts a node's log of a span of time into a file of the head, as a benchmark keeps what its engines said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

import msgspec

from common.errors import DiskFull, TimedOut
from common.fsio import sync_directory
from common.wire import LogChunk, LogRequest
from head.log_broker import LogBroker
from head.log_choice import AFTER_MS
from head.log_text import stamp

COLLECT_S = 300.0
COLLECT_BYTES = 64 << 20
WAIT_S = 60.0  # for a node that goes away meanwhile


class Collected(msgspec.Struct, frozen=True):
    """What a file holds. lost_bytes: gone at the node before it was read; -1: a whole run."""

    lines: int
    bytes: int
    is_cut: bool = False  # it would have been longer than allowed
    lost_bytes: int = 0


async def collect(
    broker: LogBroker,
    node: str,
    source: str,
    *,
    since_ms: int,
    until_ms: int,
    path: Path,
    max_bytes: int = COLLECT_BYTES,
    timeout_s: float = COLLECT_S,
) -> Collected:
    """Writes the lines of `source` ("replica:ID", "run:ID") on a node into `path`, each behind the time when it came.

    Lines whose time is not known are in it too. since_ms, until_ms: wall time, 0: no bound; Herder time will do. The
    folder is made, and the file appears whole and synced, or not at all; one that is there is replaced.
    Raises: NodeUnreachable, NotFound (the node has no such log), TooMany, TimedOut, DiskFull.
    """
    until_ms = until_ms + AFTER_MS if until_ms else 0
    request = LogRequest("", "", run=-1, tail_lines=-1, source=source, since_ms=since_ms, until_ms=until_ms)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.to_thread(path.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            with await asyncio.to_thread(_open, part) as file:
                done = await _fill(file, broker, node, request, max_bytes)
                await asyncio.to_thread(_keep, file, part, path)
    except TimeoutError:
        raise TimedOut(f"the log of {source} on {node} did not come within {timeout_s:g} s", node=node) from None
    except OSError as error:
        raise DiskFull(f"{path.name}: {error.strerror}", hint="is there space on the head's disk?") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return done


async def _fill(file: BinaryIO, broker: LogBroker, node: str, request: LogRequest, max_bytes: int) -> Collected:
    lines = size = lost = 0
    async with aclosing(broker.open_lines(node, request, wait_s=WAIT_S)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            data = _render(chunk)
            if chunk.lost_bytes:
                lost = -1 if chunk.lost_bytes < 0 or lost < 0 else lost + chunk.lost_bytes
            if size + len(data) > max_bytes:
                await asyncio.to_thread(file.write, b"[herder: the log is longer; it is cut here]\n")
                return Collected(lines, size, is_cut=True, lost_bytes=lost)
            if data:
                await asyncio.to_thread(file.write, data)
            lines += len(chunk.lines)
            size += len(data)
    return Collected(lines, size, lost_bytes=lost)


def _render(chunk: LogChunk) -> bytes:
    gone = "older lines" if chunk.lost_bytes < 0 else f"{chunk.lost_bytes} bytes"
    note = f"[herder: {gone} are gone: removed before they were read]\n" if chunk.lost_bytes else ""
    text = "".join(f"{stamp(line.at_ms or None)} {line.text}\n" for line in chunk.lines)
    return (note + text).encode(errors="replace")


def _open(part: Path) -> BinaryIO:
    return open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


def _keep(file: BinaryIO, part: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    part.rename(path)
    sync_directory(path.parent)
