"""Services: from wish to engines, and what reports, failures, drains and lost nodes make of them."""

from __future__ import annotations

from typing import Any

import pytest

from common import limits, wire
from common.errors import EngineFailed, ErrorInfo
from common.recipe import Recipe
from head.core import service_views
from head.core.effects import Reply
from head.core.events import (
    DrainRequested,
    ModelsUsed,
    ProgressReceived,
    RecipesLoaded,
    RemoveNodeRequested,
    ReplicaIdle,
    ReplicaProbed,
)
from head.core.objects import copy_key
from head.core.services import uses_copy
from herder import types as api
from tests.doubles.head_core import GIB
from tests.doubles.head_engines import RECIPES, EngineWorld


def world_with(*nodes: str, **budgets: Any) -> EngineWorld:
    """Nodes that all have the model m on disk."""
    world = EngineWorld()
    for node in nodes:
        world.add_node(node, **budgets)
    world.add_model("m", *nodes)
    return world


def failed_with(text: str) -> ErrorInfo:
    """An engine's end."""
    return EngineFailed(text).info()


class TestCreate:
    """A service is taken, or refused with a stable code."""

    def test_its_replica_is_placed_and_commanded(self) -> None:
        """One wish becomes one placed replica and one command with everything that the agent needs."""
        world = world_with("n1")
        answer = world.serve(config={"ctx": 4096, "args": ["--x"], "env": {"B": "2"}}, port=8080)
        assert isinstance(answer, Reply)
        assert answer.reference == "service:svc"
        command = world.command(wire.EnsureReplica, "n1")
        assert command is not None
        body = command.body
        assert isinstance(body, wire.EnsureReplica)
        assert (command.op_id, command.generation) == ("replica:svc-0", world.replica().generation)
        assert body.argv == ("--ctx-size", "4096", "--x")
        assert body.env == {"A": "1", "B": "2"}
        assert body.config == {"ctx": 4096, "gpu_memory_bytes": 0, "flash": False}
        assert (body.port, body.served_name, body.api_key, body.storage) == (8080, "m", "key-1", "disk")
        assert body.health.ready_timeout_s == 60
        assert body.stop_after_ms == 0

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"model": "nope"}, "model_not_found"),
            ({"recipe": "nope"}, "recipe_not_found"),
            ({"recipe": "vllm"}, "invalid_recipe"),
            ({"devices": ("n1:banana",)}, "invalid_device"),
            ({"devices": ("n1:gpu7",)}, "device_not_found"),
            ({"devices": ("nowhere:disk",)}, "device_not_found"),
            ({"recipe": "shared", "devices": ("n1:disk",)}, "invalid_device"),
            ({"config": {"colour": 1}}, "invalid_value"),
            ({"config": {"ctx": "many"}}, "invalid_value"),
            ({"config": {"ctx": True}}, "invalid_value"),
            ({"config": {"args": "--x"}}, "invalid_value"),
            ({"config": {"env": {"1 A": "x"}}}, "invalid_value"),
            ({"config": {"gpu_memory_bytes": -1}}, "invalid_value"),
            ({"name": "Not A Name"}, "invalid_name"),
            ({"labels": {"": "x"}}, "invalid_name"),
        ],
    )
    def test_what_can_never_be_is_refused(self, fields: dict[str, Any], code: str) -> None:
        """Each mistake has its own code and leaves nothing behind."""
        world = world_with("n1")
        assert world.serve(**fields).code == code
        assert not world.state.services

    def test_a_list_in_the_configuration_becomes_words(self) -> None:
        """A recipe for any program takes its whole command line from the service."""
        world = world_with("n1")
        open_recipe = Recipe(
            name="open",
            category="inference",
            runtime="command",
            command=("{command}",),
            config={"command": [], "health_path": "/health"},
        )
        world.state.recipes["open"] = open_recipe
        words = ["python3", "-m", "x", "--port", "{port}"]
        world.serve(recipe="open", config={"command": words, "health_path": "/alive"})
        command = world.command(wire.EnsureReplica, "n1")
        assert command is not None
        assert isinstance(command.body, wire.EnsureReplica)
        assert command.body.argv == tuple(words)
        assert command.body.health.path == "/alive"

    def test_a_second_of_one_name_is_refused(self) -> None:
        """A name is taken until its service is gone, and said differently while it stops."""
        world = world_with("n1")
        world.serve()
        assert world.serve().code == "already_exists"
        world.unserve()
        assert world.serve().code == "conflict"
        world.stopped()
        assert isinstance(world.serve(), Reply)

    def test_a_repeated_request_makes_one_service(self) -> None:
        """The same Idempotency-Key gets the same answer."""
        from head.core.events import CreateServiceRequested

        world = world_with("n1")
        fields: dict[str, Any] = {
            "body": api.CreateService(name="svc", model="m"),
            "api_key": "k",
            "idempotency_key": "once",
            "request_sha256": "x",
        }
        first = world.request(CreateServiceRequested, **fields)
        again = world.request(CreateServiceRequested, **fields)
        assert first.reference == again.reference == "service:svc"

    def test_an_unknown_format_is_learned_from_the_files(self) -> None:
        """The model is fetched to where it will run, and the recipe chosen once its files are known."""
        world = EngineWorld()
        world.add_node("n1")
        world.register("m", "https://host/m")
        world.serve(devices=("n1:disk",))
        assert world.service().recipe == ""
        assert "tell which engine" in world.service().reason
        world.fetched("m", "n1:disk", GIB)
        world.pass_s(6, alive=("n1",))
        assert world.service().recipe == "llamacpp"
        assert world.replica().device == "n1:disk"

    def test_a_format_without_a_recipe_fails_with_its_reason(self) -> None:
        """Waiting cannot help, and the service says so."""
        world = EngineWorld()
        world.add_node("n1")
        world.register("m", "https://host/m")
        world.state.recipes = {}
        world.serve(devices=("n1:disk",))
        world.fetched("m", "n1:disk", GIB)
        world.pass_s(6, alive=("n1",))
        assert service_views.service_state(world.state, "svc") == "failed"
        assert world.service().error is not None
        world.step(RecipesLoaded(RECIPES))
        assert world.service().recipe == "llamacpp"

    def test_the_model_is_staged_where_it_is_missing(self) -> None:
        """A node without the model fetches it, and RAM is filled when the engine runs from RAM."""
        world = EngineWorld()
        world.add_node("n1", dram=10 * GIB)
        world.register("m", "https://host/m.gguf", size=GIB)
        world.serve(devices=("n1:dram",))
        assert {"m@main|n1:disk", "m@main|n1:dram"} <= set(world.state.copies)
        assert world.replica().device == "n1:dram"


class TestReports:
    """Agents' words become states."""

    def test_ready_is_ready_where_it_listens(self) -> None:
        """A ready engine gets requests at its node's own address, whatever a report names, at the port it said."""
        world = world_with("n1")
        world.serve()
        world.ready()
        (route,) = service_views.routes(world.state, "m")
        assert (route.host, route.port, route.api_key, route.served_name) == ("n1.local", 9000, "key-1", "m")
        assert service_views.routes(world.state, "svc") == [route]
        assert service_views.service_state(world.state, "svc") == "ready"

    def test_a_result_says_it_as_well(self) -> None:
        """The answer to the command carries where the engine listens; without a port it says nothing."""
        world = world_with("n1")
        world.serve()
        generation = world.replica().generation
        world.answer("replica:svc-0", node="n1", generation=generation, detail={"host": "h"})
        assert world.replica().state == "pending"
        world.answer("replica:svc-0", node="n1", generation=generation, detail={"host": "h", "port": 9, "pid": 1})
        assert (world.replica().state, world.replica().port) == ("ready", 9)

    def test_stale_and_repeated_words_change_nothing(self) -> None:
        """What belongs to an older generation, another node or nobody is ignored."""
        world = world_with("n1", "n2")
        world.serve(devices=("n1:disk",))
        generation = world.replica().generation
        before = world.replica()
        world.answer("replica:svc-0", "failed", node="n1", generation=generation - 1, error=failed_with("old"))
        world.answer("replica:svc-0", "failed", node="n2", generation=generation, error=failed_with("other"))
        world.answer("replica:ghost-0", node="n1", generation=1)
        assert world.replica() == before
        world.ready()
        ready = world.replica()
        revision = world.state.revision
        world.answer(
            "replica:svc-0", node="n1", generation=generation, detail={"host": "10.0.0.1", "port": 9000, "pid": 77}
        )
        assert (world.replica(), world.state.revision) == (ready, revision)

    def test_an_agent_with_an_older_generation_is_told_again(self) -> None:
        """The replica is unconfirmed until the agent holds the present generation."""
        world = world_with("n1")
        world.serve()
        world.ready()
        world.engines("n1", world.status(generation=1))
        assert world.replica().state == "pending"
        assert service_views.routes(world.state, "m") == []
        world.pass_s(limits.COMMAND_REPEAT_MS / 1000 + 6, alive=("n1",))
        world.engines("n1")
        assert world.state.commanded_ms

    def test_a_replica_that_the_agent_does_not_know_is_ordered_again(self) -> None:
        """A new session whose report lacks the engine gets the command."""
        world = world_with("n1")
        world.serve()
        world.ready()
        world.now_ms += 1_000
        world.hello("n1", world.state.nodes["n1"].inventory, agent_id="agent-2")
        world.engines("n1")
        assert world.replica().state == "pending"
        assert world.command(wire.EnsureReplica, "n1") is not None

    def test_a_stray_engine_is_told_to_stop(self) -> None:
        """What no service wants does not run on."""
        world = world_with("n1")
        world.engines("n1", wire.ReplicaStatus(replica="ghost-0", generation=5, state="ready", port=1))
        command = world.command(wire.StopReplica, "n1")
        assert command is not None
        assert command.op_id == "replica:ghost-0"
        assert command.generation >= 5  # of two orders of one number the agent follows the removal

    def test_what_is_placed_next_has_a_higher_number_than_every_order_to_a_stray(self) -> None:
        """Else its agent, which keeps the number of the stop, would take the new order for the old one, for ever."""
        world = world_with("n1")
        generation = 1
        for _ in range(3):  # the agent has stopped it, and its result is lost
            world.now_ms += limits.COMMAND_REPEAT_MS
            world.engines("n1", wire.ReplicaStatus(replica="svc-0", generation=generation, state="stopped"))
            command = world.command(wire.StopReplica, "n1")
            generation = command.generation if command is not None else generation
        assert generation > 1
        world.engines("n1")
        world.serve()
        assert world.replica().generation > generation

    def test_an_engine_that_stopped_itself_starts_again(self) -> None:
        """After a time without a head the agent stops it; the same order stands."""
        world = world_with("n1")
        world.serve()
        world.ready()
        generation = world.replica().generation
        world.now_ms += limits.COMMAND_REPEAT_MS
        world.engines("n1", world.status(state="stopped"))
        command = world.command(wire.EnsureReplica, "n1")
        assert command is not None
        assert command.generation == generation
        assert world.replica().state == "pending"

    @pytest.mark.parametrize("state", ["failed", "unhealthy"])
    def test_a_late_result_makes_no_fallen_engine_ready(self, state: str) -> None:
        """The result of its first start comes after the report of its end: it changes nothing."""
        world = world_with("n1")
        world.serve()
        generation = world.replica().generation
        world.engines("n1", world.status(state="starting", pid=77))
        world.engines("n1", world.status(state=state, error=failed_with("it fell")))
        detail = {"host": "10.0.0.1", "port": 9000, "pid": 77}
        world.answer("replica:svc-0", node="n1", generation=generation, detail=detail)
        assert world.replica().state == state

    def test_progress_words_are_shown(self) -> None:
        """The state word of a starting engine is taken; `ready` waits for the port."""
        world = world_with("n1")
        world.serve()
        for word, shown in (("starting", "starting"), ("ready", "starting"), ("nonsense", "starting")):
            progress = wire.Progress(op_id="replica:svc-0", generation=world.replica().generation, state=word)
            world.step(ProgressReceived(node="n1", session_id=world.session("n1"), progress=progress))
            assert world.replica().state == shown

    def test_a_failed_probe_takes_it_out_until_the_agent_speaks(self) -> None:
        """The gateway's own probe counts only for the generation that was asked."""
        world = world_with("n1")
        world.serve()
        world.ready()
        world.step(ReplicaProbed(replica="svc-0", generation=1, is_healthy=False))
        assert service_views.routes(world.state, "m")
        world.step(ReplicaProbed(replica="svc-0", generation=world.replica().generation, is_healthy=False))
        assert not service_views.routes(world.state, "m")
        world.engines("n1", world.status())
        assert service_views.routes(world.state, "m")

    def test_use_of_a_model_is_noted_on_its_copies(self) -> None:
        """Requests keep the copy under an engine young."""
        world = world_with("n1")
        world.serve()
        world.ready()
        world.now_ms += 60_000
        world.step(ModelsUsed({"svc-0": 3, "ghost": 1}))
        assert world.state.last_used_ms["m@main|n1:disk"] == world.now_ms


class TestFailures:
    """Engines that fail for good."""

    def test_a_pinned_one_stays_failed_with_its_last_words(self) -> None:
        """Nothing is started again behind the operator's back."""
        world = world_with("n1", "n2")
        world.serve(devices=("n1:disk",))
        world.engines("n1", world.status(state="failed", error=failed_with("boom"), last_log=("a", "b"), exit_code=3))
        world.pass_s(400, alive=("n1", "n2"))
        replica = world.replica()
        assert (replica.state, replica.node, replica.last_log, replica.exit_code) == ("failed", "n1", ("a", "b"), 3)
        assert service_views.service_state(world.state, "svc") == "failed"
        assert "boom" in world.service().reason

    def test_a_free_one_is_tried_elsewhere_a_limited_number_of_times(self) -> None:
        """It goes where it has not failed, after a pause, and gives up in the end."""
        world = world_with("n1", "n2")
        world.serve()
        seen = [world.replica().node]
        for _ in range(limits.REPLICA_PLACEMENTS - 1):
            generation = world.replica().generation
            world.answer(
                "replica:svc-0", "failed", node=world.replica().node, generation=generation, error=failed_with("boom")
            )
            assert world.replica().state == "failed"
            world.pass_s(60, alive=("n1", "n2"))
            assert world.replica().state == "pending"
            assert world.replica().generation > generation
            seen.append(world.replica().node)
        assert seen[:2] == ["n1", "n2"]
        world.answer(
            "replica:svc-0",
            "failed",
            node=world.replica().node,
            generation=world.replica().generation,
            error=failed_with("boom"),
        )
        world.pass_s(700, alive=("n1", "n2"))
        assert world.replica().state == "failed"

    def test_a_copy_that_cannot_be_had_fails_the_engine(self) -> None:
        """The error of the model's copy is the replica's."""
        world = EngineWorld()
        world.add_node("n1")
        world.register("m", "https://host/m.gguf")
        world.serve(devices=("n1:disk",))
        gone = ErrorInfo(code="source_refused", message="no such file")
        world.result("m@main|n1:disk", "failed", error=gone)
        world.pass_s(6, alive=("n1",))
        assert world.replica().state == "failed"
        assert world.replica().error is not None

    def test_an_engine_that_is_given_up_lets_go_at_its_agent(self) -> None:
        """An agent that waits for a copy that never comes would hold on to what is left of it for ever."""
        world = EngineWorld()
        world.add_node("n1")
        world.register("m", "https://host/m.gguf")
        world.serve(devices=("n1:disk",))
        ordered = world.replica().generation
        world.engines("n1", world.status(state="waiting_copy"))
        world.result("m@main|n1:disk", "failed", error=ErrorInfo(code="source_refused", message="no such file"))
        stop = world.command(wire.StopReplica, "n1")
        assert stop is not None
        assert stop.generation == world.replica().generation > ordered
        world.now_ms += limits.COMMAND_REPEAT_MS
        world.engines("n1", world.status(state="waiting_copy", generation=ordered))
        assert world.replica().state == "failed"
        assert world.command(wire.StopReplica, "n1") is not None
        for state in ("stopping", "stopped"):
            world.engines("n1", world.status(state=state))
            assert world.replica().state == "failed"
        world.stopped()
        assert (world.replica().state, world.replica().attempts) == ("failed", 1)


class TestStop:
    """Services end with their engines."""

    def test_it_is_gone_when_its_engine_is(self) -> None:
        """The object stays until the agent has confirmed."""
        world = world_with("n1")
        world.serve()
        world.ready()
        world.unserve()
        world.step(ReplicaIdle("svc-0", world.replica().generation))
        command = world.command(wire.StopReplica, "n1")
        assert command is not None
        assert service_views.service_state(world.state, "svc") == "stopping"
        assert not service_views.routes(world.state, "m")
        world.answer("replica:svc-0", node="n1", generation=command.generation - 1)
        assert "svc" in world.state.services
        world.stopped()
        assert "svc" not in world.state.services
        assert not world.state.replicas

    def test_a_report_without_it_confirms_as_well(self) -> None:
        """A full report that leaves the engine out says that it is gone."""
        world = world_with("n1")
        world.serve()
        world.unserve()
        world.engines("n1")
        assert not world.state.services

    def test_an_unknown_one_is_not_stopped(self) -> None:
        """Stopping what is not there is no success."""
        assert world_with("n1").unserve("ghost").code == "service_not_found"


class TestNodes:
    """Nodes reboot, drain, vanish and return."""

    def test_a_reboot_starts_the_engine_anew(self) -> None:
        """The old generation is over at once."""
        world = world_with("n1")
        world.serve()
        world.ready()
        before = world.replica().generation
        world.hello("n1", world.state.nodes["n1"].inventory, boot_id="boot-2", agent_id="agent-2")
        assert world.replica().generation > before
        assert world.replica().state == "pending"
        world.engines("n1")
        assert world.command(wire.EnsureReplica, "n1") is not None

    def test_a_drain_makes_the_new_before_it_breaks_the_old(self) -> None:
        """The engine on the draining node answers until its successor does."""
        world = world_with("n1", "n2")
        world.serve()
        world.ready("svc-0")
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=3600))
        assert world.replica("svc-1").node == "n2"
        assert world.replica("svc-0").desired == "running"
        world.ready("svc-1")
        assert world.replica("svc-0").desired == "stopped"
        world.stopped("svc-0")
        assert set(world.state.replicas) == {"svc-1"}
        assert world.service().reason == ""

    def test_the_deadline_of_a_drain_stops_what_cannot_move(self) -> None:
        """A pinned engine stays until the deadline, then goes, and its service says why it waits."""
        world = world_with("n1", "n2")
        world.serve(devices=("n1:disk",))
        world.ready()
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=30))
        world.pass_s(20, alive=("n1", "n2"))
        assert world.replica().desired == "running"
        assert "draining" in world.service().reason
        world.pass_s(20, alive=("n1", "n2"))
        assert world.replica().desired == "stopped"

    def test_an_unreachable_engine_is_kept_by_default(self) -> None:
        """Nothing is started twice without being asked to."""
        world = world_with("n1", "n2")
        world.serve()
        world.ready()
        world.close("n1")
        world.pass_s(600, alive=("n2",))
        assert world.state.nodes["n1"].status == "unreachable"
        assert world.replica().node == "n1"
        assert "unreachable" in world.service().reason
        assert not service_views.routes(world.state, "m")
        assert service_views.service_state(world.state, "svc") == "degraded"

    def test_replace_waits_until_the_old_one_has_surely_stopped(self) -> None:
        """Lease, stop_after, grace and margin pass first; the old one is told to stop when it comes back."""
        world = world_with("n1", "n2", "n3")
        world.serve(on_unreachable="replace")
        command = world.command(wire.EnsureReplica, "n1")
        assert command is not None
        assert isinstance(command.body, wire.EnsureReplica)
        assert command.body.stop_after_ms == limits.REPLACE_STOP_AFTER_MS
        world.ready()
        world.close("n1")
        world.pass_s(20, alive=("n2", "n3"))
        lost_ms = world.state.nodes["n1"].status_since_ms
        safe_ms = lost_ms + limits.REPLACE_STOP_AFTER_MS + 15_000 + 10_000
        world.pass_s((safe_ms - world.now_ms) // 1000, alive=("n2", "n3"))
        assert world.replica().node == "n1"
        world.pass_s(60, alive=("n2", "n3"))
        assert world.replica().node == "n2"
        stray = wire.ReplicaStatus(replica="svc-0", generation=command.generation, state="ready", port=9)
        world.hello("n1", world.state.nodes["n1"].inventory, agent_id="agent-2")
        world.engines("n1", stray)
        stop = world.command(wire.StopReplica, "n1")
        assert stop is not None
        assert stop.generation > command.generation

    def test_a_clock_that_jumps_at_a_start_of_the_head_replaces_nothing_early(self) -> None:
        """The wall clock was an hour behind before: the agent's own time to stop has not passed for that."""
        world = world_with("n1", "n2", "n3")
        world.serve(on_unreachable="replace")
        world.ready()
        world.close("n1")
        world.pass_s(20, alive=("n2", "n3"))
        assert world.state.nodes["n1"].status == "unreachable"
        world.now_ms += 3_600_000
        world.restart()
        for node in ("n2", "n3"):
            world.hello(node, world.state.nodes[node].inventory)
        bound_s = (limits.REPLACE_STOP_AFTER_MS + limits.REPLACE_MARGIN_MS) // 1000 + 15 + 10
        world.pass_s(bound_s - 2, alive=("n2", "n3"))
        assert world.replica().node == "n1"
        world.pass_s(30, alive=("n2", "n3"))
        assert world.replica().node == "n2"

    def test_nothing_is_replaced_while_frozen(self) -> None:
        """When most nodes vanish together, it is more likely us than them."""
        world = world_with("n1", "n2", "n3")
        world.serve(on_unreachable="replace")
        world.ready()
        world.close("n1")
        world.close("n2")
        world.pass_s(600, alive=("n3",))
        assert world.state.is_frozen
        assert world.replica().node == "n1"
        assert "most nodes are gone" in world.service().reason

    def test_a_removed_node_takes_its_engines_with_it(self) -> None:
        """The service finds another place."""
        world = world_with("n1", "n2")
        world.serve()
        world.ready()
        world.close("n1")
        world.pass_s(60, alive=("n2",))
        world.request(RemoveNodeRequested, node="n1", force=True)
        world.pass_s(6, alive=("n2",))
        assert {replica.node for replica in world.state.replicas.values()} == {"n2"}

    def test_a_restart_in_the_middle_loses_nothing(self) -> None:
        """A head that starts again orders what was not confirmed and keeps what runs."""
        world = world_with("n1", "n2")
        world.serve(replicas=2)
        world.ready("svc-0")
        world.restart()
        for node in ("n1", "n2"):
            world.hello(node, world.state.nodes[node].inventory)
        kept = world.replica("svc-0")
        world.engines(kept.node, world.status("svc-0"))
        other = world.replica("svc-1")
        if other.node != kept.node:
            world.engines(other.node)
        assert world.replica("svc-0").state == "ready"
        assert world.replica("svc-1").state == "pending"
        world.pass_s(12, alive=("n1", "n2"))
        world.ready("svc-1")
        assert service_views.service_state(world.state, "svc") == "ready"


class TestProjections:
    """Engines on GPUs are shown as copies there."""

    def test_the_copy_follows_the_engine(self) -> None:
        """It is loading, ready with its measured bytes, then gone."""
        world = EngineWorld()
        world.add_node("n1", gpus=(24 * GIB,))
        world.add_model("m", "n1")
        world.serve(devices=("n1:gpu0",))
        key = copy_key("m", "main", "n1:gpu0")
        assert (world.state.copies[key].state, world.state.copies[key].replica) == ("loading", "svc-0")
        world.ready(gpu_memory_bytes=7 * GIB)
        assert (world.state.copies[key].state, world.state.copies[key].bytes) == ("ready", 7 * GIB)
        world.unserve()
        world.stopped()
        assert key not in world.state.copies

    def test_two_engines_of_a_model_on_one_gpu_show_one_copy(self) -> None:
        """When the first goes, the second stands for it."""
        world = EngineWorld()
        world.add_node("n1", gpus=(24 * GIB,))
        world.add_model("m", "n1")
        for name in ("s1", "s2"):
            world.serve(name, devices=("n1:gpu0",), config={"gpu_memory_bytes": 8 * GIB})
        key = copy_key("m", "main", "n1:gpu0")
        assert world.state.copies[key].replica == "s1-0"
        world.unserve("s1")
        world.stopped("s1-0")
        assert world.state.copies[key].replica == "s2-0"

    def test_the_disk_copy_under_an_engine_is_in_use(self) -> None:
        """It may be neither dropped nor evicted while an engine stands on it."""
        world = world_with("n1")
        assert not uses_copy(world.state, "m@main|n1:disk")
        world.serve()
        assert uses_copy(world.state, "m@main|n1:disk")
        assert not uses_copy(world.state, "m@main|n1:gpu0")
        assert not uses_copy(world.state, "nonsense")
