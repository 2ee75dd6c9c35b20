"""`herder story`: what happened to something, from the journal."""

from __future__ import annotations

import click

from herder.cli import output, views
from herder.cli.command import Globals, pass_globals, verb


@verb("story", examples=("herder story job-3f9a1c7e20b4", "herder story smollm2", "herder story n1 --limit 20"))
@click.argument("id")
@click.option("--kind", default="", help="Only lines about objects of this kind.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=200, show_default=True, help="The latest so many.")
@pass_globals
def command(options: Globals, id: str, kind: str, limit: int) -> None:
    """Tell what happened to ID (a job, model, node, service, replica, key or request), oldest first, with causes."""
    with options.connect() as client:
        listing = client.story(id, kind=kind)
        page = listing.page(limit=min(limit, 500))
        lines = list(page.items)
        while page.next is not None and len(lines) < limit:
            page = listing.page(limit=min(limit - len(lines), 500), cursor=page.next)
            lines = [*page.items, *lines]
    rows = [views.line_row(line) for line in lines]
    shown = output.table(options, views.LINES, rows, empty=f"nothing is known of {id}")
    output.emit(options, lines, shown, quiet="\n".join(line.what for line in lines))
