"""A wall clock that jumps when a test says so, for processes that are started under `environment`.

Builds `shiftclock.c`, which the loader puts before libc; the shift lies in a file that those processes have mapped, so
that all of them see a jump at once, in the middle of whatever they do.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shiftclock.c")


class ShiftClock:
    """One clock, shifted by no second at first."""

    def __init__(self, folder: Path) -> None:
        self._library = folder / "shiftclock.so"
        self._file = folder / "shift"
        subprocess.run(
            ["gcc", "-Wall", "-Werror", "-O2", "-shared", "-fPIC", "-o", self._library, SOURCE], check=True, timeout=60
        )
        self._file.write_bytes(struct.pack("q", 0))
        with self._file.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)

    def environment(self) -> dict[str, str]:
        """Variables under which a process has this clock."""
        return {"LD_PRELOAD": str(self._library), "SHIFT_CLOCK": str(self._file)}

    def jump_to(self, shift_s: int) -> None:
        """The wall clock is so many seconds off the true time from now on."""
        self._page[:8] = struct.pack("q", shift_s)
