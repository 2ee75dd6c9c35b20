"""When requests are sent: the whole schedule, drawn once from one seed before the first request.

An arrival process is made of two parts. A unit process draws gaps whose mean is 1 (exponential, gamma, or all equal). A
rate profile says how many arrivals are expected until a time (its cumulative intensity) and, inverted, when the n-th is
due. Unit arrivals through the inverse are the exact non-homogeneous process: nothing is thinned or rescaled, so
the number of Poisson arrivals in a second varies as a Poisson number does.

Workers take every n-th arrival of the one schedule (`slice_of`); none draws for itself, because only Poisson processes
may be drawn in parts, and only with different seeds.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

NS = 1_000_000_000
MAX_ARRIVALS = 2_000_000
"""Of one run, on all its nodes: each leaves a row, and whoever makes the report holds all of them."""
EVEN = math.inf  # the burstiness of equal gaps


class Profile(Protocol):
    """A rate over time."""

    def expected(self, seconds: float) -> float:
        """Arrivals expected in [0, seconds)."""

    def due(self, count: float) -> float:
        """Seconds until so many are expected: the inverse of `expected`; infinite where that many never are."""

    def describe(self) -> str:
        """For the report."""


@dataclass(frozen=True, slots=True)
class Flat:
    """The same rate always."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _check(self.rate_per_s > 0, "a rate must be more than 0")

    def expected(self, seconds: float) -> float:
        """R t."""
        return self.rate_per_s * seconds

    def due(self, count: float) -> float:
        """n / R."""
        return count / self.rate_per_s

    def describe(self) -> str:
        """`10/s`."""
        return f"{self.rate_per_s:g}/s"


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that goes evenly from one to another over a time, and then stays."""

    from_per_s: float
    to_per_s: float
    over_s: float

    def __post_init__(self) -> None:
        _check(self.from_per_s >= 0 and self.to_per_s > 0, "a ramp's rates must not be negative and must end above 0")
        _check(self.over_s > 0, "a ramp needs time")

    def expected(self, seconds: float) -> float:
        """r0 t + (r1 - r0) t^2 / 2D, and the end rate after D."""
        inside = min(seconds, self.over_s)
        slope = (self.to_per_s - self.from_per_s) / self.over_s
        return self.from_per_s * inside + slope * inside * inside / 2 + self.to_per_s * max(0.0, seconds - self.over_s)

    def due(self, count: float) -> float:
        """The root of the quadratic that does not cancel digits."""
        whole = (self.from_per_s + self.to_per_s) / 2 * self.over_s
        if count >= whole:
            return self.over_s + (count - whole) / self.to_per_s
        slope = (self.to_per_s - self.from_per_s) / self.over_s
        if count == 0:
            return 0.0
        root = math.sqrt(max(0.0, self.from_per_s**2 + 2 * slope * count))
        return 2 * count / (self.from_per_s + root)

    def describe(self) -> str:
        """`1/s to 50/s over 60s`."""
        return f"{self.from_per_s:g}/s to {self.to_per_s:g}/s over {self.over_s:g}s"


@dataclass(frozen=True, slots=True)
class Steps:
    """Rates one after the other; the last stays."""

    steps: tuple[tuple[float, float], ...]
    """(rate per second, seconds) each."""

    def __post_init__(self) -> None:
        _check(bool(self.steps), "steps need at least one rate")
        _check(all(rate >= 0 and lasts > 0 for rate, lasts in self.steps), "each step needs a rate and a time")
        _check(self.steps[-1][0] > 0, "the last step's rate must be more than 0")

    def expected(self, seconds: float) -> float:
        """The sum of the steps until then."""
        total, begun = 0.0, 0.0
        for number, (rate, lasts) in enumerate(self.steps):
            is_last = number == len(self.steps) - 1
            inside = max(0.0, seconds - begun) if is_last else min(max(0.0, seconds - begun), lasts)
            total += rate * inside
            begun += lasts
        return total

    def due(self, count: float) -> float:
        """Where the sum reaches the count."""
        begun = 0.0
        for rate, lasts in self.steps[:-1]:
            if count < rate * lasts:
                return begun + count / rate
            count -= rate * lasts
            begun += lasts
        return begun + count / self.steps[-1][0]

    def describe(self) -> str:
        """`10/s for 30s, 20/s for 30s`."""
        return ", ".join(f"{rate:g}/s for {lasts:g}s" for rate, lasts in self.steps)


def spike(base_per_s: float, peak_per_s: float, at_s: float, lasts_s: float) -> Steps:
    """A base rate with one stretch of another."""
    _check(at_s > 0 and lasts_s > 0, "a spike needs a start after 0 and a length")
    return Steps(((base_per_s, at_s), (peak_per_s, lasts_s), (base_per_s, at_s + lasts_s)))


@dataclass(frozen=True, slots=True)
class Sine:
    """A rate that swings around its mean, from the mean upwards."""

    mean_per_s: float
    amplitude_per_s: float
    period_s: float

    def __post_init__(self) -> None:
        _check(self.mean_per_s > 0 and self.period_s > 0, "a sine needs a mean rate and a period")
        _check(0 <= self.amplitude_per_s <= self.mean_per_s, "a sine's amplitude must not exceed its mean")

    def expected(self, seconds: float) -> float:
        """m t + (a P / 2 pi) (1 - cos(2 pi t / P))."""
        turn = 2 * math.pi / self.period_s
        return self.mean_per_s * seconds + self.amplitude_per_s / turn * (1 - math.cos(turn * seconds))

    def due(self, count: float) -> float:
        """By bisection to the last bit that matters: whole periods are exact, the rest lies within one."""
        each = self.mean_per_s * self.period_s
        periods = math.floor(count / each)
        rest = count - periods * each
        low, high = 0.0, self.period_s
        while high - low > 1e-10:
            middle = (low + high) / 2
            if self.expected(middle) < rest:
                low = middle
            else:
                high = middle
        return periods * self.period_s + (low + high) / 2

    def describe(self) -> str:
        """`20/s plus or minus 10/s every 60s`."""
        return f"{self.mean_per_s:g}/s plus or minus {self.amplitude_per_s:g}/s every {self.period_s:g}s"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Intended send times, in nanoseconds after the start, never falling."""

    times_ns: array[int]
    name: str
    seed: int | None
    asked_per_s: float | None
    """The mean rate that was asked for; None for a recorded trace."""

    def slice_of(self, worker: int, workers: int) -> tuple[range, array[int]]:
        """(indices, times) of one worker's share: every `workers`-th arrival."""
        assert 0 <= worker < workers
        return range(worker, len(self.times_ns), workers), self.times_ns[worker::workers]

    @property
    def span_ns(self) -> int:
        """The last intended send time; 0 for none."""
        return self.times_ns[-1] if self.times_ns else 0


def draw(
    profile: Profile,
    *,
    burstiness: float = 1.0,
    together: int = 1,
    seed: int,
    duration_s: float | None = None,
    requests: int | None = None,
    name: str = "",
) -> Schedule:
    """The schedule of a rate profile: all arrivals before `duration_s`, at most `requests`; at least one is given.

    burstiness: the shape of the gamma distribution of gaps: 1 is Poisson, below 1 clumps, above 1 evens out, EVEN is
    equal gaps. The coefficient of variation of the gaps is 1 / sqrt(burstiness). together: each arrival is so many
    requests at once, at a rate that keeps that of requests.
    Raises: ValueError for what cannot be drawn.
    """
    _check(duration_s is not None or requests is not None, "a schedule needs a duration or a number of requests")
    _check(duration_s is None or duration_s > 0, "a duration must be more than 0")
    _check(requests is None or requests > 0, "a number of requests must be more than 0")
    _check(burstiness > 0, "burstiness must be more than 0")
    _check(together > 0, "at least one request comes at a time")
    if duration_s is not None and requests is None:
        _check(profile.expected(duration_s) < MAX_ARRIVALS, f"more than {MAX_ARRIVALS:,} requests; take a shorter run")
    _check((requests or 0) <= MAX_ARRIVALS, f"more than {MAX_ARRIVALS:,} requests; take a shorter run")
    end_ns = math.inf if duration_s is None else duration_s * NS
    limit = requests if requests is not None else 2 * MAX_ARRIVALS
    times = array("q")
    for position in _unit_arrivals(burstiness, random.Random(f"herder arrivals {seed}")):
        at_ns = profile.due(position * together) * NS
        if at_ns >= end_ns or len(times) >= limit:
            break
        times.extend([round(at_ns)] * min(together, limit - len(times)))
    asked = len(times) * NS / max(times[-1], 1) if duration_s is None and times else None
    mean = profile.expected(duration_s) / duration_s if duration_s is not None else asked
    if isinstance(profile, Flat):
        mean = profile.rate_per_s
    process = _process(burstiness) if together == 1 else f"bursts of {together}"
    return Schedule(times, name or f"{process} at {profile.describe()}", seed, mean)


def all_at_once(requests: int) -> Schedule:
    """Everything at the start."""
    _check(0 < requests <= MAX_ARRIVALS, f"1 to {MAX_ARRIVALS:,} requests")
    return Schedule(array("q", bytes(8 * requests)), f"offline: {requests} at once", None, None)


def from_times(times_s: Sequence[float], *, speed: float = 1.0, name: str, limit_s: float | None = None) -> Schedule:
    """The schedule of recorded arrivals, moved to start at 0 and played `speed` times as fast.

    limit_s: what would be sent later than this after the start is left out.
    """
    _check(bool(times_s), "a trace without arrivals")
    _check(len(times_s) <= MAX_ARRIVALS, f"more than {MAX_ARRIVALS:,} requests; take a part of the trace")
    _check(speed > 0 and math.isfinite(speed), "a trace's speed must be more than 0")
    first = min(times_s)
    times = array("q", (round((at - first) / speed * NS) for at in sorted(times_s)))
    if limit_s is not None:
        times = array("q", (at for at in times if at < limit_s * NS))
    return Schedule(times, name, None, None)


def _unit_arrivals(burstiness: float, rng: random.Random) -> Iterator[float]:
    """Positions of arrivals at rate 1. Equal gaps begin at 0; others with a gap, as a process seen from any moment."""
    if burstiness == EVEN:
        count = 0
        while True:
            yield float(count)
            count += 1
    total, added = 0.0, 0.0  # Kahan's sum: a long schedule keeps its nanoseconds
    while True:
        gap = rng.expovariate(1.0) if burstiness == 1 else rng.gammavariate(burstiness, 1 / burstiness)
        gap -= added
        summed = total + gap
        added = (summed - total) - gap
        total = summed
        yield total


def _process(burstiness: float) -> str:
    if burstiness == EVEN:
        return "constant"
    return "poisson" if burstiness == 1 else f"gamma (burstiness {burstiness:g})"


def _check(is_good: bool, said: str) -> None:
    if not is_good:
        raise ValueError(said)
