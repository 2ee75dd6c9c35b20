"""The dimensions of a model, as its arithmetic needs them.

A model is embeddings, a list of layer groups (equal layers, in order of first appearance) and an output head. All
counts, FLOPs and bytes follow from these numbers; nothing here knows a model by its name.
"""

from __future__ import annotations

from typing import Literal

import msgspec

AttentionKind = Literal["full", "sliding", "chunked", "mla", "sparse_mla", "compressed", "linear", "mamba", "none"]
FeedForwardKind = Literal["dense", "moe", "none"]
NormKind = Literal["rms", "layer", "layer_no_bias", "none"]


class Attention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer's token mixer. Widths are numbers of elements; `window` is in tokens.

    full/sliding/chunked: `heads` query heads and `kv_heads` key/value heads of `head_dim` (values of `value_dim`).
    mla: queries through `q_rank` (0: none), keys and values through the latent `kv_rank`, `rope_dim` shared.
    sparse_mla: the same with an indexer that chooses `index_top` tokens. compressed: one shared key/value of `head_dim`
    for each token of the `window` and one for each `compress_ratio` tokens before it (0: the window only). linear and
    mamba: a state of `state_elements` per sequence (and `conv_elements` for the short convolution) instead of keys and
    values. The projections of compressed, linear and mamba layers are in `other_params`.
    """

    kind: AttentionKind = "full"
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0  # 0: as head_dim
    window: int = 0  # tokens; 0: all
    has_bias: bool = False  # on q, k and v
    has_output_bias: bool = False
    has_output_gate: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # over one head, or over all heads at once
    has_sinks: bool = False  # one learned logit per head
    q_rank: int = 0
    kv_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_top: int = 0
    compress_ratio: int = 0
    is_kv_shared: bool = False  # reads the keys and values of an earlier layer: no projection, no cache of its own
    has_value: bool = True  # False: the values are the keys (no value projection)
    state_elements: int = 0
    conv_elements: int = 0
    other_params: int = 0  # what the form above does not name (projections of linear and mamba layers, ...)


class FeedForward(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer's feed-forward part. dense: `width`; moe: `experts` of `width`, `active` of them for each token."""

    kind: FeedForwardKind = "dense"
    width: int = 0
    is_gated: bool = True
    has_bias: bool = False
    experts: int = 0
    active: int = 0
    shared_width: int = 0  # all shared experts together
    has_shared_gate: bool = False
    has_router_bias: bool = False
    latent: int = 0  # experts work on this width; 0: on the hidden one
    dense_width: int = 0  # a dense part beside the experts, for every token
    other_params: int = 0


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` equal layers."""

    count: int
    attention: Attention
    feed_forward: FeedForward
    norm: NormKind = "rms"
    norms: int = 2  # per layer, each over the hidden width
    other_params: int = 0
    kind: str = ""  # the config's word for this layer, when it has one


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole model. `source` says where the dimensions come from: preset, config, headers, registered, given."""

    name: str
    hidden: int
    vocab: int
    groups: tuple[LayerGroup, ...]
    is_tied: bool = False  # the output head is the input embedding
    has_head: bool = True  # False: an encoder that answers with vectors
    is_causal: bool = True
    has_head_bias: bool = False
    positions: int = 0  # rows of a learned position table
    context: int = 0  # tokens that the model was made for; 0: not said
    embedding_width: int = 0  # when it differs from `hidden`
    final_norm: NormKind = "rms"
    embedding_norms: int = 0  # norms over the embeddings, before the first layer
    embedding_norm: NormKind = "none"
    position_width: int = 0  # of the position and type tables, when it differs from the input embedding's
    types: int = 0  # rows of a token-type table
    other_params: int = 0
    other_embedding_params: int = 0  # tables looked up by token beside the input embedding (per-layer embeddings, ...)
    mtp_layers: int = 0  # extra multi-token-prediction layers, not counted in totals
    weights_dtype: str = "bf16"
    quantisation: str = ""  # as the config names it (fp8, awq, mxfp4, ...); empty: none
    kv_dtype: str = ""  # as the config asks; empty: as the weights' compute type
    family: str = ""  # the config's model_type, or what stands for it
    source: str = "given"
    notes: tuple[str, ...] = ()  # what was assumed where the input did not say

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(group.count for group in self.groups)

    @property
    def input_width(self) -> int:
        """Width of one row of the input embedding."""
        return self.embedding_width or self.hidden

    @property
    def is_moe(self) -> bool:
        """Whether any layer chooses experts."""
        return any(group.feed_forward.kind == "moe" for group in self.groups)
