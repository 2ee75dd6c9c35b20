"""An engine's memory: bytes that logs of real engines print, and budgets that only grow with memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from head.planner.model.presets import lookup
from head.planner.serving.engine_step import Backend, Precision, ServingLayout, experts_touched, precision_of
from head.planner.serving.memory import (
    GIB,
    MemorySettings,
    activation_peak_bytes,
    kv_budget_bytes,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    kv_capacity,
    llama_cpp_buffers,
    running_limit,
    weights_bytes,
)

# vLLM start-up logs of public issues: model, tp, KV cache GiB on a rank, tokens that it held, weights GiB on a rank.
LOGS = (
    ("Qwen/Qwen2.5-32B-Instruct", 2, 7.71, 63152, 30.7098),  # vllm issue 15815, L40S
    ("Qwen/Qwen2.5-1.5B-Instruct", 1, 2.36, 88304, 2.8875),  # a public notebook, T4
)


@pytest.mark.parametrize(("model", "tp", "kv_gib", "tokens", "weights_gib"), LOGS)
def test_cache_and_weights_are_those_of_engine_logs(
    model: str, tp: int, kv_gib: float, tokens: int, weights_gib: float
) -> None:
    """The blocks that fit a logged budget, and the weights of a rank, are within 1.5 % of what engines logged."""
    arch, layout = lookup(model), ServingLayout(tp=tp)
    precision = precision_of(arch, "bf16")
    found = kv_capacity(arch, layout, precision, kv_gib * GIB, context=4096)
    assert found.tokens == pytest.approx(tokens, rel=0.015)
    assert weights_bytes(arch, layout, precision) / GIB == pytest.approx(weights_gib, rel=0.015)


@pytest.mark.parametrize(("tp", "weights_gib"), [(1, 14.96), (2, 7.48)])
def test_weights_are_split_over_ranks(tp: int, weights_gib: float) -> None:
    """Llama-3-8B as vLLM logs it on one and two H100 (pull request 10511)."""
    arch = lookup("meta-llama/Meta-Llama-3-8B")
    assert weights_bytes(arch, ServingLayout(tp=tp), precision_of(arch, "bf16")) / GIB == pytest.approx(
        weights_gib, rel=0.005
    )


def test_latent_attention_is_not_divided_by_tp() -> None:
    """DeepSeek-V3's cache is 70,272 bytes a token in 16 bits on every rank."""
    arch = lookup("deepseek-ai/DeepSeek-V3")
    for tp in (1, 8):
        assert kv_bytes_per_token(arch, ServingLayout(tp=tp), Precision(kv_bytes=2.0)) == 70272


def test_windows_stop_growing_and_reservations_do_not() -> None:
    """A model with sliding layers needs less than an engine with one page size reserves, only past the window."""
    arch, layout, precision = lookup("openai/gpt-oss-120b"), ServingLayout(), Precision()
    short = kv_bytes_of_sequence(arch, layout, precision, 100)
    assert short == kv_bytes_of_sequence(arch, layout, precision, 100, has_window_pages=False)
    long = kv_bytes_of_sequence(arch, layout, precision, 10_000)
    assert long < 0.6 * kv_bytes_of_sequence(arch, layout, precision, 10_000, has_window_pages=False)


BACKENDS: tuple[Backend, ...] = ("vllm", "sglang", "trtllm", "llamacpp", "other")


@given(
    st.sampled_from(("meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-V3", "google/gemma-3-27b-it")),
    st.sampled_from(BACKENDS),
    st.floats(8, 300),
    st.floats(1, 100),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_more_memory_never_makes_a_fit_a_misfit(model: str, backend: Backend, gib: float, more: float) -> None:
    """Budget and sequences at once never shrink when a device has more memory."""
    arch, layout, settings_ = lookup(model), ServingLayout(tp=4), MemorySettings()
    precision = precision_of(arch, "fp8")
    small, _ = kv_budget_bytes(arch, layout, precision, backend, settings_, visible_bytes=gib * GIB)
    large, _ = kv_budget_bytes(arch, layout, precision, backend, settings_, visible_bytes=(gib + more) * GIB)
    assert large >= small
    limits = [
        running_limit(arch, layout, precision, backend, settings_, visible_bytes=size * GIB, prompt=1000, output=1000)
        for size in (gib, gib + more)
    ]
    assert limits[1] >= limits[0] >= 1


def test_profiling_with_more_tokens_needs_more() -> None:
    """The activation peak grows with the tokens of the profiling run, and shrinks with tensor parallelism."""
    arch = lookup("meta-llama/Llama-3.1-70B")
    few, many = (
        activation_peak_bytes(arch, ServingLayout(tp=2), batched_tokens=tokens, sequences=256)
        for tokens in (2048, 32768)
    )
    assert few < many
    split = activation_peak_bytes(arch, ServingLayout(tp=8), batched_tokens=32768, sequences=256)
    assert split < many


def test_experts_touched_lies_between_its_bounds() -> None:
    """One token touches its own experts; many tokens touch all; never more."""
    assert experts_touched(256, 8, 1) == pytest.approx(8)
    assert experts_touched(256, 8, 1e6) == pytest.approx(256)
    assert 8 < experts_touched(256, 8, 16) < 128.001


def test_llama_cpp_moves_layers_between_host_and_gpu() -> None:
    """Weights and cache of offloaded layers go to the GPU, the sum stays, a q8_0 cache is 8.5 bits a value."""
    arch = lookup("meta-llama/Llama-3.1-8B")
    whole = llama_cpp_buffers(arch, weight_bits=16, context=8192)
    half = llama_cpp_buffers(arch, weight_bits=16, context=8192, gpu_layers=16)
    assert half.gpu_kv_bytes == pytest.approx(whole.gpu_kv_bytes / 2)
    assert half.gpu_weights_bytes < whole.gpu_weights_bytes
    assert half.gpu_weights_bytes + half.host_weights_bytes == pytest.approx(
        whole.gpu_weights_bytes + whole.host_weights_bytes, rel=0.001
    )
    assert whole.gpu_kv_bytes == pytest.approx(8192 * 131072)
    narrow = llama_cpp_buffers(arch, weight_bits=16, context=8192, key_type="q8_0", value_type="q8_0")
    assert narrow.gpu_kv_bytes == pytest.approx(whole.gpu_kv_bytes * 8.5 / 16)
