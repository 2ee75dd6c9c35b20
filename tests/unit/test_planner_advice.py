"""Scenarios, NCCL settings and overlap advice: what is said is understood whole, or refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import HerderError, InvalidValue, NotFound
from head.planner.advice.comm_overlap import StepPart, overlap_advice
from head.planner.advice.nccl import LEFT_OUT, nccl_advice, nccl_environment
from head.planner.advice.whatif import EXAMPLES, Change, apply_scenario, parse_scenario
from head.planner.hardware.topology import topology_of_preset
from head.planner.training.layout import TrainingLayout

SCENARIOS = {
    "double_batch_size": [("global_batch", None, 2.0)],
    "tp=4,dp=2": [("tp", 4, None), ("dp", 2, None)],
    "halve gpus": [("gpus", None, 0.5)],
    "seq x2": [("seq", None, 2.0)],
    "2x batch": [("global_batch", None, 2.0)],
    "precision=fp8": [("precision", "fp8", None)],
    "set tp to 8 and pp to 2": [("tp", 8, None), ("pp", 2, None)],
    "zero=3; context=32k": [("sharding", "zero3", None), ("seq", 32768, None)],
    "gpus / 4": [("gpus", None, 0.25)],
    "hardware=h200": [("accelerator", "H200-SXM-141GB", None)],
    "enable checkpointing": [("recompute", "full", None)],
    "Quadruple the number of nodes": [("nodes", None, 4.0)],
}
LAYOUT = TrainingLayout(tp=2, pp=2, dp=8, global_batch=64, micro_batch=2, seq=4096)


@pytest.mark.parametrize(("text", "expected"), SCENARIOS.items())
def test_a_scenario_is_understood(text: str, expected: list[tuple[str, object, float | None]]) -> None:
    """Verbs, assignments, factors and divisions, alone and together."""
    assert [(change.field, change.value, change.factor) for change in parse_scenario(text)] == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "make it faster", "tp=", "tp=0", "tp=-1", "tp=4,tp=8", "colour=red", "double precision"),
        *("precision=fp7", "batch x0", "seq=1e99", "accelerator=banana", "tp=4 please", "double", "x" * 401, ",,,"),
        *("gpus/0", "tp=99999999999", "1000000x 1000000x batch", "recompute x2", "tp=4;" * 20),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_known(text: str) -> None:
    """422 with fields and examples; nothing is skipped over."""
    with pytest.raises(InvalidValue) as caught:
        parse_scenario(text)
    assert caught.value.status == 422
    assert "tp" in caught.value.details["fields"]
    assert caught.value.details["examples"]


@given(st.text(max_size=80))
def test_any_text_is_answered_or_refused(text: str) -> None:
    """No text makes the parser fail in another way."""
    try:
        changes = parse_scenario(text)
    except HerderError:
        return
    assert changes


def test_every_example_works() -> None:
    """What the refusal suggests is understood, and applies."""
    for example in EXAMPLES:
        layout, device = apply_scenario(LAYOUT, parse_scenario(example))
        assert layout != LAYOUT or device, example


def test_a_scenario_changes_what_it_says_and_nothing_else() -> None:
    """The batch doubles; fewer GPUs mean fewer replicas; nodes count by their GPUs."""
    doubled, _ = apply_scenario(LAYOUT, parse_scenario("double_batch_size"))
    assert (doubled.global_batch, doubled.dp, doubled.gpus) == (128, 8, 32)
    halved, _ = apply_scenario(LAYOUT, parse_scenario("halve gpus"))
    assert (halved.dp, halved.gpus, halved.tp) == (4, 16, 2)
    nodes, _ = apply_scenario(LAYOUT, parse_scenario("nodes=8"), gpus_per_node=8)
    assert nodes.gpus == 64
    _, device = apply_scenario(LAYOUT, parse_scenario("accelerator=b200"), accelerator="h100")
    assert device == "B200-SXM-180GB"


@pytest.mark.parametrize("text", ["gpus=30", "batch=63", "dp=5", "tp x0.1", "halve micro batch and micro_batch=3"])
def test_an_outcome_without_whole_parts_is_refused(text: str) -> None:
    """Degrees and batches are whole numbers that divide."""
    with pytest.raises(InvalidValue):
        apply_scenario(LAYOUT, parse_scenario(text))


def test_a_multiplied_field_is_exact() -> None:
    """A third of 21 sequences is 7."""
    odd = TrainingLayout(dp=1, global_batch=21)
    assert apply_scenario(odd, (Change(field="global_batch", factor=1 / 3),))[0].global_batch == 7


def test_nccl_settings_each_have_a_reason_and_exist() -> None:
    """No variable that NCCL does not have, or that only repeats a default, is ever set."""
    for network in ("nvlink", "infiniband", "roce", "efa", "ethernet"):
        for nodes in (1, 4):
            answer = nccl_advice(nodes, 8, network, tp=8, interface="eth0", hca="mlx5")["nccl_config"]
            json.dumps(answer, allow_nan=False)
            assert set(answer["environment_variables"]) == set(answer["reasons"])
            assert not set(answer["environment_variables"]) & set(LEFT_OUT)
            assert all(answer["reasons"].values())


def test_nccl_settings_follow_the_network() -> None:
    """Sockets get threads, InfiniBand patience, one node neither."""
    single = nccl_advice(1, 8)["nccl_config"]["environment_variables"]
    sockets = nccl_advice(4, 8, "ethernet")["nccl_config"]["environment_variables"]
    fabric = nccl_advice(4, 8, "infiniband")["nccl_config"]["environment_variables"]
    assert not {name for name in single if name.startswith(("NCCL_IB", "NCCL_SOCKET"))}
    assert sockets["NCCL_IB_DISABLE"] == "1"
    assert int(sockets["NCCL_SOCKET_NTHREADS"]) * int(sockets["NCCL_NSOCKS_PERTHREAD"]) <= 64
    assert fabric["NCCL_IB_TIMEOUT"] == "22"


def test_expected_bandwidth_is_the_tables_and_falls_with_the_network() -> None:
    """Eight H100 near the measured 445 GB/s; across nodes RDMA above TCP."""
    inside = nccl_advice(1, 8)["nccl_config"]["expected_bandwidth_gb_s"]
    fabric = nccl_advice(4, 8, "infiniband")["nccl_config"]["expected_bandwidth_gb_s"]
    sockets = nccl_advice(4, 8, "ethernet")["nccl_config"]["expected_bandwidth_gb_s"]
    assert 430 < inside < 495
    assert inside > fabric > sockets > 0


def test_nvlink_between_nodes_is_questioned() -> None:
    """Naming NVLink for four DGX is warned about, for one rack of GB200 it is not."""
    assert nccl_advice(4, 8, "nvlink")["nccl_config"]["warnings"]
    rack = nccl_advice(18, 4, "nvlink", accelerator="gb200")["nccl_config"]
    assert not [warning for warning in rack["warnings"] if "ends at the node" in warning]
    assert rack["environment_variables"]["NCCL_MNNVL_ENABLE"] == "1"


@pytest.mark.parametrize(
    "wrong", [{"network_type": "pigeon"}, {"num_nodes": 0}, {"gpus_per_node": -1}, {"interface": "eth0; rm -rf /"}]
)
def test_bad_nccl_questions_are_refused(wrong: dict[str, object]) -> None:
    """Unknown networks, counts below one and names that are no interface are 422."""
    with pytest.raises(InvalidValue):
        nccl_advice(**({"num_nodes": 2} | wrong))  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        nccl_advice(accelerator="banana")


def test_connections_are_limited_only_where_it_helps() -> None:
    """CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor parallelism up to Hopper, not on Blackwell or without it."""

    def names(device: str, tp: int) -> set[str]:
        return {setting.name for setting in nccl_environment(topology_of_preset(device, 8), tp=tp)}

    assert "CUDA_DEVICE_MAX_CONNECTIONS" in names("h100", 8)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in names("h100", 1)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in names("b200", 8)


parts = st.lists(
    st.builds(
        lambda kind, time, share: StepPart(kind=kind, time_s=time, exposed_s=time * share, volume_bytes=1e6),
        st.sampled_from(["tp", "dp", "fsdp", "pp", "ep", "cp"]),
        st.floats(0, 10),
        st.floats(0, 1),
    ),
    max_size=6,
)


@given(st.floats(0, 10), parts)
def test_overlap_never_promises_more_than_there_is(compute: float, found: list[StepPart]) -> None:
    """What can be hidden is at most what is exposed, and at most the computation to hide it behind."""
    answer = overlap_advice(LAYOUT, compute, tuple(found))
    json.dumps(answer, allow_nan=False)
    analysis = answer["overlap_analysis"]
    exposed = sum(part.exposed_s for part in found) * 1e3
    assert -1e-9 <= analysis["overlap_potential_ms"] <= min(exposed, compute * 1e3) + 1e-6
    assert 0 <= analysis["overlap_potential"] <= 1
    assert 0 <= analysis["communication_share"] <= 1
    hidden = sum(row["hideable_ms"] for row in answer["opportunities"])
    assert hidden == pytest.approx(analysis["overlap_potential_ms"], abs=1e-6)


def test_overlap_names_the_switch_for_the_largest_part() -> None:
    """An exposed gradient reduction under long computation can be hidden, and how is said."""
    found = (StepPart(kind="dp", time_s=1.0, exposed_s=1.0), StepPart(kind="pp", time_s=0.001, exposed_s=0.001))
    answer = overlap_advice(LAYOUT, 5.0, found)
    assert "overlap-grad-reduce" in answer["recommendations"][0]
    assert answer["opportunities"][0]["overlap_potential"] == "high"


@pytest.mark.parametrize("wrong", [(1.0, 2.0), (-1.0, 0.0), (float("nan"), 0.0)])
def test_impossible_parts_are_refused(wrong: tuple[float, float]) -> None:
    """More exposed than whole, negative and not-a-number are 422."""
    with pytest.raises(InvalidValue):
        overlap_advice(LAYOUT, 1.0, (StepPart(kind="tp", time_s=wrong[0], exposed_s=wrong[1]),))
