"""Sends the files of a run to the head: PUT with its digest, streamed from disk, said again until the head has it.

A head that is away or in trouble is asked again, with growing pauses and for a day; an answer that no repeat can
change ends it. The head takes the same file twice for what it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import quote

import aiohttp
import msgspec

from agent.tls import TlsConfig, client_context
from common import limits
from common.backoff import full_jitter_ms
from common.errors import BodyTooLarge, ErrorInfo, HerderError, Internal, RunFailed, TimedOut, from_info
from common.telemetry import fields
from herder.decoding import UNREADABLE

log = logging.getLogger(__name__)
PATH = "/api/v1/agent/runs"
PIECE_BYTES = 1 << 20
ATTEMPT_S = 120.0
SLOWEST_BYTES_PER_S = 1 << 20  # an attempt may take ATTEMPT_S and its size at this pace
FINAL = frozenset({400, 403, 404, 405, 409, 411, 413, 422})


class _Answer(msgspec.Struct, frozen=True):
    """What of the head's error answers is read."""

    error: ErrorInfo


class Uploader:
    """Sends files as this node's agent."""

    def __init__(
        self,
        head_url: str,
        token: Callable[[], str],
        *,
        tls: TlsConfig | None,
        rng: random.Random,
        give_up_s: float = limits.RUN_UPLOAD_MS / 1000,
    ) -> None:
        self.attempts = 0
        self._url = head_url.rstrip("/") + PATH
        self._token = token
        self._tls = tls
        self._rng = rng
        self._give_up_s = give_up_s

    async def send(self, run: str, path: Path) -> None:
        """Returns once the head has the file. Raises: HerderError when it will not have it; OSError."""
        size, digest = await asyncio.to_thread(_measure, path)
        if size > limits.ARTIFACT_BYTES:
            raise BodyTooLarge(f"{path.name} has {size:,} bytes; at most {limits.ARTIFACT_BYTES:,} are taken")
        url = f"{self._url}/{quote(run, safe='')}/artifacts/{quote(path.name, safe='')}"
        deadline = time.monotonic() + self._give_up_s
        attempt = 0
        while True:
            trouble = await self._attempt(url, path, size, digest)
            if not trouble:
                return
            attempt += 1
            if time.monotonic() > deadline:
                raise TimedOut(f"the head has not taken {path.name} for {self._give_up_s:g} s: {trouble}")
            delay_ms = full_jitter_ms(
                attempt, base_ms=limits.RECONNECT_BASE_MS, cap_ms=limits.RECONNECT_CAP_MS, rng=self._rng
            )
            log.warning(
                "a run's file is not with the head yet",
                extra=fields(run=run, file=path.name, reason=trouble, retry_ms=delay_ms),
            )
            await asyncio.sleep(delay_ms / 1000)

    async def _attempt(self, url: str, path: Path, size: int, digest: str) -> str:
        """Why it has to be tried again; "" when the head has the file."""
        self.attempts += 1
        headers = {
            "Authorization": f"Bearer {self._token()}",
            "Content-Length": str(size),
            "Content-Type": "application/octet-stream",
            "X-Content-SHA256": digest,
        }
        timeout = aiohttp.ClientTimeout(
            total=ATTEMPT_S + size / SLOWEST_BYTES_PER_S, sock_connect=limits.CONNECT_TIMEOUT_S
        )
        try:
            tls = await asyncio.to_thread(self._context)
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=False) as http,
                http.put(
                    url,
                    data=_pieces(path, size),
                    headers=headers,
                    ssl=tls if tls is not None else True,
                    allow_redirects=False,  # they would carry the token elsewhere
                ) as answer,
            ):
                if answer.status == 200:
                    return ""
                said = await answer.content.read(65_536)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            return str(error)[:300] or type(error).__name__
        except HerderError as error:
            return error.message  # certificates: for a person to mend
        if answer.status in FINAL:
            raise _refusal(answer.status, said, path.name)
        return f"the head answered {answer.status}{_why(said)}"

    def _context(self) -> ssl.SSLContext | None:
        return client_context(self._tls) if self._tls is not None else None


def _why(said: bytes) -> str:
    """The head's own words for people who read the log; "" without them."""
    try:
        error = msgspec.json.decode(said, type=_Answer).error
    except UNREADABLE:
        return ""
    return f" ({error.code}: {error.message})"[:300]


def _refusal(status: int, said: bytes, name: str) -> HerderError:
    try:
        error = from_info(msgspec.json.decode(said, type=_Answer).error)
    except UNREADABLE:
        return RunFailed(f"the head answered {status} to {name}")
    return error if not isinstance(error, Internal) else RunFailed(error.message)


def _measure(path: Path) -> tuple[int, str]:
    """Size and SHA-256 in hex."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            made.update(piece)
        return os.fstat(file.fileno()).st_size, made.hexdigest()


async def _pieces(path: Path, size: int) -> AsyncIterator[bytes]:
    """The file as it was measured; a shorter one breaks the attempt off."""
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while size > 0:
            piece = await asyncio.to_thread(file.read, min(size, PIECE_BYTES))
            if not piece:
                raise ConnectionError(f"{path.name} became shorter while it was sent")
            size -= len(piece)
            yield piece
    finally:
        file.close()
