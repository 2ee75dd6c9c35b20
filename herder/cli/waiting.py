"""What long verbs share: --no-wait and --timeout, the display meanwhile, and the result at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from herder import types
from herder.cli import output, progress, text, views
from herder.cli.command import Duration, Globals

if TYPE_CHECKING:
    from herder.client_sync import Client


def wait_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --wait/--no-wait and --timeout."""
    function = click.option(
        "--timeout",
        "timeout_s",
        type=Duration(),
        metavar="TIME",
        help="Stop waiting after this long (90s, 15m, 2h); the work goes on.",
    )(function)
    return click.option(
        "--wait/--no-wait",
        "is_waiting",
        default=True,
        help="Wait with progress (default), or print the job's id at once.",
    )(function)


def finish(
    options: Globals, client: Client, job: types.JobView, *, is_waiting: bool, timeout_s: float | None = None
) -> types.JobView:
    """Prints the job at once, or follows it to its end and prints that. Raises: HerderJobError, HerderTimeoutError."""
    from herder.client import succeeded

    if not is_waiting:
        said = f"{job.id} started; `herder jobs wait {job.id}` follows it"
        output.emit(options, job, said, quiet=job.id)
        return job
    last = progress.follow(options, client, job, timeout_s=timeout_s)
    if options.output != "table":
        output.emit(options, last)
    succeeded(last)
    output.emit(options, last, summary(last), quiet="")
    return last


def summary(job: types.JobView) -> str:
    """One line on a job that completed; health checks with what was seen."""
    now_ms = int(time.time() * 1000)
    took = views.span(job.started_ms, job.ended_ms, now_ms)
    total = sum(step.bytes_done for step in job.steps)
    seconds = ((job.ended_ms or now_ms) - (job.started_ms or now_ms)) / 1000
    moved = f", {text.size(total)}" if total else ""
    if total and seconds >= 0.1:
        moved += f" at {text.rate(total / seconds)}"
    what = progress.describe(job.steps[0]) if len(job.steps) == 1 else f"{job.name}: {len(job.steps)} steps"
    found = [result_line(step) for step in job.steps]
    lines = [f"{what}: completed in {took}{moved}", *(line for line in found if line)]
    return "\n".join(lines)


def result_line(step: types.StepView) -> str:
    """What a step brought, beside bytes: an endpoint, the outcome of a check."""
    shown = {name: value for name, value in step.result.items() if isinstance(value, str | int | float) and value != ""}
    return f"  {step.id}: {views.numbers(shown)}" if shown else ""
