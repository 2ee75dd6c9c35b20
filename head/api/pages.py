"""Lists in pages: a stable order, an opaque cursor, and work in proportion to the page.

`Ordered` keeps the sorted keys of one table between requests and takes in only what changed since, so that a page
of 100 out of 100,000 jobs does not sort 100,000 jobs. Keys of a table never change their order key: names and ids
sort by themselves, jobs by the time they were made (newest first), which is fixed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from common.errors import InvalidValue
from herder.decoding import UNREADABLE

T = TypeVar("T")
OrderKey = tuple[int, str]
SLICE_KEYS = 5_000  # some milliseconds of filtering


class Slice(NamedTuple):
    """One page: its entries, whether there are more, how many there are in all."""

    entries: Sequence[OrderKey]
    has_more: bool
    total: int


class Ordered(Generic[T]):
    """The keys of a table in their list order."""

    def __init__(self, table: Callable[[], dict[str, T]], rank: Callable[[T], int] | None = None) -> None:
        """`rank`: a number that comes before the key in the order; it must not change while the key lives."""
        self._table = table
        self._rank = rank
        self._ranks: dict[str, int] = {}
        self._order: list[OrderKey] = []

    def order(self) -> Sequence[OrderKey]:
        """Every key of the table, in order."""
        table = self._table()
        fresh = []
        # New keys stand at the end of a dict: what came since the last look is found without a look at the rest.
        for key in reversed(table):
            if key in self._ranks:
                break
            fresh.append(key)
        if len(self._ranks) + len(fresh) != len(table):
            self._take_in(table.keys() - self._ranks.keys(), self._ranks.keys() - table.keys(), table)
        elif fresh:
            self._take_in(fresh, (), table)
        return self._order

    def _take_in(self, fresh: Iterable[str], gone: Iterable[str], table: Mapping[str, T]) -> None:
        gone = set(gone)
        if gone:
            for key in gone:
                del self._ranks[key]
            self._order = [entry for entry in self._order if entry[1] not in gone]
        added = [(self._rank(table[key]) if self._rank else 0, key) for key in fresh]
        self._ranks.update((key, rank) for rank, key in added)
        if len(added) > 64:
            self._order.extend(added)
            self._order.sort()
        else:
            for entry in added:
                insort(self._order, entry)


def take(order: Sequence[OrderKey], *, after: OrderKey | None, limit: int) -> Slice:
    """The next `limit` keys after a cursor; the cost does not grow with the list."""
    start = bisect_right(order, after) if after is not None else 0
    return Slice(order[start : start + limit], start + limit < len(order), len(order))


async def matching(order: Sequence[OrderKey], wants: Callable[[str], bool]) -> list[OrderKey]:
    """The wanted keys of a list, looked at in slices between which the loop turns.

    `wants` raises KeyError for a key that went away meanwhile.
    """
    found: list[OrderKey] = []
    for start in range(0, len(order), SLICE_KEYS):
        if start:
            await asyncio.sleep(0)
        for entry in order[start : start + SLICE_KEYS]:
            try:
                if wants(entry[1]):
                    found.append(entry)
            except KeyError:
                continue  # deleted since the list was begun
    return found


class _Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    list: str
    rank: int
    key: str


_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Cursor)


def encode_cursor(name: str, after: OrderKey | None) -> str | None:
    """The cursor of the following page; `name` binds it to its list. None at the end."""
    if after is None:
        return None
    return base64.urlsafe_b64encode(msgspec.json.encode(_Cursor(name, *after))).decode().rstrip("=")


def decode_cursor(name: str, text: str) -> OrderKey | None:
    """Where to go on; None for an empty cursor. Raises: InvalidValue for a cursor that this list did not give."""
    if not text:
        return None
    try:
        cursor = _decoder.decode(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, *UNREADABLE):
        raise InvalidValue("cursor: cannot be read", hint="pass `next` of the page before, unchanged") from None
    if cursor.list != name:
        raise InvalidValue(f"cursor: belongs to the list of {cursor.list[:40]!r}", hint="start again without a cursor")
    return cursor.rank, cursor.key
