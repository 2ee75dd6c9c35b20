"""Benchmarks with real daemons: a head, two agents, their load generators and monitors, and an engine that answers."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herder.types import BenchmarkTick, BenchmarkView
from tests.e2e.cluster import FAST, Cluster
from tests.e2e.processes import processes_of, until

LIMITS = {**FAST, "RUN_LOST_MS": 5_000, "COMMAND_REPEAT_MS": 2_000}
LOAD = {
    "rate": 10,
    "duration": "3s",
    "scenarios": ["D(20,4)"],
    "model": "chat",
    "nodes": ["n1", "n2"],
    "exact": False,
    "drain": "10s",
}
ENDED = ("completed", "failed", "cancelled")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, two agents, and a tiny engine on n1."""
    with Cluster(tmp_path_factory.mktemp("bench") / "cluster", limits=LIMITS) as made:
        made.head.kill()
        made.head.start()  # on the port that it has by now: nodes can be told where its gateway is
        agents = [made.add_agent(node, is_started=False) for node in ("n1", "n2")]
        for agent in agents:
            agent.limits = dict(LIMITS)
            agent.begin()
        for agent in agents:
            made.wait_node(agent.node)
        made.serve_tiny("chat", "n1")
        yield made


def document(**changes: Any) -> dict[str, Any]:
    """A benchmark of the service, from both nodes."""
    made: dict[str, Any] = {"name": "e2e", "server": {"service": "chat"}, "load": dict(LOAD)}
    load = changes.pop("load", {})
    return made | changes | {"load": made["load"] | load}


def wait_end(cluster: Cluster, benchmark: str, timeout_s: float = 90.0) -> BenchmarkView:
    """The benchmark once it has ended."""

    def ended() -> BenchmarkView | None:
        view = cluster.client.benchmark(benchmark)
        return view if view.status in ENDED else None

    return until(ended, f"the end of {benchmark}", timeout_s)


def wait_point(cluster: Cluster, benchmark: str, number: int, *states: str) -> BenchmarkView:
    """The benchmark once one of its points is in one of these states."""

    def reached() -> BenchmarkView | None:
        view = cluster.client.benchmark(benchmark)
        assert view.status not in ENDED, view
        return view if number < len(view.points) and view.points[number].status in states else None

    return until(reached, f"point {number} of {benchmark} {states}", 60.0)


def run_processes(cluster: Cluster, node: str) -> list[int]:
    """Load generators and monitors of a node."""
    folder = cluster.agents[node].state
    words = ("agent.runs", "agent.monitor", "agent.loadgen")
    return [pid for pid, line in processes_of(folder) if any(word in line for word in words) and str(folder) in line]


def report_of(cluster: Cluster, benchmark: str, number: int) -> dict[str, Any]:
    """A point's report."""
    found: dict[str, Any] = json.loads(cluster.client.benchmark_report(benchmark, point=number))
    return found


def test_a_sweep_from_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Two rates, each from both nodes at one moment: whole, counted, with its logs, samples, tables and page."""
    asked = document(sweep={"rate": [10, 20]}, slo={"e2e": 60_000})
    made = cluster.client.create_benchmark(document=asked)
    ticks: list[BenchmarkTick] = list(cluster.client.live_benchmark(made.id))
    view = wait_end(cluster, made.id)
    assert view.status == "completed", view
    assert [point.status for point in view.points] == ["completed", "completed"]
    assert [point.changes for point in view.points] == [{"rate": 10}, {"rate": 20}]
    assert not view.is_degraded
    for point, rate in zip(view.points, (10, 20), strict=True):
        report = report_of(cluster, made.id, point.number)
        assert report["coverage"]["share"] == point.coverage == 1.0
        assert report["coverage"]["planned"] == report["coverage"]["performed"] == report["counts"]["sent"]
        assert abs(point.figures["asked_rate"] - rate) < 0.6 * rate
        assert point.figures["error_rate"] == 0.0
        assert point.figures["e2e_p50_ms"] > 100  # four words, 50 ms each
        assert "degraded" not in point.reasons
        assert report["recipe_sha256"] == view.recipe_sha256
        assert report["facts"]["nodes"].keys() == {"n1", "n2"}
        assert report["facts"]["engines"][0]["argv"]
    assert {tick.point for tick in ticks} == {0, 1}
    assert max(tick.nodes for tick in ticks) == 2
    files = {file.name: file.bytes for file in cluster.client.benchmark_files(made.id)}
    for name in ("benchmark.json", "report.html", "summary.csv", "logs/chat-0.log", "points/1/report.json"):
        assert files.get(name), (name, files)
    for node, part in (("n1", 0), ("n2", 1)):
        assert files[f"runs/{made.id}.1.{part}/load.bin"]
        assert files[f"runs/{made.id}.monitor.{node}/monitor.csv"]
    cluster.client.download_benchmark_file(made.id, "logs/chat-0.log", tmp_path / "log")
    assert "chat of 4 words" in (tmp_path / "log").read_text()
    cluster.client.download_benchmark_file(made.id, f"runs/{made.id}.monitor.n1/monitor.csv", tmp_path / "csv")
    samples = list(csv.DictReader(io.StringIO((tmp_path / "csv").read_text())))
    assert len(samples) >= 3
    table = cluster.client.benchmark_report(made.id, format="csv").decode()
    assert table.count("\n") == 3
    assert b"<html" in cluster.client.benchmark_report(made.id, format="html")
    vllm = json.loads(cluster.client.benchmark_report(made.id, point=0, format="vllm"))
    assert len(vllm["ttfts"]) == vllm["num_prompts"]
    for node in ("n1", "n2"):
        until(lambda node=node: not run_processes(cluster, node), f"no run on {node}")  # type: ignore[misc]
    assert cluster.client.delete_benchmark(made.id).is_done
    until(lambda: not (cluster.head.state / "benchmarks" / made.id).exists(), "the files are gone")


def test_the_head_is_killed_in_mid_run(cluster: Cluster) -> None:
    """The load goes on without it; the new head takes the results and finishes."""
    asked = document(load={"duration": "8s"}, sweep={"rate": [10, 12]})
    made = cluster.client.create_benchmark(document=asked)
    wait_point(cluster, made.id, 0, "running")
    cluster.head.kill()
    cluster.head.start()
    view = wait_end(cluster, made.id, 120.0)
    assert view.status == "completed", view
    assert [point.status for point in view.points] == ["completed", "completed"]
    for point in view.points:
        report = report_of(cluster, made.id, point.number)
        assert report["coverage"]["share"] == 1.0
        assert report["coverage"]["performed"] == report["coverage"]["planned"]


def test_cancel_leaves_nothing_behind(cluster: Cluster) -> None:
    """The own service is removed, no generator and no monitor runs on, and the engine of others is not touched."""
    server = {"serve": {"model": "chat", "recipe": "tiny", "devices": ["n2:disk"]}}
    asked = document(load={"duration": "120s"}, server=server)
    made = cluster.client.create_benchmark(document=asked)
    view = wait_point(cluster, made.id, 0, "running")
    assert view.service == made.id
    assert run_processes(cluster, "n1")
    assert run_processes(cluster, "n2")
    view = cluster.client.cancel_benchmark(made.id, wait_s=30)
    assert view.status == "cancelled", view
    for node in ("n1", "n2"):
        until(lambda node=node: not run_processes(cluster, node), f"no run on {node}")  # type: ignore[misc]
    until(lambda: made.id not in {service.name for service in cluster.client.services()}, "no service of its own")
    assert cluster.chat("chat")


def test_through_the_gateway(cluster: Cluster) -> None:
    """The load nodes ask the head's gateway with a key of the benchmark's own, which is gone afterwards."""
    server = {"service": "chat", "via": "gateway"}
    made = cluster.client.create_benchmark(document=document(server=server, monitor={"enabled": False}))
    keys = {key.id for key in cluster.client.keys().all()}
    view = wait_end(cluster, made.id)
    assert view.status == "completed", view
    (point,) = view.points
    assert point.figures["error_rate"] == 0.0
    assert cluster.head.url in report_of(cluster, made.id, 0)["plan"]["url"]
    assert {key.id for key in cluster.client.keys().all()} <= keys


def test_a_load_node_is_killed(cluster: Cluster) -> None:
    """Its agent and generator die in mid-run: the point ends degraded with exactly the other's share, and says who."""
    asked = document(load={"duration": "12s"}, monitor={"enabled": False})
    made = cluster.client.create_benchmark(document=asked)
    wait_point(cluster, made.id, 0, "running")
    for pid, _ in [*processes_of(cluster.agents["n2"].state)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    view = wait_end(cluster, made.id)
    assert view.status == "completed", view
    assert view.is_degraded
    assert not view.is_valid
    (point,) = view.points
    assert "degraded" in point.reasons
    report = report_of(cluster, made.id, 0)
    coverage = report["coverage"]
    assert [missing["node"] for missing in coverage["missing"]] == ["n2"]
    assert coverage["due"] == len(range(0, coverage["planned"], 2)) == coverage["performed"] == report["counts"]["sent"]
    assert point.coverage == coverage["share"] == coverage["due"] / coverage["planned"]
