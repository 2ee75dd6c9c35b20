"""`herder agent`: becomes the agent daemon of this machine."""

from __future__ import annotations

import os

import click

from herder.cli.command import HerderCommand
from herder.cli.daemons import become


@click.command(
    "agent",
    cls=HerderCommand,
    takes_globals=False,
    examples=(
        "herder agent http://head.example:8470 --token-file join.token",
        "herder agent http://head.example:8470 --token-file join.token --node-id gpu-07",
        "herder agent -- --help              # every option of the daemon",
    ),
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.option(
    "--token-file", metavar="FILE", help="The join token: `herder keys create --role agent NAME`, or join.token."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="HEAD_URL [OPTIONS OF herder-agent]")
def command(token_file: str | None, arguments: tuple[str, ...]) -> None:
    """Run this machine's agent in the foreground; the same as `herder-agent --head HEAD_URL`."""
    if token_file:
        os.environ["HERDER_AGENT_TOKEN_FILE"] = os.path.abspath(os.path.expanduser(token_file))
    if arguments and not arguments[0].startswith("-"):
        arguments = ("--head", *arguments)
    become("agent", arguments)
