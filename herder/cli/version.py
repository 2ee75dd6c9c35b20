"""`herder version`: of the client and of the head."""

from __future__ import annotations

import platform

from herder import __version__
from herder.cli import output
from herder.cli.command import Globals, pass_globals, verb
from herder.errors import HerderError


@verb("version", examples=("herder version", "herder version -o json"))
@pass_globals
def command(options: Globals) -> None:
    """Show the versions of client and head. A head that cannot be asked is no error."""
    head, reason = "", ""
    try:
        with options.connect(attempts=1, timeout_s=5.0) as client:
            head = client.health().version
    except HerderError as error:
        reason = error.message
    value = {"client": __version__, "python": platform.python_version(), "head": head or None}
    shown = output.fields(
        options, [("client", f"{__version__} (Python {value['python']})"), ("head", head or f"unknown: {reason}")]
    )
    output.emit(options, value, shown, quiet=__version__)
