"""The event stream: order, filters, resume from memory and from the journal, resets, and readers that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from common import limits
from head.core.objects import Job, Model
from herder import types as api
from tests.doubles.api_head import ApiHead, api_head, run, until


class Frame(msgspec.Struct):
    """One message of a stream."""

    id: int | None
    event: str
    data: bytes


def a_model(name: str) -> Model:
    """A model."""
    return Model(name, "llm", "main", 1, 1)


@asynccontextmanager
async def sse(head: ApiHead, path: str = "/events", last_id: int | None = None) -> AsyncIterator[AsyncIterator[Frame]]:
    """An open stream of frames; comments and `retry` are skipped."""
    headers = {"Authorization": f"Bearer {head.tokens['viewer']}"}
    if last_id is not None:
        headers["Last-Event-ID"] = str(last_id)
    async with head.http.get(f"{head.url}/api/v1{path}", headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream"

        async def frames() -> AsyncIterator[Frame]:
            fields: dict[str, str] = {}
            async for line in answer.content:
                text = line.decode().rstrip("\n")
                if text:
                    name, _, value = text.partition(":")
                    fields[name] = value.strip()
                elif "data" in fields:
                    number = int(fields["id"]) if "id" in fields else None
                    yield Frame(number, fields.get("event", ""), fields["data"].encode())
                    fields = {}
                else:
                    fields = {}

        yield frames()


def test_changes_are_followed_in_order(tmp_path: Path) -> None:
    """Each durable change comes once, in order, with its id and in the declared type."""

    async def body() -> None:
        async with api_head(tmp_path) as head, sse(head) as frames:
            await until(lambda: head.context.feed.subscribers == 2)
            await head.put(a_model("a"), a_model("b"))
            for name in ("a", "b"):
                frame = await anext(frames)
                event = msgspec.json.decode(frame.data, type=api.Event)
                assert (event.kind, event.key, event.what) == ("model", name, "put")
                assert (frame.id, frame.event) == (event.id, "put")

    run(body)


def test_streams_are_filtered(tmp_path: Path) -> None:
    """kind= takes several kinds, key= one key."""

    async def body() -> None:
        async with (
            api_head(tmp_path) as head,
            sse(head, "/events?kind=job,node") as jobs,
            sse(head, "/events?key=b&after=0") as b_only,
        ):
            await until(lambda: head.context.feed.subscribers == 3)
            await head.put(a_model("a"), a_model("b"), Job("job-1", "j", "x", "pending", 1, ()))
            assert msgspec.json.decode((await anext(jobs)).data, type=api.Event).key == "job-1"
            assert msgspec.json.decode((await anext(b_only)).data, type=api.Event).key == "b"

    run(body)


async def _keys(frames: AsyncIterator[Frame], count: int) -> list[str]:
    return [msgspec.json.decode((await anext(frames)).data, type=api.Event).key for _ in range(count)]


def test_resume_from_memory(tmp_path: Path) -> None:
    """A reader that was away gets exactly what came after the last id it saw, then goes on."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(*(a_model(f"m{number}") for number in range(6)))
            last = head.context.feed.last_id - 3
            async with sse(head, last_id=last) as frames:
                assert await _keys(frames, 3) == ["m3", "m4", "m5"]
                await head.put(a_model("m6"))
                assert await _keys(frames, 1) == ["m6"]
            async with sse(head, f"/events?after={last + 2}") as frames:
                assert await _keys(frames, 1) == ["m5"]

    run(body)


def _forget(head: ApiHead, kept: int) -> None:
    """Leaves only the newest events in the feed's memory."""
    feed = head.context.feed
    while len(feed._events) > kept:
        feed._forgotten_id = feed._events.popleft().id


def test_resume_from_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory has forgotten comes from the journal's history, without a gap or a repeat."""
    monkeypatch.setattr("head.api.events.HISTORY_ROWS", 2)

    async def body() -> None:
        async with api_head(tmp_path) as head:
            before = head.context.feed.last_id
            await head.put(*(a_model(f"m{number}") for number in range(8)))
            _forget(head, 2)
            async with sse(head, last_id=before) as frames:
                assert await _keys(frames, 8) == [f"m{number}" for number in range(8)]
                await head.put(a_model("m8"))
                assert await _keys(frames, 1) == ["m8"]

    run(body)


def test_a_gap_begins_with_reset(tmp_path: Path) -> None:
    """When even the journal has pruned what was missed, the reader is told before anything else."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            before = head.context.feed.last_id
            await head.put(*(a_model(f"m{number}") for number in range(6)))
            _forget(head, 1)
            journal = head.context.journal
            await journal.ask(
                lambda: journal._connection.execute("DELETE FROM history WHERE revision <= ?", (before + 2,))
            )
            async with sse(head, last_id=before) as frames:
                first = await anext(frames)
                assert (first.event, first.id) == ("reset", None)
                assert await _keys(frames, 4) == ["m2", "m3", "m4", "m5"]
            async with head.http.ws_connect(
                f"{head.url}/api/v1/events/ws?after={before}", headers=_as_viewer(head)
            ) as ws:
                assert (await ws.receive_json(timeout=10)) == {"reset": True}
                assert (await ws.receive_json(timeout=10))["key"] == "m2"

    run(body)


def test_an_id_that_was_never_given_begins_with_reset(tmp_path: Path) -> None:
    """After a restore of an older backup readers hold ids of the future; they must not wait for those in silence."""

    async def body() -> None:
        async with api_head(tmp_path) as head, sse(head, last_id=10**12) as frames:
            assert (await anext(frames)).event == "reset"
            await head.put(a_model("a"))
            assert await _keys(frames, 1) == ["a"]

    run(body)


def _as_viewer(head: ApiHead) -> dict[str, str]:
    return {"Authorization": f"Bearer {head.tokens['viewer']}"}


def test_the_websocket_says_the_same(tmp_path: Path) -> None:
    """One JSON event per message, filtered and resumed like the stream; closing it frees its place."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            url = f"{head.url}/api/v1/events/ws"
            await head.put(a_model("a"), Job("job-1", "j", "x", "pending", 1, ()))
            async with head.http.ws_connect(f"{url}?kind=job&after=0", headers=_as_viewer(head)) as ws:
                event = msgspec.convert(await ws.receive_json(timeout=10), api.Event)
                assert event.key == "job-1"
                await head.put(a_model("b"), Job("job-2", "j", "x", "pending", 1, ()))
                assert (await ws.receive_json(timeout=10))["key"] == "job-2"
                assert head.context.feed.subscribers == 2
            await until(lambda: head.context.feed.subscribers == 1)
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await head.http.ws_connect(url)
            assert refused.value.status == 401

    run(body)


def test_a_reader_that_leaves_frees_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed connection is noticed by the next comment and its subscription ends."""
    monkeypatch.setattr(limits, "KEEP_ALIVE_S", 0.05)

    async def body() -> None:
        async with api_head(tmp_path) as head:
            async with sse(head):
                await until(lambda: head.context.feed.subscribers == 2)
            await until(lambda: head.context.feed.subscribers < 2)
            assert head.context.feed.subscribers == 1  # the head's own

    run(body)


def test_quiet_streams_carry_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing happens a comment line comes now and then."""
    monkeypatch.setattr(limits, "KEEP_ALIVE_S", 0.05)

    async def body() -> None:
        async with (
            api_head(tmp_path) as head,
            head.http.get(f"{head.url}/api/v1/events", headers=_as_viewer(head)) as answer,
        ):
            seen = b""
            while b": still here\n\n" not in seen:
                seen += await answer.content.readany()
            assert seen.startswith(b"retry: ")

    run(body)


def test_a_reader_that_takes_nothing_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow reader's subscription is ended at its bound, and its connection with it; others go on."""
    monkeypatch.setattr(limits, "EVENT_SUBSCRIBER_QUEUE", 8)
    monkeypatch.setattr(limits, "STREAM_WRITE_S", 0.3)

    async def body() -> None:
        async with api_head(tmp_path) as head:
            _, writer = await asyncio.open_connection("127.0.0.1", head.port, limit=1)
            writer.write(
                b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
                + head.tokens["viewer"].encode()
                + b"\r\n\r\n"
            )
            await until(lambda: head.context.feed.subscribers == 2)
            fat: dict[str, Any] = {"x": "y" * 60_000}
            number = 0
            while head.context.feed.subscribers == 2:
                number += 1
                await _publish_fat(head, number, fat)
            assert head.context.feed.subscribers <= 1
            writer.close()
            assert (await head.call("GET", "/health")).status == 200

    run(body)


async def _publish_fat(head: ApiHead, number: int, detail: dict[str, Any]) -> None:
    """Publishes one large event to the readers, and lets them run."""
    from head.core.records import Record

    record = Record(10_000 + number, 1, "model_put", "test", "model", "m", None, detail)
    head.context.feed.publish([record])
    await asyncio.sleep(0)


def test_too_many_readers_are_refused(tmp_path: Path) -> None:
    """Over the limit of readers a new one gets 429, in our form."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            head.context.feed._subscribers_max = 1
            answer = await head.call("GET", "/events")
            assert (answer.status, answer.code) == (429, "too_many")
            assert answer.headers["Retry-After"] == "1"

    run(body)


def test_a_revoked_reader_hears_nothing_more(tmp_path: Path) -> None:
    """A stream that was opened with a good key ends at the next event once that key is revoked."""

    async def body() -> None:
        async with api_head(tmp_path) as head, sse(head) as frames:
            await head.put(a_model("before"))
            assert await _keys(frames, 1) == ["before"]
            key = head.state.keys["key-viewer"]
            await head.put(msgspec.structs.replace(key, revoked_ms=1, is_revoked=True))
            await head.put(a_model("after"))
            assert [frame async for frame in frames] == []

    run(body)
