"""Jobs: durable graphs of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from head.core.events import Event
from head.core.turn import Turn

HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {}


def reconcile(turn: Turn, key: str) -> None:
    """Brings a job forward: looks at running steps, skips what cannot run, starts what can."""


def on_tick(turn: Turn) -> None:
    """Once a second: retries and timeouts that are due, and ended jobs beyond JOBS_KEPT."""
