"""/recipes: how engines are run, as the recipe folder says."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from head.api import render
from head.api.call import Call
from head.api.routes import PREFIX, ListQuery, PageOf, Route
from herder import types as api

TAG = "services"


class RecipesQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of recipes."""

    category: Annotated[str, Meta(max_length=64, description="Only recipes of this category.")] = ""


async def index(call: Call) -> web.StreamResponse:
    query, state = call.query(RecipesQuery), await call.read()
    paths = call.context.recipe_paths
    return await call.page(
        "recipes",
        query,
        sorted((0, name) for name in state.recipes),
        lambda name: render.recipe_view(state.recipes[name], paths.get(name, "")),
        wants=(lambda name: state.recipes[name].category == query.category) if query.category else None,
    )


ROUTES = (
    Route("GET", f"{PREFIX}/recipes", index, "viewer", TAG, "List recipes", PageOf(api.RecipeView), query=RecipesQuery),
)
