"""The shim with real processes: what the engine leaves behind, how it ended, its output, its environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import procs
from agent.lease_note import LeaseNote
from agent.logs import end_of, last_lines, read_from, segments
from agent.replicas import SHIM
from common.clock import boottime_ms

WAIT_S = 20.0


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.01)


class Run:
    """A shim started as the agent does it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = str(directory)
        self.shim: subprocess.Popen[bytes] | None = None

    def start(self, script: str, *, log_bytes: int = 65_536, argv: list[str] | None = None, **more: object) -> Run:
        """Starts `sh -c script` (or argv) below a shim; `more` stands in the spec."""
        env = {"PATH": os.defpath, procs.MARK: self.mark}
        spec = {"argv": argv or ["sh", "-c", script], "env": env, "cwd": "/", "log_bytes": log_bytes, **more}
        (self.directory / "spec.json").write_text(json.dumps(spec))
        self.shim = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SHIM), str(self.directory / "spec.json")],
            env=env,
            start_new_session=True,
        )
        return self

    @property
    def pid(self) -> int:
        """The shim's pid."""
        assert self.shim is not None
        return self.shim.pid

    def identity(self) -> dict[str, int]:
        """pid.json, once it is there."""
        until((self.directory / "pid.json").exists, "pid.json")
        return json.loads((self.directory / "pid.json").read_text())  # type: ignore[no-any-return]

    def end(self) -> dict[str, object]:
        """exit.json, once the shim has ended."""
        assert self.shim is not None
        self.shim.wait(WAIT_S)
        return json.loads((self.directory / "exit.json").read_text())  # type: ignore[no-any-return]

    def output(self) -> str:
        """What the log holds."""
        return "".join(path.read_text() for _, path in segments(self.directory))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run; whatever is left of it is killed."""
    made = Run(tmp_path)
    yield made
    procs.kill_all(made.pid if made.shim else 0, made.mark, within_s=5)
    if made.shim is not None:
        made.shim.wait(WAIT_S)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -SEGV $$", -signal.SIGSEGV)])
def test_exit_is_written(run: Run, script: str, code: int) -> None:
    """exit.json tells code or signal, and both streams stand in the log."""
    end = run.start(f"echo out; echo err >&2; {script}").end()
    assert end["exit_code"] == code
    assert run.output() == "out\nerr\n"


def test_engine_that_cannot_be_executed(run: Run) -> None:
    """A missing program is told by name; there is no pid.json."""
    end = run.start("", argv=["/no/such/engine"]).end()
    assert "/no/such/engine" in str(end["error"])
    assert not (run.directory / "pid.json").exists()


def test_killing_the_parent_leaves_the_engine(run: Run) -> None:
    """kill -9 of the process that started the shim: shim and engine go on and the exit is still written."""
    (run.directory / "spec.json").write_text(
        json.dumps(
            {"argv": ["sh", "-c", "read line < gate; exit 7"], "env": {"PATH": os.defpath, procs.MARK: run.mark},
             "cwd": str(run.directory), "log_bytes": 65536}
        )
    )  # fmt: skip
    os.mkfifo(run.directory / "gate")
    starter = (
        "import subprocess,sys,time\n"
        f"subprocess.Popen([sys.executable,'-I','-S',{str(SHIM)!r},{str(run.directory / 'spec.json')!r}],"
        "start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], start_new_session=True)
    identity = run.identity()
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    assert procs.is_running(identity["shim_pid"], identity["shim_ticks"])
    assert procs.is_running(identity["pid"], identity["ticks"])
    (run.directory / "gate").write_text("go\n")
    until((run.directory / "exit.json").exists, "exit.json")
    assert json.loads((run.directory / "exit.json").read_text())["exit_code"] == 7


def test_sigterm_goes_to_the_whole_group(run: Run) -> None:
    """SIGTERM at the shim reaches the engine's children too, and the shim waits for the engine's own end."""
    run.start("trap 'echo bye; exit 5' TERM; (trap 'echo child; exit 0' TERM; while :; do sleep 0.05; done) & "
              "echo up; while :; do sleep 0.05; done")  # fmt: skip
    until(lambda: "up" in run.output(), "the engine's first line")
    os.kill(run.pid, signal.SIGTERM)
    assert run.end()["exit_code"] == 5
    assert "bye" in run.output()
    assert procs.members(run.pid, run.mark) == []


def test_grandchildren_that_ignore_sigterm_are_killed(run: Run) -> None:
    """What the engine leaves behind, even in a session of its own, is gone before exit.json is written."""
    stray = "trap '' TERM; echo stray; while :; do sleep 0.05; done"
    run.start(f"setsid sh -c \"{stray}\" & (trap '' TERM; sleep 600) & trap 'exit 0' TERM; "
              "echo up; while :; do sleep 0.05; done")  # fmt: skip
    until(lambda: {"up", "stray"} <= set(run.output().split()), "engine and stray")
    assert len(procs.members(0, run.mark)) >= 4
    os.kill(run.pid, signal.SIGTERM)
    end = run.end()
    assert isinstance(end["strays"], int)
    assert end["strays"] >= 2
    assert procs.members(run.pid, run.mark) == []


def test_kill_all_finds_what_left_the_session(run: Run) -> None:
    """The sweep kills engine, children and strays in other sessions, and spares the shim that writes the end."""
    run.start("trap '' TERM; setsid sh -c 'sleep 600' & sleep 600 & echo up; while :; do sleep 0.05; done")
    until(lambda: len(procs.members(0, run.mark)) >= 4, "all processes")
    assert procs.kill_all(run.pid, run.mark, within_s=10, keep=run.pid) == []
    assert run.end()["exit_code"] == -signal.SIGKILL


def test_log_is_capped_and_keeps_its_offsets(run: Run) -> None:
    """Old output is dropped by whole segments; what is left stands at its true offset."""
    line = "x" * 99
    run.start(f"i=0; while [ $i -lt 2000 ]; do echo {line}; i=$((i+1)); done; echo the end", log_bytes=40_000).end()
    total = 2000 * 100 + len("the end\n")
    assert end_of(run.directory) == total
    assert sum(path.stat().st_size for _, path in segments(run.directory)) <= 40_000
    start, data = read_from(run.directory, total - 8, 100)
    assert (start, data) == (total - 8, b"the end\n")
    first, _ = read_from(run.directory, 0, 10)
    assert first == segments(run.directory)[0][0] > 0


def test_engine_sees_no_terminal_and_only_its_environment(run: Run) -> None:
    """stdin is empty, and the environment is exactly the spec's."""
    run.start("cat; env | cut -d= -f1 | sort").end()
    assert set(run.output().split()) <= {procs.MARK, "PATH", "PWD", "OLDPWD", "SHLVL", "_"}


def test_shim_is_small(run: Run) -> None:
    """A shim costs little memory, since there is one per engine for as long as it runs."""
    run.start("echo up; sleep 600")
    until(lambda: "up" in run.output(), "the engine's first line")
    process = procs.read_process(run.pid)
    assert process is not None
    assert process.resident_bytes < 25 << 20


# without head and agent for too long
def note_of(run: Run) -> LeaseNote:
    """The lease's file, as the agent writes it."""
    return LeaseNote(run.directory / "lease", procs.boot_id())


def halting(run: Run, stop_after_ms: int, grace_s: float = 5.0) -> dict[str, Any]:
    """What a spec says of an engine that must not outlive the lease."""
    return {"lease": str(run.directory / "lease"), "stop_after_ms": stop_after_ms, "stop_grace_s": grace_s}


TRAPPED = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"


def test_engine_ends_when_the_lease_is_not_renewed(run: Run) -> None:
    """No agent, no lease: SIGTERM once stop_after has passed since its end, and exit.json says why."""
    until_ms = boottime_ms() + 400
    note_of(run).write(until_ms)
    end = run.start(TRAPPED, **halting(run, 300)).end()
    assert boottime_ms() >= until_ms + 300
    assert end["exit_code"] == 5
    assert "no head for 0.3 s" in str(end["halted"])


def test_a_start_does_not_renew_the_lease(run: Run) -> None:
    """An engine that is started when stop_after has nearly passed has what is left of it, and no more."""
    note_of(run).write(boottime_ms() - 58_000)
    end = run.start(TRAPPED, **halting(run, 60_000)).end()
    assert end["exit_code"] == 5
    assert "no head for 60 s" in str(end["halted"])


def test_renewed_lease_keeps_the_engine(run: Run) -> None:
    """While somebody renews the note the engine runs on, whichever agent process that is; then it ends."""
    note = note_of(run)
    note.write(boottime_ms() + 500)
    run.start(TRAPPED, **halting(run, 300))
    identity = run.identity()
    began_ms = boottime_ms()
    while boottime_ms() < began_ms + 3_000:
        note.write(boottime_ms() + 500)
        assert procs.is_running(identity["pid"], identity["ticks"])
        time.sleep(0.02)
    assert run.end()["exit_code"] == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"boot_id": "another", "until_boottime_ms": 99999999999999, "again": 99999999999999}',
        '{"boot_id": "BOOT", "until_boottime_ms": 99999999999999, "again": 99999999999998}',
        '{"boot_id": "BOOT", "until_boottime_ms": "x", "again": "x"}',
        "[1]",
    ],
)
def test_note_that_cannot_be_believed_renews_nothing(run: Run, text: str) -> None:
    """No note, half a note or one of another boot: the engine ends stop_after its own start."""
    if text:
        (run.directory / "lease").write_text(text.replace("BOOT", procs.boot_id()))
    assert run.start(TRAPPED, **halting(run, 200)).end()["exit_code"] == 5


def test_halted_engine_that_will_not_end_is_killed(run: Run) -> None:
    """After the grace everything of it is killed, also what moved to a session of its own."""
    stray = "setsid sh -c \"trap '' TERM; echo two; sleep 600\""
    script = f"trap '' TERM; {stray} & echo up; while :; do sleep 0.05; done"
    end = run.start(script, **halting(run, 1_000, grace_s=0.2)).end()
    assert end["exit_code"] == -signal.SIGKILL
    assert {"up", "two"} <= set(run.output().split())
    assert procs.members(run.pid, run.mark) == []


def test_engine_that_is_ending_is_not_signalled_twice(run: Run) -> None:
    """An engine that its agent has told to end is not told again when the lease is over: it has its grace."""
    script = "trap 'n=$((n+1))' TERM; n=0; echo up; i=0; while [ $i -lt 40 ]; do sleep 0.05; i=$((i+1)); done; exit $n"
    run.start(script, **halting(run, 700, grace_s=30))
    until(lambda: "up" in run.output(), "the engine's first line")
    os.kill(run.pid, signal.SIGTERM)
    end = run.end()
    assert end["exit_code"] == 1
    assert end["halted"]


def test_engine_dies_with_its_shim_when_it_must_not_outlive_the_lease(run: Run) -> None:
    """Without a shim nobody would end it in time: the kernel does at once."""
    run.start("sleep 600", **halting(run, 600_000))
    identity = run.identity()
    os.kill(run.pid, signal.SIGKILL)
    until(lambda: not procs.is_running(identity["pid"], identity["ticks"]), "the engine's end")
    assert not (run.directory / "exit.json").exists()  # nobody was left who could have written it


def test_without_stop_after_the_engine_runs_on(run: Run) -> None:
    """An engine that may outlive the lease does, and outlives its shim too."""
    note_of(run).write(1)
    run.start("sleep 600", lease=str(run.directory / "lease"), stop_after_ms=0)
    identity = run.identity()
    os.kill(run.pid, signal.SIGKILL)
    assert run.shim is not None
    run.shim.wait(WAIT_S)
    assert procs.is_running(identity["pid"], identity["ticks"])


# engines with bad manners
def test_junk_in_the_output(run: Run) -> None:
    """Binary junk and terminal sequences are kept in the log as they are; the last lines for people are plain text."""
    script = r"printf '\033[31mred\033[0m\n\033]0;title\007bell\007\n\000\377\200\nlast\n'"
    run.start(script).end()
    assert b"\x1b[31mred" in segments(run.directory)[0][1].read_bytes()
    lines = last_lines(run.directory)
    assert lines[:2] == ("red", "bell")
    assert lines[-1] == "last"
    assert all(character.isprintable() or character == "\ufffd" for line in lines for character in line)


def test_one_endless_line(run: Run) -> None:
    """A line of megabytes is cut for people and costs no more than the log's size."""
    run.start("head -c 3000000 /dev/zero | tr '\\0' x", log_bytes=400_000).end()
    assert sum(path.stat().st_size for _, path in segments(run.directory)) <= 400_000
    (line,) = last_lines(run.directory)
    assert 0 < len(line) <= 500


def test_engine_that_closes_its_output(run: Run) -> None:
    """An engine without stdout and stderr is company kept as any other, at no cost."""
    run.start("exec >&- 2>&-; sleep 600")
    identity = run.identity()
    os.kill(run.pid, signal.SIGTERM)
    assert run.end()["exit_code"] == -signal.SIGTERM
    assert not procs.is_running(identity["pid"], identity["ticks"])


def test_daemon_without_mark_and_session(run: Run) -> None:
    """A daemon in its own session that has thrown away its environment is found all the same when the engine ends."""
    run.start(f"env -i setsid sh -c 'echo $$ > {run.directory}/daemon; sleep 600' & echo up; wait")
    pid_file = run.directory / "daemon"
    until(lambda: pid_file.exists() and pid_file.read_text().strip(), "the daemon")
    pid = int(pid_file.read_text())
    os.kill(run.pid, signal.SIGTERM)
    run.end()
    process = procs.read_process(pid)
    assert process is None or process.state in "ZX"


def test_crash_leaves_no_core_file(run: Run) -> None:
    """A crash does not fill the disk with the engine's memory, unless the engine asks for it."""
    assert run.start("ulimit -c; kill -SEGV $$").end()["exit_code"] == -signal.SIGSEGV
    assert run.output().split()[0] == "0"
