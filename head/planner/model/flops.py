"""Floating-point operations per token, forward and training, each by a named convention.

A multiply and an add count as two. Published utilisations follow different conventions (with or without recomputation,
whole or causal-halved attention, with or without the embedding), so a number is only worth something with its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Architecture, Attention, LayerGroup
from head.planner.model.parameters import ParameterCount, attention_parameters, count, head_parameters

Convention = Literal[
    "model",
    "causal",
    "full_attention",
    "full_attention_total",
    "mosaicml",
    "megatron_model",
    "megatron_hardware",
    "palm",
    "6n",
]

Reach = Callable[[Attention], tuple[float, float]]

DESCRIPTIONS: dict[str, str] = {
    "model": "3 x forward products of this architecture, causal attention by each layer's own reach",
    "causal": "6 (N_active - N_input_embedding) + 6 L a d s: NeMo and Megatron-Bridge, attention halved by causality",
    "full_attention": "6 (N_active - N_input_embedding) + 12 L a d s: NeMo 24.07, attention not halved",
    "full_attention_total": "6 N_active + 12 L a d s with both embeddings counted: NeMo 24.07 for GPT-3",
    "mosaicml": "6 N + 12 L h s: LLM Foundry, attention not halved",
    "megatron_model": "72 L h^2 (1 + s/6h + V/12Lh): Korthikanti et al. 2022, model FLOPs",
    "megatron_hardware": "96 L h^2 (1 + s/6h + V/16Lh): Narayanan et al. 2021, with full recomputation",
    "palm": "6 N + 12 L a d s: PaLM appendix B",
    "6n": "6 N: Kaplan et al. 2020, no attention term",
}


class ForwardFlops(msgspec.Struct, frozen=True, kw_only=True):
    """Forward operations for one token; `total` is the sum of the parts."""

    projections: float  # matrices of the token mixers
    attention: float  # scores and weighted values (and an indexer's choice)
    state: float  # updates and reads of linear and state-space layers
    feed_forward: float  # dense parts, shared experts, router
    experts: float  # the chosen routed experts
    head: float  # the output matrix

    @property
    def total(self) -> float:
        """All parts."""
        return self.projections + self.attention + self.state + self.feed_forward + self.experts + self.head


def prefill_flops(architecture: Architecture, seq: int, *, has_head: bool = True) -> ForwardFlops:
    """Mean forward operations per token over one sequence of `seq` tokens (causal unless it is an encoder)."""
    return _forward(architecture, lambda attention: _mean_reach(architecture, attention, seq), has_head=has_head)


def decode_flops(architecture: Architecture, context: float) -> ForwardFlops:
    """Forward operations of one new token that sees `context` tokens before it."""
    return _forward(architecture, lambda attention: _reach(attention, context), has_head=True, is_decode=True)


def training_flops_per_token(
    architecture: Architecture, seq: int, convention: Convention = "causal", *, has_mtp: bool = False
) -> float:
    """Training operations (forward and backward) per token.

    seq: tokens of one sequence. has_mtp: count the extra prediction layers as well.
    Raises: InvalidValue for a convention that does not exist.
    Source: the formulas in DESCRIPTIONS.
    """
    if convention not in get_args(Convention):
        raise InvalidValue(
            f"no FLOPs convention {convention!r}", field="convention", conventions=list(get_args(Convention))
        )
    if seq < 1:
        raise InvalidValue("seq must be at least 1", field="seq")
    parameters = count(architecture)
    layers = architecture.layers
    hidden = architecture.hidden
    vocab = architecture.vocab
    if convention == "6n":
        return 6.0 * parameters.active
    if convention == "mosaicml":
        return 6.0 * parameters.active + 12.0 * layers * hidden * seq
    if convention in ("megatron_model", "megatron_hardware"):
        factor, logits = (72.0, 12.0) if convention == "megatron_model" else (96.0, 16.0)
        return factor * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (logits * layers * hidden))
    if convention == "model":
        return 3.0 * prefill_flops(architecture, seq).total
    attention = sum(group.count * _pair_flops(group.attention) * seq * 3.0 for group in architecture.groups)
    extra = _mtp_flops(architecture, parameters, seq) if has_mtp else 0.0
    if convention == "causal":
        return 6.0 * parameters.active_no_input_embedding + attention / 2 + extra
    if convention == "full_attention":
        return 6.0 * parameters.active_no_input_embedding + attention + 2 * extra
    return 6.0 * parameters.active + attention + extra  # palm, full_attention_total


def hardware_flops_per_token(
    architecture: Architecture, seq: int, recompute: Literal["none", "selective", "full"], convention: Convention
) -> float:
    """Operations with what recomputation adds: `full` one more forward pass, `selective` the attention core once more.

    A convention that counts recomputation already is returned as it is.
    Source: Korthikanti et al. 2022, section 4.
    """
    flops = training_flops_per_token(architecture, seq, convention)
    if convention == "megatron_hardware" or recompute == "none":
        return flops
    if recompute == "full":
        return flops * 4 / 3
    return flops + prefill_flops(architecture, seq).attention


def embedding_free_flops(architecture: Architecture) -> float:
    """2 N of everything that one token multiplies by: the roofline's work per token without attention."""
    parameters = count(architecture)
    return 2.0 * parameters.active_no_input_embedding


def _forward(architecture: Architecture, reach: Reach, *, has_head: bool, is_decode: bool = False) -> ForwardFlops:
    hidden = architecture.hidden
    projections = attention = state = feed_forward = experts = 0.0
    for group in architecture.groups:
        mixer = group.attention
        projections += group.count * 2.0 * attention_parameters(mixer, hidden)
        state += group.count * 6.0 * mixer.state_elements
        tokens, choosing = reach(mixer)
        attention += group.count * (tokens * _pair_flops(mixer, is_decode=is_decode) + choosing)
        shared, routed = _feed_forward_flops(group, hidden)
        feed_forward += group.count * (shared + 2.0 * group.other_params)
        experts += group.count * routed
    head = 0.0
    if has_head and architecture.has_head:
        table = architecture.vocab * architecture.input_width if architecture.is_tied else 0
        head = 2.0 * (table or head_parameters(architecture))
    return ForwardFlops(
        projections=projections,
        attention=attention,
        state=state,
        feed_forward=feed_forward,
        experts=experts,
        head=head,
    )


def _feed_forward_flops(group: LayerGroup, hidden: int) -> tuple[float, float]:
    """Operations outside and inside of the routed experts."""
    part = group.feed_forward
    gates = 3 if part.is_gated else 2
    if part.kind == "none":
        return 0.0, 0.0
    if part.kind == "dense":
        return 2.0 * (gates * hidden * part.width + part.other_params), 0.0
    outside = gates * hidden * (part.shared_width + part.dense_width) + hidden * part.experts
    outside += 2 * hidden * part.latent + part.other_params
    return 2.0 * outside, 2.0 * part.active * gates * (part.latent or hidden) * part.width


def _pair_flops(attention: Attention, *, is_decode: bool = False) -> float:
    """Operations of one query token with one key token: score and weighted value.

    Decoding with a latent cache works on the latent itself (absorbed projections).
    """
    if attention.kind in ("linear", "mamba", "none"):
        return 0.0
    if attention.kind in ("mla", "sparse_mla") and is_decode:
        return 2.0 * attention.heads * (2 * attention.kv_rank + attention.rope_dim)
    return 2.0 * attention.heads * (attention.head_dim + (attention.value_dim or attention.head_dim))


def _reach(attention: Attention, context: float) -> tuple[float, float]:
    """Tokens that one new token attends to, and the operations that choosing them costs."""
    match attention.kind:
        case "none" | "linear" | "mamba":
            return 0.0, 0.0
        case "sliding" | "chunked":
            return min(context, float(attention.window or context)), 0.0
        case "compressed":
            near = min(context, float(attention.window))
            if not attention.compress_ratio:
                return near, 0.0
            blocks = context / attention.compress_ratio
            choosing = 2.0 * attention.index_heads * attention.index_dim * blocks
            return near + (min(blocks, float(attention.index_top)) if attention.index_top else blocks), choosing
        case "sparse_mla":
            choosing = 2.0 * attention.index_heads * attention.index_dim * context
            return min(context, float(attention.index_top or context)), choosing
        case _:
            return context, 0.0


def _mean_reach(architecture: Architecture, attention: Attention, seq: int) -> tuple[float, float]:
    """Mean of `_reach` over the tokens of one sequence; an encoder's tokens see the whole sequence or window."""
    if not architecture.is_causal:
        return _reach(attention, float(seq))
    half = seq / 2
    match attention.kind:
        case "sliding":
            return _mean_limited(seq, attention.window), 0.0
        case "chunked":
            return min(seq, attention.window or seq) / 2, 0.0
        case "sparse_mla":
            choosing = _reach(attention, half)[1]
            return _mean_limited(seq, attention.index_top), choosing
        case "compressed":
            near = _mean_limited(seq, attention.window)
            if not attention.compress_ratio:
                return near, 0.0
            limit = attention.index_top * attention.compress_ratio
            return near + _mean_limited(seq, limit) / attention.compress_ratio, _reach(attention, half)[1]
        case _:
            return _reach(attention, half)


def _mean_limited(seq: int, limit: int) -> float:
    """Mean over 0..seq of min(tokens before, limit); limit 0: none."""
    if not limit or seq <= limit:
        return seq / 2
    return (limit * limit / 2 + (seq - limit) * limit) / seq


def _mtp_flops(architecture: Architecture, parameters: ParameterCount, seq: int) -> float:
    """Extra prediction layers: one more last layer, its projection, and the output matrix again, each."""
    if not architecture.mtp_layers:
        return 0.0
    last = parameters.groups[-1]
    hidden = architecture.hidden
    each = 6.0 * (last.active + 2 * hidden * hidden + architecture.vocab * hidden)
    return architecture.mtp_layers * (each + 3.0 * _pair_flops(architecture.groups[-1].attention) * seq / 2)
