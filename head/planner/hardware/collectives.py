"""How long a collective takes: measured tables inside a scale-up domain, a hierarchy of two networks beyond it.

Inside one domain the time is read from NCCL measurements (`head/planner/data/collectives.json`), interpolated over
bytes and the logarithm of the number of GPUs. A device without a table takes that of the nearest system: the part of
the time above the smallest message's scales with the link. Beyond the domain each GPU's network card carries its share.

`message_bytes` is what nccl-tests prints as size: the whole buffer, i.e. what every rank holds after an all-gather,
before a reduce-scatter, and before and after an all-reduce or all-to-all.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

import msgspec

from common.errors import InvalidValue
from head.planner.hardware.topology import TCP_SHARE, Topology

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]
OPS: tuple[Op, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")

# In-network reduction lets an all-reduce's bus bandwidth pass the link's rate: 482 of 450 GB/s were measured on
# 8 H200 (stas00/ml-engineering, network/README.md). Nothing is ever predicted above the link's rate times this.
NVLS_FACTOR = 1.1
# Past the largest measured message (512 MiB) the marginal rate is still a little better: 6-7 % on A100 and H200.
# Source: the same page, 512 MiB to 16 GiB.
TAIL_SHARE = 0.94
P2P_SHARE = 0.87  # of the link's rate for one pair: 0.915 (A100) and 0.829 (GB200), same page
P2P_LATENCY_S = 8e-6
# GPUs joined pair by pair without a switch get less of their summed links than switched ones: RCCL's all-reduce on
# 8 x MI300X reaches about 310-330 of 448 GB/s, NCCL's on 8 x H100 445 of 450 (recalled, not fetched).
MESH_SHARE = 0.72
NIC_SHARE = 0.92  # of the card's line rate that a large message gets over RDMA
# Of the intra-node phases of a hierarchical collective, what the network phase does not hide. Fitted to
# 4 nodes of 8 x B200 (all-reduce, 512 MiB to 16 GiB), where full overlap is 26 % too fast and none is 19 % too slow.
UNHIDDEN_SHARE = 0.43
# Seconds per network step, with the protocol's own costs. EFA: 350 us for a small all-reduce of 4 nodes, same source.
STEP_LATENCY_S = {"infiniband": 8e-6, "roce": 10e-6, "omnipath": 10e-6, "efa": 83e-6, "ethernet": 60e-6}
DEFAULT_STEP_LATENCY_S = 10e-6

# The table of a device without one: by vendor and generation, then by whether there is a scale-up link.
_SYSTEM_OF_NAME = {
    "A100-SXM-40GB": "a100_sxm",
    "A100-SXM-80GB": "a100_sxm",
    "H100-SXM-80GB": "h100_sxm",
    "H200-SXM-141GB": "h200_sxm",
    "B200-SXM-180GB": "b200_sxm",
    "B300-SXM": "b300_sxm",
    "GB200": "gb200",
    "GB300": "gb300",
    "RTX-PRO-6000-Blackwell-Server": "rtx_pro_6000_server",
}
_SYSTEM_OF_GENERATION = {"volta": "a100_sxm", "ampere": "a100_sxm", "hopper": "h100_sxm", "blackwell": "b200_sxm"}
_LINK_BYTES_PER_S = {
    "a100_sxm": 300e9,
    "h100_sxm": 450e9,
    "h200_sxm": 450e9,
    "b200_sxm": 900e9,
    "b300_sxm": 900e9,
    "gb200": 900e9,
    "gb300": 900e9,
    "rtx_pro_6000_server": 63e9,
}


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Time against message size for one system, operation and number of GPUs of one domain."""

    system: str
    op: str
    gpus: int
    us: tuple[float, ...]  # at the table's sizes
    is_measured: bool = True  # False: completed from the neighbours (see collective_tables.py)


def time_s(op: Op, message_bytes: float, gpus: int, topology: Topology, *, per_domain: int = 0) -> float:
    """Seconds of one collective over `gpus` ranks of the topology.

    per_domain: ranks of the group within one scale-up domain (or one node without scale-up links); 0: as many as fit.
    A group that takes one GPU of each node (data parallel outside a tensor-parallel node) has per_domain=1.
    Never below what the slowest link needs: see `floor_s`.
    Raises: InvalidValue for an unknown operation or a size that is negative or not finite.
    """
    if op not in OPS:
        raise InvalidValue(f"unknown collective {op!r}", hint="one of " + ", ".join(OPS), known=list(OPS))
    if not 0 <= message_bytes < 1e18:
        raise InvalidValue("message_bytes must be finite and not negative", message_bytes=str(message_bytes))
    if gpus <= 1 or message_bytes == 0:
        return 0.0
    within = min(gpus, per_domain or topology.local_gpus)
    domains = math.ceil(gpus / within)
    if op == "send_recv":
        return _send_s(message_bytes, topology, is_local=domains == 1)
    if domains == 1:
        found = _domain_s(op, message_bytes, gpus, topology)
    else:
        found = _two_level_s(op, message_bytes, within, domains, topology)
    return max(found, floor_s(op, message_bytes, gpus, topology, per_domain=within))


def bus_bytes_per_s(op: Op, message_bytes: float, gpus: int, topology: Topology, *, per_domain: int = 0) -> float:
    """The bus bandwidth of `time_s`, as nccl-tests define it: comparable with the link's rate for any operation.

    Source: NVIDIA nccl-tests, doc/PERFORMANCE.md.
    """
    seconds = time_s(op, message_bytes, gpus, topology, per_domain=per_domain)
    return traffic_share(op, gpus) * message_bytes / seconds if seconds > 0 else 0.0


def traffic_share(op: Op, gpus: int) -> float:
    """Bytes that cross each rank's link, one way, over the message's bytes."""
    if gpus <= 1:
        return 0.0
    match op:
        case "all_reduce":
            return 2 * (gpus - 1) / gpus
        case "all_gather" | "reduce_scatter" | "all_to_all":
            return (gpus - 1) / gpus
        case "broadcast" | "send_recv":
            return 1.0


def floor_s(op: Op, message_bytes: float, gpus: int, topology: Topology, *, per_domain: int = 0) -> float:
    """The least time that the links allow: the ceiling on bus bandwidth is the link's rate times `NVLS_FACTOR`."""
    if gpus <= 1:
        return 0.0
    within = min(gpus, per_domain or topology.local_gpus)
    if op == "send_recv":  # one pair: of neighbours, when the group has any
        is_local = within == gpus
        rate = _link_bytes_per_s(topology, 2) * NVLS_FACTOR if is_local else _nic_bytes_per_s(topology)
        return message_bytes / rate
    inside = traffic_share(op, within) * message_bytes / (_link_bytes_per_s(topology, within) * NVLS_FACTOR)
    domains = math.ceil(gpus / within)
    if domains == 1:
        return inside
    return max(inside, _crossing_bytes(op, message_bytes, within, domains) / _nic_bytes_per_s(topology))


def ranks_per_domain(group: int, stride: int, topology: Topology) -> int:
    """Ranks of a group of `group` GPUs, `stride` apart, that fall into one domain: the `per_domain` of `time_s`."""
    return max(1, min(group, topology.local_gpus // max(1, stride)))


def basis(gpus: int, topology: Topology, *, op: Op = "all_reduce", per_domain: int = 0) -> str:
    """In words, what `time_s` would rest on for this group."""
    within = min(gpus, per_domain or topology.local_gpus)
    system = _system_of(topology, within)
    exact = _SYSTEM_OF_NAME.get(topology.accelerator.name) == system
    table = _tables().get((system, "all_gather" if op == "broadcast" else op, max(2, min(within, 8))))
    kind = "measured" if table is not None and table.is_measured else "completed from its neighbours"
    text = f"NCCL table of {system} ({kind})" + (
        "" if exact else f", scaled to the links of {topology.accelerator.name}"
    )
    if gpus > within:
        text += f"; {math.ceil(gpus / within)} domains over network cards by the two-level formula"
    return text


def _link_bytes_per_s(topology: Topology, gpus: int) -> float:
    """One-way rate between ranks that share a domain or node."""
    if topology.has_scaleup and gpus <= topology.scaleup_gpus:
        return topology.scaleup_bytes_per_s
    return topology.pcie_bytes_per_s or 16e9


def _nic_bytes_per_s(topology: Topology) -> float:
    """Payload rate of one GPU's share of the network cards; it cannot pass the PCIe that leads there."""
    rate = topology.nic_bytes_per_s or 10e9 / 8
    if topology.pcie_bytes_per_s > 0:
        rate = min(rate, topology.pcie_bytes_per_s)
    return rate * (TCP_SHARE if topology.network == "ethernet" else 1.0)


def _system_of(topology: Topology, gpus: int) -> str:
    """The measured system nearest to this one."""
    device = topology.accelerator
    if not (topology.has_scaleup and gpus <= topology.scaleup_gpus):
        return "rtx_pro_6000_server"
    return _SYSTEM_OF_NAME.get(device.name) or _SYSTEM_OF_GENERATION.get(device.generation, "h100_sxm")


def _domain_s(op: Op, message_bytes: float, gpus: int, topology: Topology) -> float:
    """Seconds within one domain or node: the table, scaled to the link where it is another system's."""
    system = _system_of(topology, gpus)
    rate = _link_bytes_per_s(topology, gpus) / _LINK_BYTES_PER_S[system]
    if topology.accelerator.vendor == "AMD" and topology.has_scaleup:
        rate *= MESH_SHARE
    table_op: Op = "all_gather" if op == "broadcast" else op
    return _table_s(system, table_op, message_bytes, gpus, round(rate, 6))


@lru_cache(maxsize=65_536)
def _table_s(system: str, op: Op, message_bytes: float, gpus: int, rate: float) -> float:
    """Interpolated time; `rate` is the link's rate over the table's, and divides what a message adds."""
    seconds = _read(system, op, message_bytes, gpus)
    if rate == 1.0:
        return seconds
    start = min(_read(system, op, _sizes()[0], gpus), seconds)
    return start + (seconds - start) / rate


def _read(system: str, op: Op, message_bytes: float, gpus: int) -> float:
    """The table at any size and count: log-log between its counts, beyond 8 as the volume and the steps grow."""
    upper = 8
    if gpus in (2, 4, upper):
        return _at_size(system, op, message_bytes, gpus)
    if gpus < upper:
        low, high = (2, 4) if gpus < 4 else (4, upper)
        share = math.log(gpus / low) / math.log(high / low)
        one, other = (math.log(_at_size(system, op, message_bytes, count)) for count in (low, high))
        return math.exp(one + share * (other - one))
    whole = _at_size(system, op, message_bytes, upper)
    start = min(whole, _at_size(system, op, _sizes()[0], upper))
    growth = _at_size(system, op, _sizes()[0], upper) / _at_size(system, op, _sizes()[0], 4)
    steps: float = max(1.0, growth) ** math.log2(gpus / upper)
    volume = traffic_share(op, gpus) / traffic_share(op, upper)
    return start * steps + (whole - start) * volume


def _at_size(system: str, op: str, message_bytes: float, gpus: int) -> float:
    """One curve at any size: affine between points, flat below the first, at the tail's rate beyond the last.

    Between points four times apart time is latency plus volume: with every second point left out the affine rule errs
    by 7.9 %, the log-log one by 12.5 %.
    """
    sizes = _sizes()
    curve = _curve(system, op, gpus)
    if message_bytes <= sizes[0]:
        return curve[0]
    if message_bytes >= sizes[-1]:
        return curve[-1] * (1 + TAIL_SHARE * (message_bytes / sizes[-1] - 1))
    index = bisect_right(sizes, message_bytes)
    share = (message_bytes - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
    return curve[index - 1] + share * (curve[index] - curve[index - 1])


def _send_s(message_bytes: float, topology: Topology, *, is_local: bool) -> float:
    """One pair, one way."""
    if is_local:
        return P2P_LATENCY_S + message_bytes / (P2P_SHARE * _link_bytes_per_s(topology, 2))
    return _step_s(topology) + message_bytes / (NIC_SHARE * _nic_bytes_per_s(topology))


def _step_s(topology: Topology) -> float:
    """Latency of one step over the network."""
    return STEP_LATENCY_S.get(topology.network, DEFAULT_STEP_LATENCY_S)


def _crossing_bytes(op: Op, message_bytes: float, within: int, domains: int) -> float:
    """Bytes that each network card carries one way, when `within` ranks of a domain share the work."""
    share = traffic_share(op, domains)
    return share * message_bytes if op == "all_to_all" else share * message_bytes / within


def _two_level_s(op: Op, message_bytes: float, within: int, domains: int, topology: Topology) -> float:
    """A group over several domains: the phases inside (a reduce-scatter, an all-gather or both) and the network's.

    The slower phase counts whole, the faster by `UNHIDDEN_SHARE`. Latencies add: steps over the network are
    2 log2(domains) for a tree, domains - 1 for a ring or a direct exchange.
    Source: hierarchical all-reduce; constants from 4 x 8 B200 (stas00/ml-engineering, network/README.md).
    """
    steps = 2 * math.log2(domains) if op == "all_reduce" else float(domains - 1)
    if op == "broadcast":
        steps = math.log2(domains)
    network = _crossing_bytes(op, message_bytes, within, domains) / (NIC_SHARE * _nic_bytes_per_s(topology))
    latency = steps * _step_s(topology)
    if within == 1:
        return latency + network
    inside = _domain_s(op, message_bytes, within, topology)
    start = min(inside, _domain_s(op, _sizes()[0], within, topology))
    volume = inside - start
    return start + latency + max(network, volume) + UNHIDDEN_SHARE * min(network, volume)


@cache
def _document() -> dict[str, Any]:
    """The shipped file."""
    text = resources.files("head.planner").joinpath("data", "collectives.json").read_bytes()
    found: dict[str, Any] = msgspec.json.decode(text)
    return found


@cache
def _sizes() -> tuple[float, ...]:
    """Message sizes of all curves, ascending, in bytes."""
    return tuple(float(size) for size in _document()["bytes"])


@cache
def _tables() -> dict[tuple[str, str, int], Curve]:
    """Curves by system, operation and number of GPUs."""
    curves = [msgspec.convert(row, Curve) for row in _document()["curves"]]
    return {(curve.system, curve.op, curve.gpus): curve for curve in curves}


@cache
def _curve(system: str, op: str, gpus: int) -> tuple[float, ...]:
    """Seconds at the table's sizes, made monotone: a larger message never takes less time."""
    found: list[float] = []
    for value in _tables()[system, op, gpus].us:
        found.append(max(value * 1e-6, found[-1] if found else 0.0))
    return tuple(found)
