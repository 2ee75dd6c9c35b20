"""Copies on this node: what the head wants of the disk store and the RAM tier, pursued through mover and holder.

At most one request per copy is open at the mover or the holder. When the order changes, the open one is
cancelled and the next starts after its end, so that two requests never work on the same files. Everything is
pursued from the durable state: after a restart of agent, mover or holder the same requests are made again, and
both sides take a repeated request for what it is.
"""

from __future__ import annotations

from msgspec.structs import replace

from agent import holder_protocol as holder
from agent.core.effects import AskHolder, AskMover
from agent.core.objects import CopyTask, copy_key
from agent.core.state import Ask, Moving, State
from agent.core.turn import Turn
from agent.mover import protocol as mover
from common import errors, ids, limits, wire
from common.errors import ErrorInfo

WORKING = frozenset({"fetching", "verifying", "loading", "dropping"})
_DISK_VERBS = {"fetching": "fetch", "verifying": "verify", "dropping": "drop"}
_DRAM_VERBS = {"loading": "hold", "dropping": "release"}


# commands
def ensure(turn: Turn, command: wire.Command, body: wire.EnsureCopy) -> None:
    """EnsureCopy. The command was fenced: its generation is not older than what is held."""
    task = turn.state.copy(body.model, body.revision, body.storage)
    if task is not None and task.generation == command.generation:
        if task.desired == "absent" or task.state in WORKING:
            return  # dropped at this generation, or under way
        if task.state == "ready" and body.verify != "full":
            _answer_ready(turn, task)
            return
    if task is None and len(turn.state.copies) >= limits.COPIES_PER_NODE:
        refusal = errors.TooMany(f"{limits.COPIES_PER_NODE} copies on this node").info()
        turn.answer(command.op_id, command.generation, "failed", error=refusal)
        return
    order = CopyTask(
        body.model,
        body.revision,
        body.storage,
        desired="present",
        state="fetching" if body.storage == "disk" else "loading",
        generation=command.generation,
        op_id=command.op_id,
        cause=command.cause,
        sources=body.sources,
        manifest=body.manifest,
        deadline_ms=turn.now_ms + command.deadline_ms if command.deadline_ms else 0,
    )
    if task is not None and _serves(task, body):
        order = replace(
            order,
            state="verifying" if body.verify == "full" and body.storage == "disk" else "ready",
            manifest=task.manifest,
            directory=task.directory,
            size_bytes=task.size_bytes,
            digest=task.digest,
            is_locked=task.is_locked,
        )
    turn.state.moving.pop(order.key, None)
    turn.put(order, "copy_ordered", cause=command.cause)
    if order.state == "ready":
        _answer_ready(turn, order)


def _serves(task: CopyTask, body: wire.EnsureCopy) -> bool:
    """Whether the copy that is here is the one that is wanted."""
    if task.desired != "present" or task.state != "ready":
        return False
    if body.storage == "dram":
        return True
    return task.manifest is not None and (body.manifest is None or body.manifest.digest == task.manifest.digest)


def drop(turn: Turn, command: wire.Command, body: wire.DropCopy) -> None:
    """DropCopy. The command was fenced."""
    state = turn.state
    task = state.copy(body.model, body.revision, body.storage)
    if task is not None and task.generation == command.generation and task.desired == "absent":
        if task.state == "dropping":
            return
    elif task is None:
        task = CopyTask(body.model, body.revision, body.storage, "absent", "dropping")
    if task.desired == "present":
        users = users_of(state, task)
        if users:
            refusal = errors.InUse(f"{task.key} is in use", hint="stop what uses it first", users=users).info()
            turn.put(replace(task, generation=command.generation, op_id=command.op_id), "copy_kept", cause="in_use")
            turn.answer(command.op_id, command.generation, "failed", error=refusal)
            return
    turn.put(
        replace(
            task,
            desired="absent",
            state="dropping",
            generation=command.generation,
            op_id=command.op_id,
            cause=command.cause,
            sources=(),
            error=None,
            deadline_ms=0,
        ),
        "copy_drop_ordered",
        cause=command.cause,
    )


def cancel(turn: Turn, task: CopyTask) -> None:
    """Ends the work on a copy that is being fetched, verified or loaded; its result is `cancelled`."""
    _give_up(turn, task, errors.Cancelled("cancelled").info(), "cancelled")


def users_of(state: State, task: CopyTask) -> list[str]:
    """What keeps this copy in use: a RAM copy of it that shall stay, and engines that shall run from it."""
    users = []
    if task.storage == "disk":
        dram = state.copy(task.model, task.revision, "dram")
        if dram is not None and dram.desired == "present" and dram.state != "failed":
            users.append(dram.key)
    for replica in state.replicas.values():
        if _runs_from(replica.order, task) and replica.desired == "running" and replica.state != "failed":
            users.append(replica.key)
    return users


def _is_still_open(state: State, task: CopyTask) -> bool:
    """Whether something that was told to let go of this copy has not done so yet."""
    if task.storage == "disk":
        dram = state.copy(task.model, task.revision, "dram")
        if dram is not None and (dram.desired == "absent" or dram.state != "failed"):
            return True
    return any(
        _runs_from(replica.order, task) and state.engine(replica.key).phase != "none"
        for replica in state.replicas.values()
    )


def _runs_from(order: wire.EnsureReplica, task: CopyTask) -> bool:
    same_model = (order.model, order.revision) == (task.model, task.revision)
    return same_model and (task.storage == "disk" or order.storage == "dram")


# reconciliation
def reconcile(turn: Turn, key: str) -> None:
    """Brings the open request in line with the task, and wakes what waits for this copy."""
    state = turn.state
    task = state.copies.get(key)
    if task is not None and (_lacks_its_side(turn, task) or not _can_be_had(turn, task)):
        return
    _wake_dependents(turn, task, key)
    verb = _verb(state, task) if task is not None else ""
    token = state.ask_of.get(key)
    if token is not None:
        ask = state.asks[token]
        is_right = task is not None and (ask.verb, ask.generation) == (verb, task.generation)
        if not is_right and not ask.is_cancelling:
            _cancel_ask(turn, ask, is_discarding=task is None or task.desired == "absent" or task.state == "failed")
        return
    if task is not None and verb:
        _ask(turn, task, verb)


def _lacks_its_side(turn: Turn, task: CopyTask) -> bool:
    """Work for a mover or holder that does not come up ends with the reason; the head orders it again later."""
    error = turn.state.mover_error if task.storage == "disk" else turn.state.holder_error
    if error is None or task.state not in WORKING:
        return False
    _give_up(turn, task, error, "failed")
    return True


def _can_be_had(turn: Turn, task: CopyTask) -> bool:
    """A RAM copy without a disk copy ready or under way fails at once."""
    if task.storage != "dram" or task.state != "loading":
        return True
    disk = turn.state.copy(task.model, task.revision, "disk")
    if disk is not None and disk.desired == "present" and disk.state != "failed":
        return True
    missing = replace(
        errors.CopyNotFound("there is no disk copy on this node to bring to RAM").info(), is_retryable=True
    )
    _give_up(turn, task, missing, "failed")
    return False


def _verb(state: State, task: CopyTask) -> str:
    if task.storage == "disk":
        if not state.is_mover_up or (task.state == "dropping" and _is_still_open(state, task)):
            return ""
        return _DISK_VERBS.get(task.state, "")
    if not state.is_holder_up or (task.state == "dropping" and _is_still_open(state, task)):
        return ""
    if task.state == "loading":
        disk = state.copy(task.model, task.revision, "disk")
        if disk is None or disk.state != "ready":
            return ""
    return _DRAM_VERBS.get(task.state, "")


def _ask(turn: Turn, task: CopyTask, verb: str) -> None:
    state = turn.state
    state.ask_count += 1
    token = f"{verb}-{state.ask_count}"
    state.asks[token] = Ask(token, verb, task.key, task.generation)
    state.ask_of[task.key] = token
    model, revision = task.model, task.revision
    match verb:
        case "fetch":
            turn.emit(AskMover(mover.Fetch(token, model, revision, task.sources, task.manifest)))
        case "verify":
            turn.emit(AskMover(mover.Verify(token, model, revision)))
        case "drop":
            turn.emit(AskMover(mover.Drop(token, model, revision)))
        case "hold":
            disk = state.copies[copy_key(model, revision, "disk")]
            turn.emit(AskHolder(holder.Hold(token, holding_key(task), disk.directory)))
        case _:
            turn.emit(AskHolder(holder.Release(token, holding_key(task))))


def _cancel_ask(turn: Turn, ask: Ask, *, is_discarding: bool) -> None:
    """Cancels an open request. A fetch that makes room for a newer order of the same copy keeps its parts."""
    ask.is_cancelling = True
    turn.state.ask_count += 1
    token = f"cancel-{turn.state.ask_count}"
    if ask.verb in ("hold", "release"):
        turn.emit(AskHolder(holder.Cancel(token, ask.token)))
    else:
        turn.emit(AskMover(mover.Cancel(token, ask.token, discard=is_discarding)))


def _wake_dependents(turn: Turn, task: CopyTask | None, key: str) -> None:
    """Downwards (disk to RAM to engines) on what is there, upwards only to a disk drop that waits: never in a ring."""
    name, _, storage = key.rpartition("|")
    is_dropping = task is None or task.state == "dropping"
    if storage == "disk" and not is_dropping:
        dram = turn.state.copies.get(f"{name}|dram")
        if dram is not None and dram.state == "loading":
            turn.touch("copy", dram.key)
    elif storage == "dram":
        disk = turn.state.copies.get(f"{name}|disk")
        if disk is not None and disk.state == "dropping":
            turn.touch("copy", disk.key)
    if is_dropping:
        return
    for replica in turn.state.replicas.values():
        if replica.state == "waiting_copy" and f"{replica.order.model}@{replica.order.revision}" == name:
            turn.touch("replica", replica.key)


# answers of mover and holder
def ended(
    turn: Turn, token: str, error: ErrorInfo | None, done: mover.Done | None, holdings: tuple[holder.Holding, ...]
) -> None:
    """The mover or the holder has ended a request."""
    state = turn.state
    ask = state.asks.pop(token, None)
    if ask is None:
        return  # a cancel's own answer, or one of a request that was given up
    if state.ask_of.get(ask.key) == token:
        del state.ask_of[ask.key]
    turn.touch("copy", ask.key)
    is_doubted = ask.key in state.doubted
    state.doubted.discard(ask.key)
    task = state.copies.get(ask.key)
    if task is None or ask.generation != task.generation or _verb_of(task) != ask.verb:
        return  # an older order's; the present one is pursued next
    if error is not None:
        _give_up(turn, task, replace(error, is_retryable=True) if is_doubted else error, "failed")
    elif ask.verb in ("fetch", "verify"):
        _publish(turn, task, done)
    elif ask.verb == "hold":
        _hold(turn, task, holdings)
    else:
        turn.delete("copy", task.key, "copy_dropped", cause=task.op_id)
        turn.answer(task.op_id, task.generation, "ok")


def _verb_of(task: CopyTask) -> str:
    return (_DISK_VERBS if task.storage == "disk" else _DRAM_VERBS).get(task.state, "")


def _publish(turn: Turn, task: CopyTask, done: mover.Done | None) -> None:
    manifest = (done.manifest if done is not None else None) or task.manifest
    held = next((copy for copy in done.copies if _name_of(copy) == _name_of(task)), None) if done is not None else None
    directory = held.directory if held is not None else directory_of(turn.state, task)
    ready = replace(
        task,
        state="ready",
        manifest=manifest,
        directory=directory,
        size_bytes=manifest.size_bytes if manifest is not None else task.size_bytes,
        digest=manifest.digest if manifest is not None else task.digest,
        sources=(),
        error=None,
        deadline_ms=0,
    )
    turn.state.moving.pop(task.key, None)
    turn.put(ready, "copy_ready", cause=task.op_id)
    _answer_ready(turn, ready)


def _hold(turn: Turn, task: CopyTask, holdings: tuple[holder.Holding, ...]) -> None:
    holding = next((item for item in holdings if item.key == holding_key(task)), None)
    if holding is None:
        lost = errors.Internal("the holder says it is done but does not hold the copy").info()
        _give_up(turn, task, lost, "failed")
        return
    turn.state.moving.pop(task.key, None)
    ready = _held(task, holding)
    turn.put(ready, "copy_ready", cause=task.op_id)
    _answer_ready(turn, ready)


def _held(task: CopyTask, holding: holder.Holding) -> CopyTask:
    return replace(
        task,
        state="ready",
        directory=holding.directory,
        size_bytes=holding.bytes,
        is_locked=holding.is_locked,
        error=None,
        deadline_ms=0,
    )


def _give_up(turn: Turn, task: CopyTask, error: ErrorInfo, outcome: str) -> None:
    turn.state.moving.pop(task.key, None)
    turn.put(replace(task, state="failed", error=error, deadline_ms=0), f"copy_{outcome}", cause=task.op_id)
    if task.op_id:
        turn.answer(task.op_id, task.generation, outcome, error=error)


def _answer_ready(turn: Turn, task: CopyTask) -> None:
    if task.op_id:
        detail = {"directory": task.directory, "bytes": task.size_bytes, "is_locked": task.is_locked}
        turn.answer(task.op_id, task.generation, "ok", manifest=task.manifest, detail=detail)


def moved(turn: Turn, token: str, moving: Moving) -> None:
    """The mover or the holder reports progress; the head hears of it now and then."""
    ask = turn.state.asks.get(token)
    task = turn.state.copies.get(ask.key) if ask is not None else None
    if ask is None or task is None or ask.generation != task.generation or ask.is_cancelling:
        return
    before = turn.state.moving.get(task.key)
    turn.state.moving[task.key] = moving
    is_new_state = before is None or before.state != moving.state
    if is_new_state:
        turn.changed()
    if before is not None:
        moving.sent_ms = before.sent_ms
    if task.op_id and (is_new_state or turn.now_ms - moving.sent_ms >= limits.PROGRESS_SPACING_MS):
        moving.sent_ms = turn.now_ms
        turn.send(
            wire.Progress(
                task.op_id,
                task.generation,
                moving.state,
                moving.bytes_done,
                moving.bytes_total,
                moving.rate_bytes_per_s,
                moving.source,
            )
        )


# what stands in the store and in RAM
def store_scanned(turn: Turn, copies: tuple[mover.HeldCopy, ...]) -> None:
    """A mover has started and said what is published: the truth about disk copies."""
    turn.state.is_mover_up = True
    turn.state.mover_error = None
    held = {copy_key(copy.model, copy.revision, "disk"): copy for copy in copies}
    for task in list(turn.state.copies.values()):
        if task.storage != "disk":
            continue
        copy = held.pop(task.key, None)
        if copy is not None and task.desired == "present" and task.state in ("ready", "failed"):
            found = _found(task, copy)
            if found != task:
                turn.put(found, "copy_found")
        elif copy is None and task.state == "ready":
            gone = errors.CopyNotFound("the copy is gone from the store").info()
            turn.put(replace(task, state="failed", error=gone), "copy_lost")
        turn.touch("copy", task.key)
    for copy in held.values():
        if is_name(copy.model, copy.revision):
            turn.put(_found(CopyTask(copy.model, copy.revision, "disk", "present", "ready"), copy), "copy_found")


def _found(task: CopyTask, copy: mover.HeldCopy) -> CopyTask:
    return replace(
        task,
        state="ready",
        directory=copy.directory,
        size_bytes=copy.size_bytes,
        digest=copy.digest,
        manifest=copy.manifest or task.manifest,
        error=None,
    )


def holdings_listed(turn: Turn, holdings: tuple[holder.Holding, ...]) -> None:
    """Connected to a holder that said what it holds: the truth about RAM copies."""
    turn.state.is_holder_up = True
    turn.state.holder_error = None
    held = {item.key: item for item in holdings if item.is_complete}
    for task in list(turn.state.copies.values()):
        if task.storage != "dram":
            continue
        holding = held.pop(holding_key(task), None)
        if task.desired == "present" and holding is not None and task.state in ("ready", "failed"):
            found = _held(task, holding)
            if found != task:
                turn.put(found, "copy_found")
        elif holding is None and task.state == "ready":
            turn.put(replace(task, state="loading", is_locked=False), "copy_lost")  # the machine or holder restarted
        turn.touch("copy", task.key)
    for holding in held.values():
        model, _, revision = holding.key.rpartition("@")
        if is_name(model, revision):
            turn.put(_held(CopyTask(model, revision, "dram", "present", "ready"), holding), "copy_found")


def side_died(turn: Turn, verbs: frozenset[str]) -> None:
    """The mover or the holder is gone, and with it every request of these verbs."""
    state = turn.state
    for ask in [ask for ask in state.asks.values() if ask.verb in verbs]:
        del state.asks[ask.token]
        if state.ask_of.get(ask.key) == ask.token:
            del state.ask_of[ask.key]
        state.moving.pop(ask.key, None)
        turn.touch("copy", ask.key)
    turn.changed()


def side_failed(turn: Turn, storages: tuple[str, ...]) -> None:
    """The mover or the holder does not come up: what waits for it is looked at again."""
    for task in list(turn.state.copies.values()):
        if task.storage in storages and task.state in WORKING:
            turn.touch("copy", task.key)


def doubt(turn: Turn, model: str, revision: str) -> None:
    """An engine did not find the files of a copy that counts as ready: the mover looks at every byte.

    A damaged copy is withdrawn by that and told as failed, retryable, so that the head has what is missing fetched
    again. A RAM copy of such files is loaded anew afterwards.
    """
    disk = turn.state.copy(model, revision, "disk")
    if disk is None or disk.desired != "present" or disk.state != "ready":
        return
    turn.state.doubted.add(disk.key)
    turn.put(replace(disk, state="verifying"), "copy_doubted")
    dram = turn.state.copy(model, revision, "dram")
    if dram is not None and dram.desired == "present" and dram.state == "ready":
        turn.state.ask_count += 1
        turn.emit(AskHolder(holder.Release(f"let-go-{turn.state.ask_count}", holding_key(dram))))
        turn.put(replace(dram, state="loading", is_locked=False), "copy_doubted")


def expire(turn: Turn) -> None:
    """Gives up copies whose deadline has passed."""
    for task in list(turn.state.copies.values()):
        if task.deadline_ms and task.deadline_ms <= turn.now_ms and task.state in WORKING:
            _give_up(turn, task, errors.TimedOut("the deadline of the command has passed").info(), "failed")


def status(state: State, task: CopyTask) -> wire.CopyStatus:
    """The copy as reports show it."""
    moving = state.moving.get(task.key)
    if moving is not None and task.state in WORKING:
        return wire.CopyStatus(
            task.model, task.revision, task.storage, moving.state, task.generation, moving.bytes_done,
            moving.bytes_total, task.digest, task.is_locked, task.error,
        )  # fmt: skip
    size = task.size_bytes
    done = size if task.state == "ready" else 0
    return wire.CopyStatus(
        task.model, task.revision, task.storage, task.state, task.generation, done, size, task.digest,
        task.is_locked, task.error,
    )  # fmt: skip


def holding_key(task: CopyTask) -> str:
    """The holder's name of a copy."""
    return f"{task.model}@{task.revision}"


def directory_of(state: State, task: CopyTask) -> str:
    """Where the store publishes a copy."""
    return f"{state.models_dir}/{ids.model_directory(task.model, task.revision)}"


def is_name(model: str, revision: str) -> bool:
    """Whether these may name a copy."""
    try:
        ids.check_model_name(model)
        ids.check_revision(revision)
    except errors.InvalidName:
        return False
    return True


def _name_of(thing: CopyTask | mover.HeldCopy) -> tuple[str, str]:
    return thing.model, thing.revision
