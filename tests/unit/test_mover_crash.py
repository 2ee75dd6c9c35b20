"""A disk that forgets unsynced writes: whatever the moment of the crash, no wrong byte is trusted or published."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.mover.part import Part, PartSource, finished
from agent.store import publish
from agent.store.catalogue import Catalogue
from agent.store.digests import blob_id, chunk_digest
from agent.store.layout import Layout
from common.fsio import Files

CHUNK = 4_096
SIZE = 9 * CHUNK + 100
BODY = random.Random(7).randbytes(SIZE)
COUNT = 10
LEAVES = b"".join(chunk_digest(BODY[at : at + CHUNK]) for at in range(0, SIZE, CHUNK))
BLOB = blob_id(SIZE, LEAVES)
SOURCE = PartSource(SIZE, CHUNK, BLOB)


class Crash(Exception):
    """The power is gone."""


class LossyFiles(Files):
    """Crashes at the n-th call; then a chosen part of what was written since each file's last sync is undone."""

    def __init__(self, crash_at: int, lost: random.Random) -> None:
        self._left, self._lost = crash_at, lost
        self._before: dict[int, list[tuple[int, bytes]]] = {}
        self.calls = 0

    def _step(self) -> None:
        self.calls += 1
        self._left -= 1
        if self._left == 0:
            self._undo()
            raise Crash

    def _undo(self) -> None:
        for fd, writes in self._before.items():
            for offset, old in reversed(writes):
                if self._lost.random() < 0.6:
                    os.pwrite(fd, old, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        self._step()
        old = os.pread(fd, len(data), offset).ljust(len(data), b"\0")
        self._before.setdefault(fd, []).append((offset, old))
        super().pwrite(fd, data, offset)

    def sync_data(self, fd: int) -> None:
        self._step()
        self._before.pop(fd, None)

    def sync(self, fd: int) -> None:
        self.sync_data(fd)

    def sync_directory(self, path: Path) -> None:
        self._step()

    def link(self, source: Path, target: Path) -> None:
        self._step()
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def write(part: Part, index: int, body: bytes = BODY) -> None:
    data = bytearray(body[index * CHUNK : index * CHUNK + part.length(index)])
    part.write_piece(index * CHUNK, memoryview(data), len(data))
    assert part.land(index, chunk_digest(bytes(data)))


@settings(max_examples=150, deadline=None)
@given(
    order=st.permutations(range(COUNT)),
    checkpoints=st.sets(st.integers(0, COUNT - 1)),
    crashes=st.lists(st.integers(1, 45), max_size=4),
    seed=st.integers(0, 1 << 30),
    knows=st.booleans(),
)
def test_no_crash_lets_a_wrong_chunk_through(
    place: Path, order: list[int], checkpoints: set[int], crashes: list[int], seed: int, knows: bool
) -> None:
    """After any crashes, every chunk that the part claims to have is right, and it can be completed to the blob."""
    directory = Path(tempfile.mkdtemp(dir=place)) / "part"
    lost = random.Random(seed)
    source = SOURCE if knows else PartSource(SIZE, CHUNK, validator='"v"')
    for crash_at in [*crashes, 0]:
        part = Part(directory, source, files=LossyFiles(crash_at, lost))
        try:
            if not part.resume():
                shutil.rmtree(directory, ignore_errors=True)
                part.close()
                part = Part(directory, source, files=LossyFiles(crash_at, lost))
                part.create()
            if knows:
                part.set_known(LEAVES)
            part.recheck()
            for index in range(COUNT):
                if part.bitmap.has(index):
                    assert os.pread(part.data_fd, part.length(index), index * CHUNK) == _chunk(index)
                    assert part.agrees(index, chunk_digest(_chunk(index)))
            for position, index in enumerate(order):
                if not part.bitmap.has(index):
                    write(part, index)
                if position in checkpoints:
                    part.checkpoint()
            assert part.seal() == (BLOB, LEAVES)
        except Crash:
            part.close()
            continue
        part.close()
        assert (directory / "data").read_bytes() == BODY
        break


def _chunk(index: int) -> bytes:
    return BODY[index * CHUNK : (index + 1) * CHUNK]


@settings(max_examples=40, deadline=None)
@given(synced=st.sets(st.integers(0, COUNT - 1)), young=st.sets(st.integers(0, COUNT - 1)))
def test_a_killed_process_loses_nothing(place: Path, synced: set[int], young: set[int]) -> None:
    """Without a power cut everything that had landed is there again, synced or not."""
    directory = Path(tempfile.mkdtemp(dir=place)) / "part"
    part = Part(directory, SOURCE)
    part.create()
    part.set_known(LEAVES)
    for index in synced:
        write(part, index)
    part.checkpoint()
    for index in young - synced:
        write(part, index)
    part.close()
    again = Part(directory, SOURCE)
    assert again.resume()
    again.set_known(LEAVES)
    assert again.recheck() == len(young - synced)
    assert set(range(COUNT)) - set(again.bitmap.missing()) == synced | young
    again.close()


@settings(max_examples=60, deadline=None)
@given(crash_at=st.integers(1, 12), seed=st.integers(0, 1 << 30))
def test_publishing_is_all_or_nothing(place: Path, crash_at: int, seed: int) -> None:
    """A crash between any two of sync, link and directory sync leaves either no blob or the right one."""
    layout = Layout(Path(tempfile.mkdtemp(dir=place)))
    layout.create()
    directory = layout.new_part("k")
    part = Part(directory, SOURCE)
    part.create()
    part.set_known(LEAVES)
    for index in range(COUNT):
        write(part, index)
    part.seal()
    part.close()
    try:
        publish.publish_blob(layout, directory / "data", BLOB, LEAVES, CHUNK, LossyFiles(crash_at, random.Random(seed)))
    except Crash:
        pass
    if layout.blob(BLOB).exists():
        assert layout.blob(BLOB).read_bytes() == BODY
        assert layout.leaves(BLOB).read_bytes() == LEAVES
        assert finished(directory, SOURCE) == (BLOB, LEAVES)
        assert not Part(directory, SOURCE).resume()  # its data is the published blob: never opened for writing again
    row = publish.publish_blob(layout, directory / "data", BLOB, LEAVES, CHUNK)
    assert (row.blob, row.size, row.state) == (BLOB, SIZE, "good")
    assert layout.blob(BLOB).read_bytes() == BODY


def test_part_of_another_source_is_not_resumed(tmp_path: Path) -> None:
    """A part whose source has another validator, size or blob now is of no use."""
    part = Part(tmp_path / "part", PartSource(SIZE, CHUNK, validator='"one"'))
    part.create()
    part.close()
    assert not Part(tmp_path / "part", PartSource(SIZE, CHUNK, validator='"two"')).resume()
    assert not Part(tmp_path / "part", PartSource(SIZE + 1, CHUNK, validator='"one"')).resume()


def test_wrong_chunk_is_not_landed(tmp_path: Path) -> None:
    """With a known list a chunk of other bytes sets no bit."""
    part = Part(tmp_path / "part", SOURCE)
    part.create()
    part.set_known(LEAVES)
    assert not part.land(0, chunk_digest(b"x" * CHUNK))
    assert part.bitmap.missing() == list(range(COUNT))
    part.close()


def test_catalogue_is_exclusive(tmp_path: Path) -> None:
    """A second opener of the same catalogue is told that it is in use."""
    from common.errors import StateLocked

    first = Catalogue(tmp_path / "state.db")
    with pytest.raises(StateLocked):
        Catalogue(tmp_path / "state.db")
    first.close()
    Catalogue(tmp_path / "state.db").close()
