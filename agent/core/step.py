"""`step(state, event, now_ms)`: the one door into the agent's core. Total: it never raises.

After the handler, everything that was touched is reconciled until nothing changes, what changed is reported, and
the time of the next wake-up is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from agent.core import commands, copies, replicas, runs, session
from agent.core import events as ev
from agent.core.state import NEVER_MS, Moving, State
from agent.core.turn import Turn

MOVER_VERBS = frozenset({"fetch", "verify", "drop"})
HOLDER_VERBS = frozenset({"hold", "release"})
ROUNDS = 100_000  # reconciliations per turn; more would be a loop in our own rules


def step(state: State, event: ev.Event, now_ms: int) -> Turn:
    """Handles one event; the returned turn holds records (already applied) and effects (not yet released)."""
    turn = Turn(state, now_ms, cause=type(event).__name__)
    handler = _HANDLERS.get(type(event))
    if handler is None:
        state.unknown_events += 1
    else:
        handler(turn, event)
    copies.expire(turn)
    replicas.tick(turn)
    runs.tick(turn)
    _settle(turn)
    session.tell(turn)
    state.wake_ms = _wake_ms(state, now_ms)
    return turn


def _settle(turn: Turn) -> None:
    rounds = 0
    while turn.touched and rounds < ROUNDS:
        (kind, key), _ = next(iter(turn.touched.items()))
        del turn.touched[(kind, key)]
        reconciler = _RECONCILERS.get(kind)
        if reconciler is not None:
            reconciler(turn, key)
        rounds += 1
    assert rounds < ROUNDS, "reconciliation does not come to rest"


def _wake_ms(state: State, now_ms: int) -> int:
    due = min(replicas.wake_ms(state, now_ms), runs.wake_ms(state, now_ms), session.wake_ms(state, now_ms))
    deadlines = (task.deadline_ms for task in state.copies.values() if task.deadline_ms)
    return min(due, min(deadlines, default=NEVER_MS))


def _started(turn: Turn, event: ev.AgentStarted) -> None:
    state = turn.state
    state.started_ms = turn.now_ms
    state.models_dir = event.models_dir
    state.lease_until_ms = event.lease_until_ms
    before = state.meta.boot_id
    if before != event.boot_id:
        turn.put(replace(state.meta, boot_id=event.boot_id), "boot_noticed", cause=event.boot_id)
    is_rebooted = bool(before) and before != event.boot_id
    replicas.attach_all(turn, is_rebooted=is_rebooted)
    runs.attach_all(turn, is_rebooted=is_rebooted)


def _mover_moved(turn: Turn, event: ev.MoverMoved) -> None:
    moving = event.moving
    copies.moved(
        turn,
        moving.token,
        Moving(moving.state, moving.bytes_done, moving.bytes_total, moving.rate_bytes_per_s, moving.source),
    )


def _holder_moved(turn: Turn, event: ev.HolderMoved) -> None:
    moving = event.moving
    copies.moved(
        turn, moving.token, Moving(moving.state, moving.bytes_done, moving.bytes_total, moving.rate_bytes_per_s)
    )


def _mover_died(turn: Turn, event: ev.MoverDied) -> None:
    turn.state.is_mover_up = False
    copies.side_died(turn, MOVER_VERBS)


def _mover_failed(turn: Turn, event: ev.MoverFailed) -> None:
    turn.state.is_mover_up = False
    turn.state.mover_error = event.error
    copies.side_failed(turn, ("disk",))


def _holder_failed(turn: Turn, event: ev.HolderFailed) -> None:
    turn.state.is_holder_up = False
    turn.state.holder_error = event.error
    copies.side_failed(turn, ("dram",))


def _holder_died(turn: Turn, event: ev.HolderDied) -> None:
    turn.state.is_holder_up = False
    copies.side_died(turn, HOLDER_VERBS)


_HANDLERS: dict[type[ev.Event], Callable[[Turn, Any], None]] = {
    ev.AgentStarted: _started,
    ev.Ticked: lambda turn, event: None,
    ev.SessionOpened: session.opened,
    ev.SessionClosed: session.closed,
    ev.CommandReceived: commands.received,
    ev.ResultAcked: lambda turn, event: commands.acked(turn, event.op_id, event.generation),
    ev.LeaseAcked: session.lease_acked,
    ev.MoverReady: lambda turn, event: copies.store_scanned(turn, event.copies),
    ev.MoverMoved: _mover_moved,
    ev.MoverDone: lambda turn, event: copies.ended(turn, event.done.token, event.done.error, event.done, ()),
    ev.MoverDied: _mover_died,
    ev.MoverFailed: _mover_failed,
    ev.HolderReady: lambda turn, event: copies.holdings_listed(turn, event.holdings),
    ev.HolderMoved: _holder_moved,
    ev.HolderDone: lambda turn, event: copies.ended(
        turn, event.done.token, event.done.error, None, event.done.holdings
    ),
    ev.HolderDied: _holder_died,
    ev.HolderFailed: _holder_failed,
    ev.ReplicaStarted: replicas.started,
    ev.ReplicaSpawnFailed: replicas.spawn_failed,
    ev.ReplicaExited: replicas.exited,
    ev.ReplicaProbed: replicas.probed,
    ev.RunStarted: runs.started,
    ev.RunSaid: runs.said,
    ev.RunEnded: runs.ended,
    ev.RunUploaded: runs.uploaded,
    ev.RunForgotten: runs.forgotten,
    ev.HealthChecked: commands.health_checked,
}
_RECONCILERS: dict[str, Callable[[Turn, str], None]] = {
    "copy": copies.reconcile,
    "replica": replicas.reconcile,
    "run": runs.reconcile,
}
