"""Who may use the gateway, which replica answers, and how refusals look, over real sockets."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import generate_latest

from common import limits
from head.config import GatewayConfig
from head.core.events import ModelsUsed, ReplicaProbed
from tests.doubles import gateway_head, stub_engine
from tests.doubles.gateway_head import ENGINE_KEY, MODEL, GatewayHead, client, until
from tests.doubles.stub_engine import StubEngine

CHAT = "/v1/chat/completions"
PLAIN = {"model": MODEL, "messages": []}
STREAM = {"model": MODEL, "stream": True, "messages": []}


class Answer:
    """What came back."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def error(self) -> dict[str, Any]:
        """The error, which must have OpenAI's form exactly."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "code", "param"}
        return error


async def ask(
    head: GatewayHead,
    body: object = PLAIN,
    *,
    path: str = CHAT,
    method: str = "POST",
    role: str = "inference",
    headers: dict[str, str] | None = None,
    data: bytes | None = None,
) -> Answer:
    """One request to its end."""
    sent = {**(head.headers(role) if role else {}), **(headers or {})}
    payload: dict[str, Any] = (
        {"data": io.BytesIO(data)} if data is not None else {"json": body} if method == "POST" else {}
    )
    async with client() as http, http.request(method, head.url + path, headers=sent, **payload) as answer:
        return Answer(answer.status, answer.headers, await answer.read())


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class TestDoor:
    async def test_without_a_token_nothing_opens(self, tmp_path: Path) -> None:
        """Every path below /v1 wants a token, also those that do not exist."""
        async with gateway_head.running(tmp_path) as head:
            for method, path in [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/x/y"), ("GET", "/v1/no")]:
                answer = await ask(head, method=method, path=path, role="")
                assert answer.status == 401
                assert answer.error["code"] == "unauthenticated"
                assert "WWW-Authenticate" in answer.headers

    @pytest.mark.parametrize(
        ("role", "status"),
        [("inference", 200), ("operator", 200), ("admin", 200), ("viewer", 403), ("agent", 403)],
    )
    async def test_roles(self, tmp_path: Path, role: str, status: int) -> None:
        """Inference, operator and admin may ask; viewer and agent may not."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            assert (await ask(head, role=role)).status == status
            assert len(engine.requests) == (1 if status == 200 else 0)

    async def test_too_many_at_once_are_refused(self, tmp_path: Path) -> None:
        """Over the limit of requests on their way the answer is 429 with Retry-After."""
        engine = StubEngine(fault="hang")
        async with (
            stub_engine.running(engine),
            gateway_head.running(tmp_path, GatewayConfig(in_flight_max=1)) as head,
            client() as http,
        ):
            head.add_replica(engine.port)
            first = asyncio.ensure_future(http.post(head.url + CHAT, json=PLAIN, headers=head.headers()))
            await until(lambda: len(engine.requests) == 1)
            answer = await ask(head)
            assert answer.status == 429
            assert answer.error["type"] == "rate_limit_error"
            assert int(answer.headers["Retry-After"]) >= 1
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)


class TestHeaders:
    async def test_engine_gets_its_own_key_and_no_secret_of_the_client(self, tmp_path: Path) -> None:
        """The client's token, cookies and hop-by-hop headers stay here; the engine's key and the request id go out."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            secrets = {
                "Cookie": "session=cookie-secret",
                "Proxy-Authorization": "Basic proxy-secret",
                "X-Api-Key": "header-secret",
                "Accept-Encoding": "gzip",
                "TE": "trailers",
                "Traceparent": "00-abc-def-01",
            }
            answer = await ask(head, headers=secrets)
            (request,) = engine.requests
            assert request.headers["authorization"] == f"Bearer {ENGINE_KEY}"
            assert request.headers["host"] == f"127.0.0.1:{engine.port}"
            assert request.headers["traceparent"] == "00-abc-def-01"
            assert request.headers["x-request-id"] == answer.headers["X-Request-Id"]
            text = repr(request)
            assert head.tokens["inference"] not in text
            assert "secret" not in text
            assert not {"te", "accept-encoding", "connection"} & set(request.headers)

    @pytest.mark.parametrize("body", [PLAIN, STREAM])
    async def test_client_sees_no_key_and_no_inner_headers(self, tmp_path: Path, body: dict[str, object]) -> None:
        """Of the engine's headers only harmless ones come back."""
        engine = StubEngine(
            extra_headers=f"Server: inner\r\nSet-Cookie: a=b\r\nX-Key: {ENGINE_KEY}\r\nKeep-Alive: timeout=5\r\n"
            "Openai-Processing-Ms: 7\r\n"
        )
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            answer = await ask(head, body)
            assert answer.headers["Openai-Processing-Ms"] == "7"
            assert not {"Server", "Set-Cookie", "X-Key", "Keep-Alive"} & set(answer.headers)
            assert ENGINE_KEY not in repr(answer.headers)

    async def test_key_in_a_refusal_is_blotted_out(self, tmp_path: Path) -> None:
        """An engine that repeats its key in an error does not give it away."""
        engine = StubEngine(status=400, answer=b'{"error":{"message":"no %b"}}' % ENGINE_KEY.encode())
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            answer = await ask(head)
            assert answer.status == 400
            assert json.loads(answer.body) == {"error": {"message": "no ***"}}


class TestBodies:
    @pytest.mark.parametrize(
        ("data", "status", "code"),
        [
            (b"{", 400, "invalid_request"),
            (b"", 400, "invalid_request"),
            (b'{"messages":[]}', 400, "invalid_request"),
            (b'{"model":7}', 400, "invalid_request"),
            (b'["model"]', 400, "invalid_request"),
            (b'{"model":"../etc/passwd"}', 404, "model_not_found"),
        ],
    )
    async def test_unusable_bodies(self, tmp_path: Path, data: bytes, status: int, code: str) -> None:
        """What is not a request for a model is refused with its own code."""
        async with gateway_head.running(tmp_path) as head:
            answer = await ask(head, data=data)
            assert (answer.status, answer.error["code"]) == (status, code)

    async def test_large_announcement_is_refused_before_it_is_read(self, tmp_path: Path) -> None:
        """A gigabyte that is announced costs nothing."""
        async with gateway_head.running(tmp_path) as head:
            reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
            token = head.tokens["inference"]
            writer.write(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Length: {2**30}\r\n\r\n".encode()
            )
            assert b" 413 " in await reader.readline()
            writer.close()

    async def test_large_body_without_announcement_is_cut_off(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Chunks that never end are refused once they pass the limit."""
        monkeypatch.setattr(limits, "GATEWAY_BODY_BYTES", 100_000)

        async def endless() -> Any:
            while True:
                yield b"x" * 10_000

        async with gateway_head.running(tmp_path) as head, client() as http:
            try:
                async with http.post(head.url + CHAT, data=endless(), headers=head.headers()) as answer:
                    assert answer.status == 413
            except aiohttp.ClientConnectionError:
                pass  # the connection was ended while we still sent, which is the same refusal

    async def test_large_prompt_passes(self, tmp_path: Path) -> None:
        """Megabytes of prompt arrive unchanged."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            data = json.dumps({"model": MODEL, "prompt": "x" * 8_000_000}).encode()
            assert (await ask(head, data=data)).status == 200
            assert engine.requests[0].body == data

    async def test_compressed_body_is_refused(self, tmp_path: Path) -> None:
        """A body that would have to be unpacked is 415."""
        async with gateway_head.running(tmp_path) as head:
            answer = await ask(head, data=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
            assert answer.status == 415

    async def test_expectation_is_answered(self, tmp_path: Path) -> None:
        """A client that waits for 100-continue is told to go on."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head, client() as http:
            head.add_replica(engine.port)
            async with http.post(head.url + CHAT, json=PLAIN, headers=head.headers(), expect100=True) as answer:
                assert answer.status == 200


class TestNames:
    async def test_unknown_model_names_near_ones(self, tmp_path: Path) -> None:
        """A misspelt name is a 404 that says what was probably meant."""
        async with gateway_head.running(tmp_path) as head:
            head.add_model()
            answer = await ask(head, {"model": "acme/tiny-cat"})
            assert answer.status == 404
            assert answer.error["code"] == "model_not_found"
            assert answer.error["param"] == "model"
            assert MODEL in answer.error["message"]

    async def test_known_model_without_an_engine_says_why(self, tmp_path: Path) -> None:
        """A model that nothing serves is a 503 with Retry-After and what to do."""
        async with gateway_head.running(tmp_path) as head:
            head.add_model()
            answer = await ask(head)
            assert answer.status == 503
            assert answer.error["code"] == "no_replica_ready"
            assert "no service runs it" in answer.error["message"]
            assert int(answer.headers["Retry-After"]) > 0

    async def test_starting_engine_is_named(self, tmp_path: Path) -> None:
        """While a replica starts the refusal says so and asks to come back soon."""
        async with gateway_head.running(tmp_path) as head:
            head.add_replica(1, state="starting")
            answer = await ask(head)
            assert answer.status == 503
            assert "service chat is starting" in answer.error["message"]
            assert int(answer.headers["Retry-After"]) <= 5

    async def test_service_name_is_an_alias(self, tmp_path: Path) -> None:
        """Asked by the service's name, the engine hears its own model name and every other byte unchanged."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            answer = await ask(head, data=b'{"x":{"model":"chat"},"model":"chat","temperature":0.70}')
            assert answer.status == 200
            sent = engine.requests[0].body
            assert sent == b'{"x":{"model":"chat"},"model":"%b","temperature":0.70}' % MODEL.encode()

    async def test_models_lists_what_answers(self, tmp_path: Path) -> None:
        """Only models with a ready engine are listed; one can be looked up by name, with its '/', or by alias."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            head.add_model("acme/idle")
            head.add_replica(engine.port)
            listing = json.loads((await ask(head, method="GET", path="/v1/models")).body)
            assert listing["object"] == "list"
            assert [model["id"] for model in listing["data"]] == [MODEL]
            for path in (f"/v1/models/{MODEL}", f"/v1/models/{MODEL.replace('/', '%2F')}"):
                assert json.loads((await ask(head, method="GET", path=path)).body)["id"] == MODEL
            assert (await ask(head, method="GET", path="/v1/models/chat")).status == 200
            assert (await ask(head, method="GET", path="/v1/models/acme/idle")).status == 503
            assert (await ask(head, method="GET", path="/v1/models/acme/none")).status == 404

    async def test_other_paths_and_methods(self, tmp_path: Path) -> None:
        """Whatever else is below /v1 is refused in OpenAI's form."""
        async with gateway_head.running(tmp_path) as head:
            assert (await ask(head, path="/v1/images/generations")).error["code"] == "not_found"
            answer = await ask(head, method="GET", path=CHAT)
            assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")


class TestRefusals:
    @pytest.mark.parametrize("status", [500, 503, 401, 403, 307])
    async def test_engine_trouble_is_a_502_without_its_text(self, tmp_path: Path, status: int) -> None:
        """An engine's own failure, or its refusal of our key, is not the client's to read."""
        engine = StubEngine(status=status, answer=b'{"detail":"Traceback: secret path"}')
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            answer = await ask(head)
            assert (answer.status, answer.error["code"]) == (502, "upstream_failed")
            assert b"Traceback" not in answer.body

    async def test_engine_refusal_passes_in_openai_form(self, tmp_path: Path) -> None:
        """A 400 that has the form already keeps its bytes."""
        said = b'{"error": {"message":"too long","type":"x","code":1,"param":null} }'
        async with (
            stub_engine.running(StubEngine(status=400, answer=said)) as engine,
            gateway_head.running(tmp_path) as head,
        ):
            head.add_replica(engine.port)
            answer = await ask(head)
            assert (answer.status, answer.body) == (400, said)

    @pytest.mark.parametrize(
        ("said", "kind", "text"),
        [(b'{"detail":"bad field"}', "application/json", "bad field"), (b"<h1>no</h1>", "text/html", "answered 422")],
    )
    async def test_other_refusals_are_put_in_form(self, tmp_path: Path, said: bytes, kind: str, text: str) -> None:
        """A 422 of a web framework becomes an error that OpenAI clients understand."""
        engine = StubEngine(status=422, answer=said, answer_type=kind)
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            answer = await ask(head)
            assert answer.status == 422
            assert text in answer.error["message"]


class TestReplicas:
    async def test_least_busy_replica_is_taken(self, tmp_path: Path) -> None:
        """While one engine is busy, the other gets all requests."""
        busy, free = StubEngine(fault="hang"), StubEngine()
        async with (
            stub_engine.running(busy),
            stub_engine.running(free),
            gateway_head.running(tmp_path) as head,
            client() as http,
        ):
            head.add_replica(busy.port, slot=0)
            first = asyncio.ensure_future(http.post(head.url + CHAT, json=PLAIN, headers=head.headers()))
            await until(lambda: len(busy.requests) == 1)
            head.add_replica(free.port, slot=1)
            for _ in range(5):
                assert (await ask(head)).status == 200
            assert (len(busy.requests), len(free.requests)) == (1, 5)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    async def test_dead_replica_is_passed_over_and_comes_back(self, tmp_path: Path) -> None:
        """A refused connection costs the client nothing, counts the replica out, and in again when it listens."""
        port = closed_port()
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            dead = head.add_replica(port, slot=0)
            head.add_replica(engine.port, slot=1)
            for _ in range(4):
                assert (await ask(head)).status == 200
            probes = [(event.replica, event.is_healthy) for event in head.posted(ReplicaProbed)]
            assert probes == [(dead, False)]
            assert dead in head.state.unwell
            async with stub_engine.running(port=port):
                await until(lambda: dead not in head.state.unwell)
            last = head.posted(ReplicaProbed)[-1]
            assert (last.replica, last.is_healthy) == (dead, True)

    async def test_all_replicas_dead_is_a_502(self, tmp_path: Path) -> None:
        """When nothing accepts the connection the client hears so."""
        async with gateway_head.running(tmp_path) as head:
            head.add_replica(closed_port(), slot=0)
            head.add_replica(closed_port(), slot=1)
            answer = await ask(head)
            assert answer.status == 502
            assert "2 replicas" in answer.error["message"]

    @pytest.mark.parametrize("host", ["127.0.0.1.", "no such host", "x" * 300, "[::1"])
    async def test_unusable_address_is_a_502(self, tmp_path: Path, host: str) -> None:
        """An address that an agent made up breaks nothing."""
        async with gateway_head.running(tmp_path) as head:
            head.add_replica(closed_port(), host=host)
            assert (await ask(head)).status == 502

    async def test_suspect_node_is_asked_first(self, tmp_path: Path) -> None:
        """A replica whose node has no session gets a request only after it answered a probe."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            replica = head.add_replica(engine.port)
            head.state.live["n0"].session_id = ""
            assert (await ask(head)).status == 200
            assert [seen.path for seen in engine.seen] == ["/health", CHAT]
            assert [(e.replica, e.is_healthy) for e in head.posted(ReplicaProbed)] == [(replica, True)]

    async def test_suspect_node_that_does_not_answer_gets_nothing(self, tmp_path: Path) -> None:
        """A replica that fails its probe is not given the request, and the core is told."""
        engine = StubEngine(is_healthy=False)
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            replica = head.add_replica(engine.port)
            head.state.live["n0"].session_id = ""
            assert (await ask(head)).status == 502
            assert engine.requests == []
            probed = head.posted(ReplicaProbed)[0]
            assert (probed.replica, probed.is_healthy) == (replica, False)

    async def test_good_node_goes_before_a_suspect_one(self, tmp_path: Path) -> None:
        """While another replica is in good standing the suspect one is left alone."""
        async with (
            stub_engine.running() as suspect,
            stub_engine.running() as good,
            gateway_head.running(tmp_path) as head,
        ):
            head.add_replica(suspect.port, slot=0)
            head.add_replica(good.port, slot=1)
            head.state.live["n0"].session_id = ""
            for _ in range(4):
                assert (await ask(head)).status == 200
            assert (len(suspect.seen), len(good.requests)) == (0, 4)

    async def test_broken_answer_makes_the_engine_be_asked(self, tmp_path: Path) -> None:
        """After an engine broke off, a probe finds out whether it still is there."""
        engine = StubEngine(fault="die")
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            assert (await ask(head)).status == 502
            await until(lambda: [event.is_healthy for event in head.posted(ReplicaProbed)] == [True])


class TestAccount:
    async def test_uses_are_told_together(self, tmp_path: Path) -> None:
        """Many requests make one event, with their number."""
        async with stub_engine.running() as engine, gateway_head.running(tmp_path) as head:
            replica = head.add_replica(engine.port)
            for _ in range(5):
                await ask(head)
            await until(lambda: bool(head.posted(ModelsUsed)))
            assert head.posted(ModelsUsed) == [ModelsUsed({replica: 5})]

    async def test_metrics_count_requests_tokens_and_first_tokens(self, tmp_path: Path) -> None:
        """Requests by service, path and code; tokens from the usage of answers and streams; time to first token."""
        usage = b'data: {"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
        engine = StubEngine(events=[b'data: {"content":"\\"prompt_tokens\\": 99"}\n\n', usage, b"data: [DONE]\n\n"])
        async with stub_engine.running(engine), gateway_head.running(tmp_path) as head:
            head.add_replica(engine.port)
            await ask(head)
            await ask(head, STREAM)
            await ask(head, {"model": "nobody/knows"})
            text = generate_latest(head.context.metrics.registry).decode()
        wanted = [
            'herder_gateway_requests_total{code="ok",path="/v1/chat/completions",service="chat"} 2.0',
            'herder_gateway_requests_total{code="model_not_found",path="/v1/chat/completions",service=""} 1.0',
            'herder_gateway_tokens_total{kind="prompt",service="chat"} 10.0',
            'herder_gateway_tokens_total{kind="completion",service="chat"} 9.0',
            'herder_gateway_time_to_first_token_seconds_count{service="chat"} 1.0',
            "herder_gateway_in_flight 0.0",
        ]
        assert [line for line in wanted if line not in text] == []
        assert "nobody" not in text
