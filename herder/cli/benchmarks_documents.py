"""What `herder benchmarks run` sends: a recipe's name or a file's document, with the changes of the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from herder.errors import HerderError

ALTERNATIVES = {"server": ("service", "serve", "urls"), "load": ("rate", "concurrency", "steps", "trace")}
"""Of each group a recipe has one: what the command line gives takes the place of the other's."""
WHOLE = frozenset({"sweep", "search", "slo"})
"""Changed as a whole or by one of their own fields, never mixed with what was there."""
MAX_BYTES = 1_048_576
MAX_DEPTH = 20


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
    if (place := _endless(found)) is not None:  # JSON would carry it as nothing, and the head answer of something else
        raise HerderError("invalid_recipe", f"{text}: {place}: numbers are finite")
    return found


def _endless(value: Any, place: str = "", depth: int = 0) -> str | None:
    """Where a number is that is infinite or none."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    if depth < MAX_DEPTH and isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((str(at), one) for at, one in enumerate(value))
        for name, one in items:
            if (found := _endless(one, f"{place}.{name}" if place else str(name), depth + 1)) is not None:
                return found
    return None


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


def changed(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A file's document with the changes in their places, as the head does it with its recipes; null takes away."""
    made = dict(document)
    for part, names in ALTERNATIVES.items():
        there, said = made.get(part), changes.get(part)
        if isinstance(there, Mapping) and isinstance(said, Mapping) and any(said.get(name) for name in names):
            given = {name for name in names if said.get(name)}
            # A change within `serve` keeps the rest of it.
            made[part] = {name: value for name, value in there.items() if name not in names or name in given}
    for name, value in changes.items():
        there = made.get(name)
        if value is None:
            made.pop(name, None)
        elif isinstance(there, Mapping) and isinstance(value, Mapping) and name not in WHOLE:
            made[name] = changed(there, value)
        else:
            made[name] = value
    return made
