"""Benchmarks in the head's core: from the request to the figures, and whatever is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from common import limits, wire
from common.errors import EngineFailed, Internal, RunFailed
from head.core.effects import JudgePoint, MeasureClock, RemoveBenchmark, Reply, WriteBenchmark
from tests.doubles.head_benchmarks import LOAD, URLS, BenchWorld


def loads(benchmark: str, point: int, parts: int) -> list[str]:
    """The names of a point's runs."""
    return [f"{benchmark}.{point}.{part}" for part in range(parts)]


def finished(world: BenchWorld, benchmark: str) -> None:
    """Takes a benchmark whose points are over to its end."""
    for key in world.benchmark(benchmark).monitors:
        world.hand_in(key, "monitor.csv")
    world.write(benchmark)
    world.forget_all()


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
        from head.core.events import CordonRequested

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
        from head.core.events import PointJudged

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
        from head.core.events import PointJudged

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


class TestServer:
    """The service that is measured."""

    def test_an_own_service_is_made_and_removed(self) -> None:
        """Its engines run until the report with their logs is written."""
        world = BenchWorld("n1", "n2")
        world.add_model("m", "n1")
        key = world.measure(server={"serve": {"model": "m", "devices": ["n1:disk"], "config": {"ctx": 4096}}})
        service = world.service(key)
        assert (service.model, service.api_key, service.cause, service.config) == ("m", "engines", key, {"ctx": 4096})
        assert world.benchmark(key).state == "preparing"
        assert "0 of 1 replicas" in world.benchmark(key).note
        world.ready(f"{key}-0")
        world.pass_s(1, alive=("n1", "n2"))
        assert (world.benchmark(key).state, world.benchmark(key).load_nodes) == ("running", ("n2",))
        world.perform(key)
        assert world.service(key).desired == "running"
        world.write(key)
        world.forget_all()
        assert world.benchmark(key).state == "completed"
        assert world.service(key).desired == "stopped"

    def test_an_own_service_is_kept_where_the_recipe_says(self) -> None:
        """`keep` leaves it running."""
        world = BenchWorld("n1")
        world.add_model("m", "n1")
        key = world.measure(server={"serve": {"model": "m", "keep": True}})
        world.cancel_benchmark(key)
        assert world.benchmark(key).state == "cancelled"
        assert world.service(key).desired == "running"

    def test_an_engine_that_fails_fails_it(self) -> None:
        """With the engine's own error."""
        world = BenchWorld("n1")
        world.add_model("m", "n1")
        key = world.measure(server={"serve": {"model": "m", "devices": ["n1:disk"]}})
        replica = world.replica(f"{key}-0")
        error = EngineFailed("no memory").info()
        world.answer(f"replica:{key}-0", "failed", node="n1", generation=replica.generation, error=error)
        world.pass_s(1, alive=("n1",))
        finished(world, key)
        assert world.benchmark(key).state == "failed"
        assert "no memory" in str(world.benchmark(key).error)
        assert world.service(key).desired == "stopped"

    def test_a_service_that_is_never_ready_ends_it(self) -> None:
        """After ready_timeout."""
        world = BenchWorld("n1")
        world.add_model("m", "n1")
        key = world.measure(server={"serve": {"model": "m"}, "ready_timeout": 30})
        world.pass_s(32, alive=("n1",))
        assert world.benchmark(key).state == "finishing"
        assert "not ready after 30 s" in str(world.benchmark(key).error)

    def test_a_service_that_is_stopped_under_it_ends_it(self) -> None:
        """Before the next point."""
        world = BenchWorld("n1", "n2")
        world.add_model("m", "n1")
        world.serve(devices=("n1:disk",))
        world.ready()
        key = world.measure(server={"service": "svc"}, sweep={"rate": [1, 2]})
        (run,) = world.fire(key)
        world.unserve()
        world.hand_in(run)
        world.judge(key)
        world.forget_all()
        assert world.point_states(key) == ["completed", "cancelled"]
        assert world.point(key).reasons == ("server_changed",)
        assert "was stopped" in str(world.benchmark(key).error)

    def test_through_the_gateway_it_has_a_key_of_its_own(self) -> None:
        """An inference key that opens the gateway while the benchmark lives, and no longer."""
        world = BenchWorld("n1", "n2")
        world.state.gateway_url = "https://head:8443"
        world.add_model("m", "n1")
        world.serve(devices=("n1:disk",))
        world.ready()
        key = world.measure(server={"service": "svc", "via": "gateway"})
        (order,) = world.told(wire.EnsureRun, f"{key}.0.0")
        assert isinstance(order.body, wire.EnsureRun)
        assert (order.body.urls, order.body.spec["model"]) == (("https://head:8443",), "svc")
        from head.auth import authenticate

        principal = authenticate(world.state, f"Bearer {order.body.token}", world.now_ms)
        assert principal.role == "inference"
        world.cancel_benchmark(key)
        world.forget_all()
        assert not world.state.keys

    def test_an_engine_that_moved_is_not_loaded_where_it_was(self) -> None:
        """The order names its address: prepared load is given up, and prepared again for the new one."""
        world = BenchWorld("n1", "n2")
        world.add_model("m", "n1")
        world.serve(devices=("n1:disk",))
        world.ready()
        key = world.measure(server={"service": "svc"})
        world.ready(port=9001, pid=78)
        world.fire_in_vain(key)
        assert world.point_states(key) == ["failed", "preparing"]
        assert world.point(key, 1).urls == ("http://n1.local:9001",)
        assert not world.told(wire.FireRun)

    def test_an_engine_that_fell_under_load_makes_the_point_invalid(self) -> None:
        """Its figures are of two processes, or of one and none."""
        world = BenchWorld("n1", "n2")
        world.add_model("m", "n1")
        world.serve(devices=("n1:disk",))
        world.ready()
        key = world.measure(server={"service": "svc"})
        (run,) = world.fire(key)
        world.ready(restarts=1, pid=78)
        world.hand_in(run)
        world.judge(key)
        assert (world.point(key).is_valid, world.point(key).reasons) == (False, ("server_changed",))


class TestEnd:
    """Monitors, the report, cancel and delete."""

    def test_monitors_begin_with_it_and_hand_in_at_the_end(self) -> None:
        """They are told to finish when the last point is over; the report waits for their files."""
        world = BenchWorld("n1")
        key = world.measure(monitor={"interval": 0.5})
        monitor = f"{key}.monitor.n1"
        (order,) = world.told(wire.EnsureRun, monitor)
        assert isinstance(order.body, wire.EnsureRun)
        assert (order.body.kind, order.body.spec) == ("monitor", {"interval": 0.5, "engines": []})
        world.says(monitor, "running")
        world.perform(key)
        (end,) = world.told(wire.EndRun, monitor)
        assert isinstance(end.body, wire.EndRun)
        assert (end.body.how, end.generation) == ("finish", world.run(monitor).generation)
        assert world.count(WriteBenchmark) == 0
        world.hand_in(monitor, "monitor.csv", "engine.csv")
        assert world.count(WriteBenchmark) == 1
        assert world.benchmark(key).monitor_parts[0].artifacts == ("engine.csv", "monitor.csv")
        world.write(key)
        forget = world.told(wire.EndRun, monitor)[-1]
        assert forget.generation == end.generation + 1
        world.forget_all()
        assert world.benchmark(key).state == "completed"

    def test_a_report_that_cannot_be_written_is_its_error(self) -> None:
        """The points are there; the benchmark says what is missing."""
        world = BenchWorld("n1")
        key = world.measure()
        world.perform(key)
        error = Internal("disk").info()
        world.write(key, error)
        world.forget_all()
        assert (world.benchmark(key).state, world.benchmark(key).error) == ("failed", error)
        assert world.point(key).state == "completed"

    @pytest.mark.parametrize("stage", ["preparing", "armed", "running", "judging", "finishing"])
    def test_cancel_stops_everything_everywhere(self, stage: str) -> None:
        """In every state: each run is forgotten by its agent, then it is cancelled."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2}, monitor={"enabled": True})
        runs = loads(key, 0, 2)
        if stage == "armed":
            for run in runs:
                world.says(run, "armed")
        elif stage != "preparing":
            world.fire(key)
        if stage in ("judging", "finishing"):
            for run in runs:
                world.hand_in(run)
        if stage == "finishing":
            world.judge(key)
            world.forget_all()
        expected = "completed" if stage == "finishing" else "cancelled"
        world.cancel_benchmark(key)
        assert {run.desired for run in world.state.runs.values()} == {"absent"}
        assert world.benchmark(key).state == "finishing"
        world.judge(key)
        world.forget_all()
        assert (world.benchmark(key).state, world.point(key).state) == ("cancelled", expected)
        assert not world.state.runs

    def test_cancel_does_not_wait_for_a_node_that_is_away(self) -> None:
        """Its run is told to go when it comes back."""
        world = BenchWorld("n1", "n2")
        key = world.measure(load=LOAD | {"nodes": 2})
        _, two = world.fire(key)
        world.close("n2")
        world.cancel_benchmark(key)
        world.forgets("n1", f"{key}.0.0")
        world.pass_s(limits.RUN_LOST_MS // 1000 + 2, alive=("n1",))
        assert world.benchmark(key).state == "cancelled"
        world.hello("n2", world.state.nodes["n2"].inventory)
        world.orders.clear()
        world.tell("n2")
        assert len(world.told(wire.EndRun, two)) == 1

    def test_its_own_timeout_ends_it(self) -> None:
        """What was measured until then is written."""
        world = BenchWorld("n1")
        key = world.measure(timeout=60, sweep={"rate": [1, 2]})
        world.perform(key)
        world.pass_s(62, alive=("n1",))
        assert world.point_states(key) == ["completed", "cancelled"]
        world.forget_all()
        finished(world, key)
        assert world.benchmark(key).error is not None
        assert world.benchmark(key).state == "failed"

    def test_the_pause_is_kept(self) -> None:
        """The next point begins when the pause is over."""
        world = BenchWorld("n1")
        key = world.measure(pause=20, sweep={"rate": [1, 2]})
        world.perform(key)
        world.pass_s(15, alive=("n1",))
        assert world.point_states(key) == ["completed", "pending"]
        world.pass_s(6, alive=("n1",))
        assert world.point_states(key) == ["completed", "preparing"]

    def test_only_what_has_ended_is_deleted(self) -> None:
        """With its points and files."""
        world = BenchWorld("n1")
        key = world.measure()
        assert world.delete_benchmark(key).code == "in_use"
        world.cancel_benchmark(key)
        world.forget_all()
        assert isinstance(world.delete_benchmark(key), Reply)
        assert not world.state.points
        assert world.count(RemoveBenchmark) == 1
        assert world.delete_benchmark(key).code == "benchmark_not_found"

    def test_old_results_are_pruned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest beyond BENCHMARKS_KEPT go, and those beyond the number of points."""
        monkeypatch.setattr(limits, "BENCHMARKS_KEPT", 3)
        world = BenchWorld("n1")
        made = []
        for _ in range(5):
            made.append(world.measure())
            world.cancel_benchmark(made[-1])
            world.forget_all()
            world.now_ms += 1_000
        world.pass_s(1, alive=("n1",))
        assert list(world.state.benchmarks) == made[2:]
        monkeypatch.setattr(limits, "BENCHMARK_POINTS_KEPT", 1)
        world.pass_s(1, alive=("n1",))
        assert list(world.state.benchmarks) == made[4:]
        assert world.count(RemoveBenchmark) == 4


class TestSearch:
    """A search in the whole machine."""

    def measured(self, world: BenchWorld, key: str, capacity: float) -> None:
        """Performs every point that is decided, on a server of this capacity."""
        number = 0
        while f"{key}.{number}" in world.state.points:
            load = world.point(key, number).changes["rate"]
            world.perform(key, number, slo_attainment=1.0 if load <= capacity else 0.4, output_tok_s=load * 10)
            number += 1

    def test_it_finds_what_the_server_bears(self) -> None:
        """Doubling, bisection, and the figures of the best."""
        world = BenchWorld("n1")
        key = world.measure(slo={"ttft": 200, "attainment": 0.9}, search={"start": 1, "most": 64, "precision": 0.2})
        self.measured(world, key, 11)
        best = world.benchmark(key).best
        assert (best["over"], best["load"], best["point"]) == ("rate", 10, 6)
        assert best["figures"]["output_tok_s"] == 100
        assert world.benchmark(key).planned == len(world.point_states(key)) == 7

    def test_a_generator_that_is_late_is_repeated_once_and_then_ends_it(self) -> None:
        """The best so far stands, with the reason."""
        world = BenchWorld("n1")
        key = world.measure(slo={"ttft": 200}, search={"start": 1, "most": 64})
        world.perform(key, 0)
        for number in (1, 2):
            for run in world.fire(key, number):
                world.hand_in(run)
            world.judge(key, number, reasons=("rate_missed",))
            world.forget_all()
        assert [world.point(key, number).attempt for number in (1, 2)] == [0, 1]
        best = world.benchmark(key).best
        assert best["load"] == 1
        assert "rate_missed" in best["why"]
        finished(world, key)
        assert world.benchmark(key).state == "completed"

    def test_each_combination_of_a_sweep_is_searched(self) -> None:
        """One after the other; the best of all stands first."""
        world = BenchWorld("n1")
        key = world.measure(
            slo={"ttft": 200}, search={"start": 4, "most": 8}, sweep={"prefix_tokens": [0, 64]}, repetitions=2
        )
        self.measured(world, key, 5)
        best = world.benchmark(key).best
        assert [group["changes"] for group in best["groups"]] == [{"prefix_tokens": 0}, {"prefix_tokens": 64}]
        assert all(4.7 < group["load"] <= 5 for group in best["groups"])


class TestJobStep:
    """A job measures."""

    def test_it_waits_for_its_benchmark_and_has_its_figures(self) -> None:
        """The benchmark's points are the step's result."""
        world = BenchWorld("n1")
        document = {"name": "try", "server": URLS, "load": LOAD, "monitor": {"enabled": False}}
        job = world.job({"action": "benchmark", "config": {"document": document}})
        (key,) = world.state.benchmarks
        assert world.benchmark(key).cause == f"{job}/1-benchmark"
        world.perform(key)
        finished(world, key)
        assert world.states(job) == ["completed"]
        assert world.the_step(job).result["points"][0]["figures"]["req_s"] == 5.0
        assert world.the_step(job).result["benchmark"] == key

    def test_a_recipe_of_the_head_is_changed_by_the_document(self) -> None:
        """By name, with other values in some places."""
        world = BenchWorld("n1")
        from common.bench.recipe import convert

        known = convert({"name": "known", "server": URLS, "load": LOAD, "monitor": {"enabled": False}})
        world.state.benchmark_recipes = {"known": known}
        config = {"recipe": "known", "document": {"load": {"rate": 3}}}
        assert isinstance(world.job({"action": "benchmark", "config": config}), str)
        (made,) = world.state.benchmarks.values()
        assert (made.name, made.recipe["load"]["rate"], made.recipe["load"]["duration"]) == ("known", 3, 10)

    @pytest.mark.parametrize(
        ("action", "code"),
        [
            ({"config": {}}, "invalid_job"),
            ({"config": {"recipe": "none"}}, "recipe_not_found"),
            ({"config": {"document": {"name": "x"}}}, "invalid_recipe"),
            ({"config": {"recipe": "none", "colour": 1}}, "invalid_job"),
            ({"config": {"recipe": "none"}, "device": "n1:disk"}, "invalid_job"),
        ],
    )
    def test_mistakes_are_refused(self, action: dict[str, Any], code: str) -> None:
        """Before anything happens."""
        world = BenchWorld("n1")
        assert world.job({"action": "benchmark"} | action).code == code
        assert not world.state.benchmarks

    def test_cancelling_the_job_cancels_it(self) -> None:
        """The step ends when the benchmark has."""
        world = BenchWorld("n1")
        document = {"name": "try", "server": URLS, "load": LOAD, "monitor": {"enabled": False}}
        job = world.job({"action": "benchmark", "config": {"document": document}})
        (key,) = world.state.benchmarks
        world.fire(key)
        world.cancel(job)
        assert (world.states(job), world.benchmark(key).is_cancelling) == (["running"], True)
        world.forget_all()
        assert (world.states(job), world.benchmark(key).state) == (["cancelled"], "cancelled")


def test_why_says_what_it_waits_for() -> None:
    """In words, with the node that is away."""
    world = BenchWorld("n1", "n2")
    key = world.measure(load=LOAD | {"nodes": 2})
    world.fire(key)
    world.close("n2")
    said = world.ask_why("benchmark", key)
    assert (said.kind, said.state) == ("benchmark", "running")
    assert "point 1 of 1 is running" in said.reason
    assert "on n2, which is suspect" in said.reason
