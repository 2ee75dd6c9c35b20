"""GPUs through NVML, the driver's own library: what they are, how they fare, which processes hold their memory.

A call into a sick driver can hang for ever and cannot be interrupted, so every call runs on one thread that
`Nvml` owns, and the caller gets its answer, or word that there is none, within a timeout. While a call hangs no
other is started: a sick machine costs one thread. What a card, a driver or a MIG instance does not support is
None or empty, never an error; a machine without GPUs says in words why.

Device numbers: a GPU has NVML's own index. A MIG instance i of GPU g is number 100 + 10 g + i, so that
`node:gpu123` is unique on the node and survives the making of other instances. The parent of instances is listed
with `mig_mode` and cannot run anything itself.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
import pynvml

from agent.probe import gpu_sample
from agent.probe.gpu_sample import GpuProcess, GpuSample, Steady
from agent.probe.nvml_calls import LOST, attempt, memory, process_bytes, temperature
from common.wire import Gpu, GpuReading

TIMEOUT_S = 5.0  # an idle driver without persistence mode takes about 2 s to wake up
RETRY_S = 30.0  # between attempts to open a library that refused
STEADY_S = 0.9  # for what changes seldom; below a second, so that one sample a second has it fresh
MIG_INDEX_BASE = 100
MIG_INDEX_STRIDE = 10
SILENT = "NVML did not answer"

T = TypeVar("T")
_REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver: libnvidia-ml.so.1 is not on this machine",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded, or this machine has no NVIDIA GPU",
    pynvml.NVML_ERROR_NO_PERMISSION: "no permission to talk to the NVIDIA driver",
    pynvml.NVML_ERROR_GPU_IS_LOST: "it fell off the bus or its driver gave up; see the kernel log",
    pynvml.NVML_ERROR_RESET_REQUIRED: "it needs a reset before it can be used",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA library and kernel module differ in version; reboot",
}


class GpuInventory(NamedTuple):
    """The GPUs of this machine; `reason` says why there are none, or which ones are lost."""

    gpus: tuple[Gpu, ...]
    reason: str
    driver_version: str
    cuda_version: str


class Nvml:
    """NVML behind one thread of its own. Methods block for at most `timeout_s` and may be called from any thread."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._library = _Library()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._turn = threading.Lock()
        self._running: Future[Any] | None = None
        self._thread: threading.Thread | None = None
        self._is_silent = False

    @property
    def is_silent(self) -> bool:
        """Whether the last call got no answer in time."""
        return self._is_silent

    def inventory(self) -> GpuInventory:
        """The GPUs and MIG instances of this machine."""
        try:
            return self._ask(self._library.inventory)
        except TimeoutError:
            return GpuInventory((), f"{SILENT} within {self._timeout_s:g} s", "", "")

    def readings(self) -> tuple[GpuReading, ...]:
        """Live readings of every GPU and MIG instance; empty when there are none or NVML does not answer."""
        try:
            return self._ask(self._library.readings)
        except TimeoutError:
            return ()

    def process_memory(self) -> dict[int, int]:
        """Bytes of GPU memory by process id, summed over GPUs; empty when NVML does not answer."""
        try:
            return self._ask(self._library.process_memory)
        except TimeoutError:
            return {}

    def samples(self, *, timeout_s: float | None = None) -> tuple[GpuSample, ...] | None:
        """Every GPU and MIG instance in full; empty when there are none, None when NVML does not answer in time."""
        try:
            return self._ask(self._library.samples, timeout_s)
        except TimeoutError:
            return None

    def processes(self) -> tuple[GpuProcess, ...]:
        """The processes on every GPU, without names; empty when NVML does not answer."""
        try:
            return self._ask(self._library.processes)
        except TimeoutError:
            return ()

    def pcie_rates(self) -> dict[int, tuple[float | None, float | None]]:
        """Bytes/s sent and received over PCIe by GPU index. Takes 40 ms a card: for an `Nvml` of its own."""
        try:
            return self._ask(self._library.pcie_rates)
        except TimeoutError:
            return {}

    def close(self) -> None:
        """Ends the thread once it is free; never waits for a call that hangs."""
        if self._thread is not None:
            self._work.put(None)

    def _ask(self, work: Callable[[], T], timeout_s: float | None = None) -> T:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not self._turn.acquire(timeout=timeout_s):
            raise TimeoutError
        try:
            if self._running is not None and not self._running.done():
                raise TimeoutError  # the call before still hangs; a second one would hang behind it
            answer: Future[T] = Future()
            self._running = answer
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nvml", daemon=True)
                self._thread.start()
            self._work.put(lambda: _settle(answer, work))
            value = answer.result(timeout_s)
            self._is_silent = False
            return value
        except TimeoutError:
            self._is_silent = True
            raise
        finally:
            self._turn.release()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
        self._library.close()


def process_gpu_memory(nvml: Nvml, pids: Collection[int]) -> int:
    """Bytes of GPU memory that these processes hold together."""
    held = nvml.process_memory()
    return sum(held.get(pid, 0) for pid in pids)


def mig_index(parent: int, instance: int) -> int:
    """The device number of a MIG instance."""
    return MIG_INDEX_BASE + MIG_INDEX_STRIDE * parent + instance


def _settle(answer: Future[T], work: Callable[[], T]) -> None:
    try:
        answer.set_result(work())
    except Exception as error:  # noqa: BLE001 - the border of the thread: the caller gets it
        answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Unit:
    """One GPU or MIG instance that answers."""

    index: int
    uuid: str
    handle: Any
    has_instances: bool


class _Library:
    """The bindings as data. Everything here runs on the one thread."""

    def __init__(self) -> None:
        self._is_open = False
        self._reason = ""
        self._refused_at: float | None = None
        self._units: tuple[_Unit, ...] | None = None
        self._uuids: dict[int, str] = {}  # as last seen, to name a GPU that was lost since
        self._absent: dict[int, Any] = {}  # index -> the NVMLError instead of a GPU
        self._steady: dict[int, Steady | None] = {}
        self._steady_at_s = float("-inf")
        self._seen_us: dict[int, int] = {}  # index -> until when the use by processes was read

    def inventory(self) -> GpuInventory:
        self._refused_at = None  # an inventory is read seldom and always asks anew
        if self._absent:
            self.close()  # a GPU that was reset is seen again only by a library that is opened again
        if not self._open():
            return GpuInventory((), self._reason, "", "")
        driver = attempt("", pynvml.nvmlSystemGetDriverVersion)
        cuda = _cuda_version()
        try:
            gpus = self._find()
        except pynvml.NVMLError as error:
            self.close()
            return GpuInventory((), _reason(error), driver, cuda)
        reason = "; ".join(f"GPU {index}: {_reason(error)}" for index, error in self._absent.items())
        return GpuInventory(tuple(gpus), reason if gpus or reason else "the driver knows no GPU", driver, cuda)

    def readings(self) -> tuple[GpuReading, ...]:
        if not self._ready():
            return ()
        assert self._units is not None
        lost = [
            _lost_reading(index, self._uuids.get(index, ""))
            for index, error in self._absent.items()
            if error.value in LOST
        ]
        return tuple(sorted([*lost, *(_reading(unit) for unit in self._units)], key=lambda reading: reading.index))

    def process_memory(self) -> dict[int, int]:
        if not self._ready():
            return {}
        assert self._units is not None
        held: dict[int, int] = {}
        for unit in self._units:
            if not unit.has_instances:
                for pid, used in process_bytes(unit.handle).items():
                    held[pid] = held.get(pid, 0) + (used or 0)
        return held

    def samples(self) -> tuple[GpuSample, ...]:
        if not self._ready():
            return ()
        assert self._units is not None
        lost = [
            GpuSample(index=index, uuid=self._uuids.get(index, ""), is_lost=True)
            for index, error in self._absent.items()
            if error.value in LOST
        ]
        if time.monotonic() - self._steady_at_s >= STEADY_S:
            self._steady_at_s = time.monotonic()
            self._steady = {unit.index: gpu_sample.steady(unit.handle) for unit in self._units}
        found = [
            gpu_sample.sample(unit.index, unit.uuid, unit.handle, self._steady.get(unit.index)) for unit in self._units
        ]
        return tuple(sorted([*lost, *found], key=lambda sample: sample.index))

    def pcie_rates(self) -> dict[int, tuple[float | None, float | None]]:
        if not self._ready():
            return {}
        assert self._units is not None
        whole = [unit for unit in self._units if unit.index < MIG_INDEX_BASE]
        return {unit.index: gpu_sample.pcie_rates(unit.handle) for unit in whole}

    def processes(self) -> tuple[GpuProcess, ...]:
        if not self._ready():
            return ()
        assert self._units is not None
        found: list[GpuProcess] = []
        for unit in self._units:
            if not unit.has_instances:
                seen_us = self._seen_us.get(unit.index, 0)
                here, self._seen_us[unit.index] = gpu_sample.processes(unit.index, unit.handle, seen_us)
                found.extend(here)
        return tuple(found)

    def close(self) -> None:
        if self._is_open:
            attempt(None, pynvml.nvmlShutdown)
        self._is_open = False
        self._units = None

    def _ready(self) -> bool:
        if not self._open():
            return False
        if self._units is None:
            try:
                self._find()
            except pynvml.NVMLError as error:
                self._refuse(error)
        return self._units is not None

    def _open(self) -> bool:
        if self._is_open:
            return True
        if self._refused_at is not None and time.monotonic() - self._refused_at < RETRY_S:
            return False
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self._refuse(error)
            return False
        self._is_open = True
        self._reason = ""
        return True

    def _refuse(self, error: Any) -> None:
        self.close()
        self._reason = _reason(error)
        self._refused_at = time.monotonic()

    def _find(self) -> list[Gpu]:
        """Reads the device table afresh: what answers becomes a unit, what is lost is remembered as lost."""
        units: list[_Unit] = []
        gpus: list[Gpu] = []
        absent: dict[int, Any] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                found, described = _describe(index, handle)
            except pynvml.NVMLError as error:
                absent[index] = error
                continue
            units.extend(found)
            gpus.extend(described)
        self._units, self._absent = tuple(units), absent
        self._uuids.update((unit.index, unit.uuid) for unit in units)
        return _with_peers(gpus, units)


def _describe(index: int, handle: Any) -> tuple[list[_Unit], list[Gpu]]:
    """A GPU and its MIG instances. Raises: NVMLError when the GPU is lost or has no uuid."""
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    major, minor = attempt((0, 0), pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    mig_mode = bool(attempt((0, 0), pynvml.nvmlDeviceGetMigMode, handle)[0])
    limit_mw = attempt(None, pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    gpu = Gpu(
        index=index,
        uuid=uuid,
        name=attempt("", pynvml.nvmlDeviceGetName, handle),
        memory_bytes=memory(handle)[0],
        compute_capability=f"{major}.{minor}" if major else "",
        mig_mode=mig_mode,
        pci_bus_id=_bus_id(handle),
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
    )
    units, gpus = [_Unit(index, uuid, handle, mig_mode)], [gpu]
    if mig_mode:
        for number in range(min(attempt(0, pynvml.nvmlDeviceGetMaxMigDeviceCount, handle), MIG_INDEX_STRIDE)):
            instance = attempt(None, pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
            instance_uuid = "" if instance is None else attempt("", pynvml.nvmlDeviceGetUUID, instance)
            if instance_uuid:
                units.append(_Unit(mig_index(index, number), instance_uuid, instance, False))
                gpus.append(
                    Gpu(
                        index=mig_index(index, number),
                        uuid=instance_uuid,
                        name=attempt("", pynvml.nvmlDeviceGetName, instance),
                        memory_bytes=memory(instance)[0],
                        compute_capability=gpu.compute_capability,
                        mig_parent=uuid,
                        pci_bus_id=gpu.pci_bus_id,
                    )
                )
    return units, gpus


def _with_peers(gpus: list[Gpu], units: list[_Unit]) -> list[Gpu]:
    """The GPUs with their NVLink peers: direct links by PCI address, and all that reach a switch with each other."""
    handles = {unit.index: unit.handle for unit in units}
    by_bus = {gpu.pci_bus_id: gpu.index for gpu in gpus if gpu.pci_bus_id and not gpu.mig_parent}
    links = {index: _nvlinks(handles[index]) for index in by_bus.values()}
    switched = {index for index, (_, has_switch) in links.items() if has_switch}
    described = []
    for gpu in gpus:
        if gpu.index in links:
            direct, has_switch = links[gpu.index]
            peers = {by_bus[bus] for bus in direct if bus in by_bus} | (switched if has_switch else set())
            gpu = msgspec.structs.replace(gpu, nvlink_peers=tuple(sorted(peers - {gpu.index})))
        described.append(gpu)
    return described


def _nvlinks(handle: Any) -> tuple[set[str], bool]:
    """PCI addresses at the far ends of a GPU's active links, and whether one of them ends at a switch."""
    direct: set[str] = set()
    has_switch = False
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            state = attempt(None, pynvml.nvmlDeviceGetNvLinkState, handle, link)
        except pynvml.NVMLError:
            state = None  # lost since it was described; its readings will say so
        if state is None:
            break  # the first link that is not supported ends the list
        if state:
            kind = attempt(pynvml.NVML_NVLINK_DEVICE_TYPE_GPU, pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
            remote = attempt(None, pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                has_switch = True
            elif remote is not None:
                direct.add(str(remote.busId).lower())
    return direct, has_switch


def _reading(unit: _Unit) -> GpuReading:
    handle = unit.handle
    try:
        _total, used, free = memory(handle)
        rates = attempt(None, pynvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = attempt(None, pynvml.nvmlDeviceGetPowerUsage, handle)
        return GpuReading(
            index=unit.index,
            uuid=unit.uuid,
            memory_used_bytes=used,
            memory_free_bytes=free,
            utilisation=None if rates is None else rates.gpu / 100,
            memory_utilisation=None if rates is None else rates.memory / 100,
            temperature_c=temperature(handle),
            power_w=None if power_mw is None else power_mw / 1000,
            ecc_uncorrected=attempt(
                None,
                pynvml.nvmlDeviceGetTotalEccErrors,
                handle,
                pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                pynvml.NVML_VOLATILE_ECC,
            ),
        )
    except pynvml.NVMLError:  # `attempt` lets only the loss of the GPU through
        return _lost_reading(unit.index, unit.uuid)


def _lost_reading(index: int, uuid: str) -> GpuReading:
    return GpuReading(index=index, uuid=uuid, memory_used_bytes=0, memory_free_bytes=0, is_lost=True)


def _bus_id(handle: Any) -> str:
    info = attempt(None, pynvml.nvmlDeviceGetPciInfo, handle)
    return "" if info is None else str(info.busId).lower()


def _cuda_version() -> str:
    number = attempt(0, pynvml.nvmlSystemGetCudaDriverVersion)
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _reason(error: Any) -> str:
    return _REASONS.get(error.value, f"NVML: {error}")
