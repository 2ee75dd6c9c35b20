"""The agent's ledger: the durable objects of the core in one SQLite file, written before any effect is released.

One connection, used by one thread at a time (the driver's writer thread), exclusive: a second agent on the same state
is refused here too, not only by the lock of the state directory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.core.objects import KINDS, Object, Record
from common.errors import StateCorrupt, StateLocked, StateTooNew
from herder.decoding import UNREADABLE

SCHEMA = 1
_encode = msgspec.json.Encoder().encode
_decoders = {kind: msgspec.json.Decoder(cls) for kind, cls in KINDS.items()}


class Ledger:
    """The file. Methods block."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises: StateLocked, StateTooNew, StateCorrupt."""
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._open_schema()
        except sqlite3.OperationalError as error:
            self._db.close()
            if "locked" in str(error):
                raise StateLocked(f"{path} is in use by another agent") from None
            raise StateCorrupt(f"{path}: {error}") from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise StateCorrupt(
                f"{path}: {error}", hint="move the file away; the head will say again what it wants"
            ) from None
        except StateTooNew:
            self._db.close()
            raise

    def _open_schema(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StateTooNew(f"{self.path} is of a newer agent (schema {version}, known up to {SCHEMA})")
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS objects (kind TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL, "
            "PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )
        self._db.execute(f"PRAGMA user_version={SCHEMA}")
        self._db.execute("COMMIT")

    def load(self) -> list[Object]:
        """Every object. Raises: StateCorrupt."""
        found: list[Object] = []
        for kind, key, body in self._db.execute("SELECT kind, key, body FROM objects ORDER BY kind, key"):
            decoder = _decoders.get(kind)
            if decoder is None:
                continue  # of a later version that was taken back; it is kept and left alone
            try:
                found.append(decoder.decode(body))
            except UNREADABLE as error:
                raise StateCorrupt(f"{self.path}: {kind} {key}: {error}") from None
        return found

    def append(self, records: Sequence[Record]) -> None:
        """Makes the records durable, all or none. Raises: sqlite3.Error."""
        latest = {(record.kind, record.key): record.body for record in records}
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for (kind, key), body in latest.items():
                if body is None:
                    self._db.execute("DELETE FROM objects WHERE kind=? AND key=?", (kind, key))
                else:
                    self._db.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", (kind, key, _encode(body)))
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Closes the file."""
        self._db.close()
