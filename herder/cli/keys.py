"""`herder keys`: access tokens by role."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import get_args

import click

from herder import types
from herder.cli import output, views
from herder.cli.command import Duration, Globals, group, pass_globals

ROLES = click.Choice(get_args(types.Role))


@group(
    "keys", examples=("herder keys", "herder keys create --role viewer grafana", "herder keys revoke key-9b2e4f10c7aa")
)
def command() -> None:
    """Create, list and revoke access tokens. Without a subcommand: list them. Needs an admin's token."""


@command.command(
    "create",
    examples=(
        "herder keys create --role viewer grafana --file grafana.token",
        "herder keys create --role agent join --ttl 7d",
        "herder keys create --role agent gpu-7 --node gpu-7 --file gpu-7.token",
        "herder keys create --role inference app -q",
    ),
)
@click.argument("name")
@click.option("--role", type=ROLES, required=True, help="admin > operator > viewer; agent: sessions; inference: /v1.")
@click.option(
    "--ttl", "ttl_s", type=Duration(), default=0, metavar="TIME", help="How long it is valid; default: for ever."
)
@click.option("--node", default="", metavar="ID", help="Role agent: only this node may use it.")
@click.option(
    "--file", type=click.Path(path_type=Path), help="Write the token to a new 0600 file instead of printing it."
)
@pass_globals
def create(options: Globals, name: str, role: types.Role, ttl_s: float, node: str, file: Path | None) -> None:
    """Make a token. It is shown once and kept nowhere: only its hash stays at the head."""
    target = None
    if file is not None:
        try:
            # Made before the key, so that no token is lost to a folder that cannot be written.
            target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise click.UsageError(f"{file} exists already") from None
    try:
        with options.connect() as client:
            key = client.create_key(role, name, ttl_s=int(ttl_s), node=node)
    except BaseException:
        if target is not None and file is not None:
            os.close(target)
            file.unlink(missing_ok=True)
        raise
    if target is not None:
        with os.fdopen(target, "w") as opened:
            opened.write(f"{key.token}\n")
        output.emit(options, _without_token(key), f"{key.id} ({role}): token in {file}", quiet=key.id)
        return
    output.emit(options, key, key.token, quiet=key.token)
    output.note(options, f"{key.id} ({role}): this token is shown once; keep it in a 0600 file")


def _without_token(key: types.KeyView) -> types.KeyView:
    import msgspec

    return msgspec.structs.replace(key, token=None)


@command.command("list", examples=("herder keys list", "herder keys list --role agent"))
@click.option("--role", type=ROLES, help="Only keys of this role.")
@pass_globals
def list_keys(options: Globals, role: types.Role | None = None) -> None:
    """List keys. Tokens are never shown again."""
    with options.connect() as client:
        found = client.keys(role=role).all()
    now_ms = int(time.time() * 1000)
    shown = output.table(options, views.KEYS, [views.key_row(key, now_ms) for key in found], empty="no keys")
    output.emit(options, found, shown, quiet="\n".join(key.id for key in found))


@command.command("revoke", examples=("herder keys revoke key-9b2e4f10c7aa",))
@click.argument("key_id", metavar="KEY")
@pass_globals
def revoke(options: Globals, key_id: str) -> None:
    """Revoke a token, at once."""
    with options.connect() as client:
        key = client.revoke_key(key_id)
    output.emit(options, key, f"{key.id} ({key.name}, {key.role}) opens nothing any more", quiet="")
