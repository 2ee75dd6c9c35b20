"""Benchmarks in the head's core: the server that is measured, the end, searches, and jobs that measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from common import limits, wire
from common.bench.recipe import convert
from common.errors import EngineFailed, ErrorInfo, Internal
from head.api.render_benchmarks import as_ended, benchmark_view
from head.auth import authenticate
from head.core.effects import RemoveBenchmark, Reply, WriteBenchmark
from tests.doubles.head_benchmarks import LOAD, URLS, BenchWorld, finished, loads


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
        assert "engines were others" in world.point(key).said[0]
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
        if stage == "finishing":
            world.write(key)
        assert (world.benchmark(key).state, world.point(key).state) == ("cancelled", expected)
        assert benchmark_view(world.state, world.benchmark(key)).points_done == (stage == "finishing")
        assert not world.state.runs

    @pytest.mark.parametrize("error", [None, Internal("disk").info()])
    def test_what_was_measured_before_a_cancel_is_written(self, error: ErrorInfo | None) -> None:
        """Once everything has stopped; it is cancelled even where the report could not be written."""
        world = BenchWorld("n1")
        key = world.measure(sweep={"rate": [1, 2]}, monitor={"enabled": True})
        world.perform(key)
        world.cancel_benchmark(key)
        assert world.count(WriteBenchmark) == 0
        world.forget_all()
        world.pass_s(3, alive=("n1",))
        assert (world.benchmark(key).state, world.count(WriteBenchmark)) == ("finishing", 1)
        world.write(key, error)
        assert (world.benchmark(key).state, world.point_states(key)) == ("cancelled", ["completed", "cancelled"])
        said = world.benchmark(key).error
        assert said is not None
        assert said.code == "cancelled"

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
    assert "point 0 is running: " in said.reason
    assert "; 0 of 1 points are done" in said.reason
    assert "on n2, which is suspect" in said.reason


class TestVerdict:
    """What people are told of the whole, in lists as in details."""

    @pytest.mark.parametrize(
        ("reasons", "verdict"),
        [
            (((), ()), "valid"),
            (((), ("degraded",)), "degraded"),
            ((("degraded",), ("late", "degraded")), "invalid"),
        ],
    )
    def test_the_worst_of_its_points(self, reasons: Sequence[tuple[str, ...]], verdict: str) -> None:
        """The same with and without the points, and in what is kept with the result before it has ended."""
        world = BenchWorld("n1")
        key = world.measure(sweep={"rate": [1, 2]})
        for number, codes in enumerate(reasons):
            for run in world.fire(key, number):
                world.hand_in(run)
            world.judge(key, number, reasons=codes)
            world.forget_all()
        benchmark = world.benchmark(key)
        assert (benchmark.state, benchmark_view(world.state, benchmark).verdict) == ("finishing", "")
        assert as_ended(benchmark_view(world.state, benchmark), benchmark, 0)["verdict"] == verdict
        finished(world, key)
        benchmark = world.benchmark(key)
        assert benchmark_view(world.state, benchmark).verdict == verdict
        assert benchmark_view(world.state, benchmark, is_short=True).verdict == verdict
