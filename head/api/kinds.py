"""The nodes by kind, for the planner: ten thousand alike are looked at once."""

from __future__ import annotations

import msgspec

from common.wire import Inventory
from head.core.state import State
from head.planner.endpoints.questions import NodeKind, kind_of


class Kinds:
    """The nodes by kind. A node's inventory is looked at again only when it is another object."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Inventory, NodeKind]] = {}

    def of(self, state: State) -> tuple[NodeKind, ...]:
        """All nodes that have registered and were not removed."""
        seen, self._seen = self._seen, {}
        groups: dict[int, tuple[NodeKind, list[str]]] = {}
        same: dict[NodeKind, NodeKind] = {}
        for node_id, node in state.nodes.items():
            known = seen.get(node_id)
            if known is None or known[0] is not node.inventory:
                kind = kind_of(node.inventory)
                known = (node.inventory, kind)
            kind = same.setdefault(known[1], known[1])
            self._seen[node_id] = (node.inventory, kind)
            groups.setdefault(id(kind), (kind, []))[1].append(node_id)
        return tuple(msgspec.structs.replace(kind, node_ids=tuple(ids)) for kind, ids in groups.values())
