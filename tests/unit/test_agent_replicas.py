"""The agent's core: engines from order to end, whatever dies in between."""

from __future__ import annotations

import pytest

from agent.core import effects as fx
from agent.core import events as ev
from common import limits, wire
from common.errors import ErrorInfo
from tests.doubles.agent_node import Node, drop_copy, ensure_copy, ensure_replica

OP = "replica:chat-0"
SICK = ErrorInfo("unhealthy", "no token within 5 s", is_retryable=True)


@pytest.fixture
def node() -> Node:
    """A node with the copy ready and an open session."""
    node = Node().start().open()
    node.command(ensure_copy(), 1)
    node.results()
    return node


def ready(node: Node, **fields: object) -> Node:
    """The replica runs and has answered its first probe."""
    node.command(ensure_replica("chat-0", **fields), 2)
    node.probe("chat-0")
    assert node.replica_state() == "ready"
    return node


def signals(node: Node) -> list[bool]:
    """is_kill of the signals sent so far."""
    return [effect.is_kill for effect in node.effects if isinstance(effect, fx.SignalReplica)]


def spawns(node: Node) -> list[int]:
    """Runs that were spawned so far."""
    return [effect.run for effect in node.effects if isinstance(effect, fx.SpawnReplica)]


class TestStart:
    """From order to ready."""

    def test_waits_for_its_copy(self) -> None:
        """Without the copy it is waiting_copy; the moment the copy is ready it is spawned from its directory."""
        node = Node(is_eager=False).start().open()
        node.command(ensure_replica(), 2)
        assert node.replica_state() == "waiting_copy"
        node.command(ensure_copy(), 1)
        node.finish(next(iter(node.mover_asks)))
        assert node.replica_state() == "starting"
        (spawn,) = [effect for effect in node.effects if isinstance(effect, fx.SpawnReplica)]
        assert spawn.directory == "/store/models/org/m@main"

    def test_dram_replica_waits_for_ram(self, node: Node) -> None:
        """An engine on dram is not started from the disk copy."""
        node.command(ensure_replica(storage="dram"), 2)
        assert node.replica_state() == "waiting_copy"
        node.command(ensure_copy("dram"), 3)
        assert node.replica_state() == "starting"

    def test_needs_no_model(self) -> None:
        """A replica without a model starts at once."""
        node = Node().start().open()
        node.command(ensure_replica(model="", revision=""), 1)
        assert node.replica_state() == "starting"

    def test_ready_by_its_own_answer(self, node: Node) -> None:
        """Failing probes keep it starting; the first good one makes it ready and answers the command."""
        node.command(ensure_replica(), 2)
        node.probe("chat-0", SICK)
        node.wait(1_000)
        assert (node.replica_state(), node.results()) == ("starting", [])
        node.probe("chat-0")
        (result,) = node.take(wire.Result)
        assert (result.op_id, result.outcome, result.detail["port"]) == (OP, "ok", node.processes["chat-0"].port)

    def test_canary_is_part_of_readiness(self, node: Node) -> None:
        """With a canary in the order, every probe of a starting engine asks for a token."""
        node.command(ensure_replica(health=wire.HealthSpec(canary={"max_tokens": 1})), 2)
        probes = [effect for effect in node.effects if isinstance(effect, fx.ProbeReplica)]
        assert [probe.with_canary for probe in probes] in ([], [True])
        node.wait(1)
        assert next(effect for effect in node.effects if isinstance(effect, fx.ProbeReplica)).with_canary

    def test_not_ready_in_time_is_restarted(self, node: Node) -> None:
        """An engine that never answers is ended at its time and started again."""
        node.command(ensure_replica(health=wire.HealthSpec(ready_timeout_s=10)), 2)
        node.wait(10_000)
        assert signals(node) == [False]
        task = node.state.replicas["chat-0"]
        assert (task.state, task.restarts) == ("starting", 1)
        assert task.error is not None
        assert task.error.code == "engine_not_ready"

    def test_spawn_that_cannot_help_fails_at_once(self, node: Node) -> None:
        """A missing engine is a failure, not a loop of restarts."""
        node.command(ensure_replica(), 2)
        node.processes.clear()
        node.state.engines["chat-0"].phase = "spawning"
        node.post(ev.ReplicaSpawnFailed("chat-0", 1, ErrorInfo("engine_missing", "no llama-server")))
        assert node.results() == [(OP, 2, "failed", "engine_missing")]
        assert node.replica_state() == "failed"


class TestRestart:
    """Crashes, hangs and their limits."""

    def test_crash_restarts_with_growing_delay(self, node: Node) -> None:
        """Each crash doubles the wait; nothing is started before it is over."""
        ready(node)
        node.exit("chat-0", 1)
        assert node.replica_state() == "starting"
        node.wait(limits.REPLICA_BACKOFF_BASE_MS - 1)
        assert spawns(node) == [1]
        node.wait(1)
        assert spawns(node) == [1, 2]
        node.exit("chat-0", 1)
        node.wait(2 * limits.REPLICA_BACKOFF_BASE_MS - 1)
        assert spawns(node) == [1, 2]
        node.wait(1)
        assert spawns(node) == [1, 2, 3]

    def test_too_many_restarts_fail_with_last_lines(self, node: Node) -> None:
        """After max_restarts it is failed, with exit code and last log lines in report and result."""
        node.command(ensure_replica(max_restarts=2), 2)
        for _ in range(3):
            node.exit("chat-0", 9)
            node.wait(limits.REPLICA_BACKOFF_CAP_MS)
        result = next(result for result in node.take(wire.Result) if result.op_id == OP)
        assert (result.outcome, result.detail["exit_code"], result.detail["last_log"]) == ("failed", 9, ["last words"])
        (status,) = node.take(wire.Report)[-1].replicas
        assert (status.state, status.last_log, status.exit_code) == ("failed", ("last words",), 9)

    def test_long_readiness_forgives_restarts(self, node: Node) -> None:
        """An engine that was ready for long starts again from the first delay."""
        ready(node, max_restarts=1)
        for _ in range(3):
            node.now_ms += limits.REPLICA_STABLE_MS
            node.exit("chat-0", 1)
            node.wait(limits.REPLICA_BACKOFF_BASE_MS)
            node.probe("chat-0")
        assert node.replica_state() == "ready"

    def test_hung_engine_is_unhealthy_then_restarted(self, node: Node) -> None:
        """After `failures` bad probes in a row it is unhealthy, ended and started again; the reason is kept."""
        node.is_eager = False
        ready(node, health=wire.HealthSpec(failures=2))
        node.wait(limits.REPORT_SPACING_MS)
        node.probe("chat-0", SICK)
        assert node.replica_state() == "ready"
        node.probe("chat-0", SICK)
        assert node.replica_state() == "unhealthy"
        assert signals(node) == [False]
        node.obey("chat-0", 1)
        task = node.state.replicas["chat-0"]
        assert (task.state, task.restarts, task.error) == ("starting", 1, SICK)

    def test_one_good_probe_resets_the_count(self, node: Node) -> None:
        """Bad probes count only in a row."""
        ready(node, health=wire.HealthSpec(failures=2))
        for _ in range(5):
            node.probe("chat-0", SICK)
            node.probe("chat-0")
        assert node.replica_state() == "ready"

    def test_answer_of_an_older_run_changes_nothing(self, node: Node) -> None:
        """Probes, exits and starts of an earlier process are ignored; a stray old process is killed."""
        ready(node)
        node.exit("chat-0", 1)
        node.wait(limits.REPLICA_BACKOFF_BASE_MS)
        node.probe("chat-0")
        node.post(ev.ReplicaExited("chat-0", 1, 1))
        node.post(ev.ReplicaProbed("chat-0", 1, SICK))
        assert node.replica_state() == "ready"
        node.post(ev.ReplicaStarted("chat-0", 1, 5, 5, "127.0.0.1", 1))
        assert [(e.run, e.is_kill) for e in node.effects if isinstance(e, fx.SignalReplica)] == [(1, True)]


class TestStop:
    """StopReplica and what makes engines end."""

    def test_term_grace_kill(self, node: Node) -> None:
        """SIGTERM first, SIGKILL after the grace and again until it has ended, then stopped and answered."""
        ready(node)
        node.results()
        node.is_eager = False
        node.command(wire.StopReplica("chat-0", grace_s=5), 3)
        assert (node.replica_state(), signals(node)) == ("stopping", [False])
        node.wait(4_999)
        assert signals(node) == [False]
        node.wait(1)
        assert signals(node) == [False, True]
        node.wait(limits.REPLICA_KILL_REPEAT_MS)
        assert signals(node) == [False, True, True]
        assert node.results() == []
        node.obey("chat-0", 1)
        assert node.results() == [(OP, 3, "ok", "")]
        assert node.replica_state() == "stopped"

    def test_not_stopped_while_something_is_left(self, node: Node) -> None:
        """Processes or GPU memory that are left keep it stopping, with their numbers, until they are gone."""
        ready(node)
        node.results()
        node.is_eager = False
        node.command(wire.StopReplica("chat-0"), 3)
        node.post(ev.ReplicaExited("chat-0", 1, 0, left=(77,), gpu_bytes_left=5))
        assert (node.replica_state(), node.results()) == ("stopping", [])
        error = node.state.replicas["chat-0"].error
        assert error is not None
        assert error.details == {"pids": [77], "gpu_bytes": 5}
        node.wait(limits.REPLICA_KILL_REPEAT_MS)
        assert signals(node)[-1] is True
        node.post(ev.ReplicaExited("chat-0", 1, 0))
        assert node.results() == [(OP, 3, "ok", "")]

    def test_forgotten_once_acknowledged(self, node: Node) -> None:
        """A stopped replica is reported until its result is acknowledged, then forgotten; a late order is fenced."""
        ready(node)
        node.command(wire.StopReplica("chat-0"), 3)
        node.ack(OP, 3)
        assert not node.state.replicas
        assert any(isinstance(effect, fx.ForgetReplica) for effect in node.effects)
        node.results()
        node.command(ensure_replica(), 2)
        assert node.results() == [(OP, 2, "failed", "stale_generation")]

    def test_stop_wins_at_the_same_generation(self, node: Node) -> None:
        """A stop with the generation of the start stops; the start repeated afterwards does not start again."""
        ready(node)
        node.command(wire.StopReplica("chat-0"), 2)
        assert node.replica_state() == "stopped"
        node.command(ensure_replica(), 2)
        assert node.replica_state() == "stopped"
        assert spawns(node) == [1]

    def test_stop_while_spawning_waits_for_the_process(self, node: Node) -> None:
        """A process that is just being made is ended once it is known, not forgotten."""
        node.command(ensure_replica(), 2)
        node.state.engines["chat-0"].phase = "spawning"
        node.is_eager = False
        node.command(wire.StopReplica("chat-0"), 3)
        assert signals(node) == []
        node.post(ev.ReplicaStarted("chat-0", 1, 5, 5, "127.0.0.1", 1))
        assert signals(node) == [False]

    def test_stop_of_an_unknown_replica_is_ok(self, node: Node) -> None:
        """What does not run is stopped."""
        node.command(wire.StopReplica("other-0"), 3)
        assert node.results() == [("replica:other-0", 3, "ok", "")]

    def test_cancel_of_a_starting_replica(self, node: Node) -> None:
        """CancelOp ends an engine that never was ready; its result is cancelled."""
        node.command(ensure_replica(), 2)
        node.command(wire.CancelOp(OP, 2), 3, op_id="cancel:1")
        assert (OP, 2, "cancelled", "cancelled") in node.results()
        assert not node.processes

    def test_copy_of_a_running_engine_is_in_use(self, node: Node) -> None:
        """The copy an engine runs from is not dropped; stopped together, the drop follows the end of the engine."""
        ready(node)
        node.results()
        node.command(drop_copy(), 3)
        assert node.results()[0][2:] == ("failed", "in_use")
        node.is_eager = False
        node.command(wire.StopReplica("chat-0"), 4)
        node.command(drop_copy(), 5)
        assert not node.mover_asks
        node.obey("chat-0", 1)
        assert len(node.mover_asks) == 1


class TestReplace:
    """A newer order for a replica that runs."""

    def test_same_order_keeps_the_engine(self, node: Node) -> None:
        """A new generation with the same content is adopted and answered without a restart."""
        ready(node)
        node.results()
        node.command(ensure_replica(), 5)
        assert node.results() == [(OP, 5, "ok", "")]
        assert (spawns(node), signals(node)) == ([1], [])

    def test_other_order_ends_the_old_engine_first(self, node: Node) -> None:
        """A changed order ends the old process, and only then starts the new one, without counting a restart."""
        ready(node)
        node.is_eager = False
        node.command(ensure_replica(config={"parallel": 2}), 5)
        assert (signals(node), spawns(node)) == ([False], [1])
        node.obey("chat-0", 1)
        assert spawns(node) == [1, 2]
        task = node.state.replicas["chat-0"]
        assert (task.restarts, task.state, task.generation) == (0, "starting", 5)


class TestWithoutHead:
    """What happens while no head is there."""

    def test_engines_run_on(self, node: Node) -> None:
        """Without stop_after an engine outlives any absence of the head."""
        ready(node)
        node.close()
        node.state.engines["chat-0"].is_probing = True
        node.wait(86_400_000)
        assert node.replica_state() == "ready"

    def test_stop_after_counts_from_the_lease(self, node: Node) -> None:
        """stop_after_ms after the lease has ended, and not before, the engine is stopped and says why."""
        ready(node, stop_after_ms=60_000)
        node.close()
        node.wait(15_000 + 60_000 - 1)
        assert node.replica_state() == "ready"
        node.wait(1)
        assert node.replica_state() == "stopped"
        error = node.state.replicas["chat-0"].error
        assert error is not None
        assert "no head" in error.message

    def test_an_engine_that_falls_without_a_head_is_not_started_after_its_time(self, node: Node) -> None:
        """Its restart comes due when another may run elsewhere already; the head's next order starts it again."""
        ready(node, stop_after_ms=60_000)
        node.close()
        node.wait(15_000 + 60_000 - 1)
        node.exit("chat-0")
        node.wait(limits.REPLICA_BACKOFF_CAP_MS)
        assert node.replica_state() == "stopped"
        assert spawns(node) == [1]
        node.open()
        node.command(ensure_replica(stop_after_ms=60_000), 2)
        assert spawns(node) == [1, 2]

    def test_stop_after_survives_a_restart(self, node: Node) -> None:
        """A restarted agent goes on counting from the noted lease, not from its own start."""
        ready(node, stop_after_ms=60_000)
        node.close()
        node.wait(70_000)
        node.start()
        node.wait(5_000)
        assert node.replica_state() == "stopped"

    def test_halted_engine_starts_again_on_order(self, node: Node) -> None:
        """When the head is back and still wants it, the same order starts it again."""
        ready(node, stop_after_ms=1_000)
        node.close()
        node.wait(16_000)
        node.open()
        node.command(ensure_replica(stop_after_ms=1_000), 2)
        assert node.replica_state() == "starting"


class TestAgentRestart:
    """The ledger against the processes that are there."""

    def test_running_engine_is_found_again(self, node: Node) -> None:
        """A ready engine stays ready over a restart of the agent, with the same process."""
        ready(node)
        pid = node.processes["chat-0"].pid
        node.start().open()
        assert node.replica_state() == "ready"
        assert (node.processes["chat-0"].pid, spawns(node)) == (pid, [1])

    def test_engine_that_ended_meanwhile_waits_for_the_head(self, node: Node) -> None:
        """An engine that is gone is not started before a head has accepted this agent."""
        ready(node)
        node.exits[("chat-0", 1)] = 1
        node.processes.clear()
        node.start()
        node.wait(limits.REPLICA_BACKOFF_CAP_MS)
        assert spawns(node) == [1]
        node.open()
        assert spawns(node) == [1, 2]

    def test_spawned_but_not_written_down(self, node: Node) -> None:
        """A process whose start the ledger never heard of is found by its files, not started twice."""
        node.command(ensure_replica(), 2)
        task = node.ledger[("replica", "chat-0")]
        node.ledger[("replica", "chat-0")] = type(task)(
            **{**{f: getattr(task, f) for f in task.__struct_fields__}, "pid": 0, "start_ticks": 0, "port": 0}
        )
        node.start().open()
        assert spawns(node) == [1]
        node.probe("chat-0")
        assert node.replica_state() == "ready"

    def test_stop_goes_on_after_a_restart(self, node: Node) -> None:
        """A stop under way is finished by the next agent process."""
        ready(node)
        node.is_eager = False
        node.command(wire.StopReplica("chat-0"), 3)
        node.is_eager = True
        node.start()
        assert node.replica_state() == "stopped"
        node.open()
        assert (OP, 3, "ok", "") in node.results()

    def test_reboot_stops_everything(self, node: Node) -> None:
        """After a reboot replicas are stopped and wait for the head; the same order starts them again."""
        ready(node)
        node.reboot()
        node.open()
        assert node.replica_state() == "stopped"
        (status,) = node.take(wire.Report)[-1].replicas
        assert status.error is not None
        assert "reboot" in status.error.message
        node.command(ensure_replica(), 2)
        assert spawns(node) == [1, 2]


def test_engine_that_its_shim_ended_counts_as_halted(node: Node) -> None:
    """A shim that ended its engine for want of a head: stopped with the reason, no restart until it is ordered."""
    ready(node, stop_after_ms=60_000)
    process = node.processes.pop("chat-0")
    node.post(ev.ReplicaExited("chat-0", process.run, -15, halted="no head for 60 s"))
    assert node.replica_state() == "stopped"
    assert node.state.replicas["chat-0"].restarts == 0
    error = node.state.replicas["chat-0"].error
    assert error is not None
    assert "no head for 60 s" in error.message
    node.command(ensure_replica(stop_after_ms=60_000), 2)
    assert node.replica_state() == "starting"


def test_missing_files_put_the_copy_in_doubt(node: Node) -> None:
    """Files that an engine missed: the mover verifies; a damaged copy is told as failed, the engine waits for it."""
    node.is_eager = False
    node.command(ensure_replica(), 2)
    process = node.processes.pop("chat-0")
    missing = ErrorInfo("copy_not_found", "model.gguf is gone", is_retryable=True)
    node.state.engines["chat-0"].phase = "spawning"
    node.post(ev.ReplicaSpawnFailed("chat-0", process.run, missing))
    assert node.copy_state("org/m@main|disk") == "verifying"
    (token,) = node.mover_asks
    node.finish(token, ErrorInfo("digest_mismatch", "1 damaged file"))
    copy = node.state.copies["org/m@main|disk"]
    assert (copy.state, copy.error and copy.error.is_retryable) == ("failed", True)
    node.wait(5_000)
    assert node.replica_state() == "waiting_copy"
    assert "chat-0" not in node.processes
