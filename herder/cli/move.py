"""`herder move`: copy a model to another device, then drop the source."""

from __future__ import annotations

import click

from herder.cli.command import Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "move",
    examples=(
        "herder move smollm2 n2:disk --from n1:disk",
        "herder move smollm2 n1:dram --from n1:disk --keep-source",
        "herder move smollm2 n1:gpu0        # starts an engine there",
    ),
)
@click.argument("model")
@click.argument("device")
@click.option("--from", "source_device", metavar="DEVICE", help="Move from here; needed when there are several copies.")
@click.option("--keep-source", is_flag=True, help="Leave the source where it is.")
@wait_options
@pass_globals
def command(
    options: Globals,
    model: str,
    device: str,
    source_device: str | None,
    keep_source: bool,
    is_waiting: bool,
    timeout_s: float | None,
) -> None:
    """Move MODEL to DEVICE. The source is dropped only once the new copy is verified and durable."""
    with options.connect() as client:
        job = client.move(model, device, source_device=source_device, keep_source=keep_source)
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
