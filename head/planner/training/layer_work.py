"""What one layer does for one micro-batch on one GPU: matrix products with their shapes, attention, traffic, kernels.

Counts are of the forward pass; `step_work` multiplies by what backward and recomputation add. Pure arithmetic on the
dimensions of a layer group and the degrees of a layout; the names of models play no part.
"""

from __future__ import annotations

import math

import msgspec

from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.training.layout import TrainingLayout

# How often the hidden state is read or written around one norm (norm, residual, dropout), forward.
# Source: operator list of Korthikanti et al. 2022, section 4; the fitted `hidden` constant says how far fusion helps.
_HIDDEN_PASSES_PER_NORM = 4.0
_KERNELS_ATTENTION = 8.0
_KERNELS_DENSE = 5.0
_KERNELS_MOE = 22.0  # router, top-k, two permutations, two exchanges, grouped products, their bookkeeping
_KERNELS_STATE = 12.0  # projections, convolution, scan of linear and Mamba layers


class LayerWork(msgspec.Struct, frozen=True, kw_only=True):
    """Forward pass of one layer, one micro-batch, one GPU. FLOPs count a multiply-add as two; bytes are of HBM."""

    linear_flops: float = 0.0  # dense products
    expert_flops: float = 0.0  # products of routed experts
    attention_flops: float = 0.0  # scores and values, causal half
    scan_flops: float = 0.0
    linear_bytes: float = 0.0  # operands and results of the products, 2 bytes an element
    expert_bytes: float = 0.0
    score_bytes: float = 0.0  # the s x s matrix, when attention is not fused
    hidden_bytes: float = 0.0  # passes over the hidden state split by tp (or by sequence)
    mixer_bytes: float = 0.0  # passes over queries, keys and values, or a state layer's inner width
    width_bytes: float = 0.0  # passes over the feed-forward's inner width
    whole_hidden_bytes: float = 0.0  # passes that every tp rank repeats
    permute_bytes: float = 0.0  # routed copies of tokens
    routed_tokens: float = 0.0  # token copies that leave for experts
    routed_width: float = 0.0
    kernels: float = 0.0
    moe_kernels: float = 0.0  # of them, of routing and experts
    params: float = 0.0  # of this GPU
    expert_params: float = 0.0  # of this GPU, in routed experts
    small_rows_flops: float = 0.0  # expert FLOPs x (128 / rows of each product): what half-empty tiles cost
    kv_width: float = 0.0  # elements of keys and values per token, this GPU


class _Sum:
    """Adds products up."""

    def __init__(self) -> None:
        self.flops = 0.0
        self.bytes = 0.0
        self.params = 0.0

    def product(self, rows: float, inner: float, outer: float, count: float = 1.0) -> None:
        """`count` products rows x inner times inner x outer."""
        self.flops += 2.0 * rows * inner * outer * count
        self.bytes += 2.0 * (rows * inner + inner * outer + rows * outer) * count
        self.params += inner * outer * count


def mean_context(attention: Attention, seq: int, is_causal: bool) -> float:
    """Mean number of earlier tokens that one token attends to."""
    window = attention.window if attention.kind in ("sliding", "chunked") else 0
    if attention.kind == "sparse_mla" and attention.index_top:
        window = attention.index_top
    if not is_causal:
        return float(min(seq, window) if window else seq)
    if attention.kind == "compressed":
        near = _mean_limited(seq, attention.window)
        ratio = attention.compress_ratio
        return near + (_mean_limited(seq, attention.index_top * ratio) / ratio if ratio else 0.0)
    if attention.kind == "chunked" and 0 < window < seq:
        return window / 2
    return _mean_limited(seq, window)


def _mean_limited(seq: int, limit: int) -> float:
    """Mean over the positions of min(tokens before, limit); limit 0: none."""
    if not limit or limit >= seq:
        return seq / 2
    return limit - limit * limit / (2 * seq)


def _choosing_flops(attention: Attention, seq: int) -> float:
    """Operations of an indexer that scores earlier tokens (or blocks of them), one token."""
    scored = seq / 2 / max(1, attention.compress_ratio)
    return 2.0 * attention.index_heads * attention.index_dim * scored


def attention_width(attention: Attention) -> float:
    """Elements of all heads' keys plus values: what one (token, earlier token) pair multiplies."""
    if attention.kind in ("mla", "sparse_mla"):
        values = attention.value_dim or attention.nope_dim
        return float(attention.heads * (attention.nope_dim + attention.rope_dim + values))
    return float(attention.heads * (attention.head_dim + (attention.value_dim or attention.head_dim)))


def layer_work(arch: Architecture, group: LayerGroup, layout: TrainingLayout) -> LayerWork:
    """Work of one layer of `group`."""
    tokens = layout.micro_batch * layout.seq / layout.cp
    mixer = _mixer(arch, group.attention, layout, tokens)
    forward = _feed_forward(arch, group.feed_forward, layout, tokens)
    norm_bytes = 2.0 * tokens * arch.hidden * _HIDDEN_PASSES_PER_NORM * group.norms
    if layout.tp > 1 and layout.has_sequence_parallel:
        split, whole = norm_bytes / layout.tp, 0.0
    else:
        split, whole = (norm_bytes, 0.0) if layout.tp == 1 else (0.0, norm_bytes)
    values = {
        field: getattr(mixer, field) + getattr(forward, field)
        for field in LayerWork.__struct_fields__
        if field not in ("hidden_bytes", "whole_hidden_bytes")
    }
    return LayerWork(hidden_bytes=mixer.hidden_bytes + forward.hidden_bytes + split, whole_hidden_bytes=whole, **values)


def _mixer(arch: Architecture, attention: Attention, layout: TrainingLayout, tokens: float) -> LayerWork:
    if attention.kind == "none":
        return LayerWork()
    if attention.kind in ("linear", "mamba", "compressed"):
        return _state_mixer(arch, attention, layout, tokens)
    tp, products = layout.tp, _Sum()
    heads = attention.heads / tp
    if attention.kind in ("mla", "sparse_mla"):
        query = attention.heads * (attention.nope_dim + attention.rope_dim) / tp
        values = (attention.value_dim or attention.nope_dim) * attention.heads / tp
        if attention.q_rank:
            products.product(tokens / tp, arch.hidden, attention.q_rank)
            products.product(tokens, attention.q_rank, query)
        else:
            products.product(tokens, arch.hidden, query)
        products.product(tokens / tp, arch.hidden, attention.kv_rank + attention.rope_dim)
        products.product(tokens, attention.kv_rank, attention.nope_dim * attention.heads / tp + values)
        products.product(tokens, values, arch.hidden)
        kv_width = query + values
        passes = 3.0 * query + 2.0 * values
    else:
        dim = attention.head_dim
        values = (attention.value_dim or dim) * attention.heads / tp
        key_heads = 0.0 if attention.is_kv_shared else max(1.0, attention.kv_heads / tp)
        key_width = key_heads * (dim + ((attention.value_dim or dim) if attention.has_value else 0))
        gate = values if attention.has_output_gate else 0.0
        products.product(tokens, arch.hidden, heads * dim + key_width + gate)
        products.product(tokens, values, arch.hidden)
        kv_width = key_width
        passes = 3.0 * heads * dim + 2.0 * key_width
    context = mean_context(attention, layout.seq, arch.is_causal)
    flops = tokens * (2.0 * context * attention_width(attention) + _choosing_flops(attention, layout.seq)) / tp
    scores = 0.0
    if not layout.has_flash_attention:
        # An unfused kernel forms the whole square, masked half included.
        flops *= layout.seq / context
        scores = 2.0 * tokens * layout.seq * heads
    return LayerWork(
        linear_flops=products.flops,
        linear_bytes=products.bytes,
        attention_flops=flops,
        score_bytes=scores,
        mixer_bytes=2.0 * tokens * passes,
        kernels=_KERNELS_ATTENTION,
        params=products.params + attention.other_params / tp,
        kv_width=kv_width,
    )


def _state_mixer(arch: Architecture, attention: Attention, layout: TrainingLayout, tokens: float) -> LayerWork:
    """Layers whose projections are in `other_params`: linear and Mamba (a scan over a state), compressed attention."""
    tp = layout.tp
    projected = attention.other_params / tp
    products = _Sum()
    if projected:
        products.product(tokens, arch.hidden, projected / arch.hidden)
    inner = projected / (3.0 * arch.hidden)
    scores = 0.0
    if attention.kind == "compressed":
        context = mean_context(attention, layout.seq, arch.is_causal)
        scores = tokens * (2.0 * context * attention_width(attention) + _choosing_flops(attention, layout.seq)) / tp
    return LayerWork(
        linear_flops=products.flops,
        linear_bytes=products.bytes,
        attention_flops=scores,
        scan_flops=6.0 * tokens * attention.state_elements / tp,
        mixer_bytes=2.0 * tokens * inner * 12.0,
        kernels=_KERNELS_STATE,
        params=projected,
    )


def _feed_forward(arch: Architecture, part: FeedForward, layout: TrainingLayout, tokens: float) -> LayerWork:
    if part.kind == "none":
        return LayerWork()
    tp, gates = layout.tp, 2.0 if part.is_gated else 1.0
    products = _Sum()
    width = (part.width if part.kind == "dense" else part.shared_width) / tp
    if width:
        products.product(tokens, arch.hidden, gates * width)
        products.product(tokens, width, arch.hidden)
    width_bytes = 2.0 * tokens * width * (gates + 2.0)
    if part.kind == "dense":
        return LayerWork(
            linear_flops=products.flops,
            linear_bytes=products.bytes,
            width_bytes=width_bytes,
            kernels=_KERNELS_DENSE,
            params=products.params + part.other_params / tp,
        )
    products.product(tokens / tp, arch.hidden, part.experts)
    return _experts(arch, part, layout, tokens, products, width_bytes)


def _experts(
    arch: Architecture, part: FeedForward, layout: TrainingLayout, tokens: float, shared: _Sum, width_bytes: float
) -> LayerWork:
    """Routed experts: `ep` ranks hold `experts / ep` each and receive as many token copies as they send."""
    gates = 2.0 if part.is_gated else 1.0
    expert_tp = layout.expert_tp or (layout.tp if layout.ep == 1 else 1)
    local = max(1.0, part.experts / layout.ep)
    # With expert_tp below tp, each tp rank routes its own share of the tokens.
    sent = tokens * part.active * expert_tp / layout.tp
    received = sent * layout.expert_imbalance
    rows = received / local
    model_width = float(part.latent or arch.hidden)
    width = part.width / expert_tp
    experts = _Sum()
    experts.product(rows, model_width, gates * width, local)
    experts.product(rows, width, model_width, local)
    if part.latent:
        shared.product(tokens / layout.tp, arch.hidden, part.latent, 2.0)
    return LayerWork(
        linear_flops=shared.flops,
        linear_bytes=shared.bytes,
        expert_flops=experts.flops,
        expert_bytes=experts.bytes,
        small_rows_flops=experts.flops * 128.0 / max(rows, 1.0),
        width_bytes=width_bytes + 2.0 * received * width * (gates + 2.0),
        permute_bytes=2.0 * sent * model_width * 6.0,
        routed_tokens=sent,
        routed_width=model_width,
        kernels=_KERNELS_DENSE + _KERNELS_MOE + math.log2(max(local, 1.0)),
        moe_kernels=_KERNELS_MOE,
        params=shared.params + experts.params + part.other_params / layout.tp,
        expert_params=experts.params,
    )
