"""Configuration: one strict YAML file, environment variables over it, command-line values over both.

A daemon describes its configuration as a frozen msgspec Struct with defaults (nested Structs for groups). An
unknown key, a wrong type or an unreadable file is an InvalidConfig that names the place. The variable for
`tls.cert` of the head is HERDER_HEAD_TLS__CERT: prefix, then the path with double underscores; values are YAML.
Secrets are never configured by value: settings name files, which must not be readable by others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from common.errors import HerderError, InvalidConfig, PortTaken

T = TypeVar("T", bound=msgspec.Struct)


def load_config(
    cls: type[T],
    *,
    path: Path | None,
    prefix: str,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """The configuration from file, environment and overrides ("tls.cert": value); None overrides are skipped.

    prefix: "HERDER_HEAD" or "HERDER_AGENT". Raises: InvalidConfig.
    """
    document: dict[str, Any] = {}
    if path is not None:
        document = _read(path)
    for name, text in sorted(environ.items()):
        if name.startswith(prefix + "_") and name != f"{prefix}_CONFIG":
            keys = name[len(prefix) + 1 :].lower().split("__")
            _set(document, keys, _yaml(text, name), name)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(document, dotted.split("."), value, dotted)
    try:
        return msgspec.convert(document, cls)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"configuration: {error}", hint="docs/configuration.md lists every setting") from None


def listen_error(host: str, port: int, error: OSError, *, group: str = "") -> HerderError:
    """Why a daemon cannot listen where its configuration says. group: `http.` where its settings are in one."""
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"{where} is in use by another program",
            hint=f"`ss -ltnp sport = :{port}` shows which; or set {group}port",
        )
    if error.errno == errno.EACCES:
        return InvalidConfig(f"{where}: this user may not listen there", hint="use a port above 1023")
    hint = f"is `{group}host` an address of this machine?"
    return InvalidConfig(f"{where}: {error.strerror or error}", hint=hint)


def read_secret(path: Path) -> str:
    """The first line of a secret file. Raises: InvalidConfig when it is missing, empty or open to others."""
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    if mode & 0o077:
        raise InvalidConfig(f"{path}: readable by others", hint=f"chmod 600 {path}")
    if not text:
        raise InvalidConfig(f"{path}: empty")
    return text.splitlines()[0]


def default_state_dir(name: str) -> Path:
    """Where a daemon keeps its state by default: systemd's StateDirectory, /var/lib for root, else XDG."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/herder") / name
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "herder" / name


def _read(path: Path) -> dict[str, Any]:
    try:
        document = _yaml(path.read_text(), str(path))
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InvalidConfig(f"{path}: not a mapping of settings")
    return document


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None


def _set(document: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    for key in keys[:-1]:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise InvalidConfig(f"{where}: {key} is not a group of settings")
    document[keys[-1]] = value
