"""The part of a model's configuration that its arithmetic needs: kept with the model, bounded, no free text.

The head plans memory and time from these fields; what is not listed here (tokens, sampling, paths, code) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.metadata.limits import CONFIG_BYTES, CONFIG_ITEMS, CONFIG_TEXT_CHARS, NUMBER

_WORDS = """
    activation activation_function add_full_attention_sink_bias add_qkv_bias add_swa_attention_sink_bias alibi
    altup_num_inputs attention_bias attention_chunk_size attention_head_dim attention_heads attention_k_eq_v
    attn_layer_indices attn_layer_offset attn_layer_period attn_output_gate attn_type_list bias
    block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of compress_ratios conv_L_cache conv_bias
    conv_kernel d_ff d_inner d_kv d_model decoder_attention_heads decoder_ffn_dim decoder_layers decoder_sparse_step
    dense_intermediate_size dim do_layer_norm_before dtype emb_dim embedding_size enable_bias enable_moe_block expand
    expansion_ratio expert_ffn_hidden_size expert_intermediate_size expert_layer_offset expert_layer_period
    feed_forward_proj ffn_dim ffn_hidden_size first_k_dense_replace full_attention_interval full_attn_idxs
    global_head_dim hc_mult head_dim head_size hidden_act hidden_activation hidden_dim hidden_size
    hidden_size_per_layer_input hybrid_layer_pattern hybrid_override_pattern index_head_dim index_n_heads index_topk
    indexer_types interleave_moe_layer_step intermediate_size intermediate_size_mlp kv_channels kv_lora_rank
    laurel_rank layer_norm_elementwise_affine layer_norm_epsilon layer_types layers_block_type learned_pos_emb
    linear_conv_kernel_dim linear_head_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
    linear_value_head_dim lm_head_bias local_attention mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state
    mamba_dt_rank mamba_expand mamba_head_dim mamba_intermediate_size mamba_n_groups mamba_n_heads mamba_num_heads
    mamba_proj_bias mamba_rms_norm max_position_embeddings max_seq_len max_sequence_length max_window_layers
    mla_use_output_gate mlp_bias mlp_hidden_act mlp_layer_types mlp_only_layers model_dim model_max_length model_type
    moe_ffn_hidden_size moe_intermediate_size moe_k moe_latent_size moe_layer_end_index moe_layer_freq
    moe_layer_interval moe_layer_start_index moe_layers moe_num_experts moe_num_shared_experts
    moe_shared_expert_intermediate_size moe_top_k moe_topk mtp_num_hidden_layers multi_query multi_query_group_num
    n_ctx n_embd n_experts n_experts_per_token n_groups n_head n_head_kv n_heads n_inner n_kv_heads n_layer n_layers
    n_positions n_routed_experts n_shared_expert n_shared_experts n_vocab new_decoder_architecture no_bias
    no_rope_layer_interval num_attention_heads num_decoder_layers num_dense_layers num_experts num_experts_per_tok
    num_experts_per_token num_global_key_value_heads num_heads num_hidden_groups num_hidden_layers
    num_key_value_heads num_kv_heads num_kv_shared_layers num_layers num_ln_in_parallel_attn num_local_experts
    num_moe_experts num_nextn_predict_layers num_query_heads num_routed_experts num_shared_expert num_shared_experts
    o_groups o_lora_rank padded_vocab_size parallel_attn q_lora_rank qk_layernorm qk_nope_head_dim qk_rope_head_dim
    qkv_bias relative_attention_num_buckets rms_norm_eps routed_expert_hidden_size router_topk seq_length
    share_expert_dim shared_expert_intermediate_size shared_intermediate_size sliding_window sliding_window_pattern
    sliding_window_size ssm_state_size state_size swa_head_dim swa_num_attention_heads swa_num_key_value_heads
    swa_v_head_dim tie_embeddings tie_word_embeddings time_step_rank top_k_experts torch_dtype type_vocab_size
    use_bias use_conv_bias use_double_wide_mlp use_parallel_residual use_post_norm use_qk_norm use_qkv_bias
    use_sliding_window v_head_dim vocab_size vocab_size_per_layer_input word_embed_proj_dim
"""
_NAMES = frozenset(_WORDS.split())
_INNER: dict[str, frozenset[str]] = {
    "quantization_config": frozenset({"quant_method", "quant_algo", "bits", "group_size", "weight_block_size", "fmt"}),
    "linear_attn_config": frozenset(
        {"full_attn_layers", "num_heads", "head_dim", "short_conv_kernel_size", "use_full_rank_gate"}
    ),
    "attn_config": frozenset({"kv_n_heads", "alibi"}),
    "ffn_config": frozenset({"ffn_hidden_size", "moe_num_experts", "moe_top_k"}),
}


def dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The listed fields of `config` whose values are numbers, flags, words or short lists of them.

    Empty when they would take more than CONFIG_BYTES.
    """
    kept = _listed(config, _NAMES)
    for name, names in _INNER.items():
        inner = config.get(name)
        if isinstance(inner, Mapping) and (part := _listed(inner, names)):
            kept[name] = part
    return kept if len(msgspec.json.encode(kept)) <= CONFIG_BYTES else {}


def pairs(values: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The numbers among a GGUF file's pairs below `architecture`, with its name."""
    kept: dict[str, Any] = {"general.architecture": architecture}
    kept |= {
        key: value
        for key, value in values.items()
        if key.startswith(f"{architecture}.") and len(key) <= 100 and not isinstance(value, str) and _is_plain(value)
    }
    return kept if len(msgspec.json.encode(kept)) <= CONFIG_BYTES else {}


def _listed(config: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: config[name] for name in sorted(names) if name in config and _is_plain(config[name])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= CONFIG_ITEMS and all(not isinstance(item, list) and _is_plain(item) for item in value)
    if isinstance(value, bool):
        return True
    if isinstance(value, int | float):
        return abs(value) < NUMBER  # infinities and NaN are not
    return isinstance(value, str) and len(value) <= CONFIG_TEXT_CHARS
