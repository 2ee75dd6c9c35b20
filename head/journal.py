"""The journal: what the head must not forget, in one SQLite file behind one thread.

The working copy of the state is in memory; the journal exists so that a start finds it again. It keeps the latest
body of every object (what a start reads) and a pruned history of what happened (what stories are told from).

There is exactly one connection, made and used only by the writer thread, with locking_mode=EXCLUSIVE: no second
head can read half a truth, and the WAL-reset bug of SQLite 3.7.0 - 3.51.2, which needs two connections, cannot be
reached. synchronous=FULL syncs the WAL at each commit; NORMAL would let a power cut undo acknowledged commits.
Commits that wait together share one transaction and one sync (group commit), and their waiters are woken by one
call into the event loop.

A commit that SQLite refused (disk full, I/O error) is already rolled back; its frames may still lie in the WAL
behind the last valid one and are overwritten by the next commit that succeeds, which the driver's probe provides.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from common import limits
from common.errors import (
    DiskFull,
    HerderError,
    Internal,
    StateCorrupt,
    StateReadOnly,
    StateTooNew,
    TooMany,
    Unavailable,
)
from common.statedir import sync_folder
from common.telemetry import fields
from head.core.objects import KINDS, Job, Object
from head.core.records import Record
from head.core.state import State, restore, restore_job
from head.journal_schema import APPLICATION_ID, MIGRATIONS, check_identity, publish
from herder.decoding import UNREADABLE
from herder.types import StoryLine

log = logging.getLogger(__name__)
T = TypeVar("T")

QUERY_ROWS = 10_000
ASKING = 64  # questions that wait for the writer thread; more would make commits wait behind them
PRUNE_ROWS = 1_000  # history is pruned in strokes of at least this many
PROBE_ROOM_BYTES = 256 << 10  # what must be free before a journal that was refused counts as writable again
BACKUP_SPARE_BYTES = 64 << 20  # room that commits have while a backup is made
BACKUP_STEP_PAGES = 256
PROBLEM_HINT = "free space on the head's disk; it resumes by itself once its journal can be written"

_PUT = (
    "INSERT INTO objects (kind, key, revision, body) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (kind, key) DO UPDATE SET revision = excluded.revision, body = excluded.body"
)
_HISTORY_COLUMNS = "revision, at_ms, what, cause, kind, key, detail"
_NEVER = 2**63 - 1
# Each part walks one index backwards and stops at the limit: left to itself the planner would scan the whole history.
# '@' ends a model's name in the keys of its copies and manifests; 'A' is the character after it.
_STORY = (
    " UNION ".join(  # noqa: S608 - our own words only
        f"SELECT * FROM (SELECT {_HISTORY_COLUMNS} FROM history INDEXED BY {index} WHERE {where}"  # noqa: S608
        " AND (:kind = '' OR kind = :kind) AND revision < :before ORDER BY revision DESC LIMIT :limit)"
        for index, where in (
            ("history_by_key", "key = :id"),
            ("history_by_cause", "cause = :id"),
            ("history_by_key", "key >= :id || '@' AND key < :id || 'A'"),
        )
    )
    + " ORDER BY revision DESC LIMIT :limit"
)


class Row(NamedTuple):
    """A record as the journal writes it."""

    revision: int
    at_ms: int
    what: str
    cause: str
    kind: str
    key: str
    detail: bytes
    body: bytes | None


_encoder = msgspec.json.Encoder()


def encode(record: Record) -> Row:
    """A record in its stored form. Raises: TypeError and the like when a body cannot be stored (a bug)."""
    return Row(
        record.revision,
        record.at_ms,
        record.what,
        record.cause,
        record.kind,
        record.key,
        _encoder.encode(record.detail),
        None if record.body is None else _encoder.encode(record.body),
    )


class _Commit:
    """Rows that wait for the disk, and who waits."""

    __slots__ = ("future", "loop", "rows")

    def __init__(self, rows: Sequence[Row], loop: asyncio.AbstractEventLoop) -> None:
        self.rows = rows
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()


class _Call:
    """Work for the writer thread."""

    __slots__ = ("future", "work")

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever asked
            self.future.set_exception(error)


class Journal:
    """One open journal. `open` and `close` block; everything else is awaited."""

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
        self.path = path
        self.revision = 0  # of the last durable record
        self.stamp_ms = 0  # the latest time that a durable record bears
        self.was_clean = True
        self.on_commit: Callable[[float, int], None] | None = None  # (seconds, records), called in the thread
        self._migrations = migrations
        self._queue: queue.SimpleQueue[_Commit | _Call | None] = queue.SimpleQueue()
        self._postponed: deque[_Call] = deque()
        self._history_rows = 0
        self._asking = 0
        self._connection: sqlite3.Connection
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    @classmethod
    def open(cls, path: Path, *, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> Journal:
        """Opens or makes the journal. Raises: StateCorrupt, StateTooNew, StateReadOnly."""
        journal = cls(path, migrations)
        journal._thread.start()
        try:
            journal.call(journal._open)
        except BaseException:
            journal._queue.put(None)
            journal._thread.join()
            raise
        return journal

    def call(self, work: Callable[[], T]) -> T:
        """Runs work on the writer thread and blocks for it; for start-up, shutdown and tests."""
        call = _Call(work)
        self._queue.put(call)
        result: T = call.future.result()
        return result

    async def ask(self, work: Callable[[], T]) -> T:
        """Runs work on the writer thread and awaits it. Raises: TooMany, and what the work raises."""
        if self._asking >= ASKING:
            raise TooMany("too many questions to the journal at once", hint="try again in a moment")
        call = _Call(work)
        self._asking += 1
        try:
            self._queue.put(call)
            result: T = await asyncio.wrap_future(call.future)
            return result
        finally:
            self._asking -= 1

    async def commit(self, rows: Sequence[Row]) -> None:
        """Makes the rows durable, all or none. Cancelling the wait does not cancel the commit.

        No rows: a probe, which writes all the same, and wants room for more than itself. Raises: StateReadOnly.
        """
        item = _Commit(rows, asyncio.get_running_loop())
        self._queue.put(item)
        await asyncio.shield(item.future)

    def load(self) -> State:
        """The state as the journal keeps it. Raises: StateCorrupt, StateTooNew."""
        return self.call(self._load)

    async def history(self, *, after: int = 0, limit: int = 1_000, newest: bool = False) -> list[StoryLine]:
        """What happened after a revision, oldest first; `newest`: the last `limit` lines of it."""
        order = "DESC" if newest else "ASC"
        sql = f"SELECT {_HISTORY_COLUMNS} FROM history WHERE revision > ? ORDER BY revision {order} LIMIT ?"  # noqa: S608
        return await self.ask(lambda: self._lines(sql, (after, _capped(limit))))

    async def story(
        self, id: str, *, kind: str = "", before: int = 0, limit: int = limits.PAGE_ITEMS
    ) -> list[StoryLine]:
        """The last lines about a key or caused by it, oldest first; a model's name also finds its copies.

        kind: only objects of this kind. before: only revisions below, to page backwards.
        """
        values = {"id": id, "kind": kind, "before": before or _NEVER, "limit": _capped(limit)}
        return await self.ask(lambda: self._lines(_STORY, values))

    async def backup(self, target: Path) -> None:
        """Copies the journal to a new file while commits go on; the file appears whole, checked and durable.

        Raises: DiskFull before anything is written, StateReadOnly when it cannot be.
        """
        part = target.with_name(f".{target.name}.part")
        try:
            await self.ask(lambda: self._backup(part))
            await asyncio.to_thread(publish, part, target)
        except (OSError, sqlite3.Error) as error:
            raise StateReadOnly(f"the backup could not be written: {error}", hint="is there space for it?") from None
        finally:
            part.unlink(missing_ok=True)  # gone already when it was published

    def close(self) -> None:
        """Writes what waits, marks the end as clean, and ends the thread."""
        if self._thread.is_alive():
            try:
                self.call(self._close)
            finally:
                self._queue.put(None)
                self._thread.join()

    # everything below runs on the writer thread

    def _run(self) -> None:
        while True:
            item: _Commit | _Call | None = self._postponed.popleft() if self._postponed else self._queue.get()
            if item is None:
                return
            if isinstance(item, _Call):
                item.run()
            else:
                self._commit_with_followers(item)

    def _commit_with_followers(self, first: _Commit) -> None:
        """Commits what waits in one transaction, up to JOURNAL_BATCH_RECORDS; a caller's rows stay together."""
        batch, count = [first], len(first.rows)
        while count < limits.JOURNAL_BATCH_RECORDS:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if not isinstance(item, _Commit):
                if item is None:
                    self._queue.put(None)
                else:
                    self._postponed.append(item)
                break
            batch.append(item)
            count += len(item.rows)
        outcome = self._write([row for item in batch for row in item.rows])
        by_loop: dict[asyncio.AbstractEventLoop, list[_Commit]] = {}
        for item in batch:
            by_loop.setdefault(item.loop, []).append(item)
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_settle, items, outcome)
            except RuntimeError:  # the loop has closed: nobody waits any more
                log.warning("nobody waited for a commit", extra=fields(records=count))

    def _write(self, rows: list[Row]) -> HerderError | None:
        """One transaction. Returns why it failed, or None once it is durable."""
        connection = self._connection
        started = time.perf_counter()
        if not rows and (free := _free_bytes(self.path.parent)) < PROBE_ROOM_BYTES:
            # A probe alone fits into what the WAL has already, while every batch after it is refused.
            return StateReadOnly(f"the journal's disk has {free} free bytes", hint=PROBLEM_HINT)
        try:
            connection.execute("BEGIN IMMEDIATE")
            pruned = self._put(rows)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._end_transaction()
            name = getattr(error, "sqlite_errorname", "")
            return StateReadOnly(f"the journal cannot be written: {error}", hint=PROBLEM_HINT, sqlite=name)
        except Exception as error:
            self._end_transaction()
            log.exception("the journal failed on its own account")
            return Internal(f"the journal failed: {type(error).__name__}")
        self._history_rows += len(rows) - pruned
        if rows:
            self.revision = rows[-1].revision
            self.stamp_ms = max(self.stamp_ms, rows[-1].at_ms)
        if self.on_commit is not None:
            self.on_commit(time.perf_counter() - started, len(rows))
        return None

    def _put(self, rows: list[Row]) -> int:
        connection = self._connection
        latest = {(row.kind, row.key): row for row in rows}
        puts = [(*key, row.revision, row.body) for key, row in latest.items() if row.body is not None]
        connection.executemany(_PUT, puts)
        gone = [key for key, row in latest.items() if row.body is None]
        connection.executemany("DELETE FROM objects WHERE kind = ? AND key = ?", gone)
        connection.executemany("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?)", [row[:7] for row in rows])
        revision = rows[-1].revision if rows else self.revision
        stamp_ms = max(self.stamp_ms, rows[-1].at_ms) if rows else self.stamp_ms
        connection.execute("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))
        connection.execute("UPDATE meta SET value = ? WHERE name = 'stamp_ms'", (stamp_ms,))
        excess = self._history_rows + len(rows) - limits.HISTORY_RECORDS_KEPT
        if excess < PRUNE_ROWS:
            return 0
        oldest = "SELECT revision FROM history ORDER BY revision LIMIT ?"
        connection.execute(f"DELETE FROM history WHERE revision IN ({oldest})", (excess,))  # noqa: S608
        return excess

    def _end_transaction(self) -> None:
        """SQLite has mostly rolled back by itself; a ROLLBACK outside a transaction would be an error."""
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                log.exception("a transaction could not be rolled back")

    def _open(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        connection = self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=0)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise StateCorrupt(f"{self.path}: SQLite chose journal mode {mode!r} instead of WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            self._migrate()
            self._check()
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise _opening_error(self.path, error) from None
            raise

    def _migrate(self) -> None:
        connection, known = self._connection, len(self._migrations)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        check_identity(connection, self.path, known)
        if version == known:
            return
        if version:
            kept = self.path.with_name(f"{self.path.name}.v{version}")
            kept.unlink(missing_ok=True)
            self._backup(kept)
            log.info("journal of an older version was kept", extra=fields(path=str(kept), version=version))
        connection.execute("BEGIN IMMEDIATE")
        for statements in self._migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {known}")
        connection.execute("COMMIT")
        sync_folder(self.path.parent)

    def _check(self) -> None:
        connection = self._connection
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        self.was_clean = bool(meta["is_clean"])
        if not self.was_clean:
            started = time.perf_counter()
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise StateCorrupt(f"{self.path}: {verdict}", hint="restore a backup: herder-head --restore FILE")
            seconds = round(time.perf_counter() - started, 3)
            log.info("the last stop was not clean; the journal was checked", extra=fields(seconds=seconds))
        connection.execute("UPDATE meta SET value = 0 WHERE name = 'is_clean'")
        self.revision, self.stamp_ms = meta["revision"], meta["stamp_ms"]
        self._history_rows = connection.execute("SELECT count(*) FROM history").fetchone()[0]

    def _load(self) -> State:
        state = State()
        decoders = {kind: msgspec.json.Decoder(cls) for kind, cls in KINDS.items()}
        was_enabled = gc.isenabled()
        gc.disable()  # nothing here is garbage; looking for some would take longer than loading
        try:
            for kind, key, body in self._connection.execute("SELECT kind, key, body FROM objects ORDER BY rowid"):
                if kind == Job.KIND:
                    restore_job(state, key, body)
                else:
                    restore(state, _decoded(decoders, kind, key, body))
        finally:
            gc.freeze()  # else the first collection would walk all of it
            if was_enabled:
                gc.enable()
        state.revision = self.revision
        return state

    def _lines(self, sql: str, values: Any) -> list[StoryLine]:
        try:
            rows = self._connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise Unavailable(f"the journal cannot be read: {error}", hint="look at the head's disk") from None
        lines = [
            StoryLine(at, revision, what, kind, key, cause, msgspec.json.decode(detail))
            for revision, at, what, cause, kind, key, detail in rows
        ]
        return sorted(lines, key=lambda line: line.revision)

    def _backup(self, part: Path) -> None:
        """Copies page by page; commits that come meanwhile are made between steps and go into the copy too."""
        part.unlink(missing_ok=True)
        self._check_room(part.parent)
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        target = sqlite3.connect(part, isolation_level=None)
        try:
            target.execute("PRAGMA synchronous = OFF")  # synced whole at the end
            self._connection.backup(target, pages=BACKUP_STEP_PAGES, progress=self._between_steps, sleep=0)
        finally:
            target.close()

    def _check_room(self, folder: Path) -> None:
        """A copy that filled the disk would stop every change meanwhile. Raises: DiskFull, OSError."""
        (pages,), (page_bytes,) = (
            self._connection.execute(f"PRAGMA {n}").fetchone() for n in ("page_count", "page_size")
        )
        status = os.statvfs(folder)
        needed, free = pages * page_bytes + BACKUP_SPARE_BYTES, status.f_bavail * status.f_frsize
        if needed > free:
            raise DiskFull(
                f"a backup needs {needed} bytes beside the journal for a while, and {free} are free",
                hint="make room on the head's disk",
                needed_bytes=needed,
                free_bytes=free,
            )

    def _between_steps(self, status: int, remaining: int, total: int) -> None:
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, _Commit):
            self._commit_with_followers(item)
        elif item is None:
            self._queue.put(None)
        else:
            self._postponed.append(item)

    def _close(self) -> None:
        connection = self._connection
        try:
            connection.execute("UPDATE meta SET value = 1 WHERE name = 'is_clean'")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:  # a full disk at the end: the next start checks instead
            log.warning("the journal was not closed cleanly", extra=fields(error=str(error)))
        finally:
            connection.close()


def _decoded(decoders: dict[str, msgspec.json.Decoder[Object]], kind: str, key: str, body: bytes) -> Object:
    decoder = decoders.get(kind)
    if decoder is None:
        raise StateTooNew(f"the journal holds a {kind!r}, which this version does not know", hint="upgrade the head")
    try:
        thing = decoder.decode(body)
    except UNREADABLE as error:
        raise StateCorrupt(f"{kind} {key!r} in the journal cannot be read: {error}") from None
    if thing.key != key:
        raise StateCorrupt(f"{kind} {key!r} in the journal calls itself {thing.key!r}")
    return thing


def _opening_error(path: Path, error: sqlite3.Error) -> HerderError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StateCorrupt(f"{path}: {error}", hint="restore a backup: herder-head --restore FILE")
    if name.startswith("SQLITE_BUSY"):
        return StateReadOnly(f"{path} is open in another program", hint="close whatever reads the journal")
    return StateReadOnly(f"{path} cannot be opened: {error}", hint=PROBLEM_HINT)


def _free_bytes(folder: Path) -> int:
    """What this process may still write there. When nobody can tell, writing must tell: as if there were room."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return PROBE_ROOM_BYTES
    return (status.f_bavail if os.geteuid() else status.f_bfree) * status.f_frsize


def _settle(items: Iterable[_Commit], outcome: HerderError | None) -> None:
    for item in items:
        if item.future.done():
            continue
        if outcome is None:
            item.future.set_result(None)
        else:
            item.future.set_exception(outcome)


def _capped(limit: int) -> int:
    return max(1, min(limit, QUERY_ROWS))
