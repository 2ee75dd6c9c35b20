"""Where the head is and how to prove who asks: arguments, environment, contexts, and the local state directory.

Address: the argument, HERDER_URL, the context's server, http://127.0.0.1:8470.
Token: the argument, HERDER_TOKEN_FILE, HERDER_TOKEN, the context's token file (only towards that context's server),
the local head's admin.token (only towards this machine). A token file that others can read is refused.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from herder.errors import HerderConfigError

DEFAULT_URL = "http://127.0.0.1:8470"
CODE = "client_config"


class Context(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One head that a person works with, as kept in the configuration file. Paths may start with ~."""

    server: str
    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class ContextsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """~/.config/herder/config.yaml."""

    contexts: dict[str, Context] = {}
    current: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a client needs to talk to a head. An empty token sends none; `token_origin` says where it was found."""

    url: str = DEFAULT_URL
    token: str = ""
    token_origin: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


def state_base_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the daemons of this machine keep their state: HERDER_STATE_DIR, /var/lib for root, else XDG."""
    given = environ.get("HERDER_STATE_DIR", "")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/herder")
    base = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "herder"


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The file of contexts: HERDER_CONFIG, else below XDG_CONFIG_HOME or ~/.config."""
    given = environ.get("HERDER_CONFIG", "")
    if given:
        return Path(given)
    return Path(environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")) / "herder" / "config.yaml"


def discover(
    *,
    url: str | None = None,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    context: str | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    cert_file: str | os.PathLike[str] | None = None,
    key_file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings from all places; an argument wins over the environment, which wins over the context.

    Raises: HerderConfigError.
    """
    chosen = _context(context or environ.get("HERDER_CONTEXT", ""), environ)
    # An explicit context is an argument: it wins over HERDER_URL.
    address = url or (chosen.server if chosen and context else "") or environ.get("HERDER_URL", "")
    address = check_url(address or (chosen.server if chosen else "") or DEFAULT_URL)
    theirs = chosen if chosen and check_url(chosen.server) == address else None
    found, origin = _token(address, token, token_file, theirs, environ)
    pick = theirs or Context(server=address)
    return Settings(
        url=address,
        token=found,
        token_origin=origin,
        ca_file=_path(ca_file or environ.get("HERDER_CA_FILE", "") or pick.ca_file),
        cert_file=_path(cert_file or environ.get("HERDER_CERT_FILE", "") or pick.cert_file),
        key_file=_path(key_file or environ.get("HERDER_KEY_FILE", "") or pick.key_file),
    )


def check_url(text: str) -> str:
    """A head's address without a trailing slash; `host:port` means http. Raises: HerderConfigError."""
    address = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(address)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment or parts.username:
        raise HerderConfigError(
            CODE, f"{text[:120]!r} is not the address of a head", hint="as in http://head.example:8470"
        )
    return address


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token_file(path: Path) -> str:
    """The token in a file: its first line. Raises: HerderConfigError, also when others can read it."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise HerderConfigError(
            CODE, f"token file {path}: {reason}", hint="`herder keys create` makes tokens; keep each in a 0600 file"
        ) from None
    if mode & 0o077:
        raise HerderConfigError(CODE, f"token file {path} is readable by others", hint=f"chmod 600 {path}")
    if not lines:
        raise HerderConfigError(CODE, f"token file {path} is empty")
    return lines[0]


def _token(
    address: str,
    token: str | None,
    token_file: str | os.PathLike[str] | None,
    context: Context | None,
    environ: Mapping[str, str],
) -> tuple[str, str]:
    if token:
        return token.strip(), "argument"
    for name, source in (
        (str(token_file) if token_file else "", "--token-file"),
        (environ.get("HERDER_TOKEN_FILE", ""), "HERDER_TOKEN_FILE"),
    ):
        if name:
            return read_token_file(Path(name).expanduser()), f"{source} {name}"
    if environ.get("HERDER_TOKEN"):
        return environ["HERDER_TOKEN"].strip(), "HERDER_TOKEN"
    if context and context.token_file:
        return read_token_file(Path(context.token_file).expanduser()), f"context, {context.token_file}"
    if is_loopback(address):
        path = state_base_dir(environ) / "head" / "admin.token"
        # Unreadable is as good as absent: an ordinary user beside a head of root's simply has no token here.
        if os.access(path, os.R_OK):
            return read_token_file(path), str(path)
    return "", ""


def _context(name: str, environ: Mapping[str, str]) -> Context | None:
    path = config_path(environ)
    try:
        text = path.read_text()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise HerderConfigError(CODE, f"{path}: {reason}") from None
    document = _parse(text, path) if text.strip() else ContextsFile()
    name = name or document.current
    if not name:
        return None
    if name not in document.contexts:
        known = ", ".join(sorted(document.contexts)) or "none"
        raise HerderConfigError(CODE, f"no context {name!r} in {path}", hint=f"known contexts: {known}")
    return document.contexts[name]


def _parse(text: str, path: Path) -> ContextsFile:
    import yaml

    try:
        return msgspec.convert(yaml.safe_load(text) or {}, ContextsFile)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HerderConfigError(
            CODE, f"{path}: {reason}", hint="contexts: {lab: {server: https://head:8470, token_file: ~/.herder-token}}"
        ) from None


def _path(value: str | os.PathLike[str]) -> str:
    return str(Path(value).expanduser()) if value else ""
