"""Settings of a mover: what its agent gives it in one JSON file at start."""

from __future__ import annotations

from pathlib import Path

import msgspec

from common import limits
from common.errors import InvalidConfig
from herder.decoding import UNREADABLE


class SshSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How ssh:// sources are reached. Host keys are always checked against `known_hosts`."""

    key_files: tuple[str, ...] = ()  # empty: ssh-agent and the default keys of the user
    known_hosts: str = ""  # empty: ~/.ssh/known_hosts
    connect_timeout_s: float = limits.SOURCE_CONNECT_TIMEOUT_S


class MoverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mover. Bytes are bytes; 0 as a budget means "what the file system has"."""

    store_dir: str
    instance: str = ""  # names this mover where several share one store directory (use the node id there)
    disk_budget_bytes: int = 0  # the store may use this much in all; 0: the whole file system
    reserve_bytes: int = 1 << 30  # left free on the file system, always
    data_host: str = "127.0.0.1"  # where the blob server listens
    data_port: int = 0  # 0: the kernel chooses; `Ready` tells
    file_roots: tuple[str, ...] = ()  # file:// sources must lie below one of these; none: file:// is refused
    fetches: int = 32  # fetches that run at the same time; more wait
    connections: int = limits.MOVER_CONNECTIONS  # transfer threads in all
    connections_per_source: int = 4
    write_mode: str = "auto"  # "auto" | "direct" | "paced" | "buffered"
    hf_endpoint: str = ""  # empty: HF_ENDPOINT or the hub itself
    hf_token_file: str = ""  # empty: HF_TOKEN, then HF_TOKEN_PATH
    http_token_files: dict[str, str] = {}  # "host" or "host:port" -> file with a bearer token for it
    allow_link_local: bool = False  # http(s) may connect to link-local and metadata addresses
    ssh: SshSettings = SshSettings()
    checkpoint_bytes: int = limits.CHECKPOINT_BYTES
    checkpoint_s: float = limits.CHECKPOINT_S
    attempts: int = limits.SOURCE_ATTEMPTS
    retry_base_ms: int = 500
    retry_cap_ms: int = 30_000
    connect_timeout_s: float = limits.SOURCE_CONNECT_TIMEOUT_S
    read_timeout_s: float = limits.SOURCE_READ_TIMEOUT_S
    orphan_ttl_s: float = 86_400.0  # unfinished parts that nobody asks for are removed after this


def load(path: Path) -> MoverConfig:
    """The settings in a JSON file. Raises: InvalidConfig."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=MoverConfig)
    except (OSError, *UNREADABLE) as error:
        raise InvalidConfig(f"mover configuration {path}: {error}") from None
    if not Path(config.store_dir).is_absolute():
        raise InvalidConfig("store_dir must be an absolute path")
    if config.write_mode not in ("auto", "direct", "paced", "buffered"):
        raise InvalidConfig(f"write_mode {config.write_mode!r}", hint="auto, direct, paced or buffered")
    if config.instance and not all(char.isalnum() or char in ".-" for char in config.instance):
        raise InvalidConfig(f"instance {config.instance!r}", hint="letters, digits, '.' and '-'")
    if min(config.fetches, config.connections, config.connections_per_source, config.attempts) < 1:
        raise InvalidConfig("fetches, connections, connections_per_source and attempts must be at least 1")
    return config
