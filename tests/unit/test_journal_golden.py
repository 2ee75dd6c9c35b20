"""Journals of every released version open for ever."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from head.core.objects import KINDS
from head.journal import Journal, encode
from head.journal_schema import FILE_NAME, MIGRATIONS
from head.restore import restore

GOLDEN = Path(__file__).parents[1] / "golden"


def maker(version: int) -> ModuleType:
    """The script that made the file of a version."""
    spec = importlib.util.spec_from_file_location(f"make_journal_v{version}", GOLDEN / f"make_journal_v{version}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=range(1, len(MIGRATIONS) + 1))
def version(request: pytest.FixtureRequest) -> int:
    """Each schema version there ever was."""
    number: int = request.param
    return number


def test_every_version_has_a_golden_file(version: int) -> None:
    """A schema without a golden file could break unseen."""
    assert (GOLDEN / f"journal_v{version}.sqlite").is_file()


def test_old_journals_load(version: int, tmp_path: Path) -> None:
    """Every object and line of an old file is what it was, and the file can be written again."""
    path = tmp_path / FILE_NAME
    shutil.copy(GOLDEN / f"journal_v{version}.sqlite", path)
    told = maker(version)
    journal = Journal.open(path)
    state = journal.load()
    for thing in told.OBJECTS:
        assert state.table(thing.KIND)[thing.key] == thing
    assert state.revision == len(told.records())
    lines = asyncio.run(journal.history())
    assert [(line.revision, line.what, line.cause, line.key, line.detail) for line in lines] == [
        (record.revision, record.what, record.cause, record.key, record.detail) for record in told.records()
    ]
    asyncio.run(journal.commit([encode(told.records()[0])._replace(revision=state.revision + 1)]))
    journal.close()


def test_the_golden_file_holds_every_kind(version: int) -> None:
    """No kind of object escapes the promise (kinds that came later are in later files)."""
    kinds = {thing.KIND for thing in maker(version).OBJECTS}
    assert kinds <= set(KINDS)
    if version == len(MIGRATIONS):
        assert kinds == set(KINDS)


def test_old_journals_restore_as_backups(version: int, tmp_path: Path) -> None:
    """A backup made by an older version is restored and then upgraded by the start."""
    backup = tmp_path / "backup.sqlite"
    shutil.copy(GOLDEN / f"journal_v{version}.sqlite", backup)
    restore(backup, tmp_path / "home")
    journal = Journal.open(tmp_path / "home" / FILE_NAME)
    assert journal.load().head_epoch > 7
    journal.close()
