"""Models: registered, changed, deleted. A deleted model is gone once the last of its copies is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common import ids, limits
from common.errors import AlreadyExists, Conflict, InUse, InvalidSource, InvalidValue, ModelNotFound, TooMany
from head.core import copy_sources, idempotency, services
from head.core.copy_facts import is_projection, make_absent
from head.core.events import DeleteModelRequested, Event, RegisterModelRequested, UpdateModelRequested
from head.core.objects import Copy, Model, Service
from head.core.source_urls import check_source
from head.core.state import State
from head.core.turn import Turn


def register(turn: Turn, event: RegisterModelRequested) -> None:
    """Makes a model known. Answered with "model:<name>".

    Raises: InvalidName, InvalidSource, InvalidValue, AlreadyExists, TooMany.
    """
    if idempotency.replayed(turn, event):
        return
    body, state = event.body, turn.state
    name = ids.check_model_name(body.name)
    if name in state.models:
        raise AlreadyExists(
            f"{name} is registered already", hint="update it, or delete it first", reference=f"model:{name}"
        )
    if len(state.models) >= limits.MODELS:
        raise TooMany(f"{limits.MODELS} models are registered", hint="delete models that are not used")
    given = (body.source_url, *body.sources) if body.source_url is not None else body.sources
    model = Model(
        name=name,
        type=body.type,
        revision=ids.check_revision(body.revision),
        created_ms=turn.now_ms,
        updated_ms=turn.now_ms,
        sources=_checked_sources(given),
        metadata=_checked_metadata(body.metadata),
    )
    turn.put(model, "model_registered", actor=event.actor)
    idempotency.answer(turn, event, f"model:{name}")


def update(turn: Turn, event: UpdateModelRequested) -> None:
    """Changes what the body names. Copies keep the revision they were made of; new ones take the new revision.

    Raises: ModelNotFound, Conflict while it is being deleted, InvalidName, InvalidSource, InvalidValue.
    """
    model = _known(turn.state, event.model)
    if model.is_deleting:
        raise Conflict(f"{model.name} is being deleted")
    body = event.body
    metadata = dict(model.metadata)
    for key, value in (body.metadata or {}).items():
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    changed = msgspec.structs.replace(
        model,
        type=model.type if body.type is None else body.type,
        revision=model.revision if body.revision is None else ids.check_revision(body.revision),
        sources=model.sources if body.sources is None else _checked_sources(body.sources),
        metadata=_checked_metadata(metadata),
    )
    if changed != model:
        turn.put(msgspec.structs.replace(changed, updated_ms=turn.now_ms), "model_updated", actor=event.actor)
        for key in tuple(turn.state.copies_by_model.get(model.name, ())):
            if turn.state.copies[key].state == "waiting":
                turn.touch("copy", key)  # there may be a source now
    turn.reply(event, reference=f"model:{model.name}")


def delete(turn: Turn, event: DeleteModelRequested) -> None:
    """Drops every copy, then the model. Answered with "model:<name>", which may be gone at once.

    Raises: ModelNotFound, InUse while a service runs it (always), or while one is stopping or a copy is pinned
    (unless forced).
    """
    state = turn.state
    model = _known(state, event.model)
    users = [service for service in _services_of(state, model.name) if service.desired != "stopped" or not event.force]
    engines = [key for key in sorted(state.copies_by_model.get(model.name, ())) if services.uses_copy(state, key)]
    if users or engines:
        names = [service.name for service in users]
        raise InUse(
            f"{model.name} is in use by {', '.join(names) or 'engines that are stopping'}",
            hint="delete the services first and wait until their engines are gone",
            services=names,
        )
    pinned = [key for key in sorted(state.copies_by_model.get(model.name, ())) if state.copies[key].pins]
    if pinned and not event.force:
        raise InUse(f"{model.name} has pinned copies", hint="unpin them, or use force", copies=pinned[:20])
    if not model.is_deleting:
        going = msgspec.structs.replace(model, is_deleting=True, updated_ms=turn.now_ms)
        turn.put(going, "model_deletion_asked", actor=event.actor)
    turn.reply(event, reference=f"model:{model.name}")


def reconcile(turn: Turn, key: str) -> None:
    """A model that is being deleted: its copies become undesired, and after the last one it is gone."""
    state = turn.state
    model = state.models.get(key)
    if model is None or not model.is_deleting:
        return
    copies = [state.copies[copy_key] for copy_key in sorted(state.copies_by_model.get(key, ()))]
    if copies:
        for copy in copies:
            _drop(turn, copy)
        return
    for manifest_key in [name for name in state.manifests if name.rpartition("@")[0] == key]:
        turn.delete("manifest", manifest_key, "manifest_deleted")
    turn.delete("model", key, "model_deleted")


def _drop(turn: Turn, copy: Copy) -> None:
    if copy.desired == "present" and not is_projection(copy):  # a projection goes with its replica
        copy_sources.release(turn.state, copy.key)
        turn.state.progress.pop(copy.key, None)
        make_absent(turn, copy, "copy_unwanted", reason="the model is being deleted")


def _known(state: State, name: str) -> Model:
    model = state.models.get(name)
    if model is None:
        raise ModelNotFound(f"no model {name[:200]!r}", hint="`herder models` lists them")
    return model


def _services_of(state: State, name: str) -> list[Service]:
    return [state.services[key] for key in sorted(state.services) if state.services[key].model == name]


def _checked_sources(given: tuple[str, ...]) -> tuple[str, ...]:
    """The sources in canonical form and the order given, each once. Raises: InvalidSource."""
    if len(given) > limits.SOURCES_PER_MODEL:
        raise InvalidSource(f"{len(given)} sources; at most {limits.SOURCES_PER_MODEL}")
    return tuple(dict.fromkeys(check_source(url) for url in given))


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata that can be kept: JSON, not too big. Raises: InvalidValue."""
    try:
        size = len(msgspec.json.encode(metadata))
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError):
        raise InvalidValue("the metadata cannot be written as JSON") from None
    if size > limits.METADATA_BYTES:
        raise InvalidValue(f"the metadata has {size} bytes; at most {limits.METADATA_BYTES}")
    return metadata


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    RegisterModelRequested: register,
    UpdateModelRequested: update,
    DeleteModelRequested: delete,
}
