"""`herder benchmarks`: load plans that the head performs with its nodes, and their results."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, get_args

import click

from herder import types
from herder.cli import benchmarks_view as view
from herder.cli import output
from herder.cli.benchmarks_results import compare, export, logs
from herder.cli.command import Duration, Globals, KeyValue, group, pass_globals
from herder.errors import HerderError

if TYPE_CHECKING:
    from herder.client_sync import Client

CANCEL_WAIT_S = 60.0


@group(
    "benchmarks",
    examples=(
        "herder benchmarks",
        "herder benchmarks run smoke --service chat",
        "herder benchmarks compare bench-3f9a1c7e20b4 bench-51c07d2a9e66",
    ),
)
def command() -> None:
    """Run, watch, show, compare and export benchmarks. Without a subcommand: list the latest."""


@command.command(
    "run",
    examples=(
        "herder benchmarks run smoke --service chat",
        "herder benchmarks run saturation --model llama --nodes 2 --set search.most=200",
        "herder benchmarks run my-sweep.yaml --set load.duration=30s --detach",
    ),
)
@click.argument("recipe", metavar="RECIPE|FILE")
@click.option(
    "--set", "pairs", type=KeyValue(), multiple=True, metavar="PLACE=VALUE", help="A value, as load.rate=5; may repeat."
)
@click.option("--model", default="", help="The model that is served, or asked for.")
@click.option("--service", default="", help="A service that is there already, instead of what the recipe says.")
@click.option("--nodes", default="", metavar="COUNT|NODE,...", help="How many nodes send the load, or which.")
@click.option("--name", default="", help="Another name for this benchmark.")
@click.option("--wait/--detach", "is_waiting", default=True, help="Follow it to its end (default), or print its id.")
@click.option("--watch/--no-watch", "is_watched", default=True, help="Show what it does meanwhile (default).")
@click.option("--timeout", "timeout_s", type=Duration(), metavar="TIME", help="Stop waiting after this long.")
@pass_globals
def run(
    options: Globals,
    recipe: str,
    pairs: tuple[tuple[str, Any], ...],
    model: str,
    service: str,
    nodes: str,
    name: str,
    is_waiting: bool,
    is_watched: bool,
    timeout_s: float | None,
) -> int:
    """Run a benchmark: a recipe of the head (`herder benchmarks recipes`), or one in a FILE (- reads standard input).

    Ctrl-C detaches: the benchmark goes on. Exit code 1: it did not complete, or must not be believed.
    """
    from common.bench.documents import changed
    from herder.cli import benchmarks_documents as documents

    known = documents.read(recipe) if documents.is_file(recipe) else None
    with options.connect() as client:
        base = client.benchmark_recipe(recipe).document if known is None and model else known or {}
        server = base.get("server")
        has_serve = isinstance(server, dict) and bool(server.get("serve"))
        changes = documents.overrides(pairs, model=model, service=service, nodes=nodes, has_serve=has_serve)
        if known is None:
            benchmark = client.create_benchmark(recipe, changes, name=name)
        else:
            benchmark = client.create_benchmark("", changed(known, changes), name=name)
        if not is_waiting:
            said = f"{benchmark.id} started; `herder benchmarks watch {benchmark.id}` follows it"
            output.emit(options, benchmark, said, quiet=benchmark.id)
            return output.EXIT_OK
        output.note(options, f"{benchmark.id}: {benchmark.name}")
        return finish(options, client, benchmark, is_watched=is_watched, timeout_s=timeout_s)


def finish(
    options: Globals,
    client: Client,
    benchmark: types.BenchmarkView,
    *,
    is_watched: bool = True,
    timeout_s: float | None = None,
) -> int:
    """Follows a benchmark to its end and prints it; the exit code. Raises: HerderError when it failed."""
    from herder.cli import benchmarks_live

    if is_watched and not options.is_quiet:
        last = benchmarks_live.follow(options, benchmark, timeout_s=timeout_s)
    else:
        last = benchmark
        said = f"{benchmark.id} goes on. `herder benchmarks cancel {benchmark.id}` stops it."
        with output.interruptible(said):
            for seen in client.watch_benchmark(benchmark.id, timeout_s=timeout_s):
                last = seen
    output.emit(options, last, view.shown(options, last, int(time.time() * 1000)), quiet=last.verdict or last.status)
    if last.status == "failed":
        error = last.error
        raise HerderError(
            error.code if error else "benchmark_failed",
            f"{last.id} failed: {error.message if error else last.note or 'no reason given'}",
            hint=error.hint if error else f"`herder benchmarks logs {last.id}` shows what its nodes said",
        )
    return output.EXIT_OK if last.verdict == "valid" else output.EXIT_FAILED


@command.command("list", examples=("herder benchmarks list", "herder benchmarks list --state running"))
@click.option("--state", type=click.Choice(get_args(types.BenchmarkState)), help="Only benchmarks in this state.")
@click.option("--name", default="", help="Only benchmarks of this name.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many, newest first.")
@pass_globals
def list_benchmarks(
    options: Globals, state: types.BenchmarkState | None = None, name: str = "", limit: int = 50
) -> None:
    """List benchmarks, newest first."""
    with options.connect() as client:
        found = client.benchmarks(state=state, name=name).all(at_most=limit)
    now_ms = int(time.time() * 1000)
    rows = [view.list_row(benchmark, now_ms) for benchmark in found]
    empty = "no benchmarks; `herder benchmarks recipes` says what could be run"
    shown = output.table(options, view.LIST, rows, empty=empty)
    output.emit(options, found, shown, quiet="\n".join(benchmark.id for benchmark in found))


@command.command(
    "show", examples=("herder benchmarks show bench-3f9a1c7e20b4", "herder benchmarks show bench-3f9a1c7e20b4 -o json")
)
@click.argument("benchmark_id", metavar="BENCHMARK")
@pass_globals
def show(options: Globals, benchmark_id: str) -> None:
    """Show a benchmark: its points, what they found, why they must not be believed, and what files are kept."""
    with options.connect() as client:
        found = client.benchmark(benchmark_id)
        files = client.benchmark_files(benchmark_id) if options.output == "table" else []
    shown = view.shown(options, found, int(time.time() * 1000), files)
    output.emit(options, found, shown, quiet=found.verdict or found.status)


@command.command(
    "watch",
    examples=("herder benchmarks watch bench-3f9a1c7e20b4", "herder benchmarks watch bench-3f9a1c7e20b4 --timeout 1h"),
)
@click.argument("benchmark_id", metavar="BENCHMARK")
@click.option("--timeout", "timeout_s", type=Duration(), metavar="TIME", help="Stop watching after this long.")
@pass_globals
def watch(options: Globals, benchmark_id: str, timeout_s: float | None) -> int:
    """Follow a benchmark to its end. Ctrl-C ends the watching only."""
    with options.connect() as client:
        return finish(options, client, client.benchmark(benchmark_id), timeout_s=timeout_s)


@command.command("cancel", examples=("herder benchmarks cancel bench-3f9a1c7e20b4",))
@click.argument("benchmark_id", metavar="BENCHMARK")
@click.option("--wait/--no-wait", "is_waiting", default=True, help="Wait until everything of it has stopped.")
@pass_globals
def cancel(options: Globals, benchmark_id: str, is_waiting: bool) -> None:
    """Stop a benchmark. What was measured is kept."""
    said = f"{benchmark_id} goes on stopping, if the head has heard of it. `herder benchmarks show` tells."
    with options.connect() as client, output.interruptible(said):
        found = client.cancel_benchmark(benchmark_id, wait_s=CANCEL_WAIT_S if is_waiting else 0.0)
    said = f"is {found.status}" if found.status in view.ENDED else "is being cancelled"
    output.emit(options, found, f"{found.id} {said}", quiet=found.status)


@command.command("delete", examples=("herder benchmarks delete bench-3f9a1c7e20b4",))
@click.argument("benchmark_ids", metavar="BENCHMARK...", nargs=-1, required=True)
@pass_globals
def delete(options: Globals, benchmark_ids: tuple[str, ...]) -> None:
    """Remove ended benchmarks and everything that was measured."""
    with options.connect() as client:
        gone = [client.delete_benchmark(benchmark_id) for benchmark_id in benchmark_ids]
    output.emit(options, gone, "\n".join(f"{one.key} is removed" for one in gone), quiet="")


@command.command("recipes", examples=("herder benchmarks recipes", "herder benchmarks recipes smoke -o yaml"))
@click.argument("name", required=False, default="")
@pass_globals
def recipes(options: Globals, name: str) -> None:
    """List the head's benchmark recipes, or show one with its defaults."""
    with options.connect() as client:
        if name:
            one = client.benchmark_recipe(name)
            output.emit(options, one, output.to_yaml(one.document).rstrip(), quiet=one.name)
            return
        found = client.benchmark_recipes().all()
    rows = [[one.name, one.path, one.description] for one in found]
    shown = output.table(options, view.RECIPES, rows, empty="the head has no benchmark recipes")
    output.emit(options, found, shown, quiet="\n".join(one.name for one in found))


@command.command("validate", examples=("herder benchmarks validate my-sweep.yaml",))
@click.argument("file", type=click.Path(allow_dash=True))
@pass_globals
def validate(options: Globals, file: str) -> None:
    """Check a recipe file without a head: every key, every value, every point of its sweep."""
    import msgspec

    from common.bench.recipe import convert, points_of, sha256_of
    from common.errors import InvalidRecipe
    from herder.cli import benchmarks_documents as documents

    document = documents.read(file)
    try:
        recipe = convert(document, where=file)
    except InvalidRecipe as error:
        hint = f"{error.hint + ' ' if error.hint else ''}docs/benchmarking.md lists every field"
        raise HerderError(error.code, error.message, hint=hint) from None
    points = len(points_of(recipe)) * recipe.repetitions
    said = f"{recipe.name} is valid: {points} point{'s' if points > 1 else ''}"
    if recipe.search is not None:
        said = f"{recipe.name} is valid: a search over {recipe.search.over}, up to {recipe.search.max_points} loads"
    value = {"name": recipe.name, "sha256": sha256_of(recipe), "points": points, "recipe": msgspec.to_builtins(recipe)}
    output.emit(options, value, said, quiet=recipe.name)


for _command in (compare, export, logs):
    command.add_command(_command)
