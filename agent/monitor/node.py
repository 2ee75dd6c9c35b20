"""One look at the whole node: host and GPUs, with the rates that need the look before.

Also what cannot be asked within a tick: PCIe rates where a card has no counter of its bytes (40 ms a card) and the
processes on the GPUs are read by a thread with a slower beat; a look takes what that thread found last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.monitor.procfs import GROUPS as HOST_GROUPS
from agent.monitor.procfs import HostReader, HostSample
from agent.probe.gpu_sample import GpuProcess, GpuSample
from agent.probe.host import ROOT
from agent.probe.nvml import GpuInventory, Nvml
from common.clock import boottime_ns

GROUPS = ("gpu", *HOST_GROUPS, "processes")
PCIE_EVERY_S = 5.0
PROCESSES_EVERY_S = 1.0
LOST_EVERY_S = 30.0  # between attempts to see a lost GPU again
REOPEN_S = 0.5  # for the library to be let go before it is opened anew
SLOW_END_S = 0.2
_RATES = ("nvlink_tx_bytes", "nvlink_rx_bytes", "pcie_tx_bytes", "pcie_rx_bytes")


class NodeSample(msgspec.Struct):
    """Everything at one moment. `gpus` is None when the driver did not answer in time."""

    wall_ms: int
    boottime_ms: int
    elapsed_s: float
    host: HostSample
    gpus: tuple[GpuSample, ...] | None = ()
    processes: tuple[GpuProcess, ...] = ()
    missed_ticks: int = 0
    loop_s: float = 0.0  # how long the tick before took


class NodeReader:
    """Looks at this node again and again. `read` is for one thread."""

    def __init__(
        self,
        groups: Sequence[str] = GROUPS,
        *,
        has_cores: bool = False,
        root: Path = ROOT,
        nvml: Nvml | None = None,
        pcie_every_s: float = PCIE_EVERY_S,
        processes_every_s: float = PROCESSES_EVERY_S,
    ) -> None:
        """groups: which of GROUPS to look at. nvml: another's, which stays open when this closes."""
        self.groups = tuple(group for group in GROUPS if group in groups)
        self.host = HostReader(self.groups, has_cores=has_cores, root=root)
        self.inventory = GpuInventory((), "not asked for", "", "")
        self.silent = 0  # looks at which the driver did not answer in time
        self._has_gpus = "gpu" in self.groups or "processes" in self.groups
        self._nvml = nvml or Nvml()
        self._owns_nvml = nvml is None
        self._before: dict[int, tuple[float, GpuSample]] = {}
        self._slow = _Slow(
            pcie_every_s if "gpu" in self.groups else None,
            processes_every_s if "processes" in self.groups else None,
            self._nvml,
            root,
        )
        self._start_s = time.monotonic()

    def open(self) -> None:
        """Finds the GPUs, which may take seconds when the driver sleeps, and begins the slow looks."""
        if self._has_gpus:
            self.inventory = self._nvml.inventory()
            if self.inventory.gpus:
                self._slow.start()
        self._start_s = time.monotonic()

    def read(self, *, gpu_timeout_s: float | None = None) -> NodeSample:
        """The node now. Waits no longer than `gpu_timeout_s` for the GPUs."""
        now_s = time.monotonic()
        sample = NodeSample(
            wall_ms=time.time_ns() // 1_000_000,
            boottime_ms=boottime_ns() // 1_000_000,
            elapsed_s=now_s - self._start_s,
            host=self.host.read(now_s),
        )
        if "gpu" in self.groups and (self.inventory.gpus or not self._owns_nvml):  # another may find GPUs later
            sample.gpus = self._nvml.samples(timeout_s=gpu_timeout_s)
            if sample.gpus is None:
                self.silent += 1
            else:
                self._fill_rates(sample.gpus, time.monotonic())
        sample.processes = self._slow.processes
        return sample

    def close(self) -> None:
        """Ends what it started; waits for no driver."""
        self._slow.close()
        self.host.close()
        if self._owns_nvml:
            self._nvml.close()

    def _fill_rates(self, gpus: tuple[GpuSample, ...], now_s: float) -> None:
        """Rates from counters since the look before; the measured PCIe rate where a card counts nothing."""
        measured = self._slow.pcie
        is_measured_wanted = False
        for gpu in gpus:
            then = self._before.get(gpu.index)
            self._before[gpu.index] = (now_s, gpu)
            if then is not None and now_s > then[0]:
                for name in _RATES:
                    after, before = getattr(gpu, name), getattr(then[1], name)
                    if after is not None and before is not None and after >= before:
                        setattr(gpu, f"{name}_per_s", (after - before) / (now_s - then[0]))
            if gpu.pcie_tx_bytes is None and not gpu.is_lost:
                is_measured_wanted = True
                gpu.pcie_tx_bytes_per_s, gpu.pcie_rx_bytes_per_s = measured.get(gpu.index, (None, None))
        self._slow.is_pcie_wanted = is_measured_wanted
        self._slow.is_one_lost = any(gpu.is_lost for gpu in gpus)


class _Slow:
    """The thread of what takes long, with an NVML of its own, so that a tick never stands behind it."""

    def __init__(self, pcie_every_s: float | None, processes_every_s: float | None, main: Nvml, root: Path) -> None:
        self.pcie: dict[int, tuple[float | None, float | None]] = {}
        self.processes: tuple[GpuProcess, ...] = ()
        self.is_pcie_wanted = False  # set by the looks, once they see that a card has no counter
        self.is_one_lost = False  # likewise
        self._every = {"pcie": pcie_every_s, "processes": processes_every_s, "lost": LOST_EVERY_S}
        self._main = main
        self._nvml: Nvml | None = None
        self._root = root
        self._names: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="monitor-slow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(SLOW_END_S)

    def _run(self) -> None:
        due = {name: time.monotonic() for name, every in self._every.items() if every is not None}
        try:
            while not self._stop.wait(max(0.0, min(due.values()) - time.monotonic())):
                for name in [name for name, at_s in due.items() if at_s <= time.monotonic()]:
                    self._look(name)
                    due[name] = time.monotonic() + (self._every[name] or 0.0)
        finally:
            if self._nvml is not None:
                self._nvml.close()

    def _look(self, name: str) -> None:
        if name == "lost":
            if self.is_one_lost:
                self._reopen()
            return
        nvml = self._nvml = self._nvml or Nvml()
        if name == "processes":
            self.processes = tuple(
                msgspec.structs.replace(process, name=self._name(process.pid)) for process in nvml.processes()
            )
            self._forget()
        elif self.is_pcie_wanted:
            self.pcie = nvml.pcie_rates()

    def _reopen(self) -> None:
        """A GPU that was reset is seen again only once everybody in this process has let go of the library."""
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None
            self._stop.wait(REOPEN_S)
        self._main.inventory()

    def _name(self, pid: int) -> str:
        """A process's short name; empty when it is another container's."""
        name = self._names.get(pid)
        if name is None:
            try:
                name = (self._root / f"proc/{pid}/comm").read_text(errors="replace").strip()
            except OSError:
                name = ""
            self._names[pid] = name
        return name

    def _forget(self) -> None:
        """Keeps names of processes that are there: numbers are given out again."""
        here = {process.pid for process in self.processes}
        self._names = {pid: name for pid, name in self._names.items() if pid in here}
