"""Engines that are stopped while they answer: out of the routing at once, told to stop when idle or out of time."""

from __future__ import annotations

from typing import Any

import pytest

from common import limits, wire
from common.errors import StateReadOnly
from head.core import service_views
from head.core.effects import Drain, EndDrain
from head.core.events import (
    CordonRequested,
    DeleteServiceRequested,
    DrainRequested,
    HeadStarted,
    ReplicaIdle,
    Ticked,
)
from head.core.replica_facts import uses_copy
from head.core.step import step
from head.pipeline import Pipeline
from herder import types as api
from tests.doubles.head_core import SECRET
from tests.doubles.head_engines import RECIPES, EngineWorld


def serving(*nodes: str, **fields: Any) -> EngineWorld:
    """A service svc whose first engine is ready on the first node."""
    world = EngineWorld()
    for node in nodes or ("n1",):
        world.add_node(node)
    world.add_model("m", *(nodes or ("n1",)))
    world.serve(**fields)
    world.ready()
    return world


def drains(world: EngineWorld) -> list[Drain | EndDrain]:
    """What the last step asked of the gateway."""
    return [effect for effect in world.effects if isinstance(effect, Drain | EndDrain)]


def idle(world: EngineWorld, name: str = "svc-0") -> None:
    """The gateway says that nothing is on its way."""
    world.step(ReplicaIdle(name, world.replica(name).generation))


def stop_order(world: EngineWorld) -> wire.Command | None:
    """The order to stop among the last effects."""
    return world.command(wire.StopReplica, "n1")


class TestStop:
    """A stop waits for what is on its way."""

    def test_it_leaves_the_routing_at_once_and_stops_when_idle(self) -> None:
        """The gateway is asked; the agent hears nothing until the gateway has answered."""
        world = serving()
        world.unserve()
        replica = world.replica()
        assert (replica.desired, replica.state) == ("stopped", "draining")
        assert drains(world) == [Drain("svc-0", replica.generation)]
        assert stop_order(world) is None
        assert not service_views.routes(world.state, "m")
        world.pass_s(5, alive=("n1",))
        world.engines("n1", world.status(generation=replica.generation - 1))
        assert (world.replica().state, stop_order(world)) == ("draining", None)
        idle(world)
        assert world.replica().state == "stopping"
        order = stop_order(world)
        assert order is not None
        assert order.generation == replica.generation
        assert drains(world) == []
        world.stopped()
        assert not world.state.services

    def test_its_time_is_limited(self) -> None:
        """At the deadline what is on its way is cut, before the agent is told."""
        world = serving()
        world.unserve()
        generation = world.replica().generation
        effects = world.pass_s(limits.DRAIN_MS // 1000 - 1, alive=("n1",))
        assert world.replica().state == "draining"
        assert not [effect for effect in effects if isinstance(effect, EndDrain)]
        world.pass_s(1, alive=("n1",))
        assert drains(world) == [EndDrain("svc-0", generation)]
        assert stop_order(world) is not None
        assert (world.replica().state, world.replica().drain_until_ms) == ("stopping", 0)
        idle(world)
        assert (world.replica().state, world.effects) == ("stopping", [])

    def test_an_engine_that_does_not_listen_yet_has_nothing_to_finish(self) -> None:
        """What is starting is stopped at once."""
        world = EngineWorld()
        world.add_node("n1")
        world.add_model("m", "n1")
        world.serve()
        world.unserve()
        assert world.replica().state == "stopping"
        assert drains(world) == []

    def test_a_word_of_an_older_generation_ends_no_drain(self) -> None:
        """A late answer of the gateway is not taken for one about this stop."""
        world = serving()
        world.unserve()
        world.step(ReplicaIdle("svc-0", world.replica().generation - 1))
        world.step(ReplicaIdle("ghost-0", 1))
        assert world.replica().state == "draining"

    def test_without_time_it_is_stopped_at_once(self) -> None:
        """A head that lets nothing finish (or has no gateway) says so at its start."""
        world = serving()
        world.state.drain_ms = 0
        world.unserve()
        assert world.replica().state == "stopping"
        assert stop_order(world) is not None

    def test_an_engine_that_is_gone_meanwhile_is_forgotten(self) -> None:
        """A report that leaves it out ends the drain and the service."""
        world = serving()
        world.unserve()
        world.engines("n1")
        assert not world.state.services
        assert not world.state.draining

    def test_one_engine_of_several(self) -> None:
        """The others stay in the routing while one drains; its slot and its memory stay taken."""
        world = serving("n1", "n2", replicas=2, devices=("n1:disk", "n2:disk"))
        world.ready("svc-1")
        job = world.job({"action": "stop_serve", "model": "m", "device": "n1:disk"})
        assert world.replica("svc-0").state == "draining"
        assert [route.replica for route in service_views.routes(world.state, "m")] == ["svc-1"]
        assert world.the_step(job).note == "the engine finishes its requests"
        idle(world)
        world.stopped("svc-0")
        assert world.states(job) == ["completed"]

    def test_people_can_see_it(self) -> None:
        """`herder why` says what is waited for, and how long at most."""
        world = serving()
        world.unserve()
        world.pass_s(10, alive=("n1",))
        told = world.ask_why("replica", "svc-0")
        assert told.state == "draining"
        assert "may finish for 20 s more" in told.reason
        assert "draining" in world.ask_why("service", "svc").reason

    def test_a_copy_that_a_draining_engine_uses_stays(self) -> None:
        """Nothing takes its files away while it answers."""
        world = serving()
        world.unserve()
        assert service_views.service_state(world.state, "svc") == "stopping"
        assert uses_copy(world.state, "m@main|n1:disk")


class TestHead:
    """What a head process knows dies with it."""

    def test_a_restart_ends_the_drain(self) -> None:
        """The requests went through the old process: they are over, and the agent is told once it is back."""
        world = serving()
        world.unserve()
        world.restart()
        assert world.replica().state == "stopping"
        assert drains(world) == []
        world.hello("n1", world.state.nodes["n1"].inventory)
        world.engines("n1", world.status(generation=world.replica().generation - 1))
        assert stop_order(world) is not None

    def test_the_setting_comes_with_the_start(self) -> None:
        """The head's own time to drain is used."""
        world = serving()
        world.step(HeadStarted("cluster-1", SECRET, RECIPES, drain_ms=7_000))
        world.state.settle_until_ms = world.now_ms
        world.hello("n1", world.state.nodes["n1"].inventory)
        world.engines("n1", world.status())
        world.unserve()
        assert world.replica().drain_until_ms == world.now_ms + 7_000

    def test_a_stop_that_the_journal_refuses_was_never_asked(self) -> None:
        """Taken back whole: the engine is in the routing, the gateway hears nothing, nobody waits."""
        world = serving()
        pipeline = Pipeline(world.state, step)
        taken = pipeline.take(DeleteServiceRequested(request_id="r", service="svc"), world.now_ms)
        assert world.state.draining
        assert pipeline.seal()
        refused = pipeline.refused(StateReadOnly("full"))
        assert not [effect for effect in (*taken.effects, *refused.effects) if isinstance(effect, Drain)]
        assert not world.state.draining
        assert service_views.routes(world.state, "m")

    @pytest.mark.parametrize("is_idle", [True, False])
    def test_an_end_that_the_journal_refuses_is_tried_again(self, is_idle: bool) -> None:
        """Neither a lost answer nor a lost deadline keeps an engine for ever."""
        world = serving()
        world.unserve()
        pipeline = Pipeline(world.state, step)
        generation = world.replica().generation
        late_ms = world.now_ms + limits.DRAIN_MS
        pipeline.take(ReplicaIdle("svc-0", generation) if is_idle else Ticked(), world.now_ms if is_idle else late_ms)
        assert world.replica().state == "stopping"
        pipeline.seal()
        pipeline.refused(StateReadOnly("full"))
        assert (world.replica().state, world.state.draining) == ("draining", {"svc-0": generation})
        world.pass_s(limits.DRAIN_MS // 1000, alive=("n1",))
        assert world.replica().state == "stopping"


class TestNodes:
    """The node's own deadline bounds the drain of its engines."""

    def test_requests_may_finish_before_the_nodes_deadline(self) -> None:
        """A pinned engine leaves the routing in the last quarter, and is told to stop at the deadline."""
        world = serving(devices=("n1:disk",))
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=40))
        world.pass_s(29, alive=("n1",))
        assert world.replica().state == "ready"
        world.pass_s(1, alive=("n1",))
        assert world.replica().state == "draining"
        world.pass_s(9, alive=("n1",))
        assert (world.replica().state, stop_order(world)) == ("draining", None)
        world.pass_s(1, alive=("n1",))
        assert world.replica().state == "stopping"
        assert stop_order(world) is not None

    def test_a_long_drain_takes_no_more_than_its_engines_need(self) -> None:
        """Of an hour the engines give up the last DRAIN_MS."""
        world = serving(devices=("n1:disk",))
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=3_600))
        assert world.state.nodes["n1"].drain_lead_ms == limits.DRAIN_MS
        world.request(CordonRequested, node="n1", is_cordoned=False)
        assert world.state.nodes["n1"].drain_lead_ms == 0

    def test_a_deadline_that_is_over_leaves_no_time(self) -> None:
        """A drain with the deadline now stops engines now."""
        world = serving(devices=("n1:disk",))
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=0))
        assert world.replica().state == "stopping"
        assert stop_order(world) is not None

    def test_an_engine_whose_successor_answers_drains_within_the_deadline(self) -> None:
        """The sooner of the two ends holds."""
        world = serving("n1", "n2")
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=20))
        world.ready("svc-1")
        replica = world.replica("svc-0")
        assert (replica.state, replica.drain_until_ms) == ("draining", world.now_ms + 20_000)
        idle(world)
        world.stopped("svc-0")
        world.pass_s(1, alive=("n1", "n2"))
        assert world.state.nodes["n1"].is_drained

    def test_a_reboot_ends_it(self) -> None:
        """The engine is gone with its machine."""
        world = serving()
        world.unserve()
        world.hello("n1", world.state.nodes["n1"].inventory, boot_id="boot-2", agent_id="agent-2")
        assert not world.state.replicas
        assert not world.state.draining


def test_a_changed_spec_lets_the_old_engine_finish() -> None:
    """A rolling change: the old engine drains before it goes, and its successor is placed beside it."""
    world = EngineWorld()
    world.add_node("n1")
    world.add_model("m", "n1")
    serve = {"action": "serve", "model": "m", "device": "n1:disk"}
    world.job(
        {**serve, "config": {"name": "svc", "ctx": 1024}},
        {**serve, "config": {"name": "svc", "ctx": 4096}},
    )
    world.ready("svc-0")
    assert (world.replica("svc-0").state, world.replica("svc-1").state) == ("draining", "pending")
    idle(world, "svc-0")
    assert stop_order(world) is not None
