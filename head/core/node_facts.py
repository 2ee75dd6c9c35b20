"""What is true of a node now, as pure functions: its state, whether anything may be placed on it, its lease times."""

from __future__ import annotations

from common import limits
from common.errors import HerderError, NodeCordoned, NodeUnreachable
from head.core.objects import Node
from head.core.state import State


def interval_ms(state: State) -> int:
    """Interval between lease renewals at which the whole cluster sends at most LEASES_PER_S.

    Source: Nomad's RateScaledInterval (idea).
    """
    return max(limits.INTERVAL_FLOOR_MS, len(state.nodes) * 1_000 // limits.LEASES_PER_S)


def lease_ms(state: State) -> int:
    """How long a node is believed alive after its last word."""
    return limits.LEASE_INTERVALS * interval_ms(state)


def respread_ms(state: State) -> int:
    """Over how long agents must spread their reconnecting so that the head can admit them all."""
    return max(1_000, len(state.nodes) * 1_000 // limits.HELLO_RATE_PER_S)


def node_state(state: State, node_id: str, now_ms: int) -> str:
    """online | suspect | unreachable | left | unknown.

    unknown: the head started lately and has not heard of the node yet (also: no such node). suspect: its session is
    closed or its lease is over, but it is not judged lost yet.
    """
    node = state.nodes.get(node_id)
    if node is None:
        return "unknown"
    if node.status != "online":
        return node.status
    live = state.live.get(node_id)
    if live is None or live.last_seen_ms == 0:
        return "unknown" if now_ms < state.settle_until_ms else "suspect"
    if live.session_id and now_ms <= live.lease_until_ms:
        return "online"
    return "suspect"


def is_reachable(state: State, node_id: str, now_ms: int) -> bool:
    """Whether the node's bytes can be counted on now: online or (for the moment) suspect."""
    return node_state(state, node_id, now_ms) in ("online", "suspect")


def is_placeable(state: State, node_id: str, now_ms: int) -> tuple[bool, str]:
    """Whether new copies and replicas may go to a node, and if not why, in words."""
    node = state.nodes.get(node_id)
    if node is None:
        return False, "the node is not known"
    reason = _standing_reason(node)
    if reason:
        return False, reason
    seen = node_state(state, node_id, now_ms)
    if seen == "online":
        return True, ""
    if seen == "unknown":
        return False, "the node has not been heard of since the head started"
    return False, f"the node is {seen}"


def refusal(state: State, node_id: str, now_ms: int) -> HerderError | None:
    """The error for an order that names this node, or None when it may be placed there.

    A node that is only silent (suspect, or unknown after a head start) is not refused: the order waits for it.
    """
    node = state.nodes[node_id]
    reason = _standing_reason(node)
    if reason:
        return NodeCordoned(
            f"{node_id}: {reason}", hint=f"`herder nodes uncordon {node_id}` if it shall take new work", node=node_id
        )
    if node.status == "unreachable":
        return NodeUnreachable(f"{node_id} is unreachable", hint="is its agent running?", node=node_id)
    return None


def _standing_reason(node: Node) -> str:
    if node.drain_deadline_ms:
        return "the node is draining" if not node.is_drained else "the node is drained"
    if node.is_cordoned:
        return "the node is cordoned"
    if node.status == "left":
        return "the node has left"
    if node.leaving_ms:
        return "the node is leaving"
    return ""
