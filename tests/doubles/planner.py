"""The planner's endpoints, asked as a client does: JSON in, JSON out."""

from __future__ import annotations

from typing import Any

import msgspec

from head.planner.endpoints.base import ask
from head.planner.endpoints.questions import Desk
from head.planner.endpoints.table import BY_PATH


def raw(path: str, question: dict[str, Any], desk: Desk | None = None) -> bytes:
    """An answer's bytes."""
    return msgspec.json.encode(ask(BY_PATH[path], msgspec.json.encode(question), desk or Desk()))


def answer(path: str, **question: Any) -> dict[str, Any]:
    """An answer as it comes out of a client."""
    decoded = msgspec.json.decode(raw(path, question))
    assert isinstance(decoded, dict)
    return decoded
