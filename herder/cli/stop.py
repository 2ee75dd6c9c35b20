"""`herder stop`: stop the engine that serves a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from herder.cli.command import Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options

if TYPE_CHECKING:
    from herder.client_sync import Client


@verb(
    "stop",
    examples=(
        "herder stop smollm2               # where it is served on one device only",
        "herder stop smollm2 n1:gpu0",
    ),
)
@click.argument("model")
@click.argument("device", required=False)
@wait_options
@pass_globals
def command(options: Globals, model: str, device: str | None, is_waiting: bool, timeout_s: float | None) -> None:
    """Stop the engine that serves MODEL on DEVICE and check that its memory came back."""
    with options.connect() as client:
        job = client.stop(model, device or _only_device(client, model))
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)


def _only_device(client: Client, model: str) -> str:
    client.model(model)  # an unknown model is its own error
    live = [replica.device for replica in client.replicas(model=model) if replica.state not in ("stopped", "failed")]
    if len(live) == 1:
        return live[0]
    if not live:
        raise click.ClickException(f"{model} is not served anywhere; `herder services` lists what is")
    raise click.UsageError(f"{model} is served on {', '.join(sorted(live))}; say which")
