"""Retry delays: exponential with full jitter and a cap."""

from __future__ import annotations

import random


def full_jitter_ms(attempt: int, *, base_ms: int, cap_ms: int, rng: random.Random) -> int:
    """Delay before retry number `attempt` (1 is the first): uniform in [0, min(cap, base * 2**(attempt-1))].

    Source: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015 (full jitter).
    """
    return rng.randint(0, ceiling_ms(attempt, base_ms=base_ms, cap_ms=cap_ms))


def ceiling_ms(attempt: int, *, base_ms: int, cap_ms: int) -> int:
    """The longest delay before retry `attempt`; the core, which may not draw, waits this long."""
    return min(cap_ms, base_ms << min(max(attempt, 1) - 1, 30))
