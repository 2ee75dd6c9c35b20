"""Exact parameter counts of an architecture, part by part.

Every count is an integer and every whole is the sum of its parts. "Active" is what one token touches; cards quote it in
three ways, so all three are returned: with both embeddings, without the input embedding, without either.
"""

from __future__ import annotations

import msgspec

from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup, NormKind

_NORM_WIDTHS: dict[NormKind, int] = {"rms": 1, "layer": 2, "layer_no_bias": 1, "none": 0}


class LayerParameters(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one layer of a group. `active` is the part that one token touches."""

    count: int  # layers of the group
    attention: int
    routed_experts: int
    router: int
    shared_experts: int
    dense_feed_forward: int
    norms: int
    other: int
    active: int

    @property
    def feed_forward(self) -> int:
        """Everything but the token mixer and the norms."""
        return self.routed_experts + self.router + self.shared_experts + self.dense_feed_forward

    @property
    def total(self) -> int:
        """One whole layer."""
        return self.attention + self.feed_forward + self.norms + self.other


class ParameterCount(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a model. `total` counts a tied embedding once and leaves the `mtp` layers out."""

    total: int
    input_embedding: int  # token table(s) looked up at the input
    positions: int  # learned position and token-type tables
    head: int  # output matrix and its bias; 0 when tied or absent (the bias stays)
    non_embedding: int  # total - input_embedding - positions - head
    routed_experts: int
    active: int
    active_no_input_embedding: int
    active_no_embeddings: int
    final: int  # norms outside the layers and parameters that no other part names
    mtp: int
    groups: tuple[LayerParameters, ...]

    @property
    def embedding(self) -> int:
        """All embedding tables and the output head."""
        return self.input_embedding + self.positions + self.head


def count(architecture: Architecture) -> ParameterCount:
    """Exact counts. Active without input embedding keeps a tied table, because the output head multiplies by it.

    Source: the parameter shapes of the published implementations of each family.
    """
    groups = tuple(layer_parameters(architecture, group) for group in architecture.groups)
    hidden = architecture.hidden
    table = architecture.vocab * architecture.input_width
    inputs = table + architecture.other_embedding_params
    position_width = architecture.position_width or architecture.input_width
    positions = (architecture.positions + architecture.types) * position_width
    head = head_parameters(architecture)
    final = norm_parameters(architecture.final_norm, hidden) + architecture.other_params
    final += architecture.embedding_norms * norm_parameters(architecture.embedding_norm, architecture.input_width)
    layers = sum(group.total * group.count for group in groups)
    routed = sum(group.routed_experts * group.count for group in groups)
    total = inputs + positions + head + layers + final
    idle = sum((group.total - group.active) * group.count for group in groups)
    active = total - idle
    is_table_head = architecture.is_tied and architecture.has_head
    untouched = inputs + positions - (table if is_table_head else 0)
    return ParameterCount(
        total=total,
        input_embedding=inputs,
        positions=positions,
        head=head,
        non_embedding=total - inputs - positions - head,
        routed_experts=routed,
        active=active,
        active_no_input_embedding=active - untouched,
        active_no_embeddings=active - inputs - positions - head,
        final=final,
        mtp=_mtp_parameters(architecture, groups),
        groups=groups,
    )


def layer_parameters(architecture: Architecture, group: LayerGroup) -> LayerParameters:
    """One layer of `group`."""
    hidden = architecture.hidden
    attention = attention_parameters(group.attention, hidden)
    feed_forward = group.feed_forward
    norms = group.norms * norm_parameters(group.norm, hidden)
    routed = router = shared = dense = idle = 0
    if feed_forward.kind == "dense":
        dense = projection_parameters(feed_forward, hidden, feed_forward.width) + feed_forward.other_params
    elif feed_forward.kind == "moe":
        one = projection_parameters(feed_forward, feed_forward.latent or hidden, feed_forward.width)
        routed = feed_forward.experts * one
        idle = (feed_forward.experts - feed_forward.active) * one
        router = hidden * feed_forward.experts + feed_forward.has_router_bias * feed_forward.experts
        shared = _gates(feed_forward) * hidden * feed_forward.shared_width + feed_forward.has_shared_gate * hidden
        dense = _gates(feed_forward) * hidden * feed_forward.dense_width
        dense += 2 * hidden * feed_forward.latent + feed_forward.other_params
    whole = attention + routed + router + shared + dense + norms + group.other_params
    return LayerParameters(
        count=group.count,
        attention=attention,
        routed_experts=routed,
        router=router,
        shared_experts=shared,
        dense_feed_forward=dense,
        norms=norms,
        other=group.other_params,
        active=whole - idle,
    )


def attention_parameters(attention: Attention, hidden: int) -> int:
    """One layer's token mixer: projections, biases, norms of queries and keys, sinks, indexer."""
    if attention.kind in ("mla", "sparse_mla"):
        return _latent_parameters(attention, hidden) + attention.other_params
    if attention.kind in ("compressed", "linear", "mamba", "none"):
        return attention.other_params
    queries = attention.heads * attention.head_dim
    keys = 0 if attention.is_kv_shared else attention.kv_heads * attention.head_dim
    value_dim = attention.value_dim or attention.head_dim
    values = attention.kv_heads * value_dim if attention.has_value and not attention.is_kv_shared else 0
    outputs = attention.heads * value_dim
    total = hidden * (queries + keys + values) + outputs * hidden
    total += hidden * outputs if attention.has_output_gate else 0
    total += queries + keys + values if attention.has_bias else 0
    total += hidden if attention.has_output_bias else 0
    if attention.qk_norm == "head":
        total += attention.head_dim * (1 if attention.is_kv_shared else 2)
    elif attention.qk_norm == "full":
        total += queries + keys
    total += attention.heads if attention.has_sinks else 0
    return total + attention.other_params


def projection_parameters(feed_forward: FeedForward, inner: int, width: int) -> int:
    """One expert, or one dense feed-forward part, from `inner` to `width` and back."""
    bias = (_gates(feed_forward) - 1) * width + inner if feed_forward.has_bias else 0
    return _gates(feed_forward) * inner * width + bias


def head_parameters(architecture: Architecture) -> int:
    """The output matrix when it is not the input embedding, and its bias."""
    if not architecture.has_head:
        return 0
    matrix = 0 if architecture.is_tied else architecture.vocab * architecture.input_width
    return matrix + (architecture.vocab if architecture.has_head_bias else 0)


def norm_parameters(kind: NormKind, width: int) -> int:
    """One norm over `width` elements."""
    return _NORM_WIDTHS[kind] * width


def _gates(feed_forward: FeedForward) -> int:
    return 3 if feed_forward.is_gated else 2


def _latent_parameters(attention: Attention, hidden: int) -> int:
    head = attention.nope_dim + attention.rope_dim
    value = attention.value_dim or attention.head_dim
    if attention.q_rank:
        total = hidden * attention.q_rank + attention.q_rank + attention.q_rank * attention.heads * head
        total += attention.q_rank if attention.has_bias else 0
    else:
        total = hidden * attention.heads * head
    total += hidden * (attention.kv_rank + attention.rope_dim) + attention.kv_rank
    total += attention.kv_rank + attention.rope_dim if attention.has_bias else 0
    total += attention.kv_rank * attention.heads * (attention.nope_dim + value)
    total += attention.heads * value * hidden + (hidden if attention.has_output_bias else 0)
    if attention.index_heads:
        # queries from the query latent, one key for all heads with a LayerNorm, one weight per head
        total += (attention.q_rank or hidden) * attention.index_heads * attention.index_dim
        total += hidden * attention.index_dim + 2 * attention.index_dim + hidden * attention.index_heads
    return total


def _mtp_parameters(architecture: Architecture, groups: tuple[LayerParameters, ...]) -> int:
    """Extra prediction layers: one more last layer each, a projection of two hidden states, three norms.

    Source: DeepSeek-V3 report, section 2.2 (embedding and head are shared and not counted again).
    """
    if not architecture.mtp_layers or not groups:
        return 0
    hidden = architecture.hidden
    extra = 2 * hidden * hidden + 3 * norm_parameters(architecture.final_norm, hidden)
    return architecture.mtp_layers * (groups[-1].total + extra)
