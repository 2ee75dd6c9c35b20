"""The way to the head: one HTTP session, JSON in and out, timeouts, and capped retries with full jitter.

Reads may be repeated freely. Changes carry an Idempotency-Key, drawn here when the caller gives none, so that a
repeat after a lost answer does not happen twice. What is repeated: a connection that failed or broke, 429, 502, 503
and 504. What is not: anything that the head decided, and a stream that has begun. Redirects are not followed,
because a token must not travel to where its owner did not send it.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from herder import __version__
from herder.decoding import UNREADABLE
from herder.errors import (
    HerderApiError,
    HerderConfigError,
    HerderConnectionError,
    HerderError,
    HerderTimeoutError,
)
from herder.settings import CODE, Settings, is_loopback
from herder.types import ErrorAnswer

T = TypeVar("T")
Query = Mapping[str, str | int | float | bool | None]

PREFIX = "/api/v1"
CONNECT_TIMEOUT_S = 5.0
ATTEMPTS = 4
BACKOFF_BASE_S = 0.25
BACKOFF_CAP_S = 2.0
RETRY_AFTER_CAP_S = 10.0
RETRIED_STATUSES = (429, 502, 503, 504)
ANSWER_BYTES = 67_108_864
ERROR_BYTES = 65_536
STREAM_IDLE_TIMEOUT_S = 120.0  # the head sends a sign of life every 15 s or so


class Transport:
    """Requests to one head. Made outside a loop, used inside one; `close` ends its connections."""

    def __init__(
        self,
        settings: Settings,
        *,
        timeout_s: float = 30.0,
        attempts: int = ATTEMPTS,
        rng: random.Random | None = None,
    ) -> None:
        """attempts: how often a repeatable request is tried in all, >= 1."""
        self.settings = settings
        self.timeout_s = timeout_s
        self._attempts = max(1, attempts)
        self._rng = rng or random.Random()
        self._session: aiohttp.ClientSession | None = None
        self._tls = _tls_context(settings)

    async def close(self) -> None:
        """Closes the connections. May be called again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        path: str,
        type_: type[T],
        *,
        query: Query | None = None,
        body: Any = None,
        content: bytes | None = None,
        content_type: str = "application/json",
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        prefix: str = PREFIX,
    ) -> T:
        """One exchange below /api/v1, decoded as `type_`.

        body: anything that msgspec encodes; content: bytes as they are. wait_s: sent as ?wait= and added to the
        timeout. Raises: HerderApiError, HerderConnectionError, HerderTimeoutError.
        """
        given = dict(headers or {})
        data = content if content is not None else (msgspec.json.encode(body) if body is not None else None)
        if data is not None:
            given["Content-Type"] = content_type
        if method != "GET":
            given["Idempotency-Key"] = idempotency_key or uuid.uuid4().hex
        parameters = dict(query or {})
        if wait_s:
            parameters["wait"] = wait_s
        url = self.url(prefix + path, parameters)
        timeout = aiohttp.ClientTimeout(total=self.timeout_s + wait_s, connect=CONNECT_TIMEOUT_S)
        for attempt in range(1, self._attempts + 1):
            try:
                async with self._send(method, url, data, given, timeout) as response:
                    raw = await _read(response, ANSWER_BYTES)
                return _decode(raw, type_, method, path)
            except HerderError as error:
                if attempt == self._attempts or not _is_repeatable(error):
                    raise
                await asyncio.sleep(self._delay_s(attempt, error))
        raise AssertionError("the last attempt returns or raises")

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        idle_timeout_s: float | None = STREAM_IDLE_TIMEOUT_S,
        expect: Callable[[int], None] | None = None,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Opens a stream at an absolute path and gives its pieces as they come. Not repeated.

        idle_timeout_s: the longest silence; None: for ever. expect: told the bytes that will come, where the head
        says so, and may refuse them. Raises: as `request`, also between pieces.
        """
        given = dict(headers or {})
        data = msgspec.json.encode(body) if body is not None else None
        if data is not None:
            given["Content-Type"] = "application/json"
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=idle_timeout_s)
        async with self._send(method, self.url(path, query), data, given, timeout) as response:
            if expect is not None and response.content_length is not None:
                expect(response.content_length)
            yield self._pieces(response)

    def url(self, path: str, query: Query | None = None) -> URL:
        """The full address; `path` is already quoted."""
        pairs = [
            f"{quote(name, safe='')}={quote(_text(value), safe='')}"
            for name, value in (query or {}).items()
            if value is not None and value != ""
        ]
        return URL(self.settings.url + path + ("?" + "&".join(pairs) if pairs else ""), encoded=True)

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        with self._translated():
            async for piece in response.content.iter_any():
                yield piece

    @asynccontextmanager
    async def _send(
        self, method: str, url: URL, data: bytes | None, headers: dict[str, str], timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        with self._translated():
            response = await self._open().request(
                method, url, data=data, headers=headers, timeout=timeout, allow_redirects=False
            )
        try:
            if response.status >= 300:
                with self._translated():
                    raw = await response.content.read(ERROR_BYTES)
                raise _api_error(response, raw)
            with self._translated():
                yield response
        finally:
            # Closed, not released: a stream that was left in the middle must not be read to its end.
            if not response.content.at_eof():
                response.close()
            response.release()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            headers = {"User-Agent": f"herder-client/{__version__}", "Accept": "application/json, */*;q=0.5"}
            if self.settings.token:
                headers["Authorization"] = f"Bearer {self.settings.token}"
            connector = aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=32)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        return self._session

    def _translated(self) -> _Translated:
        return _Translated(self.settings.url)

    def _delay_s(self, attempt: int, error: HerderError) -> float:
        asked = error.details.get("retry_after_s") if isinstance(error, HerderApiError) else None
        if isinstance(asked, int | float) and asked > 0:
            return min(float(asked), RETRY_AFTER_CAP_S)
        return self._rng.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** (attempt - 1)))


class _Translated:
    """Turns what aiohttp raises into our errors."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, HerderError):
            return
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError | ssl.SSLError):
            raise HerderConnectionError(
                "tls_failed",
                f"TLS with {self._url} failed: {_one_line(error)}",
                hint="--ca-file (HERDER_CA_FILE) names the authority that signed the head's certificate",
            ) from None
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError) and not isinstance(
            error, aiohttp.SocketTimeoutError
        ):
            raise HerderConnectionError("unreachable", self._unreachable(error), hint=self._start_hint()) from None
        if isinstance(error, TimeoutError):
            raise HerderTimeoutError("timed_out", f"no answer from {self._url} in time") from None
        if isinstance(error, aiohttp.ClientError | OSError):
            hint = self._start_hint()
            if isinstance(error, aiohttp.ServerDisconnectedError) and self._url.startswith("http:"):
                hint = "a head with TLS is asked at https://"
            raise HerderConnectionError(
                "cut_off", f"the connection to {self._url} broke: {_one_line(error)}", hint=hint
            ) from None

    def _unreachable(self, error: BaseException) -> str:
        reason = "no answer in time" if isinstance(error, TimeoutError) else _reason(error)
        return f"cannot reach a head at {self._url}: {reason}"

    def _start_hint(self) -> str:
        if is_loopback(self._url):
            return "`herder up` starts a head and an agent on this machine; --url or HERDER_URL names another head"
        return "is the head running, and is its port open to this machine?"


def segment(text: str) -> str:
    """A name as one part of a path; a name of dots cannot climb out of it."""
    quoted = quote(text, safe="")
    return quoted.replace(".", "%2E") if not text.strip(".") else quoted


def _is_repeatable(error: HerderError) -> bool:
    if isinstance(error, HerderApiError):
        return error.status in RETRIED_STATUSES
    return isinstance(error, HerderConnectionError) and error.code != "tls_failed"


def _decode(raw: bytes, type_: type[T], method: str, path: str) -> T:
    if type_ is bytes:
        return raw  # type: ignore[return-value]
    try:
        return msgspec.json.decode(raw, type=type_)
    except UNREADABLE as error:
        raise HerderApiError(
            "unexpected_answer",
            f"{method} {path}: the answer is not what a head of this version says: {error}",
            hint="is this the address of a head, of this client's version? `herder version` shows both",
        ) from None


def _api_error(response: aiohttp.ClientResponse, raw: bytes) -> HerderApiError:
    details: dict[str, Any] = {}
    try:
        found = msgspec.json.decode(raw, type=ErrorAnswer).error
        code, message, hint, details = found.code, found.message, found.hint, dict(found.details)
    except UNREADABLE:
        code, message = f"http_{response.status}", f"{response.status} {response.reason or ''}".strip()
        hint = "this answer did not come from a head; is the address right?"
    after = response.headers.get("Retry-After", "")
    if after.isascii() and after.isdigit() and len(after) < 10:
        details.setdefault("retry_after_s", int(after))
    return HerderApiError(code, message, hint=hint, status=response.status, details=details)


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            raise HerderApiError("unexpected_answer", f"the answer is larger than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    if not (settings.ca_file or settings.cert_file):
        return None
    try:
        for path in (settings.ca_file, settings.cert_file, settings.key_file):
            if path:
                Path(path).read_bytes()  # ssl does not say which file it cannot read
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file or None)
    except OSError as error:  # ssl.SSLError is one
        raise HerderConfigError(CODE, f"TLS files: {_one_line(error)}", hint="PEM files are wanted") from None
    return context


def _text(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _reason(error: BaseException) -> str:
    inner = getattr(error, "os_error", None)
    if isinstance(inner, ConnectionRefusedError):
        return "connection refused"
    return _one_line(inner if isinstance(inner, BaseException) else error)
