"""Logs of whole clusters: followed through deaths of agent and head, searched, cut by time, kept by size."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from herder import Client
from herder.types import CreateService, LogEntry
from tests.e2e.cluster import Cluster, code_of
from tests.e2e.processes import until

COUNTING = Path(__file__).with_name("counting_engine.py")
RECIPE = """
name: counting
category: inference
runtime: command
needs_model: true
command: [{python}, -I, -S, {program}, "{{port}}", {folder}]
health: {{path: /health, timeout_s: 1, period_s: 0.5, ready_timeout_s: 20, failures: 2}}
stop_grace_s: 2
max_restarts: 5
"""
SLURM = "2026-03-01T10:00:00Z step one\nno time here\n2026-03-01T10:00:05Z step two\n"


class Follower:
    """Follows a log in a thread, as a program with the client does."""

    def __init__(self, cluster: Cluster, **wanted: object) -> None:
        self.entries: list[LogEntry] = []
        self.error: BaseException | None = None
        self._client = Client(cluster.head.url, token=cluster.head.token())
        self._wanted = wanted
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            with self._client as client:
                for batch in client.log_batches(follow=True, **self._wanted):  # type: ignore[arg-type]
                    self.entries += [entry for entry in batch if entry.line is not None or entry.note]
        except BaseException as error:  # the test's own thread looks at it
            self.error = error

    def numbers(self) -> list[int]:
        """What the engine has counted."""
        return [int(entry.line.split()[1]) for entry in list(self.entries) if entry.line and "line " in entry.line]

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Waits for something of what was read."""

        def holds() -> object:
            assert self.error is None, self.error
            return condition()

        until(holds, what, 60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and the agents n1 and n2, without services."""
    folder = tmp_path_factory.mktemp("logs")
    made = Cluster(folder / "cluster")
    words = {"python": sys.executable, "program": str(COUNTING), "folder": str(made.control)}
    (made.recipes / "counting.yaml").write_text(RECIPE.format(**words))
    jobs = folder / "jobs" / "deep"
    jobs.mkdir(parents=True)
    (jobs / "slurm-4711.out").write_text(SLURM)
    with made as cluster:
        for node in ("n1", "n2"):
            agent = cluster.add_agent(node, logs={"roots": [str(folder / "jobs")]}, is_started=False)
            agent.limits = {"RECONNECT_CAP_MS": 500}  # they come back soon after the head does
            agent.start()
        yield cluster


def serve(cluster: Cluster, name: str, *nodes: str) -> None:
    """A counting service on the nodes."""
    devices = tuple(f"{node}:disk" for node in nodes)
    cluster.make_model(name, 20_000)
    wanted = CreateService(name=name, model=name, recipe="counting", devices=devices, replicas=len(nodes))
    cluster.client.create_service(wanted)
    until(
        lambda: [view.state for view in cluster.client.replicas(service=name)] == ["ready"] * len(nodes),
        f"{name} ready",
        40,
    )


def test_follow_through_deaths_of_agent_and_head(cluster: Cluster) -> None:
    """Numbered lines of an engine, followed through kill -9 of agent and head: none is lost, none doubled."""
    serve(cluster, "steady", "n1")
    follower = Follower(cluster, service="steady", tail=-1)
    follower.wait(lambda: len(follower.numbers()) > 100, "the first lines")
    n1 = cluster.agents["n1"]
    n1.kill()
    cluster.wait_node("n1", "suspect")
    n1.start()
    seen = len(follower.numbers())
    follower.wait(lambda: len(follower.numbers()) > seen + 300, "lines after the agent's death")
    cluster.head.kill()
    time.sleep(0.5)  # the engine writes on while there is no head
    cluster.head.start()
    seen = len(follower.numbers())
    follower.wait(lambda: len(follower.numbers()) > seen + 300, "lines after the head's death")
    cluster.head.signal(signal.SIGTERM)
    cluster.head.wait_ended()
    cluster.head.start()
    seen = len(follower.numbers())
    follower.wait(lambda: len(follower.numbers()) > seen + 300, "lines after the head's restart")
    numbers = follower.numbers()
    assert numbers == list(range(len(numbers)))
    assert all(entry.lost_bytes == 0 for entry in follower.entries)
    times = [entry.time_ms for entry in follower.entries if entry.line is not None]
    assert all(times)
    assert times == sorted(times)  # type: ignore[type-var]
    cluster.client.delete_service("steady")
    until(lambda: not follower.thread.is_alive(), "the end of the log of a service that is gone", 40)
    assert follower.error is None


def test_replicas_merge_by_time_and_restarts_go_on(cluster: Cluster) -> None:
    """Two engines on two nodes in one view: each in its own order, all by time, over the restart of one of them."""
    serve(cluster, "pair", "n1", "n2")
    follower = Follower(cluster, service="pair", tail=0)
    follower.wait(lambda: len({entry.source for entry in list(follower.entries)}) == 2, "both")
    (cluster.control / "die").touch()
    follower.wait(lambda: any(entry.line == "the engine dies" for entry in follower.entries), "the death")
    died = next(entry.source for entry in follower.entries if entry.line == "the engine dies")

    def again() -> bool:
        mine = [entry.line for entry in follower.entries if entry.source == died]
        return "line 20" in mine[mine.index("the engine dies") :]

    follower.wait(again, "lines of its next run")
    entries = [entry for entry in list(follower.entries) if entry.line is not None]
    times = [entry.time_ms or 0 for entry in entries]
    late = [later for earlier, later in itertools.pairwise(times) if later < earlier]
    assert len(late) <= len(times) // 100  # only what came later than lines are held for
    for source in {entry.source for entry in entries}:
        mine = [entry.line or "" for entry in entries if entry.source == source]
        numbers = [int(line.split()[1]) for line in mine if line.startswith("line ")]
        steps = {later - earlier for earlier, later in itertools.pairwise(numbers)}
        assert steps - {1} <= ({-numbers[mine.index("the engine dies") - 1]} if source == died else set())
    cluster.client.delete_service("pair")
    until(lambda: not follower.thread.is_alive(), "the end", 40)


def test_search_and_time_range(cluster: Cluster) -> None:
    """A text, an expression, a span of time and the last lines of a search; a hostile expression harms nobody."""
    serve(cluster, "searched", "n1")
    client = cluster.client
    until(lambda: [e for e in client.log_entries(target="searched", search="line 150")], "line 150")  # noqa: C416
    found = [entry.line for entry in client.log_entries(target="searched", search="LINE 15", ignore_case=True, tail=-1)]
    assert found[:2] == ["line 15", "line 150"]
    found = [e.line for e in client.log_entries(target="searched", search=r"^line (7|8)$", regex=True, tail=-1)]
    assert found == ["line 7", "line 8"]
    last = [e.line for e in client.log_entries(target="searched", search="line 1", tail=3, until="0s")]
    assert len(last) == 3
    entries = list(client.log_entries(replica="searched-0", tail=-1))
    begin, end = entries[50], entries[100]
    assert begin.time_ms
    assert end.time_ms
    part = list(client.log_entries(replica="searched-0", since=str(begin.time_ms), until=str(end.time_ms)))
    expected = [e.line for e in entries if begin.time_ms <= (e.time_ms or 0) <= end.time_ms]
    assert [e.line for e in part] == expected
    assert code_of(lambda: list(client.log_entries(target="searched", search="(", regex=True))) == "invalid_value"
    hostile = r"(l+i*n*e* *)+(x+x+)+y$"
    started = time.monotonic()
    code_of(lambda: list(client.log_entries(target="searched", search=hostile, regex=True, tail=-1)))
    assert time.monotonic() - started < 60
    assert cluster.wait_node("n1").state == "online"
    cluster.client.delete_service("searched")


def test_command_line(cluster: Cluster, tmp_path: Path) -> None:
    """`herder logs` prints, searches, writes files and JSON lines, and says what is wrong with what it is asked."""
    serve(cluster, "shown", "n1", "n2")
    until(lambda: "line 30" in cluster.cli("logs", "shown", "--tail", "-1").stdout, "lines")
    shown = cluster.cli("logs", "--service", "shown", "--grep", "line 3", "--tail", "-1")
    assert "shown-0@n1 | line 3\n" in shown.stdout or "shown-0@n2 | line 3\n" in shown.stdout
    one = cluster.cli("logs", "shown-0", "--tail", "-1", "--grep", "line 7", "--timestamps")
    assert one.stdout.splitlines()[0].endswith("Z line 7")
    lines = [json.loads(line) for line in cluster.cli("logs", "shown", "-o", "json", "--tail", "4").stdout.splitlines()]
    assert len(lines) == 4
    assert all({"source", "node", "time_ms", "line", "cursor"} <= line.keys() for line in lines)
    written = cluster.cli("logs", "shown", "--to", f"{tmp_path}/kept/", "--tail", "-1")
    assert written.returncode == 0, written.stderr
    assert "lines written to 2 files" in written.stderr
    for path in (tmp_path / "kept").iterdir():
        assert path.read_text().startswith("line 0\nline 1\n")
    assert cluster.cli("logs").returncode == 2
    assert cluster.cli("logs", "nothing-of-that-name").returncode == 5
    assert cluster.cli("logs", "shown", "--since", "yesterday").returncode == 1
    cluster.client.delete_service("shown")


def test_daemons_and_slurm(cluster: Cluster) -> None:
    """The head, an agent and a Slurm job are read in the same way; whoever may only look does not read them."""
    client = cluster.client
    head = [entry.line or "" for entry in client.log_entries(source="head", tail=-1)]
    said = [json.loads(line) for line in head]
    assert all({"at", "level", "logger", "message"} <= line.keys() for line in said)
    assert any(line["message"] == "state loaded" for line in said)
    assert not any(cluster.head.token() in line for line in head)
    agent = list(client.log_entries(target="agent:n1", search="session open", tail=-1))
    assert agent
    assert all(entry.time_ms for entry in agent)
    slurm = list(client.log_entries(target="slurm:n2/4711", tail=-1))
    assert [entry.line for entry in slurm] == SLURM.splitlines()
    assert slurm[2].time_ms == 1_772_359_205_000
    assert code_of(lambda: list(client.log_entries(target="slurm:n2/4712"))) == "not_found"
    viewer = cluster.client.create_key("viewer", "looks").token
    with Client(cluster.head.url, token=viewer) as looking:
        assert code_of(lambda: list(looking.log_entries(source="head"))) == "forbidden"
        assert code_of(lambda: list(looking.log_entries(target="agent:n1"))) == "forbidden"


def test_rotated_lines_are_counted(cluster: Cluster) -> None:
    """What rotation removed before it was read is told in bytes; what is kept comes whole and in order."""
    n3 = cluster.add_agent("n3", is_started=False)
    n3.limits = {"LOG_BYTES_PER_REPLICA": 65_536}
    n3.start()
    (cluster.control / "burst").write_text("3000")
    serve(cluster, "burst", "n3")
    (cluster.control / "burst").unlink()
    until(lambda: list(cluster.client.log_entries(target="burst", search="line 2999 ")), "the burst")
    address = f"{cluster.head.url}/api/v1/logs?replica=burst-0&format=jsonl&cursor=replica:burst-0@n3/1/0"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {cluster.head.token()}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        entries = [json.loads(line) for line in answer]
    lost = [entry["lost_bytes"] for entry in entries if entry.get("lost_bytes")]
    lines = [entry["line"] for entry in entries if "line" in entry]
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    # What is lost and what the burst's lines still say is together what it said.
    burst = [f"line {number} {'x' * 80}\n" for number in range(3000)]
    assert sum(lost) == sum(map(len, burst[: numbers[0]]))
    assert entries[-1] == {"is_end": True}
    cluster.client.delete_service("burst")


def test_ended_runs_are_kept_by_size(cluster: Cluster) -> None:
    """An agent with little room for old logs removes those of engines that are gone, and never of one that is there."""
    cluster.add_agent("n4", logs={"bytes_max": 0}, is_started=False)
    n4 = cluster.agents["n4"]
    n4.limits = {"LOG_SWEEP_S": 1}
    n4.start()
    serve(cluster, "gone", "n4")
    serve(cluster, "stays", "n4")
    folder = n4.state / "replicas"
    cluster.client.delete_service("gone")
    until(lambda: not (folder / "gone-0").exists(), "the removal", 40)
    assert (folder / "stays-0" / "1" / "log.000000000000000").exists()
    assert list(cluster.client.log_entries(target="stays", tail=1))
    cluster.client.delete_service("stays")
