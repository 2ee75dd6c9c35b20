"""The link against a real websocket: hello and leases, refusals, cuts, silence, overflow, logs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent.core import effects as fx
from agent.core import events as ev
from agent.link import Link, Session
from common import limits, wire
from common.clock import SystemClock
from common.errors import ErrorInfo
from tests.doubles.ws_head import TOKEN, WsHead, until


class Owner:
    """What stands behind a link: events that came, log requests that came."""

    def __init__(self, url: str, token: str = TOKEN) -> None:
        self.events: list[ev.Event] = []
        self.log_requests: list[wire.LogRequest] = []
        self.closed = 0
        self.link = Link(
            url,
            lambda: token,
            tls=None,
            hello=self.hello,
            digest=lambda: 77,
            post=self.events.append,
            on_log_request=self.log_requests.append,
            on_closed=self._closed,
            clock=SystemClock(),
            rng=random.Random(1),
        )

    async def hello(self) -> wire.Hello:
        """The first frame."""
        return wire.Hello(1, 1, "n1", "boot", "agent-1", "0", wire.Inventory("n1"))

    def _closed(self) -> None:
        self.closed += 1

    def of(self, kind: type[ev.Event]) -> list[ev.Event]:
        """Events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def running(owner: Owner) -> AsyncIterator[Owner]:
    """A link that runs."""
    task = asyncio.get_running_loop().create_task(owner.link.run())
    try:
        yield owner
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_hello_welcome_lease_ack() -> None:
    """The session opens with our token, leases carry the digest, and their acks come back with the send time."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: len(owner.of(ev.LeaseAcked)) >= 2, "two acknowledged leases")
        assert head.hellos[0].node_id == "n1"
        assert {lease.digest for lease in head.of(wire.Lease)} == {77}
        assert isinstance(owner.events[0], ev.SessionOpened)
        assert owner.events[0].welcome.cluster_id == "cluster-1"


async def test_messages_reach_the_core() -> None:
    """Commands, acks of results and log requests arrive where they belong; unknown kinds are counted."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        await head.command(wire.StopReplica("chat-0"), 4, "replica:chat-0")
        await head.send(wire.ResultAck("replica:chat-0", 4))
        await head.send(wire.LogRequest("r1", "chat-0"))
        await head.send(wire.Leaving("a head never says this", 1))
        await until(lambda: owner.log_requests and owner.link.unknown_frames == 1, "all four")
        kinds = [type(event) for event in owner.events if not isinstance(event, ev.LeaseAcked)]
        assert kinds == [ev.SessionOpened, ev.CommandReceived, ev.ResultAcked]


async def test_sends_only_into_its_session() -> None:
    """A message for a session that has ended is dropped."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        owner.link.send(fx.SendMessage("session-0", wire.Result("old", 1, "ok")))
        owner.link.send(fx.SendMessage("session-1", wire.Result("new", 1, "ok")))
        await until(lambda: head.of(wire.Result), "a result")
        assert [result.op_id for result in head.of(wire.Result)] == ["new"]


async def test_comes_back_after_a_cut() -> None:
    """A cut session is followed by another one, and the core hears of both ends."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: head.sessions == 1, "the first session")
        await head.cut()
        await until(lambda: head.sessions == 2, "the second session")
        assert len(owner.of(ev.SessionClosed)) == 1
        assert owner.closed == 1


async def test_head_that_comes_late_is_found() -> None:
    """Without a head the agent keeps trying, and finds it when it comes."""
    head = WsHead()
    async with head:
        pass
    async with running(Owner(head.url)) as owner:
        await until(lambda: owner.link.last_error, "a failed attempt")
        async with head:
            await until(lambda: owner.link.session is not None, "a session")


async def test_silent_head_is_left() -> None:
    """A head that stops answering leases (a half-open connection) is left after the lease, and dialled again."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        head.is_acking = False
        await until(lambda: head.sessions >= 2, "another session")
        closed = owner.of(ev.SessionClosed)
        assert isinstance(closed[0], ev.SessionClosed)
        assert "does not answer leases" in closed[0].reason


@pytest.mark.parametrize("token", ["wrong", ""])
async def test_wrong_token_is_told_and_tried_rarely(token: str) -> None:
    """A refused token is a fatal refusal: the reason says what to check, and the head is not hammered."""
    async with WsHead() as head, running(Owner(head.url, token)) as owner:
        await until(lambda: owner.link.last_error, "the refusal")
        assert "401; check token_file" in owner.link.last_error
        await asyncio.sleep(0)
        assert len(head.tokens) == 1
        assert owner.events == []


async def test_other_cluster_is_fatal() -> None:
    """A refusal that only a person can mend waits long; one with a time waits that time."""
    owner = Owner("http://127.0.0.1:1")
    async with WsHead() as head:
        owner = Owner(head.url)
        head.refusal = wire.Refused(ErrorInfo("wrong_cluster", "another cluster", "remove its state"))
        async with running(owner):
            await until(lambda: owner.link.last_error, "the refusal")
            assert owner.link.last_error == "refused: another cluster (remove its state)"
    assert owner.events == []


async def test_retry_after_is_honoured() -> None:
    """A refusal with a time is followed by an attempt not before that time."""
    async with WsHead() as head:
        head.refusal = wire.Refused(ErrorInfo("too_many", "too many", is_retryable=True), retry_after_ms=300)
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with running(Owner(head.url)):
            await until(lambda: len(head.hellos) == 2, "the second attempt")
            assert loop.time() - started >= 0.3


async def test_garbage_ends_the_session() -> None:
    """A head that sends what cannot be read gets no session."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        head.first_frame = b'{"kind":"welcome","body":{"proto":"x"}}'
        await until(lambda: "cannot be read" in owner.link.last_error, "the complaint")
        assert owner.events == []


async def test_newer_protocol_is_refused() -> None:
    """A head that chose a protocol that we do not speak is not talked to."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        head.first_frame = wire.encode(wire.Welcome(9, "c", 1, "s", 1_000, 1_000, 0, ""))
        await until(lambda: "protocol 9" in owner.link.last_error, "the complaint")
        assert owner.events == []


async def test_overflow_ends_the_session() -> None:
    """More frames than the outbox holds end the session instead of filling memory."""
    session = Session("s")
    for _ in range(limits.OUTBOX_FRAMES):
        session.put(b"x")
    assert not session.is_ending.is_set()
    session.put(b"x")
    assert session.is_ending.is_set()


async def test_logs_wait_for_room() -> None:
    """Log chunks wait while the outbox is a quarter full, so that they never crowd out the rest."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        chunks = 4 * limits.OUTBOX_FRAMES
        for number in range(chunks):
            await owner.link.send_log(wire.LogChunk("r1", number, "x" * 1000))
        await until(lambda: len(head.of(wire.LogChunk)) == chunks, "every chunk")
        assert owner.link.sessions == 1


async def test_telemetry_latest_wins() -> None:
    """Of readings that could not be sent yet only the latest is sent."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        for load in range(50):
            owner.link.offer_telemetry(wire.Telemetry(load1=float(load)))
        await until(lambda: head.of(wire.Telemetry), "readings")
        assert [reading.load1 for reading in head.of(wire.Telemetry)] == [49.0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"op_id":"op-1","generation":7,"head_epoch":1,"cause":"c","body":{"type":"make_coffee","cups":2}}',
        b'{"op_id":"op-1","generation":7,"head_epoch":1,"cause":"c","body":{"type":"stop_replica","replica":5}}',
    ],
)
async def test_command_that_is_not_understood_is_answered(body: bytes) -> None:
    """A command of a later head is told as failed, and the session goes on."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        assert head._socket is not None
        await head._socket.send_bytes(b'{"kind":"command","body":' + body + b"}")
        await until(lambda: head.result("op-1", 7), "its result")
        result = head.result("op-1", 7)
        assert result is not None
        assert result.error is not None
        assert (result.outcome, result.error.code) == ("failed", "invalid_request")
        assert head.sessions == 1


@pytest.mark.parametrize(
    "frame",
    [
        *(b"x", b"{}", b'{"kind":"ack","body":{"seq":"x"}}', b'{"kind":"command","body":{}}'),
        *(b'{"kind":"\xff","body":{}}', b'{"kind":"ack","body":' + b"[" * 100_000),
    ],
)
async def test_frame_that_cannot_be_read_ends_the_session(frame: bytes) -> None:
    """What is no frame ends the session with the reason, and the agent comes back."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        assert head._socket is not None
        await head._socket.send_bytes(frame)
        await until(lambda: head.sessions == 2, "another session")
        closed = owner.of(ev.SessionClosed)[0]
        assert isinstance(closed, ev.SessionClosed)
        assert "cannot be read" in closed.reason


async def test_frame_over_the_limit_ends_the_session() -> None:
    """A frame beyond FRAME_BYTES is not read to its end; the agent comes back."""
    async with WsHead() as head, running(Owner(head.url)) as owner:
        await until(lambda: owner.link.session is not None, "a session")
        assert head._socket is not None
        await head._socket.send_bytes(b" " * (limits.FRAME_BYTES + 1))
        await until(lambda: head.sessions == 2, "another session")
