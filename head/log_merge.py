"""Several logs as one: lines of each in their own order, all together by time as far as that can be known. Pure.

A source is `behind` while it still says what was there before we asked: as long as one of those has nothing to give, no
line of another may pass. Once it is `live`, what it will say has yet to be written, so a line of another waits for it
only LOG_REORDER_MS, and not at all when it is old. Within a source the order never changes: a line is sorted by the
latest time that its source has told so far, so clocks set back, and lines without a time, stay where they are.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Generic, NamedTuple, TypeVar

from common import limits

T = TypeVar("T")
OLD_MS = 5_000  # a line this much older than now has nothing to wait for
ROOM_MIN = 64


class _Held(NamedTuple):
    key_ms: int
    arrived_ms: int
    line: object


class _Source:
    """One log of the view."""

    __slots__ = ("held", "is_behind", "is_ended", "last_ms", "order")

    def __init__(self, order: int) -> None:
        self.order = order
        self.held: deque[_Held] = deque()
        self.last_ms = 0
        self.is_behind = True
        self.is_ended = False


class Merge(Generic[T]):
    """Lines in, lines out. Times are milliseconds; `now_ms` is the wall clock of whoever merges."""

    def __init__(self, *, reorder_ms: int = limits.LOG_REORDER_MS, held_max: int = limits.LOG_HELD_LINES) -> None:
        self._reorder_ms = reorder_ms
        self._held_max = held_max
        self._sources: dict[str, _Source] = {}
        self._by_order: list[_Source] = []
        self._names: list[str] = []
        self._heap: list[tuple[int, int]] = []  # (key of the first held line, order) of every source that holds one
        self._silent_behind = 0  # sources that are behind and hold nothing
        self._silent_live = 0  # sources that are live and hold nothing

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._heap

    @property
    def is_behind(self) -> bool:
        """Whether some source still says what was there before."""
        return any(source.is_behind and not source.is_ended for source in self._sources.values())

    def add(self, name: str) -> None:
        """A new source; it is behind."""
        source = _Source(len(self._by_order))
        self._sources[name] = source
        self._by_order.append(source)
        self._names.append(name)
        self._count(source, 1)

    def holds(self, name: str) -> bool:
        """Whether lines of a source wait."""
        return bool(self._sources[name].held)

    def has_room(self, name: str) -> bool:
        """Whether a source may give more."""
        return len(self._sources[name].held) < max(ROOM_MIN, self._held_max // max(1, len(self._sources)))

    def push(self, name: str, at_ms: int, line: T, now_ms: int) -> None:
        """A line of a source, in its order. at_ms 0: not known."""
        source = self._sources[name]
        source.last_ms = max(source.last_ms, at_ms)
        if not source.held:
            self._count(source, -1)
            heapq.heappush(self._heap, (source.last_ms, source.order))
        source.held.append(_Held(source.last_ms, now_ms, line))

    def caught_up(self, name: str) -> None:
        """What this source says from now on was written after it was asked; also of one that cannot be reached."""
        source = self._sources[name]
        self._count(source, -1)
        source.is_behind = False
        self._count(source, 1)

    def end(self, name: str) -> None:
        """Nothing more comes of a source; what it said still comes out."""
        source = self._sources[name]
        self._count(source, -1)
        source.is_ended = True

    def pop(self, now_ms: int) -> tuple[str, T] | None:
        """The next line, or None when none may go yet."""
        if not self._heap or self._silent_behind:
            return None
        key_ms, order = self._heap[0]
        source = self._by_order[order]
        held = source.held[0]
        if self._silent_live and now_ms < min(held.arrived_ms + self._reorder_ms, key_ms + OLD_MS):
            return None
        source.held.popleft()
        if source.held:
            heapq.heapreplace(self._heap, (source.held[0].key_ms, order))
        else:
            heapq.heappop(self._heap)
            self._count(source, 1)
        return self._names[order], held.line  # type: ignore[return-value]

    def wait_ms(self, now_ms: int) -> int | None:
        """How long until a held line may go, as far as time alone decides; None: something has to come first."""
        if not self._heap or self._silent_behind:
            return None
        if not self._silent_live:
            return 0
        key_ms, order = self._heap[0]
        arrived_ms = self._by_order[order].held[0].arrived_ms
        return max(0, min(arrived_ms + self._reorder_ms, key_ms + OLD_MS) - now_ms)

    def _count(self, source: _Source, change: int) -> None:
        """Counts a source that holds nothing, in or out."""
        if source.held or source.is_ended:
            return
        if source.is_behind:
            self._silent_behind += change
        else:
            self._silent_live += change
