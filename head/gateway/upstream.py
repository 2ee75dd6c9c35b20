"""Connections to engines: a raw protocol that hands each piece on in the callback that brought it, and a pool.

aiohttp's client costs more CPU per request and per streamed piece than all the rest of the gateway together, most
of it for what a gateway does not need (cookies, redirects, queues between callbacks and coroutines). Here a piece
goes from the engine's socket to the client's in one call.

Idle connections are kept for a second only: llama.cpp's server gives each open connection a thread of a small
pool, so a gateway that sat on idle ones would lock the health checks out; and servers that close after 5 s of
idleness (uvicorn) are never raced.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol, cast

from head.gateway.http1 import HEAD_BYTES, BadAnswer, ChunkedBody, Head, parse_head

IDLE_S = 1.0
IDLE_PER_ENDPOINT = 256
CONTINUES = 8  # interim 1xx answers before the real one

Address = tuple[str, int]


class Sink(Protocol):
    """Who takes an answer in. Called from the event loop's callbacks: must not block or raise."""

    def on_head(self, head: Head) -> None:
        """The head has arrived."""
        ...

    def on_data(self, payload: bytes) -> None:
        """A piece of the body, never empty."""
        ...

    def on_end(self) -> None:
        """The body is complete. Nothing follows."""
        ...

    def on_failure(self, reason: str) -> None:
        """The answer cannot be completed. Nothing follows."""
        ...


class Connection(asyncio.Protocol):
    """One connection to an engine; carries one request at a time."""

    __slots__ = (
        "_body",
        "_buffer",
        "_continues",
        "_is_paused",
        "_is_persistent",
        "_left",
        "_pool",
        "_sink",
        "_transport",
        "address",
        "has_answered",
        "idle_since",
        "is_reused",
    )

    def __init__(self, pool: Pool, address: Address) -> None:
        self.address = address
        self.is_reused = False
        self.has_answered = False  # a byte of the present answer has come
        self.idle_since = 0.0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._buffer = b""
        self._body: ChunkedBody | None = None
        self._left: int | None = None  # bytes of the body still to come; None: until the end of the connection
        self._is_persistent = False
        self._is_paused = False
        self._continues = 0

    def send(self, sink: Sink, request: bytes, body: bytes) -> None:
        """Sends a request; its answer goes to the sink."""
        assert self._sink is None
        self._sink = sink
        self.has_answered = False
        self._buffer = b""
        self._continues = 0
        self._body = None
        self._left = -1  # the head is awaited
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection was closed")
        elif len(body) < 16_384:
            self._transport.write(request + body)
        else:
            self._transport.write(request)
            self._transport.write(body)

    def pause(self) -> None:
        """Takes in no more until `resume`."""
        if self._transport is not None and not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Takes in again."""
        if self._transport is not None and self._is_paused and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Ends the connection at once; the sink hears nothing more."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_busy(self) -> bool:
        """Whether an answer is awaited."""
        return self._sink is not None

    @property
    def is_usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            self.abort()  # nobody asked
            return
        try:
            if self._body is not None:
                payload = self._body.feed(data)
                if payload:
                    sink.on_data(payload)
                if self._body.is_done:
                    self._end()
            elif self._left == -1:
                self._take_head(data)
            else:
                self._take_plain(data)
        except BadAnswer as error:
            self._fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        if self._sink is not None:
            if self._left is None and self._body is None and exc is None:
                self._is_persistent = False
                self._end()
            else:
                self._fail("the connection ended" if exc is None else f"the connection broke: {exc}")

    # the answer

    def _take_head(self, data: bytes) -> None:
        self.has_answered = True
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES or not b"HTTP/1.".startswith(self._buffer[:7]):
                raise BadAnswer("what came is not an HTTP/1.1 answer")
            return
        head, rest = parse_head(self._buffer[:end]), self._buffer[end + 4 :]
        self._buffer = b""
        if head.status < 200:
            self._continues += 1
            if head.status == 101 or self._continues > CONTINUES:
                raise BadAnswer("the answer never begins")
            if rest:
                self._take_head(rest)
            return
        self._body = ChunkedBody() if head.is_chunked else None
        self._left = head.length
        self._is_persistent = head.is_persistent
        sink = self._sink
        assert sink is not None
        sink.on_head(head)
        if not self.is_busy:
            return  # the sink has had enough
        if self._left == 0:
            if rest:
                raise BadAnswer("bytes follow the end of the body")
            self._end()
        elif rest:
            self.data_received(rest)

    def _take_plain(self, data: bytes) -> None:
        assert self._sink is not None
        if self._left is None:
            self._sink.on_data(data)
            return
        if len(data) > self._left:
            raise BadAnswer("bytes follow the end of the body")
        self._left -= len(data)
        self._sink.on_data(data)
        if self._left == 0 and self.is_busy:
            self._end()

    def _end(self) -> None:
        sink, self._sink = self._sink, None
        if self._is_persistent and self.is_usable:
            self.resume()  # the last piece may have been one too many for the client
            self._pool.give_back(self)
        elif self._transport is not None:
            self._transport.close()
        if sink is not None:
            sink.on_end()

    def _fail(self, reason: str) -> None:
        sink, self._sink = self._sink, None
        if self._transport is not None:
            self._transport.abort()
        if sink is not None:
            sink.on_failure(reason)


class Pool:
    """Connections by address; the one used last is used first, so that the others can go."""

    def __init__(self, *, connect_timeout_s: float, idle_s: float = IDLE_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._idle: dict[Address, list[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def acquire(self, address: Address, *, is_fresh: bool = False) -> Connection:
        """An idle connection, or a new one. Raises: OSError, TimeoutError when there is none to be had."""
        idle = self._idle.get(address)
        while idle and not is_fresh:
            connection = idle.pop()
            if connection.is_usable:
                connection.is_reused = True
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, made = await loop.create_connection(lambda: Connection(self, address), *address)
        except (UnicodeError, OverflowError) as error:
            raise OSError(f"{address[0]}:{address[1]} is no address") from error
        return made

    def give_back(self, connection: Connection) -> None:
        """Keeps a connection whose answer is complete."""
        idle = self._idle.setdefault(connection.address, [])
        if self._is_closed or len(idle) >= IDLE_PER_ENDPOINT:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        idle.append(connection)
        if self._timer is None:
            self._timer = loop.call_later(self._idle_s, self._sweep)

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        idle = self._idle.get(connection.address)
        if idle and connection in idle:
            idle.remove(connection)

    def close(self) -> None:
        """Ends idle connections; busy ones end with their answers."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.abort()
        self._idle.clear()

    @property
    def idle_count(self) -> int:
        """Connections that wait for a request."""
        return sum(map(len, self._idle.values()))

    def _sweep(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        before = loop.time() - self._idle_s
        for address, idle in tuple(self._idle.items()):
            stale = [connection for connection in idle if connection.idle_since <= before]
            for connection in stale:
                idle.remove(connection)
                connection.abort()
            if not idle:
                del self._idle[address]
        if self._idle:
            self._timer = loop.call_later(self._idle_s, self._sweep)
