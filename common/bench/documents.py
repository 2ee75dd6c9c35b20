"""A benchmark's document: one changed by another, and what no document may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 20
ALTERNATIVES = {"server": ("service", "serve", "urls"), "load": ("rate", "concurrency", "steps", "trace")}
"""Of each group a recipe has one: the change's takes the place of the other's."""
WHOLE = frozenset({"sweep", "search", "slo"})
"""What a change says of these replaces all that was there."""


def changed(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the changes in their places; a null takes a value away.

    A change within a group that is there already (`server.serve.model`) keeps the rest of it; one of another group
    (`server.urls`) takes its place.
    """
    made = dict(document)
    for part, names in ALTERNATIVES.items():
        there, said = made.get(part), changes.get(part)
        if isinstance(there, Mapping) and isinstance(said, Mapping) and any(said.get(name) for name in names):
            made[part] = {name: value for name, value in there.items() if name not in names or said.get(name)}
    for name, value in changes.items():
        there = made.get(name)
        if value is None:
            made.pop(name, None)
        elif isinstance(there, Mapping) and isinstance(value, Mapping) and name not in WHOLE:
            made[name] = changed(there, value)
        else:
            made[name] = value
    return made


def endless(value: Any, place: str = "", depth: int = 0) -> str | None:
    """Where a number is infinite or none (`load.steps.1`), which JSON cannot say; None when all are finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return place or "a value"
    if depth < MAX_DEPTH and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in items:
            if (found := endless(one, f"{place}.{name}" if place else str(name), depth + 1)) is not None:
                return found
    return None
