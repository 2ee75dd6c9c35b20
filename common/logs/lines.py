"""Lines cut from a log's bytes, each with where it ends and when it came. Blocks; called from threads.

A reader goes forward from an offset. Its `position` is the offset after the last byte that it has given or skipped, so
a new reader from there goes on without a gap and without a repeat, whatever the pieces were cut like. Bytes that were
removed before they were read are counted in `lost_bytes`; the rest of a line whose beginning is gone counts with them.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from common import limits
from common.logs.files import end_of, read_from, segments, whole_characters
from common.logs.index import Index, stamp_of

READ_BYTES = limits.LOG_CHUNK_BYTES


class Line(NamedTuple):
    """A line without its newline. `is_whole` is False where its newline has yet to come, or it was too long."""

    start: int
    end: int  # after its newline
    at_ms: int  # 0: not known
    text: str
    is_whole: bool = True


class LineReader:
    """Reads one run's log. A reader that begins somewhere (not after something) misses nothing that was there before.

    is_resumed: somebody has read up to `offset`, so what is gone after it is lost; else reading begins at what is kept.
    """

    def __init__(self, place: Path, offset: int = 0, *, is_resumed: bool = False) -> None:
        self.place = place
        self.position = max(0, offset)
        self.lost_bytes = 0
        self._buffer = b""  # from `position` on, without a newline
        self._is_fresh = not is_resumed
        self._is_midline = False  # up to the next newline belongs to a line whose beginning was not read
        self._indices: dict[int, Index] = {}
        self._starts: list[int] = []
        self._last_ms = 0
        if not is_resumed and offset > 0:
            _, before = read_from(place, offset - 1, 1)
            self._is_midline = before != b"\n"

    def read(self, *, arrival_ms: int = 0) -> list[Line]:
        """The next lines; none at the end. arrival_ms: the time of lines that tell none, for what is just written."""
        wanted = self.position + len(self._buffer)
        start, data = read_from(self.place, wanted, READ_BYTES)
        if not data:
            if wanted > 0 and end_of(self.place) < wanted:
                return self._restart()
            return []
        lines: list[Line] = []
        if start > wanted:
            lines = self._jump(start, arrival_ms)
        self._look(start)
        return lines + self._cut(data, arrival_ms)

    def rest(self, *, is_whole: bool, arrival_ms: int = 0) -> Line | None:
        """What stands after the last newline, as a line of its own; None for nothing."""
        data = self._buffer if is_whole else whole_characters(self._buffer)
        if not data or self._is_midline:
            return None
        line = self._line(data, 0, arrival_ms, is_whole=is_whole)
        self._buffer = self._buffer[len(data) :]
        return line

    @property
    def unread_bytes(self) -> int:
        """Bytes of a line whose newline has yet to come."""
        return len(self._buffer)

    def _restart(self) -> list[Line]:
        """The log is shorter than what was read of it: it was begun anew."""
        self._buffer, self.position, self._is_midline, self.lost_bytes = b"", 0, False, -1
        self._indices.clear()
        self._starts.clear()
        return []

    def _jump(self, start: int, arrival_ms: int) -> list[Line]:
        """Goes on after a gap."""
        unfinished = self.rest(is_whole=False, arrival_ms=arrival_ms)
        if not self._is_fresh or self.position + len(self._buffer) > 0:
            self.lost_bytes += start - self.position
        self.position, self._buffer = start, b""
        index = Index(self._segment(start))
        index.refresh()
        self._is_midline = not index.starts_line
        return [unfinished] if unfinished else []

    def _cut(self, data: bytes, arrival_ms: int) -> list[Line]:
        if self._is_midline:
            fragment, newline, data = data.partition(b"\n")
            skipped = len(fragment) + len(newline)
            self.position += skipped
            if not self._is_fresh:
                self.lost_bytes += skipped
            if not newline:
                return []
            self._is_midline = False
        self._is_fresh = False
        *whole, rest = (self._buffer + data).split(b"\n")
        self._buffer = b""
        lines = []
        for text in whole:
            while len(text) > limits.LOG_LINE_BYTES:
                piece = whole_characters(text[: limits.LOG_LINE_BYTES])
                lines.append(self._line(piece, 0, arrival_ms, is_whole=False))
                text = text[len(piece) :]
            lines.append(self._line(text, 1, arrival_ms))
        while len(rest) > limits.LOG_LINE_BYTES:
            piece = whole_characters(rest[: limits.LOG_LINE_BYTES])
            lines.append(self._line(piece, 0, arrival_ms, is_whole=False))
            rest = rest[len(piece) :]
        self._buffer = rest
        return lines

    def _line(self, data: bytes, newline: int, arrival_ms: int, *, is_whole: bool = True) -> Line:
        text = data.decode(errors="replace")
        at_ms = self._time_at(self.position) or stamp_of(text) or arrival_ms or self._last_ms
        self._last_ms = at_ms
        start, self.position = self.position, self.position + len(data) + newline
        return Line(start, self.position, at_ms, text, is_whole)

    # times
    def _look(self, start: int) -> None:
        """Makes sure of the index of the segment that holds the bytes at `start`."""
        if not self._starts or start >= self._starts[-1]:
            self._starts = [offset for offset, _ in segments(self.place)]
        segment = self._segment_start(start)
        if segment not in self._indices:
            # the one before is kept: a line may have begun in it
            self._indices = {
                key: index for key, index in self._indices.items() if key == self._segment_start(self.position)
            }
            self._indices[segment] = Index(self._segment(segment))
        self._indices[segment].refresh()

    def _time_at(self, offset: int) -> int:
        index = self._indices.get(self._segment_start(offset))
        return index.at(offset) if index is not None else 0

    def _segment_start(self, offset: int) -> int:
        found = bisect_right(self._starts, offset)
        return self._starts[found - 1] if found else 0

    def _segment(self, start: int) -> Path:
        return self.place / f"log.{start:015d}" if self.place.is_dir() else self.place


def offset_since(place: Path, since_ms: int) -> int:
    """Where to begin to read for lines that came at or after a time: what is before has none."""
    found = segments(place)
    for start, path in found:
        index = Index(path)
        index.refresh()
        if index.offsets:
            first = index.first_since(since_ms)
            if first is not None:
                return first
            continue
        try:
            if path.stat().st_mtime_ns // 1_000_000 >= since_ms:
                return start
        except OSError:
            continue  # removed by rotation meanwhile
    return end_of(place)
