"""`herder jobs`: list, show, follow and cancel jobs."""

from __future__ import annotations

import time
from typing import get_args

import click

from herder import types
from herder.cli import output, text, views
from herder.cli.command import Duration, Globals, group, pass_globals
from herder.cli.waiting import finish


@group("jobs", examples=("herder jobs", "herder jobs show job-3f9a1c7e20b4", "herder jobs cancel job-3f9a1c7e20b4"))
def command() -> None:
    """List, show, follow and cancel jobs. Without a subcommand: list the latest."""


@command.command("list", examples=("herder jobs list", "herder jobs list --status failed --limit 5"))
@click.option("--status", type=click.Choice(get_args(types.JobState)), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many, newest first.")
@pass_globals
def list_jobs(options: Globals, status: types.JobState | None = None, limit: int = 50) -> None:
    """List jobs, newest first."""
    with options.connect() as client:
        found = client.jobs(status=status).all(at_most=limit)
    now_ms = int(time.time() * 1000)
    rows = [views.job_row(job, now_ms) for job in found]
    shown = output.table(options, views.JOBS, rows, empty="no jobs")
    output.emit(options, found, shown, quiet="\n".join(job.id for job in found))


@command.command("show", examples=("herder jobs show job-3f9a1c7e20b4", "herder jobs show job-3f9a1c7e20b4 -o json"))
@click.argument("job_id", metavar="JOB")
@pass_globals
def show(options: Globals, job_id: str) -> None:
    """Show a job, its steps, and what went wrong."""
    with options.connect() as client:
        job = client.job(job_id)
    output.emit(options, job, shown_job(options, job), quiet=job.status)


def shown_job(options: Globals, job: types.JobView) -> str:
    """A job with its steps."""
    now_ms = int(time.time() * 1000)
    pairs = [
        ("job", job.id),
        ("name", job.name),
        ("about", job.description),
        ("status", job.status),
        ("by", job.actor),
        ("priority", str(job.priority) if job.priority else ""),
        ("begun", f"{text.age(job.started_ms, now_ms)} ago" if job.started_ms else ""),
        ("took", views.span(job.started_ms, job.ended_ms, now_ms)),
        ("error", views.error_lines(job.error)),
    ]
    rows = [views.step_row(step, now_ms) for step in job.steps]
    parts = [output.fields(options, pairs), output.table(options, views.STEPS, rows, empty="no steps")]
    remarks = [f"{step.id}: {step.note}" for step in job.steps if step.note and step.state in ("pending", "running")]
    remarks += [f"{step.id}: {views.error_lines(step.error)}" for step in job.steps if step.error]
    remarks += [f"{step.id}: {views.numbers(step.result)}" for step in job.steps if step.result]
    if remarks:
        parts.append("\n".join(remarks))
    return "\n\n".join(parts)


@command.command(
    "wait", examples=("herder jobs wait job-3f9a1c7e20b4", "herder jobs wait job-3f9a1c7e20b4 --timeout 10m")
)
@click.argument("job_id", metavar="JOB")
@click.option("--timeout", "timeout_s", type=Duration(), metavar="TIME", help="Stop waiting after this long.")
@pass_globals
def wait(options: Globals, job_id: str, timeout_s: float | None) -> None:
    """Follow a job to its end with progress. Exit code 1: it did not complete."""
    with options.connect() as client:
        finish(options, client, client.job(job_id), is_waiting=True, timeout_s=timeout_s)


@command.command("cancel", examples=("herder jobs cancel job-3f9a1c7e20b4",))
@click.argument("job_id", metavar="JOB")
@click.option("--wait/--no-wait", "is_waiting", default=True, help="Wait until its steps have really stopped.")
@pass_globals
def cancel(options: Globals, job_id: str, is_waiting: bool) -> None:
    """Stop a job. What its steps have completed stays."""
    said = f"{job_id} goes on stopping, if the head has heard of it. `herder jobs show {job_id}` tells."
    with options.connect() as client, output.interruptible(said):
        job = client.cancel_job(job_id, wait_s=30.0 if is_waiting else 0.0)
    said = "is being cancelled" if job.status in ("pending", "running") else f"is {job.status}"
    output.emit(options, job, f"{job.id} {said}", quiet=job.status)
