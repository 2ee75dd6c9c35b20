"""The head's start and its tick: which nodes are lost, and whether the head should rather doubt itself.

One sweep over the lease deadlines each second, no timer per node. Before it doubts a node the head doubts itself: a
stall of its own loop extends every lease, after a start nobody is judged before the settle time is over, and when
most nodes vanish together nothing is replaced until they return or an operator removes them.
Source: Lifeguard (HashiCorp, 2018) for doubting oneself; Kubernetes' node lifecycle controller for the share of 55 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common import limits
from head.core import benchmarks, commands, copies, drains, health_checks, idempotency, jobs, keys, services
from head.core.effects import Alarm, CloseSession
from head.core.events import Event, HeadStarted, Ticked
from head.core.objects import Meta
from head.core.state import Live
from head.core.turn import Turn

FROZEN_ALARM = "most_nodes_lost"
_PARTS: tuple[tuple[str, Callable[[Turn], None]], ...] = (
    ("copies", lambda turn: copies.on_tick(turn)),
    ("services", lambda turn: services.on_tick(turn)),
    ("drains", lambda turn: drains.on_tick(turn)),
    ("jobs", lambda turn: jobs.on_tick(turn)),
    ("health_checks", lambda turn: health_checks.on_tick(turn)),
    ("benchmarks", lambda turn: benchmarks.on_tick(turn)),
    ("keys", lambda turn: keys.on_tick(turn)),
    ("idempotency", lambda turn: idempotency.on_tick(turn)),
    ("commands", lambda turn: commands.on_tick(turn)),
)


def started(turn: Turn, event: HeadStarted) -> None:
    """A head process begins: a new epoch, nothing volatile, and time for the agents to come back."""
    state = turn.state
    known = state.meta.get("cluster")
    if known is None:
        meta = Meta(cluster_id=event.cluster_id, head_epoch=1, created_ms=turn.now_ms)
    else:
        meta = msgspec.structs.replace(known, head_epoch=known.head_epoch + 1)
    turn.put(meta, "head_started", head_epoch=meta.head_epoch)
    state.ticket_secret = event.ticket_secret
    state.recipes = dict(event.recipes)
    state.benchmark_recipes = dict(event.benchmark_recipes)
    state.gateway_url, state.version = event.gateway_url, event.version
    state.started_ms = state.last_tick_ms = turn.now_ms
    state.settle_until_ms = turn.now_ms + limits.SETTLE_MS
    volatiles: tuple[dict[str, Any], ...] = (
        *(state.progress, state.commanded_ms, state.offered, state.readers, state.avoided),
        *(state.clocks, state.judging_ms),
    )
    for volatile in volatiles:
        volatile.clear()
    state.live = {node_id: Live(lease_until_ms=state.settle_until_ms) for node_id in state.nodes}
    # who was lost before counts as lost together: a restart in the middle of a partition must not unfreeze
    state.lost_ms = {node.id: turn.now_ms for node in state.nodes.values() if node.status == "unreachable"}
    state.is_frozen = False
    state.drain_ms = event.drain_ms
    drains.on_start(turn)
    _judge_freeze(turn)


def ticked(turn: Turn, event: Ticked) -> None:
    """About once a second: leases, drains, and whatever else waits for time to pass."""
    state = turn.state
    _forgive_stall(turn, event.stall_ms)
    _sweep_leases(turn)
    for node_id in tuple(state.draining_nodes):
        turn.touch("node", node_id)
        node = state.nodes[node_id]
        if node.drain_deadline_ms - node.drain_lead_ms <= turn.now_ms and state.replicas_by_node.get(node_id):
            services.on_node_draining(turn, node_id)
    for name, part in _PARTS:
        # a refusal in one part must not keep the others, and least of all the leases, from their turn
        error = turn.attempt(lambda part=part: part(turn))  # type: ignore[misc]
        if error is not None:
            turn.emit(Alarm(f"tick_failed:{name}", f"{name}: {error.message}"))
    state.last_tick_ms = turn.now_ms


def _forgive_stall(turn: Turn, told_ms: int) -> None:
    """When our own loop was late, agents could not be heard: every lease is longer by that."""
    state = turn.state
    gap_ms = turn.now_ms - state.last_tick_ms - limits.TICK_MS if state.last_tick_ms else 0
    stall_ms = max(told_ms, gap_ms)
    if stall_ms < limits.LOOP_STALL_MS:
        return
    for live in state.live.values():
        live.lease_until_ms += stall_ms
    if turn.now_ms - stall_ms < state.settle_until_ms:
        state.settle_until_ms += stall_ms


def _sweep_leases(turn: Turn) -> None:
    state, now_ms = turn.state, turn.now_ms
    _clear_flaps(turn)
    if now_ms < state.settle_until_ms:
        return
    lost, left = [], []
    for node_id, live in state.live.items():
        if live.lease_until_ms >= now_ms and live.session_id:
            continue
        node = state.nodes.get(node_id)
        if node is None or node.status != "online":
            continue
        # one that said it leaves has left as soon as it is silent then; while it talks it is still there
        if node.leaving_ms and (live.lease_until_ms < now_ms or node.leaving_ms <= now_ms):
            left.append(node_id)
        elif live.lease_until_ms < now_ms:
            lost.append(node_id)
    lost, left = lost[: limits.LOST_PER_TICK], left[: limits.LOST_PER_TICK]
    if not state.is_frozen:
        for node_id in [key for key, at_ms in state.lost_ms.items() if now_ms - at_ms > limits.LOST_WINDOW_MS]:
            del state.lost_ms[node_id]
    for node_id in lost:
        state.lost_ms[node_id] = now_ms
        _set_gone(turn, node_id, "unreachable")
    for node_id in left:
        _set_gone(turn, node_id, "left")

    def unlose() -> None:
        for node_id in lost:
            state.lost_ms.pop(node_id, None)

    turn.on_rollback(unlose)
    if lost or state.is_frozen:
        _judge_freeze(turn)
    for node_id in (*lost, *left):
        copies.on_node_lost(turn, node_id)
        services.on_node_lost(turn, node_id)


def _set_gone(turn: Turn, node_id: str, status: str) -> None:
    live = turn.state.live[node_id]
    if live.session_id:
        turn.emit(CloseSession(live.session_id))
        live.session_id, live.has_reported = "", False
    node = msgspec.structs.replace(turn.state.nodes[node_id], status=status, status_since_ms=turn.now_ms)
    turn.put(node, f"node_{status}", last_seen_ms=live.last_seen_ms)


def _judge_freeze(turn: Turn) -> None:
    """Freezes replacement when most nodes are gone together, and thaws when they are back (or removed)."""
    state = turn.state
    before = state.is_frozen
    turn.on_rollback(lambda: setattr(state, "is_frozen", before))
    gone = len(state.lost_ms)
    online = sum(1 for node in state.nodes.values() if node.status == "online")
    is_frozen = gone > 0 and gone >= limits.LOST_FRACTION_FREEZE * (online + gone)
    if is_frozen and not state.is_frozen:
        text = f"{gone} of {online + gone} nodes vanished together: nothing is replaced until they return"
        turn.emit(Alarm(FROZEN_ALARM, f"{text}, or are removed"))
    if state.is_frozen and not is_frozen:
        turn.emit(Alarm(FROZEN_ALARM, "most nodes are back", is_on=False))
        state.is_frozen = False
        for node_id in sorted(state.lost_ms):
            services.on_node_lost(turn, node_id)
    state.is_frozen = is_frozen


def _clear_flaps(turn: Turn) -> None:
    for node_id, live in turn.state.live.items():
        if live.flaps and turn.now_ms - live.flapped_ms >= limits.FLAP_WINDOW_MS:
            if live.flaps >= limits.FLAPS_ALARM:
                turn.emit(Alarm(f"duplicate_node:{node_id}", "one agent uses this node id again", is_on=False))
            live.flaps = 0


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    HeadStarted: started,
    Ticked: ticked,
}
