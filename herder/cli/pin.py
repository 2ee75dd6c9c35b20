"""`herder pin`: keep a copy from eviction."""

from __future__ import annotations

import click

from herder.cli import output
from herder.cli.command import Duration, Globals, pass_globals, verb


@verb("pin", examples=("herder pin smollm2 n1:disk", "herder pin smollm2 n1:dram --name nightly --ttl 12h"))
@click.argument("model")
@click.argument("device")
@click.option("--name", default="operator", show_default=True, help="Name of the pin; a copy may have several.")
@click.option("--ttl", "ttl_s", type=Duration(), default=0, metavar="TIME", help="How long; default: until unpinned.")
@pass_globals
def command(options: Globals, model: str, device: str, name: str, ttl_s: float) -> None:
    """Keep the copy of MODEL on DEVICE from eviction."""
    with options.connect() as client:
        copy = client.pin(model, device, name=name, ttl_s=int(ttl_s))
    output.emit(options, copy, f"{copy.model} on {copy.device} is pinned: {', '.join(copy.pins)}", quiet="")
