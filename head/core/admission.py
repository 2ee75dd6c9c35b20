"""Room on devices: which exist, how many bytes each may hold, how many are spoken for.

The head admits by its own books (copies that shall be present, ready or on their way, and what agents report beyond
that); the agent has the last word with its real file system and answers `disk_full` or `memory_full` with numbers.
"""

from __future__ import annotations

from common import ids
from common.errors import DeviceNotFound, HerderError, InvalidDevice
from head.core.copy_facts import NOT_BEGUN, size_of
from head.core.objects import Copy, Node
from head.core.state import Live, State


def devices_of(state: State, node_id: str) -> list[str]:
    """The devices of a known node: disk, dram if it has a budget, its GPUs."""
    inventory = state.nodes[node_id].inventory
    names = [f"{node_id}:disk"]
    if inventory.dram_budget_bytes > 0:
        names.append(f"{node_id}:dram")
    return names + [f"{node_id}:gpu{gpu.index}" for gpu in inventory.gpus]


def device_exists(state: State, device: str) -> bool:
    """Whether a device name is well formed and names something on a known node."""
    try:
        parsed = ids.parse_device(device)
    except HerderError:
        return False
    return parsed.node in state.nodes and str(parsed) in devices_of(state, parsed.node)


def require_device(state: State, text: str) -> ids.Device:
    """The device by that name.

    Raises: InvalidDevice, DeviceNotFound (with what exists).
    """
    parsed = ids.parse_device(text)
    if parsed.node not in state.nodes:
        known = sorted(state.nodes)[:20]
        raise DeviceNotFound(
            f"no node {parsed.node!r}", hint="`herder nodes` lists the nodes", device=str(parsed), nodes=known
        )
    existing = devices_of(state, parsed.node)
    if str(parsed) not in existing:
        hint = f"{parsed.node} has {', '.join(existing)}"
        if parsed.kind == "dram":
            hint += "; a RAM tier needs a budget in the agent's settings"
        raise DeviceNotFound(f"no device {parsed}", hint=hint, device=str(parsed), devices=existing)
    return parsed


def require_storage(state: State, text: str) -> ids.Device:
    """As require_device, for a device that holds copies of its own. Raises also: InvalidDevice for a GPU."""
    parsed = require_device(state, text)
    if parsed.kind == "gpu":
        raise InvalidDevice(f"{parsed} holds engines, not copies", hint="serve the model there instead")
    return parsed


def budget_bytes(state: State, device: ids.Device) -> int:
    """How many bytes the device may hold in all."""
    node = state.nodes.get(device.node)
    if node is None:
        return 0
    inventory = node.inventory
    if device.kind == "disk":
        if inventory.disk_budget_bytes > 0:
            return inventory.disk_budget_bytes
        return inventory.disks[0].total_bytes if inventory.disks else 0
    if device.kind == "dram":
        return max(0, inventory.dram_budget_bytes)
    return next((gpu.memory_bytes for gpu in inventory.gpus if gpu.index == device.index), 0)


def copies_on(state: State, device: ids.Device) -> list[Copy]:
    """The copies on a device, by key."""
    name = str(device)
    keys = (key for key in state.copies_by_node.get(device.node, ()) if key.endswith(f"|{name}"))
    return [state.copies[key] for key in sorted(keys)]


def unknown_bytes(state: State, device: ids.Device) -> int:
    """Bytes of copies that the agent reports but that belong to no registered model."""
    live = state.live.get(device.node)
    if live is None:
        return 0
    return sum(max(0, status.bytes_total) for status in live.unknown_copies if status.storage == device.storage)


def committed_bytes(state: State, device: ids.Device, *, without: str = "") -> int:
    """Bytes spoken for: copies that shall be present (used or reserved), and unknown ones; `without` one copy."""
    spoken = (
        size_of(state, copy)
        for copy in copies_on(state, device)
        if copy.desired == "present" and copy.state != "failed" and copy.key != without
    )
    return sum(spoken) + unknown_bytes(state, device)


def occupied_bytes(state: State, device: ids.Device, *, without: str = "") -> int:
    """Bytes that may be in place now: committed copies that have begun, and copies whose drop is not confirmed."""
    there = (
        size_of(state, copy)
        for copy in copies_on(state, device)
        if copy.key != without and (copy.desired == "absent" or copy.state not in (*NOT_BEGUN, "failed"))
    )
    return sum(there) + unknown_bytes(state, device)


def free_bytes(state: State, device: str) -> int:
    """Bytes that a new copy could still take on a device without evicting anything; 0 for a device unknown here.

    By the head's books, and on disk never more than the file system had free when the node last said.
    """
    if not device_exists(state, device):
        return 0
    parsed = ids.parse_device(device)
    free = budget_bytes(state, parsed) - committed_bytes(state, parsed)
    if parsed.kind == "disk":
        free = min(free, file_system_free_bytes(state.nodes[parsed.node], state.live.get(parsed.node), free))
    return max(0, free)


def file_system_free_bytes(node: Node, live: Live | None, unknown: int) -> int:
    """What the store's file system had free: by the latest reading, before the first one by the hello's inventory.

    `unknown` is given back when neither says.
    """
    if live is not None and live.telemetry is not None and live.telemetry.disk_free_bytes:
        return live.telemetry.disk_free_bytes
    return node.inventory.disks[0].free_bytes if node.inventory.disks else unknown
