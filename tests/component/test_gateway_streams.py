"""Answers on their way through the gateway, over real sockets: unbuffered, whole, and ended well when engines fail."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from pathlib import Path

import pytest

from head.config import GatewayConfig
from head.gateway import proxy
from tests.doubles import gateway_head, stub_engine
from tests.doubles.gateway_head import MODEL, GatewayHead, client, until
from tests.doubles.stub_engine import StubEngine

CHAT = "/v1/chat/completions"
STREAM = {"model": MODEL, "stream": True, "messages": []}
PLAIN = {"model": MODEL, "messages": []}


async def post(head: GatewayHead, body: object, path: str = CHAT) -> tuple[int, bytes, dict[str, str]]:
    """One request to its end."""
    async with client() as http, http.post(head.url + path, json=body, headers=head.headers()) as answer:
        return answer.status, await answer.read(), dict(answer.headers)


def events_of(body: bytes) -> list[bytes]:
    """The events of a whole stream."""
    assert body.endswith(b"\n\n")
    return [event + b"\n\n" for event in body.split(b"\n\n")[:-1]]


def error_of(event: bytes) -> dict[str, str]:
    """The error in a stream's last event."""
    error: dict[str, str] = json.loads(event.removeprefix(b"data: "))["error"]
    return error


async def test_first_event_arrives_before_the_second_is_made(tmp_path: Path) -> None:
    """Each event reaches the client while the engine still waits to make the next."""
    engine = StubEngine(gate=asyncio.Semaphore(0))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        assert engine.gate is not None
        head.add_replica(engine.port)
        engine.gate.release()
        async with http.post(head.url + CHAT, json=STREAM, headers=head.headers()) as answer:
            assert answer.content_type == "text/event-stream"
            for event in engine.events:
                assert await answer.content.readexactly(len(event)) == event
                engine.gate.release()
            assert await answer.content.read() == b""


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_stream_arrives_byte_for_byte(tmp_path: Path, is_chunked: bool) -> None:
    """What the engine streams is what the client gets, however its length is said."""
    engine = StubEngine(events=[b"data: %d\n\n" % number * 7 for number in range(500)], is_chunked=is_chunked)
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        status, body, _ = await post(head, STREAM)
        assert status == 200
        assert body == b"".join(engine.events)


async def test_event_in_pieces_is_put_together(tmp_path: Path) -> None:
    """Events that the engine flushes in parts reach the client whole and unchanged; a last one may lack its end."""
    whole = b"data: one\r\n\r\ndata: two\n\ndata: three"
    engine = StubEngine(events=[whole[at : at + 3] for at in range(0, len(whole), 3)])
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        assert (await post(head, STREAM))[1] == whole


async def test_answer_passes_unchanged(tmp_path: Path) -> None:
    """A JSON answer and the request that it answers keep their bytes."""
    engine = StubEngine(answer=b'{ "choices" : [] , "usage":{} }')
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        head.add_replica(engine.port)
        sent = b'{"messages": [ {"content":"\\u00e9"} ],  "model":"%b" , "x":1.0}' % MODEL.encode()
        async with http.post(head.url + CHAT, data=sent, headers=head.headers()) as answer:
            assert await answer.read() == engine.answer
        assert engine.requests[0].body == sent


async def test_long_answer_passes_as_it_comes(tmp_path: Path) -> None:
    """An answer beyond what is kept for a clean error is passed on, whole."""
    engine = StubEngine(answer=b'{"data":"' + b"x" * 5_000_000 + b'"}')
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        status, body, _ = await post(head, PLAIN, "/v1/embeddings")
        assert status == 200
        assert body == engine.answer


async def test_client_that_leaves_ends_the_engines_work(tmp_path: Path) -> None:
    """The engine's connection ends when the client's does, in the middle of a stream."""
    engine = StubEngine(gate=asyncio.Semaphore(1))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        head.add_replica(engine.port)
        async with http.post(head.url + CHAT, json=STREAM, headers=head.headers()) as answer:
            await answer.content.readexactly(len(engine.events[0]))
            answer.close()
        await until(lambda: engine.gone > 0)
        assert engine.sent_bytes < sum(map(len, engine.events))


async def test_client_that_leaves_before_the_first_byte_is_noticed(tmp_path: Path) -> None:
    """An engine that still reads the prompt is stopped too."""
    engine = StubEngine(fault="hang")
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        head.add_replica(engine.port)
        asking = asyncio.ensure_future(http.post(head.url + CHAT, json=STREAM, headers=head.headers()))
        await until(lambda: len(engine.requests) == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: engine.gone > 0)
        assert (engine.gone, engine.sent_bytes) == (1, 0)


@pytest.mark.parametrize("fault", ["die", "die_after_head", "garbage"])
@pytest.mark.parametrize("body", [PLAIN, STREAM])
async def test_engine_that_dies_before_its_first_byte_is_a_502(
    tmp_path: Path, fault: str, body: dict[str, object]
) -> None:
    """Nothing was sent, so the client gets a clean refusal in OpenAI's form, which it may retry."""
    engine = StubEngine(fault=fault)
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        status, answer, headers = await post(head, body)
        assert status == 502
        assert headers["Content-Type"].startswith("application/json")
        error = json.loads(answer)["error"]
        assert error["code"] == "upstream_failed"
        assert error["type"] == "server_error"
        assert set(error) == {"message", "type", "code", "param"}


@pytest.mark.parametrize("fault", ["die_in_stream", "die_in_event", "garbage_chunk"])
async def test_engine_that_dies_in_a_stream_leaves_an_error_event(tmp_path: Path, fault: str) -> None:
    """The stream ends well-formed: whole events, then one that carries the error."""
    engine = StubEngine(fault=fault, fault_after=2, gate=asyncio.Semaphore(0))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head, client() as http:
        assert engine.gate is not None
        head.add_replica(engine.port)
        engine.gate.release()
        async with http.post(head.url + CHAT, json=STREAM, headers=head.headers()) as answer:
            assert answer.status == 200
            first = await answer.content.readexactly(len(engine.events[0]))
            engine.gate.release()
            engine.gate.release()
            events = events_of(first + await answer.read())
        whole = 1 if fault == "garbage_chunk" and len(events) == 2 else 2  # a piece with garbage is not passed on
        assert events[:-1] == list(engine.events[:whole])
        assert error_of(events[-1])["code"] == "upstream_failed"


async def test_engine_that_falls_silent_in_a_stream_is_given_up(tmp_path: Path) -> None:
    """After the idle timeout the stream ends with an error event, and the engine is let go."""
    engine = StubEngine(fault="hang_stream", fault_after=1)
    quick = GatewayConfig(idle_timeout_s=0.2)
    async with stub_engine.running(engine), gateway_head.running(tmp_path, quick) as head:
        head.add_replica(engine.port)
        _, body, _ = await post(head, STREAM)
        events = events_of(body)
        assert events[0] == engine.events[0]
        assert error_of(events[1])["code"] == "timed_out"
        await until(lambda: engine.gone == 1)


async def test_engine_that_never_begins_is_given_up(tmp_path: Path) -> None:
    """After the first-byte timeout the answer is a 504 and the engine is let go."""
    engine = StubEngine(fault="hang")
    quick = GatewayConfig(first_byte_timeout_s=0.2)
    async with stub_engine.running(engine), gateway_head.running(tmp_path, quick) as head:
        head.add_replica(engine.port)
        status, body, _ = await post(head, PLAIN)
        assert status == 504
        assert json.loads(body)["error"]["code"] == "timed_out"
        await until(lambda: engine.gone == 1)


async def test_slow_reader_holds_the_engine_back(tmp_path: Path) -> None:
    """A client that does not read stops the engine's sending; when it reads again it misses nothing."""
    total = 64
    engine = StubEngine(events=[b"data: %b\n\n" % (bytes([65 + number % 26]) * 1_000_000) for number in range(total)])
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        reader, writer = await _ask_raw(head)
        await until(lambda: engine.sent_bytes > 0)
        await _until_still(lambda: engine.sent_bytes)
        assert engine.sent_bytes < 32_000_000
        received = await reader.read()
        writer.close()
        assert received.endswith(b"0\r\n\r\n")
        assert received.count(b"data: ") == total
        assert len(received) > total * 1_000_000


async def test_reader_that_stays_away_is_cut_off(tmp_path: Path) -> None:
    """A client that takes nothing for the idle timeout loses its connection and its engine."""
    engine = StubEngine(events=[b"data: %b\n\n" % (b"x" * 1_000_000)] * 64)
    quick = GatewayConfig(idle_timeout_s=0.3)
    async with stub_engine.running(engine), gateway_head.running(tmp_path, quick) as head:
        head.add_replica(engine.port)
        _, writer = await _ask_raw(head)
        await until(lambda: engine.gone == 1)
        assert engine.sent_bytes < 64_000_000
        writer.close()


async def test_old_client_gets_an_unframed_stream(tmp_path: Path) -> None:
    """An HTTP/1.0 client, which knows no chunks, gets plain bytes until the end of the connection."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        reader, writer = await _ask_raw(head, version="1.0")
        received = await reader.read()
        writer.close()
        assert received.partition(b"\r\n\r\n")[2] == b"".join(engine.events)


async def test_connection_closed_while_idle_is_not_the_clients_problem(tmp_path: Path) -> None:
    """A kept connection that the engine ends as it is used again is replaced without a word."""
    engine = StubEngine(fault="die_when_reused")
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        for _ in range(3):
            assert (await post(head, PLAIN))[0] == 200
        assert len(engine.requests) == 3
        assert engine.connections == 3


async def test_connections_are_used_again(tmp_path: Path) -> None:
    """Requests after each other share a connection to the engine, streams included."""
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        for body in (PLAIN, STREAM, PLAIN):
            assert (await post(head, body))[0] == 200
        assert engine.connections == 1


async def test_connection_that_was_held_back_is_read_again(tmp_path: Path) -> None:
    """An answer whose last piece paused the engine's connection does not leave the next request unread."""
    engine = StubEngine(answer=b'{"data":"%b"}' % (b"x" * proxy.JSON_BYTES))
    async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        for _ in range(4):
            assert (await post(head, PLAIN))[1] == engine.answer
        assert engine.connections == 1


async def test_silent_engine_is_not_asked_twice(tmp_path: Path) -> None:
    """A request that timed out on a used connection is given up, not sent again."""
    engine = StubEngine()
    quick = GatewayConfig(first_byte_timeout_s=0.2)
    async with stub_engine.running(engine), gateway_head.running(tmp_path, quick) as head:
        head.add_replica(engine.port)
        assert (await post(head, PLAIN))[0] == 200
        engine.fault = "hang"
        assert (await post(head, PLAIN))[0] == 504
        assert len(engine.requests) == 2


@pytest.mark.parametrize("events", [[], [b": ping\n\n"]])
async def test_stream_without_events_ends(tmp_path: Path, events: list[bytes]) -> None:
    """A stream that says nothing is passed on as it is."""
    async with stub_engine.running(StubEngine(events=events)) as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        status, body, _ = await post(head, STREAM)
        assert (status, body) == (200, b"".join(events))


async def test_bug_is_an_error_in_openai_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody expected is a 500 that tells nothing of itself."""
    monkeypatch.setattr(proxy, "request_head", lambda *_: 1 / 0)
    async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
        head.add_replica(engine.port)
        status, body, _ = await post(head, PLAIN)
        assert status == 500
        assert set(json.loads(body)["error"]) == {"message", "type", "code", "param"}
        assert b"division" not in body


@pytest.fixture
def server_tls(tmp_path: Path) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate of its own making."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-days", "1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


async def test_streams_pass_through_tls(tmp_path: Path, server_tls: ssl.SSLContext) -> None:
    """Behind TLS too, events arrive one by one and a client that leaves is noticed."""
    engine = StubEngine(gate=asyncio.Semaphore(1))
    async with stub_engine.running(engine), gateway_head.running(tmp_path, tls=server_tls) as head, client() as http:
        assert engine.gate is not None
        head.add_replica(engine.port)
        url = head.url.replace("http:", "https:") + CHAT
        async with http.post(url, json=STREAM, headers=head.headers(), ssl=False) as answer:
            assert await answer.content.readexactly(len(engine.events[0])) == engine.events[0]
            engine.gate.release()
            assert await answer.content.readexactly(len(engine.events[1])) == engine.events[1]
            answer.close()
        await until(lambda: engine.gone == 1)


async def _ask_raw(head: GatewayHead, version: str = "1.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a streaming request by hand and reads nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", head.port, limit=2**16)
    body = json.dumps(STREAM).encode()
    token = head.tokens["inference"]
    writer.write(
        f"POST {CHAT} HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    return reader, writer


async def _until_still(value: object) -> None:
    """Waits until a number has stopped growing."""
    assert callable(value)
    async with asyncio.timeout(20):
        seen = -1
        while seen != value():
            seen = value()
            await asyncio.sleep(0.3)
