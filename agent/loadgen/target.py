"""Where requests go: a URL taken apart, its address resolved once, its TLS context."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from agent.loadgen.apis import Api
from agent.loadgen.login import Login

MAX_TRIED = 4  # addresses of one name
TRY_S = 2.0
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OWN = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")


@dataclass(frozen=True, slots=True)
class Target:
    """One server and what is asked there."""

    host: str
    port: int
    is_tls: bool
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    is_unverified: bool = False
    ca_file: str | None = None
    client: tuple[str, str] | None = None
    """Files of our own certificate and its key, for servers that ask for one."""
    login: Login | None = None
    """Of PostgreSQL; None for HTTP."""

    def resolve(self) -> tuple[int, tuple[str, int]]:
        """(family, address), asked of the resolver once: no name is looked up during the run. Raises: OSError.

        Of several addresses the first that takes a connection, as `localhost` is often both ::1 and 127.0.0.1.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise type(error)(error.errno, error.strerror or "not found", self.host) from None
        addresses = [(family, address) for family, _, _, _, address in found]
        family, address = addresses[0]
        if len(addresses) > 1:
            family, address = next((one for one in addresses[:MAX_TRIED] if _listens(*one)), addresses[0])
        return int(family), (str(address[0]), int(address[1]))

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context; None for plain HTTP. Raises: OSError (ssl.SSLError is one) for files that are none."""
        if not self.is_tls:
            return None
        if self.ca_file:
            Path(self.ca_file).read_bytes()  # ssl does not say which file it cannot read
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.client is not None:
            context.load_cert_chain(*self.client, password=lambda: "")  # asks nobody for a password
        if self.login is None:
            context.set_alpn_protocols(["http/1.1"])
        if self.is_unverified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    @property
    def root(self) -> str:
        """The URL without its path."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        if self.login is not None:
            return f"postgresql://{self.login.user}@{name}:{self.port}"
        return f"{'https' if self.is_tls else 'http'}://{name}:{self.port}"

    @property
    def url(self) -> str:
        """The URL."""
        return self.root + self.path

    def opening(self, method: str) -> bytes:
        """The first lines of a request: all that differs between servers that are asked the same."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.is_tls else 80
        host = name + (f":{self.port}" if self.port != default else "")
        return f"{method} {self.path} HTTP/1.1\r\nHost: {host}\r\n".encode("latin-1")

    def request(self, method: str, body: bytes, content_type: str = "application/json") -> bytes:
        """A whole request as it goes over the wire."""
        lines = []
        given = {key.lower() for key, _ in self.headers}
        if "accept" not in given:
            lines.append("Accept: */*")
        if "user-agent" not in given:
            lines.append("User-Agent: herder-bench")
        if body or method in ("POST", "PUT", "PATCH"):
            if "content-type" not in given:
                lines.append(f"Content-Type: {content_type}")
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{key}: {value}" for key, value in self.headers]
        return self.opening(method) + "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _listens(family: int, address: Any) -> bool:
    """Whether somebody takes a connection there."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(TRY_S)
        try:
            return sock.connect_ex(address) == 0
        except OSError:
            return False


def parse_url(
    url: str,
    api: Api,
    *,
    path: str | None = None,
    headers: Sequence[tuple[str, str]] = (),
    is_unverified: bool = False,
    ca_file: str | None = None,
    client: tuple[str, str] | None = None,
) -> Target:
    """The target of `http://host:8000`, `.../v1` or a URL that names the API itself. Raises: ValueError."""
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"{url!r} is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r}: a URL begins with http:// or https:// and names a host")
    if parts.username is not None:
        raise ValueError("a URL with a password in it; use --header or --token-file")
    found = path if path is not None else _path_of(parts.path, api)
    if path is None and parts.query:
        found += f"?{parts.query}"
    if not found.startswith("/") or not found.isascii() or any(char <= " " or char == "\x7f" for char in found):
        raise ValueError(f"{found!r} is not a path")
    for key, value in headers:
        if not _NAME.fullmatch(key) or not value.isprintable() or not value.isascii():
            raise ValueError(f"{key!r} is not a header")
        if key.lower() in _OWN:
            raise ValueError(f"the header {key} is set by the load generator itself")
    is_tls = parts.scheme == "https"
    return Target(
        parts.hostname, port or (443 if is_tls else 80), is_tls, found, tuple(headers), is_unverified, ca_file, client
    )


def parse_postgres(
    url: str,
    *,
    statement: str,
    settings: tuple[tuple[str, str], ...] = (),
    password_file: str | None = None,
    is_unverified: bool = False,
    ca_file: str | None = None,
    client: tuple[str, str] | None = None,
) -> Target:
    """The target of `postgresql://user@host:port/database?sslmode=require`. Raises: ValueError; OSError.

    The password is that of the file, else the line of PGPASSFILE or ~/.pgpass that fits; a URL must not hold one.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 5432
    except ValueError:
        raise ValueError("this is not a URL") from None
    if parts.scheme not in ("postgresql", "postgres") or not parts.hostname or not parts.username:
        raise ValueError("pgvector is asked at postgresql://USER@HOST:PORT/DATABASE")
    if parts.password is not None:
        raise ValueError("a URL with a password in it; use --password-file or PGPASSFILE")
    options = dict(parse_qsl(parts.query))
    mode = options.pop("sslmode", "disable")
    if mode not in ("disable", "require", "verify-full") or options:
        raise ValueError("a URL of PostgreSQL may have sslmode=disable, require or verify-full, and nothing else")
    user, database = unquote(parts.username), unquote(parts.path.strip("/")) or unquote(parts.username)
    if not (user + database).isprintable():
        raise ValueError("a user or database that cannot be")
    if password_file is not None:
        password: str | None = Path(password_file).read_text(encoding="utf-8").rstrip("\r\n")
    else:
        password = _password_of((parts.hostname, str(port), database, user))
    login = Login(user, database, password, settings, statement)
    return Target(parts.hostname, port, mode != "disable", f"/{database}", (), is_unverified, ca_file, client, login)


def _password_of(wanted: tuple[str, str, str, str]) -> str | None:
    """The password of the first line that fits, as libpq finds it; a file that others can read is not used."""
    named = os.environ.get("PGPASSFILE")
    path = Path(named) if named else Path.home() / ".pgpass"
    try:
        if path.stat().st_mode & 0o077:
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        fields = [re.sub(r"\\(.)", r"\1", part) for part in re.findall(r"(?:\\.|[^:\\])+", line)]
        is_meant = all(field in ("*", want) for field, want in zip(fields, wanted, strict=False))
        if len(fields) == 5 and not line.startswith("#") and is_meant:
            return fields[4]
    return None


def _path_of(path: str, api: Api) -> str:
    if api.name == "http":
        return path or "/"
    base = path.rstrip("/")
    if base.endswith(api.tail):
        return base
    if base.endswith("/v1") and api.path.startswith("/v1/"):
        return base + api.path.removeprefix("/v1")
    return base + api.path
