"""Placement: filters with their reasons, scores, GPUs, ties, and large clusters."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import limits, wire
from common.errors import NothingFits
from common.ids import Device
from head.core import placement
from head.core.events import CordonRequested, TelemetryReceived
from head.core.objects import Node
from head.core.placement import Need, Place
from head.core.state import State
from tests.doubles.head_core import GIB
from tests.doubles.head_engines import EngineWorld


def new_world(**nodes: dict[str, Any]) -> EngineWorld:
    """Nodes by name with their budgets, and a model m that is nowhere."""
    world = EngineWorld()
    for name, budgets in nodes.items():
        world.add_node(name, **budgets)
    world.add_model("m")
    return world


def need(**fields: Any) -> Need:
    """What a llama.cpp replica of m asks for."""
    return Need(
        **{
            "service": "svc",
            "replica": "svc-0",
            "model": "m",
            "revision": "main",
            "model_bytes": GIB,
            "runtime": "llamacpp",
            **fields,
        }
    )


def choose(world: EngineWorld, **fields: Any) -> Place:
    """The best place now."""
    return placement.choose(world.state, need(**fields), world.now_ms)


def refused(world: EngineWorld, **fields: Any) -> str:
    """Why nothing fits."""
    with pytest.raises(NothingFits) as caught:
        choose(world, **fields)
    return caught.value.message


class TestFilters:
    """Each refusal has its reason in words."""

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"labels": {"zone": "a"}}, "label zone=a is missing"),
            ({"runtime": "sglang"}, "engine sglang is not installed"),
            ({"gpus": 1}, "has no GPU"),
            ({"devices": ("n1:gpu0",)}, "has no GPU"),
            ({"devices": ("n9:disk",)}, "node n9 is not known"),
            ({"model_bytes": 200 * GIB}, "the store at most 100.0 GiB"),
            ({"devices": ("n1:dram",), "model_bytes": 5 * GIB}, "the RAM tier at most 4.0 GiB"),
            ({"gpus": 1, "devices": ("n1:disk",)}, "needs 1 GPU and disk is none"),
        ],
    )
    def test_the_reason_is_in_words(self, fields: dict[str, Any], words: str) -> None:
        """What a person reads says what is missing."""
        assert words in refused(new_world(n1={"dram": 4 * GIB}), **fields)

    def test_nodes_that_take_nothing_are_left_out(self) -> None:
        """Cordoned, silent and unknown nodes get nothing new."""
        world = new_world(n1={}, n2={})
        world.request(CordonRequested, node="n1", is_cordoned=True)
        assert choose(world).node == "n2"
        world.close("n2")
        assert "cordoned" in refused(world)

    def test_without_nodes_it_says_so(self) -> None:
        """An empty cluster is not a riddle."""
        assert "no node yet" in refused(new_world())

    def test_many_refusals_are_counted(self) -> None:
        """A hundred nodes do not make a hundred lines."""
        world = new_world(**{f"n{number}": {} for number in range(5)})
        assert refused(world, gpus=1) == "nothing fits on 5 nodes: 5 × no GPU free"

    def test_a_taken_port_is_refused(self) -> None:
        """Two engines cannot listen on one port of a node, even before the first listens."""
        world = new_world(n1={})
        world.fetched("m", "n1:disk", GIB)
        world.serve(port=8080)
        assert "port 8080 is taken by svc-0" in refused(world, port=8080, service="other")

    def test_memory_that_others_reserved_is_not_given_twice(self) -> None:
        """What replicas may need counts before they use it."""
        world = new_world(n1={})
        node = world.state.nodes["n1"]
        larger = msgspec.structs.replace(node.inventory, memory_bytes=3 * GIB)
        world.state.nodes["n1"] = msgspec.structs.replace(node, inventory=larger)
        world.fetched("m", "n1:disk", GIB)
        world.serve()
        assert world.replica().memory_bytes == placement.estimate_memory_bytes(GIB, "disk")
        assert choose(world, service="other").memory_bytes > GIB
        world.serve("second")
        assert "memory are unreserved" in refused(world, service="third")

    def test_live_readings_count_as_well(self) -> None:
        """A node whose memory something else uses gets nothing."""
        world = new_world(n1={})
        node = world.state.nodes["n1"]
        larger = msgspec.structs.replace(node.inventory, memory_bytes=64 * GIB)
        world.state.nodes["n1"] = msgspec.structs.replace(node, inventory=larger)
        telemetry = wire.Telemetry(memory_available_bytes=GIB // 2)
        world.step(TelemetryReceived(node="n1", session_id=world.session("n1"), telemetry=telemetry))
        assert "something else uses it" in refused(world)


class TestGpus:
    """GPUs are whole unless memory is declared."""

    def test_one_engine_has_a_gpu_whole(self) -> None:
        """The second goes to the next GPU, the third waits."""
        world = new_world(n1={"gpus": (24 * GIB, 24 * GIB)})
        assert choose(world, gpus=1) == Place(
            "n1", "n1:gpu0", (0,), placement.estimate_memory_bytes(GIB, "gpu0"), 24 * GIB, True
        )
        for name in ("s1", "s2"):
            world.serve(name, devices=("n1:gpu0", "n1:gpu1"))
        assert {replica.device for replica in world.state.replicas.values()} == {"n1:gpu0", "n1:gpu1"}
        assert "is taken by s1-0" in refused(world, gpus=1, service="s3")

    def test_declared_memory_is_shared_until_it_is_full(self) -> None:
        """Two of 10 GiB on a card of 24, not three."""
        world = new_world(n1={"gpus": (24 * GIB,)})
        for name in ("s1", "s2", "s3"):
            world.serve(name, recipe="shared")
        assert [replica.gpu_memory_bytes for replica in world.state.replicas.values()] == [10 * GIB, 10 * GIB]
        assert "unreserved" in world.service("s3").reason
        assert "is shared by" in refused(world, gpus=1)

    def test_a_configuration_may_declare(self) -> None:
        """Where the recipe lists gpu_memory_bytes, the service may say it."""
        world = new_world(n1={"gpus": (24 * GIB,)})
        world.serve("s1", devices=("n1:gpu0",), config={"gpu_memory_bytes": 6 * GIB})
        assert (world.replica("s1-0").gpu_memory_bytes, world.replica("s1-0").is_exclusive) == (6 * GIB, False)

    def test_a_model_that_is_too_big_is_refused_with_numbers(self) -> None:
        """24 GiB do not hold 30."""
        world = new_world(n1={"gpus": (24 * GIB,)})
        assert "24.0 GiB of 24.0 GiB unreserved; 33.0 GiB are needed" in refused(world, gpus=1, model_bytes=30 * GIB)
        assert "33.0 GiB" not in refused(world, gpus=2, model_bytes=30 * GIB)

    def test_several_gpus_share_the_model(self) -> None:
        """Tensor parallel engines take their GPUs from one node."""
        world = new_world(n1={"gpus": (24 * GIB,)}, n2={"gpus": (24 * GIB, 24 * GIB)})
        place = choose(world, gpus=2, model_bytes=40 * GIB)
        assert (place.node, place.gpus) == ("n2", (0, 1))
        world.serve("twins", recipe="twin")
        command = world.command(wire.EnsureReplica, "n2")
        assert command is None or isinstance(command.body, wire.EnsureReplica)
        assert world.replica("twins-0").gpus == (0, 1)

    def test_the_tightest_gpu_is_taken(self) -> None:
        """Large cards stay free for large models."""
        world = new_world(n1={"gpus": (80 * GIB, 24 * GIB)})
        assert choose(world, gpus=1).gpus == (1,)

    def test_lost_split_and_foreign_gpus_are_left_alone(self) -> None:
        """What NVML says counts."""
        world = new_world(n1={"gpus": (24 * GIB, 24 * GIB, 24 * GIB)})
        cards = list(world.state.nodes["n1"].inventory.gpus)
        cards[0] = msgspec.structs.replace(cards[0], mig_mode=True)
        changed = msgspec.structs.replace(world.state.nodes["n1"].inventory, gpus=tuple(cards))
        world.state.nodes["n1"] = msgspec.structs.replace(world.state.nodes["n1"], inventory=changed)
        readings = (
            wire.GpuReading(index=1, uuid="GPU-1", memory_used_bytes=0, memory_free_bytes=24 * GIB, is_lost=True),
            wire.GpuReading(index=2, uuid="GPU-2", memory_used_bytes=24 * GIB, memory_free_bytes=0),
        )
        telemetry = wire.Telemetry(gpus=readings)
        world.step(TelemetryReceived(node="n1", session_id=world.session("n1"), telemetry=telemetry))
        said = refused(world, gpus=1)
        assert "MIG" in said
        assert "lost" in said
        assert "something else uses it" in said


class TestScores:
    """What is preferred."""

    def test_ram_before_disk_before_elsewhere(self) -> None:
        """The nearer the model, the sooner it serves."""
        world = new_world(n1={}, n2={"dram": 10 * GIB}, n3={})
        assert choose(world).node == "n1"
        world.fetched("m", "n3:disk", GIB)
        assert choose(world).device == "n3:disk"
        world.fetched("m", "n2:dram", GIB)
        assert choose(world).device == "n2:dram"

    def test_replicas_spread(self) -> None:
        """Those of one service first of all."""
        world = new_world(n1={}, n2={}, n3={})
        world.serve("other", devices=("n1:disk",))
        world.serve("svc", replicas=3)
        assert {world.replica(f"svc-{slot}").node for slot in range(3)} == {"n1", "n2", "n3"}
        assert world.replica("svc-0").node == "n2"

    def test_a_service_spreads_before_nodes_fill_evenly(self) -> None:
        """A second replica beside the first would fall with it."""
        world = new_world(n1={}, n2={})
        world.serve("svc", devices=("n1:disk",))
        for name in ("x", "y"):
            world.serve(name, devices=("n2:disk",))
        assert choose(world).node == "n2"
        assert choose(world, service="z", replica="z-0").node == "n1"

    def test_a_node_where_it_failed_comes_last(self) -> None:
        """But comes, when it is the only one."""
        world = new_world(n1={}, n2={})
        world.fetched("m", "n1:disk", GIB)
        assert choose(world, avoid=("n1",)).node == "n2"
        assert choose(world, avoid=("n1", "n2")).node == "n1"

    def test_ties_go_to_the_smaller_name(self) -> None:
        """The same question has the same answer."""
        world = new_world(n10={}, n2={}, n1={})
        assert choose(world).node == "n1"

    def test_candidates_show_every_node_with_numbers(self) -> None:
        """Those that fit first."""
        world = new_world(n1={}, n2={"gpus": (24 * GIB,)})
        shown = placement.candidates(world.state, need(gpus=1), world.now_ms)
        assert [(one.node, one.verdict) for one in shown] == [("n2", "fits"), ("n1", "refused")]
        assert shown[0].numbers["device"] == "n2:gpu0"


class TestLarge:
    """Above PLACEMENT_NODES_EXACT not every node is compared."""

    def _many(self, monkeypatch: pytest.MonkeyPatch) -> EngineWorld:
        monkeypatch.setattr(limits, "PLACEMENT_NODES_EXACT", 20)
        return new_world(**{f"n{number:03}": {} for number in range(120)})

    def test_the_node_with_the_model_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever it stands in the list."""
        world = self._many(monkeypatch)
        world.fetched("m", "n117:disk", GIB)
        assert choose(world).node == "n117"

    def test_ram_comes_before_disk_here_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many nodes have the model on disk."""
        world = self._many(monkeypatch)
        world.add_node("warm", dram=10 * GIB)
        for number in range(30):
            world.fetched("m", f"n{number:03}:disk", GIB)
        world.fetched("m", "warm:dram", GIB)
        assert {choose(world, replica=f"s{number}-0").node for number in range(20)} == {"warm"}

    def test_where_it_failed_is_no_reason_to_stop_looking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A holder that failed before is taken only when nothing else fits."""
        world = self._many(monkeypatch)
        held = tuple(f"n{number:03}" for number in range(30))
        for node in held:
            world.fetched("m", f"{node}:disk", GIB)
        assert choose(world, avoid=held).node not in held

    def test_few_are_compared_and_none_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a placement costs does not grow with the cluster."""
        world = self._many(monkeypatch)
        for number in range(4):
            world.fetched("m", f"n{number:03}:disk", GIB)
        judged: list[str] = []
        judge = placement._judge

        def noted(state: State, need: Need, node: Node, device: Device | None, now_ms: int) -> Any:
            judged.append(node.id)
            return judge(state, need, node, device, now_ms)

        monkeypatch.setattr(placement, "_judge", noted)
        choose(world)
        assert len(judged) == len(set(judged)) == limits.PLACEMENT_SAMPLE
        assert {f"n{number:03}" for number in range(4)} <= set(judged)

    def test_the_only_one_that_fits_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All are looked at before the answer is no."""
        world = self._many(monkeypatch)
        world.add_node("x", gpus=(24 * GIB,))
        assert choose(world, gpus=1).node == "x"

    def test_replicas_start_at_different_places(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that many services do not pile up on the first nodes."""
        world = self._many(monkeypatch)
        found = {choose(world, replica=f"s{number}-0", service=f"s{number}").node for number in range(20)}
        assert len(found) > 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(["shared", "twin", ""]), st.integers(1, 3)), min_size=1, max_size=5),
)
def test_reservations_never_exceed_a_gpu(sizes: list[int], wishes: list[tuple[str, int]]) -> None:
    """Whatever is asked for, each step's invariants hold and every placed replica has its GPUs."""
    world = new_world(n1={"gpus": tuple(size * GIB for size in sizes)}, n2={"gpus": (24 * GIB,)})
    for number, (recipe, count) in enumerate(wishes):
        world.serve(f"s{number}", recipe=recipe, replicas=count, devices=("n1:gpu0",) if not recipe else ())
    for replica in world.state.replicas.values():
        assert replica.gpus
        assert len(set(replica.gpus)) == len(replica.gpus)


def test_an_empty_state_has_no_candidates() -> None:
    """Nothing to say about nothing."""
    assert placement.candidates(State(), need(), 0) == ()
