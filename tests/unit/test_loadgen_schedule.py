"""Arrivals: exact counts, the dispersion of each process, slices that add up, rates that change."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench import schedule
from common.bench.schedule import EVEN, NS, Flat, Profile, Ramp, Sine, Steps, draw, from_times, spike
from common.bench.spec import LoadSpec, check

PROFILES: list[Profile] = [
    Flat(7.0),
    Ramp(1.0, 50.0, 20.0),
    Ramp(50.0, 1.0, 20.0),
    Ramp(0.0, 10.0, 5.0),
    Steps(((10.0, 3.0), (0.0, 2.0), (40.0, 1.0))),
    spike(5.0, 100.0, 4.0, 1.0),
    Sine(20.0, 20.0, 8.0),
]


def dispersion(times_ns: list[int], each_s: float, seconds: float) -> float:
    """Variance over mean of the counts in stretches of time: 1 for Poisson, 0 for equal gaps."""
    counts = [0] * int(seconds / each_s)
    for at in times_ns:
        counts[min(int(at / NS / each_s), len(counts) - 1)] += 1
    return statistics.variance(counts) / statistics.fmean(counts)


def test_constant_is_exact() -> None:
    """Equal gaps, the first request at once, as many as rate times duration."""
    made = draw(Flat(100.0), burstiness=EVEN, seed=1, duration_s=3.0)
    assert list(made.times_ns) == [number * 10_000_000 for number in range(300)]


@pytest.mark.parametrize(("burstiness", "low", "high"), [(1.0, 0.85, 1.15), (0.25, 3.0, 5.0), (4.0, 0.15, 0.4)])
def test_dispersion_is_that_of_the_process(burstiness: float, low: float, high: float) -> None:
    """Counts vary as the process says: 1 for Poisson, about 1 / burstiness for gamma over long stretches."""
    made = draw(Flat(50.0), burstiness=burstiness, seed=3, duration_s=1_000.0)
    assert low < dispersion(list(made.times_ns), 2.0, 1_000.0) < high
    assert len(made.times_ns) == pytest.approx(50_000, rel=0.05)


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_have_the_stated_variation(burstiness: float) -> None:
    """The coefficient of variation of the gaps is 1 / sqrt(burstiness)."""
    times = draw(Flat(100.0), burstiness=burstiness, seed=5, requests=40_000).times_ns
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.03)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.describe())
def test_due_is_the_inverse_of_expected(profile: Profile) -> None:
    """expected(due(n)) is n, and due never falls."""
    counts = [number / 3 for number in range(1, 300)]
    dues = [profile.due(count) for count in counts]
    assert dues == sorted(dues)
    assert [profile.expected(at) for at in dues] == pytest.approx(counts, abs=1e-6)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.describe())
def test_changing_rates_keep_their_count(profile: Profile) -> None:
    """With equal unit gaps the number of arrivals before a time is the intensity until then."""
    made = draw(profile, burstiness=EVEN, seed=1, duration_s=16.0)
    assert abs(len(made.times_ns) - profile.expected(16.0)) <= 1
    assert list(made.times_ns) == sorted(made.times_ns)


def test_steps_change_their_rate_where_they_say() -> None:
    """Ten a second, none, then forty."""
    times = draw(Steps(((10.0, 3.0), (0.0, 2.0), (40.0, 1.0))), burstiness=EVEN, seed=1, duration_s=6.0).times_ns
    assert sum(at < 3 * NS for at in times) == 30
    assert not [at for at in times if 3 * NS < at < 5 * NS - 1]
    assert sum(at >= 5 * NS - 1 for at in times) == 40


@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 200))
def test_slices_are_the_whole(seed: int, workers: int, requests: int) -> None:
    """However many workers: the same arrivals, each once, under the same index."""
    made = draw(Flat(20.0), seed=seed, requests=requests)
    union: dict[int, int] = {}
    for worker in range(workers):
        indices, times = made.slice_of(worker, workers)
        union |= dict(zip(indices, times, strict=True))
    assert [union[index] for index in range(requests)] == list(made.times_ns)


def test_a_seed_gives_one_schedule() -> None:
    """The same seed, the same schedule; another seed, another."""
    first, again, other = (draw(Flat(9.0), seed=seed, requests=50).times_ns for seed in (1, 1, 2))
    assert first == again != other


def test_traces_begin_at_zero_and_scale() -> None:
    """Recorded arrivals in any order, moved to the start, played faster, cut off."""
    assert list(from_times([12.0, 10.0, 16.0], speed=2.0, name="t").times_ns) == [0, NS, 3 * NS]
    assert len(from_times([0.0, 1.0, 5.0], name="t", limit_s=5.0).times_ns) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: Flat(0.0),
        lambda: Sine(5.0, 6.0, 1.0),
        lambda: Steps(((1.0, 1.0), (0.0, 1.0))),
        lambda: Ramp(1.0, 2.0, 0.0),
        lambda: draw(Flat(1.0), seed=1),
        lambda: draw(Flat(1e9), seed=1, duration_s=60.0),
        lambda: draw(Flat(1.0), seed=1, duration_s=-1.0),
        lambda: draw(Flat(1.0), seed=1, requests=1, burstiness=0.0),
        lambda: from_times([], name="t"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(call: object) -> None:
    """Rates, times and numbers that make no schedule."""
    with pytest.raises(ValueError, match=r"\w"):
        call()  # type: ignore[operator]


def test_the_limit_of_arrivals_is_told() -> None:
    """The refusal names the limit."""
    with pytest.raises(ValueError, match=f"{schedule.MAX_ARRIVALS:,}"):
        draw(Flat(1.0), seed=1, requests=schedule.MAX_ARRIVALS + 1)


def test_bursts_come_together() -> None:
    """So many at one moment, the moments as far apart as the rate says; the last burst may be cut by the number."""
    drawn = schedule.draw(schedule.Flat(20), burstiness=schedule.EVEN, together=8, seed=0, requests=20)
    assert list(drawn.times_ns) == [0] * 8 + [400_000_000] * 8 + [800_000_000] * 4
    drawn = schedule.draw(schedule.Flat(20), burstiness=schedule.EVEN, together=8, seed=0, duration_s=0.8)
    assert list(drawn.times_ns) == [0] * 8 + [400_000_000] * 8


def test_offline_is_all_at_once() -> None:
    """Nothing is left to a schedule."""
    assert list(schedule.all_at_once(5).times_ns) == [0] * 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"trace": "t.jsonl", "rate": 5.0}, "rate has no meaning for a trace"),
        ({"trace": "t.jsonl", "burstiness": 0.5}, "burstiness has no meaning for a trace"),
        ({"rate": 5.0, "speed": 2.0, "duration": 1.0}, "speed is for a trace"),
        ({"rate": 5.0, "steps": ("5x1s",), "duration": 1.0}, "steps have their own rates"),
        ({"rate": 5.0, "period": 2.0, "duration": 1.0}, "period is for arrivals sine"),
        ({"rate": 5.0, "peak_at": 2.0, "duration": 1.0}, "arrivals spike"),
    ],
)
def test_what_says_nothing_about_the_arrivals_is_refused(fields: dict[str, Any], said: str) -> None:
    """Nothing that was asked for is passed over in silence."""
    with pytest.raises(ValueError, match=said):
        check(LoadSpec(model="m", **fields))
