"""The token that executors ask for and the orchestrator shows: one file, of mode 0600, for both."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from herder.settings import read_token_file

VARIABLE = "HERDER_EXECUTOR_TOKEN_FILE"


def path_of(named: str | None = None) -> Path:
    """The token's file: the named one, else the environment's, else the one in the user's state folder."""
    given = named or os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "herder" / "executor.token"


def read(path: Path) -> str:
    """The token. Raises: HerderConfigError, also when others can read the file."""
    return read_token_file(path)


def read_or_make(path: Path) -> tuple[str, bool]:
    """(token, whether it was made now). Two executors that start at once agree on one. Raises: HerderConfigError."""
    if path.exists():
        return read(path), False
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"hdx_{secrets.token_urlsafe(32)}\n")
    try:
        os.link(draft, path)
    except FileExistsError:
        return read(path), False
    finally:
        draft.unlink()
    return read(path), True
