"""/nodes and /devices: what the agents brought, and what operators ask of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Literal

from aiohttp import web
from msgspec import Meta

from common import ids
from common.errors import NodeNotFound
from head.api import render_nodes
from head.api.call import Call, near
from head.api.models import ForceQuery
from head.api.pages import OrderKey, decode_cursor, encode_cursor
from head.api.routes import PREFIX, ListQuery, PageOf, Route
from head.core import node_facts
from head.core.events import (
    CordonRequested,
    DrainRequested,
    RemoveNodeRequested,
    ResetIdentityRequested,
    UpdateNodeRequested,
)
from head.core.objects import Node
from head.core.state import State
from herder import types as api

TAG = "nodes"


class NodesQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of nodes."""

    state: Annotated[api.NodeState | None, Meta(description="Only nodes in this state.")] = None
    label: Annotated[str, Meta(max_length=257, description="Only nodes with this label: `name` or `name=value`.")] = ""


class DevicesQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of devices."""

    node: Annotated[str, Meta(max_length=63, description="Only devices of this node.")] = ""
    kind: Annotated[Literal["disk", "dram", "gpu"] | None, Meta(description="Only devices of this kind.")] = None


def find(state: State, node_id: str) -> Node:
    """The node of an id. Raises: InvalidName, NodeNotFound with the nearest ids."""
    ids.check_node_id(node_id)
    node = state.nodes.get(node_id)
    if node is None:
        raise NodeNotFound(f"no node {node_id!r}", hint=near(node_id, state.nodes, "GET /api/v1/nodes lists them"))
    return node


async def index(call: Call) -> web.StreamResponse:
    query, state, now_ms = call.query(NodesQuery), await call.read(), call.now_ms
    name, has_value, value = query.label.partition("=")

    def wants(node_id: str) -> bool:
        if query.state is not None and node_facts.node_state(state, node_id, now_ms) != query.state:
            return False
        if not name:
            return True
        node = state.nodes[node_id]
        found = node.labels.get(name, node.agent_labels.get(name))
        return found is not None and (not has_value or found == value)

    return await call.page(
        "nodes",
        query,
        call.lists["node"].order(),
        lambda node_id: render_nodes.node_row(state, state.nodes[node_id], now_ms),
        wants=wants if query.state or name else None,
    )


async def show(call: Call) -> web.StreamResponse:
    find(await call.read(), call.path("id"))
    return _shown(call)


async def update(call: Call) -> web.StreamResponse:
    node = find(await call.read(), call.path("id"))
    await call.submit(UpdateNodeRequested, node=node.id, body=call.body(api.UpdateNode))
    return _shown(call)


async def remove(call: Call) -> web.StreamResponse:
    node = find(await call.read(), call.path("id"))
    await call.submit(RemoveNodeRequested, node=node.id, force=call.query(ForceQuery).force)
    call.changed = f"node:{node.id}"
    return call.answer(api.Deleted("node", node.id, node.id not in call.state.nodes))


async def cordon(call: Call) -> web.StreamResponse:
    return await _cordon(call, is_cordoned=True)


async def uncordon(call: Call) -> web.StreamResponse:
    return await _cordon(call, is_cordoned=False)


async def _cordon(call: Call, *, is_cordoned: bool) -> web.StreamResponse:
    node = find(await call.read(), call.path("id"))
    await call.submit(CordonRequested, node=node.id, is_cordoned=is_cordoned)
    return _shown(call)


async def drain(call: Call) -> web.StreamResponse:
    node = find(await call.read(), call.path("id"))
    body = call.body(api.DrainNode) if call.raw_body else api.DrainNode()
    await call.submit(DrainRequested, node=node.id, body=body)
    return _shown(call)


async def reset_identity(call: Call) -> web.StreamResponse:
    node = find(await call.read(), call.path("id"))
    await call.submit(ResetIdentityRequested, node=node.id)
    return _shown(call)


async def devices(call: Call) -> web.StreamResponse:
    query, state = call.query(DevicesQuery), await call.read()
    if query.node:
        find(state, query.node)
    node_ids = [query.node] if query.node else [node_id for _, node_id in call.lists["node"].order()]
    after = decode_cursor("devices", query.cursor)
    found = list(islice(_devices_after(state, node_ids, after, query.kind), query.limit + 1))
    following = found[query.limit - 1][0] if len(found) > query.limit else None
    total = sum(_device_count(state.nodes[node_id], query.kind) for node_id in node_ids)
    return call.listing([view for _, view in found[: query.limit]], encode_cursor("devices", following), total)


def _devices_after(
    state: State, node_ids: list[str], after: OrderKey | None, kind: str | None
) -> Iterator[tuple[OrderKey, api.DeviceView]]:
    """Devices with their place in the list: by node, then disk, dram and the GPUs by index."""
    for node_id in node_ids[bisect_left(node_ids, after[1]) if after else 0 :]:
        for place, view in enumerate(render_nodes.device_views(state, state.nodes[node_id])):
            is_past = after is None or after[1] != node_id or place > after[0]
            if is_past and kind in (None, view.kind):
                yield (place, node_id), view


def _device_count(node: Node, kind: str | None) -> int:
    gpus = len(node.inventory.gpus)
    return {None: 2 + gpus, "gpu": gpus}.get(kind, 1)


def _shown(call: Call) -> web.StreamResponse:
    node = find(call.state, call.path("id"))
    return call.answer(render_nodes.node_view(call.state, node, call.now_ms))


_NODE = f"{PREFIX}/nodes/{{id}}"
_MISSING = ("node_not_found", "invalid_name")
ROUTES = (
    Route("GET", f"{PREFIX}/nodes", index, "viewer", TAG, "List nodes", PageOf(api.NodeView), query=NodesQuery),
    Route("GET", _NODE, show, "viewer", TAG, "Show a node", api.NodeView, codes=_MISSING),
    Route(
        "PATCH",
        _NODE,
        update,
        "operator",
        TAG,
        "Label a node",
        api.NodeView,
        body=api.UpdateNode,
        codes=_MISSING,
    ),
    Route(
        "DELETE",
        _NODE,
        remove,
        "admin",
        TAG,
        "Forget a node",
        api.Deleted,
        query=ForceQuery,
        codes=(*_MISSING, "in_use", "conflict"),
        description="Its copies and replicas are forgotten with it. A node that is still there says hello again.",
    ),
    Route(
        "POST",
        f"{_NODE}/cordon",
        cordon,
        "operator",
        TAG,
        "Place nothing new on a node",
        api.NodeView,
        codes=_MISSING,
    ),
    Route(
        "POST",
        f"{_NODE}/uncordon",
        uncordon,
        "operator",
        TAG,
        "Let a node take new work again",
        api.NodeView,
        codes=_MISSING,
        description="Also ends a drain.",
    ),
    Route(
        "POST",
        f"{_NODE}/drain",
        drain,
        "operator",
        TAG,
        "Move work away from a node",
        api.NodeView,
        body=api.DrainNode,
        is_body_optional=True,
        codes=_MISSING,
    ),
    Route(
        "POST",
        f"{_NODE}/reset-identity",
        reset_identity,
        "admin",
        TAG,
        "Let a node come with a new secret",
        api.NodeView,
        codes=_MISSING,
        description="For a node whose agent has lost its state directory: the next agent that says its id binds it.",
    ),
    Route(
        "GET",
        f"{PREFIX}/devices",
        devices,
        "viewer",
        TAG,
        "List devices",
        PageOf(api.DeviceView),
        query=DevicesQuery,
        codes=_MISSING,
    ),
)
