"""The agent's settings: strict, from one YAML file, HERDER_AGENT_* variables and the command line, in that order."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from agent.tls import TlsConfig, client_context
from common.config import default_state_dir, load_config, read_secret
from common.errors import HerderError, InvalidConfig
from common.ids import check_labels, check_node_id

PREFIX = "HERDER_AGENT"
Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Root of the groups of settings."""


class HttpConfig(Group, frozen=True):
    """The agent's own /metrics and /healthz. Off loopback it needs `token_file`, or `metrics_open: true`."""

    host: str = "127.0.0.1"
    port: Port = 8471
    token_file: str = ""
    metrics_open: bool = False


class DataConfig(Group, frozen=True):
    """Where other nodes fetch model bytes; every request needs a ticket of the head. Port 0: the kernel chooses."""

    host: str = "127.0.0.1"
    port: Port = 0


class EnginesConfig(Group, frozen=True):
    """Engines. `llamacpp`: path of llama-server, empty: on PATH. `command`: recipes may start any program.
    `pass_env`: variables of the agent that engines get beside those that all get (docs/security.md).
    """

    llamacpp: str = ""
    command: bool = True
    pass_env: tuple[str, ...] = ()


class SourcesConfig(Group, frozen=True):
    """Sources of models. `file_roots`: file:// must lie below one of these; none: refused."""

    file_roots: tuple[str, ...] = ()
    hf_endpoint: str = ""
    hf_token_file: str = ""
    http_token_files: dict[str, str] = {}
    ssh_key_files: tuple[str, ...] = ()
    ssh_known_hosts: str = ""


class LogsConfig(Group, frozen=True):
    """Logs. Those of ended runs are kept up to `bytes_max` together and for `age_max_s`; the agent's own beside them.
    `roots`: folders below which Slurm's files (slurm-JOBID.out) may be read.
    """

    bytes_max: Bytes = 1 << 30
    age_max_s: Annotated[int, msgspec.Meta(ge=1)] = 14 * 86_400
    own_bytes_max: Annotated[int, msgspec.Meta(ge=65_536)] = 64 << 20
    roots: tuple[str, ...] = ()


class AgentConfig(Group, frozen=True):
    """Everything an operator can set. Budgets in bytes; None: half the memory, 0.9 of the store's file system."""

    head_url: str = ""
    node_id: str = ""  # empty: the host name
    token_file: str = ""  # the agent's key for the head, 0600
    state_dir: str = ""  # empty: systemd's StateDirectory, /var/lib/herder/agent for root, else XDG
    store_dir: str = ""  # empty: "store" in the state directory
    allow_network_fs: bool = False
    advertise: str = ""  # address under which the head and other nodes reach this one; empty: the first of its own
    engine_host: str = "127.0.0.1"  # where engines listen
    dram_budget_bytes: Bytes | None = None
    dram_tmpfs: str = ""  # a tmpfs (best with huge=within_size) for RAM copies; empty: the store's files stay in RAM
    disk_budget_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    disk_reserve_bytes: Bytes = 1 << 30  # left free on the store's file system, always
    allow_link_local: bool = False  # sources and health checks may use link-local and metadata addresses
    labels: dict[str, str] = {}
    launch_id: str = ""
    http: HttpConfig = HttpConfig()
    data: DataConfig = DataConfig()
    engines: EnginesConfig = EnginesConfig()
    sources: SourcesConfig = SourcesConfig()
    tls: TlsConfig = TlsConfig()
    logs: LogsConfig = LogsConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @property
    def state_path(self) -> Path:
        """The state directory."""
        return Path(self.state_dir).absolute() if self.state_dir else default_state_dir("agent")

    @property
    def store_path(self) -> Path:
        """Where model files stand."""
        return Path(self.store_dir).absolute() if self.store_dir else self.state_path / "store"

    @property
    def node(self) -> str:
        """This node's id."""
        return self.node_id or sanitised(socket.gethostname())

    def token(self) -> str:
        """The agent's key for the head; "" when none is set (a head that asks for none does not exist)."""
        return read_secret(Path(self.token_file)) if self.token_file else ""


def load_agent_config(
    path: Path | None, *, environ: Mapping[str, str] = os.environ, overrides: Mapping[str, Any] | None = None
) -> AgentConfig:
    """The settings, checked as far as it goes without touching the network. Raises: InvalidConfig."""
    config = load_config(AgentConfig, path=path, prefix=PREFIX, environ=environ, overrides=overrides)
    check(config)
    return config


def check(config: AgentConfig) -> None:
    """What the types cannot say. Raises: InvalidConfig."""
    url = urlsplit(config.head_url)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.username:
        raise InvalidConfig(f"head_url: {config.head_url!r}", hint="as http://head.example:8470")
    if url.scheme == "http" and config.tls != TlsConfig():
        raise InvalidConfig("tls is set, but head_url is http", hint="use https in head_url")
    if url.scheme == "https":
        tls_context(config)
    try:
        check_node_id(config.node)
        check_labels(config.labels)
    except HerderError as error:
        raise InvalidConfig(f"node_id or labels: {error.message}", hint=error.hint) from None
    if not config.token_file:
        raise InvalidConfig("token_file is not set", hint="`herder keys create --role agent` makes a join token")
    config.token()
    if not is_loopback(config.http.host) and not config.http.token_file and not config.http.metrics_open:
        raise InvalidConfig(
            f"/metrics on {config.http.host} would be open to all who reach it",
            hint="set http.token_file, or http.metrics_open: true",
        )
    if config.http.token_file:
        read_secret(Path(config.http.token_file))
    if config.dram_tmpfs and not Path(config.dram_tmpfs).is_absolute():
        raise InvalidConfig(f"dram_tmpfs: {config.dram_tmpfs!r} is not absolute")
    for name, roots in (("sources.file_roots", config.sources.file_roots), ("logs.roots", config.logs.roots)):
        for root in roots:
            if not Path(root).is_absolute():
                raise InvalidConfig(f"{name}: {root!r} is not absolute")


def tls_context(config: AgentConfig) -> ssl.SSLContext | None:
    """How an https head is checked; None for http. Raises: InvalidConfig."""
    return client_context(config.tls) if config.head_url.startswith("https:") else None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def sanitised(hostname: str) -> str:
    """A host name as a node id: lower case, odd characters to '-'."""
    text = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9.-]+", "-", hostname.lower())).strip(".-")
    return text[:63].rstrip(".-") or "node"


def posture(config: AgentConfig) -> str:
    """One line: what is open, to whom, where state lives."""

    def reach(host: str) -> str:
        return "this machine" if is_loopback(host) else "the network"

    metrics = "a token" if config.http.token_file else "anyone"
    engines = "" if is_loopback(config.engine_host) else " by their own keys"
    roots = ", ".join(config.sources.file_roots) or "refused"
    return (
        f"node {config.node}; head {config.head_url}"
        f"{'' if config.head_url.startswith('https:') else ' (not encrypted)'}; "
        f"metrics {config.http.host}:{config.http.port} for {metrics} on {reach(config.http.host)}; "
        f"model bytes {config.data.host}:{config.data.port or '(any)'} by ticket on {reach(config.data.host)}; "
        f"engines on {config.engine_host} for {reach(config.engine_host)}{engines}; "
        f"free commands {'on' if config.engines.command else 'off'}; file sources {roots}; "
        f"state {config.state_path}; store {config.store_path}"
    )
