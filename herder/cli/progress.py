"""Waiting for a job in view of the person: a live picture on a terminal, sparse lines elsewhere.

Ctrl-C ends the waiting, not the job, and says how to stop the job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from herder import types
from herder.cli import text
from herder.cli.output import has_colour, interruptible, note
from herder.cli.views import span

if TYPE_CHECKING:
    from herder.cli.command import Globals
    from herder.client_sync import Client

QUARTER = 25  # percent between two lines of a step
LINE_PERIOD_S = 30.0  # a running step says something at least so often
STEPS_SHOWN = 12


class View(Protocol):
    """What shows a job while it runs."""

    def update(self, job: types.JobView) -> None:
        """Shows this state of the job."""
        ...


def follow(options: Globals, client: Client, job: types.JobView, *, timeout_s: float | None = None) -> types.JobView:
    """Shows the job until its end and returns its last view, also when it failed. Raises: as Client.watch_job."""
    last = job
    said = f"{job.id} goes on. `herder jobs wait {job.id}` looks again, `herder jobs cancel {job.id}` stops it."
    with interruptible(said), _view(options) as view:
        view.update(job)
        for last in client.watch_job(job.id, timeout_s=timeout_s):
            view.update(last)
    return last


@contextmanager
def _view(options: Globals) -> Iterator[View]:
    if options.is_quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with LiveView(is_coloured=has_colour(options, sys.stderr)) as live:
            yield live
    else:
        yield SparseLines(options)


class Silent:
    """Shows nothing."""

    def update(self, job: types.JobView) -> None:
        """Nothing."""


class SparseLines:
    """A line when a step starts, ends, passes a quarter, or has been silent for long."""

    def __init__(self, options: Globals, *, clock: Any = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._said: dict[str, tuple[str, int, str]] = {}
        self._at: dict[str, float] = {}
        self._is_named = False

    def update(self, job: types.JobView) -> None:
        """Says what is new."""
        if not self._is_named:
            note(self._options, f"{job.id}: {job.name} ({text.plural(len(job.steps), 'step')})")
            self._is_named = True
        for step in job.steps:
            quarter = 100 * step.bytes_done // step.bytes_total // QUARTER if step.bytes_total else 0
            now = (step.state, quarter if step.state == "running" else 0, step.note)
            before = self._said.get(step.id)
            is_stale = step.state == "running" and self._clock() - self._at.get(step.id, 0.0) >= LINE_PERIOD_S
            if step.state == "pending" or (now == before and not is_stale):
                continue
            self._said[step.id], self._at[step.id] = now, self._clock()
            note(self._options, f"  {describe(step)}: {_state_of(step)}")


class LiveView:
    """One line per step that runs or has just ended, redrawn in place."""

    def __init__(self, *, is_coloured: bool) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._job: types.JobView | None = None
        self._spinner = Spinner("dots")
        self._console = Console(stderr=True, no_color=not is_coloured, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=8, transient=False, get_renderable=self._draw)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, job: types.JobView) -> None:
        """Takes in the newest view; the next refresh draws it."""
        self._job = job

    def _draw(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1), expand=False)
        grid.add_column(width=1)
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=38)
        grid.add_column(width=14)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        if self._job is None:
            return grid
        marks = {"completed": ("✓", "green"), "failed": ("✗", "red"), "cancelled": ("✗", "yellow")}
        for step in steps_in_view(self._job):
            mark: Any
            if step.state == "running":
                mark = self._spinner
            else:
                sign, colour = marks.get(step.state, ("·", "dim"))
                mark = Text(sign, style=colour)
            bar: Any = ""
            if step.bytes_total and step.state == "running":
                bar = ProgressBar(total=step.bytes_total, completed=step.bytes_done, width=14)
            grid.add_row(mark, describe(step), bar, _state_of(step))
        return grid


def steps_in_view(job: types.JobView) -> list[types.StepView]:
    """The steps worth a line: all of a small job; of a large one those that run, then the latest that ended."""
    if len(job.steps) <= STEPS_SHOWN:
        return list(job.steps)
    running = [step for step in job.steps if step.state == "running"][:STEPS_SHOWN]
    ended = sorted((step for step in job.steps if step.ended_ms), key=lambda step: step.ended_ms or 0)
    room = max(0, STEPS_SHOWN - len(running))
    return [*(ended[-room:] if room else []), *running]


def describe(step: types.StepView) -> str:
    """`download smollm2 -> n1:disk`."""
    target = f" -> {step.devices[-1]}" if step.devices and step.action in ("download", "copy", "move") else ""
    if not target and step.devices:
        target = f" on {step.devices[-1]}"
    return f"{step.action} {step.model}".strip() + target


def _state_of(step: types.StepView) -> str:
    """Bytes, rate and time left while it runs; how long it took once it has ended."""
    took = span(step.started_ms, step.ended_ms, int(time.time() * 1000))
    if step.state == "running":
        parts = []
        if step.bytes_total:
            parts.append(f"{text.size(step.bytes_done)} of {text.size(step.bytes_total)}")
        if step.rate_bytes_per_s:
            parts.append(text.rate(step.rate_bytes_per_s))
        if step.eta_s is not None:
            parts.append(f"{text.duration(step.eta_s)} left")
        if step.note:
            parts.append(step.note)
        if step.attempts > 1:
            parts.append(f"attempt {step.attempts}")
        return ", ".join(parts) or "running"
    if step.state == "failed" and step.error:
        return f"failed after {took}: {step.error.message}"
    if step.state == "completed":
        moved = f", {text.size(step.bytes_total)}" if step.bytes_total else ""
        return f"done in {took}{moved}"
    return step.state if not step.note else f"{step.state}: {step.note}"
