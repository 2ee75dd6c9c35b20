"""Engines that are stopped while they answer, with real streams on both sides of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec

from head.core.events import Event, ReplicaIdle
from tests.doubles import gateway_head, stub_engine
from tests.doubles.gateway_head import MODEL, GatewayHead, client, until
from tests.doubles.stub_engine import StubEngine

CHAT = "/v1/chat/completions"
STREAM = {"model": MODEL, "stream": True, "messages": []}
PLAIN = {"model": MODEL, "messages": []}
EVENTS = [b'data: {"n":%d}\n\n' % number for number in range(4)]


def stop(head: GatewayHead, replica: str) -> int:
    """What the core does with a replica that shall stop: out of the routing, and the gateway is asked."""
    held = head.state.replicas[replica]
    generation = held.generation + 1
    head.driver.put(msgspec.structs.replace(held, desired="stopped", state="draining", generation=generation))
    drainer = head.driver.drainer
    assert drainer is not None
    drainer.drain(replica, generation)
    return generation


def end(head: GatewayHead, replica: str) -> None:
    """The time is over."""
    drainer = head.driver.drainer
    assert drainer is not None
    drainer.end_drain(replica)


def idles(head: GatewayHead) -> list[Event]:
    """What the core was told."""
    return head.posted(ReplicaIdle)


@asynccontextmanager
async def streaming(
    head: GatewayHead, http: aiohttp.ClientSession, engine: StubEngine
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream whose first event has come and whose engine waits before the second."""
    assert engine.gate is not None
    engine.gate.release()
    async with http.post(head.url + CHAT, json=STREAM, headers=head.headers()) as answer:
        assert await answer.content.readexactly(len(EVENTS[0])) == EVENTS[0]
        yield answer


async def test_a_stream_finishes_during_a_stop(tmp_path: Path) -> None:
    """The gateway says idle when the last byte is out, not before; a new request is refused meanwhile, with a code."""
    engine = StubEngine(events=EVENTS, gate=asyncio.Semaphore(0))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        replica = head.add_replica(engine.port)
        async with streaming(head, http, engine) as answer:
            generation = stop(head, replica)
            async with http.post(head.url + CHAT, json=PLAIN, headers=head.headers()) as refused:
                assert refused.status == 503
                assert int(refused.headers["Retry-After"]) >= 1
                assert (await refused.json())["error"]["code"] == "no_replica_ready"
            assert idles(head) == []
            assert engine.gate is not None
            for event in EVENTS[1:]:
                engine.gate.release()
                assert await answer.content.readexactly(len(event)) == event
            assert await answer.content.read() == b""
        await until(lambda: idles(head) == [ReplicaIdle(replica, generation)])


async def test_a_stream_that_lasts_too_long_is_cut_with_an_error(tmp_path: Path) -> None:
    """Its last event says `engine_stopped`, the stream is well-formed, and the engine's connection is closed."""
    engine = StubEngine(events=EVENTS, gate=asyncio.Semaphore(0))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        replica = head.add_replica(engine.port)
        async with streaming(head, http, engine) as answer:
            stop(head, replica)
            end(head, replica)
            last = await answer.content.read()
        assert last.startswith(b"data: ")
        assert last.endswith(b"\n\n")
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert (error["code"], error["type"]) == ("engine_stopped", "server_error")
        assert replica in error["message"]
        await until(lambda: engine.gone == 1)
        assert idles(head) == []


async def test_an_answer_that_has_not_begun_is_refused_with_retry_after(tmp_path: Path) -> None:
    """Nothing was sent, so the client gets a status that its library retries."""
    engine = StubEngine(fault="hang")
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        replica = head.add_replica(engine.port)
        asking = asyncio.ensure_future(http.post(head.url + CHAT, json=PLAIN, headers=head.headers()))
        await until(lambda: len(engine.requests) == 1)
        stop(head, replica)
        end(head, replica)
        async with await asking as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "1"
            assert (await answer.json())["error"]["code"] == "engine_stopped"


async def test_an_engine_that_dies_while_it_is_stopped_is_told_as_stopped(tmp_path: Path) -> None:
    """The client is not told of a failure where there was an order."""
    engine = StubEngine(fault="hang")
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        replica = head.add_replica(engine.port)
        asking = asyncio.ensure_future(http.post(head.url + CHAT, json=PLAIN, headers=head.headers()))
        await until(lambda: len(engine.requests) == 1)
        stop(head, replica)
        engine.stop_all()
        async with await asking as answer:
            assert (await answer.json())["error"]["code"] == "engine_stopped"
        await until(lambda: len(idles(head)) == 1)


async def test_an_idle_replica_is_told_at_once(tmp_path: Path) -> None:
    """Nothing is waited for where nothing is on its way, also after many requests."""
    engine = StubEngine()
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        replica = head.add_replica(engine.port)
        for _ in range(3):
            async with http.post(head.url + CHAT, json=PLAIN, headers=head.headers()) as answer:
                assert answer.status == 200
                await answer.read()
        await until(lambda: not head_in_flight(head))
        generation = stop(head, replica)
        assert idles(head) == [ReplicaIdle(replica, generation)]


async def test_clients_that_leave_end_the_drain(tmp_path: Path) -> None:
    """The last client hangs up: the replica is idle."""
    engine = StubEngine(events=EVENTS, gate=asyncio.Semaphore(0))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        replica = head.add_replica(engine.port)
        async with streaming(head, http, engine) as answer:
            generation = stop(head, replica)
            assert idles(head) == []
            answer.close()
        await until(lambda: idles(head) != [])
        assert idles(head) == [ReplicaIdle(replica, generation)]


async def test_others_take_the_requests_meanwhile(tmp_path: Path) -> None:
    """With a second replica nobody is refused, and only the streams of the first are waited for and cut."""
    first = StubEngine(events=EVENTS, gate=asyncio.Semaphore(0))
    async with stub_engine.running(first), stub_engine.running() as second:
        async with gateway_head.running(tmp_path) as head, client() as http:
            replica = head.add_replica(first.port)
            async with streaming(head, http, first) as answer:
                head.add_replica(second.port, slot=1)
                stop(head, replica)
                for _ in range(5):
                    async with http.post(head.url + CHAT, json=PLAIN, headers=head.headers()) as other:
                        assert other.status == 200
                assert len(second.requests) == 5
                end(head, replica)
                assert b"engine_stopped" in await answer.content.read()


async def test_a_client_that_does_not_read_is_cut_too(tmp_path: Path) -> None:
    """A stalled reader cannot be told; its connection ends and nothing is left of it."""
    engine = StubEngine(events=[b"data: " + b"x" * 65_536 + b"\n\n"] * 400)
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        replica = head.add_replica(engine.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", head.port, limit=1_024)
        body = json.dumps(STREAM).encode()
        token = head.headers()["Authorization"]
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await reader.readline()
        before = -1
        while before != engine.sent_bytes:  # until nothing moves any more
            before = engine.sent_bytes
            await asyncio.sleep(0.3)
        stop(head, replica)
        end(head, replica)
        await until(lambda: not head_in_flight(head))
        with contextlib.suppress(ConnectionError):
            assert len(await reader.read()) < 400 * 65_536  # what the kernel still held, and then the end
        writer.transport.abort()


def head_in_flight(head: GatewayHead) -> float:
    """Requests on their way, as the metrics tell."""
    return head.context.metrics.registry.get_sample_value("herder_gateway_in_flight") or 0.0
