"""What both daemons share to be daemons: logs, notices, tasks, the owned directory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import statedir
from common.errors import InvalidConfig, StateLocked
from common.statedir import StateDir, write_secret
from common.tasks import Supervisor
from common.telemetry import GcWatch, LineFormatter, Notifier, fields, setup_logging, ticks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


class TestLogs:
    """One event, one line."""

    def test_text_lines(self, root_logger: logging.Logger) -> None:
        """Time, level, logger, message, fields; whatever they hold, it stays one line."""
        stream = io.StringIO()
        setup_logging("info", "text", stream)
        log = logging.getLogger("head.test")
        log.info("evil\nmessage", extra=fields(node="n1", text='two words "quoted"\n', count=3))
        log.debug("not shown")
        (line,) = stream.getvalue().splitlines()
        assert line[10] == "T"
        assert line.split(" ", 1)[1] == (
            "info head.test: evil\\nmessage node=n1 text=\"two words 'quoted'\\n\" count=3"
        )

    def test_json_lines_fold_tracebacks(self, root_logger: logging.Logger) -> None:
        """A failure is one JSON document with the traceback inside."""
        stream = io.StringIO()
        setup_logging("info", "json", stream)
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logging.getLogger("x").exception("failed", extra=fields(path=Path("/a")))
        (line,) = stream.getvalue().splitlines()
        document = json.loads(line)
        assert (document["level"], document["message"], document["path"]) == ("error", "failed", "/a")
        assert "ValueError: first\nsecond" in document["traceback"]

    def test_journald_lines(self) -> None:
        """Under journald the priority replaces the time."""
        record = logging.LogRecord("a.b", logging.WARNING, "", 0, "careful", (), None)
        assert LineFormatter(is_journald=True).format(record) == "<4>warning a.b: careful"


class TestNotifier:
    """sd_notify without a library."""

    def test_notices_arrive(self, tmp_path: Path) -> None:
        """Ready, watchdog and stopping reach the socket that systemd names."""
        path = tmp_path / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(str(path))
            notifier = Notifier(str(path), "2000000")
            notifier.ready("all\ngood")
            notifier.alive()
            notifier.stopping()
            assert [server.recv(100) for _ in range(3)] == [b"READY=1\nSTATUS=all\\ngood", b"WATCHDOG=1", b"STOPPING=1"]
            assert notifier.watchdog_s == 2.0

    def test_abstract_sockets(self) -> None:
        """An address that begins with @ is an abstract one."""
        name = f"herder-test-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind("\0" + name)
            Notifier("@" + name, "").ready("x")
            assert server.recv(100).startswith(b"READY=1")

    def test_without_systemd_nothing_happens(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """No address is silence; a dead address is a warning, not a failure."""
        Notifier("", "").ready("x")
        assert caplog.text == ""
        Notifier(str(tmp_path / "gone"), "1").alive()
        assert "systemd was not told" in caplog.text


class TestSupervisor:
    """Tasks with names and owners."""

    async def test_failures_are_recorded(self, caplog: pytest.LogCaptureFixture) -> None:
        """A task that fails is logged and kept, by name."""
        seen: list[str] = []
        supervisor = Supervisor("part", on_failure=lambda failure: seen.append(failure.name))

        async def fail() -> None:
            raise ValueError("broken")

        supervisor.start("job", fail())
        assert supervisor.names == ["part/job"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [(failure.name, failure.error) for failure in supervisor.failures] == [
            ("part/job", "ValueError: broken")
        ]
        assert seen == ["part/job"]
        assert "task failed" in caplog.text
        assert len(supervisor) == 0

    async def test_a_critical_task_may_not_end(self) -> None:
        """Failing or just ending, it resolves `failed`; other tasks do not."""

        async def end() -> None:
            return None

        supervisor = Supervisor("part")
        waiting = asyncio.ensure_future(supervisor.failed())
        supervisor.start("harmless", end())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        supervisor.start("vital", end(), is_critical=True)
        assert (await waiting).error == "RuntimeError: ended by itself"

    async def test_close_ends_all_and_names_the_stuck(self) -> None:
        """Closing cancels and waits; what does not end in time is named; a clean close is no failure."""
        supervisor = Supervisor("part")
        release = asyncio.Event()

        async def stubborn() -> None:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

        supervisor.start("good", asyncio.Event().wait(), is_critical=True)
        task = supervisor.start("bad", stubborn())
        await asyncio.sleep(0)
        assert await supervisor.close(timeout_s=0.05) == ["part/bad"]
        assert not supervisor.failures
        with pytest.raises(RuntimeError, match="closed"):
            supervisor.start("late", asyncio.sleep(0))
        release.set()
        await task


class TestLoop:
    """How late our own loop is."""

    async def test_ticks_name_the_lateness(self) -> None:
        """A blocked loop shows in the next tick."""
        seen: list[int] = []
        async with contextlib.aclosing(ticks(0.01)) as ticking:
            async for lag_ms in ticking:
                seen.append(lag_ms)
                if len(seen) == 2:
                    break
                __import__("time").sleep(0.2)
        assert seen[1] >= 100

    def test_gc_pauses_are_measured(self) -> None:
        """Each collection is observed once, until the watch ends."""
        pauses: list[float] = []
        watch = GcWatch(pauses.append)
        watch.start()
        gc.collect()
        watch.stop()
        count = len(pauses)
        gc.collect()
        assert count >= 1
        assert len(pauses) == count


class TestStateDir:
    """One owner for a directory on a local disk."""

    def test_a_second_owner_is_refused_until_the_first_ends(self, tmp_path: Path) -> None:
        """The refusal names who owns it; closing gives it up."""
        first = StateDir.open(tmp_path / "a" / "b", daemon="herder-head")
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
        with pytest.raises(StateLocked, match=f"running herder-head .pid {os.getpid()}."):
            StateDir.open(tmp_path / "a" / "b", daemon="herder-head")
        first.close()
        StateDir.open(tmp_path / "a" / "b", daemon="herder-head").close()

    def test_a_killed_owner_leaves_no_lock(self, tmp_path: Path) -> None:
        """The lock ends with the process, however it ends."""
        code = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom common.statedir import StateDir\n"
            "owned = StateDir.open(Path(sys.argv[1]), daemon='x')\nos.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, timeout=30, check=False)
        assert done.returncode == -9
        StateDir.open(tmp_path, daemon="x").close()

    def test_children_do_not_inherit_the_lock(self, tmp_path: Path) -> None:
        """An engine or shim that outlives the daemon does not keep the directory locked."""
        owned = StateDir.open(tmp_path, daemon="x")
        with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
            try:
                held = {os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir()}
                owned.close()
                StateDir.open(tmp_path, daemon="x").close()
                assert child.poll() is None
                assert not [name for name in held if name.startswith(str(tmp_path))]
            finally:
                child.kill()

    def test_network_file_systems_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unless the operator insists."""
        monkeypatch.setitem(statedir.NETWORK_FILE_SYSTEMS, statedir.file_system_magic(tmp_path), "nfs")
        with pytest.raises(InvalidConfig, match="lies on nfs"):
            StateDir.open(tmp_path, daemon="x")
        StateDir.open(tmp_path, daemon="x", allow_network_fs=True).close()

    def test_magic_numbers_are_read_right(self) -> None:
        """proc says proc (0x9fa0), and a missing path is an error."""
        assert statedir.file_system_magic(Path("/proc")) == 0x9FA0
        with pytest.raises(OSError, match="No such file"):
            statedir.file_system_magic(Path("/nowhere/at/all"))

    def test_unusable_places_are_named(self, tmp_path: Path) -> None:
        """A file in the way is a configuration error."""
        (tmp_path / "file").touch()
        with pytest.raises(InvalidConfig, match="state_dir"):
            StateDir.open(tmp_path / "file", daemon="x")

    def test_secrets_are_private_and_whole(self, tmp_path: Path) -> None:
        """0600 from the first byte, replaced at once, and a planted link is not followed."""
        target = tmp_path / "admin.token"
        victim = tmp_path / "victim"
        victim.write_text("mine")
        (tmp_path / ".admin.token.part").symlink_to(victim)
        write_secret(target, "one")
        write_secret(target, "two")
        assert target.read_text() == "two\n"
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert victim.read_text() == "mine"
