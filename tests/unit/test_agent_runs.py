"""The agent's core: parts of benchmarks from order to result, at most one process each, whatever dies in between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from msgspec.structs import replace

from agent.core import effects as fx
from agent.core import events as ev
from agent.core import runs
from agent.core.objects import RunTask
from common import limits, wire
from common.errors import ErrorInfo, HerderError
from tests.doubles.agent_node import Node, ensure_run

RUN = "b1.0.0"
OP, FIRE, END = f"run:{RUN}", f"fire:{RUN}", f"end:{RUN}"
START_NS = 5_000_000_000
NO_ROOM = ErrorInfo("body_too_large", "too large")


@pytest.fixture
def node() -> Node:
    """A node with an open session."""
    return Node().start().open()


def armed(node: Node, **fields: Any) -> Node:
    """A load run that waits for its start."""
    node.command(ensure_run(**fields), 3)
    node.run_says(RUN, "armed", digest="d1")
    assert node.run_state() == "armed"
    return node


def running(node: Node, **fields: Any) -> Node:
    """A load run under way."""
    armed(node, **fields).command(wire.FireRun(RUN, START_NS), 3)
    assert node.run_state() == "running"
    node.ack(FIRE, 3)
    node.results()
    return node


def emitted(node: Node, kind: type[fx.Effect]) -> list[fx.Effect]:
    """Effects of a kind so far."""
    return [effect for effect in node.effects if isinstance(effect, kind)]


def reported(node: Node) -> tuple[wire.RunStatus, ...]:
    """Runs of the last report."""
    node.wait(limits.REPORT_SPACING_MS)
    return node.take(wire.Report)[-1].runs


class TestLoad:
    """From order to result."""

    def test_prepared_armed_fired_sent(self, node: Node) -> None:
        """Each step is reported; the order's result is ok once the head has taken every file."""
        node.command(ensure_run(), 3)
        assert [run.state for run in reported(node)] == ["preparing"]
        node.run_says(RUN, "armed", digest="d1")
        assert reported(node) == (wire.RunStatus(RUN, 3, "armed", digest="d1"),)
        node.command(wire.FireRun(RUN, START_NS), 3)
        assert reported(node) == (wire.RunStatus(RUN, 3, "running", digest="d1", start_boottime_ns=START_NS),)
        assert node.results() == [(FIRE, 3, "ok", "")]
        node.run_ends(RUN, "ended")
        (result,) = node.take(wire.Result)
        assert (result.op_id, result.outcome, result.detail["artifacts"]) == (OP, "ok", ["load.bin"])
        assert [run.state for run in reported(node)] == ["done"]

    def test_sending_takes_its_time(self) -> None:
        """Until the head has everything the run is `uploading` and its order unanswered."""
        node = running(Node(is_eager=True).start().open())
        node.is_eager = False
        node.run_ends(RUN, "ended")
        assert (node.run_state(), node.results()) == ("uploading", [])
        node.uploaded(RUN)
        assert node.results() == [(OP, 3, "ok", "")]

    def test_head_that_will_not_have_it(self, node: Node) -> None:
        """A refusal of the head fails the run with the head's own reason."""
        running(node).is_eager = False
        node.run_ends(RUN, "ended")
        node.uploaded(RUN, NO_ROOM)
        assert node.results() == [(OP, 3, "failed", "body_too_large")]

    def test_secrets_leave_the_ledger(self, node: Node) -> None:
        """Once a process has its order, the ledger holds neither token nor spec."""
        node.is_eager = False
        node.command(ensure_run(), 3)
        kept = node.ledger[("run", RUN)]
        assert isinstance(kept, RunTask)
        assert (kept.order.token, kept.order.spec, kept.order.urls) == ("", {}, ("http://10.0.0.1:8000",))

    def test_error_of_the_preparation(self, node: Node) -> None:
        """What the process says of its own failure is the run's error, with the end of its log."""
        node.command(ensure_run(), 3)
        node.run_ends(RUN, "failed", ErrorInfo("invalid_value", "model is missing"))
        (result,) = node.take(wire.Result)
        assert (result.outcome, result.error) == ("failed", ErrorInfo("invalid_value", "model is missing"))
        assert result.detail["last_log"] == ["last words"]

    def test_process_that_is_gone(self, node: Node) -> None:
        """A process that ends without a word fails its run, with signal and log; it is never started again."""
        running(node).run_ends(RUN, exit_code=-9)
        (result,) = node.take(wire.Result)
        assert result.error is not None
        assert (result.error.code, result.error.message) == ("run_failed", "the load generator was killed by signal 9")
        node.wait(600_000)
        assert node.run_spawns == [(RUN, 3)]

    def test_old_words_of_a_process(self, node: Node) -> None:
        """What a process said before it began does not lead its run back."""
        running(node).post(ev.RunSaid(RUN, 3, "armed", digest="d1"))
        assert node.run_state() == "running"

    def test_no_process_at_all(self, node: Node) -> None:
        """A run whose process cannot be made fails with the reason."""
        node.command(ensure_run(), 3)
        node.state.processes[RUN].phase = "spawning"
        node.post(ev.RunEnded(RUN, 3, was_there=False, error=ErrorInfo("disk_full", "no room")))
        assert node.results() == [(OP, 3, "failed", "disk_full")]


class TestRepeats:
    """Fences and repeats."""

    def test_repeated_order(self, node: Node) -> None:
        """The same order again changes nothing while the run goes on."""
        running(node).command(ensure_run(), 3)
        assert (node.run_state(), node.run_spawns, node.results()) == ("running", [(RUN, 3)], [])

    @pytest.mark.parametrize("is_acked", [True, False])
    def test_repeated_order_of_an_ended_run(self, node: Node, is_acked: bool) -> None:
        """Its result is said again, and nothing runs again, also where the result was acknowledged."""
        running(node).run_ends(RUN, "ended")
        node.results()
        if is_acked:
            node.ack(OP, 3)
        node.command(ensure_run(), 3)
        assert node.results() == [(OP, 3, "ok", "")]
        assert node.run_spawns == [(RUN, 3)]

    def test_failed_run_is_no_fresh_attempt(self, node: Node) -> None:
        """Load that failed is not put on the server again by a late repeat; a newer generation is."""
        running(node).run_ends(RUN, exit_code=1)
        node.ack(OP, 3)
        node.command(ensure_run(), 3)
        assert node.run_spawns == [(RUN, 3)]
        node.command(ensure_run(), 4)
        assert node.run_spawns == [(RUN, 3), (RUN, 4)]
        assert node.run_state() == "preparing"

    def test_newer_generation_ends_the_older(self, node: Node) -> None:
        """Process and files of an older generation go before the newer one is made."""
        running(node).command(ensure_run(), 4)
        assert len(emitted(node, fx.ForgetRun)) == 1
        assert node.runs[RUN].generation == 4
        assert node.results() == []

    @pytest.mark.parametrize("body", [ensure_run(), wire.FireRun(RUN, START_NS), wire.EndRun(RUN, "forget")])
    def test_older_generation_is_refused(self, node: Node, body: wire.AnyCommand) -> None:
        """A late command of an older generation changes nothing."""
        armed(node).command(body, 2)
        ((_, generation, outcome, code),) = node.results()
        assert (generation, outcome, code) == (2, "failed", "stale_generation")
        assert node.run_state() == "armed"

    def test_older_head_is_refused(self, node: Node) -> None:
        """A head that was replaced cannot end a run."""
        running(node).post(ev.SessionClosed(node.session_id, "cut"))
        node.open(epoch=2)
        node.post(ev.CommandReceived(wire.Command(END, 9, 1, "job", wire.EndRun(RUN, "forget"))))
        assert node.results() == [(END, 9, "failed", "stale_generation")]
        assert node.run_state() == "running"

    def test_late_order_after_forget(self, node: Node) -> None:
        """A forgotten run does not come back by a repeat of its order, however late."""
        running(node).command(wire.EndRun(RUN, "forget"), 3)
        node.ack(OP, 3)
        node.ack(END, 3)
        node.results()
        node.command(ensure_run(), 3)
        assert node.results() == [(OP, 3, "cancelled", "cancelled")]
        assert node.run_spawns == [(RUN, 3)]

    def test_late_order_after_a_done_run_was_forgotten(self, node: Node) -> None:
        """The same holds for a run whose result had been acknowledged before."""
        running(node).run_ends(RUN, "ended")
        node.ack(OP, 3)
        node.command(wire.EndRun(RUN, "forget"), 3)
        node.command(ensure_run(), 3)
        assert node.run_spawns == [(RUN, 3)]

    def test_order_that_comes_after_its_own_end(self, node: Node) -> None:
        """Forgetting a run that is not known leaves a fence against its order."""
        node.command(wire.EndRun(RUN, "forget"), 3)
        assert node.results() == [(END, 3, "ok", "")]
        node.command(ensure_run(), 3)
        assert node.results() == [(OP, 3, "cancelled", "cancelled")]
        assert node.run_spawns == []


class TestFire:
    """FireRun."""

    def test_only_armed(self, node: Node) -> None:
        """A run that is not armed yet refuses, retryably, and the refusal is no fence."""
        node.command(ensure_run(), 3)
        node.command(wire.FireRun(RUN, START_NS), 3)
        assert node.results() == [(FIRE, 3, "failed", "unavailable")]
        node.run_says(RUN, "armed")
        node.command(wire.FireRun(RUN, START_NS), 3)
        assert node.run_state() == "running"

    def test_repeats_keep_the_first_start(self, node: Node) -> None:
        """A second FireRun is answered with the start that holds."""
        armed(node).is_eager = False
        for start_ns in (START_NS, START_NS + 7):
            node.command(wire.FireRun(RUN, start_ns), 3)
        results = node.take(wire.Result)
        assert {result.detail["start_boottime_ns"] for result in results} == {START_NS}
        assert [effect.start_boottime_ns for effect in emitted(node, fx.StartRun)] == [START_NS]  # type: ignore[attr-defined]

    def test_late_start_is_told(self, node: Node) -> None:
        """What began late is reported with its real start, and so in the result."""
        armed(node).is_eager = False
        node.command(wire.FireRun(RUN, START_NS), 3)
        node.results()
        node.run_says(RUN, "running", start_boottime_ns=START_NS + 9_000_000, late_ms=9)
        assert reported(node)[0].start_boottime_ns == START_NS + 9_000_000
        node.is_eager = True
        node.run_ends(RUN, "ended")
        (result,) = node.take(wire.Result)
        assert result.detail["late_ms"] == 9

    def test_unknown_run(self, node: Node) -> None:
        """Nothing can be fired that was not ordered."""
        node.command(wire.FireRun(RUN, START_NS), 3)
        assert node.results() == [(FIRE, 3, "failed", "not_found")]

    def test_monitor(self, node: Node) -> None:
        """Monitors wait for nobody."""
        node.command(ensure_run(kind="monitor"), 3)
        node.command(wire.FireRun(RUN, START_NS), 3)
        assert node.results() == [(FIRE, 3, "failed", "invalid_request")]

    def test_agent_dies_between_decision_and_telling(self, node: Node) -> None:
        """A start that the ledger holds is told again by the next agent."""
        armed(node).is_eager = False
        node.command(wire.FireRun(RUN, START_NS), 3)
        node.runs[RUN].fired_ns = 0  # the process was never told
        node.is_eager = True
        node.start()
        assert node.run_state() == "running"


class TestEnd:
    """EndRun and CancelOp."""

    def test_finish_keeps_what_was_measured(self, node: Node) -> None:
        """`finish` ends the load; its files are sent and the order is ok."""
        running(node).command(wire.EndRun(RUN, "finish"), 3)
        assert sorted(node.results()) == [(END, 3, "ok", ""), (OP, 3, "ok", "")]

    def test_finish_while_the_process_is_being_made(self, node: Node) -> None:
        """It is told once it is there."""
        node.is_eager = False
        node.command(ensure_run(), 3)
        node.state.processes[RUN].phase = "spawning"
        node.command(wire.EndRun(RUN, "finish"), 3)
        assert emitted(node, fx.SignalRun) == []
        node.post(ev.RunStarted(RUN, 3, 100, 7))
        assert emitted(node, fx.SignalRun) == [fx.SignalRun(RUN, 3, is_kill=False)]

    def test_finish_before_the_start(self, node: Node) -> None:
        """An armed run that shall finish measured nothing: its order is cancelled."""
        armed(node).is_eager = False
        node.command(wire.EndRun(RUN, "finish"), 3)
        node.run_ends(RUN, "failed", ErrorInfo("cancelled", "ended before it began"))
        assert node.results() == [(END, 3, "ok", ""), (OP, 3, "cancelled", "cancelled")]

    def test_finish_of_an_ended_run(self, node: Node) -> None:
        """Nothing is left to do, which is fine."""
        running(node).run_ends(RUN, "ended")
        node.results()
        node.command(wire.EndRun(RUN, "finish"), 3)
        assert node.results() == [(END, 3, "ok", "")]

    def test_forget_leaves_nothing(self, node: Node) -> None:
        """`forget` is ok once processes and files are gone; the order itself is cancelled."""
        running(node).is_eager = False
        node.command(wire.EndRun(RUN, "forget"), 3)
        assert node.results() == []
        node.post(ev.RunForgotten(RUN))
        assert node.results() == [(OP, 3, "cancelled", "cancelled"), (END, 3, "ok", "")]
        assert (node.runs, reported(node)) == ({}, ())
        assert ("run", RUN) not in node.ledger

    def test_forget_after_finish_by_the_same_number(self, node: Node) -> None:
        """An unacknowledged `finish` does not stand for a `forget` of the same generation."""
        running(node).command(wire.EndRun(RUN, "finish"), 3)
        node.command(wire.EndRun(RUN, "forget"), 3)
        assert node.runs == {}
        assert node.run_state() == ""

    def test_forget_said_twice(self, node: Node) -> None:
        """A second `forget` while the first is under way begins nothing again, and is the one that is answered."""
        running(node).is_eager = False
        node.command(wire.EndRun(RUN, "forget"), 3)
        node.command(wire.EndRun(RUN, "forget"), 4)
        node.post(ev.RunForgotten(RUN))
        assert len(emitted(node, fx.ForgetRun)) == 1
        assert node.results() == [(OP, 3, "cancelled", "cancelled"), (END, 4, "ok", "")]

    def test_process_ends_while_it_is_forgotten(self, node: Node) -> None:
        """That its process is killed by the way is no failure of a run that shall be gone."""
        running(node).is_eager = False
        node.command(wire.EndRun(RUN, "forget"), 3)
        node.post(ev.RunEnded(RUN, 3, ev.RunSaid(RUN, 3, "running"), exit_code=-9))
        node.post(ev.RunForgotten(RUN))
        assert node.results() == [(OP, 3, "cancelled", "cancelled"), (END, 3, "ok", "")]

    def test_forget_while_it_is_sent(self, node: Node) -> None:
        """What the head does not want any more is not sent on."""
        running(node).is_eager = False
        node.run_ends(RUN, "ended")
        node.command(wire.EndRun(RUN, "forget"), 3)
        node.post(ev.RunUploaded(RUN, 3, ("load.bin",)))
        node.post(ev.RunForgotten(RUN))
        assert node.results() == [(OP, 3, "cancelled", "cancelled"), (END, 3, "ok", "")]

    def test_forget_is_repeated_until_nothing_is_left(self, node: Node) -> None:
        """A process that SIGKILL did not end keeps the command open, and is killed again."""
        running(node).is_eager = False
        node.command(wire.EndRun(RUN, "forget"), 3)
        node.post(ev.RunForgotten(RUN, left=(4711,)))
        node.wait(limits.REPLICA_KILL_REPEAT_MS)
        assert (len(emitted(node, fx.ForgetRun)), node.results()) == (2, [])
        node.post(ev.RunForgotten(RUN))
        assert node.results()[-1] == (END, 3, "ok", "")

    def test_cancelled(self, node: Node) -> None:
        """CancelOp ends a run with all that it has."""
        running(node).command(wire.CancelOp(OP, 3), 8, op_id="cancel:1")
        assert sorted(node.results()) == [("cancel:1", 8, "ok", ""), (OP, 3, "cancelled", "cancelled")]
        assert node.runs == {}

    def test_cancel_of_what_is_done(self, node: Node) -> None:
        """A run that had ended keeps its result."""
        running(node).run_ends(RUN, "ended")
        node.results()
        node.command(wire.CancelOp(OP, 3), 8, op_id="cancel:1")
        assert node.results() == [("cancel:1", 8, "ok", "")]
        assert node.run_state() == "done"


class TestMonitor:
    """Monitors start by themselves and go on until they are told to end."""

    def test_life(self, node: Node) -> None:
        """Running at once; `finish` ends it and sends its files."""
        node.command(ensure_run(kind="monitor"), 3)
        assert node.run_state() == "running"
        node.command(wire.EndRun(RUN, "finish"), 3)
        assert sorted(node.results()) == [(END, 3, "ok", ""), (OP, 3, "ok", "")]


class TestDeaths:
    """What outlives what."""

    def test_agent_restart(self, node: Node) -> None:
        """A new agent finds the process again and the run goes on to its result."""
        running(node).start().open()
        assert (node.run_state(), node.run_spawns) == ("running", [(RUN, 3)])
        node.run_ends(RUN, "ended")
        assert node.results() == [(OP, 3, "ok", "")]

    def test_run_ends_without_an_agent(self, node: Node) -> None:
        """What ended meanwhile is found ended, and is sent."""
        running(node)
        node.runs[RUN].ended = True
        node.runs[RUN].said = ev.RunSaid(RUN, 3, "ended")
        node.start().open()
        assert node.results() == [(OP, 3, "ok", "")]

    def test_process_gone_without_an_agent(self, node: Node) -> None:
        """What was killed meanwhile has failed; how it ended nobody saw."""
        running(node)
        node.runs[RUN].ended = True
        node.start().open()
        (result,) = node.take(wire.Result)
        assert result.error is not None
        assert "nobody saw" in result.error.message

    def test_agent_dies_before_it_made_the_process(self, node: Node) -> None:
        """An order in the ledger without any trace of a process is carried out."""
        node.command(ensure_run(), 3)
        node.runs.clear()
        node.run_spawns.clear()
        task = node.state.runs[RUN]
        node.ledger[("run", RUN)] = replace(task, order=ensure_run(), pid=0)
        node.start()
        assert node.run_spawns == [(RUN, 3)]

    def test_reboot(self, node: Node) -> None:
        """A run cannot go on after a reboot: it failed, and says why."""
        running(node).reboot()
        node.open()
        (result,) = node.take(wire.Result)
        assert result.error is not None
        assert (result.error.code, "rebooted" in result.error.message) == ("run_failed", True)
        assert result.detail["last_log"] == ["last words"]

    def test_reboot_before_there_was_a_process(self, node: Node) -> None:
        """What was ordered before a reboot is not begun after it: its start is long over."""
        node.command(ensure_run(), 3)
        node.runs.clear()
        node.ledger[("run", RUN)] = replace(node.state.runs[RUN], order=ensure_run(), pid=0)
        node.reboot()
        node.open()
        assert node.results() == [(OP, 3, "failed", "run_failed")]
        assert node.run_spawns == [(RUN, 3)]

    def test_reboot_after_the_end(self, node: Node) -> None:
        """A run that was over when the machine went down is whole, and is sent."""
        running(node)
        node.runs[RUN].said = ev.RunSaid(RUN, 3, "ended")
        node.reboot()
        node.open()
        assert node.results() == [(OP, 3, "ok", "")]

    def test_reboot_while_it_was_sent(self, node: Node) -> None:
        """What was measured is on the disk, and is still sent."""
        running(node).is_eager = False
        node.run_ends(RUN, "ended")
        node.is_eager = True
        node.reboot()
        node.open()
        assert node.results() == [(OP, 3, "ok", "")]

    def test_agent_restart_while_it_is_forgotten(self, node: Node) -> None:
        """Forgetting goes on where it was."""
        running(node).is_eager = False
        node.command(wire.EndRun(RUN, "forget"), 3)
        node.is_eager = True
        node.start().open()
        assert sorted(node.results()) == [(END, 3, "ok", ""), (OP, 3, "cancelled", "cancelled")]

    def test_head_is_away(self, node: Node) -> None:
        """Without a session the run goes on, and its result waits for the next one."""
        running(node).close()
        node.wait(3_600_000)
        assert node.run_state() == "running"
        node.run_ends(RUN, "ended")
        node.open()
        assert node.results() == [(OP, 3, "ok", "")]

    def test_run_that_does_not_end_by_itself(self, node: Node) -> None:
        """Well after its stop_after a run is killed and has failed, head or no head."""
        running(node, stop_after_ms=60_000).close()
        node.wait(60_000 + limits.RUN_STOP_GRACE_MS - 1)
        assert node.run_state() == "running"
        node.wait(1)
        assert node.run_state() == "failed"
        assert node.runs[RUN].ended
        node.open()
        assert node.results() == [(OP, 3, "failed", "timed_out")]

    def test_process_that_comes_too_late(self, node: Node) -> None:
        """A process that is there only after its run was given up is killed."""
        node.is_eager = False
        node.command(ensure_run(stop_after_ms=60_000), 3)
        node.state.processes[RUN].phase = "spawning"
        node.wait(60_000 + limits.RUN_STOP_GRACE_MS)
        before = len(emitted(node, fx.SignalRun))
        node.post(ev.RunStarted(RUN, 3, 100, 7))
        assert emitted(node, fx.SignalRun)[before:] == [fx.SignalRun(RUN, 3, is_kill=True)]
        assert node.run_state() == "failed"


class TestLimits:
    """Borders of what a node does."""

    def test_too_many_at_a_time(self, node: Node) -> None:
        """One run more than the limit is refused; with one ended it would have a place."""
        for number in range(limits.RUNS_PER_NODE):
            node.command(ensure_run(f"b1.0.{number}"), 3)
        node.command(ensure_run("b1.1.0"), 3)
        assert node.results() == [("run:b1.1.0", 3, "failed", "too_many")]
        node.run_says("b1.0.0", "armed")
        node.command(wire.FireRun("b1.0.0", START_NS), 3)
        node.run_ends("b1.0.0", "ended")
        node.command(ensure_run("b1.1.0"), 4)
        assert node.run_state("b1.1.0") == "preparing"

    def test_ended_runs_that_nobody_forgets(self, node: Node) -> None:
        """A head that never says `forget` does not fill the node: the oldest ended runs go."""
        for number in range(limits.RUNS_KEPT + 3):
            name = f"b1.{number}.0"
            node.command(ensure_run(name, kind="monitor"), 3)
            node.run_ends(name, "ended")
            node.now_ms += 1
        assert len(node.state.runs) == limits.RUNS_KEPT + 1
        assert node.run_state("b1.0.0") == ""

    @pytest.mark.parametrize(
        ("run", "fields"),
        [
            ("../x", {}),
            ("a..b", {}),
            (".hidden", {}),
            ("a/b", {}),
            (RUN, {"kind": "shell"}),
            (RUN, {"parts": 2, "part": 2}),
            (RUN, {"parts": 0}),
            (RUN, {"urls": ()}),
            (RUN, {"urls": ("tcp://10.0.0.1:80",)}),
            (RUN, {"urls": ("http://a b",)}),
            (RUN, {"spread": "sideways"}),
            (RUN, {"token": "two\r\nlines"}),
            (RUN, {"stop_after_ms": -1}),
        ],
    )
    def test_orders_that_cannot_be(self, run: str, fields: dict[str, object]) -> None:
        """Names that are no names, and what fits into no request, are refused at the door."""
        with pytest.raises(HerderError):
            runs.check(ensure_run(run, **fields))  # type: ignore[arg-type]

    def test_end_in_an_unknown_way(self, node: Node) -> None:
        """A word that this agent does not know ends nothing."""
        running(node).command(wire.EndRun(RUN, "explode"), 3)
        assert node.results() == [(END, 3, "failed", "invalid_value")]
        assert node.run_state() == "running"


class RunMachine(RuleBasedStateMachine):
    """Any order of commands, deaths and restarts: the node's double refuses a second process of one generation, two
    transfers at a time and a run without its spec; the core's invariants are checked after each event.
    """

    RUNS = st.sampled_from(["b1.0.0", "b1.0.1"])

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(is_eager=False).start().open()
        self.generation = 0
        self.orders: list[tuple[wire.AnyCommand, int]] = []

    def order(self, body: wire.AnyCommand, generation: int) -> None:
        """A command, remembered for repeats."""
        self.orders.append((body, generation))
        if self.node.session_id:
            self.node.command(body, generation)

    @rule(run=RUNS, kind=st.sampled_from(["load", "monitor"]))
    def ensure(self, run: str, kind: str) -> None:
        """A run is ordered."""
        self.generation += 1
        self.order(ensure_run(run, kind, stop_after_ms=3_600_000), self.generation)

    @rule(run=RUNS, how=st.sampled_from(["fire", "finish", "forget"]), is_newer=st.booleans())
    def follow(self, run: str, how: str, is_newer: bool) -> None:
        """A run is fired or ended, by its own generation or a newer one."""
        task = self.node.state.runs.get(run)
        self.generation += is_newer
        generation = self.generation if is_newer or task is None else task.generation
        self.order(wire.FireRun(run, START_NS) if how == "fire" else wire.EndRun(run, how), generation)

    @precondition(lambda self: self.orders and self.node.session_id)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """An old command arrives once more."""
        body, generation = data.draw(st.sampled_from(self.orders))
        self.node.command(body, generation)

    @rule(run=RUNS, state=st.sampled_from(["armed", "running", "ended", "failed", "killed"]))
    def process(self, run: str, state: str) -> None:
        """A process comes further, or ends."""
        found = self.node.runs.get(run)
        if found is None or found.ended:
            return
        if state in ("armed", "running"):
            if found.said.state != "running" and (state == "armed" or found.fired_ns):
                self.node.run_says(run, state)
        elif state == "killed":
            self.node.run_ends(run, exit_code=-9)
        elif state == "failed" or found.said.state == "running":
            self.node.run_ends(run, state, ErrorInfo("internal", "x") if state == "failed" else None)

    @rule(run=RUNS, is_refused=st.booleans())
    def upload(self, run: str, is_refused: bool) -> None:
        """The head takes the files, or not."""
        if run in self.node.uploads:
            self.node.uploaded(run, NO_ROOM if is_refused else None)

    @rule(run=RUNS, left=st.sampled_from([(), (4711,)]))
    def forgotten(self, run: str, left: tuple[int, ...]) -> None:
        """Forgetting comes to an end, or not."""
        if self.node.state.process(run).phase == "forgetting":
            self.node.post(ev.RunForgotten(run, left))

    @rule(what=st.sampled_from(["agent", "boot", "cut", "time"]))
    def trouble(self, what: str) -> None:
        """The agent or the machine starts anew, the session is cut, time passes."""
        node = self.node
        match what:
            case "agent":
                node.start().open()
            case "boot":
                node.reboot()
                node.open()
            case "cut":
                node.close()
                node.open()
            case _:
                node.wait(limits.REPLICA_KILL_REPEAT_MS)

    def teardown(self) -> None:
        """Once everything is forgotten, nothing is left."""
        for run in ("b1.0.0", "b1.0.1"):
            self.generation += 1
            self.node.command(wire.EndRun(run, "forget"), self.generation)
            if self.node.state.process(run).phase == "forgetting":
                self.node.post(ev.RunForgotten(run))
        assert self.node.state.runs == {}
        assert self.node.runs == {}


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
