"""Files that only look like backups: refused in words, and the state directory stays as it was."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import StateCorrupt
from head.journal_schema import APPLICATION_ID, FILE_NAME, MIGRATIONS
from head.restore import restore

CLUSTER = "INSERT INTO objects VALUES ('meta', 'cluster', 1, CAST('{}' AS BLOB))".format(
    '{"cluster_id":"c","head_epoch":1,"created_ms":1}'
)


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE history"],
        ["INSERT INTO objects VALUES ('meta', 'cluster', 1, CAST('not json' AS BLOB))"],
        [CLUSTER, "DELETE FROM meta"],
        [CLUSTER, "DROP TABLE history", "CREATE TABLE history (revision INTEGER PRIMARY KEY)"],
    ],
)
def test_a_file_that_only_looks_like_a_backup_is_refused(tmp_path: Path, statements: list[str]) -> None:
    """Its marks are right and its contents are not: an error in words, no traceback, nothing left behind."""
    backup = tmp_path / "hostile.sqlite"
    with closing(sqlite3.connect(backup)) as connection:
        for statement in (*MIGRATIONS[0], *statements):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.commit()
    with pytest.raises(StateCorrupt):
        restore(backup, tmp_path / "head")
    assert not (tmp_path / "head" / FILE_NAME).exists()
    assert not list((tmp_path / "head").glob(".*restore"))
