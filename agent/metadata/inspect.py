"""One look at a model's directory: its format and the facts that placement and people want.

`inspect` never raises for what stands in a file: a file that cannot be read as what its name says is reported under
"problems", and the rest is still read. Every reader is bounded (bytes, entries, depth), because these files come
from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.metadata import config_json, gguf, safetensors
from agent.metadata.limits import BadFile
from common import limits

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PROBLEMS = 8


def inspect(directory: Path) -> tuple[str, dict[str, Any]]:
    """(format, detected) of a model's files.

    format: safetensors | gguf | pickle | other. detected may hold architecture, parameters, parameters_by_dtype,
    layers, heads, kv_heads, hidden, context, vocab, dtype, quantisation, chat_template (the text up to 16 KiB, else
    True), format, problems.
    """
    paths = sorted(Path(base) / name for base, _, names in os.walk(directory) for name in names)
    paths = [path for path in paths if not path.name.startswith(".")][: limits.MANIFEST_FILES]
    format_name = _format(paths)
    problems: list[str] = []
    detected: dict[str, Any] = {}
    if format_name == "gguf":
        detected = _try(lambda: gguf.describe([path for path in paths if path.suffix == ".gguf"]), problems)
    else:
        tensors = [path for path in paths if path.suffix == ".safetensors"]
        if tensors:
            detected = _try(lambda: safetensors.describe(tensors), problems)
        detected = {**detected, **_try(lambda: config_json.describe(directory), problems)}
    detected["format"] = format_name
    if problems:
        detected["problems"] = problems[:PROBLEMS]
    return format_name, detected


def _format(paths: list[Path]) -> str:
    suffixes = {path.suffix.lower() for path in paths}
    if ".safetensors" in suffixes:
        return "safetensors"
    if ".gguf" in suffixes:
        return "gguf"
    return "pickle" if suffixes & set(_PICKLE) else "other"


def _try(read: Callable[[], dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    try:
        return read()
    except BadFile as error:
        problems.append(str(error)[:200])
    except OSError as error:
        problems.append(f"{Path(str(error.filename)).name}: {error.strerror}")
    return {}
