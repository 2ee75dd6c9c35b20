"""The help of every command: an example, a sentence, options that are explained; and the generated page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from herder.cli import output
from herder.cli.command import FORMATS, GlobalOption, Globals
from herder.cli.main import SECTIONS, cli, run
from herder.errors import HerderApiError

ROOT = Path(__file__).parents[2]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command."""
    yield path
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = sorted(commands())
LISTS = {f"herder {name}" for name, command in cli.commands.items() if isinstance(command, click.Group)}


def find(path: tuple[str, ...]) -> click.Command:
    """The command of a path."""
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """--help prints a sentence and at least one example that begins with the command itself."""
    assert run([*path, "--help"], Globals()) == 0
    shown = capsys.readouterr().out
    examples = shown.partition("Examples:\n")[2]
    assert " ".join(["herder", *path]).rstrip() in examples
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    """No option is without a help text, and none but the global ones has a one-letter name that is not well known."""
    for parameter in find(path).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.opts
            short = {name for name in parameter.opts if len(name) == 2}
            assert short <= {"-o", "-q", "-f", "-h", "-i", "-V"}, short


@pytest.mark.parametrize("path", [path for path in ALL if path and path[0] not in ("head", "agent")], ids=" ".join)
def test_global_options_go_anywhere(path: tuple[str, ...]) -> None:
    """Every command takes every global option itself."""
    names = {name for parameter in find(path).params if isinstance(parameter, GlobalOption) for name in parameter.opts}
    assert {"--url", "--token-file", "--context", "--ca-file", "-o", "-q", "--no-color"} <= names


def test_the_overview_tells_the_truth() -> None:
    """The one line of each command in the overview begins like nothing else: no two are the same."""
    lines = [line for section in SECTIONS.values() for _, line in section.values()]
    assert len(set(lines)) == len(lines)
    assert all(line.endswith(".") and len(line) < 64 for line in lines)


def test_a_misspelt_command_has_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest command is named; the exit code is that of wrong usage."""
    assert run(["nods"], Globals()) == 2
    assert "Did you mean nodes" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell gets a script that asks herder, and the line that installs it."""
    assert run(["completion", shell], Globals()) == 0
    shown = capsys.readouterr().out
    assert "_HERDER_COMPLETE" in shown
    assert shown.startswith("# install: herder completion " + shell)


def test_formats_are_documented() -> None:
    """The three formats are those of the documentation."""
    assert FORMATS == ("table", "json", "yaml")


def test_hints_of_the_head_are_told_as_commands() -> None:
    """Every list that a hint of the head names by its path is named by its command, and the command exists."""
    hints = {
        found[1]
        for path in (ROOT / "head").rglob("*.py")
        for found in re.finditer(r'"(GET /api/v1/\S+ (?:lists|names) [^"]*)"', path.read_text())
    }
    assert len(hints) >= 9
    for hint in hints:
        told = output.hint_for(HerderApiError("not_found", "no such thing", hint=hint, status=404), Globals())
        words = re.match(r"`herder ([a-z- ]+[a-z])( [A-Z]+)?` (lists|names) ", told)
        assert words is not None, told
        assert tuple(words[1].split()) in ALL or f"herder {words[1]}" in LISTS, told
