"""`herder services`: desired state: so many engines of a recipe with a model."""

from __future__ import annotations

import time
from typing import Any, get_args

import click

from herder import types
from herder.cli import output, text, views
from herder.cli.command import Globals, KeyValue, group, pass_globals
from herder.cli.waiting import wait_options
from herder.errors import HerderError

WAIT_S = 900.0  # an engine may load for a quarter of an hour


@group(
    "services",
    examples=(
        "herder services",
        "herder services create chat --model smollm2 --replicas 2",
        "herder services show chat",
    ),
)
def command() -> None:
    """Create, list, show and delete services. Without a subcommand: list them."""


@command.command("list", examples=("herder services list", "herder services list --state ready"))
@click.option("--model", default="", help="Only services of this model.")
@click.option("--state", type=click.Choice(get_args(types.ServiceState)), help="Only services in this state.")
@pass_globals
def list_services(options: Globals, model: str = "", state: types.ServiceState | None = None) -> None:
    """List services and how many of their replicas are ready."""
    with options.connect() as client:
        found = client.services(model=model, state=state).all()
    rows = [views.service_row(service) for service in found]
    shown = output.table(options, views.SERVICES, rows, empty="no services; `herder serve MODEL DEVICE` starts one")
    output.emit(options, found, shown, quiet="\n".join(service.name for service in found))


@command.command("show", examples=("herder services show chat", "herder services show chat -o json"))
@click.argument("name")
@pass_globals
def show(options: Globals, name: str) -> None:
    """Show a service, its replicas, and why it is not ready."""
    with options.connect() as client:
        service = client.service(name)
    output.emit(options, service, _shown(options, service), quiet=service.name)


def _shown(options: Globals, service: types.ServiceView) -> str:
    now_ms = int(time.time() * 1000)
    pairs = [
        ("service", service.name),
        ("model", f"{service.model}@{service.revision}" if service.model else ""),
        ("recipe", service.recipe),
        ("state", service.state),
        ("ready", f"{service.replicas_ready} of {service.replicas_wanted}"),
        ("reason", service.reason),
        ("config", views.numbers(service.config)),
        ("made", f"{text.age(service.created_ms, now_ms)} ago"),
    ]
    parts = [output.fields(options, pairs)]
    if service.replicas:
        rows = [views.replica_row(replica, now_ms) for replica in service.replicas]
        parts.append(output.table(options, views.REPLICAS, rows, empty=""))
    for replica in service.replicas:
        if replica.error:
            parts.append(f"{replica.replica}: {views.error_lines(replica.error)}")
            if replica.last_log:
                parts.append("\n".join(f"  | {line}" for line in replica.last_log[-10:]))
    return "\n\n".join(parts)


@command.command(
    "create",
    examples=(
        "herder services create chat --model smollm2",
        "herder services create chat --model smollm2 --replicas 2 --label tier=fast",
        "herder services create chat --model smollm2 --device n1:gpu0 --config context=8192",
    ),
)
@click.argument("name")
@click.option("--model", required=True, help="What it serves.")
@click.option("--recipe", default="", help="How; default: by the model's format.")
@click.option("--replicas", type=click.IntRange(0, 256), default=1, show_default=True, help="How many engines.")
@click.option("--device", "devices", multiple=True, metavar="DEVICE", help="Where; may repeat; default: where it fits.")
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="Where each listens; 0: the node chooses.")
@click.option(
    "--config", "pairs", type=KeyValue(), multiple=True, metavar="NAME=VALUE", help="A setting of the recipe."
)
@click.option("--label", "labels", type=KeyValue(), multiple=True, metavar="NAME=VALUE", help="Nodes must have it.")
@click.option(
    "--on-unreachable",
    type=click.Choice(("keep", "replace")),
    default="keep",
    show_default=True,
    help="Whether a replica on a lost node is replaced.",
)
@wait_options
@pass_globals
def create(
    options: Globals,
    name: str,
    model: str,
    recipe: str,
    replicas: int,
    devices: tuple[str, ...],
    port: int,
    pairs: tuple[tuple[str, Any], ...],
    labels: tuple[tuple[str, Any], ...],
    on_unreachable: Any,
    is_waiting: bool,
    timeout_s: float | None,
) -> None:
    """Make a service and wait until it is ready."""
    wanted = types.CreateService(
        name=name,
        model=model,
        recipe=recipe,
        replicas=replicas,
        devices=devices,
        port=port,
        config=dict(pairs),
        labels={key: str(value) for key, value in labels},
        on_unreachable=on_unreachable,
    )
    with options.connect() as client:
        service = client.create_service(wanted)
        if is_waiting:
            output.note(options, f"{service.name}: waiting until {text.plural(replicas, 'replica')} answer")
            said = (
                f"{name} goes on starting. `herder services show {name}` looks again, `herder services delete {name}`"
            )
            with output.interruptible(f"{said} stops it."):
                service = client.wait_service(service.name, timeout_s=timeout_s or WAIT_S)
    output.emit(options, service, _shown(options, service), quiet=service.name)
    if is_waiting and service.state != "ready":
        error = next((replica.error for replica in service.replicas if replica.error), None)
        raise HerderError(
            error.code if error else "service_not_ready",
            f"{name} is {service.state}: {service.reason or (error.message if error else 'no reason given')}",
            hint=f"`herder why {name}` says more; `herder logs {name}` shows the engine's log",
        )


@command.command("delete", examples=("herder services delete chat",))
@click.argument("name")
@wait_options
@pass_globals
def delete(options: Globals, name: str, is_waiting: bool, timeout_s: float | None) -> None:
    """Stop a service's engines and forget it."""
    said = f"{name} goes on stopping, if the head has heard of it. `herder services` tells."
    with options.connect() as client, output.interruptible(said):
        service = client.delete_service(name, wait_s=(timeout_s or 60.0) if is_waiting else 0.0)
    said = "is gone" if service.state == "stopped" else f"is {service.state}"
    output.emit(options, service, f"{service.name} {said}", quiet="")
