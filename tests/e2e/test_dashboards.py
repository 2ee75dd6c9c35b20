"""Grafana's dashboards: every query of every panel finds data in a real Prometheus that a real cluster filled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import fake_nvml, prometheus_run
from tests.e2e.cluster import Cluster, stream_of
from tests.e2e.processes import until

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "monitoring" / "grafana" / "dashboards").glob("*.json"))
SECRET = "a-word-for-the-agents"
FACTS = "util=55 sm_mhz=1980 mem_mhz=2619 throttle=4 nvlink_tx_kib=9 nvlink_rx_kib=9 pcie_tx=7 pcie_rx=7"


def panels(path: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard that ask something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """(where, PromQL) of every target, with the variables as "All" sets them."""
    return [
        (
            f"{path.stem}: {panel['title']}",
            re.sub(r"\$(node|service|benchmark)", ".*", target["expr"].replace("$__rate_interval", "10s")),
        )
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that reads a cluster with GPUs, a service that is asked, and copies."""
    folder = tmp_path_factory.mktemp("dashboards")
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(folder / "cluster"))
        secret = folder / "agents.token"
        secret.write_text(SECRET + "\n")
        secret.chmod(0o600)
        agent = cluster.add_agent("n1", is_started=False, http={"port": 0, "token_file": str(secret)})
        facts = folder / "facts"
        facts.write_text("".join(f"gpu {number} {FACTS}\nlink 0 1\n" for number in range(2)))
        agent.environ = fake_nvml.environment(fake_nvml.build(folder / "nvml"), facts)
        agent.start()
        cluster.wait_node("n1")
        cluster.serve_tiny("tiny", "n1")
        viewer = folder / "viewer.token"
        viewer.write_text(f"{cluster.client.create_key('viewer', name='prometheus').token}\n")
        viewer.chmod(0o600)
        config = prometheus_run.adapted(folder, cluster.head.url, head_token=viewer, agents_token=secret)
        found = stack.enter_context(prometheus_run.running(folder, config))
        until(lambda: len(prometheus_run.ask(found, "up == 1")) == 2, "both targets up")
        for _ in range(3):
            cluster.chat("tiny")
            with stream_of(cluster.head.url, "tiny", 3, token=cluster.head.token()) as pieces:
                assert list(pieces)
        document = {"name": "watched", "server": {"service": "tiny"}, "load": {"rate": 5, "duration": 90}}
        made = cluster.client.create_benchmark(document=document)
        until(lambda: cluster.client.benchmark(made.id).points[0].status == "running", "a benchmark under way")
        yield found
        cluster.client.cancel_benchmark(made.id)


@prometheus_run.NEEDED
@pytest.mark.parametrize(("where", "query"), queries(), ids=[where for where, _ in queries()])
def test_every_query_finds_data(address: str, where: str, query: str) -> None:
    """Prometheus takes it, and it has rows once the cluster has done something."""
    rows = until(lambda: prometheus_run.ask(address, query), f"{where}: {query}")
    assert all(row["value"][1] != "NaN" for row in rows) or "histogram_quantile" in query  # of no requests lately


def test_dashboards_are_those_of_their_definitions() -> None:
    """The files are what scripts/gen-dashboards writes."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gen-dashboards"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in DASHBOARDS} >= {"benchmarks", "cluster", "nodes", "services"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_stand_beside_each_other(path: Path) -> None:
    """No two panels overlap, none is wider than the page, and each says what its numbers are."""
    taken: dict[tuple[int, int], str] = {}
    document = json.loads(path.read_text())
    for panel in document["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels(path))
