"""Job steps about engines: serve, stop_serve and health_check, and the engine's part of moves to and from GPUs."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from common.errors import (
    EngineFailed,
    ErrorInfo,
    NodeUnreachable,
    NoReplicaReady,
    ServiceNotFound,
    Unhealthy,
)
from head.core import health_checks, node_facts, replica_facts, service_orders, service_views
from head.core.objects import Job, Replica, Service, Step
from head.core.state import State
from head.core.turn import Turn

_LOG_LINES_IN_ERROR = 5
_WORDS = {
    "pending": "asks the node for the engine",
    "waiting_copy": "the engine waits for its model",
    "starting": "the engine is starting",
    "unhealthy": "the engine does not answer well and is restarted",
    "draining": "an older engine finishes its requests",
    "stopping": "an older engine is stopping",
}


def cause_of(job: Job, step: Step) -> str:
    """What a step writes as the cause on all that it makes."""
    return f"{job.id}/{step.id}"


def completed(turn: Turn, step: Step, *, note: str = "") -> Step:
    """The step has done what it was to do."""
    return replace(step, state="completed", ended_ms=turn.now_ms, target="", error=None, note=note)


def failed(turn: Turn, step: Step, error: ErrorInfo) -> Step:
    """The step's attempt has ended with an error; whether another follows is decided by `jobs`."""
    return replace(step, state="failed", ended_ms=turn.now_ms, target="", error=error, note="")


# serve
def begin_serve(turn: Turn, job: Job, step: Step) -> Step:
    """Makes the service of one replica on the step's device desired.

    An engine that is there already is used where the step asks for nothing else of it; a service that an earlier step
    of the same job made gets the new spec.
    """
    state = turn.state
    device = step.target_device
    config = dict(step.config)
    name = config.get("name") or ""
    if not name and (step.action != "serve" or not (step.port or step.config)):
        standing = engine_on(state, step.model, device)
        if standing is not None and standing.state != "failed" and standing.service in state.services:
            return _waiting_for(step, state.services[standing.service])
    name = name or service_orders.derived_name(state, step.model, device)
    existing = state.services.get(name)
    if existing is not None and existing.desired == "running" and _is_same(existing, step):
        if any(replica.state == "failed" for replica in replica_facts.of_service(state, name)):
            existing = service_orders.revive(turn, existing)
        return _waiting_for(step, existing)
    service = service_orders.start(
        turn,
        name=name,
        model=step.model,
        recipe=str(config.get("recipe", "")),
        devices=(device,),
        port=step.port,
        config=config,
        cause=cause_of(job, step),
        may_change=existing is not None and existing.cause.partition("/")[0] == job.id,
    )
    return _waiting_for(step, service)


def _is_same(service: Service, step: Step) -> bool:
    """Whether a service is what the step asks for (its recipe may have been left to the head)."""
    recipe = step.config.get("recipe", "")
    return (
        service.model == step.model
        and service.devices == (step.target_device,)
        and service.port == step.port
        and service.config == step.config
        and recipe in ("", service.recipe)
    )


def _waiting_for(step: Step, service: Service) -> Step:
    return replace(step, phase="serve", target=f"service:{service.name}", target_generation=service.generation)


def look_serve(turn: Turn, step: Step) -> tuple[Step, bool]:
    """The step as the service's state makes it, and whether its engine is ready."""
    state = turn.state
    name = step.target.partition(":")[2]
    service = state.services.get(name)
    if service is None or service.desired == "stopped":
        gone = ServiceNotFound(f"the service {name} was stopped while the step waited for it", service=name)
        return failed(turn, step, gone.info()), False
    held = [
        replica
        for replica in replica_facts.of_service(state, name)
        if replica.spec_hash == service.spec_hash and replica.desired == "running"
    ]
    here = [replica for replica in held if step.target_device in _devices(replica)] or held
    for replica in here:
        if service_views.is_serving(state, replica):
            return replace(step, result={**step.result, **_endpoint(state, replica)}, note=""), True
    broken = next((replica for replica in here if replica.state == "failed"), None)
    if broken is not None:
        return failed(turn, step, _engine_error(broken)), False
    if service.error is not None:
        return failed(turn, step, service.error), False
    note = _serve_note(state, service, here, turn.now_ms)
    return (step if step.note == note else replace(step, note=note)), False


def _endpoint(state: State, replica: Replica) -> dict[str, Any]:
    route = next(route for route in service_views.routes(state, replica.service) if route.replica == replica.id)
    where = f"{route.host}:{route.port}"
    return {"service": replica.service, "replica": replica.id, "device": replica.device, "endpoint": where}


def _engine_error(replica: Replica) -> ErrorInfo:
    error = replica.error or EngineFailed(f"{replica.id} failed").info()
    details = {**error.details, "replica": replica.id, "device": replica.device}
    if replica.last_log:
        details["last_log"] = list(replica.last_log[-_LOG_LINES_IN_ERROR:])
    return replace(error, details=details, hint=error.hint or f"herder logs {replica.id}")


def _serve_note(state: State, service: Service, held: list[Replica], now_ms: int) -> str:
    if service.reason:
        return service.reason
    if not held:
        return "waits for a place"
    seen = node_facts.node_state(state, held[0].node, now_ms)
    if seen != "online":
        return f"waits for {held[0].node}, which is {seen}"
    return _WORDS.get(held[0].state, f"the engine is {held[0].state}")


def undo_serve(turn: Turn, cause: str, step: Step) -> str:
    """Stops the service that a step made; "service:<name>" while it is still there, "" when nothing is left to undo."""
    for name, service in turn.state.services.items():
        is_mine = service.cause == cause and step.target_device in service.devices
        if is_mine or (step.target == f"service:{name}" and service.desired == "stopped"):
            service_orders.stop(turn, name, cause=cause)
            return f"service:{name}"
    return ""


# stop_serve
def begin_stop(turn: Turn, job: Job, step: Step) -> Step:
    """Stops the engine of a model on a device, or a service by name. Raises: ServiceNotFound."""
    name = step.config.get("name")
    if isinstance(name, str) and name:
        service = service_orders.stop(turn, name, cause=cause_of(job, step))
        return replace(step, phase="stop", target=f"service:{name}", target_generation=service.generation)
    return stop_engine(turn, job, step, step.target_device)


def stop_engine(turn: Turn, job: Job, step: Step, device: str) -> Step:
    """Stops what serves the step's model on a device. Raises: ServiceNotFound."""
    replica = require_engine(turn.state, step.model, device)
    target = service_orders.stop_on_device(turn, replica, cause=cause_of(job, step))
    return replace(step, phase="stop", target=target, target_generation=turn.state.revision)


def require_engine(state: State, model: str, device: str) -> Replica:
    """The engine of a model on a device. Raises: ServiceNotFound."""
    replica = engine_on(state, model, device)
    if replica is None:
        raise ServiceNotFound(
            f"nothing serves {model} on {device}", hint="`herder services` lists what runs", model=model, device=device
        )
    return replica


def engine_on(state: State, model: str, device: str) -> Replica | None:
    """The replica of a model on a device that shall run (the first by name), or None."""
    node = device.partition(":")[0]
    for key in sorted(state.replicas_by_node.get(node, ())):
        replica = state.replicas[key]
        if replica.model == model and replica.desired == "running" and device in _devices(replica):
            return replica
    return None


def _devices(replica: Replica) -> tuple[str, ...]:
    return (replica.device, *(f"{replica.node}:gpu{index}" for index in replica.gpus))


def look_stop(turn: Turn, step: Step) -> Step:
    """Completed once what was stopped is gone (or something newer has its name)."""
    kind, _, key = step.target.partition(":")
    thing: Service | Replica | None
    thing = turn.state.services.get(key) if kind == "service" else turn.state.replicas.get(key)
    if thing is None or (thing.desired == "running" and thing.generation > step.target_generation):
        return completed(turn, step)
    held = [thing] if isinstance(thing, Replica) else replica_facts.of_service(turn.state, key)
    silent = ""
    for replica in held:
        seen = node_facts.node_state(turn.state, replica.node, turn.now_ms)
        if seen != "online":
            silent = f"waits for {replica.node}, which is {seen}, to say that {replica.id} has stopped"
            break
    is_draining = any(replica.state == "draining" for replica in held)
    note = silent or ("the engine finishes its requests" if is_draining else "the engine is stopping")
    return step if step.note == note else replace(step, note=note)


# health_check
def begin_check(turn: Turn, job: Job, step: Step) -> Step:
    """Asks a node about its engine or a URL. Raises: ServiceNotFound, NoReplicaReady, NodeUnreachable, TooMany."""
    state = turn.state
    asked = step.config.get("timeout_s", 5.0)
    timeout_s = float(asked) if isinstance(asked, int | float) and 0 < asked <= 300 else 5.0
    replica_id = ""
    if step.target_url:
        node = step.target_device.partition(":")[0] or _any_node(turn)
    else:
        replica = require_engine(state, step.model, step.target_device)
        if replica.state == "failed":
            error = replica.error or EngineFailed("the engine failed").info()
            raise Unhealthy(f"{replica.id} has failed: {error.message}", replica=replica.id)
        if not replica.port:
            raise NoReplicaReady(f"{replica.id} does not listen yet: it is {replica.state}", replica=replica.id)
        node, replica_id = replica.node, replica.id
    if node_facts.node_state(state, node, turn.now_ms) != "online":
        raise NodeUnreachable(f"{node} cannot be asked: it is not online", node=node)
    check = health_checks.ask(
        turn,
        f"{job.id}.{step.id}.{step.attempts}",
        node,
        cause=cause_of(job, step),
        timeout_s=timeout_s,
        replica=replica_id,
        url=step.target_url,
    )
    return replace(
        step, phase="check", target=f"check:{check.id}", target_generation=check.generation, note=f"{node} was asked"
    )


def _any_node(turn: Turn) -> str:
    for node in sorted(turn.state.nodes):
        if node_facts.node_state(turn.state, node, turn.now_ms) == "online":
            return node
    raise NodeUnreachable("no node is online to ask from")


def look_check(turn: Turn, step: Step) -> Step:
    """Ends with the check, which is then forgotten."""
    check = turn.state.checks.get(step.target.partition(":")[2])
    if check is None:
        return failed(turn, step, Unhealthy("the question was lost").info())
    if not check.outcome:
        return step
    turn.delete("check", check.id, "health_check_read")
    if check.outcome == "ok":
        return completed(turn, replace(step, result=dict(check.detail)))
    return failed(turn, step, check.error or Unhealthy("it is not healthy").info())
