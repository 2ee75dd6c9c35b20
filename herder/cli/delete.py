"""`herder delete`: remove a copy of a model from a device."""

from __future__ import annotations

import click

from herder.cli.command import Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "delete",
    examples=(
        "herder delete smollm2 n1:disk",
        "herder delete smollm2 n1:disk --force    # also pinned, or the last one",
        "herder models delete smollm2             # the model itself, with all its copies",
    ),
)
@click.argument("model")
@click.argument("device")
@click.option("--force", is_flag=True, help="Also a pinned copy, or the last one of a model without a source.")
@wait_options
@pass_globals
def command(options: Globals, model: str, device: str, force: bool, is_waiting: bool, timeout_s: float | None) -> None:
    """Remove the copy of MODEL on DEVICE. The model stays registered."""
    with options.connect() as client:
        job = client.delete_copy(model, device, force=force)
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
