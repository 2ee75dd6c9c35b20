"""The head's settings: strict, from one YAML file, HERDER_HEAD_* variables and the command line, in that order."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from common import limits
from common.config import default_state_dir, load_config
from common.errors import InvalidConfig

PREFIX = "HERDER_HEAD"
_PUBLIC_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?/?")
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Root of the groups of settings."""


class TlsConfig(Group, frozen=True):
    """TLS is on when `cert` and `key` are given; with `client_ca`, clients must show a certificate it signed."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""

    @property
    def is_on(self) -> bool:
        return bool(self.cert)


class GatewayConfig(Group, frozen=True):
    """The OpenAI-compatible door at /v1."""

    enabled: bool = True
    connect_timeout_s: Seconds = 5.0
    first_byte_timeout_s: Seconds = 600.0  # a long prompt on a slow machine
    idle_timeout_s: Seconds = 120.0  # between two pieces of a stream
    in_flight_max: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 10_000  # requests at once; over it: 429
    bodies_bytes_max: Annotated[int, msgspec.Meta(ge=limits.GATEWAY_BODY_BYTES)] = 256 << 20  # in all; over it: 503
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = limits.DRAIN_MS / 1000  # of a stopped engine


class DoorConfig(Group, frozen=True):
    """Connections, before anybody has shown a token. 0: by the descriptors that the process may have."""

    connections_max: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0  # 0: two thirds of the descriptors
    connections_per_address_max: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0  # 0: half of connections_max
    header_timeout_s: Seconds = (
        limits.HEADER_READ_S
    )  # for the first request's line and headers, and for a TLS handshake
    keep_alive_s: Seconds = limits.KEEP_ALIVE_IDLE_S  # for the next request on a connection


class PlannerConfig(Group, frozen=True):
    """The planner. `calibration`: a file of `herder plan calibrate` below the state directory; empty: none is read."""

    calibration: str = "planner-calibration.json"


class LogsConfig(Group, frozen=True):
    """The head's own log in its state directory, beside what goes to standard error."""

    own_bytes_max: Annotated[int, msgspec.Meta(ge=65_536)] = 64 << 20
    age_max_s: Annotated[int, msgspec.Meta(ge=1)] = 14 * 86_400


class HeadConfig(Group, frozen=True):
    """Everything an operator can set. `metrics_open`: /metrics answers without a token."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 8470
    public_url: str = ""  # where nodes and people reach the head, as https://head.example:8470; empty: host and port
    state_dir: str = ""  # empty: systemd's StateDirectory, /var/lib/herder/head for root, else XDG
    allow_network_fs: bool = False  # SQLite's locks cannot be trusted there; two heads could run
    tls: TlsConfig = TlsConfig()
    metrics_open: bool = False
    recipes_dir: str = ""  # empty: the recipes that come with Herder
    door: DoorConfig = DoorConfig()
    gateway: GatewayConfig = GatewayConfig()
    planner: PlannerConfig = PlannerConfig()
    logs: LogsConfig = LogsConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @property
    def state_path(self) -> Path:
        """The state directory."""
        return Path(self.state_dir) if self.state_dir else default_state_dir("head")

    @property
    def calibration_path(self) -> Path | None:
        """The planner's calibration of this cluster, whether it is there or not."""
        return self.state_path / self.planner.calibration if self.planner.calibration else None

    @property
    def recipes_path(self) -> Path:
        """The folder of recipes: as set, beside this package in a wheel, or at the root of the source tree."""
        if self.recipes_dir:
            return Path(self.recipes_dir)
        packaged = Path(__file__).parent / "_recipes"
        return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the head."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def reachable_url(self) -> str:
        """Where the nodes reach the head; empty where that is not known, as with host 0.0.0.0 alone."""
        if self.public_url:
            return self.public_url.rstrip("/")
        return "" if self.host in ("0.0.0.0", "::") or not self.port else self.url

    @property
    def url(self) -> str:
        """Where a program on this machine reaches the head."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls.is_on else 'http'}://{host}:{self.port}"


def load(
    path: Path | None,
    *,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> HeadConfig:
    """The checked configuration. Raises: InvalidConfig."""
    config = load_config(HeadConfig, path=path, prefix=PREFIX, environ=environ, overrides=overrides)
    check(config)
    return config


def check(config: HeadConfig) -> None:
    """What types cannot say. Raises: InvalidConfig."""
    tls = config.tls
    if bool(tls.cert) != bool(tls.key):
        raise InvalidConfig("tls.cert and tls.key belong together", hint="set both, or neither")
    if tls.client_ca and not tls.cert:
        raise InvalidConfig("tls.client_ca needs tls.cert and tls.key")
    if not config.host:
        raise InvalidConfig("host is empty", hint="127.0.0.1 for this machine only, 0.0.0.0 for all addresses")
    if config.public_url and not _PUBLIC_URL.fullmatch(config.public_url):
        raise InvalidConfig(
            "public_url is an address such as https://head.example:8470", hint="without a path, a query or credentials"
        )
    if config.recipes_dir and not Path(config.recipes_dir).is_dir():
        raise InvalidConfig(f"recipes_dir: {config.recipes_dir} is not a folder")
    calibration = Path(config.planner.calibration)
    if calibration.is_absolute() or ".." in calibration.parts:
        raise InvalidConfig(
            f"planner.calibration: {calibration} is not below the state directory",
            hint="copy the file there and give its name",
        )
    ssl_context(tls)


def ssl_context(tls: TlsConfig) -> ssl.SSLContext | None:
    """The server's TLS context, or None when TLS is off. Raises: InvalidConfig."""
    if not tls.is_on:
        return None
    try:
        if Path(tls.key).stat().st_mode & 0o077:
            raise InvalidConfig(f"tls.key: {tls.key} is readable by others", hint=f"chmod 600 {tls.key}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(tls.cert, tls.key)
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl.SSLError is one
        raise InvalidConfig(f"tls: {error}", hint="PEM files: the chain in tls.cert, its key in tls.key") from None
    return context
