"""Builds the NVML double (`fakenvml.c`) and gives the environment in which the real bindings load it.

The bindings keep the library that they loaded first, so each scenario wants a process of its own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fakenvml.c")


def build(folder: Path, *, is_old: bool = False, gpus: int = 2, has_processes: bool = False) -> Path:
    """Compiles the double into `folder` and returns it; `is_old` leaves out what old drivers lack.

    gpus, has_processes: what there is where no file of facts says otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f"-DGPU_COUNT={gpus}"]
    flags += ["-DOLD_DRIVER"] if is_old else []
    flags += ["-DGPU_PROCESSES"] if has_processes else []
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", *flags, "-o", library, SOURCE], check=True)
    return folder


def environment(folder: Path, state: Path) -> dict[str, str]:
    """Variables under which a process finds the double and the machine that `state` describes."""
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML_STATE": str(state)}
