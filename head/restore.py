"""Restoring a backup: `herder-head --restore FILE`, while no head runs.

A restored head is behind what its agents remember, and agents refuse whatever is older than what they saw. So the
restored journal's head_epoch and revision (generations are revisions) jump ahead, further than the lost time can
have brought them. What was in the state directory is set aside, never deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from pathlib import Path

import msgspec

from common.errors import Conflict, InvalidConfig, StateCorrupt
from common.statedir import StateDir, sync_folder
from common.telemetry import fields
from head.core.objects import Meta
from head.journal_schema import FILE_NAME, publish, verify
from herder.decoding import UNREADABLE

log = logging.getLogger(__name__)
EPOCH_JUMP = 1_000
REVISION_JUMP = 1_000_000_000  # a billion changes; JSON numbers stay exact up to 2**53


class Restored(msgspec.Struct, frozen=True):
    """What a restore did. `kept` is where the former journal is; empty when there was none."""

    cluster_id: str
    head_epoch: int
    revision: int
    kept: str


def restore(backup: Path, state_dir: Path, *, is_forced: bool = False, allow_network_fs: bool = False) -> Restored:
    """Puts a backup in the place of the journal.

    Raises: InvalidConfig, StateLocked (a head runs), Conflict (there is a journal and `is_forced` is not set),
    StateCorrupt, StateTooNew.
    """
    if not backup.is_file():
        raise InvalidConfig(f"{backup} is not a file")
    wal = backup.with_name(f"{backup.name}-wal")
    if wal.exists() and wal.stat().st_size:
        raise InvalidConfig(
            f"{backup} is a journal in use, not a backup: part of it is in {wal.name}",
            hint="make a backup with `herder backup FILE`; copied files lose what is in the WAL",
        )
    owned = StateDir.open(state_dir, daemon="herder-head", allow_network_fs=allow_network_fs)
    try:
        target = owned.path / FILE_NAME
        if target.exists() and not is_forced:
            raise Conflict(f"{target} exists", hint="--force sets it aside and restores the backup in its place")
        part = target.with_name(f".{FILE_NAME}.restore")
        try:
            verify(backup)
            _copy(backup, part)
            meta, revision = _jump(part)
            kept = _set_aside(target)
            publish(part, target)
        except (sqlite3.Error, *UNREADABLE, KeyError, TypeError) as error:
            raise StateCorrupt(f"{backup} is not a backup of a head: {error}") from None
        except OSError as error:
            raise InvalidConfig(f"{backup} could not be restored: {error}", hint="is there space for it?") from None
        finally:
            part.unlink(missing_ok=True)
        log.warning(
            "journal restored; epoch and revision jumped ahead of what agents may have seen",
            extra=fields(backup=str(backup), head_epoch=meta.head_epoch, revision=revision, kept=kept),
        )
        return Restored(meta.cluster_id, meta.head_epoch, revision, kept)
    finally:
        owned.close()


def _copy(backup: Path, part: Path) -> None:
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as target, backup.open("rb") as source:
        shutil.copyfileobj(source, target, 1 << 20)


def _jump(part: Path) -> tuple[Meta, int]:
    """Moves epoch and revision of the copy ahead, in one transaction and with a line in the history."""
    connection = sqlite3.connect(part, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = DELETE")  # one file; the head turns WAL on again
        connection.execute("BEGIN IMMEDIATE")
        found = connection.execute("SELECT body FROM objects WHERE kind = 'meta' AND key = 'cluster'").fetchone()
        if found is None:
            raise StateCorrupt(f"{part}: the backup holds no cluster")
        was = msgspec.json.decode(found[0], type=Meta)
        meta = msgspec.structs.replace(was, head_epoch=was.head_epoch + EPOCH_JUMP)
        values = dict(connection.execute("SELECT name, value FROM meta"))
        revision = values["revision"] + REVISION_JUMP
        stamp_ms = max(values["stamp_ms"], time.time_ns() // 1_000_000)
        detail = msgspec.json.encode({"epoch_before": was.head_epoch, "revision_before": values["revision"]})
        connection.execute(
            "UPDATE objects SET body = ?, revision = ? WHERE kind = 'meta' AND key = 'cluster'",
            (msgspec.json.encode(meta), revision),
        )
        connection.execute(
            "INSERT INTO history VALUES (?, ?, 'journal_restored', 'restore', 'meta', 'cluster', ?)",
            (revision, stamp_ms, detail),
        )
        connection.executemany(
            "UPDATE meta SET value = ? WHERE name = ?",
            [(revision, "revision"), (stamp_ms, "stamp_ms"), (1, "is_clean")],
        )
        connection.execute("COMMIT")
        return meta, revision
    finally:
        connection.close()


def _set_aside(target: Path) -> str:
    """Renames a former journal and its WAL, which must never meet another database; returns the new name."""
    if not target.exists():
        target.with_name(f"{FILE_NAME}-wal").unlink(missing_ok=True)
        return ""
    number = 1
    while (kept := target.with_name(f"{FILE_NAME}.before-restore-{number}")).exists():
        number += 1
    wal = target.with_name(f"{FILE_NAME}-wal")
    if wal.exists():
        wal.rename(kept.with_name(f"{kept.name}-wal"))
    target.rename(kept)
    sync_folder(target.parent)
    return str(kept)
