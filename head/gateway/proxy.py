"""One request on its way: from the client's bytes to an engine and the answer back, piece by piece, unbuffered.

What is promised. A stream's piece leaves in the callback that brought it. Of an event stream only whole events are
passed on, so that an engine that dies in the middle leaves a well-formed stream that ends with an error event. An
engine that dies before the first byte of its answer, also after its status line, is a clean 502. A JSON answer up
to JSON_BYTES leaves when it is whole. A client that leaves ends the engine's work at once; a client that does not
read stops the engine's connection from being read, and is cut off after the idle timeout. The client's token never
reaches an engine, and an engine's own key never reaches a client.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from typing import NamedTuple

from aiohttp import HttpVersion11, web

from common.errors import HerderError, TimedOut, UpstreamFailed
from head.core.service_views import Route
from head.gateway import openai
from head.gateway.bodies import Body, ClientGone
from head.gateway.http1 import Head
from head.gateway.upstream import Connection, Pool

JSON_BYTES = 1_048_576  # a longer JSON answer is passed on as it comes
EVENT_BYTES = 1_048_576  # a longer event is passed on in parts
TAIL_PIECES = 4
TAIL_BYTES = 8_192  # where an answer's usage is looked for
STALE_S = 1.0  # a used connection that ends so soon after a request was closed by an engine that did not see it
SWEEP_S = 0.25  # how often deadlines, and clients that left silently, are looked at

_FORWARDED = ("Content-Type", "Accept", "User-Agent", "Traceparent", "Tracestate")
_RETURNED = frozenset({"content-type", "content-encoding", "retry-after"})
_RETURNED_PREFIXES = ("x-ratelimit-", "openai-")


class Timeouts(NamedTuple):
    """Seconds. `idle` is between two pieces of an answer, in either direction."""

    connect: float
    first_byte: float
    idle: float


class Outcome(NamedTuple):
    """How a request ended, for the counters. `first_at`: loop time of a stream's first piece, else 0."""

    response: web.StreamResponse
    code: str
    first_at: float
    tail: bytes


class Unreachable(Exception):
    """The engine accepts no connection; the request has not left."""


class Exchange:
    """One answer on its way. The engine's connection calls it; the handler waits on it."""

    __slots__ = (
        "_connection",
        "_deadline",
        "_held",
        "_is_chunked",
        "_loop",
        "_parts",
        "_parts_bytes",
        "_protocol",
        "_request",
        "_tail",
        "_timeouts",
        "_transport",
        "_waiter",
        "failure",
        "first_at",
        "has_ended",
        "has_heard",
        "head",
        "is_gone",
        "is_json",
        "is_paused",
        "is_ready",
        "is_sse",
        "replica",
    )

    def __init__(self, request: web.Request, connection: Connection, timeouts: Timeouts, replica: str) -> None:
        self.replica = replica
        self._loop = asyncio.get_running_loop()
        self._request = request
        self._connection = connection
        self._timeouts = timeouts
        self._deadline = self._loop.time() + timeouts.first_byte
        self._waiter: asyncio.Future[None] | None = None
        self._parts: list[bytes] = []  # what came before the client was attached
        self._parts_bytes = 0
        self._held = bytearray()  # the beginning of an event that is not whole
        self._tail: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._transport: asyncio.Transport | None = None
        self._protocol = request.protocol
        self._is_chunked = False
        self.head: Head | None = None
        self.failure: HerderError | None = None
        self.first_at = 0.0
        self.is_sse = False
        self.is_json = False
        self.is_ready = False  # the client can be answered
        self.is_paused = False
        self.is_gone = False
        self.has_ended = False
        self.has_heard = False

    # the engine's side: callbacks

    def on_head(self, head: Head) -> None:
        """Notes what is coming. The client is not answered before the first byte of the body."""
        self.head = head
        kind = head.get("content-type").partition(";")[0].strip().lower()
        self.is_sse = kind == "text/event-stream" and head.status < 300
        self.is_json = kind == "application/json" or head.status >= 300
        refusal = engine_refusal(head)
        if refusal is not None:
            self._fail(refusal)

    def on_data(self, payload: bytes) -> None:
        """Passes a piece on, or keeps it until the client can be answered."""
        self.has_heard = True
        if self.is_sse and (self._held or not payload.endswith((b"\n\n", b"\n\r\n"))):
            payload = self._whole_events(payload)
            if not payload:
                return
        self._pass_on(payload)

    def _pass_on(self, payload: bytes) -> None:
        self._tail.append(payload)
        transport = self._transport
        if transport is None:
            self._keep(payload)
            return
        if transport.is_closing():
            self.on_client_gone()
            return
        transport.write(b"%x\r\n%b\r\n" % (len(payload), payload) if self._is_chunked else payload)
        if self._protocol.writing_paused:
            self._pause()

    def on_end(self) -> None:
        """The answer is complete."""
        self.has_ended = True
        if self._held:
            rest = bytes(self._held)
            self._held.clear()
            self._pass_on(rest)  # a last event without its blank line
        self.is_ready = True
        self._wake()

    def on_failure(self, reason: str) -> None:
        """The engine is gone, or speaks no HTTP."""
        self._fail(UpstreamFailed(f"the engine failed while it answered: {reason}"))

    # the sweep's side

    def check(self, now: float) -> None:
        """Looks at deadlines, and at a client that left while nothing was sent to it."""
        transport = self._request.transport
        if transport is None or (getattr(self._protocol, "_buffer_paused", False) and has_hung_up(transport)):
            self.on_client_gone()
        elif self.has_heard:
            self.has_heard = False
            self._deadline = now + self._timeouts.idle
        elif now > self._deadline and not self.has_ended:
            self._connection.abort()
            if self.is_paused:
                self._fail(TimedOut("the client did not read its answer"))
                if self._transport is not None:
                    self._transport.abort()
            elif self.head is None or not self.first_at:
                self._fail(TimedOut(f"the engine did not begin to answer within {self._timeouts.first_byte:g} s"))
            else:
                self._fail(TimedOut(f"the engine fell silent for {self._timeouts.idle:g} s"))

    def cut(self, error: HerderError) -> None:
        """Ends an answer that may not go on, with an error that says why."""
        if self.has_ended or self.is_gone or self.failure is not None:
            return
        self._connection.abort()
        self._fail(error)
        if self.is_paused and self._transport is not None:
            self._transport.abort()  # it does not read: it could not be told

    def on_client_gone(self) -> None:
        """Ends the engine's work: nobody waits for it."""
        self.is_gone = True
        self._connection.abort()
        self._wake()

    # the handler's side

    async def wait(self) -> None:
        """Until something has changed that the handler must see to."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def attach(self, *, is_chunked: bool) -> None:
        """From here on pieces go straight to the client, whose headers have been sent."""
        transport = self._request.transport
        if transport is None:
            self.on_client_gone()
            return
        self._transport = transport
        self._is_chunked = is_chunked
        kept = self.take()
        if kept and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(kept), kept) if is_chunked else kept)
            if self._protocol.writing_paused:
                self._pause()

    def take(self) -> bytes:
        """What was kept so far."""
        parts, self._parts = self._parts, []
        self._parts_bytes = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def resume(self) -> None:
        """The client reads again."""
        self.is_paused = False
        self.has_heard = True
        self._connection.resume()

    def close(self) -> None:
        """Ends the exchange, whatever it is at."""
        if not self.has_ended:
            self._connection.abort()

    def end_broken(self, last: bytes) -> None:
        """Ends an answer that cannot be completed: by a last piece of our own, or by cutting the connection."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if last and not self.is_paused:
                transport.write(b"%x\r\n%b\r\n" % (len(last), last) if self._is_chunked else last)
            else:
                transport.abort()

    @property
    def tail(self) -> bytes:
        """The end of the answer, where its usage stands."""
        return b"".join(self._tail)[-TAIL_BYTES:]

    def _keep(self, payload: bytes) -> None:
        if not self.first_at:
            self.first_at = self._loop.time()
        self._parts.append(payload)
        self._parts_bytes += len(payload)
        if not self.is_json or self._parts_bytes > JSON_BYTES:
            self.is_json = False
            self.is_ready = True
            if self._parts_bytes > JSON_BYTES:
                self._pause()
            self._wake()

    def _whole_events(self, payload: bytes) -> bytes:
        held = self._held
        start = max(0, len(held) - 3)
        held += payload
        end = max(held.rfind(b"\n\n", start) + 2, held.rfind(b"\n\r\n", start) + 3)
        if end <= 2:
            if len(held) <= EVENT_BYTES:
                return b""
            end = len(held)
        whole = bytes(held[:end])
        del held[:end]
        return whole

    def _pause(self) -> None:
        if not self.is_paused:
            self.is_paused = True
            self._connection.pause()
        self._wake()

    def _fail(self, error: HerderError) -> None:
        self.failure = error
        self.is_ready = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Proxy:
    """Sends requests to engines and answers clients with what comes back."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self.pool = Pool(connect_timeout_s=timeouts.connect)
        self._active: set[Exchange] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sweep_s = min(SWEEP_S, timeouts.first_byte / 4, timeouts.idle / 4)

    async def forward(self, request: web.Request, route: Route, name: str, body: Body, request_id: str) -> Outcome:
        """Carries out the exchange. The body is dropped once the engine has begun to answer.

        Raises: Unreachable when the engine accepts no connection; UpstreamFailed, TimedOut before anything was sent
        to the client; ClientGone.
        """
        loop = asyncio.get_running_loop()
        data = body.named(name, route.served_name)
        head = request_head(request, route, len(data), request_id)
        connection = await self._connect(route, is_fresh=False)
        began = loop.time()
        exchange = await self._exchange(request, route.replica, connection, head, data)
        is_stale = connection.is_reused and not connection.has_answered and loop.time() - began < STALE_S
        if is_stale and isinstance(exchange.failure, UpstreamFailed):
            # The engine closed an idle connection just as we took it: it has not seen the request.
            self._discard(exchange)
            connection = await self._connect(route, is_fresh=True)
            exchange = await self._exchange(request, route.replica, connection, head, data)
        try:
            del data
            body.drop()
            return await self._answer(request, exchange, route.api_key)
        finally:
            self._discard(exchange)

    def cut(self, replica: str, error: HerderError) -> None:
        """Ends what is on its way to a replica; clients are told the error where they still can be."""
        for exchange in tuple(self._active):
            if exchange.replica == replica:
                exchange.cut(error)

    def close(self) -> None:
        """Ends idle connections and the sweep."""
        self.pool.close()
        if self._timer is not None:
            self._timer.cancel()

    @property
    def active_count(self) -> int:
        """Exchanges on their way."""
        return len(self._active)

    async def _connect(self, route: Route, *, is_fresh: bool) -> Connection:
        try:
            return await self.pool.acquire((route.host, route.port), is_fresh=is_fresh)
        except OSError as error:  # TimeoutError is one
            raise Unreachable from error

    async def _exchange(
        self, request: web.Request, replica: str, connection: Connection, head: bytes, body: bytes
    ) -> Exchange:
        """Sends the request and waits until the client can be answered."""
        exchange = Exchange(request, connection, self._timeouts, replica)
        self._active.add(exchange)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)
        try:
            connection.send(exchange, head, body)
            while not (exchange.is_ready or exchange.is_gone):
                await exchange.wait()
        except BaseException:
            self._discard(exchange)
            raise
        return exchange

    async def _answer(self, request: web.Request, exchange: Exchange, secret: str) -> Outcome:
        if exchange.is_gone:
            raise ClientGone
        if exchange.failure is not None:
            raise exchange.failure
        head = exchange.head
        assert head is not None
        code = "ok" if head.status < 400 else f"upstream_{head.status}"
        headers = returned_headers(head)
        if exchange.has_ended:
            content = exchange.take()
            if head.status >= 400:
                content = openai.engine_error(head.status, content, secret=secret)
                headers["content-type"] = "application/json"
            response = web.Response(status=head.status, body=content, headers=headers)
            return Outcome(response, code, exchange.first_at if exchange.is_sse else 0.0, exchange.tail)
        return await self._stream(request, exchange, head, headers)

    async def _stream(self, request: web.Request, exchange: Exchange, head: Head, headers: dict[str, str]) -> Outcome:
        is_chunked = request.version >= HttpVersion11
        was_sse = exchange.is_sse
        response = web.StreamResponse(status=head.status, headers=headers)
        code = "ok" if head.status < 400 else f"upstream_{head.status}"
        try:
            await response.prepare(request)
            exchange.attach(is_chunked=is_chunked)
            while not (exchange.has_ended or exchange.failure or exchange.is_gone):
                if exchange.is_paused:
                    await request.writer.drain()  # ends too when the client leaves, or is cut off by the sweep
                    exchange.resume()
                else:
                    await exchange.wait()
            if exchange.is_gone:
                raise ClientGone
            if exchange.failure is not None:
                code = exchange.failure.code
                exchange.end_broken(openai.error_event(exchange.failure) if was_sse else b"")
            await response.write_eof()
        except ConnectionError:
            if exchange.failure is None:
                raise ClientGone from None
        return Outcome(response, code, exchange.first_at if was_sse else 0.0, exchange.tail)

    def _discard(self, exchange: Exchange) -> None:
        exchange.close()
        self._active.discard(exchange)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for exchange in tuple(self._active):
            exchange.check(now)
        self._timer = loop.call_later(self._sweep_s, self._sweep) if self._active else None


def has_hung_up(transport: asyncio.BaseTransport) -> bool:
    """Whether the other side has ended a connection that is not read at present.

    aiohttp reads no further when a client has sent many requests at once, and would not see that it left.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


def request_head(request: web.Request, route: Route, length: int, request_id: str) -> bytes:
    """Request line and headers for the engine: a short list of the client's, and the engine's own key."""
    host = f"[{route.host}]" if ":" in route.host else route.host
    lines = [
        f"{request.method} {request.rel_url.raw_path} HTTP/1.1",
        f"Host: {host}:{route.port}",
        f"Content-Length: {length}",
    ]
    given = request.headers
    for name in _FORWARDED:
        value = given.get(name)
        if value is not None:
            lines.append(f"{name}: {value}")
    if route.api_key:
        lines.append(f"Authorization: Bearer {route.api_key}")
    if request_id:
        lines.append(f"X-Request-Id: {request_id}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


def returned_headers(head: Head) -> dict[str, str]:
    """The engine's headers that the client may see."""
    return {name: value for name, value in head.headers if name in _RETURNED or name.startswith(_RETURNED_PREFIXES)}


def engine_refusal(head: Head) -> HerderError | None:
    """What an engine says that its client is not to blame for, and whose text is not for the client."""
    if head.status in (401, 403):
        return UpstreamFailed("the engine refused the head's own key", hint="restart its service")
    if head.status >= 500 or 300 <= head.status < 400:
        return UpstreamFailed(f"the engine answered {head.status}", upstream_status=head.status)
    return None
