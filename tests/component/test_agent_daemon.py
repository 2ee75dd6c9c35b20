"""The whole agent as a process, with its real mover and holder, against a head's websocket."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import aiohttp
import pytest

from agent import procs
from common import wire
from tests.doubles.agent_daemon import DISK, DRAM, REPLICA, START_S, ensure_copy, ensure_replica, is_alive, node
from tests.doubles.ws_head import until


async def test_model_from_file_to_engine_and_back(tmp_path: Path) -> None:
    """One node's whole story: fetch, RAM, engine, metrics, kill -9, found again, stop, drop, SIGTERM."""
    async with node(tmp_path) as n:
        await n.start()
        hello = await n.connected(1)
        assert (hello.node_id, hello.data_port > 0, hello.http_port > 0) == ("n1", True, True)
        await n.head.command(ensure_copy(n.models), 1, DISK)
        result = await n.done(DISK, 1)
        assert result.manifest is not None
        assert result.manifest.size_bytes == 3_000_000
        await n.head.command(ensure_copy(n.models, "dram"), 2, DRAM)
        await n.done(DRAM, 2)
        await n.head.command(ensure_replica(tmp_path), 3, REPLICA)
        ready = await n.done(REPLICA, 3)
        await _metrics_tell(hello.http_port)

        assert n.process is not None
        n.process.kill()
        await n.wait_ended(n.process)
        assert is_alive(ready.detail["pid"])
        await n.start()
        hello = await n.connected(2)
        assert (hello.cluster_id, hello.max_head_epoch) == ("cluster-1", 1)
        await until(lambda: (r := n.head.replica("chat-0")) and r.state == "ready", "ready again")
        found = n.head.replica("chat-0")
        assert found is not None
        assert (found.pid, found.port, found.restarts) == (ready.detail["pid"], ready.detail["port"], 0)
        copies = {copy.storage: copy for copy in n.head.of(wire.Report)[-1].copies}
        assert {storage: copy.state for storage, copy in copies.items()} == {"disk": "ready", "dram": "ready"}

        await n.head.command(wire.StopReplica("chat-0", grace_s=5), 4, REPLICA)
        await n.done(REPLICA, 4)
        assert not is_alive(ready.detail["pid"])
        await n.head.command(wire.DropCopy("org/m", "main", "dram"), 5, DRAM)
        await n.head.command(wire.DropCopy("org/m", "main", "disk"), 6, DISK)
        await n.done(DRAM, 5)
        await n.done(DISK, 6)
        assert not (tmp_path / "state/store/models/org/m@main").exists()
        n.process.terminate()
        assert await n.wait_ended(n.process) == 0


async def _metrics_tell(port: int) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
            text = await response.text()
        async with http.get(f"http://127.0.0.1:{port}/healthz") as response:
            assert (await response.json()) == {"status": "ok", "session": True}
    assert 'herder_node_copies{state="ready",storage="dram"} 1.0' in text
    assert 'herder_replica_state{model="org/m",replica="chat-0",service="chat",state="ready"} 1.0' in text
    assert "herder_agent_session_open 1.0" in text


async def test_sigterm_leaves_engines_and_ram(tmp_path: Path) -> None:
    """SIGTERM ends the agent in order; the engine goes on, the next agent has it at once."""
    async with node(tmp_path) as n:
        await n.start()
        await n.connected(1)
        await n.head.command(ensure_copy(n.models), 1, DISK)
        await n.head.command(ensure_replica(tmp_path), 3, REPLICA)
        ready = await n.done(REPLICA, 3)
        assert n.process is not None
        n.process.send_signal(signal.SIGTERM)
        assert await n.wait_ended(n.process) == 0
        assert "task failed" not in n.log()
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{ready.detail['port']}/health") as r:
            assert r.status == 200


async def test_stop_after_holds_without_an_agent(tmp_path: Path) -> None:
    """The agent is killed while the head counts on stop_after: the engine ends all the same, and a new agent tells."""
    async with node(tmp_path) as n:
        await n.start()
        await n.connected(1)
        await n.head.command(ensure_copy(n.models), 1, DISK)
        await n.head.command(ensure_replica(tmp_path, stop_after_ms=1_500), 3, REPLICA)
        ready = await n.done(REPLICA, 3)
        assert n.process is not None
        n.process.kill()
        await n.wait_ended(n.process)
        await n.start()  # a renewed lease keeps it
        await n.connected(2)
        await until(lambda: (r := n.head.replica("chat-0")) and r.state == "ready", "found again")
        n.process.kill()
        await n.wait_ended(n.process)
        assert is_alive(ready.detail["pid"])
        await until(lambda: not is_alive(ready.detail["pid"]), "the engine's end", timeout_s=START_S)
        assert not list((tmp_path / "state").glob("replicas/chat-0/2"))
        await n.start()
        await n.connected(3)
        await until(lambda: (r := n.head.replica("chat-0")) and r.state == "stopped", "the agent tells")
        found = n.head.replica("chat-0")
        assert found is not None
        assert found.error is not None
        assert "no head for" in found.error.message


async def test_killed_mover_comes_back(tmp_path: Path) -> None:
    """kill -9 of the mover: the agent starts another one and goes on fetching."""
    async with node(tmp_path) as n:
        process = await n.start()
        await n.connected(1)
        (mover,) = [p for p in procs.processes() if p.parent == process.pid and _is_mover(p.pid)]
        os.kill(mover.pid, signal.SIGKILL)
        await n.head.command(ensure_copy(n.models), 1, DISK)
        assert (await n.done(DISK, 1)).outcome == "ok"
        (now,) = [p for p in procs.processes() if p.parent == process.pid and _is_mover(p.pid)]
        assert now.pid != mover.pid


def _is_mover(pid: int) -> bool:
    return b"agent.mover" in Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_second_agent_on_the_same_state_refuses(tmp_path: Path) -> None:
    """One agent per state directory: the second ends with 2 and names the first, which goes on."""
    async with node(tmp_path) as n:
        first = await n.start()
        await n.connected(1)
        second = await n.spawn("--config", str(n.config))
        assert await n.wait_ended(second) == 2
        assert "state_locked" in n.log()
        assert f"pid {first.pid}" in n.log()
        assert first.returncode is None


async def test_a_port_of_metrics_that_is_taken_is_named_with_its_setting(tmp_path: Path) -> None:
    """A second agent on a machine ends with 2, and its message says which setting to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with node(tmp_path) as n:
            n.settings["http"] = {"port": taken.getsockname()[1]}
            n.write()
            assert await n.wait_ended(await n.spawn("--config", str(n.config))) == 2
            assert "port_taken" in n.log()
            assert "or set http.port" in n.log()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"head_url": "ftp://x"}, "head_url"),
        ({"nonsense": 1}, "nonsense"),
        ({"http": {"host": "0.0.0.0"}}, "would be open"),
        ({"token_file": "/no/such/token"}, "/no/such/token"),
        ({"node_id": "../n1"}, "node_id"),
        ({"sources": {"file_roots": ["relative"]}}, "file_roots"),
    ],
)
async def test_check_config_refuses(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    """--check-config ends with 2 and names the setting that is wrong."""
    async with node(tmp_path) as n:
        n.settings.update(change)
        n.write()
        assert await n.wait_ended(await n.spawn("--config", str(n.config), "--check-config")) == 2
        assert complaint in n.log()


async def test_check_config_prints_the_posture(tmp_path: Path) -> None:
    """A good configuration ends with 0 and says what is open to whom."""
    async with node(tmp_path) as n:
        process = await n.spawn("--config", str(n.config), "--check-config")
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert b"node n1" in output
        assert b"for this machine" in output


async def test_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A token file with group or world bits is refused before anything starts."""
    async with node(tmp_path) as n:
        (tmp_path / "token").chmod(0o644)
        assert await n.wait_ended(await n.spawn("--config", str(n.config))) == 2
        assert "readable by others" in n.log()
