"""file:// sources on a file system that shares blocks between files: nothing is written, everything is hashed.

On an XFS of its own in a loop device; skipped where that cannot be made.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.mover.part import Part, PartSource
from agent.store.digests import blob_id, chunk_digest
from common.manifest import Manifest, ManifestFile
from tests.doubles.mover_client import MoverClient

MIB = 1 << 20
SIZE = 40 * MIB + 1_234  # ends within a block


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An XFS of 512 MiB."""
    folder = tmp_path_factory.mktemp("xfs")
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    maker = shutil.which("mkfs.xfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if maker is None or os.geteuid() != 0:
        pytest.skip("an XFS in a loop device needs root and xfsprogs")
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([maker, "-q", image], check=True, timeout=60)
    mounted = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"an XFS cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.fixture
def place(disk: Path, tmp_path: Path) -> Path:
    """A folder of a test on it."""
    made = disk / tmp_path.name
    made.mkdir()
    return made


def make_source(folder: Path) -> tuple[Path, bytes]:
    """A file of random bytes, on the disk."""
    body = random.Random(1).randbytes(SIZE)
    path = folder / "m.bin"
    path.write_bytes(body)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path, body


def free_bytes(folder: Path) -> int:
    """What the file system has left."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def leaves_of(body: bytes, chunk_bytes: int = MIB) -> bytes:
    """The digest list of a body."""
    return b"".join(chunk_digest(body[at : at + chunk_bytes]) for at in range(0, len(body), chunk_bytes))


def test_a_copy_shares_the_blocks_of_its_source(place: Path) -> None:
    """The copy costs no space, its digest is that of the bytes, and it stays when the source is written over."""
    path, body = make_source(place)
    with MoverClient(place / "store", file_roots=(str(place),)) as mover:
        before = free_bytes(place)
        done = mover.fetch("m", f"file://{path}")
        assert done.error is None
        assert done.manifest is not None
        assert done.manifest.files[0].blob == blob_id(SIZE, leaves_of(body))
        assert before - free_bytes(place) < SIZE // 4
        copy = place / "store/models/m@r1/m.bin"
        with path.open("r+b") as file:
            file.write(b"other bytes" * 1_000)
            os.fsync(file.fileno())
        assert copy.read_bytes() == body
        assert copy.stat().st_ino != path.stat().st_ino


def test_other_bytes_than_the_manifest_says_are_refused(place: Path) -> None:
    """Bytes that came by sharing are hashed like any others: one flipped bit is a wrong digest, and nothing stays."""
    path, body = make_source(place)
    with MoverClient(place / "store", file_roots=(str(place),)) as mover:
        good = mover.fetch("m", f"file://{path}").manifest
    assert isinstance(good, Manifest)
    with MoverClient(place / "other", file_roots=(str(place),)) as mover:
        changed = bytearray(body)
        changed[20 * MIB] ^= 1
        path.write_bytes(changed)
        done = mover.fetch("m", f"file://{path}", manifest=good)
        assert done.error is not None
        assert done.error.code == "digest_mismatch"
        assert not (place / "other/models/m@r1").exists()
        path.write_bytes(body)
        assert mover.fetch("m", f"file://{path}", manifest=good).error is None


def test_a_clone_is_believed_chunk_by_chunk(place: Path) -> None:
    """After a crash between the sharing and the hashing nothing of it counts as here."""
    path, body = make_source(place)
    source = PartSource(size=SIZE, chunk_bytes=MIB, validator="v")
    part = Part(place / "part", source)
    part.create()
    with path.open("rb") as file:
        assert part.clone("file", file.fileno())
    assert (place / "part/data").read_bytes() == body
    part.close()
    again = Part(place / "part", source)
    assert again.resume()
    assert again.recheck() == 0
    assert len(again.bitmap.missing()) == again.count
    assert again.cloned_from == ""
    again.close()


def test_a_source_of_another_size_is_not_shared(place: Path) -> None:
    """Nor one on another file system; the part is as if nothing had been tried."""
    path, _ = make_source(place)
    part = Part(place / "part", PartSource(size=SIZE + 1, chunk_bytes=MIB, validator="v"))
    part.create()
    with path.open("rb") as file:
        assert not part.clone("file", file.fileno())
    with Path("/proc/self/exe").open("rb") as file:
        assert not part.clone("file", file.fileno())
    assert part.cloned_from == ""
    part.close()


def test_the_row_of_a_manifest(place: Path) -> None:
    """A directory of files is shared file by file; empty ones as well."""
    folder = place / "model"
    folder.mkdir()
    (folder / "empty").touch()
    make_source(folder)
    with MoverClient(place / "store", file_roots=(str(place),)) as mover:
        done = mover.fetch("m", f"file://{folder}")
        assert done.error is None
        assert done.manifest is not None
        rows: dict[str, ManifestFile] = {row.path: row for row in done.manifest.files}
        assert {name: row.size for name, row in rows.items()} == {"empty": 0, "m.bin": SIZE}
