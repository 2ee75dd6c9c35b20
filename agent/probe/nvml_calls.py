"""Single NVML calls as the rest of the probe wants them: None or empty where a card, driver or MIG instance lacks one.

Only the loss of the GPU passes through as an error. Everything here runs on the thread that owns the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml

LOST = {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED}


def attempt(default: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's answer, or the default where it is not supported or known. Raises: NVMLError for a lost GPU."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in LOST:
            raise
        return default


def memory(handle: Any) -> tuple[int, int, int]:
    """Total, used, free. Version 2 tells what the driver keeps for itself from what is used; old drivers lack it."""
    info = attempt(None, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if info is None:
        info = attempt(None, pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (0, 0, 0) if info is None else (info.total, info.used, info.free)


def temperature(handle: Any) -> float | None:
    """Degrees Celsius of the GPU itself."""
    value = attempt(None, pynvml.nvmlDeviceGetTemperatureV, handle, pynvml.NVML_TEMPERATURE_GPU)
    if value is None:
        value = attempt(None, pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    return None if value is None else float(value)


def process_bytes(handle: Any) -> dict[int, int | None]:
    """GPU memory by process on one unit; None where the driver does not say (WDDM, some containers).

    A process that computes and draws stands in both lists with the same total.
    """
    held: dict[int, int | None] = {}
    for newest, older in (
        (pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2),
        (pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, pynvml.nvmlDeviceGetGraphicsRunningProcesses_v2),
    ):
        try:
            processes = attempt(None, newest, handle)
            if processes is None:
                processes = attempt((), older, handle)
        except pynvml.NVMLError:
            return {}  # lost: nothing is held there any more
        for process in processes:
            used, before = process.usedGpuMemory, held.get(process.pid)
            held[process.pid] = before if used is None else max(before or 0, used)
    return held
