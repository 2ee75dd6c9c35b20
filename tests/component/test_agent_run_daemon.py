"""Runs in a whole agent as a process: what it says to the head, what outlives it, and what `--release` ends."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

from agent import procs
from agent.runs.directory import RunDirectories
from common import wire
from common.bench.outcome import decode
from common.clock import boottime_ns
from tests.doubles.agent_daemon import Node, node
from tests.doubles.run_rig import RUN, Door
from tests.doubles.ws_head import until

OP = f"run:{RUN}"


def order(door: Door, **spec: Any) -> wire.EnsureRun:
    """Plain HTTP load."""
    plain = {"api": "http", "method": "GET", "arrivals": "constant", "rate": 50, "duration": 3.0}
    return wire.EnsureRun(RUN, "load", {**plain, **spec}, urls=(f"{door.url}/work",))


def status(made: Node) -> wire.RunStatus | None:
    """The run as last reported."""
    reports = made.head.of(wire.Report)
    return next((run for run in reports[-1].runs if run.run == RUN), None) if reports else None


async def fired(made: Node, door: Door, **spec: Any) -> None:
    """A run that is under way."""
    await made.head.command(order(door, **spec), 1, OP)
    await until(lambda: (run := status(made)) and run.state == "armed", "armed", timeout_s=30)
    fire = wire.FireRun(RUN, boottime_ns() + 500_000_000)
    await made.head.command(fire, 1, f"fire:{RUN}")
    await until(lambda: len(door.asked) > 5, "load")


def members(made: Node) -> list[int]:
    """Processes of the run."""
    mark = RunDirectories(made.root / "state" / "runs").mark(RUN)
    return [process.pid for process in procs.members(0, mark)]


async def test_agent_is_killed_in_the_middle(tmp_path: Path) -> None:
    """kill -9 to the agent does not touch the load; the next agent tells its seconds and sends what it measured."""
    with Door() as door:
        async with node(tmp_path) as made:
            process = await made.start()
            await made.connected(1)
            await fired(made, door)
            await until(lambda: made.head.of(wire.RunTick), "a second of the load")
            process.kill()
            await made.wait_ended(process)
            await made.start()
            await made.connected(2)
            result = await made.done(OP, 1)
            assert result.detail["artifacts"] == ["load.bin", "generator.log"]
            assert status(made) is not None
            _, outcome = decode(made.head.files[f"{RUN}/load.bin"])
            assert len(outcome.records) == len(door.asked) == 150
            assert {tick.run for tick in made.head.of(wire.RunTick)} == {RUN}


async def test_metrics_and_release(tmp_path: Path) -> None:
    """/metrics counts runs and load; `--release` ends a run that its agent left behind."""
    with Door() as door:
        async with node(tmp_path) as made:
            process = await made.start()
            hello = await made.connected(1)
            await fired(made, door, duration=60.0)
            await until(lambda: made.head.of(wire.RunTick), "a second of the load")
            url = f"http://127.0.0.1:{hello.http_port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: ASYNC210 - our own, on loopback
                text = answer.read().decode()
            assert 'herder_agent_runs{kind="load",state="running"} 1.0' in text
            sent = re.search(r"^herder_agent_load_requests_total (\S+)", text, re.MULTILINE)
            assert sent is not None
            assert float(sent[1]) > 0
            process.terminate()
            assert await made.wait_ended(process) == 0
            assert len(members(made)) == 2
            release = await made.spawn("--release", "--state-dir", str(tmp_path / "state"))
            said, _ = await release.communicate()
            assert RUN in said.decode()
            assert members(made) == []


async def test_clock_is_told_at_once(tmp_path: Path) -> None:
    """ClockAsk comes back with the agent's boot clock, between what the asker read before and after."""
    async with node(tmp_path) as made:
        await made.start()
        await made.connected(1)
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        await made.head.send(wire.ClockAsk(77))
        await until(lambda: made.head.of(wire.ClockTold), "the answer")
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        (told,) = made.head.of(wire.ClockTold)
        assert told.asked_ns == 77
        assert before < told.boottime_ns < after
