"""The file in which the agent notes until when the head's lease holds, for its successor and for the shims.

Counted in CLOCK_BOOTTIME, so it means something on this boot only. It is written in place, at one size, without
fsync: that works on a full disk, and after a crash of ours the bytes are in the page cache. A reader may meet half a
write; the number therefore stands there twice, and what does not agree with itself counts as nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

SIZE_BYTES = 160


class LeaseNote:
    """The note of one agent. Blocks for microseconds only."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self.path = path
        self.boot_id = boot_id

    def write(self, until_boottime_ms: int) -> None:
        """Notes it. Raises: OSError."""
        note = {"boot_id": self.boot_id, "until_boottime_ms": until_boottime_ms, "again": until_boottime_ms}
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(descriptor, json.dumps(note).ljust(SIZE_BYTES).encode(), 0)
        finally:
            os.close(descriptor)

    def read(self) -> int:
        """What was noted on this boot; 0 for nothing, or nothing that can be believed."""
        try:
            note = json.loads(self.path.read_text())
            until = int(note["until_boottime_ms"])
            return until if note["boot_id"] == self.boot_id and note["again"] == until else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0
