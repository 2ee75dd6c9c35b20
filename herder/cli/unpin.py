"""`herder unpin`: let a copy be evicted again."""

from __future__ import annotations

import click

from herder.cli import output
from herder.cli.command import Globals, pass_globals, verb


@verb("unpin", examples=("herder unpin smollm2 n1:disk", "herder unpin smollm2 n1:dram --name nightly"))
@click.argument("model")
@click.argument("device")
@click.option("--name", default="operator", show_default=True, help="Name of the pin.")
@pass_globals
def command(options: Globals, model: str, device: str, name: str) -> None:
    """Remove a pin from the copy of MODEL on DEVICE."""
    with options.connect() as client:
        copy = client.unpin(model, device, name=name)
    left = f"still pinned: {', '.join(copy.pins)}" if copy.pins else "no longer pinned"
    output.emit(options, copy, f"{copy.model} on {copy.device} is {left}", quiet="")
