"""Health checks: one question to a node about a replica or a URL, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import wire
from head.core.events import Event
from head.core.turn import Turn

HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {}


def on_result(turn: Turn, node_id: str, result: wire.Result) -> None:
    """Takes in the answer to a "check:<id>" command; unknown and repeated ones are ignored. The caller acknowledges."""


def on_tick(turn: Turn) -> None:
    """Once a second: checks that nobody answered in time have failed."""


def reconcile(turn: Turn, key: str) -> None:
    """Sends the question when it is due."""
