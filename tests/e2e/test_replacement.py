"""`on_unreachable: replace` with real processes: the old engine has ended before another node starts one.

Three nodes are lost in three ways, and n4 takes their services over: n1's agent is frozen (its shim must end the
engine), n2's wire is cut (its agent must), and on n3 everything is frozen, engine and shim too, as in a paused
machine (nobody can end the engine there before it goes on). Times are short, in the proportions of the real ones.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from agent import procs
from herder.types import CreateService, ReplicaView
from tests.e2e.cluster import FAST, TINY, Cluster, wait_dead
from tests.e2e.processes import is_alive, processes_of, stays, until

STOP_AFTER_MS = 2_000
HEAD = {
    **FAST,
    "REPLACE_STOP_AFTER_MS": STOP_AFTER_MS,
    "REPLACE_MARGIN_MS": 3_000,
    "LOST_FRACTION_FREEZE": 2,  # three of four are to vanish without freezing replacement
}
AGENT = {"SHIM_STOP_SLACK_MS": 1_000, "RECONNECT_CAP_MS": 1_000}
LOST = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A service on each of n1, n2 and n3, n2 behind a proxy, and n4 with nothing yet."""
    with Cluster(tmp_path_factory.mktemp("replacement") / "cluster", limits=HEAD) as made:
        proxy = made.proxied()
        for node in (*LOST, "n4"):
            agent = made.add_agent(node, url=proxy.url if node == "n2" else "", is_started=False)
            agent.limits = AGENT
            agent.begin()
        for node in (*LOST, "n4"):
            made.wait_node(node)
        for node in LOST:
            for other in (*LOST, "n4"):
                (made.client.uncordon if other == node else made.client.cordon)(other)
            made.make_model(f"on-{node}", 20_000)
            wanted = CreateService(name=f"on-{node}", model=f"on-{node}", recipe="tiny", on_unreachable="replace")
            made.client.create_service(wanted)
            until(lambda node=node: ready(made, node), f"a replica on {node}")  # type: ignore[misc]
        for node in (*LOST, "n4"):
            made.client.uncordon(node)
        until(lambda: not made.client.health().is_settling, "a head that has settled")
        yield made


def ready(cluster: Cluster, node: str) -> ReplicaView | None:
    """The ready replica of the service that began on a node."""
    return next((view for view in cluster.client.replicas(service=f"on-{node}") if view.state == "ready"), None)


def signal_all(cluster: Cluster, node: str, number: int) -> None:
    """A signal to every process of a node: agent, mover, holder, shims and engines."""
    for pid, _ in list(processes_of(cluster.agents[node].folder)):
        os.kill(pid, number)


def engines_of(cluster: Cluster, node: str) -> list[int]:
    """The engines that run on a node, whoever knows them, without those that stand still."""
    found = [pid for pid, words in processes_of(cluster.agents[node].folder) if TINY.name in words]
    running = [(pid, procs.read_process(pid)) for pid in found]
    return [pid for pid, process in running if process is not None and process.state not in "TZX"]


def all_moved(cluster: Cluster) -> bool:
    """Whether n4 serves all; fails when it starts an engine while one of the lost node still runs."""
    moved = []
    for node in LOST:
        view = cluster.client.replicas(service=f"on-{node}").all()[0]
        moved.append(view.node == "n4" and view.state == "ready")
        assert view.node == node or not engines_of(cluster, node), f"{node} still runs an engine that n4 replaces"
    return all(moved)


def test_engines_end_before_they_are_replaced(cluster: Cluster) -> None:
    """Engines of lost nodes have ended or stand still when n4 starts theirs; back, the nodes serve nothing more."""
    old = {node: view.pid for node in LOST if (view := ready(cluster, node)) and view.node == node}
    assert old.keys() == set(LOST)
    cluster.agents["n1"].freeze()
    cluster.proxies[0].cut()
    signal_all(cluster, "n3", signal.SIGSTOP)
    try:
        for node in LOST:
            cluster.wait_node(node, "unreachable")
        until(lambda: all_moved(cluster), "services on n4", timeout_s=60)
        assert [is_alive(old[node]) for node in LOST] == [False, False, True]  # n3's is not dead: it stands still
        assert [cluster.chat(f"on-{node}") for node in LOST] == ["w0 w1 w2 "] * 3
    finally:
        cluster.agents["n1"].thaw()
        cluster.proxies[0].heal()
        signal_all(cluster, "n3", signal.SIGCONT)
    wait_dead(old["n3"])
    for node in LOST:
        cluster.wait_node(node)
        told = [line for line in cluster.client.story(f"on-{node}-0") if line.what == "replica_replaced"]
        assert [(line.detail["from"], line.detail["to"]) for line in told] == [(f"{node}:disk", "n4:disk")]

    def nothing_runs_twice() -> bool:
        return all(not engines_of(cluster, node) and all_moved(cluster) for node in LOST)

    stays(nothing_runs_twice, "engines on n4 alone", 2.0)
    assert [cluster.chat(f"on-{node}") for node in LOST] == ["w0 w1 w2 "] * 3
