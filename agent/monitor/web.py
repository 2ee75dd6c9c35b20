"""One HTTP request with one deadline over all of it, for threads: a server that drips cannot hold its caller.

`http.client` times each read; a byte every second would keep it busy for ever. Redirects are not followed, and an
answer beyond its limit is an error: what is asked here is a metrics page or a push.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from agent import outbound
from common.errors import AddressRefused

ANSWER_MAX_BYTES = 16 << 20  # vLLM's page is about 200 KB
_READ_BYTES = 1 << 16


class WebError(Exception):
    """No answer, and why in words."""


def ask(
    method: str,
    url: str,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    max_bytes: int = ANSWER_MAX_BYTES,
) -> tuple[int, bytes]:
    """Status and body. Raises: WebError."""
    deadline_s = time.monotonic() + timeout_s
    try:
        parts = urlsplit(checked_url(url))
        assert parts.hostname is not None
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with outbound.connect((parts.hostname, port), timeout_s) as plain:
            connection = plain
            if parts.scheme == "https":
                connection = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.settimeout(_left_s(deadline_s))
            connection.sendall(_request(method, target, parts.netloc.rpartition("@")[2], headers or {}, body))
            raw = _read(connection, deadline_s, max_bytes)
        return _parse(raw, method)
    except TimeoutError:
        raise WebError(f"no whole answer within {timeout_s:g} s") from None
    except AddressRefused as refusal:
        raise WebError(refusal.message) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WebError(str(error) or type(error).__name__) from None


def checked_url(url: str) -> str:
    """The URL, with http:// where it has no scheme. Raises: ValueError when nobody can be asked there."""
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url)
    try:
        is_port = parts.port is None or parts.port > 0
    except ValueError:  # not a number, or beyond 65535
        is_port = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_port:
        raise ValueError(f"{url} is no http URL")
    return url


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _request(method: str, target: str, host: str, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", "Accept-Encoding: identity"]
    if body or method in ("PUT", "POST"):
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header has a line break")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _read(connection: socket.socket, deadline_s: float, max_bytes: int) -> bytes:
    """The answer's bytes, until the server closes or what it announced is there."""
    raw, whole = bytearray(), None
    while whole is None or len(raw) < whole:
        connection.settimeout(_left_s(deadline_s))
        piece = connection.recv(_READ_BYTES)
        if not piece:
            break
        raw += piece
        if len(raw) > max_bytes:
            raise ValueError(f"the answer is larger than {max_bytes} bytes")
        if whole is None and (end := raw.find(b"\r\n\r\n")) >= 0:
            whole = _announced(bytes(raw[:end]).lower(), end + 4)
    return bytes(raw)


def _announced(head: bytes, head_bytes: int) -> int | None:
    """How long the answer is with its head, where it says so; else it ends when the server closes."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length" and value.strip().isdigit():
            return head_bytes + int(value)
    return None


class _Bytes:
    """What HTTPResponse wants of a socket."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, *_arguments: object) -> io.BytesIO:
        return io.BytesIO(self._raw)


def _parse(raw: bytes, method: str) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(_Bytes(raw), method=method)  # type: ignore[arg-type]
    response.begin()
    return response.status, response.read()
