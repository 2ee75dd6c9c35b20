"""The head as a real process: start, stop, kill, restart, refuse, restore."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import re
import resource
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, web

from common import wire
from head.config import HeadConfig
from head.context import HeadContext
from head.daemon import Daemon
from head.journal import Journal
from head.journal_schema import FILE_NAME
from tests.doubles.head_shell import FakeAgent, hello

ROOT = Path(__file__).parents[2]
START_S = 30


class Head:
    """A head process and what it said."""

    def __init__(self, state: Path, *args: str, **environ: str) -> None:
        self.state = state
        self.lines: list[str] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HERDER_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "head", "--state-dir", str(state), "--port", "0", *args],
            cwd=ROOT,
            env={**clean, **environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._unread: queue.SimpleQueue[str] = queue.SimpleQueue()  # "" at the end
        threading.Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._unread.put(line)
        self._unread.put("")

    def read_until(self, pattern: str) -> re.Match[str]:
        """Reads its log up to a line that matches."""
        deadline = time.monotonic() + START_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._unread.get(timeout=left)
            except queue.Empty:
                break
            if not line:
                break
            self.lines.append(line.rstrip())
            match = re.search(pattern, line)
            if match:
                return match
        raise AssertionError(f"{pattern!r} did not come:\n" + "\n".join(self.lines))

    def ready(self) -> Head:
        """Waits until it serves."""
        self.url = self.read_until(r"herder-head \S+ at (\S+),")[1]
        return self

    def token(self, name: str = "admin") -> str:
        """A token from the state directory."""
        return (self.state / f"{name}.token").read_text().strip()

    def call(self, method: str, path: str, body: object = None, *, token: str | None = None) -> tuple[int, Any]:
        """One HTTP request."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token or self.token()}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stops it and returns its exit code."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=START_S)
        self.lines += rest.splitlines()
        return self.process.returncode


@pytest.fixture
def heads() -> Iterator[list[Head]]:
    """Heads to be ended after the test, however it went."""
    started: list[Head] = []
    yield started
    for head in started:
        if head.process.poll() is None:
            head.process.kill()
        head.process.communicate(timeout=START_S)


def run_to_end(state: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A head that is expected to end by itself."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HERDER_")}
    return subprocess.run(
        [sys.executable, "-m", "head", "--state-dir", str(state), *args],
        cwd=ROOT,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


@contextlib.asynccontextmanager
async def agent_of(head: Head, node: str = "n1") -> AsyncIterator[FakeAgent]:
    """A websocket of an agent, with the join token."""
    headers = {"Authorization": f"Bearer {head.token('join')}"}
    async with aiohttp.ClientSession() as client, client.ws_connect(f"{head.url}/api/v1/agent", headers=headers) as ws:
        agent = FakeAgent(ws)
        await agent.say(hello(node))
        yield agent


async def welcome_of(agent: FakeAgent) -> wire.Welcome:
    """The head's welcome."""
    message = await agent.hear()
    assert isinstance(message, wire.Welcome), message
    return message


def test_a_whole_life(tmp_path: Path, heads: list[Head]) -> None:
    """First start makes tokens; a model outlives restarts; the epoch grows; a stop tells agents and is clean."""
    head = Head(tmp_path)
    heads.append(head)
    head.ready()
    posture = head.lines[-1]
    assert "open to this machine only" in posture
    assert f"state in {tmp_path}" in posture
    assert "keys admin:1 operator:0 viewer:0 agent:1 inference:0" in posture
    for name in ("admin.token", "join.token", FILE_NAME, "endpoint", "owner"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    assert (tmp_path / "endpoint").read_text().strip() == head.url
    tokens = head.token(), head.token("join")
    assert not any(token.rpartition("_")[2] in "\n".join(head.lines) for token in tokens)
    status, _ = head.call("POST", "/api/v1/models", {"name": "org/tiny", "source_url": "file:///models/tiny"})
    assert status == 201

    async def live() -> tuple[int, int | None]:
        async with agent_of(head) as agent:
            welcome = await welcome_of(agent)
            await agent.say(wire.Lease(1, 1))
            while not isinstance(await agent.hear(), wire.Ack):
                pass
            head.process.send_signal(signal.SIGTERM)
            return welcome.head_epoch, await agent.hear_end()

    assert asyncio.run(live()) == (1, WSCloseCode.SERVICE_RESTART)
    assert head.end() == 0
    assert not (tmp_path / "endpoint").exists()
    assert not (tmp_path / f"{FILE_NAME}-wal").exists()

    again = Head(tmp_path)
    heads.append(again)
    again.ready()
    assert (again.token(), again.token("join")) == tokens
    assert "epoch 2, 1 nodes, 1 models" in again.lines[-1]
    assert again.call("GET", "/api/v1/models/org/tiny")[1]["name"] == "org/tiny"
    assert any("was_clean=True" in line for line in again.lines)
    assert again.end(signal.SIGINT) == 0


def test_kill_9_loses_nothing_that_was_answered(tmp_path: Path, heads: list[Head]) -> None:
    """Killed right after an answer, the head comes back with what it answered, checks itself, and locks again."""
    for start in range(3):
        head = Head(tmp_path)
        heads.append(head)
        head.ready()
        if start:
            assert any("was not clean" in line for line in head.lines)
        for number in range(start):
            assert head.call("GET", f"/api/v1/models/m{number}")[0] == 200
        assert head.call("POST", "/api/v1/models", {"name": f"m{start}"})[0] == 201
        assert head.end(signal.SIGKILL) == -9


def test_a_second_head_refuses(tmp_path: Path, heads: list[Head]) -> None:
    """Two heads on one state directory: the second says who has it and ends with 3; the first does not notice."""
    head = Head(tmp_path)
    heads.append(head)
    head.ready()
    second = run_to_end(tmp_path, "--port", "0")
    assert second.returncode == 3
    assert f"(pid {head.process.pid})" in second.stderr
    assert second.stderr.count("\n") == 1
    assert head.call("GET", "/api/v1/health")[0] == 200


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """The line says which address, and how to find who has it; nothing stays locked."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_to_end(tmp_path, "--port", str(port))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"127.0.0.1:{port} is in use" in last
    assert "Traceback" not in done.stderr
    assert Journal.open(tmp_path / FILE_NAME).was_clean


@pytest.mark.parametrize(
    ("args", "environ", "says"),
    [
        (("--port", "http"), {}, "'http' is not a valid integer"),
        ((), {"HERDER_HEAD_PORT": "high"}, "Expected `int`"),
        ((), {"HERDER_HEAD_LISTEN": "x"}, "unknown field `listen`"),
        (("--config", "/nowhere.yaml"), {}, "No such file"),
        ((), {"HERDER_HEAD_TLS__CERT": "x.pem"}, "belong together"),
        (("--check-config",), {"HERDER_HEAD_LOG_LEVEL": "loud"}, "loud"),
    ],
)
def test_wrong_settings_end_with_2(tmp_path: Path, args: tuple[str, ...], environ: dict[str, str], says: str) -> None:
    """A mistake in the configuration is one clear line and exit code 2, before anything is touched."""
    done = run_to_end(tmp_path / "state", *args, **environ)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()


def test_check_config_touches_nothing(tmp_path: Path) -> None:
    """A good configuration is confirmed without a state directory being made."""
    done = run_to_end(tmp_path / "state", "--check-config")
    assert done.returncode == 0, done.stderr
    assert "configuration is good" in done.stdout
    assert not (tmp_path / "state").exists()


def test_a_bad_recipe_is_named(tmp_path: Path) -> None:
    """Recipes are part of the configuration: a mistake in one refuses the start with its place."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "bad.yaml").write_text("name: bad\nruntime: steam\ncategory: x\n")
    done = run_to_end(tmp_path / "state", "--port", "0", HERDER_HEAD_RECIPES_DIR=str(tmp_path / "recipes"))
    assert done.returncode == 2
    assert "bad.yaml: runtime 'steam'" in done.stderr


def test_systemd_is_told(tmp_path: Path, heads: list[Head]) -> None:
    """READY once it serves, WATCHDOG while its ticks are handled, STOPPING when it ends."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        server.settimeout(START_S)
        head = Head(tmp_path / "state", NOTIFY_SOCKET=str(path), WATCHDOG_USEC="400000")
        heads.append(head)
        assert server.recv(4096).startswith(b"READY=1\nSTATUS=herder-head")
        assert server.recv(100) == b"WATCHDOG=1"
        assert server.recv(100) == b"WATCHDOG=1"
        assert head.end() == 0
        while (notice := server.recv(100)) != b"STOPPING=1":
            assert notice == b"WATCHDOG=1"


def test_recipes_are_read_again_on_sighup(tmp_path: Path, heads: list[Head]) -> None:
    """A good change is taken, a bad one is logged and the old recipes stay."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = "name: {name}\ncategory: inference\nruntime: command\ncommand: [sleep, '1']\n"
    (folder / "one.yaml").write_text(recipe.format(name="one"))
    head = Head(tmp_path / "state", HERDER_HEAD_RECIPES_DIR=str(folder))
    heads.append(head)
    head.ready()
    (folder / "two.yaml").write_text(recipe.format(name="two"))
    head.process.send_signal(signal.SIGHUP)
    head.read_until("recipes reloaded recipes=2")
    (folder / "two.yaml").write_text("nonsense: [")
    head.process.send_signal(signal.SIGHUP)
    head.read_until("recipes were not reloaded")
    _, page = head.call("GET", "/api/v1/recipes")
    assert sorted(item["name"] for item in page["items"]) == ["one", "two"]


def test_benchmark_recipes_are_read_again_on_sighup(tmp_path: Path, heads: list[Head]) -> None:
    """As engines' recipes: a good one is taken, and with a bad one everything stays as it was."""
    folder = tmp_path / "recipes" / "benchmark"
    folder.mkdir(parents=True)
    recipe = "name: {name}\nserver: {{urls: ['http://h:1']}}\nload: {{rate: 1, duration: 10s, model: m}}\n"
    (folder / "one.yaml").write_text(recipe.format(name="one"))
    head = Head(tmp_path / "state", HERDER_HEAD_RECIPES_DIR=str(tmp_path / "recipes"))
    heads.append(head)
    head.ready()
    (folder / "two.yaml").write_text(recipe.format(name="two"))
    head.process.send_signal(signal.SIGHUP)
    head.read_until("recipes reloaded recipes=0 benchmarks=2")
    (folder / "two.yaml").write_text(recipe.format(name="one"))
    head.process.send_signal(signal.SIGHUP)
    head.read_until("recipes were not reloaded")
    _, page = head.call("GET", "/api/v1/benchmark-recipes")
    assert [(item["name"], item["path"]) for item in page["items"]] == [
        ("one", "benchmark/one.yaml"),
        ("two", "benchmark/two.yaml"),
    ]


def test_tls_and_the_posture_of_an_open_head(tmp_path: Path, heads: list[Head]) -> None:
    """With TLS the door speaks TLS only; open to the network without it, the posture line says PLAIN."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    key.chmod(0o600)
    secure = Head(tmp_path / "a", HERDER_HEAD_TLS__CERT=str(cert), HERDER_HEAD_TLS__KEY=str(key))
    heads.append(secure)
    secure.ready()
    assert secure.url.startswith("https://")
    trust = ssl.create_default_context(cafile=str(cert))
    with urllib.request.urlopen(secure.url + "/healthz", context=trust, timeout=20) as answer:
        assert answer.status == 200
    with pytest.raises(OSError):
        urllib.request.urlopen(secure.url.replace("https", "http") + "/healthz", timeout=20)
    plain = Head(tmp_path / "b", "--host", "0.0.0.0")
    heads.append(plain)
    plain.ready()
    assert "open to the network (0.0.0.0), PLAIN" in plain.lines[-1]


def test_backup_and_restore(tmp_path: Path, heads: list[Head]) -> None:
    """A backup of a running head, restored elsewhere, serves; agents that saw the old head accept the new epoch."""
    head = Head(tmp_path / "old")
    heads.append(head)
    head.ready()
    assert head.call("POST", "/api/v1/models", {"name": "kept"})[0] == 201
    request = urllib.request.Request(head.url + "/api/v1/backup", headers={"Authorization": f"Bearer {head.token()}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        (tmp_path / "backup.sqlite").write_bytes(answer.read())
    assert head.call("POST", "/api/v1/models", {"name": "lost"})[0] == 201
    busy = run_to_end(tmp_path / "old", "--restore", str(tmp_path / "backup.sqlite"), "--force")
    assert busy.returncode == 3
    admin = head.token()
    assert head.end() == 0
    refused = run_to_end(tmp_path / "old", "--restore", str(tmp_path / "backup.sqlite"))
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    done = run_to_end(tmp_path / "old", "--restore", str(tmp_path / "backup.sqlite"), "--force")
    assert done.returncode == 0, done.stderr
    assert "next epoch 1002" in done.stdout
    again = Head(tmp_path / "old")
    heads.append(again)
    again.ready()
    assert again.call("GET", "/api/v1/models/kept", token=admin)[0] == 200
    assert again.call("GET", "/api/v1/models/lost", token=admin)[0] == 404

    async def join() -> int:
        async with agent_of(again) as agent:
            return (await welcome_of(agent)).head_epoch

    assert asyncio.run(join()) == 1002


def test_a_disk_that_cannot_be_written(tmp_path: Path, heads: list[Head]) -> None:
    """Real failing writes: changes answer 507, reads and leases go on, and the head recovers by itself."""
    head = Head(tmp_path)
    heads.append(head)
    head.ready()
    assert head.call("POST", "/api/v1/models", {"name": "before"})[0] == 201

    async def lease_while_full() -> wire.Message:
        async with agent_of(head) as agent:
            await welcome_of(agent)
            _, most = resource.prlimit(head.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(head.process.pid, resource.RLIMIT_FSIZE, (1, most))
            status, answer = await asyncio.to_thread(head.call, "POST", "/api/v1/models", {"name": "refused"})
            assert (status, answer["error"]["code"]) == (507, "state_read_only")
            assert (await asyncio.to_thread(head.call, "GET", "/api/v1/models/before"))[0] == 200
            assert (await asyncio.to_thread(head.call, "GET", "/api/v1/models/refused"))[0] == 404
            _, health = await asyncio.to_thread(head.call, "GET", "/api/v1/health")
            assert (health["status"], health["is_read_only"]) == ("degraded", True)
            await agent.say(wire.Lease(77, 1))
            while not isinstance(message := await agent.hear(), wire.Ack):
                pass
            resource.prlimit(head.process.pid, resource.RLIMIT_FSIZE, (most, most))
            return message

    ack = asyncio.run(lease_while_full())
    assert isinstance(ack, wire.Ack)
    assert ack.seq == 77
    head.read_until("the journal writes again")
    assert head.call("POST", "/api/v1/models", {"name": "refused"})[0] == 201
    assert head.end() == 0


def test_a_lost_admin_token_is_replaced(tmp_path: Path, heads: list[Head]) -> None:
    """--new-admin-token makes another key; the old one still works until it is revoked."""
    head = Head(tmp_path)
    heads.append(head)
    head.ready()
    old = head.token()
    head.end()
    again = Head(tmp_path, "--new-admin-token")
    heads.append(again)
    again.ready()
    assert again.token() != old
    assert again.call("GET", "/api/v1/keys", token=old)[0] == 200
    assert again.call("GET", "/api/v1/keys")[0] == 200


def test_a_stopped_process_does_not_lose_its_agents(tmp_path: Path, heads: list[Head]) -> None:
    """SIGSTOP for longer than a tick: after SIGCONT the session goes on and the lease is renewed."""
    head = Head(tmp_path)
    heads.append(head)
    head.ready()

    async def pause() -> wire.Message:
        async with agent_of(head) as agent:
            await welcome_of(agent)
            head.process.send_signal(signal.SIGSTOP)
            await agent.say(wire.Lease(5, 1))
            await asyncio.sleep(2.5)  # the length of the stall is what is tested
            head.process.send_signal(signal.SIGCONT)
            while not isinstance(message := await agent.hear(), wire.Ack):
                pass
            return message

    ack = asyncio.run(pause())
    assert isinstance(ack, wire.Ack)
    assert ack.seq == 5
    assert head.call("GET", "/api/v1/nodes/n1")[1]["state"] != "unreachable"


async def test_losing_an_organ_ends_the_daemon(tmp_path: Path) -> None:
    """When the driver's stepper dies, the daemon ends with 1 instead of playing healthy."""

    def small_app(context: HeadContext) -> web.Application:
        return web.Application()

    daemon = Daemon(HeadConfig(port=0, state_dir=str(tmp_path)), build_app=small_app)

    def kill_the_stepper() -> None:
        tasks = [task for task in asyncio.all_tasks() if task.get_name() == "driver/step"]
        assert len(tasks) == 1
        tasks[0].cancel()

    assert await daemon.run(on_ready=kill_the_stepper) == 1
