"""Answers the head's requests for logs: engines as text or as lines, benchmark runs, the agent itself, Slurm's files.

A run's output stands in segments named by their offset (see shim.py and common/logs). One task per request; it waits
for the link's room before each chunk, so that a log never crowds out a lease, and with lines for the reader's credit
too, so that a slow reader costs nothing but its own time. A task ends when the reader cancels or the session ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

from common import errors, limits, wire
from common.errors import ErrorInfo, HerderError
from common.logs.files import end_of, last_lines, read_from, segments, tail_offset, whole_characters
from common.logs.stream import FOLLOW_S, LineStream, Runs
from common.logs.threads import in_thread
from common.tasks import Supervisor

__all__ = ["LogService", "end_of", "last_lines", "read_from", "segments", "tail_offset", "whole_characters"]


class _Reading:
    """One request that is being answered."""

    __slots__ = ("credit", "has_credit", "task")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.has_credit = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def add(self, credit: int) -> None:
        """The reader takes so many more chunks."""
        self.credit = min(self.credit + max(0, credit), 4 * limits.LOG_CREDIT_CHUNKS)
        self.has_credit.set()

    async def spend(self) -> None:
        """Waits until the reader takes a chunk."""
        while self.credit <= 0:
            self.has_credit.clear()
            await self.has_credit.wait()
        self.credit -= 1


class LogService:
    """Answers log requests.

    `find` gives the directory of a replica's run, `source` the runs of what a request for lines names; both block and
    raise HerderError. `send` waits for room.
    """

    def __init__(
        self,
        tasks: Supervisor,
        find: Callable[[str, int], Path],
        send: Callable[[wire.LogChunk], Awaitable[None]],
        source: Callable[[str], Runs] | None = None,
    ) -> None:
        self._tasks = tasks
        self._find = find
        self._send = send
        self._source = source
        self._open: dict[str, _Reading] = {}

    def __len__(self) -> int:
        return len(self._open)

    def received(self, request: wire.LogRequest) -> None:
        """A request, more credit for one, or the end of one."""
        reading = self._open.get(request.request_id)
        if reading is not None:
            if request.is_cancelled and reading.task is not None:
                reading.task.cancel()
            else:
                reading.add(request.credit)
            return
        if request.is_cancelled or (request.credit and not (request.source or request.replica)):
            return  # of one that has ended meanwhile
        reading = _Reading(request.credit)
        work = self._answer_lines(request, reading) if request.source else self._answer_text(request)
        if len(self._open) >= limits.LOG_FOLLOWERS:
            work.close()
            error = errors.TooMany(f"{limits.LOG_FOLLOWERS} logs of this node are being read").info()
            work = self._end(request, error)
        self._open[request.request_id] = reading
        reading.task = self._tasks.start(f"log-{request.request_id}", work)
        reading.task.add_done_callback(lambda _: self._open.pop(request.request_id, None))

    def close_all(self) -> None:
        """The session has ended: nobody reads any more."""
        for reading in self._open.values():
            if reading.task is not None:
                reading.task.cancel()

    async def _end(self, request: wire.LogRequest, error: ErrorInfo | None, *, run: int = 0, offset: int = 0) -> None:
        end = max(offset, request.offset, 0)
        await self._send(wire.LogChunk(request.request_id, end, "", is_last=True, error=error, run=run))

    # lines
    async def _answer_lines(self, request: wire.LogRequest, reading: _Reading) -> None:
        run, offset = 0, 0
        try:
            if self._source is None:
                raise errors.NotFound("this agent has no logs of its own")
            runs = await in_thread(self._source, request.source)
            async with aclosing(LineStream(request, runs).chunks()) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    await reading.spend()
                    await self._send(chunk)
                    run, offset = chunk.run, chunk.offset
        except HerderError as error:
            await self._end(request, error.info())
            return
        except OSError as error:
            why = errors.Internal(f"the log cannot be read: {error.strerror or error}")
            await self._end(request, why.info())
            return
        await self._end(request, None, run=run, offset=offset)

    # text
    async def _answer_text(self, request: wire.LogRequest) -> None:
        try:
            run_dir = await in_thread(self._find, request.replica, request.run)
        except HerderError as error:
            await self._end(request, error.info())
            return
        offset = request.offset
        if offset < 0:
            lines = min(request.tail_lines, limits.LOG_TAIL_LINES)
            offset = await in_thread(tail_offset, run_dir, lines)
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
        start, data = await in_thread(read_from, run_dir, offset, limits.LOG_CHUNK_BYTES)
        if not data:
            return offset, False
        whole = whole_characters(data)
        if not whole and not has_ended and len(data) < 4:
            return offset, False  # the rest of a character has yet to come
        data = whole or data
        await self._send(wire.LogChunk(request.request_id, start + len(data), data.decode(errors="replace")))
        return start + len(data), True
