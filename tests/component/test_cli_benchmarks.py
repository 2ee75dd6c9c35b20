"""`herder benchmarks` against a small head on a real socket: what is sent, what is printed, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from herder import types
from herder.cli import benchmarks_live
from herder.cli.command import Globals
from herder.cli.main import run
from tests.doubles import bench_reports, benchmark_head
from tests.doubles.benchmark_head import BENCHMARK, BenchmarkHead, point, tick, view
from tests.doubles.on_a_thread import commanded

ROOT = Path(__file__).parents[2]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BenchmarkHead]:
    """A double on a thread of its own, which the environment names."""
    double = BenchmarkHead()
    with commanded(double, monkeypatch, tmp_path):
        yield double


def benchmarks(*args: str) -> int:
    """Runs one command in this process."""
    return run(["benchmarks", *args], Globals())


class TestRun:
    """What is sent."""

    def test_a_recipe_with_changes(self, head: BenchmarkHead) -> None:
        """--set, --service, --nodes and --name arrive as the places of the document that they name."""
        head.views = deque([view("pending", point(0, "pending"))])
        words = "run smoke --detach --service chat --nodes n1,n2 --set load.rate=5 --set load.duration=30s --name mine"
        assert benchmarks(*words.split()) == 0
        assert head.asked == [
            {
                "recipe": "smoke",
                "name": "mine",
                "document": {
                    "load": {"rate": 5, "duration": "30s", "nodes": ["n1", "n2"]},
                    "server": {"service": "chat"},
                },
            }
        ]

    def test_another_model_keeps_how_it_is_served(self, head: BenchmarkHead) -> None:
        """--model says the model of the recipe's own service and nothing else of it: the head keeps its replicas."""
        head.views = deque([view("pending")])
        assert benchmarks("run", "smoke", "--detach", "--model", "llama") == 0
        assert head.asked[0]["document"] == {"server": {"serve": {"model": "llama"}}}

    def test_a_file(self, head: BenchmarkHead, tmp_path: Path) -> None:
        """A file's document is sent whole with the changes in it; one kind of load takes the other's place."""
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**benchmark_head.RECIPE.document, "sweep": {"rate": [1, 2]}}))
        head.views = deque([view("pending")])
        words = ("--service", "chat", "--set", "load.concurrency=8", "--set", "sweep=null", "--nodes", "2")
        assert benchmarks("run", str(path), "--detach", *words) == 0
        assert head.asked[0]["document"] == {
            "name": "smoke",
            "server": {"service": "chat"},
            "load": {"duration": 25.0, "concurrency": 8, "nodes": 2},
        }

    @pytest.mark.parametrize(
        ("content", "code", "said"),
        [
            ("[1]", 1, "a recipe is a mapping"),
            ("a: [", 1, "not YAML"),
            ("load: {steps: [1, .nan]}", 1, "load.steps.1: numbers are finite"),
            (None, 2, "No such file"),
        ],
    )
    def test_files_that_are_no_recipes(
        self, head: BenchmarkHead, tmp_path: Path, content: str | None, code: int, said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Each is told in one line; nothing is sent."""
        path = tmp_path / "mine.yaml"
        if content is not None:
            path.write_text(content)
        assert benchmarks("run", str(path)) == code
        assert said in capsys.readouterr().err
        assert head.asked == []

    def test_what_only_the_head_can_judge_is_sent(self, head: BenchmarkHead, tmp_path: Path) -> None:
        """A part of the wrong shape goes to the head as it is, which names the place."""
        path = tmp_path / "mine.yaml"
        path.write_text("server: chat\n")
        head.views = deque([view("pending")])
        assert benchmarks("run", str(path), "--detach", "--model", "llama") == 0
        assert head.asked[0]["document"] == {"server": "chat", "load": {"model": "llama"}}

    def test_followed_to_its_end(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Without a terminal: a line per change of state and ended point, seconds in between; the tables on stdout."""
        head.ticks = [tick(1, at) for at in (1.0, 2.0)]
        head.views = deque(
            [
                view("preparing", point(0, "pending"), point(1, "pending"), note="waiting for chat"),
                view("running", point(0), point(1, "running")),
                view("completed", point(0), point(1)),
            ]
        )
        assert benchmarks("run", "smoke") == 0
        out, err = capsys.readouterr()
        assert f"{BENCHMARK}: preparing, waiting for chat" in err
        assert "point 0, rate=1, valid, 1.00 requests/s, 120 tokens/s, TTFT p50 24.6ms, p99 1.24s" in err
        assert "in flight 12" in err
        assert "\x1b" not in err
        assert out.splitlines()[-2].split()[:3] == ["0", "rate=1", "valid"]
        assert max(len(line) for line in out.splitlines()) <= 80

    def test_a_head_that_stays_away_for_a_while(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Both are said, once each: that it does not answer, and that it does again."""
        head.views = deque([view("running", point(0, "running")), *[view("running")] * 2, view("completed", point(0))])
        head.refusals = {2: 5}
        assert benchmarks("run", "smoke") == 0
        err = capsys.readouterr().err
        assert err.count("the head does not answer") == err.count("the head answers again") == 1
        assert err.index("does not answer") < err.index("answers again") < err.index(f"{BENCHMARK}: completed")

    def test_a_result_that_must_not_be_believed(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """An invalid point makes exit code 1 and is named with its reason; -o json prints the API's own type."""
        late = point(1, is_valid=False, reasons=("late",))
        lost = point(2, is_valid=False, reasons=("degraded",), coverage=0.5)
        head.views = deque([view("completed", point(0), late, lost)])
        assert benchmarks("run", "smoke", "--no-watch") == 1
        out = capsys.readouterr().out
        assert "invalid: late (point 1)" in out
        assert "degraded: degraded, 50% of the load was performed (point 2)" in out
        assert "verdict    invalid" in out  # the worst of both
        assert benchmarks("watch", BENCHMARK, "-o", "json") == 1
        assert msgspec.json.decode(capsys.readouterr().out, type=types.BenchmarkView) == head.views[0]

    def test_one_that_failed(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """The head's own error with its hint, exit code 1."""
        error = types.ErrorDetail("no_nodes", "no node may send", "herder nodes")
        head.views = deque([view("failed", error=error)])
        assert benchmarks("run", "smoke") == 1
        err = capsys.readouterr().err
        assert f"error[no_nodes]: {BENCHMARK} failed: no node may send" in err
        assert "hint: herder nodes" in err

    def test_a_wait_that_ends_early(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """--timeout is exit code 6; the benchmark runs on."""
        head.views = deque([view("running", point(0, "running"))])
        assert benchmarks("run", "smoke", "--timeout", "0.1s") == 6
        assert f"herder benchmarks show {BENCHMARK}" in capsys.readouterr().err

    def test_ctrl_c_detaches(self, head: BenchmarkHead) -> None:
        """Ctrl-C ends the watching with exit code 130 and says how to go on and how to stop; nothing is cancelled."""
        head.views = deque([view("running", point(0, "running"))])
        code = "from herder.cli.main import main; main()"
        with subprocess.Popen(
            [sys.executable, "-P", "-c", code, "benchmarks", "run", "smoke"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            try:
                assert child.stderr is not None
                assert BENCHMARK in child.stderr.readline()
                deadline = time.monotonic() + 20
                while not head.count("GET", f"/api/v1/benchmarks/{BENCHMARK}"):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                child.send_signal(signal.SIGINT)
                rest = child.stderr.read()
                child.wait(timeout=30)
            finally:
                child.kill()
        assert child.returncode == 130
        assert f"herder benchmarks watch {BENCHMARK}" in rest
        assert f"herder benchmarks cancel {BENCHMARK}" in rest
        assert "Traceback" not in rest
        assert not head.count("POST", f"/api/v1/benchmarks/{BENCHMARK}/cancel")


class TestLive:
    """The block on a terminal."""

    class Terminal(io.StringIO):
        """A stream that says it is one."""

        def isatty(self) -> bool:
            """It is."""
            return True

    def test_the_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Name and state, the point, its seconds, and the table so far: at most 80 cells wide, drawn in place."""
        stream = self.Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        shown = benchmarks_live.Live(Globals())
        running = view("running", point(0), point(1, "running", changes={"rate": 2, "scenarios": ["x" * 200]}))
        running = msgspec.structs.replace(running, note="n1 is at it")
        shown.take_view(running)
        assert "n1 is at it" in shown._lines()
        shown.take_tick(tick(1, 1.0))
        shown.take_tick(tick(1, 2.0))
        lines = shown._lines()
        assert lines[0].startswith(f"chat-sweep  {BENCHMARK}  running")
        assert lines[1].startswith("1 of 2 points done; point 1: rate=2, scenarios=xxx")
        assert lines[2] == "2.0s on 2 nodes, sent 20, done 18, failed 0, in flight 12"
        assert lines[3] == "9.00 requests/s, 800 tokens/s, TTFT p50 24.6ms, p99 101ms"
        assert lines[4].split()[:3] == ["POINT", "LOAD", "VERDICT"]
        assert "n1 is at it" not in "".join(lines)  # the seconds say more
        drawn = stream.getvalue()
        assert f"\x1b[{len(lines)}A" in drawn
        plain = [line.rpartition("\x1b[2K")[2] for line in drawn.splitlines()]
        assert max(len(line) for line in plain) <= 80
        shown.end()
        assert stream.getvalue().endswith("\x1b[J")

    def test_a_silent_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is said in place of seconds that stand still, and no more once the head answers."""
        stream = self.Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        shown = benchmarks_live.Live(Globals())
        shown.take_view(view("running", point(1, "running")))
        shown.take_tick(tick(1, 1.0))
        for is_silent in (True, False):
            shown.take_silence(is_silent)
            lines = shown._lines()
            assert (benchmarks_live.SILENT in lines) == is_silent
            assert ("9.00 requests/s" in "".join(lines)) != is_silent
            assert max(map(len, lines)) <= 80

    def test_a_new_point_counts_anew(self) -> None:
        """Sums are the point's, not the benchmark's."""
        shown = benchmarks_live.Live(Globals(is_quiet=True))
        shown.take_tick(tick(0, 9.0, sent=500))
        shown.take_tick(tick(1, 1.0, sent=3))
        assert "sent 3," in shown._seconds()[0]


class TestShow:
    """Lists and details."""

    def test_the_list(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Id, name, state, points and verdict; the group without a subcommand lists."""
        head.views = deque([view("completed", point(0))])
        assert benchmarks() == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[:5] == ["ID", "NAME", "STATUS", "POINTS", "VERDICT"]
        assert lines[1].split()[:5] == [BENCHMARK, "chat-sweep", "completed", "1/1", "valid"]
        # Lists come without points: the head says what the worst of them is.
        head.views = deque([view("completed", is_degraded=True, is_valid=False, verdict="invalid")])
        assert benchmarks() == 0
        assert " invalid " in capsys.readouterr().out
        head.views = deque()
        assert benchmarks() == 0
        assert "herder benchmarks recipes" in capsys.readouterr().out

    def test_one(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Facts, the search's result, points, files; nothing wider than the terminal."""
        best = {"over": "rate", "load": 4.0, "why": "it failed at rate 8"}
        head.views = deque([view("completed", point(0), point(2), point(4), best=best)])
        head.files = {"report.html": b"x" * 2048, "runs/a/load.bin": b"y"}
        assert benchmarks("show", BENCHMARK) == 0
        out = capsys.readouterr().out
        assert "found      rate 4.00 is the highest that met the SLO: it failed at rate 8" in out
        assert "report.html" in out
        assert "2 files, 2.00 KiB" in out
        assert f"herder benchmarks export {BENCHMARK} --format all --save FOLDER" in out, "export alone is one report"
        assert max(len(line) for line in out.splitlines()) <= 80

    def test_points_stand_behind_the_error(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """And not behind its hint."""
        error = types.ErrorDetail("run_failed", "it was killed", hint="its log says more")
        head.views = deque([view("completed", point(0), point(1, "failed", error=error))])
        assert benchmarks("show", BENCHMARK) == 0
        assert "it was killed (point 1)\n  hint: its log says more\n" in capsys.readouterr().out

    def test_loads_tell_points_apart(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Figures give way before the loads of a sweep are cut to the same text."""
        loads = [{"prefix_tokens": 0}, {"prefix_tokens": 1024}]
        head.views = deque([view("completed", *(point(at, changes=load) for at, load in enumerate(loads)))])
        assert benchmarks("show", BENCHMARK) == 0
        out = capsys.readouterr().out
        assert "prefix_tokens=0 " in out
        assert "prefix_tokens=1024 #2" in out
        assert max(len(line) for line in out.splitlines()) <= 80

    @pytest.mark.parametrize("keep", [False, True])
    def test_a_service_that_is_kept(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str], keep: bool) -> None:
        """It is said, for it holds its devices until somebody ends it."""
        recipe = {"server": {"serve": {"model": "m"} | ({"keep": True} if keep else {})}}
        head.views = deque([view("completed", point(0), recipe=recipe, service=BENCHMARK)])
        assert benchmarks("show", BENCHMARK) == 0
        out = capsys.readouterr().out
        assert (f"{BENCHMARK}, kept until `herder services delete`" in out) == keep
        assert max(len(line) for line in out.splitlines()) <= 80

    def test_errors_are_seen_in_a_narrow_terminal(
        self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without any the column leaves early; with some no figure hides that most requests failed."""
        figures = {"req_s": 1.0, "e2e_p99_ms": 81_200.0, "tpot_p50_ms": 459.0, "slo_attainment": 0.3}
        for share, is_seen in ((0.0, False), (0.69, True)):
            made = point(0, figures=figures | {"error_rate": share}, changes={"rate": 1, "turns": 12})
            head.views = deque([view("completed", made)])
            assert benchmarks("show", BENCHMARK) == 0
            out = capsys.readouterr().out
            assert ("ERRORS" in out, "69%" in out) == (is_seen, is_seen)
            assert max(len(line) for line in out.splitlines()) <= 80

    def test_reasons_are_told_in_words(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Those of the first point with the same reasons, wrapped."""
        said = ("MLPerf server: at least 600 s are to be measured, here it was 4 s", "answers were read late " * 5)
        bad = [
            point(at, is_valid=False, reasons=("mlperf_rules", "client_limited"), said=said, repetition=0)
            for at in range(2)
        ]
        head.views = deque([view("completed", *bad, is_valid=False)])
        assert benchmarks("show", BENCHMARK) == 0
        out = capsys.readouterr().out
        assert "invalid: mlperf_rules, client_limited (points 0, 1)\n  point 0: MLPerf server: at least 600 s" in out
        assert max(len(line) for line in out.splitlines()) <= 80

    def test_errors_of_a_valid_point_are_told(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """What the server answered stands below the table."""
        head.views = deque([view("completed", point(0), point(2, said=("3 x http_5xx: 503 loading",)))])
        assert benchmarks("show", BENCHMARK) == 0
        assert "valid, with errors (point 2)\n  3 x http_5xx: 503 loading\n" in capsys.readouterr().out

    def test_not_found(self, head: BenchmarkHead) -> None:
        """404 is exit code 5."""
        assert benchmarks("show", "bench-000000000000") == 5

    def test_cancel_and_delete(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Both say what became of it."""
        assert benchmarks("cancel", BENCHMARK) == 0
        assert benchmarks("delete", BENCHMARK, "bench-2") == 0
        out = capsys.readouterr().out
        assert f"{BENCHMARK} is cancelled" in out
        assert "bench-2 is removed" in out

    def test_recipes(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """The list, and one as the document that could be changed and sent."""
        assert benchmarks("recipes") == 0
        assert "Half a minute" in capsys.readouterr().out
        assert benchmarks("recipes", "smoke") == 0
        assert yaml.safe_load(capsys.readouterr().out) == benchmark_head.RECIPE.document

    def test_logs(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Kept logs one after the other with their names; --search and --tail leave lines out."""
        head.files = {
            "logs/chat-0.log": b"ready\nERROR: out of memory\n",
            "runs/r1/generator.log": b"fine\n",
            "x.csv": b"",
        }
        assert benchmarks("logs", BENCHMARK) == 0
        out = capsys.readouterr().out
        assert out == "==> logs/chat-0.log <==\nready\nERROR: out of memory\n==> runs/r1/generator.log <==\nfine\n"
        assert benchmarks("logs", BENCHMARK, "--search", "error") == 0
        assert capsys.readouterr().out == "==> logs/chat-0.log <==\nERROR: out of memory\n"
        assert benchmarks("logs", BENCHMARK, "--tail", "1", "-o", "json") == 0
        assert json.loads(capsys.readouterr().out)["logs/chat-0.log"] == ["ERROR: out of memory"]


class TestValidate:
    """Without a head."""

    def test_a_good_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Says how many points it makes; -o json has every default in."""
        assert benchmarks("validate", str(ROOT / "recipes/benchmark/throughput-latency.yaml")) == 0
        assert "18 points" in capsys.readouterr().out
        assert benchmarks("validate", str(ROOT / "recipes/benchmark/smoke.yaml"), "-o", "json") == 0
        assert json.loads(capsys.readouterr().out)["points"] == 1

    def test_a_bad_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The place of the mistake, and where the fields are explained."""
        path = tmp_path / "bad.yaml"
        path.write_text("name: x\nserver: {service: s}\nload: {rate: 1, duration: 5s, scenarois: []}\n")
        assert benchmarks("validate", str(path)) == 1
        err = capsys.readouterr().err
        assert "error[invalid_recipe]" in err
        assert "scenarois" in err
        assert "did you mean 'scenarios'? docs/benchmarking.md" in err


class TestCompare:
    """Results beside each other."""

    def results(self, factor: float) -> types.BenchmarkView:
        """Three repetitions of one load, with a little noise."""
        return view(
            "completed",
            *(
                point(number, changes={"rate": 4}, repetition=number, figures={"req_s": factor * (4 + number / 100)})
                for number in range(3)
            ),
        )

    def test_a_result_is_not_compared_with_itself(self, capsys: pytest.CaptureFixture[str]) -> None:
        """It would differ in nothing, which says nothing: wrong usage."""
        assert benchmarks("compare", BENCHMARK, BENCHMARK) == 2
        assert f"{BENCHMARK} is given twice" in capsys.readouterr().err

    def test_by_id(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """A real difference is better or worse, a small one is noise."""
        head.others = {"a": self.results(1.0), "b": self.results(0.5), "c": self.results(1.0001)}
        assert benchmarks("compare", "a", "b", "c") == 0
        out = capsys.readouterr().out
        lines = [line.split() for line in out.splitlines() if line.startswith("req_s")]
        assert [(line[3], line[-1]) for line in lines] == [("-50.0%", "worse"), ("+0.0%", "noise")]
        assert max(len(line) for line in out.splitlines()) <= 80
        assert benchmarks("compare", "a", "b", "-o", "json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loads"][0]["figures"][0]["verdict"] == ["", "less"]

    def test_different_loads_are_refused(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """Other prompts answer another question: exit code 1, unless --anyway says so."""
        one, other = ({"load": {"rate": 4, "scenarios": [sizes]}} for sizes in ("D(9,9)", "D(99,9)"))
        head.others = {
            "a": msgspec.structs.replace(self.results(1.0), recipe=one),
            "b": msgspec.structs.replace(self.results(1.0), recipe=other),
        }
        assert benchmarks("compare", "a", "b") == 1
        assert "error[not_comparable]" in capsys.readouterr().err
        assert benchmarks("compare", "a", "b", "--anyway") == 0
        assert "DIFFERENT: load" in capsys.readouterr().out

    def test_files_need_no_head(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Reports of `herder bench` in files, with one repetition each: what that means is said."""
        monkeypatch.setenv("HERDER_URL", "http://127.0.0.1:1")
        for name, seed in (("a", 0), ("b", 1)):
            report = bench_reports.report(rate=5, seconds=10, seed=seed)
            (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(report))
        assert benchmarks("compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")) == 0
        out = capsys.readouterr().out
        assert "one repetition" in out
        assert "ttft_p99" in out
        (tmp_path / "c.json").write_text("{}")
        assert benchmarks("compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")) == 1
        assert "neither a report" in capsys.readouterr().err
        assert benchmarks("compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")) == 2
        assert benchmarks("compare", "a") == 2


class TestExport:
    """Results as files."""

    def test_a_file_and_standard_output(
        self, head: BenchmarkHead, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        """The bytes of the head, unchanged."""
        head.reports = {("", "html"): b"<!doctype html>", ("3", "csv"): b"a,b\n"}
        path = tmp_path / "deep" / "report.html"
        assert benchmarks("export", BENCHMARK, "--format", "html", "--save", str(path)) == 0
        assert path.read_bytes() == b"<!doctype html>"
        capsysbinary.readouterr()
        assert benchmarks("export", BENCHMARK, "--format", "csv", "--point", "3") == 0
        assert capsysbinary.readouterr().out == b"a,b\n"

    def test_formats_of_one_point(self, head: BenchmarkHead, capsys: pytest.CaptureFixture[str]) -> None:
        """vllm is of one point: the only one is taken, of several the person says which."""
        head.views = deque([view("completed", point(0))])
        head.reports = {("0", "vllm"): b"{}"}
        assert benchmarks("export", BENCHMARK, "--format", "vllm") == 0
        head.views = deque([view("completed", point(0), point(1))])
        assert benchmarks("export", BENCHMARK, "--format", "vllm") == 2
        assert "--point" in capsys.readouterr().err

    def test_everything(self, head: BenchmarkHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Every format of the whole and of each point, and the kept files; what was never written is said."""
        head.views = deque([view("completed", point(0), point(1, "failed"))])
        head.reports = {("", "json"): b"{}", ("", "csv"): b"x", ("0", "json"): b"{}", ("0", "vllm"): b"{}"}
        head.files = {"runs/r1/load.bin": b"\0\1", "logs/chat-0.log": b"ready\n"}
        assert benchmarks("export", BENCHMARK, "--format", "all", "--save", str(tmp_path / "out")) == 0
        written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert written == {
            "report.json", "report.csv", "points/0.json", "points/0.vllm.json", "files/runs/r1/load.bin",
            "files/logs/chat-0.log",
        }  # fmt: skip
        assert "report.html is left out" in capsys.readouterr().err

    def test_two_benchmarks_are_not_mixed(
        self, head: BenchmarkHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A folder is written again for the same benchmark, and refused for another."""
        words = ("export", BENCHMARK, "--format", "all", "--save", str(tmp_path))
        for name, code in ((BENCHMARK, 0), ("bench-of-before", 2)):
            (tmp_path / "report.json").write_text(json.dumps({"benchmark": {"id": name}}))
            head.views = deque([view("completed", point(0))])
            assert benchmarks(*words) == code
        assert "holds the export of bench-of-before" in " ".join(capsys.readouterr().err.split())
        assert json.loads((tmp_path / "report.json").read_text())["benchmark"]["id"] == "bench-of-before"

    def test_names_that_would_leave_the_folder(
        self, head: BenchmarkHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A head whose files are called ../x writes nothing outside."""
        head.views = deque([view("completed")])
        head.files = {"../escaped": b"x"}
        assert benchmarks("export", BENCHMARK, "--format", "all", "--save", str(tmp_path / "out")) == 1
        assert "error[invalid_name]" in capsys.readouterr().err
        assert not (tmp_path / "escaped").exists()


class TestBench:
    """A single run without a head."""

    def test_a_page_by_its_suffix(self, tmp_path: Path) -> None:
        """`herder bench --save x.html` writes the report as a page that holds it."""
        from common.bench.report import build
        from herder.cli.bench import _save

        asked, outcome = bench_reports.outcome_of(rate=5, seconds=10)
        path = tmp_path / "run.html"
        assert not _save({"save": path, "format_": None, "detail": False}, build(asked, outcome), outcome)
        text = path.read_text()
        assert text.startswith("<!doctype html>")
        assert '"kind":"herder-bench"' in text
