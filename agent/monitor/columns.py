"""The table of the monitor: which columns there are on this node, and a sample as a row of it.

First come seed 002's columns under its names (`timestamp,gpu0_util,gpu0_mem_used,...,cpu_percent,ram_used_MB`), then
ours, units in their names. The columns are fixed when the monitor starts, so the header never changes: a card that
is lost leaves its cells empty, one that is plugged in later has none. An empty cell means "not known", never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from agent.monitor.engines import FIELDS as ENGINE_FIELDS
from agent.monitor.engines import EngineSample
from agent.monitor.node import NodeReader, NodeSample
from agent.monitor.procfs import PRESSURES
from agent.probe.gpu_sample import GpuProcess, GpuSample

MIB = 1 << 20  # seed 002 counts its MB so
Value = float | int | str | None

_GPU = (
    ("mem_total_bytes", int),
    ("mem_util_percent", float),
    ("power_w", float),
    ("power_limit_w", float),
    ("energy_j", float),
    ("temperature_c", float),
    ("sm_clock_mhz", int),
    ("mem_clock_mhz", int),
    ("throttle", str),
    ("ecc_corrected", int),
    ("ecc_uncorrected", int),
    ("nvlink_tx_bytes_per_s", float),
    ("nvlink_rx_bytes_per_s", float),
    ("pcie_tx_bytes_per_s", float),
    ("pcie_rx_bytes_per_s", float),
    ("lost", int),
)
_CLOCK = (("elapsed_s", float), ("boottime_ms", int), ("missed_ticks", int), ("loop_ms", float))
_CPU = (("cpu_iowait_percent", float), ("load1", float))
_RAM = (
    ("ram_total_bytes", int),
    ("ram_used_bytes", int),
    ("ram_available_bytes", int),
    ("ram_page_cache_bytes", int),
    ("swap_used_bytes", int),
)
_DISK = ("read_bytes_per_s", "write_bytes_per_s", "read_iops", "write_iops", "busy_percent")
_NIC = (("rx_bytes_per_s", float), ("tx_bytes_per_s", float), ("rx_errors", int), ("tx_errors", int))
_PRESSURE = (
    "psi_cpu_some_percent",
    "psi_memory_some_percent",
    "psi_memory_full_percent",
    "psi_io_some_percent",
    "psi_io_full_percent",
)
PROCESS_COLUMNS = (
    ("timestamp", str),
    ("boottime_ms", int),
    ("gpu", int),
    ("pid", int),
    ("name", str),
    ("mem_used_bytes", int),
    ("util_percent", float),
    ("mem_util_percent", float),
)
ENGINE_COLUMNS = (
    ("timestamp", str),
    ("elapsed_s", float),
    ("boottime_ms", int),
    ("replica", str),
    ("up", int),
    ("scrape_ms", float),
    *((field.name, float) for field in ENGINE_FIELDS),
)


class NodeTable:
    """The columns of one node, in order, and its rows."""

    def __init__(self, reader: NodeReader, *, cores: int = 0) -> None:
        """reader: after its `open`. cores: how many columns `cpuN_percent` there are."""
        groups = reader.groups
        self._gpus = tuple(gpu.index for gpu in reader.inventory.gpus) if "gpu" in groups else ()
        self._disks = reader.host.disks
        self._nics = reader.host.interfaces
        self._cores = cores if "cpu" in groups else 0
        self._has_cpu, self._has_ram = "cpu" in groups, "ram" in groups
        self._has_pressure = "pressure" in groups
        self.columns: tuple[tuple[str, type], ...] = tuple(self._columns())
        self.names = tuple(name for name, _ in self.columns)

    def _columns(self) -> list[tuple[str, type]]:
        columns: list[tuple[str, type]] = [("timestamp", str)]
        for gpu in self._gpus:
            columns += [(f"gpu{gpu}_util", float), (f"gpu{gpu}_mem_used", float)]
        columns += [("cpu_percent", float)] if self._has_cpu else []
        columns += [("ram_used_MB", float)] if self._has_ram else []
        columns += _CLOCK
        for gpu in self._gpus:
            columns += [(f"gpu{gpu}_{name}", kind) for name, kind in _GPU]
        columns += _CPU if self._has_cpu else ()
        columns += [(f"cpu{core}_percent", float) for core in range(self._cores)]
        columns += _RAM if self._has_ram else ()
        for disk in self._disks:
            columns += [(f"disk_{disk}_{name}", float) for name in _DISK]
        for nic in self._nics:
            columns += [(f"net_{nic}_{name}", kind) for name, kind in _NIC]
        columns += [(name, float) for name in _PRESSURE] if self._has_pressure else []
        return columns

    def row(self, sample: NodeSample) -> list[Value]:
        """The sample's cells, in the order of `columns`."""
        host = sample.host
        gpus = {gpu.index: gpu for gpu in sample.gpus or ()}
        row: list[Value] = [timestamp(sample.wall_ms)]
        for index in self._gpus:
            gpu = gpus.get(index)
            if gpu is None:
                row += (None, None)
            else:
                used = gpu.memory_used_bytes
                row += (_percent(gpu.utilisation), None if used is None else used / MIB)
        if self._has_cpu:
            row.append(_percent(host.cpu.busy) if host.cpu else None)
        if self._has_ram:
            row.append(host.memory.used_bytes / MIB if host.memory else None)
        row += (sample.elapsed_s, sample.boottime_ms, sample.missed_ticks, sample.loop_s * 1000)
        for index in self._gpus:
            row += _gpu_cells(gpus.get(index))
        self._add_cpu_and_ram(row, sample)
        self._add_devices(row, sample)
        return row

    def _add_cpu_and_ram(self, row: list[Value], sample: NodeSample) -> None:
        host = sample.host
        if self._has_cpu:
            cores = host.cpu.cores if host.cpu else ()
            row += (_percent(host.cpu.iowait) if host.cpu else None, host.load1)
            row += [_percent(cores[core]) if core < len(cores) else None for core in range(self._cores)]
        if self._has_ram:
            memory = host.memory
            row += (
                (None,) * len(_RAM)
                if memory is None
                else (
                    memory.total_bytes,
                    memory.used_bytes,
                    memory.available_bytes,
                    memory.page_cache_bytes,
                    memory.swap_used_bytes,
                )
            )

    def _add_devices(self, row: list[Value], sample: NodeSample) -> None:
        disks = {disk.name: disk for disk in sample.host.disks}
        for name in self._disks:
            disk = disks.get(name)
            row += (
                (None,) * len(_DISK)
                if disk is None
                else (
                    disk.read_bytes_per_s,
                    disk.write_bytes_per_s,
                    disk.read_iops,
                    disk.write_iops,
                    _percent(disk.busy),
                )
            )
        nics = {nic.name: nic for nic in sample.host.nics}
        for name in self._nics:
            nic = nics.get(name)
            row += (
                (None,) * len(_NIC)
                if nic is None
                else (nic.rx_bytes_per_s, nic.tx_bytes_per_s, nic.rx_errors, nic.tx_errors)
            )
        if self._has_pressure:
            pressures = {pressure.resource: pressure for pressure in sample.host.pressures}
            for resource in PRESSURES:
                pressure = pressures.get(resource)
                row.append(None if pressure is None else _percent(pressure.some))
                if resource != "cpu":
                    row.append(None if pressure is None else _percent(pressure.full))


def timestamp(wall_ms: int) -> str:
    """UTC with milliseconds, as 2026-01-31T12:00:00.250Z."""
    seconds, rest = divmod(wall_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


def process_row(sample: NodeSample, process: GpuProcess) -> list[Value]:
    """One process's cells, in the order of PROCESS_COLUMNS."""
    return [
        timestamp(sample.wall_ms),
        sample.boottime_ms,
        process.gpu,
        process.pid,
        process.name,
        process.memory_bytes,
        _percent(process.utilisation),
        _percent(process.memory_utilisation),
    ]


def engine_row(sample: EngineSample) -> list[Value]:
    """One look at an engine, in the order of ENGINE_COLUMNS."""
    return [
        timestamp(sample.wall_ms),
        sample.elapsed_s,
        sample.boottime_ms,
        sample.replica,
        int(sample.is_up),
        sample.scrape_s * 1000,
        *(sample.values.get(field.name) for field in ENGINE_FIELDS),
    ]


def csv_line(row: Sequence[Value]) -> str:
    """A row as a line of CSV. Fractions keep three decimals; None is an empty cell."""
    return ",".join(map(_cell, row)) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _gpu_cells(gpu: GpuSample | None) -> tuple[Value, ...]:
    if gpu is None:
        return (None,) * len(_GPU)
    return (
        gpu.memory_total_bytes,
        _percent(gpu.memory_utilisation),
        gpu.power_w,
        gpu.power_limit_w,
        gpu.energy_j,
        gpu.temperature_c,
        gpu.sm_clock_mhz,
        gpu.memory_clock_mhz,
        None if gpu.throttle is None else "|".join(gpu.throttle) or "none",
        gpu.ecc_corrected,
        gpu.ecc_uncorrected,
        gpu.nvlink_tx_bytes_per_s,
        gpu.nvlink_rx_bytes_per_s,
        gpu.pcie_tx_bytes_per_s,
        gpu.pcie_rx_bytes_per_s,
        int(gpu.is_lost),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100
