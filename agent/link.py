"""The websocket to the head: dials, says hello, renews the lease, carries messages both ways, comes back when cut.

What the head's state rests on (reports, results) is repeated by the core, so an outbox that overflows just ends the
session. Telemetry has one place in which the latest wins; log chunks wait for room. After a session the agent waits
what the head told it (`respread_ms`), so that a restarted head is not overrun; without a head it tries with
full jitter; after a refusal that only a person can mend it tries rarely and says so.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec

from agent.core import events as ev
from agent.core.effects import CloseSession, SendMessage
from agent.tls import TlsConfig, ask_why, client_context, explain
from common import limits, wire
from common.backoff import full_jitter_ms
from common.clock import Clock, boottime_ms, boottime_ns
from common.errors import HerderError, InvalidRequest
from common.telemetry import fields
from herder.decoding import UNREADABLE

log = logging.getLogger(__name__)
PATH = "/api/v1/agent"
FATAL = frozenset(
    {
        "wrong_cluster",
        "stale_head",
        "protocol_unsupported",
        "unauthenticated",
        "forbidden",
        "invalid_request",
        "invalid_name",
    }
)
FATAL_STATUS = frozenset({400, 401, 403, 404, 426})
WRITE_TIMEOUT_S = 30.0


class Ended(Exception):
    """A session or an attempt has ended. `wait_ms` -1: by backoff."""

    def __init__(self, reason: str, *, wait_ms: int = -1, is_fatal: bool = False) -> None:
        super().__init__(reason)
        self.wait_ms = wait_ms
        self.is_fatal = is_fatal


class Session:
    """One open websocket's outbox."""

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        self.frames: deque[bytes] = deque()
        self.frames_bytes = 0
        self.telemetry: wire.Telemetry | None = None
        self.has_work = asyncio.Event()
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.end_reason = ""
        self.end_is_fatal = False
        self.is_ending = asyncio.Event()

    def put(self, frame: bytes) -> None:
        """Queues a frame; an overflow ends the session."""
        self.frames.append(frame)
        self.frames_bytes += len(frame)
        self.has_work.set()
        if len(self.frames) > limits.OUTBOX_FRAMES // 4:
            self.has_room.clear()
        if len(self.frames) > limits.OUTBOX_FRAMES or self.frames_bytes > limits.OUTBOX_BYTES:
            self.end("the outbox is full: the head does not read")

    def end(self, reason: str, *, is_fatal: bool = False) -> None:
        """Ends the session once."""
        if not self.is_ending.is_set():
            self.end_reason, self.end_is_fatal = reason, is_fatal
            self.is_ending.set()
            self.has_room.set()


class Link:
    """The agent's one connection to its head."""

    def __init__(
        self,
        url: str,
        token: Callable[[], str],
        *,
        tls: TlsConfig | None,
        hello: Callable[[], Awaitable[wire.Hello]],
        digest: Callable[[], int],
        post: Callable[[ev.Event], None],
        on_log_request: Callable[[wire.LogRequest], None],
        on_closed: Callable[[], None],
        clock: Clock,
        is_congested: Callable[[], bool] = lambda: False,
        rng: random.Random | None = None,
    ) -> None:
        self.url = url.rstrip("/") + PATH
        self.session: Session | None = None
        self.sessions = 0
        self.unknown_frames = 0
        self.last_error = ""
        self._token = token
        self._tls = tls
        self._hello = hello
        self._digest = digest
        self._post = post
        self._on_log_request = on_log_request
        self._on_closed = on_closed
        self._clock = clock
        self._is_congested = is_congested
        self._rng = rng or random.Random()
        self._welcome: wire.Welcome | None = None
        self._interval_ms = limits.INTERVAL_FLOOR_MS
        self._lease_ms = limits.INTERVAL_FLOOR_MS * limits.LEASE_INTERVALS
        self._seq = 0
        self._leases: dict[int, int] = {}  # seq -> Herder time when sent
        self._acked_ms = 0

    # what the daemon sends
    def send(self, effect: SendMessage) -> None:
        """Queues a message of the core for its session; dropped when that has ended."""
        if self.session is not None and self.session.id == effect.session_id:
            self.session.put(wire.encode(effect.message))

    def close_session(self, effect: CloseSession) -> None:
        """Ends the session that the core will not have."""
        log.error("this head is not accepted", extra=fields(code=effect.code, reason=effect.reason))
        if self.session is not None and self.session.id == effect.session_id:
            self.session.end(effect.reason, is_fatal=True)

    def offer_telemetry(self, telemetry: wire.Telemetry) -> None:
        """Readings; the latest wins."""
        if self.session is not None:
            self.session.telemetry = telemetry
            self.session.has_work.set()

    def offer_tick(self, tick: wire.RunTick) -> None:
        """What a load run did in a second; dropped when no session is open or much waits."""
        session = self.session
        if session is not None and session.has_room.is_set():
            session.put(wire.encode(tick))

    async def send_log(self, chunk: wire.LogChunk) -> None:
        """Queues a piece of a log once there is room; dropped when no session is open."""
        session = self.session
        if session is None:
            return
        await session.has_room.wait()
        if session is self.session and not session.is_ending.is_set():
            session.put(wire.encode(chunk))

    async def leave(self, reason: str, deadline_ms: int) -> None:
        """Says that this node is about to be gone."""
        if self.session is not None:
            self.session.put(wire.encode(wire.Leaving(reason, deadline_ms)))

    # the life of the link
    async def run(self) -> None:
        """Keeps a session until cancelled."""
        attempt = 0
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                sessions_before = self.sessions
                try:
                    await self._session(http)
                    ended = Ended("the session has ended")
                except Ended as error:
                    ended = error
                except aiohttp.WSServerHandshakeError as error:
                    ended = _refused_at_the_door(error)
                except (aiohttp.ClientError, OSError, TimeoutError, HerderError) as error:
                    ended = await self._broken(error)
                had_session = self.sessions > sessions_before
                attempt = 0 if had_session else attempt + 1
                self.last_error = str(ended)
                delay_ms = self._delay_ms(ended, attempt, had_session)
                level = logging.ERROR if ended.is_fatal else logging.WARNING
                log.log(level, "no session with the head", extra=fields(reason=str(ended), retry_ms=delay_ms))
                await asyncio.sleep(delay_ms / 1000)

    def _tls_context(self) -> ssl.SSLContext | None:
        return client_context(self._tls) if self._tls is not None else None

    def _ask_why(self) -> str:
        return ask_why(self.url, self._tls) if self._tls is not None else ""

    async def _broken(self, error: Exception) -> Ended:
        """A connection that did not come to be, or broke; certificates are for a person to mend."""
        if isinstance(error, HerderError):
            return Ended(error.message, is_fatal=True)
        words = explain(error)
        if not words and isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
            try:
                words = await asyncio.to_thread(self._ask_why)
            except HerderError as wrong:
                words = wrong.message
        if words:
            return Ended(words, is_fatal=True)
        return Ended(str(error)[:300] or type(error).__name__)

    def _delay_ms(self, ended: Ended, attempt: int, had_session: bool) -> int:
        if ended.is_fatal:
            return self._rng.randint(limits.RECONNECT_REFUSED_MS // 2, limits.RECONNECT_REFUSED_MS)
        if ended.wait_ms >= 0:
            wait_ms = min(ended.wait_ms, limits.RECONNECT_REFUSED_MS)
            return wait_ms + self._rng.randint(0, max(limits.RECONNECT_BASE_MS, wait_ms // 2))
        if had_session and self._welcome is not None:
            return self._rng.randint(0, min(max(0, self._welcome.respread_ms), limits.RECONNECT_REFUSED_MS))
        return full_jitter_ms(attempt, base_ms=limits.RECONNECT_BASE_MS, cap_ms=limits.RECONNECT_CAP_MS, rng=self._rng)

    async def _session(self, http: aiohttp.ClientSession) -> None:
        tls = await asyncio.to_thread(self._tls_context)  # anew for each session: certificates are renewed
        hello = await self._hello()
        headers = {"Authorization": f"Bearer {self._token()}"}
        async with http.ws_connect(
            self.url,
            headers=headers,
            ssl=tls if tls is not None else True,
            max_msg_size=limits.FRAME_BYTES,
            compress=0,
            autoping=True,
        ) as socket:
            await socket.send_str(wire.encode(hello).decode())
            welcome = await self._await_welcome(socket, hello)
            self._begin(welcome, hello.node_id)
            session = self.session
            assert session is not None
            try:
                await self._carry(socket, session)
            finally:
                self.session = None
                self._post(ev.SessionClosed(session.id, session.end_reason))
                self._on_closed()
        raise Ended(session.end_reason or "closed by the head", is_fatal=session.end_is_fatal)

    async def _await_welcome(self, socket: aiohttp.ClientWebSocketResponse, hello: wire.Hello) -> wire.Welcome:
        async with asyncio.timeout(limits.HELLO_TIMEOUT_S):
            while True:
                frame = await socket.receive()
                if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    busy = socket.close_code == aiohttp.WSCloseCode.TRY_AGAIN_LATER
                    raise Ended(f"closed before welcome ({socket.close_code})", wait_ms=5_000 if busy else -1)
                message = _decode(frame.data)
                if isinstance(message, wire.Refused):
                    _raise_refused(message)
                if isinstance(message, wire.Welcome):
                    if not hello.proto_min <= message.proto <= hello.proto_max:
                        raise Ended(f"the head chose protocol {message.proto}", is_fatal=True)
                    return message

    def _begin(self, welcome: wire.Welcome, node_id: str) -> None:
        self._welcome = welcome
        self._interval_ms = max(100, welcome.interval_ms)
        self._lease_ms = max(self._interval_ms, welcome.lease_ms)
        self._leases.clear()
        self._acked_ms = boottime_ms()
        self.session = Session(welcome.session_id)
        self.sessions += 1
        self.last_error = ""
        log.info("session open", extra=fields(session=welcome.session_id, head_epoch=welcome.head_epoch))
        self._post(ev.SessionOpened(welcome.session_id, node_id, welcome))

    async def _carry(self, socket: aiohttp.ClientWebSocketResponse, session: Session) -> None:
        """Reader, writer and lease run until the first of them ends or the session is told to."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(socket, session))
                group.create_task(self._write(socket, session))
                group.create_task(self._renew(session))
                await session.is_ending.wait()
                raise Ended(session.end_reason)
        except* Ended as ended:
            session.end(str(ended.exceptions[0]))
        except* (aiohttp.ClientError, OSError, TimeoutError) as errors:
            session.end(str(errors.exceptions[0])[:300] or "the connection broke")
        try:
            async with asyncio.timeout(2.0):
                await socket.close()
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass  # it is cut anyway

    async def _read(self, socket: aiohttp.ClientWebSocketResponse, session: Session) -> None:
        while True:
            frame = await socket.receive()
            if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                session.end(f"closed by the head ({socket.close_code})")
                return
            try:
                message = wire.decode(frame.data)
            except UNREADABLE as error:
                session.put(wire.encode(_refusal(frame.data, error)))
                continue
            if isinstance(message, wire.ClockAsk):  # past all queues: what waits in them would widen the estimate
                await self._send_frame(socket, wire.encode(wire.ClockTold(message.asked_ns, boottime_ns())))
                continue
            if self._is_congested():
                session.end("too much waits here")
                return
            self._received(session, message)

    def _received(self, session: Session, message: wire.Message | None) -> None:
        match message:
            case wire.Command():
                self._post(ev.CommandReceived(message))
            case wire.Ack():
                self._acked(message)
            case wire.ResultAck():
                self._post(ev.ResultAcked(message.op_id, message.generation))
            case wire.LogRequest():
                self._on_log_request(message)
            case wire.Refused():
                session.end(f"refused: {message.error.message}", is_fatal=message.error.code in FATAL)
            case _:
                self.unknown_frames += 1

    def _acked(self, ack: wire.Ack) -> None:
        sent_ms = self._leases.pop(ack.seq, None)
        if sent_ms is None:
            return
        for seq in [seq for seq in self._leases if seq < ack.seq]:
            del self._leases[seq]
        self._acked_ms = boottime_ms()
        self._interval_ms = max(100, ack.interval_ms)
        self._lease_ms = max(self._interval_ms, ack.lease_ms)
        self._post(ev.LeaseAcked(sent_ms, ack.lease_ms, ack.wants_report))

    async def _write(self, socket: aiohttp.ClientWebSocketResponse, session: Session) -> None:
        while True:
            await session.has_work.wait()
            session.has_work.clear()
            while session.frames:
                frame = session.frames.popleft()
                session.frames_bytes -= len(frame)
                if len(session.frames) <= limits.OUTBOX_FRAMES // 8:
                    session.has_room.set()
                await self._send_frame(socket, frame)
            if session.telemetry is not None:
                telemetry, session.telemetry = session.telemetry, None
                await self._send_frame(socket, wire.encode(telemetry))

    async def _send_frame(self, socket: aiohttp.ClientWebSocketResponse, frame: bytes) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await socket.send_str(frame.decode())

    async def _renew(self, session: Session) -> None:
        """Sends a lease every interval, less a little by chance; a head that is silent for a lease is left."""
        while True:
            self._seq += 1
            self._leases[self._seq] = self._clock.now_ms()
            session.put(wire.encode(wire.Lease(self._seq, boottime_ms(), self._digest())))
            await asyncio.sleep(self._interval_ms * self._rng.uniform(0.9, 1.0) / 1000)
            if boottime_ms() - self._acked_ms > self._lease_ms:
                session.end("the head does not answer leases")
                return


class _AnyCommand(msgspec.Struct, frozen=True):
    """What names a command whose body is not known here."""

    op_id: str
    generation: int


def _refusal(data: str | bytes, error: Exception) -> wire.Result:
    """The answer to a command of a kind or form that is not known here: else the head would repeat it for ever.

    Raises: Ended for a frame that is no command.
    """
    try:
        envelope = msgspec.json.decode(data, type=wire.Envelope)
        command = msgspec.json.decode(envelope.body, type=_AnyCommand)
    except UNREADABLE:
        raise _unreadable(error) from None
    if envelope.kind != "command":
        raise _unreadable(error)
    log.error("a command that this agent does not understand", extra=fields(op=command.op_id[:200], why=str(error)))
    said = f"this agent does not understand the command: {error}"[:500]
    info = InvalidRequest(said, hint="agent and head are of different versions: upgrade the agent").info()
    return wire.Result(command.op_id[:512], command.generation, "failed", error=info)


def _unreadable(error: Exception) -> Ended:
    return Ended(f"the head sent what cannot be read: {error}"[:300])


def _decode(data: str | bytes) -> wire.Message | None:
    try:
        return wire.decode(data)
    except UNREADABLE as error:
        raise _unreadable(error) from None


def _raise_refused(refused: wire.Refused) -> None:
    error = refused.error
    reason = f"refused: {error.message}" + (f" ({error.hint})" if error.hint else "")
    raise Ended(reason, wait_ms=refused.retry_after_ms or -1, is_fatal=error.code in FATAL)


def _refused_at_the_door(error: aiohttp.WSServerHandshakeError) -> Ended:
    after = error.headers.get("Retry-After", "") if error.headers is not None else ""
    wait_ms = int(after) * 1000 if after.isdigit() else -1
    hint = {401: "; check token_file", 403: "; the token is not an agent's", 426: "; upgrade this agent"}
    reason = f"the head answered {error.status}{hint.get(error.status, '')}"
    return Ended(reason, wait_ms=wait_ms, is_fatal=error.status in FATAL_STATUS)
