"""`step(state, event, now_ms)`: the one door into the head's core. Total: only a bug of ours raises.

An event goes to the handler of its type (one module per resource registers its own below). Afterwards
everything that changed is reconciled until nothing changes: copies and replicas turn into commands, services into
replicas, jobs into steps. A handler that refuses raises a HerderError: its turn is taken back whole and the
request is answered with the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.errors import HerderError, Internal
from head.core import benchmark_runs, benchmarks, copies, health_checks, jobs, keys, models, nodes, services
from head.core.events import Event, RequestEvent
from head.core.state import State
from head.core.turn import Turn

Handler = Callable[[Turn, Any], None]
Reconciler = Callable[[Turn, str], None]

HANDLERS: dict[type[Event], Handler] = {
    **nodes.HANDLERS,
    **models.HANDLERS,
    **copies.HANDLERS,
    **services.HANDLERS,
    **jobs.HANDLERS,
    **health_checks.HANDLERS,
    **keys.HANDLERS,
    **benchmarks.HANDLERS,
}
RECONCILERS: dict[str, Reconciler] = {
    "node": nodes.reconcile,
    "model": models.reconcile,
    "copy": copies.reconcile,
    "service": services.reconcile_service,
    "replica": services.reconcile_replica,
    "job": jobs.reconcile,
    "check": health_checks.reconcile,
    "benchmark": benchmarks.reconcile,
    "point": benchmarks.reconcile_point,
    "run": benchmark_runs.reconcile,
}
REPEATS = 100  # reconciliations of one object in one turn; more would be a loop in our own rules


def step(state: State, event: Event, now_ms: int) -> Turn:
    """Handles one event; the returned turn holds records (already applied) and effects (not yet released)."""
    turn = Turn(state, now_ms, cause=_cause_of(event))
    try:
        HANDLERS[type(event)](turn, event)
        _settle(turn)
    except HerderError as error:
        turn.rollback()
        if isinstance(event, RequestEvent):
            turn.refuse(event, error)
    except Exception:
        turn.rollback()  # a bug of ours: the shell logs it and answers `internal`; the state stays whole
        raise
    return turn


def _settle(turn: Turn) -> None:
    rounds: dict[tuple[str, str], int] = {}
    while turn.touched:
        (kind, key), _ = next(iter(turn.touched.items()))
        del turn.touched[(kind, key)]
        reconciler = RECONCILERS.get(kind)
        if reconciler is not None:
            reconciler(turn, key)
        for job in tuple(turn.state.waiters.get(f"{kind}:{key}", ())):
            if job != key:
                turn.touch("job", job)
        rounds[(kind, key)] = rounds.get((kind, key), 0) + 1
        if rounds[(kind, key)] > REPEATS:
            raise Internal("reconciliation does not come to rest", kind=kind, key=key)


def _cause_of(event: Event) -> str:
    if isinstance(event, RequestEvent):
        return event.request_id
    return type(event).__name__
