"""Bytes that a model's weights take on each rank, by number format or quantisation.

A quantisation says which parts it touches: embeddings, output head, norms and routers usually keep 16 bits. GGUF mixes
(Q4_K_M, ...) give some tensors more bits, layer by layer, as llama.cpp's quantiser chooses them.
"""

from __future__ import annotations

import re

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Architecture, LayerGroup
from head.planner.model.dtypes import bytes_per_element, is_dtype
from head.planner.model.parameters import (
    attention_parameters,
    count,
    head_parameters,
    norm_parameters,
    projection_parameters,
)

# Bytes per weight with scales: int4 keeps a 16-bit scale and a 4-bit zero for each group of weights.
_FP8_BLOCK = 1 + 4 / (128 * 128)
_NVFP4 = 0.5 + 1 / 16
_MXFP4 = 0.5 + 1 / 32
_NF4 = 0.5 + 4 / 64
_NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)

# GGUF mixes: base, attention values, feed-forward down, attention output, output head; "+" where only the layers that
# llama.cpp gives more bits have it.
_MIXES: dict[str, tuple[str, str, str, str, str]] = {
    "q2_k": ("q2_k", "q4_k", "q3_k", "q3_k", "q6_k"),
    "q2_k_s": ("q2_k", "q4_k", "q2_k", "q2_k", "q6_k"),
    "q3_k_s": ("q3_k", "q3_k", "q3_k", "q3_k", "q6_k"),
    "q3_k_m": ("q3_k", "q4_k", "q4_k", "q4_k", "q6_k"),
    "q3_k_l": ("q3_k", "q5_k", "q5_k", "q5_k", "q6_k"),
    "q4_0": ("q4_0", "q4_0", "q4_0", "q4_0", "q6_k"),
    "q4_1": ("q4_1", "q4_1", "q4_1", "q4_1", "q6_k"),
    "q4_k_s": ("q4_k", "q4_k", "q4_k", "q4_k", "q6_k"),
    "q4_k_m": ("q4_k", "q6_k+", "q6_k+", "q4_k", "q6_k"),
    "q5_0": ("q5_0", "q5_0", "q5_0", "q5_0", "q6_k"),
    "q5_1": ("q5_1", "q5_1", "q5_1", "q5_1", "q6_k"),
    "q5_k_s": ("q5_k", "q5_k", "q5_k", "q5_k", "q6_k"),
    "q5_k_m": ("q5_k", "q6_k+", "q6_k+", "q5_k", "q6_k"),
    "q6_k": ("q6_k", "q6_k", "q6_k", "q6_k", "q6_k"),
    "q8_0": ("q8_0", "q8_0", "q8_0", "q8_0", "q8_0"),
    "iq4_xs": ("iq4_xs", "iq4_xs", "iq4_xs", "iq4_xs", "q6_k"),
    "iq4_nl": ("iq4_nl", "iq4_nl", "iq4_nl", "iq4_nl", "q6_k"),
    "iq3_xxs": ("iq3_xxs", "q4_k", "q3_k+", "iq3_xxs", "q5_k"),
    "iq2_xxs": ("iq2_xxs", "q4_k", "q2_k+", "iq2_xxs", "q5_k"),
}


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per weight of each part."""

    name: str
    attention: float
    values: float  # the value projection; as `attention` unless a mix says otherwise
    outputs: float  # the attention output projection
    dense: float
    down: float
    experts: float
    embedding: float
    head: float
    plain: float  # norms, routers, biases
    values_more: float = 0.0  # in the layers that a mix gives more bits; 0: as the others
    down_more: float = 0.0
    whole_layers: int = 0  # layers that stay in 16 bits


class WeightBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the weights on the fullest rank, by part; `total` is all ranks together without repeated parts."""

    storage: str
    total: float
    per_rank: float
    attention: float
    feed_forward: float
    routed_experts: float
    embeddings: float
    other: float


def weight_bytes(architecture: Architecture, *, dtype: str = "", tp: int = 1, pp: int = 1, ep: int = 1) -> WeightBytes:
    """Bytes on the fullest rank. dtype: a number format or a quantisation; empty: the architecture's own.

    tp splits heads, widths and the vocabulary (repeating key/value heads when there are too few), ep spreads whole
    experts over ep ranks (and tp splits each when ep is 1), pp spreads layers.
    Raises: InvalidValue for unknown formats and values below 1.
    """
    for name, value in (("tp", tp), ("pp", pp), ("ep", ep)):
        if value < 1:
            raise InvalidValue(f"{name} must be at least 1", field=name)
    storage = storage_of(architecture, dtype)
    attention, feed_forward, experts, other, tables = _parts(architecture, storage, tp=tp, pp=pp, ep=ep)
    whole = (
        sum(_parts(architecture, storage, tp=1, pp=1, ep=1))
        if (tp, pp, ep) != (1, 1, 1)
        else (attention + feed_forward + experts + other + tables)
    )
    return WeightBytes(
        storage=storage.name,
        total=whole,
        per_rank=attention + feed_forward + experts + other + tables,
        attention=attention,
        feed_forward=feed_forward,
        routed_experts=experts,
        embeddings=tables,
        other=other,
    )


def storage_of(architecture: Architecture, dtype: str = "") -> Storage:
    """How the named format stores each part of this model."""
    name = (dtype or architecture.quantisation or architecture.weights_dtype).lower()
    bits = re.fullmatch(r"(.+)-(\d)bit", name)
    if bits:
        name = bits[1] if bits[2] == "4" else f"int{bits[2]}"
    wide = architecture.weights_dtype if is_dtype(architecture.weights_dtype) else "bf16"
    plain = bytes_per_element(wide)
    if plain < 2:
        plain = 2.0
    if name in _MIXES:
        return _mix(architecture, name)
    if is_dtype(name) and name not in ("fp8", "int8", "int4", "nvfp4", "mxfp4", "mxfp8"):
        size = bytes_per_element(name)
        return _uniform(name, size, size, size, size)
    group = re.fullmatch(r"(.+?)-g(\d+)", name)
    base, width = (group[1], max(1, int(group[2]))) if group else (name, 128)
    if base in ("awq", "gptq", "gptq_marlin", "awq_marlin", "int4", "w4a16", "compressed-tensors-int4", "auto-round"):
        size = 0.5 + 2.5 / width
        return _uniform(name, size, plain, plain, plain)
    if base in ("fp8", "int8", "w8a8", "compressed-tensors", "fp8_per_tensor", "modelopt", "smoothquant", "mxfp8"):
        size = bytes_per_element("mxfp8") if base == "mxfp8" else 1.0
        return _uniform(name, size, plain, plain, plain)
    if base == "fp8_block":
        return _uniform(name, _FP8_BLOCK, plain, plain, plain)
    if base == "fbgemm_fp8":
        # feed-forward parts of all layers but the first and the last
        made = _uniform(name, plain, plain, plain, plain)
        return msgspec.structs.replace(made, dense=1.0, down=1.0, experts=1.0, whole_layers=2)
    if base in ("nvfp4", "fp4", "w4a4"):
        has_latent = any(part.attention.kind in ("mla", "sparse_mla") for part in architecture.groups)
        made = _uniform(name, _NVFP4, plain, plain, plain)
        wide_attention = plain if has_latent else _NVFP4
        return msgspec.structs.replace(made, attention=wide_attention, values=wide_attention, outputs=wide_attention)
    if base in ("mxfp4", "quark"):
        if not architecture.is_moe:
            return _uniform(name, _MXFP4, plain, plain, plain)
        return msgspec.structs.replace(_uniform(name, plain, plain, plain, plain), experts=_MXFP4)
    if base in ("nf4", "bitsandbytes", "bnb", "qlora"):
        return _uniform(name, _NF4, plain, plain, plain)
    if base == "nf4_double":
        return _uniform(name, _NF4_DOUBLE, plain, plain, plain)
    if not dtype:  # what a configuration names and nobody here knows: as the weights' own number format
        own = bytes_per_element(architecture.weights_dtype) if is_dtype(architecture.weights_dtype) else plain
        return _uniform(name, own, plain, plain, plain)
    raise InvalidValue(f"no weight format {name[:40]!r}", field="dtype", known=known_formats())


def known_formats() -> list[str]:
    """Names that storage_of takes, besides plain number formats."""
    named = ["awq", "gptq", "fp8", "fp8_block", "fbgemm_fp8", "int8", "w8a8", "nvfp4", "mxfp4", "mxfp8"]
    return [*named, "nf4", "nf4_double", *_MIXES]


def _uniform(name: str, linear: float, embedding: float, head: float, plain: float) -> Storage:
    return Storage(
        name=name,
        attention=linear,
        values=linear,
        outputs=linear,
        dense=linear,
        down=linear,
        experts=linear,
        embedding=embedding,
        head=head,
        plain=plain,
    )


def _mix(architecture: Architecture, name: str) -> Storage:
    base, values, down, outputs, head = _MIXES[name]
    size = bytes_per_element(base)
    head_size = bytes_per_element(head)
    made = _uniform(name, size, head_size if architecture.is_tied else size, head_size, 4.0)
    more_values = bytes_per_element(values.rstrip("+"))
    more_down = bytes_per_element(down.rstrip("+"))
    return msgspec.structs.replace(
        made,
        values=size if values.endswith("+") else more_values,
        down=size if down.endswith("+") else more_down,
        outputs=bytes_per_element(outputs),
        values_more=more_values if values.endswith("+") else 0.0,
        down_more=more_down if down.endswith("+") else 0.0,
    )


def more_bits(layers: int) -> int:
    """Layers that a `+` of a mix holds for: the first and last eighth, and each third between.

    Source: llama.cpp, `use_more_bits` in its quantiser.
    """
    eighth = layers // 8
    return sum(index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2 for index in range(layers))


def _parts(
    architecture: Architecture, storage: Storage, *, tp: int, pp: int, ep: int
) -> tuple[float, float, float, float, float]:
    """Attention, feed-forward, routed experts, other and tables on the fullest rank."""
    layers = architecture.layers
    share = -(-layers // pp) / max(1, layers)
    more = more_bits(layers) / max(1, layers)
    kept = storage.whole_layers / max(1, layers)
    attention = feed_forward = experts = other = 0.0
    for group in architecture.groups:
        number = group.count * share
        mixer, plain = _attention_bytes(group, architecture.hidden, storage, tp, more)
        attention += number * mixer
        dense, routed, rest = _feed_forward_bytes(group, architecture.hidden, storage, tp, ep, more, kept)
        feed_forward += number * dense
        experts += number * routed
        norms = group.norms * norm_parameters(group.norm, architecture.hidden) + group.other_params
        other += number * (plain + rest + norms * storage.plain)
    parameters = count(architecture)
    other += parameters.final * storage.plain
    head_matrix = head_parameters(architecture)
    table = (parameters.input_embedding / tp) * storage.embedding + parameters.positions * storage.plain
    head = head_matrix / tp * storage.head
    if pp > 1:
        table = max(table, head if not architecture.is_tied else table)
        head = 0.0
    return attention, feed_forward, experts, other, table + head


def _attention_bytes(group: LayerGroup, hidden: int, storage: Storage, tp: int, more: float) -> tuple[float, float]:
    """Bytes of matrices and of what stays plain, one layer and rank."""
    mixer = group.attention
    total = attention_parameters(mixer, hidden)
    if mixer.kind in ("mla", "sparse_mla"):
        # the projections into the latents and the indexer are on every rank
        repeated = hidden * (mixer.q_rank + mixer.kv_rank + mixer.rope_dim)
        repeated += (mixer.q_rank or hidden) * mixer.index_heads * mixer.index_dim + hidden * mixer.index_dim
        return (repeated + max(0, total - repeated) / tp) * storage.attention, 0.0
    if mixer.kind in ("compressed", "linear", "mamba", "none"):
        return total / tp * storage.attention, 0.0
    value_dim = mixer.value_dim or mixer.head_dim
    queries = mixer.heads * mixer.head_dim * (2 if mixer.has_output_gate else 1)
    kv_heads = -(-mixer.kv_heads // tp)
    has_keys = not mixer.is_kv_shared
    keys = hidden * kv_heads * mixer.head_dim if has_keys else 0
    values = hidden * kv_heads * value_dim if has_keys and mixer.has_value else 0
    outputs = mixer.heads * value_dim * hidden / tp
    value_size = storage.values + more * (storage.values_more - storage.values if storage.values_more else 0.0)
    matrices = (hidden * queries / tp + keys) * storage.attention
    matrices += values * value_size + outputs * storage.outputs
    whole = hidden * (queries + mixer.kv_heads * (mixer.head_dim if has_keys else 0))
    whole += hidden * mixer.kv_heads * value_dim if has_keys and mixer.has_value else 0
    whole += mixer.heads * value_dim * hidden
    return matrices, max(0, total - whole) * storage.plain


def _feed_forward_bytes(
    group: LayerGroup, hidden: int, storage: Storage, tp: int, ep: int, more: float, kept: float
) -> tuple[float, float, float]:
    """Bytes of dense matrices, of routed experts and of what stays plain, one layer and rank."""
    part = group.feed_forward
    gates = 3 if part.is_gated else 2
    down = storage.down + more * (storage.down_more - storage.down if storage.down_more else 0.0)
    dense_size = storage.dense + kept * (storage.plain - storage.dense)
    down += kept * (storage.plain - down)
    if part.kind == "none":
        return 0.0, 0.0, 0.0
    if part.kind == "dense":
        matrices = hidden * part.width / tp * ((gates - 1) * dense_size + down)
        biases = projection_parameters(part, hidden, part.width) - gates * hidden * part.width
        return matrices, 0.0, (biases + part.other_params) * storage.plain
    inner = part.latent or hidden
    expert_scale = storage.experts / storage.dense if storage.dense else 1.0
    routed = part.experts * inner * part.width * ((gates - 1) * storage.experts + down * expert_scale)
    routed /= ep if ep > 1 else tp
    biases = part.experts * (projection_parameters(part, inner, part.width) - gates * inner * part.width)
    shared = hidden * (part.shared_width + part.dense_width) / tp * ((gates - 1) * dense_size + down)
    shared += 2 * hidden * part.latent * storage.dense
    plain = hidden * part.experts + part.has_router_bias * part.experts + part.has_shared_gate * hidden
    plain += part.other_params
    return shared, routed + biases * storage.plain / (ep if ep > 1 else tp), plain * storage.plain
