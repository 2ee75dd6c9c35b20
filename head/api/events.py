"""/events: every change as it becomes durable, over SSE or a websocket, with resume from an id.

A reader that comes back says the last id it saw. What is no longer in memory is read from the journal's history; when
even that does not reach back, or the id is one that this head never gave, the stream begins with `reset`: the reader
has missed something and reads anew what it shows. A reader too slow for its queue is dropped and resumes the same
way. Quiet streams carry a comment (SSE) or a ping now and then, so that both ends notice a dead connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web
from msgspec import Meta

from common import limits
from common.errors import InvalidValue
from head.api.call import Call
from head.api.routes import PREFIX, Media, Query, Route
from head.feed import HIDDEN_KINDS, Subscription
from herder import types as api

TAG = "events"
HISTORY_ROWS = 1_000  # per look into the journal
_encoder = msgspec.json.Encoder()


class EventsQuery(Query, frozen=True, kw_only=True):
    """Which events."""

    after: (
        Annotated[
            int, Meta(ge=0, description="Resume after this id; the header Last-Event-ID wins. Left out: from now on.")
        ]
        | None
    ) = None
    kind: Annotated[
        str, Meta(max_length=256, description="Only these kinds of objects, with commas between: `job,copy`.")
    ] = ""
    key: Annotated[str, Meta(max_length=512, description="Only the object of this key.")] = ""


class Wanted:
    """The filter of a stream."""

    def __init__(self, query: EventsQuery) -> None:
        self._kinds = frozenset(part.strip() for part in query.kind.split(",") if part.strip())
        self._key = query.key

    def __contains__(self, event: api.Event) -> bool:
        return (not self._kinds or event.kind in self._kinds) and (not self._key or event.key == self._key)


async def stream(call: Call) -> web.StreamResponse:
    """Server-sent events."""
    query = call.query(EventsQuery)
    after = _last_id(call, query)
    subscription = call.context.feed.subscribe(after)
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )
    try:
        await response.prepare(call.request)
        await _write(response, b"retry: 2000\n\n")
        await _pump(
            call,
            subscription,
            Wanted(query),
            after,
            send=lambda event: _write(response, _sse(event)),
            idle=lambda: _write(response, b": still here\n\n"),
        )
    except (ConnectionError, TimeoutError):
        call.cut()  # the reader is gone or takes nothing; it resumes by its last id
    finally:
        subscription.close()
    return response


async def socket(call: Call) -> web.StreamResponse:
    """The same over a websocket: one JSON object per message; `reset` as {"reset": true}."""
    query = call.query(EventsQuery)
    after = _last_id(call, query)
    subscription = call.context.feed.subscribe(after)
    ws = web.WebSocketResponse(max_msg_size=1_024, compress=False, timeout=2.0)
    try:
        await ws.prepare(call.request)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(_until_closed(ws))
            reader.add_done_callback(lambda _: subscription.close())
            await _pump(
                call,
                subscription,
                Wanted(query),
                after,
                send=lambda event: _in_time(ws.send_str(_frame(event))),
                idle=lambda: _in_time(ws.ping()),
            )
            reader.cancel()
    except* (ConnectionError, TimeoutError):
        call.cut()  # the reader is gone or takes nothing; it resumes by its last id
    finally:
        subscription.close()
    if not ws.closed and not call.is_cut:
        code = WSCloseCode.TRY_AGAIN_LATER if subscription.is_overrun else WSCloseCode.GOING_AWAY
        await ws.close(code=code)
    return ws


async def _pump(
    call: Call,
    subscription: Subscription,
    wanted: Wanted,
    after: int | None,
    *,
    send: Callable[[api.Event | None], Awaitable[None]],
    idle: Callable[[], Awaitable[None]],
) -> None:
    """Sends history, then what the feed brings, until either side ends. None is sent for `reset`."""
    last_id = after or 0
    if last_id > call.context.feed.last_id:  # an id of another time: of another cluster, or from before a restore
        await send(None)
        last_id = 0
    if subscription.has_missed:
        async for event in _history(call, last_id):
            if event is None or event in wanted:
                await send(event)
            last_id = event.id if event is not None else last_id
    while True:
        try:
            async with asyncio.timeout(limits.KEEP_ALIVE_S):
                event = await anext(subscription)
        except TimeoutError:
            if not call.is_welcome:
                return
            await idle()
            continue
        except StopAsyncIteration:
            return
        if not call.is_welcome:  # revoked or expired since: what follows is not for this reader
            return
        if event.id > last_id and event in wanted:
            await send(event)


async def _history(call: Call, after: int) -> AsyncIterator[api.Event | None]:
    """What the journal still holds after an id, oldest first; None first when it holds not everything."""
    newest = call.context.feed.last_id
    is_first = True
    while after < newest:
        lines = await call.context.journal.history(after=after, limit=HISTORY_ROWS)
        if is_first and (not lines or lines[0].revision > after + 1):
            yield None
        is_first = False
        if not lines:
            return
        for line in lines:
            if line.kind not in HIDDEN_KINDS:
                yield api.Event(line.revision, line.at_ms, line.what, line.kind, line.key, line.cause, line.detail)
        after = lines[-1].revision


def _last_id(call: Call, query: EventsQuery) -> int | None:
    text = call.request.headers.get("Last-Event-ID", "").strip()
    if not text:
        return query.after
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidValue("Last-Event-ID: not an id of this stream", hint="a number, as in the `id:` lines")
    return int(text)


def _sse(event: api.Event | None) -> bytes:
    if event is None:
        return b"event: reset\ndata: {}\n\n"
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.what.encode(), _encoder.encode(event))


def _frame(event: api.Event | None) -> str:
    return '{"reset":true}' if event is None else _encoder.encode(event).decode()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    await _in_time(response.write(data))


async def _in_time(sending: Awaitable[None]) -> None:
    async with asyncio.timeout(limits.STREAM_WRITE_S):
        await sending


async def _until_closed(ws: web.WebSocketResponse) -> None:
    async for message in ws:
        if message.type == WSMsgType.ERROR:
            return


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/events",
        stream,
        "viewer",
        TAG,
        "Follow changes (server-sent events)",
        Media(
            "text/event-stream",
            "One `api.Event` per message, its id as `id:`; `event: reset` after a gap.",
            is_stream=True,
        ),
        query=EventsQuery,
        codes=("too_many",),
        description="Resumes with the header `Last-Event-ID`. `reset` says that events were missed for good: read "
        "anew what you show.",
    ),
    Route(
        "GET",
        f"{PREFIX}/events/ws",
        socket,
        "viewer",
        TAG,
        "Follow changes (websocket)",
        Media("application/json", 'One `api.Event` per message; `{"reset": true}` after a gap.', is_stream=True),
        query=EventsQuery,
        status=101,
        codes=("too_many",),
    ),
)
