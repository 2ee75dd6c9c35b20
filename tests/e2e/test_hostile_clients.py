"""Clients that mean harm, many at a time, against a real head with a real engine behind it.

After each crowd the head is as it was: no request on its way, no body held, no connection to an engine, as many
descriptors as before; and while it lasts, somebody with a token is answered. HERDER_TEST_CROWD multiplies the crowds
for runs by hand (10: 2,000 idle connections, 1,000 aborted streams, 500 readers that do not read).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.processes import until

CROWD = int(os.environ.get("HERDER_TEST_CROWD", "1"))
LIMITS = {"HEADER_READ_S": 3, "GATEWAY_BODY_GRACE_S": 3, "STREAM_WRITE_S": 4, "KEEP_ALIVE_S": 1}
CHAT = "/v1/chat/completions"
MODEL = "target"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that is quick to show people out, an agent, and an engine."""
    with Cluster(tmp_path_factory.mktemp("hostile") / "cluster", limits=LIMITS) as made:
        made.add_agent("n1")
        made.serve_tiny(MODEL, "n1")
        yield made


class Siege:
    """One crowd's way to the head, and what is looked at afterwards."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.token = cluster.head.token()
        cluster.chat(MODEL)
        self.connections = self.metric("herder_http_connections")
        self.before = self.descriptors()
        self.rss_before = cluster.head.rss_bytes()

    def metric(self, name: str) -> float:
        """One value of /metrics."""
        found = re.search(rf"^{name} (\S+)$", self.cluster.head.read("/metrics"), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def descriptors(self) -> int:
        """Files and sockets that the head has open."""
        return len(list(Path(f"/proc/{self.cluster.head.pid}/fd").iterdir()))

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the head."""
        return await asyncio.open_connection("127.0.0.1", self.cluster.head.port, limit=4_096)

    def request(self, body: bytes = b"", *headers: str, line: str = f"POST {CHAT} HTTP/1.1") -> bytes:
        """The bytes of a request with a good token."""
        lines = [line, "Host: x", f"Authorization: Bearer {self.token}", *headers]
        if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def served_s(self) -> float:
        """Somebody with a token asks for a page; how long it took."""
        began = time.monotonic()
        reader, writer = await self.open()
        writer.write(self.request(line="GET /api/v1/health HTTP/1.1"))
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        return time.monotonic() - began

    def is_over(self) -> None:
        """Waits until nothing is left of the crowd."""
        until(lambda: self.metric("herder_gateway_in_flight") == 0, "no request on its way")
        assert self.metric("herder_gateway_bodies_bytes") == 0
        until(lambda: self.metric("herder_http_connections") <= self.connections, "no connection is left")
        until(lambda: self.descriptors() <= self.before, f"{self.before} descriptors")
        assert self.cluster.chat(MODEL) == "w0 w1 w2 "
        grown = (self.cluster.head.rss_bytes() - self.rss_before) / 1e6
        print(f"memory grew by {grown:.1f} MB")


def run(cluster: Cluster, attack: Callable[[Siege], Awaitable[object]]) -> None:
    """One attack, and what must hold after it."""
    siege = Siege(cluster)
    asyncio.run(asyncio.wait_for(attack(siege), 120))
    siege.is_over()


def test_idle_connections(cluster: Cluster) -> None:
    """Connections that never ask are closed; the head answers others meanwhile."""

    async def attack(siege: Siege) -> None:
        held = [await siege.open() for _ in range(200 * CROWD)]
        print(f"answered in {await siege.served_s() * 1000:.0f} ms beside {len(held)} idle connections")
        for reader, writer in held:
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()

    run(cluster, attack)


@pytest.mark.parametrize("part", ["header", "body", "control body"])
def test_slow_writers(cluster: Cluster, part: str) -> None:
    """A byte now and then keeps nothing open for long, before the headers or in a body."""

    def start(siege: Siege) -> bytes:
        if part == "header":
            return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: "
        if part == "body":
            return siege.request(b"", "Content-Length: 100000")
        return b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"

    async def drip(siege: Siege) -> bytes:
        reader, writer = await siege.open()
        writer.write(start(siege))
        reading = asyncio.ensure_future(reader.read())
        while not reading.done():
            writer.write(b"x")
            await asyncio.wait([reading], timeout=0.3)
        writer.close()
        try:
            return await reading
        except ConnectionError:
            return b"reset"

    async def attack(siege: Siege) -> None:
        dripping = asyncio.gather(*(drip(siege) for _ in range(20 * CROWD)))
        print(f"answered in {await siege.served_s() * 1000:.0f} ms beside {20 * CROWD} slow writers")
        for told in await dripping:
            codes = {"header": (b"",), "body": (b"timed_out",), "control body": (b"unauthenticated", b"too_many")}[part]
            assert any(code in told for code in codes) or told == b"reset", told[:200]

    run(cluster, attack)


def test_event_readers_that_do_not_read(cluster: Cluster) -> None:
    """They take their places and nothing more; changes go on at their pace, and the readers' end frees everything."""

    async def attack(siege: Siege) -> None:
        held = []
        for _ in range(50 * CROWD):
            reader, writer = await siege.open()
            cast(asyncio.ReadTransport, writer.transport).pause_reading()
            writer.write(siege.request(line="GET /api/v1/events?after=0 HTTP/1.1"))
            held.append((reader, writer))
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        for number in range(20):
            body = {"labels": {"turn": str(number)}}
            status, _ = await loop.run_in_executor(None, siege.cluster.head.call, "PATCH", "/api/v1/nodes/n1", body)
            assert status == 200
        print(f"20 changes in {time.monotonic() - began:.2f} s beside {len(held)} readers that do not read")
        print(f"answered in {await siege.served_s() * 1000:.0f} ms")
        for _, writer in held:
            writer.transport.abort()

    run(cluster, attack)


def test_aborted_streams(cluster: Cluster) -> None:
    """Clients that leave at any moment of a streamed request: the engine's connection ends with each."""
    rng = random.Random(7)
    body = json.dumps({"model": MODEL, "stream": True, "max_tokens": 1_000, "messages": []}).encode()

    async def once(siege: Siege, gate: asyncio.Semaphore) -> None:
        async with gate:
            data = siege.request(body)
            reader, writer = await siege.open()
            kind = rng.random()
            if kind < 0.3:  # in the middle of headers or body
                writer.write(data[: rng.randrange(1, len(data))])
                await writer.drain()
            else:
                writer.write(data)
                if kind > 0.5:
                    assert b" 200 " in await asyncio.wait_for(reader.readline(), 20)
                    for _ in range(rng.randrange(7)):
                        await asyncio.wait_for(reader.readline(), 20)
            if rng.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()

    async def attack(siege: Siege) -> None:
        gate = asyncio.Semaphore(50)
        await asyncio.gather(*(once(siege, gate) for _ in range(100 * CROWD)))

    run(cluster, attack)
