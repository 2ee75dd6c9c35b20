"""A gateway in the simulator: requests that are still on their way when their engine shall stop.

It ends with its head. Nobody may tell an agent to stop an engine before its requests have ended or were cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from common import wire
from head.core.effects import Drain, EndDrain
from head.core.events import Event, ReplicaIdle
from tests.sim.world import World

LONGEST_MS = 60_000  # twice what a drain allows
Later = Callable[[int, str, Callable[[], None]], None]


class SimGateway:
    """The gateway of one head process."""

    def __init__(self, world: World, take: Callable[[Event], None], later: Later) -> None:
        self.cut = 0
        self._world = world
        self._take = take
        self._later = later
        self._rng = random.Random(world.seed)  # of its own: what requests do shall not change what goes wrong
        self._draining: dict[str, int] = {}  # replica -> generation

    def drain(self, effect: Drain) -> None:
        """Nothing is on its way, or it takes a while, or longer than it may."""
        assert effect.replica not in self._draining, f"{effect.replica} is drained twice"
        self._draining[effect.replica] = effect.generation
        rng = self._rng
        delay_ms = rng.choice([0, rng.randint(1, 5_000), rng.randint(5_000, LONGEST_MS)])
        self._later(delay_ms, "requests end", lambda: self._end(effect))

    def end_drain(self, effect: EndDrain) -> None:
        """What is still on its way is cut."""
        if self._draining.pop(effect.replica, None) is not None:
            self.cut += 1
            self._world.note(f"requests to {effect.replica} are cut")

    def sending(self, message: wire.Message) -> None:
        """A message leaves for an agent: must not stop an engine that still answers."""
        if isinstance(message, wire.Command) and isinstance(message.body, wire.StopReplica):
            drained = self._draining.get(message.body.replica)
            assert drained != message.generation, f"{message.body.replica} is stopped while it answers"

    def _end(self, effect: Drain) -> None:
        if self._draining.get(effect.replica) == effect.generation:
            del self._draining[effect.replica]
            self._take(ReplicaIdle(effect.replica, effect.generation))
