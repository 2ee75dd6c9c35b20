"""A topology says where it comes from, and is never better than what the nodes reported."""

from __future__ import annotations

import json

import pytest

from common.errors import InvalidValue, NotFound, NothingFits
from common.wire import Gpu
from head.planner.hardware.accelerators import GIB, all_accelerators
from head.planner.hardware.topology import (
    MATRIX_GPUS_LIMIT,
    NodeFacts,
    Topology,
    bandwidth_bytes_per_s,
    describe,
    optimal_tp_sizes,
    topology_of_nodes,
    topology_of_numbers,
    topology_of_preset,
)

H100 = "NVIDIA H100 80GB HBM3"


def gpus(count: int, name: str = H100, gib: float = 79.65, *, linked: bool = True) -> tuple[Gpu, ...]:
    """GPUs as an agent reports them, all linked with each other or none."""
    return tuple(
        Gpu(
            index=index,
            uuid=f"GPU-{index}",
            name=name,
            memory_bytes=int(gib * GIB),
            nvlink_peers=tuple(other for other in range(count) if other != index) if linked else (),
        )
        for index in range(count)
    )


def node(name: str, **facts: object) -> NodeFacts:
    """A node with eight linked H100 unless said otherwise."""
    return NodeFacts(node_id=name, **({"gpus": gpus(8)} | facts))  # type: ignore[arg-type]


def test_a_preset_is_called_a_preset_and_changed_numbers_given() -> None:
    """The source tells a usual machine from one whose numbers the request gave."""
    assert topology_of_preset("h100", 16).source == "preset"
    assert topology_of_preset("h100", 16, nic_gbit_per_s=100).source == "given"
    made = topology_of_numbers(4, peak_tflops=100, memory_gib=16, memory_gb_per_s=900)
    assert (made.source, made.gpus, made.gpus_per_node) == ("given", 4, 4)


def test_a_preset_is_the_usual_machine() -> None:
    """Two DGX H100, one NVL72 rack, and PCIe cards in bridged pairs."""
    dgx = topology_of_preset("h100", 16)
    assert (dgx.nodes, dgx.gpus_per_node, dgx.domain_gpus, dgx.nic_bytes_per_s) == (2, 8, 8, 50e9)
    rack = topology_of_preset("gb200", 72)
    assert (rack.nodes, rack.domain_gpus, rack.local_gpus) == (18, 72, 72)
    pairs = topology_of_preset("H100-PCIe-80GB", 8)
    assert (pairs.nodes, pairs.domain_gpus, pairs.local_gpus) == (1, 2, 8)


@pytest.mark.parametrize(
    "wrong",
    [{"gpus": 0}, {"gpus": -8}, {"gpus": 10**9}, {"gpus": 8, "gpus_per_node": -1}, {"gpus": 8, "nic_gbit_per_s": -1.0}],
)
def test_bad_counts_and_rates_are_refused(wrong: dict[str, float]) -> None:
    """Counts below one, beyond the limit, and negative rates are 422."""
    with pytest.raises(InvalidValue):
        topology_of_preset("h100", **wrong)  # type: ignore[arg-type]


def test_an_unknown_accelerator_is_not_found() -> None:
    """There is no stand-in machine for an unknown name."""
    with pytest.raises(NotFound):
        topology_of_preset("b2oo-ultra", 8)


def test_the_cluster_is_what_its_nodes_report() -> None:
    """Two nodes of eight linked H100: sixteen, registered, with the network shared by the GPUs of a node."""
    found = topology_of_nodes([node("n2", nic_bits_per_s=400e9), node("n1", nic_bits_per_s=800e9)])
    assert (found.source, found.gpus, found.gpus_per_node, found.scaleup_gpus) == ("registered", 16, 8, 8)
    assert found.accelerator.name == "H100-SXM-80GB"
    assert found.node_ids == ("n1", "n2")
    assert found.nic_bytes_per_s == 400e9 / 8 / 8


def test_reported_memory_wins_over_the_table() -> None:
    """A card that reports less than its kind usually has is planned with what it reports."""
    found = topology_of_nodes([node("n1", gpus=gpus(8, gib=78.0))])
    assert found.accelerator.visible_bytes == int(78.0 * GIB)
    usual = topology_of_nodes([node("n1")])
    assert usual.accelerator.visible_bytes < int(79.65 * GIB)


def test_gpus_without_links_are_not_given_any() -> None:
    """SXM cards whose node reports no NVLink are joined by PCIe, and the answer says so."""
    found = topology_of_nodes([node("n1", gpus=gpus(8, linked=False))])
    assert not found.has_scaleup
    assert bandwidth_bytes_per_s(found, 0, 1) == 63e9
    assert any("NVLink" in note for note in found.notes)


def test_the_most_numerous_kind_is_planned_for() -> None:
    """A lone card of another kind is left out, and named."""
    found = topology_of_nodes([node("n1"), node("n2", gpus=gpus(1, "Tesla T4", 15.0))])
    assert (found.gpus, found.accelerator.name) == (8, "H100-SXM-80GB")
    assert any("Tesla T4" in note for note in found.notes)


def test_nodes_of_unequal_size_are_used_up_to_the_size_all_have() -> None:
    """Eight and four: sixteen asked of 8+8+4 fit whole nodes; twenty need nodes of four."""
    nodes = [node("n1"), node("n2"), node("n3", gpus=gpus(4))]
    assert topology_of_nodes(nodes, gpus=16).gpus_per_node == 8
    assert topology_of_nodes(nodes, gpus=20).gpus_per_node == 4


def test_a_rack_domain_is_recognised_across_its_trays() -> None:
    """Four linked GB200 per node are part of a domain of 72."""
    trays = [node(f"n{tray}", gpus=gpus(4, "NVIDIA GB200", 185.0)) for tray in range(4)]
    found = topology_of_nodes(trays)
    assert (found.gpus, found.gpus_per_node, found.domain_gpus) == (16, 4, 16)


def test_a_cluster_that_cannot_is_a_conflict_with_what_there_is() -> None:
    """No GPUs at all, too few, and GPUs of a name that is not known are 409 with the reason."""
    for nodes, asked in (([node("n1", gpus=())], 0), ([node("n1")], 9), ([node("n1", gpus=gpus(2, "Foo 1"))], 0)):
        with pytest.raises(NothingFits) as caught:
            topology_of_nodes(nodes, gpus=asked)
        assert caught.value.hint


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 72, 200])
def test_the_seed_s_answer_is_finite_for_every_device(count: int) -> None:
    """Every number of every device's description can be written as strict JSON, its matrices are square."""
    for device in all_accelerators():
        answer = describe(topology_of_preset(device.name, count))
        json.dumps(answer, allow_nan=False)
        shown = min(count, MATRIX_GPUS_LIMIT)
        assert len(answer["bandwidth_matrix"]) == shown == answer["matrix_gpus"]
        assert all(len(row) == shown and all(rate > 0 for rate in row) for row in answer["bandwidth_matrix"])
        assert answer["bandwidth_matrix"] == [list(row) for row in zip(*answer["bandwidth_matrix"], strict=True)]
        assert answer["source"] == "preset"


def test_tensor_parallel_sizes_stay_on_one_domain() -> None:
    """Four linked GPUs allow up to 4; a bridged pair 2; a rack 64; a lone GPU 1."""

    def sizes(name: str, count: int) -> list[int]:
        return optimal_tp_sizes(topology_of_preset(name, count))

    assert sizes("h100", 4) == [1, 2, 4]
    assert sizes("h100", 64) == [1, 2, 4, 8]
    assert sizes("a100-pcie-80gb", 8) == [1, 2]
    assert sizes("gb200", 72)[-1] == 64
    assert sizes("h100", 1) == [1]


def test_more_gpus_of_the_same_machines() -> None:
    """`with_gpus` keeps machines and rates and changes the count."""
    grown: Topology = topology_of_preset("h100", 8).with_gpus(64)
    assert (grown.nodes, grown.nic_bytes_per_s) == (8, 50e9)
