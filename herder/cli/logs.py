"""`herder logs`: what an engine writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from herder.cli import output
from herder.cli.command import Globals, pass_globals, verb
from herder.errors import HerderApiError

if TYPE_CHECKING:
    from herder.client_sync import Client


@verb("logs", examples=("herder logs chat-0", "herder logs smollm2 -f --tail 20", "herder logs chat --previous"))
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option(
    "--tail", type=click.IntRange(0, 100_000), default=100, show_default=True, help="The last lines to begin with."
)
@click.option("--previous", is_flag=True, help="Of the run before, as after a crash.")
@pass_globals
def command(options: Globals, name: str, follow: bool, tail: int, previous: bool) -> None:
    """Print the log of an engine. NAME: a replica, or a service or model that has one replica."""
    with options.connect() as client:
        replica = find_replica(client, name)
        is_line_open = False
        with output.interruptible(f"{replica} goes on; only the reading of its log has ended."):
            for piece in client.logs(replica, follow=follow, tail=tail, run=int(previous)):
                output.stream(piece)
                is_line_open = not piece.endswith("\n")
        if is_line_open:
            click.echo()
        if follow:
            output.note(options, f"the log of {replica} ended")


def find_replica(client: Client, name: str) -> str:
    """The replica that a name means. Raises: HerderApiError `not_found`; click.UsageError when there are several."""
    replicas = client.replicas().all()
    ids = [replica.replica for replica in replicas]
    if name in ids:
        return name
    matches = [replica.replica for replica in replicas if name in (replica.service, replica.model)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise click.UsageError(f"{name} has {len(matches)} replicas: {', '.join(sorted(matches))}; say which")
    hint = f"replicas: {', '.join(sorted(ids)[:8])}" if ids else "nothing is served; `herder serve` starts an engine"
    raise HerderApiError("not_found", f"no replica, service or served model {name!r}", hint=hint, status=404)
