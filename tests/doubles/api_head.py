"""A head for tests of the API: the real journal, driver, core, sessions and application on a loopback socket.

Jobs can be made without nodes (`scripted_step` takes them as they come and does nothing with them), and any object
can be put through the journal with `Put`, so that a test decides when a job ends or a service is ready.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from common import wire
from common.clock import SystemClock
from common.errors import IdempotencyMismatch
from common.recipe import load_recipes
from head.api.app import SHARED, build_app
from head.api.call import Shared
from head.auth import new_token
from head.bench.performer import Performer
from head.bench.store import Store
from head.config import HeadConfig
from head.context import HeadContext, RandomIds
from head.core import events as ev
from head.core import idempotency
from head.core.objects import ApiKey, Job, Node, Object
from head.core.objects import Step as JobStep
from head.core.state import Live, State
from head.core.step import step
from head.core.turn import Turn
from head.daemon import read_benchmark_recipes
from head.driver import Driver
from head.feed import Feed
from head.journal import Journal
from head.metrics import Metrics
from head.pipeline import Step
from head.sessions import Sessions

ROLES = ("admin", "operator", "viewer", "agent", "inference")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class Put(ev.Event, frozen=True):
    """A test puts an object, or deletes it."""

    thing: Object
    what: str
    is_gone: bool = False


def scripted_step(state: State, event: ev.Event, now_ms: int) -> Turn:
    """The real core, except that jobs are taken without a plan and that tests may put what they like."""
    turn = Turn(state, now_ms, cause=getattr(event, "request_id", "") or "test")
    match event:
        case ev.CreateJobRequested():
            try:
                if not idempotency.replayed(turn, event):
                    turn.put(_job(event, now_ms), "job_created")
                    idempotency.answer(turn, event, f"job:{event.fresh_id}")
            except IdempotencyMismatch as error:
                turn.rollback()
                turn.refuse(event, error)
        case ev.CancelJobRequested():
            job = state.jobs[event.job]
            turn.put(msgspec.structs.replace(job, state="cancelled", ended_ms=now_ms), "job_cancelled")
            turn.reply(event, reference=f"job:{event.job}")
        case _:
            return real_step(state, event, now_ms)
    return turn


def real_step(state: State, event: ev.Event, now_ms: int) -> Turn:
    """The real core; only `Put` is added."""
    if not isinstance(event, Put):
        return step(state, event, now_ms)
    turn = Turn(state, now_ms, cause="test")
    if event.is_gone:
        turn.delete(event.thing.KIND, event.thing.key, event.what)
    else:
        turn.put(event.thing, event.what)
    return turn


def _job(event: ev.CreateJobRequested, now_ms: int) -> Job:
    steps = tuple(
        JobStep(
            id=action.action_id or str(number),
            action=action.action_type or action.action or "",
            model=action.model_name or action.model or "",
            source_device=action.from_ or "",
            target_device=action.to or action.device or (action.devices[-1] if action.devices else ""),
            port=action.port,
            config=action.config,
            keep_source=bool(action.keep_source),
        )
        for number, action in enumerate(event.body.actions, 1)
    )
    return Job(event.fresh_id, event.body.name, event.actor, "pending", now_ms, steps, priority=event.body.priority)


def node(name: str, *, gpus: int = 0, **changes: Any) -> Node:
    """A node as its agent describes it."""
    cards = tuple(wire.Gpu(number, f"GPU-{number}", "H100", 80 << 30, "9.0") for number in range(gpus))
    inventory = wire.Inventory(
        hostname=name, disk_budget_bytes=1 << 40, dram_budget_bytes=1 << 36, gpus=cards, gpu_reason="" if gpus else "no"
    )
    made = Node(name, "boot", "agent", "1.0", inventory, 1, "online", 1, 1, advertise="10.0.0.1", http_port=8471)
    return msgspec.structs.replace(made, **changes)


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        """The body as data."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error answer."""
        code: str = self.json["error"]["code"]
        return code


class ApiHead:
    """The running head and a client."""

    def __init__(self, context: HeadContext, http: aiohttp.ClientSession, url: str, shared: Shared) -> None:
        self.context = context
        self.http = http
        self.url = url
        self.tokens: dict[str, str] = {}
        self.waiters = shared.waiters
        self.audit = shared.audit

    @property
    def state(self) -> State:
        """The head's state."""
        return self.context.driver.state

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        role: str | None = "admin",
        headers: dict[str, str] | None = None,
        raw: Any = None,
    ) -> Answer:
        """One request; `body` is sent as JSON, `raw` as it is. Paths without '/api' are below /api/v1."""
        from yarl import URL

        sent = dict(headers or {})
        if role is not None:
            sent.setdefault("Authorization", f"Bearer {self.tokens[role]}")
        data = raw
        if body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        prefix = "" if path.startswith(("/api", "/docs", "/metrics", "/healthz", "/v1")) or path == "/" else "/api/v1"
        address = URL(f"{self.url}{prefix}{path}", encoded=True)
        async with self.http.request(method, address, data=data, headers=sent) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def put(self, *things: Object, what: str = "put") -> None:
        """Puts objects through the journal."""
        for thing in things:
            self.context.driver.post(Put(thing, what))
        await self.context.driver.settled()

    async def delete(self, thing: Object, what: str = "deleted") -> None:
        """Deletes an object through the journal."""
        self.context.driver.post(Put(thing, what, is_gone=True))
        await self.context.driver.settled()

    def connect(self, node_id: str, telemetry: wire.Telemetry | None = None) -> None:
        """Makes a node look connected."""
        now_ms = self.context.clock.now_ms()
        self.state.live[node_id] = Live("session", now_ms + 3_600_000, now_ms, readings=telemetry)


@asynccontextmanager
async def api_head(
    tmp_path: Path, *, step: Step = scripted_step, journal: Any = None, **settings: Any
) -> AsyncIterator[ApiHead]:
    """A head that listens on a free port of the loopback address, with a key of every role."""
    config = HeadConfig(state_dir=str(tmp_path), **settings)
    opened = journal or Journal.open(tmp_path / "journal.sqlite")
    state = State() if journal else opened.load()
    clock, feed, ids, metrics = SystemClock(getattr(opened, "stamp_ms", 0)), Feed(), RandomIds(), Metrics("9.9")
    feed.prime([], is_complete=True)
    driver = Driver(state, opened, clock, feed, step=step)
    sessions = Sessions(driver, clock, ids)
    metrics.attach(driver, opened, sessions, feed)
    loaded = load_recipes(RECIPES)
    paths = {name: path for name, (_, path) in loaded.items()}
    performer = driver.performer = Performer(driver, sessions, Store(tmp_path))
    benchmarks, places = read_benchmark_recipes(config)
    context = HeadContext(
        driver, config, sessions, opened, feed, metrics, clock, ids, "9.9", paths,
        benchmarks=performer, benchmark_paths=places,
    )  # fmt: skip
    await performer.start()
    driver.start(sessions, with_ticks=False)
    recipes = {name: recipe for name, (recipe, _) in loaded.items()}
    driver.post(ev.HeadStarted("cluster-1", b"k" * 32, recipes, benchmark_recipes=benchmarks, version="9.9"))
    app = build_app(context)
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
        head = ApiHead(context, http, f"http://127.0.0.1:{port}", app[SHARED])
        for role in ROLES:
            token, digest = new_token(role, f"key-{role}", "s" * 43 + role)
            head.tokens[role] = token
            driver.post(Put(ApiKey(f"key-{role}", role, role, digest, 1), "key_created"))
        await driver.settled()
        try:
            yield head
        finally:
            feed.close()
            await runner.cleanup()
            await performer.close()
            await driver.stop()
            if journal is None:
                opened.close()


def run(test: Callable[[], Awaitable[None]], timeout_s: float = 60.0) -> None:
    """Runs a test's coroutine on a fresh loop of the kind that the daemon runs on, with a limit."""

    async def limited() -> None:
        async with asyncio.timeout(timeout_s):
            await test()

    uvloop.run(limited())


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits for a condition that no event tells of."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the conditions of tests have no event
            await asyncio.sleep(0.005)
