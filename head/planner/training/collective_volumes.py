"""How long the groups of a layout would exchange bytes at the full rate of the links they lie on.

Ranks are placed as Megatron does: tensor parallel innermost, then context, expert and data parallel, pipeline
outermost. A group has members inside one scale-up domain (NVLink, ICI) and copies of them across domains (the network
card of each GPU). Times are at line rate; what part of the line is reached, and what hides behind computing, is fitted
in `step_time`.
"""

from __future__ import annotations

import msgspec

from head.planner.hardware.topology import Topology


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """`size` ranks, `local` of them in one domain; rates are bytes per second and GPU, one way."""

    size: int
    local: int
    link_bytes_per_s: float
    nic_bytes_per_s: float

    @property
    def domains(self) -> float:
        """Domains that the group spans."""
        return max(1.0, self.size / self.local)


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds at line rate on the scale-up link and on the network card."""

    link_s: float = 0.0
    nic_s: float = 0.0

    def times(self, count: float) -> Exchange:
        """`count` such exchanges."""
        return Exchange(link_s=self.link_s * count, nic_s=self.nic_s * count)

    def plus(self, other: Exchange) -> Exchange:
        """Both, one after the other."""
        return Exchange(link_s=self.link_s + other.link_s, nic_s=self.nic_s + other.nic_s)


def group_of(topology: Topology, size: int, stride: int) -> Group:
    """The group of `size` ranks that lie `stride` apart."""
    domain = topology.scaleup_gpus if topology.has_scaleup else topology.local_gpus
    link = topology.scaleup_bytes_per_s if topology.has_scaleup else topology.pcie_bytes_per_s
    local = max(1, min(size, domain // max(1, stride)))
    while size % local:
        local -= 1
    nic = topology.nic_bytes_per_s or link
    return Group(size=size, local=local, link_bytes_per_s=max(link, 1.0), nic_bytes_per_s=max(nic, 1.0))


def gather(group: Group, whole_bytes: float) -> Exchange:
    """An all-gather to `whole_bytes` on each rank; a reduce-scatter of `whole_bytes` takes the same.

    Between domains each card carries its share of the domain's traffic; inside, the link carries the rest.
    """
    if group.size <= 1:
        return Exchange()
    domains = group.domains
    inside = whole_bytes * (group.local - 1) / group.local / group.link_bytes_per_s
    across = whole_bytes / group.local * (domains - 1) / domains / group.nic_bytes_per_s
    return Exchange(link_s=inside, nic_s=across)


def reduce(group: Group, whole_bytes: float) -> Exchange:
    """An all-reduce: reduce-scatter and all-gather."""
    return gather(group, whole_bytes).times(2.0)


def all_to_all(group: Group, sent_bytes: float, copies: float = 1.0) -> Exchange:
    """Each rank sends `sent_bytes` in equal parts to all ranks.

    copies: how many of the `sent_bytes` are copies of one token for different ranks; a domain gets each token once
    and spreads it over its own link.
    """
    if group.size <= 1:
        return Exchange()
    domains = group.domains
    inside = sent_bytes * (group.size - 1) / group.size / group.link_bytes_per_s
    reached = domains * (1.0 - (1.0 - 1.0 / domains) ** copies) if domains > 1 else 1.0
    across = sent_bytes / copies * reached * (domains - 1) / domains / group.nic_bytes_per_s
    return Exchange(link_s=inside, nic_s=across)


def neighbour(topology: Topology, stride: int, sent_bytes: float) -> Exchange:
    """One message to the rank `stride` away."""
    group = group_of(topology, 2, stride)
    if group.local == 2:
        return Exchange(link_s=sent_bytes / group.link_bytes_per_s)
    return Exchange(nic_s=sent_bytes / group.nic_bytes_per_s)
