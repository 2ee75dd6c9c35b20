"""Views of several logs over nodes that come and go: what a reader gets in the end is what was written, once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest
from msgspec.structs import replace

from agent import shim
from agent.log_sources import ReplicaRuns
from agent.run_files import RunFiles
from common import limits
from common.errors import Forbidden, HerderError, InvalidValue, NodeUnreachable, NotFound, TooMany, Unavailable
from common.logs.stream import LineStream
from common.wire import Inventory, LogChunk, LogRequest
from head import log_views, logs_collect
from head.core.objects import Benchmark, Job, Node, Replica, Run, Service, Step
from head.core.state import State
from head.log_broker import LogBroker
from head.log_choice import Log, Wish, choose, kept_of
from head.log_text import LogText
from head.log_views import LogView, ViewQuery, parse_cursors
from herder.types import LogEntry

SOURCES = {"n1": "replica:a-0", "n2": "replica:b-0", "n3": "replica:c-0"}


class FlakyBroker:
    """Nodes whose sessions break between any two chunks; `away` cannot be reached at all."""

    def __init__(self, root: Path, seed: int = 0, breaks: float = 0.0) -> None:
        self.is_closing = False
        self.away: set[str] = set()
        self.failing = 0.0  # share of chunks after which the node stays away for longer than it is waited for
        self._rng = random.Random(seed)
        self._breaks = breaks
        self._files = RunFiles(root / "replicas")

    def log(self, node: str, run: int = 1) -> shim.Log:
        """A log of the node's replica."""
        folder = self._files.directory(SOURCES[node].removeprefix("replica:"), run)
        folder.mkdir(parents=True)
        return shim.Log(str(folder), 1 << 20)

    def end(self, node: str) -> None:
        """The head has forgotten the replica of a node."""
        replica = SOURCES[node].removeprefix("replica:")
        (self._files.directory(replica, 1) / "exit.json").write_text("{}")
        self._files.forget(replica)

    async def open_lines(self, node: str, request: LogRequest, *, wait_s: float = 0.0) -> AsyncIterator[LogChunk]:
        """As LogBroker.open_lines."""
        is_done = False
        while not is_done:
            if node in self.away:
                raise NodeUnreachable(f"node {node} is not connected")
            runs = ReplicaRuns(self._files, request.source.removeprefix("replica:"))
            is_done = True
            async with aclosing(LineStream(request, runs).chunks()) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
                    if chunk.run >= 0:
                        request = replace(request, run_number=chunk.run, offset=chunk.offset)
                    if self._rng.random() < self.failing:
                        raise NodeUnreachable(f"node {node} went away")
                    if self._rng.random() < self._breaks:
                        is_done = False
                        break
        yield LogChunk("", request.offset, "", is_last=True, run=request.run_number)


def view_of(broker: FlakyBroker, query: ViewQuery, logs: Sequence[Log] | None = None) -> LogView:
    """A view of all sources, or of some."""
    chosen = list(logs) if logs is not None else [Log(source, node, source) for node, source in SOURCES.items()]
    return LogView(cast(LogBroker, broker), lambda: chosen, query)


async def all_of(view: LogView) -> list[LogEntry]:
    """Everything of a view that ends."""
    async with asyncio.timeout(20):
        return [entry async for batch in view.entries() for entry in batch]


def lines_of(entries: Sequence[LogEntry], source: str = "") -> list[str]:
    """The lines, of one source or all."""
    return [entry.line for entry in entries if entry.line is not None and source in ("", entry.source)]


@pytest.mark.parametrize("seed", range(4))
async def test_no_line_is_lost_or_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """While three logs grow, nodes break off, stay away and come back, and the reader comes back itself."""
    monkeypatch.setattr(log_views, "AGAIN_S", 0.01)
    monkeypatch.setattr("common.logs.stream.FOLLOW_S", 0.01)
    monkeypatch.setattr(limits, "LOG_REORDER_MS", 20)
    rng = random.Random(seed)
    broker = FlakyBroker(tmp_path, seed, breaks=0.2)
    broker.failing = 0.1
    logs = {node: broker.log(node) for node in SOURCES}
    count = 150

    async def write() -> None:
        for number in range(count):
            for log in logs.values():
                text = f"line {number}\n".encode()
                cut = rng.randrange(len(text))
                log.write(text[:cut])
                log.write(text[cut:])
            await asyncio.sleep(rng.random() * 0.01)

    writing = asyncio.ensure_future(write())
    cursors: dict[str, str] = {}
    seen: dict[str, str] = dict.fromkeys(SOURCES.values(), "")
    async with asyncio.timeout(40):
        while any(text.count("\n") < count for text in seen.values()):
            query = ViewQuery(tail=-1, follow=True, cursors=parse_cursors(",".join(cursors.values())))
            async with aclosing(view_of(broker, query).entries()) as batches:  # type: ignore[type-var]
                async for batch in batches:
                    # A connection may break between any two entries.
                    kept = batch[: rng.randrange(len(batch) + 1)] if rng.random() < 0.1 else batch
                    for entry in kept:
                        if entry.cursor:
                            cursors[entry.cursor.rsplit("/", 2)[0]] = entry.cursor
                        if entry.line is not None:
                            seen[entry.source] += entry.line + ("" if entry.is_partial else "\n")
                    if len(kept) < len(batch) or all(text.count("\n") == count for text in seen.values()):
                        break
    await writing
    expected = "".join(f"line {number}\n" for number in range(count))
    assert seen == dict.fromkeys(SOURCES.values(), expected)


async def test_history_is_merged_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of three nodes come in the order of their times; the last of all together are the newest of all."""
    now_ms = [time.time_ns() // 1_000_000 - 10_000_000]
    monkeypatch.setattr("agent.shim.time.time_ns", lambda: now_ms[0] * 1_000_000)
    monkeypatch.setattr("agent.shim.time.monotonic_ns", lambda: now_ms[0] * 1_000_000)
    broker = FlakyBroker(tmp_path)
    logs = [broker.log(node) for node in SOURCES]
    rng = random.Random(1)
    for number in range(300):
        now_ms[0] += 100
        rng.choice(logs).write(f"line {number}\n".encode())
    broker.end("n1")
    monkeypatch.undo()
    entries = await all_of(view_of(broker, ViewQuery(tail=-1)))
    assert lines_of(entries) == [f"line {number}" for number in range(300)]
    entries = await all_of(view_of(broker, ViewQuery(tail=10)))
    assert lines_of(entries) == [f"line {number}" for number in range(290, 300)]
    again = {entry.cursor.rsplit("/", 2)[0]: entry.cursor for entry in entries if entry.cursor}
    for entry in entries:
        if entry.line == "line 294":
            break
        if entry.cursor:
            again[entry.cursor.rsplit("/", 2)[0]] = entry.cursor
    begun = [entry for entry in entries[: entries.index(entry)] if entry.cursor]
    cursors = {entry.cursor.rsplit("/", 2)[0]: entry.cursor for entry in begun}
    resumed = await all_of(view_of(broker, ViewQuery(tail=10, cursors=parse_cursors(",".join(cursors.values())))))
    assert lines_of(resumed) == [f"line {number}" for number in range(294, 300)]
    found = await all_of(view_of(broker, ViewQuery(tail=2, pattern="line 10")))
    assert lines_of(found) == ["line 108", "line 109"]


async def test_a_node_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other logs are read, with a note; alone it is an error; followed, it comes in once it is back."""
    monkeypatch.setattr(log_views, "AGAIN_S", 0.01)
    broker = FlakyBroker(tmp_path)
    for node in SOURCES:
        broker.log(node).write(f"of {node}\n".encode())
    broker.away = {"n2"}
    entries = await all_of(view_of(broker, ViewQuery(tail=-1)))
    assert sorted(lines_of(entries)) == ["of n1", "of n3"]
    assert [(entry.source, entry.note) for entry in entries if entry.note] == [
        ("replica:b-0", "node n2 is not connected")
    ]
    with pytest.raises(NodeUnreachable):
        await all_of(view_of(broker, ViewQuery(), [Log("replica:b-0", "n2", "replica:b-0")]))
    broker.away = set(SOURCES)
    with pytest.raises(NodeUnreachable):
        await all_of(view_of(broker, ViewQuery()))
    broker.away = {"n2"}
    got: list[str] = []
    async with aclosing(view_of(broker, ViewQuery(tail=-1, follow=True)).entries()) as batches:  # type: ignore[type-var]
        async with asyncio.timeout(20):
            async for batch in batches:
                got += lines_of(batch)
                if len(got) >= 2:
                    broker.away = set()
                if len(got) == 3:
                    break
    assert sorted(got) == ["of n1", "of n2", "of n3"]


async def test_a_view_ends_with_the_head(tmp_path: Path) -> None:
    """A stopping head ends followed views without saying that the log has ended."""
    broker = FlakyBroker(tmp_path)
    broker.log("n1").write(b"one\n")
    entries = view_of(broker, ViewQuery(follow=True), [Log("replica:a-0", "n1", "replica:a-0")]).entries()
    async with asyncio.timeout(20):
        got: list[str] = []
        while "one" not in got:
            got += lines_of(await anext(entries))
        broker.is_closing = True
        with pytest.raises(Unavailable):
            async for _ in entries:
                pass


async def test_a_slow_reader_holds_its_nodes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes nothing lets the view hold only so much; then it gets everything."""
    monkeypatch.setattr(limits, "LOG_LINES_PER_CHUNK", 10)
    broker = FlakyBroker(tmp_path)
    log = broker.log("n1")
    for number in range(30_000):
        log.write(f"{number}\n".encode())
    view = view_of(broker, ViewQuery(tail=-1), [Log("replica:a-0", "n1", "replica:a-0")])
    view._merge = type(view._merge)(held_max=100)
    entries = view.entries()
    first = await anext(entries)
    async with asyncio.timeout(20):
        while not (view._merge.holds("replica:a-0@n1") and not view._room.is_set()):  # noqa: ASYNC110 - a full view
            await asyncio.sleep(0.001)
    read = view._read["replica:a-0@n1"]
    for _ in range(1_000):
        await asyncio.sleep(0)
    assert view._read["replica:a-0@n1"] == read
    assert read.offset < 2_000
    rest = [entry async for batch in entries for entry in batch]
    assert lines_of([*first, *rest]) == [str(number) for number in range(30_000)]


async def test_collect(tmp_path: Path) -> None:
    """An engine's log of a span of time stands in a file, each line with its time; a view reads it as the log."""
    broker = FlakyBroker(tmp_path, breaks=0.3)
    log = broker.log("n1")
    for number in range(1_000):
        log.write(f"line {number}\n".encode())
    path = tmp_path / "kept" / "logs" / "a-0.log"
    done = await logs_collect.collect(
        cast(LogBroker, broker), "n1", "replica:a-0", since_ms=1, until_ms=time.time_ns() // 1_000_000, path=path
    )
    assert (done.lines, done.is_cut, done.lost_bytes) == (1_000, False, 0)
    text = path.read_text().splitlines()
    assert [line[25:] for line in text] == [f"line {number}" for number in range(1_000)]
    assert text[0][:2] == "20"
    assert [entry.name for entry in path.parent.iterdir()] == ["a-0.log"]
    kept = kept_of(tmp_path / "kept")
    assert kept == {"replica:a-0": path}
    entries = await all_of(view_of(broker, ViewQuery(tail=-1), [Log("replica:a-0", "", place=path)]))
    assert lines_of(entries) == [f"line {number}" for number in range(1_000)]
    assert entries[1].time_ms or entries[2].time_ms
    cut = await logs_collect.collect(
        cast(LogBroker, broker), "n1", "replica:a-0", since_ms=0, until_ms=0, path=path, max_bytes=10_000
    )
    assert cut.is_cut
    assert path.stat().st_size < 10_100
    broker.away = {"n1"}
    with pytest.raises(HerderError):
        await logs_collect.collect(cast(LogBroker, broker), "n1", "replica:a-0", since_ms=0, until_ms=0, path=path)
    assert path.stat().st_size < 10_100, "what was there stays"


# which logs
def replica(id: str, node: str) -> Replica:
    """A replica of the service its id begins with."""
    service = id.rpartition("-")[0]
    return Replica(id, service, 0, "m", "main", node, f"{node}:gpu0", 1, "running", "ready", "c", 1)


@pytest.fixture
def state() -> State:
    """Two services on two nodes, a job and a benchmark."""
    made = State()
    for node in ("n1", "n2"):
        made.nodes[node] = Node(node, "b", "a", "1", Inventory("h"), 1, "online", 1, 1)
    for id, node in (("chat-0", "n1"), ("chat-1", "n2"), ("chat-2", ""), ("other-0", "n1")):
        made.replicas[id] = replica(id, node)
        made.replicas_by_service[made.replicas[id].service][id] = None
        made.replicas_by_model["m"][id] = None
        made.replicas_by_node[node][id] = None
    for name in ("chat", "other"):
        made.services[name] = Service(name, "m", "main", "r", 1, 1, "h", 1, "c")
    step = Step("s", "serve", target="service:chat")
    made.jobs["job-1"] = Job("job-1", "serve", "me", "completed", 5, (step,), started_ms=10, ended_ms=20)
    made.runs["bench-1.0.0"] = Run("bench-1.0.0", "bench-1", "n2", "load", 1, "armed", "armed", "c", 1)
    made.runs_by_benchmark["bench-1"]["bench-1.0.0"] = None
    made.runs_by_node["n2"]["bench-1.0.0"] = None
    made.benchmarks["bench-1"] = Benchmark(
        "bench-1", "b", {}, "h", "me", "running", 7, 1, "c", service="chat", started_ms=9
    )
    return made


def names(state: State, *, is_operator: bool = True, kept: dict[str, Path] | None = None, **wish: str) -> list[str]:
    """What a wish is made of."""
    found = choose(state, Wish(**wish), is_operator=is_operator, own=Path("own"), kept=kept or {})
    return [log.name for log in found]


def test_names(state: State) -> None:
    """Everything that has a log is found by its kind and by its name alone."""
    chat = ["replica:chat-0@n1", "replica:chat-1@n2"]
    assert names(state, service="chat") == names(state, target="chat") == names(state, job="job-1") == chat
    assert names(state, target="m") == [*chat, "replica:other-0@n1"]
    assert names(state, replica="chat-1") == names(state, target="replica:chat-1") == [chat[1]]
    assert names(state, replica="gone-0", node="n2") == ["replica:gone-0@n2"]
    assert names(state, run="bench-1.0.0") == names(state, target="run:bench-1.0.0") == ["run:bench-1.0.0@n2"]
    assert names(state, benchmark="bench-1") == ["run:bench-1.0.0@n2", *chat]
    assert names(state, node="n2") == [chat[1], "run:bench-1.0.0@n2", "agent:n2@n2"]
    assert names(state, node="n2", is_operator=False) == [chat[1], "run:bench-1.0.0@n2"]
    assert names(state, target="head") == ["head@"]
    assert names(state, source="slurm:n1/12_3") == ["slurm:n1/12_3@n1"]
    assert names(state, service="chat", source="agent:n1") == ["agent:n1@n1", *chat]
    kept = {"run:bench-1.0.0": Path("x"), "replica:chat-0": Path("y")}
    assert names(state, benchmark="bench-1", kept=kept) == ["run:bench-1.0.0@", "replica:chat-0@"]


def test_spans_of_jobs_and_benchmarks(state: State) -> None:
    """Engines of a job or benchmark are read for as long as it lasted."""
    job = choose(state, Wish(job="job-1"), is_operator=True, own=Path("own"), kept={})
    assert {(log.since_ms, log.until_ms) for log in job} == {(10, 60_020)}
    benchmark = choose(state, Wish(benchmark="bench-1"), is_operator=True, own=Path("own"), kept={})
    assert [(log.since_ms, log.until_ms) for log in benchmark] == [(0, 0), (9, 0), (9, 0)]


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        ({}, InvalidValue),
        ({"target": "nothing"}, NotFound),
        ({"service": "nothing"}, NotFound),
        ({"replica": "chat-2"}, NotFound),
        ({"replica": "chat-0", "node": "n9"}, NotFound),
        ({"run": "x"}, NotFound),
        ({"benchmark": "x"}, NotFound),
        ({"job": "x"}, NotFound),
        ({"node": "x"}, NotFound),
        ({"source": "slurm:n1"}, InvalidValue),
        ({"source": "slurm:n1/../x"}, InvalidValue),
        ({"source": "file:/etc/passwd"}, InvalidValue),
    ],
)
def test_what_is_refused(state: State, wish: dict[str, str], error: type[HerderError]) -> None:
    """What is not there, and what names no log, is refused with its code."""
    with pytest.raises(error):
        choose(state, Wish(**wish), is_operator=True, own=Path("own"), kept={})


@pytest.mark.parametrize("source", ["head", "agent:n1", "slurm:n1/1"])
def test_daemons_are_for_operators(state: State, source: str) -> None:
    """Viewers read engines and runs only."""
    with pytest.raises(Forbidden):
        names(state, source=source, is_operator=False)


def test_views_have_a_limit(state: State) -> None:
    """More logs than one view merges are refused with a hint."""
    for number in range(limits.LOG_SOURCES + 1):
        id = f"big-{number}"
        state.replicas[id] = replica(id, "n1")
        state.replicas_by_service["big"][id] = None
    state.services["big"] = Service("big", "m", "main", "r", 1, 1, "h", 1, "c")
    with pytest.raises(TooMany):
        names(state, service="big")


@pytest.mark.parametrize("text", ["x", "x/1", "/1/2", "x/1/-2", "x/1/²", "x/1/99999999999999999999"])
def test_cursors_that_are_none(text: str) -> None:
    """What is no cursor is refused."""
    with pytest.raises(InvalidValue):
        parse_cursors(text)


def test_text() -> None:
    """Partial lines go on where they were; notes stand on their own; with many logs each line has its source."""
    entries = [
        LogEntry(source="replica:a-0", node="n1", time_ms=0, line="one"),
        LogEntry(source="replica:a-0", node="n1", line="ha", is_partial=True),
        LogEntry(source="replica:a-0", node="n1", line="lf"),
        LogEntry(source="replica:a-0", node="n1", line="cut", is_partial=True),
        LogEntry(source="replica:a-0", node="n1", note="5 bytes are gone"),
        LogEntry(source="replica:a-0", node="n1", cursor="x/1/2"),
    ]
    plain = LogText(is_many=False, has_times=False).render(entries).decode()
    assert plain == "one\nhalf\ncut\n[herder: replica:a-0: 5 bytes are gone]\n"
    many = LogText(is_many=True, has_times=True).render(entries[:1]).decode()
    assert many == "1970-01-01T00:00:00.000Z replica:a-0@n1 | one\n"
    assert json.loads(json.dumps(many))
