"""Time, injected. Cores never read a clock: `now_ms` arrives with each event.

Herder time is milliseconds since the epoch that never run backwards and never jump: the wall clock is read once
at start (not before the last journalled stamp), and from then on CLOCK_BOOTTIME carries it forward, which also
counts suspend. A later jump of the wall clock therefore changes nothing.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What gives time to a driver."""

    def now_ms(self) -> int:
        """Herder time in milliseconds."""
        ...


class FineClock(Clock, Protocol):
    """The same time with a finer grain, for comparing it with another machine's clock."""

    def now_ns(self) -> int:
        """Herder time in nanoseconds; `now_ms` is its whole milliseconds."""
        ...


def boottime_ns() -> int:
    """Nanoseconds since this machine booted, suspend included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boottime_ms() -> int:
    """Milliseconds since this machine booted, suspend included."""
    return boottime_ns() // 1_000_000


class SystemClock:
    """The clock of a running daemon."""

    def __init__(self, not_before_ms: int = 0) -> None:
        self._base_ms = max(not_before_ms, time.time_ns() // 1_000_000) - boottime_ms()

    def now_ms(self) -> int:
        return self._base_ms + boottime_ms()

    def now_ns(self) -> int:
        """Herder time in nanoseconds."""
        return self._base_ms * 1_000_000 + boottime_ns()


class ManualClock:
    """A clock that tests and the simulator move by hand."""

    def __init__(self, now_ms: int = 1_000_000_000_000) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        return self._now_ms

    def now_ns(self) -> int:
        """Herder time in nanoseconds."""
        return self._now_ms * 1_000_000

    def advance(self, ms: int) -> int:
        """Moves time forward and returns it."""
        assert ms >= 0
        self._now_ms += ms
        return self._now_ms
