"""/copies, /pin and /unpin: which model is on which device, and what must stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from aiohttp import web
from msgspec import Meta

from common import ids
from common.errors import CopyNotFound
from head.api import render
from head.api.call import Call
from head.api.pages import OrderKey
from head.api.routes import PREFIX, ListQuery, PageOf, Route
from head.core.events import PinRequested, RequestEvent, UnpinRequested
from head.core.objects import Copy
from herder import types as api

TAG = "copies"


class CopiesQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of copies."""

    model: Annotated[str, Meta(max_length=192, description="Only copies of this model.")] = ""
    node: Annotated[str, Meta(max_length=63, description="Only copies on this node.")] = ""
    device: Annotated[str, Meta(max_length=96, description="Only copies on this device.")] = ""
    state: Annotated[api.CopyState | None, Meta(description="Only copies in this state.")] = None


async def index(call: Call) -> web.StreamResponse:
    query, state, now_ms = call.query(CopiesQuery), await call.read(), call.now_ms
    device = str(ids.parse_device(query.device)) if query.device else ""
    node = query.node or device.partition(":")[0]
    order: Sequence[OrderKey]
    if query.model:
        order = sorted((0, key) for key in state.copies_by_model.get(query.model, ()))
    elif node:
        order = sorted((0, key) for key in state.copies_by_node.get(node, ()))
    else:
        order = call.lists["copy"].order()

    def wants(key: str) -> bool:
        copy = state.copies[key]
        return (
            (not node or copy.device.partition(":")[0] == node)
            and (not device or copy.device == device)
            and (query.state is None or render.state_of_copy(state, copy) == query.state)
        )

    return await call.page(
        "copies",
        query,
        order,
        lambda key: render.copy_view(state, state.copies[key], now_ms),
        wants=wants if node or query.state else None,
    )


async def pin(call: Call) -> web.StreamResponse:
    return await _pin(call, PinRequested)


async def unpin(call: Call) -> web.StreamResponse:
    return await _pin(call, UnpinRequested)


async def _pin(call: Call, event: type[RequestEvent]) -> web.StreamResponse:
    reply = await call.submit(event, body=call.body(api.Pin))
    copy = call.state.copies.get(reply.reference.removeprefix("copy:"))
    if copy is None:
        copy = _find(call, call.body(api.Pin))
    return call.answer(render.copy_view(call.state, copy, call.now_ms))


def _find(call: Call, body: api.Pin) -> Copy:
    device = str(ids.parse_device(body.device))
    for key in call.state.copies_by_model.get(body.model_name, ()):
        if call.state.copies[key].device == device:
            return call.state.copies[key]
    raise CopyNotFound(f"no copy of {body.model_name!r} on {device}")


_CODES = ("copy_not_found", "model_not_found", "invalid_device", "invalid_name")
ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/copies",
        index,
        "viewer",
        TAG,
        "List copies",
        PageOf(api.CopyView),
        query=CopiesQuery,
        codes=("invalid_device",),
    ),
    Route(
        "POST",
        f"{PREFIX}/pin",
        pin,
        "operator",
        TAG,
        "Keep a copy from eviction",
        api.CopyView,
        body=api.Pin,
        codes=_CODES,
    ),
    Route(
        "POST",
        f"{PREFIX}/unpin",
        unpin,
        "operator",
        TAG,
        "Let a copy be evicted again",
        api.CopyView,
        body=api.Pin,
        codes=_CODES,
    ),
)
