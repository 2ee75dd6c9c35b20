"""Bad input at the API's door: every kind is refused with its own code, in our form, and costs little."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from common import limits
from head.config import DoorConfig
from head.core import events as ev
from head.core.state import State
from head.core.turn import Turn
from tests.doubles.api_head import Answer, ApiHead, api_head, node, run, scripted_step


def in_our_form(answer: Answer) -> dict[str, Any]:
    """The error of an answer, which must have our form and no traceback."""
    assert answer.headers["Content-Type"].startswith("application/json"), answer.body[:200]
    assert answer.headers["X-Request-Id"].startswith("req-")
    assert set(answer.json) == {"error"}
    error: dict[str, Any] = answer.json["error"]
    assert set(error) == {"code", "message", "hint", "details"}
    assert b"Traceback" not in answer.body
    assert b'File \\"' not in answer.body
    return error


BAD_BODIES = [
    ("/models", b"{", 400, "invalid_request"),
    ("/models", b"", 400, "invalid_request"),
    ("/models", b"\xff\xfe", 400, "invalid_request"),
    ("/models", b'{"metadata":{"a":' + b"[" * 100_000, 400, "invalid_request"),
    ("/models", b"[]", 422, "invalid_value"),
    ("/models", b"{}", 422, "invalid_value"),
    ("/models", b'{"name":5}', 422, "invalid_value"),
    ("/models", b'{"name":"m","type":"poem"}', 422, "invalid_value"),
    ("/models", b'{"name":"m","sorces":[]}', 422, "invalid_value"),
    ("/models", b'{"name":"../../etc/passwd"}', 422, "invalid_name"),
    ("/models", b'{"name":"a/b/c"}', 422, "invalid_name"),
    ("/models", b'{"name":"m","source_url":"gopher://x"}', 422, "invalid_source"),
    ("/models", b'{"name":"m","metadata":{"a":"' + b"x" * 70_000 + b'"}}', 422, "invalid_value"),
    ("/services", b'{"name":"s","model":"m","replicas":257}', 422, "invalid_value"),
    ("/services", b'{"name":"s","model":"m","replicas":-1}', 422, "invalid_value"),
    ("/services", b'{"name":"s","model":"m","port":65536}', 422, "invalid_value"),
    ("/services", b'{"name":"s","model":"m","replicas":1.5}', 422, "invalid_value"),
    ("/keys", b'{"role":"root","name":"x"}', 422, "invalid_value"),
    ("/jobs", b'{"name":"j","actions":[]}', 422, "invalid_value"),
    ("/jobs", b'{"name":"j","actions":[{"action":"explode"}]}', 422, "invalid_value"),
    ("/health_check", b'{"timeout_s":0}', 422, "invalid_value"),
    ("/health_check", b"{}", 422, "invalid_value"),
]


def test_wrong_bodies_have_their_own_codes(tmp_path: Path) -> None:
    """Malformed is 400, what the types refuse is 422, and nothing of it reaches the core."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            revision = head.state.revision
            for path, raw, status, code in BAD_BODIES:
                answer = await head.call("POST", path, raw=raw, headers={"Content-Type": "application/json"})
                error = in_our_form(answer)
                assert (answer.status, error["code"]) == (status, code), (path, raw[:80], answer.body)
            assert head.state.revision == revision

    run(body)


def test_a_wrong_value_is_named_by_its_place(tmp_path: Path) -> None:
    """422 says where the value stands, and the nearest field for a misspelt one."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            job = {"name": "j", "actions": [{"action": "serve", "port": "http"}]}
            wrong_type = in_our_form(await head.call("POST", "/jobs", job))
            assert wrong_type["details"]["path"] == "$.actions[0].port"
            misspelt = in_our_form(await head.call("POST", "/services", {"name": "s", "model": "m", "replica": 1}))
            assert misspelt["details"]["path"] == "$.replica"
            assert "replicas" in misspelt["hint"]
            nested = in_our_form(await head.call("POST", "/jobs", {"name": "j", "actions": [{"modle": "m"}]}))
            assert nested["details"]["path"] == "$.actions[0].modle"
            assert "model" in nested["hint"]

    run(body)


BAD_QUERIES = [
    "/models?limit=0",
    "/models?limit=501",
    "/models?limit=ten",
    "/models?limti=5",
    "/models?limit=1&limit=2",
    "/models?cursor=!!!",
    "/models?cursor=bm9uc2Vuc2U",
    "/models?type=poem",
    "/jobs?status=asleep",
    "/events?after=-1",
    "/events?after=soon",
    "/replicas/r-0/logs?run=9",
    "/nodes?state=happy",
]


def test_wrong_queries_are_refused(tmp_path: Path) -> None:
    """Unknown, repeated and unusable parameters are 422; a wait that is not a number too."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for path in BAD_QUERIES:
                answer = await head.call("GET", path)
                assert (answer.status, in_our_form(answer)["code"]) == (422, "invalid_value"), path
            for wait in ("nan", "inf", "-1", "3601", "x"):
                answer = await head.call("POST", f"/jobs?wait={wait}", {"name": "j", "actions": [{}]})
                assert (answer.status, in_our_form(answer)["code"]) == (422, "invalid_value"), wait

    run(body)


def test_unknown_paths_and_methods(tmp_path: Path) -> None:
    """404 and 405 come in our form, 405 with what is possible; a trick path reaches nothing."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for path in ("/nope", "/api/v2/models", "/api", "/models/a/b/c/d", "/docs/x", "/jobs/"):
                answer = await head.call("GET", path)
                assert (answer.status, in_our_form(answer)["code"]) == (404, "not_found"), path
            for method, path, allowed in (
                ("PUT", "/models", "GET, POST"),
                ("DELETE", "/health", "GET"),
                ("GET", "/download", "POST"),
                ("POST", "/models/org/m", "DELETE, GET, PATCH"),
                ("OPTIONS", "/keys", "GET, POST"),
            ):
                answer = await head.call(method, path)
                assert (answer.status, in_our_form(answer)["code"]) == (405, "method_not_allowed"), path
                assert answer.headers["Allow"] == allowed
            assert "Access-Control-Allow-Origin" not in answer.headers
            for path in ("/models/..%2F..%2Fetc", "/models/a%2F..", "/models/%2e%2e%2fx", "/models/a%00b"):
                answer = await head.call("GET", path)
                assert answer.status in (404, 422), path
                assert in_our_form(answer)["code"] in ("invalid_name", "not_found"), path

    run(body)


def test_content_types(tmp_path: Path) -> None:
    """Only JSON is read, YAML only where jobs are; compressed bodies and foreign charsets are 415."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            model = b'{"name":"m"}'
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/yaml", "multipart/form-data"):
                answer = await head.call("POST", "/models", raw=model, headers={"Content-Type": kind})
                assert (answer.status, in_our_form(answer)["code"]) == (415, "unsupported_media_type"), kind
            for headers in (
                {"Content-Type": "application/json; charset=utf-16"},
                {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            ):
                answer = await head.call("POST", "/models", raw=model, headers=headers)
                assert (answer.status, in_our_form(answer)["code"]) == (415, "unsupported_media_type"), headers
            taken = await head.call(
                "POST", "/models", raw=model, headers={"Content-Type": "Application/JSON; charset=UTF-8"}
            )
            assert taken.status == 201

    run(body)


def test_routes_without_a_body_take_none(tmp_path: Path) -> None:
    """An empty object is let through where no body belongs; anything else is an error, not a silence."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(node("n1"))
            assert (await head.call("POST", "/nodes/n1/cordon", {})).status == 200
            answer = await head.call("POST", "/nodes/n1/cordon", {"reason": "x"})
            assert (answer.status, in_our_form(answer)["code"]) == (400, "invalid_request")

    run(body)


async def _refused_upload(head: ApiHead, head_lines: bytes, *, chunked: bool) -> tuple[int, bytes, int]:
    """Sends without end until the head has answered and closed; returns status, answer, bytes it let us send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
    writer.write(head_lines)
    piece = b"a" * 65_536
    if chunked:
        piece = b"%x\r\n%s\r\n" % (len(piece), piece)
    sent = 0

    async def upload() -> None:
        nonlocal sent
        try:
            while sent < 1 << 30:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
        except OSError:
            pass  # closed, as it should be

    upload_task = asyncio.create_task(upload())
    answer = b""
    try:
        while data := await reader.read(65_536):
            answer += data
    except ConnectionError:
        pass  # reset after the answer
    await upload_task
    writer.close()
    status = int(answer.split(b" ", 2)[1]) if answer else 0
    return status, answer, sent


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_gigabyte_body_costs_nothing(tmp_path: Path, chunked: bool) -> None:
    """A body far over the limit is 413 at once or after the limit, and most of it is never taken in."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1073741824"
            lines = (
                b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer " + head.tokens["admin"].encode() + b"\r\n" + framing + b"\r\n\r\n"
            )
            status, answer, sent = await _refused_upload(head, lines, chunked=chunked)
            assert status == 413
            assert b'"code":"body_too_large"' in answer
            assert sent < 64 << 20  # socket buffers and the little that is thrown away; not a gigabyte
            assert (await head.call("GET", "/health")).status == 200

    run(body)


def test_a_large_body_without_a_token_is_not_read(tmp_path: Path) -> None:
    """401 comes before the body is looked at, and the connection ends."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            lines = b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n"
            status, _, sent = await _refused_upload(head, lines, chunked=False)
            assert status == 401
            assert sent < 64 << 20

    run(body)


def test_expect_continue_is_answered_after_the_door(tmp_path: Path) -> None:
    """A client that waits for 100 gets the refusal instead of being told to send."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for token, length, status in (
                (b"", b"10", b"401"),
                (head.tokens["admin"].encode(), b"2000000", b"413"),
                (head.tokens["admin"].encode(), b"12", b"100"),
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
                writer.write(
                    b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Authorization: Bearer " + token + b"\r\nExpect: 100-continue\r\n"
                    b"Content-Length: " + length + b"\r\n\r\n"
                )
                line = await reader.readline()
                assert line.split(b" ")[1] == status
                if status == b"100":
                    assert await reader.readline() == b"\r\n"
                    writer.write(b'{"name":"m"}')
                    assert (await reader.readline()).split(b" ")[1] == b"201"
                writer.close()

    run(body)


def test_a_body_that_never_comes_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that announces a body and sends nothing is told so after the limit."""
    monkeypatch.setattr(limits, "BODY_READ_S", 0.2)

    async def body() -> None:
        async with api_head(tmp_path) as head:
            reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
            writer.write(
                b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer "
                + head.tokens["admin"].encode()
                + b"\r\nContent-Length: 12\r\n\r\n{"
            )
            assert (await reader.readline()).split(b" ")[1] == b"504"
            assert b"timed_out" in await reader.read(65_536)
            writer.close()

    run(body)


def test_slow_headers_end_the_connection(tmp_path: Path) -> None:
    """A client that sends its headers byte by byte is cut off at the limit, however busy it looks."""

    async def body() -> None:
        async with api_head(tmp_path, door=DoorConfig(keep_alive_s=0.3)) as head:
            reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            reading = asyncio.ensure_future(reader.read())
            while not reading.done():
                writer.write(b"X: y\r\n")
                await asyncio.wait([reading], timeout=0.05)
            with suppress(ConnectionError):
                assert await reading == b""
            writer.close()

    run(body)


def test_yaml_jobs_are_taken_and_yaml_bombs_are_not(tmp_path: Path) -> None:
    """A job file in YAML works, aliases included; bombs, loops, tags and broken YAML are refused at once."""
    job = b"""
name: deploy
x: &common {model: m, device: "n1:disk"}
actions:
  - {action: download, <<: *common}
"""
    good = job.replace(b'x: &common {model: m, device: "n1:disk"}\n', b"").replace(
        b"- {action: download, <<: *common}", b'- &first {action: download, model: m, device: "n1:disk"}\n  - *first'
    )
    bomb = b"name: j\nactions:\n" + b"".join(
        b"  - &a%d {config: {x: [%s]}}\n" % (level, b", ".join([b"*a%d" % (level - 1)] * 20) if level else b"1")
        for level in range(12)
    )
    merges = b"a0: &a0 {k: v}\n" + b"".join(
        b"a%d: &a%d {<<: [%s]}\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 20)) for level in range(1, 12)
    )
    cases = [
        (good, 202, ""),
        (job, 422, "invalid_value"),
        (bomb, 400, "invalid_request"),
        (merges, 400, "invalid_request"),
        (b"&a [*a]", 400, "invalid_request"),
        (b"name: [unclosed", 400, "invalid_request"),
        (b"!!python/object/apply:os.abort []", 400, "invalid_request"),
        (b"[" * 5_000, 400, "invalid_request"),
        (b"name: " + b"9" * 5_000 + b"\nactions: [{}]", 400, "invalid_request"),
        (b"", 400, "invalid_request"),
        (b"# only a comment", 400, "invalid_request"),
        (b"a: 1\n---\nb: 2", 400, "invalid_request"),
        (b"name: 2020-01-01\nactions: [{action: copy, timeout_s: 0}]", 422, "invalid_value"),
        (b"x" * (limits.YAML_BYTES + 1), 413, "body_too_large"),
    ]

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for raw, status, code in cases:
                answer = await head.call("POST", "/jobs", raw=raw, headers={"Content-Type": "application/yaml"})
                assert answer.status == status, (raw[:80], answer.body[:300])
                assert not code or in_our_form(answer)["code"] == code, raw[:80]

    run(body)


def test_a_bug_is_500_without_a_word_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged with the request's id and answered as `internal`."""

    def broken(state: State, event: ev.Event, now_ms: int) -> Turn:
        if isinstance(event, ev.RegisterModelRequested):
            raise ZeroDivisionError("secret words")
        return scripted_step(state, event, now_ms)

    async def body() -> None:
        async with api_head(tmp_path, step=broken) as head:
            answer = await head.call("POST", "/models", {"name": "m"})
            assert (answer.status, in_our_form(answer)["code"]) == (500, "internal")
            assert b"secret words" not in answer.body

            def explode(call: Any) -> Any:
                raise RuntimeError("more secret words")

            head.context.metrics.render = explode  # type: ignore[method-assign,assignment]
            answer = await head.call("GET", "/metrics")
            assert (answer.status, in_our_form(answer)["code"]) == (500, "internal")
            assert b"secret words" not in answer.body
            assert any(answer.headers["X-Request-Id"] in record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.ERROR):
        run(body)


async def _slow(head: ApiHead, count: int) -> AsyncIterator[Answer]:
    for _ in range(count):
        yield await head.call("GET", "/health", role=None)


def test_authentication(tmp_path: Path) -> None:
    """Every way of not being somebody is 401 with WWW-Authenticate; the wrong role is 403 and names the right one."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            good = head.tokens["admin"]
            for header in (
                None,
                "",
                "Bearer",
                "Bearer x",
                f"Basic {good}",
                good,
                f"Bearer {good}x",
                f"Bearer {good[:-1]}",
                f"Bearer {good.replace('admin', 'viewer', 1)}",
                f"Bearer {good.replace('key-admin', 'key-nobody')}",
                "Bearer hdr_admin_key-admin_" + "0" * 64,
            ):
                headers = {"Authorization": header} if header is not None else {}
                answer = await head.call("GET", "/models", role=None, headers=headers)
                assert (answer.status, in_our_form(answer)["code"]) == (401, "unauthenticated"), header
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            for role, method, path, needed in (
                ("viewer", "POST", "/models", "operator"),
                ("operator", "GET", "/keys", "admin"),
                ("operator", "GET", "/backup", "admin"),
                ("agent", "GET", "/models", "viewer"),
                ("inference", "GET", "/models", "viewer"),
                ("admin", "GET", "/agent", "agent"),
            ):
                answer = await head.call(method, path, role=role)
                error = in_our_form(answer)
                assert (answer.status, error["code"]) == (403, "forbidden"), (role, path)
                assert needed in error["message"]
            for path in ("/", "/healthz", "/docs", "/api/v1/openapi.json"):
                assert (await head.call("GET", path, role=None)).status == 200

    run(body)


def test_a_revoked_and_an_expired_key_open_nothing(tmp_path: Path) -> None:
    """Revoking works at once."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            made = (await head.call("POST", "/keys", {"role": "viewer", "name": "x"})).json
            head.tokens["x"] = made["token"]
            assert (await head.call("GET", "/models", role="x")).status == 200
            assert (await head.call("DELETE", f"/keys/{made['id']}")).json["is_revoked"] is True
            answer = await head.call("GET", "/models", role="x")
            assert (answer.status, answer.code) == (401, "unauthenticated")

    run(body)


def test_failed_authentication_is_throttled_but_valid_tokens_are_not(tmp_path: Path) -> None:
    """After so many failures an address gets 429 with Retry-After; a valid token from it still works."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            codes = [answer.code async for answer in _slow(head, limits.AUTH_FAILURES_PER_MINUTE + 2)]
            assert codes[0] == "unauthenticated"
            assert codes[-1] == "too_many"
            answer = await head.call("GET", "/health", role=None)
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert (await head.call("GET", "/health")).status == 200

    run(body)


def test_many_refusals_do_not_slow_the_others(tmp_path: Path) -> None:
    """While large uploads are being refused, reads are answered."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            lines = b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n"
            uploads = [asyncio.create_task(_refused_upload(head, lines, chunked=False)) for _ in range(5)]
            for _ in range(20):
                assert (await head.call("GET", "/health")).status == 200
            assert not all(upload.done() for upload in uploads)
            for upload in uploads:
                assert (await upload)[0] in (401, 429)

    run(body)


def test_the_form_of_an_error_is_what_the_types_say(tmp_path: Path) -> None:
    """Any error answer decodes into ErrorAnswer."""
    import msgspec

    from herder import types as api

    async def body() -> None:
        async with api_head(tmp_path) as head:
            answer = await head.call("GET", "/models/none")
            decoded = msgspec.json.decode(answer.body, type=api.ErrorAnswer)
            assert decoded.error.code == "model_not_found"
            assert json.loads(answer.body)["error"]["details"] == {}

    run(body)
