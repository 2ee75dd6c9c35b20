"""`check_invariants(state)`: what must hold after every step; tests and the simulator call it, production does not."""

from __future__ import annotations

from collections.abc import Iterator

from agent.core.copies import WORKING
from agent.core.replicas import ENDED
from agent.core.state import State

COPY_STATES = WORKING | {"ready", "failed"}
REPLICA_STATES = frozenset({"waiting_copy", "starting", "ready", "unhealthy", "stopping", "stopped", "failed"})


def check_invariants(state: State) -> None:
    """Raises AssertionError that names every broken rule."""
    broken = [*_asks(state), *_copies(state), *_replicas(state), *_outcomes(state)]
    assert not broken, "; ".join(broken[:20])


def _asks(state: State) -> Iterator[str]:
    for key, token in state.ask_of.items():
        if token not in state.asks:
            yield f"{key} waits for {token}, which is not open"
    if len(state.ask_of) != len(state.asks):
        yield "an open request belongs to no copy, or two belong to one"
    for ask in state.asks.values():
        side_is_up = state.is_holder_up if ask.verb in ("hold", "release") else state.is_mover_up
        if not side_is_up:
            yield f"{ask.token} is open at a side that is down"


def _copies(state: State) -> Iterator[str]:
    for key, task in state.copies.items():
        if task.key != key or task.state not in COPY_STATES:
            yield f"{key}: state {task.state}"
        if task.desired == "absent" and task.state not in ("dropping", "failed"):
            yield f"{key}: {task.state}, but shall be absent"
        if task.state == "ready" and not task.directory:
            yield f"{key}: ready without a directory"
        if task.storage == "dram" and task.state == "loading" and task.desired == "present":
            disk = state.copy(task.model, task.revision, "disk")
            if disk is None:
                yield f"{key}: loads without a disk copy"


def _replicas(state: State) -> Iterator[str]:
    for key, task in state.replicas.items():
        engine = state.engine(key)
        if task.state not in REPLICA_STATES:
            yield f"{key}: state {task.state}"
        if task.state in ENDED and engine.phase != "none":
            yield f"{key}: {task.state} with a process"
        if task.state == "ready" and engine.phase not in ("alive", "unknown"):
            yield f"{key}: ready without a process"
        if task.restarts > task.order.max_restarts:
            yield f"{key}: restarted {task.restarts} times"
        if engine.is_ending and not engine.kill_at_ms:
            yield f"{key}: ends without a deadline"


def _outcomes(state: State) -> Iterator[str]:
    for key, outcome in state.outcomes.items():
        if outcome.result.op_id != key:
            yield f"outcome {key} is of {outcome.result.op_id}"
