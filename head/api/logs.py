"""/replicas/{id}/logs: what an engine writes, streamed as text from its node."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated

from aiohttp import web
from msgspec import Meta

from common import limits
from common.errors import HerderError
from head.api.call import Call
from head.api.routes import PREFIX, Media, Query, Route
from head.api.services import find_replica

TAG = "services"


class LogsQuery(Query, frozen=True, kw_only=True):
    """Which part of a log."""

    follow: Annotated[bool, Meta(description="Go on with what is written from now on.")] = False
    tail: Annotated[int, Meta(ge=0, le=100_000, description="The last lines to begin with.")] = 100
    run: Annotated[
        int, Meta(ge=0, lt=limits.LOG_RUNS_KEPT, description="0: the present run; 1: the one before; and so on.")
    ] = 0


async def logs(call: Call) -> web.StreamResponse:
    query = call.query(LogsQuery)
    replica = find_replica(await call.read(), call.path("id"))
    chunks = call.context.sessions.open_log(replica.id, query.run, query.tail, query.follow)
    async with aclosing(chunks):  # type: ignore[type-var]
        # The first piece decides between an error answer and a stream, which can no longer say what went wrong.
        first = await anext(chunks, None)
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8", "X-Accel-Buffering": "no"})
        await response.prepare(call.request)
        try:
            if first is not None:
                await _write(response, first.data)
            async for chunk in chunks:
                if not call.is_welcome:  # revoked or expired since
                    break
                await _write(response, chunk.data)
        except HerderError as error:
            await _write(response, f"\n[herder: the log ends here: {error.message}]\n")
        except (ConnectionError, TimeoutError):
            call.cut()  # the reader is gone or takes nothing
    return response


async def _write(response: web.StreamResponse, text: str) -> None:
    if text:
        async with asyncio.timeout(limits.STREAM_WRITE_S):
            await response.write(text.encode())


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/replicas/{{id}}/logs",
        logs,
        "viewer",
        TAG,
        "Read an engine's log",
        Media("text/plain", "The log as text, as it comes.", is_stream=True),
        query=LogsQuery,
        codes=("not_found", "node_unreachable", "timed_out", "too_many"),
    ),
)
