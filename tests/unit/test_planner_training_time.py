"""The time of a training step: hard properties of every answer, on shipped rows and on layouts drawn at random."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from head.planner.calibration.training_rows import TrainingRow, shipped_rows
from head.planner.hardware.accelerators import accelerator_names
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.flops import prefill_flops
from head.planner.model.presets import lookup
from head.planner.training.bubble import idle_rounds, stages_of
from head.planner.training.collective_volumes import all_to_all, gather, group_of
from head.planner.training.layout import TrainingLayout
from head.planner.training.step_time import PARTS, StepTime, estimate, step_seconds
from head.planner.training.step_work import step_work

ROWS = shipped_rows()


def dense(layers: int = 32, hidden: int = 4096, heads: int = 32, width: int = 14336) -> Architecture:
    """A plain gated decoder."""
    return Architecture(
        name="dense",
        hidden=hidden,
        vocab=128256,
        groups=(
            LayerGroup(
                count=layers,
                attention=Attention(heads=heads, kv_heads=8, head_dim=128),
                feed_forward=FeedForward(width=width),
            ),
        ),
    )


def routed(experts: int = 64, active: int = 8) -> Architecture:
    """A decoder with experts in every layer."""
    return Architecture(
        name="routed",
        hidden=2048,
        vocab=151936,
        groups=(
            LayerGroup(
                count=48,
                attention=Attention(heads=32, kv_heads=4, head_dim=128),
                feed_forward=FeedForward(kind="moe", width=768, experts=experts, active=active),
            ),
        ),
    )


def ask(row: TrainingRow) -> StepTime:
    """The planner's answer to a row's question."""
    return estimate(row.architecture, row.topology(), row.layout, row.stack)


def check(found: StepTime) -> None:
    """What holds for every answer."""
    assert set(found.parts) == set(PARTS)
    assert all(value >= 0 for value in found.parts.values())
    assert math.isclose(math.fsum(found.parts.values()), found.step_s.value, rel_tol=1e-9)
    assert found.step_s.value >= found.roofline_s * (1 - 1e-9)
    assert found.roofline_s * (1 - 1e-9) <= found.step_s.low <= found.step_s.value <= found.step_s.high
    assert 0 < found.mfu.value <= found.mfu.high <= 1
    assert found.mfu.value <= found.hfu.value * (1 + 1e-9) <= 1 + 1e-9
    assert found.tokens_per_s.low <= found.tokens_per_s.value <= found.tokens_per_s.high
    text = msgspec.json.encode(found).decode()
    assert "null" not in json.dumps(json.loads(text, parse_constant=lambda word: pytest.fail(word)))


def test_every_shipped_row_gets_an_answer_with_the_hard_properties() -> None:
    """Parts are not negative and sum to the step, nothing is above the roofline, utilisations are at most 1."""
    assert len(ROWS) > 100
    for row in ROWS:
        check(ask(row))


def test_the_same_question_gets_the_same_answer() -> None:
    """Two calls agree to the last bit, and the short form agrees with the long one."""
    for row in ROWS[::25]:
        first, second = ask(row), ask(row)
        assert msgspec.json.encode(first) == msgspec.json.encode(second)
        assert step_seconds(row.architecture, row.topology(), row.layout, row.stack) == first.step_s.value


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(accelerator_names()),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 8, 64]),
    st.sampled_from(["bf16", "fp16", "fp8", "mxfp8", "nvfp4", "fp32"]),
    st.sampled_from(["none", "selective", "full"]),
    st.sampled_from(["none", "zero1", "zero2", "zero3", "fsdp", "hsdp"]),
    st.sampled_from(["full", "lora", "qlora"]),
    st.sampled_from(["none", "optimizer", "optimizer_and_weights", "activations"]),
    st.sampled_from([512, 4096, 131072]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["megatron", "torchtitan", "maxtext", "megatron-bridge@26.06", "unknown", "my-own"]),
)
def test_any_layout_on_any_device_keeps_the_hard_properties(
    device: str,
    tp: int,
    pp: int,
    cp: int,
    dp: int,
    precision: str,
    recompute: str,
    sharding: str,
    tuning: str,
    offload: str,
    seq: int,
    has_flash: bool,
    is_moe: bool,
    stack: str,
) -> None:
    """No combination of device, degrees, precision, recomputation, sharding, tuning, offload and stack breaks them."""
    layout = msgspec.convert(
        {
            "tp": tp,
            "pp": pp,
            "virtual_stages": pp,
            "cp": cp,
            "dp": dp,
            "ep": min(dp, 8) if is_moe else 1,
            "global_batch": dp * 8,
            "micro_batch": 2,
            "seq": seq,
            "precision": precision,
            "recompute": recompute,
            "sharding": sharding,
            "tuning": tuning,
            "offload": offload,
            "has_flash_attention": has_flash,
            "partition": "layers_and_embedding" if pp == 4 else "layers",
        },
        TrainingLayout,
    )
    arch = routed() if is_moe else dense()
    found = estimate(arch, topology_of_preset(device, layout.gpus), layout, stack)
    check(found)
    assert found.step_s.value > 0


@pytest.mark.parametrize("arch", [dense(), routed()], ids=["dense", "routed"])
def test_more_gpus_with_the_same_batch_stay_above_the_roofline(arch: Architecture) -> None:
    """Strong scaling: the step gets shorter at most in proportion, and efficiency never grows."""
    last = math.inf
    for dp in (1, 2, 4, 8, 16, 32, 64):
        layout = TrainingLayout(tp=2, dp=dp, global_batch=256, seq=4096)
        topology = topology_of_preset("H100-SXM-80GB", layout.gpus)
        found = estimate(arch, topology, layout, "unknown")
        work = step_work(arch, topology, layout)
        assert found.step_s.value >= work.roofline_s
        assert math.isclose(work.step_flops, step_work(arch, topology, layout).step_flops)
        assert found.mfu.value <= last * (1 + 1e-9)
        last = found.mfu.value


def test_step_flops_do_not_depend_on_the_layout() -> None:
    """Degrees of parallelism split the model FLOPs of a batch and neither add nor lose any."""
    arch, counted = dense(), []
    for tp, pp, cp, dp in ((1, 1, 1, 16), (8, 1, 1, 2), (1, 4, 1, 4), (2, 1, 4, 2)):
        layout = TrainingLayout(tp=tp, pp=pp, cp=cp, dp=dp, global_batch=64, seq=8192)
        counted.append(step_work(arch, topology_of_preset("H100-SXM-80GB", 16), layout).step_flops)
    assert all(math.isclose(value, counted[0], rel_tol=1e-9) for value in counted)
    closed = 6 * (32 * (4096 * 128 * (32 + 16) + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096) + 6 * 32 * 4096 * 8192
    assert math.isclose(counted[0] / (64 * 8192), closed, rel_tol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Meta-Llama-3.1-8B",
        "Qwen/Qwen3-30B-A3B",
        "deepseek-ai/DeepSeek-V4-Flash",
        "moonshotai/Kimi-K2-Instruct",
        "openai/gpt-oss-120b",
        "google/gemma-3-12b-it",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B",
    ],
)
def test_step_flops_agree_with_the_models_own_count(name: str) -> None:
    """The step's FLOPs, added up from the products of layers, are three times the forward count of `model.flops`."""
    arch = msgspec.structs.replace(lookup(name), mtp_layers=0)
    layout = TrainingLayout(dp=8, global_batch=8, seq=4096)
    work = step_work(arch, topology_of_preset("H100-SXM-80GB", 8), layout)
    forward = prefill_flops(arch, 4096).total
    assert math.isclose(work.step_flops / (8 * 4096), 3.0 * forward, rel_tol=0.02)


def test_recomputation_is_in_hfu_and_not_in_mfu() -> None:
    """Full recomputation adds a third of the linear FLOPs to the hardware's count and none to the model's."""
    topology = topology_of_preset("A100-SXM-80GB", 8)
    none = step_work(dense(), topology, TrainingLayout(dp=8, global_batch=8, seq=2048))
    full = step_work(dense(), topology, TrainingLayout(dp=8, global_batch=8, seq=2048, recompute="full"))
    assert full.step_flops == none.step_flops == none.hardware_flops
    assert 1.25 < full.hardware_flops / full.step_flops < 4 / 3


def test_more_microbatches_shrink_the_bubble() -> None:
    """The share of time a pipeline idles falls with the number of micro-batches, with more virtual stages and without
    bubble when the schedule has none.
    """
    arch = dense(layers=80, hidden=8192, heads=64, width=28672)
    topology = topology_of_preset("H100-SXM-80GB", 64)

    def share(batch: int, virtual: int = 1, schedule: str = "1f1b") -> float:
        layout = TrainingLayout(
            tp=8,
            pp=8,
            global_batch=batch,
            seq=4096,
            virtual_stages=virtual,
            schedule=schedule,  # type: ignore[arg-type]
        )
        found = estimate(arch, topology, layout, "unknown")
        return found.parts["bubble"] / found.step_s.value

    assert share(8) > share(16) > share(64) > 0
    assert share(16, virtual=5, schedule="interleaved") < share(16)
    assert share(16, schedule="zero_bubble") < share(16)
    assert idle_rounds(TrainingLayout(pp=1)) == 0


def test_stages_count_the_embedding_when_told_to() -> None:
    """126 layers on 16 stages: even with embedding and head as layers, uneven without."""
    even = stages_of(126, TrainingLayout(pp=16, partition="layers_and_embedding"))
    assert (even.layers_max, even.layers_last) == (8, 7)
    uneven = stages_of(126, TrainingLayout(pp=16))
    assert (uneven.layers_max, uneven.layers_last) == (8, 7)
    assert stages_of(32, TrainingLayout(pp=4)).layers_max == 8
    assert stages_of(32, TrainingLayout(pp=1)).layers_last == 32


def test_offload_and_imbalance_never_make_a_step_faster() -> None:
    """Moving states over PCIe costs time, and so do experts with more than their share of tokens."""
    topology = topology_of_preset("H100-SXM-80GB", 8)
    plain = TrainingLayout(dp=8, ep=8, global_batch=64, seq=4096)
    base = step_seconds(routed(), topology, plain)
    for change in (
        {"offload": "optimizer"},
        {"offload": "activations"},
        {"expert_imbalance": 1.5},
        {"recompute": "full"},
    ):
        assert step_seconds(routed(), topology, msgspec.structs.replace(plain, **change)) > base


def test_sharding_moves_what_each_scheme_says() -> None:
    """FSDP over nodes uses the network for every micro-batch, HSDP once; a pipeline keeps gathered parameters."""
    topology = topology_of_preset("H100-SXM-80GB", 64)
    fsdp = TrainingLayout(dp=64, global_batch=256, seq=4096, sharding="fsdp")
    whole = step_work(dense(), topology, fsdp)
    hybrid = step_work(dense(), topology, msgspec.structs.replace(fsdp, sharding="hsdp"))
    staged = step_work(dense(), topology, msgspec.structs.replace(fsdp, pp=4, dp=16))
    assert whole.shard_nic_s > 0
    assert whole.dp_nic_s == 0
    assert hybrid.shard_nic_s == 0
    assert 0 < hybrid.dp_nic_s < whole.shard_nic_s
    assert hybrid.optimizer_s > whole.optimizer_s
    assert staged.shard_nic_s == 0
    assert staged.dp_nic_s > 0
    plain = step_work(dense(), topology, msgspec.structs.replace(fsdp, sharding="none"))
    assert plain.optimizer_s == pytest.approx(64 * whole.optimizer_s)


def test_groups_lie_on_links_and_cards_as_placed() -> None:
    """A tensor-parallel group stays in a node, data parallelism with stride 8 has one member per node, an NVL72 rack
    keeps 64 ranks on its links; a domain's tokens cross the network once, not once per expert.
    """
    hgx = topology_of_preset("H100-SXM-80GB", 64)
    assert group_of(hgx, 8, 1).local == 8
    assert group_of(hgx, 8, 8).local == 1
    assert group_of(topology_of_preset("GB200", 64), 64, 1).local == 64
    whole = 1e9
    assert gather(group_of(hgx, 8, 1), whole).nic_s == 0
    assert math.isclose(gather(group_of(hgx, 8, 8), whole).nic_s, 7 / 8 * whole / 50e9)
    one = all_to_all(group_of(hgx, 64, 1), whole, copies=1.0)
    eight = all_to_all(group_of(hgx, 64, 1), whole, copies=8.0)
    assert eight.nic_s < one.nic_s
    assert eight.link_s == one.link_s


def test_an_unseen_stack_or_device_is_answered_with_a_wider_interval() -> None:
    """Nothing is refused: unknown software and a generation without rows get wider bounds and say so."""
    row = next(row for row in ROWS if row.source.startswith("Mosaic"))
    known, unknown = ask(row), estimate(row.architecture, row.topology(), row.layout, "never-heard-of")
    assert known.calibrated_for["stack"]
    assert not unknown.calibrated_for["stack"]
    assert unknown.notes
    spread = [found.step_s.high / found.step_s.low for found in (known, unknown)]
    assert spread[1] > 1.5 * spread[0]
    other = estimate(row.architecture, topology_of_preset("MI300X", row.gpus), row.layout, "never-heard-of")
    assert not other.calibrated_for["generation"]
    assert other.step_s.high / other.step_s.low > spread[1]


def test_an_answer_names_its_convention_its_calibration_and_near_rows() -> None:
    """A person can see what was counted, what was fitted, and which measured rows lie nearest."""
    row = ROWS[0]
    found = ask(row)
    assert "causal" in found.mfu.convention
    assert "recomputed" in found.hfu.convention
    assert found.step_s.calibration
    assert found.step_s.near[0].id == row.id
    assert found.step_s.near[0].distance == 0
    assert found.bottleneck in {"compute", "memory_traffic", "communication", "bubble", "launch", "optimizer"}
