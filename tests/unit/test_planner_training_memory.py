"""Memory of one training layout: parts, monotonicity, verdicts."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from head.planner.hardware.topology import topology_of_preset
from head.planner.model.architecture import Architecture, FeedForward
from head.planner.model.presets import lookup
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import (
    PARTS,
    MemoryConstants,
    estimate_memory,
    fit_probability,
    peak_parts,
    verdict_of,
)
from head.planner.training.memory_layers import copies_per_layer, layer_activations
from head.planner.training.memory_stack import STACKS, stack_for, stack_named
from head.planner.training.memory_stages import in_flight

DENSE = lookup("llama-3.1-8b")
MOE = lookup("mixtral-8x7b")
LATENT = lookup("deepseek-v3")
H100 = topology_of_preset("H100-SXM-80GB", 64)
FITTED = MemoryConstants()

powers = st.sampled_from([1, 2, 4, 8])
layouts = st.builds(
    TrainingLayout,
    tp=powers,
    pp=powers,
    cp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 2, 8, 64]),
    ep=st.sampled_from([1, 2, 8]),
    virtual_stages=st.sampled_from([1, 2]),
    has_sequence_parallel=st.booleans(),
    sharding=st.sampled_from(["none", "zero1", "zero2", "zero3", "fsdp", "hsdp"]),
    schedule=st.sampled_from(["1f1b", "gpipe", "zero_bubble"]),
    global_batch=st.just(512),
    micro_batch=st.sampled_from([1, 2, 8]),
    seq=st.sampled_from([1024, 8192]),
    precision=st.sampled_from(["fp32", "fp16", "bf16", "fp8", "nvfp4"]),
    optimizer=st.sampled_from(["adamw", "adamw_8bit", "adafactor", "sgd", "lion", "paged_adamw_8bit"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    has_flash_attention=st.booleans(),
    tuning=st.sampled_from(["full", "lora", "qlora"]),
    offload=st.sampled_from(["none", "optimizer", "optimizer_and_weights", "activations"]),
    expert_imbalance=st.sampled_from([1.0, 1.3]),
)
models = st.sampled_from([DENSE, MOE, LATENT])
stacks = st.sampled_from([None, *STACKS.values()])
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(arch=models, layout=layouts, stack=stacks)
def test_parts_sum_to_the_whole(arch: Architecture, layout: TrainingLayout, stack: object) -> None:
    """Every part is finite and not negative, and together they are the total, which lies in its interval."""
    found = estimate_memory(arch, H100, layout, stack=stack)  # type: ignore[arg-type]
    values = [getattr(found.parts, name) for name in PARTS]
    assert all(0 <= value < 1e16 for value in values)
    assert sum(values) == pytest.approx(found.total.value, rel=1e-12)
    assert found.total.low <= found.total.value <= found.total.high
    assert found.parts.allocated <= found.parts.reserved <= found.parts.total
    assert found.host_bytes >= 0
    json.loads(msgspec.json.encode(found))


@quick
@given(arch=models, layout=layouts)
def test_more_memory_never_makes_a_fit_a_misfit(arch: Architecture, layout: TrainingLayout) -> None:
    """The same layout on a card with more memory has at least the probability to fit, and a verdict no worse."""
    order = {"does_not_fit": 0, "tight": 1, "fits": 2}
    found = [
        estimate_memory(arch, topology_of_preset(name, 64), layout)
        for name in ("A100-SXM-40GB", "H100-SXM-80GB", "H200-SXM-141GB")
    ]
    assert [one.capacity_bytes for one in found] == sorted(one.capacity_bytes for one in found)
    assert [one.fit_probability for one in found] == sorted(one.fit_probability for one in found)
    assert [order[one.verdict] for one in found] == sorted(order[one.verdict] for one in found)


@quick
@given(arch=models, layout=layouts, name=st.sampled_from(["megatron", "deepspeed", "fsdp", "torchtune", "huggingface"]))
def test_more_sharding_never_increases_states(arch: Architecture, layout: TrainingLayout, name: str) -> None:
    """In one program, each stage of ZeRO and each doubling of replicas holds at most the states of the one before."""
    stack = msgspec.structs.replace(STACKS[name], states="mixed", fp32_partition_copies=0)

    def states(sharding: str, dp: int) -> float:
        # one stage: with several, the fullest may be another one under another sharding
        changed = msgspec.structs.replace(
            layout, sharding=sharding, dp=dp, pp=1, virtual_stages=1, schedule="1f1b", tuning="full", ep=1
        )
        return peak_parts(arch, changed, stack, FITTED, 8)[0].states

    if layout.offload != "none":
        return
    by_stage = [states(sharding, layout.dp) for sharding in ("none", "zero1", "zero2", "zero3")]
    assert by_stage == sorted(by_stage, reverse=True) or max(by_stage) == pytest.approx(min(by_stage))
    for sharding in ("zero1", "zero2", "zero3", "fsdp"):
        by_ranks = [states(sharding, dp) for dp in (1, 2, 4, 8)]
        assert by_ranks == sorted(by_ranks, reverse=True)


@quick
@given(arch=models, layout=layouts, stack=stacks)
def test_recomputing_more_never_takes_more(arch: Architecture, layout: TrainingLayout, stack: object) -> None:
    """Full recomputation holds at most what no recomputation holds, one working layer apart."""
    full = estimate_memory(arch, H100, msgspec.structs.replace(layout, recompute="full"), stack=stack)  # type: ignore[arg-type]
    none = estimate_memory(arch, H100, msgspec.structs.replace(layout, recompute="none"), stack=stack)  # type: ignore[arg-type]
    one_layer = none.parts.activations / max(1, arch.layers // (layout.pp * layout.virtual_stages)) * 1.6
    assert full.parts.activations <= none.parts.activations + one_layer + full.parts.logits


def test_a_bigger_micro_batch_takes_more() -> None:
    """Activations and logits grow with the micro-batch; states do not."""
    small, large = (
        estimate_memory(DENSE, H100, TrainingLayout(dp=64, global_batch=512, micro_batch=size, sharding="fsdp"))
        for size in (1, 4)
    )
    assert large.parts.activations + large.parts.logits > 3 * (small.parts.activations + small.parts.logits)
    assert large.parts.states == small.parts.states


def test_offload_moves_bytes_to_the_host_and_frees_them_here() -> None:
    """What the optimizer loses on the GPU appears on the host."""
    base = TrainingLayout(dp=8, global_batch=64)
    here = estimate_memory(DENSE, H100, base)
    there = estimate_memory(DENSE, H100, msgspec.structs.replace(base, offload="optimizer"))
    assert there.parts.optimizer == 0
    assert there.host_bytes == pytest.approx(here.parts.optimizer)
    assert there.total.value < here.total.value


def test_adapters_take_a_fraction_of_full_training() -> None:
    """LoRA holds frozen weights and small states; QLoRA holds a quarter of the frozen weights."""
    base = TrainingLayout(global_batch=1, seq=1024, recompute="full", sharding="none")
    full, lora, qlora = (
        estimate_memory(DENSE, H100, msgspec.structs.replace(base, tuning=tuning))
        for tuning in ("full", "lora", "qlora")
    )
    assert lora.parts.states < full.parts.states / 6
    assert qlora.parts.weights < lora.parts.weights / 2
    assert lora.verdict == qlora.verdict == "fits"
    assert full.verdict == "does_not_fit"


def test_one_forward_one_backward_keeps_as_many_micro_batches_as_stages_follow() -> None:
    """Stage i of p keeps p - i, never more than there are; GPipe keeps all; chunks add a share of a stage."""
    layout = TrainingLayout(pp=8, global_batch=64)
    assert [in_flight(layout, stage) for stage in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert in_flight(msgspec.structs.replace(layout, global_batch=4), 0) == 4
    assert in_flight(msgspec.structs.replace(layout, schedule="gpipe"), 3) == 64
    chunked = msgspec.structs.replace(layout, schedule="interleaved", virtual_stages=4)
    assert in_flight(chunked, 0) == pytest.approx(8 * (1 + 7 / (8 * 4)))


def test_expert_parallelism_divides_experts_only() -> None:
    """Eight ways of expert parallelism leave an eighth of the experts and everything else on each rank."""
    base = TrainingLayout(dp=8, global_batch=64, sharding="none")
    one, eight = (
        estimate_memory(MOE, H100, msgspec.structs.replace(base, ep=ep), stack=STACKS["megatron"]) for ep in (1, 8)
    )
    experts = 2 * sum(group.count * 8 * 3 * MOE.hidden * group.feed_forward.width for group in MOE.groups)
    assert one.parts.weights - eight.parts.weights == pytest.approx(experts * 7 / 8, rel=1e-3)


def test_imbalance_of_experts_adds_activations() -> None:
    """The busiest rank keeps more copies of tokens."""
    base = TrainingLayout(dp=8, ep=8, global_batch=64)
    even, uneven = (
        estimate_memory(MOE, H100, msgspec.structs.replace(base, expert_imbalance=value)) for value in (1.0, 1.5)
    )
    assert uneven.parts.activations > 1.2 * even.parts.activations


def test_plain_and_gated_layers_keep_what_their_operators_need() -> None:
    """A gated feed-forward keeps gate, up and their product; a plain one the two sides of its activation."""
    group = DENSE.groups[0]
    plain = msgspec.structs.replace(group, feed_forward=FeedForward(width=group.feed_forward.width, is_gated=False))
    gated_kept, plain_kept = (
        layer_activations(DENSE.hidden, one, "fused", "full", STACKS["megatron"]) for one in (group, plain)
    )
    assert gated_kept.split - plain_kept.split == 2 * group.feed_forward.width
    assert 24 < copies_per_layer(DENSE, group) < 32


def test_eight_bit_products_keep_narrower_inputs() -> None:
    """Transformer Engine keeps the inputs of 8-bit products in 8 bits; a program that casts on the fly does not."""
    wide, narrow = (
        estimate_memory(DENSE, H100, TrainingLayout(dp=64, global_batch=64, precision=kind), stack=STACKS["megatron"])
        for kind in ("bf16", "fp8")
    )
    assert 0.7 < narrow.parts.activations / wide.parts.activations < 0.95
    same = [
        estimate_memory(DENSE, H100, TrainingLayout(dp=64, global_batch=64, precision=kind), stack=STACKS["fsdp"])
        for kind in ("bf16", "fp8")
    ]
    assert same[0].parts.activations == same[1].parts.activations


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "fits"), (1.0, "tight"), (2.0, "does_not_fit")])
def test_verdict_follows_the_interval(share: float, verdict: str) -> None:
    """Half of the memory fits, all of it is tight, twice of it does not."""
    assert verdict_of(fit_probability(share * 80, 80, 0.1)) == verdict


def test_programs_are_found_by_their_names_and_releases() -> None:
    """A release or another name of a program is no other program; an unknown one gets the usual for the layout."""
    sharded = TrainingLayout(sharding="fsdp", dp=8)
    assert stack_named("mosaic", sharded).name == "llm-foundry"
    assert stack_named("Megatron-Bridge@26.04", TrainingLayout()).name == "megatron-bridge"
    assert stack_named("megatron-lm", TrainingLayout()).name == "megatron"
    assert stack_named("megatron-bridge", sharded).name == "fsdp"
    assert stack_named("never heard of it", sharded) == stack_for(sharded)


def test_more_of_a_card_is_used_at_the_loss_when_the_vocabulary_is_large() -> None:
    """Without a pipeline and with everything recomputed, logits of 128k words decide the peak of a small model."""
    found = estimate_memory(DENSE, H100, TrainingLayout(dp=64, global_batch=512, micro_batch=8, recompute="full"))
    assert found.peak == "loss"
    assert found.parts.logits > found.parts.activations
