"""Load nodes that begin together: how far apart they really do, and that what they measured adds up.

    python -m benchmarks.load_nodes [--nodes 8] [--repetitions 5]

A real head and so many real agents on this machine, whose generators send one schedule together to a small engine. The
head estimates each agent's clock over its session and gives each a moment of that clock. Printed per repetition: the
bound that the head reports, and how far apart the generators began by this machine's own clock (bar: 5 ms). Then the
parts are merged here once more and compared: the head's histograms with those of all raw requests, bucket by bucket.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.bench import report
from common.bench.histogram import RELATIVE_ERROR, Histogram
from common.bench.metrics import latencies, summarize
from common.bench.outcome import Outcome, decode
from herder.types import BenchmarkView
from tests.e2e.cluster import FAST, Cluster

BAR_MS = 5.0
METRICS = ("ttft", "e2e", "send_lag")


def measured(cluster: Cluster, nodes: Sequence[str], repetitions: int) -> BenchmarkView:
    """The benchmark once it has ended."""
    load = {
        "model": "chat", "rate": 5 * len(nodes), "duration": "4s", "scenarios": ["D(20,2)"], "exact": False,
        "nodes": list(nodes),
    }  # fmt: skip
    asked = {
        "name": "load-nodes", "server": {"service": "chat"}, "load": load, "repetitions": repetitions,
        "monitor": {"enabled": False},
    }  # fmt: skip
    made = cluster.client.create_benchmark(document=asked)
    *_, last = cluster.client.watch_benchmark(made.id, timeout_s=60 + 60 * repetitions)
    assert last.status == "completed", last
    return last


def parts_of(cluster: Cluster, benchmark: str, point: int, nodes: int) -> list[Outcome]:
    """What each load node sent."""
    runs = cluster.head.state / "benchmarks" / benchmark / "runs"
    return [decode((runs / f"{benchmark}.{point}.{part}" / "load.bin").read_bytes())[1] for part in range(nodes)]


def worst_error(cluster: Cluster, benchmark: str, point: int, parts: Sequence[Outcome]) -> float:
    """How far the merged percentiles are from those of all raw requests, as a share; buckets must be equal."""
    folder = cluster.head.state / "benchmarks" / benchmark / "points" / str(point)
    kept = json.loads((folder / "report.json").read_bytes())
    asked, whole = decode((folder / "load.bin").read_bytes())
    assert len(whole.records) == sum(len(part.records) for part in parts)
    samples = latencies(whole.records, report.window_of(asked, whole)[0])
    worst = 0.0
    for name in METRICS:
        raw = Histogram()
        raw.add_all(samples[name])
        merged = Histogram.from_wire(kept["histograms"][name])
        assert merged.to_wire() == raw.to_wire(), name
        exact = summarize(samples[name]).percentiles
        for share, label in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
            found = (merged.percentile(share) or 0.0) / 1e6
            worst = max(worst, abs(found - exact[label]) / exact[label] if exact[label] else 0.0)
    return worst


def main() -> None:
    """Runs the benchmark and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    names = [f"n{number + 1}" for number in range(options.nodes)]
    with tempfile.TemporaryDirectory() as scratch, Cluster(Path(scratch) / "cluster", limits=FAST) as cluster:
        for name in names:
            cluster.add_agent(name, is_started=False).begin()
        for name in names:
            cluster.wait_node(name, timeout_s=60)
        cluster.serve_tiny("chat", names[0])
        view = measured(cluster, names, options.repetitions)
        print(f"{options.nodes} load agents on one machine, {options.repetitions} starts together (bar: {BAR_MS:g} ms)")
        worst = error = 0.0
        for point in view.points:
            parts = parts_of(cluster, view.id, point.number, options.nodes)
            starts = [part.start_wall_s for part in parts]
            apart_ms = (max(starts) - min(starts)) * 1000
            worst = max(worst, apart_ms)
            error = max(error, worst_error(cluster, view.id, point.number, parts))
            print(f"  start {point.number}: apart {apart_ms:7.3f} ms, bound of the head {point.skew_ms:7.3f} ms")
        print(f"  worst start skew {worst:.3f} ms")
        print(
            f"  merged histograms against all raw requests: same buckets; percentiles off by {error:.3%} at most ",
            end="",
        )
        print(f"(stated: {RELATIVE_ERROR:.3%})")


if __name__ == "__main__":
    main()
