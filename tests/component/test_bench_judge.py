"""Judging in real processes: reports from parts, limits of time and memory, deaths that cost one point only."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.bench.outcome import decode, encode
from common.bench.recipe import convert, sha256_of
from common.clock import ManualClock
from common.errors import ErrorInfo, HerderError, InvalidRecipe, MemoryFull, NotFound, TimedOut
from common.wire import Inventory
from head.bench.judge import Judges
from head.bench.performer import Performer
from head.bench.questions import Check, Export, Judge, Judged, PartFile, Write
from head.bench.store import Store
from head.core.effects import JudgePoint, RemoveBenchmark, WriteBenchmark
from head.core.events import BenchmarkWritten, Event, PointJudged
from head.core.objects import Benchmark, Meta, Node, Part, Point
from head.core.state import State
from head.core.turn import Turn
from head.driver import Driver
from head.feed import Feed
from head.sessions import Sessions
from tests.doubles.api_head import run, until
from tests.doubles.bench_parts import asked_of, parts_of
from tests.doubles.head_shell import NOW_MS, FakeIds, SwitchJournal

RECIPE = convert(
    {
        "name": "b",
        "server": {"urls": ["http://me:secret@h:1"]},
        "load": {"rate": 100, "duration": "4s"},
        "monitor": {"enabled": False},
    }
)


def question(folder: Path, *, parts: int = 3, lost: tuple[int, ...] = (), **changes: Any) -> Judge:
    """A point whose load nodes sent what they did, but for those that are lost."""
    asked = asked_of(400)
    files = []
    for part, outcome in enumerate(parts_of(asked, parts)):
        path = folder / f"part-{part}.bin"
        path.write_bytes(encode(asked, outcome))
        kept = "" if part in lost else str(path)
        error = ErrorInfo("node_unreachable", "it is gone") if part in lost else None
        files.append(PartFile(part, f"n{part}", f"bench-1.0.{part}", kept, "lost" if error else "done", error))
    return Judge(str(folder / "point"), tuple(files), **changes)


def test_a_point_is_judged(tmp_path: Path) -> None:
    """The report and the merged run are on the disk, the figures come back."""

    async def test() -> None:
        judged = await Judges().ask(question(tmp_path, about={"recipe_sha256": "x"}), Judged)
        report = json.loads((tmp_path / "point" / "report.json").read_bytes())
        assert (judged.is_valid, judged.reasons) == (True, ())
        assert report["recipe_sha256"] == "x"
        assert report["counts"]["sent"] == 400
        assert judged.figures["req_s"] == report["throughput"]["req_s"]
        asked, outcome = decode((tmp_path / "point" / "load.bin").read_bytes())
        assert (len(asked.due_ns), len(outcome.records)) == (400, 400)

    run(test)


def test_a_lost_part_is_said(tmp_path: Path) -> None:
    """Degraded, with its node and the error of its run."""

    async def test() -> None:
        judged = await Judges().ask(question(tmp_path, lost=(1,), skew_ms=9.0), Judged)
        assert {"degraded", "clock_skew_between_nodes"} <= set(judged.reasons)
        assert any("1 of 3 parts are missing" in sentence for sentence in judged.said)
        report = json.loads((tmp_path / "point" / "report.json").read_bytes())
        assert report["coverage"]["missing"] == [{"part": 1, "node": "n1", "run": "bench-1.0.1", "why": "it is gone"}]
        assert judged.figures["coverage"] == pytest.approx(267 / 400)

    run(test)


def test_what_servers_answered_is_said(tmp_path: Path) -> None:
    """Beside the reasons: how many failed, and the first words that came with them."""

    async def test() -> None:
        asked = asked_of(400)
        (outcome,) = parts_of(asked, 1, failing=1.0)
        outcome.records.errors["http_5xx"] = ["501 start it with --embeddings", "another"]
        path = tmp_path / "part.bin"
        path.write_bytes(encode(asked, outcome))
        part = PartFile(0, "n1", "bench-1.0.0", str(path), "done", None)
        judged = await Judges().ask(Judge(str(tmp_path / "point"), (part,)), Judged)
        assert "no_success" in judged.reasons
        assert judged.said[-1] == "400 x http_5xx: 501 start it with --embeddings"

    run(test)


def test_nothing_came(tmp_path: Path) -> None:
    """An error of the point, and no report."""

    async def test() -> None:
        with pytest.raises(NotFound, match="it is gone"):
            await Judges().ask(question(tmp_path, parts=2, lost=(0, 1)), Judged)
        assert not (tmp_path / "point").exists()

    run(test)


@pytest.mark.parametrize("format_", ["csv", "vllm", "genai-bench"])
def test_other_formats_are_made_of_the_merged_rows(tmp_path: Path, format_: str) -> None:
    """Every request of every load node is in them."""

    async def test() -> None:
        judges = Judges()
        await judges.ask(question(tmp_path), Judged)
        point, target = tmp_path / "point", tmp_path / "out"
        export = Export(str(point / "load.bin"), str(point / "report.json"), str(target), format_)
        size = await judges.ask(export, int)
        made = target.read_bytes()
        assert len(made) == size
        if format_ == "vllm":
            assert len(json.loads(made)["ttfts"]) == 400
        elif format_ == "genai-bench":
            assert len(json.loads(made)["individual_request_metrics"]) == 400
        else:
            assert made.startswith(b"metric,unit,count")

    run(test)


def test_a_recipe_is_checked(tmp_path: Path) -> None:
    """Times come back as numbers; what is wrong is said with its place."""

    async def test() -> None:
        document = {"name": "x", "server": {"urls": ["http://h:1"]}, "load": {"rate": 5, "duration": "2m"}}
        plain = await Judges().ask(Check(document), dict)
        assert plain["load"]["duration"] == 120.0
        with pytest.raises(InvalidRecipe, match="`rat`"):
            await Judges().ask(Check(document | {"load": {"rat": 5}}), dict)

    run(test)


def test_memory_is_limited(tmp_path: Path) -> None:
    """A file that needs more than the child may have is the failure of its point."""

    async def test() -> None:
        big = tmp_path / "big.bin"
        with big.open("wb") as file:
            file.truncate(600 << 20)
        asked = Judge(str(tmp_path / "point"), (PartFile(0, "n0", "r", str(big)),))
        with pytest.raises(MemoryFull):
            await Judges(memory_bytes=400 << 20).ask(asked, Judged)

    run(test)


def test_time_is_limited_and_nothing_stays(tmp_path: Path) -> None:
    """A child that takes too long is killed; the next question is answered."""

    async def test() -> None:
        judges = Judges()
        with pytest.raises(TimedOut):
            await judges.ask(question(tmp_path), Judged, timeout_s=0.001)
        assert (await judges.ask(question(tmp_path), Judged)).is_valid

    run(test)


def test_a_child_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kills it: an error with a code, for whoever asked."""

    async def test() -> None:
        for body, error in (("import os; os.kill(os.getpid(), 9)", "memory_full"), ("raise SystemExit(3)", "internal"),
                            ("print('hm')", "internal")):  # fmt: skip
            script = tmp_path / "child"
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{body}"\n')
            script.chmod(0o700)
            monkeypatch.setattr(sys, "executable", str(script))
            with pytest.raises(HerderError) as caught:
                await Judges().ask(Check({}), dict)
            assert caught.value.code == error
            monkeypatch.undo()

    run(test)


def children() -> list[str]:
    """The judging children of this process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()) and b"judge_child" in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_a_caller_that_leaves_takes_the_child_along(tmp_path: Path) -> None:
    """Cancelled while it is judged: the child is gone when the cancellation is done."""

    async def test() -> None:
        judges = Judges()
        task = asyncio.create_task(judges.ask(question(tmp_path), Judged))
        await until(lambda: bool(children()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == []
        assert judges.waiting == 0

    run(test)


class Core:
    """A driver that keeps what the performer posts, over a state that a test fills."""

    def __init__(self, folder: Path) -> None:
        self.events: list[Event] = []
        self.state = State()
        self.state.meta["cluster"] = Meta("c", 1, NOW_MS)
        self.driver = Driver(self.state, SwitchJournal(), ManualClock(NOW_MS), Feed(), step=self._step)
        self.sessions = Sessions(self.driver, ManualClock(NOW_MS), FakeIds())
        self.store = Store(folder)
        self.performer = Performer(self.driver, self.sessions, self.store)
        self.driver.performer = self.performer

    def _step(self, state: State, event: Event, now_ms: int) -> Turn:
        self.events.append(event)
        return Turn(state, now_ms, "test")

    async def __aenter__(self) -> Core:
        await self.performer.start()
        self.driver.start(self.sessions, with_ticks=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.performer.close()
        await self.driver.stop()

    def benchmark(self, *, parts: int = 2, lost: tuple[int, ...] = (), **changes: Any) -> Benchmark:
        """A benchmark whose first point waits to be judged, its files as its agents sent them."""
        inventory = Inventory(hostname="n0")
        self.state.nodes["n0"] = Node("n0", "b", "a", "1", inventory, 1, "online", 1, 1)
        asked, kept = asked_of(400), []
        for part, outcome in enumerate(parts_of(asked, parts)):
            name = f"bench-1.0.{part}"
            if part in lost:
                kept.append(Part(name, f"n{part}", "lost", (), ErrorInfo("node_unreachable", "gone")))
                continue
            self.store.write(self.store.run("bench-1", name) / "load.bin", encode(asked, outcome))
            kept.append(Part(name, f"n{part}", "done", ("load.bin",)))
        values: dict[str, Any] = {"facts": {"head": "1.0"}} | changes
        made = Benchmark("bench-1", "b", msgspec.to_builtins(RECIPE), sha256_of(RECIPE), "me", "running", 1, 5, "c",
                         planned=1, **values)  # fmt: skip
        point = Point("bench-1", 0, {"rate": 100}, state="judging", parts=tuple(kept), seed=3)
        self.state.benchmarks[made.id], self.state.points[point.key] = made, point
        self.state.points_by_benchmark["bench-1"][point.key] = None
        return made

    async def answer(self, kind: type[Event]) -> Any:
        """The first event of a kind."""
        await until(lambda: any(isinstance(event, kind) for event in self.events), 60)
        return next(event for event in self.events if isinstance(event, kind))


class TestPerformer:
    """What the core asks for is done and answered."""

    def test_a_point_is_judged_once(self, tmp_path: Path) -> None:
        """Asked twice while it is on its way, it is answered once, with what the report says."""

        async def test() -> None:
            async with Core(tmp_path) as core:
                core.benchmark(lost=(1,))
                for _ in range(2):
                    core.performer.perform(JudgePoint("bench-1", 5, 0))
                event = await core.answer(PointJudged)
                assert (event.benchmark, event.generation, event.point, event.is_valid) == ("bench-1", 5, 0, False)
                assert "degraded" in event.reasons
                assert event.figures["coverage"] == 0.5
                report = json.loads((core.store.point("bench-1", 0) / "report.json").read_bytes())
                assert report["point"]["seed"] == 3
                assert report["facts"] == {"head": "1.0"}
                assert report["recipe"]["server"]["urls"] == ["http://me:***@h:1"]
                await until(lambda: not core.performer.busy)
                assert sum(isinstance(event, PointJudged) for event in core.events) == 1

        run(test)

    def test_a_point_that_cannot_be_judged_is_answered(self, tmp_path: Path) -> None:
        """No part came, or there is no such point: an error, never silence."""

        async def test() -> None:
            async with Core(tmp_path) as core:
                core.benchmark(lost=(0, 1))
                core.performer.perform(JudgePoint("bench-1", 5, 0))
                event = await core.answer(PointJudged)
                assert event.error.code == "not_found"
                core.events.clear()
                core.performer.perform(JudgePoint("bench-9", 5, 0))
                assert (await core.answer(PointJudged)).error.code == "internal"

        run(test)

    def test_the_whole_is_written(self, tmp_path: Path) -> None:
        """benchmark.json as it will be at the end, the table, and the page, which shows the points."""

        async def test() -> None:
            async with Core(tmp_path) as core:
                made = core.benchmark()
                core.performer.perform(JudgePoint("bench-1", 5, 0))
                event = await core.answer(PointJudged)
                core.state.benchmarks["bench-1"] = msgspec.structs.replace(made, state="finishing")
                point = core.state.points["bench-1.0"]
                done = msgspec.structs.replace(point, state="completed", is_valid=True, figures=event.figures)
                core.state.points["bench-1.0"] = done
                core.performer.perform(WriteBenchmark("bench-1", 5))
                assert (await core.answer(BenchmarkWritten)).error is None
                folder = core.store.folder("bench-1")
                kept = json.loads((folder / "benchmark.json").read_bytes())
                assert (kept["status"], kept["is_valid"]) == ("completed", True)
                assert (folder / "summary.csv").read_text().count("\n") == 2
                assert "<html" in (folder / "report.html").read_text()

        run(test)

    def test_a_full_disk_is_the_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A report that does not fit is an error of the benchmark, with its code."""

        async def test() -> None:
            async with Core(tmp_path) as core:
                core.benchmark()

                def full(path: Path, data: bytes) -> None:
                    from common.errors import DiskFull

                    raise DiskFull("full")

                monkeypatch.setattr(core.store, "write", full)
                core.performer.perform(WriteBenchmark("bench-1", 5))
                assert (await core.answer(BenchmarkWritten)).error.code == "disk_full"

        run(test)

    def test_removal_ends_what_is_on_its_way(self, tmp_path: Path) -> None:
        """A point that is being judged is given up, and no file appears after the removal."""

        async def test() -> None:
            async with Core(tmp_path) as core:
                core.benchmark()
                core.performer.perform(JudgePoint("bench-1", 5, 0))
                core.performer.perform(RemoveBenchmark("bench-1"))
                await until(lambda: not core.performer.busy)
                assert not core.store.folder("bench-1").exists()
                assert core.events == []

        run(test)

    def test_leftovers_go_at_the_start(self, tmp_path: Path) -> None:
        """Folders that no benchmark of the journal owns."""
        stray = tmp_path / "benchmarks" / "bench-0"
        stray.mkdir(parents=True)

        async def test() -> None:
            async with Core(tmp_path) as core:
                assert core.performer.store.root == stray.parent
                assert not stray.exists()

        run(test)


def test_a_page_that_cannot_be_drawn_fails_nothing(tmp_path: Path) -> None:
    """A report of a form that the page does not know: the table is written, the page is left out."""
    report = tmp_path / "points" / "0" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text("[1, 2]")

    async def test() -> None:
        point = {"number": 0, "repetition": 0, "status": "completed", "is_valid": True, "reasons": [], "coverage": 1.0,
                 "skew_ms": 0.0, "changes": {}, "figures": {}}  # fmt: skip
        view: dict[str, Any] = {"id": "bench-1", "name": "b", "status": "completed", "points": [point]}
        assert await Judges().ask(Write(str(tmp_path), view), list[str]) == ["summary.csv"]

    run(test)


def test_a_write_question_without_reports(tmp_path: Path) -> None:
    """A benchmark of which no point was judged has its table and its page as well."""

    async def test() -> None:
        view: dict[str, Any] = {"id": "bench-1", "name": "b", "status": "failed", "points": []}
        assert await Judges().ask(Write(str(tmp_path), view), list[str]) == ["summary.csv", "report.html"]

    run(test)
