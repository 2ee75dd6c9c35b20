"""Asking engines directly: before one on a suspect node gets a request, and after one failed until it is well.

What a probe finds goes to the core as `ReplicaProbed`: from then on the core counts the replica out, or in again.
An engine that was counted out is asked again, less and less often, until it answers or is another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from common import backoff, limits
from common.tasks import Supervisor
from common.wire import HealthSpec
from head.core.events import Event, ReplicaProbed
from head.core.service_views import Route
from head.core.state import State
from head.gateway.http1 import Head
from head.gateway.upstream import Pool

FRESH_S = 1.0  # a good probe counts for so long
AGAIN_BASE_MS = 500
AGAIN_CAP_MS = 5_000
WATCHED = 1_000  # replicas asked again at a time


class Core(Protocol):
    """What a prober needs of the driver."""

    @property
    def state(self) -> State:
        """The state, to read."""
        ...

    def post(self, event: Event) -> None:
        """Hands an event in."""
        ...


class _Answer:
    """A sink that wants the status only."""

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_head(self, head: Head) -> None:
        self._settle(head.status)

    def on_data(self, payload: bytes) -> None:
        """The body says nothing that the status does not."""

    def on_end(self) -> None:
        """The status has been taken."""

    def on_failure(self, reason: str) -> None:
        self._settle(0)

    def _settle(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)


class Prober:
    """Asks engines and tells the core. `uniform(low, high)` draws jitter."""

    def __init__(self, core: Core, pool: Pool, uniform: Callable[[int, int], int]) -> None:
        self._core = core
        self._pool = pool
        self._uniform = uniform
        self._well_until: dict[tuple[str, int], float] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[bool]] = {}
        self._watched: set[tuple[str, int]] = set()
        self._tasks = Supervisor("gateway")

    async def is_healthy(self, route: Route) -> bool:
        """Whether the engine answers now; callers at the same time share one probe."""
        key = (route.replica, route.generation)
        if self._well_until.get(key, 0.0) > asyncio.get_running_loop().time():
            return True
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = self._tasks.start(f"probe-{route.replica}", self._ask(route))
        return await asyncio.shield(task)

    def failed(self, route: Route) -> None:
        """A request could not reach the engine: it is counted out until it answers."""
        self._core.post(ReplicaProbed(route.replica, route.generation, is_healthy=False))
        self._watch(route)

    def doubt(self, route: Route) -> None:
        """An answer broke off: the engine is asked whether it still is there."""
        key = (route.replica, route.generation)
        self._well_until.pop(key, None)
        if key not in self._asking and key not in self._watched:
            self._asking[key] = self._tasks.start(f"probe-{route.replica}", self._ask(route))

    async def close(self) -> None:
        """Ends all probes."""
        await self._tasks.close()

    async def _ask(self, route: Route) -> bool:
        key = (route.replica, route.generation)
        try:
            is_healthy = await self._probe(route)
            now = asyncio.get_running_loop().time()
            if is_healthy:
                for old in [old for old, until in self._well_until.items() if until <= now]:
                    del self._well_until[old]
                self._well_until[key] = now + FRESH_S
            self._core.post(ReplicaProbed(route.replica, route.generation, is_healthy=is_healthy))
            if not is_healthy:
                self._watch(route)
            return is_healthy
        finally:
            self._asking.pop(key, None)

    def _watch(self, route: Route) -> None:
        key = (route.replica, route.generation)
        if key not in self._watched and len(self._watched) < WATCHED:
            self._watched.add(key)
            self._tasks.start(f"watch-{route.replica}", self._until_well(route))

    async def _until_well(self, route: Route) -> None:
        key = (route.replica, route.generation)
        attempt = 0
        try:
            while True:
                attempt += 1
                ceiling = backoff.ceiling_ms(attempt, base_ms=AGAIN_BASE_MS, cap_ms=AGAIN_CAP_MS)
                await asyncio.sleep(self._uniform(ceiling // 2, ceiling) / 1000)
                replica = self._core.state.replicas.get(route.replica)
                if replica is None or replica.generation != route.generation or replica.state != "ready":
                    return
                if await self._probe(route):
                    self._core.post(ReplicaProbed(route.replica, route.generation, is_healthy=True))
                    return
        finally:
            self._watched.discard(key)

    async def _probe(self, route: Route) -> bool:
        """One question, by the recipe's health path; without a path the open port is the answer."""
        health = health_of(self._core.state, route)
        try:
            async with asyncio.timeout(min(health.timeout_s, limits.PROBE_TIMEOUT_S)):
                connection = await self._pool.acquire((route.host, route.port), is_fresh=True)
                try:
                    if not health.path:
                        return True
                    answer = _Answer()
                    connection.send(answer, _question(route, health.path), b"")
                    return 200 <= await answer.status < 300
                finally:
                    connection.abort()
        except OSError:  # TimeoutError is one
            return False


def health_of(state: State, route: Route) -> HealthSpec:
    """How this engine is asked, as its service's recipe says."""
    service = state.services.get(route.service)
    recipe = state.recipes.get(service.recipe) if service is not None else None
    return recipe.health.to_wire() if recipe is not None else HealthSpec(path="")


def _question(route: Route, path: str) -> bytes:
    host = f"[{route.host}]" if ":" in route.host else route.host
    key = f"Authorization: Bearer {route.api_key}\r\n" if route.api_key else ""
    return f"GET {path} HTTP/1.1\r\nHost: {host}:{route.port}\r\n{key}Connection: close\r\n\r\n".encode()
