"""`herder why`: why something is as it is, or is not yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from herder import types
from herder.cli import output, views
from herder.cli.command import Globals, pass_globals, verb
from herder.errors import HerderApiError

if TYPE_CHECKING:
    from herder.client_sync import Client

KINDS = ("service", "replica", "job", "copy", "model", "node")


@verb(
    "why",
    examples=("herder why chat", "herder why job-3f9a1c7e20b4", "herder why node n1"),
)
@click.argument("words", nargs=-1, required=True, metavar="[KIND] ID")
@pass_globals
def command(options: Globals, words: tuple[str, ...]) -> None:
    """Say why ID is as it is. KIND (service, replica, job, copy, model, node) may be left out.

    For a service that is not placed: every node that was looked at, and why it was not taken.
    """
    if len(words) > 2 or (len(words) == 2 and words[0] not in KINDS):
        raise click.UsageError(f"write [KIND] ID; KIND is one of {', '.join(KINDS)}")
    with options.connect() as client:
        why = client.why(*words) if len(words) == 2 else guess(client, words[0])
    shown = output.fields(options, [(why.kind, why.id), ("state", why.state), ("reason", why.reason)])
    if why.candidates:
        rows = [views.candidate_row(candidate) for candidate in why.candidates]
        shown += "\n\n" + output.table(options, views.CANDIDATES, rows, empty="")
    output.emit(options, why, shown, quiet=why.reason)


def guess(client: Client, name: str) -> types.Why:
    """Asks by the kind that the name looks like, then by the others. Raises: HerderApiError `not_found`."""
    first = "job" if name.startswith("job-") else "copy" if "|" in name else "service"
    for kind in (first, *(kind for kind in KINDS if kind != first)):
        try:
            return client.why(kind, name)
        except HerderApiError as error:
            if error.status not in (404, 422, 400):
                raise
    raise HerderApiError(
        "not_found", f"nothing is called {name!r}", hint=f"say the kind too: herder why {KINDS[0]} {name}", status=404
    )
