"""Bytes that mean harm, before the gateway and behind it: nothing is smuggled, nothing hangs, nothing is left over."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common import limits
from head.config import GatewayConfig
from tests.doubles import gateway_head, stub_engine
from tests.doubles.gateway_head import MODEL, GatewayHead, client, until

CHAT = "/v1/chat/completions"
PLAIN = json.dumps({"model": MODEL, "messages": []}).encode()
STREAM = json.dumps({"model": MODEL, "stream": True, "messages": []}).encode()
SNEAKY = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
IMPATIENT = GatewayConfig(connect_timeout_s=2.0, first_byte_timeout_s=0.5, idle_timeout_s=0.5)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def request(head: GatewayHead, body: bytes = PLAIN, *headers: str, path: str = CHAT, version: str = "1.1") -> bytes:
    """A request's bytes; its Content-Length unless the headers say something of length."""
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Authorization: {head.headers()['Authorization']}", *headers]
    if not any("content-length" in line.lower() or "transfer-encoding" in line.lower() for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def exchange(head: GatewayHead, data: bytes) -> bytes:
    """All that comes back for some bytes, until the head closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
    writer.write(data)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One answer that says its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
    return int(head.split(b" ")[1]), await reader.readexactly(int(fields["content-length"]))


async def is_clean(head: GatewayHead) -> None:
    """Nothing is on its way, nothing is held."""
    drainer = head.driver.drainer
    assert drainer is not None
    registry = head.context.metrics.registry
    await until(lambda: registry.get_sample_value("herder_gateway_in_flight") == 0)
    assert registry.get_sample_value("herder_gateway_bodies_bytes") == 0
    assert drainer._loads.outstanding == {}  # type: ignore[attr-defined]


@asynccontextmanager
async def engine_that(serve: Serve) -> AsyncIterator[int]:
    """A port whose connections are answered by a few lines."""
    tasks = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass  # the gateway, or the test, has had enough
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# smuggling
FRAMINGS = {
    "both lengths": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "both lengths, other order": ["Transfer-Encoding: chunked", "Content-Length: 5"],
    "two lengths": ["Content-Length: 5", "Content-Length: 6"],
    "two lengths in one": ["Content-Length: 5, 6"],
    "a signed length": ["Content-Length: +5"],
    "a negative length": ["Content-Length: -5"],
    "a hexadecimal length": ["Content-Length: 0x5"],
    "a length of spaces": ["Content-Length: 5 5"],
    "a space before the colon": ["Transfer-Encoding : chunked"],
    "a coding that is none": ["Transfer-Encoding: xchunked"],
    "chunked twice": ["Transfer-Encoding: chunked, chunked"],
    "chunked not last": ["Transfer-Encoding: chunked, identity"],
    "two codings": ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
    "a folded header": ["Transfer-Encoding:\r\n chunked"],
    "a bare line feed": ["X: y\nTransfer-Encoding: chunked"],
    "a bare carriage return": ["X: y\rTransfer-Encoding: chunked"],
    "a null": ["Transfer-Encoding: chunked\0"],
}


@pytest.mark.parametrize("name", FRAMINGS)
async def test_a_body_has_one_length(tmp_path: Path, name: str) -> None:
    """Whatever says the length in two ways, or in none, is refused or ends there: what follows is never a request."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        sneaky = request(head, PLAIN, path="/v1/embeddings")
        for body in (b"0\r\n\r\n" + sneaky, b"%x\r\n%b\r\n0\r\n\r\n" % (len(PLAIN), PLAIN) + sneaky):
            told = await exchange(head, request(head, body, *FRAMINGS[name]))
            assert told.count(b"HTTP/1.1 200") == 0, told
            assert told.startswith(b"HTTP/1."), told
            assert b" 400 " in told.split(b"\r\n")[0]
        assert engine.requests == []
        await is_clean(head)


@pytest.mark.parametrize("size", ["0x10", "-1", "+5", " 5", "5 ", "1_0", "ffffffffffffffff1", "", "5;a\n"])
async def test_a_chunk_has_one_size(tmp_path: Path, size: str) -> None:
    """Sizes that two parsers could read in two ways end the connection, and nothing reaches the engine."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        body = f"{size}\r\n".encode() + PLAIN + b"\r\n0\r\n\r\n" + request(head, PLAIN, path="/v1/embeddings")
        told = await exchange(head, request(head, body, "Transfer-Encoding: chunked"))
        assert b" 200 " not in told
        assert engine.requests == []
        await is_clean(head)


async def test_a_body_that_looks_like_a_request_is_a_body(tmp_path: Path) -> None:
    """After a refusal that did not read the body, its bytes are thrown away or the connection ends."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        sneaky = request(head, PLAIN)
        last = request(head, b"", "Connection: close", "Content-Length: 0", path="/v1/models")
        last = last.replace(b"POST", b"GET")
        for first in (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(sneaky),  # no token
            request(head, b"", f"Content-Length: {len(sneaky)}", path="/v1/nothing"),
            request(head, b"", f"Content-Length: {len(sneaky)}", "Content-Encoding: gzip"),
            request(head, b"", f"Content-Length: {limits.GATEWAY_BODY_BYTES + 1}"),
        ):
            told = await exchange(head, first + sneaky + last)
            assert b" 4" in told[:14]
            assert told.count(b"HTTP/1.1 ") == 1 + told.count(b'"object":"list"'), told
        assert engine.requests == []
        await is_clean(head)


# connections that are used again
async def test_a_connection_after_a_small_refusal_is_used_again(tmp_path: Path) -> None:
    """An unread body that is small is read away: the next request on the connection is served."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
        assert (await read_answer(reader))[0] == 401
        writer.write(request(head))
        assert await read_answer(reader) == (200, engine.answer)
        writer.close()


async def test_a_connection_ends_after_413(tmp_path: Path) -> None:
    """The refusal arrives while the client still sends, and nothing more is taken on that connection."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
        writer.write(request(head, b"x" * 100_000, f"Content-Length: {limits.GATEWAY_BODY_BYTES * 2}"))
        status, body = await read_answer(reader)
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
        writer.write(b"x" * 100_000)
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass  # closed with our bytes unread
        writer.transport.abort()
        await is_clean(head)


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    """Each by its own answer, also behind a stream and behind a refusal."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        requests = [
            request(head, STREAM),
            request(head, PLAIN),
            request(head, b"{}"),
            request(head, PLAIN, "Connection: close"),
        ]
        told = await exchange(head, b"".join(requests))
        assert re.findall(rb"HTTP/1.1 ([0-9]+)", told) == [b"200", b"200", b"400", b"200"]
        assert told.index(b"[DONE]") < told.index(engine.answer)
        assert told.endswith(engine.answer)
        assert len(engine.requests) == 3
        await is_clean(head)


async def test_many_pipelined_requests_are_not_all_begun(tmp_path: Path) -> None:
    """One connection has one request on its way, however many it has sent; its end is seen though it is not read."""
    engine = stub_engine.StubEngine(fault="hang")
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        _, writer = await asyncio.open_connection("127.0.0.1", head.port)
        writer.write(request(head) * 500)
        await until(lambda: len(engine.requests) == 1)
        in_flight = head.context.metrics.registry.get_sample_value("herder_gateway_in_flight")
        assert (in_flight, len(engine.requests)) == (1, 1)
        writer.transport.abort()
        await until(lambda: engine.gone == 1)
        await is_clean(head)


@pytest.mark.parametrize("ending", ["eof", "abort"])
@pytest.mark.parametrize("framing", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
async def test_a_body_that_breaks_off_reaches_nobody(tmp_path: Path, ending: str, framing: str) -> None:
    """Half a prompt is no prompt."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
        part = b"x" * 1_000 if "Length" in framing else b"1388\r\n" + b"x" * 1_000
        writer.write(request(head, part, framing))
        registry = head.context.metrics.registry
        await until(lambda: registry.get_sample_value("herder_gateway_bodies_bytes") == 1_000)
        if ending == "eof":
            writer.write_eof()
            assert b" 200 " not in await reader.read()
        writer.transport.abort()
        await is_clean(head)
        assert engine.requests == []


# memory
async def test_bodies_have_a_common_limit(tmp_path: Path) -> None:
    """When held bodies fill the room the next is refused with a time to come back; afterwards there is room again."""
    engine = stub_engine.StubEngine(fault="hang")
    settings = GatewayConfig(bodies_bytes_max=limits.GATEWAY_BODY_BYTES)
    large = json.dumps({"model": MODEL, "messages": ["x" * (limits.GATEWAY_BODY_BYTES - 100_000)]}).encode()
    async with stub_engine.running(engine), gateway_head.running(tmp_path, settings) as head, client() as http:
        head.add_replica(engine.port)
        first = asyncio.ensure_future(http.post(head.url + CHAT, data=io.BytesIO(large), headers=head.headers()))
        await until(lambda: len(engine.requests) == 1)
        async with http.post(head.url + CHAT, data=b"x" * 200_000, headers=head.headers()) as refused:
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) >= 1
            assert (await refused.json())["error"]["code"] == "gateway_full"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await is_clean(head)
        engine.fault = ""
        async with http.post(head.url + CHAT, data=io.BytesIO(large), headers=head.headers()) as answer:
            assert answer.status == 200


async def test_a_body_is_let_go_when_the_engine_begins(tmp_path: Path) -> None:
    """A long stream does not hold its prompt."""
    engine = stub_engine.StubEngine(gate=asyncio.Semaphore(1))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        head.add_replica(engine.port)
        async with http.post(head.url + CHAT, data=STREAM, headers=head.headers()) as answer:
            await answer.content.readexactly(len(engine.events[0]))
            registry = head.context.metrics.registry
            assert registry.get_sample_value("herder_gateway_bodies_bytes") == 0
            assert registry.get_sample_value("herder_gateway_in_flight") == 1


async def test_a_slow_body_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However steadily it drips; one that keeps its pace is taken, though it takes longer than the beginning may."""
    monkeypatch.setattr(limits, "GATEWAY_BODY_GRACE_S", 0.4)
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        padded = PLAIN + b" " * 200_000
        for piece, status in ((b" ", 504), (b" " * 20_000, 200)):
            reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
            writer.write(request(head, PLAIN, f"Content-Length: {len(padded)}"))
            reading = asyncio.ensure_future(read_answer(reader))
            left = len(padded) - len(PLAIN)
            while not reading.done():
                if left:
                    writer.write(piece)
                    left -= len(piece)
                await asyncio.wait([reading], timeout=0.1)
            assert reading.result()[0] == status
            writer.transport.abort()
        await is_clean(head)


# engines
async def test_an_engine_that_dies_within_a_chunk(tmp_path: Path) -> None:
    """Half a chunk of a stream ends in an error event, half a JSON answer is a clean 502."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await reader.read(65_536)
        kind = b"text/event-stream" if b"stream" in body else b"application/json"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind)
        if kind != b"application/json":
            writer.write(b"e\r\ndata: whole\n\n\n\r\n")
        writer.write(b"ff\r\ndata: half")
        await writer.drain()

    async with engine_that(serve) as port, gateway_head.running(tmp_path) as head, client() as http:
        head.add_replica(port)
        async with http.post(head.url + CHAT, data=STREAM, headers=head.headers()) as answer:
            events = (await answer.read()).split(b"\n\n")
        assert events[0] == b"data: whole"
        assert b"half" not in b"".join(events)
        assert json.loads(events[-2].strip().removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
        async with http.post(head.url + CHAT, data=PLAIN, headers=head.headers()) as answer:
            assert answer.status == 502
            assert (await answer.json())["error"]["code"] == "upstream_failed"
        await is_clean(head)


@pytest.mark.parametrize("kind", ["drip", "flood", "many", "interim"])
async def test_an_engine_whose_headers_never_end(tmp_path: Path, kind: str) -> None:
    """Slowly, in one long line, in too many lines, or as interim answers: the client is told in time."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if kind == "interim":
            while True:
                writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        number = 0
        while True:
            number += 1
            writer.write({"drip": b"X: y\r\n", "flood": b"x" * 65_536, "many": b"X%d: y\r\n" % number}[kind])
            await writer.drain()
            if kind == "drip":
                await asyncio.sleep(0.02)

    async with engine_that(serve) as port, gateway_head.running(tmp_path, IMPATIENT) as head, client() as http:
        head.add_replica(port)
        async with http.post(head.url + CHAT, data=PLAIN, headers=head.headers()) as answer:
            code = (await answer.json())["error"]["code"]
        assert (answer.status, code) in ((502, "upstream_failed"), (504, "timed_out"))
        await is_clean(head)


async def test_what_an_engine_says_twice_is_not_passed_on(tmp_path: Path) -> None:
    """A second answer behind the first, and an answer with two lengths, reach nobody."""
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
        b"HTTP/1.1 200 OK\r\nX: a\nY: b\r\nContent-Length: 2\r\n\r\n{}",
    ]

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[0])
        await writer.drain()
        await asyncio.Event().wait()

    async with engine_that(serve) as port, gateway_head.running(tmp_path) as head, client() as http:
        head.add_replica(port)
        while answers:
            async with http.post(head.url + CHAT, data=PLAIN, headers=head.headers()) as answer:
                told = await answer.read()
            assert answer.status == 502, told
            assert b"other" not in told
            del answers[0]
        await is_clean(head)


async def test_clients_that_leave_at_any_moment_leave_nothing(tmp_path: Path) -> None:
    """No task, no connection to the engine and no count outlives them."""
    engine = stub_engine.StubEngine(events=[b"data: x\n\n"] * 20_000)
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        assert b" 200 " in await exchange(head, request(head, PLAIN, "Connection: close"))
        await until(lambda: not engine.tasks)  # idle connections are kept for a moment
        await is_clean(head)
        before = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
        data = request(head, STREAM)
        for number in range(150):
            reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
            writer.write(data[: len(data) * (number % 10 + 1) // 10])
            if number % 10 == 9:
                await reader.read(1 + 200 * (number % 7))
            if number % 2:
                writer.transport.abort()
            else:
                writer.close()
        await is_clean(head)
        await until(lambda: not engine.tasks)
        left = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]
        assert set(left) <= before, left
