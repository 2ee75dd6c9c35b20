"""Reads engine logs for people: the last lines, from an offset on, following, also of earlier runs.

A run's output stands in segments named by their offset (see shim.py). One task per request; it waits for the link's
room before each chunk, so that a log never crowds out a lease, and ends when the reader cancels or the session ends.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from common import errors, limits, wire
from common.errors import ErrorInfo, HerderError
from common.tasks import Supervisor

# escape sequences of terminals (CSI and OSC), and control characters but newline and tab
_NOT_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
FOLLOW_S = 0.25  # how often a followed log is looked at
TAIL_BYTES_MAX = 4 * 1024 * 1024  # how far back the last lines are looked for


def segments(run_dir: Path) -> list[tuple[int, Path]]:
    """Offset and path of a run's segments, oldest first."""
    found = []
    for path in run_dir.glob("log.*"):
        offset = path.name.removeprefix("log.")
        if offset.isdigit():
            found.append((int(offset), path))
    return sorted(found)


def end_of(run_dir: Path) -> int:
    """Offset after the last byte."""
    found = segments(run_dir)
    try:
        return found[-1][0] + found[-1][1].stat().st_size if found else 0
    except OSError:
        return 0


def read_from(run_dir: Path, offset: int, size: int) -> tuple[int, bytes]:
    """Bytes at `offset`, or after it where the output up to there is gone; gives where they start."""
    for start, path in segments(run_dir):
        try:
            length = path.stat().st_size
            if start + length <= offset:
                continue
            with path.open("rb") as file:
                file.seek(max(0, offset - start))
                return max(offset, start), file.read(size)
        except OSError:
            continue  # removed by rotation meanwhile
    return offset, b""


def tail_offset(run_dir: Path, lines: int) -> int:
    """Where the last `lines` lines start."""
    end = end_of(run_dir)
    if lines <= 0:
        return end
    first = segments(run_dir)[0][0] if end else 0
    position, found = end, b""
    while position > first and len(found) < TAIL_BYTES_MAX:
        start = max(first, position - limits.LOG_CHUNK_BYTES)
        at, data = start, b""
        while at < position:
            at, piece = read_from(run_dir, at, position - at)
            if not piece:
                break
            data += piece
            at += len(piece)
        found = data + found
        position = start
        if found.rstrip(b"\n").count(b"\n") >= lines:
            break
    kept = found.removesuffix(b"\n").split(b"\n")[-lines:]
    return end - len(b"\n".join(kept)) - (1 if found.endswith(b"\n") else 0) if found else end


def last_lines(run_dir: Path, lines: int = limits.LAST_LOG_LINES) -> tuple[str, ...]:
    """The last lines of a run, cut to a sane length."""
    _, data = read_all(run_dir, tail_offset(run_dir, lines))
    text = _NOT_TEXT.sub("", data.decode(errors="replace"))
    kept = text.removesuffix("\n").split("\n")[-lines:] if text else []
    return tuple(line[: limits.LAST_LOG_CHARS] for line in kept)


def read_all(run_dir: Path, offset: int) -> tuple[int, bytes]:
    """Everything from an offset on, up to the longest tail."""
    data = b""
    while len(data) < TAIL_BYTES_MAX:
        offset, piece = read_from(run_dir, offset, limits.LOG_CHUNK_BYTES)
        if not piece:
            break
        data += piece
        offset += len(piece)
    return offset, data


def whole_characters(data: bytes) -> bytes:
    """The data without a UTF-8 character that is cut off at its end."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needs = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return data[:-back] if needs > back else data
    return data


class LogService:
    """Answers log requests. `find` gives the directory of a replica's run; `send` waits for room."""

    def __init__(
        self,
        tasks: Supervisor,
        find: Callable[[str, int], Path],
        send: Callable[[wire.LogChunk], Awaitable[None]],
    ) -> None:
        self._tasks = tasks
        self._find = find
        self._send = send
        self._open: dict[str, asyncio.Task[None]] = {}

    def received(self, request: wire.LogRequest) -> None:
        """A request, or the end of one."""
        task = self._open.get(request.request_id)
        if request.is_cancelled or task is not None:
            if request.is_cancelled and task is not None:
                task.cancel()
            return
        work = self._answer(request)
        if len(self._open) >= limits.LOG_FOLLOWERS:
            work.close()
            error = errors.TooMany(f"{limits.LOG_FOLLOWERS} logs of this node are being read").info()
            work = self._end(request, error)
        task = self._tasks.start(f"log-{request.request_id}", work)
        self._open[request.request_id] = task
        task.add_done_callback(lambda _: self._open.pop(request.request_id, None))

    def close_all(self) -> None:
        """The session has ended: nobody reads any more."""
        for task in self._open.values():
            task.cancel()

    async def _end(self, request: wire.LogRequest, error: ErrorInfo) -> None:
        await self._send(wire.LogChunk(request.request_id, max(0, request.offset), "", is_last=True, error=error))

    async def _answer(self, request: wire.LogRequest) -> None:
        try:
            run_dir = await asyncio.to_thread(self._find, request.replica, request.run)
        except HerderError as error:
            await self._end(request, error.info())
            return
        offset = request.offset
        if offset < 0:
            lines = min(request.tail_lines, limits.LOG_TAIL_LINES)
            offset = await asyncio.to_thread(tail_offset, run_dir, lines)
        while True:
            has_ended = (run_dir / "exit.json").exists()
            offset, is_more = await self._send_piece(request, run_dir, offset, has_ended)
            if is_more:
                continue
            if has_ended or not request.follow:
                await self._send(wire.LogChunk(request.request_id, offset, "", is_last=True))
                return
            await asyncio.sleep(FOLLOW_S)

    async def _send_piece(
        self, request: wire.LogRequest, run_dir: Path, offset: int, has_ended: bool
    ) -> tuple[int, bool]:
        start, data = await asyncio.to_thread(read_from, run_dir, offset, limits.LOG_CHUNK_BYTES)
        if not data:
            return offset, False
        whole = whole_characters(data)
        if not whole and not has_ended and len(data) < 4:
            return offset, False  # the rest of a character has yet to come
        data = whole or data
        await self._send(wire.LogChunk(request.request_id, start + len(data), data.decode(errors="replace")))
        return start + len(data), True
