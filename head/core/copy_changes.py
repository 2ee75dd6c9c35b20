"""The turns that a copy's life takes: planned anew, failed, ready, lost; and who is woken by each."""

from __future__ import annotations

import msgspec

from common import ids, limits, wire
from common.backoff import ceiling_ms
from common.errors import ErrorInfo, HerderError
from head.core import admission, commands, copy_sources, eviction
from head.core.copy_facts import (
    NOT_BEGUN,
    is_projection,
    is_wanted,
    manifest_of,
    next_generation,
    node_of,
    size_of,
    storage_of,
)
from head.core.objects import Copy
from head.core.state import State
from head.core.turn import Turn

_WOKEN = 64  # waiting copies of one model that look again when one of them ends; each that ends wakes the next
_OTHER_SOURCE_HELPS = ("digest_mismatch", "size_mismatch", "source_refused", "source_not_found", "forbidden")
_NO_ROOM = ("disk_full", "memory_full")


def op_of(copy: Copy) -> str:
    """The name of the copy's command."""
    return commands.op_id(commands.COPY, copy.key)


def send_ensure(turn: Turn, copy: Copy, sources: tuple[wire.Source, ...] = ()) -> None:
    """Sends the command that a copy shall exist, if it is due."""
    body = wire.EnsureCopy(
        model=copy.model,
        revision=copy.revision,
        storage=storage_of(copy),
        sources=sources,
        manifest=manifest_of(turn.state, copy.model, copy.revision),
    )
    commands.send_if_due(turn, node_of(copy), op_of(copy), copy.generation, body, cause=copy.cause)


def wake(turn: Turn, copy: Copy) -> None:
    """Something about a copy changed that others may wait for: room, a source, the parts under an engine."""
    state, node = turn.state, node_of(copy)
    for key in tuple(state.copies_by_node.get(node, ())):
        if key != copy.key and state.copies[key].state == "waiting":
            turn.touch("copy", key)
    waiting = [
        other
        for other in (state.copies[key] for key in state.copies_by_model.get(copy.model, ()))
        if other.state == "waiting" and other.key != copy.key
    ]
    waiting.sort(key=lambda other: (other.created_ms, other.key))
    for other in waiting[:_WOKEN]:
        turn.touch("copy", other.key)
    for key in tuple(state.replicas_by_node.get(node, ())):
        if state.replicas[key].model == copy.model:
            turn.touch("replica", key)


def replan(turn: Turn, copy: Copy, what: str, *, error: ErrorInfo | None, attempts: int, not_before_ms: int) -> None:
    """A copy begins anew under a new generation, if there is (or can be made) room for it; else it has failed."""
    copy_sources.release(turn.state, copy.key)
    turn.state.progress.pop(copy.key, None)
    place = ids.parse_device(copy.device)
    try:
        room = eviction.plan_room(turn.state, place, size_of(turn.state, copy), turn.now_ms, key=copy.key)
    except HerderError as refusal:
        fail(turn, copy, refusal.info())
        return
    eviction.carry_out(turn, room, cause=copy.cause, made_for=copy.key)
    again = msgspec.structs.replace(
        copy,
        state="planned",
        generation=next_generation(turn, copy),
        error=error,
        attempts=attempts,
        not_before_ms=not_before_ms,
        is_locked=False,
    )
    turn.put(again, what, cause=copy.cause, error=error.code if error else "", attempts=attempts)
    wake(turn, again)


def fail(turn: Turn, copy: Copy, error: ErrorInfo) -> None:
    """A copy has failed for good: it holds no room and is not tried again until someone wants it anew."""
    copy_sources.release(turn.state, copy.key)
    turn.state.progress.pop(copy.key, None)
    if error.code == "source_not_found" and copy.error is not None:
        error = copy.error  # why the sources went says more than that there is none left
    failed = msgspec.structs.replace(copy, state="failed", error=error, not_before_ms=0, is_locked=False)
    turn.put(failed, "copy_failed", cause=copy.cause, error=error.code)
    wake(turn, failed)


def end_badly(turn: Turn, copy: Copy, error: ErrorInfo) -> None:
    """An attempt ended with an error: another follows after a pause if it can help, up to STEP_ATTEMPTS in all."""
    attempts = copy.attempts + 1
    if error.code in _NO_ROOM:
        _find_room(turn, copy, error, attempts)
        return
    has_others = _avoid_peers(turn.state, copy, error)
    if attempts >= limits.STEP_ATTEMPTS or not (error.is_retryable or has_others):
        fail(turn, msgspec.structs.replace(copy, attempts=attempts), error)
        return
    replan(turn, copy, "copy_retried", error=error, attempts=attempts, not_before_ms=turn.now_ms + pause_ms(attempts))


def pause_ms(attempts: int) -> int:
    """The pause before the next attempt."""
    return ceiling_ms(attempts, base_ms=limits.STEP_BACKOFF_BASE_MS, cap_ms=limits.STEP_BACKOFF_CAP_MS)


def become_ready(turn: Turn, copy: Copy, *, size: int, digest: str, is_locked: bool = False) -> None:
    """The agent has the whole, verified copy."""
    copy_sources.release(turn.state, copy.key)
    turn.state.progress.pop(copy.key, None)
    turn.state.avoided.pop(copy.key, None)
    ready = msgspec.structs.replace(
        copy,
        state="ready",
        bytes=size or copy.bytes,
        digest=digest or copy.digest,
        is_locked=is_locked,
        attempts=0,
        not_before_ms=0,
        error=None,
        verified_ms=turn.now_ms,
        last_used_ms=turn.now_ms,
    )
    turn.put(ready, "copy_ready", cause=copy.cause, bytes=ready.bytes)
    wake(turn, ready)
    rebalance(turn, ids.parse_device(copy.device))  # it may hold more room than it was given


def lose(turn: Turn, copy: Copy, reason: str) -> None:
    """A copy is not there any more: fetched again if something durable needs it, forgotten otherwise."""
    if is_wanted(turn.state, copy):
        lost = ErrorInfo(code="copy_not_found", message=f"the copy was lost: {reason}", is_retryable=True)
        replan(turn, copy, "copy_lost", error=lost, attempts=0, not_before_ms=0)
    else:
        copy_sources.release(turn.state, copy.key)
        turn.delete("copy", copy.key, "copy_lost", reason=reason)


def rebalance(turn: Turn, place: ids.Device) -> None:
    """What is on a device turned out bigger than admitted: others are evicted, or what has not begun gives way."""
    state = turn.state
    over = admission.committed_bytes(state, place) - admission.budget_bytes(state, place)
    if over <= 0:
        return
    not_begun = [
        copy
        for copy in admission.copies_on(state, place)
        if copy.desired == "present" and copy.state in NOT_BEGUN and not is_projection(copy)
    ]
    if not not_begun:
        return  # everything there is a fact; nothing new goes in until there is room again
    room = eviction.choose(state, place, over, turn.now_ms)
    if room is not None:
        eviction.carry_out(turn, room, cause=turn.cause, made_for=str(place))
        return
    not_begun.sort(key=lambda copy: (-copy.created_ms, copy.key))
    for copy in not_begun:
        size = size_of(state, copy)
        if over > 0 and size > 0:
            free = max(0, size - over)
            fail(turn, copy, eviction.full(state, place, size, free, turn.now_ms, key=copy.key).info())
            over -= size


def _find_room(turn: Turn, copy: Copy, error: ErrorInfo, attempts: int) -> None:
    """The agent had no room: evict by its numbers and try again, or fail with what stands in the way."""
    state, place = turn.state, ids.parse_device(copy.device)
    need = _number(error.details.get("need"), max(size_of(state, copy), 1))
    free = _number(error.details.get("free"), 0)
    copy = msgspec.structs.replace(copy, bytes=copy.bytes or need)
    spoken = admission.committed_bytes(state, place, without=copy.key) + size_of(state, copy)
    short = max(need - free, spoken - admission.budget_bytes(state, place), 1)
    room = eviction.choose(state, place, short, turn.now_ms, sparing=copy.key)
    is_emptying = any(other.desired == "absent" for other in admission.copies_on(state, place))
    if attempts >= limits.STEP_ATTEMPTS or (room is None and not is_emptying):
        refusal = eviction.full(state, place, need, free, turn.now_ms, key=copy.key).info()
        fail(turn, msgspec.structs.replace(copy, attempts=attempts), refusal)
        return
    if room is not None:
        eviction.carry_out(turn, room, cause=copy.cause, made_for=copy.key)
    replan(turn, copy, "copy_retried", error=error, attempts=attempts, not_before_ms=turn.now_ms + pause_ms(attempts))


def _avoid_peers(state: State, copy: Copy, error: ErrorInfo) -> bool:
    """Leaves the peers that gave wrong bytes alone from now on; says whether another source may help."""
    if error.code not in _OTHER_SOURCE_HELPS:
        return False
    nodes = [key.rpartition("|")[2].partition(":")[0] for key in state.offered.get(copy.key, ())]
    named = error.details.get("node")
    guilty = [node for node in nodes if node == named] or nodes
    for node in guilty:
        state.avoided[copy.key][node] = None
    return bool(guilty)


def _number(value: object, otherwise: int) -> int:
    """A byte count that an agent sent, if it is one."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60
    return value if is_count and isinstance(value, int) else otherwise
