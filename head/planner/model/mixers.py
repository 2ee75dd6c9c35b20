"""Token mixers of one layer, from a configuration: attention in its forms, linear attention and state-space layers.

Each function answers an Attention. What has no form of its own there (the projections of linear, state-space and
compressed layers) is counted exactly in `other_params`.
"""

from __future__ import annotations

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Attention, AttentionKind
from head.planner.model.families import Family
from head.planner.model.fields import HEADS, TOKENS, Fields


def attention_of(fields: Fields, family: Family, hidden: int, kind: AttentionKind, layer: int) -> Attention:
    """Softmax attention over all tokens or a window of them."""
    if fields.has("kv_lora_rank"):
        return latent_attention(fields, family, hidden, layer)
    is_local = kind in ("sliding", "chunked")
    heads = _own(fields, "swa_num_attention_heads", is_local, fields.at("num_attention_heads", layer, 0))
    if not 0 < heads <= HEADS:
        raise InvalidValue("num_attention_heads must be at least 1", field="num_attention_heads")
    head_dim = fields.integer("head_dim", 0)
    if not head_dim:
        if hidden % heads:
            raise InvalidValue(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given",
                field="num_attention_heads",
            )
        head_dim = hidden // heads
    kv_heads = heads if family.has_one_head_count else _kv_heads(fields, heads, layer)
    if is_local:
        doubled = 2 * kv_heads if family.has_double_local_heads else kv_heads
        kv_heads = fields.integer("swa_num_key_value_heads", doubled)
        head_dim = fields.integer("swa_head_dim", head_dim)
    else:
        kv_heads = fields.integer("num_global_key_value_heads", kv_heads)
        head_dim = fields.integer("global_head_dim", head_dim) or head_dim
    if not kv_heads or heads % kv_heads:
        raise InvalidValue(
            f"{heads} heads cannot share {kv_heads} key/value heads equally", field="num_key_value_heads"
        )
    has_bias = fields.flag(family.bias_field, family.query_bias) if family.bias_field else family.query_bias
    output_bias = {"never": False, "always": True, "as_query": has_bias}[family.output_bias]
    qk_norm = family.qk_norm
    if qk_norm != "none" and family.qk_norm_field and not fields.flag(family.qk_norm_field, family.qk_norm_default):
        qk_norm = "none"
    norm_bias = 2 * head_dim if qk_norm == "head" and family.qk_norm_has_bias else 0
    shared = fields.integer("num_kv_shared_layers", 0)
    is_shared = shared > 0 and layer >= fields.integer("num_hidden_layers") - shared
    return Attention(
        kind=kind,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=_own(fields, "swa_v_head_dim", is_local, fields.integer("v_head_dim", 0)),
        window=window_of(fields, kind),
        has_bias=has_bias,
        has_output_bias=output_bias,
        has_output_gate=fields.flag("attn_output_gate", family.has_output_gate),
        qk_norm=qk_norm,
        has_sinks=_has_sinks(fields, family, is_local),
        is_kv_shared=is_shared,
        has_value=is_local or not fields.flag("attention_k_eq_v"),
        other_params=norm_bias,
    )


def window_of(fields: Fields, kind: AttentionKind) -> int:
    """Tokens that a local layer sees; 0: all."""
    if kind == "sliding":
        for name in ("sliding_window", "sliding_window_size", "local_attention"):
            if window := fields.integer(name, 0, high=TOKENS):
                return window
    if kind == "chunked":
        return fields.integer("attention_chunk_size", 0, high=TOKENS)
    return 0


def latent_attention(fields: Fields, family: Family, hidden: int, layer: int) -> Attention:
    """Multi-head latent attention, with an indexer where the configuration has one."""
    has_bias = fields.flag("attention_bias", False)
    index_heads = fields.integer("index_n_heads", 0)
    types = fields.sequence("indexer_types")
    if types is not None and layer < len(types) and types[layer] != "full":
        index_heads = 0  # takes the choice of the layer before
    heads, value_dim = fields.integer("num_attention_heads", low=1), fields.integer("v_head_dim", low=1)
    is_sparse = bool(fields.integer("index_topk", 0))
    return Attention(
        kind="sparse_mla" if is_sparse else "mla",
        heads=heads,
        kv_heads=1,
        head_dim=fields.integer("qk_nope_head_dim", low=1) + fields.integer("qk_rope_head_dim"),
        other_params=hidden * heads * value_dim if fields.flag("mla_use_output_gate") else 0,
        value_dim=value_dim,
        has_bias=has_bias,
        has_output_bias=has_bias,
        q_rank=fields.integer("q_lora_rank", 0),
        kv_rank=fields.integer("kv_lora_rank", low=1),
        nope_dim=fields.integer("qk_nope_head_dim", low=1),
        rope_dim=fields.integer("qk_rope_head_dim"),
        index_heads=index_heads,
        index_dim=fields.integer("index_head_dim", 128) if index_heads else 0,
        index_top=fields.integer("index_topk", 0),
    )


def compressed_attention(fields: Fields, hidden: int, ratio: int) -> Attention:
    """One shared key/value head over a window and over compressed blocks of `ratio` tokens (0: the window only).

    Ratio 4 blocks overlap (two projections) and an indexer chooses among them; wider blocks are all read.
    Source: the DeepSeek-V4 implementation in `transformers` (compressor, indexer, grouped output projection).
    """
    heads = fields.integer("num_attention_heads", low=1)
    head_dim = fields.integer("head_dim", low=1)
    q_rank = fields.integer("q_lora_rank", low=1)
    o_rank = fields.integer("o_lora_rank", low=1)
    groups = fields.integer("o_groups", heads // 8 or 1, low=1)
    index_heads = fields.integer("index_n_heads", 0)
    index_dim = fields.integer("index_head_dim", 0)
    total = heads + hidden * q_rank + q_rank + q_rank * heads * head_dim + hidden * head_dim + head_dim
    total += groups * o_rank * (heads * head_dim // groups) + groups * o_rank * hidden
    is_indexed = 0 < ratio < 64
    if ratio:
        total += _compressor(hidden, head_dim, ratio, 2 if is_indexed else 1)
    if is_indexed:
        total += _compressor(hidden, index_dim, ratio, 2) + q_rank * index_heads * index_dim + hidden * index_heads
    return Attention(
        kind="compressed",
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        window=fields.integer("sliding_window", 128, high=TOKENS),
        has_sinks=True,
        q_rank=q_rank,
        rope_dim=fields.integer("qk_rope_head_dim", 64),
        index_heads=index_heads if is_indexed else 0,
        index_dim=index_dim if is_indexed else 0,
        index_top=fields.integer("index_topk", 512) if is_indexed else 0,
        compress_ratio=ratio,
        has_value=False,
        other_params=total,
    )


def gated_delta(fields: Fields, hidden: int) -> Attention:
    """Gated DeltaNet: keys and values through a short convolution into a matrix per value head."""
    heads = fields.integer("num_attention_heads", 1, low=1)
    value_heads = fields.integer("linear_num_value_heads", heads, low=1)
    key_heads = fields.integer("linear_num_key_heads", value_heads, low=1)
    key_dim = fields.integer("linear_key_head_dim", 3 * hidden // (4 * heads), low=1)
    value_dim = fields.integer("linear_value_head_dim", 2 * key_dim, low=1)
    kernel = fields.integer("linear_conv_kernel_dim", 4, low=1)
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    total = hidden * (channels + values + 2 * value_heads) + channels * kernel
    total += 2 * value_heads + value_dim + values * hidden
    return Attention(
        kind="linear",
        heads=value_heads,
        kv_heads=key_heads,
        head_dim=key_dim,
        value_dim=value_dim,
        state_elements=value_heads * key_dim * value_dim,
        conv_elements=channels * (kernel - 1),
        other_params=total,
    )


def kimi_delta(fields: Fields, hidden: int) -> Attention:
    """Kimi Delta Attention: a delta rule with a gate per channel, gates through low-rank projections."""
    inner = fields.mapping("linear_attn_config") or {}
    own = Fields(inner, {"num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4})
    heads = own.integer("num_heads", low=1, high=HEADS)
    head_dim = fields.integer("linear_head_dim", own.integer("head_dim", low=1))
    kernel = own.integer("short_conv_kernel_size", 4, low=1)
    width = heads * head_dim
    total = 4 * hidden * width + 3 * width * kernel + width + heads + 2 * (hidden * head_dim + head_dim * width)
    total += hidden * heads + head_dim
    if own.flag("use_full_rank_gate"):
        total += hidden * width - hidden * head_dim - head_dim * width
    return Attention(
        kind="linear",
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        state_elements=heads * head_dim * head_dim,
        conv_elements=3 * width * (kernel - 1),
        other_params=total,
    )


def lightning(fields: Fields, hidden: int) -> Attention:
    """Lightning attention (MiniMax-Text): linear attention with a decay per head, a norm and an output gate."""
    heads = fields.integer("num_attention_heads", low=1)
    head_dim = fields.integer("head_dim", 0) or hidden // heads
    width = heads * head_dim
    return Attention(
        kind="linear",
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        state_elements=heads * head_dim * head_dim,
        other_params=5 * hidden * width + width,
    )


def short_convolution(fields: Fields, hidden: int) -> Attention:
    """A gated short convolution (LFM2)."""
    kernel = fields.integer("conv_L_cache", 3, low=1)
    has_bias = fields.flag("conv_bias")
    total = 4 * hidden * hidden + hidden * (kernel + has_bias) + (4 * hidden if has_bias else 0)
    return Attention(kind="mamba", heads=1, conv_elements=hidden * (kernel - 1), other_params=total)


def hybrid(attention: Attention, recurrent: Attention) -> Attention:
    """Attention and a state-space layer side by side (Falcon-H1)."""
    return msgspec.structs.replace(
        attention,
        state_elements=recurrent.state_elements,
        conv_elements=recurrent.conv_elements,
        other_params=attention.other_params + recurrent.other_params,
    )


def mamba2(fields: Fields, hidden: int) -> Attention:
    """A Mamba-2 layer: gate, convolved inputs and two group projections, one time step per head."""
    heads = fields.integer("mamba_num_heads", fields.integer("mamba_n_heads", fields.integer("num_heads", 0)), low=1)
    named = "mamba_d_head" if fields.raw("mamba_d_head") not in (None, "auto") else "mamba_head_dim"
    head_dim = fields.integer(named, fields.integer("head_dim", 64), low=1)
    state = fields.integer("ssm_state_size", fields.integer("mamba_d_state", fields.integer("state_size", 128)), low=1)
    groups = fields.integer("n_groups", fields.integer("mamba_n_groups", 1), low=1)
    kernel = fields.integer("conv_kernel", fields.integer("mamba_d_conv", 4), low=1)
    has_bias = fields.flag("mamba_proj_bias", fields.flag("use_bias"))
    has_conv_bias = fields.flag("use_conv_bias", fields.flag("mamba_conv_bias", True))
    if fields.has("mamba_n_heads") and fields.raw("mamba_d_head") in (None, "auto"):
        head_dim = fields.integer("mamba_expand", 2) * hidden // heads
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    projected = inner + channels + heads
    total = hidden * projected + channels * (kernel + has_conv_bias) + 3 * heads
    total += inner * hidden + (projected + hidden if has_bias else 0)
    total += inner if fields.flag("mamba_rms_norm", True) else 0
    return Attention(
        kind="mamba",
        heads=heads,
        kv_heads=groups,
        head_dim=head_dim,
        state_elements=inner * state,
        conv_elements=channels * (kernel - 1),
        other_params=total,
    )


def mamba1(fields: Fields, hidden: int, *, has_inner_norms: bool = False) -> Attention:
    """A Mamba layer: one state row per inner channel."""
    inner = fields.integer("mamba_intermediate_size", 0)
    if not inner:
        expand = fields.number("mamba_expand", fields.number("expand", 2.0), low=0.01, high=64)
        inner = int(expand * hidden)
    state = fields.integer("mamba_d_state", fields.integer("state_size", 16), low=1)
    kernel = fields.integer("mamba_d_conv", fields.integer("conv_kernel", 4), low=1)
    rank_name = "mamba_dt_rank" if fields.has("mamba_dt_rank") else "time_step_rank"
    rank = -(-hidden // 16)
    if fields.raw(rank_name) not in (None, "auto"):
        rank = fields.integer(rank_name, low=1)
    has_bias = fields.flag("mamba_proj_bias", fields.flag("use_bias"))
    has_conv_bias = fields.flag("mamba_conv_bias", fields.flag("use_conv_bias", True))
    total = hidden * 2 * inner + inner * (kernel + has_conv_bias) + inner * (rank + 2 * state)
    total += rank * inner + inner + inner * state + inner + inner * hidden
    total += 2 * inner + hidden if has_bias else 0
    total += rank + 2 * state if has_inner_norms else 0
    return Attention(
        kind="mamba",
        heads=inner,
        kv_heads=1,
        head_dim=1,
        state_elements=inner * state,
        conv_elements=inner * (kernel - 1),
        other_params=total,
    )


def _compressor(hidden: int, width: int, ratio: int, copies: int) -> int:
    """Weighted averages of `ratio` tokens: values, gates, a bias per place, one norm."""
    return 2 * hidden * width * copies + ratio * width * copies + width


def _kv_heads(fields: Fields, heads: int, layer: int) -> int:
    if fields.flag("multi_query") and not fields.flag("new_decoder_architecture"):
        return 1
    if fields.has("num_key_value_heads"):
        return fields.at("num_key_value_heads", layer, heads)
    return fields.integer("num_key_value_heads", heads)


def _own(fields: Fields, name: str, is_local: bool, otherwise: int) -> int:
    return fields.integer(name, otherwise) if is_local else otherwise


def _has_sinks(fields: Fields, family: Family, is_local: bool) -> bool:
    name = "add_swa_attention_sink_bias" if is_local else "add_full_attention_sink_bias"
    return fields.flag(name, family.has_sinks)
