"""In-process parts of benchmarks.control_plane: a real driver over a real journal, without HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from benchmarks import swarm
from common import limits, wire
from common.clock import SystemClock, boottime_ms
from common.errors import ErrorInfo
from common.recipe import load_recipes
from common.wire import Message
from head.core import events as ev
from head.core.objects import Job, Node, Object, Step
from head.core.records import Record
from head.driver import Driver
from head.feed import Feed
from head.journal import Journal, Row, encode
from head.journal_schema import FILE_NAME
from herder import types as api

RECIPES = {name: recipe for name, (recipe, _) in load_recipes(Path(__file__).resolve().parents[1] / "recipes").items()}


class Nowhere:
    """Takes what would go to agents, and counts commands."""

    def __init__(self) -> None:
        self.commands = 0

    def send(self, session_id: str, message: Message) -> None:
        """Counts a command."""
        self.commands += isinstance(message, wire.Command)

    def close_session(self, session_id: str, error: ErrorInfo | None) -> None:
        """A session that the head will not have fails the benchmark."""
        raise RuntimeError(f"the head closed {session_id}: {error}")


def measure(state_dir: Path, *, nodes: int, count: int, concurrency: int) -> tuple[float, float, int]:
    """Creates `count` one-replica services from `concurrency` callers: placements per second, p99 of the answer in
    milliseconds, and the commands that left."""
    state_dir.mkdir(parents=True, exist_ok=True)
    return uvloop.run(_measure(state_dir, nodes, count, concurrency))


async def _measure(state_dir: Path, nodes: int, count: int, concurrency: int) -> tuple[float, float, int]:
    journal = Journal.open(state_dir / FILE_NAME)
    driver = Driver(journal.load(), journal, SystemClock(), Feed())
    outlet = Nowhere()
    driver.start(outlet)
    driver.post(ev.HeadStarted("bench", bytes(32), RECIPES))
    for index in range(nodes):
        hello = wire.Hello(
            limits.PROTOCOL_MIN,
            limits.PROTOCOL,
            f"n{index}",
            f"boot-{index}",
            f"agent-{index}",
            "0",
            swarm.inventory(index),
            advertise="127.0.0.1",
        )
        driver.post(ev.AgentSaidHello(f"s{index}", hello, "127.0.0.1"))
        driver.post(ev.AgentReported(f"n{index}", f"s{index}", wire.Report(1)))
        if index % 100 == 0:
            await driver.settled()
    register = api.RegisterModel("bench/model", sources=("https://127.0.0.1/model.gguf",))
    await driver.submit(ev.RegisterModelRequested(request_id="model", actor="bench", body=register))
    await driver.settled()
    outlet.commands = 0
    names = iter(range(count))
    waits: list[float] = []

    async def caller() -> None:
        for number in names:
            body = api.CreateService(
                f"svc-{number}", "bench/model", recipe="llamacpp", config={"context": 1024, "gpu_layers": 99}
            )
            begun = time.perf_counter()
            await driver.submit(
                ev.CreateServiceRequested(request_id=f"r{number}", actor="bench", body=body, api_key=f"k{number}")
            )
            waits.append(time.perf_counter() - begun)

    renewing = asyncio.create_task(_renew(driver, nodes))
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(caller())
    await driver.settled()
    taken_s = time.perf_counter() - begun
    renewing.cancel()
    placed = len(driver.state.replicas)
    if placed != count:
        raise RuntimeError(f"only {placed} of {count} services were placed")
    await driver.stop()
    journal.close()
    waits.sort()
    return count / taken_s, 1000 * waits[int(0.99 * (len(waits) - 1))], outlet.commands


async def _renew(driver: Driver, nodes: int) -> None:
    """Keeps the nodes' leases, as their agents would."""
    while True:
        for index in range(nodes):
            driver.post(ev.LeaseRenewed(f"n{index}", f"s{index}", wire.Lease(2, boottime_ms())))
        await asyncio.sleep(limits.INTERVAL_FLOOR_MS / 1000)


def fill(state_dir: Path, *, nodes: int, jobs: int) -> None:
    """A journal as a busy cluster leaves it: nodes with their inventory, and ended jobs."""
    state_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(state_dir / FILE_NAME)
    asyncio.run(_fill(journal, nodes, jobs))
    journal.close()


async def _fill(journal: Journal, nodes: int, jobs: int) -> None:
    batch: list[Row] = []
    for thing in _objects(nodes, jobs):
        number = journal.revision + len(batch) + 1
        batch.append(encode(Record(number, 1_700_000_000_000, "filled", "bench", thing.KIND, thing.key, thing)))
        if len(batch) == limits.JOURNAL_BATCH_RECORDS:
            await journal.commit(batch)
            batch = []
    if batch:
        await journal.commit(batch)


def _objects(nodes: int, jobs: int) -> Iterator[Object]:
    at_ms = 1_700_000_000_000
    for index in range(nodes):
        inventory = swarm.inventory(index)
        yield Node(f"n{index}", f"boot-{index}", "agent", "0", inventory, at_ms, "online", at_ms, index + 1)
    for index in range(jobs):
        steps = _ended_steps(f"org/model-{index % 1000}", f"n{index % max(1, nodes)}", at_ms)
        yield Job(f"job-{index:012x}", "deploy", "bench", "completed", at_ms, steps, ended_ms=at_ms + 60_000)


def _ended_steps(model: str, node: str, at_ms: int) -> tuple[Step, ...]:
    """Three steps as a job leaves them: fetch, serve, look whether it is well."""
    results: tuple[tuple[str, str, dict[str, object]], ...] = (
        ("download", f"{node}:disk", {"bytes": 16_060_522_496, "device": f"{node}:disk"}),
        ("serve", f"{node}:gpu0", {"service": model.partition("/")[2], "url": f"http://{node}:20000"}),
        ("health_check", f"{node}:gpu0", {"status": 200}),
    )
    return tuple(
        Step(
            f"{number}-{action}",
            action,
            "completed",
            model=model,
            target_device=device,
            dependencies=(f"{number - 1}-{results[number - 2][0]}",) if number > 1 else (),
            attempts=1,
            started_ms=at_ms,
            ended_ms=at_ms + 20_000 * number,
            result=result,
        )
        for number, (action, device, result) in enumerate(results, 1)
    )
