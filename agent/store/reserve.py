"""Space is promised before the first byte: no transfer begins that could end in a full disk.

The ledger keeps, per fetch, how many bytes were promised and are not published yet. A promise is given when both
hold: published + promised + need <= budget, and need <= what the file system has free, less what others were
promised and have not allocated yet, less the reserve. Bytes that the trash is still freeing are waited for, so
that "drop, then fetch" works; everything else is refused at once, with the numbers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.store.catalogue import Catalogue
from common.errors import DiskFull

TRASH_WAIT_S = 120.0


class Ledger:
    """Promises of one store. Thread-safe."""

    def __init__(
        self,
        root: Path,
        catalogue: Catalogue,
        *,
        budget_bytes: int,
        reserve_bytes: int,
        reclaiming: Callable[[], int] = lambda: 0,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._root, self._catalogue = root, catalogue
        self._budget_bytes, self._reserve_bytes = budget_bytes, reserve_bytes
        self._reclaiming, self._is_stopping = reclaiming, is_stopping
        self._lock = threading.Lock()
        self._promised: dict[str, int] = {}  # token -> bytes not yet published
        self._allocated: dict[str, int] = {}  # token -> of those, bytes that the file system has given already
        self._kept: dict[str, int] = {}  # part name -> bytes of a part that waits to be resumed

    def reserve(self, token: str, need: int, *, allocated: int = 0) -> None:
        """Promises `need` bytes to `token`, of which `allocated` are on disk already (a part that is resumed).

        Waits only while bytes that the trash is freeing would make room. Raises: DiskFull.
        """
        give_up = time.monotonic() + TRASH_WAIT_S
        while True:
            with self._lock:
                numbers = self._numbers(exclude=token)
                if need <= numbers["budget_free"] and need - allocated <= numbers["free"]:
                    self._promised[token], self._allocated[token] = need, allocated
                    return
            reclaiming = self._reclaiming()
            short = max(need - numbers["budget_free"], need - allocated - numbers["free"])
            if reclaiming < short or reclaiming == 0 or time.monotonic() > give_up or self._is_stopping():
                raise self._refusal(need, numbers, reclaiming)
            time.sleep(0.02)

    def grow(self, token: str, more: int) -> None:
        """Promises `more` bytes to a fetch whose source did not say how large it is. Raises: DiskFull."""
        with self._lock:
            need = self._promised.get(token, 0) + more
            allocated = self._allocated.get(token, 0)
        self.reserve(token, need, allocated=allocated)

    def allocated(self, token: str, count: int) -> None:
        """The file system has given `count` more of the promised bytes (or, below zero, has them back)."""
        with self._lock:
            if token in self._allocated:
                self._allocated[token] = max(0, self._allocated[token] + count)

    def release(self, token: str) -> None:
        """The fetch has ended, well or not."""
        with self._lock:
            self._promised.pop(token, None)
            self._allocated.pop(token, None)

    def keep_part(self, name: str, count: int) -> None:
        """An unfinished part stays on disk without a fetch that has promised for it."""
        with self._lock:
            self._kept[name] = count

    def forget_part(self, name: str) -> None:
        """A fetch has taken the part up again, or it is gone."""
        with self._lock:
            self._kept.pop(name, None)

    def capacity(self) -> dict[str, int]:
        """total_bytes, free_bytes, used_bytes, reserved_bytes, reclaiming_bytes."""
        with self._lock:
            numbers = self._numbers()
        return {
            "total_bytes": self._budget_bytes or numbers["total"],
            "free_bytes": max(0, min(numbers["free"], numbers["budget_free"])),
            "used_bytes": numbers["used"],
            "reserved_bytes": numbers["promised"],
            "reclaiming_bytes": self._reclaiming(),
        }

    def _numbers(self, exclude: str = "") -> dict[str, int]:
        status = os.statvfs(self._root)
        used = self._catalogue.used_bytes() + sum(self._kept.values())
        promised = sum(count for token, count in self._promised.items() if token != exclude)
        outstanding = promised - sum(count for token, count in self._allocated.items() if token != exclude)
        total = status.f_blocks * status.f_frsize
        budget = self._budget_bytes or total
        return {
            "total": total,
            "used": used,
            "promised": promised,
            "free": status.f_bavail * status.f_frsize - self._reserve_bytes - max(0, outstanding),
            "budget_free": budget - used - promised - self._reclaiming(),
        }

    def _refusal(self, need: int, numbers: dict[str, int], reclaiming: int) -> DiskFull:
        free = max(0, min(numbers["free"], numbers["budget_free"]))
        return DiskFull(
            f"{need} bytes are needed and {free} are free",
            hint="delete copies that are not needed on this node, or give its store more room",
            need=need,
            free=free,
            reserved=numbers["promised"],
            reclaimable=numbers["used"] + reclaiming,
        )
