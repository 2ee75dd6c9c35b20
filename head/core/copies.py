"""Copies: what is wanted of them, and the commands that bring it about.

`want` and `unwant` change what is desired and refuse what may not be; `reconcile` turns the difference into
commands: room first, then (for RAM) the disk copy under it, then a source. What agents answer is taken in by
`copy_reports`. A copy that cannot go on now is `waiting` and is looked at again when something on its node or of its
model changes, and by the tick in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common import ids, limits, wire
from common.errors import (
    Conflict,
    CopyNotFound,
    HerderError,
    InUse,
    InvalidDevice,
    InvalidValue,
    LastCopy,
    ModelNotFound,
    TooMany,
    from_info,
)
from head.core import admission, commands, copy_sources, eviction, node_facts, replica_facts, source_urls
from head.core.admission import device_exists, free_bytes
from head.core.copy_changes import fail, op_of, rebalance, replan, send_ensure, wake
from head.core.copy_facts import (
    NOT_BEGUN,
    backing_of,
    expected_bytes,
    is_backing,
    is_last,
    is_projection,
    is_wanted,
    make_absent,
    next_generation,
    node_of,
    readers_of,
    size_of,
    storage_of,
)
from head.core.copy_reports import observe, on_progress, on_result
from head.core.events import Event, PinRequested, UnpinRequested
from head.core.objects import Copy, Model, Pin, copy_key
from head.core.state import State
from head.core.turn import Turn

__all__ = [
    "HANDLERS",
    "cancel",
    "device_exists",
    "free_bytes",
    "observe",
    "on_inventory",
    "on_node_lost",
    "on_node_rebooted",
    "on_progress",
    "on_result",
    "on_tick",
    "ready_on",
    "reconcile",
    "touch_used",
    "unwant",
    "want",
]
_TOUCHED_PER_TICK = 512  # copies at work that are looked at again in one turn; the rest have their turn later
_USED_RECORD_MS = 3_600_000  # the last use is journalled at most so often


def want(turn: Turn, model: str, revision: str, device: str, *, cause: str, source: str = "") -> Copy:
    """Makes a copy desired on a disk or dram device, and the disk copy that a dram copy stands on.

    revision "": the model's own. source: a URL or a device to take it from, and only from there; "" lets the head
    choose. A copy that is there or on its way is returned as it is; a failed one begins anew. A refusal changes
    nothing.
    Raises: ModelNotFound, Conflict, InvalidDevice, DeviceNotFound, NodeCordoned, NodeUnreachable, InvalidSource,
    CopyNotFound, SourceNotFound, DiskFull, MemoryFull.
    """
    state = turn.state
    registered = _registered(state, model)
    place = admission.require_storage(state, device)
    revision = revision or registered.revision
    key = copy_key(model, revision, str(place))
    existing = state.copies.get(key)
    if existing is not None and existing.desired == "present" and existing.state != "failed":
        turn.touch("copy", key)
        return existing
    refusal = node_facts.refusal(state, place.node, turn.now_ms)
    if refusal is not None:
        raise refusal
    size = expected_bytes(state, model, revision)
    wanted = Copy(
        model=model,
        revision=revision,
        device=str(place),
        desired="present",
        state="planned",
        generation=next_generation(turn, existing),
        cause=cause,
        created_ms=turn.now_ms,
        bytes=size,
        pins=existing.pins if existing is not None else (),  # of one that failed; one that shall be gone has none
        source=_checked_source(state, place, source),
    )
    room = eviction.plan_room(state, place, size, turn.now_ms, key=key)
    if place.kind == "dram":
        want(turn, model, revision, f"{place.node}:disk", cause=cause, source=wanted.source)
        room = eviction.plan_room(state, place, size, turn.now_ms, key=key)
        wanted = msgspec.structs.replace(wanted, source="")
    else:
        copy_sources.plan(state, wanted, turn.now_ms)  # refuses when there is nothing to fetch from
    eviction.carry_out(turn, room, cause=cause, made_for=key)
    state.progress.pop(key, None)
    state.avoided.pop(key, None)
    wanted = msgspec.structs.replace(wanted, generation=next_generation(turn, existing))
    turn.put(wanted, "copy_wanted", cause=cause, bytes=size)
    return wanted


def unwant(turn: Turn, key: str, *, cause: str, force: bool = False) -> Copy | None:
    """Makes a copy undesired; its object is gone once the agent has confirmed. None: it is gone already.

    `force` drops a pinned one, one that another node reads from, and the last copy of a model without a source.
    Raises: CopyNotFound, InvalidDevice for a GPU, InUse, LastCopy.
    """
    state = turn.state
    copy = state.copies.get(key)
    if copy is None:
        raise CopyNotFound(f"no copy {key[:300]!r}", hint="`herder models locations NAME` lists the copies")
    if is_projection(copy):
        raise InvalidDevice(f"{copy.device} holds an engine", hint="stop serving the model there instead")
    if copy.desired == "absent":
        turn.touch("copy", key)
        return copy
    if replica_facts.uses_copy(state, key):
        raise InUse(f"an engine uses {key}", hint="stop serving the model on this node first", copy=key)
    if is_backing(state, copy):
        raise InUse(f"the copy in RAM on {node_of(copy)} stands on {key}", hint="delete the dram copy first", copy=key)
    if not force:
        _refuse_unforced(turn, copy)
    return _absent(turn, copy, "copy_unwanted", cause)


def cancel(turn: Turn, key: str, cause: str) -> None:
    """Stops a copy that is not ready: the agent ends the fetch and removes the parts, then the object goes.

    A ready copy stays, and so does a disk copy that something else stands on or runs from, and one that was found on
    a disk and is being verified, when there is no other.
    """
    copy = turn.state.copies.get(key)
    if copy is None or copy.desired == "absent" or copy.state in ("ready", "asleep") or is_projection(copy):
        return
    if is_wanted(turn.state, copy) or is_last(turn.state, copy, turn.now_ms, remote_only=False):
        return
    _absent(turn, copy, "copy_cancelled", cause)
    below = backing_of(turn.state, copy) if storage_of(copy) == "dram" else None
    if below is not None and below.cause == copy.cause and below.desired == "present" and below.state != "ready":
        is_kept = bool(below.pins) or replica_facts.uses_copy(turn.state, below.key)
        if not is_kept:  # it was fetched only for the copy in RAM
            _absent(turn, below, "copy_cancelled", cause)


def ready_on(state: State, model: str, revision: str, node: str) -> Copy | None:
    """The ready disk copy of a model at a revision on a node."""
    copy = state.copies.get(copy_key(model, revision, f"{node}:disk"))
    return copy if copy is not None and copy.desired == "present" and copy.state == "ready" else None


def touch_used(turn: Turn, key: str) -> None:
    """Notes that a copy is used now; journalled at most once an hour."""
    copy = turn.state.copies.get(key)
    if copy is None:
        return
    turn.state.last_used_ms[key] = turn.now_ms
    if turn.now_ms - copy.last_used_ms >= _USED_RECORD_MS:
        turn.put(msgspec.structs.replace(copy, last_used_ms=turn.now_ms), "copy_used")


def on_node_rebooted(turn: Turn, node_id: str) -> None:
    """RAM is empty after a boot: dram copies that shall be present are loaded anew.

    One that is being dropped stays in the books until the agent confirms: its ledger may still say otherwise.
    """
    for copy in _own_copies(turn.state, node_id):
        if storage_of(copy) == "dram" and copy.desired == "present" and copy.state != "failed":
            replan(turn, copy, "copy_lost", error=None, attempts=0, not_before_ms=0)


def on_node_lost(turn: Turn, node_id: str) -> None:
    """Nobody reads from a lost node, and its own fetches hold no place at other sources."""
    for copy in _own_copies(turn.state, node_id):
        copy_sources.release(turn.state, copy.key)
        if copy.desired == "present":
            wake(turn, copy)


def on_inventory(turn: Turn, node_id: str) -> None:
    """The node's budgets may have changed: what no longer fits and has not begun gives way."""
    for storage in ("disk", "dram"):
        rebalance(turn, ids.parse_device(f"{node_id}:{storage}"))


def on_tick(turn: Turn) -> None:
    """Once a second: pins that ended, and copies at work that are due."""
    for key in tuple(turn.state.pinned_copies):
        copy = turn.state.copies[key]
        kept = tuple(pin for pin in copy.pins if not pin.until_ms or pin.until_ms > turn.now_ms)
        if len(kept) != len(copy.pins):
            turn.put(msgspec.structs.replace(copy, pins=kept), "copy_pin_ended")
    active = tuple(turn.state.active_copies)
    if len(active) > _TOUCHED_PER_TICK:
        start = turn.now_ms // limits.TICK_MS * _TOUCHED_PER_TICK % len(active)
        active = (active[start:] + active[:start])[:_TOUCHED_PER_TICK]
    for key in active:
        copy = turn.state.copies[key]
        if not is_projection(copy) and copy.not_before_ms <= turn.now_ms:
            turn.touch("copy", key)


def pin(turn: Turn, event: PinRequested) -> None:
    """Pins a copy by a name; the same name again sets a new end. Answered with the copy."""
    body = event.body
    copy = _asked_copy(turn.state, body.model_name, body.device)
    if copy.desired != "present":
        raise Conflict(f"{copy.key} is being dropped", hint="wait until it is gone, then download it again")
    if not body.name.isprintable():
        raise InvalidValue("the pin's name has characters that cannot be printed")
    others = tuple(pin for pin in copy.pins if pin.name != body.name)
    if len(others) >= limits.PINS_PER_COPY:
        raise TooMany(f"{copy.key} has {len(others)} pins", limit=limits.PINS_PER_COPY)
    until_ms = turn.now_ms + body.ttl_s * 1_000 if body.ttl_s else 0
    pins = (*others, Pin(name=body.name, until_ms=until_ms))
    turn.put(msgspec.structs.replace(copy, pins=pins), "copy_pinned", pin=body.name, actor=event.actor)
    turn.reply(event, reference=f"copy:{copy.key}")


def unpin(turn: Turn, event: UnpinRequested) -> None:
    """Takes a pin away; one that is not there is as good as taken. Answered with the copy."""
    copy = _asked_copy(turn.state, event.body.model_name, event.body.device)
    kept = tuple(pin for pin in copy.pins if pin.name != event.body.name)
    if len(kept) != len(copy.pins):
        turn.put(msgspec.structs.replace(copy, pins=kept), "copy_unpinned", pin=event.body.name, actor=event.actor)
    turn.reply(event, reference=f"copy:{copy.key}")


def reconcile(turn: Turn, key: str) -> None:
    """Brings a copy nearer to what is desired of it: sends its command when the way is free."""
    copy = turn.state.copies.get(key)
    if copy is None:
        _forget(turn, key)
        return
    if is_projection(copy) or copy.not_before_ms > turn.now_ms:
        return
    if copy.desired == "absent":
        _drive_drop(turn, copy)
    elif copy.state in NOT_BEGUN:
        _drive_fetch(turn, copy)
    elif copy.state == "verifying" and key not in turn.state.progress:
        send_ensure(turn, copy)  # the agent has it, by its report; only its result tells the manifest


def _drive_drop(turn: Turn, copy: Copy) -> None:
    if is_backing(turn.state, copy):
        return  # the dram copy above goes first; its end wakes this one
    body = wire.DropCopy(model=copy.model, revision=copy.revision, storage=storage_of(copy))
    commands.send_if_due(turn, node_of(copy), op_of(copy), copy.generation, body, cause=copy.cause)


def _drive_fetch(turn: Turn, copy: Copy) -> None:
    try:
        blocked = _blocked_by(turn, copy)
        if not blocked and not commands.is_due(turn, node_of(copy), op_of(copy), copy.generation):
            return
        chosen = copy_sources.Plan()
        if not blocked and storage_of(copy) == "disk":
            chosen = copy_sources.plan(turn.state, copy, turn.now_ms)
            blocked = chosen.waits_for
    except HerderError as error:
        fail(turn, copy, error.info())
        return
    if blocked:
        if copy.state != "waiting":
            copy_sources.release(turn.state, copy.key)
            turn.put(msgspec.structs.replace(copy, state="waiting"), "copy_waiting", waits_for=blocked)
        return
    if copy.state != "planned":
        copy = msgspec.structs.replace(copy, state="planned")
        turn.put(copy, "copy_planned")
    if storage_of(copy) == "disk":
        copy_sources.offer(turn, copy, chosen)
    send_ensure(turn, copy, chosen.sources)


def _blocked_by(turn: Turn, copy: Copy) -> str:
    """What a copy has to wait for before any source is asked; "" when nothing.

    Raises what made the disk copy under a dram copy fail.
    """
    state = turn.state
    place = ids.parse_device(copy.device)
    if place.kind == "dram":
        below = backing_of(state, copy)
        if below is None or below.desired == "absent":
            below = want(turn, copy.model, copy.revision, f"{place.node}:disk", cause=copy.cause)
        if below.state == "failed" and below.error is not None:
            raise from_info(below.error)
        if below.state != "ready":
            return f"the copy on {place.node}:disk"
    occupied = admission.occupied_bytes(state, place, without=copy.key)
    if occupied and occupied + size_of(state, copy) > admission.budget_bytes(state, place):
        return f"room on {place}"
    if copy.error is not None and copy.error.code in ("disk_full", "memory_full") and _has_drops(state, place):
        return f"room on {place}"
    return ""


def _has_drops(state: State, place: ids.Device) -> bool:
    return any(copy.desired == "absent" for copy in admission.copies_on(state, place))


def _forget(turn: Turn, key: str) -> None:
    """The copy is gone: its volatile facts go, and whoever waited for its room or its parts looks again."""
    state = turn.state
    copy_sources.release(state, key)
    state.progress.pop(key, None)
    state.avoided.pop(key, None)
    state.last_used_ms.pop(key, None)
    name, _, device = key.rpartition("|")
    model = name.rpartition("@")[0]
    for other_key in tuple(state.copies_by_node.get(device.partition(":")[0], ())):
        other = state.copies[other_key]
        if other.state == "waiting" or other.desired == "absent":
            turn.touch("copy", other_key)
    registered = state.models.get(model)
    if registered is not None and registered.is_deleting:
        turn.touch("model", model)


def _absent(turn: Turn, copy: Copy, what: str, cause: str) -> Copy:
    copy_sources.release(turn.state, copy.key)
    turn.state.progress.pop(copy.key, None)
    gone = make_absent(turn, copy, what, cause=cause)
    wake(turn, gone)
    return gone


def _refuse_unforced(turn: Turn, copy: Copy) -> None:
    state = turn.state
    if copy.pins:
        names = [pin.name for pin in copy.pins]
        raise InUse(f"{copy.key} is pinned by {', '.join(names)}", hint="unpin it, or use force", pins=names)
    readers = readers_of(state, copy)
    if copy.state == "ready" and readers:
        raise InUse(
            f"{copy.key} is being read by {len(readers)} other copies", hint="wait, or use force", readers=readers
        )
    if is_last(state, copy, turn.now_ms, remote_only=False):
        raise LastCopy(
            f"{copy.key} is the last copy that can be reached, and {copy.model} has no source",
            hint="copy it elsewhere, register a source, or use force",
            copy=copy.key,
        )


def _registered(state: State, model: str) -> Model:
    registered = state.models.get(model)
    if registered is None:
        raise ModelNotFound(f"no model {model[:200]!r}", hint="register it first: `herder models add`")
    if registered.is_deleting:
        raise Conflict(f"{model} is being deleted", hint="wait until it is gone, then register it again")
    return registered


def _checked_source(state: State, place: ids.Device, source: str) -> str:
    """An explicit source in canonical form; the node's own disk needs none. Raises: InvalidSource, DeviceNotFound."""
    if not source:
        return ""
    if "://" in source:
        return source_urls.check_source(source)
    device = admission.require_device(state, source)
    return "" if device.node == place.node else str(device)


def _asked_copy(state: State, model: str, device: str) -> Copy:
    """The copy that a person named. Raises: ModelNotFound, InvalidDevice, DeviceNotFound, CopyNotFound."""
    registered = _registered(state, model)
    place = admission.require_storage(state, device)
    copy = state.copies.get(copy_key(model, registered.revision, str(place)))
    if copy is None:
        raise CopyNotFound(
            f"{place} has no copy of {model}@{registered.revision}", hint=f"`herder models locations {model}`"
        )
    return copy


def _own_copies(state: State, node_id: str) -> list[Copy]:
    keys = sorted(state.copies_by_node.get(node_id, ()))
    return [copy for copy in (state.copies[key] for key in keys) if not is_projection(copy)]


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    PinRequested: pin,
    UnpinRequested: unpin,
}
