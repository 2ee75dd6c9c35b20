"""What a journal file is: its schema by version, how it is told from other files, and how it is checked.

The file of every released version must open for ever: entries of MIGRATIONS that were released never change, new ones
are appended, and `tests/golden` keeps a file of each version.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from common.errors import StateCorrupt, StateTooNew
from common.statedir import sync_folder

APPLICATION_ID = 0x48524452  # "HRDR"
FILE_NAME = "journal.sqlite"

# One entry per schema version, each a list of statements. Released entries never change; new ones are appended.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE objects (kind TEXT NOT NULL, key TEXT NOT NULL, revision INTEGER NOT NULL, body BLOB NOT NULL,"
        " PRIMARY KEY (kind, key)) STRICT",
        "CREATE TABLE history (revision INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, what TEXT NOT NULL,"
        " cause TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, detail BLOB NOT NULL) STRICT",
        "CREATE INDEX history_by_key ON history (key)",
        "CREATE INDEX history_by_cause ON history (cause)",
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT",
        "INSERT INTO meta VALUES ('revision', 0), ('stamp_ms', 0), ('is_clean', 1)",
    ),
    (),  # benchmarks, points and runs: a head before them knows no such kinds and must not open the file
)


def check_identity(connection: sqlite3.Connection, path: Path, known_version: int) -> None:
    """That this is a journal and of a version that we know. Raises: StateCorrupt, StateTooNew."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and (application or tables):
        raise StateCorrupt(f"{path} is a database of something else", hint="give the head a state_dir of its own")
    if version > known_version:
        raise StateTooNew(
            f"{path} was written by a newer Herder (schema {version}, this one knows {known_version})",
            hint="install that version again, or restore a backup made before the upgrade",
        )


def publish(part: Path, target: Path) -> None:
    """Checks the copy with a connection of its own, syncs it and gives it its name."""
    verify(part)
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(target)
    sync_folder(target.parent)


def verify(path: Path) -> int:
    """Checks a journal file that nobody writes; returns its schema version.

    Raises: StateCorrupt, StateTooNew, sqlite3.Error when it cannot be opened.
    """
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        check_identity(connection, path, len(MIGRATIONS))
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if not version:
            raise StateCorrupt(f"{path} is not a journal", hint="a backup is made by `herder backup FILE`")
        verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise StateCorrupt(f"{path}: {verdict}")
        return version
    except sqlite3.DatabaseError as error:
        raise StateCorrupt(f"{path}: {error}") from None
    finally:
        connection.close()
