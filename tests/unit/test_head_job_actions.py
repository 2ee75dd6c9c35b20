"""Jobs: what moves and the actions about engines do, from beginning to end."""

from __future__ import annotations

from typing import Any

import pytest

from common import wire
from common.errors import EngineFailed
from tests.doubles.head_core import GIB
from tests.doubles.head_engines import EngineWorld
from tests.doubles.head_jobs import ALIVE, download, fetched, new_world


class TestMoves:
    """Move and copy."""

    def test_a_move_drops_its_source_after_the_target_is_ready(self) -> None:
        """Copy, then drop, then done."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job({"action": "move", "model": "m", "from": "n1:disk", "to": "n2:disk"})
        assert world.the_step(job).phase == "copy"
        assert world.state.copies["m@main|n1:disk"].desired == "present"
        fetched(world, node="n2")
        assert world.the_step(job).phase == "drop"
        assert world.state.copies["m@main|n1:disk"].desired == "absent"
        world.result("m@main|n1:disk")
        assert world.the_job(job).state == "completed"
        assert set(world.state.copies) == {"m@main|n2:disk"}

    def test_keep_source_keeps_it(self) -> None:
        """Then a move is a copy."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        action = {"action": "move", "model": "m", "from": "n1:disk", "to": "n2:disk", "keep_source": True}
        job = world.job(action)
        fetched(world, node="n2")
        assert world.the_job(job).state == "completed"
        assert world.state.copies["m@main|n1:disk"].desired == "present"

    def test_a_move_to_ram_keeps_the_disk_copy_and_says_so(self) -> None:
        """The RAM copy stands on it."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job({"action": "move", "model": "m", "from": "n1:disk", "to": "n1:dram"})
        world.result("m@main|n1:dram")
        step = world.the_step(job)
        assert (step.state, step.result["source_kept"]) == ("completed", True)
        assert "keeps its copy" in step.note

    def test_a_move_from_nowhere_fails(self) -> None:
        """The source has to hold the model."""
        world = new_world()
        job = world.job({"action": "move", "model": "m", "from": "n1:disk", "to": "n2:disk"})
        assert world.the_step(job).error.code == "copy_not_found"  # type: ignore[union-attr]

    def test_a_move_without_source_takes_the_only_one(self) -> None:
        """With several it asks which."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job({"action": "move", "model": "m", "to": "n2:disk"})
        assert world.the_step(job).source_device == "n1:disk"
        fetched(world, node="n2")
        world.result("m@main|n1:disk")
        assert world.the_job(job).state == "completed"

    def test_the_deployment_of_the_manual_ends_in_one_engine(self) -> None:
        """download, move to the GPU, serve on a port: the same service, with the port."""
        world = new_world()
        job = world.job(
            download(),
            {"action": "move", "model": "m", "from": "n1:disk", "to": "n1:gpu0"},
            {"action": "serve", "model": "m", "device": "n1:gpu0", "port": 8080},
        )
        fetched(world)
        name = next(iter(world.state.services))
        world.ready(f"{name}-0")
        assert world.states(job) == ["completed", "completed", "running"]
        old = next(iter(world.state.replicas.values()))
        assert old.desired == "stopped"
        world.stopped(old.id)
        world.pass_s(6, alive=ALIVE)
        (replica,) = world.state.replicas.values()
        world.ready(replica.id, port=8080)
        assert world.the_job(job).state == "completed"
        assert world.state.services[name].port == 8080
        assert world.the_step(job, 2).result["endpoint"] == "n1.local:8080"
        assert "m@main|n1:disk" in world.state.copies
        again = world.job({"action": "serve", "model": "m", "device": "n1:gpu0", "port": 8080})
        assert world.the_job(again).state == "completed"

    def test_a_move_off_a_gpu_stops_the_engine(self) -> None:
        """Bytes stay on the node's disk, the engine goes."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        serve = world.job({"action": "serve", "model": "m", "device": "n1:gpu0"})
        world.ready(next(iter(world.state.replicas)))
        assert world.the_job(serve).state == "completed"
        job = world.job({"action": "move", "model": "m", "from": "n1:gpu0", "to": "n1:dram"})
        world.result("m@main|n1:dram")
        assert world.the_step(job).phase == "stop"
        world.stopped(next(iter(world.state.replicas)))
        assert world.the_job(job).state == "completed"
        assert not world.state.services


class TestEngines:
    """serve, stop_serve, health_check."""

    def _serving(self, **action: Any) -> tuple[EngineWorld, str, str]:
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job({"action": "serve", "model": "m", "device": "n1:gpu0", **action})
        return world, job, next(iter(world.state.replicas))

    def test_done_when_ready(self) -> None:
        """A serve step ends with its engine's endpoint."""
        world, job, replica = self._serving()
        assert (world.states(job), list(world.state.services)) == (["running"], ["m-gpu0"])
        assert world.the_step(job).note
        world.ready(replica)
        assert world.the_job(job).state == "completed"
        assert world.state.services["m-gpu0"].api_key

    def test_the_name_may_be_chosen(self) -> None:
        """config.name names the service."""
        world, _, _ = self._serving(config={"name": "mine"})
        assert list(world.state.services) == ["mine"]

    def test_another_jobs_engine_is_not_changed(self) -> None:
        """Who asks for another port does not restart an engine under its users."""
        world, _, replica = self._serving()
        world.ready(replica)
        other = world.job({"action": "serve", "model": "m", "device": "n1:gpu0", "port": 8080})
        assert world.the_step(other).error.code == "already_exists"  # type: ignore[union-attr]
        assert world.state.services["m-gpu0"].port == 0

    def test_a_failed_engine_fails_the_step_with_its_last_words(self) -> None:
        """The log says what an operator needs."""
        world, job, replica = self._serving()
        boom = EngineFailed("boom").info()
        world.engines("n1", world.status(replica, "failed", error=boom, last_log=("no memory",)))
        step = world.the_step(job)
        assert step.state == "failed"
        assert step.error is not None
        assert (step.error.code, step.error.details["last_log"]) == ("engine_failed", ["no memory"])

    def test_asked_for_retries_start_it_again(self) -> None:
        """`retries` of a serve revives the failed engine after a pause."""
        world, job, replica = self._serving(retries=1)
        boom = EngineFailed("boom").info()
        world.engines("n1", world.status(replica, "failed", error=boom))
        assert world.states(job) == ["pending"]
        world.pass_s(8, alive=ALIVE)
        assert world.states(job) == ["running"]
        assert world.replica(replica).state == "pending"
        world.ready(replica)
        assert world.the_job(job).state == "completed"

    def test_a_taken_gpu_keeps_it_waiting_with_the_reason(self) -> None:
        """A GPU belongs to one engine; the step says who has it, and goes on when it is free."""
        world, _, replica = self._serving()
        world.ready(replica)
        world.add_model("m2", "n1")
        job = world.job({"action": "serve", "model": "m2", "device": "n1:gpu0"})
        assert "is taken by m-gpu0-0" in world.the_step(job).note
        world.unserve("m-gpu0")
        world.stopped(replica)
        world.pass_s(6, alive=ALIVE)
        world.ready(next(iter(world.state.replicas)))
        assert world.the_job(job).state == "completed"

    def test_stop_is_done_when_the_engine_is_gone(self) -> None:
        """Not before the agent has said so."""
        world, _, replica = self._serving()
        world.ready(replica)
        job = world.job({"action": "stop_serve", "model": "m", "device": "n1:gpu0"})
        assert world.states(job) == ["running"]
        world.stopped(replica)
        assert world.the_job(job).state == "completed"

    def test_stopping_what_is_gone_in_a_longer_job_fails(self) -> None:
        """An engine that never was is not stopped successfully."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job(download(), {"action": "stop_serve", "model": "m", "device": "n1:gpu0"})
        assert world.the_step(job, 1).error.code == "service_not_found"  # type: ignore[union-attr]

    @pytest.mark.parametrize(("outcome", "state"), [("ok", "completed"), ("failed", "failed")])
    def test_a_check_asks_the_engine_once(self, outcome: str, state: str) -> None:
        """The answer is the step's; a bad one is `unhealthy` and not tried again unasked."""
        world, _, replica = self._serving()
        world.ready(replica)
        job = world.job({"action": "health_check", "model": "m", "device": "n1:gpu0"})
        command = world.command(wire.CheckHealth, "n1")
        assert command is not None
        world.answer(command.op_id, outcome, node="n1", generation=command.generation, detail={"status": 200})
        assert world.states(job) == [state]
        assert not world.state.checks
        if state == "failed":
            assert world.the_step(job).error.code == "unhealthy"  # type: ignore[union-attr]

    def test_a_check_of_a_url_goes_to_a_node(self) -> None:
        """Any node that is online, unless one is named."""
        world = new_world()
        world.job({"action": "health_check", "target_url": "http://x/health"})
        command = world.command(wire.CheckHealth)
        assert command is not None
        assert isinstance(command.body, wire.CheckHealth)
        assert command.body.url == "http://x/health"

    def test_a_check_that_nobody_answers_fails(self) -> None:
        """Silence is an answer after a while."""
        world = new_world()
        job = world.job({"action": "health_check", "target_url": "http://x/health"})
        world.pass_s(30, alive=ALIVE)
        assert world.the_step(job).error.code == "timed_out"  # type: ignore[union-attr]
