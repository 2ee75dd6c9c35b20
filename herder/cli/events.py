"""`herder events`: follow every change."""

from __future__ import annotations

import click

from herder import types
from herder.cli import output, table, views
from herder.cli.command import Globals, pass_globals, verb

WIDTHS = (14, 26, 8, 34)


@verb("events", examples=("herder events", "herder events --kind job,copy", "herder events --after 0 -o json | jq ."))
@click.option("--after", type=click.IntRange(0), metavar="ID", help="Go on after this event; 0: from the beginning.")
@click.option(
    "--kind", default="", metavar="KIND,...", help="Only these: node, model, copy, service, replica, job, key."
)
@click.option("--key", default="", help="Only this object, as job-3f9a1c7e20b4.")
@click.option("--count", type=click.IntRange(1), help="End after so many.")
@pass_globals
def command(options: Globals, after: int | None, kind: str, key: str, count: int | None) -> None:
    """Print changes as they happen, until Ctrl-C. With -o json one object per line."""
    last = after or 0
    with options.connect() as client:
        seen = 0
        try:
            for event in client.events(after=after, kind=kind, key=key):
                _print(options, event)
                last = event.id
                seen += 1
                if seen == count:
                    return
        except KeyboardInterrupt:
            with output.interruptible(f"`herder events --after {last}` goes on from here."):
                raise


def _print(options: Globals, event: types.Event) -> None:
    if options.output == "json":
        import msgspec

        click.echo(msgspec.json.encode(event).decode())
    elif options.output == "yaml":
        click.echo("---\n" + output.to_yaml(event), nl=False)
    elif event.what == "reset":
        click.echo("-- some events were missed for good --")
    elif options.is_quiet:
        click.echo(f"{event.id} {event.what} {table.clean(event.key)}")
    else:
        cells = [table.clean(cell) for cell in views.line_row(event)]
        padded = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)]
        click.echo(" ".join([*padded, *cells[len(WIDTHS) :]]).rstrip())
