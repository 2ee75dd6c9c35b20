"""An architecture from a Hugging Face `config.json`, full or reduced to its dimensions.

Works by mechanism (layer kinds, experts, norms, biases) with each family's habits in `families.py`. A model type that
is not known is read by its fields, and `notes` say so; values that cannot be are refused and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.families import Family, family_of
from head.planner.model.feed_forwards import feed_forward_of, is_expert_layer
from head.planner.model.fields import ALIASES, LAYERS, WIDTH, Fields
from head.planner.model.layer_kinds import layer_kinds
from head.planner.model.mixers import attention_of, compressed_attention, gated_delta, mamba1, mamba2

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
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
    architecture = Architecture(
        name=name or fields.text("_name_or_path") or model_type or "model",
        hidden=hidden,
        vocab=vocab,
        groups=_grouped(layers),
        is_tied=fields.flag("tie_word_embeddings", family.is_tied),
        has_head=family.has_head,
        is_causal=family.is_causal,
        has_head_bias=family.has_head_bias,
        positions=positions,
        context=fields.integer("max_position_embeddings", 0),
        embedding_width=0 if width == hidden else width,
        final_norm=family.final_norm or family.norm,
        embedding_norms=family.embedding_norms,
        types=fields.integer("type_vocab_size", family.types) if family.types else 0,
        mtp_layers=fields.integer("num_nextn_predict_layers", fields.integer("mtp_num_hidden_layers", 0)),
        weights_dtype=dtype,
        quantisation=quantisation,
        kv_dtype=kv_dtype,
        family=model_type,
        source="config",
    )
    architecture = _with_extras(architecture, fields, model_type)
    return msgspec.structs.replace(architecture, notes=tuple(fields.notes))


def _layer(fields: Fields, family: Family, hidden: int, kind: str, index: int) -> LayerGroup:
    attention = _mixer(fields, family, hidden, kind, index)
    if kind in ("mlp", "moe"):
        feed_forward = feed_forward_of(fields, family, hidden, index, is_moe=kind == "moe")
    elif fields.raw("model_type") == "nemotron_h":
        feed_forward = FeedForward(kind="none")
    else:
        feed_forward = feed_forward_of(fields, family, hidden, index, is_moe=is_expert_layer(fields, family, index))
    return LayerGroup(
        count=1, attention=attention, feed_forward=feed_forward, norm=family.norm, norms=family.norms, kind=kind
    )


def _mixer(fields: Fields, family: Family, hidden: int, kind: str, index: int) -> Attention:
    match kind:
        case "mlp" | "moe":
            return Attention(kind="none")
        case "linear":
            return gated_delta(fields, hidden)
        case "mamba":
            return mamba2(fields, hidden) if family.mixer == "mamba2" else mamba1(fields, hidden)
        case _ if kind.startswith("compressed:"):
            return compressed_attention(fields, hidden, int(kind.partition(":")[2]))
        case "sliding" | "chunked":
            return attention_of(fields, family, hidden, kind, index)
        case _:
            return attention_of(fields, family, hidden, "full", index)


def _with_extras(architecture: Architecture, fields: Fields, model_type: str) -> Architecture:
    """Parts outside of the layers, or in each of them, that single families have."""
    replace = msgspec.structs.replace
    hidden = architecture.hidden
    if model_type.startswith("deepseek_v4"):
        copies = fields.integer("hc_mult", 4, low=1)
        mixes = (2 + copies) * copies
        each = 2 * (mixes * copies * hidden + mixes + 3)
        groups = tuple(replace(group, other_params=group.other_params + each) for group in architecture.groups)
        head = copies * copies * hidden + copies + 1
        return replace(architecture, groups=groups, other_params=head)
    if model_type.startswith("gemma4"):
        groups = tuple(_gemma4(group, hidden, fields) for group in architecture.groups)
        architecture = replace(architecture, groups=groups)
        width = fields.integer("hidden_size_per_layer_input", 0)
        if width:
            rows = fields.integer("vocab_size_per_layer_input", architecture.vocab)
            layers = architecture.layers
            architecture = replace(
                architecture,
                other_embedding_params=rows * layers * width,
                other_params=hidden * layers * width + width,
            )
    return architecture


def _gemma4(group: LayerGroup, hidden: int, fields: Fields) -> LayerGroup:
    width = fields.integer("hidden_size_per_layer_input", 0)
    extra = 1 + (2 * hidden * width + hidden if width else 0)
    if group.feed_forward.kind == "moe":
        extra += 3 * hidden + hidden + group.feed_forward.experts
    return msgspec.structs.replace(group, other_params=group.other_params + extra - 1)


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
    quantisation = fields.mapping("quantization_config") or {}
    method = quantisation.get("quant_method") or quantisation.get("quant_algo")
    named = str(method)[:40].lower() if method else ""
    if named == "modelopt":
        named = str(quantisation.get("quant_algo", named))[:40].lower()
    if named == "fp8" and quantisation.get("weight_block_size"):
        named = "fp8_block"
    return named, dtype, ""


def deficits(config: Mapping[str, Any]) -> list[str]:
    """Fields that the family needs, that differ between its models, and that `config` does not say."""
    config, _ = _text_part(config)
    model_type = config.get("model_type")
    family = family_of(model_type) if isinstance(model_type, str) else None
    needs = family.needs if family else ()
    return [name for name in needs if name not in config]
