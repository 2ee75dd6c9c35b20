"""Serving estimates: laws that no calibration may break."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidValue
from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture
from head.planner.model.presets import lookup
from head.planner.serving.disaggregated import Disaggregated, balanced_workers
from head.planner.serving.engine_step import Backend, ServingLayout
from head.planner.serving.estimate import EngineSettings, ServingEstimate, Workload, as_json, estimate_serving
from head.planner.serving.memory import MemorySettings
from head.planner.serving.speculative import Speculative, break_even_acceptance, expected_tokens

MODELS = (
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "deepseek-ai/DeepSeek-V3",
    "openai/gpt-oss-120b",
    "Qwen/Qwen3.5-397B-A17B",
    "zai-org/GLM-5",
    "mistralai/Mixtral-8x7B-v0.1",
    "google/gemma-3-27b-it",
)
DEVICES = ("H100", "B200", "A100", "RTX-4090", "L40S", "MI300X")
BACKENDS: tuple[Backend, ...] = ("vllm", "sglang", "trtllm", "llamacpp", "other")


@st.composite
def questions(draw: st.DrawFn) -> tuple[Architecture, Topology, EngineSettings, Workload]:
    """Any model on any device under any load."""
    arch = lookup(draw(st.sampled_from(MODELS)))
    tp = draw(st.sampled_from((1, 2, 4, 8)))
    dp = draw(st.sampled_from((1, 2))) if arch.is_moe else 1
    ep = draw(st.sampled_from((1, tp * dp))) if arch.is_moe else 1
    layout = ServingLayout(tp=tp, pp=draw(st.sampled_from((1, 2))), dp=dp, ep=ep)
    topology = topology_of_preset(draw(st.sampled_from(DEVICES)), layout.gpus)
    engine = EngineSettings(
        backend=draw(st.sampled_from(BACKENDS)),
        weights=draw(st.sampled_from(("bf16", "fp8", "nvfp4", "awq"))),
        layout=layout,
        memory=MemorySettings(max_num_seqs=draw(st.sampled_from((16, 256, 2048)))),
        speculative=draw(st.sampled_from((None, Speculative(drafted=2)))),
    )
    load = Workload(
        isl=draw(st.integers(1, 40_000)),
        osl=draw(st.integers(1, 9_000)),
        concurrency=draw(st.sampled_from((0.0, 1.0, 7.0, 64.0, 3000.0))),
        request_rate=draw(st.sampled_from((0.0, 0.0, 0.01, 2.0, 500.0))),
        prefix_hit=draw(st.sampled_from((0.0, 0.5, 1.0))),
    )
    return arch, topology, engine, load


@given(questions())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_answer_obeys_the_laws(question: tuple[Architecture, Topology, EngineSettings, Workload]) -> None:
    """Little's law, the roofline, ordered intervals, parts that sum up, and finite JSON hold for any question."""
    arch, topology, engine, load = question
    found = estimate_serving(arch, topology, engine, load)
    e2e = found.ttft_s.value + (load.osl - 1) * found.tpot_s.value
    assert found.e2e_s.value == pytest.approx(e2e, rel=1e-9)
    assert found.concurrency == pytest.approx(found.requests_per_s * e2e, rel=1e-6)
    assert found.output_tokens_per_s.value == pytest.approx(found.requests_per_s * load.osl, rel=1e-9)
    assert found.tpot_s.value >= found.roofline_tpot_s * (1 - 1e-9)
    assert 0 < found.roofline_share <= 1
    for quantity in (found.ttft_s, found.tpot_s, found.e2e_s, found.output_tokens_per_s):
        assert 0 < quantity.low <= quantity.value <= quantity.high
    assert sum(found.step_parts_s.values()) == pytest.approx(found.tpot_s.value, rel=1e-6)
    assert found.running <= found.concurrency * (1 + 1e-9)
    parts = found.memory
    assert parts.total_bytes == pytest.approx(
        parts.weights_bytes
        + parts.activation_bytes
        + parts.graphs_bytes
        + parts.context_bytes
        + parts.kv_bytes
        + parts.state_bytes
    )
    text = json.dumps(as_json(found), allow_nan=False)
    assert json.loads(text)["gpus"] == found.gpus


@given(questions())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_throughput_stays_below_what_the_chips_can_compute(
    question: tuple[Architecture, Topology, EngineSettings, Workload],
) -> None:
    """Tokens in and out cost at least two FLOPs for each active weight at the device's best rate."""
    arch, topology, engine, load = question
    found = estimate_serving(arch, topology, engine, load)
    from head.planner.model.parameters import count

    peak = max(topology.accelerator.peak_flops_by_precision.values()) * found.gpus
    prompt = load.isl * (1 - load.prefix_hit)
    flops = found.requests_per_s * (prompt + load.osl - 1) * 2 * count(arch).active_no_embeddings
    assert flops <= peak * 1.02


def test_answers_are_the_same_every_time() -> None:
    """Two equal questions get equal answers."""
    arch, topology = lookup("openai/gpt-oss-120b"), topology_of_preset("B200", 4)
    engine = EngineSettings(layout=ServingLayout(tp=4), weights="mxfp4")
    load = Workload(isl=1000, osl=300, request_rate=3.0)
    one, two = (msgspec.json.encode(estimate_serving(arch, topology, engine, load)) for _ in range(2))
    assert one == two


def _ask(model: str = "meta-llama/Llama-3.1-70B", gpus: int = 4, **load: Any) -> ServingEstimate:
    engine = EngineSettings(layout=ServingLayout(tp=gpus), weights="fp8")
    return estimate_serving(lookup(model), topology_of_preset("H100", gpus), engine, Workload(**load), has_near=False)


def test_more_requests_in_flight_never_make_a_token_faster() -> None:
    """TPOT and throughput grow with concurrency up to the engine's places."""
    found = [_ask(isl=1024, osl=256, concurrency=float(n)) for n in (1, 2, 8, 32, 128)]
    assert all(a.tpot_s.value <= b.tpot_s.value for a, b in itertools.pairwise(found))
    rates = [estimate.output_tokens_per_s.value for estimate in found]
    assert rates == sorted(rates)


def test_longer_prompts_cost_more() -> None:
    """TTFT and TPOT grow with the prompt."""
    found = [_ask(isl=n, osl=256, concurrency=16.0) for n in (128, 1024, 8192)]
    assert [e.ttft_s.value for e in found] == sorted(e.ttft_s.value for e in found)
    assert [e.tpot_s.value for e in found] == sorted(e.tpot_s.value for e in found)


def test_a_prefix_cache_saves_prefill() -> None:
    """With more of the prompt cached the first token comes sooner and each token is no slower."""
    cold, warm = (_ask(isl=8192, osl=256, concurrency=16.0, prefix_hit=hit) for hit in (0.0, 0.9))
    assert warm.ttft_s.value < cold.ttft_s.value
    assert warm.tpot_s.value < cold.tpot_s.value


def test_a_rate_above_capacity_is_called_saturated() -> None:
    """The answer to too high a rate is the capacity, said to be saturated, and a low rate is met exactly."""
    full = _ask(isl=1024, osl=256, request_rate=1e5)
    assert full.is_saturated
    assert full.requests_per_s < 1e5
    calm = _ask(isl=1024, osl=256, request_rate=0.5)
    assert not calm.is_saturated
    assert calm.requests_per_s == pytest.approx(0.5, rel=1e-6)


def test_a_model_that_does_not_fit_is_answered_and_said_not_to_fit() -> None:
    """No refusal: latencies are given with a note, and `fits` is false."""
    found = _ask("deepseek-ai/DeepSeek-V3", gpus=1, isl=512, osl=64, concurrency=1.0)
    assert not found.fits
    assert found.notes
    assert math.isfinite(found.tpot_s.value)


def test_near_rows_are_close_and_intervals_widen_away_from_them() -> None:
    """A measured configuration lists its measurement; an engine nobody measured gets a wider interval."""
    arch, topology = lookup("meta-llama/Llama-3.1-70B"), topology_of_preset("B200", 4)
    load = Workload(isl=1024, osl=1024, concurrency=32.0)
    layout = ServingLayout(tp=4)
    known = estimate_serving(
        arch, topology, EngineSettings(backend="vllm", weights="fp8", kv_dtype="fp8", layout=layout), load
    )
    other = estimate_serving(arch, topology, EngineSettings(backend="llamacpp", weights="fp8", layout=layout), load)
    assert known.tpot_s.near
    assert abs(math.log(known.tpot_s.near[0].measured / known.tpot_s.value)) < 0.25
    assert known.similarity > other.similarity
    assert known.tpot_s.high / known.tpot_s.low < other.tpot_s.high / other.tpot_s.low


def test_speculation_yields_what_acceptance_says() -> None:
    """Tokens for each step follow the geometric sum; speculation pays with high acceptance at low load."""
    assert expected_tokens(0.0, 3) == 1.0
    assert expected_tokens(1.0, 3) == 4.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)
    arch, topology = lookup("meta-llama/Llama-3.1-70B"), topology_of_preset("H100", 4)
    plain = EngineSettings(layout=ServingLayout(tp=4), weights="fp8")
    fast = msgspec.structs.replace(plain, speculative=Speculative(kind="eagle", drafted=3, acceptance=0.9))
    load = Workload(isl=512, osl=512, concurrency=1.0)
    assert (
        estimate_serving(arch, topology, fast, load).tpot_s.value
        < 0.6 * estimate_serving(arch, topology, plain, load).tpot_s.value
    )
    assert 0 < break_even_acceptance(Speculative(drafted=3), arch, 1.1) < 0.6


def test_disaggregation_takes_prefill_out_of_the_tokens() -> None:
    """Decode engines without prompts give faster tokens; more prefill engines a sooner first one."""
    arch, topology = lookup("deepseek-ai/DeepSeek-V3"), topology_of_preset("H200", 8)
    layout = ServingLayout(tp=8, ep=8)
    load = Workload(isl=8192, osl=1024, concurrency=64.0)
    mixed = EngineSettings(backend="sglang", weights="fp8", layout=layout)
    split = msgspec.structs.replace(mixed, disaggregated=Disaggregated(prefill_layout=layout))
    wide = msgspec.structs.replace(mixed, disaggregated=Disaggregated(prefill_layout=layout, prefill_workers=8))
    answers = [estimate_serving(arch, topology, s, load, has_near=False) for s in (mixed, split, wide)]
    assert answers[1].tpot_s.value < answers[0].tpot_s.value
    assert "prefill" not in answers[1].step_parts_s or answers[1].step_parts_s["prefill"] == 0
    assert answers[2].ttft_s.value < answers[1].ttft_s.value
    assert [a.gpus for a in answers] == [8, 16, 72]


def test_workers_are_balanced_by_their_rates() -> None:
    """A prefill of a second a prompt before engines of 4 requests a second needs four times as many of them."""
    assert balanced_workers(1.0, 400.0, 100.0) == (4, 1)
    assert balanced_workers(0.05, 1000.0, 100.0) == (1, 2)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"isl": 0}, "isl"),
        ({"osl": 0}, "osl"),
        ({"concurrency": -1.0}, "concurrency"),
        ({"request_rate": float("nan")}, "request_rate"),
        ({"prefix_hit": 1.5}, "prefix_hit"),
    ],
)
def test_bad_loads_are_refused_with_their_field(bad: dict[str, Any], field: str) -> None:
    """Numbers out of range are a 422 that names the field."""
    with pytest.raises(InvalidValue) as caught:
        _ask(**bad)
    assert field in caught.value.details["fields"]


def test_expert_ranks_must_divide_the_ranks() -> None:
    """ep has to divide tp*dp."""
    engine = EngineSettings(layout=ServingLayout(tp=4, ep=3))
    with pytest.raises(InvalidValue):
        estimate_serving(lookup("openai/gpt-oss-120b"), topology_of_preset("H100", 4), engine, Workload())
