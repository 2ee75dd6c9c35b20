"""/models: what is registered, what its files say, where it is."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from common import ids
from common.errors import ModelNotFound, NotFound
from head.api import render
from head.api.call import Call, near
from head.api.routes import MODEL, PREFIX, ListQuery, PageOf, Query, Route
from head.core.events import DeleteModelRequested, RegisterModelRequested, UpdateModelRequested
from head.core.objects import Model
from head.core.state import State
from herder import types as api

TAG = "models"


class ModelsQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of models."""

    type: Annotated[api.ModelType | None, Meta(description="Only models of this type.")] = None
    search: Annotated[str, Meta(max_length=192, description="Only models whose name holds this.")] = ""


class ForceQuery(Query, frozen=True, kw_only=True):
    """Whether to go through with it all the same."""

    force: Annotated[bool, Meta(description="Also what is pinned, in use or the last copy.")] = False


class ManifestQuery(Query, frozen=True, kw_only=True):
    """Which manifest."""

    revision: Annotated[str, Meta(max_length=64, description="Empty: the model's present revision.")] = ""


def find(state: State, name: str) -> Model:
    """The model of a name. Raises: InvalidName, ModelNotFound with the nearest names."""
    ids.check_model_name(name)
    model = state.models.get(name)
    if model is None:
        raise ModelNotFound(f"no model {name!r}", hint=near(name, state.models, "GET /api/v1/models lists them"))
    return model


async def index(call: Call) -> web.StreamResponse:
    query, state, now_ms = call.query(ModelsQuery), await call.read(), call.now_ms
    search = query.search.lower()

    def wants(name: str) -> bool:
        return (query.type is None or state.models[name].type == query.type) and search in name.lower()

    return await call.page(
        "models",
        query,
        call.lists["model"].order(),
        lambda name: render.model_view(state, state.models[name], now_ms),
        wants=wants if query.type or search else None,
        weight=lambda name: len(state.copies_by_model.get(name, ())),
    )


async def register(call: Call) -> web.StreamResponse:
    body = call.body(api.RegisterModel)
    await call.submit(RegisterModelRequested, body=body)
    return _shown(call, body.name, location=f"{PREFIX}/models/{body.name}")


async def show(call: Call) -> web.StreamResponse:
    model = find(await call.read(), call.path("name"))
    return call.answer(render.model_view(call.state, model, call.now_ms))


async def update(call: Call) -> web.StreamResponse:
    model = find(await call.read(), call.path("name"))
    await call.submit(UpdateModelRequested, model=model.name, body=call.body(api.UpdateModel))
    return _shown(call, model.name)


async def delete(call: Call) -> web.StreamResponse:
    model = find(await call.read(), call.path("name"))
    await call.submit(DeleteModelRequested, model=model.name, force=call.query(ForceQuery).force)
    call.changed = f"model:{model.name}"
    is_done = model.name not in call.state.models
    return call.answer(api.Deleted("model", model.name, is_done), status=200 if is_done else 202)


async def locations(call: Call) -> web.StreamResponse:
    state, now_ms = await call.read(), call.now_ms
    model = find(state, call.path("name"))
    order = sorted((0, key) for key in state.copies_by_model.get(model.name, ()))
    return await call.page(
        f"locations:{model.name}",
        call.query(ListQuery),
        order,
        lambda key: render.copy_view(state, state.copies[key], now_ms),
    )


async def manifest(call: Call) -> web.StreamResponse:
    state = await call.read()
    model = find(state, call.path("name"))
    revision = call.query(ManifestQuery).revision or model.revision
    found = state.manifests.get(f"{model.name}@{revision}")
    if found is None:
        raise NotFound(
            f"the files of {model.name}@{revision[:64]} are not known yet",
            hint="they are once a first copy is verified: POST /api/v1/download",
        )
    return call.answer(render.manifest_view(found.manifest))


def _shown(call: Call, name: str, *, location: str = "") -> web.StreamResponse:
    return call.answer(render.model_view(call.state, find(call.state, name), call.now_ms), location=location)


_NAME = f"{PREFIX}/models/{{name:{MODEL}}}"
_MISSING = ("model_not_found", "invalid_name")
ROUTES = (
    Route("GET", f"{PREFIX}/models", index, "viewer", TAG, "List models", PageOf(api.ModelView), query=ModelsQuery),
    Route(
        "POST",
        f"{PREFIX}/models",
        register,
        "operator",
        TAG,
        "Register a model",
        api.ModelView,
        body=api.RegisterModel,
        status=201,
        codes=("already_exists", "invalid_name", "invalid_source", "idempotency_mismatch"),
    ),
    Route(
        "GET",
        f"{_NAME}/locations",
        locations,
        "viewer",
        TAG,
        "Where a model is",
        PageOf(api.CopyView),
        query=ListQuery,
        codes=_MISSING,
        description="Every copy of the model, with state and progress. A model whose own name ends in `/locations` "
        "is reached with its slash written as `%2F`.",
    ),
    Route(
        "GET",
        f"{_NAME}/manifest",
        manifest,
        "viewer",
        TAG,
        "The files of a model",
        api.ManifestView,
        query=ManifestQuery,
        codes=(*_MISSING, "not_found"),
    ),
    Route("GET", _NAME, show, "viewer", TAG, "Show a model", api.ModelView, codes=_MISSING),
    Route(
        "PATCH",
        _NAME,
        update,
        "operator",
        TAG,
        "Change a model",
        api.ModelView,
        body=api.UpdateModel,
        codes=(*_MISSING, "invalid_source", "in_use"),
    ),
    Route(
        "DELETE",
        _NAME,
        delete,
        "operator",
        TAG,
        "Forget a model and drop its copies",
        api.Deleted,
        query=ForceQuery,
        codes=(*_MISSING, "in_use"),
        description="Answers 200 when it is gone, 202 while its copies are still being dropped.",
    ),
)
