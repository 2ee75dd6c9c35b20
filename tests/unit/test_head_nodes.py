"""Nodes: sessions, leases, liveness, drains, removal."""

from __future__ import annotations

import base64

import pytest

from common import limits, tickets, wire
from head.core.effects import Reply, Send
from head.core.events import (
    AgentLeaving,
    AgentReported,
    AgentSaidHello,
    CordonRequested,
    DrainRequested,
    HeadStarted,
    LeaseRenewed,
    RemoveNodeRequested,
    ResultReceived,
    Ticked,
    UpdateNodeRequested,
)
from head.core.nodes import interval_ms, is_placeable, lease_ms, node_state
from herder import types as api
from tests.doubles.head_core import GIB, SECRET, World, inventory, status


def sent(world: World, kind: type[wire.Message]) -> list[wire.Message]:
    """Messages of a kind among the last effects."""
    return [e.message for e in world.effects if isinstance(e, Send) and isinstance(e.message, kind)]


class TestHeadStarted:
    """A head process begins."""

    def test_first_start_takes_the_fresh_cluster_id(self) -> None:
        """The first start of all makes the cluster."""
        world = World()
        assert (world.state.cluster_id, world.state.head_epoch) == ("cluster-1", 1)

    def test_a_restart_keeps_the_id_and_raises_the_epoch(self) -> None:
        """Agents can tell this head from the one before, and still know the cluster."""
        world = World()
        world.step(HeadStarted(cluster_id="other", ticket_secret=SECRET))
        assert (world.state.cluster_id, world.state.head_epoch) == ("cluster-1", 2)

    def test_nobody_is_judged_before_the_settle_time_is_over(self) -> None:
        """Nodes that have not come back yet are unknown, then unreachable."""
        world = World()
        world.join("n1")
        world.step(HeadStarted(cluster_id="x", ticket_secret=SECRET))
        assert node_state(world.state, "n1", world.now_ms) == "unknown"
        world.pass_s(limits.SETTLE_MS / 1000 - 1)
        assert world.state.nodes["n1"].status == "online"
        world.pass_s(3)
        assert world.state.nodes["n1"].status == "unreachable"


class TestHello:
    """Agents are taken in or refused."""

    def test_a_new_node_is_welcomed_with_its_ticket_key(self) -> None:
        """The welcome carries what the agent needs to work."""
        world = World()
        world.hello("n1", inventory())
        (welcome,) = sent(world, wire.Welcome)
        assert isinstance(welcome, wire.Welcome)
        assert welcome.cluster_id == "cluster-1"
        assert welcome.lease_ms == 3 * welcome.interval_ms == 15_000
        assert base64.b64decode(welcome.ticket_key) == tickets.node_key(SECRET, "n1")
        assert world.state.nodes["n1"].advertise == "n1.local"

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"proto_min": 2, "proto_max": 3}, "protocol_unsupported"),
            ({"proto_min": 0, "proto_max": 0}, "protocol_unsupported"),
            ({"cluster_id": "another"}, "wrong_cluster"),
            ({"max_head_epoch": 9}, "stale_head"),
            ({"agent_id": ""}, "invalid_name"),
            ({"boot_id": ""}, "invalid_name"),
            ({"data_port": 70_000}, "invalid_name"),
            ({"labels": {"bad key": "x"}}, "invalid_name"),
        ],
    )
    def test_a_hello_that_cannot_be_taken_closes_the_session(self, fields: dict[str, object], code: str) -> None:
        """Each reason has its code, and no node appears."""
        world = World()
        world.hello("n1", inventory(), session_id="s", **fields)
        assert world.closings() == {"s": code}
        assert world.state.nodes == {}
        assert world.state.live == {}

    @pytest.mark.parametrize("node", ["../etc", "UPPER", "", "a" * 64, "a..b", "n1/../x"])
    def test_a_bad_node_id_is_refused(self, node: str) -> None:
        """A node id is a host name and never a path."""
        world = World()
        world.hello(node, inventory(), session_id="s")
        assert world.closings() == {"s": "invalid_name"}

    def test_protocol_refusal_names_the_versions(self) -> None:
        """An operator sees which side is too old."""
        world = World()
        world.hello("n1", inventory(), proto_min=5, proto_max=6)
        (closing,) = world.effects
        details = closing.error.details  # type: ignore[attr-defined]
        assert (details["head_max"], details["agent_min"], details["agent_max"]) == (1, 5, 6)

    def test_a_newer_session_takes_over(self) -> None:
        """The old session is closed and its frames are ignored."""
        world = World()
        world.hello("n1", inventory(), session_id="old")
        world.hello("n1", inventory(), session_id="new")
        assert world.closings() == {"old": "conflict"}
        world.step(LeaseRenewed(node="n1", session_id="old", lease=wire.Lease(seq=1, sent_boottime_ms=1)))
        assert sent(world, wire.Ack) == []
        assert world.closings() == {"old": "conflict"}
        assert world.session("n1") == "new"

    def test_a_repeated_hello_writes_nothing(self) -> None:
        """A reconnect of the same agent is not history."""
        world = World()
        world.hello("n1", inventory())
        world.hello("n1", inventory())
        assert world.turn is not None
        assert world.turn.records == []

    def test_two_agents_of_one_node_id_raise_an_alarm(self) -> None:
        """A superseded agent process that keeps coming back is a second machine."""
        world = World()
        for number in range(3):
            for agent in ("a", "b"):
                world.hello("n1", inventory(), agent_id=agent)
            if number == 0:
                assert world.alarms() == {}
        assert world.alarms() == {"duplicate_node:n1": True}

    def test_the_duplicate_alarm_ends(self) -> None:
        """When only one agent is left the alarm is taken back."""
        world = World()
        for agent in "ababab":
            world.hello("n1", inventory(), agent_id=agent)
        world.state.live["n1"].flapped_ms -= limits.FLAP_WINDOW_MS
        world.step(Ticked())
        assert world.alarms() == {"duplicate_node:n1": False}

    def test_a_restarted_agent_is_no_duplicate(self) -> None:
        """Every agent process has an id of its own; a new one is just a restart."""
        world = World()
        for number in range(8):
            world.hello("n1", inventory(), agent_id=f"agent-{number}")
            assert world.alarms() == {}

    def test_labels_of_the_operator_survive_a_hello(self) -> None:
        """What people set is theirs."""
        world = World()
        world.join("n1")
        world.request(UpdateNodeRequested, node="n1", body=api.UpdateNode(labels={"rack": "a"}))
        world.hello("n1", inventory(), labels={"rack": "b"}, agent_id="second")
        assert world.state.nodes["n1"].labels == {"rack": "a"}
        assert world.state.nodes["n1"].agent_labels == {"rack": "b"}

    def test_a_hello_that_is_rolled_back_leaves_the_old_session(self) -> None:
        """A journal that refuses takes the session back, too."""
        world = World()
        world.hello("n1", inventory(), session_id="old")
        world.hello("n1", inventory(disk=5), session_id="new")
        assert world.turn is not None
        world.turn.rollback()
        assert world.session("n1") == "old"

    def test_boot_of_a_node_loses_its_ram_copies(self) -> None:
        """After a boot nothing is in RAM until it is loaded anew; the disk copy stays."""
        world = World()
        world.join("n1", dram=GIB)
        world.register("m", "https://host/m.gguf")
        key = world.fetched("m", "n1:dram", 1000)
        disk = world.state.copies["m@main|n1:disk"]
        before = world.state.copies[key].generation
        world.hello("n1", inventory(dram=GIB), boot_id="boot-2")
        assert world.state.copies[key].state == "planned"
        assert world.state.copies[key].generation > before
        world.report("n1", status(disk))
        assert [command.op_id for command in world.commands()] == [f"copy:{key}"]
        assert world.state.copies[disk.key].state == "ready"


class TestLease:
    """Heartbeats."""

    def test_a_lease_is_acknowledged_and_not_journalled(self) -> None:
        """Heartbeats never become records."""
        world = World()
        world.join("n1")
        world.lease("n1")
        (ack,) = sent(world, wire.Ack)
        assert isinstance(ack, wire.Ack)
        assert not ack.wants_report
        assert world.turn is not None
        assert world.turn.records == []

    def test_another_digest_asks_for_a_report(self) -> None:
        """The head wants to know what has changed."""
        world = World()
        world.join("n1")
        world.lease("n1", digest=12345)
        (ack,) = sent(world, wire.Ack)
        assert isinstance(ack, wire.Ack)
        assert ack.wants_report

    def test_a_session_without_report_is_asked_for_one(self) -> None:
        """Commands wait for the first report, so it must come."""
        world = World()
        world.hello("n1", inventory())
        world.lease("n1", digest=0)
        (ack,) = sent(world, wire.Ack)
        assert isinstance(ack, wire.Ack)
        assert ack.wants_report

    def test_a_report_that_is_rolled_back_is_asked_for_again(self) -> None:
        """What the journal refused is not forgotten."""
        world = World()
        world.join("n1")
        world.report("n1")
        assert world.turn is not None
        world.turn.rollback()
        world.lease("n1")
        (ack,) = sent(world, wire.Ack)
        assert isinstance(ack, wire.Ack)
        assert ack.wants_report

    def test_the_boottime_offset_is_learnt(self) -> None:
        """Tickets end by the serving node's clock."""
        world = World()
        world.join("n1")
        world.lease("n1")
        assert world.state.live["n1"].boottime_offset_ms == 500 - 1_000_000_000_000

    def test_intervals_grow_with_the_cluster(self) -> None:
        """All leases together stay under the rate the head takes."""
        world = World()
        assert interval_ms(world.state) == limits.INTERVAL_FLOOR_MS
        world.state.nodes = {str(n): None for n in range(20_000)}  # type: ignore[misc]
        assert interval_ms(world.state) == 10_000
        assert lease_ms(world.state) == 30_000
        world.state.nodes = {}

    def test_a_lost_node_that_speaks_is_online_again(self) -> None:
        """Its session stood; only the path was cut."""
        world = World()
        world.join("n1")
        world.join("n2")
        world.join("n3")
        world.pass_s(20, alive=("n2", "n3"))
        assert world.state.nodes["n1"].status == "unreachable"
        world.hello("n1", inventory(hostname="n1"))
        assert node_state(world.state, "n1", world.now_ms) == "online"
        assert world.state.lost_ms == {}

    @pytest.mark.parametrize("event", ["report", "result", "lease"])
    def test_frames_of_unknown_nodes_end_their_session(self, event: str) -> None:
        """A node that was never taken in cannot speak."""
        world = World()
        frames = {
            "report": AgentReported(node="nx", session_id="s", report=wire.Report(seq=1)),
            "result": ResultReceived(
                node="nx", session_id="s", result=wire.Result(op_id="copy:x", generation=1, outcome="ok")
            ),
            "lease": LeaseRenewed(node="nx", session_id="s", lease=wire.Lease(seq=1, sent_boottime_ms=1)),
        }
        world.step(frames[event])
        assert world.closings() == {"s": "conflict"}

    def test_results_are_acknowledged_even_when_they_mean_nothing(self) -> None:
        """An agent may forget what the head does not need."""
        world = World()
        world.join("n1")
        for op in ("copy:none@main|n1:disk", "replica:none", "check:none", "future:x", ""):
            result = wire.Result(op_id=op, generation=3, outcome="ok")
            world.step(ResultReceived(node="n1", session_id=world.session("n1"), result=result))
            assert sent(world, wire.ResultAck) == [wire.ResultAck(op_id=op, generation=3)]


class TestLiveness:
    """Who is lost, and when the head doubts itself."""

    def test_a_closed_session_is_suspect_then_unreachable(self) -> None:
        """Suspect at once, judged after the lease."""
        world = World()
        for node in ("n1", "n2", "n3"):
            world.join(node)
        world.close("n1")
        assert node_state(world.state, "n1", world.now_ms) == "suspect"
        assert is_placeable(world.state, "n1", world.now_ms) == (False, "the node is suspect")
        world.pass_s(14, alive=("n2", "n3"))
        assert world.state.nodes["n1"].status == "online"
        world.pass_s(3, alive=("n2", "n3"))
        assert world.state.nodes["n1"].status == "unreachable"

    def test_a_silent_session_is_closed_when_judged(self) -> None:
        """A half-open connection does not keep a node alive."""
        world = World()
        for node in ("n1", "n2", "n3"):
            world.join(node)
        session = world.session("n1")
        closed = [getattr(e, "session_id", "") for e in world.pass_s(17, alive=("n2", "n3"))]
        assert session in closed
        assert world.session("n1") == ""

    def test_our_own_stall_extends_every_lease(self) -> None:
        """A head that slept does not blame its nodes."""
        world = World()
        world.join("n1")
        world.join("n2")
        world.now_ms += 60_000
        world.step(Ticked(stall_ms=59_000))
        assert world.state.nodes["n1"].status == "online"

    def test_a_stall_that_nobody_told_is_seen(self) -> None:
        """The gap between ticks tells of it as well."""
        world = World()
        world.join("n1")
        world.now_ms += 60_000
        world.step(Ticked())
        assert world.state.nodes["n1"].status == "online"

    def test_most_nodes_gone_together_freezes_and_return_thaws(self) -> None:
        """55 % at once is rather our own network than their death."""
        world = World()
        names = tuple(f"n{i}" for i in range(5))
        for name in names:
            world.join(name)
        effects = world.pass_s(17, alive=names[:2])
        assert world.is_frozen()
        assert world.alarms(effects) == {"most_nodes_lost": True}
        world.hello("n4", inventory())
        effects = world.pass_s(1, alive=(*names[:2], "n4"))
        assert not world.is_frozen()
        assert world.alarms(effects) == {"most_nodes_lost": False}

    def test_a_minority_does_not_freeze(self) -> None:
        """Two of five are two dead nodes."""
        world = World()
        names = tuple(f"n{i}" for i in range(5))
        for name in names:
            world.join(name)
        world.pass_s(17, alive=names[:3])
        assert not world.is_frozen()
        assert [n for n in names if world.state.nodes[n].status == "unreachable"] == ["n3", "n4"]

    def test_losses_far_apart_do_not_freeze(self) -> None:
        """One after another over a day is not an event."""
        world = World()
        names = tuple(f"n{i}" for i in range(5))
        for name in names:
            world.join(name)
        world.pass_s(17, alive=names[:3])
        world.pass_s(limits.LOST_WINDOW_MS / 1000 + 1, alive=names[:3])
        world.pass_s(17, alive=names[:2])
        assert not world.is_frozen()

    def test_a_freeze_survives_a_head_start(self) -> None:
        """A restart in the middle of a partition must not begin to replace."""
        world = World()
        names = tuple(f"n{i}" for i in range(5))
        for name in names:
            world.join(name)
        world.pass_s(17, alive=names[:1])
        world.step(HeadStarted(cluster_id="x", ticket_secret=SECRET))
        assert world.is_frozen()
        assert world.alarms() == {"most_nodes_lost": True}

    def test_removing_the_dead_thaws(self) -> None:
        """An operator who knows that they are gone says so by removing them."""
        world = World()
        names = tuple(f"n{i}" for i in range(5))
        for name in names:
            world.join(name)
        world.pass_s(17, alive=names[:2])
        world.request(RemoveNodeRequested, node="n2")
        world.pass_s(1, alive=names[:2])
        assert not world.is_frozen()

    def test_a_leaving_node_is_left_and_not_lost(self) -> None:
        """An allocation that ends is no accident."""
        world = World()
        world.join("n1")
        world.step(
            AgentLeaving(
                node="n1", session_id=world.session("n1"), leaving=wire.Leaving(reason="time", deadline_ms=3_000)
            )
        )
        assert is_placeable(world.state, "n1", world.now_ms) == (False, "the node is leaving")
        world.close("n1")
        world.pass_s(4)
        assert world.state.nodes["n1"].status == "left"
        assert not world.is_frozen()

    def test_a_rolled_back_loss_is_judged_again(self) -> None:
        """Volatile counts go back with the records."""
        world = World()
        world.join("n1")
        world.pass_s(15)
        world.now_ms += 1_000
        world.step(Ticked())
        assert world.turn is not None
        assert world.state.nodes["n1"].status == "unreachable"
        world.turn.rollback()
        assert world.state.lost_ms == {}
        assert not world.is_frozen()
        world.pass_s(1)
        assert world.state.nodes["n1"].status == "unreachable"


class TestOperators:
    """Cordon, drain, labels, removal."""

    def test_cordon_and_uncordon(self) -> None:
        """A cordoned node takes nothing new."""
        world = World()
        world.join("n1")
        assert world.request(CordonRequested, node="n1", is_cordoned=True).reference == "node:n1"
        assert is_placeable(world.state, "n1", world.now_ms) == (False, "the node is cordoned")
        world.request(CordonRequested, node="n1", is_cordoned=False)
        assert is_placeable(world.state, "n1", world.now_ms) == (True, "")

    def test_a_drain_without_engines_is_drained_at_once_and_ends_by_uncordon(self) -> None:
        """Uncordon opens the node again."""
        world = World()
        world.join("n1")
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=60, reason="disk change"))
        node = world.state.nodes["n1"]
        assert node.is_drained
        assert node.drain_reason == "disk change"
        assert is_placeable(world.state, "n1", world.now_ms) == (False, "the node is drained")
        world.request(CordonRequested, node="n1", is_cordoned=False)
        assert world.state.nodes["n1"].drain_deadline_ms == 0

    def test_a_drain_survives_a_head_start(self) -> None:
        """Restarting the head does not put work on a draining node."""
        world = World()
        world.join("n1")
        world.request(DrainRequested, node="n1", body=api.DrainNode(deadline_s=0))
        world.step(HeadStarted(cluster_id="x", ticket_secret=SECRET))
        world.join("n1")
        assert not is_placeable(world.state, "n1", world.now_ms)[0]

    def test_labels_are_merged_and_removed(self) -> None:
        """A null value removes a label."""
        world = World()
        world.join("n1")
        world.request(UpdateNodeRequested, node="n1", body=api.UpdateNode(labels={"a": "1", "b": "2"}))
        world.request(UpdateNodeRequested, node="n1", body=api.UpdateNode(labels={"a": None, "c": "3"}))
        assert world.state.nodes["n1"].labels == {"b": "2", "c": "3"}
        answer = world.request(UpdateNodeRequested, node="n1", body=api.UpdateNode(labels={"no way": "x"}))
        assert answer.code == "invalid_name"

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            (CordonRequested, {"is_cordoned": True}),
            (DrainRequested, {"body": api.DrainNode()}),
            (UpdateNodeRequested, {"body": api.UpdateNode(labels={})}),
            (RemoveNodeRequested, {}),
        ],
    )
    def test_unknown_nodes_are_not_found(self, kind: type, fields: dict[str, object]) -> None:
        """Every request about a node names one that exists."""
        assert World().request(kind, node="nope", **fields).code == "node_not_found"

    def test_an_online_node_is_not_removed(self) -> None:
        """Unless forced; then its session ends and it is gone."""
        world = World()
        world.join("n1")
        session = world.session("n1")
        assert world.request(RemoveNodeRequested, node="n1").code == "in_use"
        assert isinstance(world.request(RemoveNodeRequested, node="n1", force=True), Reply)
        assert world.closings() == {session: "node_not_found"}
        assert world.state.nodes == {}
        assert world.state.live == {}

    def test_the_node_of_a_last_copy_is_not_removed(self) -> None:
        """Its bytes may be the only ones in the world."""
        world = World()
        for node in ("n1", "n2", "n3"):
            world.join(node)
        world.register("m", "file:///data/m.gguf")
        world.fetched("m", "n1:disk", 1000)
        world.pass_s(17, alive=("n2", "n3"))
        assert world.request(RemoveNodeRequested, node="n1").code == "last_copy"
        world.request(RemoveNodeRequested, node="n1", force=True)
        assert world.state.copies == {}

    def test_a_node_is_not_removed_while_the_head_settles(self) -> None:
        """It may be about to come back."""
        world = World()
        world.join("n1")
        world.step(HeadStarted(cluster_id="x", ticket_secret=SECRET))
        assert world.request(RemoveNodeRequested, node="n1").code == "in_use"

    def test_a_removal_that_is_rolled_back_keeps_the_session(self) -> None:
        """Nothing of a refused change remains."""
        world = World()
        world.join("n1")
        session = world.session("n1")
        world.request(RemoveNodeRequested, node="n1", force=True)
        assert world.turn is not None
        world.turn.rollback()
        assert world.session("n1") == session
        assert "n1" in world.state.nodes

    def test_a_hello_names_too_many_nodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A runaway script cannot fill the head with nodes."""
        monkeypatch.setattr(limits, "NODES", 1)
        world = World()
        world.join("n1")
        hello = wire.Hello(1, 1, "n2", "b", "a", "v", inventory())
        world.step(AgentSaidHello(session_id="s", hello=hello, peer="p"))
        assert world.closings() == {"s": "too_many"}
