"""The gateway on a loopback socket, behind the API's own middleware, with a state that the test fills.

The driver is a small one: it holds the state, remembers what was posted, and takes probes in as the core does.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
from aiohttp import web

from common.clock import ManualClock
from common.recipe import Health, Recipe
from common.wire import Inventory
from head.api import middleware
from head.api.audit import AuditLog
from head.auth import new_token
from head.config import GatewayConfig, HeadConfig
from head.context import HeadContext, RandomIds
from head.core.events import Event, ReplicaProbed
from head.core.objects import ApiKey, Model, Node, Object, Replica, Service
from head.core.records import Record
from head.core.state import Live, State, apply
from head.driver import Drainer
from head.gateway.app import attach
from head.metrics import Metrics

NOW_MS = 1_700_000_000_000
ENGINE_KEY = "engine-key-0123456789abcdef"
MODEL = "acme/tiny-chat"
ROLES = ("admin", "operator", "viewer", "agent", "inference")
QUICK = GatewayConfig(connect_timeout_s=2.0, first_byte_timeout_s=30.0, idle_timeout_s=30.0)


class SmallDriver:
    """State and a list of what was posted."""

    def __init__(self) -> None:
        self.state = State()
        self.posted: list[Event] = []
        self.drainer: Drainer | None = None

    def post(self, event: Event) -> None:
        """Remembers, and counts engines out and in."""
        self.posted.append(event)
        if isinstance(event, ReplicaProbed):
            if event.is_healthy:
                self.state.unwell.pop(event.replica, None)
            else:
                self.state.unwell[event.replica] = event.generation

    async def durable(self) -> None:
        """Everything always is."""

    def put(self, thing: Object) -> None:
        """Puts an object as a record does."""
        apply(self.state, Record(self.state.revision + 1, NOW_MS, "put", "test", thing.KIND, thing.key, thing))


class GatewayHead:
    """The running gateway and a client."""

    def __init__(self, driver: SmallDriver, context: HeadContext) -> None:
        self.driver = driver
        self.context = context
        self.port = 0
        self.tokens = {}
        for role in ROLES:
            token, digest = new_token(role, f"k-{role}", "s" * 40)
            self.tokens[role] = token
            driver.put(ApiKey(f"k-{role}", role, role, digest, NOW_MS))

    @property
    def state(self) -> State:
        """The head's state."""
        return self.driver.state

    @property
    def url(self) -> str:
        """Where the gateway listens."""
        return f"http://127.0.0.1:{self.port}"

    def headers(self, role: str = "inference") -> dict[str, str]:
        """A client's headers."""
        return {"Authorization": f"Bearer {self.tokens[role]}"}

    def add_model(self, name: str = MODEL) -> None:
        """A registered model."""
        self.driver.put(Model(name, "llm", "main", NOW_MS, NOW_MS))

    def add_service(self, name: str = "chat", *, model: str = MODEL, recipe: str = "llamacpp") -> None:
        """A service with no replica yet."""
        self.state.recipes.setdefault(
            recipe, Recipe(name=recipe, category="inference", runtime="command", health=Health(path="/health"))
        )
        self.driver.put(Service(name, model, "main", recipe, 1, 1, "hash", NOW_MS, "test"))

    def add_replica(
        self, port: int, *, slot: int = 0, service: str = "chat", model: str = MODEL, **changes: Any
    ) -> str:
        """A ready replica on a node of its own, at a port of this machine; returns its id."""
        node = f"n{slot}"
        if node not in self.state.nodes:
            inventory = Inventory(hostname=node)
            self.driver.put(Node(node, "boot", "agent", "1", inventory, NOW_MS, "online", NOW_MS, 1))
            self.state.live[node] = Live(session_id=f"session-{node}", last_seen_ms=NOW_MS)
        if model and model not in self.state.models:
            self.add_model(model)
        if service not in self.state.services:
            self.add_service(service, model=model)
        replica = Replica(
            id=f"{service}-{slot}",
            service=service,
            slot=slot,
            model=model,
            revision="main",
            node=node,
            device=f"{node}:dram",
            generation=1,
            desired="running",
            state="ready",
            cause="test",
            created_ms=NOW_MS,
            host="127.0.0.1",
            port=port,
            api_key=ENGINE_KEY,
        )
        self.driver.put(msgspec.structs.replace(replica, **changes))
        return replica.id

    def posted(self, kind: type[Event]) -> list[Any]:
        """The posted events of a kind."""
        return [event for event in self.driver.posted if isinstance(event, kind)]


@asynccontextmanager
async def running(
    folder: Path, settings: GatewayConfig = QUICK, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[GatewayHead]:
    """The gateway until the block ends."""
    driver = SmallDriver()
    context = HeadContext(
        driver=cast(Any, driver),
        config=HeadConfig(gateway=settings),
        sessions=cast(Any, None),
        journal=cast(Any, None),
        feed=cast(Any, None),
        metrics=Metrics("test"),
        clock=ManualClock(NOW_MS),
        ids=RandomIds(),
        version="test",
    )
    head = GatewayHead(driver, context)
    audit = AuditLog(folder / "audit.log")
    audit.start()
    app = web.Application(
        middlewares=[middleware.around(context, audit)], handler_args={"access_log": None, "auto_decompress": False}
    )
    app.on_response_prepare.append(middleware.add_headers)
    attach(app, context)
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls)
    await site.start()
    head.port = runner.addresses[0][1]
    try:
        yield head
    finally:
        await runner.cleanup()
        audit.close()


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is of bytes and lists, which tell nobody
            await asyncio.sleep(0.005)
