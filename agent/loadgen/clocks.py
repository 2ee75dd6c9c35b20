"""Time for the load generator: a timer that wakes on the nanosecond, and the kernel's receive stamps on our clock.

All times are CLOCK_MONOTONIC, which the processes of a machine share. Receive stamps come in CLOCK_REALTIME; the offset
between the two is measured again ten times a second, so that a wall clock that is slewed moves no figure, and one that
is set is seen (`steps`).
"""

from __future__ import annotations

import ctypes
import os
import struct
import time

SO_TIMESTAMPNS = 35  # asm-generic; the socket module does not name it
STEP_NS = 1_000_000
_CLOCK_MONOTONIC, _ABSOLUTE = 1, 1
_CLOEXEC, _NONBLOCK = 0o2000000, 0o4000
unpack = struct.Struct("@qq").unpack_from
"""(seconds, nanoseconds) of an SCM_TIMESTAMPNS control message, in CLOCK_REALTIME."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """A timerfd on CLOCK_MONOTONIC: readable from the armed moment on. Epoll's own timeouts round up to 1 ms."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, _CLOEXEC | _NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _Itimerspec()

    def arm(self, at_ns: int) -> None:
        """Wakes at a moment of CLOCK_MONOTONIC, at once if it has passed."""
        # Zero would disarm the timer.
        self._spec.value.seconds, self._spec.value.nanoseconds = divmod(max(at_ns, 1), 1_000_000_000)
        if self._libc.timerfd_settime(self.fd, _ABSOLUTE, ctypes.byref(self._spec), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        """Takes note of a wake-up."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            pass  # armed anew between the wake-up and this

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self.fd)


class Stamps:
    """Receive stamps on CLOCK_MONOTONIC."""

    __slots__ = ("offset_ns", "steps")

    def __init__(self) -> None:
        self.offset_ns = _offset_ns()
        self.steps = 0
        """How often the wall clock was set by more than STEP_NS."""

    def refresh(self) -> None:
        """Measures the offset again."""
        offset = _offset_ns()
        if abs(offset - self.offset_ns) > STEP_NS:
            self.steps += 1
        self.offset_ns = offset


def _offset_ns() -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, from the quickest of five readings."""
    best_width, best = 1 << 62, 0
    for _ in range(5):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if after - before < best_width:
            best_width, best = after - before, wall - (before + after) // 2
    return best
