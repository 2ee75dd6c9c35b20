"""Jobs: durable graphs of steps, brought forward whenever something they wait for changes.

A step runs once everything it depends on is completed, independent steps at the same time, at most
STEPS_RUNNING_PER_NODE of those that move bytes or start engines on one node; jobs of higher priority first, then the
older. A failed step takes all that depends on it with it at once. States that end never change again. Nothing of a job
is kept outside its object, so a head that starts again goes on where the journal ends.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from common import limits
from common.backoff import ceiling_ms
from common.errors import (
    Cancelled,
    CopyNotFound,
    DependencyFailed,
    ErrorInfo,
    HerderError,
    InvalidJob,
    JobNotFound,
    ModelNotFound,
    NodeNotFound,
    TimedOut,
    TooMany,
)
from common.ids import check_service_name, parse_device
from head.core import (
    admission,
    benchmark_steps,
    copy_facts,
    engine_steps,
    idempotency,
    job_files,
    job_steps,
    service_orders,
    service_specs,
    source_urls,
)
from head.core.events import CancelJobRequested, CreateJobRequested, Event
from head.core.objects import Job, Step
from head.core.state import HEAVY_ACTIONS, JOB_ENDED, STEP_ENDED, State
from head.core.turn import Turn

_LOOK_MS = 5_000  # a job with something running or blocked looks again at least so often
_LOOKED_PER_TICK = 500


# requests
def create(turn: Turn, event: CreateJobRequested) -> None:
    """A job file, or a one-step job. Answered with the job.

    Raises: InvalidJob, JobCycle, ModelNotFound, InvalidDevice, NodeNotFound, DeviceNotFound, InvalidSource,
    InvalidValue, RecipeNotFound, TooMany; for a job of one step also what that step would find missing at once.
    """
    if idempotency.replayed(turn, event):
        return
    state = turn.state
    if len(state.live_jobs) >= limits.JOBS_LIVE:
        raise TooMany(f"{len(state.live_jobs)} jobs have not ended", hint="try again later", limit=limits.JOBS_LIVE)
    if event.fresh_id in state.jobs or not event.fresh_id:
        raise InvalidJob("the request has no fresh id", hint="this is a mistake of the head's shell")
    steps = tuple(_checked(state, step) for step in job_files.steps_of(event.body.actions))
    if len(steps) == 1:
        _refuse_vain(state, steps[0])
    job = Job(
        id=event.fresh_id,
        name=event.body.name,
        actor=event.actor,
        state="pending",
        created_ms=turn.now_ms,
        steps=steps,
        description=event.body.description,
        priority=event.body.priority,
    )
    turn.put(job, "job_created", steps=len(steps))
    idempotency.answer(turn, event, f"job:{job.id}")


def cancel(turn: Turn, event: CancelJobRequested) -> None:
    """Cancels a job; one that has ended stays as it is. Answered with the job. Raises: JobNotFound."""
    job = turn.state.jobs.get(event.job)
    if job is None:
        raise JobNotFound(f"no job {event.job[:80]!r}", hint="`herder jobs` lists them", job=event.job)
    if job.state not in JOB_ENDED and not job.is_cancelling:
        turn.put(replace(job, is_cancelling=True), "job_cancel_requested", actor=event.actor)
    turn.reply(event, reference=f"job:{event.job}")


def _checked(state: State, step: Step) -> Step:
    """The step with canonical device names, if what it names exists."""
    try:
        if step.model and step.model not in state.models:
            raise ModelNotFound(f"no model {step.model[:200]!r}", hint="register it first", model=step.model)
        if step.source_url:
            step = replace(step, source_url=source_urls.check_source(step.source_url))
        service_specs.check_general_config(step.config)
        if step.action == "serve":
            _check_serve(state, step)
        elif step.action == "benchmark":
            benchmark_steps.recipe_of(state, step)
        return replace(
            step,
            source_device=_known_device(state, step.source_device),
            target_device=_known_device(state, step.target_device),
        )
    except HerderError as error:
        error.details.setdefault("step", step.id)
        raise


def _check_serve(state: State, step: Step) -> None:
    """What is known now of the engine that a serve step asks for."""
    if step.config.get("name"):
        check_service_name(step.config["name"])
    model = state.models[step.model]
    file_format = service_specs.model_format(state, model, model.revision)
    if step.config.get("recipe"):
        recipe = service_specs.recipe_named(state, step.config["recipe"])
        service_specs.check_fits(recipe, model, file_format)
    elif file_format:
        recipe = service_specs.recipe_for(state, model, file_format)
    else:
        return
    service_orders.check_spec(recipe, step.config, (str(parse_device(step.target_device)),))


def _known_device(state: State, text: str) -> str:
    if not text:
        return ""
    device = parse_device(text)
    if device.node not in state.nodes:
        known = sorted(state.nodes)[:20]
        raise NodeNotFound(
            f"no node {device.node!r}", hint=f"known nodes: {', '.join(known) or 'none'}", node=device.node
        )
    return str(admission.require_device(state, str(device)))


def _refuse_vain(state: State, step: Step) -> None:
    """A job of one step that could only fail is refused at the door, with the step's own error."""
    is_gpu = ":gpu" in step.target_device
    if (step.action == "stop_serve" and not step.config.get("name")) or (step.action == "delete" and is_gpu):
        engine_steps.require_engine(state, step.model, step.target_device)
    elif step.action == "delete":
        held = (state.copies[key] for key in state.copies_by_model.get(step.model, ()))
        if not any(copy.device == step.target_device for copy in held):
            raise CopyNotFound(f"{step.target_device} has no copy of {step.model}", model=step.model)


# reconciliation
def reconcile(turn: Turn, key: str) -> None:
    """Brings a job forward: looks at running steps, skips what cannot run, starts what can."""
    job = turn.state.jobs.get(key)
    if job is None or job.state in JOB_ENDED:
        turn.state.due_ms.pop(f"job:{key}", None)
        return
    run = _Run(turn, job)
    for index, step in enumerate(run.steps):
        if step.state == "running":
            run.steps[index] = _advanced(turn, job, step)
    if job.is_cancelling:
        run.cancel_all()
    run.settle()
    after = run.result()
    if after != job:
        what = "job_changed" if after.state == job.state else f"job_{after.state}"
        turn.put(after, what, cause=job.id)
    _set_due(turn, after)
    _wake_queue(turn, job, after)


def _advanced(turn: Turn, job: Job, step: Step) -> Step:
    """A running step after a look at its target and at the clock."""
    try:
        looked = job_steps.look(turn, job, step)
    except HerderError as error:
        looked = engine_steps.failed(turn, step, error.info())
    if looked.state == "running" and looked.phase != "cancel":
        overdue = _overdue(turn.state, looked, turn.now_ms)
        if overdue is not None:
            stopped = job_steps.cancel(turn, job, looked, why="timed out")
            return engine_steps.failed(turn, stopped, overdue.info())
    return _retried(turn, looked) if looked.state == "failed" else looked


class _Run:
    """One pass over a job's steps: the steps as they become, and what is begun on the way."""

    def __init__(self, turn: Turn, job: Job) -> None:
        self.turn = turn
        self.job = job
        self.steps = list(job.steps)
        self.by_id = {step.id: index for index, step in enumerate(self.steps)}
        self.dependents: dict[str, list[int]] = {}
        self.others: dict[str, int] = {}  # node -> steps of other jobs that run there
        self.own: dict[str, int] = {}  # node -> steps of this job that run there now
        for index, step in enumerate(self.steps):
            for name in step.dependencies:
                self.dependents.setdefault(name, []).append(index)
            if step.state == "running" and step.action in HEAVY_ACTIONS:
                node = _node_of(step)
                self.others[node] = self.others.get(node, len(turn.state.running_steps.get(node, ()))) - 1

    def cancel_all(self) -> None:
        """Ends what has not begun and asks what runs to stop."""
        for index, step in enumerate(self.steps):
            if step.state == "pending":
                error = Cancelled("the job was cancelled before this step began").info()
                self.steps[index] = replace(step, state="cancelled", ended_ms=self.turn.now_ms, error=error, note="")
            elif step.state == "running":
                self.steps[index] = job_steps.cancel(self.turn, self.job, step)

    def settle(self) -> None:
        """Skips and begins steps until nothing follows any more; each end wakes only its dependents."""
        for step in self.steps:
            self._count(step)
        work = list(range(len(self.steps) - 1, -1, -1))
        while work:
            index = work.pop()
            before = self.steps[index]
            if before.state == "pending":
                self.steps[index] = self._considered(before)
                self._count(self.steps[index])
            after = self.steps[index]
            if after.state in STEP_ENDED and before.state not in STEP_ENDED:
                work.extend(reversed(self.dependents.get(after.id, ())))

    def _count(self, step: Step) -> None:
        if step.state == "running" and step.action in HEAVY_ACTIONS:
            node = _node_of(step)
            self.own[node] = self.own.get(node, 0) + 1

    def _considered(self, step: Step) -> Step:
        dependencies = [self.steps[self.by_id[name]] for name in step.dependencies]
        broken = next((other for other in dependencies if other.state in STEP_ENDED - {"completed"}), None)
        if broken is not None:
            error = DependencyFailed(f"step {broken.id} is {broken.state}", step=broken.id).info()
            return replace(step, state="skipped", ended_ms=self.turn.now_ms, error=error, note="")
        waited = [other.id for other in dependencies if other.state != "completed"]
        if waited:
            more = f" and {len(waited) - 3} more" if len(waited) > 3 else ""
            return _noted(step, f"waits for {', '.join(waited[:3])}{more}")
        if self.turn.now_ms < step.not_before_ms:
            return step  # its note says why it is tried again
        if step.action in HEAVY_ACTIONS:
            full = self._no_room(step)
            if full:
                return _noted(step, full)
        return self._begun(step)

    def _begun(self, step: Step) -> Step:
        try:
            begun = job_steps.begin(self.turn, self.job, step)
        except HerderError as error:
            attempted = replace(
                step, attempts=step.attempts + 1, started_ms=step.started_ms or self.turn.now_ms, state="running"
            )
            begun = engine_steps.failed(self.turn, attempted, error.info())
        return _retried(self.turn, begun) if begun.state == "failed" else begun

    def _no_room(self, step: Step) -> str:
        """Why a step has to wait for a free place on its node, in words; "" when it need not."""
        node = _node_of(step)
        state = self.turn.state
        others = self.others.get(node, len(state.running_steps.get(node, ())))
        free = limits.STEPS_RUNNING_PER_NODE - others - self.own.get(node, 0)
        if free <= 0:
            return f"waits for a free place: {limits.STEPS_RUNNING_PER_NODE} steps run on {node}"
        queued = state.queued_steps.get(node, ())
        if len(queued) <= free:
            return ""
        ahead = [key for key in _queue(state, node, self.turn.now_ms) if _rank(state.jobs[key]) < _rank(self.job)]
        return f"waits for a free place on {node}: {len(ahead)} jobs are before it" if len(ahead) >= free else ""

    def result(self) -> Job:
        """The job with the steps as they are now."""
        steps = tuple(self.steps)
        state = _job_state(self.job, steps)
        now_ms = self.turn.now_ms
        is_ended = state in JOB_ENDED
        return replace(
            self.job,
            steps=steps,
            state=state,
            started_ms=self.job.started_ms or (now_ms if any(step.started_ms for step in steps) else 0),
            ended_ms=now_ms if is_ended else 0,
            error=_job_error(steps) if state == "failed" else None,
        )


def _job_state(job: Job, steps: tuple[Step, ...]) -> str:
    if all(step.state in STEP_ENDED for step in steps):
        if all(step.state == "completed" for step in steps):
            return "completed"
        return "cancelled" if job.is_cancelling else "failed"
    return "running" if any(step.state != "pending" or step.attempts for step in steps) else "pending"


def _job_error(steps: tuple[Step, ...]) -> ErrorInfo | None:
    """The first failed step's error, with the step's name."""
    broken = next((step for step in steps if step.state == "failed" and step.error is not None), None)
    if broken is None or broken.error is None:
        return None
    details = {**broken.error.details, "step": broken.id}
    return replace(broken.error, message=f"step {broken.id}: {broken.error.message}", details=details)


# retries and time
def _retried(turn: Turn, step: Step) -> Step:
    """A step whose attempt failed: pending again where another attempt can help, else failed as it is.

    Copies and engines have had their own attempts by then; those are repeated only where the file says `retries`.
    """
    if step.error is None or not job_steps.is_retryable(step.error) or step.error.code == "timed_out":
        return step
    if step.retries >= 0:
        allowed = step.retries + 1
    else:
        allowed = limits.STEP_ATTEMPTS if not step.phase and step.action != "health_check" else 1
    if step.attempts >= allowed:
        return step
    delay_ms = ceiling_ms(step.attempts, base_ms=limits.STEP_BACKOFF_BASE_MS, cap_ms=limits.STEP_BACKOFF_CAP_MS)
    return replace(
        step,
        state="pending",
        phase="",
        target="",
        ended_ms=0,
        not_before_ms=turn.now_ms + delay_ms,
        note=f"attempt {step.attempts} of {allowed} failed: {step.error.message}; the next follows soon",
    )


def _overdue(state: State, step: Step, now_ms: int) -> TimedOut | None:
    """Why a running step has run for too long, or None."""
    spent_ms = now_ms - step.started_ms
    if step.timeout_ms:
        if spent_ms > step.timeout_ms:
            return TimedOut(
                f"not done after {step.timeout_ms // 1000} s, as its timeout says", seconds=spent_ms // 1000
            )
        return None
    if step.phase == "benchmark":
        return None  # it has a time of its own
    model = state.models.get(step.model)
    size = copy_facts.expected_bytes(state, step.model, model.revision) if model is not None else 0
    allowed_ms = limits.STEP_BASE_MS + size * 1000 // limits.STEP_BYTES_PER_S
    if spent_ms > allowed_ms:
        return TimedOut(f"not done after {allowed_ms // 1000} s, which its size allows", seconds=spent_ms // 1000)
    progress = state.progress.get(step.target.partition(":")[2]) if step.phase == "copy" else None
    if progress is None or progress.state != "fetching":
        return None
    still_ms = now_ms - max(progress.changed_ms, progress.started_ms, state.started_ms, step.started_ms)
    if still_ms > limits.STEP_STALL_MS:
        done = progress.bytes_done
        return TimedOut(f"no byte came for {still_ms // 60_000} minutes, after {done} bytes", bytes_done=done)
    return None


def on_tick(turn: Turn) -> None:
    """Once a second: retries and timeouts that are due, and ended jobs beyond JOBS_KEPT."""
    state = turn.state
    due = [
        (at_ms, _rank(state.jobs[key]))
        for key in state.live_jobs
        if (at_ms := state.due_ms.get(f"job:{key}", 0)) <= turn.now_ms
    ]
    for _, rank in sorted(heapq.nsmallest(_LOOKED_PER_TICK, due), key=lambda item: item[1]):
        turn.touch("job", rank[2])
    excess = len(state.jobs) - len(state.live_jobs) - limits.JOBS_KEPT
    if excess >= limits.JOBS_PRUNED_PER_TICK or (excess > 0 and turn.now_ms // 60_000 != state.last_tick_ms // 60_000):
        ended = ((facts.ended_ms, key) for key, facts in state.jobs.facts.items() if key not in state.live_jobs)
        for _, key in heapq.nsmallest(min(excess, limits.JOBS_PRUNED_PER_TICK), ended):
            turn.delete("job", key, "job_pruned")


def _set_due(turn: Turn, job: Job) -> None:
    key = f"job:{job.id}"
    due = turn.state.due_ms
    if job.state in JOB_ENDED:
        due.pop(key, None)
        return
    pauses = [step.not_before_ms for step in job.steps if step.state == "pending" and step.not_before_ms > turn.now_ms]
    due[key] = min([turn.now_ms + _LOOK_MS, *pauses])

    def look_now() -> None:
        turn.state.due_ms.pop(key, None)

    turn.on_rollback(look_now)


# the queue of each node
def _rank(job: Job) -> tuple[int, int, str]:
    """Jobs of higher priority first, then the older, then by id."""
    return -job.priority, job.created_ms, job.id


def _queue(state: State, node: str, now_ms: int) -> list[str]:
    """The jobs that could begin a step on a node now, in their order."""
    ready = [
        key
        for key in state.queued_steps.get(node, ())
        if not state.jobs[key].is_cancelling
        and any(
            step.state == "pending" and step.not_before_ms <= now_ms and _node_of(step) == node
            for step in state.jobs[key].steps
        )
    ]
    return sorted(ready, key=lambda key: _rank(state.jobs[key]))


def _wake_queue(turn: Turn, before: Job, after: Job) -> None:
    """Where steps of this job have ended, the next of the queue begin."""
    state = turn.state
    freed = dict.fromkeys(
        _node_of(old)
        for old, new in zip(before.steps, after.steps, strict=True)
        if old.state == "running" and new.state != "running" and old.action in HEAVY_ACTIONS
    )
    for node in freed:
        if state.queued_steps.get(node):
            free = limits.STEPS_RUNNING_PER_NODE - len(state.running_steps.get(node, ()))
            for key in _queue(state, node, turn.now_ms)[: max(0, free)]:
                turn.touch("job", key)


def _node_of(step: Step) -> str:
    return step.target_device.partition(":")[0]


def _noted(step: Step, note: str) -> Step:
    return step if step.note == note else replace(step, note=note)


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    CreateJobRequested: create,
    CancelJobRequested: cancel,
}
