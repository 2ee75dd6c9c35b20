"""Parts of a benchmark on real nodes of a real head: what they measure, and what no death takes away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import procs
from tests.doubles.run_rig import Door
from tests.e2e.cluster import Cluster
from tests.e2e.processes import until

RATE, SECONDS = 40, 6


@pytest.fixture
def door() -> Iterator[Door]:
    """A server that Herder does not manage."""
    with Door() as made:
        yield made


def begin(cluster: Cluster, door: Door, **changes: Any) -> str:
    """A benchmark with two load nodes on the door's server."""
    load = {"nodes": 2, "api": "http", "method": "GET", "rate": RATE, "arrivals": "constant", "duration": SECONDS}
    document = {
        "name": "plain",
        "server": {"urls": [f"{door.url}/work"]},
        "load": {**load, **changes},
        "monitor": {"enabled": True, "interval": 0.5},
    }
    status, view = cluster.head.call("POST", "/api/v1/benchmarks", {"document": document})
    assert status in (201, 202), view
    name: str = view["id"]
    return name


def view_of(cluster: Cluster, benchmark: str) -> dict[str, Any]:
    """A benchmark as it stands."""
    status, view = cluster.head.call("GET", f"/api/v1/benchmarks/{benchmark}")
    assert status == 200, view
    found: dict[str, Any] = view
    return found


def ended(cluster: Cluster, benchmark: str) -> dict[str, Any]:
    """Waits for its end."""

    def look() -> dict[str, Any] | None:
        view = view_of(cluster, benchmark)
        return view if view["status"] in ("completed", "failed", "cancelled") else None

    return until(look, f"the end of {benchmark}", timeout_s=90)


def left(cluster: Cluster) -> list[int]:
    """Processes of runs on all nodes."""
    return [
        process.pid
        for agent in cluster.agents.values()
        for folder in (agent.state / "runs").glob("*")
        for process in procs.members(0, str(folder))
    ]


def report_of(cluster: Cluster, benchmark: str) -> dict[str, Any]:
    """The one point's report, as the head keeps it."""
    (path,) = (cluster.head.state / "benchmarks" / benchmark).glob("points/*/report.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_two_nodes_do_one_schedule(tmp_path: Path, door: Door) -> None:
    """Every request of the one schedule is sent once, by both nodes together, and nothing stays behind."""
    with Cluster(tmp_path) as cluster:
        for node in ("n1", "n2"):
            cluster.add_agent(node)
        benchmark = begin(cluster, door)
        view = ended(cluster, benchmark)
        assert (view["status"], view["is_degraded"]) == ("completed", False), view
        assert len(door.asked) == RATE * SECONDS
        kept = cluster.head.state / "benchmarks" / benchmark / "runs"
        assert sorted(path.name for path in kept.glob("*/load.bin")) == ["load.bin"] * 2
        assert sorted(path.name for path in kept.glob("*/monitor.csv")) == ["monitor.csv"] * 2
        assert report_of(cluster, benchmark)["counts"]["good"] == RATE * SECONDS
        until(lambda: not left(cluster), "the end of every process")
        until(lambda: not list(tmp_path.glob("n?/state/runs/*")), "directories that are gone")


def test_head_and_agent_die_under_it(tmp_path: Path, door: Door) -> None:
    """kill -9 to the head and then to an agent does not touch the load; the result is whole."""
    with Cluster(tmp_path) as cluster:
        for node in ("n1", "n2"):
            cluster.add_agent(node)
        benchmark = begin(cluster, door, duration=15)
        until(lambda: len(door.asked) > RATE, "load", timeout_s=60)
        cluster.head.kill()
        cluster.agents["n1"].kill()
        seen = len(door.asked)
        until(lambda: len(door.asked) > seen + RATE, "load without head and agent")
        cluster.agents["n1"].begin()
        cluster.head.start()
        view = ended(cluster, benchmark)
        assert (view["status"], view["is_degraded"]) == ("completed", False), view
        assert len(door.asked) == RATE * 15


def test_generator_dies(tmp_path: Path, door: Door) -> None:
    """A point that lost one of its generators says so, and how much of its load was sent."""
    with Cluster(tmp_path) as cluster:
        for node in ("n1", "n2"):
            cluster.add_agent(node)
        benchmark = begin(cluster, door)
        until(lambda: len(door.asked) > RATE, "load", timeout_s=60)
        folder = next((cluster.agents["n1"].state / "runs").glob(f"{benchmark}.0.*"))
        procs.kill_all(0, str(folder), within_s=5)
        view = ended(cluster, benchmark)
        assert (view["status"], view["is_degraded"]) == ("completed", True), view
        (point,) = view["points"]
        assert 0 < point["coverage"] < 1, point


def test_cancelled(tmp_path: Path, door: Door) -> None:
    """A cancelled benchmark leaves no process and no directory on its nodes."""
    with Cluster(tmp_path) as cluster:
        for node in ("n1", "n2"):
            cluster.add_agent(node)
        benchmark = begin(cluster, door, duration=600)
        until(lambda: len(door.asked) > RATE, "load", timeout_s=60)
        status, answer = cluster.head.call("POST", f"/api/v1/benchmarks/{benchmark}/cancel", {})
        assert status in (200, 202), answer
        assert ended(cluster, benchmark)["status"] == "cancelled"
        until(lambda: not left(cluster), "the end of every process")
        until(lambda: not list(tmp_path.glob("n?/state/runs/*")), "directories that are gone")
