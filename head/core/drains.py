"""Draining: a replica that shall stop first finishes what it is answering.

It leaves the routing at once, in the very record that makes it undesired. The gateway is asked by `Drain`, and its
agent is told to stop the engine when the gateway says `ReplicaIdle` or when the time is over, whichever comes first;
what is still on its way then is cut by `EndDrain`. Who was asked is volatile: a gateway ends with its head, and so do
the requests through it, hence a replica that was draining before a head start has nothing left to finish.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from head.core.effects import Drain, EndDrain
from head.core.events import Event, ReplicaIdle
from head.core.objects import Node, Replica
from head.core.state import State
from head.core.turn import Turn

_MAY_ANSWER = frozenset({"ready", "unhealthy"})


def until_ms(state: State, replica: Replica, now_ms: int) -> int:
    """Until when a replica that is stopped now may finish its requests; 0 when it can have none, or no time."""
    if replica.state not in _MAY_ANSWER or not replica.port:
        return 0
    end_ms = now_ms + state.drain_ms
    node = state.nodes.get(replica.node)
    if node is not None:
        end_ms = min(end_ms, *(bound or end_ms for bound in (node.drain_deadline_ms, node.leaving_ms)))
    return end_ms if end_ms > now_ms else 0


def lead_ms(state: State, deadline_s: int) -> int:
    """How long before a node's deadline its engines get no new requests: the last quarter at most."""
    return min(state.drain_ms, deadline_s * 1_000 // 4)


def must_begin(node: Node, replica: Replica, now_ms: int) -> bool:
    """Whether an engine on a draining node has to leave the routing now, so that all is over at the deadline."""
    lead = node.drain_lead_ms if replica.state in _MAY_ANSWER else 0
    return 0 < node.drain_deadline_ms <= now_ms + lead


def ask(turn: Turn, replica: Replica) -> None:
    """Asks the gateway to tell when nothing is on its way to this draining replica any more."""
    state = turn.state
    state.draining[replica.id] = replica.generation
    turn.on_rollback(lambda: _set(state, replica.id, None))
    turn.emit(Drain(replica.id, replica.generation))


def reconcile(turn: Turn, replica: Replica) -> None:
    """Ends the drain when its time is over, or when no gateway of this process was asked."""
    was_asked = turn.state.draining.get(replica.id) == replica.generation
    if not was_asked or replica.drain_until_ms <= turn.now_ms:
        _end(turn, replica)


def forget(turn: Turn, replica: str) -> None:
    """The replica drains no longer."""
    state = turn.state
    before = state.draining.pop(replica, None)
    if before is not None:
        turn.on_rollback(lambda: _set(state, replica, before))


def on_start(turn: Turn) -> None:
    """A head process begins: what was draining is stopped."""
    turn.state.draining.clear()
    for replica in turn.state.replicas.values():
        if replica.state == "draining":
            turn.touch("replica", replica.id)


def on_tick(turn: Turn) -> None:
    """Once a second: those whose time is over."""
    for key in turn.state.draining:
        replica = turn.state.replicas.get(key)
        if replica is not None and replica.drain_until_ms <= turn.now_ms:
            turn.touch("replica", key)


def replica_idle(turn: Turn, event: ReplicaIdle) -> None:
    """The gateway has nothing on its way to the replica any more."""
    replica = turn.state.replicas.get(event.replica)
    if replica is not None and replica.state == "draining" and replica.generation == event.generation:
        forget(turn, replica.id)
        _end(turn, replica)


def words(replica: Replica, now_ms: int) -> str:
    """What a draining replica does, for people."""
    seconds = max(0, replica.drain_until_ms - now_ms + 999) // 1000
    return f"draining: it gets no new requests, and those on their way may finish for {seconds} s more"


def _end(turn: Turn, replica: Replica) -> None:
    is_cut = replica.id in turn.state.draining
    if is_cut:
        turn.emit(EndDrain(replica.id, replica.generation))
    forget(turn, replica.id)
    turn.put(
        replace(replica, state="stopping", drain_until_ms=0),
        "replica_stopping",
        reason="the drain's time is over" if is_cut else "no request is on its way",
    )


def _set(state: State, replica: str, generation: int | None) -> None:
    state.draining.pop(replica, None)
    if generation is not None:
        state.draining[replica] = generation


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {ReplicaIdle: replica_idle}
