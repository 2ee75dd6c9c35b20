"""The simulated world: one heap of events in virtual time, one seeded source of chance, one trace.

Nothing here sleeps or reads a clock. The same seed gives the same run to the last message; `World.trace` is a
running hash of everything that happened, so two runs can be compared.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Faults:
    """How hostile the world is. Probabilities are per message or per second of virtual time, as named.

    Everything stops being hostile at `until_ms`, after which the cluster must come to rest.
    """

    delay_ms: tuple[int, int] = (0, 20)
    loss: float = 0.0  # per message
    duplicate: float = 0.0  # per message
    reorder: float = 0.0  # per message: delayed so much that later ones overtake it
    partition_per_s: float = 0.0  # per node: one or both directions, for a while
    disconnect_per_s: float = 0.0  # per node: the websocket is cut
    head_crash_per_s: float = 0.0
    head_stall_per_s: float = 0.0
    head_disk_full_per_s: float = 0.0
    agent_crash_per_s: float = 0.0  # per node
    agent_disk_full_per_s: float = 0.0  # per node: the ledger cannot be written for a while
    mover_crash_per_s: float = 0.0  # per node
    holder_crash_per_s: float = 0.0  # per node
    reboot_per_s: float = 0.0  # per node
    engine_crash_per_s: float = 0.0  # per engine
    engine_hang_per_s: float = 0.0  # per engine: probes fail until it is restarted
    source_fails: float = 0.0  # per fetch
    source_lies: float = 0.0  # per fetch from a peer: the bytes have another digest
    result_loss: float = 0.0  # per result of an agent, beyond `loss`
    peer_cut_per_s: float = 0.0  # per node: it and another cannot reach each other
    engine_leaks: float = 0.0  # per engine: processes and GPU memory stay after SIGKILL for a while
    models_broken: float = 0.0  # per model, for ever: its engines die at start, or are never ready
    node_vanishes: float = 0.0  # per run: a node is gone for good and is removed by force
    strangers: float = 0.0  # per run: agents of another cluster, of another protocol, of a node id in use
    head_clones_per_s: float = 0.0  # the head crashes, but an old process goes on upon its own copy of the state
    head_restored: float = 0.0  # per run: a backup is restored while agents run
    clock_jump_ms: int = 0  # at each head start the wall clock is off by up to so much, either way
    agent_disk_full_ms: int = 10_000  # at most so long
    agent_away_ms: int = 30_000  # at most so long after a crash
    leaving_per_s: float = 0.0  # per node: its time ends, it says so, the machine goes and comes back
    run_fails: float = 0.0  # per run: it cannot be prepared
    run_dies: float = 0.0  # per run: its process dies while it sends
    runs_differ: float = 0.0  # per run: it draws something else than the others
    judge_fails: float = 0.0  # per point or report: the head's shell cannot make it
    disk_gib: int = 100  # per node
    dram_gib: int = 40
    until_ms: int = 0


@dataclass(order=True)
class _Entry:
    at_ms: int
    order: int
    name: str = field(compare=False)
    action: Callable[[], None] = field(compare=False)


class World:
    """Time, chance and the list of what is going to happen."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed = seed
        self.faults = faults
        self.rng = random.Random(seed)
        self.is_told = False  # prints every line
        self.now_ms = 0
        self.cuts: dict[frozenset[str], int] = {}  # pairs of nodes that cannot reach each other -> until
        self.broken_models: dict[str, str] = {}
        self.recent: deque[str] = deque(maxlen=400)
        self._heap: list[_Entry] = []
        self._order = 0
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def trace(self) -> str:
        """A hash of everything noted so far."""
        return self._hash.hexdigest()

    @property
    def is_hostile(self) -> bool:
        """Whether faults still happen."""
        return self.now_ms < self.faults.until_ms

    def note(self, text: str) -> None:
        """Adds a line to the trace."""
        line = f"{self.now_ms} {text}"
        self._hash.update(line.encode())
        self.recent.append(line)
        if self.is_told:
            print(line)

    def after(self, delay_ms: int, name: str, action: Callable[[], None]) -> None:
        """Runs the action after so much virtual time."""
        self._order += 1
        heapq.heappush(self._heap, _Entry(self.now_ms + max(0, delay_ms), self._order, name, action))

    def chance(self, probability: float) -> bool:
        """Whether something happens, while the world is hostile."""
        return probability > 0 and self.is_hostile and self.rng.random() < probability

    def run_until(self, at_ms: int, each: Callable[[], None] | None = None) -> None:
        """Lets time pass. `each` is called after every event."""
        while self._heap and self._heap[0].at_ms <= at_ms:
            entry = heapq.heappop(self._heap)
            self.now_ms = entry.at_ms
            entry.action()
            if each is not None:
                each()
        self.now_ms = at_ms
