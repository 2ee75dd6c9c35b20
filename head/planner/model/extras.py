"""Parts that single families have besides their layers' usual ones: small, but counts are exact."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from head.planner.model.architecture import Architecture, LayerGroup
from head.planner.model.fields import Fields
from head.planner.model.parameters import layer_parameters

_POOLED = ("bert", "roberta", "xlm-roberta", "camembert", "ernie", "mpnet", "xlm-roberta-xl", "albert", "megatron-bert")
_replace = msgspec.structs.replace


def with_extras(architecture: Architecture, fields: Fields, model_type: str) -> Architecture:
    """The architecture with its family's other parameters. A pooler counts as the model's own (BertModel has one)."""
    hidden = architecture.hidden
    width = architecture.input_width
    name = model_type.removesuffix("_text")
    if name in _POOLED:
        architecture = _replace(architecture, other_params=architecture.other_params + hidden * hidden + hidden)
    if name in ("electra", "albert") and width != hidden:
        architecture = _replace(architecture, other_params=architecture.other_params + width * hidden + hidden)
    if name in _FAMILIES:
        architecture = _FAMILIES[name](architecture, fields)
    return architecture


def _each(architecture: Architecture, extra: Callable[[LayerGroup], int]) -> Architecture:
    """`extra(group)` more parameters in each layer of each group."""
    groups = tuple(_replace(group, other_params=group.other_params + extra(group)) for group in architecture.groups)
    return _replace(architecture, groups=groups)


def _opt(architecture: Architecture, fields: Fields) -> Architecture:
    """Narrow embeddings are projected in and out; models that norm after each part have no last norm."""
    width, hidden = architecture.input_width, architecture.hidden
    if width != hidden:
        architecture = _replace(architecture, position_width=hidden, other_params=2 * width * hidden)
    if not fields.flag("do_layer_norm_before", True):
        architecture = _replace(architecture, final_norm="none")
    return architecture


def _deepseek_v4(architecture: Architecture, fields: Fields) -> Architecture:
    """Hyper-connections: several residual streams, mixed before and after both parts of each layer."""
    copies = fields.integer("hc_mult", 4, low=1)
    mixes = (2 + copies) * copies
    each = 2 * (mixes * copies * architecture.hidden + mixes + 3)
    head = copies * copies * architecture.hidden + copies + 1
    return _replace(_each(architecture, lambda group: each), other_params=head)


def _gemma4(architecture: Architecture, fields: Fields) -> Architecture:
    """Per-layer embeddings, and beside experts a scale of the router's input and of each expert, and three norms."""
    hidden = architecture.hidden
    width = fields.integer("hidden_size_per_layer_input", 0)

    def extra(group: LayerGroup) -> int:
        total = 2 * hidden * width + hidden if width else 0
        if group.feed_forward.kind == "moe":
            total += 3 * hidden + hidden + group.feed_forward.experts
        return total

    architecture = _each(architecture, extra)
    if not width:
        return architecture
    rows = fields.integer("vocab_size_per_layer_input", architecture.vocab)
    layers = architecture.layers
    return _replace(
        architecture,
        other_embedding_params=rows * layers * width,
        other_params=hidden * layers * width + width,
    )


def _gemma3n(architecture: Architecture, fields: Fields) -> Architecture:
    """Per-layer embeddings, low-rank residuals (Laurel) and several predicted streams (AltUp)."""
    hidden, layers = architecture.hidden, architecture.layers
    width = fields.integer("hidden_size_per_layer_input", low=1)
    streams = fields.integer("altup_num_inputs", low=1)
    rank = fields.integer("laurel_rank", low=1)
    each = hidden + streams**2 + streams**3 + streams * hidden + hidden  # AltUp
    each += 2 * rank * hidden + hidden + 2 * width * hidden + hidden  # Laurel, then the per-layer input
    rows = fields.integer("vocab_size_per_layer_input", low=1)
    return _replace(
        _each(architecture, lambda group: each),
        other_embedding_params=rows * layers * width,
        other_params=hidden * layers * width + width + 2 * (streams - 1) * hidden * hidden,
    )


def _apertus(architecture: Architecture, fields: Fields) -> Architecture:
    """xIELU learns two numbers in each layer."""
    return _each(architecture, lambda group: 2)


def _bitnet(architecture: Architecture, fields: Fields) -> Architecture:
    """A norm more inside each part."""
    return _each(architecture, lambda group: architecture.hidden + group.feed_forward.width)


def _diffllama(architecture: Architecture, fields: Fields) -> Architecture:
    """Four vectors for the weight of the subtracted attention."""
    return _each(architecture, lambda group: 4 * group.attention.head_dim)


def _modernbert(architecture: Architecture, fields: Fields) -> Architecture:
    """The first layer has no norm before attention (the embeddings have been normed)."""
    return _replace(architecture, other_params=architecture.other_params - architecture.hidden)


def _mpnet(architecture: Architecture, fields: Fields) -> Architecture:
    """One table of relative positions."""
    buckets = fields.integer("relative_attention_num_buckets", 32)
    extra = buckets * architecture.groups[0].attention.heads
    return _replace(architecture, other_params=architecture.other_params + extra)


def _roformer(architecture: Architecture, fields: Fields) -> Architecture:
    """Fixed rotary tables, which its file stores."""
    rows = fields.integer("max_position_embeddings", 1536)
    return _replace(architecture, other_params=rows * architecture.groups[0].attention.head_dim)


def _gte(architecture: Architecture, fields: Fields) -> Architecture:
    """Only the last matrix of the feed-forward part has a bias."""
    groups = tuple(
        _replace(
            group,
            feed_forward=_replace(group.feed_forward, has_bias=False),
            other_params=group.other_params + architecture.hidden,
        )
        for group in architecture.groups
    )
    return _replace(architecture, groups=groups)


def _albert(architecture: Architecture, fields: Fields) -> Architecture:
    """All layers share one layer's parameters: the file has them once."""
    groups = fields.integer("num_hidden_groups", 1, low=1)
    spared = max(0, architecture.layers - groups)
    layer = layer_parameters(architecture, architecture.groups[0]).total
    fields.note(f"layers share parameters: {spared} of them are not counted again")
    return _replace(architecture, other_params=architecture.other_params - spared * layer)


def _axk1(architecture: Architecture, fields: Fields) -> Architecture:
    """One norm more after experts."""
    return _each(architecture, lambda group: architecture.hidden if group.feed_forward.kind == "moe" else 0)


def _laguna(architecture: Architecture, fields: Fields) -> Architecture:
    """One gate per head."""
    return _each(architecture, lambda group: architecture.hidden * group.attention.heads)


def _mpt(architecture: Architecture, fields: Fields) -> Architecture:
    """Positions are learned where ALiBi is off."""
    attention = fields.mapping("attn_config") or {}
    has_alibi = attention.get("alibi", fields.raw("alibi"))
    if has_alibi is False and fields.flag("learned_pos_emb", True):
        return _replace(architecture, positions=fields.integer("max_position_embeddings", 2048))
    return architecture


def _t5(architecture: Architecture, fields: Fields) -> Architecture:
    """One table of relative positions, in the first layer."""
    buckets = fields.integer("relative_attention_num_buckets", 32)
    extra = buckets * architecture.groups[0].attention.heads
    return _replace(architecture, other_params=architecture.other_params + extra)


_FAMILIES: dict[str, Callable[[Architecture, Fields], Architecture]] = {
    "albert": _albert,
    "axk1": _axk1,
    "laguna": _laguna,
    "opt": _opt,
    "deepseek_v4": _deepseek_v4,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "apertus": _apertus,
    "bitnet": _bitnet,
    "diffllama": _diffllama,
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "roformer": _roformer,
    "gte": _gte,
    "new": _gte,
    "mpt": _mpt,
    "t5": _t5,
    "mt5": _t5,
    "umt5": _t5,
}
