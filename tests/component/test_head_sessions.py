"""Sessions over real sockets: agents that behave, agents that do not, and logs through them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
from aiohttp import WSCloseCode, web
from aiohttp.test_utils import TestClient, TestServer

from common import limits, wire
from common.clock import ManualClock
from common.errors import ErrorInfo, HerderError, NodeUnreachable, NotFound, TimedOut, TooMany, WrongCluster
from head import log_broker
from head import sessions as sessions_module
from head.auth import hash_secret, new_token
from head.core import events as ev
from head.core.objects import ApiKey, Benchmark, Meta, Replica, Run
from head.core.state import Live, State
from head.core.turn import Turn
from head.driver import Driver
from head.feed import Feed
from head.sessions import Sessions
from head.websocket import text_frame
from tests.doubles.head_shell import (
    NOW_MS,
    FakeAgent,
    FakeIds,
    SwitchJournal,
    answer_errors,
    hello,
    small_step,
    until,
)

PATH = "/api/v1/agent"
AGENT_TOKEN, AGENT_HASH = new_token("agent", "key-agent", "a" * 64)
VIEWER_TOKEN, VIEWER_HASH = new_token("viewer", "key-viewer", "b" * 64)


class Head:
    """Driver, sessions and a web server, with two keys and one replica on n1."""

    def __init__(self) -> None:
        self.state = State()
        self.state.meta["cluster"] = Meta("cluster-1", 3, NOW_MS)
        self.state.keys["key-agent"] = ApiKey("key-agent", "join", "agent", AGENT_HASH, NOW_MS)
        self.state.keys["key-viewer"] = ApiKey("key-viewer", "me", "viewer", VIEWER_HASH, NOW_MS)
        self.state.replicas["chat-0"] = Replica(
            "chat-0", "chat", 0, "m", "main", "n1", "n1:gpu0", 1, "running", "ready", "c", NOW_MS
        )
        self.events: list[ev.Event] = []
        self.clock = ManualClock(NOW_MS)
        self.journal = SwitchJournal()
        self.driver = Driver(self.state, self.journal, self.clock, Feed(), step=self._step)
        self.sessions = Sessions(self.driver, self.clock, FakeIds())
        app = web.Application(middlewares=[answer_errors])
        app.router.add_get(PATH, self.sessions.handle_agent)
        self.client: TestClient[web.Request, web.Application] = TestClient(TestServer(app))

    def _step(self, state: State, event: ev.Event, now_ms: int) -> Turn:
        self.events.append(event)
        return small_step(state, event, now_ms)

    def seen(self, kind: type[ev.Event]) -> list[ev.Event]:
        """Events of a type that reached the core."""
        return [event for event in self.events if isinstance(event, kind)]

    async def dial(self, token: str = AGENT_TOKEN) -> FakeAgent:
        """A websocket that has not said anything."""
        ws = await self.client.ws_connect(PATH, headers={"Authorization": f"Bearer {token}"}, autoping=True)
        return FakeAgent(ws)

    async def join(self, node: str = "n1") -> FakeAgent:
        """An agent that was welcomed."""
        agent = await self.dial()
        await agent.say(hello(node))
        welcome = await agent.hear()
        assert isinstance(welcome, wire.Welcome)
        return agent


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Head]:
    """A head that serves until the block ends."""
    head = Head()
    head.driver.start(head.sessions, with_ticks=False)
    await head.client.start_server()
    try:
        yield head
    finally:
        await head.sessions.close(timeout_s=0.05)  # agents here do not listen any more
        await head.client.close()
        await head.driver.stop()


async def test_an_agent_joins_and_renews_its_lease() -> None:
    """Hello is answered by Welcome after its record is durable, a lease by Ack; the core hears who and from where."""
    async with running() as head:
        agent = await head.join()
        assert [row.what for row in head.journal.rows] == ["node_joined"]
        await agent.say(wire.Lease(9, 1_000))
        assert await agent.hear() == wire.Ack(9, 15_000, 5_000)
        said = head.events[0]
        assert isinstance(said, ev.AgentSaidHello)
        assert said.peer == "127.0.0.1"
        assert len(head.sessions) == 1


async def test_welcome_waits_for_the_disk() -> None:
    """While the join is on its way to the disk, the agent hears nothing."""
    async with running() as head:
        head.journal.gate.clear()
        agent = await head.dial()
        await agent.say(hello())
        await until(lambda: head.journal.waiting)
        with pytest.raises(TimeoutError):
            await agent.ws.receive(timeout=0.1)
        head.journal.gate.set()
        assert isinstance(await agent.hear(), wire.Welcome)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer nonsense"}, 401),
        ({"Authorization": f"Bearer {AGENT_TOKEN[:-1]}0"}, 401),
        ({"Authorization": f"Basic {AGENT_TOKEN}"}, 401),
        ({"Authorization": f"Bearer {VIEWER_TOKEN}"}, 403),
    ],
)
async def test_only_agents_open_sessions(headers: dict[str, str], status: int) -> None:
    """No token, a wrong one or another role never gets as far as a websocket."""
    async with running() as head:
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await head.client.ws_connect(PATH, headers=headers)
        assert error.value.status == status
        assert head.events == []


async def test_a_plain_request_is_refused() -> None:
    """The address without an upgrade answers 400."""
    async with running() as head:
        async with head.client.get(PATH, headers={"Authorization": f"Bearer {AGENT_TOKEN}"}) as answer:
            assert answer.status == 400


async def refused(agent: FakeAgent) -> tuple[ErrorInfo, int, int | None]:
    """How an agent was refused: the error, when to retry, and the close code."""
    message = await agent.hear()
    assert isinstance(message, wire.Refused), message
    return message.error, message.retry_after_ms, await agent.hear_end()


async def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says no hello is closed after HELLO_TIMEOUT."""
    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 0.05)
    async with running() as head:
        error, retry_after_ms, code = await refused(await head.dial())
        assert error.code == "timed_out"
        assert retry_after_ms > 0
        assert code == WSCloseCode.TRY_AGAIN_LATER
        assert head.events == []


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"{", "invalid_request"),
        (b'{"kind":"hello","body":{"proto_min":"one"}}', "invalid_request"),
        (b'{"kind":"from_the_future","body":{}}', "invalid_request"),
        (wire.encode(wire.Lease(1, 1)), "invalid_request"),
        (wire.encode(hello("../../etc")), "invalid_name"),
        (wire.encode(msgspec.structs.replace(hello(), labels={"a b": "c"})), "invalid_name"),
    ],
)
async def test_a_bad_hello_is_refused(frame: bytes, code: str) -> None:
    """What is no proper hello is refused with its code, and the core never hears of it."""
    async with running() as head:
        agent = await head.dial()
        await agent.ws.send_str(frame.decode())
        error, retry_after_ms, close_code = await refused(agent)
        assert (error.code, retry_after_ms, close_code) == (code, 0, WSCloseCode.POLICY_VIOLATION)
        assert head.events == []


async def test_a_crowd_is_spread() -> None:
    """Beyond the admission rate agents are told to come back later, with 1013 and a delay."""
    async with running() as head:
        head.sessions._hellos = sessions_module.TokenBucket(2, 0)
        head.sessions._hellos._rate_per_ms = 0  # no refill while the test runs
        agents = [await head.dial() for _ in range(3)]
        for number, agent in enumerate(agents[:2]):
            await agent.say(hello(f"n{number}"))
            assert isinstance(await agent.hear(), wire.Welcome)
        await agents[2].say(hello("n2"))
        error, retry_after_ms, code = await refused(agents[2])
        assert (error.code, code) == ("too_many", WSCloseCode.TRY_AGAIN_LATER)
        assert 1_000 <= retry_after_ms <= 5_000


async def test_a_bucket_refills() -> None:
    """Tokens come back with time, up to the size."""
    bucket = sessions_module.TokenBucket(2, 0)
    assert [bucket.take(0), bucket.take(0), bucket.take(0)] == [True, True, False]
    assert [bucket.take(500), bucket.take(500)] == [True, False]
    assert [bucket.take(100_000) for _ in range(3)] == [True, True, False]


async def test_the_core_may_refuse_an_agent() -> None:
    """CloseSession says why and ends the session."""
    async with running() as head:
        agent = await head.dial()
        await agent.say(hello(cluster_id="another"))
        error, _, code = await refused(agent)
        assert (error.code, code) == (WrongCluster.code, WSCloseCode.POLICY_VIOLATION)
        await until(lambda: head.seen(ev.SessionClosed))
        assert len(head.sessions) == 0


async def test_unknown_kinds_are_counted_and_ignored() -> None:
    """A frame of a newer protocol does not disturb the session."""
    async with running() as head:
        agent = await head.join()
        await agent.ws.send_str('{"kind":"from_the_future","body":{"x":1}}')
        await agent.say(wire.Lease(1, 1))
        assert isinstance(await agent.hear(), wire.Ack)
        assert head.sessions.counts["in unknown"] == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"{",
        b'{"kind":"lease","body":{"seq":"x"}}',
        wire.encode(hello()),
        b'{"kind":"\xff","body":{}}',
        b'{"kind":"event","body":' + b"[" * 100_000,
    ],
)
async def test_bad_frames_end_the_session(frame: bytes) -> None:
    """A frame that cannot be read, or that has no place here, is counted and ends the session with a reason."""
    async with running() as head:
        agent = await head.join()
        await agent.ws.send_bytes(frame)
        error, _, code = await refused(agent)
        assert (error.code, code) == ("invalid_request", WSCloseCode.POLICY_VIOLATION)
        assert head.sessions.counts["bad"] == 1
        await until(lambda: head.seen(ev.SessionClosed))


async def test_a_giant_frame_ends_the_session() -> None:
    """Beyond FRAME_BYTES the head closes with 1009 and nothing of it reaches the core."""
    async with running() as head:
        agent = await head.join()
        with contextlib.suppress(ConnectionError):
            await agent.ws.send_str('{"kind":"lease","body":"' + "x" * limits.FRAME_BYTES + '"}')
        assert await agent.hear_end() in (WSCloseCode.MESSAGE_TOO_BIG, WSCloseCode.ABNORMAL_CLOSURE)
        await until(lambda: head.seen(ev.SessionClosed))
        assert head.seen(ev.LeaseRenewed) == []


async def test_a_revoked_key_ends_its_sessions() -> None:
    """With the next lease, not only at the next connection."""
    async with running() as head:
        agent = await head.join()
        key = head.state.keys["key-agent"]
        head.state.keys["key-agent"] = msgspec.structs.replace(key, is_revoked=True)
        await agent.say(wire.Lease(1, 1))
        error, _, _ = await refused(agent)
        assert error.code == "unauthenticated"


async def test_a_clock_is_asked_and_told() -> None:
    """Questions go out over the session, answers come back as one estimate; another node's answers are nothing."""
    async with running() as head:
        agent, other = await head.join(), await head.join("n2")
        session = head.state.live["n1"].session_id
        head.sessions.clocks.measure("n1", session)
        for number in range(limits.CLOCK_ASKS):
            asked = await agent.hear()
            assert isinstance(asked, wire.ClockAsk)
            await other.say(wire.ClockTold(asked.asked_ns, 1))
            await agent.say(wire.ClockTold(asked.asked_ns, 5_000_000_000 + number))
        await until(lambda: head.seen(ev.ClockMeasured))
        (measured,) = head.seen(ev.ClockMeasured)
        assert isinstance(measured, ev.ClockMeasured)
        assert (measured.node, measured.session_id, measured.bound_ns) == ("n1", session, 0)  # time stands still here
        assert 0 <= measured.offset_ns + NOW_MS * 1_000_000 - 5_000_000_000 < limits.CLOCK_ASKS


async def test_seconds_of_runs_reach_who_watches() -> None:
    """A tick of a node's own run is shown; of another node's run it is dropped, and the session goes on."""
    async with running() as head:
        head.state.benchmarks["b"] = Benchmark("b", "b", {}, "", "me", "running", 1, 1, "c")
        head.state.runs["b.0.0"] = Run("b.0.0", "b", "n1", "load", 1, "fired", "running", "c", 1, 0, 0, 1)
        agent, other = await head.join(), await head.join("n2")
        reader = head.sessions.live.watch("b")
        await other.say(wire.RunTick("b.0.0", 1.0, sent=99))
        await until(lambda: head.sessions.live.dropped == 1)
        await agent.say(wire.RunTick("b.0.0", 1.0, sent=4))
        tick = await reader.next(20)
        assert tick is not None
        assert (tick.benchmark, tick.at_s, tick.sent) == ("b", 1.0, 4)
        assert len(head.sessions) == 2
        assert head.sessions.key_of("n1") == "key-agent"
        assert head.sessions.key_of("n9") == ""


async def test_a_lost_connection_is_reported_once() -> None:
    """The core hears of the end with the session's id and a reason."""
    async with running() as head:
        agent = await head.join()
        await agent.ws.close()
        await until(lambda: head.seen(ev.SessionClosed))
        (closed,) = head.seen(ev.SessionClosed)
        assert isinstance(closed, ev.SessionClosed)
        assert (closed.node, closed.reason) == ("n1", "closed with 1000")
        assert head.state.live["n1"].session_id == ""


async def test_an_agent_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outbox is bounded; a burst that it reads in time is delivered whole, however many frames."""
    async with running() as head:
        agent = await head.join()
        session_id = head.state.live["n1"].session_id
        for number in range(5 * limits.OUTBOX_FRAMES):
            head.sessions.send(session_id, wire.Ack(number, 1, 1))
        assert [await agent.hear() for _ in range(5 * limits.OUTBOX_FRAMES)][-1] == wire.Ack(1_279, 1, 1)
        monkeypatch.setattr(limits, "OUTBOX_BYTES", 3_000_000)
        filler = wire.LogChunk("x", 0, "y" * 1_000_000)
        for _ in range(40):
            head.sessions.send(session_id, filler)
        await until(lambda: head.seen(ev.SessionClosed))
        (closed,) = head.seen(ev.SessionClosed)
        assert isinstance(closed, ev.SessionClosed)
        assert closed.reason == "the agent does not read"
        assert head.sessions.counts["overflow"] == 1


async def test_a_stop_tells_agents_to_come_back() -> None:
    """Sessions end with 1012, and new ones are refused."""
    async with running() as head:
        agent = await head.join()
        closing = asyncio.ensure_future(head.sessions.close())
        assert await agent.hear_end() == WSCloseCode.SERVICE_RESTART
        await closing
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await head.dial()
        assert error.value.status == 503


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536, 300_000])
async def test_frames_of_every_length_arrive(size: int) -> None:
    """The frame header that we write ourselves is right at its three lengths."""
    async with running() as head:
        agent = await head.join()
        session = head.sessions._open[head.state.live["n1"].session_id]
        session._transport.write(text_frame(b"x" * size))
        frame = await agent.ws.receive(timeout=10)
        assert (frame.type, len(frame.data)) == (aiohttp.WSMsgType.TEXT, size)


class TestLogs:
    """Logs of replicas through the session of their node."""

    async def read(self, head: Head, **options: object) -> list[str]:
        """Reads a log to its end."""
        return [chunk.data async for chunk in head.sessions.open_log("chat-0", **options)]  # type: ignore[arg-type]

    async def test_a_log_is_read(self) -> None:
        """The request names what was asked for; chunks come in order until the last."""
        async with running() as head:
            agent = await head.join()
            reading = asyncio.ensure_future(self.read(head, run=1, tail=5))
            asked = await agent.hear()
            assert isinstance(asked, wire.LogRequest)
            assert (asked.replica, asked.run, asked.offset, asked.tail_lines, asked.follow) == (
                "chat-0",
                1,
                -1,
                5,
                False,
            )
            await agent.say(wire.LogChunk("log-of-somebody-else", 9, "?"))
            await agent.say(wire.LogChunk(asked.request_id, 3, "one"))
            await agent.say(wire.LogChunk(asked.request_id, 6, "two", is_last=True))
            assert await reading == ["one", "two"]
            assert head.sessions.logs.readers == 0

    async def test_a_reader_that_leaves_cancels_the_request(self) -> None:
        """The agent is told to stop."""
        async with running() as head:
            agent = await head.join()
            reading = asyncio.ensure_future(self.read(head, follow=True))
            asked = await agent.hear()
            assert isinstance(asked, wire.LogRequest)
            await agent.say(wire.LogChunk(asked.request_id, 3, "one"))
            await until(lambda: head.sessions.counts["in log_chunk"] == 1)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            cancelled = await agent.hear()
            assert isinstance(cancelled, wire.LogRequest)
            assert (cancelled.request_id, cancelled.is_cancelled) == (asked.request_id, True)

    async def test_a_slow_reader_resumes_where_it_was(self) -> None:
        """What does not fit is thrown away and asked for again from the last byte that was read."""
        async with running() as head:
            agent = await head.join()
            chunks = head.sessions.open_log("chat-0", follow=True)
            first = asyncio.ensure_future(anext(aiter(chunks)))
            asked = await agent.hear()
            assert isinstance(asked, wire.LogRequest)
            total = log_broker.QUEUE_CHUNKS + 20
            for number in range(1, total + 1):
                await agent.say(wire.LogChunk(asked.request_id, number, f"[{number}]"))
            cancelled = await agent.hear()
            assert isinstance(cancelled, wire.LogRequest)
            assert cancelled.is_cancelled
            got = [(await first).data]

            async def read_rest() -> None:
                async for chunk in chunks:
                    got.append(chunk.data)

            reading = asyncio.ensure_future(read_rest())
            again = await agent.hear()
            assert isinstance(again, wire.LogRequest)
            assert again.request_id != asked.request_id
            for number in range(again.offset + 1, total + 1):
                await agent.say(wire.LogChunk(again.request_id, number, f"[{number}]", is_last=number == total))
            await reading
            assert got == [f"[{number}]" for number in range(1, total + 1)]

    async def test_lines_go_on_in_the_next_session(self) -> None:
        """Lines are paid with credit; when the session breaks, the next one is asked for what follows."""
        async with running() as head:
            agent = await head.join()
            request = wire.LogRequest("", "", run=-1, source="replica:chat-0", follow=True, tail_lines=7)
            got: list[str] = []

            async def read() -> None:
                async for chunk in head.sessions.logs.open_lines("n1", request, wait_s=20):
                    got.extend(line.text for line in chunk.lines)

            reading = asyncio.ensure_future(read())
            asked = await agent.hear()
            assert isinstance(asked, wire.LogRequest)
            assert (asked.source, asked.tail_lines, asked.run_number) == ("replica:chat-0", 7, -1)
            assert asked.credit == limits.LOG_CREDIT_CHUNKS
            for number in range(4):
                lines = (wire.LogLine(10 * number + 10, 5, f"line {number}"),)
                await agent.say(wire.LogChunk(asked.request_id, 10 * number + 10, "", lines=lines, run=3))
            paid = await agent.hear()
            assert isinstance(paid, wire.LogRequest)
            assert (paid.request_id, paid.credit, paid.is_cancelled) == (asked.request_id, 4, False)
            await agent.ws.close()
            await until(lambda: len(head.sessions) == 0)
            head.state.live["n1"].session_id = ""
            again = await head.join()
            asked = await again.hear()
            assert isinstance(asked, wire.LogRequest)
            assert (asked.run_number, asked.offset, asked.follow) == (3, 40, True)
            lines = (wire.LogLine(50, 5, "line 4"),)
            await again.say(wire.LogChunk(asked.request_id, 50, "", lines=lines, run=3))
            await again.say(wire.LogChunk(asked.request_id, 50, "", run=3, is_last=True))
            await reading
            assert got == [f"line {number}" for number in range(5)]
            assert head.sessions.logs.readers == 0

    async def test_more_lines_than_were_paid_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An agent that sends without credit is cut off from this log, and costs no more memory than the queue."""
        monkeypatch.setattr(log_broker, "QUEUE_CHUNKS", 3)
        async with running() as head:
            agent = await head.join()
            request = wire.LogRequest("", "", run=-1, source="replica:chat-0", follow=True)
            chunks = head.sessions.logs.open_lines("n1", request)
            first = asyncio.ensure_future(anext(aiter(chunks)))
            asked = await agent.hear()
            assert isinstance(asked, wire.LogRequest)
            for number in range(30):
                await agent.say(wire.LogChunk(asked.request_id, number, "", run=1))
            await first
            await until(lambda: head.sessions.counts["in log_chunk"] == 30)
            with pytest.raises(HerderError, match="more of a log than it was asked for"):
                async for _ in chunks:
                    pass
            assert head.sessions.logs.readers == 0

    async def test_what_cannot_be_read_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unknown replica, a node that is away, does not answer, goes away or refuses: each has its error."""
        monkeypatch.setattr(log_broker, "FIRST_CHUNK_S", 0.1)
        async with running() as head:
            with pytest.raises(NotFound):
                await anext(aiter(head.sessions.open_log("nobody")))
            with pytest.raises(NodeUnreachable):
                await self.read(head)
            agent = await head.join()
            with pytest.raises(TimedOut):
                await self.read(head)
            for _ in range(2):
                await agent.hear()  # the request and its cancellation
            monkeypatch.setattr(log_broker, "FIRST_CHUNK_S", 10)
            reading = asyncio.ensure_future(self.read(head))
            asked = await agent.hear()
            assert isinstance(asked, wire.LogRequest)
            await agent.say(
                wire.LogChunk(asked.request_id, 0, "", is_last=True, error=ErrorInfo("not_found", "no such run"))
            )
            with pytest.raises(HerderError, match="no such run"):
                await reading
            reading = asyncio.ensure_future(self.read(head, follow=True))
            await agent.hear()
            await agent.ws.close()
            with pytest.raises(NodeUnreachable, match="went away"):
                await reading

    async def test_readers_have_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond it another reader is refused."""
        monkeypatch.setattr(log_broker, "STREAMS", 0)
        async with running() as head:
            with pytest.raises(TooMany):
                await self.read(head)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Upgrade", "h2c"),
        ("Sec-WebSocket-Version", "8"),
        ("Sec-WebSocket-Key", "short"),
        ("Sec-WebSocket-Key", ""),
    ],
)
async def test_an_upgrade_that_is_none_is_refused_over_http(name: str, value: str) -> None:
    """A wrong version, key or protocol is answered 400, as HTTP, and the connection stays usable for it."""
    headers = {
        "Authorization": f"Bearer {AGENT_TOKEN}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with running() as head:
        async with head.client.get(PATH, headers={**headers, name: value}) as answer:
            assert answer.status == 400
        assert len(head.sessions) == 0


async def test_a_full_queue_holds_agents_back_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the queue's limit the sockets are not read until there is room; then every lease is answered."""
    monkeypatch.setattr(limits, "JOURNAL_QUEUE_EVENTS", 2)
    async with running() as head:
        agents = [await head.join(f"n{number}") for number in range(4)]
        for agent in agents:
            for seq in range(50):
                await agent.say(wire.Lease(seq, 1))
        for agent in agents:
            assert [await agent.hear() for _ in range(50)] == [wire.Ack(seq, 15_000, 5_000) for seq in range(50)]


async def test_readings_that_cannot_be_read_are_none() -> None:
    """Readings are decoded when somebody looks; what is no reading is as if it had been lost."""
    async with running() as head:
        agent = await head.join()
        for body in ('{"cpu":0.5}', '{"cpu":"hot"}'):
            await agent.ws.send_str('{"kind":"telemetry","body":' + body + "}")
        await until(lambda: len(head.seen(ev.TelemetryReceived)) == 2)
        said = [event.telemetry for event in head.seen(ev.TelemetryReceived) if isinstance(event, ev.TelemetryReceived)]
        looked = [Live(readings=readings).telemetry for readings in said]
        assert looked == [wire.Telemetry(cpu=0.5), None]


async def test_readings_beyond_their_limit_end_the_session() -> None:
    """What is kept of a node has a size."""
    async with running() as head:
        agent = await head.join()
        await agent.ws.send_str('{"kind":"telemetry","body":{"x":"' + "y" * limits.TELEMETRY_BYTES + '"}}')
        error, _, _ = await refused(agent)
        assert error.code == "invalid_request"
        assert not head.seen(ev.TelemetryReceived)


async def test_a_key_for_one_node_opens_no_session_of_another() -> None:
    """Refused at hello, before the core hears of it; its own node is welcome."""
    async with running() as head:
        key = head.state.keys["key-agent"]
        head.state.keys["key-agent"] = msgspec.structs.replace(key, node="n1")
        agent = await head.dial()
        await agent.say(hello("n2"))
        error, _, code = await refused(agent)
        assert (error.code, code) == ("forbidden", WSCloseCode.POLICY_VIOLATION)
        assert head.events == []
        await head.join("n1")


async def test_the_core_sees_a_hash_and_never_the_secret() -> None:
    """What an agent shows is hashed at the door; what is no secret of the known form is refused."""
    secret = "5" * 64
    async with running() as head:
        agent = await head.dial()
        await agent.say(msgspec.structs.replace(hello("n1"), identity=secret))
        assert isinstance(await agent.hear(), wire.Welcome)
        (said,) = head.seen(ev.AgentSaidHello)
        assert isinstance(said, ev.AgentSaidHello)
        assert said.hello.identity == hash_secret(secret)
        agent = await head.dial()
        await agent.say(msgspec.structs.replace(hello("n1"), identity="guess"))
        error, _, _ = await refused(agent)
        assert error.code == "invalid_request"
