"""`herder copy`: copy a model to another device."""

from __future__ import annotations

import click

from herder.cli.command import Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "copy",
    examples=(
        "herder copy smollm2 n1:dram",
        "herder copy org/name n2:disk --from n1:disk",
    ),
)
@click.argument("model")
@click.argument("device")
@click.option("--from", "source_device", metavar="DEVICE", help="Copy from here; default: the nearest copy.")
@wait_options
@pass_globals
def command(
    options: Globals, model: str, device: str, source_device: str | None, is_waiting: bool, timeout_s: float | None
) -> None:
    """Copy MODEL to DEVICE. The bytes go from node to node, never through the head."""
    with options.connect() as client:
        job = client.copy(model, device, source_device=source_device)
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
