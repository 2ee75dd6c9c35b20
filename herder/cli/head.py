"""`herder head`: becomes the head daemon."""

from __future__ import annotations

import click

from herder.cli.command import HerderCommand
from herder.cli.daemons import become


@click.command(
    "head",
    cls=HerderCommand,
    takes_globals=False,
    examples=(
        "herder head",
        "herder head --host 0.0.0.0 --config /etc/herder/head.yaml",
        "herder head --check-config",
        "herder head --restore herder.sqlite",
        "herder head -- --help               # every option of the daemon",
    ),
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF herder-head]")
def command(arguments: tuple[str, ...]) -> None:
    """Run a head in the foreground; the same as `herder-head`. Options go to it as they are."""
    become("head", arguments)
