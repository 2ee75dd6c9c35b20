"""The change feed: every durable change, in order, resumable by id."""

from __future__ import annotations

import asyncio

import pytest

from common import limits
from common.errors import TooMany
from head.core.objects import Idempotent
from head.core.records import Record
from head.feed import Feed, Subscription
from herder.types import StoryLine
from tests.doubles.head_shell import NOW_MS, record


def feed_with(*revisions: int, backlog: int = 100) -> Feed:
    """A feed that has published these."""
    feed = Feed(backlog)
    for revision in revisions:
        feed.publish([record(revision, f"m{revision}")])
    return feed


async def waiting_ids(subscription: Subscription) -> list[int]:
    """Ids of what can be read now."""
    subscription.close()
    return [event.id async for event in subscription]


async def test_readers_get_what_comes() -> None:
    """From now on by default, as whole events."""
    feed = feed_with(1)
    subscription = feed.subscribe()
    feed.publish([record(2, "a", note="x"), record(3, "b")])
    event = await anext(subscription)
    assert (event.id, event.at_ms, event.what, event.kind, event.key, event.cause, event.detail) == (
        2, NOW_MS + 2, "model_registered", "model", "a", "req-1", {"note": "x"},
    )  # fmt: skip
    assert await waiting_ids(subscription) == [3]


async def test_a_reader_that_waits_is_woken() -> None:
    """An event published later reaches a reader that is already waiting."""
    feed = feed_with()
    subscription = feed.subscribe()
    waiting = asyncio.ensure_future(anext(subscription))
    await asyncio.sleep(0)
    feed.publish([record(1, "a")])
    assert (await waiting).id == 1
    feed.close()
    with pytest.raises(StopAsyncIteration):
        await anext(subscription)


async def test_resume_by_id() -> None:
    """After an id come exactly the later ones; whoever was away too long is told."""
    feed = feed_with(*range(1, 11), backlog=5)
    resumed = feed.subscribe(after=7)
    assert not resumed.has_missed
    assert await waiting_ids(resumed) == [8, 9, 10]
    assert not feed.subscribe(after=5).has_missed
    late = feed.subscribe(after=4)
    assert late.has_missed
    assert await waiting_ids(late) == [6, 7, 8, 9, 10]
    assert feed.last_id == 10


async def test_a_restart_keeps_the_feed() -> None:
    """Primed from the journal's history it resumes as before; what the history no longer holds is missed."""
    lines = [StoryLine(NOW_MS, number, "x", "model", "a", "c") for number in (4, 5, 6)]
    complete, pruned = Feed(), Feed()
    complete.prime(lines, is_complete=True)
    pruned.prime(lines)
    assert not complete.subscribe(after=0).has_missed
    assert pruned.subscribe(after=2).has_missed
    assert not pruned.subscribe(after=3).has_missed
    assert await waiting_ids(pruned.subscribe(after=4)) == [5, 6]


async def test_slow_readers_are_closed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader with a full queue ends, can still read what it has, and resumes from there."""
    monkeypatch.setattr(limits, "EVENT_SUBSCRIBER_QUEUE", 3)
    feed = feed_with()
    slow, quick = feed.subscribe(), feed.subscribe()
    for revision in range(1, 6):
        feed.publish([record(revision, "a")])
        assert (await anext(quick)).id == revision
    assert slow.is_overrun
    assert feed.subscribers == 1
    assert await waiting_ids(slow) == [1, 2, 3]
    assert await waiting_ids(feed.subscribe(after=3)) == [4, 5]


async def test_a_long_backlog_does_not_count_as_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming far behind gives the whole backlog and room for what comes meanwhile."""
    monkeypatch.setattr(limits, "EVENT_SUBSCRIBER_QUEUE", 3)
    feed = feed_with(*range(1, 51))
    subscription = feed.subscribe(after=0)
    feed.publish([record(51, "a")])
    assert await waiting_ids(subscription) == list(range(1, 52))


async def test_readers_are_limited() -> None:
    """Beyond the limit a reader is refused until another leaves."""
    feed = Feed(subscribers_max=1)
    first = feed.subscribe()
    with pytest.raises(TooMany):
        feed.subscribe()
    first.close()
    feed.subscribe()


async def test_bookkeeping_is_no_news() -> None:
    """Idempotency keys stay out of the feed."""
    feed = feed_with()
    subscription = feed.subscribe()
    kept = Idempotent("a:b", "0", NOW_MS)
    feed.publish([Record(1, NOW_MS, "x", "c", "idempotent", kept.key, kept), record(2, "a")])
    assert await waiting_ids(subscription) == [2]
