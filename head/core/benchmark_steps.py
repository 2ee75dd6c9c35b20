"""The job step `benchmark`: makes a benchmark, waits for it, and has its figures as the result.

`config` names one of the head's recipes (`recipe`), gives a whole document (`document`), or changes the first by the
second, as a request to make a benchmark does. The benchmark is as any other afterwards, with the step as its cause.
"""

from __future__ import annotations

import hashlib
from typing import Any

from msgspec.structs import replace

from common.bench import recipe as recipes
from common.bench.recipe import BenchmarkRecipe
from common.errors import BenchmarkNotFound, Cancelled, InvalidJob, RecipeNotFound
from head.core import benchmark_facts, benchmarks
from head.core.benchmark_documents import document_of
from head.core.engine_steps import cause_of, completed, failed
from head.core.objects import Benchmark, Job, Step
from head.core.state import BENCHMARK_ENDED, State
from head.core.turn import Turn
from herder.types import CreateBenchmark

FIELDS = frozenset({"recipe", "document", "name"})


def recipe_of(state: State, step: Step) -> BenchmarkRecipe:
    """What the step asks for. Its schedules are not drawn here: the load nodes do that, and say when they cannot.

    Raises: InvalidJob, InvalidRecipe, RecipeNotFound.
    """
    config: dict[str, Any] = step.config
    unknown = set(config) - FIELDS
    if unknown:
        raise InvalidJob(f"{sorted(unknown)[0]!r} means nothing to a benchmark", step=step.id, field="config")
    name, document = config.get("recipe", ""), config.get("document", {})
    if not isinstance(name, str) or not isinstance(document, dict) or not isinstance(config.get("name", ""), str):
        raise InvalidJob("recipe and name are texts, document is a mapping", step=step.id, field="config")
    asked = CreateBenchmark(recipe=name, document=document, name=config.get("name", ""))
    try:
        plain = document_of(asked, state.benchmark_recipes)
    except KeyError:
        known = ", ".join(sorted(state.benchmark_recipes)[:20])
        hint = f"known: {known or 'none'}"
        raise RecipeNotFound(f"no benchmark recipe {name[:80]!r}", hint=hint, recipe=name) from None
    return recipes.convert(plain, where=f"step {step.id}", is_drawn=False)


def begin(turn: Turn, job: Job, step: Step) -> Step:
    """Makes the benchmark. Raises: whatever refuses it."""
    recipe = recipe_of(turn.state, step)
    name = hashlib.sha256(f"{job.id}/{step.id}/{step.attempts}".encode()).hexdigest()[:12]
    made = benchmarks.start(turn, recipe, benchmark_id=f"bench-{name}", actor=job.actor, cause=cause_of(job, step))
    return replace(step, phase="benchmark", target=f"benchmark:{made.id}", target_generation=made.generation)


def look(turn: Turn, step: Step) -> Step:
    """Ends with the benchmark."""
    benchmark = benchmark_of(turn.state, step)
    if benchmark is None:
        return failed(turn, step, BenchmarkNotFound("the benchmark was deleted while the step waited for it").info())
    if benchmark.state == "completed":
        return completed(turn, replace(step, result=benchmark_facts.summary(turn.state, benchmark)))
    if benchmark.state in BENCHMARK_ENDED:
        said = benchmark.error or Cancelled(f"the benchmark was {benchmark.state}").info()
        details = {**said.details, "benchmark": benchmark.id}
        return failed(turn, step, replace(said, details=details))
    words = benchmark.note or f"{benchmark.id} is {benchmark.state}"
    return step if step.note == words else replace(step, note=words)


def undo(turn: Turn, step: Step) -> bool:
    """Cancels the step's benchmark; whether it has ended."""
    benchmark = benchmark_of(turn.state, step)
    if benchmark is None or benchmark.state in BENCHMARK_ENDED:
        return True
    benchmarks.order_cancel(turn, benchmark)
    return False


def benchmark_of(state: State, step: Step) -> Benchmark | None:
    """The benchmark that a step waits for."""
    kind, _, key = step.target.partition(":")
    return state.benchmarks.get(key) if kind == "benchmark" else None
