"""The door: listening, and closing connections that never ask for anything.

How many connections there may be stands in `head/crowd.py`. Whoever opens one and says nothing, or one byte a minute,
is shown out by a sweep after `door.header_timeout_s`; who has asked may keep it for `door.keep_alive_s` between two
requests, which is longer, because proxies keep connections for the next of their clients.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from common import limits
from common.clock import boottime_ms
from common.config import listen_error
from common.telemetry import fields
from head import config
from head.config import HeadConfig
from head.crowd import Crowd, GuestRunner

log = logging.getLogger(__name__)
LISTEN_BACKLOG = 4_096
HANDLERS_END_S = 5.0
SWEEP_S = 5.0
MALFORMED_EVERY_MS = 60_000


class _Malformed(logging.Filter):
    """Bytes that are no HTTP: counted, and one line a minute, without the bytes, which may hold a token.

    aiohttp would write an error with a traceback for each, and so let anybody fill the head's log.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._told_ms = -MALFORMED_EVERY_MS

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        self._count += 1
        now_ms = boottime_ms()
        if now_ms - self._told_ms < MALFORMED_EVERY_MS:
            return False
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = "requests that are not HTTP were refused", (), None
        record.fields = {"requests": self._count, "kind": type(error).__name__}
        self._told_ms, self._count = now_ms, 0
        return True


def _http_log() -> logging.Logger:
    """A logger of this door's own for aiohttp's server."""
    logger = logging.Logger("head.http", logging.WARNING)
    logger.parent = logging.getLogger()
    logger.addFilter(_Malformed())
    return logger


class _Site(web.TCPSite):
    """aiohttp's site, with a time for TLS handshakes (asyncio's own is a minute)."""

    handshake_s: float | None = None

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        self._server = await loop.create_server(
            server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=self.handshake_s,
        )


class Door:
    """One listening address and the application behind it."""

    def __init__(self, settings: HeadConfig, app: web.Application) -> None:
        self.config = settings
        self.url = settings.url
        self._silent: dict[Any, int] = {}  # connections without a request yet -> when they were first seen
        self._site: web.TCPSite | None = None
        self.crowd = Crowd(settings.door)
        self._runner = GuestRunner(
            app,
            self.crowd,
            handle_signals=False,
            logger=_http_log(),
            access_log=None,
            keepalive_timeout=settings.door.keep_alive_s,
            lingering_time=limits.LINGER_S,
            shutdown_timeout=HANDLERS_END_S,
        )

    async def open(self) -> None:
        """Starts the application and listens. Raises: PortTaken, InvalidConfig."""
        settings = self.config
        await self._runner.setup()
        tls = config.ssl_context(settings.tls)
        self._site = _Site(self._runner, settings.host, settings.port, ssl_context=tls, backlog=LISTEN_BACKLOG)
        if tls is not None:
            self._site.handshake_s = settings.door.header_timeout_s
        try:
            await self._site.start()
        except OSError as error:
            self._site = None
            raise listen_error(settings.host, settings.port, error) from None
        self.url = f"{settings.url.rpartition(':')[0]}:{self._runner.addresses[0][1]}"

    async def shut(self) -> None:
        """Takes no new connections; those that are open go on."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def close(self) -> None:
        """Ends every connection and the application."""
        await self._runner.cleanup()

    async def sweep_forever(self) -> None:
        """Ends connections that take too long to ask."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(boottime_ms())

    def sweep(self, now_ms: int) -> int:
        """Ends connections whose first request is not there after `door.header_timeout_s`; returns how many."""
        server = self._runner.server
        if server is None:
            return 0
        # the count is aiohttp's own and private; should it ever go away, nobody is ended
        silent = [handler for handler in server.connections if getattr(handler, "_request_count", 1) == 0]
        self._silent = {handler: self._silent.get(handler, now_ms) for handler in silent}
        patience_ms = self.config.door.header_timeout_s * 1000
        late = [handler for handler, since_ms in self._silent.items() if now_ms - since_ms > patience_ms]
        for handler in late:
            handler.force_close()
        if late:
            log.warning("connections without a request were closed", extra=fields(connections=len(late)))
        return len(late)
