"""What commands print: tables for people, JSON and YAML of the API's own types for programs. Results go to stdout,
everything else to stderr."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from herder.cli.table import Column, render, safe
from herder.errors import HerderApiError, HerderConnectionError, HerderError, HerderTimeoutError

if TYPE_CHECKING:
    from herder.cli.command import Globals

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_NOT_ALLOWED, EXIT_NOT_FOUND, EXIT_TIMED_OUT = range(7)
EXIT_INTERRUPTED = 130

_GREEN = ("online", "ready", "completed", "healthy", "drained", "valid", "fits", "running", "yes")
_YELLOW = (
    "suspect",
    "pending",
    "waiting",
    "waiting_copy",
    "reserved",
    "fetching",
    "verifying",
    "syncing",
    "loading",
    "starting",
    "degraded",
    "draining",
    "cordoned",
    "planned",
    "asleep",
    "dropping",
    "stopping",
    "settling",
)
_RED = ("unreachable", "failed", "invalid", "unhealthy", "lost", "revoked", "expired", "refused", "cancelled", "left")


def emit(options: Globals, value: Any, table: str | None = None, *, quiet: str | None = None) -> None:
    """Prints a result: the value as JSON or YAML, or the table. quiet: what -q prints of it, with tables only."""
    if options.output == "json":
        import msgspec

        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
        click.echo(escaped(text) if sys.stdout.isatty() else text)
    elif options.output == "yaml":
        click.echo(to_yaml(value), nl=False)
    elif options.is_quiet and quiet is not None:
        if quiet:
            click.echo(quiet)
    elif table is not None:
        click.echo(table)


def escaped(text: str) -> str:
    """JSON whose strings cannot drive a terminal: the same document."""
    if text.replace("\n", "").isprintable():
        return text
    kept = (c if c.isprintable() or c == "\n" else "".join(f"\\u{unit:04x}" for unit in _utf16(c)) for c in text)
    return "".join(kept)


def _utf16(char: str) -> list[int]:
    data = char.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)]


def to_yaml(value: Any) -> str:
    """A value of the API as YAML, fields in their order."""
    import msgspec
    import yaml

    return yaml.safe_dump(msgspec.to_builtins(value), sort_keys=False, allow_unicode=True, width=100)


def stream(piece: str) -> None:
    """A piece of what others wrote (an engine, a model): as it is for a pipe, harmless for a terminal."""
    click.echo(safe(piece) if sys.stdout.isatty() else piece, nl=False)


def note(options: Globals, text: str) -> None:
    """A line for people on stderr; -q keeps it back."""
    if not options.is_quiet:
        click.echo(safe(text), err=True)


def has_colour(options: Globals, stream: Any = None) -> bool:
    """Whether to colour: a terminal, and nobody asked not to."""
    target = stream if stream is not None else sys.stdout
    if options.is_colourless or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(target.isatty())


def line_width() -> int | None:
    """Cells of a line: the terminal's, or COLUMNS; None (no limit) for a pipe, so that nothing is cut off there."""
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    if sys.stdout.isatty():
        return shutil.get_terminal_size((80, 24)).columns
    return None


def table(options: Globals, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, empty: str) -> str:
    """The rows as a table; the sentence `empty` when there are none."""
    if not rows:
        return empty
    return render_table(options, columns, rows, width=line_width())


def render_table(
    options: Globals, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, width: int | None
) -> str:
    """The rows as a table of at most so many cells in a line; None: no limit."""
    return render(columns, rows, width=width, paint=painter(options))


def painter(options: Globals) -> Any:
    """Colours cells of columns that hold states; None without colours."""
    if not has_colour(options):
        return None

    def paint(title: str, cell: str) -> str:
        return paint_state(cell) if title in ("STATE", "STATUS", "VERDICT") else cell

    return paint


def paint_state(word: str) -> str:
    """A state in its colour."""
    first = word.split(",")[0].split(" ")[0]
    colour = "green" if first in _GREEN else "yellow" if first in _YELLOW else "red" if first in _RED else None
    return click.style(word, fg=colour) if colour else word


def fields(options: Globals, pairs: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value not in ("", "-")]
    longest = max((len(name) for name, _ in shown), default=0)
    is_coloured = has_colour(options)
    lines = []
    for name, value in shown:
        is_state = is_coloured and name in ("state", "status")
        text = safe("\n".join(value.splitlines()))
        lines.append(f"{name.ljust(longest)}  {paint_state(text) if is_state else text}")
    return "\n".join(lines)


@contextmanager
def interruptible(said: str) -> Iterator[None]:
    """A wait that Ctrl-C ends with one line about what goes on without us. Raises: click's Exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\n{_one_line(said)}", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


_LISTED_BY = {
    "models": "herder models",
    "nodes": "herder nodes",
    "services": "herder services",
    "replicas": "herder services show NAME",
    "jobs": "herder jobs",
    "keys": "herder keys",
    "benchmarks": "herder benchmarks",
    "benchmarks/{id}": "herder benchmarks show ID",
    "benchmark-recipes": "herder benchmarks recipes",
}
_API_LISTS = re.compile(rf"GET /api/v1/({'|'.join(map(re.escape, _LISTED_BY))})(?= (?:lists|names) )")
"""The head's hints are for all who use its API: here the command says it."""


def show_error(code: str, message: str, hint: str = "") -> None:
    """`error[code]: message`, and what to do on a second line."""
    label = f"error[{code}]:"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        label = click.style(label, fg="red", bold=True)
    click.echo(f"{label} {_one_line(message)}", err=True)
    if hint:
        click.echo(f"hint: {_one_line(hint)}", err=True)


def exit_code_of(error: HerderError) -> int:
    """The exit code that an error ends the command with."""
    if isinstance(error, HerderConnectionError):
        return EXIT_UNREACHABLE
    if isinstance(error, HerderTimeoutError) or error.code == "timed_out":
        return EXIT_TIMED_OUT
    if isinstance(error, HerderApiError):
        if error.status in (401, 403):
            return EXIT_NOT_ALLOWED
        if error.status == 404:
            return EXIT_NOT_FOUND
    return EXIT_FAILED


def hint_for(error: HerderError, options: Globals) -> str:
    """The error's own hint, or what helps at the command line."""
    if isinstance(error, HerderApiError) and error.status == 401:
        return "--token-file or HERDER_TOKEN_FILE names the file with your token; `herder keys create` makes tokens"
    return _API_LISTS.sub(lambda found: f"`{_LISTED_BY[found[1]]}`", error.hint)


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
