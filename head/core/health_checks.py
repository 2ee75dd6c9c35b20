"""Health checks: one question to a node about a replica or a URL, and its answer.

A check is an object until whoever asked has read its outcome. It is never asked twice under one id: an answer that
does not come within its own timeout and CHECK_GRACE_MS counts as a failure that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from common import limits, wire
from common.errors import ErrorInfo, TimedOut, TooMany, Unhealthy
from head.core import commands
from head.core.events import Event
from head.core.objects import Check
from head.core.turn import Turn

HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {}
_KEPT_MS = 3_600_000  # an outcome that nobody read is forgotten after this


def ask(
    turn: Turn, check_id: str, node: str, *, cause: str, timeout_s: float, replica: str = "", url: str = ""
) -> Check:
    """Makes a check. Raises: TooMany."""
    if len(turn.state.checks) >= limits.CHECKS_LIVE:
        raise TooMany(f"{len(turn.state.checks)} health checks are waiting", limit=limits.CHECKS_LIVE)
    check = Check(
        id=check_id,
        node=node,
        generation=turn.next_generation(),
        cause=cause,
        asked_ms=turn.now_ms,
        replica=replica,
        url=url,
        timeout_s=timeout_s,
    )
    turn.put(check, "health_check_asked")
    return check


def on_result(turn: Turn, node_id: str, result: wire.Result) -> None:
    """Takes in the answer to a "check:<id>" command; unknown and repeated ones are ignored. The caller acknowledges."""
    kind, key = commands.split_op_id(result.op_id)
    check = turn.state.checks.get(key) if kind == commands.CHECK else None
    if check is None or check.node != node_id or check.generation != result.generation or check.outcome:
        return
    if result.outcome == "ok":
        _end(turn, check, None, result.detail)
    else:
        said = result.error.message if result.error is not None else "it did not answer well"
        asked = check.replica or check.url
        error = Unhealthy(f"{asked} is not healthy: {said}", node=node_id).info()
        _end(turn, check, error, result.detail)


def on_tick(turn: Turn) -> None:
    """Once a second: open questions go out again when due; those that nobody answered in time have failed."""
    for check in tuple(turn.state.checks.values()):
        age_ms = turn.now_ms - check.asked_ms
        if not check.outcome and age_ms > check.timeout_s * 1000 + limits.CHECK_GRACE_MS:
            _end(turn, check, TimedOut(f"{check.node} did not answer the health check", node=check.node).info(), {})
        elif check.outcome and age_ms > _KEPT_MS:
            turn.delete("check", check.id, "health_check_forgotten")
        elif not check.outcome:
            turn.touch("check", check.id)


def reconcile(turn: Turn, key: str) -> None:
    """Sends the question when it is due."""
    check = turn.state.checks.get(key)
    if check is None or check.outcome:
        return
    body = wire.CheckHealth(replica=check.replica, url=check.url, timeout_s=check.timeout_s)
    op = commands.op_id(commands.CHECK, check.id)
    commands.send_if_due(turn, check.node, op, check.generation, body, cause=check.cause)


def _end(turn: Turn, check: Check, error: ErrorInfo | None, detail: dict[str, Any]) -> None:
    ended = replace(check, outcome="failed" if error is not None else "ok", error=error, detail=detail)
    turn.put(ended, "health_check_failed" if error is not None else "health_check_passed")
