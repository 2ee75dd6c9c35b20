"""Watching a benchmark: a block that is drawn anew in place on a terminal, a line every ten seconds elsewhere.

Ctrl-C ends the watching, not the benchmark, and says how to look again and how to stop it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from common.bench.figures import changes_told, told
from herder import types
from herder.cli import benchmarks_view as view
from herder.cli import output, text, views
from herder.cli.table import clean, cut
from herder.errors import HerderError

if TYPE_CHECKING:
    from herder.cli.command import Globals

WIDTH = 80
LINE_PERIOD_S = 10.0
POINTS_SHOWN = 8
RATE_SECONDS = 5
SILENT = "the head does not answer and is asked again; load that runs goes on"


def follow(options: Globals, benchmark: types.BenchmarkView, *, timeout_s: float | None = None) -> types.BenchmarkView:
    """Shows the benchmark until its end; its last view. Raises: HerderTimeoutError; click's Exit at Ctrl-C."""
    said = (
        f"{benchmark.id} goes on. `herder benchmarks watch {benchmark.id}` looks again, "
        f"`herder benchmarks cancel {benchmark.id}` stops it."
    )
    shown = Live(options)
    with output.interruptible(said):
        try:
            return asyncio.run(_follow(options, benchmark, shown, timeout_s))
        finally:
            shown.end()


async def _follow(
    options: Globals, benchmark: types.BenchmarkView, shown: Live, timeout_s: float | None
) -> types.BenchmarkView:
    from herder.client import AsyncClient

    last = benchmark
    shown.take_view(last)
    async with AsyncClient(
        options.url, token_file=options.token_file, context=options.context, ca_file=options.ca_file
    ) as client:
        seconds = asyncio.ensure_future(_take_seconds(client.live_benchmark(benchmark.id), shown))
        try:
            watched = client.watch_benchmark(benchmark.id, timeout_s=timeout_s, on_lost=shown.take_silence)
            async with aclosing(watched) as changes:
                async for last in changes:
                    shown.take_view(last)
        finally:
            seconds.cancel()
            await asyncio.gather(seconds, return_exceptions=True)
    return last


async def _take_seconds(ticks: AsyncGenerator[types.BenchmarkTick, None], shown: Live) -> None:
    """Seconds are for the eyes: when they cannot be had, the benchmark is watched without them."""
    try:
        async with aclosing(ticks):
            async for tick in ticks:
                shown.take_tick(tick)
    except HerderError as error:
        shown.say(f"its seconds cannot be shown: {error.message}")


class Live:
    """Progress on stderr."""

    def __init__(self, options: Globals, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        # A block is cut to a width, which colours would spoil.
        self._plain = dataclasses.replace(options, is_colourless=True)
        self._is_terminal = sys.stderr.isatty() and not options.is_quiet
        self._view: types.BenchmarkView | None = None
        self._tick: types.BenchmarkTick | None = None
        self._latest: deque[types.BenchmarkTick] = deque(maxlen=RATE_SECONDS)
        self._sums = [0, 0, 0]
        self._drawn = 0
        self._said: dict[int, str] = {}
        self._status = ""
        self._is_silent = False
        self._line_at = -LINE_PERIOD_S

    def take_view(self, benchmark: types.BenchmarkView) -> None:
        """The benchmark has changed."""
        self._view = benchmark
        if self._is_terminal:
            self._draw()
            return
        if benchmark.status != self._status:
            self._status = benchmark.status
            self.say(f"{benchmark.id}: {benchmark.status}{f', {benchmark.note}' if benchmark.note else ''}")
        for point in benchmark.points:
            if point.status in view.ENDED and self._said.get(point.number) != point.status:
                self._said[point.number] = point.status
                self.say(f"  {line_of(point)}")

    def take_tick(self, tick: types.BenchmarkTick) -> None:
        """One second more."""
        if self._tick is None or tick.point != self._tick.point:
            self._sums = [0, 0, 0]
            self._latest.clear()
        self._tick = tick
        self._latest.append(tick)
        for place, value in enumerate((tick.sent, tick.done, tick.failed)):
            self._sums[place] += value
        if self._is_terminal:
            self._draw()
        elif self._clock() - self._line_at >= LINE_PERIOD_S:
            self._line_at = self._clock()
            self.say(f"  point {tick.point}: {', '.join(self._seconds())}")

    def take_silence(self, is_silent: bool) -> None:
        """The head no longer answers, or does again."""
        self._is_silent = is_silent
        if self._is_terminal:
            self._draw()
        else:
            self.say(f"  {SILENT}" if is_silent else "  the head answers again")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.end()
        output.note(self._options, line)

    def _seconds(self) -> list[str]:
        """What the last seconds were."""
        tick = self._tick
        if tick is None:
            return []
        sent, done, failed = self._sums
        lasted = len(self._latest)
        rate = sum(one.done for one in self._latest) / lasted
        tokens = sum(one.tokens for one in self._latest) / lasted
        nodes = f" on {tick.nodes} nodes" if tick.nodes > 1 else ""
        return [
            f"{text.duration(tick.at_s)}{nodes}, sent {sent:,}, done {done:,}, failed {failed:,}, "
            f"in flight {tick.in_flight:,}",
            f"{told(rate)} requests/s, {told(tokens)} tokens/s"
            + (f", TTFT p50 {view.ms(tick.ttft_p50_ms)}, p99 {view.ms(tick.ttft_p99_ms)}" if tick.ttft_p50_ms else ""),
        ]

    def _lines(self) -> list[str]:
        benchmark = self._view
        if benchmark is None:
            return []
        now_ms = int(time.time() * 1000)
        took = views.span(benchmark.started_ms, benchmark.ended_ms, now_ms)
        lines = [
            f"{benchmark.name}  {benchmark.id}  {benchmark.status} {took if benchmark.started_ms else ''}".rstrip(),
            f"{benchmark.points_done} of {text.plural(benchmark.points_planned, 'point')} done" + _current(benchmark),
        ]
        is_running = self._tick is not None and any(
            point.number == self._tick.point and point.status == "running" for point in benchmark.points
        )
        if self._is_silent:
            lines.append(SILENT)
        elif is_running:
            lines += self._seconds()
        elif benchmark.note:
            lines.append(benchmark.note)
        ended = [point for point in benchmark.points if point.status in view.ENDED]
        if ended:
            rows = [view.point_row(point) for point in ended[-POINTS_SHOWN:]]
            columns = view.points_columns(rows)
            lines += output.render_table(self._plain, columns, rows, width=WIDTH - 1).splitlines()
        return lines

    def _draw(self) -> None:
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        lines = [cut(clean(line), WIDTH - 1) for line in self._lines()]
        body = "".join(f"\r\x1b[2K{line}\n" for line in lines)
        # What a longer block left behind below is wiped away.
        click.echo(f"{up}{body}\x1b[J", nl=False, err=True)
        self._drawn = len(lines)

    def end(self) -> None:
        """The block is taken away: what follows takes its place."""
        if self._drawn:
            click.echo(f"\x1b[{self._drawn}A\x1b[J", nl=False, err=True)
            self._drawn = 0


def _current(benchmark: types.BenchmarkView) -> str:
    for point in benchmark.points:
        if point.status not in (*view.ENDED, "pending"):
            load = changes_told(point.changes)
            again = f" #{point.repetition + 1}" if point.repetition else ""
            return f"; point {point.number}: {load or 'the load as asked'}{again}, {point.status}"
    return ""


def line_of(point: types.PointView) -> str:
    """A point that has ended, in one line."""
    figures = point.figures
    parts = [f"point {point.number}", changes_told(point.changes), view.point_verdict(point)]
    if "req_s" in figures:
        parts.append(f"{told(figures['req_s'])} requests/s")
    if "output_tok_s" in figures:
        parts.append(f"{told(figures['output_tok_s'])} tokens/s")
    if "ttft_p50_ms" in figures:
        parts.append(f"TTFT p50 {view.ms(figures['ttft_p50_ms'])}, p99 {view.ms(figures.get('ttft_p99_ms'))}")
    if point.error is not None:
        parts.append(point.error.message)
    return ", ".join(part for part in parts if part)
