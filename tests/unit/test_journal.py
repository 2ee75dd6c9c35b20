"""The journal: what is acknowledged is kept, what is refused is not, and neither ever lies about it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from common import limits
from common.errors import (
    Conflict,
    DiskFull,
    HerderError,
    InvalidConfig,
    StateCorrupt,
    StateLocked,
    StateReadOnly,
    StateTooNew,
    TooMany,
)
from common.statedir import StateDir
from head import journal as journal_module
from head.core.objects import Copy, Job, Meta, Step, copy_key
from head.core.records import Record
from head.core.state import State, apply
from head.journal import BACKUP_SPARE_BYTES, Journal, encode
from head.journal_schema import FILE_NAME, MIGRATIONS
from head.restore import EPOCH_JUMP, REVISION_JUMP, restore
from tests.doubles.head_shell import NOW_MS, record, removal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a journal goes."""
    return tmp_path / FILE_NAME


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """An open journal."""
    opened = Journal.open(path)
    yield opened
    opened.close()


def write(journal: Journal, *records: Record) -> None:
    """Commits records in one batch."""
    asyncio.run(journal.commit([encode(record) for record in records]))


def reopened(journal: Journal) -> Journal:
    """The same journal after a clean stop."""
    journal.close()
    return Journal.open(journal.path)


def test_what_was_committed_is_loaded_again(journal: Journal) -> None:
    """A start finds the latest body of every object and the last revision."""
    write(journal, record(1, "a"), record(2, "b", note="old"))
    write(journal, record(3, "b", note="new"), removal(4, "a"))
    again = reopened(journal)
    state = again.load()
    assert set(state.models) == {"b"}
    assert state.models["b"].metadata == {"note": "new"}
    assert (state.revision, again.revision, again.stamp_ms) == (4, 4, NOW_MS + 4)
    again.close()


def test_loading_equals_applying(journal: Journal) -> None:
    """The loaded state, indices included, is the one that folding the records gives."""
    copy = Copy("m", "main", "n1:disk", "present", "fetching", 1, "req", NOW_MS)
    job = Job("job-1", "j", "me", "running", NOW_MS, (Step("s", "copy", "running", target=f"copy:{copy.key}"),))
    records = [
        Record(1, NOW_MS, "made", "c", "copy", copy.key, copy),
        Record(2, NOW_MS, "made", "c", "job", job.key, job),
        record(3, "m"),
    ]
    write(journal, *records)
    folded = State()
    for one in records:
        apply(folded, one)
    loaded = journal.load()
    assert loaded == folded
    assert loaded.waiters[f"copy:{copy_key('m', 'main', 'n1:disk')}"] == {"job-1": None}


def test_one_key_twice_in_a_batch(journal: Journal) -> None:
    """Within one transaction the last word about a key counts, also when the key was deleted and made again."""
    write(journal, record(1, "a", note="1"), removal(2, "a"), record(3, "a", note="3"), record(4, "b"), removal(5, "b"))
    state = journal.load()
    assert state.models["a"].metadata == {"note": "3"}
    assert "b" not in state.models


def test_pragmas_are_what_the_promises_need(journal: Journal) -> None:
    """WAL, full sync, exclusive lock, strict tables, private file."""

    def ask() -> dict[str, object]:
        connection = journal._connection
        names = ("journal_mode", "synchronous", "locking_mode", "foreign_keys")
        return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names}

    assert journal.call(ask) == {
        "journal_mode": "wal",
        "synchronous": 2,
        "locking_mode": "exclusive",
        "foreign_keys": 1,
    }
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT"):
        journal.call(lambda: journal._connection.execute("INSERT INTO meta VALUES ('x', 'not a number')"))


def test_nobody_else_opens_an_open_journal(journal: Journal) -> None:
    """A second connection, of a second head or of a curious tool, is refused."""
    write(journal, record(1, "a"))
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(journal.path, timeout=0).execute("SELECT count(*) FROM objects")
    with pytest.raises(HerderError, match="open in another program"):
        Journal.open(journal.path)


def test_full_disk_is_refused_whole_and_then_recovers(journal: Journal) -> None:
    """A commit that does not fit leaves nothing behind; the next one that fits succeeds."""
    write(journal, record(1, "kept"))
    pages = journal.call(lambda: journal._connection.execute("PRAGMA page_count").fetchone()[0])
    journal.call(lambda: journal._connection.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    with pytest.raises(StateReadOnly) as refused:
        write(journal, record(2, "small"), record(3, "big", note="x" * 1_000_000))
    assert refused.value.details["sqlite"] == "SQLITE_FULL"
    assert not journal.call(lambda: journal._connection.in_transaction)
    assert set(journal.load().models) == {"kept"}
    journal.call(lambda: journal._connection.execute("PRAGMA max_page_count = 1073741823").fetchone())
    write(journal)
    write(journal, record(2, "later"))
    assert set(journal.load().models) == {"kept", "later"}
    assert journal.revision == 2


def test_a_probe_wants_room_for_more_than_itself(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is all but full the probe is refused: it alone would fit, and the next batch would not."""
    write(journal, record(1, "kept"))
    free = [journal_module.PROBE_ROOM_BYTES - 1]
    monkeypatch.setattr(journal_module, "_free_bytes", lambda folder: free[0])
    with pytest.raises(StateReadOnly, match="free bytes"):
        write(journal)
    write(journal, record(2, "fits"))
    free[0] += 1
    write(journal)
    assert set(journal.load().models) == {"kept", "fits"}


def test_waiting_commits_share_one_transaction(journal: Journal) -> None:
    """Group commit: commits that wait together are synced together, and a failure is theirs together."""
    sizes: list[int] = []
    journal.on_commit = lambda seconds, records: sizes.append(records)

    async def many() -> None:
        gate = journal.ask(lambda: __import__("time").sleep(0.05))
        work = [journal.commit([encode(record(number, f"m{number}"))]) for number in range(1, 101)]
        await asyncio.gather(gate, *work)

    asyncio.run(many())
    assert sum(sizes) == 100
    assert len(sizes) < 10
    assert len(journal.load().models) == 100


def test_a_batch_has_a_limit_but_a_turn_stays_whole(journal: Journal) -> None:
    """More than JOURNAL_BATCH_RECORDS from one caller are one transaction; from many callers several."""
    sizes: list[int] = []
    journal.on_commit = lambda seconds, records: sizes.append(records)
    big = limits.JOURNAL_BATCH_RECORDS + 10

    async def many() -> None:
        gate = journal.ask(lambda: __import__("time").sleep(0.05))
        first = journal.commit([encode(record(number, f"m{number}")) for number in range(1, big + 1)])
        second = journal.commit([encode(record(big + 1, "last"))])
        await asyncio.gather(gate, first, second)

    asyncio.run(many())
    assert sizes == [big, 1]


def test_cancelling_the_wait_does_not_undo_the_commit(journal: Journal) -> None:
    """A caller that goes away leaves its commit to happen, and nothing complains."""

    async def go_away() -> None:
        gate = asyncio.ensure_future(journal.ask(lambda: __import__("time").sleep(0.05)))
        work = asyncio.ensure_future(journal.commit([encode(record(1, "a"))]))
        await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(gate, work, return_exceptions=True)
        await journal.commit(())

    asyncio.run(go_away())
    assert "a" in journal.load().models


def test_history_tells_stories(journal: Journal) -> None:
    """Lines are found by key, by cause, by the model of a copy, and by kind; oldest first, capped, paged."""
    copy = Copy("org/m", "main", "n1:disk", "present", "ready", 1, "job-9", NOW_MS)
    write(
        journal,
        record(1, "org/m", cause="req-7"),
        Record(2, NOW_MS, "copy_planned", "job-9", "copy", copy.key, copy, {"bytes": 5}),
        record(3, "org/me", cause="req-8"),
    )

    async def story(id: str, kind: str = "", before: int = 0, limit: int = 100) -> list[tuple[int, str]]:
        lines = await journal.story(id, kind=kind, before=before, limit=limit)
        return [(line.revision, line.what) for line in lines]

    assert asyncio.run(story("org/m")) == [(1, "model_registered"), (2, "copy_planned")]
    assert asyncio.run(story("org/m", "copy")) == [(2, "copy_planned")]
    assert asyncio.run(story("org/m", limit=1)) == [(2, "copy_planned")]
    assert asyncio.run(story("org/m", before=2)) == [(1, "model_registered")]
    assert asyncio.run(story("job-9")) == [(2, "copy_planned")]
    assert asyncio.run(story("req-8")) == [(3, "model_registered")]
    assert asyncio.run(journal.history(after=1, limit=1))[0].detail == {"bytes": 5}
    assert [line.revision for line in asyncio.run(journal.history(limit=2, newest=True))] == [2, 3]


def test_stories_use_their_indices(journal: Journal) -> None:
    """No part of a story's query scans the history: it may hold half a million lines, and commits wait meanwhile."""
    values = {"id": "a", "kind": "", "before": 5, "limit": 3}
    plan = journal.call(
        lambda: [row[3] for row in journal._connection.execute(f"EXPLAIN QUERY PLAN {journal_module._STORY}", values)]
    )
    searches = [line for line in plan if "history" in line]
    assert len(searches) == 3
    assert all(line.startswith("SEARCH history USING INDEX history_by_") for line in searches), plan


def test_questions_are_limited(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many at once are refused, and commits are not."""
    monkeypatch.setattr(journal_module, "ASKING", 2)

    async def flood() -> list[object]:
        stories = [journal.story("a") for _ in range(5)]
        return await asyncio.gather(*stories, journal.commit([encode(record(1, "a"))]), return_exceptions=True)

    *stories, commit = asyncio.run(flood())
    assert [isinstance(story, TooMany) for story in stories] == [False, False, True, True, True]
    assert commit is None


def test_history_is_pruned_and_objects_are_not(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old lines go, counted and not by revision, which may jump; what they made stays."""
    monkeypatch.setattr(limits, "HISTORY_RECORDS_KEPT", 50)
    monkeypatch.setattr(journal_module, "PRUNE_ROWS", 10)
    write(journal, *(record(number, f"m{number}") for number in range(1, 41)))
    write(journal, *(record(1_000_000 + number, f"m{number}") for number in range(1, 41)))
    lines = asyncio.run(journal.history())
    assert len(lines) == 50
    assert lines[0].revision == 31
    assert len(journal.load().models) == 40


def test_a_clean_stop_is_told_from_an_unclean_one(journal: Journal, path: Path) -> None:
    """Only a stop through `close` is clean."""
    write(journal, record(1, "a"))
    again = reopened(journal)
    assert again.was_clean
    again.call(lambda: again._connection.close())  # what a killed process leaves: nothing was marked
    again._queue.put(None)
    third = Journal.open(path)
    assert not third.was_clean
    assert "a" in third.load().models
    third.close()


def test_damage_is_found_and_named(journal: Journal, path: Path) -> None:
    """A file with overwritten pages is refused with a way out, and never half loaded."""
    write(journal, *(record(number, f"m{number}", note="x" * 3_000) for number in range(1, 200)))
    journal.call(lambda: journal._connection.execute("UPDATE meta SET value = 0 WHERE name = 'is_clean'"))
    journal.call(lambda: journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    journal.call(lambda: journal._connection.close())
    journal._queue.put(None)
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * 40 * 4096)
    with pytest.raises(StateCorrupt) as error:
        Journal.open(path)
    assert "restore" in error.value.hint


def test_foreign_and_newer_files_are_refused(path: Path) -> None:
    """A database of something else, no database at all, and one of a newer Herder each have their own answer."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(StateCorrupt, match="something else"):
        Journal.open(path)
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StateCorrupt):
        Journal.open(path)
    path.unlink()
    Journal.open(path, migrations=(*MIGRATIONS, ("CREATE TABLE later (x TEXT) STRICT",))).close()
    with pytest.raises(StateTooNew, match="newer Herder"):
        Journal.open(path)


def test_a_half_made_file_is_made_again(path: Path) -> None:
    """A head killed while it made its journal leaves an empty file, which the next start takes over."""
    path.touch()
    opened = Journal.open(path)
    assert not opened.load().models
    write(opened, record(1, "a"))
    again = reopened(opened)
    assert set(again.load().models) == {"a"}
    again.close()


def test_migration_keeps_the_old_file(journal: Journal, path: Path) -> None:
    """An upgrade applies the new statements in one transaction and leaves a copy of the older version."""
    write(journal, record(1, "a"))
    journal.close()
    newer = (*MIGRATIONS, ("ALTER TABLE objects ADD COLUMN note TEXT", "CREATE TABLE later (x TEXT) STRICT"))
    upgraded = Journal.open(path, migrations=newer)
    assert "a" in upgraded.load().models
    upgraded.close()
    kept = Journal.open(path.with_name(f"{FILE_NAME}.v{len(MIGRATIONS)}"))
    assert "a" in kept.load().models
    kept.close()


def test_a_failed_migration_changes_nothing(journal: Journal, path: Path) -> None:
    """When a migration fails the journal is as before, and the older version opens it."""
    write(journal, record(1, "a"))
    journal.close()
    with pytest.raises(HerderError):
        Journal.open(path, migrations=(*MIGRATIONS, ("CREATE TABLE later (x TEXT) STRICT", "CREATE NONSENSE")))
    again = Journal.open(path)
    assert "a" in again.load().models
    again.close()


def test_unreadable_bodies_are_named(journal: Journal) -> None:
    """A body that does not fit its kind, and a kind of the future, say which object it is."""
    write(journal, record(1, "a"))
    journal.call(lambda: journal._connection.execute("UPDATE objects SET body = CAST('{}' AS BLOB)"))
    with pytest.raises(StateCorrupt, match="model 'a'"):
        journal.load()
    journal.call(lambda: journal._connection.execute("UPDATE objects SET kind = 'spaceship'"))
    with pytest.raises(StateTooNew, match="spaceship"):
        journal.load()


class TestBackup:
    """Backups are whole, checked, and made while commits go on."""

    def test_commits_go_on_during_a_backup(self, journal: Journal, tmp_path: Path) -> None:
        """Writers are not shut out, nothing acknowledged before the end is missing, and the file is private."""
        write(journal, *(record(number, f"m{number}", note="x" * 4_000) for number in range(1, 3_001)))
        target = tmp_path / "backup.sqlite"
        during: list[int] = []

        async def run() -> None:
            backup = asyncio.ensure_future(journal.backup(target))
            number = 3_001
            while not backup.done():
                await journal.commit([encode(record(number, f"m{number}"))])
                if not target.exists():
                    during.append(number)
                number += 1
            await backup

        asyncio.run(run())
        assert len(during) > 3
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert not list(tmp_path.glob(".*.part"))
        copy = Journal.open(target)
        loaded = copy.load()
        assert len(loaded.models) >= 3_000
        assert loaded.revision == copy.revision == len(loaded.models)
        copy.close()

    def test_a_backup_that_would_fill_the_disk_is_refused(
        self, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is not begun where it would leave no room for commits, and says how much is missing."""
        real = os.statvfs(tmp_path)
        write(journal, record(1, "a"))
        short = SimpleNamespace(f_bavail=BACKUP_SPARE_BYTES // real.f_frsize, f_frsize=real.f_frsize)
        monkeypatch.setattr(os, "statvfs", lambda path: short)
        with pytest.raises(DiskFull) as caught:
            asyncio.run(journal.backup(tmp_path / "b.sqlite"))
        assert caught.value.details["needed_bytes"] > caught.value.details["free_bytes"]
        assert not list(tmp_path.glob("*b.sqlite*"))
        write(journal, record(2, "b"))

    def test_no_half_backup_appears(self, journal: Journal, tmp_path: Path) -> None:
        """A place that cannot be written gives an error and no file."""
        with pytest.raises(StateReadOnly, match="backup could not be written"):
            asyncio.run(journal.backup(tmp_path / "missing" / "backup.sqlite"))
        write(journal, record(1, "still-alive"))


class TestRestore:
    """`herder-head --restore`."""

    @pytest.fixture
    def backup(self, journal: Journal, tmp_path: Path) -> Path:
        """A backup of a journal with a cluster at epoch 7 and a model."""
        meta = Meta("cluster-1", 7, NOW_MS)
        write(journal, Record(1, NOW_MS, "head_started", "c", "meta", "cluster", meta), record(2, "a"))
        asyncio.run(journal.backup(tmp_path / "backup.sqlite"))
        return tmp_path / "backup.sqlite"

    def test_epoch_and_revision_jump_ahead(self, backup: Path, tmp_path: Path) -> None:
        """What agents remember of the lost time is lower than what the restored head will say; history tells of it."""
        done = restore(backup, tmp_path / "new")
        assert (done.cluster_id, done.head_epoch, done.revision) == ("cluster-1", 7 + EPOCH_JUMP, 2 + REVISION_JUMP)
        restored = Journal.open(tmp_path / "new" / FILE_NAME)
        state = restored.load()
        assert state.head_epoch == 7 + EPOCH_JUMP
        assert state.revision == 2 + REVISION_JUMP
        assert "a" in state.models
        assert asyncio.run(restored.history())[-1].what == "journal_restored"
        restored.close()

    def test_an_existing_journal_is_not_overwritten(self, backup: Path, tmp_path: Path) -> None:
        """Without --force it is a conflict; with it the former journal is set aside, its WAL with it."""
        home = tmp_path / "home"
        home.mkdir()
        former = Journal.open(home / FILE_NAME)
        write(former, record(1, "former"))
        former.call(lambda: former._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())
        former.close()
        (home / f"{FILE_NAME}-wal").write_bytes(b"left over")
        with pytest.raises(Conflict, match="exists"):
            restore(backup, home)
        done = restore(backup, home, is_forced=True)
        assert (home / f"{FILE_NAME}.before-restore-1-wal").read_bytes() == b"left over"
        (home / f"{FILE_NAME}.before-restore-1-wal").unlink()
        kept = Journal.open(Path(done.kept))
        assert "former" in kept.load().models
        kept.close()
        restored = Journal.open(home / FILE_NAME)
        assert set(restored.load().models) == {"a"}
        restored.close()

    def test_a_running_head_is_not_restored_over(self, backup: Path, tmp_path: Path) -> None:
        """The owner's lock refuses it."""
        owned = StateDir.open(tmp_path / "home", daemon="herder-head")
        with pytest.raises(StateLocked, match=r"running herder-head \(pid \d+\)"):
            restore(backup, tmp_path / "home", is_forced=True)
        owned.close()

    def test_what_is_no_backup_is_refused(self, backup: Path, tmp_path: Path) -> None:
        """Damaged files, other databases, empty files and missing ones leave the state directory as it was."""
        data = bytearray(backup.read_bytes())
        data[5_000:12_000] = b"\xff" * 7_000
        broken = tmp_path / "broken.sqlite"
        broken.write_bytes(data)
        empty = tmp_path / "empty.sqlite"
        empty.touch()
        for file in (broken, empty):
            with pytest.raises(StateCorrupt):
                restore(file, tmp_path / "new")
        with pytest.raises(InvalidConfig, match="not a file"):
            restore(tmp_path / "nowhere", tmp_path / "new")
        live = tmp_path / "live.sqlite"
        live.write_bytes(backup.read_bytes())
        (tmp_path / "live.sqlite-wal").write_bytes(b"frames")
        with pytest.raises(InvalidConfig, match="a journal in use"):
            restore(live, tmp_path / "new")
        assert not (tmp_path / "new" / FILE_NAME).exists()


def test_bodies_are_readable_json(journal: Journal) -> None:
    """What stands in the file is the object as JSON, for people with sqlite3 at hand."""
    write(journal, record(1, "a", note="hello"))
    body = journal.call(lambda: journal._connection.execute("SELECT body FROM objects").fetchone()[0])
    assert msgspec.json.decode(body)["metadata"] == {"note": "hello"}
