"""Idempotency keys: a repeated request gets the answer of the first, never a second effect.

Every handler that creates something begins with `if replayed(turn, event): return` and ends with
`remember(turn, event, reference)` (or `answer`, which also replies). Keys belong to the actor who used them.
"""

from __future__ import annotations

from common import limits
from common.errors import IdempotencyMismatch, InvalidValue, TooMany
from head.core.events import RequestEvent
from head.core.objects import Idempotent
from head.core.turn import Turn

_SWEEP_MS = 60_000
_EXPIRED_PER_SWEEP = 1_000


def replayed(turn: Turn, event: RequestEvent) -> bool:
    """Whether this request was answered before; if so it is answered again, with the same reference.

    Raises: InvalidValue for an unusable key, IdempotencyMismatch when the key came with another request,
    TooMany when no more keys can be remembered.
    """
    if not event.idempotency_key:
        return False
    if len(event.idempotency_key) > limits.IDEMPOTENCY_KEY_CHARS or not event.idempotency_key.isprintable():
        raise InvalidValue(
            "the Idempotency-Key is not usable", hint=f"at most {limits.IDEMPOTENCY_KEY_CHARS} printable characters"
        )
    known = turn.state.idempotents.get(_id(event))
    if known is None or turn.now_ms - known.at_ms >= limits.IDEMPOTENCY_TTL_MS:
        if known is None and len(turn.state.idempotents) >= limits.IDEMPOTENCY_KEYS:
            raise TooMany("too many idempotency keys are remembered", limit=limits.IDEMPOTENCY_KEYS)
        return False
    if known.request_sha256 != event.request_sha256:
        raise IdempotencyMismatch(
            "this Idempotency-Key was used for another request", hint="use a new key for a new request"
        )
    turn.reply(event, reference=known.reference)
    return True


def remember(turn: Turn, event: RequestEvent, reference: str) -> None:
    """Keeps what the request made ("kind:key") for repeats; without a key there is nothing to keep."""
    if event.idempotency_key:
        kept = Idempotent(id=_id(event), request_sha256=event.request_sha256, at_ms=turn.now_ms, reference=reference)
        turn.put(kept, "request_remembered")


def answer(turn: Turn, event: RequestEvent, reference: str) -> None:
    """Remembers and replies."""
    remember(turn, event, reference)
    turn.reply(event, reference=reference)


def on_tick(turn: Turn) -> None:
    """Once a minute forgets keys that are past their time, a bounded number at once."""
    if turn.now_ms // _SWEEP_MS == turn.state.last_tick_ms // _SWEEP_MS:
        return
    horizon_ms = turn.now_ms - limits.IDEMPOTENCY_TTL_MS
    ended = [key for key, kept in turn.state.idempotents.items() if kept.at_ms <= horizon_ms]
    for key in ended[:_EXPIRED_PER_SWEEP]:
        turn.delete("idempotent", key, "request_forgotten")


def _id(event: RequestEvent) -> str:
    return f"{event.actor}:{event.idempotency_key}"
