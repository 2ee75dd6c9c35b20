"""What becomes of a node's engines when its daemons stop: they run on, or their services are deleted first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from herder.cli import output, text
from herder.cli.command import Globals

if TYPE_CHECKING:
    from herder.client_sync import Client

STOP_S = 60.0
GONE = ("stopped", "failed")


def settle(options: Globals, client: Client, node: str, *, is_stopping: bool) -> str:
    """Stops the node's engines, or says in one sentence that they run on; "" when there are none.

    Stopping deletes their services: an engine that is wanted would be started again by the next `herder up`.
    """
    live = [replica for replica in client.replicas(node=node) if replica.state not in GONE]
    if not live:
        return ""
    services = sorted({replica.service for replica in live})
    if not is_stopping:
        return (
            f"still running: {text.plural(len(live), 'engine')} of {', '.join(services)}; the next `herder up` goes on "
            "with that, `herder down --stop-engines` ends it too"
        )
    for name in services:
        output.note(options, f"stopping the engines of {name}")
        with output.interruptible(f"{name} goes on stopping; head and agent run on. `herder down` again ends them."):
            client.delete_service(name, wait_s=STOP_S)
    return ""
