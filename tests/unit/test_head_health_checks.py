"""Health checks: asked once, answered once, or failed by silence."""

from __future__ import annotations

import pytest

from common import limits, wire
from common.errors import ErrorInfo, TooMany
from head.core import health_checks
from head.core.objects import Check
from tests.doubles.head_engines import EngineWorld


def asked(timeout_s: float = 5.0) -> tuple[EngineWorld, Check]:
    """A world with one open check."""
    world = EngineWorld()
    world.add_node("n1")
    check = world.do(
        lambda turn: health_checks.ask(turn, "c1", "n1", cause="test", timeout_s=timeout_s, url="http://x/health")
    )
    return world, check


class TestAnswers:
    """What becomes of a question."""

    def test_it_goes_to_its_node(self) -> None:
        """One command with what to ask and for how long."""
        world, check = asked(7.0)
        command = world.command(wire.CheckHealth, "n1")
        assert command is not None
        assert (command.op_id, command.generation) == ("check:c1", check.generation)
        assert command.body == wire.CheckHealth(url="http://x/health", timeout_s=7.0)

    def test_a_good_answer_is_kept_with_its_detail(self) -> None:
        """Whoever asked reads it."""
        world, check = asked()
        world.answer("check:c1", node="n1", generation=check.generation, detail={"status": 200})
        assert (world.state.checks["c1"].outcome, world.state.checks["c1"].detail) == ("ok", {"status": 200})

    def test_a_bad_answer_is_unhealthy(self) -> None:
        """With the node's own words."""
        world, check = asked()
        error = ErrorInfo("upstream_failed", "refused")
        world.answer("check:c1", "failed", node="n1", generation=check.generation, error=error)
        ended = world.state.checks["c1"]
        assert ended.outcome == "failed"
        assert ended.error is not None
        assert (ended.error.code, ended.error.message) == ("unhealthy", "http://x/health is not healthy: refused")

    def test_the_first_answer_stands(self) -> None:
        """Repeated, stale and foreign answers change nothing."""
        world, check = asked()
        world.add_node("n2")
        for node, generation in (("n1", check.generation - 1), ("n2", check.generation)):
            world.answer("check:c1", node=node, generation=generation)
            assert world.state.checks["c1"].outcome == ""
        world.answer("check:c1", node="n1", generation=check.generation)
        world.answer("check:c1", "failed", node="n1", generation=check.generation)
        world.answer("check:ghost", node="n1", generation=1)
        assert world.state.checks["c1"].outcome == "ok"

    def test_silence_fails_after_its_time(self) -> None:
        """Its own timeout and a grace, not earlier."""
        world, _ = asked(10.0)
        world.pass_s(10 + limits.CHECK_GRACE_MS // 1000, alive=("n1",))
        assert world.state.checks["c1"].outcome == ""
        world.pass_s(2, alive=("n1",))
        ended = world.state.checks["c1"]
        assert ended.error is not None
        assert (ended.outcome, ended.error.code) == ("failed", "timed_out")

    def test_an_outcome_that_nobody_reads_is_forgotten(self) -> None:
        """Checks do not pile up."""
        world, check = asked()
        world.answer("check:c1", node="n1", generation=check.generation)
        world.pass_s(3_602, alive=("n1",))
        assert not world.state.checks

    def test_a_restart_asks_again(self) -> None:
        """The question is durable; the agent dedupes it."""
        world, check = asked()
        world.restart()
        world.hello("n1", world.state.nodes["n1"].inventory)
        world.report("n1")
        command = world.command(wire.CheckHealth, "n1")
        assert command is not None
        assert command.generation == check.generation

    def test_there_is_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More are refused."""
        monkeypatch.setattr(limits, "CHECKS_LIVE", 1)
        world, _ = asked()
        with pytest.raises(TooMany):
            world.do(lambda turn: health_checks.ask(turn, "c2", "n1", cause="t", timeout_s=5))
