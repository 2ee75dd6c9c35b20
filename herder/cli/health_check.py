"""`herder health-check`: ask an engine or a URL, from a node, once."""

from __future__ import annotations

import click

from herder.cli.command import Duration, Globals, pass_globals, verb
from herder.cli.waiting import finish, wait_options


@verb(
    "health-check",
    examples=(
        "herder health-check smollm2 n1:gpu0",
        "herder health-check --target-url http://10.0.0.7:8080/health",
    ),
)
@click.argument("model", required=False)
@click.argument("device", required=False)
@click.option("--target-url", metavar="URL", help="Ask this address instead of an engine.")
@click.option("--check-timeout", "check_timeout_s", type=Duration(), default=5.0, help="How long one answer may take.")
@wait_options
@pass_globals
def command(
    options: Globals,
    model: str | None,
    device: str | None,
    target_url: str | None,
    check_timeout_s: float,
    is_waiting: bool,
    timeout_s: float | None,
) -> None:
    """Ask the engine of MODEL on DEVICE, or --target-url, whether it is healthy. Exit code 1: it is not."""
    if bool(target_url) == bool(model) or (model and not device):
        raise click.UsageError("give MODEL and DEVICE, or --target-url")
    with options.connect() as client:
        job = client.health_check(model, device, target_url=target_url, check_timeout_s=check_timeout_s)
        finish(options, client, job, is_waiting=is_waiting, timeout_s=timeout_s)
