"""HTTP/1.1 for byte ranges: blocking, keep-alive, on http.client, and believing nothing that it is told.

It follows redirects itself (a token goes to the first host only, https never becomes http), asks for ranges with
`If-Range`, and checks every answer: a 206 must be exactly the range that was asked, of a file of the size that was
listed, with the ETag that was seen; a 200 to a range request is the whole file from byte 0, and says so by
`Stream.offset`. `readinto` goes straight from the socket into the caller's buffer.
Link-local addresses are not connected to (`agent/outbound.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

from agent import outbound
from agent.mover.sources import RemoteFile, SourceChanged
from common.errors import HerderError, SizeMismatch, SourceFailed, SourceNotFound, SourceRefused

REDIRECTS = 5
RETRY_AFTER_CAP_S = 120.0
STALL_BYTES = 65_536  # less than this in a whole read timeout is a stall, however steadily it drips
DRAIN_BYTES = 65_536  # rest of an answer that is read to keep the connection; more is not worth it

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})")
_REDIRECT = {301, 302, 303, 307, 308}
_RETRY = {408, 425, 429, 500, 502, 503, 504}


class HttpStream:
    """One answer's body, counted."""

    def __init__(self, owner: HttpConnection, response: http.client.HTTPResponse, offset: int, total: int) -> None:
        self.offset, self.total = offset, total
        self.validator = validator_of(response)
        self._owner, self._response = owner, response
        self._left = response.length
        self._window_began, self._window_bytes = time.monotonic(), 0

    def readinto(self, view: memoryview) -> int:
        """Some bytes; 0 at the end. Raises: SourceFailed on a cut, a timeout or a stall."""
        try:
            count = self._read(view)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            # ValueError and AttributeError: http.client, when `interrupt` closed the socket under it
            raise self._owner.failed(error) from None
        if count == 0 and self._left:
            raise self._owner.failed(ConnectionError(f"cut {self._left} bytes before the end"))
        self._window_bytes += count
        now = time.monotonic()
        if now - self._window_began > self._owner.read_timeout_s:
            if self._window_bytes < STALL_BYTES and count and self._left:
                raise self._owner.failed(
                    TimeoutError(f"{self._window_bytes} bytes in {now - self._window_began:.0f} s")
                )
            self._window_began, self._window_bytes = now, 0
        return count

    def _read(self, view: memoryview) -> int:
        """What one recv gives, so that a source that drips is seen (`HTTPResponse.readinto` fills the buffer)."""
        if self._left is None:
            data = self._response.read1(len(view))  # chunked, or until the connection closes
            view[: len(data)] = data
            return len(data)
        if self._left == 0:
            return 0
        count = int(self._response.fp.readinto1(view[: self._left]))
        self._left -= count
        return count

    def close(self) -> None:
        """Keeps the connection when the body is at its end, else drops it."""
        if self._left is not None and 0 < self._left <= DRAIN_BYTES:
            rest = memoryview(bytearray(self._left))
            with contextlib.suppress(SourceFailed):
                while self._left and self.readinto(rest):
                    pass
        is_ended = self._left == 0 or self._response.isclosed()
        will_close = self._response.will_close
        self._response.close()
        if not is_ended or will_close:
            self._owner.close()


class HttpConnection:
    """Keep-alive connection of one thread to wherever the URL (after redirects) leads."""

    def __init__(
        self,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        token: str = "",
        token_host: str = "",
        headers: dict[str, str] | None = None,
        follows: bool = True,
        allow_link_local: bool = False,
    ) -> None:
        self.read_timeout_s = read_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._token, self._token_host = token, token_host
        self._headers = headers or {}
        self._follows = follows
        self._allow_link_local = allow_link_local
        self._place: tuple[str, str] | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._resolved: dict[str, str] = {}  # URL -> where its redirects led
        self._is_interrupted = False

    def open(self, file: RemoteFile, offset: int, length: int) -> HttpStream:
        """The range as a stream, checked against what is known of the file."""
        headers = {}
        is_all = offset == 0 and (length < 0 or length == file.size)
        if not is_all:
            headers["Range"] = f"bytes={offset}-{offset + length - 1}"
            if file.validator.startswith('"'):
                headers["If-Range"] = file.validator
        response = self.request(file.url, headers)
        try:
            stream = self._check(response, file, offset, length, is_all)
        except HerderError:
            self.close()
            raise
        return stream

    def _check(
        self, response: http.client.HTTPResponse, file: RemoteFile, offset: int, length: int, is_all: bool
    ) -> HttpStream:
        now = validator_of(response)
        if response.status == 416:
            total = _UNSATISFIED.fullmatch(response.headers.get("Content-Range", ""))
            raise SourceChanged(f"{file.path}: the source has no byte {offset}", size=int(total[1]) if total else -1)
        if now and now[:1] == file.validator[:1] and now != file.validator:
            raise SourceChanged(f"{file.path}: the source has another file now")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise SourceRefused(f"{file.path}: the source answers with Content-Encoding {encoding[:20]!r}")
        if response.status == 206:
            first, last, total_bytes = content_range(response)
            if first != offset or last != offset + (length if length >= 0 else file.size - offset) - 1:
                raise SourceFailed(f"{file.path}: asked for byte {offset}, was given {first}-{last}")
            if response.length is not None and response.length != last - first + 1:
                raise SourceFailed(f"{file.path}: Content-Length and Content-Range disagree")
            start = offset
        else:
            total_bytes = -1 if response.length is None else response.length
            start = 0
            if total_bytes < 0 and file.size < 0 and not response.chunked and not file.sha256:
                raise SourceRefused(f"{file.path}: the source gives no length, so a cut could not be seen")
        if file.size >= 0 and total_bytes >= 0 and total_bytes != file.size:
            raise SizeMismatch(
                f"{file.path}: listed with {file.size} bytes, the source has {total_bytes}",
                path=file.path,
                expected=file.size,
                actual=total_bytes,
            )
        return HttpStream(self, response, start, total_bytes)

    def request(self, url: str, headers: dict[str, str], *, method: str = "GET") -> http.client.HTTPResponse:
        """A 200, 206 or 416 answer, after redirects. Raises: SourceFailed, SourceNotFound, SourceRefused."""
        target = self._resolved.get(url, url)
        for _ in range(REDIRECTS + 1):
            response = self._send(target, headers, method)
            status = response.status
            if status in (200, 206, 416):
                if target != url:
                    self._resolved[url] = target
                return response
            location = response.headers.get("Location", "")
            self._finish(response)
            if status in _REDIRECT and location and self._follows:
                target = self._redirect(target, location)
            elif status in (401, 403) and url in self._resolved:
                del self._resolved[url]  # a presigned address that has ended: ask the first host again
                target = url
            else:
                raise _refusal(status, response, url)
        raise SourceRefused(f"{_shown(url)}: more than {REDIRECTS} redirects")

    def _redirect(self, target: str, location: str) -> str:
        following = urljoin(target, location)
        scheme = urlsplit(following).scheme
        if scheme not in ("http", "https") or (urlsplit(target).scheme == "https" and scheme != "https"):
            raise SourceRefused(f"{_shown(target)}: redirects to {scheme[:20]!r}, which is not followed")
        return following

    def _send(self, url: str, headers: dict[str, str], method: str) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        place = (parts.scheme, parts.netloc)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        send = {"Accept-Encoding": "identity", "User-Agent": "herder", **self._headers, **headers}
        if self._token and parts.netloc == self._token_host:
            send["Authorization"] = f"Bearer {self._token}"
        is_fresh = self._connection is None or self._place != place
        for _ in range(2):
            try:
                connection = self._connected(place)
                connection.request(method, path, headers=send)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                self.close()
                if is_fresh or self._is_interrupted or isinstance(error, TimeoutError):
                    raise self.failed(error) from None
                is_fresh = True  # a kept connection that the other side had closed meanwhile: once more
                continue
            return response
        raise AssertionError("unreachable")

    def _connected(self, place: tuple[str, str]) -> http.client.HTTPConnection:
        if self._is_interrupted:
            raise ConnectionError("stopped")
        if self._connection is not None and self._place == place:
            return self._connection
        self.close()
        scheme, netloc = place
        timeout_s = self._connect_timeout_s
        connection = (
            http.client.HTTPSConnection(netloc, timeout=timeout_s, context=ssl.create_default_context())
            if scheme == "https"
            else http.client.HTTPConnection(netloc, timeout=timeout_s)
        )
        if not self._allow_link_local:
            connection._create_connection = outbound.connect  # type: ignore[attr-defined]
        self._connection, self._place = connection, place
        try:
            connection.connect()
        except HerderError:
            self.close()
            raise
        connection.sock.settimeout(self.read_timeout_s)
        return connection

    def _finish(self, response: http.client.HTTPResponse) -> None:
        HttpStream(self, response, 0, -1).close()

    def failed(self, error: Exception) -> SourceFailed:
        """The error as the source's; the connection is of no use afterwards."""
        self.close()
        where = _shown("://".join(self._place)) if self._place else "the source"
        text = str(error) or type(error).__name__
        return SourceFailed(f"{where}: {text[:200]}")

    def interrupt(self) -> None:
        """Breaks a blocked read of the owning thread."""
        self._is_interrupted = True
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Drops the connection; the next request opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def strong_etag(response: http.client.HTTPResponse) -> str:
    """The ETag when it promises the very same bytes, else empty."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') and len(etag) <= 256 else ""


def validator_of(response: http.client.HTTPResponse) -> str:
    """The strong ETag, else "modified:" and Last-Modified, else empty: another one means other bytes."""
    modified = response.headers.get("Last-Modified", "")[:64]
    return strong_etag(response) or (f"modified:{modified}" if modified else "")


def content_range(response: http.client.HTTPResponse) -> tuple[int, int, int]:
    """(first, last, total or -1) of a 206. Raises: SourceFailed."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        raise SourceFailed("a 206 without a usable Content-Range")
    return int(match[1]), int(match[2]), -1 if match[3] == "*" else int(match[3])


def _refusal(status: int, response: http.client.HTTPResponse, url: str) -> HerderError:
    shown = _shown(url)
    if status in (404, 410):
        return SourceNotFound(f"{shown}: {status}, it is not there")
    if status in (401, 403):
        return SourceRefused(f"{shown}: {status}, access is refused", hint="a token file may be missing or wrong")
    if status in _RETRY:
        return SourceFailed(f"{shown}: {status}", retry_after_s=_retry_after_s(response))
    return SourceRefused(f"{shown}: unexpected status {status}")


def _retry_after_s(response: http.client.HTTPResponse) -> float:
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit() and len(text) < 9:
        return min(float(text), RETRY_AFTER_CAP_S)
    try:
        wait_s = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
    return min(max(wait_s, 0.0), RETRY_AFTER_CAP_S)


def _shown(url: str) -> str:
    """The URL without its query, which may hold a signature."""
    return url.partition("?")[0][:200]
