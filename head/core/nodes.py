"""Nodes: what operators ask of them (cordon, drain, labels, removal), and the public face of the node rules.

Sessions are in `node_sessions`, leases and the tick in `liveness`, what is true of a node now in `node_facts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common import ids
from common.errors import InUse, InvalidValue, LastCopy, NodeNotFound
from head.core import benchmark_runs, copy_facts, copy_sources, drains, liveness, node_sessions, services
from head.core.effects import Alarm, CloseSession
from head.core.events import (
    CordonRequested,
    DrainRequested,
    Event,
    RemoveNodeRequested,
    ResetIdentityRequested,
    UpdateNodeRequested,
)
from head.core.node_facts import interval_ms, is_placeable, is_reachable, lease_ms, node_state, respread_ms
from head.core.objects import Copy, Node
from head.core.state import State
from head.core.turn import Turn

__all__ = [
    "HANDLERS",
    "interval_ms",
    "is_placeable",
    "is_reachable",
    "lease_ms",
    "node_state",
    "reconcile",
    "respread_ms",
]
_REASON_CHARS = 500


def cordon(turn: Turn, event: CordonRequested) -> None:
    """Closes a node to new work, or opens it again, which also ends its drain. Answered with "node:<id>"."""
    node = _known(turn.state, event.node)
    was_draining = node.drain_deadline_ms > 0
    if event.is_cordoned:
        changed = msgspec.structs.replace(node, is_cordoned=True)
    else:
        changed = msgspec.structs.replace(
            node, is_cordoned=False, drain_deadline_ms=0, drain_lead_ms=0, drain_reason="", is_drained=False
        )
    if changed != node:
        turn.put(changed, "node_cordoned" if event.is_cordoned else "node_uncordoned", actor=event.actor)
    if was_draining and not event.is_cordoned:
        services.on_node_draining(turn, node.id)
    turn.reply(event, reference=f"node:{node.id}")


def drain(turn: Turn, event: DrainRequested) -> None:
    """Empties a node: nothing new, services move away, and what is left at the deadline is stopped.

    A drain that is asked for again gets the new deadline. It survives head starts. Answered with "node:<id>".
    """
    node = _known(turn.state, event.node)
    if not event.body.reason.isprintable() or len(event.body.reason) > _REASON_CHARS:
        raise InvalidValue(f"the reason of a drain is at most {_REASON_CHARS} printable characters")
    changed = msgspec.structs.replace(
        node,
        drain_deadline_ms=max(1, turn.now_ms + event.body.deadline_s * 1_000),
        drain_lead_ms=drains.lead_ms(turn.state, event.body.deadline_s),
        drain_reason=event.body.reason,
        is_drained=False,
    )
    turn.put(changed, "node_draining", actor=event.actor, deadline_ms=changed.drain_deadline_ms)
    services.on_node_draining(turn, node.id)
    turn.reply(event, reference=f"node:{node.id}")


def update(turn: Turn, event: UpdateNodeRequested) -> None:
    """Sets and removes an operator's labels. Answered with "node:<id>". Raises: NodeNotFound, InvalidName."""
    node = _known(turn.state, event.node)
    labels = dict(node.labels)
    for key, value in event.body.labels.items():
        if value is None:
            labels.pop(key, None)
        else:
            labels[key] = value
    ids.check_labels(labels)
    if labels != node.labels:
        turn.put(msgspec.structs.replace(node, labels=labels), "node_labelled", actor=event.actor)
    turn.reply(event, reference=f"node:{node.id}")


def reset_identity(turn: Turn, event: ResetIdentityRequested) -> None:
    """Forgets the secret of a node whose state directory was lost: the next agent that says its id binds it anew.

    A session that is open goes on. Answered with "node:<id>". Raises: NodeNotFound.
    """
    node = _known(turn.state, event.node)
    if node.identity_sha256:
        turn.put(msgspec.structs.replace(node, identity_sha256=""), "node_identity_reset", actor=event.actor)
        turn.emit(Alarm(f"wrong_identity:{node.id}", "its identity was reset", is_on=False))
    turn.reply(event, reference=f"node:{node.id}")


def remove(turn: Turn, event: RemoveNodeRequested) -> None:
    """Forgets a node and its copies. Answered with "node:<id>", which is gone then.

    Raises: NodeNotFound; unless forced also InUse (online, or engines there) and LastCopy.
    """
    state = turn.state
    node = _known(state, event.node)
    copies = [state.copies[key] for key in sorted(state.copies_by_node.get(node.id, ()))]
    if not event.force:
        _refuse_removal(turn, node, copies)
    live = state.live.pop(node.id, None)
    if live is not None:
        turn.on_rollback(lambda: state.live.__setitem__(node.id, live))
        if live.session_id:
            turn.emit(CloseSession(live.session_id, NodeNotFound(f"{node.id} was removed").info()))
    for copy in copies:
        if not copy_facts.is_projection(copy):
            turn.delete("copy", copy.key, "copy_forgotten", reason="the node was removed")
    turn.delete("node", node.id, "node_removed", actor=event.actor)
    turn.emit(Alarm(f"wrong_identity:{node.id}", "the node was removed", is_on=False))
    state.lost_ms.pop(node.id, None)
    copy_sources.forget_node(turn, node.id)
    services.on_node_lost(turn, node.id)
    state.clocks.pop(node.id, None)
    benchmark_runs.touch_on(turn, node.id)
    turn.reply(event, reference=f"node:{node.id}")


def reconcile(turn: Turn, key: str) -> None:
    """A draining node without engines is drained."""
    node = turn.state.nodes.get(key)
    if node is None or not node.drain_deadline_ms or node.is_drained:
        return
    if not turn.state.replicas_by_node.get(key):
        turn.put(msgspec.structs.replace(node, is_drained=True), "node_drained")


def _refuse_removal(turn: Turn, node: Node, copies: list[Copy]) -> None:
    state = turn.state
    if node.status == "online" and node_state(state, node.id, turn.now_ms) != "unknown":
        raise InUse(f"{node.id} is online", hint="drain it and stop its agent first, or use force", node=node.id)
    if node_state(state, node.id, turn.now_ms) == "unknown":
        raise InUse(f"{node.id} may still come back: the head has just started", hint="wait a minute, or use force")
    engines = sorted(state.replicas_by_node.get(node.id, ()))
    if engines:
        raise InUse(f"{node.id} still has engines by the books", hint="drain it first, or use force", replicas=engines)
    last = [copy.key for copy in copies if copy_facts.is_last(state, copy, turn.now_ms, remote_only=True)]
    if last:
        raise LastCopy(
            f"{node.id} holds the last copies of {len(last)} models without a remote source",
            hint="bring the node back and copy them elsewhere, or use force",
            copies=last[:20],
        )


def _known(state: State, node_id: str) -> Node:
    node = state.nodes.get(node_id)
    if node is None:
        raise NodeNotFound(f"no node {node_id[:80]!r}", hint="`herder nodes` lists them")
    return node


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    **node_sessions.HANDLERS,
    **liveness.HANDLERS,
    CordonRequested: cordon,
    DrainRequested: drain,
    ResetIdentityRequested: reset_identity,
    UpdateNodeRequested: update,
    RemoveNodeRequested: remove,
}
