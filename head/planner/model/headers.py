"""Architectures and exact weight bytes from what files say of themselves: safetensors headers, GGUF metadata.

Takes plain dictionaries, as the agents' readers make them; reads no file. A configuration beside the tensors is better
than guesses from shapes: where both are given the configuration gives the form and the tensors the exact total.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Architecture
from head.planner.model.dtypes import bytes_per_element, is_dtype
from head.planner.model.fields import FIELDS, WIDTH, integer, shown
from head.planner.model.hf_config import architecture_of_config
from head.planner.model.parameters import count

TENSORS = 200_000
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|blk)\.(\d+)\.")
_PACKED = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map")
_SAFETENSORS_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "BOOL": 8}

# GGUF's names of architectures, and the family whose layers they have.
_GGUF_FAMILIES = {
    "llama": "llama",
    "llama4": "llama4_text",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "qwen3vl": "qwen3",
    "qwen3vlmoe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi2": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "gpt2": "gpt2",
    "gptj": "gptj",
    "gptneox": "gpt_neox",
    "falcon": "falcon",
    "bloom": "bloom",
    "mpt": "mpt",
    "starcoder2": "starcoder2",
    "command-r": "cohere",
    "cohere2": "cohere2",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "chatglm": "chatglm",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "deepseek2": "deepseek_v3",
    "minimax-m2": "minimax_m2",
    "gpt-oss": "gpt_oss",
    "nemotron": "nemotron",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "exaone4": "exaone4",
    "stablelm": "stablelm",
    "internlm2": "internlm2",
    "baichuan": "baichuan",
    "ernie4_5": "ernie4_5",
    "ernie4_5-moe": "ernie4_5_moe",
    "hunyuan-dense": "hunyuan_v1_dense",
    "hunyuan-moe": "hunyuan_v1_moe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "dots1": "dots1",
    "apertus": "apertus",
    "mamba": "mamba",
    "bert": "bert",
    "nomic-bert": "nomic_bert",
}
# GGUF key below the architecture's name -> field of a configuration
_GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "leading_dense_block_count": "first_k_dense_replace",
    "nextn_predict_layers": "num_nextn_predict_layers",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "ssm.state_size": "state_size",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.time_step_rank": "time_step_rank",
    "ssm.inner_size": "mamba_intermediate_size",
}


class StoredWeights(msgspec.Struct, frozen=True, kw_only=True):
    """What the tensors of a file take: elements and bytes, in all and by dtype."""

    elements: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    elements_by_dtype: dict[str, int]


def stored_weights(tensors: Mapping[str, Mapping[str, Any]]) -> StoredWeights:
    """Exact bytes of the tensors of a header: name -> {dtype, shape}, safetensors' or ggml's type names.

    Raises: InvalidValue for shapes and types that cannot be.
    """
    size: dict[str, int] = {}
    elements: dict[str, int] = {}
    for name, tensor in _checked(tensors).items():
        dtype = str(tensor["dtype"]).upper()
        number = math.prod(tensor["shape"])
        elements[dtype] = elements.get(dtype, 0) + number
        size[dtype] = size.get(dtype, 0) + _tensor_bytes(name, dtype, number)
    return StoredWeights(
        elements=sum(elements.values()),
        bytes=sum(size.values()),
        bytes_by_dtype=size,
        elements_by_dtype=elements,
    )


def architecture_of_tensors(
    tensors: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any] | None = None, name: str = ""
) -> Architecture:
    """An architecture from a safetensors header (name -> {dtype, shape}), with its configuration when there is one.

    Without a configuration the widths are read from the shapes of a Llama-like naming; the number of heads cannot be,
    and is assumed. Unquantised tensors give the exact total. Raises: InvalidValue when no embedding or layer is found.
    """
    rows = _checked(tensors)
    given = dict(config) if config is not None else _config_of_shapes(rows)
    architecture = architecture_of_config(given, name)
    notes = list(architecture.notes)
    if config is None:
        notes.append("dimensions read from the tensors' shapes; the number of heads is assumed from common head widths")
    is_packed = any(key.rpartition(".")[2] in _PACKED for key in rows)
    language = {key: row for key, row in rows.items() if not re.search(r"(vision|visual|audio)", key)}
    has_mtp = architecture.mtp_layers and any(_layer(key) >= architecture.layers for key in language)
    if is_packed or has_mtp:
        return msgspec.structs.replace(architecture, source="headers", notes=tuple(notes))
    exact = sum(math.prod(row["shape"]) for row in language.values())
    if architecture.is_tied and "lm_head.weight" in rows:
        exact -= math.prod(rows["lm_head.weight"]["shape"])
    difference = exact - count(architecture).total
    if difference:
        notes.append(f"{difference} parameters that the form does not name, counted outside of the layers")
    return msgspec.structs.replace(
        architecture,
        other_params=architecture.other_params + difference,
        source="headers",
        notes=tuple(notes),
    )


def architecture_of_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]] | None = None, name: str = ""
) -> Architecture:
    """An architecture from a GGUF file's key-value pairs, and its tensor infos when they are given.

    Raises: InvalidValue when the pairs name no architecture or lack dimensions.
    Source: the GGUF specification (ggml, docs/gguf.md).
    """
    if not isinstance(metadata, Mapping) or len(metadata) > 65_536:
        raise InvalidValue("the metadata is not an object of bounded size", field="metadata")
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or not kind:
        raise InvalidValue("the metadata does not say general.architecture", field="general.architecture")
    config: dict[str, Any] = {"model_type": _GGUF_FAMILIES.get(kind, kind[:100])}
    for key, field in _GGUF_KEYS.items():
        value = metadata.get(f"{kind}.{key}")
        if value is not None and value != 0:
            config[field] = _one(value, field)
    _latent(config, metadata, kind)
    config.setdefault("vocab_size", _vocabulary(metadata, tensors))
    rows = _checked(tensors) if tensors is not None else None
    if rows is not None:
        config["tie_word_embeddings"] = "output.weight" not in rows
    config = {key: value for key, value in config.items() if value is not None}
    architecture = architecture_of_config(config, name or str(metadata.get("general.name") or kind)[:200])
    quantisation = architecture.quantisation
    if rows is not None:
        stored = stored_weights(rows).bytes_by_dtype
        most = max(sorted(stored), key=lambda dtype: stored[dtype]).lower()
        quantisation = most if most not in ("f16", "bf16", "f32") else ""
    return msgspec.structs.replace(architecture, quantisation=quantisation, source="headers")


def architecture_of_registered(metadata: Mapping[str, Any], name: str = "") -> Architecture:
    """An architecture from what the agents detected of a registered model (`metadata.detected`, or its fields).

    `config` (the stored part of config.json) is used when it is there; older entries have a few dimensions only, and
    the feed-forward width is then solved from the parameter count. Raises: InvalidValue when neither suffices.
    """
    detected = metadata.get("detected", metadata)
    if not isinstance(detected, Mapping):
        raise InvalidValue("the model's metadata is not an object", field="metadata")
    config = detected.get("config")
    pairs = detected.get("gguf")
    if isinstance(config, Mapping):
        architecture = _of_stored(config, detected, name)
    elif isinstance(pairs, Mapping):
        vocab = {f"{pairs.get('general.architecture')}.vocab_size": detected.get("vocab")}
        architecture = architecture_of_gguf({**vocab, **pairs}, name=name)
        architecture = _tied_by_count(architecture, detected.get("parameters"))
    else:
        architecture = _of_few(detected, name)
    quantisation = str(detected.get("quantisation") or "").lower()[:40]
    return msgspec.structs.replace(
        architecture, quantisation=architecture.quantisation or quantisation, source="registered"
    )


def _of_stored(config: Mapping[str, Any], detected: Mapping[str, Any], name: str) -> Architecture:
    """The stored configuration; the few dimensions beside it where its form was too large to be kept."""
    try:
        return architecture_of_config(config, name)
    except InvalidValue:
        if detected.get("parameters") is None:
            raise
        return _of_few(detected, name)


def _tied_by_count(architecture: Architecture, parameters: Any) -> Architecture:
    """A GGUF file's pairs do not say whether the head is the embedding; the count of its parameters does."""
    tied = msgspec.structs.replace(architecture, is_tied=True)
    untied = msgspec.structs.replace(architecture, is_tied=False)
    if not isinstance(parameters, int) or isinstance(parameters, bool):
        return architecture
    return min(tied, untied, key=lambda form: abs(count(form).total - parameters))


def _of_few(detected: Mapping[str, Any], name: str) -> Architecture:
    names = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "vocab": "vocab_size",
        "context": "max_position_embeddings",
        "head_dim": "head_dim",
    }
    config: dict[str, Any] = {new: detected[old] for old, new in names.items() if detected.get(old) is not None}
    total = detected.get("parameters")
    if total is None:
        raise InvalidValue("the model's metadata has neither its configuration nor its parameter count", field="model")
    total = integer(total, "parameters", low=1, high=1 << 50)
    bare = count(architecture_of_config({**config, "model_type": "llama", "intermediate_size": 1}, name))
    layers = integer(config.get("num_hidden_layers"), "num_hidden_layers", low=1, high=4_096)
    hidden = integer(config.get("hidden_size"), "hidden_size", low=1, high=WIDTH)
    width = max(1, min(WIDTH, 1 + round((total - bare.total) / (3 * hidden * layers))))
    architecture = architecture_of_config({**config, "model_type": "llama", "intermediate_size": width}, name)
    note = "feed-forward width solved from the parameter count: the stored metadata has no configuration"
    return msgspec.structs.replace(architecture, notes=(*architecture.notes, note))


def _config_of_shapes(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Dimensions from tensors named as in Llama and its relatives."""
    table = _shape(rows, r"(embed_tokens|wte|tok_embeddings|word_embeddings|embeddings)\.weight$")
    layers = 1 + max((_layer(key) for key in rows), default=-1)
    query = _shape(rows, r"(q_proj|wq)\.weight$")
    keys = _shape(rows, r"(k_proj|wk)\.weight$")
    up = _shape(rows, r"layers\.\d+\.(?!.*experts).*(up_proj|w3|fc1)\.weight$")
    expert = _shape(rows, r"experts\.\d+\.(up_proj|w3|w1)\.weight$")
    if table is None or layers < 1 or query is None or keys is None or (up is None and expert is None):
        raise InvalidValue(
            "the tensors' names do not show embeddings and layers: give the configuration", field="tensors"
        )
    vocab, hidden = table[0], table[1]
    normed = _shape(rows, r"(q_norm|q_layernorm)\.weight$")
    head_dim = (
        normed[0]
        if normed and normed[0] < query[0]
        else next(
            (width for width in (128, 64, 96, 80, 256, 32, 16) if query[0] % width == 0 and keys[0] % width == 0), 1
        )
    )
    config: dict[str, Any] = {
        "model_type": "qwen3" if normed else "llama",
        "hidden_size": hidden,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "num_attention_heads": query[0] // head_dim,
        "num_key_value_heads": keys[0] // head_dim,
        "tie_word_embeddings": not any(key.endswith("lm_head.weight") for key in rows),
        "attention_bias": any(key.endswith("q_proj.bias") for key in rows),
    }
    if up:
        config["intermediate_size"] = up[0]
    if expert:
        numbers = [int(found[1]) for key in rows if (found := re.search(r"experts\.(\d+)\.", key))]
        config.update(num_experts=1 + max(numbers), moe_intermediate_size=expert[0])
        config["model_type"] = "qwen3_moe" if normed else "mixtral"
        config.setdefault("intermediate_size", expert[0])
    return config


def _latent(config: dict[str, Any], metadata: Mapping[str, Any], kind: str) -> None:
    """Latent attention: GGUF says the lengths of whole keys; the rotary part is the rope dimension."""
    if "kv_lora_rank" not in config:
        value = metadata.get(f"{kind}.attention.value_length")
        if value is not None and value != config.get("head_dim"):
            config["v_head_dim"] = _one(value, "v_head_dim")
        return
    rope = integer(metadata.get(f"{kind}.rope.dimension_count"), "rope.dimension_count", low=1, high=WIDTH)
    whole = metadata.get(f"{kind}.attention.key_length_mla", metadata.get(f"{kind}.attention.key_length"))
    value = metadata.get(f"{kind}.attention.value_length_mla", metadata.get(f"{kind}.attention.value_length"))
    config["qk_rope_head_dim"] = rope
    config["qk_nope_head_dim"] = integer(whole, "attention.key_length", low=rope + 1, high=WIDTH) - rope
    config["v_head_dim"] = integer(value, "attention.value_length", low=1, high=WIDTH)
    config["num_key_value_heads"] = config.get("num_attention_heads")
    config.pop("head_dim", None)


def _vocabulary(metadata: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]] | None) -> int | None:
    table = (tensors or {}).get("token_embd.weight")
    if isinstance(table, Mapping) and isinstance(table.get("shape"), (list, tuple)) and len(table["shape"]) == 2:
        return int(max(table["shape"])) if table["shape"][1] < table["shape"][0] else int(table["shape"][1])
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, (list, tuple)):
        return len(tokens)
    number = getattr(tokens, "count", None)
    return number if isinstance(number, int) else None


def _one(value: Any, field: str) -> Any:
    """A number, or the list of each layer's numbers (its most common value where only one is taken)."""
    if isinstance(value, (list, tuple)):
        if not value or len(value) > FIELDS:
            raise InvalidValue(f"{field} is an empty or endless list", field=field)
        numbers = [integer(item, field, low=0, high=WIDTH) for item in value]
        return numbers if field in ("num_key_value_heads", "intermediate_size", "num_attention_heads") else max(numbers)
    return integer(value, field, low=0, high=1 << 40)


def _checked(tensors: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(tensors, Mapping) or not tensors or len(tensors) > TENSORS:
        raise InvalidValue(f"a header has 1 to {TENSORS} tensors", field="tensors")
    rows = {}
    for name, row in tensors.items():
        if name == "__metadata__":
            continue
        if not isinstance(row, Mapping) or not isinstance(row.get("shape"), (list, tuple)) or len(row["shape"]) > 8:
            raise InvalidValue("a tensor has a shape of at most 8 extents", field="tensors", tensor=shown(name))
        for extent in row["shape"]:
            integer(extent, "shape", low=0, high=1 << 48)
        if not isinstance(row.get("dtype"), str):
            raise InvalidValue("a tensor has a dtype", field="tensors", tensor=shown(name))
        rows[str(name)] = row
    return rows


def _tensor_bytes(name: str, dtype: str, elements: int) -> int:
    bits = _SAFETENSORS_BITS.get(dtype)
    if bits is None and (found := re.fullmatch(r"[IUC](\d+)", dtype)):
        bits = int(found[1])
    if bits is None and dtype.startswith("F8_"):
        bits = 8
    if bits is not None:
        return -(-elements * bits // 8)
    if not is_dtype(dtype):
        raise InvalidValue(f"no number format {dtype[:20]!r}", field="dtype", tensor=shown(name))
    return math.ceil(elements * bytes_per_element(dtype))


def _layer(key: str) -> int:
    found = _LAYER.search(key)
    return int(found[1]) if found else -1


def _shape(rows: Mapping[str, Mapping[str, Any]], pattern: str) -> list[int] | None:
    expression = re.compile(pattern)
    return next((list(row["shape"]) for key, row in rows.items() if expression.search(key)), None)
