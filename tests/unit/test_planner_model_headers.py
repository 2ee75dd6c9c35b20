"""Headers: dimensions and exact bytes from tensor names and shapes, GGUF pairs and stored metadata."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import InvalidValue
from head.planner.model.headers import (
    architecture_of_gguf,
    architecture_of_registered,
    architecture_of_tensors,
    stored_weights,
)
from head.planner.model.hf_config import architecture_of_config
from head.planner.model.parameters import count

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 1_000,
    "tie_word_embeddings": False,
}


def _llama_tensors(*, dtype: str = "BF16") -> dict[str, dict[str, Any]]:
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [1_000, 256],
        "model.norm.weight": [256],
        "lm_head.weight": [1_000, 256],
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": [256, 256],
            f"{prefix}.self_attn.k_proj.weight": [128, 256],
            f"{prefix}.self_attn.v_proj.weight": [128, 256],
            f"{prefix}.self_attn.o_proj.weight": [256, 256],
            f"{prefix}.mlp.gate_proj.weight": [512, 256],
            f"{prefix}.mlp.up_proj.weight": [512, 256],
            f"{prefix}.mlp.down_proj.weight": [256, 512],
            f"{prefix}.input_layernorm.weight": [256],
            f"{prefix}.post_attention_layernorm.weight": [256],
        }
    return {name: {"dtype": dtype, "shape": shape} for name, shape in shapes.items()}


def test_shapes_alone_give_the_exact_total() -> None:
    """A header without a configuration has the parameters of its tensors, and says what it assumed."""
    tensors = _llama_tensors()
    architecture = architecture_of_tensors(tensors)
    assert count(architecture).total == stored_weights(tensors).elements
    assert (architecture.layers, architecture.hidden, architecture.vocab) == (3, 256, 1_000)
    assert any("assumed" in note for note in architecture.notes)


def test_a_configuration_beside_the_tensors_gives_the_form() -> None:
    """With its configuration the header names no parameter that the form does not."""
    architecture = architecture_of_tensors(_llama_tensors(), _CONFIG)
    assert architecture.groups == architecture_of_config(_CONFIG).groups
    assert architecture.other_params == 0
    assert architecture.source == "headers"


def test_parameters_without_a_name_are_counted_too() -> None:
    """A tensor that the form does not know is in the total, and in the notes."""
    tensors = {**_llama_tensors(), "model.something.weight": {"dtype": "BF16", "shape": [7, 11]}}
    architecture = architecture_of_tensors(tensors, _CONFIG)
    assert count(architecture).total == stored_weights(tensors).elements
    assert any("77 parameters" in note for note in architecture.notes)


def test_bytes_by_dtype_are_exact() -> None:
    """Each dtype's bytes: two for bf16, one for fp8, half for packed four-bit, blocks for ggml types."""
    stored = stored_weights(
        {
            "a": {"dtype": "BF16", "shape": [10, 10]},
            "b": {"dtype": "F8_E4M3", "shape": [10, 10]},
            "c": {"dtype": "F4", "shape": [3]},
            "d": {"dtype": "Q4_K", "shape": [256, 4]},
            "e": {"dtype": "I32", "shape": [2]},
        }
    )
    assert stored.bytes_by_dtype == {"BF16": 200, "F8_E4M3": 100, "F4": 2, "Q4_K": 4 * 144, "I32": 8}
    assert stored.bytes == sum(stored.bytes_by_dtype.values())


@pytest.mark.parametrize("shape", [[-1, 2], [1.5], "ab", [2] * 9, [True]])
def test_shapes_that_cannot_be_are_refused(shape: object) -> None:
    """A header from anywhere cannot make the planner count nonsense."""
    with pytest.raises(InvalidValue):
        stored_weights({"a": {"dtype": "BF16", "shape": shape}})


def test_gguf_pairs_give_the_same_model_as_its_configuration() -> None:
    """Llama's GGUF keys describe the same dimensions; the head is tied when the file has no output tensor."""
    pairs = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 4096,
        "llama.vocab_size": 1_000,
    }
    tensors = {"token_embd.weight": {"dtype": "Q4_K", "shape": [256, 1_000]}}
    untied = architecture_of_gguf(pairs)
    tied = architecture_of_gguf(pairs, tensors)
    assert count(untied).total == count(architecture_of_config(_CONFIG)).total
    assert count(tied).total == count(untied).total - 256_000
    assert tied.quantisation == "q4_k"


def test_gguf_latent_attention() -> None:
    """DeepSeek's GGUF keys give the latent's ranks and the parts of a head."""
    pairs: dict[str, Any] = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 4,
        "deepseek2.embedding_length": 512,
        "deepseek2.feed_forward_length": 1024,
        "deepseek2.attention.head_count": 8,
        "deepseek2.attention.head_count_kv": 8,
        "deepseek2.attention.key_length": 192,
        "deepseek2.attention.value_length": 128,
        "deepseek2.attention.kv_lora_rank": 512,
        "deepseek2.rope.dimension_count": 64,
        "deepseek2.expert_count": 16,
        "deepseek2.expert_used_count": 2,
        "deepseek2.expert_feed_forward_length": 256,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.vocab_size": 1_000,
    }
    architecture = architecture_of_gguf(pairs)
    attention = architecture.groups[0].attention
    assert (attention.kind, attention.nope_dim, attention.rope_dim, attention.value_dim) == ("mla", 128, 64, 128)
    assert [group.count for group in architecture.groups] == [1, 3]


def test_gguf_without_an_architecture_is_refused() -> None:
    """Pairs that do not say their architecture are no model."""
    with pytest.raises(InvalidValue):
        architecture_of_gguf({"general.name": "x"})


def test_registered_models() -> None:
    """Stored configurations are used as they are; a few dimensions and the count give the width."""
    exact = architecture_of_config(_CONFIG)
    assert count(architecture_of_registered({"config": _CONFIG})).total == count(exact).total
    few = {
        "hidden": 256,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "vocab": 1_000,
        "parameters": count(exact).total,
    }
    solved = architecture_of_registered({"detected": few})
    assert solved.source == "registered"
    assert solved.groups[0].feed_forward.width == 512
    with pytest.raises(InvalidValue):
        architecture_of_registered({"detected": {"layers": 3}})


def test_a_registered_gguf_model_is_tied_when_its_parameters_say_so() -> None:
    """GGUF pairs do not say whether the head is the embedding: the parameter count decides."""
    pairs = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
    }
    untied = count(architecture_of_config(_CONFIG)).total
    for parameters, is_tied in ((untied, False), (untied - 256_000, True)):
        detected = {"gguf": pairs, "vocab": 1_000, "parameters": parameters, "quantisation": "Q4_K_M"}
        architecture = architecture_of_registered({"detected": detected})
        assert architecture.is_tied is is_tied
        assert count(architecture).total == parameters
        assert architecture.quantisation == "q4_k_m"
