"""`herder download`: fetch a model from its source to a device."""

from __future__ import annotations

import click

from herder.cli.command import Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "download",
    examples=(
        "herder download smollm2 n1:disk",
        "herder download org/name n1:disk --source hf://org/name@main",
        "herder download smollm2 n1:disk --no-wait",
    ),
)
@click.argument("model")
@click.argument("device")
@click.option("--source", metavar="URL", help="Fetch from here instead of the model's registered sources.")
@wait_options
@pass_globals
def command(
    options: Globals, model: str, device: str, source: str | None, is_waiting: bool, timeout_s: float | None
) -> None:
    """Fetch MODEL to DEVICE (as n1:disk), verify it, and keep it there."""
    with options.connect() as client:
        job = client.download(model, device, source=source)
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
