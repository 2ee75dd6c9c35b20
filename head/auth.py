"""Who asks: bearer tokens against the keys in the state. Pure; fails closed.

A token is "hdr_<role>_<id>_<secret>". The key is looked up by its id and the secret compared by its sha256 in
constant time, so an attacker learns nothing from timing; the role in the token is only for people and must agree.
"""

from __future__ import annotations

import hashlib
import hmac
import re

import msgspec

from common.errors import Forbidden, Unauthenticated
from head.core.state import State

RANK = {"viewer": 1, "operator": 2, "admin": 3}  # each may do what the lower may; agent and inference stand apart
_TOKEN = re.compile(r"hdr_(admin|operator|viewer|agent|inference)_([A-Za-z0-9-]{1,64})_([A-Za-z0-9_-]{16,128})")
_NOBODY = "0" * 64
_HINT = "send `Authorization: Bearer TOKEN`; `herder keys` creates tokens"


class Principal(msgspec.Struct, frozen=True):
    """Who was authenticated."""

    role: str
    key_id: str
    name: str

    @property
    def actor(self) -> str:
        """How records name who asked."""
        return f"{self.name}({self.key_id})"

    def require(self, role: str) -> None:
        """At least this role of viewer < operator < admin, or exactly agent or inference. Raises: Forbidden.

        An admin and an operator may also use the gateway; nobody but agents may open sessions.
        """
        if role == "inference":
            is_allowed = self.role == role or RANK.get(self.role, 0) >= RANK["operator"]
        elif role == "agent":
            is_allowed = self.role == role
        else:
            is_allowed = RANK.get(self.role, 0) >= RANK[role]
        if not is_allowed:
            raise Forbidden(f"this needs the role {role}; the key {self.key_id} has {self.role}", hint=_HINT)


def is_good(state: State, key_id: str, now_ms: int) -> bool:
    """Whether a key that opened something still may keep it open."""
    key = state.keys.get(key_id)
    return key is not None and not key.is_revoked and not 0 < key.expires_ms <= now_ms


def new_token(role: str, key_id: str, secret: str) -> tuple[str, str]:
    """The token's text, shown once, and the hash of its secret, which is what is kept."""
    return f"hdr_{role}_{key_id}_{secret}", hash_secret(secret)


def hash_secret(secret: str) -> str:
    """Hex sha256: enough for 256 random bits, which cannot be guessed from their hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def authenticate(state: State, header: str | None, now_ms: int) -> Principal:
    """The principal behind an Authorization header. Raises: Unauthenticated."""
    scheme, _, token = (header or "").partition(" ")
    match = _TOKEN.fullmatch(token.strip()) if scheme.lower() == "bearer" else None
    if match is None:
        raise Unauthenticated("no usable token was sent", hint=_HINT)
    role, key_id, secret = match.groups()
    key = state.keys.get(key_id)
    is_same = hmac.compare_digest(key.secret_sha256 if key else _NOBODY, hash_secret(secret))
    if key is None or not is_same or key.role != role:
        raise Unauthenticated("the token is not known here", hint=_HINT)
    if key.is_revoked:
        raise Unauthenticated(f"the key {key_id} was revoked", hint=_HINT)
    if key.expires_ms and key.expires_ms <= now_ms:
        raise Unauthenticated(f"the key {key_id} has expired", hint=_HINT)
    return Principal(key.role, key.id, key.name)
