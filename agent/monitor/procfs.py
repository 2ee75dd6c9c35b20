"""What the host does, from /proc and /sys: CPU, memory, disks, network, pressure.

The files are opened once and read again at offset 0; a read is one system call each. Rates are over the time since
the read before, so the first read has none. What the kernel does not have (pressure in old ones, disks in
containers) is None or empty. The numbers are the machine's, not a cgroup's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.probe.cpu_ticks import CpuTicks, shares, ticks_of
from agent.probe.host import ROOT

DISKS_MAX = 32
NICS_MAX = 32
GROUPS = ("cpu", "ram", "disk", "network", "pressure")
SECTOR_BYTES = 512  # of /proc/diskstats, whatever the disk's own is. Source: Documentation/admin-guide/iostats.rst
IB_WORD_BYTES = 4  # port_xmit_data counts words. Source: Documentation/ABI/stable/sysfs-class-infiniband
_READ_BYTES = 1 << 16
# Disks that hold nothing of their own: partitions are not in /sys/block, mapped and RAID devices count their members.
_NO_DISK = re.compile(r"(loop|ram|zram|fd|sr|nbd|dm-|md)\d*")
_NO_NIC = re.compile(r"lo|veth.*|docker.*|virbr.*|cni.*|flannel.*|cali.*|br-.*|podman.*|tap.*|ifb.*|dummy.*")
_MEMORY = re.compile(rb"^(MemTotal|MemFree|MemAvailable|Buffers|Cached|SwapTotal|SwapFree|SReclaimable):\s+(\d+)", re.M)
_TOTAL = re.compile(rb"^(some|full) .*total=(\d+)", re.M)
PRESSURES = ("cpu", "memory", "io")


class Cpu(msgspec.Struct, frozen=True):
    """Shares of CPU time, 0..1 over all CPUs; None at the first read."""

    busy: float | None
    iowait: float | None
    cores: tuple[float | None, ...] = ()  # busy by CPU, where asked for


class Memory(msgspec.Struct, frozen=True):
    """Bytes. Used is what cannot be had without swapping: total less available."""

    total_bytes: int
    used_bytes: int
    available_bytes: int
    page_cache_bytes: int
    swap_used_bytes: int


class DiskUse(msgspec.Struct, frozen=True):
    """One disk: totals since boot, and rates since the read before."""

    name: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int
    busy_s: float
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    read_iops: float | None = None
    write_iops: float | None = None
    busy: float | None = None  # 0..1


class NicUse(msgspec.Struct, frozen=True):
    """One interface or InfiniBand port: totals since it came up, and rates since the read before."""

    name: str
    rx_bytes: int
    tx_bytes: int
    rx_errors: int
    tx_errors: int
    rx_bytes_per_s: float | None = None
    tx_bytes_per_s: float | None = None


class Pressure(msgspec.Struct, frozen=True):
    """Time in which some (or all) tasks waited for a resource: seconds since boot, and the share since last time."""

    resource: str
    some_s: float
    full_s: float | None = None
    some: float | None = None  # 0..1
    full: float | None = None


class HostSample(msgspec.Struct, frozen=True):
    """The host at one moment. A group that was not asked for, or that the kernel does not have, is None or empty."""

    cpu: Cpu | None = None
    load1: float | None = None
    memory: Memory | None = None
    disks: tuple[DiskUse, ...] = ()
    nics: tuple[NicUse, ...] = ()
    pressures: tuple[Pressure, ...] = ()


class HostReader:
    """Reads the host again and again. Not for two threads at once."""

    def __init__(self, groups: Sequence[str] = GROUPS, *, has_cores: bool = False, root: Path = ROOT) -> None:
        """groups: which of GROUPS to read; root: where proc and sys are found."""
        self._groups = frozenset(groups)
        self._has_cores = has_cores
        self._root = root
        self._files: dict[str, int] = {}
        self._ticks: list[CpuTicks] = []
        self._before: dict[str, tuple[int, ...]] = {}
        self._read_at: float | None = None
        self.disks: tuple[str, ...] = ()
        self.nics: tuple[str, ...] = ()
        self._ports: dict[str, str] = {}
        self.rescan()

    def rescan(self) -> None:
        """Looks which disks and interfaces there are. Who writes tables does it once, at the start."""
        if "disk" in self._groups:
            self.disks = _disks(self._root)
        if "network" in self._groups:
            self.nics, self._ports = _nics(self._root), _ports(self._root)

    @property
    def interfaces(self) -> tuple[str, ...]:
        """Interfaces and InfiniBand ports."""
        return (*self.nics, *self._ports)

    def read(self, now_s: float) -> HostSample:
        """The host now; `now_s` is of any monotonic clock, the same at each call."""
        passed_s = 0.0 if self._read_at is None else now_s - self._read_at
        self._read_at = now_s
        groups = self._groups
        return HostSample(
            cpu=self._cpu() if "cpu" in groups else None,
            load1=os.getloadavg()[0] if "cpu" in groups else None,
            memory=self._memory() if "ram" in groups else None,
            disks=self._disk_uses(passed_s) if self.disks else (),
            nics=self._nic_uses(passed_s) if self.interfaces else (),
            pressures=self._pressures(passed_s) if "pressure" in groups else (),
        )

    def close(self) -> None:
        """Closes its files."""
        for descriptor in self._files.values():
            if descriptor >= 0:
                os.close(descriptor)
        self._files.clear()

    def _bytes(self, name: str, *, is_list: bool = False) -> bytes:
        """A file's content; empty when it is not there or cannot be read.

        is_list: the kernel hands the file out by the page, so it is read until nothing comes.
        """
        descriptor = self._files.get(name)
        if descriptor is None:
            try:
                descriptor = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                descriptor = -1
            self._files[name] = descriptor
        if descriptor < 0:
            return b""
        try:
            text = os.pread(descriptor, _READ_BYTES, 0)
            while is_list and (more := os.pread(descriptor, _READ_BYTES, len(text))):
                text += more
        except OSError:
            return b""
        return text

    def _cpu(self) -> Cpu | None:
        ticks: list[CpuTicks] = []
        for line in self._bytes("proc/stat").split(b"\n"):
            if not line.startswith(b"cpu"):
                break
            ticks.append(ticks_of(line))
            if not self._has_cores:
                break
        if not ticks:
            return None
        before, self._ticks = self._ticks, ticks
        if len(before) != len(ticks):  # the first read, or a CPU came or went
            return Cpu(None, None, (None,) * (len(ticks) - 1))
        used = [shares(now, then) for now, then in zip(ticks, before, strict=True)]
        return Cpu(used[0][0], used[0][1], tuple(busy for busy, _ in used[1:]))

    def _memory(self) -> Memory | None:
        found = {name: int(value) * 1024 for name, value in _MEMORY.findall(self._bytes("proc/meminfo"))}
        total = found.get(b"MemTotal", 0)
        if not total:
            return None
        cache = found.get(b"Cached", 0) + found.get(b"Buffers", 0) + found.get(b"SReclaimable", 0)
        available = found.get(b"MemAvailable", found.get(b"MemFree", 0) + cache)
        return Memory(
            total_bytes=total,
            used_bytes=total - available,
            available_bytes=available,
            page_cache_bytes=cache,
            swap_used_bytes=found.get(b"SwapTotal", 0) - found.get(b"SwapFree", 0),
        )

    def _disk_uses(self, passed_s: float) -> tuple[DiskUse, ...]:
        found: dict[str, list[bytes]] = {}
        for line in self._bytes("proc/diskstats", is_list=True).split(b"\n"):
            fields = line.split()
            if len(fields) >= 14:
                found[fields[2].decode(errors="replace")] = fields
        uses = []
        for name in self.disks:
            if name not in found:
                continue  # it was taken out
            fields = found[name]
            reads, writes, busy_ms = int(fields[3]), int(fields[7]), int(fields[12])
            read, written = int(fields[5]) * SECTOR_BYTES, int(fields[9]) * SECTOR_BYTES
            rates = self._rates(f"disk {name}", (read, written, reads, writes, busy_ms), passed_s)
            uses.append(
                DiskUse(
                    name=name,
                    read_bytes=read,
                    written_bytes=written,
                    reads=reads,
                    writes=writes,
                    busy_s=busy_ms / 1000,
                    read_bytes_per_s=rates[0],
                    write_bytes_per_s=rates[1],
                    read_iops=rates[2],
                    write_iops=rates[3],
                    busy=None if rates[4] is None else min(1.0, rates[4] / 1000),
                )
            )
        return tuple(uses)

    def _nic_uses(self, passed_s: float) -> tuple[NicUse, ...]:
        found: dict[str, list[bytes]] = {}
        for line in self._bytes("proc/net/dev", is_list=True).split(b"\n"):
            before, colon, rest = line.partition(b":")
            if colon:
                found[before.strip().decode(errors="replace")] = rest.split()
        uses = []
        for name in self.nics:
            fields = found.get(name)
            if fields is None or len(fields) < 16:
                continue
            now = (int(fields[0]), int(fields[8]), int(fields[2]), int(fields[10]))
            uses.append(NicUse(name, *now, *self._rates(f"nic {name}", now, passed_s)[:2]))
        for name, folder in self._ports.items():
            counters = [self._bytes(f"{folder}/counters/{file}").strip() for file in _PORT_COUNTERS]
            if all(text.isdigit() for text in counters):
                received, sent, rx_errors, tx_errors = (int(text) for text in counters)
                now = (received * IB_WORD_BYTES, sent * IB_WORD_BYTES, rx_errors, tx_errors)
                uses.append(NicUse(name, *now, *self._rates(f"nic {name}", now, passed_s)[:2]))
        return tuple(uses)

    def _pressures(self, passed_s: float) -> tuple[Pressure, ...]:
        found = []
        for resource in PRESSURES:
            totals = {kind: int(total) for kind, total in _TOTAL.findall(self._bytes(f"proc/pressure/{resource}"))}
            if b"some" not in totals:
                continue
            some, full = totals[b"some"], totals.get(b"full")
            rates = self._rates(f"pressure {resource}", (some, full or 0), passed_s)
            share, share_full = (None if rate is None else min(1.0, rate / 1e6) for rate in rates)
            has_full = full is not None and resource != "cpu"  # the whole system never stalls on its CPUs
            found.append(
                Pressure(
                    resource=resource,
                    some_s=some / 1e6,
                    full_s=full / 1e6 if full is not None and has_full else None,
                    some=share,
                    full=share_full if has_full else None,
                )
            )
        return tuple(found)

    def _rates(self, key: str, now: tuple[int, ...], passed_s: float) -> list[float | None]:
        """Growth a second of counters; None the first time, and where one fell (a reset, a replaced device)."""
        before = self._before.get(key)
        self._before[key] = now
        if before is None or passed_s <= 0:
            return [None] * len(now)
        return [(a - b) / passed_s if a >= b else None for a, b in zip(now, before, strict=True)]


_PORT_COUNTERS = ("port_rcv_data", "port_xmit_data", "port_rcv_errors", "port_xmit_discards")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _disks(root: Path) -> tuple[str, ...]:
    names = [name for name in _names(root / "sys/block") if not _NO_DISK.fullmatch(name)]
    return tuple(names[:DISKS_MAX])


def _nics(root: Path) -> tuple[str, ...]:
    """Interfaces with hardware, so that a bond or a bridge is not counted beside its members.

    A container's own has none: where no interface has, all are taken that are not known to be virtual.
    """
    top = root / "sys/class/net"
    names = [name for name in _names(top) if not _NO_NIC.fullmatch(name)]
    real = [name for name in names if (top / name / "device").exists()]
    return tuple((real or names)[:NICS_MAX])


def _ports(root: Path) -> dict[str, str]:
    """InfiniBand ports, whose traffic no interface counts (RDMA): name -> folder below the root."""
    ports = {}
    top = root / "sys/class/infiniband"
    for device in _names(top):
        for port in _names(top / device / "ports"):
            ports[f"{device}_{port}"] = f"sys/class/infiniband/{device}/ports/{port}"
    return dict(list(ports.items())[:NICS_MAX])
