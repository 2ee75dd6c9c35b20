"""`herder-agent --release`: after it nothing of a stopped agent runs any more."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agent import procs
from common import wire
from tests.doubles.agent_daemon import DISK, DRAM, REPLICA, ROOT, Node, ensure_copy, ensure_replica, is_alive, node
from tests.doubles.ws_head import until


async def release(n: Node) -> tuple[int, str, str]:
    """Runs it on a node's state."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "agent", "--release", "--state-dir", str(n.root / "state")),
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode().strip(), errors.decode()


def ours(n: Node) -> list[int]:
    """Processes that name this node's folder in their command line."""
    found = []
    for process in procs.processes():
        try:
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if str(n.root).encode() in words:
            found.append(process.pid)
    return found


async def test_release_ends_engines_and_ram_tier(tmp_path: Path) -> None:
    """Refused while the agent runs; then it ends a stubborn engine, its strays and the holder, and no process stays."""
    async with node(tmp_path) as n:
        await n.start()
        await n.connected(1)
        await n.head.command(ensure_copy(n.models), 1, DISK)
        await n.done(DISK, 1)
        await n.head.command(ensure_copy(n.models, "dram"), 2, DRAM)
        await n.done(DRAM, 2)
        await n.head.command(ensure_replica(tmp_path), 3, REPLICA)
        ready = await n.done(REPLICA, 3)
        status, _, errors = await release(n)
        assert status == 2
        assert "state_locked" in errors
        assert is_alive(ready.detail["pid"])
        assert n.process is not None
        n.process.terminate()
        await n.wait_ended(n.process)
        assert len(ours(n)) >= 3  # the shim, its engine and the holder
        assert await release(n) == (0, "ended chat-0, the RAM tier", "")
        await until(lambda: not ours(n), "nothing of it is left")
        assert await release(n) == (0, "nothing runs here", "")
        await n.start()  # the state is as usable as before
        await n.connected(2)
        await until(lambda: (r := n.head.replica("chat-0")) and r.state == "ready", "it starts again", timeout_s=30)


async def test_release_of_an_engine_that_will_not_end(tmp_path: Path) -> None:
    """What ignores SIGTERM is killed after the grace, also in a session of its own."""
    stray = "setsid sh -c \"trap '' TERM; sleep 600\" & trap '' TERM; while :; do sleep 0.05; done"
    async with node(tmp_path) as n:
        await n.start()
        await n.connected(1)
        order = wire.EnsureReplica("chat-0", "chat", "", "", "disk", "command", argv=("sh", "-c", stray))
        await n.head.command(order, 1, REPLICA)
        mark = str(tmp_path / "state/replicas/chat-0/1")
        await until(lambda: len(procs.members(0, mark)) >= 4, "all its processes")
        assert n.process is not None
        n.process.kill()
        await n.wait_ended(n.process)
        status, said, _ = await release(n)
        assert (status, said) == (0, "ended chat-0, the RAM tier")
        assert procs.members(0, mark) == []


async def test_release_of_a_holder_without_its_socket(tmp_path: Path) -> None:
    """A holder whose socket file somebody removed cannot be asked any more; it is ended all the same."""
    async with node(tmp_path) as n:
        await n.start()
        await n.connected(1)
        socket = tmp_path / "state/holder/holder.sock"
        await until(socket.exists, "the holder")
        assert n.process is not None
        n.process.terminate()
        await n.wait_ended(n.process)
        socket.unlink()
        assert len(ours(n)) == 1
        assert await release(n) == (0, "ended the RAM tier", "")
        await until(lambda: not ours(n), "nothing of it is left")


async def test_release_of_nothing(tmp_path: Path) -> None:
    """A state folder that is not there is no error and is not made."""
    async with node(tmp_path) as n:
        assert await release(n) == (0, "nothing runs here", "")
        assert not (tmp_path / "state").exists()
