"""What `herder benchmarks run` sends: a recipe's name or a file's document, with the changes of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from common.bench.documents import endless
from herder.errors import HerderError

MAX_BYTES = 1_048_576


def is_file(text: str) -> bool:
    """Whether an argument names a file and not a recipe of the head."""
    return text == "-" or "/" in text or text.endswith((".yaml", ".yml", ".json"))


def read(text: str) -> dict[str, Any]:
    """The document of a file (YAML or JSON; - is standard input). Raises: click.UsageError, HerderError."""
    import sys

    import yaml

    try:
        content = sys.stdin.buffer.read(MAX_BYTES + 1) if text == "-" else Path(text).read_bytes()
    except OSError as error:
        raise click.UsageError(f"{text}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise HerderError("invalid_recipe", f"{text} is larger than a recipe may be")
    try:
        found = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise HerderError("invalid_recipe", f"{text}: not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise HerderError("invalid_recipe", f"{text}: a recipe is a mapping with name, server and load")
    if (place := endless(found)) is not None:  # JSON would carry it as nothing, and the head answer of something else
        raise HerderError("invalid_recipe", f"{text}: {place}: numbers are finite")
    return found


def overrides(
    pairs: Sequence[tuple[str, Any]], *, model: str, service: str, nodes: str, has_serve: bool
) -> dict[str, Any]:
    """The changes as a document. pairs: ("load.rate", 5) each. Raises: click.UsageError."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        place = made
        *path, last = name.split(".")
        for step in path:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"--set {name}: {step} has a value already")
        place[last] = value
    if service:
        made.setdefault("server", {})["service"] = service
    if model:
        if has_serve and not service:
            made.setdefault("server", {}).setdefault("serve", {})["model"] = model
        else:
            made.setdefault("load", {})["model"] = model
    if nodes:
        made.setdefault("load", {})["nodes"] = int(nodes) if nodes.isdigit() else nodes.split(",")
    return made
