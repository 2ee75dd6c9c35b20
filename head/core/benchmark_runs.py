"""Runs: what agents say of their parts of a benchmark, and the commands that prepare, fire and end them.

A run is `pending` until its agent has confirmed it; `done`, `failed` and `lost` stay. What an agent reports that no
benchmark knows is told to be forgotten. A run that shall go keeps its object until its agent has said that it is gone,
or cannot be reached: then it is told when it comes back.

Ending is said twice with two numbers, for an agent hears each (op, generation) once: "finish" under the run's own
generation, "forget" under the next. Source for levels instead of edges: Kubernetes' controllers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from msgspec.structs import replace

from common import limits, wire
from common.errors import Conflict, ErrorInfo, NodeNotFound, NodeUnreachable, Unavailable
from head.core import benchmark_orders, commands, node_facts
from head.core.effects import MeasureClock
from head.core.events import ArtifactStored, ClockMeasured, Event
from head.core.objects import Benchmark, Part, Run
from head.core.state import RUN_ENDED, Clock, State
from head.core.turn import Turn

_REPORTED = frozenset({"preparing", "armed", "running", "uploading"})
_ARTIFACT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NS = 1_000_000
_CLOCK_AGAIN_MS = 3_000
_DISAGREED = 1 << 63  # no digest: the next lease asks for the report again


# made and changed by the benchmark
def make(
    turn: Turn, benchmark: Benchmark, node: str, kind: str, *, point: int = -1, part: int = 0, parts: int = 1
) -> Run:
    """A new run, to be prepared as soon as its agent can hear; a monitor begins by itself."""
    run_id = f"{benchmark.id}.monitor.{node}" if kind == "monitor" else f"{benchmark.id}.{point}.{part}"
    run = Run(
        id=run_id,
        benchmark=benchmark.id,
        node=node,
        kind=kind,
        generation=turn.next_generation(),
        desired="fired" if kind == "monitor" else "armed",
        state="pending",
        cause=benchmark.cause,
        created_ms=turn.now_ms,
        point=point,
        part=part,
        parts=parts,
    )
    turn.put(run, "run_planned", node=node)
    return run


def fire(turn: Turn, run: Run, start_boottime_ns: int) -> None:
    """The run shall begin at this moment of its node's clock."""
    turn.put(replace(run, desired="fired", start_boottime_ns=start_boottime_ns), "run_fired")


def finish(turn: Turn, run: Run) -> None:
    """The run shall send no more, and hand in what it has."""
    if run.desired in ("armed", "fired") and run.state not in RUN_ENDED:
        turn.put(replace(run, desired="ended"), "run_finishing")


def forget(turn: Turn, run: Run) -> None:
    """The run shall be gone, whatever it is at."""
    if run.desired != "absent":
        turn.put(replace(run, desired="absent"), "run_unwanted")


def lose(turn: Turn, run: Run, error: ErrorInfo, *, state: str = "lost") -> None:
    """The run has come to nothing; what it may still do is ended."""
    if run.state not in RUN_ENDED:
        turn.put(replace(run, state=state, error=error), f"run_{state}", error=error.code, reason=error.message)


def drop(turn: Turn, run: Run) -> None:
    """The object goes; whoever still has the run is told when he reports it."""
    turn.delete("run", run.id, "run_forgotten")
    turn.touch("benchmark", run.benchmark)


def part_of(run: Run) -> Part:
    """What is kept of a run."""
    state = run.state if run.state in RUN_ENDED else "cancelled"
    return Part(run.id, run.node, state, run.artifacts, run.error)


# what agents say
def observe(turn: Turn, node_id: str, statuses: Iterable[wire.RunStatus]) -> None:
    """Takes in a full report of a node: what it names is updated, what it leaves out is not there."""
    named: set[str] = set()
    for status in statuses:
        named.add(status.run)
        run = turn.state.runs.get(status.run)
        if run is None or run.node != node_id:
            _forget_stray(turn, node_id, status)
        elif run.generation != status.generation:
            _other_generation(turn, run, status)
        else:
            _take(turn, run, status)
    for key in tuple(turn.state.runs_by_node.get(node_id, ())):
        if key not in named:
            _missing(turn, turn.state.runs[key])


def on_progress(turn: Turn, node_id: str, progress: wire.Progress) -> None:
    """The state word of a "run:<id>" command; `armed` waits for the report, which has the digest."""
    kind, run = _addressed(turn.state, node_id, progress.op_id, progress.generation)
    if run is None or kind != commands.RUN or run.state in RUN_ENDED:
        return
    if progress.state in ("preparing", "running", "uploading") and progress.state != run.state:
        turn.put(replace(run, state=progress.state), f"run_{progress.state}")


def on_result(turn: Turn, node_id: str, result: wire.Result) -> None:
    """How a command about a run ended; stale generations are ignored. The caller acknowledges."""
    kind, run = _addressed(turn.state, node_id, result.op_id, result.generation)
    if run is None:
        return
    if kind == commands.RUN:
        if run.desired == "absent" and result.outcome == "cancelled":
            drop(turn, run)
        elif result.outcome == "ok":
            _done_by_result(turn, run, result.detail)
        else:
            said = result.error or Unavailable(f"{run.node} ended it and did not say why").info()
            lose(turn, run, said, state="failed")
    elif kind == commands.FIRE and result.outcome == "failed":
        if result.error is not None and result.error.is_retryable:
            return  # told again, unless its moment is over by then
        said = result.error or Conflict(f"{run.node} did not begin and did not say why").info()
        lose(turn, run, said, state="failed")
    elif kind == commands.END and run.desired == "absent" and result.outcome == "ok":
        drop(turn, run)


def _addressed(state: State, node_id: str, op: str, generation: int) -> tuple[str, Run | None]:
    kind, key = commands.split_op_id(op)
    run = state.runs.get(key) if kind in (commands.RUN, commands.FIRE, commands.END) else None
    if run is None or run.node != node_id:
        return kind, None
    wanted = run.generation + 1 if kind == commands.END and run.desired == "absent" else run.generation
    return kind, run if generation == wanted else None


def _take(turn: Turn, run: Run, status: wire.RunStatus) -> None:
    """A status of the present generation."""
    if run.state in RUN_ENDED or run.desired == "absent":
        turn.touch("run", run.id)
    elif status.state == "done" and run.artifacts:
        _done(turn, _begun(run, status.start_boottime_ns))
    elif status.state == "done":
        _ask_again(turn, run)
    elif status.state == "failed":
        said = status.error or Unavailable(f"the run failed on {run.node} and its agent did not say why").info()
        lose(turn, run, said, state="failed")
    elif status.state in _REPORTED:
        changed = replace(run, state=status.state, digest=status.digest or run.digest)
        changed = _begun(changed, status.start_boottime_ns)
        if changed != run:
            turn.put(changed, f"run_{status.state}" if status.state != run.state else "run_changed")
        turn.touch("run", run.id)


def _done_by_result(turn: Turn, run: Run, detail: dict[str, Any]) -> None:
    """The agent's own list of what the head took counts, too: it is written down there before it is said."""
    listed = detail.get("artifacts")
    told = listed if isinstance(listed, list | tuple) else ()
    names = [name for name in told if isinstance(name, str) and _ARTIFACT.fullmatch(name) and ".." not in name]
    kept = tuple(sorted({*run.artifacts, *names}))[: limits.ARTIFACTS_PER_RUN]
    began_ns = detail.get("start_boottime_ns")
    _done(turn, _begun(replace(run, artifacts=kept), began_ns if isinstance(began_ns, int) else 0))


def _ask_again(turn: Turn, run: Run) -> None:
    """It is done and its result, which names the files, was lost with an older life of ours: it is said again."""
    op = commands.op_id(commands.RUN, run.id)
    body = benchmark_orders.ensure_body(turn, run) if _is_due(turn, run, op) else None
    if body is not None:
        _send(turn, run, commands.RUN, run.generation, body)


def _begun(run: Run, began_boottime_ns: int) -> Run:
    """The run with how late it began, where it says so."""
    if run.kind != "load" or not run.start_boottime_ns or began_boottime_ns <= run.start_boottime_ns:
        return run
    return replace(run, late_ms=max(1, (began_boottime_ns - run.start_boottime_ns) // _NS))


def _done(turn: Turn, run: Run) -> None:
    if run.state not in RUN_ENDED:
        turn.put(replace(run, state="done"), "run_done", artifacts=list(run.artifacts))


def _missing(turn: Turn, run: Run) -> None:
    """The agent reported and did not name this run."""
    if run.desired == "absent":
        drop(turn, run)
    elif run.state == "pending":
        turn.touch("run", run.id)
    else:
        lose(turn, run, Unavailable(f"the agent of {run.node} does not know it any more", node=run.node).info())


def _other_generation(turn: Turn, run: Run, status: wire.RunStatus) -> None:
    """A run of this name from another life of the head's state: an order with a higher number takes its place."""
    if run.desired == "absent" or run.state in RUN_ENDED:
        _forget_stray(turn, run.node, status)
    elif run.state != "pending":
        lose(turn, run, Conflict(f"{run.node} has it under another number", node=run.node).info())
    elif run.generation <= status.generation:
        raised = max(turn.next_generation(), status.generation + 1)
        turn.put(replace(run, generation=raised), "run_generation_raised")
    turn.touch("run", run.id)


def _forget_stray(turn: Turn, node_id: str, status: wire.RunStatus) -> None:
    """A run that no benchmark wants there (any more) is told to be forgotten, at every report until it is gone."""
    live = turn.state.live.get(node_id)
    if live is not None:
        live.report_digest = _DISAGREED
    generation = max(status.generation + 1, turn.state.revision)
    body = wire.EndRun(run=status.run, how="forget")
    op = commands.op_id(commands.END, status.run)
    commands.send_if_due(turn, node_id, op, generation, body, cause="stray_run")


# nodes and time
def on_node_rebooted(turn: Turn, node_id: str) -> None:
    """The node came back with a new boot id: every process there is gone, and its clock is another."""
    turn.state.clocks.pop(node_id, None)
    for key in tuple(turn.state.runs_by_node.get(node_id, ())):
        run = turn.state.runs[key]
        if run.state != "pending":
            lose(turn, run, Unavailable(f"{node_id} was booted", node=node_id).info())


def touch_on(turn: Turn, node_id: str) -> None:
    """The runs of a node look at their situation."""
    for key in tuple(turn.state.runs_by_node.get(node_id, ())):
        turn.touch("run", key)


def artifact_stored(turn: Turn, event: ArtifactStored) -> None:
    """A file of a run is with the head."""
    run = turn.state.runs.get(event.run)
    if run is None or run.generation != event.generation or event.name in run.artifacts:
        return
    if len(run.artifacts) < limits.ARTIFACTS_PER_RUN:
        kept = tuple(sorted((*run.artifacts, event.name)))
        turn.put(replace(run, artifacts=kept), "run_artifact_stored", name=event.name, bytes=event.bytes)


def clock_measured(turn: Turn, event: ClockMeasured) -> None:
    """A node's clock is known, in its present session only."""
    live = turn.state.live.get(event.node)
    if live is None or live.session_id != event.session_id:
        return
    asked_ms = turn.state.clocks.get(event.node, Clock()).asked_ms
    bound_ns = max(0, event.bound_ns)
    turn.state.clocks[event.node] = Clock(event.session_id, event.offset_ns, bound_ns, turn.now_ms, asked_ms)
    for key in turn.state.runs_by_node.get(event.node, ()):
        turn.touch("benchmark", turn.state.runs[key].benchmark)


def clock_of(turn: Turn, node_id: str) -> Clock | None:
    """A fresh estimate of a node's clock; None when there is none yet, and then it is asked for."""
    state = turn.state
    live = commands.session_of(state, node_id)
    if live is None:
        return None
    clock = state.clocks.get(node_id)
    if clock is None or clock.session_id != live.session_id:
        clock = state.clocks[node_id] = Clock(session_id=live.session_id)
    if clock.measured_ms and turn.now_ms - clock.measured_ms <= limits.CLOCK_FRESH_MS:
        return clock
    if not clock.asked_ms or turn.now_ms - clock.asked_ms >= _CLOCK_AGAIN_MS:
        before = clock.asked_ms
        clock.asked_ms = turn.now_ms
        turn.on_rollback(lambda: setattr(clock, "asked_ms", before))
        turn.emit(MeasureClock(node_id, live.session_id))
    return None


def node_boottime_ms(state: State, node_id: str, now_ms: int) -> int | None:
    """What a node's CLOCK_BOOTTIME says now, to some milliseconds; None when nothing is known of it."""
    live = state.live.get(node_id)
    if live is None:
        return None
    clock = state.clocks.get(node_id)
    if clock is not None and clock.measured_ms and clock.session_id == live.session_id:
        return now_ms + clock.offset_ns // _NS
    return now_ms + live.boottime_offset_ms if live.boottime_offset_ms else None


def gone_ms(state: State, node_id: str) -> int:
    """Since when a node is surely not reachable, time before this head's start not counted; 0: it may be."""
    node = state.nodes.get(node_id)
    if node is None:
        return 1
    return max(node.status_since_ms, state.started_ms) if node.status != "online" else 0


def watch(turn: Turn, run: Run) -> None:
    """Gives a run up whose node is gone for too long, or that was told to begin and surely has not."""
    state, since_ms = turn.state, gone_ms(turn.state, run.node)
    node = state.nodes.get(run.node)
    if run.state in RUN_ENDED:
        return
    if node is None:
        lose(turn, run, NodeNotFound(f"{run.node} was removed", node=run.node).info())
    elif since_ms and (node.status == "left" or turn.now_ms - since_ms >= limits.RUN_LOST_MS):
        seconds = (turn.now_ms - since_ms) // 1000
        lose(turn, run, NodeUnreachable(f"{run.node} is {node.status} for {seconds} s", node=run.node).info())


def has_missed_its_start(state: State, run: Run, now_ms: int) -> bool:
    """Whether a fired run began apart from the others, or waits although its moment is long over."""
    if run.late_ms and run.parts > 1:
        return True
    if run.kind != "load" or run.desired != "fired" or run.state not in ("armed", "preparing"):
        return False
    there_ms = node_boottime_ms(state, run.node, now_ms)
    live = commands.session_of(state, run.node)
    slack_ms = 2 * node_facts.interval_ms(state) + 5_000
    return live is not None and there_ms is not None and there_ms > run.start_boottime_ns // _NS + slack_ms


# reconciliation
def reconcile(turn: Turn, key: str) -> None:
    """Sends the command that the run's situation asks for."""
    run = turn.state.runs.get(key)
    if run is None:
        return
    turn.touch("benchmark", run.benchmark)
    if run.benchmark not in turn.state.live_benchmarks and run.desired != "absent":
        forget(turn, run)
        return
    if run.desired == "absent":
        if gone_ms(turn.state, run.node):
            drop(turn, run)
        else:
            _send(turn, run, commands.END, run.generation + 1, wire.EndRun(run=run.id, how="forget"))
    elif run.state in RUN_ENDED:
        return
    elif run.desired == "ended":
        _send(turn, run, commands.END, run.generation, wire.EndRun(run=run.id, how="finish"))
    elif run.state == "pending":
        op = commands.op_id(commands.RUN, run.id)
        body = benchmark_orders.ensure_body(turn, run) if _is_due(turn, run, op) else None
        if body is not None:
            _send(turn, run, commands.RUN, run.generation, body)
    elif run.kind == "load" and run.desired == "fired" and run.state == "armed":
        there_ms = node_boottime_ms(turn.state, run.node, turn.now_ms)
        if there_ms is not None and there_ms <= run.start_boottime_ns // _NS:
            body_of_fire = wire.FireRun(run=run.id, start_boottime_ns=run.start_boottime_ns)
            _send(turn, run, commands.FIRE, run.generation, body_of_fire)


def _is_due(turn: Turn, run: Run, op: str) -> bool:
    return commands.is_due(turn, run.node, op, run.generation)


def _send(turn: Turn, run: Run, kind: str, generation: int, body: wire.AnyCommand) -> None:
    commands.send_if_due(turn, run.node, commands.op_id(kind, run.id), generation, body, cause=run.cause)


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    ArtifactStored: artifact_stored,
    ClockMeasured: clock_measured,
}
