"""Nodes and their devices as people see them; `node_row` is the form for pages, most of it encoded once.

As in `render.py` nothing here changes anything or waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import msgspec

from common.wire import Gpu, GpuReading, Inventory, Telemetry
from head.api.render import IN_FLIGHT
from head.core import node_facts
from head.core.admission import file_system_free_bytes
from head.core.objects import Node
from head.core.state import Live, State
from herder import types as api

_ENCODED_NODES = 1_000  # some 6 kB each with 8 GPUs
_ENCODED_BYTES = 65_536  # a node that says more is encoded anew each time
_json = msgspec.json.Encoder().encode


def node_view(state: State, node: Node, now_ms: int) -> api.NodeView:
    """A node with its devices and latest readings."""
    live = state.live.get(node.id)
    telemetry = live.telemetry if live is not None else None
    readings = msgspec.to_builtins(telemetry) if telemetry is not None else None
    return _node_view(state, node, now_ms, inventory=msgspec.to_builtins(node.inventory), telemetry=readings)


def node_row(state: State, node: Node, now_ms: int) -> msgspec.Struct:
    """`node_view` for encoding only, at a fraction of its cost: a page of 500 nodes must not hold up the loop.

    What is large and stays for a while (inventory, readings, GPUs) is encoded once, until other readings come.
    """
    live = state.live.get(node.id)
    kept = _encoded(node, live.telemetry if live is not None else None)
    return _node_view(
        state,
        node,
        now_ms,
        inventory=cast(dict[str, Any], kept.inventory_json),
        telemetry=cast(dict[str, Any] | None, kept.telemetry_json),
        devices=cast(tuple[api.DeviceView, ...] | None, _encoded_devices(state, node, live, kept)),
    )


def _node_view(
    state: State,
    node: Node,
    now_ms: int,
    *,
    inventory: dict[str, Any],
    telemetry: dict[str, Any] | None,
    devices: tuple[api.DeviceView, ...] | None = None,
) -> api.NodeView:
    live = state.live.get(node.id)
    return api.NodeView(
        node_id=node.id,
        hostname=node.inventory.hostname,
        state=cast(api.NodeState, node_facts.node_state(state, node.id, now_ms)),
        state_since_ms=node.status_since_ms,
        last_seen_ms=(live.last_seen_ms or None) if live is not None else None,
        is_cordoned=node.is_cordoned,
        drain=_drain(node),
        drain_deadline_ms=node.drain_deadline_ms or None,
        labels={**node.agent_labels, **node.labels},
        version=node.version,
        address=node.advertise,
        gpu_count=len(node.inventory.gpus),
        gpu_reason=node.inventory.gpu_reason,
        devices=devices if devices is not None else device_views(state, node),
        inventory=inventory,
        telemetry=telemetry,
        copies=len(state.copies_by_node.get(node.id, ())),
        replicas=len(state.replicas_by_node.get(node.id, ())),
        unknown_copies=len(live.unknown_copies) if live is not None else 0,
    )


def device_views(state: State, node: Node) -> tuple[api.DeviceView, ...]:
    """Every device of a node: disk, dram, then the GPUs by index."""
    live = state.live.get(node.id)
    return (*_storages(state, node, live), *_gpus(state, node, live))


def _storages(state: State, node: Node, live: Live | None) -> tuple[api.DeviceView, api.DeviceView]:
    used: dict[str, int] = {}
    reserved: dict[str, int] = {}
    copies, skip = state.copies, len(node.id) + 1
    for key in state.copies_by_node.get(node.id, ()):
        copy = copies[key]
        if copy.replica:
            continue  # a projection of an engine: counted by its replica
        storage = copy.device[skip:]
        if copy.state in IN_FLIGHT:
            progress = state.progress.get(key)
            wanted = max(copy.bytes, progress.bytes_total if progress else 0)
            reserved[storage] = reserved.get(storage, 0) + wanted
        elif copy.state != "failed":
            used[storage] = used.get(storage, 0) + copy.bytes
    return _disk(node, live, used, reserved), _dram(node, live, used, reserved)


def _disk(node: Node, live: Live | None, used: dict[str, int], reserved: dict[str, int]) -> api.DeviceView:
    telemetry = live.telemetry if live is not None else None
    store = node.inventory.disks[0] if node.inventory.disks else None
    total = node.inventory.disk_budget_bytes or (store.total_bytes if store else 0)
    taken = max(used.get("disk", 0), telemetry.disk_used_bytes if telemetry else 0)
    held = max(reserved.get("disk", 0), telemetry.disk_reserved_bytes if telemetry else 0)
    free = max(0, total - taken - held)
    free = min(free, file_system_free_bytes(node, live, free))
    return api.DeviceView(f"{node.id}:disk", "disk", total, taken, held, free)


def _dram(node: Node, live: Live | None, used: dict[str, int], reserved: dict[str, int]) -> api.DeviceView:
    telemetry = live.telemetry if live is not None else None
    total = node.inventory.dram_budget_bytes
    taken = max(used.get("dram", 0), telemetry.dram_used_bytes if telemetry else 0)
    held = reserved.get("dram", 0)
    return api.DeviceView(f"{node.id}:dram", "dram", total, taken, held, max(0, total - taken - held))


def _gpus(state: State, node: Node, live: Live | None) -> Iterable[api.DeviceView]:
    if not node.inventory.gpus:
        return ()
    telemetry = live.telemetry if live is not None else None
    return _gpu_views(node, telemetry, _reserved_gpus(state, node))


def _reserved_gpus(state: State, node: Node) -> dict[str, int]:
    """Memory by GPU that engines on their way will take."""
    reserved: dict[str, int] = {}
    for key in state.replicas_by_node.get(node.id, ()):
        replica = state.replicas[key]
        if replica.desired == "running" and replica.state != "ready":
            reserved[replica.device] = reserved.get(replica.device, 0) + replica.gpu_memory_bytes
    return reserved


def _gpu_views(node: Node, telemetry: Telemetry | None, reserved: dict[str, int]) -> list[api.DeviceView]:
    readings: dict[int, GpuReading] = {reading.index: reading for reading in telemetry.gpus} if telemetry else {}
    prefix = f"{node.id}:gpu"
    return [_gpu(f"{prefix}{gpu.index}", gpu, readings.get(gpu.index), reserved) for gpu in node.inventory.gpus]


def _gpu(device: str, gpu: Gpu, reading: GpuReading | None, reserved: dict[str, int]) -> api.DeviceView:
    total, held = gpu.memory_bytes, reserved.get(device, 0)
    if reading is None:
        return api.DeviceView(device, "gpu", total, 0, held, max(0, total - held), gpu.name, gpu.uuid)
    taken = reading.memory_used_bytes
    free = total - taken - held
    return api.DeviceView(
        device,
        "gpu",
        total,
        taken,
        held,
        free if free > 0 else 0,
        gpu.name,
        gpu.uuid,
        reading.utilisation,
        reading.temperature_c,
        reading.power_w,
        reading.is_lost,
    )


def _drain(node: Node) -> str:
    if node.is_drained:
        return "drained"
    return "draining" if node.drain_deadline_ms else ""


class _Encoded(NamedTuple):
    """The large parts of a node's row as JSON, and the objects that they were made from."""

    inventory: Inventory
    telemetry: Telemetry | None
    inventory_json: msgspec.Raw
    telemetry_json: msgspec.Raw | None
    gpus_json: bytes  # views of the GPUs while nothing is reserved on them


_encoded_parts: dict[str, _Encoded] = {}


def _encoded(node: Node, telemetry: Telemetry | None) -> _Encoded:
    """The large parts of a row, kept for the nodes that were shown last until other readings come."""
    kept = _encoded_parts.get(node.id)
    if kept is not None and kept.inventory is node.inventory and kept.telemetry is telemetry:
        return kept
    is_same = kept is not None and kept.inventory is node.inventory
    inventory_json = kept.inventory_json if kept and is_same else msgspec.Raw(_json(node.inventory))
    telemetry_json = msgspec.Raw(_json(telemetry)) if telemetry is not None else None
    fresh = _Encoded(node.inventory, telemetry, inventory_json, telemetry_json, _json(_gpu_views(node, telemetry, {})))
    if len(inventory_json) + len(telemetry_json or b"") + len(fresh.gpus_json) <= _ENCODED_BYTES:
        if len(_encoded_parts) >= _ENCODED_NODES:
            _encoded_parts.clear()
        _encoded_parts[node.id] = fresh
    return fresh


def _encoded_devices(state: State, node: Node, live: Live | None, kept: _Encoded) -> msgspec.Raw | None:
    """`device_views` as JSON; None when the GPUs have to be shown with what engines reserved on them."""
    if state.replicas_by_node.get(node.id) and _reserved_gpus(state, node):
        return None
    storages = _json(_storages(state, node, live))
    if not node.inventory.gpus:
        return msgspec.Raw(storages)
    return msgspec.Raw(b"%b,%b" % (storages[:-1], kept.gpus_json[1:]))
