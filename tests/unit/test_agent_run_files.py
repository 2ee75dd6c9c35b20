"""Files of a run: the seconds it tells, the end of its log, what is kept of old ones, and what a spec may read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.loadgen.engine import Tick
from agent.runs.directory import TICKS_BYTES, RunDirectories, RunDirectory
from agent.runs.runner import Seconds, confined, monotonic_of
from common import limits, wire
from common.bench.spec import LoadSpec
from common.clock import boottime_ns
from common.errors import Forbidden, HerderError


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run's directory."""
    return RunDirectory(tmp_path)


def seconds(directory: RunDirectory, workers: int = 1) -> Seconds:
    """Who writes a run's seconds."""
    return Seconds(directory.path / "ticks.jsonl", "r", workers)


class TestSeconds:
    """What is told while load runs."""

    def test_processes_are_added_up(self, directory: RunDirectory) -> None:
        """One line for each second once every process has told its own; `done` counts good answers only."""
        writer = seconds(directory, workers=2)
        writer.take(0, Tick(1.001, sent=5, done=4, failed=1, in_flight=2, tokens=9, ttft_ns=[1_000_000, 3_000_000]))
        assert directory.ticks(0) == (0, [])
        writer.take(1, Tick(1.002, sent=6, done=6, failed=0, in_flight=1, tokens=7, ttft_ns=[2_000_000]))
        (tick,) = directory.ticks(0)[1]
        assert tick == wire.RunTick("r", 1.002, 11, 9, 1, 3, 16, ttft_p50_ms=2.0, ttft_p99_ms=3.0)

    def test_a_process_that_says_nothing_holds_nobody_up(self, directory: RunDirectory) -> None:
        """A second is told without it two seconds later, and what is left at the end."""
        writer = seconds(directory, workers=2)
        for second in (1, 2, 3):
            writer.take(0, Tick(second, sent=second))
        assert [tick.sent for tick in directory.ticks(0)[1]] == [1]
        writer.flush()
        assert [tick.sent for tick in directory.ticks(0)[1]] == [1, 2, 3]

    def test_the_rest_after_the_last_second(self, directory: RunDirectory) -> None:
        """Two ticks of one process in one second lose nothing."""
        writer = seconds(directory, workers=2)
        writer.take(0, Tick(1.0, sent=5, done=1, in_flight=4, tokens=3, ttft_ns=[7]))
        writer.take(0, Tick(1.2, sent=0, done=4, in_flight=0, tokens=2, ttft_ns=[8]))
        writer.flush()
        (tick,) = directory.ticks(0)[1]
        assert (tick.sent, tick.done, tick.in_flight, tick.tokens) == (5, 5, 0, 5)

    def test_reader_goes_on_where_it_was(self, directory: RunDirectory) -> None:
        """Only whole lines are taken, each once."""
        writer = seconds(directory)
        writer.take(0, Tick(1, sent=1))
        offset, first = directory.ticks(0)
        with (directory.path / "ticks.jsonl").open("ab") as file:
            file.write(b'{"run":"r","at_s":')
        assert directory.ticks(offset) == (offset, [])
        with (directory.path / "ticks.jsonl").open("ab") as file:
            file.write(b'2,"sent":2}\n')
        assert [tick.sent for tick in [*first, *directory.ticks(offset)[1]]] == [1, 2]

    def test_file_is_bounded(self, directory: RunDirectory) -> None:
        """A file that has grown large is begun anew, and a reader takes what stands in the new one."""
        path = directory.path / "ticks.jsonl"
        writer = seconds(directory)
        path.write_bytes(b"x" * TICKS_BYTES + b"\n")
        writer.take(0, Tick(1, sent=1))
        assert path.stat().st_size < 1_000
        assert [tick.sent for tick in directory.ticks(TICKS_BYTES + 1)[1]] == [1]


class TestLog:
    """The generator's log."""

    def test_last_lines(self, directory: RunDirectory) -> None:
        """The last lines, without what would colour a terminal, each cut."""
        lines = [f"line {number}" for number in range(100)]
        text = "\n".join([*lines, "\x1b[31mred", "z" * 10_000])
        (directory.path / "generator.log").write_text(text)
        last = directory.last_lines()
        assert len(last) == limits.LAST_LOG_LINES
        assert last[-2] == "[31mred"
        assert len(last[-1]) == limits.LAST_LOG_CHARS
        assert last[0] == "line 82"

    def test_none(self, directory: RunDirectory) -> None:
        """A run that wrote nothing has no last words."""
        assert directory.last_lines() == ()

    def test_is_bounded(self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        """A log beyond all measure is begun anew under its writer."""
        monkeypatch.setattr("agent.runs.directory.LOG_BYTES", 100)
        path = directory.path / "generator.log"
        with path.open("ab", buffering=0) as file:
            file.write(b"x" * 101)
            directory.bound_log()
            file.write(b"after\n")
        assert path.read_bytes() == b"after\n"


class TestLeftovers:
    """Directories that no run speaks of."""

    def test_few_are_kept_and_without_secrets(self, tmp_path: Path) -> None:
        """The newest stay, old ones go, and none keeps its order; directories of runs are left alone."""
        files = RunDirectories(tmp_path / "runs")
        for number in range(limits.RUNS_KEPT + 2):
            path = files.of(f"r{number}").path
            path.mkdir(parents=True)
            (path / "order.json").write_text("{}")
            os.utime(path, (2_000_000_000 + number,) * 2)
        os.utime(files.of("r5").path, (1_000_000,) * 2)
        files.prune({"r0"})
        names = files.names()
        assert "r0" in names
        assert "r5" not in names
        assert len(names) == limits.RUNS_KEPT + 1
        assert [path.parent.name for path in files.root.glob("*/order.json")] == ["r0"]

    def test_no_folder_yet(self, tmp_path: Path) -> None:
        """A node that never had a run has nothing to look at."""
        files = RunDirectories(tmp_path / "runs")
        files.prune(())
        assert files.names() == []


class TestConfined:
    """Files that a spec names."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """A directory that may be read."""
        root = tmp_path / "data"
        root.mkdir()
        (root / "rows.csv").write_text("prompt\ninside\n")
        return root

    def test_what_was_opened_is_what_is_read(self, tmp_path: Path, root: Path) -> None:
        """A name that leads out of the root after it was looked at does not lead there for us."""
        made = confined(LoadSpec(dataset=f"{root}/rows.csv:csv"), [root], tmp_path / "run")
        secret = tmp_path / "secret"
        secret.write_text("prompt\noutside\n")
        (root / "rows.csv").unlink()
        (root / "rows.csv").symlink_to(secret)
        assert made.dataset is not None
        name, _, kind = made.dataset.rpartition(":")
        assert (Path(name).name, kind) == ("rows.csv", "csv")
        assert "inside" in Path(name).read_text()

    def test_colon_in_a_name(self, tmp_path: Path, root: Path) -> None:
        """What follows a colon is the kind only where it is one."""
        (root / "a:b").write_text("x")
        made = confined(LoadSpec(dataset=f"{root}/a:b", body=f"{root}/a:b"), [root], tmp_path / "run")
        assert [Path(text or "").read_text() for text in (made.dataset, made.body)] == ["x", "x"]

    def test_link_within_the_root(self, tmp_path: Path, root: Path) -> None:
        """Links that stay inside are followed."""
        (root / "link.csv").symlink_to(root / "rows.csv")
        made = confined(LoadSpec(trace=f"{root}/link.csv"), [root], tmp_path / "run")
        assert "inside" in Path(made.trace or "").read_text()

    def test_device(self, tmp_path: Path) -> None:
        """What is no regular file is not opened for anybody, be it below a root."""
        with pytest.raises(HerderError):
            confined(LoadSpec(body="/dev/zero"), [Path("/dev")], tmp_path / "run")

    def test_server_as_tokenizer(self, tmp_path: Path) -> None:
        """A tokenizer that is a server's is no file."""
        spec = LoadSpec(tokenizer="server:http://10.0.0.1:8000")
        assert confined(spec, [], tmp_path) == spec

    def test_no_roots(self, tmp_path: Path, root: Path) -> None:
        """Without roots nothing is read."""
        with pytest.raises(Forbidden):
            confined(LoadSpec(trace=f"{root}/rows.csv"), [], tmp_path)


def test_moments_of_two_clocks() -> None:
    """A moment of CLOCK_BOOTTIME on CLOCK_MONOTONIC: a second later there is a second later here."""
    now = boottime_ns()
    assert abs(monotonic_of(now + 1_000_000_000) - monotonic_of(now) - 1_000_000_000) < 1_000_000
