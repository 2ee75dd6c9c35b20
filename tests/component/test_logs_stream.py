"""Logs at their node: requests answered from files, searched by processes, daemons' own logs, what is kept."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import shim
from agent.log_retention import Kept, Retention, to_remove
from agent.log_sources import LogSources
from agent.logs import LogService
from agent.run_files import RunFiles
from common import limits, wire
from common.errors import InvalidValue, TooMany
from common.logs import match
from common.logs.files import segments
from common.logs.lines import Line, LineReader
from common.logs.match import Regex
from common.logs.own import OwnLog, Segments
from common.tasks import Supervisor
from common.telemetry import fields

WAIT_S = 20.0


async def until(condition: Callable[[], object], what: str) -> None:
    """Waits for a condition."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)


class Node:
    """A state directory with runs, and the service that answers from it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = RunFiles(root / "replicas")
        self.chunks: list[wire.LogChunk] = []
        self.tasks = Supervisor("node")
        self.sources = LogSources(self.files, root / "runs", root / "logs", (str(root / "slurm"),))
        self.logs = LogService(self.tasks, self.files.find, self._send, self.sources.find)

    async def _send(self, chunk: wire.LogChunk) -> None:
        self.chunks.append(chunk)

    def run(self, number: int, replica: str = "chat-0") -> shim.Log:
        """The log of a run, as its shim writes it."""
        folder = self.files.directory(replica, number)
        folder.mkdir(parents=True, exist_ok=True)
        return shim.Log(str(folder), limits.LOG_BYTES_PER_REPLICA)

    def end(self, number: int, replica: str = "chat-0") -> None:
        """The run has ended."""
        (self.files.directory(replica, number) / "exit.json").write_text("{}")

    def ask(self, id: str, **asked: object) -> None:
        """A request for lines."""
        values: dict[str, object] = {"source": "replica:chat-0", "run": -1, "tail_lines": -1, "credit": 1_000, **asked}
        self.logs.received(wire.LogRequest(id, "", **values))  # type: ignore[arg-type]

    def of(self, id: str) -> list[wire.LogChunk]:
        """The chunks of a request."""
        return [chunk for chunk in self.chunks if chunk.request_id == id]

    def lines(self, id: str) -> list[str]:
        """The lines of a request."""
        return [line.text for chunk in self.of(id) for line in chunk.lines]

    async def read(self, id: str, **asked: object) -> list[str]:
        """All lines of a request that ends. Raises: what it is refused with."""
        self.ask(id, **asked)
        await until(lambda: [chunk for chunk in self.of(id) if chunk.is_last], f"the end of {id}")
        error = self.of(id)[-1].error
        if error is not None:
            raise AssertionError(error.code)
        return self.lines(id)


@asynccontextmanager
async def node_at(root: Path) -> AsyncIterator[Node]:
    """A node; its tasks end with it."""
    node = Node(root)
    try:
        yield node
    finally:
        await node.tasks.close()


async def test_runs_one_after_the_other(tmp_path: Path) -> None:
    """All kept runs in order, one of them, the last lines over several, and from a cursor on."""
    async with node_at(tmp_path) as node:
        for number in (3, 4, 5):
            log = node.run(number)
            log.write(f"{number}a\n{number}b\n{number}c".encode())
            if number < 5:
                node.end(number)
        assert await node.read("all") == ["3a", "3b", "3c", "4a", "4b", "4c", "5a", "5b", "5c"]
        assert await node.read("present", run=0) == ["5a", "5b", "5c"]
        assert await node.read("before", run=1) == ["4a", "4b", "4c"]
        assert await node.read("tail", tail_lines=5) == ["4b", "4c", "5a", "5b", "5c"]
        assert await node.read("resumed", run_number=4, offset=3) == ["4b", "4c", "5a", "5b", "5c"]
        with pytest.raises(AssertionError, match="not_found"):
            await node.read("none", run=7)
        with pytest.raises(AssertionError, match="not_found"):
            await node.read("nobody", source="replica:nobody")


async def test_who_does_not_follow_sees_what_was_there(tmp_path: Path) -> None:
    """A log that is written faster than it is read ends, for who does not follow it, where it ended when they came."""
    async with node_at(tmp_path) as node:
        log = node.run(1)
        for number in range(5_000):
            log.write(f"line {number}\n".encode())
        log.write(b"half")
        answers = [("all", -1), ("tail", 3), ("last", 1)]
        for id, tail in answers:
            node.ask(id, tail_lines=tail, credit=1)
        await until(lambda: all(node.of(id) for id, _ in answers), "the beginnings")
        log.write(b" and half\nlater\nand later\n")
        for id, _ in answers:
            node.logs.received(wire.LogRequest(id, "", credit=30))
        await until(lambda: all(node.of(id)[-1].is_last for id, _ in answers), "the ends")
        before = [f"line {number}" for number in range(5_000)]
        assert node.lines("all") in ([*before, "half"], [*before, "half and half"])
        assert node.lines("tail")[:2] == ["line 4998", "line 4999"]
        assert len(node.lines("tail")) == 3
        assert len(node.lines("last")) == 1
        end = node.of("all")[-1]
        rest = await node.read("rest", run_number=end.run, offset=end.offset)
        assert "".join([*node.lines("all")[5_000:], *rest]) == "half and halflaterand later"


async def test_a_removed_run_is_lost_aloud(tmp_path: Path) -> None:
    """Whoever comes back to a run that is gone is told so, and goes on with the next one."""
    async with node_at(tmp_path) as node:
        node.run(7).write(b"one\n")
        assert await node.read("back", run_number=5, offset=100) == ["one"]
        assert [chunk.lost_bytes for chunk in node.of("back") if chunk.lost_bytes] == [-1]


async def test_following_goes_on_with_the_next_run(tmp_path: Path) -> None:
    """A follower sees the end of a run, unfinished lines once nothing follows, the next run, and the end of it all."""
    async with node_at(tmp_path) as node:
        log = node.run(1)
        log.write(b"one\nhalf")
        node.ask("f", follow=True)
        await until(lambda: node.lines("f") == ["one", "half"], "the unfinished line")
        assert not node.of("f")[-1].lines[-1].is_whole
        log.write(b" whole\n")
        await until(lambda: node.lines("f")[2:] == [" whole"], "its rest")
        node.end(1)
        node.run(2).write(b"two\n")
        await until(lambda: node.lines("f")[3:] == ["two"], "the next run")
        assert sum(chunk.is_caught_up for chunk in node.of("f")) == 1
        node.end(2)
        node.files.forget("chat-0")
        await until(lambda: node.of("f")[-1].is_last, "the end")
        assert [chunk.run for chunk in node.of("f") if chunk.lines] == [1, 1, 1, 2]


async def test_search_and_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines by text, by expression and by the time at which they came; the last of those that match."""
    now_ms = [1_000_000]
    monkeypatch.setattr("agent.shim.time.monotonic_ns", lambda: now_ms[0] * 1_000_000)
    monkeypatch.setattr("agent.shim.time.time_ns", lambda: now_ms[0] * 1_000_000)
    async with node_at(tmp_path) as node:
        log = node.run(1)
        for number in range(50):
            now_ms[0] = 1_000_000 + 1_000 * number
            log.write(f"Line {number}\n".encode())
        assert await node.read("text", pattern="Line 4") == ["Line 4", *(f"Line {n}" for n in range(40, 50))]
        assert await node.read("case", pattern="lInE 49", ignore_case=True) == ["Line 49"]
        assert await node.read("none", pattern="line 49") == []
        assert await node.read("regex", pattern=r"^Line (7|1[01])$", is_regex=True) == ["Line 7", "Line 10", "Line 11"]
        assert await node.read("last", pattern="Line", tail_lines=2) == ["Line 48", "Line 49"]
        part = {"since_ms": 1_010_000, "until_ms": 1_012_000}
        assert await node.read("part", **part) == ["Line 10", "Line 11", "Line 12"]
        assert await node.read("both", **part, pattern="2") == ["Line 12"]
        assert await node.read("later", since_ms=9_000_000) == []
        with pytest.raises(AssertionError, match="invalid_value"):
            await node.read("broken", pattern="(", is_regex=True)


async def test_a_hostile_expression_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(a+)+$ would look for hours: its process ends, the answer is an error, and the loop has turned all the while."""
    search = Regex("(a+)+$", ignore_case=False, limit_s=0.3)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    turning = asyncio.ensure_future(turn())
    with pytest.raises(InvalidValue, match="needs more than"):
        await search.choose([Line(0, 50, 0, "a" * 48 + "!")])
    turning.cancel()
    assert turns > 5
    await search.close()
    assert not match._running
    monkeypatch.setattr(limits, "LOG_REGEX_S", 0.3)
    async with node_at(tmp_path) as node:
        node.run(1).write(b"a" * 48 + b"!\n")
        with pytest.raises(AssertionError, match="invalid_value"):
            await node.read("hostile", pattern="(a+)+$", is_regex=True)
        assert await node.read("plain", pattern="(a+)+$") == []


async def test_searches_by_expression_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many processes search at the same time, and one that ends makes room."""
    monkeypatch.setattr(limits, "LOG_REGEX_PROCESSES", 1)
    first, second = Regex("x", ignore_case=False), Regex("x", ignore_case=False)
    line = Line(0, 2, 0, "x")
    assert await first.choose([line]) == [line]
    with pytest.raises(TooMany):
        await second.choose([line])
    await first.close()
    assert await second.choose([line, Line(2, 4, 0, "y")]) == [line]
    await second.close()


async def test_credit(tmp_path: Path) -> None:
    """Without credit nothing more is sent, and nothing is lost of what waits."""
    async with node_at(tmp_path) as node:
        log = node.run(1)
        for number in range(20_000):
            log.write(f"line {number}\n".encode())
        node.end(1)
        node.ask("slow", credit=2)
        await until(lambda: len(node.of("slow")) == 2, "what credit allows")
        node.ask("other", tail_lines=1)
        await until(lambda: node.lines("other") == ["line 19999"], "the other reader")
        assert len(node.of("slow")) == 2
        while not node.of("slow")[-1].is_last:
            had = len(node.of("slow"))
            node.logs.received(wire.LogRequest("slow", "", credit=1))
            await until(lambda: len(node.of("slow")) > had, "one more")  # noqa: B023
        assert node.lines("slow") == [f"line {number}" for number in range(20_000)]
        assert len(node.logs) == 0
        node.logs.received(wire.LogRequest("slow", "", credit=4))  # late credit begins nothing
        assert len(node.logs) == 0


async def test_sources(tmp_path: Path) -> None:
    """Runs of benchmarks, Slurm's files below the roots only, and names that are paths are refused."""
    async with node_at(tmp_path) as node:
        run = tmp_path / "runs" / "bench-1.0.0"
        run.mkdir(parents=True)
        (run / "generator.log").write_text("armed\n")
        (run / "status.json").write_text('{"state":"running"}')
        assert await node.read("run", source="run:bench-1.0.0") == ["armed"]
        node.ask("follow", source="run:bench-1.0.0", follow=True)
        await until(lambda: node.lines("follow") == ["armed"], "its line")
        (run / "generator.log").write_text("armed\ndone\n")
        (run / "status.json").write_text('{"state":"ended"}')
        await until(lambda: node.of("follow")[-1].is_last, "the run's end")
        assert node.lines("follow") == ["armed", "done"]
        jobs = tmp_path / "slurm" / "a" / "b"
        jobs.mkdir(parents=True)
        (jobs / "slurm-12_3.out").write_text("task 3\n")
        (tmp_path / "secret").write_text("secret\n")
        (jobs / "slurm-13.out").symlink_to(tmp_path / "secret")
        os.mkfifo(jobs / "slurm-14.out")
        assert await node.read("slurm", source="slurm:12_3") == ["task 3"]
        for id, source, code in (
            ("link", "slurm:13", "not_found"),
            ("pipe", "slurm:14", "not_found"),
            ("gone", "slurm:15", "not_found"),
            ("glob", "slurm:*", "invalid_value"),
            ("path", "run:../../secret", "invalid_value"),
            ("dots", "replica:..", "invalid_value"),
            ("kind", "file:/etc/passwd", "invalid_value"),
            ("head", "head", "invalid_value"),
        ):
            with pytest.raises(AssertionError, match=code):
                await node.read(id, source=source)


# daemons' own logs
def own_lines(folder: Path) -> list[Line]:
    """What a daemon's log holds."""
    reader, lines = LineReader(folder), []
    while more := reader.read():
        lines += more
    return lines


def test_own_log(tmp_path: Path) -> None:
    """What a daemon logs stands in 0600 files as JSON lines with their times, without tokens, over restarts."""
    token = "hdr_admin_key-1_" + "s" * 40
    for start in range(2):
        own = OwnLog.start(tmp_path, bytes_max=65_536, age_max_s=1e6)
        logger = logging.getLogger("tests.own")
        logger.warning("start %s with %s", start, token, extra=fields(authorization=f"Bearer {token}", node="n1"))
        own.close()
    lines = own_lines(tmp_path / "logs")
    said = [json.loads(line.text) for line in lines]
    assert [line["message"] for line in said] == [f"start {n} with hdr_admin_key-1_..." for n in range(2)]
    assert said[0]["node"] == "n1"
    assert "ssss" not in "".join(line.text for line in lines)
    assert all(abs(line.at_ms - time.time() * 1000) < 60_000 for line in lines)
    for path in (tmp_path / "logs").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_own_log_is_bounded(tmp_path: Path) -> None:
    """By size and by age whole segments go; the present one stays, and offsets never change."""
    files = Segments(tmp_path, bytes_max=65_536, age_max_s=1_000)
    files.open()
    for number in range(5_000):
        files.write(f"line {number} {'x' * 60}\n".encode())
    assert sum(path.stat().st_size for _, path in segments(tmp_path)) <= 65_536
    assert own_lines(tmp_path)[-1].text.startswith("line 4999 ")
    for _, path in segments(tmp_path):
        os.utime(path, (1, 1))
    files.sweep()
    assert len(segments(tmp_path)) == 1
    files.close()
    with segments(tmp_path)[0][1].open("ab") as file:
        file.write(b"cut off by a cra")
    again = Segments(tmp_path, bytes_max=65_536, age_max_s=1_000)
    again.open()
    again.write(b"after it\n")
    again.close()
    assert [line.text for line in own_lines(tmp_path)][-2:] == ["cut off by a cra", "after it"]


# retention
def test_old_runs_go_first() -> None:
    """By age, then by size from the oldest on; nothing that is newer goes before something older."""
    runs = [Kept(Path(str(number)), 10, float(number)) for number in range(10)]
    gone = to_remove(runs, bytes_max=45, age_max_s=7.5, now_s=10.0)
    assert sorted(int(run.path.name) for run in gone) == [0, 1, 2, 3, 4, 5]
    uneven = [Kept(Path("old"), 1, 1.0), Kept(Path("big"), 100, 2.0), Kept(Path("new"), 1, 3.0)]
    assert [run.path.name for run in to_remove(uneven, bytes_max=50, age_max_s=1e9, now_s=4.0)] == ["big", "old"]


async def test_the_present_run_is_never_swept(tmp_path: Path) -> None:
    """Only ended runs go: of forgotten replicas all, of others what is not the last; and runs that nobody holds."""
    node = Node(tmp_path)
    for number in (1, 2):
        node.run(number).write(b"x\n")
        node.end(number)
        node.run(number, "gone-0").write(b"x\n")
    node.end(1, "gone-0")
    node.end(2, "gone-0")
    node.files.forget("gone-0")
    node.run(1, "busy-0").write(b"x\n")
    (node.files.directory("busy-0", 1) / "pid.json").write_text("{}")
    node.files.forget("busy-0")
    for run in ("held", "left"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "generator.log").write_text("x\n")
    retention = Retention(node.files, tmp_path / "runs", bytes_max=0, age_max_s=1e9, held_runs=lambda: {"held"})
    gone = {str(run.path.relative_to(tmp_path)) for run in retention.sweep({"held"})}
    assert gone == {"replicas/chat-0/1", "replicas/gone-0/1", "replicas/gone-0/2", "runs/left"}
    assert not (tmp_path / "replicas" / "gone-0").exists()
    assert (tmp_path / "replicas" / "busy-0" / "1").exists()
    assert node.files.runs("chat-0") == [2]
    assert retention.sweep({"held"}) == []
    await node.tasks.close()
