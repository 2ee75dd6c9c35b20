"""Which kind each layer is, from the many ways in which configurations say it.

Kinds: full, sliding, chunked, linear, mamba, conv, mlp, moe (a layer that is only that), and compressed:RATIO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import InvalidValue
from head.planner.model.families import Family
from head.planner.model.fields import LAYERS, Fields, integer, shown

_WORDS = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "global_attention": "full",
    "indexed_attention": "full",
    "hybrid": "hybrid",
    "sliding_attention": "sliding",
    "local_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "mamba",
    "mamba2": "mamba",
    "conv": "conv",
    "recurrent": "recurrent",
    "mlp": "mlp",
    "moe": "moe",
    "heavily_compressed_attention": "compressed:128",
    "compressed_sparse_attention": "compressed:4",
}
_LETTERS = {"M": "mamba", "*": "full", "-": "mlp", "E": "moe"}


def layer_kinds(fields: Fields, family: Family) -> list[str]:
    """One kind per layer, first layer first. A count without an order keeps the order of its words."""
    pattern = fields.raw("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return _letters(pattern)
    blocks = fields.sequence("block_configs")
    if blocks:
        return ["mlp" if is_left_out(block, "attention") else "full" for block in blocks]
    for name in ("layers_block_type", "layer_types"):
        words = fields.sequence(name)
        if words:
            return [_kind(word, family, name) for word in words]
    layers = fields.integer("num_hidden_layers", low=1)
    if listed := _listed(fields, family, layers):
        return listed
    counts = fields.mapping("layer_types_count")
    if counts:
        return _counted(counts, layers, family)
    ratios = fields.sequence("compress_ratios")
    if ratios:
        return [f"compressed:{integer(ratio, 'compress_ratios', low=0, high=1 << 20)}" for ratio in ratios[:layers]]
    flags = fields.sequence("hybrid_layer_pattern")
    if flags:
        return ["sliding" if flag else "full" for flag in flags[:layers]]
    return _cycled(fields, family, layers)


def is_left_out(block: Any, part: str) -> bool:
    """Whether a layer of a searched architecture (`block_configs`) goes without its attention or feed-forward part."""
    inner = block.get(part) if isinstance(block, Mapping) else None
    if not isinstance(inner, Mapping):
        raise InvalidValue("block_configs has a layer without parts", field="block_configs")
    return bool(inner.get("no_op"))


def _listed(fields: Fields, family: Family, layers: int) -> list[str]:
    """Layers whose places are listed or counted off; empty when the configuration has no such list."""
    recurrent = {"conv": "conv", "mamba1": "mamba", "mamba2": "mamba"}.get(family.mixer, "linear")
    inner = fields.mapping("linear_attn_config")
    full = fields.sequence("attn_layer_indices") or fields.sequence("full_attn_idxs")
    if inner is not None and isinstance(inner.get("full_attn_layers"), (list, tuple)):
        chosen = {place for place in inner["full_attn_layers"] if isinstance(place, int)}
        return ["full" if index + 1 in chosen else recurrent for index in range(layers)]
    if full:
        return ["full" if index in full else recurrent for index in range(layers)]
    flags = fields.sequence("attn_type_list")
    if flags:
        return ["full" if flag else recurrent for flag in flags[:layers]]
    if fields.has("attn_layer_period"):
        period, offset = fields.integer("attn_layer_period", low=1), fields.integer("attn_layer_offset", 0)
        return ["full" if index % period == offset else recurrent for index in range(layers)]
    if family.mixer == "kimi_delta":
        return ["full" if index % 4 == 3 else recurrent for index in range(layers)]
    return []


def _cycled(fields: Fields, family: Family, layers: int) -> list[str]:
    if family.cycle:
        cycle: Sequence[str] = family.cycle
        for name in ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval"):
            if fields.has(name) and isinstance(fields.raw(name), int):
                every = fields.integer(name, low=1, high=LAYERS)
                cycle = (family.cycle[0],) * (every - 1) + ("full",)
        kinds = [cycle[index % len(cycle)] for index in range(layers)]
        return [*kinds[:-1], "full"] if family.ends_with_full else kinds
    is_used = fields.flag("use_sliding_window", not family.is_window_optional)
    if is_used and (family.has_window or family.is_window_optional) and fields.integer("sliding_window", 0):
        first = fields.integer("max_window_layers", 0) if family.is_window_optional else 0
        return ["full" if index < first else "sliding" for index in range(layers)]
    return ["full"] * layers


def _letters(pattern: str) -> list[str]:
    if len(pattern) > LAYERS or any(letter not in _LETTERS for letter in pattern):
        raise InvalidValue(
            "hybrid_override_pattern has letters other than M * - E",
            field="hybrid_override_pattern",
            value=shown(pattern),
        )
    return [_LETTERS[letter] for letter in pattern]


def _kind(word: Any, family: Family, name: str) -> str:
    if not isinstance(word, str) or (word not in _WORDS and "attention" not in word[:100]):
        raise InvalidValue(f"{name} has a word that is not a layer kind", field=name, value=shown(word))
    kind = _WORDS.get(word, "full")
    if family.is_compressed and kind in ("sliding", "full"):
        return "compressed:0"
    return "mamba" if kind == "linear" and family.mixer in ("mamba1", "mamba2") else kind


def _counted(counts: Mapping[str, Any], layers: int, family: Family) -> list[str]:
    kinds: list[str] = []
    for word, number in counts.items():
        kinds += [_kind(word, family, "layer_types_count")] * integer(number, "layer_types_count", low=0, high=LAYERS)
    if len(kinds) != layers:
        raise InvalidValue(f"layer_types_count adds up to {len(kinds)} of {layers} layers", field="layer_types_count")
    return kinds
