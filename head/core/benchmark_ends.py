"""The end of a benchmark: monitors hand in, the shell writes the whole, everything of it is forgotten.

finish goes step by step, each decided by what is there: monitors end and send their files; the shell collects logs and
writes the report; then the service that was made for it is stopped, and agents forget its runs. Engines run until the
report is written, because their logs belong to it. cancel stops everything first, and then has written what was
measured until then, if anything was.
"""

from __future__ import annotations

from msgspec.structs import replace

from common import limits
from common.bench.recipe import BenchmarkRecipe
from common.errors import Cancelled, ErrorInfo, TimedOut, Unavailable
from head.core import benchmark_facts, benchmark_orders, benchmark_points, benchmark_runs, service_orders
from head.core.benchmark_facts import points_of
from head.core.effects import WriteBenchmark
from head.core.objects import Benchmark, Run
from head.core.state import POINT_ENDED, RUN_ENDED
from head.core.turn import Turn

_WRITE_AGAIN_MS = int(2 * limits.JUDGE_S * 1000)
_WRITES = 3


def finish(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> None:
    """Brings a benchmark that has no more points to its end."""
    if not benchmark.is_written:
        if _monitors_end(turn, benchmark):
            _write(turn, benchmark)
        return
    if _is_cleared(turn, benchmark, recipe):
        _end(turn, benchmark, "failed" if benchmark.error is not None else "completed")


def cancel(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> None:
    """Everything of it stops everywhere; points that were measured get their report; then it is cancelled."""
    points = points_of(turn.state, benchmark.id)
    for point in points:
        if point.state not in POINT_ENDED:
            benchmark_points.cancel(turn, point)
    if not _is_cleared(turn, benchmark, recipe):
        return
    if not benchmark.is_written and any(point.state == "completed" for point in points):
        _write(turn, benchmark)
    else:
        said = Cancelled("the benchmark was cancelled").info()
        _end(turn, replace(benchmark, error=benchmark.error or said), "cancelled")


def written(turn: Turn, benchmark: Benchmark, error: ErrorInfo | None) -> None:
    """The shell has written the whole, or could not: then that is the benchmark's error, if it has no other.

    One that is being cancelled ends as cancelled whether its report could be written or not.
    """
    if benchmark.state == "finishing" and not benchmark.is_written:
        turn.state.judging_ms.pop(benchmark.id, None)
        kept = replace(benchmark, is_written=True, since_ms=turn.now_ms)
        if not benchmark.is_cancelling:
            kept = replace(kept, error=benchmark.error or error)
        turn.put(kept, "benchmark_written" if error is None else "benchmark_not_written")


def _monitors_end(turn: Turn, benchmark: Benchmark) -> bool:
    """Whether every monitor has handed in its files or is lost; until then they are told to finish."""
    waiting = ""
    is_late = _is_over(turn, benchmark, limits.RUN_COLLECT_MS)
    for run in _monitors(turn, benchmark):
        benchmark_runs.watch(turn, run)
        run = turn.state.runs[run.id]
        if run.state in RUN_ENDED:
            continue
        if run.state == "pending":
            benchmark_runs.lose(turn, run, Unavailable(f"{run.node} never began to watch").info())
        elif is_late:
            seconds = limits.RUN_COLLECT_MS // 1000
            benchmark_runs.lose(turn, run, TimedOut(f"its files did not come within {seconds} s").info())
        else:
            benchmark_runs.finish(turn, run)
            waiting = waiting or run.node
    if waiting:
        _note(turn, benchmark, "monitors hand in what they have seen")
    return not waiting


def _write(turn: Turn, benchmark: Benchmark) -> None:
    """Has the whole written, once in this process, and again when there is no answer."""
    state = turn.state
    if not benchmark.monitor_parts and _monitors(turn, benchmark):  # those of a cancelled one were forgotten
        parts = tuple(benchmark_runs.part_of(run) for run in _monitors(turn, benchmark))
        benchmark = replace(benchmark, monitor_parts=parts, since_ms=turn.now_ms, note="the report is written")
        turn.put(benchmark, "benchmark_watched")
    if _is_over(turn, benchmark, _WRITES * _WRITE_AGAIN_MS):
        written(turn, benchmark, TimedOut("its report was not written in time").info())
        return
    asked_ms = state.judging_ms.get(benchmark.id)
    if asked_ms is not None and turn.now_ms - asked_ms < _WRITE_AGAIN_MS:
        return
    state.judging_ms[benchmark.id] = turn.now_ms

    def forget() -> None:
        state.judging_ms.pop(benchmark.id, None)
        if asked_ms is not None:
            state.judging_ms[benchmark.id] = asked_ms

    turn.on_rollback(forget)
    turn.emit(WriteBenchmark(benchmark.id, benchmark.generation))


def _is_cleared(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> bool:
    """Stops the own service, has agents forget, and says whether all have or cannot be waited for."""
    state = turn.state
    keeps = recipe.server.serve is not None and recipe.server.serve.keep
    service = state.services.get(benchmark.service) if benchmark.is_own_service and not keeps else None
    if service is not None and service.desired == "running":
        service_orders.stop(turn, service.name, cause=benchmark.id)
    benchmark_orders.forget_keys(turn, benchmark)
    runs = benchmark_facts.runs_of(state, benchmark.id)
    for run in runs:
        benchmark_runs.forget(turn, run)
    if runs and _is_over(turn, benchmark, limits.RUN_LOST_MS):
        for run in runs:
            benchmark_runs.drop(turn, turn.state.runs[run.id])
        return True
    return not runs


def _end(turn: Turn, benchmark: Benchmark, state: str) -> None:
    turn.state.judging_ms.pop(benchmark.id, None)
    ended = replace(benchmark, state=state, ended_ms=turn.now_ms, since_ms=turn.now_ms, note="")
    error = benchmark.error
    turn.put(ended, f"benchmark_{state}", **({"error": error.code, "reason": error.message} if error else {}))


def _monitors(turn: Turn, benchmark: Benchmark) -> list[Run]:
    return [turn.state.runs[key] for key in benchmark.monitors if key in turn.state.runs]


def _is_over(turn: Turn, benchmark: Benchmark, allowed_ms: int) -> bool:
    return turn.now_ms - max(benchmark.since_ms, turn.state.started_ms) > allowed_ms


def _note(turn: Turn, benchmark: Benchmark, words: str) -> None:
    if benchmark.note != words:
        turn.put(replace(benchmark, note=words), "benchmark_waits", note=words)
