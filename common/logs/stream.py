"""Answers one LogRequest for lines: run after run, from where it says, and what is written from now on.

The first chunk says where reading begins and may hold nothing. Each further one stands for everything up to its
(run, offset), so that a request that goes on from there misses nothing and repeats nothing; in a chunk of run -1
nothing is said yet, as while the last lines of a search are looked for. A line whose newline has
yet to come is held back until it comes, the run ends, or nothing has come for a second.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from common import limits
from common.errors import NotFound
from common.logs.files import TAIL_BYTES_MAX, end_of, tail_start
from common.logs.lines import Line, LineReader, offset_since
from common.logs.match import Everything, Search, search_of
from common.logs.threads import in_thread
from common.wire import LogChunk, LogLine, LogRequest

FOLLOW_S = 0.25  # how often a followed log is looked at
UNFINISHED_S = 1.0  # a line without its newline is shown when nothing has come for so long
ALIVE_S = 3.0  # a search that finds nothing says so often that it goes on
CHUNK_CHARS = limits.LOG_CHUNK_BYTES // 2
CLOCK_SLACK_MS = 60_000  # wall clocks are corrected by less than this: a later line is the end of a time range


class Runs(Protocol):
    """The runs of one log, oldest first. All functions block; numbers grow for ever."""

    def numbers(self) -> list[int]:
        """Those that are kept."""
        ...

    def place(self, number: int) -> Path:
        """Directory of segments, or a plain file."""
        ...

    def has_ended(self, number: int) -> bool:
        """Whether nothing more is written to it."""
        ...

    def is_over(self) -> bool:
        """Whether no further run will come."""
        ...


class OneLog:
    """A log that never begins anew: of a daemon, or a plain file. `is_over` says when nothing more will come."""

    def __init__(self, place: Path, is_over: Callable[[], bool] | None = None) -> None:
        self._place = place
        self._is_over = is_over

    def numbers(self) -> list[int]:
        """One, while it is there."""
        return [0] if self._place.exists() else []

    def place(self, number: int) -> Path:
        """The file or folder."""
        return self._place

    def has_ended(self, number: int) -> bool:
        """Whether it is gone or complete."""
        return not self._place.exists() or self.is_over()

    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._is_over is not None and self._is_over()


class Begin(NamedTuple):
    """Where to begin to read."""

    run: int
    offset: int
    is_resumed: bool = False
    lost_bytes: int = 0


class _Tail:
    """The last lines of a search: as many as were asked for, and not more than memory is set aside for."""

    def __init__(self, lines: int) -> None:
        self._lines = lines
        self._kept: deque[tuple[int, Line]] = deque()
        self._chars = 0

    def add(self, run: int, lines: Iterable[Line]) -> None:
        """More lines."""
        for line in lines:
            self._kept.append((run, line))
            self._chars += len(line.text)
            while len(self._kept) > self._lines or (self._chars > TAIL_BYTES_MAX and len(self._kept) > 1):
                self._chars -= len(self._kept.popleft()[1].text)

    def take(self) -> list[tuple[int, Line]]:
        """What was kept."""
        kept = list(self._kept)
        self._kept.clear()
        return kept


class LineStream:
    """One request's answer."""

    def __init__(self, request: LogRequest, runs: Runs) -> None:
        self._request = request
        self._runs = runs
        self._search: Search = Everything()
        self._run = 0
        self._offset = 0
        self._is_caught_up = False
        self._stop: tuple[int, int] | None = None  # where the log ended when somebody came who does not follow it
        self._tail: _Tail | None = None  # while the last lines of a search are looked for

    async def chunks(self) -> AsyncIterator[LogChunk]:
        """The answer without its last chunk, which the caller makes. Raises: HerderError."""
        request = self._request
        self._search = search_of(request.pattern, is_regex=request.is_regex, ignore_case=request.ignore_case)
        try:
            await self._search.choose([])  # nothing yet
            begin = await in_thread(self._begin)
            if self._tail_is_searched:
                self._tail = _Tail(min(request.tail_lines, limits.LOG_TAIL_LINES))
                yield self._nothing_yet()
            else:
                self._run, self._offset = begin.run, begin.offset
                yield self._chunk([], lost_bytes=begin.lost_bytes)
            async for chunk in self._read(begin):
                yield chunk
        finally:
            await self._search.close()

    # where to begin
    @property
    def _is_resumed(self) -> bool:
        return self._request.run_number >= 0 and self._request.offset >= 0

    @property
    def _tail_is_searched(self) -> bool:
        """Whether the last lines are the last of those that are wanted, which only reading everything tells."""
        request = self._request
        is_cut = bool(request.pattern or request.since_ms or request.until_ms)
        return is_cut and request.tail_lines >= 0 and not self._is_resumed

    def _begin(self) -> Begin:
        """Raises: NotFound."""
        request = self._request
        numbers = self._runs.numbers()
        if request.run >= 0 and not self._is_resumed:
            if request.run >= len(numbers):
                raise NotFound(f"{request.source} has no run {request.run} here", runs=len(numbers))
            numbers = [numbers[-1 - request.run]]
        if not numbers:
            raise NotFound(f"there is no log of {request.source} on this node")
        if not request.follow:  # else a log that is written faster than it is read would have no end
            self._stop = (numbers[-1], end_of(self._runs.place(numbers[-1])))
        if self._is_resumed:
            return self._resume(numbers)
        if request.since_ms:
            return self._begin_since(numbers)
        if request.tail_lines >= 0 and not self._tail_is_searched:
            return self._begin_tail(numbers)
        return Begin(numbers[0], 0)

    def _resume(self, numbers: list[int]) -> Begin:
        request = self._request
        if request.run_number in numbers:
            return Begin(request.run_number, request.offset, is_resumed=True)
        later = [number for number in numbers if number > request.run_number]
        # Without a later run the log was begun anew, as by somebody who emptied the folder.
        return Begin(later[0] if later else numbers[0], 0, is_resumed=True, lost_bytes=-1)

    def _begin_since(self, numbers: list[int]) -> Begin:
        for number in numbers:
            place = self._runs.place(number)
            offset = offset_since(place, self._request.since_ms)
            if offset < end_of(place):
                return Begin(number, offset)
        return Begin(numbers[-1], end_of(self._runs.place(numbers[-1])))

    def _begin_tail(self, numbers: list[int]) -> Begin:
        missing = min(self._request.tail_lines, limits.LOG_TAIL_LINES)
        begin = Begin(numbers[-1], 0)
        for number in reversed(numbers):
            end = self._stop[1] if self._stop is not None and number == self._stop[0] else None
            offset, found = tail_start(self._runs.place(number), missing, end=end)
            begin = Begin(number, offset)
            missing -= found
            if missing <= 0:
                break
        return begin

    # reading
    async def _read(self, begin: Begin) -> AsyncIterator[LogChunk]:
        number: int | None = begin.run
        offset, is_resumed = begin.offset, begin.is_resumed
        while number is not None:
            async for chunk in self._read_run(number, offset, is_resumed):
                yield chunk
            if self._request.run >= 0 or (self._stop is not None and number >= self._stop[0]):
                break
            # A run that begins while we look belongs to what is followed.
            following = await in_thread(self._next_run, number)
            if following is None:
                for chunk in self._caught_up():
                    yield chunk
                following = await self._wait_for_run(number)
            number, offset, is_resumed = following, 0, is_resumed or self._is_caught_up
        for chunk in self._caught_up():
            yield chunk

    async def _read_run(self, number: int, offset: int, is_resumed: bool) -> AsyncIterator[LogChunk]:
        """One run, to its end or for as long as it is followed."""
        reader = LineReader(await in_thread(self._runs.place, number), offset, is_resumed=is_resumed)
        follow = self._request.follow
        quiet_since = said_at = time.monotonic()
        while True:
            has_ended = await in_thread(self._runs.has_ended, number)
            unread = reader.unread_bytes
            arrival_ms = time.time_ns() // 1_000_000 if self._is_caught_up else 0
            lines = await in_thread(reader.read, arrival_ms=arrival_ms)
            is_at_end = not lines and reader.unread_bytes == unread
            if not is_at_end:
                quiet_since = time.monotonic()
            elif has_ended or not follow or self._is_quiet(quiet_since):
                rest = reader.rest(is_whole=has_ended, arrival_ms=arrival_ms)
                lines = [rest] if rest is not None else []
            position = reader.position
            if self._stop is not None and number == self._stop[0]:
                later = next((line.start for line in lines if line.start >= self._stop[1]), None)
                lines = [line for line in lines if line.start < self._stop[1]]
                is_at_end = is_at_end or later is not None or position >= self._stop[1]
                position = position if later is None else later
            is_past = self._is_past(lines)
            for chunk in await self._choose(number, lines, reader, position):
                said_at = time.monotonic()
                yield chunk
            if is_past or (is_at_end and (has_ended or not follow)):
                return
            if is_at_end:
                for chunk in self._caught_up():
                    yield chunk
                await asyncio.sleep(FOLLOW_S)
            elif time.monotonic() - said_at > ALIVE_S:  # a long search that finds nothing
                said_at = time.monotonic()
                yield self._nothing_yet()

    def _is_quiet(self, since: float) -> bool:
        """Whether an unfinished line is shown as far as it is; a search waits for the whole of it."""
        return not self._request.pattern and time.monotonic() - since >= UNFINISHED_S

    def _is_past(self, lines: list[Line]) -> bool:
        until_ms = self._request.until_ms
        return bool(until_ms and lines and lines[-1].at_ms > until_ms + CLOCK_SLACK_MS)

    async def _choose(self, number: int, lines: list[Line], reader: LineReader, position: int) -> list[LogChunk]:
        """Chunks of the lines that are wanted. position: up to where the lines stand for the log."""
        request = self._request
        wanted = [
            line
            for line in lines
            if (not line.at_ms or line.at_ms >= request.since_ms)
            and (not request.until_ms or line.at_ms <= request.until_ms)
        ]
        wanted = await self._search.choose(wanted)
        lost, reader.lost_bytes = reader.lost_bytes, 0
        is_news = self._run != number or self._offset != position
        self._run = number
        if self._tail is not None:
            self._tail.add(number, wanted)
            self._offset = position
            return []
        chunks = []
        for part in _parts(wanted):
            self._offset = part[-1].end
            chunks.append(self._chunk(part, lost_bytes=lost))
            lost = 0
        self._offset = position
        if chunks:
            chunks[-1] = msgspec.structs.replace(chunks[-1], offset=position)
        elif lost or is_news:
            chunks.append(self._chunk([], lost_bytes=lost))
        return chunks

    def _caught_up(self) -> list[LogChunk]:
        """Marks, once, that everything that was there has been said; the lines of a searched tail come before it."""
        if self._is_caught_up:
            return []
        self._is_caught_up = True
        end = (self._run, self._offset)
        kept = self._tail.take() if self._tail is not None else []
        self._tail = None
        chunks = []
        if kept:  # who comes back before the first of them gets all of them
            self._run, self._offset = kept[0][0], kept[0][1].start
            chunks.append(self._chunk([]))
        while kept:
            run = kept[0][0]
            lines = [line for number, line in kept if number == run]
            kept = kept[len(lines) :]
            for part in _parts(lines):
                self._run, self._offset = run, part[-1].end
                chunks.append(self._chunk(part))
        self._run, self._offset = end
        chunks.append(self._chunk([], is_caught_up=True))
        return chunks

    def _nothing_yet(self) -> LogChunk:
        if self._tail is None:
            return self._chunk([])
        return LogChunk(self._request.request_id, 0, "", run=-1)

    def _next_run(self, number: int) -> int | None:
        return next((later for later in self._runs.numbers() if later > number), None)

    async def _wait_for_run(self, number: int) -> int | None:
        """The next run, once there is one; None when none will come, or nobody waits for it."""
        while self._request.follow:
            following = await in_thread(self._next_run, number)
            if following is not None:
                return following
            if await in_thread(self._runs.is_over):
                return None
            await asyncio.sleep(FOLLOW_S)
        return None

    def _chunk(self, lines: list[Line], *, lost_bytes: int = 0, is_caught_up: bool = False) -> LogChunk:
        return LogChunk(
            self._request.request_id,
            self._offset,
            "",
            lines=tuple(LogLine(line.end, line.at_ms, line.text, line.is_whole) for line in lines),
            run=self._run,
            lost_bytes=lost_bytes,
            is_caught_up=is_caught_up,
        )


def _parts(lines: list[Line]) -> list[list[Line]]:
    """The lines in pieces that a frame carries."""
    parts: list[list[Line]] = []
    chars = 0
    for line in lines:
        if not parts or chars + len(line.text) > CHUNK_CHARS or len(parts[-1]) >= limits.LOG_LINES_PER_CHUNK:
            parts.append([])
            chars = 0
        parts[-1].append(line)
        chars += len(line.text)
    return parts
