"""A whole agent as a process, with its real mover and holder, against a head's websocket."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import yaml

from agent import holder_protocol, procs
from agent.run_files import RunFiles
from agent.runs.directory import RunDirectories
from common import wire
from common.errors import ErrorInfo
from tests.doubles.ws_head import TOKEN, WsHead, until

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "doubles" / "engine_program.py"
START_S = 30.0
DISK, DRAM, REPLICA = "copy:org/m@main|n1:disk", "copy:org/m@main|n1:dram", "replica:chat-0"


class Node:
    """An agent's files and processes."""

    def __init__(self, root: Path, head: WsHead) -> None:
        self.root = root
        self.head = head
        self.config = root / "agent.yaml"
        self.models = root / "models"
        self.models.mkdir()
        (self.models / "model.gguf").write_bytes(os.urandom(3_000_000))
        token = root / "token"
        token.write_text(TOKEN + "\n")
        token.chmod(0o600)
        self.settings: dict[str, object] = {
            "head_url": head.url,
            "node_id": "n1",
            "token_file": str(token),
            "state_dir": str(root / "state"),
            "dram_budget_bytes": 64 << 20,
            "disk_reserve_bytes": 0,
            "http": {"port": 0},
            "sources": {"file_roots": [str(self.models)]},
        }
        self.write()
        self.process: asyncio.subprocess.Process | None = None

    def write(self) -> None:
        """Writes the configuration."""
        self.config.write_text(yaml.safe_dump(self.settings))

    async def start(self) -> asyncio.subprocess.Process:
        """Starts the daemon."""
        self.process = await self.spawn("--config", str(self.config))
        return self.process

    async def spawn(self, *arguments: str) -> asyncio.subprocess.Process:
        """Runs `herder-agent`."""
        with (self.root / "agent.log").open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "agent", *arguments),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
            )

    def log(self) -> str:
        """What the daemon wrote."""
        return (self.root / "agent.log").read_text()

    async def wait_ended(self, process: asyncio.subprocess.Process) -> int:
        """The exit status."""
        async with asyncio.timeout(START_S):
            await process.communicate()
        assert process.returncode is not None
        return process.returncode

    async def connected(self, hellos: int) -> wire.Hello:
        """Waits for a session."""
        await until(lambda: len(self.head.hellos) >= hellos, f"hello {hellos}", timeout_s=START_S)
        return self.head.hellos[-1]

    async def failed(self, op_id: str, generation: int) -> ErrorInfo:
        """Waits for a result that is not ok, and gives its error."""
        await until(lambda: self.head.result(op_id, generation), f"the result of {op_id}", timeout_s=START_S)
        result = self.head.result(op_id, generation)
        assert result is not None
        assert result.outcome == "failed"
        assert result.error is not None
        await self.head.send(wire.ResultAck(op_id, generation))
        return result.error

    async def done(self, op_id: str, generation: int) -> wire.Result:
        """Waits for a result that is ok, and acknowledges it."""
        await until(lambda: self.head.result(op_id, generation), f"the result of {op_id}", timeout_s=START_S)
        result = self.head.result(op_id, generation)
        assert result is not None
        assert result.outcome == "ok", result.error
        await self.head.send(wire.ResultAck(op_id, generation))
        return result

    async def clean(self) -> None:
        """Ends what outlives an agent."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.wait_ended(self.process)
        runs = RunDirectories(self.root / "state" / "runs")
        for name in runs.names():
            procs.kill_all(0, runs.mark(name), within_s=5)
        files = RunFiles(self.root / "state" / "replicas")
        for replica, run in files.unfinished():
            procs.kill_all(0, files.mark(replica, run), within_s=5)
        _stop_holder(self.root / "state" / "holder" / "holder.sock")


def _stop_holder(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as channel:
        try:
            channel.connect(str(path))
            channel.sendall(holder_protocol.frame(holder_protocol.Stop("stop")))
            channel.settimeout(10)
            while channel.recv(4096):
                pass
        except OSError:
            pass  # none runs


@asynccontextmanager
async def node(root: Path) -> AsyncIterator[Node]:
    """A head and a node that is not started yet."""
    async with WsHead() as head:
        made = Node(root, head)
        try:
            yield made
        finally:
            await made.clean()


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    process = procs.read_process(pid)
    return process is not None and process.state not in "ZX"


def ensure_copy(models: Path, storage: str = "disk") -> wire.EnsureCopy:
    """An order for the model."""
    return wire.EnsureCopy("org/m", "main", storage, (wire.Source(f"file://{models}/model.gguf"),))


def ensure_replica(root: Path, stop_after_ms: int = 0) -> wire.EnsureReplica:
    """An order for an engine of it."""
    return wire.EnsureReplica(
        "chat-0", "chat", "org/m", "main", "disk", "command",
        argv=(sys.executable, str(PROGRAM), "{port}", str(root)),
        health=wire.HealthSpec(period_s=0.2, canary={"max_tokens": 1}), stop_after_ms=stop_after_ms,
    )  # fmt: skip
