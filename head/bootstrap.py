"""A head's first start: the admin's and the agents' tokens, made once, kept in 0600 files beside the journal.

Whoever may read the state directory is the administrator of this head anyway; the local command line reads
`admin.token` there, and a person carries `join.token` to the nodes. The file is written before the key is durable:
a crash in between leaves a token that opens nothing, and the next start, finding no key, draws anew.
"""

from __future__ import annotations

import logging
from pathlib import Path

from common.statedir import write_secret
from common.telemetry import fields
from head.auth import new_token
from head.context import IdSource
from head.core.events import CreateKeyRequested
from head.core.state import State
from head.driver import Driver
from herder.types import CreateKey, Role

log = logging.getLogger(__name__)
ADMIN_FILE = "admin.token"
JOIN_FILE = "join.token"
ACTOR = "head"


async def ensure_tokens(driver: Driver, ids: IdSource, state_dir: Path) -> None:
    """Makes the first admin key and the first agent key where the journal has none that is valid."""
    await _ensure(driver, ids, "admin", state_dir / ADMIN_FILE, "first-admin")
    await _ensure(driver, ids, "agent", state_dir / JOIN_FILE, "join")


async def new_admin_token(driver: Driver, ids: IdSource, state_dir: Path) -> None:
    """Makes one more admin key and puts its token into the admin file, for an admin who lost theirs."""
    await _create(driver, ids, "admin", state_dir / ADMIN_FILE, "recovered-admin")


def valid_keys(state: State, role: str, now_ms: int) -> int:
    """How many keys of a role open doors."""
    keys = state.keys.values()
    return sum(key.role == role and not key.is_revoked and not 0 < key.expires_ms <= now_ms for key in keys)


async def _ensure(driver: Driver, ids: IdSource, role: Role, path: Path, name: str) -> None:
    if not valid_keys(driver.state, role, driver.clock.now_ms()):
        await _create(driver, ids, role, path, name)


async def _create(driver: Driver, ids: IdSource, role: Role, path: Path, name: str) -> None:
    key_id = ids.fresh("key")
    token, secret_sha256 = new_token(role, key_id, ids.secret())
    write_secret(path, token)
    await driver.submit(
        CreateKeyRequested(
            request_id=ids.fresh("req"),
            actor=ACTOR,
            fresh_id=key_id,
            body=CreateKey(role=role, name=name),
            secret_sha256=secret_sha256,
        )
    )
    log.info("token created", extra=fields(role=role, key=key_id, file=str(path)))
