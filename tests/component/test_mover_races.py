"""Checks of a blob beside what drops and fetches do to it at the same moment."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.mover import verify
from agent.mover.config import MoverConfig
from agent.mover.fetch import FetchJob
from agent.mover.protocol import Fetch
from agent.store.catalogue import Blob
from agent.store.disk import DiskStore
from common.wire import Source


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    """A store with one model of one file."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "m.bin").write_bytes(os.urandom(3 << 20))
    store = DiskStore(tmp_path / "store")
    fetch(store, tmp_path)
    yield store
    store.close()


def fetch(store: DiskStore, tmp_path: Path) -> Blob:
    """Fetches the model and returns its blob's row."""
    request = Fetch("t", "m", "r1", (Source(f"file://{tmp_path / 'source'}"),))
    config = MoverConfig(store_dir=str(store.layout.root), file_roots=(str(tmp_path),))
    manifest = FetchJob(request, store, config, threading.Semaphore(4)).run()
    row = store.catalogue.blob(manifest.files[0].blob)
    assert row is not None
    return row


def damage(store: DiskStore, row: Blob) -> None:
    """Flips a byte in the blob's file."""
    path = store.layout.blob(row.blob)
    path.chmod(0o600)
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))


def test_verdict_is_of_the_file_that_was_hashed(store: DiskStore, tmp_path: Path) -> None:
    """A damaged blob that is dropped and fetched again while it is hashed is not quarantined in its new form."""
    row = fetch(store, tmp_path)
    damage(store, row)
    with store.layout.blob(row.blob).open("rb"):  # the old inode stays taken, so the new file has another

        def drop_and_fetch(_: int) -> None:
            if store.catalogue.blob(row.blob) == row:
                store.drop("m", "r1")
                fetch(store, tmp_path)

        assert verify.check_blob(store, row, threading.Event(), drop_and_fetch)
    assert store.present("m", "r1") is not None


def test_dropped_while_it_is_hashed(store: DiskStore, tmp_path: Path) -> None:
    """A blob that is dropped while it is hashed leaves nothing behind, whatever its bytes were."""
    row = fetch(store, tmp_path)
    damage(store, row)

    def drop(_: int) -> None:
        store.drop("m", "r1")

    assert not verify.check_blob(store, row, threading.Event(), drop)
    assert store.catalogue.blob(row.blob) is None
    assert not store.catalogue.parts()


def test_damage_is_still_found(store: DiskStore, tmp_path: Path) -> None:
    """A blob that nobody touches is judged as before: the damaged one is withdrawn, with its copy."""
    row = fetch(store, tmp_path)
    assert verify.check_blob(store, row, threading.Event())
    damage(store, row)
    assert not verify.check_blob(store, msgspec.structs.replace(row, state="good"), threading.Event())
    assert store.present("m", "r1") is None
    assert len(store.catalogue.parts()) == 1
