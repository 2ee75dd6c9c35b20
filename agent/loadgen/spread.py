"""Which of several endpoints a request goes to: a function of its index, so that it is the same wherever it is drawn.

round-robin   index i to endpoint i modulo n: exactly even over the whole run
random        drawn for each index from the run's seed: as a balancer without memory would do
all-to-all    every process goes round all endpoints, each beginning at another
static        load node i asks endpoint i modulo n alone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

Spread = Literal["round-robin", "random", "all-to-all", "static"]
SPREADS: tuple[Spread, ...] = get_args(Spread)
Choose = Callable[[int, int], int]
"""(index of the conversation in the run, how many this process has begun before) -> number of the endpoint."""
_MASK = (1 << 64) - 1


def only(index: int, begun: int) -> int:
    """There is one."""
    return 0


def chooser(spread: str, endpoints: int, *, seed: int, part: int, process: int) -> Choose:
    """How one process of a run chooses. process: its number in all parts of the run."""
    assert spread in SPREADS
    if endpoints == 1:
        return only
    match spread:
        case "round-robin":
            return lambda index, begun: index % endpoints
        case "random":
            return lambda index, begun: _draw(seed, index) % endpoints
        case "all-to-all":
            return lambda index, begun: (process + begun) % endpoints
        case _:
            return lambda index, begun: part % endpoints


def _draw(seed: int, index: int) -> int:
    """64 even bits for an index (splitmix64)."""
    value = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
