"""Whole clusters that measure under seeded faults: what is said of a point was so, and nothing is left behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from common.bench.recipe import convert
from head.core import events as ev
from head.core.benchmark_facts import points_of
from tests.sim.cluster import Cluster
from tests.sim.profiles import PROFILES
from tests.sim.world import Faults


def run(seed: int, faults: Faults, *, requests: int = 40, benchmarks: int = 14) -> Cluster:
    """A cluster after its run; whatever must hold of benchmarks held at every moment and at rest."""
    cluster = Cluster(seed, nodes=5, models=6, faults=faults, requests=requests, benchmarks=benchmarks)
    cluster.run()
    return cluster


def measured(cluster: Cluster, nodes: int | list[str], **document: object) -> None:
    """Asks for a benchmark of an address outside from these nodes, or so many."""
    load = {"rate": 5, "duration": 4, "drain": 1, "nodes": nodes}
    plain = {"name": "try", "server": {"urls": ["http://elsewhere:1"]}, "load": load} | document
    facts = {f"benchmark:id-{cluster.people.asked + 1}": "there"}
    cluster.people.submit(ev.CreateBenchmarkRequested, facts, recipe=convert(plain), api_key="k")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("seed", [1, 2])
def test_measuring_in_every_world(profile: str, seed: int) -> None:
    """Every profile, with people who measure, cancel and delete; in odd seeds generators and judges fail, too."""
    faults = PROFILES[profile]
    if seed % 2:
        faults = replace(faults, run_fails=0.03, run_dies=0.03, runs_differ=0.02, judge_fails=0.03)
    cluster = run(seed, faults)
    assert cluster.head.judge.judged, "the run must have measured something"


FOUND = {
    ("disks", 1): "a full disk lost the note of a file that the agent knew was taken: the part had no files",
    ("wild", 1): "a restored head fired one part of a point that an older life of it had begun with the others",
}


@pytest.mark.parametrize(("profile", "seed"), FOUND)
def test_seeds_that_found_something(profile: str, seed: int) -> None:
    """Each once failed for the reason that FOUND says."""
    run(seed, PROFILES[profile])


def test_same_seed_same_run() -> None:
    """Benchmarks bring no other source of chance."""
    assert run(3, PROFILES["everything"]).world.trace == run(3, PROFILES["everything"]).world.trace


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_head_that_dies_again_and_again_loses_no_point(seed: int) -> None:
    """Machines and networks are well, only the head crashes: every point has its valid figures in the end."""
    faults = Faults(head_crash_per_s=0.04, until_ms=300_000)
    cluster = Cluster(seed, nodes=4, models=1, faults=faults, requests=0)

    def ask() -> None:
        if not cluster.head.is_up or len(cluster.head.state.nodes) < 4:
            cluster.world.after(1_000, "ask", ask)
            return
        measured(cluster, ["n0", "n1", "n2"], sweep={"rate": [1, 2, 4]}, repetitions=3)
        if not cluster.head.state.benchmarks:  # the nodes were not all heard of yet
            cluster.world.after(1_000, "ask", ask)

    cluster.world.after(10_000, "ask", ask)
    cluster.run()
    assert cluster.head.starts > 3
    (benchmark,) = cluster.head.state.benchmarks.values()
    points = points_of(cluster.head.state, benchmark.id)
    assert benchmark.state == "completed", benchmark
    valid = Counter((point.changes["rate"], point.repetition) for point in points if point.is_valid)
    assert len(valid) == 9, [(point.number, point.state, point.error) for point in points]
    assert not benchmark.is_degraded


def test_a_search_finds_the_truth() -> None:
    """Over a quiet cluster the best load is what the simulated server bears, to the precision."""
    cluster = Cluster(7, nodes=3, models=1, faults=Faults(until_ms=60_000), requests=0)
    search = {"over": "rate", "start": 1, "most": 100, "precision": 0.02}
    cluster.world.after(
        20_000, "ask", lambda: measured(cluster, 2, slo={"ttft": 300, "attainment": 0.9}, search=search)
    )
    cluster.run()
    (benchmark,) = cluster.head.state.benchmarks.values()
    assert 11 / 1.02 <= benchmark.best["load"] <= 11


def test_fifty_load_nodes_begin_together() -> None:
    """With some of them partitioned and a head that crashes; the judge compares when each really began."""
    faults = Faults(loss=0.01, partition_per_s=0.0005, head_crash_per_s=0.005, until_ms=200_000)
    cluster = Cluster(5, nodes=60, models=1, faults=faults, requests=0, rest_ms=700_000)
    cluster.world.after(40_000, "ask", lambda: measured(cluster, 50, sweep={"rate": [60, 120, 240]}))
    cluster.run()
    assert cluster.head.judge.judged >= 2


def test_a_lost_load_node_is_told_exactly() -> None:
    """One of four machines goes while all send: three quarters were performed, and that is what is said."""
    cluster = Cluster(3, nodes=4, models=1, faults=Faults(until_ms=200_000), requests=0)
    names = [f"n{number}" for number in range(4)]
    load = {"rate": 8, "duration": 60, "drain": 1, "nodes": names}
    cluster.world.after(20_000, "ask", lambda: measured(cluster, names, load=load, monitor={"enabled": False}))
    cluster.world.after(50_000, "power off", cluster.nodes["n2"].power_off)
    cluster.world.after(190_000, "remove", lambda: cluster.people.remove_for_good("n2"))
    cluster.run()
    (benchmark,) = cluster.head.state.benchmarks.values()
    (point,) = points_of(cluster.head.state, benchmark.id)
    assert (point.coverage, point.is_valid, point.reasons) == (0.75, False, ("degraded",))
    assert (benchmark.state, benchmark.is_degraded) == ("completed", True)
    assert next(part.node for part in point.parts if part.state == "lost") == "n2"
