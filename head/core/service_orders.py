"""Orders to services: start one, stop one, stop one engine of one. Used by the API and by job steps.

An order changes what is desired and refuses what can never be; where replicas go is decided in `services`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from msgspec.structs import replace

from common import ids, limits
from common.errors import AlreadyExists, Conflict, InvalidDevice, ModelNotFound, ServiceNotFound, TooMany
from common.recipe import Recipe
from head.core import admission, replica_facts, replicas, service_specs
from head.core.objects import Model, Replica, Service
from head.core.state import State
from head.core.turn import Turn


def start(
    turn: Turn,
    *,
    name: str,
    model: str,
    cause: str,
    recipe: str = "",
    replica_count: int = 1,
    devices: tuple[str, ...] = (),
    port: int = 0,
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    on_unreachable: str = "keep",
    api_key: str = "",
    may_change: bool = False,
) -> Service:
    """Makes a service desired. `may_change`: one of this name gets the new spec, and failed replicas start again.

    api_key "": one is drawn from the head's own secret.
    Raises: InvalidName, ModelNotFound, RecipeNotFound, InvalidRecipe, InvalidValue, InvalidDevice, DeviceNotFound,
    AlreadyExists, Conflict while one of this name is stopping, TooMany.
    """
    state = turn.state
    config = dict(config or {})
    existing = _existing(state, name, may_change)
    registered = _model(state, model)
    if labels:
        ids.check_labels(labels)
    canonical = tuple(dict.fromkeys(str(admission.require_device(state, device)) for device in devices))
    service_specs.check_general_config(config)
    named = recipe or config.get("recipe", "")
    file_format = service_specs.model_format(state, registered, registered.revision)
    chosen: Recipe | None = None
    if named:
        chosen = service_specs.recipe_named(state, named)
        service_specs.check_fits(chosen, registered, file_format)
    elif file_format:
        chosen = service_specs.recipe_for(state, registered, file_format)
    if chosen is not None:
        check_spec(chosen, config, canonical)
    generation = turn.next_generation()
    service = Service(
        name=name,
        model=model,
        revision=registered.revision,
        recipe=chosen.name if chosen is not None else "",
        replicas=replica_count,
        generation=generation,
        spec_hash=service_specs.spec_hash(
            model, registered.revision, chosen.name if chosen is not None else "", config, port
        ),
        created_ms=existing.created_ms if existing is not None else turn.now_ms,
        cause=cause,
        devices=canonical,
        port=port,
        config=config,
        labels=labels or {},
        on_unreachable=on_unreachable,
        api_key=(existing.api_key if existing is not None else "")
        or api_key
        or service_specs.engine_key(state, name, generation),
    )
    turn.put(service, "service_changed" if existing is not None else "service_created")
    if existing is not None:
        revive(turn, service)
    return service


def _existing(state: State, name: str, may_change: bool) -> Service | None:
    ids.check_service_name(name)
    existing = state.services.get(name)
    if existing is None:
        if len(state.services) >= limits.SERVICES:
            raise TooMany(f"{len(state.services)} services", limit=limits.SERVICES)
        return None
    if existing.desired == "stopped":
        raise Conflict(f"the service {name} is being stopped", hint="wait until it is gone", service=name)
    if not may_change:
        raise AlreadyExists(
            f"there is a service {name} already", hint="choose another name, or delete it first", service=name
        )
    return existing


def _model(state: State, name: str) -> Model:
    model = state.models.get(name)
    if model is None:
        raise ModelNotFound(f"no model {name[:200]!r}", hint="register it first: `herder models add`", model=name)
    if model.is_deleting:
        raise Conflict(f"{name} is being deleted", hint="wait until it is gone, then register it again", model=name)
    return model


def check_spec(recipe: Recipe, config: dict[str, Any], devices: tuple[str, ...]) -> None:
    """Configuration and devices against the recipe. Raises: InvalidValue, InvalidDevice."""
    service_specs.check_config(recipe, config)
    for device in devices:
        if recipe.resources.gpus and not device.partition(":")[2].startswith("gpu"):
            raise InvalidDevice(
                f"recipe {recipe.name} needs {recipe.resources.gpus} GPU; {device} is none",
                hint="name a device such as NODE:gpu0, or another recipe",
                device=device,
            )


def stop(turn: Turn, name: str, *, cause: str) -> Service:
    """Makes a service undesired; its object goes with its last replica. Raises: ServiceNotFound."""
    service = turn.state.services.get(name)
    if service is None:
        raise ServiceNotFound(f"no service {name[:80]!r}", hint="`herder services` lists them", service=name)
    if service.desired == "running":
        service = replace(
            service, desired="stopped", reason="", error=None, cause=cause, generation=turn.next_generation()
        )
        turn.put(service, "service_stopped")
    return service


def stop_on_device(turn: Turn, replica: Replica, *, cause: str) -> str:
    """Stops one engine; the reference of what has to go: the service if this was all of it, else the replica."""
    service = turn.state.services.get(replica.service)
    if service is None or service.replicas <= 1 or service.desired == "stopped":
        if service is not None:
            stop(turn, service.name, cause=cause)
        return f"service:{replica.service}"
    kept = tuple(device for device in service.devices if device != replica.device)
    smaller = replace(
        service, replicas=service.replicas - 1, devices=kept, generation=turn.next_generation(), cause=cause
    )
    replicas.stop(turn, replica, "replica_unwanted")
    turn.put(smaller, "service_shrunk")
    return f"replica:{replica.id}"


def revive(turn: Turn, service: Service) -> Service:
    """Failed replicas of a service that somebody starts again get a new chance."""
    for replica in replica_facts.of_service(turn.state, service.name):
        if replica.desired == "running" and replica.state == "failed" and replica.spec_hash == service.spec_hash:
            turn.put(_anew(turn, replica), "replica_revived")
    return service


def _anew(turn: Turn, replica: Replica) -> Replica:
    return replace(
        replica, state="pending", generation=replicas.fresh_generation(turn, replica), attempts=0, avoid=(),
        not_before_ms=0, restarts=0, error=None, exit_code=None, last_log=(), cause=turn.cause,
    )  # fmt: skip


def derived_name(state: State, model: str, device: str) -> str:
    """The name of the service that one model on one device makes: "<model>-<storage>", longer when that is taken.

    Raises: AlreadyExists when the longer one is taken by something else, too.
    """
    node, _, storage = device.partition(":")
    slug = re.sub(r"[^a-z0-9.]+", "-", model.rpartition("/")[2].lower()).replace("..", ".").strip(".-") or "model"
    for tail in (storage, f"{node}-{storage}"):
        name = f"{slug}-{tail}"
        if len(name) > limits.NODE_ID_CHARS:
            digest = hashlib.sha256(f"{model} {tail}".encode()).hexdigest()[:10]
            name = f"{name[: limits.NODE_ID_CHARS - 11].rstrip('.-')}-{digest}"
        existing = state.services.get(name)
        if existing is None or (existing.model == model and existing.devices == (device,)):
            return name
    raise AlreadyExists(f"the names for {model} on {device} are taken", hint="name the service: config.name")
