"""Entries of logs as text for people."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from herder.types import LogEntry

STAMP_CHARS = 24  # of a time


class LogText:
    """Entries as lines of text; with several logs each line says whose it is."""

    def __init__(self, *, is_many: bool, has_times: bool) -> None:
        self._is_many = is_many
        self._has_times = has_times
        self._is_open = False  # the last line has no newline yet

    def render(self, entries: Iterable[LogEntry]) -> bytes:
        """Their text."""
        parts = []
        for entry in entries:
            if entry.note:
                parts.append(f"{self._close()}[herder: {entry.source}: {entry.note}]\n")
            elif entry.line is not None:
                begins = not self._is_open or self._is_many
                parts.append((self._before(entry) if begins else "") + entry.line)
                self._is_open = entry.is_partial and not self._is_many
                parts.append("" if self._is_open else "\n")
        return "".join(parts).encode(errors="replace")

    def _before(self, entry: LogEntry) -> str:
        text = f"{stamp(entry.time_ms)} " if self._has_times else ""
        return text + (f"{entry.source}{f'@{entry.node}' if entry.node else ''} | " if self._is_many else "")

    def _close(self) -> str:
        was_open, self._is_open = self._is_open, False
        return "\n" if was_open else ""


def stamp(time_ms: int | None) -> str:
    """A time as text, as wide as every other; '-' where it is not known."""
    if time_ms is None:
        return "-".ljust(STAMP_CHARS)
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time_ms % 1000:03d}Z"
