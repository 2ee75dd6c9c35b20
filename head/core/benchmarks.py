"""Benchmarks: what people ask of them, and how one goes on from state to state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from head.core.events import Event
from head.core.turn import Turn

HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {}


def reconcile(turn: Turn, key: str) -> None:
    """Brings a benchmark forward."""
