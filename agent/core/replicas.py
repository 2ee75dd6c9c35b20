"""Engines on this node: started when their copy is here, asked whether they are well, restarted, stopped for good.

    waiting_copy -> starting -> ready -> unhealthy -> starting ...        desired running
                        any state -> stopping -> stopped                  desired stopped
                        too many restarts -> failed

A process is named by (replica, run). What the shell says of an older run changes nothing. An engine counts as
ended only when its whole process group is gone; until then SIGKILL and the search are repeated, because a port or
GPU memory that somebody still holds would fail the next start for a reason that nobody sees.
"""

from __future__ import annotations

from msgspec.structs import replace

from agent.core import copies
from agent.core.effects import AttachReplica, ForgetReplica, NoteLease, ProbeReplica, SignalReplica, SpawnReplica
from agent.core.events import ReplicaExited, ReplicaProbed, ReplicaSpawnFailed, ReplicaStarted
from agent.core.objects import CopyTask, ReplicaTask
from agent.core.state import NEVER_MS, Engine, State
from agent.core.turn import Turn
from common import errors, limits, wire
from common.backoff import ceiling_ms
from common.errors import ErrorInfo

ENDED = frozenset({"stopped", "failed"})
SIGILL = -4


# commands
def ensure(turn: Turn, command: wire.Command, body: wire.EnsureReplica) -> None:
    """EnsureReplica. The command was fenced."""
    state = turn.state
    task = state.replicas.get(body.replica)
    is_repeat = task is not None and task.generation == command.generation
    if task is not None and is_repeat and (task.desired == "stopped" or task.state not in ENDED):
        if task.state == "ready":
            _answer_ready(turn, task)
        return
    if task is None and len(state.replicas) >= limits.REPLICAS_PER_NODE:
        refusal = errors.TooMany(f"{limits.REPLICAS_PER_NODE} replicas on this node").info()
        turn.answer(command.op_id, command.generation, "failed", error=refusal)
        return
    if body.stop_after_ms:
        turn.emit(NoteLease(state.lease_until_ms))
    engine = state.engine(body.replica)
    has_process = engine.phase != "none"
    if task is not None and has_process and task.desired == "running" and task.order == body and not engine.is_ending:
        kept = replace(task, generation=command.generation, op_id=command.op_id, cause=command.cause)
        turn.put(replace(kept, is_answered=False), "replica_kept", cause=command.cause)
        if task.state == "ready":
            _answer_ready(turn, kept)
        return
    turn.put(
        ReplicaTask(
            body,
            command.generation,
            command.op_id,
            command.cause,
            desired="running",
            state="stopping" if has_process else "waiting_copy",
            run=task.run if task is not None else 0,
            host=task.host if task is not None and has_process else "",
            port=task.port if task is not None and has_process else 0,
            pid=task.pid if task is not None and has_process else 0,
            start_ticks=task.start_ticks if task is not None and has_process else 0,
            grace_s=body.stop_grace_s,
            needs_replacing=has_process,
        ),
        "replica_ordered",
        cause=command.cause,
    )


def stop(turn: Turn, command: wire.Command, body: wire.StopReplica) -> None:
    """StopReplica. The command was fenced."""
    task = turn.state.replicas.get(body.replica)
    if task is None:
        turn.answer(command.op_id, command.generation, "ok")
        return
    if task.generation == command.generation and task.desired == "stopped" and task.state == "stopping":
        return
    turn.put(
        replace(
            task,
            generation=command.generation,
            op_id=command.op_id,
            cause=command.cause,
            desired="stopped",
            state="stopping",
            grace_s=body.grace_s,
            is_answered=False,
            is_cancelled=False,
            needs_replacing=False,
        ),
        "replica_stop_ordered",
        cause=command.cause,
    )


def cancel(turn: Turn, task: ReplicaTask) -> None:
    """Stops a replica that never was ready; its result is `cancelled`."""
    turn.put(replace(task, desired="stopped", state="stopping", is_cancelled=True), "replica_cancelled")


def acked(turn: Turn, task: ReplicaTask) -> None:
    """The head knows that this replica is stopped; it is forgotten."""
    if task.desired == "stopped" and task.state == "stopped":
        turn.delete("replica", task.key, "replica_forgotten", cause=task.op_id)
        turn.emit(ForgetReplica(task.key))


def _answer_ready(turn: Turn, task: ReplicaTask) -> None:
    if not task.is_answered:
        turn.put(replace(task, is_answered=True), "replica_answered", cause=task.op_id)
    detail = {"host": task.host, "port": task.port, "pid": task.pid}
    turn.answer(task.op_id, task.generation, "ok", detail=detail)


# reconciliation
def reconcile(turn: Turn, replica: str) -> None:
    """Starts, ends or leaves alone, by what is desired and what is there."""
    task = turn.state.replicas.get(replica)
    if task is None:
        return
    _wake_copies(turn, task)
    engine = turn.state.engine(replica)
    if engine.phase == "none":
        if task.desired == "stopped" or task.halted:
            _stopped(turn, task)
        elif task.state not in ENDED:
            _start(turn, task, engine)
    elif engine.phase == "alive" and (
        task.desired == "stopped" or task.halted or task.needs_replacing or task.state == "unhealthy"
    ):
        _end(turn, task, engine)


def _wake_copies(turn: Turn, task: ReplicaTask) -> None:
    for storage in ("disk", "dram"):
        copy = turn.state.copy(task.order.model, task.order.revision, storage)
        if copy is not None and copy.state == "dropping":
            turn.touch("copy", copy.key)


def _start(turn: Turn, task: ReplicaTask, engine: Engine) -> None:
    state = turn.state
    if _halt_at_ms(state, task) <= turn.now_ms:
        _halt(turn, task)  # it fell while there was no head, and by now another may run elsewhere
        return
    is_here, copy = _copy_of(state, task.order)
    if not is_here:
        if task.state != "waiting_copy":
            turn.put(replace(task, state="waiting_copy"), "replica_waits_for_copy", cause=task.op_id)
        return
    if not state.is_confirmed or turn.now_ms < task.not_before_ms:
        if task.state == "waiting_copy":
            turn.put(replace(task, state="starting"), "replica_starting", cause=task.op_id)
        return
    engine.phase = "spawning"
    engine.is_ending = False
    run = task.run + 1
    turn.put(
        replace(
            task, state="starting", run=run, not_before_ms=0, started_ms=turn.now_ms, ready_ms=0, pid=0, start_ticks=0,
            host="", port=0, needs_replacing=False,
        ),
        "replica_spawned",
        cause=task.op_id,
    )  # fmt: skip
    directory = copy.directory if copy is not None else ""
    turn.emit(SpawnReplica(run, task.order, directory, copy.manifest if copy is not None else None))


def _copy_of(state: State, order: wire.EnsureReplica) -> tuple[bool, CopyTask | None]:
    """Whether the replica may start, and the copy it starts from."""
    if not order.model:
        return True, None
    disk = state.copy(order.model, order.revision, "disk")
    if order.storage != "dram":
        return disk is not None and disk.desired == "present" and disk.state == "ready", disk
    dram = state.copy(order.model, order.revision, "dram")
    if dram is None or dram.desired != "present" or dram.state != "ready":
        return False, None
    manifest = dram.manifest or (disk.manifest if disk is not None else None)
    return True, replace(dram, manifest=manifest)


def _end(turn: Turn, task: ReplicaTask, engine: Engine) -> None:
    if engine.is_ending:
        return
    engine.is_ending = True
    engine.kill_at_ms = turn.now_ms + int(task.grace_s * 1000)
    if task.state not in ("stopping", "unhealthy", "starting"):
        turn.put(replace(task, state="stopping"), "replica_stopping", cause=task.op_id)
    turn.emit(SignalReplica(task.key, task.run, is_kill=False))


def _stopped(turn: Turn, task: ReplicaTask) -> None:
    if task.state != "stopped":
        task = replace(task, state="stopped", pid=0, start_ticks=0)
        turn.put(task, "replica_stopped", cause=task.op_id)
    if task.desired == "stopped" and not task.is_answered:
        turn.put(replace(task, is_answered=True), "replica_answered", cause=task.op_id)
        outcome = "cancelled" if task.is_cancelled else "ok"
        error = errors.Cancelled("cancelled").info() if task.is_cancelled else None
        turn.answer(task.op_id, task.generation, outcome, error=error)


# what the shell says
def started(turn: Turn, event: ReplicaStarted) -> None:
    """The process of a run is there."""
    task = turn.state.replicas.get(event.replica)
    engine = turn.state.engines.get(event.replica)
    if task is None or engine is None or event.run != task.run or engine.phase not in ("spawning", "unknown"):
        if task is None or event.run != task.run:
            turn.emit(SignalReplica(event.replica, event.run, is_kill=True))
        return
    engine.phase = "alive"
    engine.is_ending = False
    engine.failures = engine.probes = 0
    engine.is_probing = False
    engine.probe_at_ms = turn.now_ms
    ready_within_ms = int(task.order.health.ready_timeout_s * 1000)
    engine.ready_by_ms = turn.now_ms + ready_within_ms if task.state == "starting" else 0
    turn.put(
        replace(task, pid=event.pid, start_ticks=event.start_ticks, host=event.host, port=event.port),
        "replica_started",
        cause=task.op_id,
    )


def spawn_failed(turn: Turn, event: ReplicaSpawnFailed) -> None:
    """No process came to be: tried again when that can help, else failed."""
    task = _task_of(turn.state, event.replica, event.run)
    if task is None:
        return
    _gone(turn, task)
    if event.error.code == errors.CopyNotFound.code:
        copies.doubt(turn, task.order.model, task.order.revision)
    if not _has_to_run(turn, task):
        return
    if event.error.is_retryable:
        _restart(turn, task, event.error, None, ())
    else:
        _fail(turn, task, event.error, None, ())


def exited(turn: Turn, event: ReplicaExited) -> None:
    """The engine ended. With processes left, the kill is repeated and nothing else happens."""
    task = _task_of(turn.state, event.replica, event.run)
    if task is None:
        return
    if event.left or event.gpu_bytes_left:
        engine = turn.state.engine(task.key)
        engine.phase, engine.is_ending = "alive", True
        engine.kill_at_ms = turn.now_ms + limits.REPLICA_KILL_REPEAT_MS
        error = errors.EngineFailed(
            "processes or GPU memory are left after SIGKILL", pids=list(event.left), gpu_bytes=event.gpu_bytes_left
        ).info()
        if task.error != error:
            turn.put(replace(task, error=error), "replica_left_something", cause=task.op_id)
        return
    _gone(turn, task)
    ended = replace(task, exit_code=event.exit_code, last_log=event.last_log, pid=0, start_ticks=0)
    if event.halted and ended.desired == "running" and not ended.halted and not ended.needs_replacing:
        error = errors.Unavailable(f"stopped by its own shim: {event.halted}").info()
        turn.put(replace(ended, halted=event.halted, error=error), "replica_halted", cause="stop_after")
        return
    if not _has_to_run(turn, ended):
        turn.put(ended, "replica_exited", cause=task.op_id)
        return
    error = task.error if task.state == "unhealthy" and task.error is not None else _exit_error(event.exit_code)
    _restart(turn, ended, error, event.exit_code, event.last_log)


def _gone(turn: Turn, task: ReplicaTask) -> None:
    turn.state.engines[task.key] = Engine()
    turn.touch("replica", task.key)
    turn.changed()


def _has_to_run(turn: Turn, task: ReplicaTask) -> bool:
    """False when the end was wanted; an engine that made room for a newer order then starts by reconciliation."""
    if task.desired == "stopped" or task.halted:
        return False
    if task.needs_replacing:
        turn.put(
            replace(task, needs_replacing=False, state="waiting_copy", restarts=0, not_before_ms=0),
            "replica_replaced",
            cause=task.op_id,
        )
        return False
    return task.state not in ENDED


def _restart(turn: Turn, task: ReplicaTask, error: ErrorInfo, exit_code: int | None, last_log: tuple[str, ...]) -> None:
    was_stable = task.ready_ms and turn.now_ms - task.ready_ms >= limits.REPLICA_STABLE_MS
    restarts = 1 if was_stable else task.restarts + 1
    if restarts > task.order.max_restarts:
        _fail(turn, task, error, exit_code, last_log)
        return
    delay_ms = ceiling_ms(restarts, base_ms=limits.REPLICA_BACKOFF_BASE_MS, cap_ms=limits.REPLICA_BACKOFF_CAP_MS)
    turn.put(
        replace(
            task, state="starting", restarts=restarts, not_before_ms=turn.now_ms + delay_ms, error=error, ready_ms=0,
            exit_code=exit_code, last_log=last_log,
        ),
        "replica_will_restart",
        cause=task.op_id,
    )  # fmt: skip


def _fail(turn: Turn, task: ReplicaTask, error: ErrorInfo, exit_code: int | None, last_log: tuple[str, ...]) -> None:
    failed = replace(
        task, state="failed", error=error, exit_code=exit_code, last_log=last_log, pid=0, start_ticks=0,
        is_answered=True,
    )  # fmt: skip
    turn.put(failed, "replica_failed", cause=task.op_id)
    if not task.is_answered:
        detail = {"exit_code": exit_code, "last_log": list(last_log), "restarts": task.restarts}
        turn.answer(task.op_id, task.generation, "failed", error=error, detail=detail)


def _exit_error(exit_code: int | None) -> ErrorInfo:
    if exit_code is None:
        return errors.EngineFailed("the engine is gone; nobody saw how it ended").info()
    if exit_code == SIGILL:
        hint = "this build of the engine uses instructions that this CPU does not have; install another build"
        return errors.EngineFailed("the engine met an illegal instruction", hint=hint, exit_code=exit_code).info()
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"
    return errors.EngineFailed(f"the engine {how}", hint="see `herder logs`", exit_code=exit_code).info()


def probed(turn: Turn, event: ReplicaProbed) -> None:
    """The engine answered, or did not."""
    task = _task_of(turn.state, event.replica, event.run)
    if task is None:
        return
    engine = turn.state.engine(task.key)
    engine.is_probing = False
    health = task.order.health
    if engine.phase != "alive" or engine.is_ending:
        return
    period_ms = max(100, int(health.period_s * 1000))
    if event.error is None:
        _measure(turn, engine, event)
        engine.failures = 0
        engine.probe_at_ms = turn.now_ms + period_ms
        if task.state == "starting":
            engine.ready_by_ms = 0
            ready = replace(task, state="ready", ready_ms=turn.now_ms, error=None, exit_code=None, last_log=())
            turn.put(ready, "replica_ready", cause=task.op_id)
            if not ready.is_answered:
                _answer_ready(turn, ready)
    elif task.state == "starting":
        engine.probe_at_ms = turn.now_ms + min(period_ms, limits.REPLICA_START_PROBE_MS)
    else:
        engine.failures += 1
        engine.probe_at_ms = turn.now_ms + min(period_ms, 1_000)
        if engine.failures >= health.failures:
            turn.put(replace(task, state="unhealthy", error=event.error), "replica_unhealthy", cause=task.op_id)


def _measure(turn: Turn, engine: Engine, event: ReplicaProbed) -> None:
    """Takes memory readings that differ by more than a tenth, so that small changes make no reports."""
    for field, value in (("memory_bytes", event.memory_bytes), ("gpu_memory_bytes", event.gpu_memory_bytes)):
        if abs(value - getattr(engine, field)) * 10 > getattr(engine, field):
            setattr(engine, field, value)
            turn.changed()


def _task_of(state: State, replica: str, run: int) -> ReplicaTask | None:
    task = state.replicas.get(replica)
    return task if task is not None and task.run == run else None


# time
def attach_all(turn: Turn, *, is_rebooted: bool) -> None:
    """After a start: looks for the processes of the agent before us; after a reboot there are none."""
    for task in list(turn.state.replicas.values()):
        if task.state in ENDED or task.run == 0:
            turn.touch("replica", task.key)
        elif is_rebooted:
            error = errors.EngineFailed("the node was rebooted").info()
            gone = replace(task, state="stopped", pid=0, start_ticks=0, error=error)
            turn.put(gone, "replica_lost_by_reboot", cause="reboot")
        elif task.pid or not task.not_before_ms:
            turn.state.engine(task.key).phase = "unknown"
            turn.emit(AttachReplica(task.run, task.order, task.pid, task.start_ticks, task.host, task.port))
        else:
            turn.touch("replica", task.key)


def tick(turn: Turn) -> None:
    """Does what has come due: kills, probes, starts, the end of patience."""
    for task in list(turn.state.replicas.values()):
        engine = turn.state.engine(task.key)
        if engine.phase == "none":
            if task.not_before_ms and task.not_before_ms <= turn.now_ms:
                turn.touch("replica", task.key)
            continue
        if engine.phase != "alive":
            continue
        if engine.is_ending:
            if engine.kill_at_ms <= turn.now_ms:
                engine.kill_at_ms = turn.now_ms + limits.REPLICA_KILL_REPEAT_MS
                turn.emit(SignalReplica(task.key, task.run, is_kill=True))
            continue
        if _halt_at_ms(turn.state, task) <= turn.now_ms:
            _halt(turn, task)
        elif engine.ready_by_ms and engine.ready_by_ms <= turn.now_ms:
            engine.ready_by_ms = 0
            error = errors.EngineNotReady(f"not ready after {task.order.health.ready_timeout_s:g} s").info()
            turn.put(replace(task, state="unhealthy", error=error), "replica_not_ready_in_time", cause=task.op_id)
        elif not engine.is_probing and engine.probe_at_ms <= turn.now_ms:
            _probe(turn, task, engine)


def _probe(turn: Turn, task: ReplicaTask, engine: Engine) -> None:
    has_canary = bool(task.order.health.canary)
    is_due = task.state != "ready" or engine.failures > 0 or engine.probes % limits.CANARY_EVERY_PROBES == 0
    engine.probes += 1
    engine.is_probing = True
    turn.emit(ProbeReplica(task.run, task.order, task.host, task.port, with_canary=has_canary and is_due))


def wake_ms(state: State, now_ms: int) -> int:
    """When `tick` has something to do next."""
    due = NEVER_MS
    for task in state.replicas.values():
        engine = state.engine(task.key)
        if engine.phase == "none":
            if task.state == "starting" and task.not_before_ms > now_ms:
                due = min(due, task.not_before_ms)
        elif engine.phase == "alive":
            if engine.is_ending:
                due = min(due, engine.kill_at_ms)
            else:
                due = min(due, _halt_at_ms(state, task), engine.ready_by_ms or NEVER_MS)
                if not engine.is_probing:
                    due = min(due, engine.probe_at_ms)
    return due


def _halt(turn: Turn, task: ReplicaTask) -> None:
    """Without a head for too long: it does not run until a head orders it again."""
    reason = f"no head for {task.order.stop_after_ms / 1000:g} s"
    error = errors.Unavailable(f"stopped by its own agent: {reason}").info()
    turn.put(replace(task, state="stopping", halted=reason, error=error), "replica_halted", cause="stop_after")


def _halt_at_ms(state: State, task: ReplicaTask) -> int:
    if not task.order.stop_after_ms or task.halted or task.desired != "running":
        return NEVER_MS
    return (state.lease_until_ms or state.started_ms) + task.order.stop_after_ms


def status(state: State, task: ReplicaTask) -> wire.ReplicaStatus:
    """The replica as reports show it."""
    engine = state.engines.get(task.key, Engine())
    return wire.ReplicaStatus(
        task.key,
        task.generation,
        task.state,
        host=task.host,
        port=task.port,
        pid=task.pid,
        restarts=task.restarts,
        exit_code=task.exit_code,
        started_ms=task.started_ms,
        ready_ms=task.ready_ms,
        memory_bytes=engine.memory_bytes,
        gpu_memory_bytes=engine.gpu_memory_bytes,
        error=task.error,
        last_log=task.last_log,
    )
