"""Why: reasons in words with numbers, for everything that can be asked about."""

from __future__ import annotations

import pytest

from common import wire
from common.errors import EngineFailed, ErrorInfo
from head.core.events import CordonRequested, DrainRequested
from herder import types as api
from tests.doubles.head_core import GIB
from tests.doubles.head_engines import EngineWorld


def new_world() -> EngineWorld:
    """Two nodes, one with a GPU, and a model on n1."""
    world = EngineWorld()
    world.add_node("n1", gpus=(24 * GIB,))
    world.add_node("n2")
    world.add_model("m", "n1")
    return world


def why(world: EngineWorld, kind: str, key: str) -> api.Why:
    """The answer to a question; it changes nothing."""
    revision = world.state.revision
    answer = world.ask_why(kind, key)
    assert world.state.revision == revision
    assert isinstance(answer, api.Why), answer
    return answer


class TestServices:
    """Why a service is not there yet."""

    def test_a_waiting_one_shows_every_node(self) -> None:
        """Each with its reason and numbers."""
        world = new_world()
        world.serve("first", devices=("n1:gpu0",))
        world.serve("second", recipe="shared")
        said = why(world, "service", "second")
        assert (said.state, said.kind, said.id) == ("pending", "service", "second")
        assert "0 of 1 replicas answer" in said.reason
        reasons = {one.node: one.reason for one in said.candidates}
        assert "is taken by first-0" in reasons["n1"]
        assert "has no GPU" in reasons["n2"]
        assert all(one.verdict == "refused" for one in said.candidates)

    def test_a_starting_one_shows_its_replicas(self) -> None:
        """What each waits for."""
        world = new_world()
        world.serve()
        said = why(world, "service", "svc")
        assert "svc-0 on n1:disk is pending: the order was sent" in said.reason
        assert not said.candidates

    def test_a_ready_one_says_so(self) -> None:
        """Nothing to explain."""
        world = new_world()
        world.serve()
        world.ready()
        said = why(world, "service", "svc")
        assert (said.state, said.reason) == ("ready", "1 of 1 replicas answer")

    def test_a_failed_replica_shows_its_last_words(self) -> None:
        """The log line that says most."""
        world = new_world()
        world.serve(devices=("n1:disk",))
        boom = EngineFailed("boom").info()
        world.engines("n1", world.status(state="failed", error=boom, last_log=("out of memory",), restarts=3))
        said = why(world, "replica", "svc-0")
        assert said.state == "failed"
        for words in ("boom", "after 3 restarts", "out of memory"):
            assert words in said.reason


class TestOthers:
    """Jobs, copies, nodes, models."""

    def test_a_job_shows_what_its_steps_wait_for(self) -> None:
        """Running and waiting ones."""
        world = new_world()
        job = world.job(
            {"action": "download", "model": "m", "target": "n2:disk"},
            {"action": "download", "model": "m", "target": "n1:disk"},
        )
        said = why(world, "job", job)
        assert "0 of 2 steps have ended" in said.reason
        assert "1-download runs for 0 s" in said.reason
        assert "2-download: waits for 1-download" in said.reason

    def test_a_copy_shows_its_error_and_users(self) -> None:
        """Also by model and device."""
        world = new_world()
        world.serve(devices=("n1:disk",))
        assert "an engine uses it" in why(world, "copy", "m|n1:disk").reason
        world.want("m", "n2:disk")
        world.result("m@main|n2:disk", "failed", error=ErrorInfo("source_failed", "cut", is_retryable=True))
        said = why(world, "copy", "m@main|n2:disk")
        assert "failed: cut" in said.reason
        assert "tried again in" in said.reason

    def test_a_node_says_whether_it_takes_work(self) -> None:
        """And what is left to drain."""
        world = new_world()
        assert "new work may go there" in why(world, "node", "n1").reason
        world.serve(devices=("n1:disk",))
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=60))
        assert "1 replicas are left to drain, 60 s" in why(world, "node", "n1").reason
        world.request(CordonRequested, node="n2", is_cordoned=True)
        assert "cordoned" in why(world, "node", "n2").reason

    def test_a_model_says_where_it_comes_from(self) -> None:
        """And that nobody has it."""
        world = new_world()
        world.register("bare")
        assert "no source" in why(world, "model", "bare").reason
        assert "1 of 1 copies are ready" in why(world, "model", "m").reason

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            ("service", "service_not_found"),
            ("replica", "not_found"),
            ("job", "job_not_found"),
            ("copy", "copy_not_found"),
            ("node", "node_not_found"),
            ("model", "model_not_found"),
            ("moon", "invalid_value"),
        ],
    )
    def test_what_is_not_there_is_said_so(self, kind: str, code: str) -> None:
        """Each kind has its own code."""
        assert new_world().ask_why(kind, "ghost").code == code


def test_a_node_says_what_it_holds_that_nobody_registered() -> None:
    """Copies of no registered model take room and are left alone: their number, bytes and first names are told."""
    world = new_world()
    live = world.state.live["n2"]
    assert "registered" not in why(world, "node", "n2").reason
    live.unknown_copies = tuple(
        wire.CopyStatus(f"lost/m{number}", "main", "disk", "ready", bytes_total=GIB) for number in range(7)
    )
    said = why(world, "node", "n2").reason
    assert f"7 copies in its store are of no registered model and stay as they are ({7 * GIB} bytes)" in said
    assert "lost/m0@main (disk, ready)" in said
    assert "lost/m4" in said
    assert "lost/m5" not in said
    assert "and 2 more" in said
