"""What the load generator costs and how right it is, against a stub that knows the truth, beside aiohttp on uvloop.

    python -m benchmarks.loadgen [--rounds N] [--streams N] [--seconds S] [--small]

The stub (tests/doubles/token_stub.c, compiled here) sends every token on a timetable, one send each, and writes the
time of sending into it. In each round our client and a minimal aiohttp+uvloop client do the same closed-loop work one
after the other, each in a process of its own, pinned with the stub to other cores where there are two; the figure is
CPU time of the client's loop, user and system, per token; the ratio is the median over rounds. TTFT errors are our
stamp of a first token against the time inside it; pacing is Poisson at 1,000 requests/s. Other tools (vLLM, GuideLLM,
genai-bench, AIPerf) are not run here. On a busy machine only the paired ratio means much; the load average is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from agent.loadgen.apis import APIS, Answer, read_openai_event
from agent.loadgen.connection import Endpoint
from agent.loadgen.engine import Share
from agent.loadgen.run import run
from agent.loadgen.workload import Item
from common.bench import schedule
from common.bench.records import Records

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "tests" / "doubles" / "token_stub.c"
TTFT_US, ITL_US, TOKENS = 50_000, 10_000, 100
CPUS = sorted(os.sched_getaffinity(0))


def body_of(tokens: int) -> bytes:
    """A question of about a hundred words."""
    text = "word " * 100
    return json.dumps(
        {"model": "stub", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": tokens,
         "stream_options": {"include_usage": True}}, separators=(",", ":"),
    ).encode()  # fmt: skip


@contextmanager
def stub(program: Path, ttft_us: int, itl_us: int) -> Iterator[int]:
    """The stub on a free port, on the last core."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with subprocess.Popen([program, str(port), str(ttft_us), str(itl_us)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.sched_setaffinity(process.pid, {CPUS[-1]})
        try:
            yield port
        finally:
            process.kill()


def share_of(port: int, tokens: int, **more: Any) -> Share:
    """A closed loop of `slots`, or what `more` says."""
    body = body_of(tokens)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    wire = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    base = Share(
        APIS["chat"], (Endpoint(socket.AF_INET, ("127.0.0.1", port), "127.0.0.1"),), (Item(wire, 0, 100, tokens),)
    )
    return replace(base, **more)


def ours(port: int, tokens: int, slots: int, seconds: float) -> tuple[float, Records]:
    """(CPU seconds, records) of a closed loop."""
    records = run(
        [share_of(port, tokens, slots=slots, slots_in_all=slots, until_ns=int(seconds * 1e9), connections=slots)]
    ).records
    assert set(records.column("outcome")) == {0}, records.errors
    return records.workers[0]["cpu_s"], records


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, until: float) -> int:
    """One slot: asks until the time is over; returns tokens."""
    tokens, decode = 0, json.loads
    while time.monotonic() < until:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            stamps = []
            async for line in answer.content:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    choices = decode(line[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        stamps.append(time.perf_counter())
            tokens += len(stamps)
    return tokens


def aiohttp_client(pipe: Any, port: int, tokens: int, slots: int, seconds: float) -> None:
    """The client that anybody would write, in its own process."""

    async def main() -> int:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            url, until = f"http://127.0.0.1:{port}/v1/chat/completions", time.monotonic() + seconds
            return sum(await asyncio.gather(*(ask(session, url, body_of(tokens), until) for _ in range(slots))))

    before = resource.getrusage(resource.RUSAGE_SELF)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        made = runner.run(main())
    after = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, made))


def theirs(port: int, tokens: int, slots: int, seconds: float) -> tuple[float, int]:
    """(CPU seconds, tokens) of aiohttp."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=aiohttp_client, args=(there, port, tokens, slots, seconds)
    )
    process.start()
    found: tuple[float, int] = here.recv()
    process.join(60)
    return found


def tokens_of(records: Records) -> int:
    """All output tokens."""
    return sum(records.grid.values())


def paired(program: Path, rounds: int, streams: int, seconds: float) -> None:
    """CPU per token, ours and aiohttp's, in turn."""
    ratios, mine, other = [], [], []
    with stub(program, TTFT_US, ITL_US) as port:
        for number in range(rounds):
            pair: dict[str, float] = {}
            for name in ("ours", "aiohttp") if number % 2 == 0 else ("aiohttp", "ours"):
                if name == "ours":
                    cpu_s, records = ours(port, TOKENS, streams, seconds)
                    pair[name] = cpu_s * 1e6 / tokens_of(records)
                else:
                    cpu_s, count = theirs(port, TOKENS, streams, seconds)
                    pair[name] = cpu_s * 1e6 / count
            mine.append(pair["ours"])
            other.append(pair["aiohttp"])
            ratios.append(pair["aiohttp"] / pair["ours"])
    show(f"CPU per token at {streams} streams, ours", f"{statistics.median(mine):.1f} us")
    show("CPU per token, aiohttp + uvloop", f"{statistics.median(other):.1f} us")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    show("aiohttp / ours, median of rounds (bar 1.5)", f"{statistics.median(ratios):.2f}  ({spread})")


def limits(program: Path, seconds: float, streams: int) -> None:
    """Requests/s and tokens/s of a core, memory at many streams."""
    with stub(program, 0, 0) as port:
        cpu_s, records = ours(port, 4, 64, seconds)
        show("4-token requests/s of a core, by CPU (bar 10,000)", f"{len(records) / cpu_s:,.0f}")
        show("4-token requests/s achieved, 64 slots", f"{len(records) / records.workers[0]['wall_s']:,.0f}")
        cpu_s, records = ours(port, 500, 64, seconds)
        show("tokens/s of a core, whole answers at once, by CPU", f"{tokens_of(records) / cpu_s:,.0f}")
    with stub(program, TTFT_US, ITL_US) as port:
        cpu_s, records = ours(port, TOKENS, streams * 4, seconds)
        show(f"tokens/s of a core, {streams * 4} streams, by CPU (bar 50,000)", f"{tokens_of(records) / cpu_s:,.0f}")
    with stub(program, TTFT_US, 100_000) as port:
        _, records = ours(port, 30, streams * 10, seconds)
        memory = records.workers[0]["rss_bytes"] / 1e6
        show(f"memory at {streams * 10} streams (bar 100 MB)", f"{memory:.0f} MB")


def truth(program: Path, seconds: float, streams: int) -> None:
    """Our stamp of each first token against the time inside it, at about 10,000 tokens/s."""
    path = Path(tempfile.mkdtemp()) / "errors"

    def read(payload: bytes, answer: Answer) -> int:
        """As ever, and the row's `input` is the true time of the first token."""
        truth_ns = answer.input_tokens
        kind = read_openai_event(payload, answer)
        if kind and truth_ns == -1:
            at = payload.index(b'"content":" t') + 13
            truth_ns = int(payload[at : at + 19])
        answer.input_tokens = truth_ns
        return kind

    with stub(program, TTFT_US, ITL_US) as port:
        made = share_of(port, TOKENS, slots=streams, slots_in_all=streams, until_ns=int(seconds * 1e9))
        made = replace(made, api=replace(made.api, read_event=read), connections=streams)
        pid = os.fork()
        if pid == 0:
            from agent.loadgen.engine import Engine

            os.sched_setaffinity(0, {CPUS[0]})
            one = Engine(made)
            one.open_connections()
            start = time.monotonic_ns()
            records = one.run(start)
            errors = [first + start - sent for first, sent in records.columns("first", "input") if first >= 0]
            path.write_text(json.dumps(errors))
            os._exit(0)
        os.waitpid(pid, 0)
    errors = sorted(abs(error) / 1e6 for error in json.loads(path.read_text()))
    show(
        f"TTFT error at {streams} streams, p50 / p99 (bars 0.5 / 5 ms)",
        f"{errors[len(errors) // 2]:.3f} / {errors[int(len(errors) * 0.99)]:.3f} ms  ({len(errors)} requests)",
    )


def pacing(program: Path, seconds: float) -> None:
    """Lateness at 1,000 requests/s, and whether the rate was kept."""
    drawn = schedule.draw(schedule.Flat(1_000.0), seed=1, duration_s=seconds)
    with stub(program, 5_000, 1_000) as port:
        made = share_of(port, 4, indices=range(len(drawn.times_ns)), times_ns=drawn.times_ns, connections=64)
        records = run([made]).records
    late = sorted(acted - due for due, acted in records.columns("scheduled", "acted"))
    show(
        "lateness at 1,000 requests/s, p50 / p99 (bars 0.1 / 2 ms)",
        f"{late[len(late) // 2] / 1e6:.3f} / {late[int(len(late) * 0.99)] / 1e6:.3f} ms",
    )
    in_time = sum(acted < seconds * 1e9 for acted in records.column("acted"))
    show("sent within the time, of those due", f"{in_time / len(drawn.times_ns):.2%}")


def show(name: str, value: str) -> None:
    """A line of the table."""
    print(f"{name:<58} {value}", flush=True)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--small", action="store_true", help="the smallest sizes: that it runs")
    given = parser.parse_args()
    if given.small:
        given.rounds, given.streams, given.seconds = 1, 10, 0.3
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "token_stub"
        subprocess.run(["gcc", "-O2", "-o", program, STUB], check=True, timeout=60)
        os.sched_setaffinity(0, {CPUS[0]})
        show("machine", f"{len(CPUS)} cores, Python {sys.version.split()[0]}, load average {_load()}")
        steps: list[Callable[[], None]] = [
            lambda: paired(program, given.rounds, given.streams, given.seconds),
            lambda: truth(program, given.seconds, given.streams),
            lambda: pacing(program, given.seconds),
            lambda: limits(program, given.seconds, given.streams),
        ]
        for step in steps:
            step()
        show("load average at the end", _load())


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


if __name__ == "__main__":
    main()
