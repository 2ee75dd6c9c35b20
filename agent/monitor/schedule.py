"""Ticks at fixed moments: the n-th is due at start + n x interval, whatever the ones before it took.

A tick that comes late moves no other; one whose moment has passed when the next is due is missed, and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

INTERVAL_MIN_S = 0.05


class Schedule:
    """When the next tick is due. `now` is any monotonic clock in seconds."""

    def __init__(self, interval_s: float, *, now: Callable[[], float] = time.monotonic) -> None:
        """Raises: ValueError for an interval below INTERVAL_MIN_S."""
        if not interval_s >= INTERVAL_MIN_S:
            raise ValueError(f"an interval is at least {INTERVAL_MIN_S:g} s, not {interval_s:g}")
        self.interval_s = interval_s
        self.missed = 0
        self._now = now
        self._start_s = now()
        self._number = 0

    def restart(self) -> None:
        """The first tick is due now."""
        self._start_s = self._now()
        self._number = 0

    def wait_s(self) -> float:
        """Seconds until the next tick, 0 when it is due."""
        return max(0.0, self._start_s + self._number * self.interval_s - self._now())

    def begin(self) -> None:
        """The tick that is due begins: the next is the first whose moment has not passed, those between are missed."""
        passed = int((self._now() - self._start_s) / self.interval_s)
        self.missed += max(0, passed - self._number)
        self._number = max(passed, self._number) + 1
