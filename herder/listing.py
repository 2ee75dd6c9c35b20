"""Lists of the API: pages under a cursor, and iteration over all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from herder.transport import Query, Transport
from herder.types import Page

T = TypeVar("T")
R = TypeVar("R")
PAGE_ITEMS = 500


class PageOf(msgspec.Struct, Generic[T], frozen=True):
    """One page. `next` is the cursor of the following page, None at the end; `total` counts the whole list."""

    items: tuple[T, ...]
    next: str | None
    total: int


class Listing(Generic[T]):
    """A list at the head, asked for when it is read: `async for`, `await .all()`, `await .page(...)`.

    Iteration asks for the next page when it gets there: items that come or go meanwhile may or may not be seen.
    """

    def __init__(self, transport: Transport, path: str, item: type[T], query: Query) -> None:
        self._transport = transport
        self._path = path
        self._item = item
        self._query = query

    async def page(self, *, limit: int | None = None, cursor: str | None = None) -> PageOf[T]:
        """One page. limit: at most 500; None: what the head thinks right (100)."""
        query = {**self._query, "limit": limit, "cursor": cursor}
        raw = await self._transport.request("GET", self._path, Page, query=query)
        items = tuple(msgspec.json.decode(item, type=self._item) for item in raw.items)
        return PageOf(items, raw.next, raw.total)

    async def all(self, *, at_most: int | None = None) -> list[T]:
        """The items, at most so many."""
        found: list[T] = []
        cursor: str | None = None
        while at_most is None or len(found) < at_most:
            limit = PAGE_ITEMS if at_most is None else min(PAGE_ITEMS, at_most - len(found))
            page = await self.page(limit=limit, cursor=cursor)
            found += page.items
            cursor = page.next
            if cursor is None:
                break
        return found

    async def __aiter__(self) -> AsyncIterator[T]:
        cursor: str | None = None
        while True:
            page = await self.page(limit=PAGE_ITEMS, cursor=cursor)
            for item in page.items:
                yield item
            cursor = page.next
            if cursor is None:
                return


class Runner(Protocol):
    """What runs a coroutine to its end from a program without a loop."""

    def __call__(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Its result, or what it raises."""
        ...


class ListingSync(Generic[T]):
    """The same for programs without a loop: `for`, `.all()`, `.page(...)`."""

    def __init__(self, listing: Listing[T], run: Runner) -> None:
        self._listing = listing
        self._run = run

    def page(self, *, limit: int | None = None, cursor: str | None = None) -> PageOf[T]:
        """One page. limit: at most 500; None: what the head thinks right (100)."""
        return self._run(self._listing.page(limit=limit, cursor=cursor))

    def all(self, *, at_most: int | None = None) -> list[T]:
        """The items, at most so many."""
        return self._run(self._listing.all(at_most=at_most))

    def __iter__(self) -> Iterator[T]:
        cursor: str | None = None
        while True:
            page = self.page(limit=PAGE_ITEMS, cursor=cursor)
            yield from page.items
            cursor = page.next
            if cursor is None:
                return
