"""The batching simulation, service levels and the search."""

from __future__ import annotations

import itertools

import pytest

from common.errors import InvalidValue, NothingFits
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.presets import lookup
from head.planner.serving.batching import StepCost, arrivals_at, simulate
from head.planner.serving.engine_step import ServingLayout
from head.planner.serving.estimate import EngineSettings, Workload, estimate_serving
from head.planner.serving.memory import MemorySettings
from head.planner.serving.search import (
    SearchSpace,
    Slo,
    largest_load,
    layouts,
    load_curve,
    pareto,
    search_serving,
)

COST = StepCost(decode_points=((1, 0.010), (64, 0.020)), prompt_token_s=1e-5)


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    """A lone request: prompt of 1000 tokens in 10 ms, then 99 steps of 10 ms."""
    found = simulate(COST, prompt=1000, output=100, places=8, arrivals=[0.0])
    assert found.ttft_s.mean == pytest.approx(0.010)
    assert found.tpot_s.mean == pytest.approx(0.010)
    assert found.e2e_s.mean == pytest.approx(0.010 + 99 * 0.010)
    assert found.steps < 10


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    """Chunks add their fixed cost and delay the first token, not beyond it."""
    whole = simulate(COST, prompt=4000, output=2, places=1, arrivals=[0.0])
    cost = StepCost(decode_points=COST.decode_points, prompt_token_s=1e-5, chunk_s=0.002)
    parts = simulate(cost, prompt=4000, output=2, places=1, chunk=1000, arrivals=[0.0])
    assert parts.ttft_s.mean == pytest.approx(whole.ttft_s.mean + 4 * 0.002)


@pytest.mark.parametrize("rate", [0.2, 2.0, 8.0, 40.0])
def test_littles_law_is_exact_in_the_simulation(rate: float) -> None:
    """Time-averaged requests in flight are the rate of finished ones times their mean time."""
    found = simulate(COST, prompt=500, output=50, places=32, arrivals=arrivals_at(rate, 300))
    assert found.mean_in_flight == pytest.approx(found.requests_per_s * found.e2e_s.mean, rel=1e-9)
    assert found.mean_running <= 32 + 1e-9


def test_latency_grows_with_load_and_an_overload_is_unstable() -> None:
    """Waiting grows with the rate; beyond capacity the queue does not come to rest."""
    found = [simulate(COST, prompt=500, output=50, places=16, arrivals=arrivals_at(r, 400)) for r in (1, 8, 15, 60)]
    waits = [point.ttft_s.mean for point in found]
    assert waits == sorted(waits)
    assert found[0].is_stable
    assert not found[-1].is_stable


def test_a_closed_loop_keeps_its_clients_in_flight() -> None:
    """With as many places as clients, nearly all are always in flight and nobody waits for a place."""
    found = simulate(COST, prompt=100, output=100, places=16, concurrency=16)
    assert found.mean_in_flight <= 16 + 1e-9
    assert found.mean_in_flight > 14
    assert found.requests == 128
    squeezed = simulate(COST, prompt=100, output=100, places=4, concurrency=16)
    assert squeezed.ttft_s.mean > 2 * found.ttft_s.mean
    assert squeezed.output_tokens_per_s < found.output_tokens_per_s


def test_arrivals_have_their_rate_and_are_the_same_every_time() -> None:
    """The gaps are fixed, positive and add up to the rate."""
    times = arrivals_at(5.0, 1000)
    assert times == arrivals_at(5.0, 1000)
    assert times[-1] == pytest.approx(200.0)
    assert all(a < b for a, b in itertools.pairwise(times))


def test_a_simulation_without_a_load_is_refused() -> None:
    """Arrivals or a concurrency have to be given."""
    with pytest.raises(InvalidValue):
        simulate(COST, prompt=10, output=10, places=1)


def test_a_load_curve_rises_to_the_engine_s_capacity() -> None:
    """Ten loads, each no slower than the one before, with throughput near the rate while stable."""
    arch, topology = lookup("meta-llama/Llama-3.1-8B"), topology_of_preset("H100", 1)
    engine = EngineSettings(weights="fp8", memory=MemorySettings(max_num_seqs=64))
    curve = load_curve(arch, topology, engine, Workload(isl=512, osl=128), requests=150)
    assert len(curve) == 10
    e2e = [point.e2e_s.mean for point in curve]
    assert all(a <= b * 1.02 for a, b in itertools.pairwise(e2e))
    assert all(not point.is_truncated for point in curve)


def test_the_largest_load_holds_its_limits_and_one_more_does_not() -> None:
    """At the answer every limit holds; one request more breaks one or finds no place."""
    arch, topology = lookup("meta-llama/Llama-3.1-70B"), topology_of_preset("H100", 4)
    engine = EngineSettings(layout=ServingLayout(tp=4), weights="fp8")
    load, slo = Workload(isl=1024, osl=256), Slo(ttft_s=1.0, tpot_s=0.03)
    count, found = largest_load(arch, topology, engine, load, slo)
    assert count > 1
    assert not slo.misses(found)
    more = estimate_serving(arch, topology, engine, Workload(isl=1024, osl=256, concurrency=float(count + 1)))
    assert slo.misses(more) or more.is_saturated
    assert largest_load(arch, topology, engine, load, Slo(tpot_s=1e-4))[0] == 0


def test_layouts_say_why_they_are_left_out() -> None:
    """Heads, experts and dense replicas: each reason once at least, and every kept layout fills its engine."""
    found = list(layouts(lookup("Qwen/Qwen3-235B-A22B"), topology_of_preset("H200", 16)))
    assert all(layout.tp * layout.pp * layout.dp in (1, 2, 4, 8, 16) for layout, _ in found)
    assert "tensor parallelism across nodes" in {reason for _, reason in found}
    dense = list(layouts(lookup("meta-llama/Llama-3.1-8B"), topology_of_preset("H200", 4)))
    assert {layout.dp for layout, reason in dense if not reason} == {1}


def test_a_search_returns_a_front_that_nothing_in_it_dominates() -> None:
    """No choice of the front is at least as good in everything; dropped ones are counted with a reason."""
    arch, topology = lookup("meta-llama/Llama-3.1-70B"), topology_of_preset("H100", 8)
    space = SearchSpace(weights=("bf16", "fp8"), max_num_seqs=(64, 256), chunk_tokens=(8192,))
    found = search_serving(arch, topology, Workload(isl=1024, osl=256, concurrency=64.0), space)
    assert found.front
    assert pareto(found.front) == list(found.front)
    assert {"throughput", "ttft", "latency", "memory"} <= set(found.best)
    assert all(choice.rationale for choice in found.best.values())
    assert any("room" in item.reason for item in found.dropped)
    again = search_serving(arch, topology, Workload(isl=1024, osl=256, concurrency=64.0), space)
    assert again == found


def test_a_search_where_nothing_fits_says_so_with_reasons() -> None:
    """A 671B model on one 24 GB card is a 409 with what was dropped."""
    with pytest.raises(NothingFits) as caught:
        search_serving(lookup("deepseek-ai/DeepSeek-V3"), topology_of_preset("RTX-4090", 1), Workload(), SearchSpace())
    assert caught.value.details["dropped"]


def test_choices_keep_the_limits_when_any_configuration_can() -> None:
    """With a limit that some configurations meet, all of the front meet it."""
    arch, topology = lookup("openai/gpt-oss-120b"), topology_of_preset("H100", 8)
    slo = Slo(tpot_s=0.02)
    found = search_serving(
        arch, topology, Workload(isl=1024, osl=256, concurrency=32.0), SearchSpace(chunk_tokens=(8192,)), slo
    )
    assert all(not choice.misses for choice in found.front)
