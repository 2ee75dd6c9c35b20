"""/plan: the planner's endpoints, with the cluster's inventory and registered models at hand.

The routes are made from the planner's own table. Answers are computed in a process beside the head
(head/planner_process.py); what it needs of the state is gathered here: the models that the question names, and the
nodes by kind where the question does not name an accelerator.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
from aiohttp import web

from head.api.call import Call
from head.api.kinds import Kinds
from head.api.routes import PREFIX, NoQuery, Query, Route
from head.core.state import State
from head.planner.endpoints.base import Endpoint
from head.planner.endpoints.questions import Desk, ModelQuestion, PlacedQuestion
from head.planner.endpoints.table import ENDPOINTS

TAG = "plan"
NAMES = 1_000  # registered names that are looked through for near ones
METADATA_BYTES = 1 << 20  # of one model


def desk_of(state: State, question: msgspec.Struct | None, kinds: Kinds) -> Desk:
    """What the question may draw on."""
    models: dict[str, dict[str, Any]] = {}
    names: tuple[str, ...] = ()
    if isinstance(question, ModelQuestion) or hasattr(question, "models"):
        names = tuple(sorted(state.models)[:NAMES])
        for name in (getattr(question, "model", ""), *getattr(question, "models", ())):
            known = _metadata(state, name)
            if known is not None and len(msgspec.json.encode(known)) <= METADATA_BYTES:
                models[name] = known
    names_device = isinstance(question, PlacedQuestion) and bool(question.gpu or question.mock_topology)
    return Desk(kinds=() if names_device else kinds.of(state), source="registered", models=models, names=names)


def _metadata(state: State, name: str) -> dict[str, Any] | None:
    """What is known of a registered model: as its files say, once a node has read them, else as it was registered."""
    model = state.models.get(name)
    if model is None:
        return None
    kept = state.manifests.get(f"{name}@{model.revision}")
    return {**model.metadata, "detected": kept.manifest.detected} if kept and kept.manifest.detected else model.metadata


def _handler(endpoint: Endpoint) -> Any:
    async def answer(call: Call) -> web.StreamResponse:
        state = await call.read()
        if endpoint.method == "GET":
            question = msgspec.convert(msgspec.to_builtins(call.query(Query)), endpoint.question)
            body = msgspec.json.encode(question)
        else:
            body = call.raw_body
            question = call.body(endpoint.question) if body else msgspec.convert({}, endpoint.question)
        desk = desk_of(state, question, call.shared.kinds)
        answered = await call.shared.planner.ask(endpoint.path, body, desk)
        return web.Response(body=answered, content_type="application/json")

    return answer


def _query_of(endpoint: Endpoint) -> type[Query]:
    """The query string of a GET endpoint: the fields of its question."""
    found = msgspec.structs.fields(endpoint.question)
    if not found:
        return NoQuery
    fields = [(field.name, field.type, field.default) for field in found]
    name = f"{endpoint.question.__name__}Query"
    made: Any = msgspec.defstruct(name, fields, bases=(Query,), frozen=True, kw_only=True)
    return cast(type[Query], made)


def _route(endpoint: Endpoint) -> Route:
    path = f"{PREFIX}/plan/{endpoint.path}" if endpoint.path else f"{PREFIX}/plan"
    is_get = endpoint.method == "GET"
    is_optional = not is_get and all(not field.required for field in msgspec.structs.fields(endpoint.question))
    return Route(
        endpoint.method,
        path,
        _handler(endpoint),
        "viewer",
        TAG,
        endpoint.summary,
        endpoint.answer_type,
        body=None if is_get else endpoint.question,
        is_body_optional=is_optional,
        query=_query_of(endpoint) if is_get else NoQuery,
        codes=("timed_out", "too_many", *endpoint.codes),
        is_reading=True,
    )


ROUTES = tuple(_route(endpoint) for endpoint in ENDPOINTS)
