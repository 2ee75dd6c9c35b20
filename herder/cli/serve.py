"""`herder serve`: run one engine for a model on a device."""

from __future__ import annotations

from typing import Any

import click

from herder.cli import output
from herder.cli.command import Globals, KeyValue, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "serve",
    examples=(
        "herder serve smollm2 n1:gpu0",
        "herder serve smollm2 n1:dram --config context=8192 --config parallel=2",
        "herder serve smollm2 n1:gpu0 --name chat --port 8080 --arg --flash-attn",
    ),
)
@click.argument("model")
@click.argument("device")
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="Where it listens; 0: the node chooses.")
@click.option("--recipe", help="How to run it; default: by the model's format (`herder recipes` lists them).")
@click.option("--name", help="Name of the service; default: made from the model's name.")
@click.option(
    "--config", "pairs", type=KeyValue(), multiple=True, metavar="NAME=VALUE", help="A setting of the recipe."
)
@click.option(
    "--env", "environment", type=KeyValue(), multiple=True, metavar="NAME=VALUE", help="A variable for the engine."
)
@click.option("--arg", "arguments", multiple=True, metavar="ARG", help="A further argument of the engine.")
@wait_options
@pass_globals
def command(
    options: Globals,
    model: str,
    device: str,
    port: int,
    recipe: str | None,
    name: str | None,
    pairs: tuple[tuple[str, Any], ...],
    environment: tuple[tuple[str, Any], ...],
    arguments: tuple[str, ...],
    is_waiting: bool,
    timeout_s: float | None,
) -> None:
    """Run an engine for MODEL on DEVICE (n1:gpu0; n1:dram or n1:disk: on the CPU).

    A copy that is not on the node yet is fetched first. Ready means that the engine answers.
    """
    config: dict[str, Any] = dict(pairs)
    if recipe:
        config["recipe"] = recipe
    if name:
        config["name"] = name
    if environment:
        config["env"] = {key: str(value) for key, value in environment}
    if arguments:
        config["args"] = [*config.get("args", ()), *arguments]
    with options.connect() as client:
        job = client.serve(model, device, port=port, config=config)
        last = finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
        if is_waiting and last.status == "completed" and options.output == "table":
            output.note(
                options, f'ask it: herder chat {model} "..."; or POST {client.settings.url}/v1/chat/completions'
            )
