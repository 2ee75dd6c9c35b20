"""API keys: created, revoked, and pruned some days after they ended. The secret itself never comes here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common import ids, limits
from common.errors import Conflict, InvalidValue, KeyNotFound, TooMany
from head.core import idempotency
from head.core.events import CreateKeyRequested, Event, RevokeKeyRequested
from head.core.objects import ApiKey
from head.core.turn import Turn

_SWEEP_MS = 60_000
_PRUNED_PER_SWEEP = 500


def is_valid(key: ApiKey, now_ms: int) -> bool:
    """Whether a token with this key still opens doors."""
    return not key.is_revoked and (key.expires_ms == 0 or now_ms < key.expires_ms)


def create(turn: Turn, event: CreateKeyRequested) -> None:
    """Makes a key. Answered with "key:<id>"."""
    if idempotency.replayed(turn, event):
        return
    body = event.body
    if not body.name.isprintable():
        raise InvalidValue("the key's name has characters that cannot be printed")
    if body.node:
        if body.role != "agent":
            raise InvalidValue("only a key of the role agent can be bound to a node")
        ids.check_node_id(body.node)
    if len(turn.state.keys) >= limits.KEYS:
        raise TooMany(f"{limits.KEYS} keys exist already", hint="revoke keys that are not used")
    if len(event.secret_sha256) != 64 or event.fresh_id in turn.state.keys:
        raise InvalidValue("the key's digest or id is not usable")
    key = ApiKey(
        id=event.fresh_id,
        name=body.name,
        role=body.role,
        secret_sha256=event.secret_sha256,
        created_ms=turn.now_ms,
        expires_ms=turn.now_ms + body.ttl_s * 1_000 if body.ttl_s else 0,
        node=body.node,
    )
    turn.put(key, "key_created", role=key.role, actor=event.actor)
    idempotency.answer(turn, event, f"key:{key.id}")


def revoke(turn: Turn, event: RevokeKeyRequested) -> None:
    """Ends a key at once; revoking it again changes nothing. The last key of an admin stays."""
    key = turn.state.keys.get(event.key)
    if key is None:
        raise KeyNotFound(f"no key {event.key[:80]!r}", hint="`herder keys` lists them")
    if not key.is_revoked:
        if key.role == "admin" and is_valid(key, turn.now_ms) and not _has_other_admin(turn, key.id):
            raise Conflict("this is the last valid admin key", hint="create another admin key first")
        ended = msgspec.structs.replace(key, is_revoked=True, revoked_ms=turn.now_ms)
        turn.put(ended, "key_revoked", actor=event.actor)
    turn.reply(event, reference=f"key:{key.id}")


def on_tick(turn: Turn) -> None:
    """Once a minute forgets keys that ended KEY_KEPT_MS ago."""
    if turn.now_ms // _SWEEP_MS == turn.state.last_tick_ms // _SWEEP_MS:
        return
    horizon_ms = turn.now_ms - limits.KEY_KEPT_MS
    ended = [key.id for key in turn.state.keys.values() if 0 < _ended_ms(key) <= horizon_ms]
    for key_id in ended[:_PRUNED_PER_SWEEP]:
        turn.delete("key", key_id, "key_pruned")


def reconcile(turn: Turn, key: str) -> None:
    """Keys want nothing of the world."""


def _ended_ms(key: ApiKey) -> int:
    """When the key ended or will end, whichever is first; 0: never."""
    return min((ms for ms in (key.expires_ms, key.revoked_ms) if ms), default=0)


def _has_other_admin(turn: Turn, key_id: str) -> bool:
    """Whether another valid admin key exists."""
    return any(
        other.role == "admin" and other.id != key_id and is_valid(other, turn.now_ms)
        for other in turn.state.keys.values()
    )


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    CreateKeyRequested: create,
    RevokeKeyRequested: revoke,
}
