"""What one replica will take of memory, as the planner estimates it from what the agents read of the model's files.

Pure, and the same answer each time; answers are kept for each manifest and setting, since a placement must cost
microseconds. Nothing is estimated where the dimensions are not known or the engine is not one of the planner's:
placement then falls back to the model's size.
"""

from __future__ import annotations

import re
from typing import Any

from common.errors import HerderError
from common.manifest import Manifest
from common.recipe import Recipe
from head.core import copy_facts, service_specs
from head.core.objects import Model, ModelManifest, Service
from head.core.state import State
from head.planner.model.architecture import Architecture
from head.planner.model.headers import architecture_of_registered
from head.planner.serving.need import (
    LlamaCppSettings,
    MemoryNeed,
    SharedSettings,
    llama_cpp_need,
    llama_cpp_settings,
    shared_need,
    shared_settings,
)

MODELS_KEPT = 1_024
SETTINGS_KEPT = 64  # of each model
# What hostile or odd metadata may end in; the model is then placed by its size.
_NOT_ESTIMATED = (HerderError, ArithmeticError, TypeError, ValueError, LookupError)
_FIRST_SHARD = re.compile(r"-0*1-of-\d+\.gguf$", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+\.gguf$", re.IGNORECASE)
_PARTS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "buffers": "buffers",
    "process": "process",
    "prompt_cache": "prompt cache",
}


class _Known:
    """One model: its dimensions (None: not known) and the needs that were asked for."""

    def __init__(self, source: Model | ModelManifest, architecture: Architecture | None) -> None:
        self.source = source
        self.architecture = architecture
        self.needs: dict[tuple[Any, ...], MemoryNeed | None] = {}


_known: dict[str, _Known] = {}


def needs_of(state: State, service: Service, recipe: Recipe | None) -> tuple[MemoryNeed | None, MemoryNeed | None]:
    """The need of a replica of the service without a GPU, and with the recipe's GPUs (at least one); None: no estimate.

    recipe None: not chosen yet.
    """
    if recipe is None or not recipe.needs_model:
        return None, None
    known = _known_of(state, service.model, service.revision)
    if known is None or known.architecture is None:
        return None, None
    gpus = max(1, recipe.resources.gpus)
    words = service_specs.engine_words(recipe, service)
    if recipe.runtime == "llamacpp":
        settings = llama_cpp_settings(service_specs.merged_config(recipe, service), words)
        return _llama_cpp(state, service, known, settings, words, gpus)
    if words and words[0].rpartition("/")[2] == "llama-server":
        return _llama_cpp(state, service, known, llama_cpp_settings({}, words), words, gpus)
    shared = shared_settings(words, gpus)
    if shared is None:
        return None, None
    return None, _kept(known, _stored_bytes(state, service, ".safetensors"), shared, gpus)


def shown(need: MemoryNeed, where: str) -> str:
    """The parts in words: where is "host" or "gpu"."""
    parts = need.gpu if where == "gpu" else need.host
    listed = ", ".join(f"{_PARTS.get(name, name)} {_size(count)}" for name, count in parts.items() if count)
    return f"the planner's estimate: {listed}; {need.rule}"


def numbers(need: MemoryNeed, where: str) -> dict[str, Any]:
    """The parts as details of an answer, bytes."""
    parts = need.gpu if where == "gpu" else need.host
    return {"estimated_by": "planner", "rule": need.rule, **{f"{name}_bytes": count for name, count in parts.items()}}


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"


def _llama_cpp(
    state: State, service: Service, known: _Known, settings: LlamaCppSettings, words: tuple[str, ...], gpus: int
) -> tuple[MemoryNeed | None, MemoryNeed | None]:
    stored = _stored_bytes(state, service, ".gguf", words)
    return _kept(known, stored, settings, 0), _kept(known, stored, settings, gpus)


def _kept(known: _Known, stored: int, settings: LlamaCppSettings | SharedSettings, gpus: int) -> MemoryNeed | None:
    """The need by settings, computed once."""
    key = (stored, settings, gpus)
    if key not in known.needs:
        if len(known.needs) >= SETTINGS_KEPT:
            known.needs.clear()
        known.needs[key] = _computed(known.architecture, stored, settings, gpus)
    return known.needs[key]


def _computed(
    architecture: Architecture | None, stored: int, settings: LlamaCppSettings | SharedSettings, gpus: int
) -> MemoryNeed | None:
    if architecture is None or not stored:
        return None
    try:
        if isinstance(settings, SharedSettings):
            return shared_need(architecture, stored, settings)
        return llama_cpp_need(architecture, stored, settings, gpus)
    except _NOT_ESTIMATED:
        return None


def _known_of(state: State, model: str, revision: str) -> _Known | None:
    """What is known of the model: by its manifest, else by the metadata it was registered with."""
    name = f"{model}@{revision}"
    source: ModelManifest | Model | None = state.manifests.get(name) or state.models.get(model)
    if source is None:
        return None
    known = _known.get(name)
    if known is None or known.source is not source:
        if len(_known) >= MODELS_KEPT:
            _known.pop(next(iter(_known)))
        metadata = source.manifest.detected if isinstance(source, ModelManifest) else source.metadata
        known = _known[name] = _Known(source, _architecture(metadata, model))
    return known


def _architecture(metadata: dict[str, Any], name: str) -> Architecture | None:
    try:
        return architecture_of_registered(metadata, name)
    except _NOT_ESTIMATED:
        return None


def _stored_bytes(state: State, service: Service, suffix: str, words: tuple[str, ...] = ()) -> int:
    """Bytes of the files that the engine loads: those of the suffix, of several GGUF files the one that the agent
    chooses (all shards of it), and what the command names besides; the model's size when its files are not known."""
    manifest = copy_facts.manifest_of(state, service.model, service.revision)
    if manifest is None:
        return copy_facts.expected_bytes(state, service.model, service.revision)
    chosen = _loaded(manifest, suffix)
    if not chosen:
        return manifest.size_bytes
    named = {file.path for file in manifest.files if any(word.endswith(f"/{file.path}") for word in words)}
    return sum(file.size for file in manifest.files if file.path in chosen or file.path in named)


def _loaded(manifest: Manifest, suffix: str) -> set[str]:
    sizes = {file.path: file.size for file in manifest.files if file.path.lower().endswith(suffix)}
    if suffix != ".gguf":
        return set(sizes)
    weights = {path: size for path, size in sizes.items() if "mmproj" not in path.lower()} or sizes
    first = next((path for path in sorted(weights) if _FIRST_SHARD.search(path)), "")
    if first:
        stem = _SHARD.sub("", first)
        return {path for path in weights if _SHARD.search(path) and _SHARD.sub("", path) == stem}
    return {max(sorted(weights), key=lambda path: weights[path])} if weights else set()
