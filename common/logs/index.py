"""When the bytes of a log segment came.

Beside a segment `log.OFFSET` stands `log.OFFSET.at`: entries of 16 bytes, each the offset at which a batch of output
begins and the wall time in milliseconds at which it came. A line's time is that of the batch in which its first byte
lies. An entry is written before the bytes that it is about, so no byte is seen without one; an entry that a crash left
half written is no entry. The top bit of the first entry's time says that the segment begins with a whole line.
Segments of older versions have no index: their times are what their lines say themselves, or not known.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from bisect import bisect_right
from datetime import datetime
from pathlib import Path

ENTRY = struct.Struct("<QQ")
STARTS_LINE = 1 << 63
SUFFIX = ".at"
INDEX_BYTES = 64 * 1024 * 1024  # a longer index is not one of ours
STAMP_CHARS = 40
_STAMP = re.compile(
    r'^(?:\{"at": ?")?\[?(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?\s?(Z|[+-]\d\d:?\d\d)?', re.ASCII
)


class Index:
    """The index of one segment, read as far as it has grown."""

    def __init__(self, segment: Path) -> None:
        self.path = segment.with_name(segment.name + SUFFIX)
        self.offsets: list[int] = []
        self.times_ms: list[int] = []
        self.starts_line = False
        self._read_bytes = 0

    def refresh(self) -> None:
        """Reads the entries that were added."""
        try:
            # Beside a Slurm file anybody may have put anything: no link is followed, no pipe waited for.
            with open(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                size = status.st_size
                is_file = stat.S_ISREG(status.st_mode)
                if not is_file or size - self._read_bytes < ENTRY.size or size > INDEX_BYTES:
                    return
                file.seek(self._read_bytes)
                data = file.read(size - self._read_bytes)
        except OSError:
            return
        whole = len(data) // ENTRY.size * ENTRY.size
        for offset, at_ms in ENTRY.iter_unpack(data[:whole]):
            if not self.offsets:
                self.starts_line = bool(at_ms & STARTS_LINE)
            self.offsets.append(offset)
            self.times_ms.append(at_ms & ~STARTS_LINE)
        self._read_bytes += whole

    def at(self, offset: int) -> int:
        """Milliseconds at which the byte came; 0 when that is not known."""
        found = bisect_right(self.offsets, offset)
        return self.times_ms[found - 1] if found else 0

    def first_since(self, since_ms: int) -> int | None:
        """Offset of the first batch that came at or after a time; None when there is none, or no index.

        Wall clocks are set back now and then, so times need not grow: every entry is looked at.
        """
        for offset, at_ms in zip(self.offsets, self.times_ms, strict=True):
            if at_ms >= since_ms:
                return offset
        return None


def stamp_of(text: str) -> int:
    """The time that a line begins with, as daemons and many programs write it, in milliseconds; 0 without one.

    A time without a zone is one of this machine's zone.
    """
    found = _STAMP.match(text[:STAMP_CHARS])
    if found is None:
        return 0
    day, clock, fraction, zone = found.groups()
    zone = {None: "", "Z": "+00:00"}.get(zone, zone)
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}{zone}")
        whole_ms = int(moment.timestamp()) * 1000
    except (ValueError, OverflowError, OSError):
        return 0
    return max(0, whole_ms + int((fraction or "0").ljust(3, "0")[:3]))
