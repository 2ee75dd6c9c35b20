"""`herder backup`: everything the head knows, in one file."""

from __future__ import annotations

from pathlib import Path

import click

from herder.cli import output, text
from herder.cli.command import Globals, pass_globals, verb


@verb("backup", examples=("herder backup herder.sqlite", "herder backup /backups/herder.sqlite --force"))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Put it in the place of a file that is there.")
@pass_globals
def command(options: Globals, file: Path, force: bool) -> None:
    """Save a consistent copy of everything the head knows to FILE, while it goes on working.

    It holds key hashes and engine keys: keep it as you keep tokens. `herder head --restore FILE` puts it back.
    """
    if file.exists() and not force:
        raise click.UsageError(f"{file} exists; --force puts the new one in its place")
    if not file.absolute().parent.is_dir():
        raise click.UsageError(f"{file.absolute().parent} is not a folder")
    with options.connect() as client:
        done = client.backup(file)
    value = {"file": str(file), "bytes": done}
    output.emit(options, value, f"{file}: {text.size(done)}, readable by you only", quiet=str(file))
