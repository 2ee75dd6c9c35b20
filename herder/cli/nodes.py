"""`herder nodes`: the machines, and what operators ask of them."""

from __future__ import annotations

import time
from typing import get_args

import click

from herder import types
from herder.cli import output, text, views
from herder.cli.command import Duration, Globals, group, pass_globals


@group("nodes", examples=("herder nodes", "herder nodes show n1", "herder nodes drain n1 --deadline 30m"))
def command() -> None:
    """List, show, cordon, drain, label and remove nodes. Without a subcommand: list them."""


@command.command("list", examples=("herder nodes list", "herder nodes list --state online --label rack=a"))
@click.option("--state", type=click.Choice(get_args(types.NodeState)), help="Only nodes in this state.")
@click.option("--label", default="", metavar="NAME[=VALUE]", help="Only nodes with this label.")
@pass_globals
def list_nodes(options: Globals, state: types.NodeState | None = None, label: str = "") -> None:
    """List nodes, what they have free and what they hold."""
    with options.connect() as client:
        found = client.nodes(state=state, label=label).all()
    now_ms = int(time.time() * 1000)
    rows = [views.node_row(node, now_ms) for node in found]
    shown = output.table(options, views.NODES, rows, empty="no nodes; `herder agent HEAD_URL` on a machine adds it")
    output.emit(options, found, shown, quiet="\n".join(node.node_id for node in found))


@command.command("show", examples=("herder nodes show n1", "herder nodes show n1 -o json"))
@click.argument("node")
@pass_globals
def show(options: Globals, node: str) -> None:
    """Show a node: state, hardware, devices and what it holds."""
    with options.connect() as client:
        found = client.node(node)
        copies = client.copies(node=node).all() if options.output == "table" else []
        replicas = client.replicas(node=node).all() if options.output == "table" else []
    now_ms = int(time.time() * 1000)
    parts = [
        _facts(options, found, now_ms),
        output.table(
            options, views.DEVICES, [views.device_row(device) for device in found.devices], empty="no devices"
        ),
    ]
    if copies:
        parts.append(output.table(options, views.COPIES, [views.copy_row(copy, now_ms) for copy in copies], empty=""))
    if replicas:
        rows = [views.replica_row(replica, now_ms) for replica in replicas]
        parts.append(output.table(options, views.REPLICAS, rows, empty=""))
    output.emit(options, found, "\n\n".join(parts), quiet=found.node_id)


def _facts(options: Globals, node: types.NodeView, now_ms: int) -> str:
    inventory = node.inventory
    cpu = " ".join(str(inventory.get(name, "")) for name in ("cpu_model", "arch")).strip()
    left = "" if not node.drain_deadline_ms else f" until {views.clock(node.drain_deadline_ms)}"
    return output.fields(
        options,
        [
            ("node", node.node_id),
            ("state", views.node_state(node) + left),
            ("for", text.age(node.state_since_ms, now_ms)),
            ("last seen", f"{text.age(node.last_seen_ms, now_ms)} ago" if node.last_seen_ms else ""),
            ("hostname", node.hostname),
            ("address", node.address),
            ("version", node.version),
            ("system", str(inventory.get("os", ""))),
            ("processor", cpu),
            ("labels", ", ".join(f"{name}={value}" for name, value in sorted(node.labels.items()))),
            ("gpus", f"{node.gpu_count}" + (f" ({node.gpu_reason})" if node.gpu_reason else "")),
        ],
    )


@command.command("cordon", examples=("herder nodes cordon n1",))
@click.argument("node")
@pass_globals
def cordon(options: Globals, node: str) -> None:
    """Place nothing new on a node; what is there stays."""
    with options.connect() as client:
        found = client.cordon(node)
    output.emit(options, found, f"{found.node_id} is cordoned: nothing new is placed there", quiet="")


@command.command("uncordon", examples=("herder nodes uncordon n1",))
@click.argument("node")
@pass_globals
def uncordon(options: Globals, node: str) -> None:
    """Let a node take new work again; also ends a drain."""
    with options.connect() as client:
        found = client.uncordon(node)
    output.emit(options, found, f"{found.node_id} takes new work", quiet="")


@command.command("drain", examples=("herder nodes drain n1", "herder nodes drain n1 --deadline 30m --reason kernel"))
@click.argument("node")
@click.option(
    "--deadline", "deadline_s", type=Duration(), default="1h", show_default=True, help="Then what is left is stopped."
)
@click.option("--reason", default="", help="Shown to others.")
@pass_globals
def drain(options: Globals, node: str, deadline_s: float, reason: str) -> None:
    """Move services away from a node; at the deadline stop what is left."""
    with options.connect() as client:
        found = client.drain(node, deadline_s=int(deadline_s), reason=reason)
    said = "drained" if found.drain == "drained" else f"draining until {views.clock(found.drain_deadline_ms or 0)}"
    output.emit(options, found, f"{found.node_id} is {said}; `herder nodes uncordon {node}` ends it", quiet="")


@command.command(
    "label", examples=("herder nodes label n1 rack=a tier=fast", "herder nodes label n1 tier-   # removes it")
)
@click.argument("node")
@click.argument("labels", nargs=-1, required=True, metavar="NAME=VALUE|NAME-...")
@pass_globals
def label(options: Globals, node: str, labels: tuple[str, ...]) -> None:
    """Set labels (NAME=VALUE) and remove them (NAME-)."""
    changes: dict[str, str | None] = {}
    for entry in labels:
        name, sign, value = entry.partition("=")
        if sign and name:
            changes[name] = value
        elif entry.endswith("-") and len(entry) > 1:
            changes[entry[:-1]] = None
        else:
            raise click.UsageError(f"{entry!r} is neither NAME=VALUE nor NAME-")
    with options.connect() as client:
        found = client.label_node(node, changes)
    now = ", ".join(f"{name}={value}" for name, value in sorted(found.labels.items())) or "none"
    output.emit(options, found, f"labels of {found.node_id}: {now}", quiet="")


@command.command("remove", examples=("herder nodes remove n1", "herder nodes remove n1 --force"))
@click.argument("node")
@click.option("--force", is_flag=True, help="Also one that is online, or holds last copies.")
@pass_globals
def remove(options: Globals, node: str, force: bool) -> None:
    """Forget a node. One whose agent still runs says hello again."""
    with options.connect() as client:
        gone = client.remove_node(node, force=force)
    output.emit(options, gone, f"{gone.key} is {'removed' if gone.is_done else 'being removed'}", quiet="")


@command.command("reset-identity", examples=("herder nodes reset-identity n1",))
@click.argument("node")
@pass_globals
def reset_identity(options: Globals, node: str) -> None:
    """Let a node come with a new secret, after its agent lost its state directory. Needs an admin's token."""
    with options.connect() as client:
        found = client.reset_node_identity(node)
    output.emit(options, found, f"{found.node_id}: the next agent that says this id takes its place", quiet="")
