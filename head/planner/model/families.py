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
from head.planner.model.fields import Fields

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
    has_head_bias: bool = False  # when the configuration's lm_head_bias does not say
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
    has_one_head_count: bool = False  # no grouped keys and values, whatever the configuration says
    post_norms_field: str = ""  # a flag for two more norms in each layer
    has_double_local_heads: bool = False  # local layers have twice the key/value heads, unless said
    ends_with_full: bool = False  # the last layer sees everything, whatever the cycle
    is_compressed: bool = False  # DeepSeek-V4: windows with compressed blocks behind them
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
    ends_with_full=True,
    needs=("hidden_size_per_layer_input",),
    defaults={"head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": 256},
)

FAMILIES: dict[str, Family] = {
    "gemma3n": msgspec.structs.replace(
        _GEMMA3,
        cycle=("sliding",) * 4 + ("full",),
        defaults={
            "head_dim": 256,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144,
            "laurel_rank": 64,
            "altup_num_inputs": 4,
            "num_kv_shared_layers": 15,
        },
    ),
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
        _LAYER,
        is_tied=True,
        has_positions=True,
        position_offset=2,
        bias_field="enable_bias",
        feed_forward_bias_field="enable_bias",
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
        is_compressed=True,
        cycle=("compressed:128", "compressed:4"),
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
    "minimax_m2": Family(qk_norm="full", qk_norm_field="use_qk_norm", defaults={"head_dim": 128}),
    "minimax_m3": Family(qk_norm="head", defaults={"head_dim": 128}),
    "mimo_v2_flash": Family(
        has_double_local_heads=True,
        defaults={"first_k_dense_replace": 1, "head_dim": 192, "v_head_dim": 128, "add_swa_attention_sink_bias": True},
        cycle=("full",) + ("sliding",) * 5,
    ),
    "llama4": Family(
        defaults={"head_dim": 128, "interleave_moe_layer_step": 1}, cycle=("chunked", "chunked", "chunked", "full")
    ),
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
    "ministral": Family(has_window=True, defaults={"head_dim": 128}),
    "ministral3": Family(defaults={"head_dim": 128}),
    "qwen": Family(query_bias=True, output_bias="never", bias_field="", has_one_head_count=True),
    "vaultgemma": Family(is_tied=True, cycle=("sliding", "full"), defaults={"head_dim": 256}),
    "phimoe": Family(norm="layer", defaults={"num_experts_per_tok": 2}),
    "gpt_bigcode": msgspec.structs.replace(
        _LAYER, is_tied=True, has_positions=True, bias_field="", defaults={"multi_query": True}
    ),
    "gpt_neo": msgspec.structs.replace(
        _LAYER, is_tied=True, has_positions=True, query_bias=False, output_bias="always", bias_field=""
    ),
    "megatron_gpt": msgspec.structs.replace(_LAYER, is_tied=True, has_positions=True),
    "codegen": Family(norm="layer", norms=1, is_gated=False, feed_forward_bias=True, has_head_bias=True),
    "flex_olmo": Family(qk_norm="full"),
    "olmo_hybrid": Family(qk_norm="full", mixer="gated_delta", cycle=("linear", "linear", "linear", "full")),
    "glm4_moe_lite": Family(defaults={"first_k_dense_replace": 1, "n_shared_experts": 1}),
    "minimax": Family(mixer="lightning", cycle=("full", "linear")),
    "nemotron": Family(norm="layer", is_gated=False),
    "arcee": Family(is_gated=False),
    "apertus": Family(is_gated=False, qk_norm="head"),
    "smollm3": Family(is_tied=True),
    "mamba": Family(norms=1, is_tied=True, mixer="mamba1", cycle=("mamba",)),
    "falcon_mamba": Family(norms=1, is_tied=True, mixer="mamba1", cycle=("mamba",)),
    "mamba2": Family(norms=1, mixer="mamba2", cycle=("mamba",), defaults={"n_groups": 8, "head_dim": 64}),
    "jamba": Family(mixer="mamba1", defaults={"mamba_d_state": 16, "mamba_d_conv": 4}),
    "bamba": Family(mixer="mamba2", defaults={"mamba_n_groups": 1, "mamba_d_state": 256}),
    "falcon_h1": Family(
        mixer="mamba2", cycle=("hybrid",), defaults={"mamba_n_groups": 1, "mamba_d_state": 256, "mamba_rms_norm": False}
    ),
    "granite": Family(),
    "granite_swa": Family(is_tied=True, has_sinks=True),
    "granitemoe": Family(),
    "granitemoeshared": Family(),
    "granitemoe_swa": Family(has_sinks=True),
    "granitemoehybrid": Family(
        mixer="mamba2", defaults={"mamba_n_groups": 1, "mamba_d_state": 256, "shared_intermediate_size": 1024}
    ),
    "ernie4_5": Family(
        is_tied=True, bias_field="use_bias", feed_forward_bias_field="use_bias", defaults={"head_dim": 128}
    ),
    "ernie4_5_moe": Family(is_tied=True, bias_field="use_bias", feed_forward_bias_field="use_bias", router_bias=True),
    "hunyuan_v1_dense": Family(qk_norm="head"),
    "hunyuan_v1_moe": Family(qk_norm="head", defaults={"num_experts_per_tok": 1}),
    "hy_v3": Family(qk_norm="head", defaults={"head_dim": 128, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "seed_oss": Family(query_bias=True, output_bias="never", defaults={"head_dim": 128}),
    "exaone4": Family(qk_norm="head", cycle=("sliding", "sliding", "sliding", "full")),
    "exaone_moe": Family(
        qk_norm="head",
        cycle=("sliding", "sliding", "sliding", "full"),
        defaults={"first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "stablelm": Family(
        norm="layer",
        bias_field="use_qkv_bias",
        output_bias="never",
        qk_norm="full",
        qk_norm_field="qk_layernorm",
        qk_norm_default=False,
    ),
    "internlm2": Family(bias_field="bias", feed_forward_bias_field="bias"),
    "internlm3": Family(bias_field="qkv_bias", feed_forward_bias_field="bias", defaults={"head_dim": 128}),
    "baichuan": Family(bias_field="", has_one_head_count=True),
    "chatglm": Family(query_bias=True, bias_field="add_qkv_bias", output_bias="never"),
    "mpt": Family(norm="layer_no_bias", is_gated=False, is_tied=True),
    "dbrx": Family(norm="layer_no_bias", defaults={"num_key_value_heads": 1}),
    "kimi_linear": Family(mixer="kimi_delta", defaults={"first_k_dense_replace": 1, "n_shared_experts": 1}),
    "dots1": Family(qk_norm="head", defaults={"n_shared_experts": 0}),
    "afmoe": Family(
        norms=4,
        qk_norm="head",
        has_output_gate=True,
        router_bias=True,
        cycle=("sliding", "sliding", "sliding", "full"),
        defaults={"head_dim": 128, "first_k_dense_replace": 1, "n_shared_experts": 2},
    ),
    "lfm2": Family(is_tied=True, qk_norm="head", mixer="conv"),
    "lfm2_moe": Family(
        is_tied=True, qk_norm="head", mixer="conv", router_bias=True, defaults={"first_k_dense_replace": 2}
    ),
    "minicpm3": Family(is_tied=True),
    "minicpm": Family(is_tied=True),
    "youtu": Family(is_tied=True),
    "mistral4": Family(defaults={"n_shared_experts": 1, "first_k_dense_replace": 0}),
    "persimmon": msgspec.structs.replace(
        _LAYER,
        bias_field="",
        has_one_head_count=True,
        qk_norm="head",
        qk_norm_field="qk_layernorm",
        qk_norm_has_bias=True,
    ),
    "biogpt": msgspec.structs.replace(
        _LAYER, is_tied=True, has_positions=True, position_offset=2, bias_field="", has_one_head_count=True
    ),
    "axk1": Family(defaults={"n_shared_experts": 1, "first_k_dense_replace": 1}),
    "xglm": msgspec.structs.replace(_LAYER, is_tied=True, bias_field=""),
    "nanochat": Family(norm="none", is_gated=False),
    "diffllama": Family(),
    "bitnet": Family(),
    "hyperclovax": Family(post_norms_field="use_post_norm"),
    "helium": Family(defaults={"head_dim": 128}),
    "jais2": msgspec.structs.replace(_LAYER),
    "cwm": Family(cycle=("full", "sliding", "sliding", "sliding"), defaults={"head_dim": 128}),
    "cohere2_moe": Family(
        norm="layer_no_bias", norms=1, is_tied=True, cycle=("sliding",) * 3 + ("full",), defaults={"head_dim": 128}
    ),
    "laguna": Family(qk_norm="head", router_bias=True, defaults={"head_dim": 128, "first_k_dense_replace": 1}),
    "mellum": Family(qk_norm="head", defaults={"head_dim": 128}),
    "mimo": Family(query_bias=True, output_bias="never", is_window_optional=True),
    "step3p7": Family(qk_norm="head", defaults={"n_shared_experts": 1}),
    "nemotron-nas": Family(),
    "grok-1": Family(norms=4, is_tied=True),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": msgspec.structs.replace(
        _ENCODER, defaults={"max_position_embeddings": 512, "type_vocab_size": 2, "embedding_size": 128}
    ),
    "mpnet": msgspec.structs.replace(_ENCODER, types=0),
    "albert": msgspec.structs.replace(
        _ENCODER, defaults={"max_position_embeddings": 512, "type_vocab_size": 2, "embedding_size": 128}
    ),
    "roformer": msgspec.structs.replace(_ENCODER, has_positions=False),
    "deberta-v2": msgspec.structs.replace(_ENCODER, types=0),
    "distilbert": msgspec.structs.replace(_ENCODER, types=0),
    "xlm-roberta-xl": msgspec.structs.replace(
        _ENCODER, embedding_norms=0, final_norm="layer", types=1, defaults={"max_position_embeddings": 514}
    ),
    "nomic_bert": msgspec.structs.replace(
        _ENCODER, has_positions=False, is_gated=True, query_bias=False, feed_forward_bias=False
    ),
    "gte": msgspec.structs.replace(
        _ENCODER, has_positions=False, is_gated=True, types=1, defaults={"max_position_embeddings": 512}
    ),
    "modernbert": Family(
        norm="layer_no_bias",
        has_head=False,
        is_causal=False,
        is_tied=True,
        embedding_norms=1,
        cycle=("full", "sliding", "sliding"),
    ),
    "eurobert": Family(has_head=False, is_causal=False, is_tied=True),
    "t5": Family(is_gated=False, has_head=False, is_causal=False, is_tied=True),
}

# Other names of the same family.
SAME: dict[str, str] = {
    "camembert": "roberta",
    "xlm-roberta": "roberta",
    "ernie": "bert",
    "megatron-bert": "bert",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_audio": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "mistral3": "mistral",
    "phi4mm": "phi3",
    "phi4_multimodal": "phi3",
    "granitemoe_shared": "granitemoeshared",
    "Yi": "llama",
    "yi": "llama",
    "aquila": "llama",
    "orion": "llama",
    "solar": "llama",
    "smollm": "llama",
    "minimax_text_01": "minimax",
    "minimax_m1": "minimax",
    "mimo_v2": "mimo_v2_flash",
    "minimax_m3_vl": "minimax_m3",
    "deepseek_ref": "deepseek_v4",
    "new": "gte",
    "kimi_k25": "deepseek_v3",
    "chatglm4": "chatglm",
    "mt5": "t5",
    "umt5": "t5",
    "hunyuan": "hunyuan_v1_moe",
    "deci": "nemotron-nas",
    "gpt_neox_japanese": "gpt_neox",
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


def norm_of(fields: Fields, family: Family) -> NormKind:
    """The norm of the family's layers, where the configuration may switch its parts off."""
    if not fields.flag("layer_norm_elementwise_affine", True):
        return "none"
    if family.norm == "layer" and fields.flag("no_bias"):
        return "layer_no_bias"
    if fields.raw("model_type") == "mpt" and not fields.flag("no_bias", True):
        return "layer"
    return family.norm


def norms_of(fields: Fields, family: Family) -> int:
    """Norms in each layer: blocks that run both parts at once from the same input have one less."""
    if fields.raw("model_type") == "falcon":
        if fields.flag("new_decoder_architecture"):
            return fields.integer("num_ln_in_parallel_attn", 2)
        return 1 if fields.flag("parallel_attn", True) else 2
    if fields.raw("model_type") == "stablelm" and fields.flag("use_parallel_residual"):
        return 1
    if family.post_norms_field and fields.flag(family.post_norms_field, True):
        return family.norms + 2
    return family.norms
