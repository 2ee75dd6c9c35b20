"""What `herder monitor` draws on a terminal: one block of at most 80 columns, drawn anew in its place."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import click

from herder.cli.command import Globals
from herder.cli.table import Column, clean, cut
from herder.cli.table import render as render_table
from herder.cli.text import rate, size

if TYPE_CHECKING:
    from agent.monitor.monitor import Monitor

WIDTH = 80
GPUS = (
    Column("gpu", is_number=True),
    Column("name", shrinks_to=6, rank=2),
    Column("use", is_number=True),
    Column("memory", is_number=True),
    Column("power", is_number=True),
    Column("temp", is_number=True, rank=3),
    Column("clock", is_number=True, rank=4),
    Column("held back by", shrinks_to=8, rank=1),
)
PROCESSES = (
    Column("gpu", is_number=True),
    Column("pid", is_number=True),
    Column("process", shrinks_to=8),
    Column("memory", is_number=True),
    Column("use", is_number=True),
)
ENGINES = (
    Column("engine", shrinks_to=8),
    Column("running", is_number=True),
    Column("waiting", is_number=True),
    Column("KV cache", is_number=True, rank=2),
    Column("tokens in/s", is_number=True, rank=1),
    Column("tokens out/s", is_number=True),
)
PROCESSES_MAX = 8


class View:
    """The block; `draw` takes the monitor's newest sample."""

    def __init__(self, options: Globals, monitor: Monitor) -> None:
        self._options, self._monitor = options, monitor
        self._drawn = 0
        self._samples = -1

    def draw(self) -> None:
        """Draws where there is something new."""
        if self._monitor.latest is None or self._monitor.samples == self._samples:
            return
        self._samples = self._monitor.samples
        terminal = shutil.get_terminal_size((WIDTH, 24))
        width = min(WIDTH, terminal.columns - 1)
        lines = [cut(clean(line), width) for line in render(self._monitor, width)][: terminal.lines - 1]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        click.echo(up + "".join(f"\r\x1b[2K{line}\n" for line in lines) + "\x1b[J", nl=False)
        self._drawn = len(lines)


def render(monitor: Monitor, width: int = WIDTH) -> list[str]:
    """The lines of the newest sample."""
    sample = monitor.latest
    if sample is None:
        return []
    host = sample.host
    missed = f", {sample.missed_ticks} missed" if sample.missed_ticks else ""
    lines = [f"{monitor.instance}  every {monitor.settings.interval_s:g} s, {monitor.samples} samples{missed}"]
    if host.cpu is not None:
        load = "" if host.load1 is None else f"  load {host.load1:.2f}"
        lines.append(f"CPU  {_percent(host.cpu.busy)}  iowait {_percent(host.cpu.iowait)}{load}{_pressure(host)}")
    if host.memory is not None:
        memory = host.memory
        swap = f"  swap {size(memory.swap_used_bytes)}" if memory.swap_used_bytes else ""
        lines.append(
            f"RAM  {size(memory.used_bytes)} of {size(memory.total_bytes)}"
            f"  page cache {size(memory.page_cache_bytes)}{swap}"
        )
    for disk in host.disks:
        if disk.read_bytes_per_s or disk.write_bytes_per_s:
            lines.append(
                f"disk {disk.name}  read {rate(disk.read_bytes_per_s)}  write {rate(disk.write_bytes_per_s)}"
                f"  busy {_percent(disk.busy)}"
            )
    for nic in host.nics:
        if nic.rx_bytes_per_s or nic.tx_bytes_per_s:
            errors = f"  errors {nic.rx_errors + nic.tx_errors}" if nic.rx_errors + nic.tx_errors else ""
            lines.append(f"net  {nic.name}  in {rate(nic.rx_bytes_per_s)}  out {rate(nic.tx_bytes_per_s)}{errors}")
    lines += _gpus(monitor, sample, width)
    lines += _processes(sample, width)
    lines += _engines(monitor, width)
    if monitor.error:
        lines.append(f"trouble: {monitor.error}")
    return lines


def _pressure(host: Any) -> str:
    shares = {pressure.resource: pressure.some for pressure in host.pressures if pressure.some is not None}
    if not shares:
        return ""
    return "  waiting for " + " ".join(f"{name} {_percent(share)}" for name, share in shares.items())


def _gpus(monitor: Monitor, sample: Any, width: int) -> list[str]:
    found = monitor.reader.inventory
    if "gpu" not in monitor.reader.groups:
        return []
    if sample.gpus is None:
        return ["GPUs: the driver does not answer"]
    if not sample.gpus:
        return [f"no GPU: {found.reason}"]
    names = {gpu.uuid: gpu.name for gpu in found.gpus}
    rows = []
    for gpu in sample.gpus:
        if gpu.is_lost:
            rows.append([str(gpu.index), names.get(gpu.uuid, ""), "lost", "", "", "", "", ""])
            continue
        power = "-" if gpu.power_w is None else f"{gpu.power_w:.0f}"
        limit = "" if gpu.power_limit_w is None else f"/{gpu.power_limit_w:.0f}"
        rows.append(
            [
                str(gpu.index),
                names.get(gpu.uuid, ""),
                _percent(gpu.utilisation),
                f"{size(gpu.memory_used_bytes)}/{size(gpu.memory_total_bytes)}",
                f"{power}{limit} W",
                "-" if gpu.temperature_c is None else f"{gpu.temperature_c:.0f} C",
                "-" if gpu.sm_clock_mhz is None else f"{gpu.sm_clock_mhz} MHz",
                "-" if gpu.throttle is None else ", ".join(gpu.throttle),
            ]
        )
    return ["", *render_table(GPUS, rows, width=width).splitlines()]


def _processes(sample: Any, width: int) -> list[str]:
    if not sample.processes:
        return []
    largest = sorted(sample.processes, key=lambda process: -(process.memory_bytes or 0))[:PROCESSES_MAX]
    rows = [
        [str(one.gpu), str(one.pid), one.name, size(one.memory_bytes), _percent(one.utilisation)] for one in largest
    ]
    return ["", *render_table(PROCESSES, rows, width=width).splitlines()]


def _engines(monitor: Monitor, width: int) -> list[str]:
    if not monitor.watches:
        return []
    rows = []
    for watch in monitor.watches:
        latest = watch.latest
        if latest is None or not latest.is_up:
            rows.append([watch.target.replica, "down" if latest else "-", "", "", "", ""])
            continue
        values = latest.values
        rows.append(
            [
                watch.target.replica,
                _number(values.get("requests_running")),
                _number(values.get("requests_waiting")),
                _percent(values.get("kv_cache_used_ratio")),
                _number(values.get("prompt_tokens_per_s")),
                _number(values.get("generation_tokens_per_s")),
            ]
        )
    return ["", *render_table(ENGINES, rows, width=width).splitlines()]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
