"""The agents' sessions: one websocket each, dialled by the agent, JSON frames both ways.

The way of a lease: aiohttp gives the frame, `wire.decode` the message, `Driver.post` an event, and the core's Ack
goes straight into the transport. No task, no timer and no queue per lease or per session. aiohttp's own `send_*`
are coroutines that may wait for a slow reader; here frames (text, whole, unmasked) are written to the transport
directly, whose buffer is the outbox. It is bounded: an agent that does not read is cut off, which is safe, because
the state is level-triggered and a new session begins with a full report.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from common import ids, limits, wire
from common.clock import Clock, boottime_ms
from common.errors import (
    ErrorInfo,
    HerderError,
    InvalidRequest,
    TimedOut,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from common.telemetry import fields
from head import frames
from head.auth import authenticate, is_good
from head.context import IdSource
from head.core import events as ev
from head.driver import Driver
from head.log_broker import LogBroker

log = logging.getLogger(__name__)
HELLO_RATE_TLS_PER_S = 300  # a TLS handshake costs six times a plain one
HELLO_SLACK = 1.5  # admitted beyond the rate at which agents are told to come: who is refused comes seconds later
HELLO_WAITING = 2_000  # connections that have not said hello yet
RETRY_AFTER_MS = (1_000, 5_000)  # drawn for an agent that came in a crowd
STALL_MS = 10_000  # more than OUTBOX_FRAMES unread for so long: cut off
CLOSE_S = 2.0  # for the agent to answer a close
SESSIONS = limits.NODES

Builder = Callable[[str, str, Any], ev.Event]
BUILDERS: dict[type[wire.Message], Builder] = {
    wire.Lease: ev.LeaseRenewed,
    wire.Telemetry: ev.TelemetryReceived,
    wire.Report: ev.AgentReported,
    wire.Progress: ev.ProgressReceived,
    wire.Result: ev.ResultReceived,
    wire.Leaving: ev.AgentLeaving,
}


class TokenBucket:
    """So many per second on average, and as many at once."""

    def __init__(self, rate_per_s: float, now_ms: int) -> None:
        self._rate_per_ms = rate_per_s / 1000
        self._size = rate_per_s
        self._tokens = rate_per_s
        self._at_ms = now_ms

    def take(self, now_ms: int) -> bool:
        """Takes one if there is one."""
        self._tokens = min(self._size, self._tokens + (now_ms - self._at_ms) * self._rate_per_ms)
        self._at_ms = now_ms
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Session:
    """One agent's connection."""

    __slots__ = ("_first_unread_ms", "_frames_unread", "_transport", "id", "is_closing", "key_id", "node", "reason")

    def __init__(self, id: str, node: str, key_id: str, transport: asyncio.WriteTransport) -> None:
        self.id = id
        self.node = node
        self.key_id = key_id
        self.reason = ""  # why it ended, when we ended it
        self.is_closing = False
        self._transport = transport
        self._frames_unread = 0  # written since the buffer was last seen empty
        self._first_unread_ms = 0

    def send(self, frame: bytes) -> bool:
        """Writes a text frame; False when the agent does not read and the session has to end."""
        transport = self._transport
        if self.is_closing or transport.is_closing():
            return True
        unread_bytes = transport.get_write_buffer_size()
        if unread_bytes == 0:
            self._frames_unread = 0
            self._first_unread_ms = boottime_ms()
        elif unread_bytes + len(frame) > limits.OUTBOX_BYTES or (
            self._frames_unread >= limits.OUTBOX_FRAMES and boottime_ms() - self._first_unread_ms > STALL_MS
        ):
            return False
        self._frames_unread += 1
        transport.write(text_frame(frame))
        return True

    def send_close(self, code: int) -> None:
        """Asks the agent to close; cuts the connection when it does not answer."""
        if self.is_closing or self._transport.is_closing():
            return
        self.is_closing = True
        self._transport.write(b"\x88\x02" + struct.pack("!H", code))
        asyncio.get_running_loop().call_later(CLOSE_S, self.abort)

    def abort(self) -> None:
        """Cuts the connection without a word; what waits in the outbox is dropped."""
        self._transport.abort()


class Sessions:
    """All sessions. `handle_agent` is mounted by the API at GET /api/v1/agent."""

    def __init__(self, driver: Driver, clock: Clock, ids: IdSource, *, is_tls: bool = False) -> None:
        self.counts: Counter[str] = Counter()  # frames by kind and direction, refusals: read by the metrics
        self.logs = LogBroker(driver.state, ids, self.send)
        self._driver = driver
        self._clock = clock
        self._ids = ids
        self._open: dict[str, Session] = {}  # said hello
        self._waiting = 0  # have not yet
        rate_per_s = HELLO_RATE_TLS_PER_S if is_tls else limits.HELLO_RATE_PER_S
        self._hellos = TokenBucket(HELLO_SLACK * rate_per_s, boottime_ms())
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._open)

    def open_log(
        self, replica: str, run: int = 0, tail: int = limits.PAGE_ITEMS_DEFAULT, follow: bool = False
    ) -> AsyncIterator[wire.LogChunk]:
        """See `LogBroker.open_log`."""
        return self.logs.open_log(replica, run, tail, follow)

    # the driver's outlet

    def send(self, session_id: str, message: wire.Message) -> None:
        """Sends to a session, if it still is there."""
        session = self._open.get(session_id)
        if session is None:
            return
        self.counts[_OUT[type(message)]] += 1
        if not session.send(wire.encode(message)):
            self.counts["overflow"] += 1
            session.reason = "the agent does not read"
            log.warning("outbox overflow; session cut", extra=fields(node=session.node, session=session_id))
            session.abort()

    def close_session(self, session_id: str, error: ErrorInfo | None) -> None:
        """Ends a session, if it still is there; says why first."""
        session = self._open.get(session_id)
        if session is None:
            return
        session.reason = error.message if error else "closed by the head"
        retry_after_ms = self._ids.uniform(*RETRY_AFTER_MS) if error and error.is_retryable else 0
        if error is not None:
            session.send(wire.encode(wire.Refused(error, retry_after_ms)))
        session.send_close(WSCloseCode.TRY_AGAIN_LATER if retry_after_ms else WSCloseCode.POLICY_VIOLATION)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ends every session with "service restart"; agents come back spread over the time they were told."""
        self._is_closing = True
        for session in tuple(self._open.values()):
            session.reason = "the head is stopping"
            session.send_close(WSCloseCode.SERVICE_RESTART)
        try:
            async with asyncio.timeout(timeout_s):
                while self._open:  # noqa: ASYNC110 - once, at the end
                    await asyncio.sleep(0.01)
        except TimeoutError:
            for session in tuple(self._open.values()):
                session.abort()

    # the handler

    async def handle_agent(self, request: web.Request) -> web.WebSocketResponse:
        """One agent, from its upgrade request to its end. Raises: HerderError, only before the upgrade."""
        principal = authenticate(self._driver.state, request.headers.get("Authorization"), self._clock.now_ms())
        principal.require("agent")
        if self._is_closing:
            raise Unavailable("the head is stopping")
        if self._waiting >= HELLO_WAITING or len(self._open) >= SESSIONS:
            self.counts["refused_crowd"] += 1
            raise TooMany("too many agents connect at once", hint="try again in a few seconds")
        ws = web.WebSocketResponse(
            timeout=CLOSE_S, compress=False, max_msg_size=limits.FRAME_BYTES, decode_text=False, heartbeat=None
        )
        if not ws.can_prepare(request):
            raise InvalidRequest("agents open a websocket here")
        await ws.prepare(request)
        self._waiting += 1
        try:
            hello = await self._hello(ws, request.remote or "")
        except HerderError as error:
            await self._refuse(ws, error, request.remote)
            return ws
        finally:
            self._waiting -= 1
        if request.transport is not None:
            session = Session(self._ids.fresh("ses"), hello.node_id, principal.key_id, request.transport)
            await self._serve(ws, session, ev.AgentSaidHello(session.id, hello, request.remote or ""))
        return ws

    async def _hello(self, ws: web.WebSocketResponse, peer: str) -> wire.Hello:
        """The first frame. Raises: HerderError."""
        try:
            frame = await ws.receive(timeout=limits.HELLO_TIMEOUT_S)
        except TimeoutError:
            raise TimedOut("no hello came") from None
        if frame.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
            raise InvalidRequest("the connection ended before hello")
        if not self._hellos.take(boottime_ms()):
            raise TooMany("too many agents say hello at once", hint="come back after the delay that was sent")
        try:
            hello = wire.decode(frame.data)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"hello cannot be read: {error}") from None
        if not isinstance(hello, wire.Hello):
            raise InvalidRequest("the first frame must be hello")
        ids.check_node_id(hello.node_id)
        ids.check_labels(hello.labels)
        frames.check_hello(hello, peer)
        self.counts["in hello"] += 1
        return hello

    async def _refuse(self, ws: web.WebSocketResponse, error: HerderError, peer: str | None) -> None:
        self.counts[f"refused_{error.code}"] += 1
        # thousands are told to come back in a crowd: those are counted, not logged
        level = logging.DEBUG if isinstance(error, TooMany) else logging.WARNING
        log.log(level, "agent refused", extra=fields(peer=peer, code=error.code, why=error.message))
        retry_after_ms = self._ids.uniform(*RETRY_AFTER_MS) if error.is_retryable else 0
        code = WSCloseCode.TRY_AGAIN_LATER if error.is_retryable else WSCloseCode.POLICY_VIOLATION
        try:
            async with asyncio.timeout(2 * CLOSE_S):
                await ws.send_str(wire.encode(wire.Refused(error.info(), retry_after_ms)).decode())
                await ws.close(code=code, message=error.code.encode())
        except (TimeoutError, ConnectionError):
            pass  # it has gone already, or does not read: the connection ends either way

    async def _serve(self, ws: web.WebSocketResponse, session: Session, hello: ev.AgentSaidHello) -> None:
        self._open[session.id] = session
        self._driver.post(hello)
        try:
            await self._read(ws, session)
        finally:
            del self._open[session.id]
            reason = session.reason or (f"closed with {ws.close_code}" if ws.close_code else "connection lost")
            self.logs.session_closed(session.id)
            self._driver.post(ev.SessionClosed(session.node, session.id, reason))

    async def _read(self, ws: web.WebSocketResponse, session: Session) -> None:
        """Frames until the end. While the driver's queue is full nothing is read: TCP carries the wait to the agent."""
        driver, counts = self._driver, self.counts
        async for frame in ws:
            if frame.type is not WSMsgType.TEXT and frame.type is not WSMsgType.BINARY:
                return  # an error: aiohttp has closed the connection with its code (1009: frame too large)
            if session.is_closing:
                continue  # said before it heard that we end it
            try:
                message = wire.decode(frame.data)
            except msgspec.DecodeError as error:
                counts["bad"] += 1
                self._end(session, InvalidRequest(f"a frame cannot be read: {error}"))
                continue
            if message is None:
                counts["in unknown"] += 1
                continue
            counts[_IN[type(message)]] += 1
            builder = BUILDERS.get(type(message))
            if not self._is_key_good(session.key_id):
                self._end(session, Unauthenticated("the key of this agent was revoked or has expired"))
                continue
            try:
                message = frames.tame(message)
            except InvalidRequest as error:
                counts["bad"] += 1
                self._end(session, error)
                continue
            if builder is None:
                self._take_other(session, message)
                continue
            if driver.queue_depth >= limits.JOURNAL_QUEUE_EVENTS:
                await driver.room()
            driver.post(builder(session.node, session.id, message))

    def _take_other(self, session: Session, message: wire.Message) -> None:
        if isinstance(message, wire.LogChunk):
            self.logs.take(message, session.id)
        else:
            self.counts["bad"] += 1
            self._end(session, InvalidRequest(f"an agent does not say {wire.KINDS[type(message)]!r} here"))

    def _end(self, session: Session, error: HerderError) -> None:
        log.warning("session ended", extra=fields(node=session.node, code=error.code, why=error.message))
        self.close_session(session.id, error.info())

    def _is_key_good(self, key_id: str) -> bool:
        return is_good(self._driver.state, key_id, self._clock.now_ms())


_IN = {cls: f"in {kind}" for cls, kind in wire.KINDS.items()}
_OUT = {cls: f"out {kind}" for cls, kind in wire.KINDS.items()}


def text_frame(payload: bytes) -> bytes:
    """A whole, unmasked text frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c" % size + payload
    if size < 65_536:
        return b"\x81\x7e" + struct.pack("!H", size) + payload
    return b"\x81\x7f" + struct.pack("!Q", size) + payload
