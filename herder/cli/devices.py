"""`herder devices`: where bytes can be, and what room there is."""

from __future__ import annotations

from typing import Literal

import click

from herder.cli import output, views
from herder.cli.command import Globals, pass_globals, verb


@verb("devices", examples=("herder devices", "herder devices --node n1", "herder devices --kind gpu"))
@click.option("--node", default="", help="Only devices of this node.")
@click.option("--kind", type=click.Choice(("disk", "dram", "gpu")), help="Only devices of this kind.")
@pass_globals
def command(options: Globals, node: str, kind: Literal["disk", "dram", "gpu"] | None) -> None:
    """List devices: bytes in all, used, reserved for what is on its way, and free."""
    with options.connect() as client:
        found = client.devices(node=node, kind=kind).all()
    rows = [views.device_row(device) for device in found]
    shown = output.table(options, views.DEVICES, rows, empty="no devices; `herder nodes` shows the nodes")
    output.emit(options, found, shown, quiet="\n".join(device.device for device in found))
