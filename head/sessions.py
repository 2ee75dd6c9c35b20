"""The agents' sessions: one websocket each, dialled by the agent, JSON frames both ways.

The way of a lease: the transport gives the frame (`head/websocket.py`), `wire` the message, `Driver.post` an event,
and the core's Ack goes straight into the transport. No task, no timer and no queue per lease or per session. The
transport's buffer is the outbox. It is bounded: an agent that does not read is cut off, which is safe, because the
state is level-triggered and a new session begins with a full report.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from sys import intern
from typing import Any

import msgspec
from aiohttp import WSCloseCode, web

from common import ids, limits, wire
from common.clock import FineClock, boottime_ms
from common.errors import (
    ErrorInfo,
    Forbidden,
    HerderError,
    InvalidRequest,
    TimedOut,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from common.telemetry import fields
from head import frames, websocket
from head.auth import authenticate, hash_secret, is_good
from head.bench.clocks import Clocks
from head.bench.live import Live
from head.context import IdSource
from head.core import events as ev
from head.driver import Driver
from head.log_broker import LogBroker
from herder.decoding import UNREADABLE

log = logging.getLogger(__name__)
HELLO_RATE_TLS_PER_S = 300  # a TLS handshake costs six times a plain one
HELLO_SLACK = 1.5  # admitted beyond the rate at which agents are told to come: who is refused comes seconds later
HELLO_WAITING = 2_000  # connections that have not said hello yet
RETRY_AFTER_MS = (1_000, 5_000)  # drawn for an agent that came in a crowd
STALL_MS = 10_000  # more than OUTBOX_FRAMES unread for so long: cut off
SESSIONS = limits.NODES

Builder = Callable[[str, str, Any], ev.Event]
BUILDERS: dict[type[wire.Message], Builder] = {
    wire.Lease: ev.LeaseRenewed,
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


class Session(websocket.Socket):
    """One agent's connection, from its upgrade to its end."""

    __slots__ = ("_first_unread_ms", "_frames_unread", "_owner", "id", "key_id", "node", "peer", "reason")

    def __init__(self, owner: Sessions, key_id: str, peer: str) -> None:
        super().__init__()
        self.id = ""  # until it has said hello
        self.node = ""
        self.key_id = key_id
        self.peer = peer
        self.reason = ""  # why it ended, when we ended it
        self._owner = owner
        self._frames_unread = 0  # written since the buffer was last seen empty
        self._first_unread_ms = 0

    def message(self, payload: bytes) -> None:
        if self.is_closing:
            return  # said before it heard that we end it
        if self.id:
            self._owner.heard(self, payload)
        else:
            self._owner.heard_first(self, payload)

    def ended(self) -> None:
        self._owner.lost(self)

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
        transport.write(websocket.text_frame(frame))
        return True


class Sessions:
    """All sessions. `handle_agent` is mounted by the API at GET /api/v1/agent."""

    def __init__(self, driver: Driver, clock: FineClock, ids: IdSource, *, is_tls: bool = False) -> None:
        self.counts: Counter[str] = Counter()  # frames by kind and direction, refusals: read by the metrics
        self.logs = LogBroker(driver.state, ids, self.send, lambda session_id: session_id in self._open)
        self.clocks = Clocks(clock, self.send, driver.post)
        self.live = Live(driver.state)
        self._driver = driver
        self._clock = clock
        self._ids = ids
        self._open: dict[str, Session] = {}  # said hello
        self._waiting: set[Session] = set()  # have not yet
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

    def key_of(self, node: str) -> str:
        """The key that a node's open session came with; "" when it has none."""
        live = self._driver.state.live.get(node)
        session = self._open.get(live.session_id) if live is not None else None
        return session.key_id if session is not None else ""

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
        session.write_close(WSCloseCode.TRY_AGAIN_LATER if retry_after_ms else WSCloseCode.POLICY_VIOLATION)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ends every session with "service restart"; agents come back spread over the time they were told."""
        self._is_closing = self.logs.is_closing = True
        for session in tuple(self._waiting):
            session.abort()
        for session in tuple(self._open.values()):
            session.reason = "the head is stopping"
            session.write_close(WSCloseCode.SERVICE_RESTART)
        try:
            async with asyncio.timeout(timeout_s):
                while self._open:  # noqa: ASYNC110 - once, at the end
                    await asyncio.sleep(0.01)
        except TimeoutError:
            for session in tuple(self._open.values()):
                session.abort()

    # the handler

    async def handle_agent(self, request: web.Request) -> web.StreamResponse:
        """Takes an agent's connection over and returns at once. Raises: HerderError, only before the upgrade."""
        principal = authenticate(self._driver.state, request.headers.get("Authorization"), self._clock.now_ms())
        principal.require("agent")
        if self._is_closing:
            raise Unavailable("the head is stopping")
        if len(self._waiting) >= HELLO_WAITING or len(self._open) >= SESSIONS:
            self.counts["refused_crowd"] += 1
            raise TooMany("too many agents connect at once", hint="try again in a few seconds")
        session = Session(self, principal.key_id, request.remote or "")
        answer = websocket.take_over(request, session)
        self._waiting.add(session)
        session.call_later(limits.HELLO_TIMEOUT_S, lambda: self._refuse(session, TimedOut("no hello came")))
        return answer

    # what the sessions call

    def heard_first(self, session: Session, frame: bytes) -> None:
        """The first frame of a connection: hello, or its end."""
        session.cancel_timer()
        try:
            hello = self._hello(session, frame)
        except HerderError as error:
            self._refuse(session, error)
            return
        self._waiting.discard(session)
        session.id, session.node = self._ids.fresh("ses"), intern(hello.node_id)
        self._open[session.id] = session
        self._post(session, ev.AgentSaidHello(session.id, hello, session.peer))

    def heard(self, session: Session, frame: bytes) -> None:
        """A frame of an open session."""
        try:
            envelope = wire.envelope(frame)
            is_readings = envelope.kind == "telemetry"
            message = None if is_readings else wire.body_of(envelope)
        except UNREADABLE as error:
            self._bad(session, InvalidRequest(f"a frame cannot be read: {error}"))
            return
        if not is_readings and message is None:
            self.counts["in unknown"] += 1
            return
        self.counts["in telemetry" if message is None else _IN[type(message)]] += 1
        if not self._is_key_good(session.key_id):
            self._end(session, Unauthenticated("the key of this agent was revoked or has expired"))
        elif message is None:
            self._take_readings(session, envelope.body)
        else:
            self._take(session, message)

    def lost(self, session: Session) -> None:
        """A connection has ended."""
        self._waiting.discard(session)
        if self._open.pop(session.id, None) is None:
            return
        reason = session.reason or (f"closed with {session.close_code}" if session.close_code else "connection lost")
        self.logs.session_closed(session.id)
        self.clocks.session_closed(session.id)
        self._driver.post(ev.SessionClosed(session.node, session.id, reason))

    def _hello(self, session: Session, frame: bytes) -> wire.Hello:
        """The first frame. Raises: HerderError."""
        if not self._hellos.take(boottime_ms()):
            raise TooMany("too many agents say hello at once", hint="come back after the delay that was sent")
        try:
            hello = wire.decode(frame)
        except UNREADABLE as error:
            raise InvalidRequest(f"hello cannot be read: {error}") from None
        if not isinstance(hello, wire.Hello):
            raise InvalidRequest("the first frame must be hello")
        ids.check_node_id(hello.node_id)
        ids.check_labels(hello.labels)
        frames.check_hello(hello, session.peer)
        key = self._driver.state.keys.get(session.key_id)
        if key is None or key.node not in ("", hello.node_id):
            raise Forbidden("the key of this agent is for another node", hint="`herder keys` shows for which")
        self.counts["in hello"] += 1
        return msgspec.structs.replace(hello, identity=hash_secret(hello.identity) if hello.identity else "")

    def _refuse(self, session: Session, error: HerderError) -> None:
        """Ends a connection that has not said a proper hello."""
        self.counts[f"refused_{error.code}"] += 1
        # thousands are told to come back in a crowd: those are counted, not logged
        level = logging.DEBUG if isinstance(error, TooMany) else logging.WARNING
        log.log(level, "agent refused", extra=fields(peer=session.peer, code=error.code, why=error.message))
        retry_after_ms = self._ids.uniform(*RETRY_AFTER_MS) if error.is_retryable else 0
        code = WSCloseCode.TRY_AGAIN_LATER if error.is_retryable else WSCloseCode.POLICY_VIOLATION
        session.send(wire.encode(wire.Refused(error.info(), retry_after_ms)))
        session.write_close(code, error.code.encode())

    def _take_readings(self, session: Session, body: msgspec.Raw) -> None:
        """Readings stay as they came until somebody looks: of 2,000 a second hardly one is looked at."""
        if len(body) > limits.TELEMETRY_BYTES:
            self._bad(session, InvalidRequest(f"readings of more than {limits.TELEMETRY_BYTES} bytes"))
            return
        self._post(session, ev.TelemetryReceived(session.node, session.id, bytes(body)))

    def _take(self, session: Session, message: wire.Message) -> None:
        builder = BUILDERS.get(type(message))
        try:
            message = frames.tame(message)
        except InvalidRequest as error:
            self._bad(session, error)
            return
        if builder is None:
            self._take_other(session, message)
        else:
            self._post(session, builder(session.node, session.id, message))

    def _post(self, session: Session, event: ev.Event) -> None:
        """While the driver's queue is full nothing more is read: TCP carries the wait to the agent."""
        driver = self._driver
        driver.post(event)
        if driver.queue_depth >= limits.JOURNAL_QUEUE_EVENTS:
            session.hold()
            driver.when_room(session.resume)

    def _take_other(self, session: Session, message: wire.Message) -> None:
        if isinstance(message, wire.LogChunk):
            self.logs.take(message, session.id)
        elif isinstance(message, wire.RunTick):
            self.live.take(session.node, message, self._clock.now_ms())
        elif isinstance(message, wire.ClockTold):
            self.clocks.take(message, session.id)
        else:
            self._bad(session, InvalidRequest(f"an agent does not say {wire.KINDS[type(message)]!r} here"))

    def _bad(self, session: Session, error: HerderError) -> None:
        self.counts["bad"] += 1
        self._end(session, error)

    def _end(self, session: Session, error: HerderError) -> None:
        log.warning("session ended", extra=fields(node=session.node, code=error.code, why=error.message))
        self.close_session(session.id, error.info())

    def _is_key_good(self, key_id: str) -> bool:
        return is_good(self._driver.state, key_id, self._clock.now_ms())


_IN = {cls: f"in {kind}" for cls, kind in wire.KINDS.items()}
_OUT = {cls: f"out {kind}" for cls, kind in wire.KINDS.items()}
