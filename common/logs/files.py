"""Logs on disk: segments named by where they start in the whole output, or one plain file.

All functions block and are called from threads. What rotation has removed is skipped; whoever goes on from an offset
learns from the offset that comes back how much that was.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from common import limits

# escape sequences of terminals (CSI and OSC), and control characters but newline and tab
_NOT_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TAIL_BYTES_MAX = 4 * 1024 * 1024  # how far back the last lines are looked for


def segments(place: Path) -> list[tuple[int, Path]]:
    """Offset and path of the segments of a log, oldest first; a plain file is one segment."""
    found = []
    try:
        names = os.listdir(place)
    except NotADirectoryError:
        return [(0, place)]
    except OSError:
        return []
    for name in names:
        offset = name.removeprefix("log.")
        if name.startswith("log.") and offset.isdigit():
            found.append((int(offset), place / name))
    return sorted(found)


def end_of(place: Path) -> int:
    """Offset after the last byte."""
    found = segments(place)
    try:
        return found[-1][0] + found[-1][1].stat().st_size if found else 0
    except OSError:
        return 0


def read_from(place: Path, offset: int, size: int) -> tuple[int, bytes]:
    """Bytes at `offset`, or after it where the output up to there is gone; gives where they start."""
    for start, path in segments(place):
        try:
            length = path.stat().st_size
            if start + length <= offset or not length:
                continue  # an empty one is what a full disk leaves
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    continue  # a pipe or a device under a log's name would hold the reader
                file.seek(max(0, offset - start))
                return max(offset, start), file.read(size)
        except OSError:
            continue  # removed by rotation meanwhile
    return offset, b""


def tail_offset(place: Path, lines: int) -> int:
    """Where the last `lines` lines start."""
    return tail_start(place, lines)[0]


def tail_start(place: Path, lines: int, *, end: int | None = None) -> tuple[int, int]:
    """Where the last `lines` lines (before `end`) start, and how many there are up to that number."""
    end = end_of(place) if end is None else end
    if lines <= 0:
        return end, 0
    first = segments(place)[0][0] if end else 0
    position, newlines, size = end, 0, 0
    found: list[tuple[int, bytes]] = []  # pieces and where they start, the last first: there may be gaps between them
    while position > first and size < TAIL_BYTES_MAX and newlines <= lines:
        start = max(first, position - limits.LOG_CHUNK_BYTES)
        at, pieces = start, []
        while at < position:
            at, piece = read_from(place, at, position - at)
            piece = piece[: max(0, position - at)]  # behind a gap is what was found already
            if not piece:
                break
            pieces.append((at, piece))
            at += len(piece)
        found += reversed(pieces)
        newlines += sum(piece.count(b"\n") for _, piece in pieces)
        size += sum(len(piece) for _, piece in pieces)
        position = start
    if not found:
        return end, 0
    kept = b"".join(piece for _, piece in reversed(found)).removesuffix(b"\n").split(b"\n")[-lines:]
    left = len(b"\n".join(kept)) + found[0][1].endswith(b"\n")
    for at, piece in found:
        if left <= len(piece):
            return at + len(piece) - left, len(kept)
        left -= len(piece)
    return first, len(kept)


def last_lines(place: Path, lines: int = limits.LAST_LOG_LINES) -> tuple[str, ...]:
    """The last lines of a log, cut to a sane length, without what drives terminals."""
    _, data = read_all(place, tail_offset(place, lines))
    text = _NOT_TEXT.sub("", data.decode(errors="replace"))
    kept = text.removesuffix("\n").split("\n")[-lines:] if text else []
    return tuple(line[: limits.LAST_LOG_CHARS] for line in kept)


def read_all(place: Path, offset: int) -> tuple[int, bytes]:
    """Everything from an offset on, up to the longest tail."""
    data = b""
    while len(data) < TAIL_BYTES_MAX:
        offset, piece = read_from(place, offset, limits.LOG_CHUNK_BYTES)
        if not piece:
            break
        data += piece
        offset += len(piece)
    return offset, data


def whole_characters(data: bytes) -> bytes:
    """The data without a UTF-8 character that is cut off at its end."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needs = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return data[:-back] if needs > back else data
    return data
