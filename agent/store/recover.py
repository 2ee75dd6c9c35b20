"""What a mover does with its store at start: prove that it is alone, then believe what is unchanged.

Nothing good is hashed again. A blob whose size, mtime and inode are what the catalogue says is trusted; one that
differs becomes *suspect*, is taken out of use and hashed in the background; one that is gone takes its copies with
it. What the catalogue does not know (it was lost, or another mover of a shared store published it) is adopted when
blob, digest list and manifest agree, because nothing but `link` and `rename` of verified files puts it there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

import msgspec

from agent.store import publish
from agent.store.catalogue import Blob, Catalogue
from agent.store.digests import check_leaves, is_hex
from agent.store.layout import Layout
from agent.store.trash import Trash
from common.errors import HerderError, StateLocked
from common.manifest import Manifest
from herder.decoding import UNREADABLE


class Owner(msgspec.Struct, frozen=True):
    """The owner file: which process has this store under this instance name."""

    boot_id: str
    pid: int
    start_ticks: int
    host: str


def take(layout: Layout) -> None:
    """Writes the owner file with O_EXCL; a stale one (dead process, earlier boot) is taken over.

    Raises: StateLocked when the owner is alive, or cannot be judged because it is on another machine.
    """
    me = msgspec.json.encode(_self())
    for _ in range(3):
        try:
            fd = os.open(layout.owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            _remove_stale(layout.owner)
            continue
        try:
            os.write(fd, me)
            os.fsync(fd)
        finally:
            os.close(fd)
        return
    raise StateLocked(f"{layout.owner}: another mover keeps taking it")


def give_back(layout: Layout) -> None:
    """Removes the owner file if it is ours."""
    with contextlib.suppress(OSError, *UNREADABLE):
        if msgspec.json.decode(layout.owner.read_bytes(), type=Owner) == _self():
            layout.owner.unlink()


def _remove_stale(path: Path) -> None:
    try:
        body = path.read_bytes()
        owner = msgspec.json.decode(body, type=Owner)
    except FileNotFoundError:
        return
    except UNREADABLE:
        body, owner = b"", None  # torn by a power cut before its fsync
    if owner is not None and _may_live(owner):
        raise StateLocked(
            f"another mover (process {owner.pid} on {owner.host}) owns the store at {path.parent}",
            hint=f"stop it, or remove {path} if that machine is gone",
        )
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if aside.read_bytes() not in (body, b"") and not path.exists():
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)  # it was a fresh one of somebody faster: give it back and lose
    aside.unlink()


def _self() -> Owner:
    return Owner(_boot_id(), os.getpid(), _start_ticks(os.getpid()), os.uname().nodename)


def _may_live(owner: Owner) -> bool:
    if owner.host != os.uname().nodename:
        return True
    return owner.boot_id == _boot_id() and owner.start_ticks == _start_ticks(owner.pid)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat; -1 when there is no such process. A zombie counts as none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[19])


def recover(layout: Layout, catalogue: Catalogue, trash: Trash, *, orphan_ttl_s: float) -> list[str]:
    """Brings catalogue and disk together; returns the suspect blobs, which are to be hashed."""
    suspects = _check_blobs(layout, catalogue)
    for manifest in catalogue.copies():
        if not layout.model(manifest.model, manifest.revision).is_dir() or not _has_blobs(catalogue, manifest):
            publish.unpublish_copy(layout, manifest.model, manifest.revision, trash)
            catalogue.remove_copy(manifest.model, manifest.revision)
    adopt(layout, catalogue)
    _sweep_parts(layout, catalogue, trash, orphan_ttl_s)
    _sweep_blobs(layout, catalogue, trash, orphan_ttl_s)
    return suspects


def _check_blobs(layout: Layout, catalogue: Catalogue) -> list[str]:
    suspects = []
    for row in catalogue.blobs():
        try:
            now = publish.describe_blob(layout, row.blob, row.chunk_bytes, row.sha256, row.state)
        except FileNotFoundError:
            catalogue.remove_blob(row.blob)
            continue
        if now != row or row.state != "good" or not layout.leaves(row.blob).is_file():
            catalogue.put_blob(msgspec.structs.replace(row, state="suspect"))
            suspects.append(row.blob)
    return suspects


def _has_blobs(catalogue: Catalogue, manifest: Manifest) -> bool:
    return all(catalogue.blob(file.blob) is not None for file in manifest.files)


def adopt(layout: Layout, catalogue: Catalogue) -> None:
    """Takes into the catalogue the published copies that it does not know."""
    for directory in _model_directories(layout.models):
        name = str(directory.relative_to(layout.models))
        model, _, revision = name.rpartition("@")
        if catalogue.copy(model, revision) is not None:
            continue
        manifest = publish.read_manifest(directory)
        if manifest is None or (manifest.model, manifest.revision) != (model, revision):
            continue
        blobs = [_adopt_blob(layout, catalogue, directory, manifest, index) for index in range(len(manifest.files))]
        known = [blob for blob in blobs if blob is not None]
        if len(known) == len(blobs):
            catalogue.put_copy(manifest, known, [])


def _adopt_blob(layout: Layout, catalogue: Catalogue, directory: Path, manifest: Manifest, index: int) -> Blob | None:
    file = manifest.files[index]
    row = catalogue.blob(file.blob)
    if row is not None:
        return row if row.state == "good" else None
    try:
        check_leaves(file.blob, file.size, file.chunk_bytes, layout.leaves(file.blob).read_bytes())
        blob = publish.describe_blob(layout, file.blob, file.chunk_bytes, file.sha256)
        status = (directory / file.path).stat()
    except (OSError, HerderError):
        return None
    return blob if blob.size == file.size == status.st_size and status.st_ino == blob.inode else None


def _model_directories(models: Path) -> list[Path]:
    """models/name@rev and models/org/name@rev."""
    found = []
    for entry in sorted(models.iterdir()):
        if not entry.is_dir():
            continue
        if "@" in entry.name:
            found.append(entry)
        else:
            found.extend(sorted(child for child in entry.iterdir() if "@" in child.name and child.is_dir()))
    return found


def _sweep_parts(layout: Layout, catalogue: Catalogue, trash: Trash, orphan_ttl_s: float) -> None:
    known = catalogue.parts()
    for entry in layout.parts.iterdir():
        is_old = time.time() - entry.lstat().st_mtime > orphan_ttl_s
        if is_old:
            trash.discard(entry)
            catalogue.remove_part(entry.name)
        elif entry.name.startswith("gc.") and layout.is_mine(entry.name):
            _put_back(layout, entry, trash)
        elif entry.name.startswith("stage.") and layout.is_mine(entry.name):
            trash.discard(entry)
    for name in known:
        if not (layout.parts / name).is_dir():
            catalogue.remove_part(name)


def _put_back(layout: Layout, aside: Path, trash: Trash) -> None:
    """A blob that was being discarded when the mover died: with another name left it is only an extra link."""
    if aside.lstat().st_nlink > 1:
        aside.unlink()
    else:
        trash.discard(aside)


def _sweep_blobs(layout: Layout, catalogue: Catalogue, trash: Trash, orphan_ttl_s: float) -> None:
    """Blobs that no copy names: young ones may belong to a fetch that will be resumed, old ones go."""
    for path in layout.blobs.glob("??/*"):
        blob = f"b3:{path.name}"
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if not is_hex(path.name) or catalogue.copies_of(blob) or status.st_nlink > 1:
            continue
        if time.time() - status.st_ctime > orphan_ttl_s and publish.discard_blob(layout, blob, trash):
            catalogue.remove_blob(blob)
