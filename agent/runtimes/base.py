"""What an adapter of an engine does: says whether the engine is here, and how it is started on a model.

An adapter is pure but for looking at the machine; processes are `agent/replicas.py`'s, asking the engine whether it
is well is `health.py`'s. To add an engine: one module here, one line in `REGISTRY` of `registry.py`, one recipe.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from common import wire
from common.errors import InvalidValue
from common.manifest import Manifest

_PLACEHOLDER = re.compile(r"\{(model_path|model_dir|port|host|api_key_file|gpu_uuids|state_dir|cpus)\}")
_PASSED = frozenset({"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"})
_PASSED_FAMILIES = (
    "LC_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "UCX_",
    "OMP_",
    "MKL_",
    "GGML_",
    "SLURM_",
    "ROCR_",
    "HIP_",
    "HSA_",
)
_SECRET = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|KEY|AUTH", re.IGNORECASE)


class Setting(msgspec.Struct, frozen=True):
    """Where and on what one engine is started. Paths are absolute; empty where there is none."""

    order: wire.EnsureReplica
    host: str
    port: int
    run_dir: str  # private to this run; `state_dir` of the placeholders
    directory: str = ""  # of the model
    manifest: Manifest | None = None
    api_key_file: str = ""


class Launch(msgspec.Struct, frozen=True):
    """What is executed; `env` is laid over the scrubbed environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}


class Runtime(Protocol):
    """An engine's adapter."""

    name: str

    def find(self) -> str:
        """Version or path of the engine here. Blocks. Raises: EngineMissing."""
        ...

    def launch(self, setting: Setting) -> Launch:
        """How it is started. Blocks. Raises: HerderError, for what no retry can mend."""
        ...

    def steps_path(self) -> tuple[str, str]:
        """Path of the engine's metrics and the name of a counter that grows while it works; empty: it has none."""
        ...


def fill(text: str, setting: Setting, *, model_path: str = "") -> str:
    """The text with its placeholders filled in, in one pass: what is filled in is not looked at again.

    Raises: InvalidValue for a placeholder that has no value here.
    """
    order = setting.order
    values = {
        "model_path": model_path or setting.directory,
        "model_dir": setting.directory,
        "port": str(setting.port),
        "host": setting.host,
        "api_key_file": setting.api_key_file,
        "gpu_uuids": ",".join(order.gpu_uuids),
        "state_dir": setting.run_dir,
        "cpus": str(len(os.sched_getaffinity(0))),
    }

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not values[name] and name != "gpu_uuids":
            raise InvalidValue(
                f"{{{name}}} has no value for {order.replica}", hint="the recipe asks for what is not set"
            )
        return values[name]

    return _PLACEHOLDER.sub(value, text)


def gpu_env(order: wire.EnsureReplica) -> dict[str, str]:
    """Which GPUs the engine sees: exactly those it was given, by uuid, so that an index never means another card."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(order.gpu_uuids)}


def scrubbed(environ: Mapping[str, str], *, bin_dir: str = "", pass_env: Collection[str] = ()) -> dict[str, str]:
    """What of our environment engines get: where things are, language, and what drivers and libraries read.

    Everything else stays behind, so that no token, proxy or Python path of the agent's reaches an engine. Within the
    families a name that looks like a secret is left out. `pass_env`: names that the operator lets through.
    """
    ours = os.path.realpath(bin_dir or Path(sys.executable).parent)
    kept = {name: value for name, value in environ.items() if _is_passed(name) or name in pass_env}
    folders = [folder for folder in kept.get("PATH", os.defpath).split(":") if folder]
    if sys.prefix != sys.base_prefix or bin_dir:  # a virtual environment's; the system's own bin stays
        folders = [folder for folder in folders if os.path.realpath(folder) != ours]
    kept["PATH"] = ":".join(folders)
    return kept


def _is_passed(name: str) -> bool:
    return name in _PASSED or (name.startswith(_PASSED_FAMILIES) and _SECRET.search(name) is None)


def gguf_file(setting: Setting) -> str:
    """The GGUF file to load: the first shard of a split model, else the largest file that is not a projector.

    Raises: InvalidValue when the model has none.
    """
    root = Path(setting.directory)
    if setting.manifest is not None:
        sizes = {file.path: file.size for file in setting.manifest.files}
    else:
        sizes = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    found = {path: size for path, size in sizes.items() if path.lower().endswith(".gguf")}
    weights = {path: size for path, size in found.items() if "mmproj" not in path.lower()} or found
    if not weights:
        raise InvalidValue(f"{setting.order.model} has no .gguf file", hint="llama.cpp serves GGUF models")
    first_shards = sorted(path for path in weights if re.search(r"-0*1-of-\d+\.gguf$", path, re.IGNORECASE))
    chosen = first_shards[0] if first_shards else max(sorted(weights), key=lambda path: weights[path])
    return str(root / chosen)
