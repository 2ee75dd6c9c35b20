"""What each model family does differently from a Llama block: one readable table.

A Llama block is: RMS norms before attention and feed-forward part, no biases, gated feed-forward part, separate output
head. A family is named by the `model_type` of its configuration; `defaults` are the values that its implementation
takes for fields that a configuration leaves out. Nothing here is a dimension of one model.

Source: the configuration and model classes of the `transformers` package, family by family.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from head.planner.model.architecture import NormKind

Mixers = Literal["", "gated_delta", "kimi_delta", "lightning", "mamba1", "mamba2", "conv", "rg_lru"]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How a family's layers are put together."""

    norm: NormKind = "rms"
    norms: int = 2
    is_gated: bool = True
    query_bias: bool = False  # on q, k and v, when the configuration does not say
    bias_field: str = "attention_bias"  # where the configuration says it
    output_bias: Literal["never", "always", "as_query"] = "as_query"
    feed_forward_bias: bool = False
    feed_forward_bias_field: str = "mlp_bias"
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_field: str = ""  # a flag that switches it; empty: always
    qk_norm_default: bool = True
    qk_norm_has_bias: bool = False
    is_tied: bool = False
    has_head: bool = True
    has_head_bias: bool = False
    is_causal: bool = True
    has_positions: bool = False  # a learned position table
    position_offset: int = 0
    types: int = 0
    embedding_norms: int = 0
    final_norm: NormKind | None = None  # None: as `norm`
    has_sinks: bool = False
    has_output_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    has_shared_gate: bool = False
    cycle: tuple[str, ...] = ()  # kinds of consecutive layers when the configuration does not say
    mixer: Mixers = ""  # of layers called linear, mamba or conv
    first_dense: bool = False
    is_window_optional: bool = False  # a window counts only when use_sliding_window says so
    has_window: bool = False  # a `sliding_window` of the configuration holds for every layer
    needs: tuple[str, ...] = ()  # fields that differ between its models and have no sensible default
    defaults: dict[str, Any] = {}


_LAYER = Family(norm="layer", is_gated=False, query_bias=True, feed_forward_bias=True)
_ENCODER = msgspec.structs.replace(
    _LAYER,
    has_head=False,
    is_causal=False,
    is_tied=True,
    has_positions=True,
    embedding_norms=1,
    final_norm="none",
    types=2,
    bias_field="",
    feed_forward_bias_field="",
    defaults={"max_position_embeddings": 512, "type_vocab_size": 2},
)
_DEEPSEEK = Family(
    output_bias="as_query",
    defaults={"n_shared_experts": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1},
)
_QWEN_NEXT = Family(
    qk_norm="head",
    has_output_gate=True,
    has_shared_gate=True,
    cycle=("linear", "linear", "linear", "full"),
    mixer="gated_delta",
    needs=("linear_num_value_heads",),
    defaults={
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "head_dim": 256,
    },
)
_GEMMA3 = Family(norms=4, qk_norm="head", is_tied=True, cycle=("sliding",) * 5 + ("full",), defaults={"head_dim": 256})
_GEMMA4 = msgspec.structs.replace(
    _GEMMA3,
    needs=("hidden_size_per_layer_input",),
    defaults={"head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": 256},
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(has_window=True),
    "mixtral": Family(has_window=True),
    "qwen2": Family(query_bias=True, bias_field="", output_bias="never", is_window_optional=True),
    "qwen2_moe": Family(
        query_bias=True, bias_field="qkv_bias", output_bias="never", has_shared_gate=True, is_window_optional=True
    ),
    "qwen3": Family(qk_norm="head", is_window_optional=True, defaults={"head_dim": 128}),
    "qwen3_moe": Family(qk_norm="head", is_window_optional=True, defaults={"shared_expert_intermediate_size": 0}),
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5": _QWEN_NEXT,
    "qwen3_5_moe": _QWEN_NEXT,
    "gemma": Family(is_tied=True, defaults={"head_dim": 256}),
    "gemma2": Family(norms=4, is_tied=True, cycle=("sliding", "full"), defaults={"head_dim": 256}),
    "gemma3": _GEMMA3,
    "gemma4": _GEMMA4,
    "phi": msgspec.structs.replace(
        _LAYER,
        norms=1,
        has_head_bias=True,
        bias_field="",
        output_bias="always",
        feed_forward_bias_field="",
        qk_norm="head",
        qk_norm_field="qk_layernorm",
        qk_norm_default=False,
        qk_norm_has_bias=True,
    ),
    "phi3": Family(),
    "gpt2": msgspec.structs.replace(
        _LAYER, is_tied=True, has_positions=True, defaults={"max_position_embeddings": 1024, "vocab_size": 50257}
    ),
    "gpt_neox": msgspec.structs.replace(_LAYER, feed_forward_bias_field=""),
    "gptj": Family(norm="layer", norms=1, is_gated=False, feed_forward_bias=True, has_head_bias=True),
    "opt": msgspec.structs.replace(
        _LAYER, is_tied=True, has_positions=True, position_offset=2, bias_field="enable_bias"
    ),
    "bloom": msgspec.structs.replace(_LAYER, is_tied=True, embedding_norms=1, bias_field=""),
    "falcon": Family(norm="layer", is_gated=False, is_tied=True, bias_field="bias", feed_forward_bias_field="bias"),
    "starcoder2": msgspec.structs.replace(
        _LAYER, is_tied=True, bias_field="use_bias", feed_forward_bias_field="use_bias", has_window=True
    ),
    "cohere": Family(
        norm="layer_no_bias",
        norms=1,
        is_tied=True,
        qk_norm="full",
        qk_norm_field="use_qk_norm",
        qk_norm_default=False,
    ),
    "cohere2": Family(norm="layer_no_bias", norms=1, is_tied=True, cycle=("sliding", "sliding", "sliding", "full")),
    "olmo": Family(norm="none"),
    "olmo2": Family(qk_norm="full"),
    "olmo3": Family(qk_norm="full", cycle=("sliding", "sliding", "sliding", "full")),
    "olmoe": Family(qk_norm="full"),
    "glm": Family(query_bias=True, output_bias="never", defaults={"head_dim": 128}),
    "glm4": Family(norms=4, query_bias=True, output_bias="never", defaults={"head_dim": 128}),
    "glm4_moe": Family(
        qk_norm="head",
        qk_norm_field="use_qk_norm",
        qk_norm_default=False,
        output_bias="never",
        defaults={"first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "glm_moe_dsa": msgspec.structs.replace(
        _DEEPSEEK,
        needs=("indexer_types", "index_n_heads"),
        defaults={**_DEEPSEEK.defaults, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048},
    ),
    "deepseek_v2": msgspec.structs.replace(_DEEPSEEK, defaults={"n_shared_experts": 2, "first_k_dense_replace": 0}),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": Family(
        needs=("o_groups",),
        defaults={
            "hc_mult": 4,
            "o_lora_rank": 1024,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "n_shared_experts": 1,
            "sliding_window": 128,
            "head_dim": 512,
        },
    ),
    "kimi_k2": _DEEPSEEK,
    "minimax_m2": Family(qk_norm="full", qk_norm_field="use_qk_norm"),
    "mimo_v2_flash": Family(defaults={"swa_num_key_value_heads": 8}, cycle=("full",) + ("sliding",) * 5),
    "llama4": Family(cycle=("chunked", "chunked", "chunked", "full")),
    "gpt_oss": Family(
        query_bias=True,
        has_sinks=True,
        router_bias=True,
        expert_bias=True,
        cycle=("sliding", "full"),
        defaults={"head_dim": 64},
    ),
    "nemotron_h": Family(
        is_gated=False,
        norms=1,
        mixer="mamba2",
        needs=("hybrid_override_pattern",),
        defaults={"head_dim": 128, "n_groups": 8, "ssm_state_size": 128, "n_shared_experts": 1},
    ),
}

# Other names of the same family.
SAME: dict[str, str] = {
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "llama4_text": "llama4",
}


def family_of(model_type: str) -> Family | None:
    """The family of a `model_type`; None when it is not known."""
    name = SAME.get(model_type, model_type)
    if name not in FAMILIES and name.endswith("_text"):
        name = SAME.get(name.removesuffix("_text"), name.removesuffix("_text"))
    return FAMILIES.get(name)
