"""Which replica answers: a pure choice among those that are ready. Later policies implement `Policy`.

A route is where one replica answers. Routes of a name are looked up in the state (`head/core/service_views.py` says
which replicas serve); what the gateway itself knows of them (requests on their way, recent failures) stands in
`Loads`, and a policy sees both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from head.core.service_views import Route
from head.core.state import State

FRESH_S = 0.25  # a lookup is used again for so long, unless the state changed
NAMES = 1_024  # lookups remembered
FAILURE_S = 1.0  # a replica that refused a connection is left alone for so long while others are there


FindRoutes = Callable[[State, str], Sequence[Route]]


class Lookup:
    """Routes by name, remembered for a moment: a service of 200 replicas is not looked through for each request."""

    def __init__(self, find: FindRoutes) -> None:
        self._find = find
        self._known: dict[str, tuple[int, float, Sequence[Route]]] = {}

    def routes(self, state: State, name: str, now_s: float) -> Sequence[Route]:
        """The ready replicas of a model or service."""
        known = self._known.get(name)
        if known is not None and known[0] == state.revision and known[1] > now_s:
            return known[2]
        found = self._find(state, name)
        if not found:
            self._known.pop(name, None)
            return found
        if len(self._known) >= NAMES:
            self._known.clear()
        self._known[name] = (state.revision, now_s + FRESH_S, found)
        return found


class Loads:
    """What the gateway knows of replicas: requests on their way, and until when one is left alone."""

    def __init__(self) -> None:
        self.outstanding: dict[str, int] = {}
        self.failed_until: dict[str, float] = {}

    def begin(self, replica: str) -> None:
        """A request goes to the replica."""
        self.outstanding[replica] = self.outstanding.get(replica, 0) + 1

    def end(self, replica: str) -> None:
        """A request has ended."""
        left = self.outstanding[replica] - 1
        if left:
            self.outstanding[replica] = left
        else:
            del self.outstanding[replica]

    def failed(self, replica: str, now_s: float) -> None:
        """The replica could not be reached."""
        for name in [name for name, until in self.failed_until.items() if until <= now_s]:
            del self.failed_until[name]
        self.failed_until[replica] = now_s + FAILURE_S

    def is_failing(self, replica: str, now_s: float) -> bool:
        """Whether the replica was out of reach a moment ago."""
        return self.failed_until.get(replica, 0.0) > now_s


class Policy(Protocol):
    """Chooses among candidates, which are never empty."""

    def choose(self, candidates: Sequence[Route], loads: Loads) -> Route:
        """The route to take."""
        ...


class LeastOutstanding:
    """The replica with the fewest requests on their way; among equals each in its turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Route], loads: Loads) -> Route:
        count = len(candidates)
        if count == 1:
            return candidates[0]
        self._turn = turn = self._turn + 1
        outstanding = loads.outstanding
        best = candidates[turn % count]
        least = outstanding.get(best.replica, 0)
        for step in range(1, count):
            if not least:
                break
            route = candidates[(turn + step) % count]
            number = outstanding.get(route.replica, 0)
            if number < least:
                best, least = route, number
        return best


def eligible(
    routes: Sequence[Route], *, tried: Collection[str], is_good: Callable[[Route], bool]
) -> tuple[Sequence[Route], bool]:
    """The routes worth trying now, and whether they want a probe first.

    Good ones come first; those on suspect nodes, or that failed a moment ago, only when there is no other. Nothing
    is tried twice for one request.
    """
    left = [route for route in routes if route.replica not in tried] if tried else routes
    good = [route for route in left if is_good(route)]
    return (good, False) if good else (left, bool(left))
