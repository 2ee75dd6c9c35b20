"""The live view: seconds of several load nodes added up, readers bounded, nonsense dropped."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import TooMany
from common.wire import RunTick
from head.bench import live as live_module
from head.bench.live import QUEUE_TICKS, Live, Reader
from head.core.objects import Benchmark, Run
from head.core.state import State
from herder.types import BenchmarkTick

NOW = 1_000_000


def state_of(*, parts: int = 2, points: int = 2, ended: bool = False) -> State:
    """A benchmark whose load nodes n0, n1, ... do two points."""
    state = State()
    status = "completed" if ended else "running"
    state.benchmarks["b"] = Benchmark("b", "sweep", {}, "", "me", status, 1, 1, "c")
    for point in range(points):
        for part in range(parts):
            key = f"b.{point}.{part}"
            state.runs[key] = Run(key, "b", f"n{part}", "load", 1, "fired", "running", "c", 1, point, part, parts)
    state.runs["b.monitor.n0"] = Run("b.monitor.n0", "b", "n0", "monitor", 1, "fired", "running", "c", 1)
    return state


def tick(part: int, second: float, *, point: int = 0, sent: int = 10, **changes: object) -> RunTick:
    """What a part did."""
    return RunTick(f"b.{point}.{part}", second, sent=sent, **changes)  # type: ignore[arg-type]


def read(reader: Reader) -> list[BenchmarkTick]:
    """Everything that waits."""

    async def all_of() -> list[BenchmarkTick]:
        found = []
        while (one := await reader.next(0.0)) is not None:
            found.append(one)
        return found

    return asyncio.run(all_of())


class TestSeconds:
    """When a second is told, and what it says."""

    def test_a_second_is_told_once_all_parts_have_said_it(self) -> None:
        """Counts add up; the p50 is weighted by answers, the p99 the worst."""
        live = Live(state_of())
        reader = live.watch("b")
        first = tick(0, 1.0, done=30, failed=1, in_flight=4, tokens=90, ttft_p50_ms=10.0, ttft_p99_ms=20.0)
        live.take("n0", first, NOW)
        assert read(reader) == []
        second = tick(1, 1.0, done=10, tokens=10, in_flight=1, ttft_p50_ms=30.0, ttft_p99_ms=90.0)
        live.take("n1", second, NOW)
        assert read(reader) == [BenchmarkTick("b", 0, 1.0, 2, 20, 40, 1, 5, 100, 15.0, 90.0)]

    def test_a_part_that_is_silent_is_not_waited_for(self) -> None:
        """Two seconds further, what is there is told, with how many nodes it is of; late ticks are dropped."""
        live = Live(state_of())
        reader = live.watch("b")
        for second in (1.0, 2.0, 3.0):
            live.take("n0", tick(0, second), NOW)
        assert [(one.at_s, one.nodes, one.sent) for one in read(reader)] == [(1.0, 1, 10)]
        live.take("n1", tick(1, 1.0), NOW)
        assert read(reader) == []
        assert live.dropped == 1
        live.take("n1", tick(1, 2.0), NOW)
        assert [(one.at_s, one.nodes) for one in read(reader)] == [(2.0, 2)]

    def test_a_repeated_tick_counts_once(self) -> None:
        """A frame may come twice."""
        live = Live(state_of())
        reader = live.watch("b")
        for _ in range(2):
            live.take("n0", tick(0, 1.0), NOW)
        live.take("n1", tick(1, 1.0), NOW)
        assert [one.sent for one in read(reader)] == [20]

    def test_the_next_point_ends_the_one_before(self) -> None:
        """What was not told of a point is told before the first second of the next; ticks of the old are nothing."""
        live = Live(state_of())
        reader = live.watch("b")
        live.take("n0", tick(0, 1.0), NOW)
        live.take("n0", tick(0, 1.0, point=1), NOW)
        live.take("n1", tick(1, 2.0, point=0), NOW)
        live.take("n1", tick(1, 1.0, point=1), NOW)
        assert [(one.point, one.at_s, one.nodes) for one in read(reader)] == [(0, 1.0, 1), (1, 1.0, 2)]

    @pytest.mark.parametrize(
        ("node", "said"),
        [
            ("n1", tick(0, 1.0)),
            ("n0", RunTick("b.monitor.n0", 1.0)),
            ("n0", RunTick("b.9.0", 1.0)),
            ("n0", tick(0, -1.0)),
            ("n0", tick(0, 1e300)),
            ("n0", tick(0, 1.0, sent=-5)),
            ("n0", tick(0, 1.0, ttft_p50_ms=-1.0)),
        ],
    )
    def test_what_no_load_node_says_is_dropped(self, node: str, said: RunTick) -> None:
        """Another node's run, a monitor, an unknown run, negative or endless numbers."""
        live = Live(state_of(parts=1))
        reader = live.watch("b")
        live.take(node, said, NOW)
        assert read(reader) == []
        assert live.dropped == 1

    def test_the_end_tells_what_is_left(self) -> None:
        """When the benchmark has ended, the last seconds are told and it is forgotten."""
        state = state_of()
        live = Live(state)
        reader = live.watch("b")
        live.take("n0", tick(0, 1.0), NOW)
        before = reader.is_over
        state.benchmarks["b"] = state_of(ended=True).benchmarks["b"]
        live.sweep()
        assert [one.at_s for one in read(reader)] == [1.0]
        assert (before, reader.is_over) == (False, True)
        assert list(live.in_motion(NOW)) == []


class TestReaders:
    """Who watches."""

    def test_a_slow_reader_loses_the_oldest(self) -> None:
        """Its queue is bounded; the newest seconds are there."""
        live = Live(state_of(parts=1))
        reader = live.watch("b")
        for second in range(1, QUEUE_TICKS + 11):
            live.take("n0", tick(0, float(second)), NOW)
        found = read(reader)
        assert len(found) == QUEUE_TICKS
        assert found[-1].at_s == QUEUE_TICKS + 10

    def test_there_are_only_so_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One more is refused until another leaves; leaving twice counts once."""
        monkeypatch.setattr(live_module, "READERS", 1)
        live = Live(state_of())
        reader = live.watch("b")
        with pytest.raises(TooMany):
            live.watch("b")
        reader.close()
        reader.close()
        live.watch("b").close()

    def test_metrics_show_only_what_moves(self) -> None:
        """The last second of a benchmark, until nothing came for some seconds."""
        live = Live(state_of(parts=1))
        live.take("n0", tick(0, 1.0), NOW)
        assert [one.sent for one in live.in_motion(NOW + 4_000)] == [10]
        assert list(live.in_motion(NOW + 6_000)) == []
