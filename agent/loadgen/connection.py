"""One connection to the server: never blocking, reads stamped by the kernel, TLS through memory buffers.

It knows bytes and answers, not schedules: it tells its owner (`Owner`) when it is open, when an answer is over and when
something failed. The owner decides what is sent next.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Protocol

from agent.loadgen.apis import Answer, Api
from agent.loadgen.clocks import SO_TIMESTAMPNS, Stamps
from agent.loadgen.clocks import unpack as _unpack
from agent.loadgen.http1 import AnswerReader, ProtocolError
from agent.loadgen.likeness import Likeness, learn
from agent.loadgen.login import Login
from agent.loadgen.sse import EventReader, LineReader, TooLong
from agent.loadgen.workload import Item

READ_BYTES = 16_384  # a larger buffer is allocated through mmap at every read and costs three times as much
MAX_BODY = 64 << 20
LIKEN_AFTER = 4  # events until what they have in common is looked for: short answers are not worth the look
LIKEN_EVERY = 16  # events for each time it is looked for: some servers write another second into each event
MAX_ERROR_BODY = 4_096
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_monotonic_ns = time.monotonic_ns
_OWN_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)


class Call:
    """One request on its way."""

    __slots__ = (
        "acted",
        "answer",
        "body",
        "bytes",
        "connect",
        "endpoint",
        "events",
        "first_output",
        "heard",
        "index",
        "is_retried",
        "is_reused",
        "item",
        "like",
        "likeness",
        "marks",
        "scheduled",
        "sent",
        "slot",
        "stamps",
        "tries",
        "turn",
    )

    def __init__(
        self, index: int, item: Item, turn: int, scheduled: int, slot: int, keeps_text: bool, endpoint: int = 0
    ) -> None:
        self.index, self.item, self.turn, self.scheduled, self.slot = index, item, turn, scheduled, slot
        self.endpoint = endpoint
        self.acted = self.sent = self.first_output = -1
        self.is_retried = False
        self.restart(keeps_text)

    def restart(self, keeps_text: bool) -> None:
        """As before its first byte was sent."""
        self.answer = Answer([] if keeps_text else None)
        self.events: EventReader | LineReader | None = None
        self.body: list[bytes] | None = None
        self.stamps: list[int] = []
        self.marks: list[int] = []
        self.bytes = self.connect = self.heard = self.tries = 0
        self.is_reused = False
        self.likeness: Likeness | None = None
        """What its events have in common, as far as it is known."""
        self.like: Likeness | None = None
        """The same while the next read begins with a chunk and an event; None where the long way is to be gone."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server that requests can go to."""

    family: int
    address: tuple[str, int]
    host: str
    tls: ssl.SSLContext | None = None
    opening: bytes = b""
    """The first lines of a request to it."""
    login: Login | None = None
    """Of PostgreSQL."""


class Owner(Protocol):
    """Who has connections."""

    api: Api
    epoll: select.epoll
    stamps: Stamps
    lags: list[int]
    reads: int
    coalesced: int

    def opened(self, connection: Connection) -> None:
        """It can be used."""

    def answered(self, connection: Connection, call: Call, at_ns: int) -> None:
        """An answer is over; the connection has no call now."""

    def failed(self, connection: Connection, call: Call | None, outcome: str, said: str, at_ns: int) -> None:
        """It is closed; what it was doing did not end well."""


class Connection:
    """A socket and the answer that is coming on it."""

    __slots__ = (
        "_bios",
        "_is_connecting",
        "_is_shaking",
        "_out",
        "_tls",
        "began",
        "call",
        "endpoint",
        "fd",
        "is_open",
        "owner",
        "reader",
        "sock",
        "took",
    )

    def __init__(self, owner: Owner, there: Endpoint, endpoint: int = 0) -> None:
        """Begins to connect. endpoint: its number, for the owner. Raises: OSError."""
        self.owner, self.endpoint = owner, endpoint
        self.call: Call | None = None
        self.reader = AnswerReader()
        self.is_open = False
        self.took = 0
        self._out: memoryview | None = None
        self._is_connecting = self._is_shaking = True
        self._bios = (ssl.MemoryBIO(), ssl.MemoryBIO())
        self._tls = None if there.tls is None else there.tls.wrap_bio(*self._bios, server_hostname=there.host)
        self.sock = socket.socket(there.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.fd = self.sock.fileno()
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            self.began = _monotonic_ns()
            code = self.sock.connect_ex(there.address)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, errno.errorcode.get(code, "connect"))
            owner.epoll.register(self.fd, _IN | _OUT)
        except OSError:
            self.sock.close()
            raise

    def send(self, call: Call, wire: bytes) -> None:
        """Sends a request; the connection must be open and idle."""
        assert self.is_open
        assert self.call is None
        self.call = call
        self.reader.reset()
        if self._tls is not None:
            call.sent = _monotonic_ns()
            self._tls.write(wire)
            self._flush_tls()
            return
        self._write(memoryview(wire))

    def close(self) -> None:
        """Closes at once, whatever is on the way."""
        self.is_open = False
        self.call = None
        if self.sock.fileno() >= 0:
            self.owner.epoll.unregister(self.fd)
            self.sock.close()

    def on_event(self, mask: int) -> None:
        """The socket can be read or written, or has failed."""
        if self._is_connecting:
            self._connected()
            return
        if mask & _OUT and self._out is not None:
            self._write(self._out)
        if mask & ~_OUT:
            self.read()

    def _connected(self) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail("no_socket" if code in _OWN_LIMITS else "connect", errno.errorcode.get(code, str(code)))
            return
        self._is_connecting = False
        self.owner.epoll.modify(self.fd, _IN)
        self._greet()

    def _greet(self) -> None:
        """The socket is connected."""
        if self._tls is None:
            self._open()
        else:
            self._handshake()

    def _open(self) -> None:
        self.is_open = True
        self.took = _monotonic_ns() - self.began
        self.owner.opened(self)

    def _handshake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush_tls()
            return
        except ssl.SSLError as error:
            self._fail("tls", str(error))
            return
        self._flush_tls()
        if self.sock.fileno() >= 0:
            self._is_shaking = False
            self._open()

    def _write(self, view: memoryview) -> None:
        """Writes what the socket takes and keeps the rest until it takes more."""
        try:
            if self.call is not None and not self.call.bytes:
                self.call.sent = _monotonic_ns()
            gone = self.sock.send(view)
        except BlockingIOError:
            gone = 0
        except OSError as error:
            self._fail("reset", error.strerror or "send")
            return
        had_rest = self._out is not None
        self._out = view[gone:] if gone < len(view) else None
        if (self._out is not None) != had_rest:
            self.owner.epoll.modify(self.fd, _IN | _OUT if self._out is not None else _IN)

    def _flush_tls(self) -> None:
        data = self._bios[1].read()
        if data:
            self._write(memoryview(bytes(self._out) + data if self._out is not None else data))

    def read(self) -> None:
        """Takes what has come; the socket is open and can be read."""
        owner = self.owner
        try:
            data, control, _, _ = self.sock.recvmsg(READ_BYTES, 64)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail("reset", error.strerror or "recv")
            return
        now = _monotonic_ns()
        if control:
            seconds, nanoseconds = _unpack(control[0][2])
            at = seconds * 1_000_000_000 + nanoseconds - owner.stamps.offset_ns
            if at > now:
                at = now
            owner.lags.append(now - at)
        else:  # the kernel switches stamping on a moment after it is asked to
            at = now
            owner.reads += 1
        if self._tls is not None:
            self._read_tls(data, at)
        elif data:
            self.on_data(data, at)
        else:
            self._ended(at)

    def _read_tls(self, data: bytes, at: int) -> None:
        assert self._tls is not None
        if data:
            self._bios[0].write(data)
        else:
            self._bios[0].write_eof()
        if self._is_shaking:
            if data:
                self._handshake()
            else:
                self._fail("tls", "closed during the handshake")
            return
        while self.sock.fileno() >= 0:
            try:
                plain = self._tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLEOFError:
                plain = b""
            except ssl.SSLError as error:
                self._fail("tls", str(error))
                return
            if not plain:
                self._ended(at)
                return
            self.on_data(plain, at)
        if self.sock.fileno() >= 0:
            self._flush_tls()

    def on_data(self, data: bytes, at: int) -> None:
        """Bytes of an answer, stamped."""
        call = self.call
        if call is None:
            self._fail("protocol", "the server spoke without being asked")
            return
        call.heard = at
        call.bytes += len(data)
        if call.like is not None:
            text = call.like.text_of(data)
            if text is not None:
                call.stamps.append(at)
                if call.answer.texts is not None:
                    call.answer.take(call.like.kind, text.decode())
                return
            call.like = None
        reader, events = self.reader, call.events
        if events is not None and events.is_fresh:
            payload = reader.whole_event(data)
            if payload is not None:
                self._take_event(call, payload, at)
                self._liken(call, payload)
                return
        try:
            pieces = reader.feed(data)
            if events is None:
                if call.body is None and reader.status:
                    self._choose_framing(call)
                    events = call.events
                if call.body is not None and pieces:
                    call.body += pieces
                    if call.bytes > MAX_BODY:
                        raise ProtocolError(f"an answer of more than {MAX_BODY >> 20} MiB")
            if events is not None:
                self._take_events(call, events, pieces, at)
        except ProtocolError as error:
            self._fail("protocol", str(error))
            return
        except TooLong:
            self._fail("protocol", "an event of more than 4 MiB")
            return
        if reader.is_done:
            if reader.leftover:
                reader.is_kept = False
            self._finish(call, at)

    def _take_event(self, call: Call, payload: bytes, at: int) -> None:
        answer = call.answer
        kind = self.owner.api.read_event(payload, answer)
        if kind:
            call.stamps.append(at)
            if answer.output_tokens >= 0:
                call.marks.append(answer.output_tokens)
            if kind == 1 and call.first_output < 0:
                call.first_output = at

    def _liken(self, call: Call, payload: bytes) -> None:
        """Behind an event that came as a read of its own: from the next on a look at the text may do."""
        if call.answer.output_tokens >= 0:
            return  # usage in every event is read in every event
        if len(call.stamps) >= LIKEN_AFTER + LIKEN_EVERY * call.tries:
            call.tries += 1
            call.likeness = learn(payload, self.owner.api.read_event) or call.likeness
        call.like = call.likeness

    def _take_events(self, call: Call, events: EventReader | LineReader, pieces: list[bytes], at: int) -> None:
        stamps = call.stamps
        before = len(stamps)
        for piece in pieces:
            for payload in events.feed(piece):
                self._take_event(call, payload, at)
        if len(stamps) - before > 1:
            self.owner.coalesced += len(stamps) - before - 1

    def _choose_framing(self, call: Call) -> None:
        """Events where the server says so and the API has some; else, and for errors, the body is read as a whole."""
        headers, framing = self.reader.headers, self.owner.api.framing
        coding = headers.get(b"content-encoding", b"").strip().lower()
        if coding not in (b"", b"identity") and self.reader.status == 200 and not self.owner.api.is_opaque:
            raise ProtocolError(f"compressed ({coding[:20].decode(errors='replace')}), which was not asked for")
        kind = headers.get(b"content-type", b"").lower()
        if self.reader.status == 200 and kind.startswith(b"text/event-stream") and framing in ("sse", "lines"):
            call.events = EventReader()
        elif self.reader.status == 200 and b"ndjson" in kind and framing == "lines":
            call.events = LineReader()
        else:
            call.body = []

    def _ended(self, at: int) -> None:
        """The server closed."""
        call = self.call
        if call is None:
            self.close()
            return
        try:
            self.reader.feed_end()
        except ProtocolError as error:
            # A stream that breaks off behind its first event is the server's failure, not a lost connection.
            outcome = "truncated" if call.events is not None else "reset"
            self._fail(outcome, str(error))
            return
        self.reader.is_kept = False
        self._finish(call, at)

    def _finish(self, call: Call, at: int) -> None:
        self.call = None
        if not self.reader.is_kept or self._out is not None:
            self.close()
        self.owner.answered(self, call, at)

    def _fail(self, outcome: str, said: str) -> None:
        call = self.call
        self.close()
        self.owner.failed(self, call, outcome, said, _monotonic_ns())
