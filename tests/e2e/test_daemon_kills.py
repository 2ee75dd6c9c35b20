"""Daemons and engines are killed, stopped and frozen: what runs goes on, what died comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Agent, Cluster, stream_of, wait_dead
from tests.e2e.processes import is_alive, until

WORDS = 60  # of a stream that outlives a restart: 3 s


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and the agent n1, with the service `chat` on a tiny engine."""
    with Cluster(tmp_path_factory.mktemp("kills") / "cluster") as made:
        made.add_agent("n1")
        made.serve_tiny("chat", "n1")
        yield made


@pytest.fixture
def n1(cluster: Cluster) -> Agent:
    """The agent."""
    return cluster.agents["n1"]


def test_head_is_killed_under_a_stream(cluster: Cluster, n1: Agent) -> None:
    """After kill -9 of the head a stream to the engine goes on, the agent comes back, the gateway serves again."""
    before = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    sessions = n1.sessions()
    with stream_of(before.endpoint, "chat", WORDS) as pieces:
        first = next(pieces)
        cluster.head.kill()
        cluster.head.start()
        rest = list(pieces)
    assert [first, *rest] == [f"w{number} " for number in range(WORDS)]
    n1.wait_session(sessions + 1)
    after = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    assert (after.replica, after.pid, after.generation, after.restarts) == (
        before.replica,
        before.pid,
        before.generation,
        before.restarts,
    )
    assert until(lambda: cluster.wait_node("n1"), "n1 online").state == "online"
    assert cluster.chat("chat") == "w0 w1 w2 "


def test_agent_is_killed(cluster: Cluster, n1: Agent) -> None:
    """After kill -9 of the agent the engine is the same process, still answers, and the next agent takes it over."""
    before = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    n1.kill()
    cluster.wait_node("n1", "suspect")
    assert cluster.chat("chat") == "w0 w1 w2 "
    n1.start()
    after = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    assert (after.pid, after.restarts) == (before.pid, before.restarts)
    assert is_alive(before.pid)
    assert cluster.wait_node("n1").state == "online"
    engine_log = cluster.cli("logs", "chat")
    assert engine_log.returncode == 0, engine_log.stderr
    assert f"tiny engine {before.pid} listens" in engine_log.stdout


def test_holder_is_killed(cluster: Cluster, n1: Agent) -> None:
    """After kill -9 of the holder the RAM copy is locked again by a new one."""
    cluster.make_model("held", 3_000_000)
    cluster.client.wait_job(cluster.client.copy("held", "n1:dram"), timeout_s=40)
    assert cluster.wait_copy("held", "n1:dram", "ready").is_locked
    holder = n1.child("agent.holder")
    os.kill(holder, signal.SIGKILL)
    wait_dead(holder)
    again = until(lambda: n1.child("agent.holder"), "a new holder")
    assert again != holder
    locked = until(lambda: _locked_bytes(again) >= 3_000_000, "the copy locked by the new holder")
    assert locked
    assert cluster.wait_copy("held", "n1:dram", "ready").is_locked


def test_ram_tier_outlives_the_agent(cluster: Cluster, n1: Agent) -> None:
    """After kill -9 of the agent the holder keeps what it holds; the next agent finds it, empty ones as well."""
    cluster.make_model("kept", 3_000_000)
    cluster.client.wait_job(cluster.client.copy("kept", "n1:dram"), timeout_s=40)
    holder = n1.child("agent.holder")
    n1.kill()
    assert _locked_bytes(holder) >= 3_000_000
    n1.start()
    assert cluster.wait_copy("kept", "n1:dram", "ready").is_locked
    assert n1.child("agent.holder") == holder
    for copy in cluster.client.copies(node="n1", state="ready").all():
        if copy.device == "n1:dram":
            cluster.client.wait_job(cluster.client.delete_copy(copy.model, copy.device), timeout_s=40)
    until(lambda: _locked_bytes(holder) == 0, "a holder that holds nothing")
    n1.kill()
    assert is_alive(holder)
    n1.start()
    cluster.client.wait_job(cluster.client.copy("kept", "n1:dram"), timeout_s=40)
    assert n1.child("agent.holder") == holder
    assert _locked_bytes(holder) >= 3_000_000


def _locked_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0


def test_engine_is_killed(cluster: Cluster) -> None:
    """After kill -9 an engine is started again, counted, and its last log can be read with --previous."""
    before = cluster.serve_tiny("mortal", "n1")
    os.kill(before.pid, signal.SIGKILL)
    after = cluster.wait_replica("mortal", lambda replica: replica.state == "ready" and replica.restarts == 1)
    assert after.pid != before.pid
    assert cluster.chat("mortal") == "w0 w1 w2 "
    previous = cluster.cli("logs", "mortal", "--previous")
    assert f"tiny engine {before.pid} listens" in previous.stdout
    assert f"tiny engine {after.pid} listens" in cluster.cli("logs", "mortal").stdout
    reasons = [line.detail.get("reason", "") for line in cluster.client.story(after.replica)]
    assert any("signal 9" in reason for reason in reasons), reasons
    cluster.client.delete_service("mortal", wait_s=20)
    wait_dead(after.pid)


def test_engine_is_frozen(cluster: Cluster) -> None:
    """An engine under SIGSTOP takes no more requests, then it is killed and started again with a reason."""
    before = cluster.serve_tiny("frozen", "n1")
    os.kill(before.pid, signal.SIGSTOP)
    sick = cluster.wait_replica("frozen", lambda replica: replica.state not in ("ready",))
    assert sick.pid in (before.pid, 0)
    after = cluster.wait_replica("frozen", lambda replica: replica.state == "ready" and replica.restarts == 1)
    assert after.pid != before.pid
    assert not is_alive(before.pid)
    assert cluster.chat("frozen") == "w0 w1 w2 "
    cluster.client.delete_service("frozen", wait_s=20)


def test_stop_ends_children_of_the_engine(cluster: Cluster) -> None:
    """Stopping a service ends the engine, its child, and a grandchild that hid in a session of its own."""
    (cluster.control / "children").touch()
    replica = cluster.serve_tiny("parent", "n1")
    (cluster.control / "children").unlink()
    port = replica.endpoint.rpartition(":")[2]
    family = [replica.pid, *map(int, (cluster.control / f"{port}.pids").read_text().split())]
    assert all(is_alive(pid) for pid in family)
    cluster.client.wait_job(cluster.client.stop("parent", "n1:disk"), timeout_s=30)
    assert [pid for pid in family if is_alive(pid)] == []
    assert cluster.client.replicas(service="parent", state="ready").all() == []


def test_agent_stops_in_order(cluster: Cluster, n1: Agent) -> None:
    """SIGTERM ends the agent with 0, leaves its engine, and tells the head; the next agent finds the engine."""
    before = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    assert n1.stop() == 0
    assert is_alive(before.pid)
    assert "Traceback" not in n1.log()
    node = until(lambda: next(v for v in cluster.client.nodes() if v.state != "online"), "the head's notice")
    assert node.state in ("suspect", "left")
    assert cluster.chat("chat") == "w0 w1 w2 "
    n1.start()
    after = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    assert (after.pid, after.restarts) == (before.pid, before.restarts)


def test_head_stops_in_order(cluster: Cluster, n1: Agent) -> None:
    """SIGTERM ends the head with 0 and a closed journal; started again it is served by the same engine."""
    before = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    sessions = n1.sessions()
    assert cluster.head.stop() == 0
    assert not list(cluster.head.state.glob("*-wal"))
    began = time.monotonic()
    cluster.head.start()
    n1.wait_session(sessions + 1)
    assert time.monotonic() - began < 30
    after = cluster.wait_replica("chat", lambda replica: replica.state == "ready")
    assert after.pid == before.pid
    assert "Traceback" not in cluster.head.log()
