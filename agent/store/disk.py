"""The disk store of one node, open: layout, catalogue, ledger and trash, and what is done with whole copies."""

from __future__ import annotations

import contextlib
import secrets
import threading
from pathlib import Path

from agent.metadata import inspect
from agent.store import publish, recover
from agent.store.catalogue import Blob, Catalogue
from agent.store.digests import check_leaves, manifest_digest
from agent.store.layout import Layout
from agent.store.reserve import Ledger
from agent.store.trash import Trash
from common.errors import CopyNotFound, HerderError
from common.manifest import Manifest, ManifestFile


class DiskStore:
    """One store. Owned by one mover; its methods may be called by many threads."""

    def __init__(
        self,
        root: Path,
        *,
        instance: str = "",
        budget_bytes: int = 0,
        reserve_bytes: int = 0,
        orphan_ttl_s: float = 86_400.0,
        write_mode: str = "auto",
    ) -> None:
        """Opens and recovers. Raises: InvalidConfig, StateLocked, StateCorrupt, StateTooNew."""
        self.layout = Layout(root, instance)
        self.layout.create()
        recover.take(self.layout)
        try:
            self.device = self.layout.probe()
            self.catalogue = Catalogue(self.layout.catalogue, trusts_locks=not self.device.is_shared)
        except BaseException:
            recover.give_back(self.layout)
            raise
        self.trash = Trash(self.layout)
        self.write_mode = write_mode
        if write_mode == "auto":
            self.write_mode = "direct" if self.device.direct else "paced"
        self.is_stopping = False
        self.changing = threading.RLock()  # held for the moments in which blobs and copies appear or vanish
        self.ledger = Ledger(
            root,
            self.catalogue,
            budget_bytes=budget_bytes,
            reserve_bytes=reserve_bytes,
            reclaiming=self.trash.reclaiming_bytes,
            is_stopping=lambda: self.is_stopping,
        )
        self.suspects = recover.recover(self.layout, self.catalogue, self.trash, orphan_ttl_s=orphan_ttl_s)
        for name in self.catalogue.parts():
            self.keep_part(name)
        self.trash.start()

    def close(self) -> None:
        """Ends in order."""
        self.is_stopping = True
        self.trash.stop()
        self.catalogue.close()
        recover.give_back(self.layout)

    # blobs
    def find_blob(self, blob: str, size: int, chunk_bytes: int) -> Blob | None:
        """A good blob with this id, from the catalogue or, published by another mover, from the store."""
        row = self.catalogue.blob(blob)
        if row is not None:
            with contextlib.suppress(OSError):
                now = publish.describe_blob(self.layout, blob, row.chunk_bytes, row.sha256, row.state)
                return row if row.state == "good" and now == row else None
            return None
        try:
            check_leaves(blob, size, chunk_bytes, self.layout.leaves(blob).read_bytes())
            found = publish.describe_blob(self.layout, blob, chunk_bytes)
        except (OSError, HerderError):
            return None
        if found.size != size:
            return None
        self.catalogue.put_blob(found)
        return found

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes | None:
        """The blob's digest list, if this store has it."""
        try:
            leaves = self.layout.leaves(blob).read_bytes()
            check_leaves(blob, size, chunk_bytes, leaves)
        except (OSError, HerderError):
            return None
        return leaves

    # parts
    def keep_part(self, name: str) -> None:
        """Counts an unfinished part that waits to be resumed."""
        with contextlib.suppress(OSError):
            status = (self.layout.parts / name / "data").stat()
            if status.st_nlink == 1:
                self.ledger.keep_part(name, status.st_blocks * 512)

    def discard_part(self, name: str) -> None:
        """An unfinished part is of no use any more."""
        self.trash.discard(self.layout.parts / name)
        self.catalogue.remove_part(name)
        self.ledger.forget_part(name)

    # copies
    def publish(self, model: str, revision: str, files: tuple[ManifestFile, ...], given: Manifest | None) -> Manifest:
        """Makes a copy of blobs that are all here. Raises: CopyNotFound when one vanished meanwhile."""
        with self.changing:
            return self._publish(model, revision, files, given)

    def _publish(self, model: str, revision: str, files: tuple[ManifestFile, ...], given: Manifest | None) -> Manifest:
        staged = self.layout.parts / f"stage.{self.layout.instance}.{secrets.token_hex(8)}"
        try:
            publish.stage_copy(self.layout, [(file.path, file.blob) for file in files], staged)
            manifest = given or _describe(model, revision, files, staged)
            publish.publish_copy(self.layout, staged, manifest, self.trash)
        except FileNotFoundError as error:
            self.trash.discard(staged)
            raise CopyNotFound(f"{model}@{revision}: a blob vanished: {error.filename}") from None
        except BaseException:
            self.trash.discard(staged)
            raise
        present = publish.read_manifest(self.layout.model(model, revision)) or manifest
        blobs = [row for file in files if (row := self.catalogue.blob(file.blob)) is not None]
        self.catalogue.put_copy(present, blobs, [])
        return present

    def drop(self, model: str, revision: str) -> int:
        """Takes a copy away at once and gives its bytes to the trash; returns them. Absent already: 0."""
        with self.changing:
            manifest = self.catalogue.copy(model, revision)
            if manifest is None:
                manifest = publish.read_manifest(self.layout.model(model, revision))
            publish.unpublish_copy(self.layout, model, revision, self.trash)
            self.catalogue.remove_copy(model, revision)
            return self.collect([file.blob for file in manifest.files]) if manifest is not None else 0

    def collect(self, blobs: list[str]) -> int:
        """Discards those of the blobs that no copy uses; returns their bytes.

        The unpublished directory may still hold hard links until the trash is empty, so those go first.
        """
        freed = 0
        for blob in sorted(set(blobs)):
            row = self.catalogue.blob(blob)
            if row is None or self.catalogue.copies_of(blob):
                continue
            self.trash.drop_links(self.layout.blob(blob))
            if publish.discard_blob(self.layout, blob, self.trash):
                self.catalogue.remove_blob(blob)
                freed += row.size
        return freed

    def present(self, model: str, revision: str) -> Manifest | None:
        """The manifest of a copy that engines can open now."""
        manifest = self.catalogue.copy(model, revision)
        if manifest is None or not self.layout.model(model, revision).is_dir():
            return None
        rows = [self.catalogue.blob(file.blob) for file in manifest.files]
        return manifest if all(row is not None and row.state == "good" for row in rows) else None

    def copies(self) -> list[Manifest]:
        """Every copy that engines can open, also those that another mover published since."""
        recover.adopt(self.layout, self.catalogue)
        found = [self.present(row.model, row.revision) for row in self.catalogue.copies()]
        return [manifest for manifest in found if manifest is not None]


def _describe(model: str, revision: str, files: tuple[ManifestFile, ...], directory: Path) -> Manifest:
    format_name, detected = inspect(directory)
    return Manifest(model, revision, files, manifest_digest(files), format_name, detected)
