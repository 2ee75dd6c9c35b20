"""Cache and weight bytes: what engines logged, what files weigh, and how ranks share them."""

from __future__ import annotations

import pytest

from common.errors import InvalidValue
from head.planner.model.dtypes import bytes_per_element
from head.planner.model.kv_cache import bytes_per_token, kv_cache, state_bytes
from head.planner.model.parameters import count
from head.planner.model.presets import lookup
from head.planner.model.weights import more_bits, weight_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("model", "tp", "tokens", "gib"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1, 88_304, 2.36),
        ("Llama-3.2-3B-Instruct", 1, 22_320, 2.38),
        ("Qwen/Qwen2.5-32B-Instruct", 2, 63_152, 7.71),
    ],
)
def test_cache_bytes_that_vllm_logged(model: str, tp: int, tokens: int, gib: float) -> None:
    """Tokens and GiB of the cache in engines' start logs agree within 1.5 %."""
    assert tokens * bytes_per_token(lookup(model), tp=tp) / GIB == pytest.approx(gib, rel=0.015)


@pytest.mark.parametrize(
    ("model", "tp", "gib"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1, 2.8875),
        ("meta-llama/Meta-Llama-3-8B", 1, 14.96),
        ("meta-llama/Meta-Llama-3-8B", 2, 7.48),
        ("Qwen/Qwen2.5-32B-Instruct", 2, 30.7098),
        ("neuralmagic/Meta-Llama-3.1-70B-Instruct-quantized.w8a8", 1, 67.7229),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 2, 13.9476),
    ],
)
def test_weight_bytes_that_vllm_logged(model: str, tp: int, gib: float) -> None:
    """Weights per rank in engines' start logs agree within 1.5 %."""
    assert weight_bytes(lookup(model), tp=tp).per_rank / GIB == pytest.approx(gib, rel=0.015)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("llama-7b", 524_288),
        ("llama-13b", 819_200),
        ("llama-3.1-70b", 327_680),
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-405b", 516_096),
        ("mixtral-8x22b", 229_376),
        ("qwen-72b", 2_621_440),
        ("deepseek-v2", 69_120),
        ("deepseek-v3", 70_272),
    ],
)
def test_cache_bytes_per_token(model: str, expected: int) -> None:
    """Reference values in bf16: keys and values of all layers, or the latent of MLA."""
    assert bytes_per_token(lookup(model)) == expected


def test_latents_are_repeated_and_heads_are_shared() -> None:
    """Tensor parallelism divides keys and values down to one head, and never a latent."""
    assert bytes_per_token(lookup("deepseek-v3"), tp=8) == 70_272
    llama = lookup("llama-3.1-8b")
    assert [bytes_per_token(llama, tp=tp) for tp in (1, 2, 8, 16)] == [131_072, 65_536, 16_384, 16_384]


def test_windows_cost_less_than_engines_reserve() -> None:
    """Local layers keep a window in theory; an engine with one page size reserves the whole context."""
    cache = kv_cache(lookup("google/gemma-3-27b-it"), 32_768)
    assert cache.theory < 0.3 * cache.reserved
    short = kv_cache(lookup("google/gemma-3-27b-it"), 512)
    assert short.theory == short.reserved


def test_states_do_not_grow() -> None:
    """Linear layers keep the same bytes at any length; only the full layers grow."""
    hybrid = lookup("qwen3-next")
    assert state_bytes(hybrid) > 0
    first, second = kv_cache(hybrid, 1_000), kv_cache(hybrid, 2_000)
    assert first.state == second.state
    assert second.theory - first.theory == pytest.approx(1_000 * first.growing_bytes_per_token)


def test_cache_formats_scale() -> None:
    """q8_0 keys take 34 bytes for 32 elements, fp8 ones half of bf16."""
    llama = lookup("llama-3.1-8b")
    assert bytes_per_token(llama, dtype="q8_0") == 131_072 / 2 * 34 / 32
    assert bytes_per_token(llama, dtype="fp8") == 65_536


@pytest.mark.parametrize(
    ("model", "mix", "gigabytes"),
    [
        ("llama-2-7b", "q4_k_m", 4.08),
        ("llama-2-7b", "q5_k_m", 4.78),
        ("llama-2-7b", "q6_k", 5.53),
        ("llama-2-7b", "q8_0", 7.16),
        ("llama-3.1-8b", "q4_k_m", 4.92),
        ("llama-3.1-8b", "q5_k_m", 5.73),
        ("llama-3.1-70b", "q4_k_m", 42.52),
    ],
)
def test_gguf_mixes_weigh_what_their_files_do(model: str, mix: str, gigabytes: float) -> None:
    """Published GGUF files of each mix, within 1.5 %."""
    assert weight_bytes(lookup(model), dtype=mix).total / 1e9 == pytest.approx(gigabytes, rel=0.015)


def test_ranks_hold_at_least_their_share() -> None:
    """What is repeated makes ranks hold more than an equal share, and never more than the whole."""
    for model in ("llama-3.1-8b", "deepseek-v3", "gpt-oss-120b", "qwen3-next"):
        whole = weight_bytes(lookup(model))
        for tp in (2, 4, 8, 16):
            rank = weight_bytes(lookup(model), tp=tp)
            assert rank.total == pytest.approx(whole.total)
            assert whole.total / tp * 0.999 <= rank.per_rank <= whole.total


def test_parts_sum_to_the_rank() -> None:
    """Attention, feed-forward, experts, tables and the rest are all there is."""
    rank = weight_bytes(lookup("deepseek-v3"), tp=4, ep=4)
    parts = rank.attention + rank.feed_forward + rank.routed_experts + rank.embeddings + rank.other
    assert parts == pytest.approx(rank.per_rank)


def test_16_bit_weights_are_two_bytes_each() -> None:
    """Plain bf16 weights are exactly two bytes for each counted parameter."""
    for model in ("llama-3.1-8b", "qwen3-30b-a3b", "google/gemma-2-9b", "nemotron-3-nano", "deepseek-v2-lite"):
        architecture = lookup(model)
        assert weight_bytes(architecture, dtype="bf16").total == pytest.approx(2 * count(architecture).total, rel=1e-9)


def test_more_bits_follow_the_quantiser() -> None:
    """Of 32 layers the quantiser gives 16 more bits: the first and last four, and each third between."""
    assert more_bits(32) == 16


def test_unknown_formats_are_refused() -> None:
    """A format that does not exist is a bad value."""
    with pytest.raises(InvalidValue):
        bytes_per_element("q99")
    with pytest.raises(InvalidValue):
        weight_bytes(lookup("llama-7b"), dtype="q99")
