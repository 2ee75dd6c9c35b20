"""GPUs through NVML. Signatures first; the body follows."""

from __future__ import annotations

from typing import NamedTuple

from common.wire import Gpu, GpuReading


class GpuInventory(NamedTuple):
    """The GPUs of this machine, or in words why there are none."""

    gpus: tuple[Gpu, ...]
    reason: str
    driver_version: str
    cuda_version: str


class Nvml:
    """NVML behind one thread: every call answers within `timeout_s`, also while the driver hangs."""

    def __init__(self, *, timeout_s: float = 5.0) -> None: ...

    def inventory(self) -> GpuInventory:
        """The GPUs and MIG instances."""
        raise NotImplementedError

    def readings(self) -> tuple[GpuReading, ...]:
        """Live readings; empty when there is no GPU or NVML does not answer."""
        raise NotImplementedError

    def process_memory(self) -> dict[int, int]:
        """Bytes of GPU memory by process id, over all GPUs."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the library; never waits for a hung call."""


def process_gpu_memory(nvml: Nvml, pids: set[int]) -> int:
    """Bytes of GPU memory that these processes hold together."""
    raise NotImplementedError
