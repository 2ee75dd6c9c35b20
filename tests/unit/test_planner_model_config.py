"""Configurations: absurd values are refused by name, unknown families are read by their fields."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import HerderError, InvalidValue
from head.planner.model.hf_config import architecture_of_config
from head.planner.model.parameters import count
from head.planner.model.weights import weight_bytes

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -1),
        ("hidden_size", 10**12),
        ("hidden_size", float("nan")),
        ("hidden_size", "4096"),
        ("hidden_size", [4096]),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("num_attention_heads", 33),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 7),
        ("num_key_value_heads", float("inf")),
        ("vocab_size", None),
        ("intermediate_size", {"a": {"b": {}}}),
        ("tie_word_embeddings", "yes"),
        ("max_position_embeddings", -5),
        ("layer_types", "full_attention"),
        ("model_type", 7),
    ],
)
def test_absurd_values_are_refused_by_name(field: str, value: object) -> None:
    """A value that cannot be is InvalidValue (422) and the error names the field."""
    with pytest.raises(InvalidValue) as caught:
        architecture_of_config({**_LLAMA, field: value})
    assert caught.value.status == 422
    assert caught.value.details["field"] == field


def test_more_chosen_experts_than_there_are_is_refused() -> None:
    """A token cannot choose nine of eight experts."""
    with pytest.raises(InvalidValue) as caught:
        architecture_of_config({**_LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9})
    assert caught.value.details["field"] == "num_experts_per_tok"


def test_the_text_model_of_a_multimodal_configuration() -> None:
    """Nested text dimensions are taken, and the notes say that other towers are not counted."""
    nested = {"model_type": "llava", "text_config": _LLAMA, "vision_config": {"hidden_size": 1024}}
    architecture = architecture_of_config(nested)
    assert count(architecture).total == count(architecture_of_config(_LLAMA)).total
    assert any("text model" in note for note in architecture.notes)


def test_an_unknown_family_is_read_by_its_fields() -> None:
    """A new model type is no error: it counts like the Llama block that its fields describe, and says so."""
    architecture = architecture_of_config({**_LLAMA, "model_type": "brand_new"})
    assert count(architecture).total == count(architecture_of_config(_LLAMA)).total
    assert any("brand_new" in note for note in architecture.notes)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq-g32"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 32}}},
            },
            "int4-g32",
        ),
    ],
)
def test_quantisation_is_kept(config: dict[str, Any], expected: str) -> None:
    """The quantisation that the configuration names is the architecture's, and weighs less than 16 bits."""
    architecture = architecture_of_config({**_LLAMA, "quantization_config": config})
    assert architecture.quantisation == expected
    assert weight_bytes(architecture).total < 1.5 * count(architecture).total


def test_an_unknown_quantisation_weighs_as_its_number_format() -> None:
    """A new method in a configuration is no error; a format that a person asks for must exist."""
    architecture = architecture_of_config({**_LLAMA, "quantization_config": {"quant_method": "brand_new"}})
    assert weight_bytes(architecture).total == 2 * count(architecture).total
    with pytest.raises(InvalidValue):
        weight_bytes(architecture, dtype="brand_new")


def test_layers_are_grouped_in_order_of_appearance() -> None:
    """Three dense layers and then experts make two groups."""
    config = {
        **_LLAMA,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 32,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "first_k_dense_replace": 3,
    }
    groups = architecture_of_config(config).groups
    assert [(group.count, group.feed_forward.kind) for group in groups] == [(3, "dense"), (29, "moe")]


_JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*_LLAMA, "layer_types", "num_experts", "text_config", "head_dim"]), _JUNK))
def test_junk_is_refused_or_counted_and_never_crashes(junk: dict[str, Any]) -> None:
    """Whatever stands in a configuration, the answer is a JSON-safe count or an error of ours."""
    refused: HerderError | None = None
    try:
        counted = count(architecture_of_config({**_LLAMA, **junk}))
    except HerderError as error:
        refused = error
    if refused is None:
        assert msgspec.json.encode(counted)
        assert counted.total > 0
    else:
        assert 400 <= refused.status < 500
