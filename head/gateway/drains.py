"""The gateway's part in draining: it tells the core when nothing is on its way to a replica any more.

What the core decides stands in `head/core/drains.py`. A replica that drains is out of the routing already when the
gateway is asked, so that what it counts here can only become less.
"""

from __future__ import annotations

from collections.abc import Callable

from common.errors import EngineStopped, HerderError
from head.core.events import Event, ReplicaIdle
from head.core.service_views import Route
from head.core.state import State
from head.gateway.routing import Loads

RETRY_STOPPED_S = 1  # another replica may take it at once; where there is none, that refusal says how long


class Drains:
    """Replicas whose last requests are waited for. `cut(replica, error)` ends those that are on their way."""

    def __init__(self, loads: Loads, post: Callable[[Event], None], cut: Callable[[str, HerderError], None]) -> None:
        self.waiting: dict[str, int] = {}  # replica -> generation
        self._loads = loads
        self._post = post
        self._cut = cut

    def drain(self, replica: str, generation: int) -> None:
        """Tells the core once the replica is idle."""
        if self._loads.outstanding.get(replica):
            self.waiting[replica] = generation
        else:
            self._post(ReplicaIdle(replica, generation))

    def end_drain(self, replica: str) -> None:
        """The time is over."""
        self.waiting.pop(replica, None)
        self._cut(replica, stopped(replica))

    def ended(self, replica: str) -> None:
        """A request to a replica has ended."""
        if replica in self.waiting and not self._loads.outstanding.get(replica):
            self._post(ReplicaIdle(replica, self.waiting.pop(replica)))


def stopped(replica: str) -> EngineStopped:
    """What clients are told whose request did not end in time."""
    return EngineStopped(
        f"the engine {replica} was stopped before its answer was complete",
        hint="send the request again",
        retry_after_s=RETRY_STOPPED_S,
    )


def is_routed(state: State, route: Route) -> bool:
    """Whether the replica is the one that the route was made for, and still wanted."""
    replica = state.replicas.get(route.replica)
    return replica is not None and replica.generation == route.generation and replica.desired == "running"
