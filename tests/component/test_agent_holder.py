"""A real holder process: residency by mincore, budget, cancel, and outliving the agent that asked."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import holder_protocol as protocol
from agent.holder import listen
from common import fsio
from tests.doubles.hostile_http import eventually

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


class HolderClient:
    """One agent's connection."""

    def __init__(self, path: Path) -> None:
        self.channel = socket.socket(socket.AF_UNIX)
        self.channel.connect(str(path))
        self.channel.settimeout(30)
        self._stream = self.channel.makefile("rb")
        self._count = 0
        ready = self.read()
        assert isinstance(ready, protocol.Ready)
        self.ready = ready

    def read(self) -> protocol.AnyAnswer:
        head = self._stream.read(4)
        answer: protocol.AnyAnswer = protocol.answers.decode(self._stream.read(protocol.LENGTH.unpack(head)[0]))
        return answer

    def ask(self, make: Callable[[str], protocol.Request]) -> protocol.Done:
        self._count += 1
        token = f"t{self._count}"
        self.channel.sendall(protocol.frame(make(token)))
        while True:
            answer = self.read()
            if isinstance(answer, protocol.Done) and answer.token == token:
                return answer

    def close(self) -> None:
        self._stream.close()
        self.channel.close()


class Program:
    """A holder process."""

    def __init__(self, path: Path, budget: int, *more: str, locks: bool = True) -> None:
        self.path = path
        command = [sys.executable, "-P", "-m", "agent.holder", "--socket", str(path), "--budget", str(budget), *more]
        if not locks:
            command = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *command]
            command = ["prlimit", "--memlock=65536:65536", *command]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        eventually(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.path))
            return True
        return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=20) == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.bin").write_bytes(random.Random(1).randbytes(70 * MIB + 5))
    (directory / "sub/b.bin").write_bytes(b"x" * 5_000)
    (directory / ".manifest.json").write_bytes(b"{}")
    return directory


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path / "run" / "holder.sock", 100 * MIB)
    yield program
    if program.process.poll() is None:
        program.stop()


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident(path: Path) -> int:
    """Counted by this process, in a mapping of its own."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        vector = ctypes.create_string_buffer(pages)
        anchor = ctypes.c_char.from_buffer(view)
        found = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(view)), vector)
        del anchor
    assert found == 0
    return sum(byte & 1 for byte in vector.raw[:pages]) * mmap.PAGESIZE


def test_hold_makes_resident_and_locks(holder: Program, model: Path) -> None:
    """A cold model is resident to the last page after `hold`, is locked, and stays when the cache is dropped."""
    evict(model / "a.bin")
    assert resident(model / "a.bin") < 70 * MIB
    client = HolderClient(holder.path)
    done = client.ask(lambda token: protocol.Hold(token, "m@r1", str(model)))
    assert done.error is None
    (holding,) = done.holdings
    assert holding.bytes == holding.resident == 70 * MIB + 5 + 5_000
    assert holding.is_locked == (client.ready.why_unlocked == "")
    if holding.is_locked:
        evict(model / "a.bin")
    assert resident(model / "a.bin") >= 70 * MIB + 5
    client.close()


def test_socket_is_private(holder: Program) -> None:
    """The socket is 0600 in a 0700 directory."""
    assert stat.S_IMODE(holder.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(holder.path.parent.stat().st_mode) == 0o700


def test_holdings_outlive_the_agent(holder: Program, model: Path) -> None:
    """When the agent goes and another one comes, it finds the holding."""
    first = HolderClient(holder.path)
    assert first.ask(lambda token: protocol.Hold(token, "m@r1", str(model))).error is None
    first.close()
    second = HolderClient(holder.path)
    (holding,) = second.ask(protocol.List).holdings
    assert holding.key == "m@r1"
    assert holding.resident == holding.bytes
    again = second.ask(lambda token: protocol.Hold(token, "m@r1", str(model)))
    assert again.error is None
    second.close()


def test_budget(holder: Program, model: Path) -> None:
    """What does not fit the budget is refused with the numbers; after a release it fits."""
    client = HolderClient(holder.path)
    assert client.ask(lambda token: protocol.Hold(token, "one", str(model))).error is None
    refused = client.ask(lambda token: protocol.Hold(token, "two", str(model)))
    assert refused.error is not None
    assert refused.error.code == "memory_full"
    assert refused.error.details["budget"] == 100 * MIB
    assert refused.error.details["need"] > refused.error.details["free"]
    assert [holding.key for holding in refused.holdings] == ["one"]
    released = client.ask(lambda token: protocol.Release(token, "one"))
    assert released.holdings == ()
    assert released.used_bytes == 0
    assert client.ask(lambda token: protocol.Hold(token, "two", str(model))).error is None
    client.close()


def test_missing_files_and_path_tricks(holder: Program, model: Path) -> None:
    """Files that are not there, and paths that lead outside, are refused and hold nothing."""
    client = HolderClient(holder.path)
    trials: list[tuple[Path, tuple[str, ...]]] = [
        (model, ("none",)),
        (model / "none", ()),
        (model, ("../model/a.bin",)),
    ]
    for directory, paths in trials:
        done = client.ask(functools.partial(protocol.Hold, key="m", directory=str(directory), paths=paths))
        assert done.error is not None
        assert done.error.code in ("not_found", "invalid_path")
        assert done.used_bytes == 0
    client.close()


def test_without_permission_to_lock(tmp_path: Path, model: Path) -> None:
    """Where memory may not be locked the model is resident without a lock, and says so."""
    program = Program(tmp_path / "run2" / "holder.sock", 100 * MIB, locks=False)
    client = HolderClient(program.path)
    assert "RLIMIT_MEMLOCK" in client.ready.why_unlocked
    (holding,) = client.ask(lambda token: protocol.Hold(token, "m@r1", str(model))).holdings
    assert not holding.is_locked
    assert holding.resident == holding.bytes
    client.close()
    program.stop()


def test_second_holder_gives_way(holder: Program) -> None:
    """A second holder on the same socket ends with its own status and leaves the first alone."""
    command = [sys.executable, "-P", "-m", "agent.holder", "--socket", str(holder.path), "--budget", "1"]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=30).returncode == 3
    HolderClient(holder.path).close()


def test_a_removed_socket_is_made_again(holder: Program, model: Path) -> None:
    """When somebody removes the socket, the holder makes it anew and still holds what it held."""
    client = HolderClient(holder.path)
    assert client.ask(functools.partial(protocol.Hold, key="m@1", directory=str(model))).error is None
    holder.path.unlink()
    eventually(holder.answers)
    assert stat.S_IMODE(holder.path.stat().st_mode) == 0o600
    successor = HolderClient(holder.path)
    (held,) = successor.ask(protocol.List).holdings
    assert (held.key, held.is_complete) == ("m@1", True)
    assert client.ask(protocol.List).holdings[0].key == "m@1"  # the connection of before goes on
    client.close()
    successor.close()


def test_a_holder_that_nobody_can_find_ends(tmp_path: Path) -> None:
    """Its directory gone, or another holder in its place: it ends, and leaves the other's socket alone."""
    lost = Program(tmp_path / "lost" / "holder.sock", MIB)
    shutil.rmtree(tmp_path / "lost")
    assert lost.process.wait(timeout=20) == 0
    assert not (tmp_path / "lost").exists()
    first = Program(tmp_path / "run" / "holder.sock", MIB)
    first.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, first.process.pid, os.WSTOPPED)  # else it may see the gap and fill it itself
    first.path.unlink()
    second = Program(first.path, MIB)
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(timeout=20) == 0
    HolderClient(second.path).close()
    second.stop()


def test_the_directory_goes_before_the_holder_serves(tmp_path: Path) -> None:
    """The socket is there and the directory is taken away before the first look at it: the holder ends all the same."""
    path = tmp_path / "lost" / "holder.sock"
    found = listen(path)
    assert found is not None
    listener, mark = found
    shutil.rmtree(path.parent)
    program = f"""
import socket, sys
from pathlib import Path
from agent.holder import Holder, serve
serve(Holder(1), socket.socket(fileno={listener.fileno()}), Path({str(path)!r}), {mark!r})
"""
    command = [sys.executable, "-P", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, pass_fds=[listener.fileno()], timeout=20, capture_output=True, text=True
    )
    listener.close()
    assert (ended.returncode, ended.stderr) == (
        0,
        "the socket was removed and its directory is gone: the RAM tier is let go\n",
    )


def test_stop(holder: Program) -> None:
    """`stop` ends the process in order and removes the socket."""
    client = HolderClient(holder.path)
    assert client.ask(protocol.Stop).error is None
    client.close()
    assert holder.process.wait(timeout=20) == 0
    assert not holder.path.exists()


def test_tmpfs_copy(tmp_path: Path, model: Path) -> None:
    """With --tmpfs the files are copied there, and engines are told that directory."""
    place = Path("/dev/shm") / f"herder-test-{os.getpid()}"
    place.mkdir(mode=0o700)
    try:
        program = Program(tmp_path / "run3" / "holder.sock", 100 * MIB, "--tmpfs", str(place))
        client = HolderClient(program.path)
        (holding,) = client.ask(lambda token: protocol.Hold(token, "m@r1", str(model))).holdings
        assert holding.directory.startswith(str(place))
        assert (Path(holding.directory) / "sub/b.bin").read_bytes() == b"x" * 5_000
        assert (Path(holding.directory) / "a.bin").read_bytes() == (model / "a.bin").read_bytes()
        client.ask(lambda token: protocol.Release(token, "m@r1"))
        assert list(place.iterdir()) == []
        client.close()
        program.stop()
    finally:
        place.rmdir()


def test_tmpfs_must_be_one(tmp_path: Path) -> None:
    """A directory on a disk is refused as the RAM tier's tmpfs, with a line that says why."""
    if fsio.filesystem_name(tmp_path) == "tmpfs":
        pytest.skip("temporary files are on a tmpfs here")
    command = [sys.executable, "-P", "-m", "agent.holder", "--socket", str(tmp_path / "run" / "h.sock")]
    command += ["--budget", str(MIB), "--tmpfs", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=30
    )
    assert ended.returncode == 2
    assert b"is not a tmpfs" in ended.stderr
