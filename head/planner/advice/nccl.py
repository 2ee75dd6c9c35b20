"""Environment variables for NCCL and the process around it, each with the reason it is set.

NCCL tunes itself from the topology it detects; a variable is set only where its default is known to be wrong for the
case, or where a failure would otherwise be silent. Variables that circulate but do not exist in NCCL (NCCL_TIMEOUT) or
that are defaults by now (TORCH_NCCL_ASYNC_ERROR_HANDLING, NCCL_IB_GID_INDEX, NCCL_NVLS_ENABLE) are left out; `LEFT_OUT`
says why.

Source: NVIDIA NCCL user guide, "Environment Variables" (NCCL 2.28); PyTorch 2.13, "ProcessGroupNCCL Environment
Variables"; AWS OFI NCCL plugin for EFA.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from common.errors import InvalidValue
from head.planner.hardware import collectives
from head.planner.hardware.topology import Network, Topology, topology_of_preset

NETWORK_TYPES: dict[str, Network] = {
    "nvlink": "none",
    "infiniband": "infiniband",
    "ib": "infiniband",
    "roce": "roce",
    "efa": "efa",
    "ethernet": "ethernet",
    "tcp": "ethernet",
}
# Line rate per GPU when only a kind of network is named: 400 Gbit/s RDMA cards are usual since Hopper, 100 Gbit/s of
# Ethernet per node is what a machine without them has.
_USUAL_NIC_GBIT = {"infiniband": 400.0, "roce": 400.0, "efa": 400.0}
_ETHERNET_NODE_GBIT = 100.0
_MEASURED_MESSAGE_BYTES = 1 << 30
_INTERFACE = re.compile(r"[\^=]?[A-Za-z0-9][A-Za-z0-9_.:,-]{0,127}")

LEFT_OUT = {
    "NCCL_TIMEOUT": "NCCL has no such variable; the timeout is the argument of torch.distributed.init_process_group",
    "NCCL_ASYNC_ERROR_HANDLING": "named TORCH_NCCL_ASYNC_ERROR_HANDLING by now, and on by default",
    "NCCL_IB_GID_INDEX": "found by itself since NCCL 2.21",
    "NCCL_NVLS_ENABLE": "on where the hardware has it",
    "NCCL_P2P_LEVEL": "NVLink is used where there is one; forcing a level can only take paths away",
    "NCCL_ALGO": "chosen for each size by NCCL's own model; forcing it slows down the sizes it does not suit",
    "NCCL_BUFFSIZE": "4 MiB by default; larger ones cost memory for each channel and peer",
    "NCCL_NTHREADS": "512 by default on recent GPUs",
}


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One variable, its value and why."""

    name: str
    value: str
    reason: str


def nccl_environment(
    topology: Topology, *, tp: int = 1, interface: str = "", hca: str = "", has_debug: bool = False
) -> tuple[Setting, ...]:
    """What to set for training on the topology.

    interface: network interfaces for sockets (NCCL's own syntax: "eth0", "=ib0", "^docker"); hca: RDMA devices.
    Raises: InvalidValue for names that no interface has.
    """
    for field, value in (("interface", interface), ("hca", hca)):
        if value and not _INTERFACE.fullmatch(value):
            raise InvalidValue(f"{field} {value[:60]!r} is not a list of devices", field=field)
    found = [
        Setting(
            name="NCCL_DEBUG",
            value="INFO" if has_debug else "WARN",
            reason="errors name their cause; INFO also prints which network and algorithm were chosen",
        )
    ]
    if topology.gpus > 1:
        found += [
            Setting(
                name="TORCH_NCCL_TRACE_BUFFER_SIZE",
                value="2000",
                reason="the flight recorder keeps the last collectives, so that a hang can be explained",
            ),
            Setting(name="TORCH_NCCL_DUMP_ON_TIMEOUT", value="1", reason="writes the recorder's content on a timeout"),
        ]
    if topology.gpus > topology.local_gpus or topology.nodes > 1:
        found += _between_nodes(topology, interface, hca)
    if tp > 1 and topology.accelerator.generation in ("volta", "ampere", "hopper"):
        found.append(
            Setting(
                name="CUDA_DEVICE_MAX_CONNECTIONS",
                value="1",
                reason="before Blackwell, tensor-parallel collectives overlap only when kernels keep their order",
            )
        )
    return tuple(found)


def nccl_advice(
    num_nodes: int = 1,
    gpus_per_node: int = 8,
    network_type: str = "nvlink",
    *,
    accelerator: str = "h100",
    interface: str = "",
    hca: str = "",
    has_debug: bool = False,
    tp: int = 1,
) -> dict[str, Any]:
    """The seed's /nccl answer, with reasons, expected bandwidth from the measured tables, and warnings.

    Raises: InvalidValue for counts below 1 or an unknown network, NotFound for an unknown accelerator.
    """
    network = NETWORK_TYPES.get(network_type.strip().lower())
    if network is None:
        known = sorted(NETWORK_TYPES)
        raise InvalidValue(
            f"unknown network_type {network_type[:40]!r}", hint="one of " + ", ".join(known), known=known
        )
    for field, value in (("num_nodes", num_nodes), ("gpus_per_node", gpus_per_node)):
        if not 1 <= value <= 65_536:
            raise InvalidValue(f"{field} must be between 1 and 65536", field=field)
    nic = _USUAL_NIC_GBIT.get(network, _ETHERNET_NODE_GBIT / gpus_per_node if network == "ethernet" else None)
    topology = topology_of_preset(
        accelerator, num_nodes * gpus_per_node, gpus_per_node=gpus_per_node, nic_gbit_per_s=nic, network=network
    )
    settings = nccl_environment(topology, tp=tp, interface=interface, hca=hca, has_debug=has_debug)
    variables = {setting.name: setting.value for setting in settings}
    gpus = topology.gpus
    expected = collectives.bus_bytes_per_s("all_reduce", _MEASURED_MESSAGE_BYTES, gpus, topology)
    return {
        "nccl_config": {
            "interconnect": network_type.strip().lower(),
            "debug_enabled": has_debug,
            "environment_variables": variables,
            "export_commands": [f"export {name}={value}" for name, value in variables.items()],
            "reasons": {setting.name: setting.reason for setting in settings},
            "left_out": LEFT_OUT,
            "description": f"{num_nodes} x {gpus_per_node} {topology.accelerator.name} over {network_type.lower()}",
            "expected_bandwidth_gb_s": round(expected / 1e9, 1),
            "expected_bandwidth": {
                "what": "bus bandwidth of a 1 GiB all-reduce over all GPUs, as all_reduce_perf of nccl-tests prints it",
                "basis": collectives.basis(gpus, topology),
                "all_reduce_1gib_ms": round(
                    collectives.time_s("all_reduce", _MEASURED_MESSAGE_BYTES, gpus, topology) * 1e3, 3
                ),
            },
            "warnings": _warnings(topology, network_type, interface),
            "optimizations": _optimizations(topology, tp),
        },
        "topology": {"source": topology.source, "accelerator": topology.accelerator.name, "gpus": gpus},
    }


def _between_nodes(topology: Topology, interface: str, hca: str) -> list[Setting]:
    """Settings that matter once packets leave a node."""
    found = []
    if interface:
        found.append(
            Setting(
                name="NCCL_SOCKET_IFNAME",
                value=interface,
                reason="bootstrap (and sockets) use this interface, not the first one that is up (docker, lo)",
            )
        )
    if hca and topology.network in ("infiniband", "roce"):
        found.append(Setting(name="NCCL_IB_HCA", value=hca, reason="only the RDMA devices of the compute fabric"))
    if topology.network in ("infiniband", "roce"):
        found.append(
            Setting(
                name="NCCL_IB_TIMEOUT",
                value="22",
                reason="about 17 s before a retry fails (default 20: 4 s), so that a flapping link is outlived",
            )
        )
    if topology.network == "ethernet":
        found += [
            Setting(
                name="NCCL_IB_DISABLE", value="1", reason="sockets are meant: do not try RDMA devices that are there"
            ),
            Setting(name="NCCL_SOCKET_NTHREADS", value="4", reason="one thread per connection cannot fill 100 Gbit/s"),
            Setting(
                name="NCCL_NSOCKS_PERTHREAD",
                value="4",
                reason="several flows per thread; the product with the threads must stay under 64",
            ),
        ]
    if topology.network == "efa":
        found += [
            Setting(name="FI_PROVIDER", value="efa", reason="libfabric uses the EFA devices"),
            Setting(name="FI_EFA_USE_DEVICE_RDMA", value="1", reason="GPUDirect RDMA on the instances that have it"),
        ]
    if topology.domain_gpus > topology.gpus_per_node:
        found.append(
            Setting(
                name="NCCL_MNNVL_ENABLE",
                value="1",
                reason="fail at start when the multi-node NVLink domain (IMEX) is not up, instead of using the network",
            )
        )
    return found


def _warnings(topology: Topology, network_type: str, interface: str) -> list[str]:
    """What may go wrong with this choice."""
    found = []
    spans = topology.nodes > 1 and topology.domain_gpus <= topology.gpus_per_node
    if spans and network_type.strip().lower() == "nvlink":
        found.append(
            f"NVLink of {topology.accelerator.name} ends at the node: between {topology.nodes} nodes the network "
            f"carries the traffic ({topology.nic_bytes_per_s / 1e9:g} GB/s per GPU assumed); name its kind"
        )
    if spans and topology.network == "ethernet":
        found.append(
            "TCP costs CPU and latency: expect a fraction of RDMA's bandwidth, most visible with small messages"
        )
    if spans and not interface:
        found.append(
            "several nodes: give the interface, or NCCL takes the first that is up, which may be a container's"
        )
    if not topology.has_scaleup and topology.gpus_per_node > 1:
        found.append("no NVLink between the GPUs of a node: keep tensor parallelism small, or use pipeline parallelism")
    return found


def _optimizations(topology: Topology, tp: int) -> list[str]:
    """What is worth doing, in order."""
    found = ["run nccl-tests (all_reduce_perf -b 8M -e 8G -f 2) once and compare with the expected bandwidth"]
    if tp > topology.domain_gpus:
        found.append(f"tensor parallelism {tp} leaves the NVLink domain of {topology.domain_gpus}: reduce it")
    if topology.network in ("infiniband", "roce") and topology.nodes > 1:
        found.append("check that GPUDirect RDMA is in use: NCCL_DEBUG=INFO prints GDRDMA on its channel lines")
        found.append("keep rank order by node (one rail per GPU index), so that rings stay on their rail")
    if topology.network == "infiniband" and topology.nodes > 8:
        found.append("where switches do SHARP, NCCL_COLLNET_ENABLE=1 halves the bytes of large all-reduces")
    return found
