"""`herder up`: a head and an agent on this machine, as child processes.

In the foreground it shows both logs, each line with its origin, and Ctrl-C stops both cleanly: the agent first, so
that the head hears it leave. Detached, the two run on by themselves and log to files. Engines are children of
neither: they outlive both unless asked otherwise.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from herder.cli import daemons, engines, output
from herder.cli.command import Globals, pass_globals, verb
from herder.errors import HerderError
from herder.settings import Settings, read_token_file, state_base_dir

if TYPE_CHECKING:
    from herder.client_sync import Client

HEAD_READY_S = 60.0
AGENT_READY_S = 60.0
LOG_TAIL_BYTES = 4_096
EXIT_LOCKED = 3  # of herder-head: another head owns the state
COLOURS = {"head": "cyan", "agent": "magenta"}


@dataclass(slots=True)
class Plan:
    """What is to be started."""

    base: Path
    port: int
    agent_port: int
    node: str
    file_roots: Sequence[Path]
    llama_server: Path | None
    is_detached: bool
    options: Globals
    started_ns: int = field(default_factory=time.time_ns)


@verb(
    "up",
    examples=(
        "herder up",
        "herder up --file-root ~/models --llama-server /opt/llama.cpp/llama-server",
        "herder up --detach && herder status",
        "herder up --state-dir ./state --port 9470 --agent-port 9471 --node-id n1",
    ),
)
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where both keep their state (HERDER_STATE_DIR).")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8470, show_default=True, help="The head's; 0: any free one."
)
@click.option(
    "--agent-port", type=click.IntRange(0, 65_535), default=8471, show_default=True, help="The agent's /metrics."
)
@click.option("--node-id", help="Name of this node; default: the host's name.")
@click.option(
    "--file-root",
    "file_roots",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="file:// models may lie below it; may repeat; default: none, file:// is refused.",
)
@click.option(
    "--llama-server", type=click.Path(path_type=Path), metavar="PATH", help="llama.cpp's server; default: on PATH."
)
@click.option("--detach", "is_detached", is_flag=True, help="Return once both are ready; `herder down` stops them.")
@click.option(
    "--stop-engines",
    is_flag=True,
    help="At the end also stop this node's engines (deletes their services) and its RAM tier.",
)
@pass_globals
def command(
    options: Globals,
    state_dir: Path | None,
    port: int,
    agent_port: int,
    node_id: str | None,
    file_roots: tuple[Path, ...],
    llama_server: Path | None,
    is_detached: bool,
    stop_engines: bool,
) -> None:
    """Run a head and an agent on this machine, in the foreground, until Ctrl-C.

    Both listen on this machine only. Engines keep running when they stop, and are found again by the next `up`.
    HERDER_HEAD_* and HERDER_AGENT_* variables set what has no option here.
    """
    base = (state_dir or state_base_dir()).expanduser().absolute()
    if stop_engines and is_detached:
        raise click.UsageError("--stop-engines belongs to the foreground; `herder down --stop-engines` does it then")
    for root in file_roots:
        if not root.expanduser().is_dir():
            raise click.UsageError(f"--file-root {root} is not a folder")
    program = llama_server.expanduser() if llama_server else None
    if program and not (program.is_file() and os.access(program, os.X_OK)):
        raise click.UsageError(f"--llama-server {llama_server} is not a program")
    plan = Plan(
        base=base,
        port=port,
        agent_port=agent_port,
        node=node_id or daemons.node_id_of_host(),
        file_roots=[root.expanduser().resolve() for root in file_roots],
        llama_server=program.absolute() if program else None,
        is_detached=is_detached,
        options=options,
    )
    lock = daemons.take_lock(base)
    try:
        _refuse_second(plan)
        signal.signal(signal.SIGTERM, _interrupt)
        Pair(plan).run(stops_engines=stop_engines)
    finally:
        os.close(lock)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _refuse_second(plan: Plan) -> None:
    record = daemons.read_record(plan.base)
    if record and record.alive:
        raise daemons.already_running(plan.base, record)
    for port, name in ((plan.port, "--port"), (plan.agent_port, "--agent-port")):
        if port and daemons.is_port_open("127.0.0.1", port):
            raise HerderError(
                "port_taken",
                f"something listens on port {port} already",
                hint=f"`herder status` tells whether it is a head; {name} chooses another port",
            )


class Pair:
    """The two daemons of one `herder up`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
        self._is_coloured = output.has_colour(plan.options)
        self._url = ""

    def run(self, *, stops_engines: bool) -> None:
        """Starts both, says what to do next, and in the foreground stays until the end of one or Ctrl-C."""
        plan = self._plan
        try:
            self._start_head()
            self._start_agent()
            self._keep_record()
            self._say_ready()
            if plan.is_detached:
                return
            self._watch()
        except KeyboardInterrupt:
            self._stop(stops_engines=stops_engines)
            raise click.exceptions.Exit(output.EXIT_OK) from None
        except BaseException:
            self._stop(stops_engines=False)
            raise

    # starting
    def _start_head(self) -> None:
        plan = self._plan
        state = plan.base / "head"
        self._spawn("head", ["--state-dir", str(state), "--port", str(plan.port)], {})
        endpoint = state / "endpoint"

        def is_listening() -> bool:
            self._check_alive("head")
            try:
                return endpoint.stat().st_mtime_ns >= plan.started_ns and bool(endpoint.read_text().strip())
            except FileNotFoundError:
                return False

        if not daemons.wait_until(is_listening, HEAD_READY_S):
            raise HerderError(
                "timed_out", f"the head is not ready after {HEAD_READY_S:g} s", hint=self._log_hint("head")
            )
        self._url = endpoint.read_text().strip()

    def _start_agent(self) -> None:
        plan = self._plan
        environment = {
            "HERDER_AGENT_TOKEN_FILE": str(plan.base / "head" / "join.token"),
            "HERDER_AGENT_HTTP__PORT": str(plan.agent_port),
        }
        if plan.file_roots:
            import msgspec

            roots = msgspec.json.encode([str(root) for root in plan.file_roots]).decode()
            environment["HERDER_AGENT_SOURCES__FILE_ROOTS"] = roots
        if plan.llama_server:
            environment["HERDER_AGENT_ENGINES__LLAMACPP"] = str(plan.llama_server)
        arguments = ["--head", self._url, "--node-id", plan.node, "--state-dir", str(plan.base / "agent")]
        self._spawn("agent", arguments, environment)
        with self._client() as client:

            def is_online() -> bool:
                self._check_alive("agent")
                self._check_alive("head")
                return any(node.node_id == plan.node and node.state == "online" for node in client.nodes())

            if not daemons.wait_until(is_online, AGENT_READY_S):
                raise HerderError(
                    "timed_out", f"the agent is not online after {AGENT_READY_S:g} s", hint=self._log_hint("agent")
                )

    def _spawn(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        plan = self._plan
        stdout: int | IO[bytes] = subprocess.PIPE
        if plan.is_detached:
            stdout = _append(plan.base / f"{name}.log")
        child = subprocess.Popen(
            daemons.argv_of(name, arguments),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
            # A session of its own: Ctrl-C of the terminal reaches us only, and we end them in order.
            start_new_session=True,
        )
        if not isinstance(stdout, int):
            stdout.close()
        self._children[name] = child
        if child.stdout is not None:
            reader = threading.Thread(target=self._show, args=(name, child.stdout), name=f"log of {name}", daemon=True)
            reader.start()
            self._readers.append(reader)

    def _show(self, name: str, stream: IO[bytes]) -> None:
        label = f"{name:5} | "
        if self._is_coloured:
            label = click.style(label, fg=COLOURS[name])
        for line in stream:
            try:
                click.echo(label + line.decode(errors="replace").rstrip("\n"))
            except OSError:
                pass  # our own reader is gone; the pipe is still emptied, or the daemon would block

    def _check_alive(self, name: str) -> None:
        code = self._children[name].poll()
        if code is None:
            return
        for reader in self._readers:
            reader.join(1.0)
        if name == "head" and code == EXIT_LOCKED:
            raise HerderError(
                "state_locked",
                f"another head owns {self._plan.base / 'head'}",
                hint="a service of this machine (systemctl status herder-head)? --state-dir chooses another folder",
            )
        raise HerderError(f"{name}_ended", f"the {name} ended with exit code {code}", hint=self._log_hint(name))

    def _log_hint(self, name: str) -> str:
        if not self._plan.is_detached:
            return "its last lines above say why"
        return f"{self._plan.base / f'{name}.log'} says why"

    def _client(self) -> Client:
        from herder.client_sync import Client

        token = read_token_file(self._plan.base / "head" / "admin.token")
        ca_file = self._plan.options.ca_file or os.environ.get("HERDER_CA_FILE", "")
        return Client(settings=Settings(url=self._url, token=token, ca_file=ca_file))

    def _keep_record(self) -> None:
        record = daemons.Record(
            url=self._url,
            node=self._plan.node,
            head=daemons.Process.of(self._children["head"].pid),
            agent=daemons.Process.of(self._children["agent"].pid),
            supervisor=None if self._plan.is_detached else daemons.Process.of(os.getpid()),
        )
        daemons.write_record(self._plan.base, record)

    def _say_ready(self) -> None:
        plan = self._plan
        token = plan.base / "head" / "admin.token"
        roots = ", ".join(map(str, plan.file_roots))
        value = {"url": self._url, "node": plan.node, "state_dir": str(plan.base), "token_file": str(token)}
        value["join_token_file"] = str(plan.base / "head" / "join.token")
        facts = output.fields(
            plan.options,
            [
                ("head", self._url),
                ("node", plan.node),
                ("gateway", f"{self._url}/v1"),
                ("state", str(plan.base)),
                ("token", f"{token} (the herder command finds it)" if self._is_default() else str(token)),
                ("file://", f"below {roots}" if roots else "refused: no --file-root was given"),
                ("engines", str(plan.llama_server or "llama-server of PATH")),
            ],
        )
        setting = []
        if not self._is_default():
            setting = [f"export HERDER_STATE_DIR={shlex.quote(str(plan.base))}"]
        if self._url != "http://127.0.0.1:8470":
            setting.append(f"export HERDER_URL={self._url}")
        source = f"file://{plan.file_roots[0]}/MODEL.gguf" if plan.file_roots else "https://HOST/MODEL.gguf"
        steps = [
            *setting,
            "herder status",
            f"herder models add my-model --source {source}",
            f"herder serve my-model {plan.node}:dram",
            'herder chat my-model "Hello"',
        ]
        where = "`herder down` stops them" if plan.is_detached else "Ctrl-C stops them; engines keep running"
        lines = "\n".join(f"  {step}" for step in steps)
        output.emit(
            plan.options,
            value,
            f"herder is up; {where}\n\n{facts}\n\nnext, in another terminal:\n{lines}\n",
            quiet=self._url,
        )
        sys.stdout.flush()

    def _is_default(self) -> bool:
        return self._plan.base == state_base_dir().absolute()

    # staying and stopping
    def _watch(self) -> None:
        while True:
            for name in self._children:
                self._check_alive(name)
            time.sleep(0.2)

    def _stop(self, *, stops_engines: bool) -> None:
        # A second Ctrl-C must not leave one of the two behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        options = self._plan.options
        running = ""
        if self._url and all(child.poll() is None for child in self._children.values()):
            try:
                with self._client() as client:
                    running = engines.settle(options, client, self._plan.node, is_stopping=stops_engines)
            except HerderError as error:
                output.note(options, f"the engines could not be asked about: {error.message}")
        for name, seconds in (("agent", daemons.AGENT_STOP_S), ("head", daemons.HEAD_STOP_S)):
            child = self._children.get(name)
            if child is None or child.poll() is not None:
                continue
            output.note(options, f"stopping the {name}")
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                output.note(options, f"the {name} did not end in {seconds:g} s: killed")
                child.kill()
                child.wait(5.0)
        for reader in self._readers:
            reader.join(2.0)
        if not any(child.poll() is None for child in self._children.values()):
            (self._plan.base / daemons.RECORD_FILE).unlink(missing_ok=True)
            if stops_engines:
                try:
                    daemons.release(self._plan.base)
                except HerderError as error:
                    output.note(options, error.message)
        if running:
            output.note(options, running)


def _append(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab")
