"""Feed-forward parts of one layer, from a configuration: dense or experts, and which layers have which."""

from __future__ import annotations

from common.errors import InvalidValue
from head.planner.model.architecture import FeedForward
from head.planner.model.families import Family
from head.planner.model.fields import EXPERTS, Fields


def is_expert_layer(fields: Fields, family: Family, layer: int) -> bool:
    """Whether this layer chooses experts, by any of the ways in which configurations say it."""
    if fields.integer("num_experts", 0, high=EXPERTS) < 1 or not fields.flag("enable_moe_block", True):
        return False
    words = fields.sequence("mlp_layer_types")
    if words is not None:
        return layer < len(words) and words[layer] != "dense"
    chosen = fields.sequence("moe_layers")
    if chosen is not None:
        return layer in chosen
    dense = fields.sequence("mlp_only_layers")
    if dense and layer in dense:
        return False
    if fields.raw("interleave_moe_layer_step") is not None:
        step = fields.integer("interleave_moe_layer_step", 1, low=1)
        return (layer + 1) % step == 0
    if fields.has("expert_layer_period"):
        period, offset = fields.integer("expert_layer_period", low=1), fields.integer("expert_layer_offset", 0)
        return layer % period == offset
    if fields.has("moe_layer_interval"):
        interval = fields.integer("moe_layer_interval", 1, low=1)
        first = fields.integer("moe_layer_start_index", 0)
        last = fields.raw("moe_layer_end_index")
        end = last if isinstance(last, int) and last >= 0 else layer
        return (layer + 1) % interval == 0 and first <= layer <= end
    if fields.has("decoder_sparse_step"):
        step = fields.integer("decoder_sparse_step", 1, low=1)
        return (layer + 1) % step == 0
    frequency = fields.raw("moe_layer_freq")
    if isinstance(frequency, (list, tuple)):
        return layer < len(frequency) and bool(frequency[layer])
    if layer < fields.integer("first_k_dense_replace", 0):
        return False
    return layer % fields.integer("moe_layer_freq", 1, low=1) == 0


def feed_forward_of(fields: Fields, family: Family, hidden: int, layer: int, *, is_moe: bool) -> FeedForward:
    """The feed-forward part of layer `layer`."""
    if is_moe:
        return _experts(fields, family, hidden, layer)
    width = _dense_width(fields, family, hidden, layer)
    if not width:
        return FeedForward(kind="none")
    is_gated = family.is_gated or fields.text("feed_forward_proj").startswith("gated")
    return FeedForward(width=width, is_gated=is_gated, has_bias=_bias(fields, family))


def _dense_width(fields: Fields, family: Family, hidden: int, layer: int) -> int:
    if fields.has("intermediate_size_mlp") and fields.integer("num_experts", 0):
        return fields.integer("intermediate_size_mlp")  # Llama-4's dense layers
    if fields.has("dense_intermediate_size"):
        return fields.integer("dense_intermediate_size")
    model_type = fields.raw("model_type")
    if model_type == "granitemoehybrid" and not fields.integer("num_experts", 0):
        return fields.integer("shared_intermediate_size")
    width = fields.at("intermediate_size", layer, 0)
    if fields.flag("use_double_wide_mlp"):
        own = fields.integer("num_hidden_layers", len(fields.sequence("layer_types") or ()))
        return 2 * width if layer >= own - fields.integer("num_kv_shared_layers", 0) else width
    if model_type == "qwen":
        return width // 2  # the configuration says gate and up together
    if model_type == "recurrent_gemma":
        return width // 2
    if model_type in ("lfm2", "lfm2_moe") and fields.flag("block_auto_adjust_ff_dim", model_type == "lfm2"):
        width = int(2 * width / 3 * fields.number("block_ffn_dim_multiplier", 1.0, high=64))
        multiple = fields.integer("block_multiple_of", 256, low=1)
        return multiple * -(-width // multiple)
    if width or (family.mixer in ("mamba1", "mamba2") and not fields.has("intermediate_size")):
        return width
    if family.is_gated:
        fields.integer("intermediate_size")  # refuses with the field's name
    ratio = fields.number("expansion_ratio", 4.0, low=0.01, high=64)
    return int(ratio * hidden)


def _bias(fields: Fields, family: Family) -> bool:
    if fields.raw("model_type") == "mpt":
        return not fields.flag("no_bias", True)
    if not family.feed_forward_bias_field:
        return family.feed_forward_bias
    return fields.flag(family.feed_forward_bias_field, family.feed_forward_bias)


def _experts(fields: Fields, family: Family, hidden: int, layer: int) -> FeedForward:
    experts = fields.integer("num_experts", low=1, high=EXPERTS)
    active = fields.integer("num_experts_per_tok", 0)
    if not active:
        active = min(8, experts)
        fields.note(f"the configuration does not say how many experts a token chooses: {active} assumed")
    if active > experts:
        raise InvalidValue(f"a token cannot choose {active} of {experts} experts", field="num_experts_per_tok")
    width = fields.at("moe_intermediate_size", layer, 0) or fields.at("intermediate_size", layer, 0)
    if fields.raw("model_type") == "cohere2_moe":
        width = fields.at("intermediate_size", layer, 0)  # its experts have the dense width
    if not width:
        fields.integer("moe_intermediate_size")
    shared = fields.integer("shared_expert_intermediate_size", 0)
    if not shared:
        shared = fields.at("n_shared_experts", layer, 0) * width
    dense_width = 0
    if fields.raw("model_type") in ("gemma4_text", "gemma4"):
        dense_width = fields.integer("intermediate_size")
    if fields.raw("model_type") in ("llama4_text", "llama4"):
        shared = width
    if fields.raw("model_type") in ("hunyuan_v1_moe", "hunyuan"):
        shared = fields.at("n_shared_experts", layer, 1) * fields.at("intermediate_size", layer, 0)
    return FeedForward(
        kind="moe",
        width=width,
        is_gated=family.is_gated,
        has_bias=family.expert_bias,
        experts=experts,
        active=active,
        shared_width=shared,
        has_shared_gate=family.has_shared_gate and shared > 0,
        has_router_bias=family.router_bias,
        latent=fields.integer("moe_latent_size", fields.integer("routed_expert_hidden_size", 0)),
        dense_width=dense_width,
    )
