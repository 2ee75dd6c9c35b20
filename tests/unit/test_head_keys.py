"""API keys: created, revoked, ended, pruned; never the last admin."""

from __future__ import annotations

import pytest

from common import limits
from head.core.effects import Reply
from head.core.events import CreateKeyRequested, RevokeKeyRequested
from head.core.keys import is_valid
from herder import types as api
from tests.doubles.head_core import World

SHA = "a" * 64


def create(world: World, role: str = "admin", **fields: object) -> str:
    """Makes a key that must be taken; its id."""
    body = api.CreateKey(role=role, name="key", **fields)  # type: ignore[arg-type]
    answer = world.request(CreateKeyRequested, body=body, secret_sha256=SHA)
    assert isinstance(answer, Reply)
    return answer.reference.removeprefix("key:")


def test_a_key_is_kept_without_its_secret() -> None:
    """Only the digest of the secret comes to the core."""
    world = World()
    key = world.state.keys[create(world, "operator", ttl_s=60)]
    assert (key.role, key.secret_sha256, key.expires_ms) == ("operator", SHA, world.now_ms + 60_000)


@pytest.mark.parametrize("sha", ["", "abc", "a" * 65])
def test_a_digest_of_another_length_is_refused(sha: str) -> None:
    """A key that could never match is a mistake."""
    world = World()
    body = api.CreateKey(role="admin", name="k")
    assert world.request(CreateKeyRequested, body=body, secret_sha256=sha).code == "invalid_value"


def test_two_keys_never_share_an_id() -> None:
    """A drawn id that is taken is refused and not overwritten."""
    world = World()
    body = api.CreateKey(role="admin", name="k")
    world.request(CreateKeyRequested, body=body, secret_sha256=SHA, fresh_id="same")
    answer = world.request(CreateKeyRequested, body=body, secret_sha256="b" * 64, fresh_id="same")
    assert answer.code == "invalid_value"
    assert world.state.keys["same"].secret_sha256 == SHA


def test_a_revoked_key_is_not_valid() -> None:
    """Revoking ends a key at once, and again changes nothing."""
    world = World()
    create(world)
    key = create(world, "viewer")
    assert is_valid(world.state.keys[key], world.now_ms)
    world.request(RevokeKeyRequested, key=key)
    assert not is_valid(world.state.keys[key], world.now_ms)
    world.request(RevokeKeyRequested, key=key)
    assert world.turn is not None
    assert world.turn.records == []


def test_the_last_admin_key_stays() -> None:
    """Nobody locks everybody out; an expired or revoked admin does not count as another."""
    world = World()
    first, second = create(world), create(world, ttl_s=10)
    world.now_ms += 10_000
    assert not is_valid(world.state.keys[second], world.now_ms)
    assert world.request(RevokeKeyRequested, key=first).code == "conflict"
    third = create(world)
    assert isinstance(world.request(RevokeKeyRequested, key=first), Reply)
    assert world.request(RevokeKeyRequested, key=third).code == "conflict"


def test_unknown_key() -> None:
    """Only known keys can be revoked."""
    assert World().request(RevokeKeyRequested, key="none").code == "key_not_found"


def test_ended_keys_are_pruned_after_a_while() -> None:
    """They stay listed for some days, so that people see what happened."""
    world = World()
    create(world)
    expired, revoked = create(world, "viewer", ttl_s=1), create(world, "viewer")
    world.request(RevokeKeyRequested, key=revoked)
    world.pass_s(120)
    assert {expired, revoked} <= set(world.state.keys)
    world.now_ms += limits.KEY_KEPT_MS
    world.pass_s(1)
    assert {expired, revoked} & set(world.state.keys) == set()
    assert len(world.state.keys) == 1


def test_the_number_of_keys_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that creates keys is told to stop."""
    monkeypatch.setattr(limits, "KEYS", 1)
    world = World()
    create(world)
    body = api.CreateKey(role="viewer", name="k")
    assert world.request(CreateKeyRequested, body=body, secret_sha256=SHA).code == "too_many"
