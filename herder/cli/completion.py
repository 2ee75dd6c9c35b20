"""`herder completion`: the shell's completion script."""

from __future__ import annotations

import click

from herder.cli.command import verb

INSTALL = {
    "bash": "herder completion bash > ~/.local/share/bash-completion/completions/herder",
    "zsh": "herder completion zsh > ~/.zfunc/_herder    # with ~/.zfunc in fpath, before compinit",
    "fish": "herder completion fish > ~/.config/fish/completions/herder.fish",
}


@verb("completion", examples=tuple(INSTALL.values()))
@click.argument("shell", type=click.Choice(tuple(INSTALL)))
def command(shell: str) -> None:
    """Print the completion script for SHELL; the examples show where each shell looks for it."""
    from click.shell_completion import get_completion_class

    from herder.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(f"# install: {INSTALL[shell]}")
    click.echo(found(cli, {}, "herder", "_HERDER_COMPLETE").source())
