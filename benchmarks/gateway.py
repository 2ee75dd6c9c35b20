"""What a request and a streamed piece cost in the gateway, beside a bare aiohttp pass-through and nginx.

    python -m benchmarks.gateway [--requests N] [--streams N] [--rounds N]

One stub engine, one load generator and one gateway at a time, all on this machine over loopback, each gateway one
process on uvloop (nginx: one worker). The figure is CPU time of the gateway's process, user and system, as the
kernel accounts it; the median of the rounds, which alternate between the gateways. `herder` is the whole way of a
request: the API's middleware, authentication, routing, metering. The bare pass-through has none of it; nginx
parses no JSON. The bar: at most 1.3 times the bare pass-through, per request and per streamed piece.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import aiohttp
import uvloop
from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]

PORTS = {"stub": 18_480, "herder": 18_481, "bare": 18_482, "nginx": 18_483}
CHUNKS = 64
GAP_S = 0.005
CONNECTIONS = 32
MODEL = "acme/tiny-chat"
PATH = "/v1/chat/completions"
EVENT = b'data: {"id":"c-1","object":"chat.completion.chunk","choices":[{"delta":{"content":" token"},"index":0}]}\n\n'
ANSWER = json.dumps(
    {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": "word " * 40}}],
     "usage": {"prompt_tokens": 20, "completion_tokens": 40}}
).encode()  # fmt: skip
BAR = 1.3
LOAD_S = 120  # the longest that one load may take


class StubProtocol(asyncio.Protocol):
    """The engine: answers from memory, or streams an event every GAP_S."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but class
        self.loop = asyncio.get_running_loop()
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        if b'"stream": true' in rest[:length]:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            self.loop.call_later(GAP_S, self.piece, CHUNKS)
        else:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(ANSWER), ANSWER)
            )

    def piece(self, left: int) -> None:
        """One event, then the next."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
        if left > 1:
            self.loop.call_later(GAP_S, self.piece, left - 1)
        else:
            self.transport.write(b"0\r\n\r\n")


async def serve_stub() -> None:
    server = await asyncio.get_running_loop().create_server(StubProtocol, "127.0.0.1", PORTS["stub"])
    await server.serve_forever()


async def serve_bare() -> None:
    """The pass-through that anybody would write with aiohttp."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            headers = {"Content-Type": request.headers.get("Content-Type", "")}
            url = f"http://127.0.0.1:{PORTS['stub']}{request.path}"
            async with session.post(url, data=body, headers=headers) as answer:
                given = {"Content-Type": answer.headers["Content-Type"]}
                if answer.content_length is not None:
                    return web.Response(status=answer.status, body=await answer.read(), headers=given)
                response = web.StreamResponse(status=answer.status, headers=given)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response

        app = web.Application(client_max_size=2**25)
        app.router.add_post(PATH, forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", PORTS["bare"]).start()
        await asyncio.Event().wait()


async def serve_herder() -> None:
    """The gateway behind the API's middleware, with one replica in a state made by hand."""
    from tests.doubles import gateway_head

    with tempfile.TemporaryDirectory() as scratch:
        async with gateway_head.running(Path(scratch), port=PORTS["herder"]) as head:
            head.add_replica(PORTS["stub"])
            print(head.tokens["inference"], flush=True)
            await asyncio.Event().wait()


NGINX = """
daemon off; master_process off; worker_processes 1; pid {scratch}/pid; error_log {scratch}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f;
  uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s; keepalive_requests 1000000;
  upstream engine {{ server 127.0.0.1:{stub}; keepalive 64; keepalive_requests 1000000; }}
  server {{ listen 127.0.0.1:{port};
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; }}
  }}
}}
"""


class LoadProtocol(asyncio.Protocol):
    """A client connection: one request after the other, until told to stop."""

    def __init__(self, request: bytes, is_stream: bool, more: Callable[[], bool]) -> None:
        self.request = request
        self.ending = b"0\r\n\r\n" if is_stream else b""
        self.more = more
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but class
        self.next()

    def next(self) -> None:
        """Sends the next request, or ends."""
        self.buffer = b""
        if self.more():
            self.transport.write(self.request)
        elif not self.done.done():
            self.done.set_result(None)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.ending:
            if self.buffer.endswith(self.ending):
                assert self.buffer.count(b"data: ") == CHUNKS, "pieces are missing"
                self.next()
            return
        _, blank, body = self.buffer.partition(b"\r\n\r\n")
        if blank and len(body) >= len(ANSWER):
            assert body == ANSWER, self.buffer[:500]
            self.next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError(f"the gateway closed: {self.buffer[:300]!r}"))


async def load(port: int, token: str, count: int, *, is_stream: bool) -> float:
    """Sends `count` requests over CONNECTIONS connections; returns seconds."""
    body = json.dumps(
        {"model": MODEL, "stream": is_stream, "messages": [{"role": "user", "content": "Say something. " * 8}]}
    ).encode()
    request = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nUser-Agent: bench\r\nAccept: */*\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    left = count

    def more() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    loop = asyncio.get_running_loop()
    began = time.monotonic()
    clients = [
        (await loop.create_connection(lambda: LoadProtocol(request, is_stream, more), "127.0.0.1", port))[1]
        for _ in range(CONNECTIONS)
    ]
    async with asyncio.timeout(LOAD_S):
        await asyncio.gather(*(client.done for client in clients))
    return time.monotonic() - began


def cpu_s(pid: int) -> float:
    """CPU seconds of another process so far. Source: clock_getcpuclockid(3), kernel/time/posix-cpu-timers.c."""
    return time.clock_gettime((~pid << 3) | 2)


@contextmanager
def running(name: str, scratch: Path) -> Iterator[tuple[int, str]]:
    """One process of the benchmark: its pid and, for herder, a token."""
    if name == "nginx":
        config = scratch / "nginx.conf"
        config.write_text(NGINX.format(scratch=scratch, stub=PORTS["stub"], port=PORTS["nginx"]))
        command = ["nginx", "-c", str(config), "-p", str(scratch)]
    else:
        command = [sys.executable, "-m", "benchmarks.gateway", "--role", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout is not None
        token = process.stdout.readline().strip() if name == "herder" else "none"
        _wait_listening(PORTS[name])
        yield process.pid, token
    finally:
        process.kill()
        process.wait()


def _wait_listening(port: int) -> None:
    import socket

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Microseconds of CPU by gateway and kind, a value per round."""
    names = ["herder", "bare", *(["nginx"] if shutil.which("nginx") else [])]
    found: dict[str, dict[str, list[float]]] = {name: {"request": [], "piece": [], "rate": []} for name in names}
    with tempfile.TemporaryDirectory() as folder, running("stub", Path(folder)):
        for _ in range(options.rounds):
            for name in names:
                with running(name, Path(folder)) as (pid, token):
                    asyncio.run(load(PORTS[name], token, 500, is_stream=False))  # warm up
                    asyncio.run(load(PORTS[name], token, CONNECTIONS, is_stream=True))
                    before = cpu_s(pid)
                    took_s = asyncio.run(load(PORTS[name], token, options.requests, is_stream=False))
                    between = cpu_s(pid)
                    asyncio.run(load(PORTS[name], token, options.streams, is_stream=True))
                    after = cpu_s(pid)
                found[name]["request"].append((between - before) / options.requests * 1e6)
                found[name]["piece"].append((after - between) / options.streams / CHUNKS * 1e6)
                found[name]["rate"].append(options.requests / took_s)
    return found


def report(found: dict[str, dict[str, list[float]]]) -> bool:
    """Prints the table; True when the bar is kept."""
    bare = {kind: statistics.median(values) for kind, values in found["bare"].items()}
    print(f"{'':10}{'CPU µs/request':>16}{'x bare':>8}{'CPU µs/piece':>14}{'x bare':>8}{'requests/s':>12}")
    for name, kinds in found.items():
        middle = {kind: statistics.median(values) for kind, values in kinds.items()}
        print(
            f"{name:10}{middle['request']:16.1f}{middle['request'] / bare['request']:8.2f}"
            f"{middle['piece']:14.1f}{middle['piece'] / bare['piece']:8.2f}{middle['rate']:12.0f}"
        )
    ours = {kind: statistics.median(values) for kind, values in found["herder"].items()}
    is_kept = all(ours[kind] <= BAR * bare[kind] for kind in ("request", "piece"))
    print(f"bar: {BAR} times the bare pass-through: {'kept' if is_kept else 'MISSED'}")
    print(
        f"{CONNECTIONS} connections; streams of {CHUNKS} pieces every {GAP_S * 1000:g} ms, head of the stream included"
    )
    return is_kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=["stub", "bare", "herder"], help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=6_000)
    parser.add_argument("--streams", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    uvloop.install()
    if options.role:
        asyncio.run({"stub": serve_stub, "bare": serve_bare, "herder": serve_herder}[options.role]())
        return 0
    return 0 if report(measure(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
