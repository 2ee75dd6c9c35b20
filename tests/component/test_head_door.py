"""The door: who does not ask is shown out, who asks is served."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from common.errors import HerderError, InvalidConfig, PortTaken
from head import door
from head.config import DoorConfig, HeadConfig, TlsConfig
from head.door import Door
from tests.doubles.head_shell import until


async def answer(request: web.Request) -> web.Response:
    """Serves a page that takes until it is released."""
    release: asyncio.Event = request.app[RELEASE]
    await release.wait()
    return web.Response(text="served")


RELEASE: web.AppKey[asyncio.Event] = web.AppKey("release", asyncio.Event)


async def test_silent_connections_are_closed() -> None:
    """One without a word and one with half a header end after the header timeout; one that is being served does not."""
    app = web.Application()
    app[RELEASE] = asyncio.Event()
    app.router.add_get("/", answer)
    door = Door(HeadConfig(port=0), app)
    await door.open()
    port = int(door.url.rpartition(":")[2])
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    (silent, _), (half, half_out), (asking, asking_out) = connections
    half_out.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    asking_out.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    late_ms = int(door.config.door.header_timeout_s * 1000) + 1
    await until(lambda: door.sweep(1_000) == 0 and len(door._silent) == 2)
    assert door.sweep(late_ms) == 0
    assert door.sweep(1_000 + late_ms) == 2
    assert await silent.read() == b""
    assert await half.read() == b""
    app[RELEASE].set()
    assert (await asking.read()).endswith(b"served")
    for _, out in connections:
        out.close()
        await out.wait_closed()
    await door.close()


async def test_one_connection_too_many_is_told_so() -> None:
    """It is answered at once, whatever it says, and costs nothing; when another ends there is room again."""
    app = web.Application()
    app[RELEASE] = asyncio.Event()
    app[RELEASE].set()
    app.router.add_get("/", answer)
    door = Door(HeadConfig(port=0, door=DoorConfig(connections_max=2)), app)
    await door.open()
    port = int(door.url.rpartition(":")[2])
    inside = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    await until(lambda: door.crowd.count == 2)
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        told = await reader.read()
        assert told.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nRetry-After: " in told
        assert b'"code":"too_many"' in told
        writer.close()
        await writer.wait_closed()
    server = door._runner.server
    assert server is not None
    assert (door.crowd.count, len(server.connections), door.crowd.refused["total"]) == (2, 2, 20)
    inside[0][1].close()
    await until(lambda: door.crowd.count == 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).endswith(b"served")
    for _, out in (inside[1], (reader, writer)):
        out.close()
    await door.close()
    await until(lambda: door.crowd.count == 0)


@pytest.fixture
def server_tls(tmp_path: Path) -> TlsConfig:
    """A certificate of its own making."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-days", "1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    key.chmod(0o600)
    return TlsConfig(str(certificate), str(key))


@pytest.mark.parametrize("half", [b"", b"\x16\x03\x01"])
async def test_a_tls_handshake_does_not_take_for_ever(server_tls: TlsConfig, half: bytes) -> None:
    """Whoever connects to a TLS door and does not shake hands is shown out."""
    door = Door(HeadConfig(port=0, tls=server_tls, door=DoorConfig(header_timeout_s=0.3)), web.Application())
    await door.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]))
    writer.write(half)
    try:
        async with asyncio.timeout(10):
            assert await reader.read() == b""
    except ConnectionError:
        pass  # reset
    writer.transport.abort()
    await door.close()


async def test_an_address_that_is_not_ours_is_named() -> None:
    """Whatever is wrong with the address, the error says which and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases: list[tuple[str, type[HerderError], str]] = [
            ("127.0.0.1", PortTaken, "in use"),
            ("192.0.2.1", InvalidConfig, "192.0.2.1"),
        ]
        for host, kind, says in cases:
            door = Door(HeadConfig(host=host, port=taken.getsockname()[1]), web.Application())
            with pytest.raises(kind, match=says) as error:
                await door.open()
            assert error.value.hint
            await door.close()


async def test_shut_lets_the_open_ones_finish() -> None:
    """After `shut` new connections are refused and the one being served gets its answer."""
    app = web.Application()
    app[RELEASE] = asyncio.Event()
    app.router.add_get("/", answer)
    door = Door(HeadConfig(port=0), app)
    await door.open()
    port = int(door.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    server = door._runner.server
    assert server is not None
    await until(lambda: any(handler._request_in_progress for handler in server.connections))
    await door.shut()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    app[RELEASE].set()
    assert (await reader.read()).endswith(b"served")
    writer.close()
    await writer.wait_closed()
    await door.close()


def test_bytes_that_are_no_http_fill_no_log() -> None:
    """One line a minute for malformed requests, with their number and without their bytes, which may hold a token."""
    lines: list[logging.LogRecord] = []
    logger = door._http_log()
    logger.parent = None
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign,assignment]
    logger.addHandler(handler)
    for _ in range(50):
        try:
            raise BadHttpMessage("Authorization : Bearer hdr_admin_secret")
        except BadHttpMessage as error:
            logger.exception("Error handling request from %s", "1.2.3.4", exc_info=error)
    assert [(line.levelname, line.getMessage(), line.exc_info) for line in lines] == [
        ("WARNING", "requests that are not HTTP were refused", None)
    ]
    logger.error("something else")
    assert lines[-1].getMessage() == "something else"
