"""The door for commands: fences, repeats and checks of what the head sent, then the handler of its kind.

Fences, in this order:
  1. a head epoch below the highest seen: an older head still talks; refused, nothing is remembered;
  2. a generation below the one held for the same copy or replica: a late command; refused;
  3. the same (op_id, generation) with an outcome that is not acknowledged yet: the outcome is said again.
A failed command whose outcome the head has acknowledged is a fresh attempt when it comes again.
Refusals of 1 and 2 are said once and not kept: whoever sent them is not waiting for an acknowledged result.
"""

from __future__ import annotations

import re
from typing import assert_never

from agent.core import copies, replicas, runs
from agent.core.effects import RunHealthCheck
from agent.core.events import CommandReceived, HealthChecked
from agent.core.objects import CopyTask, Outcome, ReplicaTask, RunTask
from agent.core.state import State
from agent.core.turn import Turn
from common import errors, ids, limits, wire
from common.errors import HerderError

_REPLICA = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,94}[a-z0-9])?")
_REPLICA_STORAGE = re.compile(r"disk|dram|gpu[0-9]{1,3}(?:,gpu[0-9]{1,3})*")
_URL = re.compile(r"(?:https?|tcp)://\S{1,2000}")
_URL_PATH = re.compile(r"/[!-~]{0,1000}")
_ENV_NAME = re.compile(r"[^=\0]{1,256}")
SECONDS_MAX = 30 * 86_400
Task = CopyTask | ReplicaTask | RunTask


def received(turn: Turn, event: CommandReceived) -> None:
    """A command has come."""
    command = event.command
    turn.cause = command.cause or command.op_id
    meta = turn.state.meta
    if command.head_epoch < meta.max_head_epoch:
        stale = errors.StaleGeneration(
            "the command is of an older head", head_epoch=command.head_epoch, seen=meta.max_head_epoch
        )
        _refuse(turn, command, stale)
        return
    try:
        _check(command.body)
    except HerderError as error:
        _refuse(turn, command, error)
        return
    task = _task(turn.state, command.body)
    held = max(task.generation if task is not None else 0, _fence(turn.state, command))
    if command.generation < held:
        stale = errors.StaleGeneration("a newer order is held", generation=command.generation, held=held)
        _refuse(turn, command, stale)
    elif not _say_again(turn, command, task):
        _handle(turn, command)


def _fence(state: State, command: wire.Command) -> int:
    outcome = state.outcomes.get(command.op_id)
    return outcome.result.generation if outcome is not None else 0


def _say_again(turn: Turn, command: wire.Command, task: Task | None) -> bool:
    """Repeats the outcome of a command that has ended; False when there is work to do."""
    outcome = turn.state.outcomes.get(command.op_id)
    if outcome is None or outcome.result.generation != command.generation:
        return False
    if isinstance(task, RunTask):
        if outcome.is_acked or (isinstance(command.body, wire.EndRun) and command.body.how == "forget"):
            return False  # the outcome may be that of `finish`
        turn.say(outcome.result)
        return True
    is_removal = isinstance(command.body, wire.DropCopy | wire.StopReplica)
    if task is not None and is_removal != (task.desired in ("absent", "stopped")):
        return False  # the outcome is the other order's of this generation; removal wins
    if outcome.is_acked and task is not None:
        return False
    if task is not None and outcome.result.outcome == "ok" and not is_removal and task.state in ("failed", "stopped"):
        return False  # it was well once and is not any more (a reboot, a lost file): done again
    turn.say(outcome.result)
    return True


def _task(state: State, body: wire.AnyCommand) -> Task | None:
    match body:
        case wire.EnsureCopy() | wire.DropCopy():
            return state.copy(body.model, body.revision, body.storage)
        case wire.EnsureReplica() | wire.StopReplica():
            return state.replicas.get(body.replica)
        case wire.EnsureRun() | wire.FireRun() | wire.EndRun():
            return state.runs.get(body.run)
        case _:
            return None


def _handle(turn: Turn, command: wire.Command) -> None:
    body = command.body
    match body:
        case wire.EnsureCopy():
            copies.ensure(turn, command, body)
        case wire.DropCopy():
            copies.drop(turn, command, body)
        case wire.EnsureReplica():
            replicas.ensure(turn, command, body)
        case wire.StopReplica():
            replicas.stop(turn, command, body)
        case wire.CheckHealth():
            _check_health(turn, command, body)
        case wire.CancelOp():
            _cancel(turn, command, body)
        case wire.EnsureRun():
            runs.ensure(turn, command, body)
        case wire.FireRun():
            refusal = runs.fire(turn, command, body)
            if refusal is not None:
                _refuse(turn, command, refusal)
        case wire.EndRun():
            runs.end(turn, command, body)
        case _:
            assert_never(body)


def _refuse(turn: Turn, command: wire.Command, error: HerderError) -> None:
    turn.send(wire.Result(command.op_id, command.generation, "failed", error=error.info()))


def _check(body: wire.AnyCommand) -> None:
    """What names files, processes and addresses here is checked again here. Raises: HerderError."""
    match body:
        case wire.EnsureCopy() | wire.DropCopy():
            ids.check_model_name(body.model)
            ids.check_revision(body.revision)
            if body.storage not in ("disk", "dram"):
                raise errors.InvalidDevice(f"{body.storage[:40]!r} is no place for a copy", hint="disk or dram")
            if isinstance(body, wire.EnsureCopy) and body.manifest is not None:
                if (body.manifest.model, body.manifest.revision) != (body.model, body.revision):
                    raise errors.InvalidValue("the manifest is of another model")
                for file in body.manifest.files:
                    ids.check_relative_path(file.path)
        case wire.EnsureReplica():
            _check_replica(body)
        case wire.StopReplica():
            _check_replica_id(body.replica)
            _check_seconds(body.grace_s)
        case wire.CheckHealth():
            if body.replica:
                _check_replica_id(body.replica)
            elif not _URL.fullmatch(body.url):
                raise errors.InvalidValue(f"{body.url[:80]!r} cannot be asked", hint="http://, https:// or tcp://")
        case wire.EnsureRun():
            runs.check(body)
        case wire.FireRun():
            runs.check_id(body.run)
        case wire.EndRun():
            runs.check_id(body.run)
            if body.how not in ("finish", "forget"):
                raise errors.InvalidValue(f"a run cannot end by {body.how[:40]!r}", hint="finish or forget")
        case _:
            pass


def _check_replica(body: wire.EnsureReplica) -> None:
    _check_replica_id(body.replica)
    if body.model:
        ids.check_model_name(body.model)
        ids.check_revision(body.revision)
    if not _REPLICA_STORAGE.fullmatch(body.storage):
        raise errors.InvalidDevice(f"{body.storage[:40]!r} is no place for an engine")
    if body.port and not 1_024 <= body.port <= 65_535:
        raise errors.InvalidValue(f"port {body.port}", hint="1024 to 65535, or 0: the agent chooses")
    words = (*body.argv, *body.env, *body.env.values(), *body.gpu_uuids, body.served_name, body.api_key)
    if any("\0" in text for text in words):
        raise errors.InvalidValue("a NUL byte in what the engine is started with")
    if not all(_ENV_NAME.fullmatch(name) for name in body.env):
        raise errors.InvalidValue("a name of an environment variable that is none")
    health = body.health
    for path in (health.path, health.canary_path):
        if path and not _URL_PATH.fullmatch(path):  # it follows host and port: "@elsewhere" would be another host
            raise errors.InvalidValue(f"{path[:80]!r} is not a path", hint="it begins with /")
    for seconds in (health.timeout_s, health.period_s, health.ready_timeout_s, body.stop_grace_s):
        _check_seconds(seconds)
    if not 0 <= body.stop_after_ms <= SECONDS_MAX * 1000:
        raise errors.InvalidValue(f"stop_after_ms {body.stop_after_ms}")


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds <= SECONDS_MAX:
        raise errors.InvalidValue(f"{seconds} seconds", hint=f"0 to {SECONDS_MAX}")


def _check_replica_id(text: str) -> None:
    if not _REPLICA.fullmatch(text) or ".." in text:
        raise errors.InvalidName(f"{text[:80]!r} is not a replica id")


# health checks asked for by people
def _check_health(turn: Turn, command: wire.Command, body: wire.CheckHealth) -> None:
    state = turn.state
    if state.checks.get(command.op_id, -1) >= command.generation:
        return
    if len(state.checks) >= limits.CHECKS_PER_NODE:
        _refuse(turn, command, errors.TooMany(f"{limits.CHECKS_PER_NODE} health checks at a time"))
        return
    timeout_s = min(max(body.timeout_s, 0.1), 60.0)
    if not body.replica:
        turn.emit(RunHealthCheck(command.op_id, command.generation, body.url, timeout_s))
    else:
        task = state.replicas.get(body.replica)
        if task is None or not task.port:
            missing = errors.EngineNotReady(f"{body.replica} does not run here").info()
            turn.answer(command.op_id, command.generation, "failed", error=missing)
            return
        turn.emit(RunHealthCheck(command.op_id, command.generation, "", timeout_s, task.order, task.host, task.port))
    state.checks[command.op_id] = command.generation


def health_checked(turn: Turn, event: HealthChecked) -> None:
    """A check has its answer."""
    if turn.state.checks.get(event.op_id) != event.generation:
        return
    del turn.state.checks[event.op_id]
    turn.answer(
        event.op_id,
        event.generation,
        "ok" if event.error is None else "failed",
        error=event.error,
        detail=event.detail,
    )


# cancelling
def _cancel(turn: Turn, command: wire.Command, body: wire.CancelOp) -> None:
    """Stops work on another command; one that had ended keeps its result."""
    state = turn.state
    target = (body.target_op_id, body.target_generation)
    for copy in state.copies.values():
        if (copy.op_id, copy.generation) == target:
            if copy.desired == "present" and copy.state in copies.WORKING:
                copies.cancel(turn, copy)
            break
    for replica in state.replicas.values():
        if (replica.op_id, replica.generation) == target:
            if replica.desired == "running" and not replica.is_answered:
                replicas.cancel(turn, replica)
            break
    for run in state.runs.values():
        if (run.op_id, run.generation) == target:
            if run.state not in runs.ENDED and run.desired != "absent":
                runs.cancel(turn, run)
            break
    if state.checks.get(body.target_op_id) == body.target_generation:
        del state.checks[body.target_op_id]
        error = errors.Cancelled("cancelled").info()
        turn.answer(body.target_op_id, body.target_generation, "cancelled", error=error)
    turn.answer(command.op_id, command.generation, "ok")


# acknowledgements
def acked(turn: Turn, op_id: str, generation: int) -> None:
    """The head has made a result durable. Where no task holds the generation, the outcome stays as a fence."""
    state = turn.state
    outcome = state.outcomes.get(op_id)
    if outcome is None or outcome.is_acked or outcome.result.generation != generation:
        return
    for replica in list(state.replicas.values()):
        if (replica.op_id, replica.generation) == (op_id, generation):
            replicas.acked(turn, replica)
    tasks: list[Task] = [*state.copies.values(), *state.replicas.values(), *state.runs.values()]
    is_held = any((task.op_id, task.generation) == (op_id, generation) for task in tasks)
    if is_held:
        turn.delete("outcome", op_id, "result_acknowledged", cause=op_id)
        return
    fence = wire.Result(op_id, generation, outcome.result.outcome, error=outcome.result.error)
    state.results_sent_ms.pop(op_id, None)
    turn.put(Outcome(fence, outcome.at_ms, is_acked=True), "result_acknowledged", cause=op_id)
    _prune(turn)


def _prune(turn: Turn) -> None:
    fences = [outcome for outcome in turn.state.outcomes.values() if outcome.is_acked]
    if len(fences) > limits.OUTCOMES_KEPT:
        for outcome in sorted(fences, key=lambda item: item.at_ms)[: len(fences) // 10]:
            turn.delete("outcome", outcome.key, "fence_pruned")
