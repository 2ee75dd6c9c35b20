"""Where everything of a disk store lies, and what the file system below it can do.

    DEVICE.json                 what was probed
    blobs/9f/9f3c...            immutable, 0444, published only by link()
    chunks/9f/9f3c...           the blob's chunk digests, 32 bytes each
    models/<name>@<rev>/...     hard links to blobs and .manifest.json: what engines open
    part/<key>.<instance>.<id>  private to one writer
    trash/<id>                  renamed here first, freed slowly
    state.db                    the catalogue of one mover (state-<instance>.db where several share the store)

Invariants: a path under blobs/ or models/ is complete, verified and never modified; nothing depends on a file
lock; every byte an engine can read has a digest in a manifest.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from agent.store import digests
from common import fsio, ids
from common.errors import InvalidConfig
from herder.decoding import UNREADABLE


class Device(msgspec.Struct, frozen=True):
    """What DEVICE.json says. `uuid` stays; the rest is probed at every start."""

    uuid: str
    filesystem: str
    magic: int
    direct: bool
    fallocate: bool
    reflink: bool
    is_shared: bool


class Layout:
    """Paths of one store. `instance` is part of every private name, so that movers can share a store."""

    def __init__(self, root: Path, instance: str = "") -> None:
        self.root = root
        self.instance = instance or "local"
        self.blobs, self.chunks, self.models = root / "blobs", root / "chunks", root / "models"
        self.parts, self.trash = root / "part", root / "trash"
        suffix = f"-{instance}" if instance else ""
        self.catalogue = root / f"state{suffix}.db"
        self.owner = root / f"owner{suffix}"

    def create(self) -> None:
        """Makes the directories that are missing. Raises: InvalidConfig when the store cannot be used."""
        try:
            fsio.make_directories(self.root)
            for directory, mode in (
                (self.blobs, 0o755),
                (self.chunks, 0o755),
                (self.models, 0o755),
                (self.parts, 0o700),
                (self.trash, 0o700),
            ):
                fsio.make_directories(directory, mode=mode)
        except OSError as error:
            hint = "give the agent a directory it can write"
            raise InvalidConfig(f"store {self.root}: {error.strerror}", hint=hint) from None

    def blob(self, blob: str) -> Path:
        """The published file of a blob."""
        digits = digests.hex_of(blob)
        return self.blobs / digits[:2] / digits

    def leaves(self, blob: str) -> Path:
        """The chunk digests of a blob."""
        digits = digests.hex_of(blob)
        return self.chunks / digits[:2] / digits

    def model(self, model: str, revision: str) -> Path:
        """The directory that engines open."""
        ids.check_model_name(model)
        ids.check_revision(revision)
        return self.models / ids.model_directory(model, revision)

    def new_part(self, key: str) -> Path:
        """A fresh private directory name. `key` is a file-name-safe word that finds the part again."""
        return self.parts / f"{key}.{self.instance}.{secrets.token_hex(8)}"

    def new_trash(self) -> Path:
        """A fresh name in the trash, of this mover."""
        return self.trash / f"{self.instance}.{secrets.token_hex(8)}"

    def is_mine(self, name: str) -> bool:
        """Whether a name under part/ or trash/ was made by this mover."""
        parts = name.split(".")
        return ".".join(parts[1:-1] if len(parts) > 2 else parts[:-1]) == self.instance

    def probe(self) -> Device:
        """Probes the file system and writes DEVICE.json. Raises: InvalidConfig when it has no hard links."""
        path = self.root / "DEVICE.json"
        try:
            uuid = str(msgspec.json.decode(path.read_bytes())["uuid"])
        except (OSError, *UNREADABLE, KeyError, TypeError):
            uuid = secrets.token_hex(16)
        name = fsio.filesystem_name(self.root)
        device = Device(
            uuid=uuid,
            filesystem=name,
            magic=fsio.filesystem_magic(self.root),
            direct=fsio.supports_direct(self.parts),
            fallocate=self._probe_pair("fallocate"),
            reflink=self._probe_pair("reflink"),
            is_shared=name in fsio.SHARED_FILESYSTEMS,
        )
        if not self._probe_pair("link"):
            raise InvalidConfig(
                f"store {self.root}: its file system ({name}) has no hard links",
                hint="put the store on a file system with hard links, such as ext4, xfs, btrfs, Lustre or NFS",
            )
        fsio.write_atomic(path, msgspec.json.format(msgspec.json.encode(device)), mode=0o644)
        return device

    def _probe_pair(self, what: str) -> bool:
        """Does one thing with two scratch files and says whether it worked."""
        one, two = self.parts / f".probe.{secrets.token_hex(6)}", self.parts / f".probe.{secrets.token_hex(6)}"
        fd = os.open(one, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if what == "fallocate":
                return fsio.allocate(fd, fsio.ALIGN_BYTES)
            if what == "link":
                os.link(one, two)
                return True
            other = os.open(two, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(fd, b"x" * fsio.ALIGN_BYTES)
                return fsio.clone(fd, other)
            finally:
                os.close(other)
        except OSError:
            return False
        finally:
            os.close(fd)
            one.unlink(missing_ok=True)
            two.unlink(missing_ok=True)
