"""Copies: what reports make of them, where their bytes come from, and those in RAM."""

from __future__ import annotations

import pytest

from common import limits, tickets, wire
from common.errors import HerderError
from head.core import copies
from head.core.events import PinRequested
from herder import types as api
from tests.doubles.head_copies import DISK, DRAM, drop, ensure, make, refusal
from tests.doubles.head_core import GIB, SECRET, START_MS, World, error, inventory, manifest, status


class TestReports:
    """What a full report says."""

    def test_a_ready_copy_that_is_gone_and_unneeded_is_forgotten(self) -> None:
        """Lost, and recorded as lost."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.report("n1")
        assert key not in world.state.copies
        assert world.turn is not None
        assert [record.what for record in world.turn.records] == ["copy_lost"]

    def test_a_pinned_copy_that_is_gone_is_fetched_again(self) -> None:
        """A pin says that it shall be there."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk"))
        world.report("n1")
        assert world.state.copies[key].state == "planned"
        assert ensure(world) is not None

    def test_a_fetch_that_the_agent_does_not_know_is_ordered_again(self) -> None:
        """Its ledger may be lost."""
        world = make()
        world.want("m", "n1:disk")
        world.progress("n1", DISK, "fetching", 1, 10)
        world.now_ms += limits.COMMAND_REPEAT_MS
        world.report("n1")
        assert world.state.copies[DISK].state == "planned"
        assert ensure(world) is not None

    def test_a_report_of_the_present_order_is_progress(self) -> None:
        """After a head start reports tell how far things are."""
        world = make()
        copy = world.want("m", "n1:disk")
        world.report("n1", status(copy, "syncing", bytes_done=9, bytes_total=10))
        assert world.state.copies[DISK].state == "syncing"
        assert world.state.progress[DISK].bytes_done == 9

    def test_a_ready_report_with_the_known_digest_is_ready(self) -> None:
        """The result may be lost for ever; the report says the same."""
        world = make(nodes=("n1", "n2"))
        world.fetched("m", "n1:disk", 10)
        copy = world.want("m", "n2:disk")
        world.report("n2", status(copy, digest=manifest("m", 10).digest))
        assert world.state.copies[copy.key].state == "ready"

    def test_a_ready_report_before_any_manifest_is_known_asks_for_the_result(self) -> None:
        """Only the result carries the manifest; the order, repeated, brings it."""
        world = make()
        copy = world.want("m", "n1:disk")
        world.now_ms += limits.COMMAND_REPEAT_MS
        world.report("n1", status(copy, digest=manifest("m", 10).digest))
        assert world.state.copies[DISK].state == "verifying"
        assert ensure(world) is not None
        world.result(DISK, manifest=manifest("m", 10))
        assert world.state.copies[DISK].state == "ready"

    def test_a_report_of_an_older_order_gets_the_present_one(self) -> None:
        """An old order's copy is not yet what was asked for."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        old = world.state.copies[key]
        drop(world, key)
        new = world.want("m", "n1:disk")
        world.now_ms += limits.COMMAND_REPEAT_MS
        world.report("n1", status(old, generation=old.generation))
        assert world.state.copies[key].state == "planned"
        assert [command.generation for command in world.commands("n1")] == [new.generation]

    def test_a_ready_report_with_another_digest_fails_the_copy(self) -> None:
        """Bytes that changed on a disk are not the model."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.report("n1", status(world.state.copies[key], digest="b3:" + "f" * 64))
        assert world.state.copies[key].error.code == "digest_mismatch"  # type: ignore[union-attr]

    def test_a_failed_report_counts_as_the_result(self) -> None:
        """The result itself may come later and is then old."""
        world = make()
        copy = world.want("m", "n1:disk")
        world.report("n1", status(copy, "failed", error=error("source_failed", is_retryable=True)))
        assert (world.state.copies[DISK].state, world.state.copies[DISK].attempts) == ("planned", 1)
        world.result(DISK, "failed", error=error("source_failed", is_retryable=True), generation=copy.generation)
        assert world.state.copies[DISK].attempts == 1

    def test_an_unknown_copy_of_a_registered_model_is_adopted(self) -> None:
        """The head was restored from an older backup: what it does not know is never deleted."""
        world = make()
        seen = wire.CopyStatus("m", "main", "disk", "ready", generation=900, digest=manifest("m", 10).digest)
        world.report("n1", seen)
        command = world.command(wire.EnsureCopy)
        assert command is not None
        assert command.generation > 900
        world.result(DISK, manifest=manifest("m", 10))
        assert world.state.copies[DISK].state == "ready"

    def test_an_unknown_copy_of_an_unknown_model_is_listed_and_left_alone(self) -> None:
        """Never delete what we do not know; its bytes count."""
        world = World()
        world.join("n1", wire.CopyStatus("x", "main", "disk", "ready", bytes_total=60 * GIB))
        assert [seen.model for seen in world.state.live["n1"].unknown_copies] == ["x"]
        assert list(world.commands()) == []
        assert copies.free_bytes(world.state, "n1:disk") == 40 * GIB

    def test_names_that_are_no_names_are_ignored(self) -> None:
        """A report is made by a machine that may be broken."""
        world = make()
        world.report(
            "n1", wire.CopyStatus("../x", "main", "disk", "ready"), wire.CopyStatus("m", "..", "disk", "ready")
        )
        assert world.state.copies == {}

    def test_an_agent_with_a_higher_generation_is_overtaken(self) -> None:
        """After a restore our orders would be refused as old, so they get a higher number."""
        world = make()
        copy = world.want("m", "n1:disk")
        world.now_ms += limits.COMMAND_REPEAT_MS
        world.report("n1", status(copy, "fetching", generation=5_000))
        command = world.command(wire.EnsureCopy)
        assert command is not None
        assert command.generation > 5_000

    def test_an_older_report_is_ignored(self) -> None:
        """Reports may be repeated or overtake each other."""
        from head.core.events import AgentReported

        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.report("n1", status(world.state.copies[key]))
        stale = AgentReported(node="n1", session_id=world.session("n1"), report=wire.Report(seq=0))
        world.step(stale)
        assert world.state.copies[key].state == "ready"


class TestSources:
    """Who reads from whom."""

    def test_a_ready_copy_elsewhere_is_preferred_and_ticketed(self) -> None:
        """Peers first, the registered URLs behind them; the ticket opens exactly this."""
        world = make(nodes=("n1", "n2"))
        world.fetched("m", "n1:disk", 10)
        world.lease("n1")
        world.want("m", "n2:disk")
        body = ensure(world, "n2")
        assert body is not None
        assert [source.url for source in body.sources] == ["peer://n1.local:7000", "https://h/m.gguf"]
        assert body.manifest == manifest("m", 10)
        boottime_ms = world.now_ms - START_MS + 500
        ticket = tickets.check(
            body.sources[0].ticket, tickets.node_key(SECRET, "n1"), node_id="n1", now_boottime_ms=boottime_ms
        )
        assert (ticket.reading_node, ticket.digest) == ("n2", manifest("m", 10).digest)
        assert ticket.until_boottime_ms == boottime_ms + limits.TICKET_TTL_MS

    def test_an_ipv6_peer_is_bracketed(self) -> None:
        """The URL can be parsed."""
        world = make()
        world.hello("n1", inventory(hostname="n1"), advertise="fd00::1", agent_id="x")
        world.report("n1")
        world.fetched("m", "n1:disk", 10)
        world.join("n2")
        world.want("m", "n2:disk")
        assert ensure(world, "n2").sources[0].url == "peer://[fd00::1]:7000"  # type: ignore[union-attr]

    def test_suspect_peers_come_last_and_lost_ones_not_at_all(self) -> None:
        """Bytes are taken from whom we hear."""
        world = make(nodes=("n1", "n2", "n3"))
        world.fetched("m", "n1:disk", 10)
        world.fetched("m", "n2:disk", 10)
        world.close("n1")
        world.want("m", "n3:disk")
        body = ensure(world, "n3")
        assert [source.node for source in body.sources if source.node] == ["n2", "n1"]  # type: ignore[union-attr]

    def test_one_node_serves_a_few_and_the_others_wait(self) -> None:
        """The fifth reader waits until a reader ends, and then has more to choose from."""
        nodes = tuple(f"n{i}" for i in range(1, 8))
        world = make(nodes=nodes)
        world.fetched("m", "n1:disk", 10)
        world.register("plain")
        world.state.models["m"] = world.state.models["plain"].__class__(
            name="m", type="llm", revision="main", created_ms=1, updated_ms=1
        )
        for node in nodes[1:]:
            world.want("m", f"{node}:disk")
        states = [world.state.copies[f"m@main|{node}:disk"].state for node in nodes[1:]]
        assert states == ["planned"] * 4 + ["waiting"] * 2
        world.result("m@main|n2:disk", manifest=manifest("m", 10))
        states = [world.state.copies[f"m@main|{node}:disk"].state for node in nodes[1:]]
        assert states == ["ready"] + ["planned"] * 5
        assert {node: len(readers) for node, readers in world.state.readers.items()} == {"n1": 4, "n2": 2}

    def test_only_a_few_read_from_the_origin(self) -> None:
        """Eight downloads of one model do not fetch it eight times from the web."""
        nodes = tuple(f"n{i}" for i in range(1, 7))
        world = make(nodes=nodes)
        for node in nodes:
            world.want("m", f"{node}:disk")
        states = [world.state.copies[f"m@main|{node}:disk"].state for node in nodes]
        assert states == ["planned"] * limits.ORIGIN_READERS_PER_MODEL + ["waiting"] * 4
        world.result("m@main|n1:disk", manifest=manifest("m", 10))
        states = [world.state.copies[f"m@main|{node}:disk"].state for node in nodes]
        assert states == ["ready"] + ["planned"] * 5

    def test_an_origin_reader_that_dies_makes_place(self) -> None:
        """A lost node holds no place at the source."""
        nodes = tuple(f"n{i}" for i in range(1, 8))
        world = make(nodes=nodes)
        for node in nodes[:3]:
            world.want("m", f"{node}:disk")
        assert world.state.copies["m@main|n3:disk"].state == "waiting"
        world.pass_s(17, alive=nodes[1:])
        assert world.state.copies["m@main|n3:disk"].state == "planned"

    def test_a_peer_that_gave_wrong_bytes_is_left_alone(self) -> None:
        """The next attempt asks others."""
        world = make(nodes=("n1", "n2", "n3"))
        world.fetched("m", "n1:disk", 10)
        world.want("m", "n3:disk")
        world.result("m@main|n3:disk", "failed", error=error("digest_mismatch"))
        assert world.state.copies["m@main|n3:disk"].state == "planned"
        effects = world.pass_s(1, alive=("n1", "n2", "n3"))
        bodies = [e.message.body for e in effects if isinstance(getattr(e, "message", None), wire.Command)]  # type: ignore[attr-defined]
        assert [source.url for source in bodies[0].sources] == ["https://h/m.gguf"]

    def test_wrong_bytes_from_everyone_fail_with_that_reason(self) -> None:
        """Not with a source that cannot be found."""
        world = make(nodes=("n1", "n2"))
        world.fetched("m", "n1:disk", 10)
        world.want("m", "n2:disk", source="n1:disk")
        world.result("m@main|n2:disk", "failed", error=error("digest_mismatch"))
        world.pass_s(2, alive=("n1", "n2"))
        assert world.state.copies["m@main|n2:disk"].error.code == "digest_mismatch"  # type: ignore[union-attr]

    def test_an_explicit_url_is_the_only_source(self) -> None:
        """A person said where from."""
        world = make(nodes=("n1", "n2"))
        world.fetched("m", "n1:disk", 10)
        world.want("m", "n2:disk", source="https://mirror/m")
        assert [source.url for source in ensure(world, "n2").sources] == ["https://mirror/m"]  # type: ignore[union-attr]

    def test_an_explicit_device_is_the_only_source_and_must_have_it(self) -> None:
        """A copy from a device that has none is refused."""
        world = make(nodes=("n1", "n2", "n3"))
        world.fetched("m", "n1:disk", 10)
        assert refusal(world, "m", "n3:disk", source="n2:disk").code == "copy_not_found"
        assert refusal(world, "m", "n3:disk", source="n9:disk").code == "device_not_found"
        world.want("m", "n3:disk", source="n1:disk")
        assert [source.node for source in ensure(world, "n3").sources] == ["n1"]  # type: ignore[union-attr]

    def test_waiting_for_another_fetch_ends_when_that_fails(self) -> None:
        """Nobody waits for what will never come."""
        world = World()
        for node in ("n1", "n2"):
            world.join(node)
        world.register("m")
        world.want("m", "n1:disk", source="https://mirror/m")
        world.want("m", "n2:disk")
        assert world.state.copies["m@main|n2:disk"].state == "waiting"
        world.result(DISK, "failed", error=error("source_refused"))
        assert world.state.copies["m@main|n2:disk"].error.code == "source_not_found"  # type: ignore[union-attr]


class TestDram:
    """Copies in RAM."""

    def test_the_disk_copy_comes_first(self) -> None:
        """One want makes both; the RAM copy waits for the disk copy."""
        world = make(dram=GIB)
        world.want("m", "n1:dram")
        assert world.state.copies[DRAM].state == "waiting"
        assert [command.op_id for command in world.commands()] == [f"copy:{DISK}"]
        world.result(DISK, manifest=manifest("m", 10))
        assert [command.op_id for command in world.commands()] == [f"copy:{DRAM}"]
        world.result(DRAM, detail={"is_locked": True})
        copy = world.state.copies[DRAM]
        assert (copy.state, copy.is_locked, copy.bytes) == ("ready", True, 10)

    def test_loading_is_progress(self) -> None:
        """The agent's word for bringing a copy to RAM."""
        world = make(dram=GIB)
        world.fetched("m", "n1:disk", 10)
        world.want("m", "n1:dram")
        world.progress("n1", DRAM, "loading", 5, 10)
        assert world.state.copies[DRAM].state == "loading"
        world.report("n1", status(world.state.copies[DISK]), status(world.state.copies[DRAM], "loading"))
        assert world.state.copies[DRAM].state == "loading"

    def test_a_drop_is_not_taken_as_done_by_a_boot(self) -> None:
        """The agent's ledger may still hold the copy; only its answer ends the drop."""
        world = make(dram=GIB)
        world.fetched("m", "n1:dram", 10)
        world.close("n1")
        drop(world, DRAM)
        world.hello("n1", inventory(dram=GIB), boot_id="second")
        world.report("n1", status(world.state.copies[DISK]))
        assert isinstance(world.command(wire.DropCopy), wire.Command)
        assert DRAM in world.state.copies
        world.result(DRAM)
        assert DRAM not in world.state.copies

    def test_a_failing_disk_copy_fails_it(self) -> None:
        """The reason is the disk copy's."""
        world = make(dram=GIB)
        world.want("m", "n1:dram")
        world.result(DISK, "failed", error=error("source_refused"))
        assert world.state.copies[DRAM].error.code == "source_refused"  # type: ignore[union-attr]

    def test_the_disk_copy_under_it_stays(self) -> None:
        """Not even force drops it; after the RAM copy is gone it may go."""
        world = make(dram=GIB)
        world.fetched("m", "n1:dram", 10)
        with pytest.raises(HerderError) as caught:
            drop(world, DISK, force=True)
        assert caught.value.code == "in_use"
        drop(world, DRAM)
        world.result(DRAM)
        drop(world, DISK)
        world.result(DISK)
        assert world.state.copies == {}

    def test_a_lost_lock_is_seen(self) -> None:
        """Resident only is not locked."""
        world = make(dram=GIB)
        world.fetched("m", "n1:dram", 10)
        world.report("n1", status(world.state.copies[DISK]), status(world.state.copies[DRAM], is_locked=True))
        assert world.state.copies[DRAM].is_locked

    def test_a_pinned_ram_copy_returns_after_a_boot(self) -> None:
        """The pin outlives the boot, and the order goes out with the first report."""
        world = make(dram=GIB)
        world.fetched("m", "n1:dram", 10)
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:dram"))
        world.hello("n1", inventory(dram=GIB), boot_id="second")
        world.report("n1", status(world.state.copies[DISK]))
        assert [command.op_id for command in world.commands()] == [f"copy:{DRAM}"]

    def test_the_budget_is_its_own(self) -> None:
        """RAM that is too small refuses before the disk is touched."""
        world = World()
        world.join("n1", dram=5)
        world.register("m", "https://h/m", size=10)
        assert refusal(world, "m", "n1:dram").code == "memory_full"

    def test_cancel_takes_the_disk_copy_that_was_fetched_for_it(self) -> None:
        """Cancelling really stops the bytes."""
        world = make(dram=GIB)
        world.want("m", "n1:dram", cause="job-1")
        world.do(lambda turn: copies.cancel(turn, DRAM, "job-1"))
        world.result(DRAM)
        assert [command.op_id for command in world.commands()] == [f"copy:{DISK}"]
        assert isinstance(world.command(wire.DropCopy).body, wire.DropCopy)  # type: ignore[union-attr]
        world.result(DISK)
        assert world.state.copies == {}
