"""The server's end of a websocket for thousands of quiet peers (RFC 6455), without a task, a queue or a future each.

aiohttp answers the upgrade request, and what it keeps for a connection (parser, request, response, two tasks) costs
20 kB and a wake-up per frame. So the connection is taken over: the transport gets a protocol of ours, aiohttp hears
that its connection is lost, and frames go from the socket straight into `Socket.message`. Text and binary frames are
the same here, fragments are put together, pings are answered, and what breaks the protocol ends the connection with
the code that the RFC names. No compression is offered.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import struct
from abc import abstractmethod
from typing import Any, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from common import limits
from common.errors import InvalidRequest, Unavailable

CLOSE_S = 2.0  # for the peer to answer a close, and to read what was said before it
NO_CODE = 1005  # the peer closed without a code
PROTOCOL_ERROR = 1002
TOO_BIG = 1009
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_CONTROL_BYTES = 125


class Socket(asyncio.Protocol):
    """One connection. What comes is handed to `message`, the end to `ended`; both must not raise."""

    __slots__ = ("_fragments", "_is_held", "_needs_bytes", "_rest", "_timer", "_transport", "close_code", "is_closing")

    def __init__(self) -> None:
        self.is_closing = False  # we asked the peer to close, or it asked us: nothing more is sent or heard
        self.close_code = 0  # as the peer said it; 0: it did not
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # `connection_made` sets it, at once
        self._rest: bytearray | None = None  # of a frame that is not whole yet, or that waits while held
        self._needs_bytes = 0  # of `_rest`, before it is worth another look
        self._fragments: bytearray | None = None
        self._is_held = False
        self._timer: asyncio.TimerHandle | None = None

    @abstractmethod
    def message(self, payload: bytes) -> None:
        """A whole message."""

    @abstractmethod
    def ended(self) -> None:
        """The connection is gone."""

    # sending
    def write_close(self, code: int, reason: bytes = b"") -> None:
        """Asks the peer to close; the connection is cut when it does not answer."""
        if self.is_closing or self._transport.is_closing():
            return
        self.is_closing = True
        reason = reason[: _CONTROL_BYTES - 2]
        self._transport.write(b"\x88%c" % (2 + len(reason)) + struct.pack("!H", code) + reason)
        self.call_later(CLOSE_S, self.abort)

    def abort(self) -> None:
        """Cuts the connection without a word; what waits to be sent is dropped."""
        self._transport.abort()

    def call_later(self, delay_s: float, callback: Any) -> None:
        """The connection's one timer; it replaces the one before and ends with the connection."""
        self.cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, callback)

    def cancel_timer(self) -> None:
        """Takes the timer back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # back-pressure
    def hold(self) -> None:
        """Hands out nothing more until `resume`; TCP carries the wait to the peer."""
        if not self._is_held and not self._transport.is_closing():
            self._is_held = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Goes on, first with what had come."""
        if not self._is_held:
            return
        self._is_held = False
        rest, self._rest = self._rest, None
        if rest is not None:
            self._take(bytes(rest))
        if not self._is_held and not self._transport.is_closing():
            self._transport.resume_reading()

    # what the loop calls
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        rest = self._rest
        if rest is not None:
            rest += data
            if self._is_held or len(rest) < self._needs_bytes:
                return
            self._rest, data = None, bytes(rest)
        self._take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.cancel_timer()
        self._rest = self._fragments = None
        self.is_closing = True
        self.ended()

    def _take(self, data: bytes) -> None:
        """Hands out every whole frame in the data and keeps the rest."""
        start, end = 0, len(data)
        while start < end:
            if self._is_held:
                self._needs_bytes = 0
                break
            needs = frame_bytes(data, start, end)
            if needs < 0:
                self._fail(PROTOCOL_ERROR)
                return
            payload_bytes = needs - 6 - (0 if needs < 132 else 2 if needs < 65_544 else 8)
            if payload_bytes + len(self._fragments or b"") > limits.FRAME_BYTES:
                self._fail(TOO_BIG)
                return
            if start + needs > end:
                self._needs_bytes = needs
                break
            opcode = data[start]
            stop = start + needs
            body = stop - payload_bytes
            self._frame(opcode & 0x8F, unmasked(data[body:stop], data[body - 4 : body]))
            start = stop
            if self._transport.is_closing():
                return
        if start < end:
            self._rest = bytearray(data[start:] if start else data)

    def _frame(self, first: int, payload: bytes) -> None:
        is_final, opcode = first & 0x80, first & 0x0F
        if opcode in (_TEXT, _BINARY):
            if self._fragments is not None:
                self._fail(PROTOCOL_ERROR)
            elif is_final:
                self.message(payload)
            else:
                self._fragments = bytearray(payload)
        elif opcode == _CONTINUATION:
            if self._fragments is None:
                self._fail(PROTOCOL_ERROR)
                return
            self._fragments += payload
            if is_final:
                whole, self._fragments = bytes(self._fragments), None
                self.message(whole)
        elif opcode == _PING:
            self._pong(payload)
        elif opcode == _CLOSE:
            self._peer_closed(payload)
        elif opcode != _PONG:
            self._fail(PROTOCOL_ERROR)

    def _pong(self, payload: bytes) -> None:
        if self._transport.get_write_buffer_size() > limits.OUTBOX_BYTES:
            self.abort()  # it asks and does not read
        elif not self.is_closing:
            self._transport.write(b"\x8a%c" % len(payload) + payload)

    def _peer_closed(self, payload: bytes) -> None:
        """The peer's close: answered, unless it is the answer to ours, and then the connection ends."""
        self.close_code = struct.unpack("!H", payload[:2])[0] if len(payload) >= 2 else NO_CODE
        if not self.is_closing:
            self.is_closing = True
            self._transport.write(b"\x88%c" % len(payload[:2]) + payload[:2])
        self._transport.close()
        self.call_later(CLOSE_S, self.abort)  # a peer that does not read would keep it open

    def _fail(self, code: int) -> None:
        """The peer broke the protocol: it is told how, and nothing more is read."""
        self._rest = self._fragments = None
        if not self.is_closing:
            self.is_closing = True
            self._transport.write(b"\x88\x02" + struct.pack("!H", code))
        self._transport.close()
        self.call_later(CLOSE_S, self.abort)


def frame_bytes(data: bytes, start: int, end: int) -> int:
    """Bytes of the client's frame that begins here, header included, or the least it takes to know more.

    -1 for what no client may send: reserved bits, no mask, a length that is not the shortest form of itself, a control
    frame that is long or in pieces.
    """
    if end - start < 2:
        return 2
    first, second = data[start], data[start + 1]
    size = second & 0x7F
    if first & 0x70 or not second & 0x80:
        return -1
    if first & 0x08 and (size > _CONTROL_BYTES or not first & 0x80):
        return -1
    if size < 126:
        return 6 + size
    if size == 126:
        if end - start < 4:
            return 8 + 126
        (size,) = struct.unpack_from("!H", data, start + 2)
        return 8 + size if size >= 126 else -1
    if end - start < 10:
        return 14 + 65_536
    (size,) = struct.unpack_from("!Q", data, start + 2)
    return 14 + size if 65_536 <= size < 1 << 63 else -1


def unmasked(payload: bytes, mask: bytes) -> bytes:
    """The payload without its mask: one exclusive-or of two large numbers."""
    size = len(payload)
    key = mask * (size // 4) + mask[: size % 4]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def text_frame(payload: bytes) -> bytes:
    """A whole, unmasked text frame."""
    size = len(payload)
    if size < 126:
        return b"\x81%c" % size + payload
    if size < 65_536:
        return b"\x81\x7e" + struct.pack("!H", size) + payload
    return b"\x81\x7f" + struct.pack("!Q", size) + payload


class _TakenOver(web.StreamResponse):
    """What aiohttp is given as the answer: there is nothing left for it to send."""

    def __init__(self) -> None:
        super().__init__(status=101)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def accept_key(request: web.Request) -> str:
    """The `Sec-WebSocket-Accept` of an upgrade request. Raises: InvalidRequest."""
    headers = request.headers
    key = headers.get("Sec-WebSocket-Key", "")
    tokens = {token.strip().lower() for token in headers.get("Connection", "").split(",")}
    try:
        is_key = len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        is_key = False
    is_upgrade = headers.get("Upgrade", "").strip().lower() == "websocket" and "upgrade" in tokens
    if request.method != "GET" or not is_upgrade or not is_key or headers.get("Sec-WebSocket-Version") != "13":
        raise InvalidRequest("agents open a websocket here, of version 13")
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


def take_over(request: web.Request, socket: Socket) -> web.StreamResponse:
    """Answers the upgrade and gives the connection to `socket`; the handler returns what this returns, at once.

    A client says nothing before it has the answer, so nothing that was read can get lost on the way.
    Raises: InvalidRequest, Unavailable when the connection has gone.
    """
    key = accept_key(request)
    connection, transport = request.protocol, request.transport
    if transport is None or transport.is_closing():
        raise Unavailable("the connection has gone")
    answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    transport.write(f"{answer}Sec-WebSocket-Accept: {key}\r\n\r\n".encode())
    connection.transport = None  # aiohttp closes what it still holds
    transport.set_protocol(socket)
    socket.connection_made(transport)
    connection.connection_lost(None)
    return _TakenOver()
