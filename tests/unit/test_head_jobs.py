"""Jobs: what is refused, what runs when, what fails with what, cancel, retries, timeouts, restarts."""

from __future__ import annotations

from typing import Any

import pytest

from common import limits, wire
from common.errors import ErrorInfo
from head.core.effects import Reply
from head.core.objects import Job, Step
from tests.doubles.head_core import GIB
from tests.doubles.head_engines import EngineWorld
from tests.doubles.head_jobs import ALIVE, download, fetched, graph, new_world


class TestDoor:
    """What is refused before anything begins."""

    @pytest.mark.parametrize(
        ("action", "code"),
        [
            (download(model="ghost"), "model_not_found"),
            (download("n1:banana"), "invalid_device"),
            (download("n9:disk"), "node_not_found"),
            (download("n1:gpu7"), "device_not_found"),
            (download(source="gopher://x/y"), "invalid_source"),
            ({"action": "serve", "model": "m", "device": "n1:gpu0", "config": {"args": 3}}, "invalid_value"),
            ({"action": "serve", "model": "m", "device": "n1:gpu0", "config": {"recipe": "x"}}, "recipe_not_found"),
            ({"action": "serve", "model": "m", "device": "n1:gpu0", "config": {"name": "No Name"}}, "invalid_name"),
            ({"action": "serve", "model": "m", "device": "n1:gpu0", "config": {"colour": 1}}, "invalid_value"),
            ({"action": "serve", "model": "m", "device": "n1:gpu0", "config": {"recipe": "vllm"}}, "invalid_recipe"),
            ({"action": "stop_serve", "model": "m", "device": "n1:gpu0"}, "service_not_found"),
            ({"action": "delete", "model": "m", "device": "n1:disk"}, "copy_not_found"),
            ({"action": "serve", "model": "m"}, "invalid_job"),
            (graph("a", "a"), "job_cycle"),
        ],
    )
    def test_the_code_is_stable(self, action: dict[str, Any], code: str) -> None:
        """Each mistake has its code, and no job is made."""
        world = new_world()
        assert world.job(action).code == code
        assert not world.state.jobs

    def test_too_many_live_jobs_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The limit counts jobs that have not ended."""
        monkeypatch.setattr(limits, "JOBS_LIVE", 2)
        world = new_world()
        first = world.job(download())
        world.job(download())
        assert world.job(download()).code == "too_many"
        world.cancel(first)
        fetched(world)
        assert isinstance(world.job(download()), str)

    def test_a_repeated_request_makes_one_job(self) -> None:
        """The same Idempotency-Key: the same job; with another body: a conflict."""
        world = new_world()
        first = world.job(download(), idempotency_key="k", request_sha256="a")
        assert world.job(download(), idempotency_key="k", request_sha256="a") == first
        assert world.job(download(), idempotency_key="k", request_sha256="b").code == "idempotency_mismatch"
        assert len(world.state.jobs) == 1

    def test_an_unknown_job_is_not_cancelled(self) -> None:
        """Cancelling what is not there is no success."""
        assert new_world().cancel("ghost").code == "job_not_found"


class TestRunning:
    """Steps run as the graph says."""

    def test_a_download_commands_and_completes(self) -> None:
        """From wish to verified copy, with what came in its result."""
        world = new_world()
        job = world.job(download())
        assert world.command(wire.EnsureCopy, "n1") is not None
        assert (world.the_job(job).state, world.states(job)) == ("running", ["running"])
        fetched(world)
        assert world.the_job(job).state == "completed"
        assert world.the_step(job).result["bytes"] == GIB
        assert world.the_job(job).ended_ms == world.now_ms

    def test_what_is_there_already_completes_at_once(self) -> None:
        """Nothing is fetched twice."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job(download())
        assert world.the_job(job).state == "completed"

    def test_independent_steps_run_together_and_dependents_after(self) -> None:
        """Two downloads at once, the third when both are done."""
        world = new_world()
        for name in ("m2", "m3"):
            world.add_model(name)
        job = world.job(graph("a"), graph("b", model_name="m2"), graph("c", "a", "b", model_name="m3"))
        assert world.states(job) == ["running", "running", "pending"]
        assert world.the_step(job, 2).note == "waits for a, b"
        fetched(world, "m")
        assert world.states(job) == ["completed", "running", "pending"]
        fetched(world, "m2")
        assert world.states(job) == ["completed", "completed", "running"]

    def test_a_failed_step_takes_its_dependents_with_it(self) -> None:
        """At once, and not those that do not depend on it."""
        world = new_world()
        world.add_model("m2")
        job = world.job(graph("a"), graph("b", "a"), graph("c", "b"), graph("d", model_name="m2"))
        refused = ErrorInfo(code="source_refused", message="no")
        world.result("m@main|n1:disk", "failed", error=refused)
        assert world.states(job) == ["failed", "skipped", "skipped", "running"]
        assert world.the_step(job, 1).error is not None
        assert world.the_step(job, 1).error.code == "dependency_failed"  # type: ignore[union-attr]
        assert world.the_job(job).state == "running"
        fetched(world, "m2")
        assert world.the_job(job).state == "failed"
        assert world.the_job(job).error.code == "source_refused"  # type: ignore[union-attr]

    def test_to_ram_is_disk_then_ram(self) -> None:
        """The RAM copy is the disk copy made resident."""
        world = new_world()
        job = world.job(download("n1:dram"))
        fetched(world)
        assert world.states(job) == ["running"]
        world.result("m@main|n1:dram")
        assert world.states(job) == ["completed"]

    def test_a_long_chain_of_done_things_ends_in_one_turn(self) -> None:
        """1,000 steps that find their work done are no loop."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job(*[download() for _ in range(1000)])
        assert world.the_job(job).state == "completed"

    def test_so_does_one_that_is_written_backwards(self) -> None:
        """Each step that ends lets its dependents follow in the same turn, wherever they stand in the file."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job(*[graph(f"s{n}", *([f"s{n + 1}"] if n < 299 else [])) for n in range(300)])
        assert world.the_job(job).state == "completed"

    def test_a_source_of_ones_own_is_used(self) -> None:
        """`source` of a download wins over what is registered."""
        world = new_world()
        world.job(download(source="https://other/m.gguf"))
        command = world.command(wire.EnsureCopy, "n1")
        assert command is not None
        assert isinstance(command.body, wire.EnsureCopy)
        assert [source.url for source in command.body.sources] == ["https://other/m.gguf"]


class TestQueue:
    """Limits per node, priorities."""

    def _full(self) -> tuple[EngineWorld, list[str]]:
        world = new_world()
        jobs = []
        for number in range(limits.STEPS_RUNNING_PER_NODE):
            world.add_model(f"x{number}")
            jobs.append(world.job(download(model=f"x{number}")))
        return world, jobs

    def test_so_many_steps_run_on_a_node_and_no_more(self) -> None:
        """The next waits and says for what; another node is not concerned."""
        world, _ = self._full()
        job = world.job(download())
        assert world.states(job) == ["pending"]
        assert world.the_step(job).note == "waits for a free place: 8 steps run on n1"
        other = world.job(download("n2:disk"))
        assert world.states(other) == ["running"]

    def test_higher_priority_goes_first_then_age(self) -> None:
        """A free place goes to the most important, the oldest of its kind."""
        world, _ = self._full()
        for name in ("a", "b", "c"):
            world.add_model(name)
        low = world.job(download(model="a"), priority=-5)
        old = world.job(download(model="b"), priority=5)
        world.now_ms += 1_000
        young = world.job(download(model="c"), priority=5)
        order = []
        for number in range(3):
            fetched(world, f"x{number}")
            order.append([job for job in (low, old, young) if world.states(job) == ["running"]])
        assert order == [[old], [old, young], [low, old, young]]

    def test_one_wide_job_keeps_the_limit(self) -> None:
        """Steps of the same job count as well; each that ends lets the next begin."""
        world = new_world()
        names = [f"x{number}" for number in range(limits.STEPS_RUNNING_PER_NODE + 2)]
        for name in names:
            world.add_model(name)
        job = world.job(*[graph(name, model_name=name) for name in names])
        assert world.states(job).count("running") == limits.STEPS_RUNNING_PER_NODE
        fetched(world, names[0])
        assert world.states(job).count("running") == limits.STEPS_RUNNING_PER_NODE
        assert world.states(job).count("pending") == 1

    def test_a_stop_does_not_queue(self) -> None:
        """Freeing things must not wait for places."""
        world, _ = self._full()
        world.fetched("m", "n2:disk", GIB)
        world.serve("svc", devices=("n2:disk",))
        job = world.job({"action": "stop_serve", "model": "m", "device": "n2:disk"})
        assert world.states(job) == ["running"]


class TestCancel:
    """Cancel really stops."""

    def test_a_fetch_is_stopped_and_the_rest_never_begins(self) -> None:
        """The step ends when the agent has confirmed; what was pending at once."""
        world = new_world()
        job = world.job(download(), download("n2:disk"))
        assert isinstance(world.cancel(job), Reply)
        assert world.command(wire.DropCopy, "n1") is not None
        assert world.states(job) == ["running", "cancelled"]
        world.result("m@main|n1:disk")
        assert world.states(job) == ["cancelled", "cancelled"]
        assert world.the_job(job).state == "cancelled"
        assert not world.state.copies

    def test_to_ram_stops_both_copies(self) -> None:
        """RAM first, then the disk copy that was only fetched for it."""
        world = new_world()
        job = world.job(download("n1:dram"))
        world.cancel(job)
        for _ in range(2):
            for key in [key for key, copy in world.state.copies.items() if copy.desired == "absent"]:
                world.result(key)
        assert world.the_job(job).state == "cancelled"
        assert not world.state.copies

    def test_a_copy_that_others_wait_for_goes_on(self) -> None:
        """Only this job's wish is taken back."""
        world = new_world()
        first, second = world.job(download()), world.job(download())
        world.cancel(first)
        assert (world.states(first), world.states(second)) == (["cancelled"], ["running"])
        assert world.state.copies["m@main|n1:disk"].desired == "present"

    def test_a_fetch_that_something_else_began_goes_on(self) -> None:
        """The step only waited for it."""
        world = new_world()
        world.want("m", "n1:disk", cause="someone")
        job = world.job(download())
        world.cancel(job)
        assert world.states(job) == ["cancelled"]
        assert world.state.copies["m@main|n1:disk"].desired == "present"

    def test_an_engine_that_it_started_is_stopped(self) -> None:
        """And the model that was there before stays."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        job = world.job({"action": "serve", "model": "m", "device": "n1:gpu0"})
        world.cancel(job)
        assert world.states(job) == ["running"]
        world.stopped(next(iter(world.state.replicas)))
        assert world.states(job) == ["cancelled"]
        assert not world.state.services
        assert world.state.copies["m@main|n1:disk"].desired == "present"

    def test_an_engine_that_was_there_before_stays(self) -> None:
        """The step only waited for it."""
        world = new_world()
        world.fetched("m", "n1:disk", GIB)
        world.serve("svc", devices=("n1:gpu0",))
        job = world.job({"action": "move", "model": "m", "from": "n1:disk", "to": "n1:gpu0"})
        world.cancel(job)
        assert world.states(job) == ["cancelled"]
        assert world.service().desired == "running"

    def test_an_agent_that_never_confirms_does_not_hold_it_for_ever(self) -> None:
        """After a while it ends, and says that nobody confirmed."""
        world = new_world()
        job = world.job(download())
        world.close("n1")
        world.cancel(job)
        assert world.states(job) == ["running"]
        world.pass_s(limits.STEP_STOP_MS / 1000 + 10, alive=("n2",))
        assert world.states(job) == ["cancelled"]
        assert "not confirmed" in world.the_step(job).note

    def test_an_ended_job_stays_as_it_is(self) -> None:
        """Cancelling later changes nothing."""
        world = new_world()
        job = world.job(download())
        fetched(world)
        before = world.the_job(job)
        world.cancel(job)
        assert world.the_job(job) == before


class TestTime:
    """Retries, timeouts, restarts."""

    def test_what_can_help_is_tried_again_with_pauses(self) -> None:
        """A node that is unreachable when the step begins may come back."""
        world = new_world()
        world.close("n1")
        world.pass_s(60, alive=("n2",))
        assert world.state.nodes["n1"].status == "unreachable"
        job = world.job(download())
        assert (world.states(job), world.the_step(job).attempts) == (["pending"], 1)
        assert "attempt 1 of 4 failed" in world.the_step(job).note
        world.pass_s(60, alive=("n2",))
        assert world.states(job) == ["failed"]
        assert world.the_step(job).attempts == limits.STEP_ATTEMPTS

    def test_its_own_timeout_ends_it_and_stops_the_work(self) -> None:
        """The outcome is unknown, so the fetch is told to stop."""
        world = new_world()
        job = world.job(download(timeout_s=30))
        world.pass_s(29, alive=ALIVE)
        assert world.states(job) == ["running"]
        world.pass_s(12, alive=ALIVE)
        assert world.the_step(job).error.code == "timed_out"  # type: ignore[union-attr]
        assert world.state.copies["m@main|n1:disk"].desired == "absent"

    def test_a_fetch_without_bytes_times_out(self) -> None:
        """Progress counts, not time."""
        world = new_world()
        job = world.job(download())
        world.progress("n1", "m@main|n1:disk", "fetching", 1, GIB)
        for done in range(2, 6):
            world.pass_s(limits.STEP_STALL_MS / 1000 - 60, alive=ALIVE)
            assert world.states(job) == ["running"], done
            world.progress("n1", "m@main|n1:disk", "fetching", done, 1 << 44)
            if done == 3:
                break
        world.pass_s(limits.STEP_STALL_MS / 1000 + 20, alive=ALIVE)
        assert world.the_step(job).error is not None
        assert "no byte came" in world.the_step(job).error.message  # type: ignore[union-attr]

    def test_a_restart_goes_on_where_the_journal_ends(self) -> None:
        """A running step is still watched, and what followed follows."""
        world = new_world()
        world.add_model("m2")
        job = world.job(graph("a"), graph("b", "a", model_name="m2"))
        world.restart()
        for node in ALIVE:
            world.hello(node, world.state.nodes[node].inventory)
            world.report(node)
        fetched(world)
        assert world.states(job) == ["completed", "running"]
        world.restart()
        for node in ALIVE:
            world.hello(node, world.state.nodes[node].inventory)
        world.report("n2")
        world.engines("n1")
        fetched(world, "m2")
        assert world.the_job(job).state == "completed"

    def test_stale_and_repeated_results_change_nothing(self) -> None:
        """A result of an older generation is nobody's."""
        world = new_world()
        job = world.job(download())
        generation = world.state.copies["m@main|n1:disk"].generation
        world.result("m@main|n1:disk", "failed", error=ErrorInfo("source_refused", "no"), generation=generation - 1)
        assert world.states(job) == ["running"]
        fetched(world)
        ended = world.the_job(job)
        fetched(world)
        assert world.the_job(job) == ended

    def test_old_ended_jobs_are_pruned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest go first; live ones never."""
        monkeypatch.setattr(limits, "JOBS_KEPT", 3)
        world = new_world()
        live = world.job(download("n2:disk"))
        world.fetched("m", "n1:disk", GIB)
        jobs = []
        for _ in range(5):
            world.now_ms += 10
            jobs.append(world.job(download()))
        world.pass_s(61, alive=ALIVE)
        assert list(world.state.jobs) == [live, *jobs[2:]]

    def test_no_job_is_journalled_while_nothing_changes(self) -> None:
        """Ticks and leases of a waiting job cost no record."""
        world = new_world()
        world.job(download())
        revision = world.state.revision
        world.pass_s(60, alive=ALIVE)
        assert world.state.revision == revision


def test_a_job_of_an_older_release_loads() -> None:
    """Fields that a journal does not have yet get their defaults."""
    import msgspec

    old = b'{"id":"j","name":"n","actor":"a","state":"running","created_ms":1,"steps":[{"id":"s","action":"download"}]}'
    job = msgspec.json.decode(old, type=Job)
    assert job.steps == (Step(id="s", action="download"),)
