"""What the parts of the head's shell share: one object, made by `head/daemon.py`, handed to the API and the gateway.

Readers call `await context.driver.durable()` before they render from `context.driver.state`, so that no answer
shows what a crash could take back. Writers `await context.driver.submit(event)`, which returns the Reply once the
records are on the disk and raises a HerderError otherwise. Ids and random bits come from `context.ids`, time from
`context.clock`; nothing else in the shell draws either.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from common import ids
from common.clock import Clock

if TYPE_CHECKING:
    from head.bench.performer import Performer
    from head.config import HeadConfig
    from head.driver import Driver
    from head.feed import Feed
    from head.journal import Journal
    from head.metrics import Metrics
    from head.sessions import Sessions


class IdSource(Protocol):
    """What draws ids and secrets; tests give one that counts."""

    def fresh(self, prefix: str) -> str:
        """A new id, as `job-3f9a1c7e20b4`."""
        ...

    def secret(self) -> str:
        """256 random bits as 64 hex digits."""
        ...

    def uniform(self, low: int, high: int) -> int:
        """A number in [low, high], for jitter."""
        ...


class RandomIds:
    """The id source of a running daemon."""

    def fresh(self, prefix: str) -> str:
        return ids.new_id(prefix)

    def secret(self) -> str:
        return secrets.token_hex(32)

    def uniform(self, low: int, high: int) -> int:
        return low + secrets.randbelow(high - low + 1)


@dataclass(slots=True)
class HeadContext:
    """The head's shell. `gateway_routes` adds the gateway's routes to the app; None: no gateway.

    `recipe_paths` and `benchmark_paths` tell where each recipe in `driver.state` was read, relative to the recipes
    folder.
    """

    driver: Driver
    config: HeadConfig
    sessions: Sessions
    journal: Journal
    feed: Feed
    metrics: Metrics
    clock: Clock
    ids: IdSource
    version: str
    recipe_paths: dict[str, str] = field(default_factory=dict)
    gateway_routes: Callable[[web.Application], None] | None = None
    benchmarks: Performer | None = None  # None: this head keeps no results
    benchmark_paths: dict[str, str] = field(default_factory=dict)
