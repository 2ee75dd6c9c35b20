"""Commands that messages and hints name exist."""

from __future__ import annotations

import re
from pathlib import Path

import click

from herder.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`herder ([a-z][a-z-]+)(?: ([a-z][a-z-]+))?")


def test_commands_that_are_named_exist() -> None:
    """Whoever follows a hint finds the command: its name, and its subcommand where it has some."""
    wrong, seen = [], 0
    context = click.Context(cli)
    for folder in ("head", "agent", "common", "herder"):
        for path in (ROOT / folder).rglob("*.py"):
            for name, below in NAMED.findall(path.read_text()):
                seen += 1
                found = cli.get_command(context, name)
                is_known = found is not None
                if isinstance(found, click.Group) and below:
                    is_known = found.get_command(context, below) is not None
                if not is_known:
                    wrong.append(f"{path.relative_to(ROOT)}: herder {name} {below}".rstrip())
    assert seen > 50
    assert wrong == []
