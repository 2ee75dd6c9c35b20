"""How many connections the head's door holds: in all, and from one address.

Every connection costs a descriptor and some memory, before anybody has shown a token. By default two thirds of the
process's descriptors may be connections (those of the gateway to engines, and the journal's files, need the rest),
and half of them may come from one address, so that one machine cannot shut the others out. Connections from this
machine itself are counted in all only: proxies, the command line and tests stand there.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, cast

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.clock import boottime_ms
from common.errors import TooMany
from common.telemetry import fields
from head.addresses import network
from head.api.call import error_body
from head.config import DoorConfig

log = logging.getLogger(__name__)
DESCRIPTORS_KEPT = 64  # files, pipes and the listening socket
TOLD_EVERY_MS = 60_000
RETRY_S = 5


class Crowd(Collector):
    """Who is inside. `enter` and `leave` frame the life of every connection that was let in."""

    def __init__(self, settings: DoorConfig, *, descriptors: int | None = None) -> None:
        if descriptors is None:
            descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max = settings.connections_max or max(16, (descriptors - DESCRIPTORS_KEPT) * 2 // 3)
        self.per_address_max = min(settings.connections_per_address_max or self.max // 2, self.max)
        self.count = 0
        self.refused: Counter[str] = Counter()  # by limit: total, address
        self._by_network: Counter[str] = Counter()
        self._told_ms = -TOLD_EVERY_MS

    def enter(self, address: str) -> bool:
        """Lets a connection in, or not."""
        place = "" if _is_local(address) else network(address)
        if self.count >= self.max:
            self._refuse("total", place)
            return False
        if place and self._by_network[place] >= self.per_address_max:
            self._refuse("address", place)
            return False
        self.count += 1
        if place:
            self._by_network[place] += 1
        return True

    def leave(self, address: str) -> None:
        """One that was let in has gone."""
        self.count -= 1
        if not _is_local(address):
            place = network(address)
            self._by_network[place] -= 1
            if not self._by_network[place]:
                del self._by_network[place]

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("herder_http_connections", "Connections that are open.", value=self.count)
        refused = CounterMetricFamily(
            "herder_http_connections_refused", "Connections that were refused.", labels=("limit",)
        )
        for limit in ("address", "total"):
            refused.add_metric((limit,), self.refused[limit])
        yield refused

    def _refuse(self, limit: str, place: str) -> None:
        self.refused[limit] += 1
        now_ms = boottime_ms()
        if now_ms - self._told_ms >= TOLD_EVERY_MS:
            self._told_ms = now_ms
            log.warning(
                "connections are refused", extra=fields(limit=limit, address=place, open=self.count, max=self.max)
            )


class Guest(web.RequestHandler):
    """A connection that has to be let in before it costs anything."""

    __slots__ = ("_address", "_crowd")

    def __init__(self, server: web.Server, crowd: Crowd, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._crowd = crowd
        self._address: str | None = None  # None: not inside

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        if self._crowd.enter(address):
            self._address = address
            super().connection_made(transport)
            return
        self.force_close()
        refused = cast(asyncio.Transport, transport)
        refused.write(REFUSAL)
        refused.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._address is not None:
            self._crowd.leave(self._address)
            self._address = None
            super().connection_lost(exc)


class GuestServer(web.Server):
    """aiohttp's server, whose connections are counted."""

    crowd: Crowd

    @classmethod
    def around(cls, server: web.Server, crowd: Crowd) -> GuestServer:
        """The same server with a door."""
        made = cls(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=server._loop,
            **server._kwargs,
        )
        made.crowd = crowd
        return made

    def __call__(self) -> web.RequestHandler:
        return Guest(self, self.crowd, loop=self._loop, **self._kwargs)


class GuestRunner(web.AppRunner):
    """aiohttp's runner with a server that counts."""

    def __init__(self, app: web.Application, crowd: Crowd, **settings: Any) -> None:
        super().__init__(app, **settings)
        self._crowd = crowd

    async def _make_server(self) -> web.Server:
        return GuestServer.around(await super()._make_server(), self._crowd)


def _is_local(address: str) -> bool:
    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refusal() -> bytes:
    body = error_body(TooMany("the head has too many connections", hint="try again in a moment", retry_after_s=RETRY_S))
    return (
        b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Retry-After: %d\r\nContent-Length: %d\r\n\r\n%b" % (RETRY_S, len(body), body)
    )


REFUSAL = _refusal()
