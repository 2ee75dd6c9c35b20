"""Replicas: what agents say of engines, and the commands that start and stop them.

A replica is `pending` until the agent has confirmed its present generation; only then do the agent's words count.
Whatever an agent reports that the head does not know, or knows elsewhere, is told to stop. A replica that shall go
keeps its object, and with it its reservations, until the agent has said that the engine is gone.

Copies on GPUs are projections of replicas: they are put and deleted here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from common import limits, wire
from common.backoff import ceiling_ms
from common.errors import EngineFailed, ErrorInfo, HerderError
from head.core import commands, copies, drains, service_specs
from head.core.objects import Copy, Replica, copy_key
from head.core.state import State
from head.core.turn import Turn

REPORTED = frozenset({"waiting_copy", "starting", "ready", "unhealthy", "stopping", "stopped", "failed"})
_PROJECTED = {"ready": "ready", "failed": "failed", "stopping": "dropping", "draining": "dropping"}


def fresh_generation(turn: Turn, replica: Replica) -> int:
    """A generation above every one that this replica had."""
    return max(turn.next_generation(), replica.generation + 1)


# what agents say
def observe(turn: Turn, node_id: str, replica_statuses: Iterable[wire.ReplicaStatus]) -> None:
    """Takes in a full report of a node: what it names is updated, what it leaves out is not there."""
    named: set[str] = set()
    for status in replica_statuses:
        named.add(status.replica)
        replica = turn.state.replicas.get(status.replica)
        if replica is None or replica.node != node_id:
            _stop_stray(turn, node_id, status)
        elif status.generation != replica.generation:
            _stale(turn, replica, status.generation)
        else:
            _take(turn, replica, status)
    for key in tuple(turn.state.replicas_by_node.get(node_id, ())):
        if key not in named:
            _missing(turn, turn.state.replicas[key])


def on_progress(turn: Turn, node_id: str, progress: wire.Progress) -> None:
    """Takes in the progress of a "replica:<id>" command (its state word).

    `ready` waits for the report or the result, which say where the engine listens.
    """
    replica = _addressed(turn.state, node_id, progress.op_id, progress.generation)
    if replica is None or replica.desired != "running" or progress.state not in ("waiting_copy", "starting"):
        return
    if replica.state in ("pending", "waiting_copy", "starting") and replica.state != progress.state:
        turn.put(replace(replica, state=progress.state), f"replica_{progress.state}")


def on_result(turn: Turn, node_id: str, result: wire.Result) -> None:
    """Takes in how a "replica:<id>" command ended; stale generations are ignored. The caller acknowledges."""
    replica = _addressed(turn.state, node_id, result.op_id, result.generation)
    if replica is None:
        return
    if replica.desired == "stopped":
        if result.outcome != "failed":
            remove(turn, replica, "replica_stopped")
        elif replica.error != result.error:
            turn.put(replace(replica, error=result.error), "replica_stop_failed")
        return
    if result.outcome == "ok":
        _ready_by_result(turn, replica, result.detail)
    elif result.outcome == "failed":
        lines = result.detail.get("last_log")
        last_log = tuple(str(line) for line in lines) if isinstance(lines, list | tuple) else ()
        code = result.detail.get("exit_code")
        fail(turn, replica, result.error, exit_code=code if isinstance(code, int) else None, last_log=last_log)


def _ready_by_result(turn: Turn, replica: Replica, detail: dict[str, Any]) -> None:
    host, port, pid = detail.get("host"), detail.get("port"), detail.get("pid")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65_536:
        return  # the report says it
    if replica.state not in ("pending", "waiting_copy", "starting") or replica.restarts:
        return  # a late word: reports have told since that it fell, and will tell when it is there again
    _update(turn, replica, state="ready", host=host, port=port, pid=pid if isinstance(pid, int) else 0)


def _addressed(state: State, node_id: str, op: str, generation: int) -> Replica | None:
    kind, key = commands.split_op_id(op)
    replica = state.replicas.get(key) if kind == commands.REPLICA else None
    return replica if replica is not None and replica.node == node_id and replica.generation == generation else None


def _stop_stray(turn: Turn, node_id: str, status: wire.ReplicaStatus) -> None:
    """An engine that is no longer wanted there (or never was, by this journal) is told to stop.

    The order's number stays below that of whatever is placed next: an agent that kept a higher one as its fence would
    take the new order for a late one. Removal wins over a start of the same number.
    """
    generation = max(status.generation, turn.state.revision)
    if status.state == "stopping":
        return
    body = wire.StopReplica(replica=status.replica, grace_s=limits.REPLICA_STOP_GRACE_S)
    op = commands.op_id(commands.REPLICA, status.replica)
    commands.send_if_due(turn, node_id, op, generation, body, cause="stray_replica")


def _stale(turn: Turn, replica: Replica, generation: int) -> None:
    """The agent holds another generation: it is told ours, which has to be the higher one."""
    if generation > replica.generation:
        replica = replace(replica, generation=max(turn.next_generation(), generation + 1))
        turn.put(_unconfirmed(replica), "replica_generation_raised")
    elif replica.state == "failed":
        _let_go(turn, replica)  # it was given up while the agent could not hear
    elif replica.desired == "running" and replica.state != "pending":
        turn.put(_unconfirmed(replica), "replica_not_confirmed")
    turn.touch("replica", replica.id)


def _missing(turn: Turn, replica: Replica) -> None:
    """The agent reported and did not name this replica."""
    if replica.desired == "stopped":
        remove(turn, replica, "replica_stopped")
    elif replica.state not in ("pending", "failed"):
        turn.put(_unconfirmed(replica), "replica_missing")
    else:
        turn.touch("replica", replica.id)


def _unconfirmed(replica: Replica) -> Replica:
    state = "pending" if replica.desired == "running" else "stopping"
    return replace(replica, state=state, pid=0, port=0, host="", started_ms=0, ready_ms=0, drain_until_ms=0)


def _take(turn: Turn, replica: Replica, status: wire.ReplicaStatus) -> None:
    """A status of the present generation."""
    if status.state not in REPORTED:
        return  # a newer agent's word; its other words say enough
    turn.state.measured[replica.id] = (status.memory_bytes, status.gpu_memory_bytes)
    turn.state.unwell.pop(replica.id, None)
    if replica.desired == "stopped":
        if status.state in ("stopped", "failed"):
            remove(turn, replica, "replica_stopped")
        elif replica.error != status.error:
            turn.put(replace(replica, error=status.error), "replica_stopping")
        else:
            turn.touch("replica", replica.id)
    elif status.state == "failed":
        fail(
            turn, replica, status.error, exit_code=status.exit_code, last_log=status.last_log, restarts=status.restarts
        )
    elif replica.state == "failed" and status.state in ("stopped", "stopping"):
        return  # as it was told when it was given up
    elif status.state in ("stopped", "stopping"):
        # it stopped by itself, being without a head for too long; the same order starts it again
        if replica.state != "pending":
            turn.put(replace(_unconfirmed(replica), error=status.error), "replica_stopped_itself")
        turn.touch("replica", replica.id)
    else:
        _update(
            turn,
            replica,
            state=status.state,
            host=status.host,
            port=status.port,
            pid=status.pid,
            restarts=status.restarts,
            exit_code=status.exit_code,
            error=status.error,
            last_log=status.last_log[-limits.LAST_LOG_LINES :],
        )


def _update(turn: Turn, replica: Replica, **fields: Any) -> None:
    """Puts what changed; the moments of starting and of getting ready are taken by our own clock."""
    state = fields["state"]
    if state == "ready":
        fields |= {"attempts": 0, "avoid": (), "not_before_ms": 0, "ready_ms": replica.ready_ms or turn.now_ms}
    else:
        fields["ready_ms"] = 0
    if fields.get("pid") and fields["pid"] != replica.pid:
        fields["started_ms"] = turn.now_ms
    changed = replace(replica, **fields)
    if changed != replica:
        what = f"replica_{state}" if state != replica.state else "replica_changed"
        # Once the engine is well again its error is gone from the object: the story alone still tells why it fell.
        news = changed.error if changed.error != replica.error else None
        detail: dict[str, Any] = {}
        if news is not None:
            detail = {"error": news.code, "reason": news.message, "restarts": changed.restarts}
        turn.put(changed, what, **detail)
    elif replica.gpus:
        turn.touch("replica", replica.id)  # its measured memory may be new to the projection


def fail(
    turn: Turn,
    replica: Replica,
    error: ErrorInfo | None,
    *,
    exit_code: int | None = None,
    last_log: tuple[str, ...] = (),
    restarts: int | None = None,
) -> None:
    """The replica has failed for good where it is; the service decides what follows, after a while."""
    if replica.state == "failed":
        return
    attempts = replica.attempts + 1
    delay_ms = ceiling_ms(attempts, base_ms=limits.REPLICA_BACKOFF_BASE_MS, cap_ms=limits.REPLICA_BACKOFF_CAP_MS)
    failed = replace(
        replica,
        state="failed",
        error=error or EngineFailed("the engine failed and its agent did not say why").info(),
        exit_code=exit_code,
        last_log=last_log[-limits.LAST_LOG_LINES :],
        restarts=replica.restarts if restarts is None else restarts,
        pid=0,
        ready_ms=0,
        attempts=attempts,
        avoid=tuple(dict.fromkeys((*replica.avoid, replica.node)))[-limits.REPLICA_PLACEMENTS :],
        not_before_ms=turn.now_ms + delay_ms,
    )
    turn.put(failed, "replica_failed")


# nodes
def on_node_rebooted(turn: Turn, node_id: str) -> None:
    """The node came back with a new boot id: every engine there is gone, and is started anew."""
    for key in tuple(turn.state.replicas_by_node.get(node_id, ())):
        replica = turn.state.replicas[key]
        if replica.desired == "stopped":
            remove(turn, replica, "replica_stopped")
        else:
            lost = replace(
                _unconfirmed(replica), generation=fresh_generation(turn, replica), restarts=0, exit_code=None
            )
            turn.put(lost, "replica_lost", reason="the node was booted")


def touch_services_on(turn: Turn, node_id: str) -> None:
    """The services that have replicas on a node look at their situation."""
    for key in tuple(turn.state.replicas_by_node.get(node_id, ())):
        turn.touch("service", turn.state.replicas[key].service)


# changes
def stop(turn: Turn, replica: Replica, what: str) -> None:
    """Makes a replica undesired: it drains, its agent is told, and its object goes when the agent has confirmed."""
    if replica.desired == "stopped":
        return
    until_ms = drains.until_ms(turn.state, replica, turn.now_ms)
    stopping = replace(
        replica,
        desired="stopped",
        state="draining" if until_ms else "stopping",
        drain_until_ms=until_ms,
        generation=fresh_generation(turn, replica),
        cause=turn.cause,
    )
    turn.put(stopping, what)
    if until_ms:
        drains.ask(turn, stopping)


def remove(turn: Turn, replica: Replica, what: str) -> None:
    """The engine is gone: so are the object, its projections and what was measured of it."""
    _unproject(turn, replica, keep=())
    turn.delete("replica", replica.id, what)
    turn.state.measured.pop(replica.id, None)
    turn.state.unwell.pop(replica.id, None)
    drains.forget(turn, replica.id)
    turn.touch("service", replica.service)


def stop_elsewhere(turn: Turn, before: Replica, generation: int) -> None:
    """Tells the node where a replica was that it is not wanted there any more, if it can hear."""
    body = wire.StopReplica(replica=before.id, grace_s=limits.REPLICA_STOP_GRACE_S)
    op = commands.op_id(commands.REPLICA, before.id)
    commands.send_if_due(turn, before.node, op, generation, body, cause="replica_replaced")
    _unproject(turn, before, keep=())


# reconciliation
def reconcile_replica(turn: Turn, key: str) -> None:
    """Stages what the replica needs and sends its command when one is due."""
    state = turn.state
    replica = state.replicas.get(key)
    if replica is None:
        return
    turn.touch("service", replica.service)
    _project(turn, replica)
    service = state.services.get(replica.service)
    if replica.desired == "running" and service is None:
        stop(turn, replica, "replica_orphaned")
        return
    recipe = state.recipes.get(service.recipe) if service is not None else None
    if replica.state == "draining":
        drains.reconcile(turn, replica)
        return
    if replica.desired == "stopped":
        grace_s = recipe.stop_grace_s if recipe is not None else limits.REPLICA_STOP_GRACE_S
        body = wire.StopReplica(replica=replica.id, grace_s=grace_s)
        _send(turn, replica, body)
        return
    node = state.nodes.get(replica.node)
    if service is None or recipe is None or node is None or replica.state in ("failed", "ready", "unhealthy"):
        return
    if recipe.needs_model and not _stage(turn, replica):
        return
    if replica.state == "pending":
        _send(turn, replica, service_specs.ensure_body(service, recipe, replica, node))


def _give_up(turn: Turn, replica: Replica, error: ErrorInfo | None) -> None:
    """The head itself sees that the engine cannot start: its agent, which still waits, is told to let go."""
    fail(turn, replace(replica, generation=fresh_generation(turn, replica)), error)
    _let_go(turn, turn.state.replicas[replica.id])


def _let_go(turn: Turn, replica: Replica) -> None:
    _send(turn, replica, wire.StopReplica(replica=replica.id, grace_s=limits.REPLICA_STOP_GRACE_S))


def _send(turn: Turn, replica: Replica, body: wire.AnyCommand) -> None:
    op = commands.op_id(commands.REPLICA, replica.id)
    commands.send_if_due(turn, replica.node, op, replica.generation, body, cause=replica.cause)


def _stage(turn: Turn, replica: Replica) -> bool:
    """Makes sure of the copy that the engine starts from; says whether its command may go out meanwhile."""
    is_dram = replica.device.endswith(":dram")
    device = replica.device if is_dram else f"{replica.node}:disk"
    copy = turn.state.copies.get(copy_key(replica.model, replica.revision, device))
    if copy is not None and copy.desired == "present":
        if copy.state == "failed" and copy.generation > replica.generation:
            _give_up(turn, replica, copy.error)
            return False
        if copy.state != "failed":
            return True
    try:
        copies.want(turn, replica.model, replica.revision, device, cause=replica.cause)
    except HerderError as error:
        if not error.is_retryable and error.code != "node_cordoned":
            _give_up(turn, replica, error.info())
        elif replica.error != error.info():
            turn.put(replace(replica, error=error.info()), "replica_staging_refused")
        return False
    return True


# projections
def _project(turn: Turn, replica: Replica) -> None:
    keys = [copy_key(replica.model, replica.revision, f"{replica.node}:gpu{index}") for index in replica.gpus]
    _unproject(turn, replica, keep=keys)
    if not replica.model:
        return
    for index, key in zip(replica.gpus, keys, strict=True):
        before = turn.state.copies.get(key)
        if before is not None and before.replica != replica.id:
            continue  # two replicas of a model share this GPU: the first stands for both
        projection = Copy(
            model=replica.model,
            revision=replica.revision,
            device=f"{replica.node}:gpu{index}",
            desired="absent" if replica.desired == "stopped" else "present",
            state=_PROJECTED.get(replica.state, "loading"),
            generation=replica.generation,
            cause=replica.cause,
            created_ms=before.created_ms if before is not None else turn.now_ms,
            bytes=turn.state.measured.get(replica.id, (0, 0))[1] // max(1, len(replica.gpus)),
            error=replica.error if replica.state == "failed" else None,
            last_used_ms=before.last_used_ms if before is not None else 0,
            replica=replica.id,
        )
        if projection != before:
            turn.put(projection, f"copy_{projection.state}")


def _unproject(turn: Turn, replica: Replica, *, keep: Iterable[str]) -> None:
    """Deletes the projections that a replica no longer has; another on the same GPU then gets its own."""
    kept = set(keep)
    state = turn.state
    for key in tuple(state.projections.get(replica.id, ())):
        copy = state.copies[key]
        if key in kept:
            continue
        turn.delete("copy", key, "copy_dropped")
        for other in tuple(state.replicas_by_node.get(copy.device.partition(":")[0], ())):
            if other != replica.id and state.replicas[other].model == replica.model:
                turn.touch("replica", other)
