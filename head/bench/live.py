"""Running benchmarks as they go: the load nodes' ticks, added up second by second, for people and for /metrics.

A tick may be lost or late, so a second is told once every part has come so far, or once somebody is two further.
What is shown here is for watching: rates and counts add up, but a percentile over several nodes is only bounded by
theirs. The p50 shown is the mean of the nodes' weighted by their answers, the p99 the highest of them. Reports are made
of raw rows and know nothing of this.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.errors import TooMany
from common.wire import RunTick
from head.core.objects import Run
from head.core.state import BENCHMARK_ENDED, State
from herder.types import BenchmarkTick

LATEST_S = 1e7  # a second beyond this is not one
WAIT_SECONDS = 2  # a part that is so far behind the first is not waited for
QUEUE_TICKS = 256  # a reader that is further behind loses the oldest
READERS = 256
STALE_MS = 5_000  # after so long without a tick a benchmark is not in motion


@dataclass(slots=True)
class _Second:
    ticks: dict[int, RunTick] = field(default_factory=dict)  # by part


@dataclass(slots=True)
class _Point:
    """What is being added up of one point."""

    number: int
    parts: int
    told: int = -1  # the last second that was told
    latest: int = -1
    reached: dict[int, int] = field(default_factory=dict)  # by part: its last second
    seconds: dict[int, _Second] = field(default_factory=dict)


class Reader:
    """One who watches a benchmark."""

    def __init__(self, owner: Live, benchmark: str) -> None:
        self._owner = owner
        self.benchmark = benchmark
        self._ticks: deque[BenchmarkTick] = deque(maxlen=QUEUE_TICKS)
        self._news = asyncio.Event()
        self._is_closed = False

    def give(self, tick: BenchmarkTick) -> None:
        """A second more."""
        self._ticks.append(tick)
        self._news.set()

    async def next(self, wait_s: float) -> BenchmarkTick | None:
        """The next second; None when none came within `wait_s`, or the benchmark has ended."""
        if not self._ticks and wait_s > 0:
            self._news.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                return None
        return self._ticks.popleft() if self._ticks else None

    @property
    def is_over(self) -> bool:
        """Whether everything was read that will come: the benchmark has ended, or the head stops."""
        return not self._ticks and (self._owner.is_closed or self._owner.has_ended(self.benchmark))

    def close(self) -> None:
        """Watches no more."""
        self._owner.forget(self)

    def wake(self) -> None:
        """Lets it look whether the benchmark has ended."""
        self._news.set()


class Live:
    """All running benchmarks."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._points: dict[str, _Point] = {}  # by benchmark: the one that runs
        self._last: dict[str, tuple[int, BenchmarkTick]] = {}  # by benchmark: when it came, and what
        self._readers: dict[str, set[Reader]] = {}
        self._count = 0
        self.dropped = 0
        self.is_closed = False

    def close(self) -> None:
        """Lets every reader go: the head stops."""
        self.is_closed = True
        for readers in self._readers.values():
            for reader in readers:
                reader.wake()

    def take(self, node: str, tick: RunTick, now_ms: int) -> None:
        """What a load node did in a second. Of a run that is not its own, or nonsense, is dropped."""
        run = self._state.runs.get(tick.run)
        if run is None or run.node != node or run.kind != "load" or not _is_sound(tick):
            self.dropped += 1
            return
        point = self._points.get(run.benchmark)
        if point is None or point.number < run.point:
            if point is not None:
                self._tell(run.benchmark, point, now_ms, before=point.latest + 1)
            point = self._points[run.benchmark] = _Point(run.point, run.parts)
        if point.number == run.point:
            self._add(run, point, tick, now_ms)

    def watch(self, benchmark: str) -> Reader:
        """Seconds of a benchmark from now on. Raises: TooMany."""
        if self._count >= READERS:
            raise TooMany("too many watch benchmarks", hint="close some of them")
        self._count += 1
        reader = Reader(self, benchmark)
        self._readers.setdefault(benchmark, set()).add(reader)
        return reader

    def forget(self, reader: Reader) -> None:
        """A reader left."""
        readers = self._readers.get(reader.benchmark, set())
        if reader in readers:
            readers.discard(reader)
            self._count -= 1
            if not readers:
                del self._readers[reader.benchmark]

    def watched(self, benchmark: str) -> int:
        """How many watch a benchmark."""
        return len(self._readers.get(benchmark, ()))

    def sweep(self) -> None:
        """Forgets benchmarks that have ended, after their last seconds were told; called about once a second."""
        for benchmark in [*self._points]:
            if self.has_ended(benchmark):
                self._tell(benchmark, self._points[benchmark], 0, before=self._points[benchmark].latest + 1)
                del self._points[benchmark]
                self._last.pop(benchmark, None)
        for benchmark, readers in self._readers.items():
            if self.has_ended(benchmark):
                for reader in readers:
                    reader.wake()

    def has_ended(self, benchmark: str) -> bool:
        """Whether no second of it will come any more."""
        known = self._state.benchmarks.get(benchmark)
        return known is None or known.state in BENCHMARK_ENDED

    def in_motion(self, now_ms: int) -> Iterator[BenchmarkTick]:
        """The last second of every benchmark that sends load now: what /metrics shows."""
        for at_ms, tick in self._last.values():
            if now_ms - at_ms <= STALE_MS:
                yield tick

    def _add(self, run: Run, point: _Point, tick: RunTick, now_ms: int) -> None:
        second = round(tick.at_s)
        if second <= point.told:
            self.dropped += 1
            return
        point.seconds.setdefault(second, _Second()).ticks[run.part] = tick
        point.latest = max(point.latest, second)
        point.reached[run.part] = max(point.reached.get(run.part, 0), second)
        is_whole = len(point.reached) >= point.parts  # frames of a session come in order: nobody goes back
        passed = min(point.reached.values()) if is_whole else -1
        self._tell(run.benchmark, point, now_ms, before=max(passed, point.latest - WAIT_SECONDS) + 1)

    def _tell(self, benchmark: str, point: _Point, now_ms: int, *, before: int) -> None:
        """Tells every second before this one that was not told yet."""
        for number in sorted(number for number in point.seconds if number < before):
            tick = added_up(benchmark, point.number, number, list(point.seconds.pop(number).ticks.values()))
            point.told = max(point.told, number)
            if now_ms:
                self._last[benchmark] = (now_ms, tick)
            for reader in self._readers.get(benchmark, ()):
                reader.give(tick)


def added_up(benchmark: str, point: int, second: int, ticks: list[RunTick]) -> BenchmarkTick:
    """One second of all load nodes together."""
    halves = [(tick.ttft_p50_ms, max(tick.done, 1)) for tick in ticks if tick.ttft_p50_ms is not None]
    weight = sum(done for _, done in halves)
    return BenchmarkTick(
        benchmark=benchmark,
        point=point,
        at_s=float(second),
        nodes=len(ticks),
        sent=sum(tick.sent for tick in ticks),
        done=sum(tick.done for tick in ticks),
        failed=sum(tick.failed for tick in ticks),
        in_flight=sum(tick.in_flight for tick in ticks),
        tokens=sum(tick.tokens for tick in ticks),
        ttft_p50_ms=sum(value * done for value, done in halves) / weight if halves else None,
        ttft_p99_ms=max((tick.ttft_p99_ms for tick in ticks if tick.ttft_p99_ms is not None), default=None),
    )


def _is_sound(tick: RunTick) -> bool:
    counts = (tick.sent, tick.done, tick.failed, tick.in_flight, tick.tokens)
    times = [value for value in (tick.ttft_p50_ms, tick.ttft_p99_ms) if value is not None]
    return (
        0 <= tick.at_s < LATEST_S
        and all(count >= 0 for count in counts)
        and all(0 <= value < LATEST_S * 1000 for value in times)
    )
