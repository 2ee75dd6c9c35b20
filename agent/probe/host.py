"""What this machine is, read from /proc, /sys and /etc: names, CPUs, memory, file systems, network interfaces.

Memory and CPUs are what this process may use, not what the board carries: cgroup limits (v1 and v2) and the CPU
affinity of a Slurm allocation count. A fact that cannot be read is empty; nothing here raises for a strange machine.
All functions block (a network file system may block for long) and are meant for a thread.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from agent.probe.nvml import Nvml
from common.wire import Disk, Inventory, Nic

DRAM_SHARE = 0.5  # of the memory that may be used; the rest is for engines and the system
DISK_SHARE = 0.9  # of the store's file system
DISKS_MAX = 32
NICS_MAX = 32
ROOT = Path("/")

# Local file systems that hold data. Network ones appear only where the store stands on them: asking a dead one hangs.
_LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "reiserfs"})
_VIRTUAL_NICS = re.compile(r"lo|veth.*|docker.*|virbr.*|cni.*|flannel.*|cali.*|br-.*|podman.*|tap.*|ifb.*|dummy.*")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes about 2**63 where there is no limit


def read_inventory(
    store: Path,
    nvml: Nvml,
    *,
    find_engines: Callable[[], dict[str, str]] = dict,
    dram_budget_bytes: int | None = None,
    disk_budget_bytes: int | None = None,
    root: Path = ROOT,
) -> Inventory:
    """This machine as it is now.

    Budgets: what the operator gave, never more than there is; None is half the memory and 0.9 of the file system.
    root: where proc, sys and etc are found; tests give a tree of their own.
    """
    found = nvml.inventory()
    memory = memory_bytes(root)
    disks = read_disks(store, root)
    cpus = os.sched_getaffinity(0)
    nics = read_nics(root)
    disk_total = disks[0].total_bytes
    return Inventory(
        hostname=socket.gethostname(),
        addresses=_routable(nics),
        os=_os_name(root),
        kernel=os.uname().release,
        arch=os.uname().machine,
        cpu_model=_cpu_model(root),
        cpus=len(cpus),
        cores=count_cores(cpus, root),
        numa_nodes=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
        memory_bytes=memory,
        dram_budget_bytes=_budget(dram_budget_bytes, memory, DRAM_SHARE),
        disk_budget_bytes=_budget(disk_budget_bytes, disk_total, DISK_SHARE),
        disks=disks,
        nics=nics,
        gpus=found.gpus,
        gpu_reason=found.reason,
        driver_version=found.driver_version,
        cuda_version=found.cuda_version,
        engines=find_engines(),
    )


# memory
def memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process may use: what the kernel has, or the narrowest cgroup limit above us."""
    return min([_meminfo(root).get("MemTotal", 0), *(limit for limit, _ in _cgroup_limits(root))])


def memory_available_bytes(root: Path = ROOT) -> int:
    """Memory that can be had without swapping, also inside cgroup limits.

    Source: a cgroup's working set is its usage less inactive_file, as kubelet counts it.
    """
    rooms = [_meminfo(root).get("MemAvailable", 0)]
    for limit, folder in _cgroup_limits(root):
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        cache = _fields(folder / "memory.stat", " ")
        reclaimable = cache.get("total_inactive_file", cache.get("inactive_file", 0))
        rooms.append(max(0, limit - max(0, used - reclaimable)))
    return min(rooms)


def _meminfo(root: Path) -> Mapping[str, int]:
    return {name: value * 1024 for name, value in _fields(root / "proc/meminfo", ":").items()}


def _cgroup_limits(root: Path) -> Iterator[tuple[int, Path]]:
    """Every memory limit from our cgroup up to the top, with the folder it stands in."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # Without a cgroup namespace a container sees the host's path, which is not there: the top still is.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            limit = _number(folder / name)
            if limit is not None and limit < _UNLIMITED_BYTES:
                yield limit, folder


# file systems
def read_disks(store: Path, root: Path = ROOT) -> tuple[Disk, ...]:
    """The store's file system first, then the other local ones that hold data, each device once."""
    mounts = _mounts(root)
    place = _existing(store)
    point, fs_type, device = _mount_of(place, mounts)
    try:
        disks = [_disk(str(store), place, fs_type, device)]
    except OSError:
        disks = [Disk(path=str(store), fs_type=fs_type, total_bytes=0, free_bytes=0, device=device)]
    seen = {device}
    for path, (kind, source) in mounts.items():
        if kind in _LOCAL_TYPES and source not in seen and path != point and len(disks) < DISKS_MAX:
            seen.add(source)
            try:
                disks.append(_disk(path, Path(path), kind, source))
            except OSError:
                continue  # mounted where we may not look
    return tuple(disks)


def disk_free_bytes(store: Path) -> int:
    """Free bytes of the store's file system for a process without privileges."""
    stats = os.statvfs(_existing(store))
    return stats.f_bavail * stats.f_frsize


def disk_budget_bytes(store: Path, given_bytes: int | None) -> int:
    """What the store may use in all: the inventory says it, and the mover is held to it. Raises: OSError."""
    stats = os.statvfs(_existing(store))
    return _budget(given_bytes, stats.f_blocks * stats.f_frsize, DISK_SHARE)


def _disk(name: str, path: Path, fs_type: str, device: str) -> Disk:
    stats = os.statvfs(path)
    return Disk(
        path=name,
        fs_type=fs_type,
        total_bytes=stats.f_blocks * stats.f_frsize,
        free_bytes=stats.f_bavail * stats.f_frsize,
        device=device,
    )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists: the store may not be made yet."""
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:  # unlike Path.exists, quiet where we may not look
        path = path.parent
    return path.resolve()


def _mounts(root: Path) -> dict[str, tuple[str, str]]:
    """Mount point -> (type, source); of mounts over each other the last, which is the one seen."""
    mounts = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, source = left.split(), right.split()
        if len(fields) > 4 and len(source) > 1:
            mounts[_unescape(fields[4])] = (source[0], _unescape(source[1]))
    return mounts


def _mount_of(path: Path, mounts: Mapping[str, tuple[str, str]]) -> tuple[str, str, str]:
    for folder in (path, *path.parents):
        if str(folder) in mounts:
            return str(folder), *mounts[str(folder)]
    return "/", "", ""


def _unescape(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


# network
def read_nics(root: Path = ROOT) -> tuple[Nic, ...]:
    """Interfaces that lead off this machine, with their addresses and the speed that the kernel gives."""
    stats = psutil.net_if_stats()
    nics: list[Nic] = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        is_up = name in stats and stats[name].isup
        if is_up and not _VIRTUAL_NICS.fullmatch(name) and len(nics) < NICS_MAX:
            found = (
                address.address.partition("%")[0]
                for address in addresses
                if address.family in (socket.AF_INET, socket.AF_INET6)
            )
            nics.append(Nic(name=name, addresses=tuple(found), speed_mbps=nic_speed_mbps(name, root)))
    return tuple(nics)


def nic_speed_mbps(name: str, root: Path = ROOT) -> int:
    """An interface's speed, by ethtool or InfiniBand port rate; -1 when the kernel does not say."""
    folder = root / "sys/class/net" / name
    speed = _number(folder / "speed")
    if speed is not None and speed > 0:
        return speed
    for rate in sorted(folder.glob("device/infiniband/*/ports/1/rate")):
        match = re.match(r"(\d+(?:\.\d+)?) Gb/sec", _text(rate))
        if match:
            return int(float(match[1]) * 1000)
    return -1


def _routable(nics: tuple[Nic, ...]) -> tuple[str, ...]:
    """Addresses that others may reach: IPv4 first, no loopback, no link-local."""
    usable = []
    for nic in nics:
        for text in nic.addresses:
            address = ipaddress.ip_address(text)
            if not address.is_loopback and not address.is_link_local:
                usable.append((address.version, text))
    return tuple(text for _, text in sorted(usable, key=lambda pair: pair[0]))


# CPUs and names
def count_cores(cpus: set[int], root: Path = ROOT) -> int:
    """Physical cores among these logical CPUs; as many as CPUs where the kernel does not tell."""
    cores = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core = _number(topology / "core_id")
        cores.add((_number(topology / "physical_package_id"), core) if core is not None else (None, -1 - cpu))
    return len(cores)


def _cpu_model(root: Path) -> str:
    text = _text(root / "proc/cpuinfo")
    match = re.search(r"^(?:model name|Model|cpu)\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return " ".join(match[1].split())
    return _text(root / "sys/firmware/devicetree/base/model").strip("\0\n ")


def _os_name(root: Path) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release"), re.MULTILINE)
    return match[1] if match else os.uname().sysname


def _budget(given_bytes: int | None, there_bytes: int, share: float) -> int:
    return int(there_bytes * share) if given_bytes is None else min(given_bytes, there_bytes)


# reading
def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _fields(path: Path, separator: str) -> dict[str, int]:
    """`name<separator>number [unit]` lines."""
    fields = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(separator)
        first = value.split()[:1]
        if first and first[0].isdigit():
            fields[name] = int(first[0])
    return fields
