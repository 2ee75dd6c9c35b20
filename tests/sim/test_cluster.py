"""Whole clusters under seeded faults: what is desired is what is there once the faults end, and nothing is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from tests.sim.cluster import Cluster
from tests.sim.profiles import PROFILES
from tests.sim.world import Faults


def run(seed: int, profile: str, *, nodes: int = 5, models: int = 6, requests: int = 60) -> Cluster:
    """A cluster after its run."""
    cluster = Cluster(seed, nodes=nodes, models=models, faults=PROFILES[profile], requests=requests)
    cluster.run()
    return cluster


@pytest.mark.parametrize("seed", range(1, 9))
def test_everything_at_once(seed: int) -> None:
    """Loss, reorder, partitions, crashes at both sides, full disks, dying and lying sources: the cluster heals."""
    cluster = run(seed, "everything")
    assert cluster.head.starts > 1, "the profile must crash the head"


@pytest.mark.parametrize("profile", ["network", "crashes", "disks"])
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_one_kind_of_fault(profile: str, seed: int) -> None:
    """Each kind of fault by itself, harder."""
    cluster = run(seed, profile)
    assert cluster.summary()["copies"], "the run must have done something"


@pytest.mark.parametrize("profile", ["room", "engines", "heads", "silence", "wild"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_kind_of_request(profile: str, seed: int) -> None:
    """Small disks, bad engines, restored and old heads, long silence: whoever asked for what, it comes to rest."""
    cluster = run(seed, profile, requests=120)
    assert cluster.head.state.services, "the run must have done something"


def test_requests_on_their_way_are_seen_to() -> None:
    """Engines are stopped after their requests have ended, and after their time, when those last too long."""
    reasons: Counter[str] = Counter()
    for seed in range(1, 5):
        history = run(seed, "calm").head.journal.history
        ended = [row.detail for row in history if row.what == "replica_stopping"]
        reasons.update(msgspec.json.decode(detail)["reason"] for detail in ended)
    assert reasons["no request is on its way"] > 0
    assert reasons["the drain's time is over"] > 0


FOUND = {
    ("silence", 112): "an order to a stray engine had the number of the next placement, which its agent then ignored",
    (
        "wild",
        146,
    ): "a copy that was found on a disk and not verified yet was deleted, the last of a model without source",
    ("wild", 327): "a late result made an engine ready again that a report had told was failed, for ever",
    ("wild", 524): "a copy stayed ready that its node reported as failed under an older order (two machines, one id)",
    ("wild", 534): "a failed copy that was wanted again lost its pins",
}


@pytest.mark.parametrize(("profile", "seed"), FOUND)
def test_seeds_that_found_something(profile: str, seed: int) -> None:
    """Each once failed for the reason that FOUND says."""
    run(seed, profile, requests=120)


def test_same_seed_same_run() -> None:
    """A run is replayed to the last record from its seed."""
    assert run(3, "everything").world.trace == run(3, "everything").world.trace


def test_calm_world_finishes_what_can_be_done() -> None:
    """Without faults every job ends, or waits for a GPU that somebody else holds and says so."""
    cluster = run(2, "calm")
    for job in cluster.head.state.jobs.values():
        if job.state == "running":
            assert any("is taken by" in step.note for step in job.steps), job


def test_hundreds_of_agents() -> None:
    """300 agents with partitions and a crashing head: nobody healthy is judged lost, and all work comes to rest."""
    faults = Faults(loss=0.005, partition_per_s=0.0005, disconnect_per_s=0.002, head_crash_per_s=0.01, until_ms=120_000)
    cluster = Cluster(21, nodes=300, models=12, faults=faults, requests=120, rest_ms=300_000)
    cluster.run()
    assert all(node.status == "online" for node in cluster.head.state.nodes.values())
    assert cluster.head.starts > 1


def test_stalled_head_judges_nobody() -> None:
    """A head that stands still for longer than every lease finds all its nodes online afterwards."""
    cluster = Cluster(5, nodes=6, models=1, faults=Faults(until_ms=200_000), requests=0)
    cluster.world.after(100_000, "stall", lambda: cluster.head.stall(60_000))
    cluster.run()
    whats = [row.what for row in cluster.head.journal.history]
    assert "node_unreachable" not in whats


def test_most_nodes_gone_freezes_replacement() -> None:
    """When most nodes vanish together nothing is replaced, and when they return nothing was started twice."""
    cluster = Cluster(9, nodes=6, models=3, faults=Faults(until_ms=300_000), requests=30)

    def cut() -> None:
        for name in ("n0", "n1", "n2", "n3", "n4"):
            node = cluster.nodes[name]
            node.to_head_cut_until_ms = node.from_head_cut_until_ms = cluster.world.now_ms + 60_000

    frozen: list[bool] = []
    cluster.world.after(150_000, "cut", cut)
    cluster.world.after(195_000, "look", lambda: frozen.append(cluster.head.state.is_frozen))
    cluster.run()
    assert frozen == [True]
    assert not cluster.head.state.is_frozen


def test_reboot_is_known_at_once() -> None:
    """A node that comes back with a new boot id has its engines started again, without waiting for a lease."""
    cluster = Cluster(4, nodes=3, models=2, faults=Faults(until_ms=120_000), requests=25)
    node = cluster.nodes["n1"]

    def reboot() -> None:
        node.reboot()
        cluster.world.after(3000, "agent", node.start)

    cluster.world.after(100_000, "reboot", reboot)
    cluster.run()
    assert node.machine.boot == 2


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_machines_that_leave_and_agents_that_stay_away(seed: int) -> None:
    """Nodes say that their time ends and are gone at it; shims end engines whose agent is away for too long."""
    cluster = run(seed, "leaving")
    whats = {row.what for row in cluster.head.journal.history}
    assert "node_leaving" in whats
    assert "node_left" in whats or "node_unreachable" in whats
    assert not any(node.leaving_ms for node in cluster.head.state.nodes.values()), "who is back does not leave any more"


def test_shims_end_what_the_head_may_have_given_up() -> None:
    """With the agents away and their nodes silent for minutes no engine of a replaceable service is left running."""
    ended = 0
    for seed in range(1, 13):
        cluster = Cluster(seed, nodes=5, models=6, faults=PROFILES["leaving"], requests=60)
        lines: list[str] = []
        note = cluster.world.note

        def noted(text: str, lines: list[str] = lines, note: Callable[[str], None] = note) -> None:
            lines.append(text)
            note(text)

        cluster.world.note = noted  # type: ignore[method-assign]
        cluster.run()
        ended += sum("shim of" in line for line in lines)
    assert ended > 0


def test_an_agent_that_stops_while_its_ledger_is_full_loses_nothing() -> None:
    """What it had decided and not written is decided again by the next process, on the ledger as it was."""
    cluster = Cluster(6, nodes=3, models=3, faults=Faults(until_ms=200_000), requests=40)
    node = cluster.nodes["n1"]
    stuck: list[int] = []

    def fill() -> None:
        node.ledger_full_until_ms = cluster.world.now_ms + 60_000

    def stop() -> None:
        stuck.append(len(node._pending))
        node.crash()

    for at_ms in (20_000, 100_000):
        cluster.world.after(at_ms, "full", fill)
        cluster.world.after(at_ms + 20_000, "stop", stop)
        cluster.world.after(at_ms + 25_000, "start", node.start)
    cluster.run()
    assert any(stuck), "the run must stop it with work that is not written"
