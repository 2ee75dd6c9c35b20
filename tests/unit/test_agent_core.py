"""The agent's core: fences and repeats of commands, copies, sessions and reports."""

from __future__ import annotations

import pytest

from agent.core import effects as fx
from agent.core import events as ev
from agent.mover import protocol as mover
from common import limits, wire
from common.errors import ErrorInfo
from tests.doubles.agent_node import Node, drop_copy, ensure_copy, ensure_replica, manifest_of

DISK = "org/m@main|disk"
DRAM = "org/m@main|dram"
OP = "copy:org/m@main|n1:disk"


@pytest.fixture
def node() -> Node:
    """A node with an open session."""
    return Node().start().open()


@pytest.fixture
def slow() -> Node:
    """A node whose mover and holder wait to be told."""
    return Node(is_eager=False).start().open()


class TestFences:
    """What is refused because something newer is known."""

    def test_lower_epoch_is_refused(self, node: Node) -> None:
        """A command of an older head changes nothing and is answered stale_generation."""
        node.close()
        node.open(epoch=5)
        node.epoch = 4
        node.command(ensure_copy(), 1)
        assert node.results() == [(OP, 1, "failed", "stale_generation")]
        assert not node.state.copies

    def test_epoch_survives_a_restart(self, node: Node) -> None:
        """The highest epoch is in the ledger: an older head's welcome closes its session."""
        node.close()
        node.open(epoch=5)
        node.start()
        node.effects.clear()
        node.epoch = 4
        node.open()
        closed = [effect for effect in node.effects if isinstance(effect, fx.CloseSession)]
        assert closed[0].code == "stale_head"
        assert not node.state.session_id

    def test_other_cluster_is_refused(self, node: Node) -> None:
        """A head of another cluster gets no session, and none of its commands counts."""
        node.effects.clear()
        node.close()
        welcome = wire.Welcome(1, "cluster-2", 9, "s", 15_000, 5_000, 0, "a2V5")
        node.post(ev.SessionOpened("s", "n1", welcome))
        assert any(isinstance(effect, fx.CloseSession) and effect.code == "wrong_cluster" for effect in node.effects)
        assert node.state.meta.max_head_epoch == 1

    def test_lower_generation_is_refused(self, node: Node) -> None:
        """A late order for a copy that has a newer one is answered stale_generation."""
        node.command(ensure_copy(), 7)
        node.results()
        node.command(drop_copy(), 6)
        assert node.results() == [(OP, 6, "failed", "stale_generation")]
        assert node.copy_state(DISK) == "ready"

    def test_fence_stays_after_drop_and_ack(self, node: Node) -> None:
        """An EnsureCopy older than an acknowledged drop does not bring the copy back, also after a restart."""
        node.command(ensure_copy(), 5)
        node.command(drop_copy(), 9)
        node.ack(OP, 9)
        node.start().open()
        node.results()
        node.command(ensure_copy(), 5)
        assert node.results() == [(OP, 5, "failed", "stale_generation")]
        assert not node.state.copies

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (wire.EnsureCopy("../x", "main", "disk"), "invalid_name"),
            (wire.EnsureCopy("x", "../main", "disk"), "invalid_name"),
            (wire.EnsureCopy("x", "main", "gpu0"), "invalid_device"),
            (wire.StopReplica("../../etc"), "invalid_name"),
            (ensure_replica(storage="moon"), "invalid_device"),
            (ensure_replica(argv=("a\0b",)), "invalid_value"),
            (wire.CheckHealth(url="file:///etc/passwd"), "invalid_value"),
        ],
    )
    def test_names_are_checked_again(self, node: Node, body: wire.AnyCommand, code: str) -> None:
        """What would name a file or process here is refused with its own code, whoever sent it."""
        node.command(body, 1, op_id="x")
        assert node.results() == [("x", 1, "failed", code)]
        assert not node.state.copies
        assert not node.state.replicas


class TestResults:
    """How outcomes are kept and said again."""

    def test_repeat_of_a_done_command_says_its_result_again(self, node: Node) -> None:
        """(op_id, generation) that is done is answered from what is known, without new work."""
        node.command(ensure_copy(), 1)
        node.effects.clear()
        node.command(ensure_copy(), 1)
        assert node.results() == [(OP, 1, "ok", "")] * 2
        assert not [effect for effect in node.effects if isinstance(effect, fx.AskMover)]

    def test_result_waits_for_a_session(self, node: Node) -> None:
        """A result made without a session is said when the next one opens, also after a restart."""
        node.is_eager = False
        node.command(ensure_copy(), 1)
        node.close()
        node.finish(next(iter(node.mover_asks)))
        assert node.results() == []
        node.start()
        node.open()
        assert node.results() == [(OP, 1, "ok", "")]

    def test_result_is_repeated_until_acknowledged(self, node: Node) -> None:
        """An unacknowledged result is said again after a while, an acknowledged one is not."""
        node.command(ensure_copy(), 1)
        node.wait(limits.RESULT_REPEAT_MS)
        assert node.results() == [(OP, 1, "ok", "")] * 2
        node.ack(OP, 1)
        node.wait(3 * limits.RESULT_REPEAT_MS)
        assert node.results() == []

    def test_ack_of_another_generation_is_ignored(self, node: Node) -> None:
        """Only the acknowledgement of exactly this result ends its repetition."""
        node.command(ensure_copy(), 2)
        node.ack(OP, 1)
        assert node.state.outcomes[OP].is_acked is False

    def test_failed_and_acknowledged_is_tried_again(self, slow: Node) -> None:
        """The same command after an acknowledged failure is a fresh attempt."""
        slow.command(ensure_copy(), 1)
        slow.finish(next(iter(slow.mover_asks)), ErrorInfo("source_failed", "gone", is_retryable=True))
        slow.command(ensure_copy(), 1)
        assert slow.results() == [(OP, 1, "failed", "source_failed")] * 2
        assert not slow.mover_asks
        slow.ack(OP, 1)
        slow.command(ensure_copy(), 1)
        assert [type(ask) for ask in slow.mover_asks.values()] == [mover.Fetch]


class TestCopies:
    """Disk and RAM copies."""

    def test_fetch_makes_a_ready_copy(self, node: Node) -> None:
        """EnsureCopy on disk asks the mover once and answers with the manifest."""
        node.command(ensure_copy(), 1)
        (result,) = node.take(wire.Result)
        assert result.outcome == "ok"
        assert result.manifest == manifest_of("org/m", "main")
        assert node.state.copies[DISK].directory == "/store/models/org/m@main"

    def test_newer_order_cancels_the_older(self, slow: Node) -> None:
        """A newer generation cancels the fetch under way, keeping its parts, and starts its own."""
        slow.command(ensure_copy(), 1)
        slow.command(ensure_copy(manifest=manifest_of("org/m", "main")), 2)
        cancels = [
            effect.request
            for effect in slow.effects
            if isinstance(effect, fx.AskMover) and isinstance(effect.request, mover.Cancel)
        ]
        assert [cancel.discard for cancel in cancels] == [False]
        (ask,) = slow.mover_asks.values()
        assert isinstance(ask, mover.Fetch)
        assert ask.manifest is not None
        slow.finish(ask.token)
        assert slow.results() == [(OP, 2, "ok", "")]

    def test_drop_cancels_a_fetch_and_removes_parts(self, slow: Node) -> None:
        """DropCopy during a fetch discards its parts, then drops, then answers ok."""
        slow.command(ensure_copy(), 1)
        slow.command(drop_copy(), 2)
        requests = [effect.request for effect in slow.effects if isinstance(effect, fx.AskMover)]
        assert [type(request).__name__ for request in requests] == ["Configure", "Fetch", "Cancel", "Drop"]
        assert isinstance(requests[2], mover.Cancel)
        assert requests[2].discard
        slow.finish(next(iter(slow.mover_asks)))
        assert slow.results() == [(OP, 2, "ok", "")]
        assert not slow.state.copies

    def test_drop_of_nothing_is_ok(self, node: Node) -> None:
        """Dropping what is not there asks the mover anyway (parts may be left) and answers ok."""
        node.command(drop_copy(), 3)
        assert node.results() == [(OP, 3, "ok", "")]

    def test_dram_needs_the_disk_copy(self, node: Node) -> None:
        """A RAM copy without a disk copy fails at once, retryable."""
        node.command(ensure_copy("dram"), 1)
        (result,) = node.take(wire.Result)
        assert result.error is not None
        assert (result.error.code, result.error.is_retryable) == ("copy_not_found", True)

    def test_dram_follows_a_disk_copy_under_way(self, slow: Node) -> None:
        """A RAM copy whose disk copy is being fetched waits for it and then loads."""
        slow.command(ensure_copy(), 1)
        slow.command(ensure_copy("dram"), 2)
        assert not slow.holder_asks
        slow.finish(next(iter(slow.mover_asks)))
        (ask,) = slow.holder_asks.values()
        slow.finish(ask.token)
        assert slow.copy_state(DRAM) == "ready"
        assert slow.state.copies[DRAM].is_locked

    def test_disk_copy_under_dram_is_in_use(self, node: Node) -> None:
        """The disk copy that backs a RAM copy is not dropped; the answer names the user."""
        node.command(ensure_copy(), 1)
        node.command(ensure_copy("dram"), 2)
        node.results()
        node.command(drop_copy(), 3)
        assert node.results() == [(OP, 3, "failed", "in_use")]
        assert node.copy_state(DISK) == "ready"

    def test_disk_drop_waits_for_the_dram_drop(self, slow: Node) -> None:
        """Ordered together, RAM goes first and disk after it."""
        slow.is_eager = True
        slow.command(ensure_copy(), 1)
        slow.command(ensure_copy("dram"), 2)
        slow.is_eager = False
        slow.command(drop_copy("dram"), 3)
        slow.command(drop_copy(), 4)
        assert not slow.mover_asks
        slow.finish(next(iter(slow.holder_asks)))
        assert [type(ask) for ask in slow.mover_asks.values()] == [mover.Drop]

    def test_verify_of_a_good_copy(self, slow: Node) -> None:
        """verify=full asks the mover to hash again and answers when it has."""
        slow.is_eager = True
        slow.command(ensure_copy(), 1)
        slow.is_eager = False
        slow.results()
        slow.command(ensure_copy(verify="full"), 2)
        (ask,) = slow.mover_asks.values()
        assert isinstance(ask, mover.Verify)
        slow.finish(ask.token, ErrorInfo("digest_mismatch", "bad"))
        assert slow.results() == [(OP, 2, "failed", "digest_mismatch")]
        assert slow.copy_state(DISK) == "failed"

    def test_deadline_ends_a_fetch(self, slow: Node) -> None:
        """A command whose deadline passes fails timed_out and its fetch is cancelled."""
        slow.command(ensure_copy(), 1, deadline_ms=5_000)
        slow.wait(5_000)
        assert slow.results() == [(OP, 1, "failed", "timed_out")]
        assert not slow.mover_asks

    def test_cancel_ends_with_cancelled(self, slow: Node) -> None:
        """CancelOp stops the fetch; both commands get their results."""
        slow.command(ensure_copy(), 1)
        slow.command(wire.CancelOp(OP, 1), 2, op_id="cancel:1")
        assert sorted(slow.results()) == [("cancel:1", 2, "ok", ""), (OP, 1, "cancelled", "cancelled")]
        assert not slow.mover_asks

    def test_cancel_of_an_ended_op_changes_nothing(self, node: Node) -> None:
        """A copy that was ready before the cancel stays."""
        node.command(ensure_copy(), 1)
        node.command(wire.CancelOp(OP, 1), 2, op_id="cancel:1")
        assert node.copy_state(DISK) == "ready"


class TestRestarts:
    """The ledger against what mover and holder say after a restart."""

    def test_open_fetch_is_asked_again(self, slow: Node) -> None:
        """A mover that died, or an agent that was restarted, gets the same fetch again."""
        slow.command(ensure_copy(), 1)
        slow.kill_mover()
        assert [type(ask) for ask in slow.mover_asks.values()] == [mover.Fetch]
        slow.start()
        assert [type(ask) for ask in slow.mover_asks.values()] == [mover.Fetch]

    def test_published_while_the_agent_was_away(self, slow: Node) -> None:
        """A fetch whose end nobody heard of is asked again and ends ok."""
        slow.command(ensure_copy(), 1)
        slow.store["org/m@main"] = manifest_of("org/m", "main")
        slow.start().open()
        slow.finish(next(iter(slow.mover_asks)))
        assert slow.results() == [(OP, 1, "ok", "")]

    def test_lost_copy_is_reported_failed(self, node: Node) -> None:
        """A ready copy that the store does not have any more is failed, and its replica is not started from it."""
        node.command(ensure_copy(), 1)
        node.store.clear()
        node.start().open()
        report = node.take(wire.Report)[-1]
        assert [(copy.state, copy.error.code if copy.error else "") for copy in report.copies] == [
            ("failed", "copy_not_found")
        ]

    def test_unknown_copies_are_adopted(self, node: Node) -> None:
        """What stands in the store without an order is reported with generation 0."""
        node.store["a/b@r1"] = manifest_of("a/b", "r1")
        node.start().open()
        (report,) = node.take(wire.Report)[-1:]
        assert [(copy.model, copy.state, copy.generation) for copy in report.copies] == [("a/b", "ready", 0)]

    def test_ram_is_filled_again_after_the_holder_died(self, node: Node) -> None:
        """A holder that lost everything is asked to hold what shall be in RAM."""
        node.command(ensure_copy(), 1)
        node.command(ensure_copy("dram"), 2)
        node.kill_holder()
        assert node.held == {"org/m@main"}
        assert node.copy_state(DRAM) == "ready"

    def test_half_done_drop_goes_on(self, slow: Node) -> None:
        """A drop that was under way when the agent ended is finished after its restart."""
        slow.is_eager = True
        slow.command(ensure_copy(), 1)
        slow.is_eager = False
        slow.command(drop_copy(), 2)
        slow.start().open()
        slow.results()
        slow.finish(next(iter(slow.mover_asks)))
        assert slow.results() == [(OP, 2, "ok", "")]
        assert not slow.store


class TestSession:
    """Reports, progress and health checks."""

    def test_report_at_open_and_on_change(self, node: Node) -> None:
        """A report goes out once per session and again when a status changes, with the digest of the leases."""
        assert [report.seq for report in node.take(wire.Report)] == [1]
        node.wait(limits.REPORT_SPACING_MS)
        node.command(ensure_copy(), 1)
        node.wait(limits.REPORT_SPACING_MS)
        reports = node.take(wire.Report)
        assert reports[-1].digest == node.state.digest
        assert [copy.state for copy in reports[-1].copies] == ["ready"]

    def test_no_report_without_change(self, node: Node) -> None:
        """Nothing is said while nothing changes, and progress alone is no change."""
        node.take(wire.Report)
        node.is_eager = False
        node.command(ensure_copy(), 1)
        token = next(iter(node.mover_asks))
        node.post(ev.MoverMoved(mover.Moving(token, "fetching", 10, 100)))
        node.wait(1_000)
        node.take(wire.Report)
        for done in range(20, 100, 10):
            node.post(ev.MoverMoved(mover.Moving(token, "fetching", done, 100)))
            node.wait(300)
        assert node.take(wire.Report) == []

    def test_progress_is_spaced(self, node: Node) -> None:
        """However often the mover speaks, the head hears of a copy at most twice a second."""
        node.is_eager = False
        node.command(ensure_copy(), 1)
        token = next(iter(node.mover_asks))
        for done in range(100):
            node.post(ev.MoverMoved(mover.Moving(token, "fetching", done, 100)))
            node.wait(10)
        assert len(node.take(wire.Progress)) == 2

    def test_head_may_ask_for_a_report(self, node: Node) -> None:
        """An ack that wants a report gets one."""
        node.take(wire.Report)
        node.post(ev.LeaseAcked(node.now_ms, 15_000, wants_report=True))
        assert len(node.take(wire.Report)) == 1

    def test_lease_counts_from_sending(self, node: Node) -> None:
        """The lease ends a lease length after the lease was sent, not after it was answered."""
        sent_ms = node.now_ms
        node.wait(4_000)
        node.post(ev.LeaseAcked(sent_ms, 15_000))
        assert node.state.lease_until_ms == sent_ms + 15_000

    def test_check_of_a_url(self, node: Node) -> None:
        """A health check is run once, however often it is asked, and its answer is a result."""
        node.command(wire.CheckHealth(url="http://127.0.0.1:1/"), 1)
        node.command(wire.CheckHealth(url="http://127.0.0.1:1/"), 1)
        checks = [effect for effect in node.effects if isinstance(effect, fx.RunHealthCheck)]
        assert len(checks) == 1
        node.post(ev.HealthChecked("check:1", 1, ErrorInfo("unhealthy", "no")))
        assert node.results() == [("check:1", 1, "failed", "unhealthy")]

    def test_unknown_event_is_counted(self, node: Node) -> None:
        """The core is total: an event it does not know changes nothing."""
        node.post(ev.Event())
        assert node.state.unknown_events == 1


@pytest.mark.parametrize(("storage", "event"), [("disk", ev.MoverFailed), ("dram", ev.HolderFailed)])
def test_side_that_does_not_come_up_ends_what_waits_for_it(
    slow: Node, storage: str, event: type[ev.MoverFailed | ev.HolderFailed]
) -> None:
    """Orders open and to come fail with the reason while mover or holder fail to start, and work once they are up."""
    error = ErrorInfo("unavailable", "it does not start", is_retryable=True)
    if storage == "dram":
        slow.command(ensure_copy(), 1)
        slow.finish(next(iter(slow.mover_asks)))
    slow.command(ensure_copy(storage), 2)
    slow.results()
    slow.post(ev.MoverDied("killed") if storage == "disk" else ev.HolderDied("killed"))
    slow.mover_asks.clear()
    slow.holder_asks.clear()
    assert slow.results() == []
    slow.post(event(error))
    slow.command(ensure_copy(storage), 3)
    op_id = f"copy:org/m@main|n1:{storage}"
    assert slow.results() == [(op_id, 2, "failed", "unavailable"), (op_id, 3, "failed", "unavailable")]
    slow.is_eager = True
    slow.post(ev.MoverReady(slow._copies()) if storage == "disk" else ev.HolderReady(()))
    slow.command(ensure_copy(storage), 4)
    assert slow.results() == [(op_id, 4, "ok", "")]


def test_many_results_do_not_overflow_the_link(node: Node) -> None:
    """More results than the link can queue are said in portions, each portion when the one before is acknowledged."""
    node.close()
    for number in range(300):
        node.command(drop_copy(model=f"org/m{number}"), 1)
    node.open()
    said: set[str] = set()
    for _ in range(300):
        portion = node.results()
        if not portion:
            break
        assert len(portion) <= limits.RESULTS_IN_FLIGHT
        said |= {op_id for op_id, *_ in portion}
        for op_id, generation, *_ in portion:
            node.ack(op_id, generation)
    assert len(said) == 300


def test_results_that_nobody_acknowledges_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that never acknowledges does not fill the ledger; what it still wants it repeats."""
    monkeypatch.setattr(limits, "OUTCOMES_KEPT", 20)
    monkeypatch.setattr(limits, "OUTCOMES_UNACKED", 20)
    for number in range(200):
        node.command(drop_copy(model=f"org/m{number}"), 1)
    assert len(node.state.outcomes) <= 40
    node.take(wire.Result)
    node.command(drop_copy(model="org/m0"), 1)
    node.wait(limits.RESULT_REPEAT_MS * 2)
    assert "copy:org/m199@main|n1:disk" in node.state.outcomes


HOSTILE = [
    ensure_replica(port=80),
    ensure_replica(port=70_000),
    ensure_replica(env={"A=B": "x"}),
    ensure_replica(env={"": "x"}),
    ensure_replica(gpu_uuids=("GPU\0",)),
    ensure_replica(health=wire.HealthSpec(path="@evil.example/")),
    ensure_replica(health=wire.HealthSpec(canary_path="http://evil.example/")),
    ensure_replica(health=wire.HealthSpec(path="/a b")),
    ensure_replica(health=wire.HealthSpec(timeout_s=1e308)),
    ensure_replica(health=wire.HealthSpec(ready_timeout_s=1e308)),
    ensure_replica(health=wire.HealthSpec(period_s=-1)),
    ensure_replica(stop_grace_s=1e308),
    ensure_replica(stop_after_ms=-5),
    wire.StopReplica("chat-0", grace_s=1e308),
]


@pytest.mark.parametrize("body", HOSTILE)
def test_values_that_would_break_the_agent_are_refused(node: Node, body: wire.AnyCommand) -> None:
    """Numbers without bounds, addresses dressed as paths, privileged ports: refused before anything is kept."""
    node.command(body, 1, op_id="x")
    assert node.results() == [("x", 1, "failed", "invalid_value")]
    assert not node.state.replicas
