"""The machine a plan is for: which accelerators, how many, and what joins them.

A Topology always says where it comes from: `detected` (this machine's own probe), `registered` (the agents' inventory),
`preset` (an accelerator's name and its usual machine) or `given` (numbers of the request). There is no silent stand-in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from common.errors import InvalidValue, NothingFits
from head.planner.hardware.accelerators import GIB, Accelerator, accelerator, find_accelerator, given_accelerator

Source = Literal["detected", "registered", "preset", "given"]
Network = Literal["none", "infiniband", "roce", "efa", "omnipath", "ethernet", "unknown"]

GPUS_LIMIT = 1_048_576  # of one plan
MATRIX_GPUS_LIMIT = 64  # a matrix of peers is drawn for so many GPUs at most
LOCAL_BYTES_PER_S_LIMIT = 1e15

# What one byte of line rate carries. IB and RoCE are quoted at payload rate; TCP spends CPU and copies.
# Source: nccl-tests runs over sockets reach about half of 100 GbE; RDMA 92-97 % (planner.md 2.6: 381.8 of 400 GB/s).
TCP_SHARE = 0.5


class GpuFacts(Protocol):
    """What is read of one GPU; `common.wire.Gpu` has it."""

    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def nvlink_peers(self) -> tuple[int, ...]: ...


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner reads of one node: plain values of its inventory.

    `nic_bits_per_s` is the sum over the node's network ports that are up.
    """

    node_id: str
    gpus: tuple[GpuFacts, ...] = ()
    cpu_model: str = ""
    cpus: int = 0
    numa_nodes: int = 1
    memory_bytes: int = 0
    nic_bits_per_s: float = 0.0
    network: Network = "unknown"


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """`gpus` equal devices in nodes of `gpus_per_node`; rates are bytes per second, one way, per GPU.

    `scaleup_gpus` reach each other over NVLink, xGMI or ICI at `scaleup_bytes_per_s`; it may be more than a node
    (72 in a GB200 NVL72) or fewer (pairs of bridged PCIe cards). `nic_bytes_per_s` leads out of the domain.
    """

    accelerator: Accelerator
    gpus: int
    gpus_per_node: int
    scaleup_gpus: int
    scaleup_bytes_per_s: float
    pcie_bytes_per_s: float = 0.0
    nic_bytes_per_s: float = 0.0
    network: Network = "unknown"
    cpu_memory_bytes: int = 0  # per node; 0: not known
    cpus_per_node: int = 0  # 0: not known
    source: Source = "preset"
    node_ids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """Nodes that hold the GPUs."""
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def domain_gpus(self) -> int:
        """GPUs of this topology that one scale-up domain can hold, at least 1."""
        return max(1, min(self.scaleup_gpus, self.gpus))

    @property
    def local_gpus(self) -> int:
        """GPUs that reach each other without a network card: the larger of node and scale-up domain."""
        return max(self.domain_gpus, min(self.gpus_per_node, self.gpus))

    @property
    def has_scaleup(self) -> bool:
        """Whether there is a scale-up link at all between GPUs of this topology."""
        return self.scaleup_gpus > 1 and self.scaleup_bytes_per_s > 0 and self.gpus > 1

    def with_gpus(self, gpus: int) -> Topology:
        """The same machines, another number of GPUs."""
        _check_count("gpus", gpus)
        return msgspec.structs.replace(self, gpus=gpus, gpus_per_node=max(1, min(self.gpus_per_node, gpus)))


def topology_of_preset(
    name: str | Accelerator,
    gpus: int,
    *,
    gpus_per_node: int = 0,
    scaleup_gpus: int = 0,
    scaleup_gb_per_s: float | None = None,
    nic_gbit_per_s: float | None = None,
    network: Network = "unknown",
    cpu_memory_gib: float = 0.0,
    source: Source | None = None,
) -> Topology:
    """`gpus` devices in their usual machine; anything given overrides what is usual and makes the source `given`.

    nic_gbit_per_s: per GPU. Raises: NotFound for an unknown name, InvalidValue for a bad number.
    """
    device = accelerator(name) if isinstance(name, str) else name
    _check_count("gpus", gpus)
    per_node = gpus_per_node or min(device.gpus_per_node, gpus)
    _check_count("gpus_per_node", per_node)
    domain = scaleup_gpus or device.scaleup_gpus
    _check_count("scaleup_gpus", domain)
    link = device.scaleup_bytes_per_s if scaleup_gb_per_s is None else scaleup_gb_per_s * 1e9
    nic = device.nic_bytes_per_s if nic_gbit_per_s is None else nic_gbit_per_s * 1e9 / 8
    for field, rate in (("scaleup_gb_per_s", link), ("nic_gbit_per_s", nic), ("cpu_memory_gib", cpu_memory_gib)):
        if not 0 <= rate < LOCAL_BYTES_PER_S_LIMIT:
            raise InvalidValue(f"{field} must be finite and not negative", field=field)
    notes: list[str] = []
    spans = gpus > max(domain, min(per_node, gpus))
    if spans and nic == 0:
        nic = 200e9 / 8
        notes.append("no network card is usual for this device: 200 Gbit/s per GPU assumed between nodes")
    is_given = bool(gpus_per_node or scaleup_gpus) or scaleup_gb_per_s is not None or nic_gbit_per_s is not None
    return Topology(
        accelerator=device,
        gpus=gpus,
        gpus_per_node=per_node,
        scaleup_gpus=domain if link > 0 else 1,
        scaleup_bytes_per_s=link if domain > 1 else 0.0,
        pcie_bytes_per_s=device.pcie_bytes_per_s,
        nic_bytes_per_s=nic,
        network=network if spans or nic_gbit_per_s is not None or network != "unknown" else "none",
        cpu_memory_bytes=int(cpu_memory_gib * GIB),
        source=source or ("given" if is_given or not isinstance(name, str) else "preset"),
        notes=tuple(notes),
    )


def topology_of_numbers(gpus: int, *, gpus_per_node: int = 8, network: Network = "unknown", **numbers: Any) -> Topology:
    """A topology wholly from the request's numbers; `numbers` are those of `given_accelerator`."""
    device = given_accelerator(gpus_per_node=gpus_per_node, **numbers)
    found = topology_of_preset(device, gpus, gpus_per_node=min(gpus_per_node, max(gpus, 1)), network=network)
    return msgspec.structs.replace(found, source="given")


def topology_of_nodes(nodes: Sequence[NodeFacts], *, gpus: int = 0, source: Source = "registered") -> Topology:
    """The topology that the inventory of `nodes` makes: the most numerous kind of GPU, all of them or `gpus`.

    The memory is the least that a GPU of that kind reports (MIG instances and cut-down parts included), the node size
    the least common to all, so that a plan made here fits every node.
    Raises: NothingFits when no node has a GPU that is known, or fewer than `gpus`.
    """
    kinds = Counter((gpu.name, _rounded_gib(gpu.memory_bytes)) for node in nodes for gpu in node.gpus)
    if not kinds:
        raise NothingFits(
            "no node of the cluster reports a GPU",
            hint="name an accelerator (gpu=h100) to plan for a machine that is not registered",
            nodes=[node.node_id for node in nodes],
        )
    (name, memory), total = max(kinds.items(), key=lambda item: (item[1], item[0][1], item[0][0]))
    device = _device_of_facts(name, memory, nodes)
    holders = [(node, _of_kind(node, name, memory)) for node in sorted(nodes, key=lambda node: node.node_id)]
    holders = [(node, found) for node, found in holders if found]
    per_node = _common_node_size([len(found) for _, found in holders], gpus)
    wanted = gpus or total
    _check_count("gpus", wanted)
    if wanted > total:
        raise NothingFits(
            f"the cluster has {total} x {name}, {wanted} are asked for",
            hint=f"ask for at most {total}, or name an accelerator to plan for other machines",
            available={kind[0]: count for kind, count in sorted(kinds.items())},
        )
    domain, notes = _domain_of_facts([found for _, found in holders], device, per_node)
    others = [f"{count} x {kind[0]}" for kind, count in sorted(kinds.items()) if kind != (name, memory)]
    if others:
        notes.append("left out of the plan, of another kind: " + ", ".join(others))
    nics = [node.nic_bits_per_s for node, _ in holders if node.nic_bits_per_s > 0]
    nic = min(nics) / 8 / max(len(found) for _, found in holders) if nics else 0.0
    if wanted > per_node and not nics:
        nic = 10e9 / 8 / per_node
        notes.append("no node reports the rate of its network: 10 Gbit/s per node assumed")
    networks = {node.network for node, _ in holders if node.network != "unknown"}
    used = holders[: math.ceil(wanted / per_node)]
    return Topology(
        accelerator=device,
        gpus=wanted,
        gpus_per_node=min(per_node, wanted),
        scaleup_gpus=domain,
        scaleup_bytes_per_s=device.scaleup_bytes_per_s if domain > 1 else 0.0,
        pcie_bytes_per_s=device.pcie_bytes_per_s or 16e9,
        nic_bytes_per_s=nic,
        network=next(iter(networks)) if len(networks) == 1 else ("none" if len(holders) == 1 else "unknown"),
        cpu_memory_bytes=min((node.memory_bytes for node, _ in used), default=0),
        cpus_per_node=min((node.cpus for node, _ in used), default=0),
        source=source,
        node_ids=tuple(node.node_id for node, _ in used),
        notes=tuple(notes),
    )


def optimal_tp_sizes(topology: Topology) -> list[int]:
    """Powers of two that stay on one scale-up domain, where tensor parallelism pays; all of a node without one."""
    reach = topology.domain_gpus if topology.has_scaleup else topology.local_gpus
    return [1 << power for power in range(reach.bit_length()) if 1 << power <= reach]


def bandwidth_bytes_per_s(topology: Topology, one: int, other: int) -> float:
    """One-way rate between two GPUs by index; a GPU to itself has its own memory's rate (always finite)."""
    if one == other:
        return topology.accelerator.memory_bytes_per_s
    if topology.has_scaleup and one // topology.scaleup_gpus == other // topology.scaleup_gpus:
        return topology.scaleup_bytes_per_s
    if one // topology.gpus_per_node == other // topology.gpus_per_node:
        return topology.pcie_bytes_per_s
    return topology.nic_bytes_per_s


def describe(topology: Topology, numa_nodes: int = 1, cpu_model: str = "") -> dict[str, Any]:
    """The topology as the seed's API showed it, every number finite, with `source` beside.

    Matrices are drawn for the first `MATRIX_GPUS_LIMIT` GPUs; GB/s are one way, in units of 1e9.
    Source of the field names: seed 000, GET /topology.
    """
    device = topology.accelerator
    shown = range(min(topology.gpus, MATRIX_GPUS_LIMIT))
    is_grace = device.generation in {"hopper", "blackwell"} and device.name.startswith("G")
    matrix = [[round(bandwidth_bytes_per_s(topology, one, other) / 1e9, 3) for other in shown] for one in shown]
    peers = [[one == other or _are_peers(topology, one, other) for other in shown] for one in shown]
    numa = [index % topology.gpus_per_node * max(1, numa_nodes) // topology.gpus_per_node for index in shown]
    nvlink = {"volta": 2.0, "ampere": 3.0, "hopper": 4.0, "blackwell": 5.0}.get(device.generation)
    has_nvlink = topology.has_scaleup and device.vendor == "NVIDIA"
    return {
        "source": topology.source,
        "notes": list(topology.notes),
        "num_gpus": topology.gpus,
        "gpus": [
            {
                "index": index,
                "name": device.name,
                "compute_capability": device.compute_capability,
                "memory_gb": round(device.visible_bytes / 1e9, 2),
                "num_sms": device.multiprocessors,
                "architecture": device.generation,
                "nvlink_capable": device.vendor == "NVIDIA" and device.scaleup_gpus > 1,
                "numa_node": numa[index],
            }
            for index in shown
        ],
        "total_memory_gb": round(topology.gpus * device.visible_bytes / 1e9, 2),
        "has_nvlink": has_nvlink,
        "has_nvswitch": has_nvlink and topology.scaleup_gpus >= 8,
        "nvlink_version": nvlink if has_nvlink else None,
        "max_nvlink_bandwidth_gbps": round(topology.scaleup_bytes_per_s / 1e9, 3) if has_nvlink else 0.0,
        "scaleup_gpus": topology.scaleup_gpus,
        "p2p_matrix": peers,
        "bandwidth_matrix": matrix,
        "matrix_gpus": len(shown),
        "numa_nodes": max(1, numa_nodes),
        "gpu_numa_mapping": {str(index): numa[index] for index in shown},
        "cpu_type": cpu_model or ("grace" if is_grace else ""),
        "is_grace_cpu": is_grace or "grace" in cpu_model.lower() or "neoverse-v2" in cpu_model.lower(),
        "has_nvlink_c2c": is_grace,
        "optimal_tp_sizes": optimal_tp_sizes(topology),
        "num_nodes": topology.nodes,
        "gpus_per_node": topology.gpus_per_node,
        "node_ids": list(topology.node_ids),
        "network": topology.network,
        "nic_gb_per_s_per_gpu": round(topology.nic_bytes_per_s / 1e9, 3),
        "infiniband_available": topology.network == "infiniband",
        "rdma_capable": topology.network in {"infiniband", "roce", "efa", "omnipath"},
    }


def _are_peers(topology: Topology, one: int, other: int) -> bool:
    """Whether one GPU can read the other's memory without a network card. GeForce cards since Ada cannot."""
    device = topology.accelerator
    if topology.has_scaleup and one // topology.scaleup_gpus == other // topology.scaleup_gpus:
        return True
    is_blocked = device.name.startswith(("RTX-40", "RTX-50"))
    return not is_blocked and one // topology.gpus_per_node == other // topology.gpus_per_node


def _check_count(field: str, value: int) -> None:
    """Counts are whole, at least 1 and bounded."""
    if isinstance(value, bool) or not 1 <= value <= GPUS_LIMIT:
        raise InvalidValue(f"{field} must be between 1 and {GPUS_LIMIT}", field=field, limit=GPUS_LIMIT)


def _rounded_gib(memory_bytes: int) -> int:
    """Memory in GiB, so that equal cards with a few MiB of difference stay one kind."""
    return round(memory_bytes / GIB)


def _of_kind(node: NodeFacts, name: str, memory_gib: int) -> list[GpuFacts]:
    """The node's GPUs of one kind, by index."""
    found = [gpu for gpu in node.gpus if gpu.name == name and _rounded_gib(gpu.memory_bytes) == memory_gib]
    return sorted(found, key=lambda gpu: gpu.index)


def _device_of_facts(name: str, memory_gib: int, nodes: Iterable[NodeFacts]) -> Accelerator:
    """The table's device with the memory that the nodes really report.

    The driver's total (NVML) includes what it keeps for itself; a process sees that less the table's usual difference.
    """
    reported = min(gpu.memory_bytes for node in nodes for gpu in _of_kind(node, name, memory_gib))
    known = find_accelerator(name)
    if known is None:
        raise NothingFits(
            f"the cluster's GPUs call themselves {name!r}, which the planner does not know",
            hint="give the accelerator's numbers with the request",
            accelerator=name,
            memory_bytes=reported,
        )
    return msgspec.structs.replace(known, visible_bytes=min(reported, known.visible_bytes), memory_bytes=reported)


def _common_node_size(sizes: list[int], gpus: int) -> int:
    """GPUs per node that every node used can give: of the sizes that reach `gpus`, the one that wastes least."""
    wanted = gpus or sum(sizes)
    options = sorted(set(sizes), reverse=True)
    for size in options:
        if sum(size for found in sizes if found >= size) >= wanted:
            return size
    return options[-1] if options else 1


def _domain_of_facts(nodes: Sequence[Sequence[GpuFacts]], device: Accelerator, per_node: int) -> tuple[int, list[str]]:
    """GPUs that are all linked with each other on every node, from the peers each reports; with what was found."""
    groups: list[int] = []
    for gpus in nodes:
        indices = {gpu.index for gpu in gpus}
        groups.append(min(len(({gpu.index} | set(gpu.nvlink_peers)) & indices) for gpu in gpus))
    domain = min(groups, default=1)
    if domain > 1:
        whole = device.scaleup_gpus if device.scaleup_gpus > device.gpus_per_node and domain >= per_node else domain
        return min(domain, whole) if whole <= per_node else whole, []
    if device.scaleup_gpus > 1 and per_node > 1:
        return 1, ["the nodes report no NVLink between their GPUs: PCIe is assumed"]
    return 1, []
