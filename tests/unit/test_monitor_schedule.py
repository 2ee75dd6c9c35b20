"""The monitor's ticks: at fixed moments, never shifted, missed ones counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.monitor.schedule import Schedule


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_ticks_keep_their_moments_however_long_each_takes() -> None:
    """A tick that takes 0.7 of an interval leaves 0.3 to wait, so a thousand ticks end where they should."""
    clock = Clock()
    schedule = Schedule(1.0, now=clock)
    for number in range(1000):
        clock.now_s += schedule.wait_s()
        assert clock.now_s == pytest.approx(100.0 + number)
        schedule.begin()
        clock.now_s += 0.7
    assert schedule.missed == 0


def test_a_tick_that_takes_too_long_misses_whole_ticks() -> None:
    """After 2.5 intervals two moments have passed; the next tick is at its own moment and not half of one late."""
    clock = Clock()
    schedule = Schedule(1.0, now=clock)
    schedule.begin()
    clock.now_s += 2.5
    assert schedule.wait_s() == 0.0
    schedule.begin()
    assert schedule.missed == 1
    assert schedule.wait_s() == pytest.approx(0.5)


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60), st.sampled_from([0.05, 0.25, 1.0]))
def test_every_moment_is_sampled_or_missed(takes: list[float], interval_s: float) -> None:
    """Whatever samples take: samples and missed ticks together are the moments that have passed."""
    clock = Clock()
    schedule = Schedule(interval_s, now=clock)
    for samples, taken in enumerate(takes, 1):
        clock.now_s += schedule.wait_s() + 1e-9
        schedule.begin()
        passed = int((clock.now_s - 100.0) / interval_s) + 1
        assert samples + schedule.missed == passed
        clock.now_s += taken


@pytest.mark.parametrize("interval_s", [0.0, 0.049, -1.0, float("nan")])
def test_an_interval_has_a_floor(interval_s: float) -> None:
    """Less than 0.05 s, and what is no number, is refused."""
    with pytest.raises(ValueError, match=r"at least 0\.05 s"):
        Schedule(interval_s)
