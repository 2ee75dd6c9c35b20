"""What the actions of a job do: begin one, look how far it is, end it before its time.

A running step waits on one object (`target`: a copy, a service, a replica, a check or a benchmark) and is looked at
whenever that object changes. `phase` says what it is at: copy (bytes on their way), serve (an engine on its way), drop
(a copy on its way out), stop (an engine on its way out), check (a question asked), benchmark (one goes on), cancel
(undoing what it began). What a step made carries "<job>/<step>" as its cause; only that is undone when it is cancelled.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from common import ids, limits
from common.errors import BY_CODE, Conflict, CopyNotFound, ErrorInfo, InvalidJob
from head.core import benchmark_steps, copies, engine_steps, node_facts
from head.core.copy_facts import IN_FLIGHT
from head.core.engine_steps import cause_of, completed, failed
from head.core.objects import Copy, Job, Step, copy_key
from head.core.state import STEP_ENDED, State
from head.core.turn import Turn


def begin(turn: Turn, job: Job, step: Step) -> Step:
    """Starts a step whose dependencies are completed; it may be completed already. A refusal changes nothing.

    Raises: HerderError, whatever the action meets.
    """
    started = replace(
        step,
        state="running",
        attempts=step.attempts + 1,
        started_ms=step.started_ms or turn.now_ms,
        not_before_ms=0,
        error=None,
        note="",
    )
    match step.action:
        case "download" | "copy" | "move":
            return look(turn, job, _begin_placing(turn, job, started))
        case "serve":
            return look(turn, job, engine_steps.begin_serve(turn, job, started))
        case "stop_serve":
            return look(turn, job, engine_steps.begin_stop(turn, job, started))
        case "delete":
            return look(turn, job, _begin_drop(turn, job, started, started.target_device))
        case "health_check":
            return look(turn, job, engine_steps.begin_check(turn, job, started))
        case "benchmark":
            return look(turn, job, benchmark_steps.begin(turn, job, started))
        case _:
            raise InvalidJob(f"no action {step.action!r}", step=step.id, field="action")


def look(turn: Turn, job: Job, step: Step) -> Step:
    """The step as its target's state makes it. Raises: HerderError when a following phase is refused."""
    while step.state == "running":
        before = step
        match step.phase:
            case "copy":
                step = _look_copy(turn, job, step)
            case "serve":
                step = _look_serve(turn, job, step)
            case "drop":
                step = _look_drop(turn, step)
            case "stop":
                step = engine_steps.look_stop(turn, step)
            case "check":
                step = engine_steps.look_check(turn, step)
            case "benchmark":
                step = benchmark_steps.look(turn, step)
            case _:
                step = _look_cancel(turn, job, step)
        if step == before or step.phase == before.phase:
            break
    return step


def cancel(turn: Turn, job: Job, step: Step, *, why: str = "cancelled") -> Step:
    """Stops what a running step began; it ends once that is gone. What leaves already (a drop) is left to end."""
    if step.phase in ("drop", "stop", "cancel"):
        return step
    if step.phase == "check":
        turn.delete("check", step.target.partition(":")[2], "health_check_cancelled")
    cancelling = replace(step, phase="cancel", not_before_ms=turn.now_ms + limits.STEP_STOP_MS, note=why)
    return look(turn, job, cancelling)


# placing copies
def _begin_placing(turn: Turn, job: Job, step: Step) -> Step:
    target = ids.parse_device(step.target_device)
    if step.action == "move":
        step = replace(step, source_device=_source_of_move(turn.state, step))
    source = step.source_url
    if step.source_device:
        origin = ids.parse_device(step.source_device)
        _require_present(turn.state, step.model, step.source_device)
        source = "" if origin.node == target.node else f"{origin.node}:disk"
    if target.kind == "gpu" and not source:
        return engine_steps.begin_serve(turn, job, step)  # which stages by itself
    device = str(target) if target.kind != "gpu" else f"{target.node}:disk"
    copy = copies.want(turn, step.model, "", device, cause=cause_of(job, step), source=source)
    return replace(step, phase="copy", target=f"copy:{copy.key}", target_generation=copy.generation)


def _source_of_move(state: State, step: Step) -> str:
    """The device to move from: as asked, else the only one; the target's own node decides between several."""
    if step.source_device:
        return step.source_device
    places = [copy.device for copy in _present(state, step.model) if copy.device != step.target_device]
    on_node = [place for place in places if place.partition(":")[0] == step.target_device.partition(":")[0]]
    for few in (places, on_node):
        if len(few) == 1:
            return few[0]
    if not places:
        raise CopyNotFound(f"{step.model} is nowhere to be moved from", hint="download it first", model=step.model)
    raise InvalidJob(
        f"{step.model} is on {', '.join(sorted(places)[:5])}: say from where to move it",
        hint="name the source device",
        step=step.id,
        field="from",
    )


def _present(state: State, model: str) -> list[Copy]:
    found = (state.copies[key] for key in state.copies_by_model.get(model, ()))
    return [copy for copy in found if copy.desired == "present" and copy.state == "ready"]


def _require_present(state: State, model: str, device: str) -> None:
    if not any(copy.device == device for copy in _present(state, model)):
        raise CopyNotFound(f"{device} has no ready copy of {model}", hint=f"`herder models locations {model}`")


def _look_copy(turn: Turn, job: Job, step: Step) -> Step:
    state = turn.state
    copy = state.copies.get(step.target.partition(":")[2])
    if copy is None or copy.desired == "absent":
        return failed(turn, step, CopyNotFound("the copy was taken away while the step waited for it").info())
    if copy.state == "failed":
        return failed(turn, step, copy.error or Conflict("the copy failed and nobody said why").info())
    if copy.state != "ready":
        return _noted(step, _copy_note(state, copy, turn.now_ms))
    result: dict[str, Any] = {"device": copy.device, "bytes": copy.bytes, "digest": copy.digest}
    done = replace(step, result={**step.result, **result})
    if ids.parse_device(step.target_device).kind == "gpu":
        return engine_steps.begin_serve(turn, job, done)
    return _after_placing(turn, job, done)


def _look_serve(turn: Turn, job: Job, step: Step) -> Step:
    step, is_ready = engine_steps.look_serve(turn, step)
    if not is_ready:
        return step
    return completed(turn, step) if step.action == "serve" else _after_placing(turn, job, step)


def _after_placing(turn: Turn, job: Job, step: Step) -> Step:
    """The target has it: a move now lets go of its source, where nothing stands on that."""
    if step.action != "move" or step.keep_source:
        return completed(turn, step)
    source, target = ids.parse_device(step.source_device), ids.parse_device(step.target_device)
    if source.kind == "disk" and source.node == target.node:
        why = "the RAM copy is this disk copy made resident" if target.kind == "dram" else "the engine runs from it"
        words = f"{source} keeps its copy: {why}"
        return completed(turn, replace(step, result={**step.result, "source_kept": True}, note=words), note=words)
    return _begin_drop(turn, job, step, str(source))


# dropping copies
def _begin_drop(turn: Turn, job: Job, step: Step, device: str) -> Step:
    if ids.parse_device(device).kind == "gpu":
        return engine_steps.stop_engine(turn, job, step, device)
    state = turn.state
    model = state.models.get(step.model)
    here = [
        state.copies[key] for key in state.copies_by_model.get(step.model, ()) if state.copies[key].device == device
    ]
    here.sort(key=lambda copy: (model is None or copy.revision != model.revision, copy.revision))
    if not here:
        if step.action == "move":
            return completed(turn, step, note=f"{device} had let go of its copy already")
        raise CopyNotFound(f"{device} has no copy of {step.model}", hint=f"`herder models locations {step.model}`")
    copy = copies.unwant(turn, here[0].key, cause=cause_of(job, step), force=step.is_forced)
    generation = copy.generation if copy is not None else 0
    return replace(step, phase="drop", target=f"copy:{here[0].key}", target_generation=generation)


def _look_drop(turn: Turn, step: Step) -> Step:
    copy = turn.state.copies.get(step.target.partition(":")[2])
    if copy is None:
        return completed(turn, step)
    if copy.desired == "present":
        error = Conflict(f"{copy.key} is wanted again by {copy.cause}", hint="see `herder story`").info()
        return failed(turn, step, error)
    silent = _silence(turn.state, copy.device.partition(":")[0], turn.now_ms)
    return _noted(step, silent or f"is being removed from {copy.device}")


# cancelling
def _look_cancel(turn: Turn, job: Job, step: Step) -> Step:
    """Undoes what the step began, engine first, then RAM, then disk, and waits until each is gone."""
    state, own = turn.state, cause_of(job, step)
    is_late = turn.now_ms >= step.not_before_ms
    if not benchmark_steps.undo(turn, step) and not is_late:
        return step
    service_left = engine_steps.undo_serve(turn, own, step)
    if service_left and not is_late:
        return replace(step, target=service_left)
    model = state.models.get(step.model)
    node = step.target_device.partition(":")[0]
    for storage in ("dram", "disk"):
        key = copy_key(step.model, model.revision if model is not None else "", f"{node}:{storage}")
        copy = state.copies.get(key)
        if copy is None or copy.cause != own or copy.state == "ready" or _has_other_waiters(state, job, step, key):
            continue
        copies.cancel(turn, key, own)
        copy = state.copies.get(key)
        if copy is not None and copy.desired == "absent" and not is_late:
            return replace(step, target=f"copy:{key}")
    where = node or step.target
    note = step.note if not is_late else f"{step.note}; {where} has not confirmed that it stopped"
    return replace(step, state="cancelled", ended_ms=turn.now_ms, note=note, target="")


def _has_other_waiters(state: State, job: Job, step: Step, key: str) -> bool:
    """Whether another running step, of this or another job, waits for the same copy."""
    target = f"copy:{key}"
    if any(other != job.id for other in state.waiters.get(target, ())):
        return True
    return any(
        other.id != step.id and other.target == target and other.state not in STEP_ENDED and other.phase != "cancel"
        for other in job.steps
    )


# words
def _noted(step: Step, note: str) -> Step:
    return step if step.note == note else replace(step, note=note)


def _copy_note(state: State, copy: Copy, now_ms: int) -> str:
    node = copy.device.partition(":")[0]
    silent = _silence(state, node, now_ms)
    if silent:
        return silent
    if copy.state in IN_FLIGHT:
        return f"{copy.model} is on its way to {copy.device}"
    if copy.error is not None and copy.attempts:
        return f"attempt {copy.attempts + 1} for {copy.device} follows: {copy.error.message}"
    return f"waits for room or a source for {copy.device}" if copy.state == "waiting" else f"asks {node} for the copy"


def _silence(state: State, node: str, now_ms: int) -> str:
    seen = node_facts.node_state(state, node, now_ms)
    return "" if seen == "online" else f"waits for {node}, which is {seen}"


def is_retryable(info: ErrorInfo) -> bool:
    """Whether trying again can help, by the error itself and by its code."""
    known = BY_CODE.get(info.code)
    return info.is_retryable or (known is not None and known.is_retryable)
