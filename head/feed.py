"""The change feed: one `api.Event` per durable record, in order, for as many readers as want to follow.

The last EVENT_BACKLOG events stay in memory, so a reader that was away resumes by the id of the last one it saw; at
start the backlog is filled from the journal, so a restart of the head interrupts nobody. A reader too slow for its
queue is closed and resumes the same way. Bookkeeping of idempotency keys is not news and is left out.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable

from common import limits
from common.errors import TooMany
from head.core.records import Record
from herder.types import Event, StoryLine

HIDDEN_KINDS = frozenset({"idempotent"})


class Subscription:
    """One reader: `async for event in subscription`. It ends when closed, by either side.

    has_missed: events between `after` and the first one given are no longer in memory. is_overrun: it was closed
    because it read too slowly.
    """

    def __init__(self, feed: Feed, backlog: Iterable[Event], *, has_missed: bool) -> None:
        self.has_missed = has_missed
        self.is_overrun = False
        self.is_closed = False
        self._feed = feed
        self._waiting: deque[Event] = deque(backlog)
        self._room = limits.EVENT_SUBSCRIBER_QUEUE + len(self._waiting)
        self._news = asyncio.Event()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self.is_closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    def offer(self, events: list[Event]) -> None:
        """Gives events to the reader, or closes it when they would not fit."""
        if len(self._waiting) + len(events) > self._room:
            self.is_overrun = True
            self.close()
            return
        self._waiting.extend(events)
        self._news.set()

    def close(self) -> None:
        """Ends the subscription; what waits can still be read."""
        self.is_closed = True
        self._news.set()
        self._feed.forget(self)


class Feed:
    """The events and who follows them."""

    def __init__(self, backlog: int = limits.EVENT_BACKLOG, subscribers_max: int = limits.EVENT_SUBSCRIBERS) -> None:
        self._events: deque[Event] = deque(maxlen=backlog)
        self._subscribers: dict[Subscription, None] = {}
        self._subscribers_max = subscribers_max
        self._forgotten_id = 0  # of the newest event that is no longer in memory
        self._is_closed = False

    @property
    def last_id(self) -> int:
        """Id of the newest event; 0 when there was none."""
        return self._events[-1].id if self._events else self._forgotten_id

    @property
    def subscribers(self) -> int:
        """How many follow."""
        return len(self._subscribers)

    def prime(self, lines: Iterable[StoryLine], *, is_complete: bool = False) -> None:
        """Fills the backlog from the journal's history, oldest first. is_complete: the history holds no more."""
        lines = list(lines)
        if lines and not is_complete:
            self._forgotten_id = lines[0].revision - 1
        for line in lines:
            if line.kind not in HIDDEN_KINDS:
                self._append(Event(line.revision, line.at_ms, line.what, line.kind, line.key, line.cause, line.detail))

    def publish(self, records: Iterable[Record]) -> None:
        """Tells every reader about durable records."""
        events = [
            Event(record.revision, record.at_ms, record.what, record.kind, record.key, record.cause, record.detail)
            for record in records
            if record.kind not in HIDDEN_KINDS
        ]
        if not events:
            return
        for event in events:
            self._append(event)
        for subscription in tuple(self._subscribers):
            subscription.offer(events)

    def subscribe(self, after: int | None = None) -> Subscription:
        """Follows from the event after this id, or from now on. Raises: TooMany."""
        if self._is_closed or len(self._subscribers) >= self._subscribers_max:
            raise TooMany("too many readers follow the events", hint="close some, or try again later")
        backlog: list[Event] = []
        if after is not None:
            events = list(self._events)
            backlog = events[bisect_right(events, after, key=lambda event: event.id) :]
        has_missed = after is not None and after < self._forgotten_id
        subscription = Subscription(self, backlog, has_missed=has_missed)
        self._subscribers[subscription] = None
        return subscription

    def forget(self, subscription: Subscription) -> None:
        """Takes a closed reader off the list."""
        self._subscribers.pop(subscription, None)

    def close(self) -> None:
        """Ends every subscription."""
        self._is_closed = True
        for subscription in tuple(self._subscribers):
            subscription.close()

    def _append(self, event: Event) -> None:
        if len(self._events) == self._events.maxlen:
            self._forgotten_id = self._events[0].id
        self._events.append(event)
