"""Replica logs, asked for through the agents' sessions and handed to the API as they come.

The session protocol has no flow control of its own and must not get any: a pause would stop the leases too. So a
reader that falls behind costs its own stream only: what does not fit its queue is thrown away, the request is
cancelled at the agent, and once the reader has caught up a new request goes on from the last byte it was given.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from common import limits
from common.errors import NodeUnreachable, NotFound, TimedOut, TooMany, from_info
from common.wire import LogChunk, LogRequest, Message
from head.context import IdSource
from head.core.state import State

FIRST_CHUNK_S = 15.0  # a node that does not answer for so long is not going to
QUEUE_CHUNKS = 64  # of at most LOG_CHUNK_BYTES each
STREAMS = 256  # logs read at the same time, over all nodes


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

    def __init__(self, state: State, ids: IdSource, send: Callable[[str, Message], None]) -> None:
        self._state = state
        self._ids = ids
        self._send = send
        self._streams: dict[str, _Stream] = {}
        self._readers = 0

    @property
    def readers(self) -> int:
        """How many logs are being read."""
        return self._readers

    async def open_log(
        self, replica: str, run: int = 0, tail: int = limits.PAGE_ITEMS_DEFAULT, follow: bool = False
    ) -> AsyncIterator[LogChunk]:
        """The log of a replica: the last `tail` lines, then what is added while `follow`.

        run: 0 is the present run, 1 the one before. The iterator ends after the chunk with `is_last`; close it
        (`aclose`) to stop early. Raises: NotFound, NodeUnreachable, TooMany, TimedOut, and what the agent says.
        """
        if self._readers >= STREAMS:
            raise TooMany("too many logs are being read", hint="close some of them")
        self._readers += 1
        try:
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
        finally:
            self._readers -= 1

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

    async def _one_request(self, request: LogRequest) -> AsyncIterator[LogChunk]:
        """Asks once and gives what comes, until the last chunk or until chunks had to be thrown away."""
        stream = self._session_of(request.replica)
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
                chunk = await self._next(stream, request, has_begun=has_begun)
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

    async def _next(self, stream: _Stream, request: LogRequest, *, has_begun: bool) -> LogChunk | None:
        """The next chunk, or None when the rest was thrown away. Quiet is fine once a followed log has begun."""
        timeout_s = None if has_begun and request.follow else FIRST_CHUNK_S
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

    def _session_of(self, replica_id: str) -> _Stream:
        replica = self._state.replicas.get(replica_id)
        if replica is None:
            raise NotFound(f"there is no replica {replica_id[:80]!r}", hint="GET /api/v1/replicas lists them")
        live = self._state.live.get(replica.node)
        if live is None or not live.session_id:
            raise NodeUnreachable(f"node {replica.node} is not connected", node=replica.node)
        return _Stream(replica.node, live.session_id)

    def _cancel(self, request_id: str, stream: _Stream) -> None:
        self._send(stream.session_id, LogRequest(request_id, "", is_cancelled=True))
