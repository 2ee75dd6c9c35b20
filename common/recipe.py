"""Recipes: YAML files that say how an engine is run. Strict: an unknown key is an error with its place.

A recipe names a runtime (an adapter in agent/runtimes), what models it takes, how it is asked whether it is
ready, what it needs, and the defaults of its configuration. A service's `config` overrides those defaults; a key
that the recipe does not list is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from common.errors import InvalidRecipe
from common.wire import HealthSpec

RUNTIMES = ("llamacpp", "command")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one replica needs. Memory 0: estimated from the model's size."""

    gpus: int = 0
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """See wire.HealthSpec; seconds."""

    path: str = "/health"
    timeout_s: float = 5.0
    period_s: float = 5.0
    ready_timeout_s: float = 900.0
    failures: int = 3
    canary_path: str = ""
    canary: dict[str, Any] = {}

    def to_wire(self) -> HealthSpec:
        """The same as it travels."""
        return HealthSpec(**{field: getattr(self, field) for field in self.__struct_fields__})


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One recipe."""

    name: str
    category: str
    runtime: str
    description: str = ""
    model_formats: tuple[str, ...] = ()  # gguf, safetensors, ...; empty: any
    needs_model: bool = True
    command: tuple[str, ...] = ()  # runtime "command" only; placeholders as in wire.EnsureReplica
    args: tuple[str, ...] = ()  # appended to what the adapter builds
    env: dict[str, str] = {}
    port: int = 0
    resources: Resources = Resources()
    health: Health = Health()
    config: dict[str, Any] = {}  # defaults of what a service may set
    max_restarts: int = 10
    stop_grace_s: float = 10.0


def parse_recipe(text: str, *, where: str = "recipe") -> Recipe:
    """A recipe from YAML. Raises: InvalidRecipe with the place of the mistake."""
    try:
        document = yaml.safe_load(text)
        recipe = msgspec.convert(document, Recipe)
    except yaml.YAMLError as error:
        raise InvalidRecipe(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None
    except msgspec.ValidationError as error:
        raise InvalidRecipe(f"{where}: {error}") from None
    if not _NAME.fullmatch(recipe.name):
        raise InvalidRecipe(f"{where}: name {recipe.name!r}", hint="lower-case letters, digits and '-'")
    if recipe.runtime not in RUNTIMES:
        raise InvalidRecipe(f"{where}: runtime {recipe.runtime!r}", hint=f"one of {', '.join(RUNTIMES)}")
    if (recipe.runtime == "command") != bool(recipe.command):
        raise InvalidRecipe(f"{where}: `command` belongs to runtime 'command', and only there")
    return recipe


def load_recipes(root: Path) -> dict[str, tuple[Recipe, str]]:
    """All recipes below a folder by name, each with its path relative to it.

    Raises: InvalidRecipe, also for two of one name.
    """
    found: dict[str, tuple[Recipe, str]] = {}
    for path in sorted(root.rglob("*.y*ml")):
        relative = str(path.relative_to(root))
        if relative.startswith(("benchmark/", "suite/")):
            continue  # another kind of document: common/bench/recipe.py
        recipe = parse_recipe(path.read_text(), where=relative)
        if recipe.name in found:
            raise InvalidRecipe(f"{relative}: {recipe.name!r} is also in {found[recipe.name][1]}")
        found[recipe.name] = (recipe, relative)
    return found
