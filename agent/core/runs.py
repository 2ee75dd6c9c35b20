"""Parts of benchmarks on this node: load generators and monitors, from order to the head holding what they measured.

    preparing -> armed -> running -> uploading -> done       a load run; FireRun leads from armed to running
                          running -> uploading -> done       a monitor, ended by EndRun
                  any state before done -> failed

A run of one generation has at most one process, ever: load that is put on a server twice measures nothing, so a
process that is gone is a failed run and never a restart. Once `EndRun forget` has come nothing of a run stays but a
fence against late repeats of its order.
"""

from __future__ import annotations

import re
from typing import Any

from msgspec.structs import replace

from agent.core.effects import AttachRun, ForgetRun, SignalRun, SpawnRun, StartRun, UploadRun
from agent.core.events import RunEnded, RunForgotten, RunSaid, RunStarted, RunUploaded
from agent.core.objects import Outcome, RunTask
from agent.core.state import NEVER_MS, RunProcess, State
from agent.core.turn import Turn
from common import errors, limits, wire
from common.errors import ErrorInfo

ENDED = frozenset({"done", "failed"})
AT_WORK = frozenset({"preparing", "armed", "running"})
_ORDER = ("preparing", "armed", "running")  # a process goes only forward
_RUN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,158}[a-z0-9])?")
_URL = re.compile(r"(?:https?|postgres(?:ql)?)://[!-~]{1,2000}")
_TOKEN = re.compile(r"[!-~]{0,4096}")
SPREADS = ("round-robin", "random", "all-to-all", "static")
PARTS_MAX = 10_000
URLS_MAX = 1_024
STOP_AFTER_MAX_MS = 30 * 86_400_000


# what a command may say
def check_id(text: str) -> None:
    """A run's id names its directory. Raises: InvalidName."""
    if not _RUN.fullmatch(text) or ".." in text:
        raise errors.InvalidName(f"{text[:80]!r} is not the id of a run")


def check(body: wire.EnsureRun) -> None:
    """What can be told without looking at files. Raises: InvalidName, InvalidValue."""
    check_id(body.run)
    if body.kind not in ("load", "monitor"):
        raise errors.InvalidValue(f"{body.kind[:40]!r} is no kind of run", hint="load or monitor")
    if not 1 <= body.parts <= PARTS_MAX or not 0 <= body.part < body.parts:
        raise errors.InvalidValue(f"part {body.part} of {body.parts}")
    if len(body.urls) > URLS_MAX or not all(_URL.fullmatch(url) for url in body.urls):
        raise errors.InvalidValue(
            "a URL that load cannot go to", hint="http://, https:// or postgresql://, without blanks"
        )
    if body.kind == "load" and not body.urls:
        raise errors.InvalidValue("no URL to put load on")
    if body.spread not in SPREADS:
        raise errors.InvalidValue(f"spread {body.spread[:40]!r}", hint=", ".join(SPREADS))
    if not _TOKEN.fullmatch(body.token):
        raise errors.InvalidValue("a token that fits into no header")
    if not 0 <= body.stop_after_ms <= STOP_AFTER_MAX_MS:
        raise errors.InvalidValue(f"stop_after_ms {body.stop_after_ms}")


# commands
def ensure(turn: Turn, command: wire.Command, body: wire.EnsureRun) -> None:
    """EnsureRun. The command was fenced."""
    state = turn.state
    task = state.runs.get(body.run)
    if task is not None and task.generation == command.generation:
        if task.state in ENDED:
            _answer(turn, task)
        return
    others = [other for other in state.runs.values() if other.key != body.run]
    if sum(other.state in AT_WORK for other in others) >= limits.RUNS_PER_NODE:
        refusal = errors.TooMany(f"{limits.RUNS_PER_NODE} runs at a time on this node").info()
        turn.answer(command.op_id, command.generation, "failed", error=refusal)
        return
    _forget_old(turn, others)
    turn.put(
        RunTask(
            body,
            command.generation,
            command.op_id,
            command.cause,
            desired="present",
            state="preparing",
            ordered_ms=turn.now_ms,
        ),
        "run_ordered",
        cause=command.cause,
    )
    if task is not None:  # an older generation of it: its process and files go first
        _forget(turn, body.run)


def _forget_old(turn: Turn, others: list[RunTask]) -> None:
    """A head that forgets to say `forget` must not fill this node."""
    ended = sorted((task for task in others if task.state in ENDED), key=lambda task: task.ordered_ms)
    for task in ended[: max(0, len(ended) - limits.RUNS_KEPT)]:
        turn.put(replace(task, desired="absent"), "run_too_old", cause="runs_kept")


def fire(turn: Turn, command: wire.Command, body: wire.FireRun) -> errors.HerderError | None:
    """FireRun. The command was fenced. Gives why it cannot be done now, which is not kept."""
    task = turn.state.runs.get(body.run)
    if task is None:
        return errors.NotFound(f"there is no run {body.run} on this node")
    if task.order.kind != "load":
        return errors.InvalidRequest("only load waits to be fired")
    if task.state == "failed":
        turn.answer(command.op_id, command.generation, "failed", error=task.error)
        return None
    if not task.fire_boottime_ns:
        if task.state == "preparing":
            return errors.Unavailable("the run is not armed yet")
        if task.state != "armed" or task.desired != "present":
            return errors.Conflict("the run is being ended")
        task = replace(task, fire_boottime_ns=body.start_boottime_ns)
        turn.put(task, "run_fired", cause=command.cause)
        turn.emit(StartRun(task.key, task.generation, body.start_boottime_ns))
    detail = {"start_boottime_ns": task.fire_boottime_ns}
    turn.answer(command.op_id, command.generation, "ok", detail=detail)
    return None


def end(turn: Turn, command: wire.Command, body: wire.EndRun) -> None:
    """EndRun. The command was fenced."""
    task = turn.state.runs.get(body.run)
    if task is None:
        _fence(turn, f"run:{body.run}", command.generation, errors.Cancelled("forgotten before it began").info())
        turn.answer(command.op_id, command.generation, "ok")
    elif body.how == "forget":
        ended = replace(task, desired="absent", end_op_id=command.op_id, end_generation=command.generation)
        if ended != task:
            turn.put(ended, "run_forget_ordered", cause=command.cause)
    else:
        if task.desired == "present" and task.state in AT_WORK:
            turn.put(replace(task, desired="finished"), "run_finish_ordered", cause=command.cause)
        turn.answer(command.op_id, command.generation, "ok")


def cancel(turn: Turn, task: RunTask) -> None:
    """Ends a run that is not over, with all that it has; its result is `cancelled`."""
    turn.put(replace(task, desired="absent"), "run_cancelled")


def _answer(turn: Turn, task: RunTask) -> None:
    if not task.is_answered:
        turn.put(replace(task, is_answered=True), "run_answered", cause=task.op_id)
    detail: dict[str, Any] = {"start_boottime_ns": task.start_boottime_ns, "late_ms": task.late_ms}
    if task.state == "done":
        detail["artifacts"] = list(task.artifacts)
        turn.answer(task.op_id, task.generation, "ok", detail=detail)
        return
    outcome = "failed"
    if task.error is not None and task.error.code == errors.Cancelled.code:
        outcome = "cancelled"
    detail["last_log"] = list(task.last_log)
    turn.answer(task.op_id, task.generation, outcome, error=task.error, detail=detail)


def _fence(turn: Turn, op_id: str, generation: int, error: ErrorInfo | None) -> None:
    """Leaves what stops a late repeat of an order that nobody waits for any more."""
    held = turn.state.outcomes.get(op_id)
    if held is None or held.result.generation < generation:
        outcome = "cancelled" if error is not None else "ok"
        turn.put(
            Outcome(wire.Result(op_id, generation, outcome, error=error), turn.now_ms, is_acked=True), "run_fenced"
        )


# reconciliation
def reconcile(turn: Turn, run: str) -> None:
    """Starts, ends, sends or removes, by what is desired and what is there."""
    task = turn.state.runs.get(run)
    if task is None:
        return
    process = turn.state.process(run)
    if task.desired == "absent":
        if process.phase != "forgetting":
            _forget(turn, run)
    elif task.state == "uploading":
        if process.phase == "none":
            process.phase = "uploading"
            turn.emit(UploadRun(run, task.generation, task.order.kind))
    elif task.state in AT_WORK:
        if process.phase == "none":
            process.phase = "spawning"
            turn.emit(SpawnRun(task.order, task.generation))
        elif process.phase == "alive" and task.desired == "finished" and not process.is_told:
            process.is_told = True
            turn.emit(SignalRun(run, task.generation, is_kill=False))


def _forget(turn: Turn, run: str) -> None:
    process = turn.state.process(run)
    process.phase, process.again_ms = "forgetting", 0
    turn.emit(ForgetRun(run))


# what the shell says
def started(turn: Turn, event: RunStarted) -> None:
    """The process is there: just made, or found again. It has read its order, so the ledger drops the secrets."""
    task = _task_of(turn.state, event.run, event.generation)
    if task is None:
        return
    process = turn.state.process(event.run)
    if process.phase not in ("spawning", "unknown"):
        return
    process.phase = "alive"
    if task.state not in AT_WORK:
        turn.emit(SignalRun(task.key, task.generation, is_kill=True))
        return
    bare = replace(task.order, spec={}, token="")
    state = "running" if task.order.kind == "monitor" else task.state
    turn.put(
        replace(task, order=bare, state=state, pid=event.pid, start_ticks=event.start_ticks),
        "run_started",
        cause=task.op_id,
    )
    if task.fire_boottime_ns and state == "armed":  # the order to begin may have died with the agent before us
        turn.emit(StartRun(task.key, task.generation, task.fire_boottime_ns))


def said(turn: Turn, event: RunSaid) -> None:
    """The process has come further."""
    task = _task_of(turn.state, event.run, event.generation)
    if task is None or task.state not in AT_WORK:
        return
    now = _told(task, event)
    if event.state in _ORDER and _ORDER.index(event.state) > _ORDER.index(task.state):
        now = replace(now, state=event.state)
    if now != task:
        turn.put(now, f"run_{now.state}", cause=task.op_id)


def _told(task: RunTask, event: RunSaid) -> RunTask:
    return replace(
        task,
        digest=event.digest or task.digest,
        start_boottime_ns=event.start_boottime_ns or task.start_boottime_ns,
        late_ms=event.late_ms or task.late_ms,
    )


def ended(turn: Turn, event: RunEnded) -> None:
    """The process is gone, and whatever it had started."""
    task = _task_of(turn.state, event.run, event.generation)
    process = turn.state.process(event.run)
    if task is None or task.state not in AT_WORK or task.desired == "absent":
        if process.phase == "alive":
            turn.state.processes[event.run] = RunProcess()
            turn.touch("run", event.run)
        return
    if process.phase == "unknown" and not (event.was_there or task.pid or process.is_rebooted):
        process.phase = "none"  # the agent before us ended before it made one
        turn.touch("run", task.key)
        return
    turn.state.processes[event.run] = RunProcess()
    last = event.said
    task = replace(task, pid=0, start_ticks=0, last_log=event.last_log)
    if last is not None:
        task = _told(task, last)
    if last is not None and last.state == "ended":
        turn.put(replace(task, state="uploading", ended_ms=turn.now_ms), "run_ended", cause=task.op_id)
        return
    error = last.error if last is not None and last.state == "failed" and last.error is not None else None
    _fail(turn, task, error or event.error or _gone(task, process, event.exit_code))


def _gone(task: RunTask, process: RunProcess, exit_code: int | None) -> ErrorInfo:
    if process.is_rebooted:
        return errors.RunFailed("the node was rebooted in the middle of the run").info()
    name = "the load generator" if task.order.kind == "load" else "the monitor"
    if exit_code is None:
        how = "is gone; nobody saw how it ended"
    else:
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"
    return errors.RunFailed(f"{name} {how}", hint="the last lines of its log say more").info()


def _fail(turn: Turn, task: RunTask, error: ErrorInfo) -> None:
    failed = replace(task, state="failed", error=error, ended_ms=turn.now_ms)
    turn.put(failed, "run_failed", cause=task.op_id)
    _answer(turn, failed)


def uploaded(turn: Turn, event: RunUploaded) -> None:
    """The head has everything, or will not have it."""
    task = _task_of(turn.state, event.run, event.generation)
    if task is None or turn.state.process(event.run).phase != "uploading":
        return
    turn.state.processes[event.run] = RunProcess()
    if event.error is not None:
        _fail(turn, task, event.error)
        return
    done = replace(task, state="done", artifacts=event.artifacts)
    turn.put(done, "run_done", cause=task.op_id)
    _answer(turn, done)


def forgotten(turn: Turn, event: RunForgotten) -> None:
    """Processes and files are gone; with processes left, the kill is repeated and nothing else happens."""
    process = turn.state.process(event.run)
    task = turn.state.runs.get(event.run)
    if process.phase != "forgetting":
        return
    if event.left:
        process.again_ms = turn.now_ms + limits.REPLICA_KILL_REPEAT_MS
        return
    turn.state.processes[event.run] = RunProcess()
    if task is None:
        return
    if task.desired != "absent":  # it made room for a newer order
        turn.touch("run", task.key)
        return
    error = errors.Cancelled("ended before it was over").info()
    if not task.is_answered:
        turn.answer(task.op_id, task.generation, "cancelled", error=error)
    else:
        _fence(turn, task.op_id, task.generation, error)
    turn.delete("run", task.key, "run_forgotten", cause=task.end_op_id or task.op_id)
    if task.end_op_id:
        turn.answer(task.end_op_id, task.end_generation, "ok")


def _task_of(state: State, run: str, generation: int) -> RunTask | None:
    task = state.runs.get(run)
    return task if task is not None and task.generation == generation else None


# time
def attach_all(turn: Turn, *, is_rebooted: bool) -> None:
    """After a start: looks for the processes of the agent before us; after a reboot for what they left."""
    for task in list(turn.state.runs.values()):
        if task.desired == "absent" or task.state not in AT_WORK:
            turn.touch("run", task.key)
        else:
            process = turn.state.process(task.key)
            process.phase, process.is_rebooted = "unknown", is_rebooted
            turn.emit(AttachRun(task.key, task.generation, task.order.kind, task.pid, task.start_ticks))


def tick(turn: Turn) -> None:
    """Does what has come due: kills again, and ends what did not end by itself."""
    for task in list(turn.state.runs.values()):
        process = turn.state.process(task.key)
        if process.phase == "forgetting" and 0 < process.again_ms <= turn.now_ms:
            _forget(turn, task.key)
        elif _overdue_ms(task) <= turn.now_ms:
            error = errors.TimedOut("the run did not end by itself after its stop_after").info()
            _fail(turn, task, error)
            turn.emit(SignalRun(task.key, task.generation, is_kill=True))


def wake_ms(state: State, now_ms: int) -> int:
    """When `tick` has something to do next."""
    due = NEVER_MS
    for task in state.runs.values():
        process = state.process(task.key)
        if process.phase == "forgetting" and process.again_ms:
            due = min(due, process.again_ms)
        else:
            due = min(due, _overdue_ms(task))
    return due


def _overdue_ms(task: RunTask) -> int:
    if not task.order.stop_after_ms or task.state not in AT_WORK or task.desired == "absent":
        return NEVER_MS
    return task.ordered_ms + task.order.stop_after_ms + limits.RUN_STOP_GRACE_MS


def status(task: RunTask) -> wire.RunStatus:
    """The run as reports show it."""
    return wire.RunStatus(
        task.key,
        task.generation,
        task.state,
        digest=task.digest,
        start_boottime_ns=task.start_boottime_ns or task.fire_boottime_ns,
        error=task.error,
    )
