"""A whole cluster on one machine: a head, agents with their movers, holders and engines, all real processes.

    with Cluster(tmp_path) as cluster:
        node = cluster.add_agent("n1")
        cluster.serve_tiny("chat", "n1")

Everything a cluster starts carries its folder in its command line or environment, so that `close` finds and ends
every process, however the test went. `FAST` are the limits of a cluster whose leases are to run out in a test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import urlsplit

import yaml

from agent import procs
from herder import Client
from herder.errors import HerderError
from herder.types import CopyView, CreateService, JobView, NodeView, ReplicaView, ServiceView
from tests.e2e.processes import ROOT, Daemon, clean_environ, end_all, is_alive, until
from tests.e2e.proxy import Proxy

FAST: dict[str, int] = {"INTERVAL_FLOOR_MS": 1_000, "SETTLE_MS": 4_000}
CLI = "from herder.cli.main import main; main()"
TINY = Path(__file__).with_name("tiny_engine.py")
TINY_RECIPE = """
name: tiny
category: inference
runtime: command
needs_model: {needs_model}
command: [{python}, -I, -S, {program}, "{{port}}", {folder}]
health: {{path: /health, timeout_s: 1, period_s: 0.5, ready_timeout_s: 20, failures: 2}}
stop_grace_s: 2
"""
LLAMA_RECIPE = """
name: quick-llama
category: inference
runtime: llamacpp
model_formats: [gguf]
health: {path: /health, timeout_s: 4, period_s: 0.5, ready_timeout_s: 60, failures: 3,
         canary_path: /v1/completions, canary: {prompt: "a", max_tokens: 1, temperature: 0}}
config: {context: 512, parallel: 1, threads: 0, gpu_layers: -1, embeddings: false, args: []}
stop_grace_s: 5
"""


def daemon_argv(module: str, limits: Mapping[str, int]) -> list[str]:
    """How a daemon is run, with other limits where some are given."""
    if not limits:
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-P", "-m", "tests.e2e.scaled", module, json.dumps(dict(limits))]


class Head(Daemon):
    """The head. Its port is the kernel's choice at the first start and stays over restarts."""

    def __init__(self, folder: Path, recipes: Path, limits: Mapping[str, int]) -> None:
        super().__init__("head", folder / "head.log")
        self.state = folder / "head"
        self.port = 0
        self._recipes = recipes
        self._limits = limits

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def token(self, name: str = "admin") -> str:
        """A token of its state folder."""
        return (self.state / f"{name}.token").read_text().strip()

    def argv(self, *more: str) -> list[str]:
        """Its command line."""
        return [*daemon_argv("head", self._limits), "--state-dir", str(self.state), "--port", str(self.port), *more]

    def environ(self) -> dict[str, str]:
        """Its environment."""
        return {**clean_environ(), "HERDER_HEAD_RECIPES_DIR": str(self._recipes)}

    def start(self) -> Head:
        """Starts it and waits until it serves."""
        endpoint = self.state / "endpoint"
        endpoint.unlink(missing_ok=True)  # of one that was killed
        self.spawn(self.argv(), self.environ())
        until(lambda: not self.is_running or (endpoint.exists() and endpoint.read_text().strip()), "a head that serves")
        assert self.is_running, self.tail()
        self.port = urlsplit(endpoint.read_text().strip()).port or 0
        return self

    def run_to_end(self, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """The same command once more, expected to end by itself."""
        return subprocess.run(
            self.argv(*args), env={**self.environ(), **environ}, capture_output=True, text=True, timeout=30, check=False
        )

    def call(
        self, method: str, path: str, body: object = None, *, token: str | None = None, timeout_s: float = 20.0
    ) -> tuple[int, Any]:
        """One HTTP request without a client's kindness: its status and answer."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token or self.token()}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def read(self, path: str) -> str:
        """The text of a page, as /metrics."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token()}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            text: str = answer.read().decode()
            return text

    def rss_bytes(self) -> int:
        """Its memory now."""
        process = procs.read_process(self.pid)
        assert process is not None
        return process.resident_bytes


class Agent(Daemon):
    """An agent with its own folder, ports and node id."""

    def __init__(self, folder: Path, node: str, head_url: str, settings: Mapping[str, object]) -> None:
        super().__init__(f"agent {node}", folder / "agent.log")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.node = node
        self.state = folder / "state"
        self.store = folder / "state" / "store"
        self.limits: dict[str, int] = {}  # other than the real ones
        self.prefix: list[str] = []  # of its command line: what it is run under
        self.environ: dict[str, str] = {}  # beside the usual
        self.settings: dict[str, object] = {
            "head_url": head_url,
            "node_id": node,
            "state_dir": str(self.state),
            "dram_budget_bytes": 256 << 20,
            "disk_reserve_bytes": 0,
            "http": {"port": 0},
            **settings,
        }

    def start(self) -> Agent:
        """Starts it, and waits for the session with its head."""
        sessions = self.log().count("session open")
        self.begin()
        self.wait_session(sessions + 1)
        return self

    def begin(self) -> None:
        """Starts it without waiting."""
        argv = [*self.prefix, *daemon_argv("agent", self.limits), "--config", str(self.write())]
        self.spawn(argv, {**clean_environ(), **self.environ})

    def write(self, name: str = "agent.yaml", **changes: object) -> Path:
        """Writes its configuration, changed where asked."""
        path = self.folder / name
        path.write_text(yaml.safe_dump({**self.settings, **changes}))
        return path

    def run_to_end(self, config: Path) -> subprocess.CompletedProcess[str]:
        """An agent on a configuration that is expected to end by itself."""
        argv = [*daemon_argv("agent", {}), "--config", str(config)]
        return subprocess.run(argv, env=clean_environ(), capture_output=True, text=True, timeout=30, check=False)

    def wait_session(self, count: int) -> None:
        """Waits for the so-manieth session of all its lives."""
        self.wait_logged("session open", count)

    def sessions(self) -> int:
        """How many sessions it has had."""
        return self.log().count("session open")

    def child(self, words: str) -> int:
        """The one process of this agent whose command line holds the words, as "agent.mover"."""

        def found() -> list[int]:
            mine = []
            for process in procs.processes():
                try:
                    line = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended meanwhile
                if words in line and str(self.state) in line:
                    mine.append(process.pid)
            return mine

        return until(lambda: found()[:1], f"{words} of {self.node}")[0]

    def parts(self) -> list[str]:
        """What lies in the private folders of its store: unfinished files and trash."""
        return [f"{name}/{path.name}" for name in ("part", "trash") for path in (self.store / name).glob("*")]

    def published(self, model: str, revision: str = "main") -> Path:
        """The folder that engines open."""
        return self.store / "models" / f"{model}@{revision}"


class Cluster:
    """See the module."""

    live: ClassVar[list[Cluster]] = []  # for the logs of failed tests

    def __init__(self, folder: Path, *, limits: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.control = folder / "control"
        self.recipes = folder / "recipes"
        for made in (self.models, self.control, self.recipes):
            made.mkdir(parents=True)
        self._write_recipes()
        self.head = Head(folder, self.recipes, limits or {})
        self.agents: dict[str, Agent] = {}
        self.proxies: list[Proxy] = []
        self._client: Client | None = None
        Cluster.live.append(self)

    def __enter__(self) -> Cluster:
        try:
            self.head.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the cluster and removes its files; logs stay."""
        if self._client is not None:
            self._client.close()
        for proxy in self.proxies:
            proxy.close()
        end_all(self.folder)
        for daemon in (self.head, *self.agents.values()):
            if daemon.is_running:
                daemon.wait_ended()
        for agent in self.agents.values():
            shutil.rmtree(agent.store, ignore_errors=True)
        Cluster.live.remove(self)

    def _write_recipes(self) -> None:
        for source in (ROOT / "recipes" / "inference").glob("*.yaml"):
            shutil.copy(source, self.recipes)
        words = {"python": sys.executable, "program": str(TINY), "folder": str(self.control)}
        (self.recipes / "tiny.yaml").write_text(TINY_RECIPE.format(needs_model="true", **words))
        (self.recipes / "quick-llama.yaml").write_text(LLAMA_RECIPE)

    # its parts
    @property
    def client(self) -> Client:
        """The Python client, with the admin's token."""
        if self._client is None:
            self._client = Client(self.head.url, token=self.head.token())
        return self._client

    def add_agent(
        self, node: str, *, url: str = "", is_started: bool = True, token: str | None = None, **settings: object
    ) -> Agent:
        """One more agent. settings: of its configuration."""
        folder = self.folder / node
        folder.mkdir()
        secret = folder / "token"
        secret.write_text((self.head.token("join") if token is None else token) + "\n")
        secret.chmod(0o600)
        sources = {"file_roots": [str(self.models)]}
        given = {"token_file": str(secret), "sources": sources, **settings}
        agent = Agent(folder, node, url or self.head.url, given)
        self.agents[node] = agent
        if is_started:
            agent.start()
            self.wait_node(node)
        return agent

    def proxied(self) -> Proxy:
        """A proxy to the head, closed with the cluster."""
        proxy = Proxy(("127.0.0.1", self.head.port))
        self.proxies.append(proxy)
        return proxy.__enter__()

    def cli(self, *args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Runs the `herder` command."""
        environ = {
            **clean_environ(),
            "HERDER_URL": self.head.url,
            "HERDER_TOKEN_FILE": str(self.head.state / "admin.token"),
            "HERDER_CONFIG": str(self.folder / "no-contexts"),
            "HERDER_STATE_DIR": str(self.folder),
            "COLUMNS": "200",
        }
        argv = [sys.executable, "-P", "-c", CLI, *args]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False)

    # what is asked of it
    def make_model(self, name: str, size: int = 300_000, *, source: str = "") -> Path:
        """A registered model of random bytes in a file below the agents' file root, or at another source."""
        path = self.models / f"{name.replace('/', '--')}.bin"
        if not source:
            path.write_bytes(os.urandom(size))
        self.client.register_model(name, source=source or f"file://{path}")
        return path

    def download(self, model: str, node: str) -> JobView:
        """A model on a node's disk."""
        return self.client.wait_job(self.client.download(model, f"{node}:disk"), timeout_s=40)

    def serve_tiny(self, service: str, node: str, *, storage: str = "disk", **spec: Any) -> ReplicaView:
        """A tiny engine on a model of its own; returns its ready replica."""
        if service not in {model.name for model in self.client.models()}:
            self.make_model(service, 20_000)
        wanted = CreateService(name=service, model=service, recipe="tiny", devices=(f"{node}:{storage}",), **spec)
        self.client.create_service(wanted)
        return self.wait_replica(service, lambda replica: replica.state == "ready")

    # what is waited for
    def wait_node(self, node: str, state: str = "online", timeout_s: float = 30.0) -> NodeView:
        """Waits for a node's state."""
        return until(
            lambda: next((view for view in self.client.nodes() if view.node_id == node and view.state == state), None),
            f"{node} {state}",
            timeout_s,
        )

    def wait_replica(
        self, service: str, condition: Callable[[ReplicaView], object], timeout_s: float = 30.0
    ) -> ReplicaView:
        """Waits for a replica of a service of which something is true."""
        return until(
            lambda: next((view for view in self.client.replicas(service=service) if condition(view)), None),
            f"the replica of {service}",
            timeout_s,
        )

    def copy(self, model: str, device: str) -> CopyView | None:
        """A copy as the head sees it."""
        return next((view for view in self.client.copies(model=model, device=device)), None)

    def wait_copy(self, model: str, device: str, state: str, timeout_s: float = 30.0) -> CopyView:
        """Waits for a copy's state."""

        def found() -> CopyView | None:
            view = self.copy(model, device)
            return view if view is not None and view.state == state else None

        return until(found, f"{model} on {device} {state}", timeout_s)

    def service(self, name: str) -> ServiceView:
        """A service as the head sees it."""
        return self.client.service(name)

    def chat(self, model: str, words: int = 3) -> str:
        """An answer through the gateway."""
        return "".join(chunk.text for chunk in self.client.chat(model, "Hello", max_tokens=words))


@contextmanager
def stream_of(base_url: str, model: str, words: int, *, token: str = "") -> Iterator[Iterator[str]]:
    """A streamed chat with whatever speaks OpenAI's HTTP at an address; yields the pieces of text.

    `ignore_eos` makes llama-server go on to `max_tokens`, and at temperature 0 the text is the same each time: how long
    the stream is must not be chance (drawn tokens may be control tokens, which give no text).
    """
    body: dict[str, object] = {"model": model, "stream": True, "max_tokens": words, "ignore_eos": True}
    body["temperature"] = 0
    body["messages"] = [{"role": "user", "content": "Hello"}]
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        yield _pieces(answer)


def _pieces(lines: Iterator[bytes]) -> Iterator[str]:
    for line in lines:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            text = json.loads(line[6:])["choices"][0]["delta"].get("content")
            if text:
                yield text


def code_of(call: Callable[[], object]) -> str:
    """The code of the error that a call ends with; "" when it succeeds."""
    try:
        call()
    except HerderError as error:
        return error.code
    return ""


def wait_dead(pid: int, timeout_s: float = 20.0) -> None:
    """Waits for the end of a process that is not our child."""
    until(lambda: not is_alive(pid), f"the end of {pid}", timeout_s)
