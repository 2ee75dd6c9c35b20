"""Where a copy's bytes come from: ready copies on other nodes first, then the model's registered sources.

Readers are spread: one node serves at most READERS_PER_SERVING_NODE fetches, one model's registered sources at most
ORIGIN_READERS_PER_MODEL; whoever finds no free source waits, and every copy that becomes ready is a new source.
Who reads from whom is volatile (`State.offered`, `State.readers`): after a head start it is learnt anew, and the
worst that a wrong count does is one reader too many.
"""

from __future__ import annotations

import msgspec

from common import ids, limits, wire
from common.errors import CopyNotFound, SourceNotFound
from head.core import commands, node_facts
from head.core.copy_facts import IN_FLIGHT, NOT_BEGUN, manifest_of, node_of, storage_of
from head.core.objects import Copy, copy_key
from head.core.state import State
from head.core.turn import Turn


class Plan(msgspec.Struct, frozen=True):
    """Sources in order of preference and the copies among them; or what has to be waited for."""

    sources: tuple[wire.Source, ...] = ()
    offered: tuple[str, ...] = ()
    waits_for: str = ""


def plan(state: State, copy: Copy, now_ms: int) -> Plan:
    """Sources for a disk copy, at this moment. Changes nothing.

    Raises: SourceNotFound, CopyNotFound when there is none and none is on its way.
    """
    if "://" in copy.source:
        return Plan((wire.Source(url=copy.source),))
    if copy.source:
        return _plan_from_device(state, copy, now_ms)
    peers = _ready_peers(state, copy, now_ms)
    free = [peer for peer in peers if _load(state, peer, copy.key) < limits.READERS_PER_SERVING_NODE]
    registered = state.models.get(copy.model)
    urls = tuple(wire.Source(url=url) for url in registered.sources) if registered else ()
    if free:
        chosen = free[: limits.PEERS_PER_FETCH]
        return Plan(
            tuple(_peer_source(state, peer, copy, now_ms) for peer in chosen) + urls,
            tuple(peer.key for peer in chosen),
        )
    if urls and origin_readers(state, copy) < limits.ORIGIN_READERS_PER_MODEL:
        return Plan(urls)
    if urls or peers:
        return Plan(waits_for="a source that is less busy")
    if _is_coming(state, copy):
        return Plan(waits_for="another copy that is on its way or on a node that cannot be reached")
    raise SourceNotFound(
        f"{copy.model}@{copy.revision} has no source and no copy to read from",
        hint="register a source (`herder models update NAME --source URL`) or name one",
        model=copy.model,
        avoided=list(state.avoided.get(copy.key, ())),
    )


def offer(turn: Turn, copy: Copy, chosen: Plan) -> None:
    """Notes that the copy now reads from these sources, until `release`."""
    state, key = turn.state, copy.key
    before = state.offered.get(key)
    release(state, key)
    _note(state, key, chosen.offered)

    def take_back() -> None:
        release(state, key)
        if before is not None:
            _note(state, key, before)

    turn.on_rollback(take_back)


def release(state: State, key: str) -> None:
    """Forgets from whom a copy reads; it has ended or begins anew."""
    for served in state.offered.pop(key, ()):
        node = _serving_node(served)
        readers = state.readers.get(node)
        if readers is not None:
            readers.pop(key, None)
            if not readers:
                del state.readers[node]


def forget_node(turn: Turn, node_id: str) -> None:
    """Nobody reads from a node that was removed; what else they were offered stays."""
    state = turn.state
    for key in tuple(state.readers.get(node_id, ())):
        before = state.offered[key]
        release(state, key)
        _note(state, key, tuple(served for served in before if _serving_node(served) != node_id))

        def take_back(key: str = key, before: tuple[str, ...] = before) -> None:
            release(state, key)
            _note(state, key, before)

        turn.on_rollback(take_back)


def origin_readers(state: State, copy: Copy) -> int:
    """How many other copies of the same model and revision read from its registered sources now."""
    of_model = state.copies_by_model.get(copy.model, {})
    keys = state.offered if len(state.offered) < len(of_model) else of_model  # whichever is shorter to look through
    prefix = f"{copy.model}@{copy.revision}|"
    return sum(1 for key in keys if key.startswith(prefix) and key != copy.key and state.offered.get(key) == ())


def _note(state: State, key: str, offered: tuple[str, ...]) -> None:
    state.offered[key] = offered
    for served in offered:
        state.readers[_serving_node(served)][key] = None


def _serving_node(key: str) -> str:
    """The node of a copy's key."""
    return key.rpartition("|")[2].partition(":")[0]


def _plan_from_device(state: State, copy: Copy, now_ms: int) -> Plan:
    """The one source that was asked for: the disk copy on the node of the named device."""
    node = ids.parse_device(copy.source).node
    serving = state.copies.get(copy_key(copy.model, copy.revision, f"{node}:disk"))
    if serving is None or serving.desired != "present" or serving.state == "failed":
        raise CopyNotFound(f"{copy.source} has no copy of {copy.model}@{copy.revision}", device=copy.source)
    if node in state.avoided.get(copy.key, ()):
        raise SourceNotFound(f"the copy on {copy.source} did not match the manifest", device=copy.source)
    if not _can_serve(state, serving, now_ms):
        return Plan(waits_for=f"the copy on {copy.source}")
    if _load(state, serving, copy.key) >= limits.READERS_PER_SERVING_NODE:
        return Plan(waits_for=f"{node} to be less busy")
    return Plan((_peer_source(state, serving, copy, now_ms),), (serving.key,))


def _ready_peers(state: State, copy: Copy, now_ms: int) -> list[Copy]:
    """Copies elsewhere that can be read now, the best first: not suspect, few readers, then by node."""
    avoided = state.avoided.get(copy.key, {})
    ready = (state.copies[key] for key in state.ready_by_model.get(copy.model, ()) if key != copy.key)
    found = [
        other
        for other in ready
        if other.revision == copy.revision and node_of(other) not in avoided and _can_serve(state, other, now_ms)
    ]
    found.sort(
        key=lambda other: (
            node_facts.node_state(state, node_of(other), now_ms) != "online",
            _load(state, other, copy.key),
            node_of(other),
        )
    )
    return found


def _others(state: State, copy: Copy) -> list[Copy]:
    """Disk copies of the same model and revision on other nodes, that shall be present."""
    keys = state.copies_by_model.get(copy.model, ())
    return [
        other
        for other in (state.copies[key] for key in keys if key != copy.key)
        if other.revision == copy.revision and other.desired == "present" and storage_of(other) == "disk"
    ]


def _can_serve(state: State, serving: Copy, now_ms: int) -> bool:
    """Whether a copy can be read from now: ready, its node reachable and listening, its manifest known."""
    node = state.nodes.get(node_of(serving))
    return (
        serving.state == "ready"
        and node is not None
        and node.data_port > 0
        and bool(node.advertise)
        and node_facts.is_reachable(state, node.id, now_ms)
        and manifest_of(state, serving.model, serving.revision) is not None
    )


def _is_coming(state: State, copy: Copy) -> bool:
    """Whether another copy is ready somewhere (though not to be had now) or is being fetched."""
    avoided = state.avoided.get(copy.key, {})
    return any(
        other.state in ("ready", *IN_FLIGHT) or (other.state == NOT_BEGUN[0] and other.key in state.offered)
        for other in _others(state, copy)
        if node_of(other) not in avoided
    )


def _load(state: State, serving: Copy, reader: str) -> int:
    """Fetches that read from the node of a copy, the asking one not counted."""
    return sum(1 for key in state.readers.get(node_of(serving), ()) if key != reader)


def _peer_source(state: State, serving: Copy, copy: Copy, now_ms: int) -> wire.Source:
    node = state.nodes[node_of(serving)]
    manifest = manifest_of(state, copy.model, copy.revision)
    assert manifest is not None, "only copies with a known manifest serve"
    host = f"[{node.advertise}]" if ":" in node.advertise else node.advertise
    ticket = commands.issue_ticket(
        state, serving_node=node.id, reading_node=node_of(copy), digest=manifest.digest, now_ms=now_ms
    )
    return wire.Source(url=f"peer://{host}:{node.data_port}", ticket=ticket, node=node.id)
