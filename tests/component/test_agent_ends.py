"""Which processes end with the agent, and which outlive it, when it alone is killed (KillMode=process of its unit)."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from agent import procs
from common import wire
from tests.doubles.agent_daemon import DISK, REPLICA, Node, ensure_copy, ensure_replica, is_alive, node
from tests.doubles.ws_head import until


def children(pid: int, word: bytes) -> list[int]:
    """Children of a process by a word of their command line."""
    found = []
    for process in procs.processes():
        if process.parent == pid:
            try:
                words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if word in words:
                found.append(process.pid)
    return found


async def all_parts(n: Node, root: Path) -> tuple[int, int, int, int]:
    """Pids of mover, holder, shim and engine of a node that has one of each."""
    await n.connected(1)
    await n.head.command(ensure_copy(n.models), 1, DISK)
    await n.done(DISK, 1)
    await n.head.command(ensure_replica(root), 2, REPLICA)
    ready = await n.done(REPLICA, 2)
    assert n.process is not None
    agent = n.process.pid
    await until(lambda: children(agent, b"agent.holder"), "the holder")
    (mover,), (holder,) = children(agent, b"agent.mover"), children(agent, b"agent.holder")
    (shim,) = children(agent, b"shim.py")
    return mover, holder, shim, ready.detail["pid"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
async def test_only_the_mover_ends_with_the_agent(tmp_path: Path, number: signal.Signals) -> None:
    """However the agent ends, the mover ends with it; holder, shim and engine stay, and none is left a zombie."""
    async with node(tmp_path) as n:
        process = await n.start()
        mover, holder, shim, engine = await all_parts(n, tmp_path)
        process.send_signal(number)
        await n.wait_ended(process)
        await until(lambda: not is_alive(mover), "the mover's end")
        assert [is_alive(pid) for pid in (holder, shim, engine)] == [True, True, True]


async def test_mover_in_the_middle_of_a_fetch_ends_too(tmp_path: Path) -> None:
    """A mover that is busy reading when its agent is killed does not go on by itself."""
    async with node(tmp_path) as n:
        process = await n.start()
        await n.connected(1)
        with (n.models / "big.gguf").open("wb") as file:
            file.truncate(2 << 30)
        order = wire.EnsureCopy("org/m", "main", "disk", (wire.Source(f"file://{n.models}/big.gguf"),))
        await n.head.command(order, 1, DISK)
        await until(lambda: n.head.of(wire.Progress), "it moves")
        (mover,) = children(process.pid, b"agent.mover")
        process.kill()
        await n.wait_ended(process)
        await until(lambda: not is_alive(mover), "the mover's end")
        assert not n.head.of(wire.Result)  # it did not end because it was through


async def test_sessions_of_what_outlives_the_agent(tmp_path: Path) -> None:
    """Holder and shim have sessions of their own: a signal to the agent's group or terminal does not reach them."""
    async with node(tmp_path) as n:
        process = await n.start()
        mover, holder, shim, _ = await all_parts(n, tmp_path)
        found = {pid: procs.read_process(pid) for pid in (process.pid, mover, holder, shim)}
        sessions = {pid: process.session for pid, process in found.items() if process is not None}
        assert sessions[holder] == holder
        assert sessions[shim] == shim
        assert sessions[mover] == sessions[process.pid]
