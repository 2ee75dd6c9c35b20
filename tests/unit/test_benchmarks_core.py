"""Benchmarks in the head's core: from the request to the figures, and whatever is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from common import limits, wire
from common.errors import Internal, RunFailed
from head.core.effects import JudgePoint, MeasureClock, WriteBenchmark
from head.core.events import CordonRequested, PointJudged
from tests.doubles.head_benchmarks import LOAD, BenchWorld, finished, loads


class TestCreate:
    """A benchmark is taken, or refused with a stable code and nothing left behind."""

    def test_its_points_are_all_repetitions_of_the_sweep(self) -> None:
        """The whole sweep is gone through once for each repetition, each repetition with its own seed."""
        world = BenchWorld("n1")
        key = world.measure(sweep={"rate": [2, 4]}, repetitions=2, load=LOAD | {"seed": 7})
        points = [world.point(key, number) for number in range(4)]
        assert [(one.changes["rate"], one.repetition, one.seed) for one in points] == [
            (2, 0, 7), (4, 0, 7), (2, 1, 8), (4, 1, 8),
        ]  # fmt: skip
        assert world.benchmark(key).planned == 4

    def test_a_repeated_request_makes_one(self) -> None:
        """Under one idempotency key the same benchmark is answered."""
        world = BenchWorld("n1")
        first = world.measure(idempotency_key="k", request_sha256="s")
        assert world.measure(idempotency_key="k", request_sha256="s") == first
        assert world.measure(idempotency_key="k", request_sha256="other").code == "idempotency_mismatch"
        assert len(world.state.benchmarks) == 1

    @pytest.mark.parametrize(
        ("document", "code"),
        [
            ({"server": {"service": "none"}}, "service_not_found"),
            ({"server": {"serve": {"model": "none"}}}, "model_not_found"),
            ({"server": {"service": "svc", "via": "gateway"}}, "invalid_recipe"),
            ({"load": LOAD | {"nodes": ["n1", "n9"]}}, "node_not_found"),
            ({"load": LOAD | {"nodes": 3}}, "nothing_fits"),
            (
                {
                    "slo": {"ttft": 100},
                    "search": {"max_points": 300, "start": 5},
                    "sweep": {"prefix_tokens": [0, 100]},
                },
                "invalid_recipe",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, document: dict[str, Any], code: str) -> None:
        """Each mistake has its own code."""
        world = BenchWorld("n1", "n2")
        world.add_model("m", "n1")
        world.serve()
        assert world.measure(**document).code == code
        assert not world.state.benchmarks
        assert not world.state.points
        assert list(world.state.services) == ["svc"]

    def test_too_few_nodes_are_told_with_numbers(self) -> None:
        """A cordoned node is not counted, and why is said."""
        world = BenchWorld("n1", "n2")

        world.request(CordonRequested, node="n2", is_cordoned=True)
        refusal = world.measure(load=LOAD | {"nodes": 2})
        assert refusal.details == {"wanted": 2, "usable": 1, "known": 2}
        assert "n2: the node is cordoned" in refusal.hint

    def test_live_benchmarks_are_limited(self) -> None:
        """One more than BENCHMARKS_LIVE is refused."""
        world = BenchWorld("n1")
        for _ in range(limits.BENCHMARKS_LIVE):
            assert isinstance(world.measure(), str)
        assert world.measure().code == "too_many"

    def test_the_second_of_one_server_waits(self) -> None:
        """Two benchmarks would measure each other; the later begins when the first has ended."""
        world = BenchWorld("n1")
        first, second = world.measure(), world.measure()
        assert world.benchmark(first).state == "running"
        assert (world.benchmark(second).state, first in world.benchmark(second).note) == ("pending", True)
        world.cancel_benchmark(first)
        world.forget_all()
        world.pass_s(1, alive=("n1",))
        assert world.benchmark(second).state == "running"

    def test_load_nodes_are_those_without_the_service(self) -> None:
        """Of the nodes that may be used, those with its engines come last."""
        world = BenchWorld("n1", "n2", "n3")
        world.add_model("m", "n1")
        world.serve(devices=("n1:disk",))
        world.ready()
        key = world.measure(server={"service": "svc"}, load=LOAD | {"nodes": 2})
        assert world.benchmark(key).load_nodes == ("n2", "n3")
        assert world.benchmark(key).server_nodes == ("n1",)


class TestPoint:
    """One point on several nodes."""

    def test_orders_hold_what_a_part_needs(self) -> None:
        """Every node gets the same spec and its own part of it."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2}, sweep={"rate": [9]}, slo={"ttft": 300})
        first, second = (world.told(wire.EnsureRun, run)[0].body for run in loads(key, 0, 2))
        assert isinstance(first, wire.EnsureRun)
        assert isinstance(second, wire.EnsureRun)
        assert (first.part, second.part, first.parts, first.urls) == (0, 1, 2, ("http://there:8000",))
        assert first.spec == second.spec
        assert (first.spec["rate"], first.spec["slos"], first.token) == (9, ("ttft:300",), "")
        assert first.stop_after_ms > limits.RUN_PREPARE_MS + 12_000

    def test_engines_are_asked_with_their_own_key_and_model(self) -> None:
        """Load on a service goes to its engines; the model's name is the one they serve."""
        world = BenchWorld("n1", "n2")
        world.add_model("m", "n1")
        world.serve(devices=("n1:disk",))
        world.ready()
        key = world.measure(server={"service": "svc"}, monitor={"on": "server"})
        (order,) = world.told(wire.EnsureRun, f"{key}.0.0")
        assert isinstance(order.body, wire.EnsureRun)
        assert (order.body.urls, order.body.token, order.body.spec["model"]) == (
            ("http://n1.local:9000",),
            "key-1",
            "m",
        )
        (watch,) = world.told(wire.EnsureRun, f"{key}.monitor.n1")
        assert isinstance(watch.body, wire.EnsureRun)
        assert watch.body.spec["engines"] == [{"replica": "svc-0", "url": "http://n1.local:9000", "api_key": "key-1"}]
        facts = world.benchmark(key).facts
        assert facts["engines"][0]["argv"] == ["--ctx-size", "2048"]
        assert set(facts["nodes"]) == {"n1", "n2"}

    def test_all_begin_at_one_moment_of_their_own_clocks(self) -> None:
        """The start waits for every part and every clock; its skew is the sum of the two largest bounds."""
        world = BenchWorld("n1", "n2", "n3")
        key = world.measure(load=LOAD | {"nodes": 3})
        runs = loads(key, 0, 3)
        for run in runs[:2]:
            world.says(run, "armed")
        assert world.count(MeasureClock) == 0
        world.says(runs[2], "armed")
        assert (world.point(key).state, world.count(MeasureClock)) == ("armed", 3)
        world.clocks("n1", bound_ns=1_000_000)
        world.clocks("n2", bound_ns=3_000_000)
        assert not world.told(wire.FireRun)
        world.clocks("n3", bound_ns=2_000_000)
        point = world.point(key)
        assert (point.state, point.fire_ms, point.skew_ms) == ("running", world.now_ms + limits.RUN_LEAD_MS, 5.0)
        starts = {command.body.start_boottime_ns for command in world.told(wire.FireRun)}  # type: ignore[union-attr]
        assert starts == {(limits.RUN_LEAD_MS + world.now_ms - 1_000_000_000_000 + 500) * 1_000_000}

    def test_parts_that_differ_are_not_fired(self) -> None:
        """Another dataset on one node would make another load: the point fails and says which differs."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        one, two = loads(key, 0, 2)
        world.says(one, "armed", digest="a")
        world.says(two, "armed", digest="b")
        error = world.point(key).error
        assert error is not None
        assert (error.code, error.details["digests"]) == ("digest_mismatch", {"n1": "a", "n2": "b"})
        assert not world.told(wire.FireRun)
        world.forget_all()
        assert world.benchmark(key).state == "finishing"

    def test_its_figures_end_it(self) -> None:
        """Files come, the shell judges once, agents are told to forget, and the benchmark is whole."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        for run in world.fire(key):
            assert world.count(JudgePoint) == 0
            world.hand_in(run)
        assert (world.point(key).state, world.count(JudgePoint)) == ("judging", 1)
        assert [part.artifacts for part in world.point(key).parts] == [("generator.log", "load.bin")] * 2
        assert {command.body.how for command in world.told(wire.EndRun)} == {"forget"}  # type: ignore[union-attr]
        world.judge(key, req_s=4.9)
        point = world.point(key)
        assert (point.state, point.is_valid, point.coverage, point.figures["req_s"]) == ("completed", True, 1.0, 4.9)
        world.forget_all()
        finished(world, key)
        assert world.benchmark(key).state == "completed"
        assert not world.state.runs

    def test_a_judge_that_fails_fails_the_point(self) -> None:
        """Its error is the point's, and of the only point also the benchmark's."""
        world = BenchWorld("n1")
        key = world.measure()
        for run in world.fire(key):
            world.hand_in(run)

        error = Internal("the child died").info()
        world.step(PointJudged(key, world.benchmark(key).generation, 0, error=error))
        world.forget_all()
        finished(world, key)
        assert (world.benchmark(key).state, world.benchmark(key).error) == ("failed", error)

    def test_answers_of_another_generation_are_ignored(self) -> None:
        """What an older life of the state asked for counts no more."""
        world = BenchWorld("n1")
        key = world.measure()
        for run in world.fire(key):
            world.hand_in(run)

        world.step(PointJudged(key, world.benchmark(key).generation - 1, 0, True, (), {"req_s": 1.0}))
        assert world.point(key).state == "judging"


class TestLosses:
    """Nodes, agents, commands and heads that go away."""

    def test_a_lost_node_leaves_its_part_out(self) -> None:
        """A node that is silent for RUN_LOST_MS: coverage says so, the point is degraded and not valid."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        one, two = world.fire(key)
        world.hand_in(one)
        world.close("n2")
        world.pass_s(40, alive=("n1",))
        assert (world.state.nodes["n2"].status, world.run(two).state) == ("unreachable", "running")
        assert world.point(key).note == "n2 is unreachable; what is so for 60 s has lost its part"
        world.pass_s(50, alive=("n1",))
        assert world.point(key).state == "judging"
        world.judge(key)
        point = world.point(key)
        assert (point.coverage, point.is_valid, point.reasons) == (0.5, False, ("degraded",))
        assert [part.state for part in point.parts] == ["done", "lost"]
        world.forget_all()
        finished(world, key)
        assert world.benchmark(key).is_degraded
        assert world.benchmark(key).state == "completed"

    def test_the_next_point_waits_for_a_generator_that_nobody_can_stop(self) -> None:
        """A lost node may still send: only when its time is over the next point begins, without it."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2, "duration": 200}, sweep={"rate": [1, 2]})
        one, _ = world.fire(key)
        world.close("n2")
        world.pass_s(90, alive=("n1",))
        world.hand_in(one)
        world.judge(key)
        world.forget_all()
        world.pass_s(1, alive=("n1",))
        assert world.point_states(key) == ["completed", "pending"]
        assert "surely ended" in world.benchmark(key).note
        world.pass_s(130, alive=("n1",))
        assert world.point_states(key) == ["completed", "preparing"]
        assert [run.state for run in world.state.runs.values()] == ["pending", "lost"]

    def test_an_agent_that_forgot_its_run_has_lost_it(self) -> None:
        """It had it and reports without: nothing is started twice."""
        world = BenchWorld("n1")
        key = world.measure()
        (run,) = world.fire(key)
        world.forgets("n1", run)
        assert world.point(key).state == "failed"
        assert len(world.told(wire.EnsureRun, run)) == 1

    def test_an_order_is_repeated_until_the_agent_has_it(self) -> None:
        """A lost command is said again after COMMAND_REPEAT_MS, under the same generation."""
        world = BenchWorld("n1")
        key = world.measure()
        world.pass_s(limits.COMMAND_REPEAT_MS // 1000, alive=("n1",))
        first, second = world.told(wire.EnsureRun, f"{key}.0.0")
        assert first == second
        world.says(f"{key}.0.0", "preparing")
        world.pass_s(30, alive=("n1",))
        assert len(world.told(wire.EnsureRun, f"{key}.0.0")) == 2

    def test_a_run_that_fails_says_why(self) -> None:
        """The only part: the point and the benchmark fail with its error."""
        world = BenchWorld("n1")
        key = world.measure()
        error = RunFailed("no such dataset").info()
        world.fails(f"{key}.0.0", error)
        assert (world.point(key).state, world.point(key).error) == ("failed", error)
        world.forget_all()
        finished(world, key)
        assert (world.benchmark(key).state, world.benchmark(key).error) == ("failed", error)

    def test_failures_in_a_row_end_it(self) -> None:
        """After POINT_FAILURES failed points the rest is not run."""
        world = BenchWorld("n1")
        key = world.measure(sweep={"rate": [1, 2, 3, 4, 5]})
        for number in range(limits.POINT_FAILURES):
            world.fails(f"{key}.{number}.0", RunFailed("no").info())
            world.forget_all()
        assert world.point_states(key) == ["failed"] * 3 + ["cancelled"] * 2

    def test_what_is_not_prepared_in_time_is_left_out(self) -> None:
        """The others go on without it."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        one, two = loads(key, 0, 2)
        world.says(one, "armed")
        world.says(two, "preparing")
        world.pass_s(limits.RUN_PREPARE_MS // 1000 + 2, alive=("n1", "n2"))
        assert (world.run(two).state, world.point(key).state) == ("lost", "armed")

    def test_a_start_that_was_missed_begins_the_point_anew(self) -> None:
        """A part that began apart from the others: all of it is given up, and run once more."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        one, two = loads(key, 0, 2)
        for run in (one, two):
            world.says(run, "armed")
        world.clocks("n1", "n2")
        world.says(one, "running", start_boottime_ns=world.run(one).start_boottime_ns)
        world.says(two, "running", start_boottime_ns=world.run(two).start_boottime_ns + 400_000_000)
        assert "400 ms late" in str(world.point(key).error)
        world.forget_all()
        assert world.point_states(key) == ["failed", "preparing"]
        assert world.point(key, 1).attempt == 1
        world.perform(key, 1)
        finished(world, key)
        assert world.benchmark(key).state == "completed"

    def test_a_moment_that_is_over_is_not_told(self) -> None:
        """A head that was away fires nobody late; when the agents still wait the point is begun anew."""
        world = BenchWorld("n1")
        key = world.measure()
        (run,) = loads(key, 0, 1)
        world.says(run, "armed")
        world.clocks("n1")
        fired = len(world.told(wire.FireRun))
        world.restart()
        world.hello("n1", world.state.nodes["n1"].inventory)
        world.lease("n1")
        world.says(run, "armed")
        world.pass_s(20, alive=("n1",))
        assert len(world.told(wire.FireRun)) == fired
        assert world.point_states(key)[0] == "failed"
        world.forget_all()
        assert world.point_states(key) == ["failed", "preparing"]

    def test_a_head_that_starts_again_goes_on(self) -> None:
        """In the middle of a point: the run is taken as reported, and the shell is asked again to judge."""
        world = BenchWorld("n1")
        key = world.measure()
        (run,) = world.fire(key)
        world.restart()
        world.hello("n1", world.state.nodes["n1"].inventory)
        world.says(run, "running", start_boottime_ns=world.run(run).start_boottime_ns)
        world.hand_in(run)
        assert world.count(JudgePoint) == 1
        world.restart()
        world.pass_s(1)
        assert world.count(JudgePoint) == 2
        world.judge(key)
        assert world.point(key).is_valid
        world.restart()
        world.hello("n1", world.state.nodes["n1"].inventory)
        world.tell("n1")
        world.forget_all()
        world.pass_s(1, alive=("n1",))
        assert world.count(WriteBenchmark) >= 1
        finished(world, key)
        assert world.benchmark(key).state == "completed"

    def test_a_result_whose_files_were_not_noted_is_asked_for_again(self) -> None:
        """A report says that it is done, and the head knows no file of it: the agent says its result once more."""
        world = BenchWorld("n1")
        key = world.measure()
        (run,) = world.fire(key)
        world.pass_s(10, alive=("n1",))
        world.says(run, "done")
        assert len(world.told(wire.EnsureRun, run)) == 2
        detail = {"artifacts": ["load.bin", "../load.bin"], "start_boottime_ns": world.run(run).start_boottime_ns}
        world.answer(f"run:{run}", node="n1", generation=world.run(run).generation, detail=detail)
        assert world.point(key).parts[0].artifacts == ("load.bin",)

    def test_a_stray_run_is_told_to_go(self) -> None:
        """What no benchmark knows is forgotten, and asked about until it is."""
        world = BenchWorld("n1")
        world.runs["n1"] = {"old.0.0": wire.RunStatus("old.0.0", 5, "running")}
        world.tell("n1")
        (order,) = world.told(wire.EndRun, "old.0.0")
        assert isinstance(order.body, wire.EndRun)
        assert (order.body.how, order.generation > 5) == ("forget", True)
        ack = [effect.message for effect in world.lease("n1", digest=world._seqs - 1)]  # type: ignore[attr-defined]
        assert any(isinstance(message, wire.Ack) and message.wants_report for message in ack)

    def test_a_reboot_takes_its_runs(self) -> None:
        """A new boot id: what ran there is lost at once."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        _, two = world.fire(key)
        world.hello("n2", world.state.nodes["n2"].inventory, boot_id="another")
        assert world.run(two).state == "lost"
        assert world.point(key).state == "running"
