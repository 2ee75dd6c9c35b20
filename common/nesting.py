"""How deep plain data is nested. What is too deep for one reader's stack must not be kept for all readers."""

from __future__ import annotations

from typing import Any

import msgspec


def is_deeper(value: Any, limit: int) -> bool:
    """Whether dicts, lists and Structs stand in each other more than `limit` levels deep. Needs no stack."""
    level: list[Any] = [value]
    for _ in range(limit + 1):
        level = [inner for outer in level for inner in _parts(outer)]
        if not level:
            return False
    return True


def _parts(value: Any) -> list[Any]:
    """The containers right inside a value; a scalar has none."""
    if isinstance(value, dict):
        return [part for part in value.values() if isinstance(part, _CONTAINERS)]
    if isinstance(value, list | tuple):
        return [part for part in value if isinstance(part, _CONTAINERS)]
    if isinstance(value, msgspec.Struct):
        parts = (getattr(value, name) for name in value.__struct_fields__)
        return [part for part in parts if isinstance(part, _CONTAINERS)]
    return []


_CONTAINERS = (dict, list, tuple, msgspec.Struct)
