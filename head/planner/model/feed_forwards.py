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
    if fields.has("interleave_moe_layer_step"):
        step = fields.integer("interleave_moe_layer_step", 1, low=1)
        return (layer + 1) % step == 0
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
    width = fields.at("intermediate_size", layer, 0)
    if fields.has("intermediate_size_mlp") and fields.integer("num_experts", 0):
        width = fields.integer("intermediate_size_mlp")
    if not width:
        if fields.has("num_experts") or family.is_gated:
            fields.integer("intermediate_size")  # refuses with the field's name
        width = 4 * hidden
    return FeedForward(width=width, is_gated=family.is_gated, has_bias=_bias(fields, family))


def _bias(fields: Fields, family: Family) -> bool:
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
    if not width:
        fields.integer("moe_intermediate_size")
    shared = fields.integer("shared_expert_intermediate_size", 0)
    if not shared:
        shared = fields.integer("n_shared_experts", 0) * width
    dense_width = 0
    if fields.raw("model_type") in ("gemma4_text", "gemma4"):
        dense_width = fields.integer("intermediate_size")
    if fields.raw("model_type") in ("llama4_text", "llama4"):
        shared = width
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
        latent=fields.integer("moe_latent_size", 0),
        dense_width=dense_width,
    )
