"""Logs of nodes, asked for through the agents' sessions and handed on as they come.

The session protocol has no flow control of its own and must not get any: a pause would stop the leases too. So a
reader that falls behind costs its own stream only. As lines, an agent sends as many chunks as it was given credit for,
and more credit comes with reading. As text (what agents of every version give), what does not fit the queue is thrown
away, the request is cancelled at the agent, and a new one goes on from the last byte that was read.

A stream of lines outlives its session: when the node is connected again, it goes on after the last chunk that was read.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager

from msgspec.structs import replace

from common import limits
from common.errors import InvalidRequest, NodeUnreachable, NotFound, TimedOut, TooMany, from_info
from common.wire import LogChunk, LogRequest, Message
from head.context import IdSource
from head.core.state import State

FIRST_CHUNK_S = 15.0  # a node that does not answer for so long is not going to
QUEUE_CHUNKS = 64  # of at most LOG_CHUNK_BYTES each
STREAMS = limits.LOG_STREAMS  # logs read at the same time, over all nodes
RETRY_S = 0.2  # how often a node that is away is looked for


class _Stream:
    """One reader of one log."""

    __slots__ = ("chunks", "is_lost", "is_over", "news", "node", "session_id")

    def __init__(self, node: str, session_id: str) -> None:
        self.node = node
        self.session_id = session_id
        self.chunks: deque[LogChunk] = deque()
        self.news = asyncio.Event()
        self.is_over = False  # chunks were thrown away; go on with a new request
        self.is_lost = False  # the session closed


class LogBroker:
    """Matches requests and chunks by id."""

    def __init__(
        self, state: State, ids: IdSource, send: Callable[[str, Message], None], is_open: Callable[[str], bool]
    ) -> None:
        self._state = state
        self._ids = ids
        self._send = send
        self._is_open = is_open
        self._streams: dict[str, _Stream] = {}
        self._readers: Counter[str] = Counter()  # by node
        self.is_closing = False  # the head is stopping: views end, and their readers come back to the next one

    @property
    def readers(self) -> int:
        """How many logs are being read."""
        return self._readers.total()

    async def open_log(
        self, replica: str, run: int = 0, tail: int = limits.PAGE_ITEMS_DEFAULT, follow: bool = False
    ) -> AsyncIterator[LogChunk]:
        """The log of a replica: the last `tail` lines, then what is added while `follow`.

        run: 0 is the present run, 1 the one before. The iterator ends after the chunk with `is_last`; close it
        (`aclose`) to stop early. Raises: NotFound, NodeUnreachable, TooMany, TimedOut, and what the agent says.
        """
        with self._counted(self._node_of(replica)):
            request = LogRequest("", replica, run=run, tail_lines=tail, follow=follow)
            while True:
                offset = -1
                async for chunk in self._one_request(request):
                    offset = chunk.offset
                    yield chunk
                    if chunk.is_last:
                        return
                if offset < 0 and request.offset < 0:
                    raise TooMany("the log comes faster than it is read", hint="ask for fewer lines")
                start = offset if offset >= 0 else request.offset
                request = LogRequest("", replica, run=run, offset=start, tail_lines=0, follow=follow)

    async def open_lines(self, node: str, request: LogRequest, *, wait_s: float = 0.0) -> AsyncIterator[LogChunk]:
        """What `request` (its id is given here) asks of a node, as chunks of lines, to the one with `is_last`.

        wait_s: how long a node is waited for that goes away meanwhile, or is away when reading goes on.
        Raises: NodeUnreachable, TooMany, TimedOut, and what the agent says.
        """
        with self._counted(node):
            has_begun = request.run_number >= 0
            while True:
                stream = _Stream(node, await self._session_again(node, wait_s if has_begun else 0.0))
                async with aclosing(self._lines(stream, request)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        has_begun = True
                        if chunk.run >= 0:  # else it has found nothing yet, and would have to begin anew
                            request = replace(request, run_number=chunk.run, offset=chunk.offset)
                        yield chunk
                        if chunk.is_last:
                            return
                if stream.is_over:
                    raise InvalidRequest(f"node {node} sends more of a log than it was asked for", node=node)

    def take(self, chunk: LogChunk, session_id: str) -> None:
        """A chunk came from an agent. One that nobody waits for, or of another session, is dropped."""
        stream = self._streams.get(chunk.request_id)
        if stream is None or stream.session_id != session_id or stream.is_over:
            return
        if len(stream.chunks) >= QUEUE_CHUNKS:
            stream.is_over = True
            self._cancel(chunk.request_id, stream)
        else:
            stream.chunks.append(chunk)
        stream.news.set()

    def session_closed(self, session_id: str) -> None:
        """Nothing more will come from this session."""
        for stream in self._streams.values():
            if stream.session_id == session_id:
                stream.is_lost = True
                stream.news.set()

    async def _lines(self, stream: _Stream, request: LogRequest) -> AsyncIterator[LogChunk]:
        """Asks once and gives what comes, until the last chunk or the end of the session."""
        request_id = self._ids.fresh("log")
        self._streams[request_id] = stream
        is_ended = is_caught_up = False
        unpaid = 0
        try:
            self._send(stream.session_id, replace(request, request_id=request_id, credit=limits.LOG_CREDIT_CHUNKS))
            while True:
                try:
                    chunk = await self._next(stream, has_limit=not is_caught_up)
                except NodeUnreachable:
                    return
                if chunk is None:
                    return
                is_ended, is_caught_up = chunk.is_last, is_caught_up or (chunk.is_caught_up and request.follow)
                if chunk.error is not None:
                    raise from_info(chunk.error)
                yield chunk
                if is_ended:
                    return
                unpaid += 1
                if unpaid >= limits.LOG_CREDIT_CHUNKS // 2:
                    self._send(stream.session_id, LogRequest(request_id, "", credit=unpaid))
                    unpaid = 0
        finally:
            del self._streams[request_id]
            if not (is_ended or stream.is_over or stream.is_lost):
                self._cancel(request_id, stream)

    async def _session_again(self, node: str, wait_s: float) -> str:
        """The node's session, once there is one. Raises: NodeUnreachable after wait_s."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while True:
            try:
                return self._session(node)
            except NodeUnreachable:
                if loop.time() >= end:
                    raise
            await asyncio.sleep(RETRY_S)  # sessions come and go in the core; nobody announces them here

    async def _one_request(self, request: LogRequest) -> AsyncIterator[LogChunk]:
        """Asks once and gives what comes, until the last chunk or until chunks had to be thrown away."""
        node = self._node_of(request.replica)
        stream = _Stream(node, self._session(node))
        request_id = self._ids.fresh("log")
        self._streams[request_id] = stream
        is_ended = False
        try:
            self._send(
                stream.session_id,
                LogRequest(
                    request_id, request.replica, request.run, request.offset, request.tail_lines, request.follow
                ),
            )
            has_begun = False
            while True:
                # Quiet is fine once a followed log has begun.
                chunk = await self._next(stream, has_limit=not (has_begun and request.follow))
                if chunk is None:
                    return
                has_begun = True
                is_ended = chunk.is_last
                if chunk.error is not None:
                    raise from_info(chunk.error)
                yield chunk
                if is_ended:
                    return
        finally:
            del self._streams[request_id]
            if not (is_ended or stream.is_over or stream.is_lost):
                self._cancel(request_id, stream)

    async def _next(self, stream: _Stream, *, has_limit: bool) -> LogChunk | None:
        """The next chunk, or None when the rest was thrown away. Raises: NodeUnreachable, TimedOut."""
        timeout_s = FIRST_CHUNK_S if has_limit else None
        while not stream.chunks:
            if stream.is_over:
                return None
            if stream.is_lost:
                raise NodeUnreachable(f"node {stream.node} went away while its log was read", node=stream.node)
            stream.news.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await stream.news.wait()
            except TimeoutError:
                raise TimedOut(f"node {stream.node} did not send the log", node=stream.node) from None
        return stream.chunks.popleft()

    def _node_of(self, replica_id: str) -> str:
        replica = self._state.replicas.get(replica_id)
        if replica is None:
            raise NotFound(f"there is no replica {replica_id[:80]!r}", hint="GET /api/v1/replicas lists them")
        return replica.node

    def _session(self, node: str) -> str:
        live = self._state.live.get(node)
        # A session that has just closed stands in the state until the core has heard of it.
        if live is None or not live.session_id or not self._is_open(live.session_id):
            raise NodeUnreachable(f"node {node} is not connected", node=node)
        return live.session_id

    @contextmanager
    def _counted(self, node: str) -> Iterator[None]:
        """Counts a reader for as long as it reads. Raises: TooMany."""
        if self.readers >= STREAMS or self._readers[node] >= limits.LOG_STREAMS_PER_NODE:
            raise TooMany("too many logs are being read", hint="close some of them")
        self._readers[node] += 1
        try:
            yield
        finally:
            self._readers[node] -= 1
            if not self._readers[node]:
                del self._readers[node]

    def _cancel(self, request_id: str, stream: _Stream) -> None:
        self._send(stream.session_id, LogRequest(request_id, "", is_cancelled=True))
