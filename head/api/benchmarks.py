"""/benchmarks: load plans run against services and URLs by load nodes together, and the recipes that say them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from common.bench.recipe import BenchmarkRecipe
from common.errors import BenchmarkNotFound, Internal, InvalidRecipe, RecipeNotFound, TimedOut, Unavailable
from head.api import render_benchmarks
from head.api.call import Call, near
from head.api.routes import PREFIX, ListQuery, PageOf, Route, WaitQuery
from head.bench.performer import Performer
from head.bench.questions import Check
from head.core.benchmark_documents import document_of
from head.core.benchmark_facts import is_ended
from head.core.events import CancelBenchmarkRequested, CreateBenchmarkRequested, DeleteBenchmarkRequested
from head.core.objects import Benchmark
from head.core.state import State
from herder import types as api

TAG = "benchmarks"
CHECK_S = 20.0  # drawing every schedule of a sweep once


class BenchmarksQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of benchmarks."""

    state: Annotated[api.BenchmarkState | None, Meta(description="Only benchmarks in this state.")] = None
    name: Annotated[str, Meta(max_length=64, description="Only benchmarks of this name.")] = ""


def performer_of(call: Call) -> Performer:
    """Who keeps the results. Raises: Unavailable."""
    performer = call.context.benchmarks
    if performer is None:
        raise Unavailable("this head keeps no benchmarks")
    return performer


def find(state: State, benchmark_id: str) -> Benchmark:
    """The benchmark of an id. Raises: BenchmarkNotFound with the nearest ids."""
    benchmark = state.benchmarks.get(benchmark_id)
    if benchmark is None:
        hint = near(benchmark_id, state.benchmarks, "GET /api/v1/benchmarks lists them")
        raise BenchmarkNotFound(f"no benchmark {benchmark_id[:80]!r}", hint=hint)
    return benchmark


async def index(call: Call) -> web.StreamResponse:
    query, state = call.query(BenchmarksQuery), await call.read()

    def wants(key: str) -> bool:
        benchmark = state.benchmarks[key]
        return query.state in (None, benchmark.state) and query.name in ("", benchmark.name)

    return await call.page(
        "benchmarks",
        query,
        call.lists["benchmark"].order(),
        lambda key: render_benchmarks.benchmark_view(state, state.benchmarks[key], is_short=True),
        wants=wants if query.state or query.name else None,
        weight=lambda key: len(state.points_by_benchmark.get(key, ())),
    )


async def create(call: Call) -> web.StreamResponse:
    """Checks the recipe in a process of its own (it draws every schedule once), then hands it to the core."""
    recipe = await _recipe(call, call.body(api.CreateBenchmark))
    secret = call.context.ids.secret()
    reply = await call.submit(CreateBenchmarkRequested, fresh="bench", recipe=recipe, api_key=secret)
    return await _outcome(call, reply.reference.removeprefix("benchmark:"))


async def show(call: Call) -> web.StreamResponse:
    benchmark = find(await call.read(), call.path("id"))
    return call.answer(render_benchmarks.benchmark_view(call.state, benchmark))


async def cancel(call: Call) -> web.StreamResponse:
    benchmark = find(await call.read(), call.path("id"))
    await call.submit(CancelBenchmarkRequested, benchmark=benchmark.id)
    return await _outcome(call, benchmark.id)


async def delete(call: Call) -> web.StreamResponse:
    benchmark = find(await call.read(), call.path("id"))
    await call.submit(DeleteBenchmarkRequested, benchmark=benchmark.id)
    call.changed = f"benchmark:{benchmark.id}"
    return call.answer(api.Deleted("benchmark", benchmark.id, benchmark.id not in call.state.benchmarks))


async def recipes(call: Call) -> web.StreamResponse:
    query, state = call.query(ListQuery), await call.read()
    paths = call.context.benchmark_paths
    return await call.page(
        "benchmark-recipes",
        query,
        sorted((0, name) for name in state.benchmark_recipes),
        lambda name: render_benchmarks.recipe_view(state.benchmark_recipes[name], paths.get(name, "")),
    )


async def recipe(call: Call) -> web.StreamResponse:
    state, name = await call.read(), call.path("name")
    if name not in state.benchmark_recipes:
        raise _unknown(state, name)
    view = render_benchmarks.recipe_view(state.benchmark_recipes[name], call.context.benchmark_paths.get(name, ""))
    return call.answer(view)


async def _recipe(call: Call, asked: api.CreateBenchmark) -> BenchmarkRecipe:
    try:
        document = document_of(asked, call.state.benchmark_recipes)
    except KeyError:
        raise _unknown(call.state, asked.recipe) from None
    try:
        plain = await performer_of(call).clerks.ask(Check(document), dict, timeout_s=CHECK_S)
    except TimedOut:
        raise InvalidRecipe(
            f"the recipe's schedules are not drawn within {CHECK_S:g} s", hint="fewer points, or shorter ones"
        ) from None
    return msgspec.convert(plain, BenchmarkRecipe)


def _unknown(state: State, name: str) -> RecipeNotFound:
    hint = near(name, state.benchmark_recipes, "GET /api/v1/benchmark-recipes lists them")
    return RecipeNotFound(f"no benchmark recipe {name[:80]!r}", hint=hint)


async def _outcome(call: Call, benchmark_id: str) -> web.StreamResponse:
    def has_ended(state: State) -> bool:
        benchmark = state.benchmarks.get(benchmark_id)
        return benchmark is None or is_ended(benchmark)

    await call.waiters.until(f"benchmark:{benchmark_id}", has_ended, call.query(WaitQuery).wait)
    benchmark = call.state.benchmarks.get(benchmark_id)
    if benchmark is None:
        raise Internal("the benchmark is not in the state that made it", benchmark=benchmark_id)
    return call.answer(
        render_benchmarks.benchmark_view(call.state, benchmark),
        status=200 if is_ended(benchmark) else 202,
        location=f"{PREFIX}/benchmarks/{benchmark.id}",
    )


_BY_ID = f"{PREFIX}/benchmarks/{{id}}"
ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/benchmarks",
        index,
        "viewer",
        TAG,
        "List benchmarks, newest first",
        PageOf(api.BenchmarkView),
        query=BenchmarksQuery,
        description="Without their points and runs.",
    ),
    Route(
        "POST",
        f"{PREFIX}/benchmarks",
        create,
        "operator",
        TAG,
        "Run a benchmark",
        api.BenchmarkView,
        body=api.CreateBenchmark,
        query=WaitQuery,
        status=202,
        takes_yaml=True,
        codes=(
            *("recipe_not_found", "invalid_recipe", "service_not_found", "model_not_found", "node_not_found"),
            *("nothing_fits", "conflict", "too_many", "memory_full"),
        ),
        description="From a recipe of the head, from a whole recipe in `document`, or from the first changed by the "
        "second: its values take the places of the recipe's, a null takes one away; `sweep`, `search` and `slo` are "
        "replaced whole. Answers 200 when it ended within `wait`.",
    ),
    Route("GET", _BY_ID, show, "viewer", TAG, "Show a benchmark", api.BenchmarkView, codes=("benchmark_not_found",)),
    Route(
        "POST",
        f"{_BY_ID}/cancel",
        cancel,
        "operator",
        TAG,
        "Cancel a benchmark",
        api.BenchmarkView,
        query=WaitQuery,
        status=202,
        codes=("benchmark_not_found",),
        description="Load and monitors are stopped, a service that was made for it is removed; what was measured "
        "stays. Answers 200 once it has ended.",
    ),
    Route(
        "DELETE",
        _BY_ID,
        delete,
        "operator",
        TAG,
        "Remove an ended benchmark and its result",
        api.Deleted,
        codes=("benchmark_not_found", "in_use", "conflict"),
    ),
    Route(
        "GET",
        f"{PREFIX}/benchmark-recipes",
        recipes,
        "viewer",
        TAG,
        "List benchmark recipes",
        PageOf(api.BenchmarkRecipeView),
        query=ListQuery,
    ),
    Route(
        "GET",
        f"{PREFIX}/benchmark-recipes/{{name}}",
        recipe,
        "viewer",
        TAG,
        "Show a benchmark recipe",
        api.BenchmarkRecipeView,
        codes=("recipe_not_found",),
    ),
)
