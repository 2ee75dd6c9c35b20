"""The mover's own book, `state.db`: blobs, copies, unfinished parts.

It is a cache of what the disk says, kept so that a start need not hash anything: if it is lost, recovery reads
the store again. One connection, guarded by a lock, exclusive to this process; WAL with synchronous=FULL, so a copy
that was reported is still there after a power cut. On file systems whose locks cannot be trusted SQLite takes none:
the owner file (agent/store/recover.py) is what keeps a second mover away.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from common.errors import StateCorrupt, StateLocked, StateTooNew
from common.manifest import Manifest

SCHEMA = 1

_TABLES = """
CREATE TABLE blobs (blob TEXT PRIMARY KEY, size INTEGER NOT NULL, chunk_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, sha256 TEXT NOT NULL, state TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX blobs_sha256 ON blobs (sha256) WHERE sha256 != '';
CREATE TABLE copies (model TEXT NOT NULL, revision TEXT NOT NULL, digest TEXT NOT NULL, manifest BLOB NOT NULL,
    PRIMARY KEY (model, revision)) WITHOUT ROWID;
CREATE TABLE copy_files (blob TEXT NOT NULL, model TEXT NOT NULL, revision TEXT NOT NULL,
    PRIMARY KEY (blob, model, revision)) WITHOUT ROWID;
CREATE TABLE parts (name TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX parts_key ON parts (key);
"""


class Blob(msgspec.Struct, frozen=True):
    """A published blob. state: good | suspect (changed behind our back: not used until it was hashed again)."""

    blob: str
    size: int
    chunk_bytes: int
    mtime_ns: int
    inode: int
    sha256: str = ""
    state: str = "good"


class Catalogue:
    """The open book. Every method is one durable transaction."""

    def __init__(self, path: Path, *, trusts_locks: bool = True) -> None:
        self._lock = threading.Lock()
        try:
            self._db = _open(path, trusts_locks)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StateLocked(f"{path} is in use by another mover") from None
            raise StateCorrupt(f"{path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise StateCorrupt(f"{path}: {error}", hint="move the file away: it is rebuilt from the store") from None

    def close(self) -> None:
        """Ends with a checkpoint of the write-ahead log."""
        with self._lock:
            self._db.close()

    # blobs
    def put_blob(self, blob: Blob) -> None:
        """Adds or replaces a blob."""
        with self._write() as db:
            _put_blob(db, blob)

    def blob(self, blob: str) -> Blob | None:
        """A blob by its id."""
        rows = self._rows("SELECT * FROM blobs WHERE blob = ?", blob)
        return Blob(*rows[0]) if rows else None

    def blob_by_sha256(self, sha256: str, size: int, chunk_bytes: int) -> Blob | None:
        """A good blob whose sha256 was computed here, so that the same file from elsewhere is not fetched."""
        query = "SELECT * FROM blobs WHERE sha256 = ? AND size = ? AND chunk_bytes = ? AND state = 'good'"
        rows = self._rows(query, sha256, size, chunk_bytes) if sha256 else []
        return Blob(*rows[0]) if rows else None

    def blobs(self) -> list[Blob]:
        """All blobs."""
        return [Blob(*row) for row in self._rows("SELECT * FROM blobs ORDER BY blob")]

    def remove_blob(self, blob: str) -> None:
        """Forgets a blob."""
        with self._write() as db:
            db.execute("DELETE FROM blobs WHERE blob = ?", (blob,))

    def used_bytes(self) -> int:
        """Bytes of all published blobs, each counted once."""
        return int(self._rows("SELECT coalesce(sum(size), 0) FROM blobs")[0][0])

    # copies
    def put_copy(self, manifest: Manifest, blobs: list[Blob], parts: list[str]) -> None:
        """A copy was published: its blobs, its row and the end of its parts in one transaction."""
        with self._write() as db:
            for blob in blobs:
                _put_blob(db, blob)
            key = (manifest.model, manifest.revision)
            db.execute("DELETE FROM copy_files WHERE model = ? AND revision = ?", key)
            body = msgspec.json.encode(manifest)
            db.execute("INSERT OR REPLACE INTO copies VALUES (?, ?, ?, ?)", (*key, manifest.digest, body))
            rows = {(file.blob, *key) for file in manifest.files}
            db.executemany("INSERT INTO copy_files VALUES (?, ?, ?)", sorted(rows))
            db.executemany("DELETE FROM parts WHERE name = ?", [(name,) for name in parts])

    def copy(self, model: str, revision: str) -> Manifest | None:
        """A copy's manifest."""
        rows = self._rows("SELECT manifest FROM copies WHERE model = ? AND revision = ?", model, revision)
        return _manifest(rows[0][0]) if rows else None

    def copy_by_digest(self, digest: str) -> Manifest | None:
        """Any copy with this manifest digest."""
        rows = self._rows("SELECT manifest FROM copies WHERE digest = ? LIMIT 1", digest)
        return _manifest(rows[0][0]) if rows else None

    def copies(self) -> list[Manifest]:
        """All copies."""
        return [_manifest(row[0]) for row in self._rows("SELECT manifest FROM copies ORDER BY model, revision")]

    def copies_of(self, blob: str) -> list[tuple[str, str]]:
        """The (model, revision) that use a blob."""
        return [(row[0], row[1]) for row in self._rows("SELECT model, revision FROM copy_files WHERE blob = ?", blob)]

    def remove_copy(self, model: str, revision: str) -> None:
        """Forgets a copy; its blobs stay until nobody uses them."""
        with self._write() as db:
            db.execute("DELETE FROM copy_files WHERE model = ? AND revision = ?", (model, revision))
            db.execute("DELETE FROM copies WHERE model = ? AND revision = ?", (model, revision))

    # parts
    def put_part(self, name: str, key: str) -> None:
        """A private directory of this mover begins."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?)", (name, key))

    def part(self, key: str) -> str | None:
        """The directory name of an unfinished part."""
        rows = self._rows("SELECT name FROM parts WHERE key = ? ORDER BY name LIMIT 1", key)
        return str(rows[0][0]) if rows else None

    def parts(self) -> dict[str, str]:
        """All unfinished parts: directory name -> key."""
        return {str(row[0]): str(row[1]) for row in self._rows("SELECT name, key FROM parts")}

    def remove_part(self, name: str) -> None:
        """A private directory has ended."""
        with self._write() as db:
            db.execute("DELETE FROM parts WHERE name = ?", (name,))

    def _rows(self, query: str, *values: str | int) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _open(path: Path, trusts_locks: bool) -> sqlite3.Connection:
    vfs = "" if trusts_locks else "?vfs=unix-none"
    uri = f"{path.absolute().as_uri()}{vfs}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=1.0)
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StateTooNew(f"{path} has schema {version}; this mover knows {SCHEMA}")
        db.execute("BEGIN EXCLUSIVE")
        if version == 0:
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA}")
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _put_blob(db: sqlite3.Connection, blob: Blob) -> None:
    db.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?, ?, ?, ?)", msgspec.structs.astuple(blob))


_manifests = msgspec.json.Decoder(Manifest)


def _manifest(body: bytes) -> Manifest:
    return _manifests.decode(body)
