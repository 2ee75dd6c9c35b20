"""One GPU's readings in full: what the monitor writes down once a second or faster, and which processes use it.

About nine short calls per card, and three more once a second. The one call that takes long,
`nvmlDeviceGetPcieThroughput`, which measures over 20 ms each time, stands apart (`pcie_rates`); where the driver counts
PCIe bytes itself it is not needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import pynvml

from agent.probe.nvml_calls import attempt, memory, process_bytes, temperature

# Source: nvml.h. The scope of NVLink fields is a link's number; the largest number asks for the sum over all links.
_ENERGY_MJ, _NVLINK_TX_KIB, _NVLINK_RX_KIB, _PCIE_TX_BYTES, _PCIE_RX_BYTES = 83, 138, 139, 197, 198
_ALL_LINKS = 0xFFFFFFFF
FIELDS = (
    (_ENERGY_MJ, 0),
    (_NVLINK_TX_KIB, _ALL_LINKS),
    (_NVLINK_RX_KIB, _ALL_LINKS),
    (_PCIE_TX_BYTES, 0),
    (_PCIE_RX_BYTES, 0),
)
_KIB = 1024
_PCIE_UNIT_BYTES = 1000  # nvmlDeviceGetPcieThroughput answers in KB/s

# Source: nvml.h, nvmlClocksEventReason* (called throttle reasons before driver 535).
THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}


class GpuSample(msgspec.Struct):
    """One GPU or MIG instance at one moment; None where the card or driver does not say.

    Counters (`energy_j`, `*_bytes` of links) grow since the driver was loaded. The rates are filled in by whoever
    keeps the sample before; until then they are None.
    """

    index: int
    uuid: str
    is_lost: bool = False
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilisation: float | None = None  # 0..1
    memory_utilisation: float | None = None  # 0..1
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle: tuple[str, ...] | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    nvlink_tx_bytes: int | None = None
    nvlink_rx_bytes: int | None = None
    pcie_tx_bytes: int | None = None
    pcie_rx_bytes: int | None = None
    nvlink_tx_bytes_per_s: float | None = None
    nvlink_rx_bytes_per_s: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    pcie_rx_bytes_per_s: float | None = None


class GpuProcess(msgspec.Struct, frozen=True):
    """One process on one GPU."""

    gpu: int
    pid: int
    memory_bytes: int | None = None
    utilisation: float | None = None  # 0..1 of the GPU's time
    memory_utilisation: float | None = None  # 0..1
    name: str = ""


class Steady(NamedTuple):
    """What changes seldom enough to be asked once a second, however often the rest is."""

    power_limit_w: float | None
    ecc_corrected: int | None
    ecc_uncorrected: int | None


def steady(handle: Any) -> Steady | None:
    """None when the GPU is lost."""
    volatile = pynvml.NVML_VOLATILE_ECC
    try:
        limit_mw = attempt(None, pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        errors = [
            attempt(None, pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, volatile)
            for kind in (pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
        ]
    except pynvml.NVMLError:
        return None
    return Steady(None if limit_mw is None else limit_mw / 1000, errors[0], errors[1])


def sample(index: int, uuid: str, handle: Any, known: Steady | None) -> GpuSample:
    """What one unit says now, with what was `known` a moment ago; a lost one says so and nothing else."""
    try:
        return _sample(index, uuid, handle, known or Steady(None, None, None))
    except pynvml.NVMLError:  # `attempt` lets only the loss of the GPU through
        return GpuSample(index=index, uuid=uuid, is_lost=True)


def _sample(index: int, uuid: str, handle: Any, known: Steady) -> GpuSample:
    total, used, free = memory(handle)
    rates = attempt(None, pynvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = attempt(None, pynvml.nvmlDeviceGetPowerUsage, handle)
    energy_mj, nvlink_tx, nvlink_rx, pcie_tx, pcie_rx = _fields(handle)
    if energy_mj is None:
        energy_mj = attempt(None, pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return GpuSample(
        index=index,
        uuid=uuid,
        memory_total_bytes=total or None,
        memory_used_bytes=used if total else None,
        memory_free_bytes=free if total else None,
        utilisation=None if rates is None else rates.gpu / 100,
        memory_utilisation=None if rates is None else rates.memory / 100,
        power_w=None if power_mw is None else power_mw / 1000,
        power_limit_w=known.power_limit_w,
        energy_j=None if energy_mj is None else energy_mj / 1000,
        temperature_c=temperature(handle),
        sm_clock_mhz=attempt(None, pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_clock_mhz=attempt(None, pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        throttle=_throttle(handle),
        ecc_corrected=known.ecc_corrected,
        ecc_uncorrected=known.ecc_uncorrected,
        nvlink_tx_bytes=None if nvlink_tx is None else nvlink_tx * _KIB,
        nvlink_rx_bytes=None if nvlink_rx is None else nvlink_rx * _KIB,
        pcie_tx_bytes=pcie_tx,
        pcie_rx_bytes=pcie_rx,
    )


def _fields(handle: Any) -> list[int | None]:
    """The counters that are read together, in the order of FIELDS; each has its own return code."""
    values = attempt(None, pynvml.nvmlDeviceGetFieldValues, handle, FIELDS)
    if values is None:
        return [None] * len(FIELDS)
    return [_number(value) if value.nvmlReturn == pynvml.NVML_SUCCESS else None for value in values]


def _number(value: Any) -> int | None:
    """A field's value by the type it says it has. Fields that we read are unsigned; others mean a newer driver."""
    kind = value.valueType
    if kind in (pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG):
        return int(value.value.ullVal)
    if kind == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT:
        return int(value.value.uiVal)
    if kind == pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG:
        return int(value.value.sllVal)
    return None


def _throttle(handle: Any) -> tuple[str, ...] | None:
    """Why the clocks are below what they could be, by name; empty when they are not held back."""
    bits = attempt(None, pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if bits is None:
        bits = attempt(None, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return None if bits is None else throttle_names(bits)


def throttle_names(bits: int) -> tuple[str, ...]:
    """The reasons that are set; one that we do not know keeps its number."""
    names = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    unknown = bits & ~sum(THROTTLE_REASONS)
    return tuple([*names, f"0x{unknown:x}"] if unknown else names)


def pcie_rates(handle: Any) -> tuple[float | None, float | None]:
    """Bytes/s sent and received over the last 20 ms. Takes 2 x 20 ms on a real card."""
    try:
        sent = attempt(None, pynvml.nvmlDeviceGetPcieThroughput, handle, pynvml.NVML_PCIE_UTIL_TX_BYTES)
        received = attempt(None, pynvml.nvmlDeviceGetPcieThroughput, handle, pynvml.NVML_PCIE_UTIL_RX_BYTES)
    except pynvml.NVMLError:
        return None, None  # lost
    return tuple(None if rate is None else float(rate * _PCIE_UNIT_BYTES) for rate in (sent, received))  # type: ignore[return-value]


def processes(index: int, handle: Any, seen_us: int) -> tuple[list[GpuProcess], int]:
    """The processes on one unit, and until when their use of it was read; pass that in the next time.

    Use is the newest sample of each process since `seen_us`; the driver takes several a second.
    """
    held = process_bytes(handle)
    newest: dict[int, Any] = {}
    try:
        samples = attempt((), pynvml.nvmlDeviceGetProcessUtilization, handle, seen_us)
    except pynvml.NVMLError:
        return [], seen_us  # lost
    for use in samples:
        seen_us = max(seen_us, use.timeStamp)
        if use.pid not in newest or newest[use.pid].timeStamp < use.timeStamp:
            newest[use.pid] = use
    found = []
    for pid in sorted(held):
        mine = newest.get(pid)
        found.append(
            GpuProcess(
                gpu=index,
                pid=pid,
                memory_bytes=held[pid],
                utilisation=None if mine is None else mine.smUtil / 100,
                memory_utilisation=None if mine is None else mine.memUtil / 100,
            )
        )
    return found, seen_us
