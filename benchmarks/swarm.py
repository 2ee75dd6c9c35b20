"""Simulated agents: real websockets and real messages, many in one process, to load a head.

Used by benchmarks.control_plane. Each agent says hello with the inventory of an 8-GPU machine, reports that it holds
nothing, then renews its lease and sends the readings of 8 GPUs at the interval that the head tells.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec
import uvloop

from common import limits, wire
from common.backoff import full_jitter_ms
from common.clock import boottime_ms


def inventory(index: int) -> wire.Inventory:
    """An 8-GPU machine."""
    gpus = tuple(
        wire.Gpu(i, f"GPU-{index:06d}-{i}", "NVIDIA H200", 151_397_597_184, "9.0", nvlink_peers=tuple(range(8)))
        for i in range(8)
    )
    return wire.Inventory(
        hostname=f"n{index}",
        addresses=(f"127.{index >> 14 & 63}.{index >> 7 & 127}.{index & 127}",),
        os="Debian GNU/Linux 12",
        cpus=192,
        cores=96,
        numa_nodes=2,
        memory_bytes=2 << 40,
        dram_budget_bytes=1 << 40,
        disk_budget_bytes=28 << 40,
        disks=(wire.Disk("/var/lib/herder", "ext4", 30 << 40, 28 << 40),),
        gpus=gpus,
        driver_version="570.86.15",
        cuda_version="12.8",
        engines={"llamacpp": "1", "command": "1"},
    )


def telemetry() -> wire.Telemetry:
    """Readings of such a machine."""
    return wire.Telemetry(
        cpu=0.31,
        memory_available_bytes=1 << 40,
        disk_free_bytes=20 << 40,
        gpus=tuple(wire.GpuReading(i, f"GPU-{i}", 100 << 30, 41 << 30, 0.9, 0.5, 61.0, 640.0, 0) for i in range(8)),
        load1=12.0,
    )


@dataclass
class Tally:
    """What the swarm saw."""

    connected: int = 0
    welcomes: int = 0
    leases: int = 0
    closed: int = 0
    refused: int = 0
    ack_ms: list[float] = field(default_factory=list)
    last_welcome: float = 0.0


@dataclass
class Past:
    """What an agent remembers from session to session."""

    agent_id: str
    max_epoch: int = 0
    wait_ms: int = -1  # told or drawn; -1: nobody was there, so the delay grows


async def one_agent(
    session: aiohttp.ClientSession, url: str, index: int, tally: Tally, stop: asyncio.Event, rng: random.Random
) -> None:
    """One agent's life: connect, renew, come back after a close as the real agent would, until told to stop."""
    past = Past(f"a{index}-{rng.getrandbits(32):08x}")
    attempt = 0
    while not stop.is_set():
        past.wait_ms = -1
        attempt += 1
        try:
            async with session.ws_connect(url, compress=0, max_msg_size=limits.FRAME_BYTES) as socket:
                await live(socket, index, past, tally, stop, rng)
        except (aiohttp.ClientError, OSError, TimeoutError, TypeError):  # TypeError: it closed before its first word
            pass
        if past.wait_ms >= 0:
            attempt = 0
        else:
            tally.refused += 1
            past.wait_ms = full_jitter_ms(
                attempt, base_ms=limits.RECONNECT_BASE_MS, cap_ms=limits.RECONNECT_CAP_MS, rng=rng
            )
        if not stop.is_set():
            await asyncio.sleep(past.wait_ms / 1000)


async def live(
    socket: aiohttp.ClientWebSocketResponse,
    index: int,
    past: Past,
    tally: Tally,
    stop: asyncio.Event,
    rng: random.Random,
) -> None:
    """One session, or the refusal of one."""
    hello = wire.Hello(
        proto_min=limits.PROTOCOL_MIN,
        proto_max=limits.PROTOCOL,
        node_id=f"n{index}",
        boot_id=f"boot-{index}",
        agent_id=past.agent_id,
        version="0.1.0",
        inventory=inventory(index),
        max_head_epoch=past.max_epoch,
        advertise="127.0.0.1",
        data_port=9,
        identity=f"{index:064x}",
        http_port=9,
    )
    await socket.send_str(wire.encode(hello).decode())
    welcome = wire.decode((await socket.receive(timeout=30)).data)
    if not isinstance(welcome, wire.Welcome):
        tally.refused += 1
        if isinstance(welcome, wire.Refused):
            past.wait_ms = welcome.retry_after_ms + rng.randint(0, welcome.retry_after_ms // 2)
        return
    past.max_epoch = welcome.head_epoch
    tally.welcomes += 1
    tally.connected += 1
    tally.last_welcome = time.monotonic()
    sent: dict[int, float] = {}
    reader = asyncio.ensure_future(read(socket, tally, sent))
    interval_s = welcome.interval_ms / 1000
    seq = 1
    try:
        await socket.send_str(wire.encode(wire.Report(1)).decode())
        await asyncio.wait({reader}, timeout=rng.uniform(0, interval_s))
        while not stop.is_set() and not reader.done():
            seq += 1
            tally.leases += 1
            sent[seq] = time.monotonic()
            await socket.send_str(wire.encode(wire.Lease(seq, boottime_ms())).decode())
            await socket.send_str(wire.encode(telemetry()).decode())
            await asyncio.wait({reader}, timeout=interval_s * rng.uniform(0.95, 1.05))
    finally:
        reader.cancel()
        tally.connected -= 1
        tally.closed += not stop.is_set()
        past.wait_ms = rng.randint(0, welcome.respread_ms)


async def read(socket: aiohttp.ClientWebSocketResponse, tally: Tally, sent: dict[int, float]) -> None:
    """Takes what the head sends; an ack's latency counts from just before its lease was written."""
    async for message in socket:
        body = wire.decode(message.data)
        if isinstance(body, wire.Ack) and body.seq in sent:
            tally.ack_ms.append(1000 * (time.monotonic() - sent.pop(body.seq)))


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, p99 and maximum, in milliseconds; the list is emptied, so each call speaks of its own window."""
    ordered = sorted(values)
    values.clear()
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {
        "n": len(ordered),
        "p50": ordered[last // 2],
        "p99": ordered[int(last * 0.99)],
        "max": ordered[-1],
    }


async def main() -> None:
    """Runs the agents; each line on standard input asks for the tally, `quit` ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--token-file", type=lambda name: Path(name).read_text().strip(), dest="token", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--connect-rate", type=int, default=400, help="new sessions a second at the start")
    options = parser.parse_args()
    token = options.token
    rng = random.Random(options.first)
    tally = Tally()
    stop = asyncio.Event()
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=20)
    ) as session:
        tasks = []
        for index in range(options.first, options.first + options.count):
            tasks.append(asyncio.ensure_future(one_agent(session, options.url, index, tally, stop, rng)))
            if index % max(1, options.connect_rate // 20) == 0:
                await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        commands = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while line := (await commands.readline()).strip():  # each line asks for the tally
            if line == b"quit":
                break
            now = time.monotonic()
            print(
                msgspec.json.encode(
                    {
                        "connected": tally.connected,
                        "welcomes": tally.welcomes,
                        "leases": tally.leases,
                        "closed": tally.closed,
                        "refused": tally.refused,
                        "ack_ms": quantiles(tally.ack_ms),
                        "since_last_welcome_s": now - tally.last_welcome if tally.last_welcome else None,
                    }
                ).decode(),
                flush=True,
            )
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    uvloop.run(main())
