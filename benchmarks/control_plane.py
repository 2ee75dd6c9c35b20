"""What one head costs and how fast it is, against the bars of docs/benchmarks.md.

    python -m benchmarks.control_plane load       10,000 agents at the 5 s interval: CPU, memory, ack latency
    python -m benchmarks.control_plane reattach   kill -9 of the head under 10,000 agents: time until all are back
    python -m benchmarks.control_plane api        API latency with 1,000 agents
    python -m benchmarks.control_plane placements durable placements a second
    python -m benchmarks.control_plane idle       memory and CPU of an idle head and agent
    python -m benchmarks.control_plane start      start-up with 10,000 nodes and 100,000 job records
    python -m benchmarks.control_plane crash      acknowledged writes lost over random kill -9

Everything runs on this machine, over loopback. The head is pinned to CPU 0, what loads it to the other CPUs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import place_load
from benchmarks.processes import ROOT, Head, Swarm, free_port, running_head, share_of_a_core, start_head, table, usage

PORT = free_port()  # one for the whole run: a head that is killed comes back there


def load(options: argparse.Namespace, scratch: Path) -> None:
    """CPU, memory and ack latency of a head with many agents."""
    with running_head(scratch / "head", PORT, cpu=0) as head:
        swarm = Swarm(head, options.agents, processes=2, cpu=1)
        try:
            connect_s = swarm.wait_connected(options.agents)
            time.sleep(options.warm_up)
            swarm.tallies()
            before = usage(head.pid)
            time.sleep(options.seconds)
            after = usage(head.pid)
            tallies = swarm.tallies()
            pauses = head.metrics()
        finally:
            swarm.close()
    acks = [tally["ack_ms"] for tally in tallies if tally["ack_ms"]]
    leases = sum(ack["n"] for ack in acks)
    leases_per_s = leases / (after.at - before.at)
    table(
        f"{options.agents} agents, {after.at - before.at:.0f} s, one head on one core",
        [
            ("CPU of the head", f"{share_of_a_core(before, after):.1%} of a core", "20 %"),
            ("for a lease and its readings", f"{1e6 * (after.cpu_s - before.cpu_s) / max(1, leases):.0f} us", ""),
            ("resident memory", f"{after.rss_bytes / 1e6:.0f} MB", "350 MB"),
            ("leases and telemetry", f"{leases_per_s:.0f} + {leases_per_s:.0f} frames/s", ""),
            ("lease to ack, p50 / p99", f"{acks[0]['p50']:.2f} / {max(a['p99'] for a in acks):.2f} ms", ""),
            ("garbage collections, the longest", slowest(pauses, "herder_gc_pause_seconds"), ""),
            ("ticks of the head's loop, the latest", slowest(pauses, "herder_loop_lag_seconds"), ""),
            ("all connected after", f"{connect_s:.1f} s (paced by the swarm)", ""),
            ("sessions lost", str(sum(tally["closed"] for tally in tallies)), "0"),
        ],
    )


def slowest(metrics: dict[str, float], name: str) -> str:
    """How many a histogram counted since the start, and between which of its borders the greatest lies."""
    count = metrics[f"{name}_count"]
    borders = {
        key.partition('"')[2].partition('"')[0]: value
        for key, value in metrics.items()
        if key.startswith(name + "_bucket")
    }
    above = [float(border) for border, value in borders.items() if value >= count]
    return f"{count:.0f}, at most {1000 * min(above):g} ms" if count else "none"


def reattach(options: argparse.Namespace, scratch: Path) -> None:
    """Time until every agent is back after kill -9 of the head, and how many were judged lost."""
    head = start_head(scratch / "head", PORT, cpu=0)
    swarm = Swarm(head, options.agents, processes=2, cpu=1)
    try:
        swarm.wait_connected(options.agents)
        time.sleep(min(3, options.warm_up))
        head.kill()
        begun = time.monotonic()
        turned_away = sum(tally["refused"] for tally in swarm.tallies())
        head = start_head(scratch / "head", PORT, cpu=0)
        serving_s = time.monotonic() - begun
        swarm.wait_connected(options.agents)
        back_s = time.monotonic() - begun
        busy_s = usage(head.pid).cpu_s
        turned_away = sum(tally["refused"] for tally in swarm.tallies()) - turned_away
        time.sleep(options.warm_up / 2)
        health = head.request("GET", "/api/v1/health")
    finally:
        swarm.close()
        head.kill()
    table(
        f"kill -9 of the head under {options.agents} agents",
        [
            ("head serves again after", f"{serving_s:.2f} s", ""),
            ("all agents back after", f"{back_s:.1f} s", "15 s"),
            ("attempts that found no head or were refused", str(turned_away), ""),
            ("CPU of the head until then", f"{busy_s:.1f} s", ""),
            ("judged lost", str(health["nodes"] - health["nodes_online"]), "0"),
        ],
    )


def api(options: argparse.Namespace, scratch: Path) -> None:
    """Latency of one object and of a page of 500 nodes while 1,000 agents renew their leases."""
    with running_head(scratch / "head", PORT, cpu=0) as head:
        agents = min(1_000, options.agents)
        swarm = Swarm(head, agents, cpu=1)
        try:
            swarm.wait_connected(agents)
            time.sleep(min(3, options.warm_up))
            one = latencies(head, f"/api/v1/nodes/n{agents // 2}", options.requests)
            pages = max(10, options.requests // 15)
            before = usage(head.pid)
            page = latencies(head, "/api/v1/nodes?limit=500", pages)
            page_cpu_s = (usage(head.pid).cpu_s - before.cpu_s) / pages
        finally:
            swarm.close()
    table(
        f"API with {agents} agents, one keep-alive connection",
        [
            ("GET one node, p50 / p99", f"{one[0]:.2f} / {one[1]:.2f} ms", "p99 5 ms"),
            ("GET a page of 500 nodes, p50 / p99", f"{page[0]:.1f} / {page[1]:.1f} ms", "20 ms"),
            ("CPU of the head for a page, agents included", f"{1000 * page_cpu_s:.1f} ms", ""),
        ],
    )


def latencies(head: Head, path: str, count: int) -> tuple[float, float]:
    """Median and p99 in milliseconds of so many GETs, one after another."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
    headers = {"Authorization": f"Bearer {head.token()}"}
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        answer.read()
        found.append(1000 * (time.perf_counter() - begun))
        assert answer.status == 200, answer.status
    found.sort()
    return found[count // 2], found[int((count - 1) * 0.99)]


def placements(options: argparse.Namespace, scratch: Path) -> None:
    """Services created through the driver with 1,000 nodes: placed, journalled with fsync, answered."""
    rate, p99_ms, sent = place_load.measure(
        scratch / "head", nodes=options.nodes // 10, count=options.count, concurrency=256
    )
    table(
        f"durable placements, {options.count} services over {options.nodes // 10} nodes of 8 GPUs, 256 callers",
        [
            ("placements, each fsynced before its answer", f"{rate:.0f}/s", "3,000/s"),
            ("answer p99", f"{p99_ms:.1f} ms", ""),
            ("commands that left for agents", str(sent), ""),
        ],
    )


def idle(options: argparse.Namespace, scratch: Path) -> None:
    """Memory and CPU of a head with one agent, and of that agent with all its helper processes."""
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
    with running_head(scratch / "head", PORT) as head:
        environ |= {
            "HERDER_AGENT_HEAD_URL": head.url,
            "HERDER_AGENT_TOKEN_FILE": str(head.state_dir / "join.token"),
            "HERDER_AGENT_STATE_DIR": str(scratch / "agent"),
            "HERDER_AGENT_NODE_ID": "bench",
        }
        agent = subprocess.Popen([sys.executable, "-m", "agent"], env=environ, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while head.request("GET", "/api/v1/health")["nodes_online"] < 1 and time.monotonic() < deadline:
                time.sleep(0.2)
            time.sleep(1.5 * options.warm_up)
            pids = [head.pid, agent.pid]
            before = [usage(pid) for pid in pids]
            time.sleep(options.seconds)
            after = [usage(pid) for pid in pids]
            children = {
                Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-40:]: usage(pid).rss_bytes
                for pid in children_of(agent.pid)
            }
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(30)
    table(
        f"idle for {options.seconds} s",
        [
            ("head, resident", f"{after[0].rss_bytes / 1e6:.0f} MB", "90 MB"),
            ("head, CPU", f"{share_of_a_core(before[0], after[0]):.2%} of a core", ""),
            ("agent, resident", f"{after[1].rss_bytes / 1e6:.0f} MB", "70 MB"),
            ("agent, CPU", f"{share_of_a_core(before[1], after[1]):.2%} of a core", "0.5 %"),
            *[(f"beside the agent: {name}", f"{rss / 1e6:.0f} MB", "") for name, rss in children.items()],
        ],
    )


def children_of(parent: int) -> list[int]:
    """Direct children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def start(options: argparse.Namespace, scratch: Path) -> None:
    """Start-up with a full journal: process start to the first answer."""
    place_load.fill(scratch / "head", nodes=options.nodes, jobs=options.jobs)
    found = []
    for _ in range(3):
        begun = time.monotonic()
        head = start_head(scratch / "head", PORT)
        found.append(time.monotonic() - begun)
        rss = usage(head.pid).rss_bytes
        head.process.send_signal(signal.SIGTERM)
        head.process.wait(30)
    size = (scratch / "head" / "journal.sqlite").stat().st_size
    table(
        f"start with {options.nodes} nodes and {options.jobs} job records ({size / 1e6:.0f} MB journal)",
        [
            ("start to serving, best / worst of 3", f"{min(found):.2f} / {max(found):.2f} s", "2 s"),
            ("resident memory", f"{rss / 1e6:.0f} MB", ""),
        ],
    )


def crash(options: argparse.Namespace, scratch: Path) -> None:
    """Writers note every acknowledged write; the head is killed at random; what was acknowledged must be there."""
    rng = random.Random(options.seed)
    acknowledged: set[str] = set()
    head = start_head(scratch / "head", PORT)
    token = head.token()
    kills = 0
    begun = time.monotonic()
    for round_number in range(options.kills):
        stop = threading.Event()
        threads = [
            threading.Thread(target=register, args=(token, f"r{round_number}-w{n}", acknowledged, stop))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.01, 0.25))
        head.kill()
        kills += 1
        stop.set()
        for thread in threads:
            thread.join()
        head = start_head(scratch / "head", PORT)
    present = set()
    cursor: str | None = ""
    while cursor is not None:
        page: dict[str, Any] = head.request("GET", f"/api/v1/models?limit=500{'&cursor=' + cursor if cursor else ''}")
        present |= {model["name"] for model in page["items"]}
        cursor = page["next"]
    head.kill()
    table(
        f"{kills} times kill -9 in {time.monotonic() - begun:.0f} s, seed {options.seed}",
        [
            ("writes acknowledged", str(len(acknowledged)), ""),
            ("acknowledged and lost", str(len(acknowledged - present)), "0"),
        ],
    )


def register(token: str, prefix: str, acknowledged: set[str], stop: threading.Event) -> None:
    """Registers models until told to stop or the head is gone."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    number = 0
    while not stop.is_set():
        name = f"{prefix}-{number}"
        number += 1
        try:
            connection.request("POST", "/api/v1/models", json.dumps({"name": name}), headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return
        if answer.status in (200, 201):
            acknowledged.add(name)


COMMANDS = {
    "load": load,
    "reattach": reattach,
    "api": api,
    "placements": placements,
    "idle": idle,
    "start": start,
    "crash": crash,
}


SMALL = {
    "agents": 20,
    "seconds": 2,
    "warm_up": 0.5,
    "count": 40,
    "kills": 2,
    "requests": 50,
    "nodes": 100,
    "jobs": 200,
}


def main() -> None:
    """Runs the named measurements, each in a scratch directory of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*COMMANDS, "all"])
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=30, help="length of a measured window")
    parser.add_argument("--count", type=int, default=6_000, help="placements to make")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds before a measured window")
    parser.add_argument("--requests", type=int, default=3_000, help="of one object; pages: a fifteenth")
    parser.add_argument("--nodes", type=int, default=10_000, help="at a start; placements: a tenth")
    parser.add_argument("--jobs", type=int, default=100_000, help="at a start")
    parser.add_argument("--small", action="store_true", help="shows that it works, not how fast it is")
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    for name in COMMANDS if "all" in options.what else options.what:
        with tempfile.TemporaryDirectory(prefix="herder-bench-") as scratch:
            COMMANDS[name](options, Path(scratch))


if __name__ == "__main__":
    main()
