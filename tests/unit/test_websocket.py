"""Frames of websockets as our own end reads them: whole, in pieces, held back, and broken in every way we know."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import limits
from head import websocket
from head.websocket import Socket, frame_bytes, text_frame, unmasked

MASK = b"\x01\x80\xfe\x7f"


class Wire:
    """A transport that notes what is done to it."""

    def __init__(self) -> None:
        self.sent = b""
        self.ends: list[str] = []
        self.reading = True
        self.unread_bytes = 0

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.ends.append("close")

    def abort(self) -> None:
        self.ends.append("abort")

    def is_closing(self) -> bool:
        return bool(self.ends)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes


class Heard(Socket):
    """Keeps what it hears; holds itself back after `room` messages."""

    def __init__(self, room: int = 1 << 30) -> None:
        super().__init__()
        self.wire = Wire()
        self.messages: list[bytes] = []
        self.room = room
        self.is_over = False
        self.timers: list[float] = []
        self.connection_made(cast(asyncio.BaseTransport, self.wire))

    def message(self, payload: bytes) -> None:
        self.messages.append(payload)
        self.room -= 1
        if self.room <= 0:
            self.hold()

    def ended(self) -> None:
        self.is_over = True

    def call_later(self, delay_s: float, callback: Any) -> None:
        self.timers.append(delay_s)  # no loop turns here


def frame(payload: bytes = b"", *, first: int = 0x81, is_masked: bool = True, form: int = 0) -> bytes:
    """A client's frame; form: 0 the shortest length, 126 or 127 those."""
    size, bit = len(payload), 0x80 if is_masked else 0
    if form == 127 or (not form and size >= 65_536):
        head = struct.pack("!BBQ", first, bit | 127, size)
    elif form == 126 or (not form and size >= 126):
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BB", first, bit | size)
    return head + (MASK + unmasked(payload, MASK) if is_masked else payload)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_a_mask_is_its_own_inverse(payload: bytes, mask: bytes) -> None:
    """Unmasking is the RFC's exclusive-or, byte by byte."""
    expected = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    assert unmasked(payload, mask) == expected


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_a_frame_of_every_length_form_is_read(size: int) -> None:
    """The header's three forms, on both sides of their borders, and the two frames behind it."""
    socket = Heard()
    socket.data_received(frame(b"x" * size) + frame(b"y", first=0x82) + frame(b"z"))
    assert socket.messages == [b"x" * size, b"y", b"z"]
    assert frame_bytes(frame(b"x" * size), 0, size + 14) == len(frame(b"x" * size))
    assert socket._rest is None


@given(st.lists(st.binary(max_size=200), max_size=6), st.data())
def test_however_the_bytes_come_the_messages_are_the_same(payloads: list[bytes], data: st.DataObject) -> None:
    """Frames cut anywhere, or many at once, give the same messages in order."""
    stream = b"".join(frame(payload) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    socket = Heard()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        socket.data_received(stream[start:end])
    assert socket.messages == payloads
    assert not socket.wire.ends


def test_fragments_are_put_together_around_a_ping() -> None:
    """A message in three pieces with a ping between them: one message, one pong."""
    socket = Heard()
    socket.data_received(frame(b"a", first=0x01) + frame(b"?", first=0x89) + frame(b"b", first=0x00))
    assert socket.messages == []
    socket.data_received(frame(b"c", first=0x80))
    assert socket.messages == [b"abc"]
    assert socket.wire.sent == b"\x8a\x01?"


@pytest.mark.parametrize(
    "bad",
    [
        frame(b"x", is_masked=False),
        frame(b"x", first=0xC1),  # a reserved bit, as compression would set
        frame(b"x", first=0x83),  # an opcode that is none
        frame(b"x", first=0x8B),
        frame(b"x", first=0x80),  # the end of nothing
        frame(b"x", first=0x09),  # a ping in pieces
        frame(b"x" * 126, first=0x89),
        frame(b"x", form=126),  # lengths not in their shortest form
        frame(b"x" * 200, form=127),
        struct.pack("!BBQ", 0x81, 0xFF, 1 << 63),
        frame(b"a", first=0x01) + frame(b"b"),  # a new message inside another
    ],
)
def test_what_breaks_the_protocol_ends_it_with_1002(bad: bytes) -> None:
    """Nothing behind it is heard, and the peer is told which kind of mistake it was."""
    socket = Heard()
    socket.data_received(bad + frame(b"after"))
    assert socket.messages == []
    assert socket.wire.sent == b"\x88\x02" + struct.pack("!H", 1002)
    assert socket.wire.ends == ["close"]


def test_too_much_ends_with_1009_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of a giant is enough; so is the sum of fragments."""
    monkeypatch.setattr(limits, "FRAME_BYTES", 100)
    giants = (frame(b"x" * 101)[:10], frame(b"x" * 60, first=0x01) + frame(b"x" * 41, first=0x80))
    for giant in giants:
        socket = Heard()
        socket.data_received(giant)
        assert socket.messages == []
        assert socket.wire.sent == b"\x88\x02" + struct.pack("!H", 1009)


def test_a_held_socket_hands_out_nothing_until_it_goes_on() -> None:
    """What came with the last message, and what still comes, waits; the transport is not read meanwhile."""
    socket = Heard(room=1)
    socket.data_received(frame(b"1") + frame(b"2") + frame(b"3")[:4])
    assert (socket.messages, socket.wire.reading) == ([b"1"], False)
    socket.data_received(frame(b"3")[4:])
    assert socket.messages == [b"1"]
    socket.room = 2
    socket.resume()
    assert (socket.messages, socket.wire.reading) == ([b"1", b"2", b"3"], False)
    socket.room = 10
    socket.resume()
    assert socket.wire.reading


def test_a_close_is_answered_with_its_code() -> None:
    """The peer's code is echoed and kept, and a peer that reads nothing is cut off by a timer."""
    socket = Heard()
    socket.data_received(frame(struct.pack("!H", 1001) + b"bye", first=0x88) + frame(b"late"))
    assert (socket.close_code, socket.messages) == (1001, [])
    assert socket.wire.sent == b"\x88\x02" + struct.pack("!H", 1001)
    assert socket.wire.ends == ["close"]
    assert socket.timers == [websocket.CLOSE_S]


def test_our_close_is_sent_once_and_its_answer_ends_the_connection() -> None:
    """A second close says nothing more; the peer's answer is not answered."""
    socket = Heard()
    socket.write_close(1008, b"no")
    socket.write_close(1000)
    assert socket.wire.sent == b"\x88\x04" + struct.pack("!H", 1008) + b"no"
    socket.data_received(frame(struct.pack("!H", 1008), first=0x88))
    assert socket.wire.sent.count(b"\x88") == 1
    assert socket.wire.ends == ["close"]


def test_a_peer_that_pings_and_does_not_read_is_cut() -> None:
    """Answers to pings have no more room than other answers."""
    socket = Heard()
    socket.wire.unread_bytes = limits.OUTBOX_BYTES + 1
    socket.data_received(frame(b"?", first=0x89))
    assert socket.wire.ends == ["abort"]


@given(st.binary(max_size=400))
def test_no_bytes_break_it(noise: bytes) -> None:
    """Whatever comes, nothing is raised and what is kept stays within the limit."""
    socket = Heard()
    for start in range(0, len(noise), 7):
        if not socket.wire.is_closing():
            socket.data_received(noise[start : start + 7])
    socket.connection_lost(None)
    assert socket.is_over
    assert len(socket._rest or b"") <= limits.FRAME_BYTES + 14


def test_our_text_frames_have_the_three_forms() -> None:
    """The header of what the head sends."""
    assert text_frame(b"x" * 125)[:2] == b"\x81\x7d"
    assert text_frame(b"x" * 126)[:4] == b"\x81\x7e\x00\x7e"
    assert text_frame(b"x" * 65_536)[:10] == b"\x81\x7f" + struct.pack("!Q", 65_536)
