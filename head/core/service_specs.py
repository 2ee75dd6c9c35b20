"""What a service runs: which recipe takes its model, what its configuration may say, and the command for an engine.

Pure functions over recipes and objects. The words of an engine's command line are made here from the recipe and the
configuration; what only the node knows ({model_path}, {port}, ...) is left for the agent to fill in.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
from blake3 import blake3

from common import limits, wire
from common.errors import InvalidRecipe, InvalidValue, RecipeNotFound, Unavailable
from common.recipe import Recipe
from head.core.objects import Model, Node, Replica, Service
from head.core.state import State

ALWAYS_ALLOWED = frozenset({"args", "env", "name", "recipe"})
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_WORD = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_FORMAT_BY_SUFFIX = {".gguf": "gguf", ".safetensors": "safetensors"}


def model_format(state: State, model: Model, revision: str) -> str:
    """The model's file format: by its verified manifest, else as its metadata or its sources' file names say.

    "" when nobody can tell before the files are here.
    """
    manifest = state.manifests.get(f"{model.name}@{revision}")
    if manifest is not None:
        return manifest.manifest.format
    said = model.metadata.get("format")
    if isinstance(said, str) and said:
        return said
    for source in model.sources:
        path = source.split("?", 1)[0].split("#", 1)[0]
        for suffix, name in _FORMAT_BY_SUFFIX.items():
            if path.lower().endswith(suffix):
                return name
    return ""


def recipe_named(state: State, name: str) -> Recipe:
    """The recipe of that name. Raises: RecipeNotFound."""
    recipe = state.recipes.get(name)
    if recipe is None:
        known = ", ".join(sorted(state.recipes)[:20])
        raise RecipeNotFound(f"there is no recipe {name[:80]!r}", hint=f"known recipes: {known or 'none'}", recipe=name)
    return recipe


def recipe_for(state: State, model: Model, file_format: str) -> Recipe:
    """The inference recipe that takes models of this format: the first by name of those that list it.

    Raises: RecipeNotFound when none does.
    """
    fitting = sorted(
        name
        for name, recipe in state.recipes.items()
        if recipe.category == "inference" and recipe.needs_model and file_format in recipe.model_formats
    )
    if not fitting:
        raise RecipeNotFound(
            f"no recipe serves {model.name}: its files are of the format {file_format!r}",
            hint="name one with `recipe`, or add one that lists this format under model_formats",
            model=model.name,
            format=file_format,
        )
    return state.recipes[fitting[0]]


def check_fits(recipe: Recipe, model: Model, file_format: str) -> None:
    """Raises: InvalidRecipe when the recipe is known not to take this model."""
    if recipe.needs_model and recipe.model_formats and file_format and file_format not in recipe.model_formats:
        raise InvalidRecipe(
            f"recipe {recipe.name} takes {', '.join(recipe.model_formats)}; {model.name} is {file_format}",
            hint="choose another recipe, or none to have one chosen",
            recipe=recipe.name,
            format=file_format,
        )


def check_general_config(config: dict[str, Any]) -> None:
    """What every recipe's configuration must keep to. Raises: InvalidValue."""
    try:
        size = len(msgspec.json.encode(config))
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"config cannot be written as JSON: {str(error)[:120]}") from None
    if size > limits.METADATA_BYTES:
        raise InvalidValue(f"config has {size} bytes; at most {limits.METADATA_BYTES}", limit=limits.METADATA_BYTES)
    args = config.get("args", [])
    if not isinstance(args, list | tuple) or not all(isinstance(arg, str) and "\0" not in arg for arg in args):
        raise InvalidValue("config.args must be a list of strings", hint='as in args: ["--threads", "8"]')
    env = config.get("env", {})
    if not isinstance(env, dict) or not all(
        isinstance(key, str) and _ENV_NAME.fullmatch(key) and isinstance(value, str) and "\0" not in value
        for key, value in env.items()
    ):
        raise InvalidValue("config.env must map variable names to strings", hint="as in env: {OMP_NUM_THREADS: '8'}")
    for key in ("name", "recipe"):
        if not isinstance(config.get(key, ""), str):
            raise InvalidValue(f"config.{key} must be a string")


def check_config(recipe: Recipe, config: dict[str, Any]) -> None:
    """A service's configuration against its recipe: only listed keys, of the listed default's type.

    Raises: InvalidValue.
    """
    check_general_config(config)
    for key, value in config.items():
        if key in ALWAYS_ALLOWED:
            continue
        if key not in recipe.config:
            listed = ", ".join(sorted({*recipe.config, "args", "env"}))
            raise InvalidValue(
                f"recipe {recipe.name} has no setting {key[:80]!r}",
                hint=f"it has: {listed}",
                recipe=recipe.name,
                key=key,
            )
        if not _is_like(value, recipe.config[key]):
            wanted = type(recipe.config[key]).__name__
            raise InvalidValue(
                f"config.{key} must be of type {wanted}, as its default {recipe.config[key]!r}",
                recipe=recipe.name,
                key=key,
            )
        if key in ("memory_bytes", "gpu_memory_bytes") and value < 0:
            raise InvalidValue(f"config.{key} must not be negative", recipe=recipe.name, key=key)


def _is_like(value: Any, default: Any) -> bool:
    if default is None or value is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(default))


def spec_hash(model: str, revision: str, recipe: str, config: dict[str, Any], port: int) -> str:
    """16 hex digits over what makes an engine differ; replicas with another hash are replaced one by one."""
    document = msgspec.json.encode([model, revision, recipe, config, port], order="sorted")
    return hashlib.sha256(document).hexdigest()[:16]


def engine_key(state: State, service: str, generation: int) -> str:
    """An engine's own key for a service that a job makes: drawn from this head process's secret.

    Raises: Unavailable before the head has its secret; an engine without a key would be an open door.
    """
    if len(state.ticket_secret) != 32:
        raise Unavailable("the head has not started yet")
    name = f"engine:{state.cluster_id}:{service}:{generation}"
    return blake3(name.encode(), key=state.ticket_secret).hexdigest()[:48]


def merged_config(recipe: Recipe, service: Service) -> dict[str, Any]:
    """The recipe's defaults under the service's own settings, without what is not the engine's business."""
    config = {**recipe.config, **service.config}
    return {key: value for key, value in config.items() if key not in ALWAYS_ALLOWED}


def declared_bytes(recipe: Recipe, service: Service) -> tuple[int, int]:
    """Host and GPU memory that the configuration or the recipe declares; 0: not declared."""
    config = merged_config(recipe, service)
    declared = []
    for key, default in (
        ("memory_bytes", recipe.resources.memory_bytes),
        ("gpu_memory_bytes", recipe.resources.gpu_memory_bytes),
    ):
        value = config.get(key)
        declared.append(value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default)
    return declared[0], declared[1]


def engine_words(recipe: Recipe, service: Service) -> tuple[str, ...]:
    """The words of an engine's command line that the recipe and the configuration give."""
    config = merged_config(recipe, service)
    words = [filled for word in (*recipe.command, *recipe.args) for filled in _filled(word, config)]
    return (*words, *service.config.get("args", ()))


def ensure_body(service: Service, recipe: Recipe, replica: Replica, node: Node) -> wire.EnsureReplica:
    """The command body that starts this replica."""
    config = merged_config(recipe, service)
    health = recipe.health.to_wire()
    path = config.get("health_path")
    if isinstance(path, str) and "health_path" in recipe.config:
        health = msgspec.structs.replace(health, path=path)
    uuids = {gpu.index: gpu.uuid for gpu in node.inventory.gpus}
    storage = ",".join(f"gpu{index}" for index in replica.gpus) or replica.device.partition(":")[2]
    stop_after_ms = limits.REPLACE_STOP_AFTER_MS if service.on_unreachable == "replace" else 0
    return wire.EnsureReplica(
        replica=replica.id,
        service=service.name,
        model=service.model if recipe.needs_model else "",
        revision=service.revision if recipe.needs_model else "",
        storage=storage,
        runtime=recipe.runtime,
        argv=engine_words(recipe, service),
        env={**recipe.env, **service.config.get("env", {})},
        port=service.port or recipe.port,
        gpu_uuids=tuple(uuids[index] for index in replica.gpus if index in uuids),
        health=health,
        served_name=service.model or service.name,
        api_key=replica.api_key,
        max_restarts=recipe.max_restarts,
        stop_grace_s=recipe.stop_grace_s,
        stop_after_ms=stop_after_ms,
        config=config,
    )


def _filled(word: str, config: dict[str, Any]) -> list[str]:
    """`{key}` of the configuration put into a word of the recipe; other placeholders are the agent's to fill.

    A word that is nothing but the key of a list becomes the words of that list.
    """
    whole = config.get(word[1:-1]) if _WORD.fullmatch(word) else None
    if isinstance(whole, list | tuple):
        return [str(item) for item in whole]

    def one(match: re.Match[str]) -> str:
        value = config.get(match[1])
        return match[0] if value is None or isinstance(value, list | tuple | dict) else str(value)

    return [_WORD.sub(one, word)]
