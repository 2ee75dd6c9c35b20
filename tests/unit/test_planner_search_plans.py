"""Scaling, resilience and post-training: what is built on memory and step time."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidValue
from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.model.presets import lookup
from head.planner.training.layout import TrainingLayout
from head.planner.training.post_training import RECIPES, plan, reference_strategy
from head.planner.training.resilience import (
    checkpoint_of,
    daly_interval_s,
    resilience,
    young_interval_s,
)
from head.planner.training.scaling import scale

SMALL = lookup("llama-3.1-8b")
NODE = topology_of_preset("H100-SXM-80GB", 8)
BASE = TrainingLayout(dp=8, sharding="fsdp", recompute="full", global_batch=512, seq=2048)


def work(arch: Architecture, topology: Topology, layout: TrainingLayout) -> float:
    """Compute that divides by GPUs, and an exchange that grows with them."""
    compute = 1e-15 * 6 * count(arch).active * layout.global_batch * layout.seq / layout.gpus
    return compute * (1.33 if layout.recompute == "full" else 1.0) + 0.02 * math.log2(layout.gpus)


def test_strong_scaling_loses_what_weak_scaling_keeps() -> None:
    """With the batch fixed, efficiency falls with GPUs; with the batch of each GPU fixed, it falls less."""
    curves = scale(SMALL, NODE, BASE, [8, 16, 64, 256], step_seconds=work)
    strong = [point.efficiency for point in curves.strong]
    weak = [point.efficiency for point in curves.weak]
    assert strong[0] == weak[0] == 1.0
    assert strong == sorted(strong, reverse=True)
    assert all(w > s for w, s in zip(weak[1:], strong[1:], strict=True))
    assert all(0 < value <= 1 for value in strong + weak)
    good = [point.gpus for point in curves.strong if point.efficiency >= curves.efficiency_floor]
    assert curves.optimal_gpus == max(good)


def test_points_that_cannot_be_say_why() -> None:
    """More replicas than sequences, or GPUs that the model's ways do not divide, have words instead of numbers."""
    layout = msgspec.structs.replace(BASE, tp=2, dp=4, global_batch=12)
    curves = scale(SMALL, NODE, layout, [9, 64], step_seconds=work)
    problems = {point.gpus: point.problem for point in curves.strong}
    assert "multiple" in problems[9]
    assert "does not divide" in problems[64]
    assert problems[8] == ""


def test_checkpoint_holds_weights_master_and_moments() -> None:
    """BLOOM's checkpoints: 14 bytes per parameter, 2.3 TB as printed for 176 billion (TiB)."""
    saved = checkpoint_of(lookup("bigscience/bloom"), BASE)
    assert saved.bytes_per_param == 14
    assert saved.total_bytes / 2**40 == pytest.approx(2.3, rel=0.03)
    assert saved.total_bytes == saved.weights_bytes + saved.optimizer_bytes
    adapters = checkpoint_of(SMALL, msgspec.structs.replace(BASE, tuning="lora"))
    assert adapters.total_bytes < checkpoint_of(SMALL, BASE).total_bytes / 50


@given(write=st.floats(0.1, 1e4), mtbf=st.floats(1e3, 1e8))
def test_daly_agrees_with_young_when_failures_are_rare(write: float, mtbf: float) -> None:
    """The higher-order interval is under Young's by about the time of a write, and never over the MTBF."""
    daly, young = daly_interval_s(write, mtbf), young_interval_s(write, mtbf)
    assert 0 < daly <= max(mtbf, young)
    if write < mtbf / 1e4:
        assert daly == pytest.approx(young, rel=0.02)


@settings(max_examples=100, deadline=None)
@given(
    dp=st.sampled_from([8, 512, 16384, 131072]),
    hours=st.floats(100, 1e6),
    restart=st.floats(0, 7200),
    rate=st.floats(1e8, 1e13),
    is_asynchronous=st.booleans(),
)
def test_shares_of_wall_time_sum_to_one(
    dp: int, hours: float, restart: float, rate: float, is_asynchronous: bool
) -> None:
    """Useful work, saving, lost work and restarts are all of the wall time."""
    topology = topology_of_preset("H100-SXM-80GB", dp)
    layout = msgspec.structs.replace(BASE, dp=dp, global_batch=dp)
    found = resilience(
        SMALL, topology, layout, gpu_hours_per_failure=hours, restart_s=restart, storage_bytes_per_s=rate,
        is_asynchronous=is_asynchronous,
    )  # fmt: skip
    shares = (found.goodput_share, found.checkpoint_share, found.lost_work_share, found.restart_share)
    assert all(-1e-12 <= share <= 1 for share in shares)
    assert sum(shares) == pytest.approx(1.0)
    assert found.failures_per_day == pytest.approx(dp * 24 / hours)


def test_the_optimal_interval_is_near_the_best_of_many() -> None:
    """No interval tried leaves noticeably more goodput than the one proposed."""
    topology = topology_of_preset("H100-SXM-80GB", 16384)
    layout = msgspec.structs.replace(BASE, dp=16384, global_batch=16384)
    ours = resilience(SMALL, topology, layout, storage_bytes_per_s=1e9)
    tried = [
        resilience(SMALL, topology, layout, storage_bytes_per_s=1e9, interval_s=ours.interval_s * factor).goodput_share
        for factor in (0.25, 0.5, 0.8, 1.25, 2, 4)
    ]
    assert ours.goodput_share >= max(tried) - 1e-3


def test_failures_of_the_llama_run_are_reproduced() -> None:
    """419 interruptions in 54 days on 16,384 GPUs are 7.8 a day; the effective time was over 90 %."""
    topology = topology_of_preset("H100-SXM-80GB", 16384)
    layout = TrainingLayout(tp=8, pp=16, dp=128, global_batch=2048, seq=8192)
    found = resilience(lookup("llama-3.1-405b"), topology, layout)
    assert found.failures_per_day == pytest.approx(419 / 54)
    assert found.goodput_share > 0.9


def test_bad_numbers_of_resilience_are_refused() -> None:
    """A failure every zero hours is no plan."""
    with pytest.raises(InvalidValue):
        resilience(SMALL, NODE, BASE, gpu_hours_per_failure=0)


@pytest.mark.parametrize("algorithm", sorted(RECIPES))
@pytest.mark.parametrize("reference", ["separate", "cpu_offload", "quantized", "vllm_server", "none"])
def test_post_training_parts_sum_to_the_whole(algorithm: str, reference: str) -> None:
    """States of all models, the largest phase and what is fixed are the total; phases are the step."""
    found = plan(SMALL, NODE, BASE, algorithm, reference=reference, step_seconds=work)
    states = sum(model.gpu_bytes for model in found.models)
    largest = max(phase.working_bytes for phase in found.phases)
    assert found.total.value == pytest.approx(states + largest + found.fixed_bytes)
    assert found.step_s.value == pytest.approx(sum(phase.seconds for phase in found.phases))
    assert found.samples_per_s == pytest.approx(BASE.global_batch / found.step_s.value)
    assert "composed" in found.basis
    json.loads(msgspec.json.encode(found))


def test_algorithms_hold_the_models_they_need() -> None:
    """PPO holds four models, GRPO no critic, DPO no reward model, ORPO the actor alone."""
    roles = {
        name: {model.role for model in plan(SMALL, NODE, BASE, name, step_seconds=work).models}
        for name in ("ppo", "grpo", "dpo", "orpo")
    }
    assert roles["ppo"] == {"actor", "critic", "reference", "reward"}
    assert roles["grpo"] == {"actor", "reference", "reward"}
    assert roles["dpo"] == {"actor", "reference"}
    assert roles["orpo"] == {"actor"}
    rules = plan(SMALL, NODE, BASE, "grpo", has_reward_model=False, step_seconds=work)
    assert {model.role for model in rules.models} == {"actor", "reference"}


def test_reference_strategies_trade_gpu_memory_for_something_else() -> None:
    """Quantised takes less than full, the host takes what is offloaded, a server takes GPUs of its own."""
    full, quantized, host, server = (
        plan(SMALL, NODE, BASE, "dpo", reference=name, step_seconds=work)
        for name in ("full_gpu", "quantized", "cpu_offload", "vllm_server")
    )
    weights = [found.models[1].weights for found in (full, quantized, host, server)]
    assert weights[0] > weights[1] > weights[2] > weights[3] == 0
    assert host.host_bytes_per_node > 0 == full.host_bytes_per_node
    assert server.extra_gpus == 1
    assert host.step_s.value >= full.step_s.value


def test_shared_weights_need_adapters() -> None:
    """Full training moves the weights that the reference would share; adapters do not."""
    with pytest.raises(InvalidValue, match="adapters"):
        plan(SMALL, NODE, BASE, "dpo", reference="shared_weights", step_seconds=work)
    lora = msgspec.structs.replace(BASE, tuning="lora")
    found = plan(SMALL, NODE, lora, "dpo", reference="shared_weights", step_seconds=work)
    assert found.models[1].gpu_bytes == 0


def test_unknown_words_are_refused_with_what_is_known() -> None:
    """An unknown algorithm or strategy is a bad value; "separate" is a full copy on the GPUs."""
    with pytest.raises(InvalidValue):
        plan(SMALL, NODE, BASE, "sarsa", step_seconds=work)
    with pytest.raises(InvalidValue):
        reference_strategy("somewhere")
    assert reference_strategy("separate") == "full_gpu"


def test_generation_takes_longer_for_longer_answers() -> None:
    """Twice the response takes about twice the time to generate; a preference pair generates nothing."""
    short, long = (
        plan(SMALL, NODE, BASE, "grpo", response_tokens=tokens, step_seconds=work).phases[0] for tokens in (512, 1024)
    )
    assert short.name == long.name == "generate"
    assert 1.5 < long.seconds / short.seconds < 2.5
    assert "generate" not in [phase.name for phase in plan(SMALL, NODE, BASE, "dpo", step_seconds=work).phases]
