"""The wire between head and agent is cut or frozen, and daemons are frozen: nobody is lost who is there.

The head of this module runs with a short interval (1 s, so leases of 3 s) and a short settling time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import FAST, Agent, Cluster, stream_of
from tests.e2e.processes import is_alive, stays, until
from tests.e2e.proxy import Proxy

LEASE_S = 3.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """n1 behind a proxy with the service `chat`; n2 and n3 with a straight wire, so that n1 is not most of us."""
    with Cluster(tmp_path_factory.mktemp("partitions") / "cluster", limits=FAST) as made:
        proxy = made.proxied()
        agents = [made.add_agent("n1", url=proxy.url, is_started=False)]
        agents += [made.add_agent(node, is_started=False) for node in ("n2", "n3")]
        for agent in agents:
            agent.begin()
        for agent in agents:
            made.wait_node(agent.node)
        made.serve_tiny("chat", "n1")
        until(lambda: not made.client.health().is_settling, "a head that has settled")
        yield made


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """The wire of n1, whole before and after each test."""
    yield cluster.proxies[0]
    cluster.proxies[0].heal()
    cluster.wait_node("n1")


@pytest.fixture
def engine_pid(cluster: Cluster) -> int:
    """The engine of `chat`, which no partition may touch."""
    return cluster.wait_replica("chat", lambda replica: replica.state == "ready").pid


def same_engine(cluster: Cluster, pid: int) -> None:
    """The engine was neither stopped nor started anew, here or elsewhere."""
    replica = cluster.wait_replica("chat", lambda view: view.state == "ready")
    assert (replica.pid, replica.node, replica.restarts) == (pid, "n1", 0)
    assert is_alive(pid)
    assert len(cluster.client.replicas(service="chat").all()) == 1


@pytest.mark.parametrize("directions", [("up",), ("up", "down")])
def test_a_silent_wire(cluster: Cluster, proxy: Proxy, engine_pid: int, directions: tuple[str, ...]) -> None:
    """When nothing of the agent arrives it is unreachable after its lease; healed, all is as before."""
    began = time.monotonic()
    proxy.freeze(*directions)
    cluster.wait_node("n1", "unreachable")
    assert time.monotonic() - began >= LEASE_S - 1.0 - 0.5  # a lease, less the interval before and a tick
    assert {view.node_id for view in cluster.client.nodes(state="online")} == {"n2", "n3"}
    assert cluster.service("chat").replicas_wanted == 1
    proxy.heal()
    cluster.wait_node("n1")
    same_engine(cluster, engine_pid)
    assert cluster.chat("chat") == "w0 w1 w2 "


def test_a_wire_that_is_deaf_for_the_agent(cluster: Cluster, proxy: Proxy, engine_pid: int) -> None:
    """When the agent hears nothing it dials again by itself; meanwhile its engine is not touched."""
    n1 = cluster.agents["n1"]
    sessions, ends = n1.sessions(), n1.log().count("no session with the head")
    proxy.freeze("down")
    n1.wait_logged("no session with the head", ends + 1)
    assert is_alive(engine_pid)
    proxy.heal()
    n1.wait_session(sessions + 1)
    cluster.wait_node("n1")
    same_engine(cluster, engine_pid)


def test_a_cut_wire(cluster: Cluster, proxy: Proxy, engine_pid: int) -> None:
    """A closed connection makes the node suspect at once, then unreachable; requests still reach its engine."""
    sessions = cluster.agents["n1"].sessions()
    proxy.cut()
    cluster.wait_node("n1", "suspect", timeout_s=2.0)
    assert cluster.chat("chat") == "w0 w1 w2 "  # a direct probe says that the engine is well
    cluster.wait_node("n1", "unreachable")
    why = cluster.cli("why", "node", "n1")
    assert why.returncode == 0, why.stderr
    assert "unreachable" in why.stdout
    proxy.heal()
    cluster.agents["n1"].wait_session(sessions + 1)
    same_engine(cluster, engine_pid)


def test_a_frozen_head_loses_nobody(cluster: Cluster, engine_pid: int) -> None:
    """A head under SIGSTOP for longer than every lease judges nobody lost, and an engine's stream goes on."""
    revision = max(line.revision for line in cluster.client.story("n1"))
    replica = cluster.wait_replica("chat", lambda view: view.state == "ready")
    words = int((2 * LEASE_S + 1) / 0.05)
    with stream_of(replica.endpoint, "chat", words) as pieces:
        next(pieces)
        cluster.head.freeze()
        try:
            assert len(list(pieces)) == words - 1  # about two leases long
        finally:
            cluster.head.thaw()
    for node in ("n1", "n2", "n3"):
        cluster.wait_node(node)
    stays(lambda: len(cluster.client.nodes(state="unreachable").all()) == 0, "nobody unreachable", LEASE_S)
    told = [line.what for line in cluster.client.story("n1") if line.revision > revision]
    assert "node_unreachable" not in told, told
    same_engine(cluster, engine_pid)


def test_a_frozen_agent_comes_back(cluster: Cluster, engine_pid: int) -> None:
    """An agent under SIGSTOP becomes unreachable; its service is kept and moves nowhere; thawed, all is as before."""
    n1: Agent = cluster.agents["n1"]
    n1.freeze()
    try:
        cluster.wait_node("n1", "unreachable")
        stays(lambda: [view.node for view in cluster.client.replicas(service="chat")] == ["n1"], "one replica", 2.0)
        assert is_alive(engine_pid)
    finally:
        n1.thaw()
    cluster.wait_node("n1")
    same_engine(cluster, engine_pid)


def test_most_nodes_vanish_at_once(cluster: Cluster, engine_pid: int) -> None:
    """When most agents go silent together an alarm is raised, and `herder status` shows it; back, it ends."""
    others = [cluster.agents[node] for node in ("n2", "n3")]
    for agent in others:
        agent.freeze()
    try:
        for agent in others:
            cluster.wait_node(agent.node, "unreachable")
        alarms = until(lambda: cluster.client.health().alarms, "an alarm")
        shown = cluster.cli("status").stdout
        assert all(alarm in shown for alarm in alarms)
    finally:
        for agent in others:
            agent.thaw()
    for agent in others:
        cluster.wait_node(agent.node)
    same_engine(cluster, engine_pid)
