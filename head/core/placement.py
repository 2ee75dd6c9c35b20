"""Placement: which node and device a replica gets. Pure: reads the state, changes nothing, gives the same answer twice.

Each possible place is judged by filters with named reasons (node, labels, engine, GPU, memory, disk, port) and, if it
passes, scored by integers (less is better). The order of wishes: a node where this replica has not failed; the model
already in RAM, else on disk, else elsewhere; fewer replicas of the same service, then fewer in all; ties by node id.

GPUs: a replica reserves its GPUs whole unless its recipe or its configuration declares `gpu_memory_bytes`; replicas
that declare may share a GPU as long as the declared bytes fit. An engine that nobody measured may take all there is
(most do, on purpose), so sharing by guess would break both. What is reserved stays reserved until the agent has said
that the engine is gone.

Memory is what the recipe or the configuration declares, else what the planner estimates from the model's dimensions
and the engine's settings (`memory_needs`), else the model's bytes and a tenth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any
from zlib import crc32

import msgspec

from common import limits
from common.errors import NothingFits
from common.ids import Device, parse_device
from common.recipe import Recipe
from common.wire import Gpu, GpuReading
from head.core import copy_facts, memory_needs, node_facts
from head.core.objects import Copy, Node, Replica, Service, copy_key
from head.core.state import State
from head.planner.serving.need import MemoryNeed
from herder.types import Candidate

HOST_BASE_BYTES = 256 << 20  # an engine process without its model
FITS = "fits"
_COPY_COMING = frozenset({"planned", "waiting", "reserved", "fetching", "verifying", "syncing", "ready"})


class Need(msgspec.Struct, frozen=True):
    """What one replica asks for. Bytes 0: not declared. `devices` empty: anywhere."""

    service: str
    replica: str
    model: str = ""
    revision: str = ""
    model_bytes: int = 0  # 0: not known yet
    runtime: str = ""  # "": any node will do
    gpus: int = 0
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0
    on_host: MemoryNeed | None = None  # the planner's estimate for an engine without a GPU; None: there is none
    on_gpus: MemoryNeed | None = None  # and for one with the GPUs it needs
    port: int = 0
    labels: dict[str, str] = {}
    devices: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    ignore_replica: str = ""  # a replica whose reservation does not count: the one that is being replaced


class Place(msgspec.Struct, frozen=True):
    """Where a replica goes and what is reserved for it there."""

    node: str
    device: str
    gpus: tuple[int, ...] = ()
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0
    is_exclusive: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """One place judged. `code` names the filter that refused; reasons carry no live readings, `numbers` do."""

    node: str
    device: str
    code: str
    reason: str
    numbers: dict[str, Any] = {}
    place: Place | None = None
    score: tuple[int, ...] = ()

    def to_candidate(self) -> Candidate:
        """As `herder why` shows it."""
        verdict = FITS if self.place is not None else "refused"
        where = {"device": self.device} if self.device else {}
        return Candidate(self.node, verdict, self.reason, {**where, **self.numbers})


def estimate_memory_bytes(model_bytes: int, storage: str) -> int:
    """Host memory of an engine: the process, and its model (with a tenth for the cache) where no GPU holds it."""
    if storage.startswith("gpu"):
        return HOST_BASE_BYTES + model_bytes // 10
    return HOST_BASE_BYTES + model_bytes + model_bytes // 10


def choose(state: State, need: Need, now_ms: int) -> Place:
    """The best place.

    Raises: NothingFits with the reason of every place that was looked at (the first PAGE_ITEMS of them).
    """
    best: Verdict | None = None
    refused: list[Verdict] = []
    for verdict in _judged(state, need, now_ms):
        if verdict.place is None:
            if len(refused) < limits.PAGE_ITEMS:
                refused.append(verdict)
        elif best is None or _order(verdict) < _order(best):
            best = verdict
    if best is not None and best.place is not None:
        return best.place
    raise NothingFits(
        summary(refused, need),
        hint=f"`herder why service {need.service}` shows every node with its numbers",
        nodes={verdict.device or verdict.node: verdict.reason for verdict in refused[:50]},
        **_estimates(need),
    )


def _estimates(need: Need) -> dict[str, Any]:
    """What the planner estimated, as details of a refusal; nothing where memory is declared or not estimated."""
    is_on_gpus = bool(need.gpus) or any(parse_device(device).storage.startswith("gpu") for device in need.devices)
    estimate = need.on_gpus if is_on_gpus else need.on_host
    shown: dict[str, Any] = {}
    if estimate is not None and estimate.host and not need.memory_bytes:
        shown["memory"] = memory_needs.numbers(estimate, "host")
    if estimate is not None and estimate.gpu and not need.gpu_memory_bytes:
        shown["gpu_memory"] = memory_needs.numbers(estimate, "gpu")
    return shown


def candidates(state: State, need: Need, now_ms: int, *, limit: int = limits.PAGE_ITEMS) -> tuple[Candidate, ...]:
    """Every place with its verdict, those that fit first, best first."""
    verdicts = list(_explicit(state, need, now_ms) if need.devices else _on_nodes(state, need, now_ms, state.nodes))
    fits = sorted((v for v in verdicts if v.place is not None), key=_order)
    refused = sorted((v for v in verdicts if v.place is None), key=lambda v: (v.node, v.device))
    return tuple(verdict.to_candidate() for verdict in [*fits, *refused][:limit])


def summary(refused: list[Verdict], need: Need) -> str:
    """Why nothing fits, in words that stay the same while the world does."""
    if not refused:
        return "there is no node yet" if not need.devices else "none of its devices is known"
    if len(refused) <= 3:
        return "nothing fits: " + "; ".join(f"{v.device or v.node}: {v.reason}" for v in refused)
    counts: dict[str, int] = {}
    for verdict in refused:
        counts[verdict.code] = counts.get(verdict.code, 0) + 1
    causes = ", ".join(
        f"{count} × {code}" for code, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    return f"nothing fits on {len(refused)} nodes: {causes}"


def gpu_use(state: State, node_id: str, *, ignore: str = "") -> dict[int, list[Replica]]:
    """The replicas that hold each GPU of a node, by index."""
    use: dict[int, list[Replica]] = {}
    for key in state.replicas_by_node.get(node_id, ()):
        if key != ignore:
            for index in state.replicas[key].gpus:
                use.setdefault(index, []).append(state.replicas[key])
    return use


def reserved_gpu_bytes(holders: Iterable[Replica], gpu: Gpu) -> int:
    """Bytes of a GPU that its holders have reserved."""
    return sum(gpu.memory_bytes if holder.is_exclusive else holder.gpu_memory_bytes for holder in holders)


def _judged(state: State, need: Need, now_ms: int) -> Iterator[Verdict]:
    if need.devices:
        yield from _explicit(state, need, now_ms)
        return
    if len(state.nodes) <= limits.PLACEMENT_NODES_EXACT:
        yield from _on_nodes(state, need, now_ms, state.nodes)
        return
    yield from _sampled(state, need, now_ms)


def _sampled(state: State, need: Need, now_ms: int) -> Iterator[Verdict]:
    """On large clusters: a few of the nodes that fit, first those with the model in RAM, then on disk, then others.

    Comparing all of 10,000 nodes for each of thousands of replicas would cost seconds; the best of a dozen is nearly
    as good. Where to begin depends on the replica, so that many do not pile up on the same nodes. A worse kind of node
    is looked at only where the better ones are too few (or this replica has failed there), and all of them before the
    answer is that nothing fits.
    Source: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001).
    """
    place = crc32(need.replica.encode())
    seen: set[str] = set()
    fitting = 0
    for nodes in (_holders(state.warm_by_model, need), _holders(state.ready_by_model, need), list(state.nodes)):
        start = place % max(1, len(nodes))
        for node_id in chain(islice(nodes, start, None), islice(nodes, start)):
            if node_id in seen:
                continue
            seen.add(node_id)
            for verdict in _on_nodes(state, need, now_ms, (node_id,)):
                fitting += verdict.place is not None and node_id not in need.avoid
                yield verdict
            if fitting >= limits.PLACEMENT_SAMPLE:
                return


def _holders(index: dict[str, dict[str, None]], need: Need) -> list[str]:
    """The nodes of an index's copies of the model at the revision."""
    prefix = copy_key(need.model, need.revision, "")
    keys = index.get(need.model, ()) if need.model else ()
    return [key[len(prefix) :].partition(":")[0] for key in keys if key.startswith(prefix)]


def _on_nodes(state: State, need: Need, now_ms: int, nodes: Iterable[str]) -> Iterator[Verdict]:
    for node_id in nodes:
        node = state.nodes.get(node_id)
        if node is not None:
            yield _judge(state, need, node, None, now_ms)


def _explicit(state: State, need: Need, now_ms: int) -> Iterator[Verdict]:
    for text in dict.fromkeys(need.devices):
        device = parse_device(text)
        node = state.nodes.get(device.node)
        if node is None:
            yield Verdict(device.node, text, "unknown node", f"node {device.node} is not known")
        else:
            yield _judge(state, need, node, device, now_ms)


def _judge(state: State, need: Need, node: Node, device: Device | None, now_ms: int) -> Verdict:
    """One node (or one device of it) against every filter, cheapest first."""
    where = str(device) if device is not None else ""

    def no(code: str, reason: str, **numbers: Any) -> Verdict:
        return Verdict(node.id, where, code, reason, numbers)

    is_placeable, why_not = node_facts.is_placeable(state, node.id, now_ms)
    if not is_placeable:
        return no("node not available", why_not)
    labels = {**node.agent_labels, **node.labels} if need.labels else {}
    missing = [f"{key}={value}" for key, value in need.labels.items() if labels.get(key) != value]
    if missing:
        return no("label missing", f"label {', '.join(missing)} is missing")
    if need.runtime and need.runtime != "command" and need.runtime not in node.inventory.engines:
        found = sorted(node.inventory.engines)
        return no("engine missing", f"the engine {need.runtime} is not installed", engines=found)
    held = [state.replicas[key] for key in state.replicas_by_node.get(node.id, ()) if key != need.ignore_replica]
    if len(held) >= limits.REPLICAS_PER_NODE:
        return no("too many replicas", f"it has {len(held)} replicas already", replicas=len(held))
    if need.port and (taken := next((r for r in held if need.port == _port_of(state, r)), None)) is not None:
        return no("port taken", f"port {need.port} is taken by {taken.id}", port=need.port)
    return _judge_bytes(state, need, node, device, held, no)


def _judge_bytes(state: State, need: Need, node: Node, device: Device | None, held: list[Replica], no: Any) -> Verdict:
    copies = _copies(state, need, node.id)
    storage = device.storage if device is not None else _storage(need, copies)
    gpus: tuple[int, ...] = ()
    if storage.startswith("gpu"):
        chosen = _choose_gpus(state, need, node, device)
        if isinstance(chosen, str):
            return no("no GPU free", chosen, gpus=len(node.inventory.gpus))  # type: ignore[no-any-return]
        gpus = chosen
        storage = f"gpu{gpus[0]}"
    elif need.gpus:
        return no("not a GPU", f"the recipe needs {need.gpus} GPU and {storage} is none")  # type: ignore[no-any-return]
    estimate = None if need.memory_bytes else need.on_gpus if gpus else need.on_host
    memory = need.memory_bytes or _memory_bytes(need, estimate, storage)
    short = _memory_short(state, node, held, memory, copies, storage, need.model_bytes)
    if short is not None:
        parts = f" ({memory_needs.shown(estimate, 'host')})" if estimate is not None and estimate.host else ""
        return no("memory full", short[0] + parts, **short[1])  # type: ignore[no-any-return]
    short = _disk_short(state, node, copies, need)
    if short is not None:
        return no("disk full", short[0], **short[1])  # type: ignore[no-any-return]
    is_exclusive = bool(gpus) and not need.gpu_memory_bytes
    sizes = [gpu.memory_bytes for gpu in node.inventory.gpus if gpu.index in gpus]
    place = Place(
        node=node.id,
        device=f"{node.id}:{storage}",
        gpus=gpus,
        memory_bytes=memory,
        gpu_memory_bytes=min(sizes, default=0) if is_exclusive else need.gpu_memory_bytes if gpus else 0,
        is_exclusive=is_exclusive,
    )
    dram, disk = copies
    local = 2 if dram is not None and dram.state == "ready" else 1 if disk is not None and disk.state == "ready" else 0
    same = sum(1 for replica in held if replica.service == need.service)
    score = (int(node.id in need.avoid), -local, same, len(held))
    words = ("fetches the model", "has the model on disk", "has the model in RAM")[local] if need.model else "has room"
    numbers: dict[str, Any] = {"local": local, "replicas_of_service": same, "replicas": len(held)}
    if estimate is not None and estimate.host:
        numbers["memory"] = memory_needs.numbers(estimate, "host")
    if gpus and need.on_gpus is not None and not need.gpu_memory_bytes:
        numbers["gpu_memory"] = memory_needs.numbers(need.on_gpus, "gpu")
    return Verdict(node.id, place.device, FITS, words, numbers, place, score)


def _memory_bytes(need: Need, estimate: MemoryNeed | None, storage: str) -> int:
    """Host memory to reserve where none is declared."""
    if estimate is not None and estimate.host:
        return estimate.host_bytes
    return estimate_memory_bytes(need.model_bytes, storage) if need.model_bytes else 0


def _port_of(state: State, replica: Replica) -> int:
    """The port that a replica has or will get; 0 while its node is free to choose."""
    service = state.services.get(replica.service)
    recipe = state.recipes.get(service.recipe) if service is not None else None
    return replica.port or (service.port if service is not None else 0) or (recipe.port if recipe is not None else 0)


def _order(verdict: Verdict) -> tuple[tuple[int, ...], str, str]:
    """Better places first: the smaller score, then the smaller node id and device."""
    return verdict.score, verdict.node, verdict.device


def _copies(state: State, need: Need, node_id: str) -> tuple[Copy | None, Copy | None]:
    """The dram and the disk copy of the model on a node, of those that shall stay and can be hoped for."""

    def one(storage: str) -> Copy | None:
        copy = state.copies.get(copy_key(need.model, need.revision, f"{node_id}:{storage}")) if need.model else None
        return copy if copy is not None and copy.desired == "present" and copy.state in _COPY_COMING else None

    return one("dram"), one("disk")


def _storage(need: Need, copies: tuple[Copy | None, Copy | None]) -> str:
    if need.gpus:
        return "gpu"
    return "dram" if copies[0] is not None and copies[0].state == "ready" else "disk"


def _choose_gpus(state: State, need: Need, node: Node, device: Device | None) -> tuple[int, ...] | str:
    """Indices of the GPUs to take, the asked-for one first; or why there are not enough, in words."""
    wanted = max(1, need.gpus)
    if not node.inventory.gpus:
        return f"it has no GPU ({node.inventory.gpu_reason})" if node.inventory.gpu_reason else "it has no GPU"
    live = state.live.get(node.id)
    telemetry = live.telemetry if live is not None else None
    readings = {reading.index: reading for reading in telemetry.gpus} if telemetry is not None else {}
    use = gpu_use(state, node.id, ignore=need.ignore_replica)
    fits: list[tuple[int, int]] = []
    reasons: dict[int, str] = {}
    for gpu in node.inventory.gpus:
        reason = _gpu_refusal(need, gpu, use.get(gpu.index, []), readings.get(gpu.index))
        if reason:
            reasons[gpu.index] = reason
        else:
            fits.append((gpu.memory_bytes - reserved_gpu_bytes(use.get(gpu.index, []), gpu), gpu.index))
    if device is not None and not any(index == device.index for _, index in fits):
        return reasons.get(device.index) or f"there is no gpu{device.index}; it has {len(node.inventory.gpus)}"
    first = device.index if device is not None else -1
    # the tightest that fits first, so that larger holes stay for larger engines
    ordered = [index for _, index in sorted(fits, key=lambda fit: (fit[1] != first, fit[0], fit[1]))]
    if len(ordered) < wanted:
        listed = "; ".join(f"gpu{index} {reason}" for index, reason in list(reasons.items())[:8])
        return f"{len(ordered)} of {wanted} GPUs have room" + (f": {listed}" if listed else "")
    return tuple(ordered[:wanted])


def _gpu_refusal(need: Need, gpu: Gpu, holders: list[Replica], reading: GpuReading | None) -> str:
    """Why a GPU cannot be taken, in words; empty when it can."""
    if reading is not None and reading.is_lost:
        return "is lost (fallen off the bus)"
    if gpu.mig_mode and not gpu.mig_parent:
        return "is split into MIG instances"
    exclusive = next((holder.id for holder in holders if holder.is_exclusive), "")
    if exclusive:
        return f"is taken by {exclusive}"
    asked, words = _gpu_asked(need, gpu)
    if not need.gpu_memory_bytes and holders:
        return f"is shared by {', '.join(holder.id for holder in holders)}; declare gpu_memory_bytes to share it"
    if not gpu.memory_bytes:  # the driver does not say: one replica, which has it whole
        return f"does not say its memory and is used by {holders[0].id}" if holders else ""
    share = need.on_gpus.share if need.on_gpus is not None and not need.gpu_memory_bytes else 0.0
    if share and need.on_gpus is not None and need.on_gpus.gpu_bytes > share * gpu.memory_bytes:
        whole = f"{share:g} of {_gib(gpu.memory_bytes)}"
        return f"has {whole} for the engine; {_gib(need.on_gpus.gpu_bytes)} are needed{words}"
    free = gpu.memory_bytes - reserved_gpu_bytes(holders, gpu)
    if asked > free:
        return f"has {_gib(free)} of {_gib(gpu.memory_bytes)} unreserved; {_gib(asked)} are needed{words}"
    starting = reserved_gpu_bytes((h for h in holders if h.state != "ready"), gpu)
    if reading is not None and reading.memory_free_bytes - starting < asked:
        return f"has less free memory than the {_gib(asked)} needed: something else uses it{words}"
    return ""


def _gpu_asked(need: Need, gpu: Gpu) -> tuple[int, str]:
    """Bytes of a GPU that have to be free: declared, as the planner estimates them, or the model's and a tenth; and
    the estimate's parts in words."""
    if need.gpu_memory_bytes:
        return need.gpu_memory_bytes, ""
    estimate = need.on_gpus
    if estimate is not None and estimate.gpu:
        taken = int(estimate.share * gpu.memory_bytes)
        return max(taken, estimate.gpu_bytes), f" ({memory_needs.shown(estimate, 'gpu')})"
    per_gpu = -(-need.model_bytes // max(1, need.gpus))
    return per_gpu + per_gpu // 10, ""


def _memory_short(
    state: State,
    node: Node,
    held: list[Replica],
    asked: int,
    copies: tuple[Copy | None, Copy | None],
    storage: str,
    model_bytes: int,
) -> tuple[str, dict[str, Any]] | None:
    """What is missing of host memory (and of the RAM tier's budget, for a replica that runs from it), or None."""
    in_dram = sum(
        state.copies[key].bytes
        for key in state.copies_by_node.get(node.id, ())
        if state.copies[key].device == f"{node.id}:dram"
    )
    if storage == "dram" and copies[0] is None and model_bytes > node.inventory.dram_budget_bytes:
        budget = node.inventory.dram_budget_bytes
        words = f"the model has {_gib(model_bytes)}, the RAM tier at most {_gib(budget)}"
        return words, {"needed_bytes": model_bytes, "dram_budget_bytes": budget}
    if copies[0] is not None and not storage.startswith("gpu"):
        asked -= min(asked, copies[0].bytes)  # the engine maps what is locked already
    if not node.inventory.memory_bytes or not asked:
        return None
    reserved = sum(replica.memory_bytes for replica in held)
    free = node.inventory.memory_bytes - reserved - in_dram
    numbers = {"needed_bytes": asked, "reserved_bytes": reserved, "memory_bytes": node.inventory.memory_bytes}
    if asked > free:
        whole = _gib(node.inventory.memory_bytes)
        words = f"{_gib(max(0, free))} of {whole} memory are unreserved; {_gib(asked)} are needed"
        return words, numbers
    live = state.live.get(node.id)
    telemetry = live.telemetry if live is not None else None
    if telemetry is None or not telemetry.memory_available_bytes:
        return None
    starting = sum(replica.memory_bytes for replica in held if replica.state != "ready")
    if asked > telemetry.memory_available_bytes - starting:
        numbers["available_bytes"] = telemetry.memory_available_bytes
        return f"less memory is available than the {_gib(asked)} needed: something else uses it", numbers
    return None


def _disk_short(
    state: State, node: Node, copies: tuple[Copy | None, Copy | None], need: Need
) -> tuple[str, dict[str, Any]] | None:
    """What is missing of disk for a model that is not there yet, or None. What eviction could free counts as free."""
    store = node.inventory.disks[0] if node.inventory.disks else None
    total = node.inventory.disk_budget_bytes or (store.total_bytes if store is not None else 0)
    if copies[1] is not None or not need.model_bytes or not total or need.model_bytes <= total:
        return None
    words = f"the model has {_gib(need.model_bytes)}, the store at most {_gib(total)}"
    return words, {"needed_bytes": need.model_bytes, "disk_bytes": total}


def need_of(
    state: State, service: Service, replica: str, recipe: Recipe | None, memory_bytes: int, gpu_memory_bytes: int
) -> Need:
    """What one replica of a service asks for; without a recipe (not chosen yet) only what its model asks for."""
    on_host, on_gpus = memory_needs.needs_of(state, service, recipe)
    return Need(
        service=service.name,
        replica=replica,
        model=service.model if recipe is None or recipe.needs_model else "",
        revision=service.revision,
        model_bytes=copy_facts.expected_bytes(state, service.model, service.revision),
        runtime=recipe.runtime if recipe is not None else "",
        gpus=recipe.resources.gpus if recipe is not None else 0,
        memory_bytes=memory_bytes,
        gpu_memory_bytes=gpu_memory_bytes,
        on_host=on_host,
        on_gpus=on_gpus,
        port=service.port or (recipe.port if recipe is not None else 0),
        labels=service.labels,
        devices=service.devices,
    )


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
