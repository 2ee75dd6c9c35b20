"""Eviction: which copies make room for another, and when nothing may.

A victim is a ready copy that nobody needs now and that can be had again. Victims are taken in GreedyDual-Size-
Frequency order: what is cheap to fetch again per byte and was not used for long goes first. A plan is made whole
before anything is dropped, so that a refusal drops nothing.
Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs, 1998.
"""

from __future__ import annotations

import msgspec

from common import ids
from common.errors import DiskFull, HerderError, MemoryFull
from head.core import admission, replica_facts
from head.core.copy_facts import (
    has_source,
    is_backing,
    is_last,
    last_used_ms,
    make_absent,
    readers_of,
    size_of,
    storage_of,
    survivors,
)
from head.core.objects import Copy
from head.core.state import State
from head.core.turn import Turn

# what a source gives, in bytes per millisecond, for comparing refetch costs
_DISK_RATE = 2_000_000
_PEER_RATE = 1_000_000
_ORIGIN_RATE = 50_000
_LOCAL_OVERHEAD_MS = 100
_ORIGIN_OVERHEAD_MS = 2_000
_GIB = 1 << 30
_SMALL_BYTES = 16 << 20  # smaller copies count as this big, or the smallest would never go
_CREDIT = 60  # one second of refetching per GiB weighs as much as one minute since the last use
_BLOCKERS_TOLD = 20


class Room(msgspec.Struct, frozen=True):
    """What has to go so that something fits."""

    victims: tuple[str, ...] = ()


def blocker(state: State, copy: Copy, now_ms: int) -> str:
    """Why a copy may not be evicted, in words; "" when it may."""
    if copy.desired != "present":
        return "already being dropped"
    if copy.state != "ready":
        return f"it is {copy.state}"
    if copy.pins:
        return f"pinned by {', '.join(pin.name for pin in copy.pins)}"
    if replica_facts.uses_copy(state, copy.key):
        return "an engine uses it"
    if is_backing(state, copy):
        return "a copy in RAM stands on it"
    if readers_of(state, copy):
        return "another node reads from it"
    if is_last(state, copy, now_ms, remote_only=True):
        return "it is the last copy of a model without a remote source"
    return ""


def refetch_ms(state: State, copy: Copy, now_ms: int) -> int:
    """About how long it would take to have this copy again, from the best source that would be left."""
    size = size_of(state, copy)
    if storage_of(copy) == "dram":
        return _LOCAL_OVERHEAD_MS + size // _DISK_RATE
    if survivors(state, copy, now_ms) or not has_source(state, copy.model, remote_only=True):
        return _LOCAL_OVERHEAD_MS + size // _PEER_RATE
    return _ORIGIN_OVERHEAD_MS + size // _ORIGIN_RATE


def score(state: State, copy: Copy, now_ms: int) -> int:
    """Worth of keeping a copy, in milliseconds on the clock of last uses: the lowest goes first."""
    per_gib_ms = refetch_ms(state, copy, now_ms) * _GIB // max(size_of(state, copy), _SMALL_BYTES)
    return last_used_ms(state, copy) + _CREDIT * per_gib_ms


def choose(state: State, device: ids.Device, need_bytes: int, now_ms: int, *, sparing: str = "") -> Room | None:
    """The copies to drop so that `need_bytes` come free, none of them without need; None when it cannot be done."""
    able = [
        copy
        for copy in admission.copies_on(state, device)
        if copy.key != sparing and size_of(state, copy) > 0 and not blocker(state, copy, now_ms)
    ]
    able.sort(key=lambda copy: (score(state, copy, now_ms), copy.key))
    chosen: list[Copy] = []
    freed = 0
    for copy in able:
        if freed >= need_bytes:
            break
        chosen.append(copy)
        freed += size_of(state, copy)
    if freed < need_bytes:
        return None
    for copy in reversed(chosen[:]):  # a big late victim may make earlier ones needless
        if freed - size_of(state, copy) >= need_bytes:
            chosen.remove(copy)
            freed -= size_of(state, copy)
    return Room(tuple(copy.key for copy in chosen))


def plan_room(state: State, device: ids.Device, size: int, now_ms: int, *, key: str) -> Room:
    """What has to go so that copy `key` of `size` bytes (0: not known) can be present on the device.

    Raises: DiskFull or MemoryFull with {need, free, reclaimable, blockers}.
    """
    free = admission.budget_bytes(state, device) - admission.committed_bytes(state, device, without=key)
    need = max(size, 1)
    if need <= free:
        return Room()
    room = choose(state, device, need - free, now_ms, sparing=key)
    if room is None:
        raise full(state, device, need, max(0, free), now_ms, key=key)
    return room


def full(state: State, device: ids.Device, need: int, free: int, now_ms: int, *, key: str) -> HerderError:
    """The refusal that says what stands in the way."""
    reclaimable = 0
    blockers = []
    for copy in admission.copies_on(state, device):
        if copy.key == key or copy.desired != "present" or copy.state == "failed":
            continue
        why_not = blocker(state, copy, now_ms)
        if why_not:
            blockers.append({"copy": copy.key, "bytes": size_of(state, copy), "reason": why_not})
        else:
            reclaimable += size_of(state, copy)
    leaf = MemoryFull if device.kind == "dram" else DiskFull
    return leaf(
        f"{device} has no room for {need} bytes: {free} free, {reclaimable} could be evicted",
        hint="delete or unpin copies there, or choose another device",
        need=need,
        free=free,
        reclaimable=reclaimable,
        blockers=blockers[:_BLOCKERS_TOLD],
    )


def carry_out(turn: Turn, room: Room, *, cause: str, made_for: str) -> None:
    """Drops the victims of a plan."""
    for key in room.victims:
        make_absent(turn, turn.state.copies[key], "copy_evicted", cause=cause, made_for=made_for)
