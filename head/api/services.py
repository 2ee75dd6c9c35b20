"""/services and /replicas: desired state, and the engines that run for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from common import ids
from common.errors import NotFound, ServiceNotFound
from head.api import render
from head.api.call import Call, near
from head.api.pages import OrderKey
from head.api.routes import PREFIX, ListQuery, PageOf, Route, WaitQuery
from head.core import service_views
from head.core.events import CreateServiceRequested, DeleteServiceRequested
from head.core.objects import Replica, Service
from head.core.state import State
from herder import types as api

TAG = "services"


class ServicesQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of services."""

    model: Annotated[str, Meta(max_length=192, description="Only services of this model.")] = ""
    state: Annotated[api.ServiceState | None, Meta(description="Only services in this state.")] = None


class ReplicasQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of replicas."""

    service: Annotated[str, Meta(max_length=192, description="Only replicas of this service.")] = ""
    model: Annotated[str, Meta(max_length=192, description="Only replicas of this model.")] = ""
    node: Annotated[str, Meta(max_length=63, description="Only replicas on this node.")] = ""
    state: Annotated[api.ReplicaState | None, Meta(description="Only replicas in this state.")] = None


def find(state: State, name: str) -> Service:
    """The service of a name. Raises: InvalidName, ServiceNotFound with the nearest names."""
    ids.check_service_name(name)
    service = state.services.get(name)
    if service is None:
        hint = near(name, state.services, "GET /api/v1/services lists them")
        raise ServiceNotFound(f"no service {name!r}", hint=hint)
    return service


def find_replica(state: State, replica_id: str) -> Replica:
    """The replica of an id. Raises: NotFound with the nearest ids."""
    replica = state.replicas.get(replica_id)
    if replica is None:
        hint = near(replica_id, state.replicas, "GET /api/v1/replicas lists them")
        raise NotFound(f"no replica {replica_id[:80]!r}", hint=hint)
    return replica


async def index(call: Call) -> web.StreamResponse:
    query, state = call.query(ServicesQuery), await call.read()

    def wants(name: str) -> bool:
        service = state.services[name]
        if query.model and service.model != query.model:
            return False
        return query.state is None or service_views.service_state(state, name) == query.state

    return await call.page(
        "services",
        query,
        call.lists["service"].order(),
        lambda name: render.service_view(state, state.services[name]),
        wants=wants if query.model or query.state else None,
        weight=lambda name: len(state.replicas_by_service.get(name, ())),
    )


async def create(call: Call) -> web.StreamResponse:
    body = call.body(api.CreateService)
    reply = await call.submit(CreateServiceRequested, body=body, api_key=call.context.ids.secret())
    name = reply.reference.removeprefix("service:") or body.name

    def has_settled(state: State) -> bool:
        return service_views.service_state(state, name) in ("ready", "failed", "stopped")

    await call.waiters.until(f"service:{name}", has_settled, call.query(WaitQuery).wait)
    service = find(call.state, name)
    view = render.service_view(call.state, service)
    return call.answer(view, status=200 if view.state == "ready" else 202, location=f"{PREFIX}/services/{name}")


async def show(call: Call) -> web.StreamResponse:
    service = find(await call.read(), call.path("name"))
    return call.answer(render.service_view(call.state, service))


async def delete(call: Call) -> web.StreamResponse:
    service = find(await call.read(), call.path("name"))
    await call.submit(DeleteServiceRequested, service=service.name)
    call.changed = f"service:{service.name}"

    def is_gone(state: State) -> bool:
        return service.name not in state.services

    if await call.waiters.until(f"service:{service.name}", is_gone, call.query(WaitQuery).wait):
        last = render.service_view(call.state, service)
        return call.answer(msgspec.structs.replace(last, state="stopped", replicas=(), reason=""), status=200)
    return call.answer(render.service_view(call.state, find(call.state, service.name)))


async def replicas(call: Call) -> web.StreamResponse:
    query, state = call.query(ReplicasQuery), await call.read()
    order: Sequence[OrderKey]
    if query.service:
        order = sorted((0, key) for key in state.replicas_by_service.get(query.service, ()))
    elif query.node:
        order = sorted((0, key) for key in state.replicas_by_node.get(query.node, ()))
    else:
        order = call.lists["replica"].order()

    def wants(key: str) -> bool:
        replica = state.replicas[key]
        return (
            (not query.model or replica.model == query.model)
            and (not query.node or replica.node == query.node)
            and (query.state is None or replica.state == query.state)
        )

    is_filtered = bool(query.model or query.node or query.state)
    return await call.page(
        "replicas",
        query,
        order,
        lambda key: render.replica_view(state, state.replicas[key]),
        wants=wants if is_filtered else None,
    )


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/services",
        index,
        "viewer",
        TAG,
        "List services",
        PageOf(api.ServiceView),
        query=ServicesQuery,
    ),
    Route(
        "POST",
        f"{PREFIX}/services",
        create,
        "operator",
        TAG,
        "Run a service",
        api.ServiceView,
        body=api.CreateService,
        query=WaitQuery,
        status=202,
        codes=(
            "already_exists",
            "invalid_name",
            "invalid_device",
            "invalid_recipe",
            "model_not_found",
            "recipe_not_found",
            "nothing_fits",
            "idempotency_mismatch",
        ),
        description="So many replicas of a recipe with a model. Answers 200 when it was ready within `wait`.",
    ),
    Route(
        "GET",
        f"{PREFIX}/services/{{name}}",
        show,
        "viewer",
        TAG,
        "Show a service",
        api.ServiceView,
        codes=("service_not_found", "invalid_name"),
    ),
    Route(
        "DELETE",
        f"{PREFIX}/services/{{name}}",
        delete,
        "operator",
        TAG,
        "Stop a service and forget it",
        api.ServiceView,
        query=WaitQuery,
        status=202,
        codes=("service_not_found", "invalid_name"),
        description="Answers 200 once every replica has ended and its memory came back, else 202.",
    ),
    Route(
        "GET",
        f"{PREFIX}/replicas",
        replicas,
        "viewer",
        TAG,
        "List replicas",
        PageOf(api.ReplicaView),
        query=ReplicasQuery,
    ),
)
