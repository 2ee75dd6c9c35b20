"""llama.cpp's `llama-server`: GGUF models on CPU or GPU.

Settings of a service (`config`): context, parallel, threads, gpu_layers, embeddings, prompt_cache_mib; 0 threads means
the server's own choice, gpu_layers below 0 means all layers when GPUs are given. Flags checked against build 10434.

The server would keep up to 8 GiB of earlier prompts in host memory by itself, which nobody has reserved: it gets what
prompt_cache_mib says. That goes by its environment, which older servers ignore and a flag under `args` overrides.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from agent.runtimes.base import Launch, Setting, fill, gguf_file, gpu_env, scrubbed
from common.errors import EngineMissing, InvalidValue

VERSION_TIMEOUT_S = 20.0
ALL_LAYERS = 999  # more than any model has; older servers do not know the word "all"
_VERSION = re.compile(r"^version: (.{1,80})$", re.MULTILINE)


class LlamaCpp:
    """The adapter. `binary`: as configured; empty: `llama-server` on PATH or beside our own programs."""

    name = "llamacpp"

    def __init__(self, binary: str = "") -> None:
        self._binary = binary
        self._version: tuple[str, int, str] | None = None  # path, its mtime_ns, what it said

    def path(self) -> str:
        """The server's path. Raises: EngineMissing."""
        found = shutil.which(self._binary or "llama-server")
        if found is None and not self._binary:
            found = shutil.which("llama-server", path=str(Path(sys.executable).parent))
        if found is None:
            raise EngineMissing(
                f"{self._binary or 'llama-server'} was not found on this node",
                hint="install llama.cpp, or set engines.llamacpp to the path of its llama-server",
            )
        return os.path.abspath(found)

    def find(self) -> str:
        """What `llama-server --version` says. Raises: EngineMissing."""
        path = self.path()
        changed_ns = os.stat(path).st_mtime_ns
        if self._version is None or self._version[:2] != (path, changed_ns):
            self._version = (path, changed_ns, self._ask_version(path))
        return self._version[2]

    def _ask_version(self, path: str) -> str:
        try:
            answer = subprocess.run(
                [path, "--version"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=VERSION_TIMEOUT_S,
                env=scrubbed(os.environ),
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineMissing(f"{path} does not run: {error}"[:300]) from None
        match = _VERSION.search(answer.stdout + answer.stderr)
        if answer.returncode != 0 or match is None:
            said = (answer.stderr or answer.stdout).strip()[-200:]
            raise EngineMissing(f"{path} --version ended with {answer.returncode}: {said}")
        return match[1]

    def launch(self, setting: Setting) -> Launch:
        """See Runtime.launch."""
        order = setting.order
        model_path = gguf_file(setting)
        argv = [self.path(), "--model", model_path, "--host", setting.host, "--port", str(setting.port)]
        argv += ["--alias", order.served_name or order.model, "--metrics", "--no-webui", "--offline"]
        if setting.api_key_file:
            argv += ["--api-key-file", setting.api_key_file]
        argv += _flags(order.config, has_gpus=bool(order.gpu_uuids))
        argv += [fill(word, setting, model_path=model_path) for word in order.argv]
        cache = {"LLAMA_ARG_CACHE_RAM": str(_whole(order.config, "prompt_cache_mib"))}
        return Launch(tuple(argv), {**gpu_env(order), **cache, **order.env})

    def steps_path(self) -> tuple[str, str]:
        """See Runtime.steps_path."""
        return "/metrics", "llamacpp:n_decode_total"


def _flags(config: dict[str, object], *, has_gpus: bool) -> list[str]:
    flags: list[str] = []
    for name, flag in (("context", "--ctx-size"), ("parallel", "--parallel"), ("threads", "--threads")):
        value = _whole(config, name)
        if value > 0:
            flags += [flag, str(value)]
    if config.get("embeddings") is True:
        flags.append("--embeddings")
    layers = _whole(config, "gpu_layers", default=-1)
    if not has_gpus or layers == 0:
        return [*flags, "--device", "none"]
    return [*flags, "--n-gpu-layers", str(layers if layers > 0 else ALL_LAYERS)]


def _whole(config: dict[str, object], name: str, default: int = 0) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 1 << 30:
        raise InvalidValue(f"config.{name} is {value!r}", hint="a whole number")
    return value
