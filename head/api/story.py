"""/story and /why: what happened to something, from the journal, and why it is as it is."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from common import limits
from common.errors import Internal, NotFound
from head.api.call import Call
from head.api.pages import decode_cursor, encode_cursor
from head.api.routes import PREFIX, REST, PageOf, Query, Route
from head.core.events import WhyRequested
from herder import types as api

TAG = "story"


class StoryQuery(Query, frozen=True, kw_only=True):
    """Which lines of a story."""

    limit: Annotated[int, Meta(ge=1, le=limits.PAGE_ITEMS, description="Lines on a page.")] = limits.PAGE_ITEMS
    cursor: Annotated[str, Meta(max_length=2_048, description="`next` of the page before: goes back in time.")] = ""
    kind: Annotated[str, Meta(max_length=32, description="Only lines about objects of this kind.")] = ""


async def story(call: Call) -> web.StreamResponse:
    query, subject = call.query(StoryQuery), call.path("id")[:600]
    name = f"story:{subject}"
    after = decode_cursor(name, query.cursor)
    await call.read()
    lines = await call.context.journal.story(
        subject, kind=query.kind, before=after[0] if after else 0, limit=query.limit
    )
    if not lines and after is None:
        raise NotFound(
            f"nothing is known of {subject[:80]!r}",
            hint="a request id, job id, model, node, service, replica or key id; old lines are pruned",
        )
    is_full = len(lines) == query.limit
    following = encode_cursor(name, (lines[0].revision, "") if is_full else None)
    return call.listing(lines, following, len(lines))


async def why(call: Call) -> web.StreamResponse:
    reply = await call.submit(WhyRequested, kind=call.path("kind"), key=call.path("id"))
    if not isinstance(reply.value, api.Why):
        raise Internal("the question was not answered", kind=call.path("kind"))
    return call.answer(reply.value)


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/story/{{id:{REST}}}",
        story,
        "viewer",
        TAG,
        "What happened to something",
        PageOf(api.StoryLine),
        query=StoryQuery,
        codes=("not_found",),
        description="Every recorded change about a key, or caused by a request id, oldest first on each page; "
        "the first page holds the latest lines, `next` goes back in time.",
    ),
    Route(
        "GET",
        f"{PREFIX}/why/{{kind}}/{{id:{REST}}}",
        why,
        "viewer",
        TAG,
        "Why something is as it is",
        api.Why,
        codes=("not_found", "service_not_found", "job_not_found", "copy_not_found", "model_not_found"),
        description="For a service that is not placed: every node that was looked at, with reason and numbers.",
    ),
)
