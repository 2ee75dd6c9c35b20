"""Builds the NVML double (`fakenvml.c`) and gives the environment in which the real bindings load it.

The bindings keep the library that they loaded first, so each scenario wants a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("fakenvml.c")
PRELUDE = """
import json, os, sys, time
from pathlib import Path
import msgspec
from agent.probe.nvml import Nvml, process_gpu_memory
machine = Path(os.environ["FAKE_NVML_STATE"])
def show(**values):
    print(json.dumps(msgspec.to_builtins(values)))
def swap(text):
    new = machine.with_suffix(".new")
    new.write_text(text)
    new.rename(machine)
"""


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


def probe(library: Path | None, machine: Path, facts: str, script: str) -> dict[str, Any]:
    """Runs the script in a new process on a machine with these facts, and returns what it showed.

    library: as `build` returned it; None is a machine without a driver. machine: the file that the facts are kept in;
    `swap` of the script changes them. The script has `Nvml`, and `show` to answer with.
    """
    machine.write_text(textwrap.dedent(facts))
    environ = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    environ["FAKE_NVML_STATE"] = str(machine)
    if library is not None:
        environ.update(environment(library, machine))
    command = [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(script)]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer
