"""Models by name: dimensions that ship with Herder, found by full id, short name or alias.

The table (data/models.json) holds configurations reduced to their dimensions, as their publishers gave them, and a few
estimates, which say so. It is read once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from common.errors import InvalidValue, ModelNotFound
from head.planner.model.architecture import Architecture
from head.planner.model.hf_config import architecture_of_config, deficits

_NAME_CHARS = 200
_NEAR = 5
_TUNED = {
    "instruct",
    "chat",
    "base",
    "hf",
    "it",
    "pt",
    "thinking",
    "reasoning",
    "gguf",
    "bf16",
    "fp16",
    "dynamic",
    "static",
    "preview",
    "pretrained",
    "quantized",
    "tuned",
    "tokendrop",
    "dropless",
}
_QUANTISED = {
    "fp8": "fp8",
    "w8a8": "w8a8",
    "int8": "int8",
    "awq": "awq",
    "gptq": "gptq",
    "nvfp4": "nvfp4",
    "fp4": "nvfp4",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "nf4": "nf4",
    "bnb": "nf4",
    "w4a16": "gptq",
    "int4": "gptq",
}
_GGUF = re.compile(r"^(iq[1-4]|q[2-8]|tq[12])(_|$)")


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One named model."""

    id: str
    config: dict[str, Any]
    aliases: tuple[str, ...] = ()
    is_estimate: bool = False
    note: str = ""


def names() -> list[str]:
    """The ids of all presets, in the order of the table."""
    return [preset.id for preset in _table()]


def presets() -> tuple[Preset, ...]:
    """All presets."""
    return _table()


def lookup(name: str) -> Architecture:
    """The architecture of a named model. Letter case, separators, publisher's prefix and tuning suffixes are ignored.

    A suffix that names a quantisation (-FP8, -AWQ, Q4_K_M, ...) sets the architecture's.
    Raises: InvalidValue for what cannot be a name; ModelNotFound (404) with the nearest names.
    """
    preset, quantisation = resolve(name)
    architecture = _architecture(preset.id)
    if quantisation and not architecture.quantisation:
        architecture = msgspec.structs.replace(architecture, quantisation=quantisation)
    return architecture


def resolve(name: str) -> tuple[Preset, str]:
    """The preset that `name` means, and the quantisation that its suffix names (or empty)."""
    if not isinstance(name, str) or not name.strip() or len(name) > _NAME_CHARS:
        raise InvalidValue("a model's name has 1 to 200 characters", field="model")
    index = _index()
    if found := index.get(_key(name)) or index.get(_key(name.rpartition("/")[2])):
        return found, ""
    words = re.split(r"[-\s:.@]+(?=[A-Za-z])|[-\s:@]+", name.rpartition("/")[2].strip())
    quantisation = ""
    while len(words) > 1:
        last = words.pop().lower()
        if last in _QUANTISED or _GGUF.match(last):
            quantisation = quantisation or _QUANTISED.get(last, last)
        elif last not in _TUNED and not re.fullmatch(r"v\d+(\.\d+)*|\d{4}|\d{6}|128g|gs\d+|block", last):
            break
        if found := index.get(_key("-".join(words))):
            return found, quantisation
    raise unknown(name)


def unknown(name: str) -> ModelNotFound:
    """The error for a model that nobody knows, with the nearest names."""
    keys = {_key(preset.id.rpartition("/")[2]): preset.id for preset in _table()}
    keys.update({_key(alias): preset.id for preset in _table() for alias in preset.aliases})
    found = difflib.get_close_matches(_key(name.rpartition("/")[2]), list(keys), n=2 * _NEAR, cutoff=0.5)
    near = list(dict.fromkeys(keys[key] for key in found))[:_NEAR]
    hint = f"Near: {', '.join(near)}. " if near else ""
    return ModelNotFound(
        f"no model {name[:80]!r} is known",
        hint=hint + "Give a configuration (config.json) or explicit dimensions for other models.",
        model=name[:_NAME_CHARS],
        near=near,
    )


def architecture_of(config: Mapping[str, Any], name: str = "") -> Architecture:
    """As architecture_of_config, for configurations that leave out what their family needs.

    When fields are missing that no default can stand for, and a known model has the name or all of the given
    dimensions, its values are taken for them; the notes say so.
    """
    missing = deficits(config)
    if not missing or (preset := _agreeing(config, name)) is None:
        return architecture_of_config(config, name)
    architecture = architecture_of_config(_completed(config, preset), name or preset.id)
    text = f"{', '.join(missing)} not given: taken from {preset.id}, which has the same dimensions"
    return msgspec.structs.replace(architecture, notes=(*architecture.notes, text))


def _completed(config: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    return {**preset.config, **config}


def _agreeing(config: Mapping[str, Any], name: str) -> Preset | None:
    """The preset of that name, else the only one, whose configuration nowhere contradicts `config`."""
    candidates = [preset for preset in _table() if _agrees(preset.config, config)]
    if name:
        named = _index().get(_key(name))
        if named in candidates:
            return named
    forms = {architecture_of_config(_completed(config, preset)).groups for preset in candidates}
    return candidates[0] if len(forms) == 1 else None


def _agrees(known: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    if known.get("model_type") != given.get("model_type") or "hidden_size" not in given:
        return False
    sizes: tuple[str, ...] = (
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
    )
    sizes += ("moe_intermediate_size", "num_key_value_heads", "max_position_embeddings")
    return all(known[key] == given[key] for key in sizes if key in known and given.get(key) is not None)


@cache
def _architecture(preset_id: str) -> Architecture:
    preset = _index()[_key(preset_id)]
    architecture = architecture_of_config(preset.config, preset.id)
    notes = architecture.notes
    if preset.is_estimate:
        notes = (*notes, "an estimate: the publisher has not said these dimensions")
    if preset.note:
        notes = (*notes, preset.note)
    return msgspec.structs.replace(architecture, source="preset", notes=notes)


@cache
def _table() -> tuple[Preset, ...]:
    data = resources.files("head.planner").joinpath("data/models.json").read_bytes()
    return msgspec.json.decode(data, type=tuple[Preset, ...])


@cache
def _index() -> dict[str, Preset]:
    index: dict[str, Preset] = {}
    for preset in _table():
        for name in (preset.id, *preset.aliases):
            index.setdefault(_key(name), preset)
    for preset in _table():
        index.setdefault(_key(preset.id.rpartition("/")[2]), preset)
    for preset in _table():
        words = preset.id.rpartition("/")[2].split("-")
        while len(words) > 1 and words[-1].lower() in _TUNED:
            words.pop()
        index.setdefault(_key("-".join(words)), preset)
    return index


def _key(name: str) -> str:
    """Letters, digits and the publisher's slash; a separator between digits stays one (1.3b is not 13b)."""
    text = re.sub(r"(?<=\d)[^a-z0-9/]+(?=\d)", ".", name.strip().lower())
    return re.sub(r"[^a-z0-9/.]|(?<!\d)\.|\.(?!\d)", "", text)
