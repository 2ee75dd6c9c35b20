"""How this machine fares: a handful of small reads, cheap enough for once a second. Blocking; meant for a thread."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from agent.probe.cpu_ticks import CpuTicks, shares, ticks_of
from agent.probe.host import ROOT, disk_free_bytes, memory_available_bytes
from agent.probe.nvml import Nvml
from common.wire import Telemetry


class CpuMeter:
    """The share of CPU time that was used since the last look, over all CPUs."""

    def __init__(self, root: Path = ROOT) -> None:
        self._stat = root / "proc/stat"
        self._lock = threading.Lock()
        self._last = self._read()

    def share(self) -> float:
        """0..1 since the last call; 0 when no time has passed."""
        with self._lock:
            before, self._last = self._last, self._read()
            busy, _ = shares(self._last, before)
            return busy or 0.0

    def _read(self) -> CpuTicks:
        try:
            with self._stat.open("rb") as file:
                return ticks_of(file.readline())
        except (OSError, ValueError):
            return CpuTicks(0, 0, 0)


_METER = CpuMeter()


def read_telemetry(
    store: Path,
    nvml: Nvml,
    *,
    disk_used_bytes: int = 0,
    disk_reserved_bytes: int = 0,
    dram_used_bytes: int = 0,
    cpu: CpuMeter = _METER,
    root: Path = ROOT,
) -> Telemetry:
    """Readings of now. What the store and the RAM tier hold is known to their owners and passed in."""
    try:
        free = disk_free_bytes(store)
    except OSError:
        free = 0  # a store that cannot be asked has no room
    return Telemetry(
        cpu=cpu.share(),
        memory_available_bytes=memory_available_bytes(root),
        disk_free_bytes=free,
        disk_used_bytes=disk_used_bytes,
        disk_reserved_bytes=disk_reserved_bytes,
        dram_used_bytes=dram_used_bytes,
        gpus=nvml.readings(),
        load1=os.getloadavg()[0],
    )
