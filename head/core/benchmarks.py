"""Benchmarks: what people ask of them, and how one goes on from state to state.

pending: another benchmark measures the same server. preparing: its service gets ready and its nodes are chosen.
running: point after point. finishing: monitors hand in their files and the shell writes the whole. Everything is
decided afresh from what is there, at each change and each tick, so a head that starts again goes on where it was.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec.structs import replace

from common import ids, limits
from common.bench import recipe as recipes
from common.bench.recipe import BenchmarkRecipe, Server
from common.errors import (
    BenchmarkNotFound,
    ErrorInfo,
    HerderError,
    InUse,
    InvalidRecipe,
    ServiceNotFound,
    TimedOut,
    TooMany,
)
from head.core import (
    benchmark_ends,
    benchmark_facts,
    benchmark_nodes,
    benchmark_orders,
    benchmark_plan,
    benchmark_points,
    benchmark_runs,
    idempotency,
    replica_facts,
    service_orders,
    service_views,
)
from head.core.benchmark_facts import current_point, next_point, points_of, recipe_of
from head.core.effects import RemoveBenchmark
from head.core.events import (
    BenchmarkWritten,
    CancelBenchmarkRequested,
    CreateBenchmarkRequested,
    DeleteBenchmarkRequested,
    Event,
    PointJudged,
)
from head.core.objects import Benchmark, point_key
from head.core.state import BENCHMARK_ENDED, POINT_ENDED, State
from head.core.turn import Turn

_PRUNED_PER_TICK = 20


# requests
def create(turn: Turn, event: CreateBenchmarkRequested) -> None:
    """A benchmark by its recipe. Answered with the benchmark. Raises: as `start`."""
    if idempotency.replayed(turn, event):
        return
    benchmark = start(
        turn, event.recipe, benchmark_id=event.fresh_id, actor=event.actor, cause=event.request_id, key=event.api_key
    )
    idempotency.answer(turn, event, f"benchmark:{benchmark.id}")


def start(
    turn: Turn, recipe: BenchmarkRecipe, *, benchmark_id: str, actor: str, cause: str, key: str = ""
) -> Benchmark:
    """Makes a benchmark and its points, and with `serve` its service. `key`: the own engines', drawn when "".

    Raises: TooMany, InvalidRecipe, ServiceNotFound, NodeNotFound, NodeUnreachable, NothingFits, and whatever
    refuses the service.
    """
    state = turn.state
    if len(state.live_benchmarks) >= limits.BENCHMARKS_LIVE:
        count = len(state.live_benchmarks)
        raise TooMany(f"{count} benchmarks have not ended", hint="try again later", limit=limits.BENCHMARKS_LIVE)
    if not benchmark_id or benchmark_id in state.benchmarks:
        raise InvalidRecipe("the request has no fresh id", hint="this is a mistake of the head's shell")
    load_nodes = benchmark_nodes.check(state, recipe, turn.now_ms)
    points = benchmark_plan.first_points(benchmark_id, recipe)
    service = _serve(turn, recipe.server, benchmark_id, key)
    benchmark = Benchmark(
        id=benchmark_id,
        name=recipe.name,
        recipe=msgspec.to_builtins(recipe),
        recipe_sha256=recipes.sha256_of(recipe),
        actor=actor,
        state="pending",
        created_ms=turn.now_ms,
        generation=turn.next_generation(),
        cause=cause,
        planned=len(points),
        load_nodes=load_nodes,
        service=service,
        is_own_service=recipe.server.serve is not None,
        since_ms=turn.now_ms,
    )
    turn.put(benchmark, "benchmark_created", recipe=recipe.name, points=len(points))
    for point in points:
        turn.put(point, "point_planned")
    return benchmark


def _serve(turn: Turn, server: Server, benchmark_id: str, key: str) -> str:
    """The service that is asked, made now where it is the benchmark's own; "" for addresses outside."""
    if server.via == "gateway" and not turn.state.gateway_url:
        raise InvalidRecipe(
            "this head does not know under which address its nodes reach its gateway",
            hint="set the head's public_url, or measure the engines themselves: server.via: engine",
        )
    if server.service:
        service = turn.state.services.get(server.service)
        if service is None or service.desired == "stopped":
            hint = "`herder services` lists them"
            raise ServiceNotFound(f"no service {server.service[:80]!r}", hint=hint, service=server.service)
        return service.name
    serve = server.serve
    if serve is None:
        return ""
    name = ids.check_service_name(benchmark_id)
    service_orders.start(
        turn,
        name=name,
        model=serve.model,
        recipe=serve.recipe,
        replica_count=serve.replicas,
        devices=serve.devices,
        config=serve.config,
        cause=benchmark_id,
        api_key=key,
    )
    return name


def cancel(turn: Turn, event: CancelBenchmarkRequested) -> None:
    """Ends a benchmark early; one that has ended stays as it is. Answered with it. Raises: BenchmarkNotFound."""
    benchmark = _known(turn.state, event.benchmark)
    order_cancel(turn, benchmark, actor=event.actor)
    turn.reply(event, reference=f"benchmark:{benchmark.id}")


def order_cancel(turn: Turn, benchmark: Benchmark, *, actor: str = "") -> None:
    """The benchmark shall end; it does when everything of it has stopped."""
    if benchmark.state not in BENCHMARK_ENDED and not benchmark.is_cancelling:
        cancelling = replace(benchmark, is_cancelling=True, state="finishing", since_ms=turn.now_ms)
        turn.put(replace(cancelling, note="is being cancelled"), "benchmark_cancel_requested", actor=actor)


def delete(turn: Turn, event: DeleteBenchmarkRequested) -> None:
    """Forgets an ended benchmark and its files. Answered with "benchmark:<id>", which is gone then.

    Raises: BenchmarkNotFound, InUse while it goes on.
    """
    benchmark = _known(turn.state, event.benchmark)
    if benchmark.state not in BENCHMARK_ENDED:
        raise InUse(f"{benchmark.id} is {benchmark.state}", hint="cancel it first", benchmark=benchmark.id)
    _remove(turn, benchmark, "benchmark_deleted")
    turn.reply(event, reference=f"benchmark:{benchmark.id}")


def _known(state: State, key: str) -> Benchmark:
    benchmark = state.benchmarks.get(key)
    if benchmark is None:
        raise BenchmarkNotFound(f"no benchmark {key[:80]!r}", hint="`herder benchmarks` lists them", benchmark=key)
    return benchmark


def _remove(turn: Turn, benchmark: Benchmark, what: str) -> None:
    for key in tuple(turn.state.points_by_benchmark.get(benchmark.id, ())):
        turn.delete("point", key, "point_deleted")
    for key in tuple(turn.state.runs_by_benchmark.get(benchmark.id, ())):
        benchmark_runs.drop(turn, turn.state.runs[key])
    turn.delete("benchmark", benchmark.id, what)
    turn.emit(RemoveBenchmark(benchmark.id))


# what the shell answers
def point_judged(turn: Turn, event: PointJudged) -> None:
    """A point's parts were merged, or could not be."""
    benchmark = turn.state.benchmarks.get(event.benchmark)
    point = turn.state.points.get(point_key(event.benchmark, event.point))
    if benchmark is None or point is None or benchmark.generation != event.generation:
        return
    if point.state == "judging" and benchmark.state == "running":
        benchmark_points.judged(turn, point, event)


def written(turn: Turn, event: BenchmarkWritten) -> None:
    """The whole is on the disk, or could not be written."""
    benchmark = turn.state.benchmarks.get(event.benchmark)
    if benchmark is not None and benchmark.generation == event.generation:
        benchmark_ends.written(turn, benchmark, event.error)


# reconciliation
def reconcile(turn: Turn, key: str) -> None:
    """Brings a benchmark forward: one state after the other, as far as it goes now."""
    benchmark = turn.state.benchmarks.get(key)
    if benchmark is None or benchmark.state in BENCHMARK_ENDED:
        return
    recipe = recipe_of(benchmark)
    if benchmark.is_cancelling:
        benchmark_ends.cancel(turn, benchmark, recipe)
        return
    if benchmark.state != "finishing" and _is_over(turn, benchmark, recipe.timeout) and benchmark.started_ms:
        said = TimedOut(f"not done after {recipe.timeout:g} s, as its recipe's timeout says")
        _finish(turn, benchmark, said.info())
        return
    match benchmark.state:
        case "pending":
            _wait(turn, benchmark, recipe)
        case "preparing":
            _prepare(turn, benchmark, recipe)
        case "running":
            _run(turn, benchmark, recipe)
        case _:
            benchmark_ends.finish(turn, benchmark, recipe)


def reconcile_point(turn: Turn, key: str) -> None:
    """A point goes on with its benchmark."""
    point = turn.state.points.get(key)
    if point is not None and point.state not in POINT_ENDED and point.state != "pending":
        turn.touch("benchmark", point.benchmark)


def _is_over(turn: Turn, benchmark: Benchmark, allowed_s: float, since_ms: int = 0) -> bool:
    since_ms = max(since_ms or benchmark.started_ms, turn.state.started_ms)
    return turn.now_ms - since_ms > allowed_s * 1000


def _wait(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> None:
    """Two benchmarks of one server would measure each other: the later one waits."""
    other = _before(turn.state, benchmark, recipe)
    if other is not None:
        note(turn, benchmark, f"waits for {other.id}, which measures the same server")
        return
    _enter(turn, replace(benchmark, started_ms=turn.now_ms), "preparing")


def _before(state: State, benchmark: Benchmark, recipe: BenchmarkRecipe) -> Benchmark | None:
    rank = (benchmark.created_ms, benchmark.id)
    for key in state.live_benchmarks:
        other = state.benchmarks[key]
        if other.id == benchmark.id or (other.state == "pending" and (other.created_ms, other.id) > rank):
            continue
        is_same_service = bool(benchmark.service) and benchmark.service == other.service
        if is_same_service or set(recipe.server.urls) & set(recipe_of(other).server.urls):
            return other
    return None


def _prepare(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> None:
    """The service is ready with all its replicas, the nodes are chosen and have room: the points may begin."""
    is_late = _is_over(turn, benchmark, recipe.server.ready_timeout, benchmark.since_ms)
    is_ready, words, error = service_stands(turn.state, benchmark)
    if not is_ready:
        if error is None and is_late:
            error = TimedOut(f"the service is not ready after {recipe.server.ready_timeout:g} s: {words}").info()
        _note_or_finish(turn, benchmark, words, error)
        return
    try:
        load_nodes = benchmark_nodes.choose(turn.state, benchmark, recipe, turn.now_ms)
    except HerderError as refusal:
        _note_or_finish(turn, benchmark, refusal.message, refusal.info() if is_late else None)
        return
    server_nodes = benchmark_nodes.server_nodes(turn.state, benchmark)
    monitored = benchmark_nodes.watched(recipe, load_nodes, server_nodes)
    full = benchmark_nodes.full_node(turn.state, load_nodes, monitored)
    if full:
        note(turn, benchmark, f"waits for room on {full}: at most {limits.RUNS_PER_NODE} runs are there at a time")
        return
    placed = replace(benchmark, load_nodes=load_nodes, server_nodes=server_nodes)
    placed = replace(placed, facts=benchmark_orders.facts_of(turn.state, placed))
    monitors = [benchmark_runs.make(turn, placed, node, "monitor") for node in monitored]
    _enter(turn, replace(placed, monitors=tuple(run.id for run in monitors)), "running")


def service_stands(state: State, benchmark: Benchmark) -> tuple[bool, str, ErrorInfo | None]:
    """Whether its server can be asked; else what it waits for in words, or the error when waiting is in vain."""
    if not benchmark.service:
        return True, "", None
    service = state.services.get(benchmark.service)
    if service is None or service.desired == "stopped":
        gone = ServiceNotFound(f"the service {benchmark.service} was stopped", service=benchmark.service)
        return False, gone.message, gone.info()
    held = [one for one in replica_facts.of_service(state, service.name) if one.desired == "running"]
    current = [one for one in held if one.spec_hash == service.spec_hash]
    ready = [one for one in current if service_views.is_serving(state, one)]
    if len(ready) >= service.replicas and len(held) == len(ready) > 0:
        return True, "", None
    broken = next((one for one in current if one.state == "failed"), None)
    if broken is not None and broken.error is not None:
        details = {**broken.error.details, "replica": broken.id, "device": broken.device}
        return False, broken.error.message, replace(broken.error, details=details)
    if service.error is not None:
        return False, service.reason, service.error
    words = f"{len(ready)} of {service.replicas} replicas of {service.name} answer"
    return False, f"{words}: {service.reason}" if service.reason else words, None


def _run(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> None:
    """Brings the present point forward, or begins the next, or ends the points."""
    for key in benchmark.monitors:
        monitor = turn.state.runs.get(key)
        if monitor is not None:
            benchmark_runs.watch(turn, monitor)
    point = current_point(turn.state, benchmark.id)
    if point is not None:
        benchmark_points.advance(turn, benchmark, recipe, point)
        return
    points = points_of(turn.state, benchmark.id)
    ended = [point for point in points if point.state in POINT_ENDED]
    if ended:
        benchmark = _after_point(turn, benchmark, recipe, ended[-1].ended_ms)
    failures = ended[-limits.POINT_FAILURES :]
    if len(failures) == limits.POINT_FAILURES and all(point.state == "failed" for point in failures):
        _finish(turn, benchmark, failures[-1].error)
        return
    upcoming = next_point(turn.state, benchmark.id)
    if upcoming is None:
        more = benchmark_plan.following(benchmark.id, recipe, points)
        for point in more:
            turn.put(point, "point_planned")
        if more:
            turn.put(replace(benchmark, planned=len(points) + len(more)), "benchmark_goes_on", points=len(more))
        elif any(point.state == "completed" for point in points):
            _finish(turn, benchmark, None)
        else:
            _finish(turn, benchmark, points[-1].error if points else None)
        return
    waits = _what_it_waits_for(turn, benchmark, recipe)
    if waits:
        note(turn, benchmark, waits)
        return
    is_ready, words, error = service_stands(turn.state, benchmark)
    if not is_ready:
        since_ms = max(benchmark.since_ms, ended[-1].ended_ms if ended else 0)
        if error is None and _is_over(turn, benchmark, recipe.server.ready_timeout, since_ms):
            error = TimedOut(f"the service is not ready any more: {words}").info()
        _note_or_finish(turn, benchmark, words, error)
        return
    benchmark_points.begin(turn, benchmark, recipe, upcoming)


def _after_point(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe, ended_ms: int) -> Benchmark:
    """Notes the pause, and that a load node was lost."""
    state = turn.state
    is_degraded = any(point.coverage < 1 for point in points_of(state, benchmark.id) if point.state == "completed")
    not_before_ms = ended_ms + int(recipe.pause * 1000)
    changed = replace(benchmark, is_degraded=is_degraded, not_before_ms=not_before_ms if recipe.pause else 0)
    if changed != benchmark:
        turn.put(changed, "benchmark_changed")
    return changed


def _what_it_waits_for(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> str:
    """What must end before the next point begins: generators of the one before, and the pause."""
    state = turn.state
    left = [run for run in benchmark_facts.runs_of(state, benchmark.id) if run.kind == "load"]
    if left:
        return f"waits for {left[0].node} to forget {left[0].id}"
    quiet_ms = benchmark_points.quiet_ms(state, recipe, points_of(state, benchmark.id))
    if quiet_ms > turn.now_ms:
        return f"waits {(quiet_ms - turn.now_ms) // 1000} s until what a lost load node still sends has surely ended"
    return "pauses between two points" if turn.now_ms < benchmark.not_before_ms else ""


def _note_or_finish(turn: Turn, benchmark: Benchmark, words: str, error: ErrorInfo | None) -> None:
    if error is not None:
        _finish(turn, benchmark, error)
    else:
        note(turn, benchmark, words)


def _finish(turn: Turn, benchmark: Benchmark, error: ErrorInfo | None) -> None:
    """No more points: what goes on is ended, and the rest is said not to have been run."""
    points = points_of(turn.state, benchmark.id)
    for point in points:
        if point.state not in POINT_ENDED:
            benchmark_points.cancel(turn, point)
    best = benchmark_plan.best_of(recipe_of(benchmark), points)
    _enter(turn, replace(benchmark, error=error, best=best), "finishing")


def _enter(turn: Turn, benchmark: Benchmark, state: str) -> None:
    changed = replace(benchmark, state=state, since_ms=turn.now_ms, note="")
    turn.put(changed, f"benchmark_{state}")


def note(turn: Turn, benchmark: Benchmark, words: str) -> None:
    """Says what it waits for, when that is new."""
    if benchmark.note != words:
        turn.put(replace(benchmark, note=words), "benchmark_waits", note=words)


# time
def on_tick(turn: Turn) -> None:
    """Once a second: every live benchmark looks again, and ended ones beyond the limits go with their files."""
    state = turn.state
    for key in state.live_benchmarks:
        turn.touch("benchmark", key)
    for key in state.runs:
        turn.touch("run", key)
    for key in _surplus(state):
        _remove(turn, state.benchmarks[key], "benchmark_pruned")


def _surplus(state: State) -> list[str]:
    """The oldest ended benchmarks beyond the numbers that are kept, a few at once."""
    ended = len(state.benchmarks) - len(state.live_benchmarks)
    too_many, excess = ended - limits.BENCHMARKS_KEPT, len(state.points) - limits.BENCHMARK_POINTS_KEPT
    if too_many <= 0 and excess <= 0:
        return []
    by_age = (
        (benchmark.ended_ms, key) for key, benchmark in state.benchmarks.items() if key not in state.live_benchmarks
    )
    going: list[str] = []
    for _, key in heapq.nsmallest(_PRUNED_PER_TICK, by_age):
        if too_many - len(going) <= 0 and excess <= 0:
            break
        going.append(key)
        excess -= len(state.points_by_benchmark.get(key, ()))
    return going


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    **benchmark_runs.HANDLERS,
    BenchmarkWritten: written,
    CancelBenchmarkRequested: cancel,
    CreateBenchmarkRequested: create,
    DeleteBenchmarkRequested: delete,
    PointJudged: point_judged,
}
