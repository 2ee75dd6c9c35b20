"""`herder up` and `herder down` with the real head and the real agent as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from herder.cli import daemons

CODE = "from herder.cli.main import main; main()"
PORTS = ("--port", "0", "--agent-port", "0")


class Site:
    """A state folder and commands on it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("HERDER_", "COLUMNS"))
        }
        self.environ |= {"HERDER_STATE_DIR": str(base), "HERDER_CONFIG": str(base / "none"), "PYTHONSAFEPATH": "1"}

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Starts a command."""
        argv = [sys.executable, "-c", CODE, *args]
        return subprocess.Popen(argv, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        record = daemons.read_record(self.base)
        environ = {**self.environ, **({"HERDER_URL": record.url} if record else {})}
        argv = [sys.executable, "-c", CODE, *args]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=100, check=False)

    def processes(self) -> list[str]:
        """Command lines of the processes that name this folder or the daemons' files in it."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if str(self.base).encode() in words:
                found.append(words.replace(b"\0", b" ").decode(errors="replace"))
        return found

    def alive(self) -> list[str]:
        """Which daemons run."""
        record = daemons.read_record(self.base)
        return record.alive if record else []


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A fresh state folder; nothing runs on it afterwards."""
    made = Site(tmp_path / "state")
    yield made
    record = daemons.read_record(made.base)
    for process in (record.supervisor, record.agent, record.head) if record else ():
        if process is not None:
            process.signal(signal.SIGKILL)
    # The holder of the RAM tier outlives its agent by design; this one's socket lies in our own folder.
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if str(made.base).encode() in words:
            os.kill(int(entry.parent.name), signal.SIGKILL)


def read_until(child: subprocess.Popen[str], wanted: str) -> str:
    """What a command prints up to a line that holds the words; fails with all of it when they do not come."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"{wanted!r} did not come in:\n{''.join(lines)}")


def test_in_the_foreground(site: Site) -> None:
    """Both are ready when it says so, their lines carry their origin, a second start is refused, Ctrl-C ends both."""
    up = site.start("up", *PORTS, "--node-id", "n1")
    shown = read_until(up, "herder chat")
    assert "head  | " in shown
    assert "agent | " in shown
    assert f"export HERDER_STATE_DIR={site.base}" not in shown  # the environment says it already
    nodes = site.run("nodes", "-q")
    assert (nodes.returncode, nodes.stdout) == (0, "n1\n")
    second = site.run("up", *PORTS)
    assert second.returncode == 1
    assert "error[already_running]: " in second.stderr
    record = daemons.read_record(site.base)
    assert record is not None
    up.send_signal(signal.SIGINT)
    rest, _ = up.communicate(timeout=90)
    assert up.returncode == 0, rest
    assert record.alive == []
    assert "stopping the agent" in rest
    assert daemons.read_record(site.base) is None


def test_detached(site: Site) -> None:
    """--detach returns once both are ready, `status` finds them, `down` ends them, and a second `down` is no error."""
    up = site.run("up", *PORTS, "--node-id", "n1", "--detach", "-q")
    assert up.returncode == 0, up.stderr
    assert up.stdout.startswith("http://127.0.0.1:")
    assert site.alive() == ["head", "agent"]
    assert "1 of 1 online" in site.run("status").stdout
    assert "online" in (site.base / "head.log").read_text() or (site.base / "head.log").stat().st_size > 0
    assert (site.base / "head.log").stat().st_mode & 0o077 == 0
    down = site.run("down")
    assert (down.returncode, down.stdout) == (0, "stopped: head and agent\n")
    assert site.alive() == []
    again = site.run("down")
    assert again.returncode == 0
    assert "is not up" in again.stdout


def test_down_ends_the_foreground(site: Site) -> None:
    """`herder down` from another terminal ends the one in the foreground, in order."""
    up = site.start("up", *PORTS, "--node-id", "n1")
    read_until(up, "herder chat")
    assert site.run("down").returncode == 0
    up.communicate(timeout=30)
    assert up.returncode == 0
    assert site.alive() == []


def test_a_daemon_that_dies_takes_the_other_along(site: Site) -> None:
    """When one ends by itself the command says which, ends the other, and fails."""
    up = site.start("up", *PORTS, "--node-id", "n1")
    read_until(up, "herder chat")
    record = daemons.read_record(site.base)
    assert record is not None
    record.agent.signal(signal.SIGKILL)
    rest, _ = up.communicate(timeout=60)
    assert up.returncode == 1
    assert "error[agent_ended]: " in rest
    assert record.alive == []


def test_daemons_of_a_killed_command_are_found(site: Site) -> None:
    """After kill -9 of the command its daemons run on: `up` says so, `down` ends them."""
    up = site.start("up", *PORTS, "--node-id", "n1")
    read_until(up, "herder chat")
    up.kill()
    up.communicate(timeout=30)
    assert site.alive() == ["head", "agent"]
    second = site.run("up", *PORTS)
    assert "error[already_running]: " in second.stderr
    assert site.run("down").returncode == 0
    assert site.alive() == []


@pytest.mark.parametrize("is_detached", [True, False])
def test_stop_engines_leaves_no_process(site: Site, is_detached: bool) -> None:
    """--stop-engines also ends the holder of the RAM tier: nothing of ours is left, whichever way they were started."""
    with site.start("up", *PORTS, "--node-id", "n1", *(["--detach"] if is_detached else [])) as up:
        read_until(up, "herder chat")
        _down_leaves_nothing(site)
        assert not site.processes()


def _down_leaves_nothing(site: Site) -> None:
    socket = site.base / "agent/holder/holder.sock"
    assert daemons.wait_until(socket.exists, 20)
    assert site.processes()
    down = site.run("down", "--stop-engines")
    assert down.returncode == 0, down.stderr
    assert daemons.wait_until(lambda: not site.processes(), 20), site.processes()
    again = site.run("down", "--stop-engines")
    assert again.returncode == 0, again.stderr


def test_stop_engines_after_a_crash(site: Site) -> None:
    """With head and agent killed, `down --stop-engines` still ends what outlived them, and says what that was."""
    assert site.run("up", *PORTS, "--node-id", "n1", "--detach", "-q").returncode == 0
    assert daemons.wait_until((site.base / "agent/holder/holder.sock").exists, 20)
    record = daemons.read_record(site.base)
    assert record is not None
    record.head.signal(signal.SIGKILL)
    assert daemons.wait_until(lambda: record.alive == ["agent"], 10)
    again = site.run("up", *PORTS, "--node-id", "n1", "--detach", "-q")
    assert again.returncode
    assert "half up" in again.stderr
    assert "its head has ended" in again.stderr
    record.agent.signal(signal.SIGKILL)
    assert daemons.wait_until(lambda: not site.alive(), 10)
    down = site.run("down", "--stop-engines")
    assert down.returncode == 0, down.stderr
    assert "the RAM tier" in down.stdout + down.stderr
    assert daemons.wait_until(lambda: not site.processes(), 20), site.processes()


def test_a_port_that_is_taken(site: Site) -> None:
    """A port on which something listens is refused before anything is started."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = site.run("up", "--port", port, "--agent-port", "0")
    assert done.returncode == 1
    assert "error[port_taken]: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--file-root", "--llama-server"])
def test_wrong_options(site: Site, tmp_path: Path, option: str) -> None:
    """What is no folder, and what is no program, are wrong usage; nothing is started."""
    path = tmp_path / "plain"
    path.write_text("")
    path.chmod(0o600)
    done = site.run("up", *PORTS, option, str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert not site.base.exists()


def test_a_process_is_known_by_its_start() -> None:
    """The same id with another start is another process."""
    mine = daemons.Process.of(os.getpid())
    assert mine.is_alive
    assert not daemons.Process(mine.pid, mine.start_ticks + 1, mine.boot_id).is_alive
    assert not daemons.Process(mine.pid, mine.start_ticks, "another boot").is_alive
