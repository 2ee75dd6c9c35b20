"""Room: what is admitted, what is evicted for it, and what never is."""

from __future__ import annotations

from typing import Any

import pytest

from common import ids, wire
from common.errors import HerderError
from head.core import copies, eviction
from head.core.admission import committed_bytes
from head.core.events import PinRequested
from herder import types as api
from tests.doubles.head_core import World, error, inventory, manifest

PLACE = ids.parse_device("n1:disk")


def make(*, disk: int = 100, dram: int = 0, nodes: tuple[str, ...] = ("n1",)) -> World:
    """A world whose disks are small."""
    world = World()
    for node in nodes:
        world.join(node, disk=disk, dram=dram)
    return world


def have(world: World, model: str, size: int, *sources: str, device: str = "n1:disk") -> str:
    """Registers a model and makes a copy of it ready; a second later than the one before."""
    if model not in world.state.models:
        world.register(model, *(sources or (f"https://h/{model}",)), size=size)
    world.now_ms += 1_000
    return world.fetched(model, device, size)


def refused(world: World, model: str, device: str) -> HerderError:
    """The error of a want that must be refused."""
    with pytest.raises(HerderError) as caught:
        world.want(model, device)
    return caught.value


def test_what_fits_is_admitted_without_eviction() -> None:
    """Exactly the budget is not too much."""
    world = make()
    have(world, "a", 60)
    world.register("b", "https://h/b", size=40)
    world.want("b", "n1:disk")
    assert copies.free_bytes(world.state, "n1:disk") == 0
    assert world.state.copies["a@main|n1:disk"].desired == "present"


def test_the_copy_that_was_not_used_for_longest_goes() -> None:
    """Of two alike the older one makes room; the new copy waits until it is gone."""
    world = make()
    old, new = have(world, "a", 40), have(world, "b", 40)
    world.register("c", "https://h/c", size=50)
    copy = world.want("c", "n1:disk")
    assert (world.state.copies[old].desired, world.state.copies[new].desired) == ("absent", "present")
    assert world.state.copies[copy.key].state == "waiting"
    assert world.command(wire.EnsureCopy) is None
    world.result(old)
    command = world.command(wire.EnsureCopy)
    assert command is not None
    assert command.op_id == f"copy:{copy.key}"


def test_use_keeps_a_copy() -> None:
    """What an engine used just now is not the oldest any more."""
    world = make()
    old, new = have(world, "a", 40), have(world, "b", 40)
    world.now_ms += 1_000
    world.do(lambda turn: copies.touch_used(turn, old))
    world.register("c", "https://h/c", size=50)
    world.want("c", "n1:disk")
    assert (world.state.copies[old].desired, world.state.copies[new].desired) == ("present", "absent")


def test_what_is_cheap_to_fetch_again_goes_first() -> None:
    """A copy that another node also has is worth less than one from the web, though it was used later."""
    world = make(disk=100, nodes=("n1", "n2"))
    costly = have(world, "a", 40)
    cheap = have(world, "b", 40)
    have(world, "b", 40, device="n2:disk")
    world.register("c", "https://h/c", size=50)
    world.want("c", "n1:disk")
    assert (world.state.copies[costly].desired, world.state.copies[cheap].desired) == ("present", "absent")


def test_no_more_is_evicted_than_needed() -> None:
    """A big victim makes the small ones before it needless."""
    world = make(disk=100)
    small, big = have(world, "a", 20), have(world, "b", 70)
    world.register("c", "https://h/c", size=75)
    world.want("c", "n1:disk")
    assert (world.state.copies[small].desired, world.state.copies[big].desired) == ("present", "absent")


def test_a_refusal_tells_the_numbers_and_drops_nothing() -> None:
    """need, free, reclaimable and what is in the way."""
    world = make()
    pinned, free = have(world, "a", 60), have(world, "b", 30)
    world.request(PinRequested, body=api.Pin(model_name="a", device="n1:disk"))
    world.register("c", "https://h/c", size=50)
    caught = refused(world, "c", "n1:disk")
    assert caught.code == "disk_full"
    assert caught.details == {
        "need": 50,
        "free": 10,
        "reclaimable": 30,
        "blockers": [{"copy": pinned, "bytes": 60, "reason": "pinned by operator"}],
    }
    assert world.state.copies[free].desired == "present"


def test_bigger_than_the_disk() -> None:
    """Nothing is evicted for what can never fit."""
    world = make()
    key = have(world, "a", 60)
    world.register("c", "https://h/c", size=101)
    assert refused(world, "c", "n1:disk").code == "disk_full"
    assert world.state.copies[key].desired == "present"


def test_a_fetch_in_progress_is_not_evicted() -> None:
    """Only ready copies are victims."""
    world = make()
    world.register("a", "https://h/a", size=60)
    world.want("a", "n1:disk")
    world.register("c", "https://h/c", size=50)
    assert refused(world, "c", "n1:disk").details["blockers"][0]["reason"] == "it is planned"


def test_the_last_copy_without_a_remote_source_is_never_evicted() -> None:
    """A file on some node's disk is not a source beyond the nodes."""
    world = make()
    have(world, "a", 60, "file:///data/a")
    world.register("c", "https://h/c", size=50)
    blockers = refused(world, "c", "n1:disk").details["blockers"]
    assert blockers[0]["reason"] == "it is the last copy of a model without a remote source"


def test_it_may_go_once_another_node_has_it_and_then_that_one_stays() -> None:
    """Two nodes never evict the last two copies for each other."""
    world = make(nodes=("n1", "n2"))
    first = have(world, "a", 60, "file:///data/a")
    second = have(world, "a", 60, device="n2:disk")
    world.register("c", "https://h/c", size=50)
    world.want("c", "n1:disk")
    assert world.state.copies[first].desired == "absent"
    assert refused(world, "c", "n2:disk").code == "disk_full"
    assert world.state.copies[second].desired == "present"


def test_a_copy_that_another_node_reads_from_stays() -> None:
    """A transfer in progress is not cut off."""
    world = make(nodes=("n1", "n2"))
    have(world, "a", 60)
    world.want("a", "n2:disk")
    world.register("c", "https://h/c", size=50)
    assert refused(world, "c", "n1:disk").details["blockers"][0]["reason"] == "another node reads from it"


def test_the_disk_copy_under_a_ram_copy_stays() -> None:
    """The tiers are independent; what backs RAM is in use."""
    world = make(dram=100)
    have(world, "a", 60, device="n1:dram")
    world.register("c", "https://h/c", size=50)
    assert refused(world, "c", "n1:disk").details["blockers"][0]["reason"] == "a copy in RAM stands on it"


def test_ram_evicts_ram() -> None:
    """The RAM copy goes, the disk copy under it stays."""
    world = make(disk=1_000, dram=100)
    old = have(world, "a", 60, device="n1:dram")
    world.register("c", "https://h/c", size=50)
    world.want("c", "n1:dram")
    assert world.state.copies[old].desired == "absent"
    assert world.state.copies["a@main|n1:disk"].desired == "present"


def test_an_unknown_size_is_admitted_while_there_is_room() -> None:
    """The agent has the last word once it knows."""
    world = make()
    have(world, "a", 60)
    world.register("c", "https://h/c")
    assert world.want("c", "n1:disk").bytes == 0


def test_the_agents_disk_full_evicts_by_its_numbers() -> None:
    """The head learns the size, makes room and orders again."""
    world = make()
    old = have(world, "a", 60)
    world.register("c", "https://h/c")
    key = world.want("c", "n1:disk").key
    world.result(key, "failed", error=error("disk_full", need=50, free=40))
    assert world.state.copies[old].desired == "absent"
    assert (world.state.copies[key].state, world.state.copies[key].bytes) == ("planned", 50)
    world.pass_s(2, alive=("n1",))
    assert world.state.copies[key].state == "waiting"
    world.result(old)
    assert world.command(wire.EnsureCopy) is not None
    world.result(key, manifest=manifest("c", 50))
    assert world.state.copies[key].state == "ready"


def test_the_agents_disk_full_with_nothing_to_evict_fails_with_numbers() -> None:
    """What cannot be helped is said at once."""
    world = make()
    have(world, "a", 60)
    world.request(PinRequested, body=api.Pin(model_name="a", device="n1:disk"))
    world.register("c", "https://h/c")
    key = world.want("c", "n1:disk").key
    world.result(key, "failed", error=error("disk_full", need=50, free=40))
    failed = world.state.copies[key]
    assert failed.error is not None
    assert (failed.state, failed.error.code, failed.error.details["need"]) == ("failed", "disk_full", 50)


@pytest.mark.parametrize("details", [{}, {"need": "x", "free": None}, {"need": -5, "free": True}, {"need": 1 << 80}])
def test_numbers_that_are_none_do_no_harm(details: dict[str, Any]) -> None:
    """An agent's details are only data."""
    world = make()
    have(world, "a", 60)
    world.register("c", "https://h/c")
    key = world.want("c", "n1:disk").key
    world.result(key, "failed", error=error("disk_full", **details))
    assert world.state.copies[key].state in ("planned", "failed")


def test_a_disk_that_stays_full_is_given_up() -> None:
    """Attempts are limited, even when each finds something to evict."""
    world = make(disk=1_000)
    for name in "abcdef":
        have(world, name, 60)
    world.register("z", "https://h/z")
    key = world.want("z", "n1:disk").key
    for _ in range(10):
        if world.state.copies[key].state == "failed":
            break
        world.result(key, "failed", error=error("disk_full", need=50, free=0))
        for other in [k for k, copy in world.state.copies.items() if copy.desired == "absent"]:
            world.result(other)
        world.pass_s(10, alive=("n1",))
    assert world.state.copies[key].state == "failed"
    assert sum(copy.state == "ready" for copy in world.state.copies.values()) >= 3


def test_a_size_that_turns_out_too_big_makes_room_or_gives_way() -> None:
    """A fetch of unknown size is found to overbook the disk: what has not begun gives way."""
    world = make()
    world.register("a", "https://h/a")
    world.register("b", "https://h/b", size=60)
    first = world.want("a", "n1:disk").key
    second = world.want("b", "n1:disk").key
    world.progress("n1", first, "fetching", 1, 80)
    copy = world.state.copies[second]
    assert copy.error is not None
    assert (copy.state, copy.error.code) == ("failed", "disk_full")
    assert committed_bytes(world.state, PLACE) == 80


def test_a_smaller_budget_stops_what_has_not_begun() -> None:
    """The operator gave the store less room."""
    world = make()
    world.register("b", "https://h/b", size=60)
    key = world.want("b", "n1:disk").key
    world.hello("n1", inventory(disk=50, hostname="n1"))
    assert world.state.copies[key].state == "failed"


def test_scores_order_by_cost_and_time() -> None:
    """A copy from the web is worth more than one from a peer, a later use more than an earlier one."""
    world = make(disk=1_000, nodes=("n1", "n2"))
    web = world.state.copies[have(world, "a", 60)]
    peer = world.state.copies[have(world, "b", 60)]
    have(world, "b", 60, device="n2:disk")
    state, now_ms = world.state, world.now_ms
    assert eviction.refetch_ms(state, web, now_ms) > eviction.refetch_ms(state, peer, now_ms)
    before = eviction.score(state, web, now_ms)
    state.last_used_ms[web.key] = now_ms + 5
    assert eviction.score(state, web, now_ms) > before


def test_free_bytes_never_exceeds_what_the_file_system_has() -> None:
    """Others write to the disk, too."""
    from head.core.events import TelemetryReceived

    world = make()
    reading = wire.Telemetry(disk_free_bytes=7)
    world.step(TelemetryReceived(node="n1", session_id=world.session("n1"), telemetry=reading))
    assert copies.free_bytes(world.state, "n1:disk") == 7
    assert copies.free_bytes(world.state, "n1:nonsense") == 0
    assert copies.free_bytes(world.state, "n9:disk") == 0
