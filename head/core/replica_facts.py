"""What is true of replicas now, as pure functions. Imports none of the modules that act on it."""

from __future__ import annotations

from head.core.objects import Replica, copy_key
from head.core.state import State


def uses_copy(state: State, key: str) -> bool:
    """Whether an engine runs from this copy (or is about to), so that it must be neither dropped nor evicted."""
    _, _, device = key.rpartition("|")
    node, _, storage = device.partition(":")
    if storage not in ("disk", "dram"):
        return False
    for replica_id in state.replicas_by_node.get(node, ()):
        replica = state.replicas[replica_id]
        if not replica.model or replica.state == "failed":
            continue
        if key == copy_key(replica.model, replica.revision, device) and (storage == "disk" or replica.device == device):
            return True
    return False


def of_service(state: State, service: str) -> list[Replica]:
    """The replicas of a service by slot."""
    held = [state.replicas[key] for key in state.replicas_by_service.get(service, ())]
    return sorted(held, key=lambda replica: replica.slot)
