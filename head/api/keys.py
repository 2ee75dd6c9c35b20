"""/keys: tokens by role. A token is shown once, in the answer that created it; only its hash is kept."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from common.errors import KeyNotFound
from head import auth
from head.api import render
from head.api.call import Call, near
from head.api.routes import PREFIX, ListQuery, PageOf, Route
from head.core.events import CreateKeyRequested, RevokeKeyRequested
from head.core.objects import ApiKey
from head.core.state import State
from herder import types as api

TAG = "keys"


class KeysQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of keys."""

    role: Annotated[api.Role | None, Meta(description="Only keys of this role.")] = None


def find(state: State, key_id: str) -> ApiKey:
    """The key of an id. Raises: KeyNotFound."""
    key = state.keys.get(key_id)
    if key is None:
        raise KeyNotFound(f"no key {key_id[:80]!r}", hint=near(key_id, state.keys, "GET /api/v1/keys lists them"))
    return key


async def index(call: Call) -> web.StreamResponse:
    query, state = call.query(KeysQuery), await call.read()
    return await call.page(
        "keys",
        query,
        call.lists["key"].order(),
        lambda key_id: render.key_view(state.keys[key_id]),
        wants=(lambda key_id: state.keys[key_id].role == query.role) if query.role else None,
    )


async def create(call: Call) -> web.StreamResponse:
    body = call.body(api.CreateKey)
    secret = call.context.ids.secret()
    reply = await call.submit(CreateKeyRequested, fresh="key", body=body, secret_sha256=auth.hash_secret(secret))
    key = find(call.state, reply.reference.removeprefix("key:"))
    token, digest = auth.new_token(key.role, key.id, secret)
    # A repeat under an Idempotency-Key finds the first key, whose secret nobody has any more: no token then.
    return call.answer(render.key_view(key, token if digest == key.secret_sha256 else None))


async def revoke(call: Call) -> web.StreamResponse:
    key = find(await call.read(), call.path("id"))
    await call.submit(RevokeKeyRequested, key=key.id)
    return call.answer(render.key_view(find(call.state, key.id)))


ROUTES = (
    Route("GET", f"{PREFIX}/keys", index, "admin", TAG, "List keys", PageOf(api.KeyView), query=KeysQuery),
    Route(
        "POST",
        f"{PREFIX}/keys",
        create,
        "admin",
        TAG,
        "Create a key",
        api.KeyView,
        body=api.CreateKey,
        status=201,
        codes=("idempotency_mismatch", "too_many"),
        description="The answer holds the token, this once. A repeat under the same Idempotency-Key shows the key "
        "without it: the secret is not kept.",
    ),
    Route(
        "DELETE",
        f"{PREFIX}/keys/{{id}}",
        revoke,
        "admin",
        TAG,
        "Revoke a key",
        api.KeyView,
        codes=("key_not_found", "conflict"),
        description="At once. The last valid admin key stays.",
    ),
)
