"""Points: one load on all load nodes together, from preparing it to its judged figures.

preparing: every node writes all that it will send. armed: all have, alike, and their clocks are asked. running: each
was told a moment of its own clock. collecting: the files are on their way. judging: the shell merges them.
A node that is lost on the way takes its part with it: the others go on, coverage says what is missing, and the point
is not valid. When a start was missed (this head was away when it should have told the moment) all of it is given up.
Every wait has its end; time from before this head's start does not count.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from common import limits
from common.bench.recipe import BenchmarkRecipe
from common.errors import DigestMismatch, ErrorInfo, NodeUnreachable, TimedOut, Unavailable
from head.core import benchmark_orders, benchmark_runs
from head.core.benchmark_facts import load_runs
from head.core.effects import JudgePoint
from head.core.events import PointJudged
from head.core.objects import Benchmark, Part, Point, Run
from head.core.state import POINT_ENDED, RUN_ENDED, State
from head.core.turn import Turn

_NS = 1_000_000
_JUDGE_MS = int(limits.JUDGE_S * 1000)
_JUDGED_AGAIN_MS = 2 * _JUDGE_MS  # the shell is asked again when it has not answered for so long
_REASONS = 32
_FIGURES = 64
_SAID = 12
_SAID_CHARS = 300
_IN_WORDS = {
    "server_changed": "the service's engines were others at the end than at the start",
    "degraded": "a load node was lost: its part of the load is missing, and nothing is scaled up for it",
}


def begin(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe, point: Point) -> None:
    """Makes the runs of a point; every load node prepares its part."""
    parts = len(benchmark.load_nodes)
    runs = [
        benchmark_runs.make(turn, benchmark, node, "load", point=point.number, part=part, parts=parts)
        for part, node in enumerate(benchmark.load_nodes)
    ]
    begun = replace(
        point,
        runs=tuple(run.id for run in runs),
        urls=benchmark_orders.urls_of(turn.state, benchmark, recipe),
        started_ms=turn.now_ms,
    )
    _enter(turn, begun, "preparing")


def advance(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe, point: Point) -> None:
    """Brings the present point forward as far as its runs allow."""
    for run in load_runs(turn.state, point):
        benchmark_runs.watch(turn, run)
    if point.state in ("preparing", "armed") and _began_without_us(turn, point):
        return
    match point.state:
        case "preparing":
            _prepare(turn, point)
        case "armed":
            _arm(turn, benchmark, recipe, point)
        case "running":
            _run(turn, recipe, point)
        case "collecting":
            _collect(turn, benchmark, point)
        case "judging":
            _judge(turn, benchmark, point)
        case _:
            pass


def _began_without_us(turn: Turn, point: Point) -> bool:
    """Gives the point up when a run has begun that this life of the state never fired (it is a restored one)."""
    begun = [run for run in load_runs(turn.state, point) if run.state in ("running", "uploading", "done")]
    if begun:
        node = begun[0].node
        fail(turn, point, Unavailable(f"{node} began at the word of an earlier state of this head", node=node).info())
    return bool(begun)


def _prepare(turn: Turn, point: Point) -> None:
    if _is_over(turn.state, point, limits.RUN_PREPARE_MS, turn.now_ms):
        for run in _going(turn.state, point):
            if run.state != "armed":
                seconds = limits.RUN_PREPARE_MS // 1000
                late = TimedOut(f"{run.node} was not prepared within {seconds} s: it is {run.state}", node=run.node)
                benchmark_runs.lose(turn, run, late.info())
    going = _going(turn.state, point)
    if not going:
        fail(turn, point, _first_error(turn.state, point))
        return
    waiting = [run.node for run in going if run.state != "armed"]
    if waiting:
        _note(turn, point, _waits(turn.state, waiting, "not ready to begin"))
        return
    digests = {run.digest for run in going}
    if len(digests) > 1:
        shown = {run.node: run.digest[:16] for run in going[:20]}
        error = DigestMismatch(
            "the load nodes would not do the same: what they drew from one spec differs",
            hint="their agents, datasets or tokenizers are not of one version",
            digests=shown,
        )
        fail(turn, point, error.info())
        return
    _enter(turn, point, "armed")


def _arm(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe, point: Point) -> None:
    """Everybody is ready: asks the clocks, and names the moment once all are known."""
    state = turn.state
    going = _going(state, point)
    if not going:
        fail(turn, point, _first_error(state, point))
        return
    if any(run.state != "armed" for run in going):
        _enter(turn, point, "preparing")  # an agent began anew
        return
    if benchmark_orders.urls_of(state, benchmark, recipe) != point.urls:
        moved = Unavailable("an engine is not where it was when the load was prepared", urls=list(point.urls[:20]))
        fail(turn, point, moved.info())
        return
    clocks = {run.node: benchmark_runs.clock_of(turn, run.node) for run in going}
    unknown = [node for node, clock in clocks.items() if clock is None]
    if unknown and _is_over(state, point, limits.RUN_LOST_MS, turn.now_ms):
        for run in going:
            if run.node in unknown:
                silent = NodeUnreachable(f"{run.node} did not tell its clock", node=run.node)
                benchmark_runs.lose(turn, run, silent.info())
        return  # the losses touch the benchmark, which looks again
    if unknown:
        _note(turn, point, _waits(state, unknown, "asked for the time"))
        return
    fire_ms = turn.now_ms + limits.RUN_LEAD_MS
    bounds = sorted((clock.bound_ns for clock in clocks.values() if clock is not None), reverse=True)
    for run in going:
        clock = clocks[run.node]
        assert clock is not None
        benchmark_runs.fire(turn, run, fire_ms * _NS + clock.offset_ns)
    skew_ms = sum(bounds[:2]) / _NS if len(bounds) > 1 else 0.0
    servers = benchmark_orders.servers_of(state, benchmark)
    _enter(turn, replace(point, fire_ms=fire_ms, skew_ms=skew_ms, servers=servers), "running")


def _run(turn: Turn, recipe: BenchmarkRecipe, point: Point) -> None:
    state = turn.state
    if _missed(turn, point):
        return
    allowed_ms = limits.RUN_LEAD_MS + benchmark_orders.sending_ms(recipe, point) + limits.RUN_COLLECT_MS
    if _is_over(state, point, allowed_ms, turn.now_ms):
        _give_up(turn, point, f"not over {allowed_ms // 1000} s after its start")
    going = _going(state, point)
    running = [run.node for run in going if run.state != "uploading"]
    if not running:
        _enter(turn, point, "collecting")
    else:
        _note(turn, point, _waits(state, running, "at it"))


def _missed(turn: Turn, point: Point) -> bool:
    """Gives the point up when a load node did not begin with the others."""
    runs = load_runs(turn.state, point)
    late = next((run for run in runs if benchmark_runs.has_missed_its_start(turn.state, run, turn.now_ms)), None)
    if late is not None:
        said = f"began {late.late_ms} ms late" if late.late_ms else "did not begin"
        missed = Unavailable(f"{late.node} {said}: it was told of the common start too late", node=late.node)
        fail(turn, point, missed.info())
    return late is not None


def _collect(turn: Turn, benchmark: Benchmark, point: Point) -> None:
    state = turn.state
    if _missed(turn, point):
        return
    if _is_over(state, point, limits.RUN_COLLECT_MS, turn.now_ms):
        _give_up(turn, point, f"its files did not come within {limits.RUN_COLLECT_MS // 1000} s")
    going = _going(state, point)
    if going:
        _note(turn, point, _waits(state, [run.node for run in going], "handing in files"))
        return
    if not any(run.state == "done" for run in load_runs(state, point)):
        fail(turn, point, _first_error(state, point))
        return
    reasons = ("server_changed",) if benchmark_orders.servers_of(state, benchmark) != point.servers else ()
    judged = _enter(turn, replace(_with_parts(turn, point), reasons=reasons), "judging")
    _judge(turn, benchmark, judged)


def _judge(turn: Turn, benchmark: Benchmark, point: Point) -> None:
    """Asks the shell, once in this process, and again when it does not answer."""
    asked = turn.state.judging_ms
    if _is_over(turn.state, point, 3 * _JUDGE_MS, turn.now_ms):
        fail(turn, point, TimedOut(f"it was not judged within {3 * _JUDGE_MS // 1000} s").info())
        return
    before = asked.get(point.key)
    if before is not None and turn.now_ms - before < _JUDGED_AGAIN_MS:
        return
    _ask(turn, point.key)
    turn.emit(JudgePoint(benchmark.id, benchmark.generation, point.number))


def _ask(turn: Turn, key: str) -> None:
    asked = turn.state.judging_ms
    before = asked.get(key)
    asked[key] = turn.now_ms

    def forget() -> None:
        asked.pop(key, None)
        if before is not None:
            asked[key] = before

    turn.on_rollback(forget)


def judged(turn: Turn, point: Point, event: PointJudged) -> None:
    """The shell has merged the parts of a point, or could not."""
    if event.error is not None:
        fail(turn, point, event.error)
        return
    reasons = tuple(dict.fromkeys((*point.reasons, *event.reasons)))[:_REASONS]
    if point.coverage < 1 and "degraded" not in reasons:
        reasons = (*reasons, "degraded")
    ours = [_IN_WORDS[code] for code in reasons if code in _IN_WORDS and code not in event.reasons]
    said = tuple(sentence[:_SAID_CHARS] for sentence in (*ours, *event.said))[:_SAID]
    figures = dict(sorted(event.figures.items())[:_FIGURES])
    is_valid = event.is_valid and not reasons
    done = replace(point, is_valid=is_valid, reasons=reasons, said=said, figures=figures)
    _end(turn, done, "completed", valid=is_valid, coverage=point.coverage)


def fail(turn: Turn, point: Point, error: ErrorInfo) -> None:
    """The point has come to nothing."""
    failed = replace(_with_parts(turn, point), error=error)
    _end(turn, failed, "failed", error=error.code, reason=error.message)


def cancel(turn: Turn, point: Point) -> None:
    """The point is not wanted any more."""
    _end(turn, _with_parts(turn, point), "cancelled")


def quiet_ms(state: State, recipe: BenchmarkRecipe, points: list[Point]) -> int:
    """Until when a part that was lost after its start may still send by itself; 0: there is none.

    Nobody could tell such a generator to stop, so the next point waits until it has surely ended.
    """
    until_ms = 0
    for point in points:
        if point.fire_ms and any(_is_silent(part) for part in point.parts):
            sent_ms = max(point.fire_ms, state.started_ms) + benchmark_orders.sending_ms(recipe, point)
            until_ms = max(until_ms, sent_ms + limits.RUN_LEAD_MS)
    return until_ms


def _is_silent(part: Part) -> bool:
    return part.state == "lost" and part.error is not None and part.error.code == NodeUnreachable.code


# words and bookkeeping
def _going(state: State, point: Point) -> list[Run]:
    """Its runs that have not ended."""
    return [run for run in load_runs(state, point) if run.state not in RUN_ENDED]


def _is_over(state: State, point: Point, allowed_ms: int, now_ms: int) -> bool:
    return now_ms - max(point.since_ms, state.started_ms) > allowed_ms


def _give_up(turn: Turn, point: Point, why: str) -> None:
    for run in _going(turn.state, point):
        benchmark_runs.lose(turn, run, TimedOut(f"{run.node}: {why}", node=run.node).info())


def _first_error(state: State, point: Point) -> ErrorInfo:
    errors = [run.error for run in load_runs(state, point) if run.error is not None]
    return errors[0] if errors else Unavailable("no load node is left").info()


def _with_parts(turn: Turn, point: Point) -> Point:
    """The point with what became of its runs, which are not wanted any more."""
    if not point.runs or point.parts:
        return point
    runs = load_runs(turn.state, point)
    parts: tuple[Part, ...] = tuple(benchmark_runs.part_of(run) for run in runs)
    for run in runs:
        benchmark_runs.forget(turn, run)
    done = sum(part.state == "done" for part in parts)
    return replace(point, parts=parts, coverage=done / len(point.runs))


def _enter(turn: Turn, point: Point, state: str) -> Point:
    changed = replace(point, state=state, since_ms=turn.now_ms, note="")
    turn.put(changed, f"point_{state}")
    turn.touch("benchmark", point.benchmark)
    return changed


def _end(turn: Turn, point: Point, state: str, **detail: Any) -> None:
    if point.state in POINT_ENDED:
        return
    turn.state.judging_ms.pop(point.key, None)
    ended = replace(point, state=state, since_ms=turn.now_ms, ended_ms=turn.now_ms, note="")
    turn.put(ended, f"point_{state}", **detail)
    turn.touch("benchmark", point.benchmark)


def _note(turn: Turn, point: Point, note: str) -> None:
    """Notes are written when they change; they name few nodes, so that they change rarely."""
    if point.note != note:
        turn.put(replace(point, note=note), "point_waits", note=note)


def _waits(state: State, nodes: list[str], doing: str) -> str:
    """Who is at what; nodes that cannot be reached come first, since the others may have to wait for their end."""
    gone = [name for name in nodes if name in state.nodes and state.nodes[name].status == "unreachable"]
    if gone:
        who = f"{gone[0]} is" if len(gone) == 1 else f"{len(gone)} load nodes are"
        return f"{who} unreachable; what is so for {limits.RUN_LOST_MS // 1000} s has lost its part"
    return f"{nodes[0]} is {doing}" if len(nodes) == 1 else f"load nodes are {doing}"
