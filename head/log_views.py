"""One view of several logs: asks their nodes, merges what comes, and says where each stands.

Each entry carries the cursor of its source: what was read of it up to and with this entry. A reader that comes back
with the latest cursor of every source gets what follows, without a gap and without a repeat, whoever was restarted
meanwhile. The cursor of "*" holds when the view was first opened: a log that appears later is read from then on.

Every log has a task that waits while its part of the merge is full, which stops its agent by credit. So a slow reader
costs memory for what is held here, and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple

from msgspec.structs import replace

from common import limits
from common.errors import HerderError, InvalidValue, Unavailable
from common.logs.stream import LineStream, OneLog
from common.tasks import Supervisor
from common.wire import LogChunk, LogRequest
from head.log_broker import LogBroker
from head.log_choice import Log
from head.log_merge import Merge
from head.log_text import STAMP_CHARS
from herder.types import LogEntry

BATCH_ENTRIES = 500
ALIVE_S = limits.KEEP_ALIVE_S
CHOOSE_S = 1.0  # how often a followed view looks for logs that are new
AGAIN_S = 2.0  # before a node that was away for long is asked again
FINISH_S = 15.0  # how long a node that goes away is waited for by who does not follow
NEVER_MS = 1 << 62
OPENED = "*"


class Cursor(NamedTuple):
    """How far a source was read."""

    run: int
    offset: int


class ViewQuery(NamedTuple):
    """What is wanted of the logs of a view. tail -1: everything; back 0: the present run only, 1 the one before."""

    tail: int = 100
    follow: bool = False
    back: int = -1
    since_ms: int = 0
    until_ms: int = 0
    pattern: str = ""
    is_regex: bool = False
    ignore_case: bool = False
    cursors: Mapping[str, Cursor] = {}


def parse_cursors(text: str) -> dict[str, Cursor]:
    """Cursors as entries gave them, by commas. Raises: InvalidValue."""
    found = {}
    for word in filter(None, text.split(",")):
        name, _, rest = word.rpartition("/")
        name, _, run = name.rpartition("/")
        if not name or not all(part.isascii() and part.isdigit() and len(part) < 19 for part in (rest, run)):
            raise InvalidValue(f"cursor: {word[:80]!r} is none", hint="the latest `cursor` of each source, by commas")
        found[name] = Cursor(int(run), int(rest))
    return found


class LogView:
    """One reader's view. `choose` gives its logs, `revision` changes when they may have changed."""

    def __init__(
        self,
        broker: LogBroker,
        choose: Callable[[], Sequence[Log]],
        query: ViewQuery,
        *,
        revision: Callable[[], int] = lambda: 0,
    ) -> None:
        self._broker = broker
        self._choose = choose
        self._query = query
        self._revision = revision
        self._merge: Merge[LogEntry] = Merge()
        self._logs: dict[str, Log] = {}
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ready: list[LogEntry] = []  # what goes out before any line that is held
        self._read: dict[str, Cursor] = {}  # how far each log was read
        self._said: dict[str, Cursor] = {}  # and how far the reader knows of
        self._notes: dict[str, str] = {}
        self._failures: list[HerderError] = []
        self._has_begun = False
        self._is_waiting = False  # for a node or an engine that may come
        self._pumps = 0
        opened = query.cursors.get(OPENED)
        self._opened_ms = opened.offset if opened else _now_ms()
        is_cut = query.tail >= 0 and not query.cursors
        self._tail: deque[LogEntry] | None = deque() if is_cut else None

    async def entries(self) -> AsyncIterator[list[LogEntry]]:
        """Batches of entries until the end, or for ever.

        Raises: Unavailable when the head is stopping, HerderError when none of the logs can be read.
        """
        chosen = list(self._choose())
        tasks = Supervisor("log view")
        try:
            for log in chosen:
                self._start(tasks, log, is_new=False)
            if len(chosen) == 1 and not self._query.follow:
                self._tail = None  # its node has cut it already
            self._ready.append(LogEntry(cursor=f"{OPENED}/0/{self._opened_ms}"))
            async for batch in self._run(tasks):
                yield batch
        finally:
            await tasks.close()

    async def _run(self, tasks: Supervisor) -> AsyncIterator[list[LogEntry]]:
        loop = asyncio.get_running_loop()
        alive = chosen = loop.time()
        revision = self._revision()
        while True:
            self._news.clear()
            if self._broker.is_closing:
                raise Unavailable("the head is stopping")
            # Before the first news of any log it may still turn out that there is nothing but an error to tell.
            may_speak = self._has_begun or self._is_waiting or not self._logs
            batch = self._take_ready() if may_speak else None
            if batch:
                alive = loop.time()
                yield batch
                continue
            if self._failures and not self._has_begun and len(self._failures) == len(self._logs):
                raise self._failures[0]
            if not self._pumps and self._merge.is_empty and not self._query.follow:
                return
            if self._is_over():
                return
            now = loop.time()
            if self._query.follow and now - chosen >= CHOOSE_S:
                chosen = now
                if revision != self._revision():
                    revision = self._revision()
                    self._add_new(tasks)
            if self._query.follow and now - alive >= ALIVE_S:
                alive = now
                self._ready.extend(self._alive())
                continue
            wait_ms = self._merge.wait_ms(_now_ms())
            wait_s = min(CHOOSE_S, ALIVE_S if wait_ms is None else wait_ms / 1000)
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                pass  # time alone decides then

    def _is_over(self) -> bool:
        """Whether a followed view has come to its end: all its logs have, and what they are of has no others."""
        if self._pumps or not self._merge.is_empty:
            return False
        try:
            found = self._choose()
        except HerderError:
            return True
        return bool(found) and all(log.name in self._logs for log in found)

    # what goes out
    def _take_ready(self) -> list[LogEntry]:
        batch: list[LogEntry] = []
        if self._tail is None:
            batch, self._ready = self._ready, []
        is_tail_whole = self._tail is not None and not self._merge.is_behind
        # Once all have said what was there, the last lines of all together are known: nothing has to be waited for.
        now_ms = NEVER_MS if is_tail_whole else _now_ms()
        while len(batch) < BATCH_ENTRIES:
            popped = self._merge.pop(now_ms)
            if popped is None:
                break
            if self._tail is None:
                batch.append(popped[1])
            else:
                self._keep(popped[1])
        if not self._room.is_set():
            self._room.set()
        if self._tail is not None and is_tail_whole:
            batch = [*self._ready, *self._tail]
            self._tail, self._ready = None, []
        for entry in batch:
            self._note_said(entry)
        return batch

    def _keep(self, entry: LogEntry) -> None:
        """Keeps the last lines of all logs together; of what is dropped the reader learns only how far it went."""
        assert self._tail is not None
        self._tail.append(entry)
        if len(self._tail) > min(self._query.tail, limits.LOG_TAIL_LINES):
            dropped = self._tail.popleft()
            self._ready = [ready for ready in self._ready if ready.source != dropped.source or ready.note]
            self._ready.append(LogEntry(source=dropped.source, node=dropped.node, cursor=dropped.cursor))

    def _note_said(self, entry: LogEntry) -> None:
        if entry.source and entry.cursor:
            name, run, offset = entry.cursor.rsplit("/", 2)
            self._said[name] = Cursor(int(run), int(offset))

    def _alive(self) -> list[LogEntry]:
        """A sign of life, and how far logs are of which nothing was said for a while."""
        entries = [LogEntry(cursor=f"{OPENED}/0/{self._opened_ms}")]
        for name, cursor in self._read.items():
            if self._said.get(name) != cursor and not self._merge.holds(name):
                entries.append(self._entry(self._logs[name], cursor))
        return entries

    def _entry(self, log: Log, cursor: Cursor, *, note: str = "", lost_bytes: int = 0) -> LogEntry:
        return LogEntry(
            source=log.source,
            node=log.node,
            note=note,
            lost_bytes=lost_bytes,
            cursor=f"{log.name}/{cursor.run}/{cursor.offset}",
        )

    # what comes in
    def _add_new(self, tasks: Supervisor) -> None:
        try:
            found = self._choose()
        except HerderError:
            return  # what was named is gone; what is read goes on to its end
        for log in found:
            if log.name not in self._logs and len(self._logs) < limits.LOG_SOURCES:
                self._start(tasks, log, is_new=True)

    def _start(self, tasks: Supervisor, log: Log, *, is_new: bool) -> None:
        self._logs[log.name] = log
        self._merge.add(log.name)
        if is_new:
            self._merge.caught_up(log.name)
        self._pumps += 1
        tasks.start(log.name, self._pump(log, self._request(log, is_new=is_new)))

    def _request(self, log: Log, *, is_new: bool) -> LogRequest:
        query = self._query
        request = LogRequest(
            "",
            "",
            run=query.back,
            tail_lines=query.tail,
            follow=query.follow and not log.until_ms,
            source=log.asked or log.source,
            since_ms=max(query.since_ms, log.since_ms),
            until_ms=min(filter(None, (query.until_ms, log.until_ms)), default=0),
            pattern=query.pattern,
            is_regex=query.is_regex,
            ignore_case=query.ignore_case,
        )
        known = query.cursors.get(log.name)
        if known is not None:
            return replace(request, run_number=known.run, offset=known.offset)
        if is_new or query.cursors:
            return replace(request, tail_lines=-1, since_ms=max(request.since_ms, self._opened_ms))
        return request

    async def _pump(self, log: Log, request: LogRequest) -> None:
        """Reads one log to its end, or for as long as it is followed."""
        try:
            while True:
                try:
                    async with aclosing(self._open(log, request)) as chunks:  # type: ignore[type-var]
                        async for chunk in chunks:
                            await self._take(log, chunk)
                    return
                except HerderError as error:
                    if not self._is_passing(error, log):
                        self._fail(log, error)
                        return
                    self._is_waiting = True
                    self._say(log, f"{error.message}; waiting for it")
                self._merge.caught_up(log.name)  # the others do not wait
                self._news.set()
                await asyncio.sleep(AGAIN_S)
                read = self._read.get(log.name)
                if read is not None:
                    request = replace(request, run_number=read.run, offset=read.offset)
        finally:
            self._pumps -= 1
            self._merge.end(log.name)
            self._news.set()

    def _open(self, log: Log, request: LogRequest) -> AsyncIterator[LogChunk]:
        if log.place is not None:
            runs = OneLog(log.place, None if log.source == "head" else lambda: True)
            return _local(request, runs, is_stamped=log.source.startswith("replica:"))
        return self._broker.open_lines(
            log.node, request, wait_s=limits.LOG_NODE_WAIT_S if self._query.follow else FINISH_S
        )

    def _is_passing(self, error: HerderError, log: Log) -> bool:
        """Whether following goes on: a node comes back, an engine that has a place writes its first line."""
        if not self._query.follow or log.until_ms:
            return False
        if error.code in ("node_unreachable", "timed_out"):
            return log.name in self._read or bool(self._query.cursors) or len(self._logs) > 1
        return error.code == "not_found" and log.source.startswith("replica:") and self._is_chosen(log)

    def _is_chosen(self, log: Log) -> bool:
        try:
            return log in self._choose()
        except HerderError:
            return False

    def _fail(self, log: Log, error: HerderError) -> None:
        if not self._has_begun:
            self._failures.append(error)
        if self._has_begun or len(self._logs) > 1:
            self._say(log, error.message)

    def _say(self, log: Log, note: str) -> None:
        """A note among the lines of a log; the same one again only after something has come."""
        if self._notes.get(log.name) == note:
            return
        self._notes[log.name] = note
        cursor = self._read.get(log.name)
        entry = LogEntry(source=log.source, node=log.node, note=note)
        if cursor is not None:
            entry = self._entry(log, cursor, note=note)
        self._merge.push(log.name, 0, entry, _now_ms())

    async def _take(self, log: Log, chunk: LogChunk) -> None:
        if chunk.run < 0:
            return  # it has found nothing yet
        self._has_begun = True
        self._notes.pop(log.name, None)
        while not self._merge.has_room(log.name):
            self._room.clear()
            await self._room.wait()
        now_ms = _now_ms()
        is_first = log.name not in self._read
        before = self._read.get(log.name, Cursor(chunk.run, chunk.lines[-1].offset if chunk.lines else chunk.offset))
        if is_first and not chunk.lines:
            self._ready.append(self._entry(log, before))
        if chunk.lost_bytes:
            note = "older lines are gone" if chunk.lost_bytes < 0 else f"{chunk.lost_bytes} bytes are gone"
            lost = self._entry(log, before, note=f"{note}: removed before they were read", lost_bytes=chunk.lost_bytes)
            self._merge.push(log.name, 0, lost, now_ms)
        for line in chunk.lines:
            entry = LogEntry(
                source=log.source,
                node=log.node,
                time_ms=line.at_ms or None,
                line=line.text,
                is_partial=not line.is_whole,
                cursor=f"{log.name}/{chunk.run}/{line.offset}",
            )
            self._merge.push(log.name, line.at_ms, entry, now_ms)
        self._read[log.name] = Cursor(chunk.run, chunk.offset)
        if chunk.is_caught_up:
            self._merge.caught_up(log.name)
        self._news.set()


async def _local(request: LogRequest, runs: OneLog, *, is_stamped: bool) -> AsyncIterator[LogChunk]:
    """A log of the head itself, as a node would answer. is_stamped: as logs_collect.py writes lines."""
    async with aclosing(LineStream(request, runs).chunks()) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            if is_stamped and chunk.lines:
                lines = tuple(replace(line, text=line.text[STAMP_CHARS + 1 :]) for line in chunk.lines)
                chunk = replace(chunk, lines=lines)
            yield chunk


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
