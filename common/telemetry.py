"""What a daemon says about itself: one-line logs, readiness for systemd, and how late its own loop is.

Log lines go to stderr, one event per line whatever the message holds, as `key=value` text or as JSON. Fields are
passed as `extra=fields(node=..., job=...)`. Under systemd a priority prefix replaces the time, which journald adds.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from typing import Any, TextIO

import msgspec

from common.clock import boottime_ms

_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/@%+|,-")


def fields(**values: Any) -> dict[str, Any]:
    """Fields of a log line, for `extra=`."""
    return {"fields": values}


class LineFormatter(logging.Formatter):
    """One line per record: time, level, logger, message, fields, and the traceback folded into the line."""

    def __init__(self, *, is_json: bool = False, is_journald: bool = False) -> None:
        super().__init__()
        self.is_json = is_json
        self.is_journald = is_journald

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        values: dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            values["traceback"] = "".join(traceback.format_exception(*record.exc_info)).strip()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        if self.is_json:
            line = {"at": stamp, "level": record.levelname.lower(), "logger": record.name, "message": message, **values}
            return msgspec.json.encode(line, enc_hook=str).decode()
        start = f"<{_PRIORITIES.get(record.levelname, 6)}>" if self.is_journald else f"{stamp} "
        tail = "".join(f" {key}={_quoted(value)}" for key, value in values.items())
        return f"{start}{record.levelname.lower()} {record.name}: {_one_line(message)}{tail}"


def setup_logging(level: str = "info", style: str = "text", stream: TextIO | None = None) -> None:
    """Sends every logger of this process to stderr as single lines. `style`: text | json."""
    handler = logging.StreamHandler(stream or sys.stderr)
    is_journald = stream is None and bool(os.environ.get("JOURNAL_STREAM"))
    handler.setFormatter(LineFormatter(is_json=style == "json", is_journald=is_journald))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiohttp").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if text and _BARE.issuperset(text):
        return text
    return '"' + _one_line(text).replace('"', "'") + '"'


class Notifier:
    """Tells systemd about readiness and life; does nothing where systemd did not ask for it."""

    def __init__(self, address: str | None = None, watchdog_usec: str | None = None) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        usec = os.environ.get("WATCHDOG_USEC", "") if watchdog_usec is None else watchdog_usec
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() else 0.0

    def ready(self, status: str) -> None:
        """The daemon serves."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def alive(self) -> None:
        """The daemon's own loop turned; feeds the watchdog."""
        if self.watchdog_s:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The daemon is on its way down."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        path = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.connect(path)
                sock.send(text.encode())
        except OSError as error:
            logging.getLogger(__name__).warning("systemd was not told", extra=fields(error=str(error)))


async def ticks(period_s: float) -> AsyncGenerator[int, None]:
    """Turns about every period, each giving how many milliseconds later than planned this loop got here.

    Lateness is measured on CLOCK_BOOTTIME, so a stopped process or a suspended machine shows as a stall too.
    """
    woke_ms = boottime_ms()
    while True:
        planned_ms = woke_ms + round(period_s * 1000)
        await asyncio.sleep(max(0, planned_ms - boottime_ms()) / 1000)
        woke_ms = boottime_ms()
        yield max(0, woke_ms - planned_ms)


class GcWatch:
    """Measures the pauses of the garbage collector, which stop the loop."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._started = 0.0

    def start(self) -> None:
        """Begins to measure."""
        gc.callbacks.append(self._on_gc)

    def stop(self) -> None:
        """Ends it."""
        if self._on_gc in gc.callbacks:
            gc.callbacks.remove(self._on_gc)

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        else:
            self._observe(time.perf_counter() - self._started)


def calm_gc() -> None:
    """After start-up: what lives now lives long, so collections skip it; later ones come less often and stay short.

    Nothing is collected before: that would walk the whole state, and a start leaves little garbage. A collection of
    the middle generation walks up to the product of the first two thresholds, 100,000 objects in about 10 ms; with a
    million, as 10,000 agents brought them, it stood still for 300 ms.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 100)
