"""Presets: found by any usual spelling, refused with near matches, and all of them sound."""

from __future__ import annotations

import pytest

from common.errors import InvalidValue, ModelNotFound
from head.planner.model import presets
from head.planner.model.parameters import count


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama-7b", 6_738_415_616),
        ("LLaMA-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseek-v3", 671_026_404_352),
        ("deepseek-r1", 671_026_404_352),
        ("opt-13b", 12_853_473_280),
        ("opt-1.3b", 1_315_758_080),
        ("qwen-72b", 72_287_920_128),
        ("gpt-oss-20b", 20_914_757_184),
        ("databricks/dbrx-instruct", 131_596_523_520),
        ("BAAI/bge-m3", 567_754_752),
        ("bert-base-uncased", 109_482_240),
        ("answerdotai/ModernBERT-base", 149_014_272),
    ],
)
def test_usual_names_are_found(name: str, total: int) -> None:
    """Full ids, short names and aliases in any case give the model that is meant."""
    assert count(presets.lookup(name)).total == total


def test_a_quantised_name_sets_the_quantisation() -> None:
    """Suffixes such as -AWQ, -FP8 and Q4_K_M say how the weights are stored."""
    assert presets.lookup("Qwen3-32B-AWQ").quantisation == "awq"
    assert presets.lookup("nvidia/Llama-3.1-8B-Instruct-FP8").quantisation == "fp8"
    assert presets.lookup("Llama-3.2-3B-Instruct Q8_0 GGUF").quantisation == "q8_0"


def test_unknown_names_come_with_near_ones() -> None:
    """An unknown model is 404 and names what may have been meant."""
    with pytest.raises(ModelNotFound) as caught:
        presets.lookup("mixtral-8x7c")
    assert caught.value.status == 404
    assert "mistralai/Mixtral-8x7B-v0.1" in caught.value.details["near"]


def test_what_cannot_be_a_name_is_refused() -> None:
    """Empty and endless names are bad values, not unknown models."""
    for name in ("", "  ", "x" * 1_000):
        with pytest.raises(InvalidValue):
            presets.lookup(name)


def test_estimates_say_so() -> None:
    """A model whose publisher keeps its dimensions secret is marked."""
    assert any("estimate" in note for note in presets.lookup("gpt-4-estimated").notes)


def test_every_preset_is_sound() -> None:
    """Each preset counts, comes from the table, and its names lead back to its own dimensions."""
    for preset in presets.presets():
        architecture = presets.lookup(preset.id)
        assert architecture.source == "preset"
        assert count(architecture).total > 0
        for name in (preset.id, *preset.aliases):
            found, _ = presets.resolve(name)
            assert found.config == preset.config, name


def test_the_size_in_a_name_is_the_size() -> None:
    """A name that ends in a number of billions has about that many parameters."""
    assert len(presets.names()) > 300
    for name, billions in (
        ("GPT-22B", 22),
        ("GPT-175B", 175),
        ("GPT-1T", 1_000),
        ("bloom", 176),
        ("nemotron-340b", 340),
    ):
        assert count(presets.lookup(name)).total / 1e9 == pytest.approx(billions, rel=0.04)
