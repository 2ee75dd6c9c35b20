"""Services: desired state becomes placed replicas.

A service wants so many replicas of one spec (recipe, model, configuration, port). Each turn it is compared with what
there is: replicas of an older spec and surplus ones are stopped, missing ones placed, those on draining nodes doubled
elsewhere before they go, failed ones of services that may run anywhere tried elsewhere with backoff. What cannot be
placed keeps the service waiting with its reason in words; it looks again every PLACEMENT_RETRY_MS.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from common import limits
from common.errors import (
    ErrorInfo,
    HerderError,
    InvalidDevice,
    InvalidRecipe,
    InvalidValue,
    NothingFits,
    RecipeNotFound,
)
from common.recipe import Recipe
from head.core import (
    copies,
    drains,
    idempotency,
    node_facts,
    placement,
    replica_facts,
    replicas,
    service_orders,
    service_specs,
    why,
)
from head.core.events import (
    CreateServiceRequested,
    DeleteServiceRequested,
    Event,
    ModelsUsed,
    RecipesLoaded,
    ReplicaProbed,
    WhyRequested,
)
from head.core.objects import Replica, Service, copy_key
from head.core.replica_facts import uses_copy
from head.core.replicas import observe, on_node_rebooted, on_progress, on_result, reconcile_replica
from head.core.service_orders import start, stop, stop_on_device
from head.core.state import State
from head.core.turn import Turn

__all__ = [
    "HANDLERS",
    "observe",
    "on_node_draining",
    "on_node_lost",
    "on_node_rebooted",
    "on_progress",
    "on_result",
    "on_tick",
    "reconcile_replica",
    "reconcile_service",
    "start",
    "stop",
    "stop_on_device",
    "uses_copy",
]
NEVER_MS = 1 << 62
_WAITING_IS_VAIN = (InvalidDevice, InvalidRecipe, InvalidValue, RecipeNotFound)


# requests
def create(turn: Turn, event: CreateServiceRequested) -> None:
    """A service by its whole spec. Answered with the service."""
    if idempotency.replayed(turn, event):
        return
    body = event.body
    recipe = body.recipe or body.config.get("recipe", "")
    start(
        turn,
        name=body.name,
        model=body.model,
        recipe=recipe if isinstance(recipe, str) else "",
        replica_count=body.replicas,
        devices=body.devices,
        port=body.port,
        config=body.config,
        labels=body.labels,
        on_unreachable=body.on_unreachable,
        cause=event.request_id,
        api_key=event.api_key,
    )
    idempotency.answer(turn, event, f"service:{body.name}")


def delete(turn: Turn, event: DeleteServiceRequested) -> None:
    """Stops a service; it is gone once its engines are. Answered with the service."""
    stop(turn, event.service, cause=event.request_id)
    turn.reply(event, reference=f"service:{event.service}")


# the world around
def on_node_draining(turn: Turn, node_id: str) -> None:
    """The node was told to drain (or stopped draining): its services look for other places."""
    replicas.touch_services_on(turn, node_id)


def on_node_lost(turn: Turn, node_id: str) -> None:
    """The node's lease ended, or it left or was removed: services there reconsider."""
    replicas.touch_services_on(turn, node_id)


def on_tick(turn: Turn) -> None:
    """Once a second: services that wait for something look again when their time has come."""
    state = turn.state
    due = [(at_ms, name) for name in state.services if (at_ms := state.due_ms.get(f"service:{name}", 0)) <= turn.now_ms]
    for _, name in heapq.nsmallest(limits.PLACEMENTS_PER_TICK, due):
        turn.touch("service", name)
        for key in state.replicas_by_service.get(name, ()):
            if state.replicas[key].state != "ready":
                turn.touch("replica", key)


def recipes_loaded(turn: Turn, event: RecipesLoaded) -> None:
    """The recipe folder was read again: services that miss one look again."""
    turn.state.recipes = event.recipes
    if event.benchmark_recipes is not None:
        turn.state.benchmark_recipes = event.benchmark_recipes
    for name, service in turn.state.services.items():
        if service.reason:
            turn.touch("service", name)


def models_used(turn: Turn, event: ModelsUsed) -> None:
    """Engines answered requests: the copies they run from were used."""
    for replica_id in event.replicas:
        replica = turn.state.replicas.get(replica_id)
        if replica is not None and replica.model:
            for storage in ("disk", "dram", *(f"gpu{index}" for index in replica.gpus)):
                copies.touch_used(turn, copy_key(replica.model, replica.revision, f"{replica.node}:{storage}"))


def replica_probed(turn: Turn, event: ReplicaProbed) -> None:
    """The gateway asked an engine itself; until a good probe or the agent's next word it gets no requests."""
    replica = turn.state.replicas.get(event.replica)
    if replica is None or replica.generation != event.generation:
        return
    if event.is_healthy:
        turn.state.unwell.pop(event.replica, None)
    else:
        turn.state.unwell[event.replica] = event.generation


def why_requested(turn: Turn, event: WhyRequested) -> None:
    """Answers why something is as it is."""
    turn.reply(event, value=why.why(turn.state, event.kind, event.key, turn.now_ms))


# reconciliation
def reconcile_service(turn: Turn, key: str) -> None:
    """Makes the service's replicas what its spec says."""
    service = turn.state.services.get(key)
    if service is None:
        turn.state.due_ms.pop(f"service:{key}", None)
        return
    if service.desired == "stopped":
        _wind_down(turn, service)
        return
    recipe, reason, error = _resolve_recipe(turn, service)
    if recipe is not None:
        service = turn.state.services[key]
        _replace_old(turn, service)
        _forget_gone(turn, service)
        reason = _fill(turn, service, recipe)
        error = None
    service = turn.state.services[key]
    if (service.reason, service.error) != (reason, error):
        service = replace(service, reason=reason, error=error)
        turn.put(service, "service_waiting" if reason else "service_placed", reason=reason)
    _schedule(turn, service)


def _wind_down(turn: Turn, service: Service) -> None:
    _forget_gone(turn, service)
    for replica in replica_facts.of_service(turn.state, service.name):
        replicas.stop(turn, replica, "replica_unwanted")
    if not turn.state.replicas_by_service.get(service.name):
        turn.delete("service", service.name, "service_deleted")
        return
    _set_due(turn, service.name, turn.now_ms + limits.PLACEMENT_RETRY_MS)


def _resolve_recipe(turn: Turn, service: Service) -> tuple[Recipe | None, str, ErrorInfo | None]:
    """The recipe, choosing it once the model's format is known; else why there is none, and the error if that stays."""
    state = turn.state
    if service.recipe:
        recipe = state.recipes.get(service.recipe)
        return recipe, "" if recipe is not None else f"the recipe {service.recipe} is not there any more", None
    model = state.models.get(service.model)
    if model is None:
        return None, f"the model {service.model} is not registered any more", None
    try:
        file_format = service_specs.model_format(state, model, service.revision)
        if not file_format:
            return None, *_learn_format(turn, service)
        recipe = service_specs.recipe_for(state, model, file_format)
        service_orders.check_spec(recipe, service.config, service.devices)
    except HerderError as refusal:
        return None, refusal.message, refusal.info() if isinstance(refusal, _WAITING_IS_VAIN) else None
    hashed = service_specs.spec_hash(service.model, service.revision, recipe.name, service.config, service.port)
    turn.put(replace(service, recipe=recipe.name, spec_hash=hashed), "service_recipe_chosen", recipe=recipe.name)
    return recipe, "", None


def _learn_format(turn: Turn, service: Service) -> tuple[str, ErrorInfo | None]:
    """Has the model fetched to where it will probably run, since only its files tell which engine takes it."""
    state = turn.state
    name = f"{service.model}@{service.revision}"
    for key in state.copies_by_model.get(service.model, ()):
        copy = state.copies[key]
        if copy.revision != service.revision or copy.desired != "present" or copy.replica:
            continue
        if copy.state != "failed":
            return f"waits for {name} on {copy.device}, whose files tell which engine takes it", None
        if copy.generation > service.generation and copy.error is not None:
            return f"{name} could not be fetched to {copy.device}: {copy.error.message}", copy.error
    need = placement.need_of(state, service, f"{service.name}-0", None, 0, 0)
    place = placement.choose(state, need, turn.now_ms)
    copies.want(turn, service.model, service.revision, f"{place.node}:disk", cause=service.cause)
    return f"fetches {name} to {place.node}:disk, whose files tell which engine takes it", None


def _replace_old(turn: Turn, service: Service) -> None:
    """Replicas of an older spec go one by one, the next when the one before is there again."""
    held = replica_facts.of_service(turn.state, service.name)
    old = [replica for replica in held if replica.spec_hash != service.spec_hash and replica.desired == "running"]
    is_busy = any(
        replica.desired == "stopped" or (replica.spec_hash == service.spec_hash and replica.state != "ready")
        for replica in held
    )
    for replica in old:
        if replica.state != "ready" or not is_busy:
            replicas.stop(turn, replica, "replica_outdated")
            is_busy = True


def _forget_gone(turn: Turn, service: Service) -> None:
    """Replicas on nodes that were removed, or that left and whose time is over, are gone with them."""
    for replica in replica_facts.of_service(turn.state, service.name):
        node = turn.state.nodes.get(replica.node)
        gone_ms = 0
        if node is not None:
            left_ms = max(node.leaving_ms, node.status_since_ms) + limits.REPLACE_MARGIN_MS
            gone_ms = left_ms if node.status == "left" else NEVER_MS
        if turn.now_ms >= gone_ms:
            replicas.remove(turn, replica, "replica_lost")


def _fill(turn: Turn, service: Service, recipe: Recipe) -> str:
    """Stops what is too much, places what is missing; returns why it could not, in words."""
    running = [
        replica for replica in replica_facts.of_service(turn.state, service.name) if replica.desired == "running"
    ]
    leaving = [replica for replica in running if _is_leaving(turn.state, replica)]
    staying = [replica for replica in running if replica not in leaving]
    for replica in _surplus(staying, service.replicas):
        replicas.stop(turn, replica, "replica_unwanted")
        staying.remove(replica)
    reasons: list[str] = []
    for replica in staying:
        reasons += _move_if_lost(turn, service, recipe, replica)
    for _ in range(service.replicas - len(staying)):
        try:
            staying.append(_place_new(turn, service, recipe))
        except HerderError as refusal:
            reasons.append(refusal.message)
            break
    ready = sum(1 for replica in staying if replica.state == "ready")
    _let_go(turn, leaving, service.replicas - ready)
    return "; ".join(dict.fromkeys(reasons))


def _surplus(staying: list[Replica], wanted: int) -> list[Replica]:
    """Those to stop first when there are too many: not ready, then the highest slots."""
    ordered = sorted(staying, key=lambda replica: (replica.state == "ready", -replica.slot))
    return ordered[: max(0, len(staying) - wanted)]


def _let_go(turn: Turn, leaving: list[Replica], still_needed: int) -> None:
    """Engines on leaving nodes go when others are ready in their place, or in time for the drain's deadline."""
    for number, replica in enumerate(sorted(leaving, key=lambda replica: (replica.state != "ready", replica.slot))):
        node = turn.state.nodes[replica.node]
        if drains.must_begin(node, replica, turn.now_ms) or number >= max(0, still_needed):
            replicas.stop(turn, replica, "replica_drained")


def _is_leaving(state: State, replica: Replica) -> bool:
    node = state.nodes[replica.node]
    return bool(node.drain_deadline_ms or node.leaving_ms or node.status == "left")


def _place_new(turn: Turn, service: Service, recipe: Recipe) -> Replica:
    """Places one more replica in the lowest free slot. Raises: NothingFits."""
    taken = {replica.slot for replica in replica_facts.of_service(turn.state, service.name)}
    slot = next(number for number in range(len(taken) + 1) if number not in taken)
    name = f"{service.name}-{slot}"
    need = placement.need_of(turn.state, service, name, recipe, *service_specs.declared_bytes(recipe, service))
    place = placement.choose(turn.state, need, turn.now_ms)
    replica = Replica(
        id=name,
        service=service.name,
        slot=slot,
        model=service.model if recipe.needs_model else "",
        revision=service.revision if recipe.needs_model else "",
        node=place.node,
        device=place.device,
        generation=turn.next_generation(),
        desired="running",
        state="pending",
        cause=service.cause,
        created_ms=turn.now_ms,
        spec_hash=service.spec_hash,
        api_key=service.api_key,
        memory_bytes=place.memory_bytes,
        gpu_memory_bytes=place.gpu_memory_bytes,
        gpus=place.gpus,
        is_exclusive=place.is_exclusive,
    )
    turn.put(replica, "replica_placed", node=place.node, device=place.device)
    return replica


def _move_if_lost(turn: Turn, service: Service, recipe: Recipe, replica: Replica) -> list[str]:
    """Gives a failed or unreachable replica another place where the service allows it; else why not, in words."""
    state = turn.state
    if replica.state == "failed":
        said = replica.error.message if replica.error is not None else "it failed"
        failed = f"{replica.id} failed on {replica.device}: {said}"
        if service.devices or replica.attempts >= limits.REPLICA_PLACEMENTS:
            return [failed]
        if turn.now_ms < replica.not_before_ms:
            return [f"{failed}; it is tried elsewhere soon"]
        return _move(turn, service, recipe, replica, failed)
    node = state.nodes[replica.node]
    if node.status != "unreachable":
        return []
    silent = f"{replica.node} is unreachable"
    if service.on_unreachable != "replace":
        return [f"{silent}; {replica.id} stays, as on_unreachable says"]
    if state.is_frozen:
        return [f"{silent}; nothing is replaced while most nodes are gone"]
    if turn.now_ms < state.settle_until_ms or turn.now_ms < replace_after_ms(state, recipe, replica):
        return [f"{silent}; {replica.id} is replaced once it has surely stopped by itself"]
    return _move(turn, service, recipe, replica, silent)


def replace_after_ms(state: State, recipe: Recipe, replica: Replica) -> int:
    """When an engine on an unreachable node has surely been stopped by its own agent.

    The agent counts stop_after from its last acknowledged lease, which is before the head's view of the lease ends
    (`status_since_ms`); another whole lease, the grace to stop and a margin cover every delay between them. Time from
    before this head's start does not count: its clock may have jumped ahead then.
    """
    since_ms = max(state.nodes[replica.node].status_since_ms, state.started_ms)
    grace_ms = int(recipe.stop_grace_s * 1000)
    return since_ms + node_facts.lease_ms(state) + limits.REPLACE_STOP_AFTER_MS + grace_ms + limits.REPLACE_MARGIN_MS


def _move(turn: Turn, service: Service, recipe: Recipe, replica: Replica, why: str) -> list[str]:
    declared = service_specs.declared_bytes(recipe, service)
    need = placement.need_of(turn.state, service, replica.id, recipe, *declared)
    need = replace(need, avoid=replica.avoid, ignore_replica=replica.id)
    try:
        place = placement.choose(turn.state, need, turn.now_ms)
    except NothingFits as refusal:
        return [f"{why}; {refusal.message}"]
    generation = replicas.fresh_generation(turn, replica)
    if place.node != replica.node:
        replicas.stop_elsewhere(turn, replica, generation)
    moved = replace(
        replica,
        node=place.node,
        device=place.device,
        gpus=place.gpus,
        memory_bytes=place.memory_bytes,
        gpu_memory_bytes=place.gpu_memory_bytes,
        is_exclusive=place.is_exclusive,
        generation=max(generation, turn.next_generation()),
        state="pending",
        created_ms=turn.now_ms,
        host="",
        port=0,
        pid=0,
        restarts=0,
        started_ms=0,
        ready_ms=0,
        error=None,
    )
    turn.put(moved, "replica_replaced", **{"from": replica.device, "to": place.device, "why": why[:200]})
    return []


def _schedule(turn: Turn, service: Service) -> None:
    """When to look again without being asked: soon while something is missing, at a deadline, else never."""
    state = turn.state
    held = replica_facts.of_service(state, service.name)
    is_settled = not service.reason and all(replica.state in ("ready", "failed") for replica in held)
    is_moving = any(replica.node in state.nodes and _is_leaving(state, replica) for replica in held)
    _set_due(turn, service.name, NEVER_MS if is_settled and not is_moving else turn.now_ms + limits.PLACEMENT_RETRY_MS)


def _set_due(turn: Turn, name: str, at_ms: int) -> None:
    key = f"service:{name}"
    turn.state.due_ms[key] = at_ms

    def look_now() -> None:
        turn.state.due_ms.pop(key, None)

    turn.on_rollback(look_now)


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    **drains.HANDLERS,
    CreateServiceRequested: create,
    DeleteServiceRequested: delete,
    RecipesLoaded: recipes_loaded,
    ModelsUsed: models_used,
    ReplicaProbed: replica_probed,
    WhyRequested: why_requested,
}
