"""What CPUs did, by the kernel's counters in /proc/stat."""

from __future__ import annotations

from typing import NamedTuple


class CpuTicks(NamedTuple):
    """Ticks of one CPU or of all since the machine started."""

    busy: int
    iowait: int
    total: int


def ticks_of(line: bytes) -> CpuTicks:
    """A `cpu` line of /proc/stat. Raises: ValueError when it is none.

    Source: proc(5): user nice system idle iowait irq softirq steal; guest is counted in user.
    """
    numbers = [int(text) for text in line.split()[1:9]]
    if len(numbers) < 5:
        raise ValueError("too few counters of a CPU")
    total = sum(numbers)
    return CpuTicks(total - numbers[3] - numbers[4], numbers[4], total)


def shares(now: CpuTicks, then: CpuTicks) -> tuple[float | None, float | None]:
    """Busy and iowait between two readings, 0..1; None when no tick has passed. iowait may fall in some kernels."""
    total = now.total - then.total
    if total <= 0:
        return None, None
    busy, iowait = now.busy - then.busy, now.iowait - then.iowait
    return min(1.0, max(0.0, busy / total)), min(1.0, max(0.0, iowait / total))
