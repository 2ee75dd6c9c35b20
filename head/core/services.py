"""Services and their replicas: desired state becomes placed engines, and reports become replica states.

Signatures that the node and copy modules build against; the rules follow in this file and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from common import wire
from head.core.events import Event
from head.core.state import State
from head.core.turn import Turn

HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {}


def observe(turn: Turn, node_id: str, replica_statuses: Iterable[wire.ReplicaStatus]) -> None:
    """Takes in a full report of a node: what it names is updated, what it leaves out is not there."""


def on_progress(turn: Turn, node_id: str, progress: wire.Progress) -> None:
    """Takes in the progress of a "replica:<id>" command (its state word)."""


def on_result(turn: Turn, node_id: str, result: wire.Result) -> None:
    """Takes in how a "replica:<id>" command ended; stale generations are ignored. The caller acknowledges."""


def on_node_rebooted(turn: Turn, node_id: str) -> None:
    """The node came back with a new boot id: every engine there is gone."""


def on_node_draining(turn: Turn, node_id: str) -> None:
    """The node was told to drain (or stopped draining): its services look for other places."""


def on_node_lost(turn: Turn, node_id: str) -> None:
    """The node's lease ended, or it left or was removed: services there reconsider."""


def on_tick(turn: Turn) -> None:
    """Once a second: services that wait for something look again when their time has come."""


def uses_copy(state: State, copy_key: str) -> bool:
    """Whether an engine runs from this copy (or is about to), so that it must be neither dropped nor evicted."""
    return False


def reconcile_service(turn: Turn, key: str) -> None:
    """Makes the service's replicas what its spec says."""


def reconcile_replica(turn: Turn, key: str) -> None:
    """Stages what the replica needs and sends its command when one is due."""
