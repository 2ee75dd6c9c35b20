"""How a finished part becomes a blob, and blobs become a copy that engines can open.

A blob: sync the data, make it read-only, put its digest list in place, `link()` it to its name, sync the directory.
`link` fails with EEXIST when someone else (another mover on a shared store, or this one in an earlier life) was
first; their file has the same id, so ours is dropped. A copy: a directory of hard links and `.manifest.json` is built
in private and renamed to its name in one step, so an engine sees all of it or nothing. No lock is taken anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import msgspec

from agent.store import digests
from agent.store.catalogue import Blob
from agent.store.digests import MANIFEST_NAME
from agent.store.layout import Layout
from agent.store.trash import Trash
from common import fsio, ids
from common.errors import Conflict, HerderError
from common.fsio import Files
from common.manifest import Manifest
from herder.decoding import UNREADABLE

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


def publish_blob(
    layout: Layout, data: Path, blob: str, leaves: bytes, chunk_bytes: int, files: Files | None = None
) -> Blob:
    """Gives a sealed part (complete, verified, synced) its name below blobs/."""
    files = files or Files()
    target, list_path = layout.blob(blob), layout.leaves(blob)
    for path in (target, list_path):
        fsio.make_directories(path.parent)
    data.chmod(0o444)
    fd = os.open(data, os.O_RDONLY)
    try:
        files.sync(fd)
    finally:
        os.close(fd)
    if not _has_leaves(list_path, leaves):
        fsio.write_atomic(list_path, leaves, mode=0o444)
    with contextlib.suppress(FileExistsError):
        files.link(data, target)
    if not _has_leaves(list_path, leaves):  # another mover may have removed the blob, and its list, just before
        fsio.write_atomic(list_path, leaves, mode=0o444)
    files.sync_directory(target.parent)
    return describe_blob(layout, blob, chunk_bytes)


def describe_blob(layout: Layout, blob: str, chunk_bytes: int, sha256: str = "", state: str = "good") -> Blob:
    """The catalogue's row for a published blob, with what tells later whether it was touched."""
    status = layout.blob(blob).stat()
    return Blob(blob, status.st_size, chunk_bytes, status.st_mtime_ns, status.st_ino, sha256, state)


def stage_copy(layout: Layout, files: list[tuple[str, str]], directory: Path) -> None:
    """Builds the (path, blob) pairs as hard links in a private directory. Raises: FileNotFoundError."""
    directory.mkdir(0o755)
    made = {directory}
    for path, blob in files:
        target = directory / ids.check_relative_path(path)
        while not target.parent.is_dir():
            above = next(parent for parent in reversed(target.parents) if not parent.exists())
            above.mkdir(0o755)
            made.add(above)
        os.link(layout.blob(blob), target, follow_symlinks=False)
    for made_directory in made:
        fsio.sync_directory(made_directory)


def publish_copy(layout: Layout, staged: Path, manifest: Manifest, trash: Trash, files: Files | None = None) -> Path:
    """Renames the staged directory to its place. An older copy there with another digest goes to the trash.

    Raises: Conflict when the place keeps being taken.
    """
    files = files or Files()
    target = layout.model(manifest.model, manifest.revision)
    fsio.write_atomic(staged / MANIFEST_NAME, msgspec.json.encode(manifest), mode=0o444)
    fsio.make_directories(target.parent)
    for _ in range(8):
        try:
            files.rename(staged, target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            present = read_manifest(target)
            if present is not None and present.digest == manifest.digest:
                trash.discard(staged)
                break
            trash.discard(target)
            continue
        break
    else:
        raise Conflict(f"{manifest.model}@{manifest.revision}: other movers keep publishing it")
    files.sync_directory(target.parent)
    return target


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a published copy; None when there is none that can be trusted."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST_NAME).read_bytes(), type=Manifest)
        digests.check_manifest(manifest)
    except (OSError, *UNREADABLE, HerderError):
        return None
    return manifest


def unpublish_copy(layout: Layout, model: str, revision: str, trash: Trash) -> bool:
    """Takes a copy away from engines at once; False when it was not there."""
    directory = layout.model(model, revision)
    gone = trash.discard(directory) is not None
    if "/" in model:
        with contextlib.suppress(OSError):
            directory.parent.rmdir()
    return gone


def discard_blob(layout: Layout, blob: str, trash: Trash) -> bool:
    """Removes a blob that no copy uses; False when one does.

    On a shared store another mover may link it at this very moment: after the rename nobody can find it any more, so
    a second name that exists now was made before, and the blob is put back.
    """
    path = layout.blob(blob)
    try:
        if path.stat().st_nlink > 1:
            return False
        aside = layout.parts / f"gc.{layout.instance}.{os.urandom(8).hex()}"
        path.rename(aside)
    except FileNotFoundError:
        return True
    if aside.stat().st_nlink > 1:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
        return False
    layout.leaves(blob).unlink(missing_ok=True)
    trash.discard(aside)
    return True


def _has_leaves(path: Path, leaves: bytes) -> bool:
    try:
        return path.read_bytes() == leaves
    except OSError:
        return False
