"""Server-sent events and lines of JSON, read in any pieces.

An event is given back when its blank line has come, as its data lines joined; comments, ids, names and retries are
dropped, and so is an event without data. Lines may end with CR LF, LF or CR, also when a read ends between the two.
Source: HTML Living Standard, 9.2.6.
"""

from __future__ import annotations

MAX_EVENT = 4 << 20


class TooLong(Exception):
    """An event longer than MAX_EVENT."""


class EventReader:
    """The events of one stream."""

    __slots__ = ("_data", "_line", "_size", "_skips_feed", "is_fresh")

    def __init__(self) -> None:
        self.is_fresh = True
        """Nothing of an event that is not whole is held."""
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0
        self._skips_feed = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes. Raises: TooLong."""
        # Nearly every read is whole events of one line each, and these need no look at single lines.
        if self.is_fresh and piece[:6] == b"data: " and piece[-2:] == b"\n\n" and b"\r" not in piece:
            if piece.find(b"\n") == len(piece) - 2:
                return [piece[6:-2]]
            parts = piece[:-2].split(b"\n\n")
            if all(part[:6] == b"data: " and b"\n" not in part for part in parts):
                return [part[6:] for part in parts]
        events = self._feed_lines(piece)
        self.is_fresh = not (self._line or self._data or self._skips_feed)
        return events

    def _feed_lines(self, piece: bytes) -> list[bytes]:
        if self._skips_feed and piece:
            self._skips_feed = False
            if piece[:1] == b"\n":
                piece = piece[1:]
        if not piece:
            return []
        self._skips_feed = piece[-1:] == b"\r"
        text = (self._line + piece).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._line = text.split(b"\n")
        events = []
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        if self._size + len(self._line) > MAX_EVENT:
            raise TooLong
        return events

    def _field(self, line: bytes) -> None:
        if line[:5] != b"data:" and line != b"data":
            return
        value = line[6:] if line[5:6] == b" " else line[5:]
        self._data.append(value)
        self._size += len(value)


class LineReader:
    """The lines of one stream of JSON lines."""

    __slots__ = ("_line", "is_fresh")

    def __init__(self) -> None:
        self.is_fresh = False  # no event of a stream is ever one of its lines
        self._line = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that this piece completes, without empty ones. Raises: TooLong."""
        *lines, self._line = (self._line + piece).split(b"\n")
        if len(self._line) > MAX_EVENT:
            raise TooLong
        return [line.strip() for line in lines if line.strip()]
