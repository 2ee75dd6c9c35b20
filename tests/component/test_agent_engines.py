"""Driver, ledger and engines together, with real shims and processes, without a head: start, probes, ends, logs."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import procs
from agent.config import EnginesConfig
from agent.core import effects as fx
from agent.core import events as ev
from agent.core.objects import ReplicaTask
from agent.core.state import State, load
from agent.driver import Driver
from agent.ledger import Ledger
from agent.logs import LogService
from agent.metadata.inspect import inspect
from agent.replicas import Replicas
from agent.run_files import RunFiles
from agent.runtimes.registry import find_engines, make_runtimes
from common import wire
from common.clock import SystemClock
from common.tasks import Supervisor
from head.planner.model.headers import architecture_of_registered
from head.planner.serving.need import LlamaCppSettings, llama_cpp_need
from tests.doubles.ws_head import until

PROGRAM = Path(__file__).parents[1] / "doubles" / "engine_program.py"
OP = "replica:chat-0"


class Rig:
    """An agent without link, mover and holder."""

    def __init__(self, root: Path, *, llama_server: str = "") -> None:
        self.root = root
        self.manners = root / "manners"
        self.manners.mkdir(exist_ok=True)
        self.tasks = Supervisor("rig")
        self.ledger = Ledger(root / "ledger.db")
        self.state = load(State(), self.ledger.load())
        self.driver = Driver(self.state, self.ledger, SystemClock(), self.release)
        self.files = RunFiles(root / "replicas")
        self.files.root.mkdir(exist_ok=True)
        self.gpu_bytes = 0
        self.runtimes = make_runtimes(EnginesConfig(llamacpp=llama_server))
        self.replicas = Replicas(
            self.files,
            self.runtimes,
            self.driver.post,
            self.tasks,
            gpu_memory=lambda pids: self.gpu_bytes,
            rng=random.Random(),
        )
        self.sent: list[wire.Message] = []
        self.chunks: list[wire.LogChunk] = []
        self.logs = LogService(self.tasks, self.files.find, self._chunk)

    async def _chunk(self, chunk: wire.LogChunk) -> None:
        self.chunks.append(chunk)

    def release(self, effect: fx.Effect) -> None:
        """Performs what concerns engines."""
        match effect:
            case fx.SendMessage():
                self.sent.append(effect.message)
            case fx.SpawnReplica():
                self.replicas.spawn(effect)
            case fx.AttachReplica():
                self.replicas.attach(effect)
            case fx.SignalReplica():
                self.replicas.signal(effect)
            case fx.ProbeReplica():
                self.replicas.probe(effect)
            case fx.RunHealthCheck():
                self.replicas.check(effect)
            case fx.ForgetReplica():
                self.replicas.forget(effect)
            case _:
                pass

    def order(self, script: str = "", **fields: object) -> wire.EnsureReplica:
        """An engine: the program of tests/doubles, or a shell script."""
        argv = ["sh", "-c", script] if script else [sys.executable, str(PROGRAM), "{port}", str(self.manners)]
        values: dict[str, object] = {
            "service": "chat",
            "model": "",
            "revision": "",
            "storage": "disk",
            "runtime": "command",
            "argv": tuple(argv),
            "health": wire.HealthSpec(period_s=0.1, timeout_s=5, failures=2),
            **fields,
        }
        return wire.EnsureReplica("chat-0", **values)  # type: ignore[arg-type]

    def command(self, body: wire.AnyCommand, generation: int, op_id: str = OP) -> None:
        """A command of the head."""
        self.driver.post(ev.CommandReceived(wire.Command(op_id, generation, 1, "job-1", body)))

    @property
    def task(self) -> ReplicaTask:
        """The replica's task."""
        return self.state.replicas["chat-0"]

    def is_in(self, state: str) -> Callable[[], bool]:
        """Whether the replica is in a state."""
        return lambda: "chat-0" in self.state.replicas and self.task.state == state

    def result(self, generation: int, op_id: str = OP) -> wire.Result | None:
        """A result, once it was sent."""
        for message in self.sent:
            if isinstance(message, wire.Result) and (message.op_id, message.generation) == (op_id, generation):
                return message
        return None

    def members(self) -> list[int]:
        """Every process of the replica's runs."""
        return [p.pid for run in range(10) for p in procs.members(0, self.files.mark("chat-0", run))]


@asynccontextmanager
async def rig(root: Path, *, has_session: bool = True, llama_server: str = "") -> AsyncIterator[Rig]:
    """A rig that runs; closing it is what the end of an agent process is to its engines."""
    made = Rig(root, llama_server=llama_server)
    await made.replicas.start()
    made.tasks.start("driver", made.driver.run())
    made.driver.post(ev.AgentStarted(procs.boot_id(), str(root / "store/models")))
    made.driver.post(ev.MoverReady(()))
    if has_session:
        made.driver.post(ev.SessionOpened("s", "n1", wire.Welcome(1, "c", 1, "s", 60_000, 5_000, 0, "")))
    try:
        yield made
    finally:
        await made.tasks.close()
        await made.replicas.close()
        made.driver.close()
        made.ledger.close()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> object:
    """Whatever a test left running is killed."""
    yield
    for run in range(10):
        procs.kill_all(0, str(tmp_path / "replicas" / "chat-0" / str(run)), within_s=5)


def visible(pid: int) -> list[bytes]:
    """What other processes may see of a process."""
    return [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]


def remove_ledger(root: Path) -> None:
    """The ledger is lost."""
    for path in root.glob("ledger.db*"):
        path.unlink()


async def test_start_ready_stop(tmp_path: Path) -> None:
    """An engine starts, answers on its port, reports its memory, and is stopped with nothing left."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(api_key="k-123"), 1)
        await until(agent.is_in("ready"), "ready")
        await until(lambda: agent.state.engine("chat-0").memory_bytes > 1 << 20, "its memory")
        agent.command(wire.StopReplica("chat-0", grace_s=5), 2)
        await until(lambda: agent.result(2), "the result")
        assert agent.members() == []
        assert agent.task.exit_code == -15
        assert agent.replicas.engines == {}


async def test_secrets_stay_in_private_files(tmp_path: Path) -> None:
    """The engine's key stands in a 0600 file, in no argv and no environment, and is removed with the replica."""
    async with rig(tmp_path) as agent:
        argv = (sys.executable, str(PROGRAM), "{port}", str(agent.manners), "{api_key_file}")
        agent.command(agent.order(argv=argv, api_key="k-123"), 1)
        await until(agent.is_in("ready"), "ready")
        key = tmp_path / "replicas/chat-0/1/api_key"
        assert key.read_text().strip() == "k-123"
        assert key.stat().st_mode & 0o077 == 0
        assert not any(b"k-123" in text for pid in agent.members() for text in visible(pid))
        agent.command(wire.StopReplica("chat-0"), 2)
        await until(lambda: agent.result(2), "the result")
        agent.driver.post(ev.ResultAcked(OP, 2))
        await until(lambda: not key.exists(), "the key is gone")


async def test_engine_gets_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHON*, VIRTUAL_ENV, HERDER_* and our bin dir do not reach the engine; its own env does."""
    ours = os.path.dirname(sys.executable)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("HERDER_AGENT_TOKEN_FILE", "/ours")
    monkeypatch.setenv("PATH", f"{ours}:/usr/bin:/bin")
    async with rig(tmp_path) as agent:
        agent.command(agent.order("env; sleep 600", env={"ENGINE_WORD": "{port}"}), 1)
        log = tmp_path / "replicas/chat-0/1/log.000000000000000"
        await until(lambda: log.exists() and "ENGINE_WORD" in log.read_text(), "the environment")
        lines = dict(line.split("=", 1) for line in log.read_text().splitlines())
        assert lines["ENGINE_WORD"].isdigit()
        assert lines["PATH"] == "/usr/bin:/bin"
        assert not [name for name in lines if name.startswith(("PYTHON", "VIRTUAL_ENV", "HERDER_AGENT"))]
        assert "/ours" not in lines.values()


async def test_crash_is_restarted_and_fails_with_its_last_words(tmp_path: Path) -> None:
    """An engine that always crashes is failed after its restarts, with exit code and last lines."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order("echo starting; echo no memory >&2; exit 4", max_restarts=1), 1)
        await until(lambda: agent.result(1), "the result")
        assert agent.task.state == "failed"
        result = agent.result(1)
        assert result is not None
        assert result.outcome == "failed"
        assert (result.detail["exit_code"], result.detail["last_log"]) == (4, ["starting", "no memory"])
        assert agent.task.run == 2


async def test_missing_program_fails_at_once(tmp_path: Path) -> None:
    """A program that is not there is engine_missing, without restarts."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(argv=("/no/such/engine",)), 1)
        await until(lambda: agent.result(1), "the result")
        assert agent.task.state == "failed"
        result = agent.result(1)
        assert result is not None
        assert result.error is not None
        assert result.error.code == "engine_missing"


async def test_stubborn_engine_is_killed(tmp_path: Path) -> None:
    """An engine that ignores SIGTERM, with children in other sessions that do too, is gone after the grace."""
    stubborn = "trap '' TERM; setsid sh -c \"trap '' TERM; sleep 600\" & while :; do sleep 0.05; done"
    async with rig(tmp_path) as agent:
        agent.command(agent.order(stubborn), 1)
        await until(lambda: len(agent.members()) >= 4, "all its processes")
        agent.command(wire.StopReplica("chat-0", grace_s=0.2), 2)
        await until(lambda: agent.result(2), "the result")
        assert agent.members() == []
        assert agent.task.exit_code == -9


async def test_not_stopped_before_gpu_memory_came_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the driver still counts memory for the engine's processes, the replica is not stopped."""
    monkeypatch.setattr("agent.replicas.GPU_TIMEOUT_S", 0.3)
    async with rig(tmp_path) as agent:
        agent.command(agent.order(gpu_uuids=("GPU-1",)), 1)
        await until(agent.is_in("ready"), "ready")
        agent.gpu_bytes = 5 << 30
        agent.command(wire.StopReplica("chat-0"), 2)
        await until(lambda: agent.task.error is not None, "the complaint")
        assert agent.task.error is not None
        assert agent.task.error.details["gpu_bytes"] == 5 << 30
        assert agent.result(2) is None
        agent.gpu_bytes = 0
        await until(lambda: agent.result(2), "the result")


async def test_hung_engine_with_healthy_health(tmp_path: Path) -> None:
    """/health says 200 but no token comes: unhealthy, ended, started again, and ready when it works again."""
    health = wire.HealthSpec(period_s=0.1, timeout_s=0.3, failures=2, canary={"max_tokens": 1})
    async with rig(tmp_path) as agent:
        agent.command(agent.order(health=health), 1)
        await until(agent.is_in("ready"), "ready")
        (agent.manners / "hang").touch()
        await until(lambda: agent.task.restarts == 1, "a restart")
        assert agent.task.error is not None
        assert "no token" in agent.task.error.message
        (agent.manners / "hang").unlink()
        await until(agent.is_in("ready"), "ready again")
        assert agent.task.run == 2


async def test_busy_engine_is_not_hung(tmp_path: Path) -> None:
    """A late token is excused while the engine's own step counter grows."""
    from agent.runtimes.health import probe
    from agent.runtimes.llamacpp import LlamaCpp

    health = wire.HealthSpec(period_s=60, timeout_s=0.3, canary={"max_tokens": 1})
    async with rig(tmp_path) as agent:
        order = agent.order(health=health)
        agent.command(order, 1)
        await until(agent.is_in("ready"), "ready")
        http = agent.replicas._http
        assert http is not None
        (agent.manners / "busy").touch()
        well = await probe(http, LlamaCpp(), order, "127.0.0.1", agent.task.port, with_canary=True)
        (agent.manners / "hang").touch()
        (agent.manners / "busy").unlink()
        sick = await probe(http, LlamaCpp(), order, "127.0.0.1", agent.task.port, with_canary=True)
        assert well is None
        assert sick is not None


async def test_reattach(tmp_path: Path) -> None:
    """The next agent process finds the engine by its files: same process, still ready, and can stop it."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(), 1)
        await until(agent.is_in("ready"), "ready")
        before = (agent.task.pid, agent.task.port)
    async with rig(tmp_path) as agent:
        await until(lambda: agent.state.engine("chat-0").phase == "alive", "found again")
        assert (agent.task.state, agent.task.pid, agent.task.port) == ("ready", *before)
        agent.command(wire.StopReplica("chat-0"), 2)
        await until(lambda: agent.result(2), "the result")
        assert agent.members() == []


async def test_exit_while_no_agent_was_there(tmp_path: Path) -> None:
    """An engine that ended without an agent is told with its real exit code and started again for the head."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(), 1)
        await until(agent.is_in("ready"), "ready")
        engine = agent.files.identity("chat-0", 1)
    assert engine is not None
    os.kill(engine.pid, 6)
    await until((tmp_path / "replicas/chat-0/1/exit.json").exists, "exit.json")
    async with rig(tmp_path, has_session=False) as agent:
        await until(lambda: agent.task.exit_code == -6, "the exit code")
        assert agent.task.run == 1


async def test_shim_killed_with_its_agent(tmp_path: Path) -> None:
    """When the shim is gone too, the orphaned engine is found by its mark, ended, and started afresh."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(), 1)
        await until(agent.is_in("ready"), "ready")
        engine = agent.files.identity("chat-0", 1)
    assert engine is not None
    os.kill(engine.shim_pid, 9)
    await until(lambda: os.waitpid(engine.shim_pid, os.WNOHANG)[0], "its end")
    assert procs.is_running(engine.pid, engine.ticks)
    async with rig(tmp_path) as agent:
        await until(lambda: agent.task.run == 2 and agent.task.state == "ready", "a fresh engine")
        assert not procs.is_running(engine.pid, engine.ticks)


async def test_engine_without_an_order_is_ended(tmp_path: Path) -> None:
    """After the ledger was lost, an engine that nobody knows of is ended rather than left for ever."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(), 1)
        await until(agent.is_in("ready"), "ready")
    remove_ledger(tmp_path)
    async with rig(tmp_path) as agent:
        assert agent.members()
        await agent.replicas.kill_orphans(set(agent.state.replicas))
        assert agent.members() == []


async def test_fixed_port_that_is_taken(tmp_path: Path) -> None:
    """A port that somebody holds is told as port_taken and tried again until it is free."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with rig(tmp_path) as agent:
        agent.command(agent.order(port=port), 1)
        await until(lambda: "chat-0" in agent.state.replicas and agent.task.error is not None, "the complaint")
        assert agent.task.error is not None
        assert agent.task.error.code == "port_taken"
        server.close()
        await server.wait_closed()
        await until(agent.is_in("ready"), "ready")
        assert agent.task.port == port


async def test_logs_tail_follow_and_runs(tmp_path: Path) -> None:
    """The last lines, what comes after, and the run before; a follower ends with the run."""
    async with rig(tmp_path) as agent:
        script = "echo one; echo two; echo drei é; while [ ! -e manners/../go ]; do sleep 0.02; done; echo last"
        agent.command(agent.order(script.replace("manners/..", str(tmp_path)), max_restarts=1), 1)
        await until(lambda: "chat-0" in agent.state.replicas and agent.task.pid, "a process")
        log = tmp_path / "replicas/chat-0/1/log.000000000000000"
        await until(lambda: log.exists() and "drei" in log.read_text(), "its lines")
        agent.logs.received(wire.LogRequest("tail", "chat-0", tail_lines=2))
        await until(lambda: [c for c in agent.chunks if c.request_id == "tail" and c.is_last], "the tail")
        assert "".join(c.data for c in agent.chunks if c.request_id == "tail") == "two\ndrei é\n"
        agent.logs.received(wire.LogRequest("follow", "chat-0", tail_lines=1, follow=True))
        await until(lambda: [c for c in agent.chunks if c.request_id == "follow"], "the beginning")
        (tmp_path / "go").touch()
        await until(lambda: [c for c in agent.chunks if c.request_id == "follow" and c.is_last], "the end")
        assert "".join(c.data for c in agent.chunks if c.request_id == "follow") == "drei é\nlast\n"
        await until(agent.is_in("failed"), "failed")
        agent.logs.received(wire.LogRequest("before", "chat-0", run=1, offset=0))
        agent.logs.received(wire.LogRequest("none", "chat-0", run=9))
        await until(lambda: [c for c in agent.chunks if c.request_id == "none"], "both answers")
        await until(lambda: [c for c in agent.chunks if c.request_id == "before" and c.is_last], "both answers")
        assert "".join(c.data for c in agent.chunks if c.request_id == "before").startswith("one\n")
        (refused,) = [c for c in agent.chunks if c.request_id == "none"]
        assert refused.error is not None
        assert refused.error.code == "not_found"


async def test_ledger_that_cannot_write_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the ledger cannot be written no engine is started; once it can, everything goes on by itself."""
    import sqlite3

    monkeypatch.setattr("common.limits.LEDGER_RETRY_S", 0.02)
    async with rig(tmp_path) as agent:
        await agent.driver.settled()
        append = agent.ledger.append

        def fail(records: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(agent.ledger, "append", fail)
        agent.command(agent.order(), 1)
        await until(lambda: agent.driver.is_ledger_stuck, "the ledger is stuck")
        assert agent.members() == []
        assert agent.sent == [] or not any(isinstance(message, wire.Result) for message in agent.sent)
        monkeypatch.setattr(agent.ledger, "append", append)
        await until(agent.is_in("ready"), "ready")


async def test_check_health_asks_the_engine(tmp_path: Path) -> None:
    """CheckHealth of a replica asks it by its own health spec, and of a URL the URL."""
    async with rig(tmp_path) as agent:
        agent.command(agent.order(), 1)
        await until(agent.is_in("ready"), "ready")
        agent.command(wire.CheckHealth("chat-0"), 5, op_id="check:1")
        agent.command(wire.CheckHealth(url=f"http://127.0.0.1:{agent.task.port}/health"), 6, op_id="check:2")
        agent.command(wire.CheckHealth(url="tcp://127.0.0.1:1"), 7, op_id="check:3")
        await until(lambda: agent.result(7, "check:3"), "the last answer")
        await until(lambda: agent.result(5, "check:1") and agent.result(6, "check:2"), "all answers")
        outcomes = [agent.result(n, f"check:{n - 4}") for n in (5, 6, 7)]
        assert [result.outcome for result in outcomes if result is not None] == ["ok", "ok", "failed"]


async def ends_by_illegal_instruction(server: str, gguf: str) -> bool:
    """Whether the engine alone, without anything of ours, cannot run on this CPU (prebuilt ones assume much)."""
    argv = (server, "--model", gguf, "--host", "127.0.0.1", "--port", "0", "--device", "none", "--ctx-size", "256")
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(10):
            return await process.wait() == -4
    except TimeoutError:
        process.kill()
        await process.wait()
        return False


def estimated_bytes(directory: Path, *, context: int, slots: int) -> int:
    """What the head would reserve for a llama-server of this model on the CPU."""
    arch = architecture_of_registered(inspect(directory)[1])
    size = sum(path.stat().st_size for path in directory.glob("*.gguf"))
    return llama_cpp_need(arch, size, LlamaCppSettings(context=context, slots=slots), 0).host_bytes


@pytest.mark.engine
async def test_real_llama_server(tmp_path: Path) -> None:
    """A real llama-server serves a real model: version, readiness, key, a completion, its memory, and a clean stop."""
    import aiohttp

    server, gguf = os.environ.get("HERDER_TEST_LLAMA_SERVER", ""), os.environ.get("HERDER_TEST_GGUF", "")
    if not server or not gguf:
        pytest.skip("HERDER_TEST_LLAMA_SERVER and HERDER_TEST_GGUF name no engine and model; scripts/test sets them")
    if await ends_by_illegal_instruction(server, gguf):
        pytest.skip("this build of llama-server needs CPU instructions that this machine lacks (SIGILL by itself)")
    directory = tmp_path / "store/models/smol@main"
    directory.mkdir(parents=True)
    (directory / "model.gguf").symlink_to(gguf)
    async with rig(tmp_path, llama_server=server) as agent:
        assert "llamacpp" in await asyncio.to_thread(find_engines, agent.runtimes)
        order = agent.order(
            runtime="llamacpp",
            argv=(),
            served_name="smol",
            api_key="k-456",
            config={"context": 1024, "parallel": 2, "threads": 1},
            health=wire.HealthSpec(
                period_s=0.5, timeout_s=30, canary={"prompt": "a", "max_tokens": 1}, canary_path="/v1/completions"
            ),
            model="smol",
            revision="main",
        )
        from agent.mover.protocol import HeldCopy

        agent.driver.post(ev.MoverReady((HeldCopy("smol", "main", str(directory), 1, "b3:0", "gguf"),)))
        agent.command(order, 1)
        await until(agent.is_in("ready"), "ready", timeout_s=90)
        url = f"http://127.0.0.1:{agent.task.port}/v1/completions"
        body = {"model": "smol", "prompt": "2+2=", "max_tokens": 4}
        async with aiohttp.ClientSession() as http:
            async with http.post(url, json=body) as refused:
                assert refused.status == 401
            async with http.post(url, json=body, headers={"Authorization": "Bearer k-456"}) as answer:
                said = await answer.json()
        assert said["usage"]["completion_tokens"] == 4
        await until(lambda: agent.state.engine("chat-0").memory_bytes > 50 << 20, "its memory")
        estimated = estimated_bytes(directory, context=1_024, slots=2)
        assert 0.7 * estimated < agent.state.engine("chat-0").memory_bytes < 1.05 * estimated
        agent.command(wire.StopReplica("chat-0"), 2)
        await until(lambda: agent.result(2), "the result")
        assert agent.task.exit_code == 0
        assert agent.members() == []
