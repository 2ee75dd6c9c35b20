"""`herder job`: run a job file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from herder.cli.command import Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "job",
    examples=("herder job deploy.yaml", "herder job deploy.json --no-wait", "generate-job | herder job - --timeout 2h"),
)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@wait_options
@pass_globals
def command(options: Globals, file: Path, is_waiting: bool, timeout_s: float | None) -> None:
    """Run the job in FILE (YAML or JSON, either dialect; - reads standard input)."""
    if str(file) == "-":
        content = sys.stdin.buffer.read()
    else:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise click.UsageError(f"{file}: {error.strerror}") from None
    kind: Literal["yaml", "json"] = "json" if content.lstrip()[:1] == b"{" else "yaml"
    with options.connect() as client:
        job = client.create_job_from_text(content, format=kind)
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
