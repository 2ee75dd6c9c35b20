"""?wait=SECONDS: waits for an outcome by the change feed, never by polling.

One subscription serves every waiting request: each event wakes those who wait for its object, and they look at the
state themselves. When the feed drops us for reading too slowly, everybody looks once and we subscribe again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from common.errors import HerderError
from head.context import HeadContext
from head.core.state import State
from herder.types import Event

log = logging.getLogger(__name__)

WAITERS = 10_000  # requests that wait at once; beyond it they are answered without waiting
_RETRY_S = 1.0


class Waiters:
    """Who waits for which object."""

    def __init__(self, context: HeadContext) -> None:
        self._context = context
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._count = 0
        self._is_closed = False

    async def run(self) -> None:
        """Follows the feed until it ends for good; one task of the application."""
        while True:
            try:
                subscription = self._context.feed.subscribe()
            except HerderError as error:  # closed, or full for the moment
                log.warning("waiting requests cannot follow the events: %s", error.message)
                self._wake_all()
                await asyncio.sleep(_RETRY_S)
                continue
            self._wake_all()
            try:
                async for event in subscription:
                    self._wake(event)
            finally:
                subscription.close()
            if not subscription.is_overrun:
                self.close()
                return

    def close(self) -> None:
        """Lets everybody go with what is known now."""
        self._is_closed = True
        self._wake_all()

    async def until(self, reference: str, is_done: Callable[[State], bool], seconds: float) -> bool:
        """Waits until the state says so, at most so long. reference: "kind:key" of the object that will tell."""
        state = self._context.driver.state
        if seconds <= 0 or self._count >= WAITERS:
            return is_done(state)
        news = asyncio.Event()
        self._waiting.setdefault(reference, set()).add(news)
        self._count += 1
        try:
            async with asyncio.timeout(seconds):
                while not is_done(state) and not self._is_closed:
                    await news.wait()
                    news.clear()
        except TimeoutError:
            pass  # the answer then shows how far it is
        finally:
            self._count -= 1
            waiting = self._waiting[reference]
            waiting.discard(news)
            if not waiting:
                del self._waiting[reference]
        await self._context.driver.durable()
        return is_done(state)

    def _wake(self, event: Event) -> None:
        for news in self._waiting.get(f"{event.kind}:{event.key}", ()):
            news.set()
        if event.kind == "replica":
            for news in self._waiting.get(f"service:{event.key.rpartition('-')[0]}", ()):
                news.set()

    def _wake_all(self) -> None:
        for waiting in self._waiting.values():
            for news in waiting:
                news.set()
