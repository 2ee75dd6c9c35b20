"""What is true of copies now, as pure functions, and the one way in which a copy becomes unwanted.

disk and dram copies are the head's own business; copies on gpuN are projections of replicas and only listed.
A dram copy is the disk copy of the same node made resident, so the disk copy backs it and stays while it does.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec

from common.manifest import Manifest
from head.core import node_facts, replica_facts
from head.core.objects import Copy, copy_key
from head.core.state import State
from head.core.turn import Turn

NOT_BEGUN = ("planned", "waiting")
IN_FLIGHT = ("reserved", "fetching", "verifying", "syncing", "loading")  # loading: disk to RAM
_LOCAL_SCHEMES = ("file://",)
_LOOKED_FOR_SIZE = 64  # copies asked for a size; a model on 10,000 nodes must not cost a walk each time


def node_of(copy: Copy) -> str:
    """The node a copy is on."""
    return copy.device.partition(":")[0]


def storage_of(copy: Copy) -> str:
    """disk | dram | gpuN."""
    return copy.device.partition(":")[2]


def is_projection(copy: Copy) -> bool:
    """Whether the copy is a replica's weights on a GPU, put by services."""
    return storage_of(copy).startswith("gpu")


def manifest_of(state: State, model: str, revision: str) -> Manifest | None:
    """The verified manifest of a model at a revision, once a node has made it."""
    kept = state.manifests.get(f"{model}@{revision}")
    return kept.manifest if kept else None


def size_of(state: State, copy: Copy) -> int:
    """Bytes of a copy: its own figure, else the manifest's, else 0 (not known yet)."""
    if copy.bytes:
        return copy.bytes
    manifest = manifest_of(state, copy.model, copy.revision)
    return manifest.size_bytes if manifest else 0


def expected_bytes(state: State, model: str, revision: str) -> int:
    """Best guess of a model's size before it is fetched: manifest, another copy, registered `size_bytes`; else 0."""
    manifest = manifest_of(state, model, revision)
    if manifest is not None:
        return manifest.size_bytes
    for key in islice(state.copies_by_model.get(model, ()), _LOOKED_FOR_SIZE):
        copy = state.copies[key]
        if copy.revision == revision and copy.bytes and not is_projection(copy):
            return copy.bytes
    registered = state.models.get(model)
    hint = registered.metadata.get("size_bytes") if registered else None
    return hint if isinstance(hint, int) and not isinstance(hint, bool) and 0 <= hint < 1 << 60 else 0


def backing_of(state: State, copy: Copy) -> Copy | None:
    """The disk copy under a dram copy."""
    return state.copies.get(copy_key(copy.model, copy.revision, f"{node_of(copy)}:disk"))


def is_backing(state: State, copy: Copy) -> bool:
    """Whether a dram copy of the same node stands, or is to stand, on this disk copy."""
    if storage_of(copy) != "disk":
        return False
    above = state.copies.get(copy_key(copy.model, copy.revision, f"{node_of(copy)}:dram"))
    # a dram copy on its way out still has the pages mapped until the agent confirms
    return above is not None and above.state != "failed"


def readers_of(state: State, copy: Copy) -> list[str]:
    """Keys of the copies that may be reading from this one now."""
    if storage_of(copy) != "disk":
        return []
    return [key for key in state.readers.get(node_of(copy), ()) if copy.key in state.offered.get(key, ())]


def is_wanted(state: State, copy: Copy) -> bool:
    """Whether something durable needs this copy: a pin, a replica, or a dram copy on it."""
    return bool(copy.pins) or is_backing(state, copy) or replica_facts.uses_copy(state, copy.key)


def survivors(state: State, copy: Copy, now_ms: int) -> list[Copy]:
    """Other ready disk copies of the same model and revision on nodes that can be reached now."""
    others = (state.copies[key] for key in state.ready_by_model.get(copy.model, ()))
    return [
        other
        for other in others
        if other.key != copy.key
        and other.revision == copy.revision
        and node_facts.is_reachable(state, node_of(other), now_ms)
    ]


def has_source(state: State, model: str, *, remote_only: bool = False) -> bool:
    """Whether a model could be fetched again from what was registered; `remote_only`: from beyond the nodes' disks."""
    registered = state.models.get(model)
    sources = registered.sources if registered else ()
    return any(not (remote_only and source.startswith(_LOCAL_SCHEMES)) for source in sources)


def is_last(state: State, copy: Copy, now_ms: int, *, remote_only: bool) -> bool:
    """Whether dropping this disk copy would lose the model for good. One that is being verified has its bytes, too."""
    if storage_of(copy) != "disk" or copy.state not in ("ready", "verifying"):
        return False
    return not has_source(state, copy.model, remote_only=remote_only) and not survivors(state, copy, now_ms)


def last_used_ms(state: State, copy: Copy) -> int:
    """When the copy was last used: by an engine, a transfer or a person who asked for it."""
    return max(copy.created_ms, copy.last_used_ms, state.last_used_ms.get(copy.key, 0))


def next_generation(turn: Turn, copy: Copy | None) -> int:
    """The fencing number of a copy's next order: above every number that its agent has seen of it."""
    return max(turn.next_generation(), copy.generation + 1 if copy else 0)


def make_absent(turn: Turn, copy: Copy, what: str, *, cause: str = "", **detail: Any) -> Copy:
    """Records that a copy shall be gone; its object stays until the agent confirms."""
    gone = msgspec.structs.replace(
        copy,
        desired="absent",
        state="dropping",
        generation=next_generation(turn, copy),
        cause=cause or turn.cause,
        pins=(),
        attempts=0,
        not_before_ms=0,
        error=None,
    )
    turn.put(gone, what, cause=cause, **detail)
    return gone
