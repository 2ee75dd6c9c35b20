"""Commands against a small head on a real socket: what they print, where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from herder import types
from herder.cli import progress
from herder.cli.command import Globals
from herder.cli.main import run
from tests.doubles import cli_views as made
from tests.doubles.api_double import JOB, ApiDouble, job, model, step
from tests.doubles.on_a_thread import commanded


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ApiDouble]:
    """A double on a thread of its own, which the environment names."""
    double = ApiDouble()
    with commanded(double, monkeypatch, tmp_path):
        yield double


def herder(*args: str) -> int:
    """Runs one command in this process."""
    return run(list(args), Globals())


class TestOutput:
    """Formats."""

    def test_a_table(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """A list is a table with a heading, without colours when nobody looks."""
        head.nodes = made.NODES
        assert herder("nodes") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[:2] == ["NODE", "STATE"]
        assert len(lines) == 4
        assert "\x1b" not in "".join(lines)

    @pytest.mark.parametrize(
        "line", ["-o json nodes list", "nodes -o json list", "nodes list -o json", "nodes -o json"]
    )
    def test_json_is_the_apis_own_type(self, head: ApiDouble, capsys: pytest.CaptureFixture[str], line: str) -> None:
        """-o json goes in any place and prints what the API says."""
        import msgspec

        head.nodes = made.NODES
        assert herder(*line.split()) == 0
        found = msgspec.json.decode(capsys.readouterr().out, type=list[types.NodeView])
        assert found == made.NODES

    def test_yaml(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """-o yaml is the same as data."""
        head.models = {"a": model("a")}
        assert herder("models", "show", "a", "-o", "yaml") == 0
        assert yaml.safe_load(capsys.readouterr().out)["name"] == "a"

    def test_quiet(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """-q prints names only."""
        head.models = {"a": model("a"), "b": model("b")}
        assert herder("models", "list", "-q") == 0
        assert capsys.readouterr().out == "a\nb\n"

    def test_an_empty_list_says_what_to_do(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing there is a sentence with the next step, and an empty array for programs."""
        assert herder("models") == 0
        assert "herder models add" in capsys.readouterr().out
        assert herder("models", "-o", "json") == 0
        assert json.loads(capsys.readouterr().out) == []


class TestErrors:
    """One line, a hint, the right exit code."""

    def test_not_found(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """404 is exit code 5, with the head's hint and nothing on stdout."""
        assert herder("models", "show", "b") == 5
        out, err = capsys.readouterr()
        assert out == ""
        assert err == "error[model_not_found]: no model 'b'\nhint: did you mean 'a'?\n"

    def test_wrong_token(
        self, head: ApiDouble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """401 is exit code 4 and says where tokens are looked for; the token itself is not shown."""
        monkeypatch.setenv("HERDER_TOKEN", "hdr_admin_secret")
        assert herder("nodes") == 4
        err = capsys.readouterr().err
        assert err.startswith("error[unauthenticated]: ")
        assert "HERDER_TOKEN_FILE" in err
        assert "secret" not in err

    def test_head_down(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A refused connection is exit code 3 and names `herder up`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert herder("nodes", "--url", url) == 3
        err = capsys.readouterr().err
        assert err.startswith("error[unreachable]: ")
        assert "hint: `herder up` starts" in err

    def test_a_wait_that_ends_early(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """--timeout is exit code 6; the job runs on, and the hint says how to stop it."""
        head.scripts[JOB] = deque([job("running")])
        assert herder("download", "smollm2", "n1:disk", "--timeout", "0.1s") == 6
        assert f"herder jobs cancel {JOB}" in capsys.readouterr().err

    def test_a_token_file_open_to_others(
        self, head: ApiDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A token that others can read is refused before anything is sent."""
        path = tmp_path / "token"
        path.write_text("x")
        path.chmod(0o644)
        assert herder("nodes", "--token-file", str(path)) == 1
        assert capsys.readouterr().err.splitlines()[1] == f"hint: chmod 600 {path}"
        assert head.requests == []

    @pytest.mark.parametrize(
        "line", ["nodes show", "serve a", "keys create x", "why a b c", "health-check", "download a b --timeout soon"]
    )
    def test_wrong_usage(self, head: ApiDouble, capsys: pytest.CaptureFixture[str], line: str) -> None:
        """A wrong line is exit code 2, one line and where to read on; nothing is sent."""
        assert herder(*line.split()) == 2
        err = capsys.readouterr().err.splitlines()
        assert err[0].startswith("error[usage]: ")
        assert "--help" in err[1]
        assert len(err) == 2
        assert head.requests == []

    def test_a_message_cannot_drive_the_terminal(
        self, head: ApiDouble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Escape codes in what the head says do not reach the terminal."""
        assert herder("models", "show", "b\x1b[2J\nc") == 5
        err = capsys.readouterr().err
        assert "\x1b" not in err
        assert len(err.splitlines()) == 2


class TestLongWork:
    """Waiting, and not waiting."""

    def test_progress_on_a_pipe_is_sparse(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """Without a terminal there is a line per state and quarter on stderr, and the summary on stdout."""
        total = 100 << 20
        running = [job("running", step(bytes_done=done << 20, bytes_total=total)) for done in (1, 2, 30, 31, 55)]
        head.scripts[JOB] = deque(
            [*running, job("completed", step("completed", bytes_done=total, bytes_total=total, ended_ms=1))]
        )
        assert herder("download", "smollm2", "n1:disk") == 0
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "download smollm2 -> n1:disk" in line]
        assert 2 <= len(lines) <= 5
        assert "done in" in lines[-1]
        assert out.startswith("download smollm2 -> n1:disk: completed in 2.0s, 100 MiB at 50.0 MiB/s")

    def test_no_wait_prints_the_id(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """--no-wait answers at once; with -q it is the id alone."""
        head.scripts[JOB] = deque([job("running")])
        assert herder("copy", "smollm2", "n1:dram", "--no-wait", "-q") == 0
        assert capsys.readouterr().out == JOB + "\n"
        assert head.count("GET", f"/api/v1/jobs/{JOB}") == 0

    def test_a_failed_job(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """A job that fails is exit code 1 with the step's code; -o json still prints the job."""
        broken = step("failed", error=types.ErrorDetail("disk_full", "n1:disk is full", "free some room"), ended_ms=1)
        head.scripts[JOB] = deque([job("failed", broken)])
        assert herder("download", "smollm2", "n1:disk", "-o", "json") == 1
        out, err = capsys.readouterr()
        assert json.loads(out)["steps"][0]["error"]["code"] == "disk_full"
        assert "error[disk_full]: " in err
        assert "hint: free some room" in err

    def test_a_job_file(self, head: ApiDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A YAML file goes to the head as it is, and as YAML."""
        path = tmp_path / "job.yaml"
        path.write_text("name: x\nactions:\n- {action: download, model: a, to: n1:disk}\n")
        head.scripts[JOB] = deque([job("completed")])
        assert herder("job", str(path)) == 0
        sent = next(place for place, (method, _, _) in enumerate(head.requests) if method == "POST")
        assert head.bodies[sent] == path.read_bytes()
        assert head.requests[sent][2]["Content-Type"] == "application/yaml"

    def test_a_missing_job_file(self, head: ApiDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A file that is not there is wrong usage, not a traceback."""
        assert herder("job", str(tmp_path / "none.yaml")) == 2
        assert "No such file" in capsys.readouterr().err

    def test_ctrl_c_leaves_the_job_running(self, head: ApiDouble) -> None:
        """Ctrl-C ends the waiting with exit code 130 and says how to follow and how to cancel."""
        head.scripts[JOB] = deque([job("running")])
        code = "from herder.cli.main import main; main()"
        with subprocess.Popen(
            [sys.executable, "-c", code, "download", "smollm2", "n1:disk"], stderr=subprocess.PIPE, text=True
        ) as child:
            try:
                assert child.stderr is not None
                assert JOB in child.stderr.readline()
                child.send_signal(signal.SIGINT)
                rest = child.stderr.read()
                child.wait(timeout=30)
            finally:
                child.kill()
        assert child.returncode == 130
        assert f"herder jobs cancel {JOB}" in rest
        assert "Traceback" not in rest
        assert head.count("POST", f"/api/v1/jobs/{JOB}/cancel") == 0

    @pytest.mark.parametrize(
        ("words", "path", "says"),
        [
            (("models",), "models", "herder status"),
            (("services", "delete", "chat"), "services/chat", "chat goes on stopping"),
            (("jobs", "cancel", JOB), f"jobs/{JOB}/cancel", f"herder jobs show {JOB}"),
            (("health-check", "--target-url", "http://h/"), "health_check", "goes on"),
            (("nodes", "drain", "n1"), "nodes/n1/drain", "goes on"),
            (("logs", "chat-0", "-f"), "logs", "goes on"),
            (("events", "--after", "7"), "events", "herder events --after 7"),
            (("backup", "kept.sqlite"), "backup", "goes on"),
            (("chat", "smollm2", "hello"), "/v1/chat/completions", "nothing goes on"),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_ctrl_c_in_any_wait(
        self, head: ApiDouble, tmp_path: Path, words: tuple[str, ...], path: str, says: str
    ) -> None:
        """While a head does not answer, Ctrl-C ends a command with 130 and one line about what goes on."""
        path = path if path.startswith("/") else f"/api/v1/{path}"
        head.fail_next(path, *["hang"] * 5)
        code = "from herder.cli.main import main; main()"
        with subprocess.Popen(
            [sys.executable, "-P", "-c", code, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            try:
                assert child.stderr is not None
                deadline = time.monotonic() + 20
                while not any(where.partition("?")[0] == path for _, where, _ in head.requests):
                    assert time.monotonic() < deadline, head.requests
                    time.sleep(0.01)
                child.send_signal(signal.SIGINT)
                said = child.stderr.read()
                child.wait(timeout=30)
            finally:
                child.kill()
        assert child.returncode == 130
        (line,) = [line for line in said.splitlines() if line.strip()]
        assert says in line
        assert not list(tmp_path.glob("*kept*"))

    def test_the_live_picture(self) -> None:
        """On a terminal each step has a line with bytes, rate and time left."""
        from rich.console import Console

        view = progress.LiveView(is_coloured=False)
        view.update(
            job("running", step(bytes_done=50 << 20, bytes_total=100 << 20, rate_bytes_per_s=1 << 20, eta_s=50.0))
        )
        console = Console(width=100, file=io.StringIO(), force_terminal=True)
        with console.capture() as captured:
            console.print(view._draw())
        shown = captured.get()
        assert "download smollm2 -> n1:disk" in shown
        assert "50.0 MiB of 100 MiB, 1.00 MiB/s, 50s left" in shown

    def test_a_large_job_shows_what_runs(self) -> None:
        """Of a hundred steps only so many are shown as fit, those that run first of all."""
        steps = [step("completed", id=f"s{n}", ended_ms=n + 1) for n in range(90)]
        steps += [step("running", id=f"r{n}") for n in range(5)]
        shown = progress.steps_in_view(job("running", *steps))
        assert len(shown) == progress.STEPS_SHOWN
        assert [one.id for one in shown if one.state == "running"] == [f"r{n}" for n in range(5)]


class TestVerbs:
    """Single verbs."""

    def test_chat_streams_to_stdout(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """The answer is on stdout alone, the figures on stderr."""
        head.chat_lines = [
            '{"choices":[{"delta":{"content":"Blue"}}]}',
            '{"choices":[{"delta":{"content":"."}}]}',
            "[DONE]",
        ]
        assert herder("chat", "smollm2", "which", "colour?", "--stats") == 0
        out, err = capsys.readouterr()
        assert out == "Blue.\n"
        assert "first token after" in err
        assert b'"content":"which colour?"' in head.bodies[-1]

    def test_backup_keeps_what_is_there(
        self, head: ApiDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """An existing file is kept unless --force."""
        path = tmp_path / "b"
        path.write_text("old")
        assert herder("backup", str(path)) == 2
        assert path.read_text() == "old"
        assert herder("backup", str(path), "--force") == 0
        assert path.stat().st_size == 100_016

    def test_events_as_lines_of_json(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """With -o json each event is one line."""
        head.events = [types.Event(n, 0, "copy_ready", "copy", "c", "") for n in (1, 2)]
        assert herder("events", "--after", "0", "--count", "2", "-o", "json") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["id"] for line in lines] == [1, 2]

    def test_version_without_a_head(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The client's own version needs no head."""
        assert herder("version", "--url", "http://127.0.0.1:1") == 0
        assert "unknown: cannot reach" in capsys.readouterr().out

    def test_serve_puts_the_configuration_together(self, head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
        """--config keeps YAML's types; recipe, name, env and args find their places."""
        line = (
            "serve a n1:gpu0 --no-wait --config context=8192 --config flash=true --recipe r --name s --env A=1 --arg -x"
        )
        assert herder(*line.split()) == 0
        sent = json.loads(head.bodies[-1])["config"]
        assert sent == {"context": 8192, "flash": True, "recipe": "r", "name": "s", "env": {"A": "1"}, "args": ["-x"]}

    def test_head_takes_the_place_of_the_command(self) -> None:
        """`herder head` is the daemon: its options, its answer."""
        code = "from herder.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "head", "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "herder-head" in done.stdout
