"""An architecture from a Hugging Face `config.json`, full or reduced to its dimensions.

Works by mechanism (layer kinds, experts, norms, biases) with each family's habits in `families.py`. A model type that
is not known is read by its fields, and `notes` say so; values that cannot be are refused and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common.errors import InvalidValue
from head.planner.model import mixers
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.extras import with_extras
from head.planner.model.families import Family, family_of, norm_of, norms_of
from head.planner.model.feed_forwards import feed_forward_of, is_expert_layer
from head.planner.model.fields import ALIASES, LAYERS, WIDTH, Fields, integer
from head.planner.model.layer_kinds import is_left_out, layer_kinds
from head.planner.model.mixers import attention_of, compressed_attention, mamba1, mamba2

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
# Parts of a configuration with fields of their own (DBRX, MPT).
_PARTS = {
    "attn_config": {"kv_n_heads": "num_key_value_heads"},
    "ffn_config": {"ffn_hidden_size": "intermediate_size", "moe_num_experts": "num_experts", "moe_top_k": "moe_topk"},
}
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8", "half": "fp16"}


def architecture_of_config(config: Mapping[str, Any], name: str = "") -> Architecture:
    """The dimensions of the (text) model that `config` describes.

    Raises: InvalidValue (422) that names the field when a value is missing, of another type or absurd.
    """
    config, inner_notes = _text_part(config)
    model_type = config.get("model_type")
    if model_type is not None and (not isinstance(model_type, str) or len(model_type) > 100):
        raise InvalidValue("model_type is not a short string", field="model_type")
    family = family_of(model_type or "")
    fields = Fields(config, family.defaults if family else {})
    for text in inner_notes:
        fields.note(text)
    if family is None:
        family = _inferred(fields, model_type or "")
    return _assemble(fields, family, model_type or "", name)


def _text_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The text model's own fields over those of the whole; vision and audio towers are left out."""
    Fields(config)  # refuses what is no object of bounded size
    notes: list[str] = []
    for _ in range(3):
        for key in _NESTED:
            inner = config.get(key)
            if isinstance(inner, Mapping) and any(alias in inner for alias in ALIASES["hidden_size"]):
                Fields(inner)
                outer = {k: v for k, v in config.items() if k not in (*_NESTED, "vision_config", "audio_config")}
                if inner.get("model_type") is None:
                    outer.pop("model_type", None)
                config = {**outer, **inner}
                notes = ["the text model only: towers for other media are not counted"]
                break
        else:
            break
    for part, names in _PARTS.items():
        inner = config.get(part)
        if isinstance(inner, Mapping):
            config = {**config, **{new: inner[old] for old, new in names.items() if old in inner}}
    return config, notes


def _inferred(fields: Fields, model_type: str) -> Family:
    """A family for an unknown model type, from the names of its fields."""
    fields.note(f"model type {model_type or '(none)'} is not known: read by its fields as a Llama-like model")
    family = Family()
    replace = msgspec.structs.replace
    if fields.has("layer_norm_epsilon", "layer_norm_eps") and not fields.has("rms_norm_eps"):
        family = replace(family, norm="layer")
    if fields.has("use_qk_norm", "qk_layernorm"):
        field = "use_qk_norm" if fields.has("use_qk_norm") else "qk_layernorm"
        family = replace(family, qk_norm="head", qk_norm_field=field, qk_norm_default=False)
    if fields.text("hidden_act") in ("gelu", "gelu_new", "gelu_fast", "relu", "relu2"):
        family = replace(family, is_gated=False)
    if fields.has("linear_num_value_heads"):
        family = replace(family, mixer="gated_delta")
    return family


def _assemble(fields: Fields, family: Family, model_type: str, name: str) -> Architecture:
    hidden = fields.integer("hidden_size", low=1)
    vocab = fields.integer("vocab_size", low=1)
    kinds = layer_kinds(fields, family)
    if not 0 < len(kinds) <= LAYERS:
        raise InvalidValue("num_hidden_layers must be at least 1", field="num_hidden_layers")
    layers = [_layer(fields, family, hidden, kind, index) for index, kind in enumerate(kinds)]
    positions = 0
    if family.has_positions:
        positions = fields.integer("max_position_embeddings", 2048, high=WIDTH) + family.position_offset
    quantisation, dtype, kv_dtype = _weights(fields)
    width = fields.integer("word_embed_proj_dim", fields.integer("embedding_size", hidden))
    norm = norm_of(fields, family)
    architecture = Architecture(
        name=name or fields.text("_name_or_path") or model_type or "model",
        hidden=hidden,
        vocab=vocab,
        groups=_grouped(layers),
        is_tied=fields.flag("tie_word_embeddings", family.is_tied),
        has_head=family.has_head,
        is_causal=family.is_causal,
        has_head_bias=fields.flag("lm_head_bias", family.has_head_bias),
        positions=positions,
        context=fields.integer("max_position_embeddings", 0),
        embedding_width=0 if width == hidden else width,
        final_norm=family.final_norm or norm,
        embedding_norm=family.norm if family.embedding_norms else "none",
        embedding_norms=family.embedding_norms,
        types=fields.integer("type_vocab_size", family.types) if family.types else 0,
        mtp_layers=fields.integer("num_nextn_predict_layers", fields.integer("mtp_num_hidden_layers", 0)),
        weights_dtype=dtype,
        quantisation=quantisation,
        kv_dtype=kv_dtype,
        family=model_type,
        source="config",
    )
    architecture = with_extras(architecture, fields, model_type)
    return msgspec.structs.replace(architecture, notes=tuple(fields.notes))


def _layer(fields: Fields, family: Family, hidden: int, kind: str, index: int) -> LayerGroup:
    blocks = fields.sequence("block_configs")
    if blocks:
        return _searched(fields, family, hidden, blocks[index], index)
    attention = _mixer(fields, family, hidden, kind, index)
    if kind in ("mlp", "moe"):
        feed_forward = feed_forward_of(fields, family, hidden, index, is_moe=kind == "moe")
    elif fields.raw("model_type") == "nemotron_h" or (family.mixer and kind == "mamba" and family.norms == 1):
        feed_forward = FeedForward(kind="none")
    else:
        feed_forward = feed_forward_of(fields, family, hidden, index, is_moe=is_expert_layer(fields, family, index))
    return LayerGroup(
        count=1,
        attention=attention,
        feed_forward=feed_forward,
        norm=norm_of(fields, family),
        norms=norms_of(fields, family),
        kind=kind,
    )


def _searched(fields: Fields, family: Family, hidden: int, block: Any, index: int) -> LayerGroup:
    """A layer whose sizes were searched for: heads per group and width of its own, or a part left out.

    Source: the DeciLM configuration (`ffn_mult` of 2/3 of the width, rounded up to 256).
    """
    heads = fields.integer("num_attention_heads", low=1)
    attention = Attention(kind="none")
    feed_forward = FeedForward(kind="none")
    if not is_left_out(block, "attention"):
        group = integer(block["attention"].get("n_heads_in_group"), "n_heads_in_group", low=1, high=heads)
        head_dim = fields.integer("head_dim", hidden // heads)
        attention = Attention(heads=heads, kv_heads=heads // group, head_dim=head_dim)
    if not is_left_out(block, "ffn"):
        multiple = Fields(block["ffn"]).number("ffn_mult", 4.0, low=0.01, high=64)
        width = int(2 * multiple * hidden / 3)
        feed_forward = FeedForward(width=256 * -(-width // 256))
    norms = (attention.kind != "none") + (feed_forward.kind != "none")
    return LayerGroup(count=1, attention=attention, feed_forward=feed_forward, norms=norms, kind="full")


def _mixer(fields: Fields, family: Family, hidden: int, kind: str, index: int) -> Attention:
    match kind:
        case "mlp" | "moe":
            return Attention(kind="none")
        case "linear" if family.mixer == "kimi_delta":
            return mixers.kimi_delta(fields, hidden)
        case "linear" if family.mixer == "lightning":
            return mixers.lightning(fields, hidden)
        case "linear":
            return mixers.gated_delta(fields, hidden)
        case "conv":
            return mixers.short_convolution(fields, hidden)
        case "mamba" if family.mixer == "mamba2":
            return mamba2(fields, hidden)
        case "mamba":
            return mamba1(fields, hidden, has_inner_norms=fields.raw("model_type") == "jamba")
        case "hybrid":
            return mixers.hybrid(attention_of(fields, family, hidden, "full", index), mamba2(fields, hidden))
        case _ if kind.startswith("compressed:"):
            return compressed_attention(fields, hidden, int(kind.partition(":")[2]))
        case "sliding" | "chunked":
            return attention_of(fields, family, hidden, kind, index)
        case _:
            return attention_of(fields, family, hidden, "full", index)


def _grouped(layers: list[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Equal layers together, in order of first appearance."""
    counts: dict[LayerGroup, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    return tuple(msgspec.structs.replace(layer, count=number) for layer, number in counts.items())


def _weights(fields: Fields) -> tuple[str, str, str]:
    """Quantisation, weights' dtype and the KV cache's dtype, as the configuration names them."""
    value = fields.raw("torch_dtype") or fields.raw("dtype")
    text = value.removeprefix("torch.") if isinstance(value, str) else "bfloat16"
    dtype = _DTYPES.get(text, text[:40])
    return _quantisation(fields.mapping("quantization_config") or {}), dtype, ""


def _quantisation(config: Mapping[str, Any]) -> str:
    """A quantisation's short name: fp8, fp8_block, awq, gptq-g64, int8, nvfp4, ...; empty for none."""
    method = config.get("quant_method") or config.get("quant_algo")
    name = str(method)[:40].lower() if method else ""
    if name == "modelopt":
        name = str(config.get("quant_algo", name))[:40].lower()
    if name == "fp8" and config.get("weight_block_size"):
        return "fp8_block"
    bits, group = config.get("bits") or config.get("w_bit"), config.get("group_size") or config.get("q_group_size")
    if name == "compressed-tensors":
        name, bits, group = _compressed(config)
    if name in ("awq", "gptq", "auto-round", "int4") and bits == 8:
        return "int8"
    if name in ("awq", "gptq", "auto-round", "int4") and isinstance(group, int) and 0 < group != 128:
        return f"{name}-g{group}"
    return name


def _compressed(config: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """What the first group of a compressed-tensors configuration does with weights: name, bits, group size."""
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return "compressed-tensors", None, None
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if weights.get("type") == "float":
        return ("fp8", bits, group) if bits == 8 else ("nvfp4", bits, group)
    return ("int8", bits, group) if bits == 8 else ("int4", bits, group)


def deficits(config: Mapping[str, Any]) -> list[str]:
    """Fields that the family needs, that differ between its models, and that `config` does not say."""
    config, _ = _text_part(config)
    model_type = config.get("model_type")
    family = family_of(model_type) if isinstance(model_type, str) else None
    needs = family.needs if family else ()
    return [name for name in needs if name not in config]
