"""`check_invariants(state)`: what must hold after every step; tests and the simulator call it, production does not."""

from __future__ import annotations

from collections.abc import Iterator

from agent.core import runs
from agent.core.copies import WORKING
from agent.core.replicas import ENDED
from agent.core.state import State
from common import limits

COPY_STATES = WORKING | {"ready", "failed"}
REPLICA_STATES = frozenset({"waiting_copy", "starting", "ready", "unhealthy", "stopping", "stopped", "failed"})


def check_invariants(state: State) -> None:
    """Raises AssertionError that names every broken rule."""
    broken = [*_asks(state), *_copies(state), *_replicas(state), *_runs(state), *_outcomes(state)]
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


def _runs(state: State) -> Iterator[str]:
    at_work = 0
    for key, task in state.runs.items():
        process = state.process(key)
        at_work += task.state in runs.AT_WORK
        if task.state not in runs.AT_WORK | runs.ENDED | {"uploading"}:
            yield f"{key}: state {task.state}"
        if task.state in runs.ENDED and not task.is_answered:
            yield f"{key}: {task.state}, and nobody was told"
        if task.state == "failed" and task.error is None:
            yield f"{key}: failed without a reason"
        if task.desired == "absent" and process.phase != "forgetting":
            yield f"{key}: shall be forgotten, but is {process.phase}"
        if process.phase == "uploading" and task.state != "uploading":
            yield f"{key}: sends its files, but is {task.state}"
        if task.fire_boottime_ns and (task.order.kind != "load" or task.state == "preparing"):
            yield f"{key}: fired while {task.state}"
    if at_work > limits.RUNS_PER_NODE:
        yield f"{at_work} runs at a time"


def _outcomes(state: State) -> Iterator[str]:
    for key, outcome in state.outcomes.items():
        if outcome.result.op_id != key:
            yield f"outcome {key} is of {outcome.result.op_id}"
