"""One fetch from request to published copy: planned, reserved, fetching, verifying, syncing, published.

Without a manifest the sources are tried in order, each from its listing to the published copy, because only a digest
could say that two sources mean the same bytes. With a manifest all sources serve one plan: peers at once and
together, the others in order when they are needed. Whatever ends a fetch before its time, what has landed stays on
disk for the next one, except where it is of no use: cancelled with discard, a wrong digest, a changed source.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import msgspec
from blake3 import blake3

from agent.mover.config import MoverConfig
from agent.mover.measure import measured
from agent.mover.part import Part, PartSource, finished
from agent.mover.protocol import Fetch
from agent.mover.source_file import FileOrigin
from agent.mover.sources import Listing, Origin, RemoteFile, SourceChanged, origin_for
from agent.mover.transfer import Feed, Round, Task
from agent.store import publish
from agent.store.digests import check_leaves, check_manifest, hex_of
from agent.store.disk import DiskStore
from common import backoff, ids
from common.errors import (
    Cancelled,
    DigestMismatch,
    DiskFull,
    HerderError,
    InvalidSource,
    SizeMismatch,
    SourceFailed,
)
from common.manifest import Manifest, ManifestFile, chunk_bytes_for

RESTARTS = 3  # of one fetch, because its source changed


class Progress:
    """What a fetch has done so far; read by the thread that reports."""

    def __init__(self) -> None:
        self.state, self.source = "reserved", ""
        self.bytes_done = self.bytes_total = 0
        self._lock = threading.Lock()

    def add(self, count: int, source: str) -> None:
        """More bytes are verified and written."""
        with self._lock:
            self.bytes_done += count
            self.source = source


class FetchJob:
    """One `Fetch` request."""

    def __init__(self, request: Fetch, store: DiskStore, config: MoverConfig, slots: threading.Semaphore) -> None:
        self.request, self.progress = request, Progress()
        self._store, self._config, self._slots = store, config, slots
        self._cancelled = threading.Event()
        self._discards = False
        self._parts: dict[str, Part] = {}  # path -> open part
        self._token = request.token
        self._errors: list[HerderError] = []
        self._rng = random.Random()

    def cancel(self, *, discard: bool) -> None:
        """Ends the fetch soon; `discard` also removes what has landed."""
        self._discards = self._discards or discard
        self._cancelled.set()

    def check_cancelled(self) -> None:
        """Raises: Cancelled when that was asked."""
        if self._cancelled.is_set():
            raise Cancelled("stopped on request")

    def run(self) -> Manifest:
        """The published manifest. Raises: HerderError."""
        model, revision = ids.check_model_name(self.request.model), ids.check_revision(self.request.revision)
        given = self.request.manifest
        present = self._store.present(model, revision)
        if present is not None and (given is None or given.digest == present.digest):
            return present
        if given is not None:
            check_manifest(given)
        try:
            return self._run(msgspec.structs.replace(given, model=model, revision=revision) if given else None)
        except BaseException as error:
            self._put_away(error)
            raise
        finally:
            self._close()
            self._store.ledger.release(self._token)

    def _run(self, manifest: Manifest | None) -> Manifest:
        origins = self._origins()
        if manifest is None:
            for origin in origins:
                if not origin.is_peer:
                    continue
                try:
                    manifest = self._listing(origin).manifest
                    break
                except HerderError as error:
                    self._errors.append(error)
        if manifest is not None:
            manifest = msgspec.structs.replace(manifest, model=self.request.model, revision=self.request.revision)
            return self._by_manifest(manifest, origins)
        for origin in origins:
            if origin.is_peer:
                continue
            try:
                return self._by_listing(origin)
            except (Cancelled, DiskFull):
                raise
            except HerderError as error:
                self._put_away(error)
                self._errors.append(error)
        raise self._worst()

    def _origins(self) -> list[Origin]:
        origins = []
        for source in self.request.sources:
            try:
                origins.append(origin_for(source, self._config, self._cancelled.is_set))
            except HerderError as error:
                self._errors.append(error)
        if not origins:
            raise self._worst()
        return origins

    def _worst(self) -> HerderError:
        """The error that says most: of the first source that can never work, else of the last that was tried."""
        if not self._errors:
            return InvalidSource("no source was given")
        return self._errors[-1] if all(error.is_retryable for error in self._errors) else _first_final(self._errors)

    def _listing(self, origin: Origin) -> Listing:
        """What a source has; asked again, as a transfer is, while it fails in a way that can pass."""
        for attempt in range(1, self._config.attempts + 1):
            try:
                return origin.listing()
            except SourceFailed as error:
                if attempt == self._config.attempts:
                    raise
                delay_ms = backoff.full_jitter_ms(
                    attempt, base_ms=self._config.retry_base_ms, cap_ms=self._config.retry_cap_ms, rng=self._rng
                )
                self._cancelled.wait(max(delay_ms / 1000, float(error.details.get("retry_after_s", 0.0))))
                self.check_cancelled()
        raise AssertionError("unreachable")

    # without a manifest
    def _by_listing(self, origin: Origin) -> Manifest:
        files = list(self._listing(origin).files)
        for restart in range(RESTARTS):
            try:
                return self._attempt(origin, files)
            except SourceChanged as error:
                self._put_away(error)
                if restart == RESTARTS - 1:
                    raise
                files = [self._again(origin, file, error) for file in files]
        raise AssertionError("unreachable")

    def _again(self, origin: Origin, file: RemoteFile, error: SourceChanged) -> RemoteFile:
        """The file as it is now. What the listing said with a digest must not have changed its size."""
        now = origin.refresh(file)
        if file.sha256 and now.size not in (-1, file.size):
            raise SizeMismatch(f"{file.path}: listed with {file.size} bytes, the source has {now.size}") from error
        return msgspec.structs.replace(now, sha256=file.sha256)

    def _attempt(self, origin: Origin, files: list[RemoteFile]) -> Manifest:
        self.progress.state, self.progress.bytes_done = "reserved", 0
        files = [self._settled(origin, file) for file in files]
        total = sum(file.size for file in files)
        self.progress.bytes_total = total
        chunk_bytes = chunk_bytes_for(total)
        have: dict[str, str] = {}
        plan: list[tuple[str, PartSource]] = []
        for file in files:
            row = self._store.catalogue.blob_by_sha256(file.sha256, file.size, chunk_bytes)
            if row is not None and self._store.find_blob(row.blob, file.size, chunk_bytes) is not None:
                have[file.path] = row.blob
                self.progress.add(file.size, origin.name)
                continue
            plan.append((file.path, PartSource(file.size, chunk_bytes, "", file.sha256, file.validator)))
        have |= self._fetch(plan, [Feed(origin, {file.path: file for file in files})])
        rows = tuple(
            ManifestFile(file.path, file.size, have[file.path], chunk_bytes, file.sha256)
            for file in sorted(files, key=lambda file: file.path)
        )
        return self._publish(rows, None)

    def _settled(self, origin: Origin, file: RemoteFile) -> RemoteFile:
        """The file with a size and, so that a resume can be trusted, a validator."""
        if file.size < 0:
            return measured(origin, file, self._cancelled)
        if not file.validator and not file.sha256 and file.size > 1 << 20:
            now = origin.refresh(file)
            if now.size not in (-1, file.size):
                raise SizeMismatch(
                    f"{file.path}: listed with {file.size} bytes, the source has {now.size}",
                    path=file.path,
                    expected=file.size,
                    actual=now.size,
                )
            return msgspec.structs.replace(file, validator=now.validator)
        return file

    # with a manifest
    def _by_manifest(self, manifest: Manifest, origins: list[Origin]) -> Manifest:
        self.progress.bytes_total = manifest.size_bytes
        self.progress.bytes_done = 0
        by_blob: dict[str, ManifestFile] = {}
        for file in manifest.files:
            if self._store.find_blob(file.blob, file.size, file.chunk_bytes) is not None:
                self.progress.add(file.size, "")
            else:
                by_blob.setdefault(file.blob, file)
        plan = [(file.path, PartSource(file.size, file.chunk_bytes, file.blob)) for file in by_blob.values()]
        feeds = self._feeds(manifest, origins) if plan else []
        while plan:
            try:
                self._fetch(plan, feeds)
                break
            except (SourceChanged, DigestMismatch) as error:
                # without a chunk list only the whole blob tells; the source that gave it is not asked again
                self._errors.append(error)
                self._put_away(error)
                feeds = feeds[1:]
                if not feeds:
                    raise self._worst() from None
                plan = [
                    row for row in plan if self._store.find_blob(row[1].blob, row[1].size, row[1].chunk_bytes) is None
                ]
        return self._publish(manifest.files, manifest)

    def _feeds(self, manifest: Manifest, origins: list[Origin]) -> list[Feed]:
        wanted = {file.path: file for file in manifest.files}
        feeds = []
        for origin in sorted(origins, key=lambda origin: not origin.is_peer):
            try:
                files = origin.files_of(manifest) if hasattr(origin, "files_of") else self._listing(origin).files
            except HerderError as error:
                self._errors.append(error)
                continue
            usable = {file.path: file for file in files if file.path in wanted}
            wrong = [file for file in usable.values() if file.size not in (-1, wanted[file.path].size)]
            if wrong:
                self._errors.append(_size_error(wrong[0], wanted[wrong[0].path].size))
                continue
            if usable:
                feeds.append(Feed(origin, usable))
        if not feeds:
            raise self._worst()
        return feeds

    # both
    def _fetch(self, plan: list[tuple[str, PartSource]], feeds: list[Feed]) -> dict[str, str]:
        """Completes and publishes the blobs of a plan; returns path -> blob id."""
        done: dict[str, str] = {}
        rest = []
        for path, source in plan:
            blob = self._finished_before(path, source)
            if blob is None:
                rest.append((path, source))
            else:
                done[path] = blob
                self.progress.add(source.size, "")
        self._reserve(rest)
        tasks = [self._task(path, source, feeds) for path, source in rest]
        self.progress.state = "fetching"
        if tasks:
            round_ = Round(
                tasks,
                feeds,
                self._config,
                slots=self._slots,
                cancelled=self._cancelled,
                landed=self.progress.add,
            )
            round_.run()
            if round_.changed is not None:
                raise round_.changed[2]
        self.progress.state = "syncing"
        for task in tasks:
            done[task.path] = self._publish_blob(task)
        return done

    def _finished_before(self, path: str, source: PartSource) -> str | None:
        """A part that an earlier process had already linked to its blob."""
        name = self._store.catalogue.part(self._key(path, source))
        ended = finished(self._store.layout.parts / name, source) if name else None
        if name is None or ended is None:
            return None
        blob, leaves = ended
        check_leaves(blob, source.size, source.chunk_bytes, leaves)
        if self._store.find_blob(blob, source.size, source.chunk_bytes) is None:
            return None
        self._store.discard_part(name)
        return blob

    def _reserve(self, plan: list[tuple[str, PartSource]]) -> None:
        need = allocated = 0
        for path, source in plan:
            need += source.size
            name = self._store.catalogue.part(self._key(path, source))
            if name is not None:
                try:
                    status = (self._store.layout.parts / name / "data").stat()
                    allocated += min(status.st_blocks * 512, source.size)
                except OSError:
                    pass  # the part is gone: `_task` begins anew
                self._store.ledger.forget_part(name)
        self._store.ledger.reserve(self._token, need, allocated=allocated)

    def _task(self, path: str, source: PartSource, feeds: list[Feed]) -> Task:
        part = self._open(path, source)
        self._parts[path] = part
        if part.is_new and self._store.device.reflink:
            _clone(part, path, feeds)
        if source.blob:
            known = self._store.leaves(source.blob, source.size, source.chunk_bytes) or self._ask_leaves(part, feeds)
            if known is not None:
                part.set_known(known)
        part.recheck()
        self.progress.add(sum(part.length(index) for index in range(part.count) if part.bitmap.has(index)), "")
        return Task(path, part, "" if source.blob else source.sha256)

    def _open(self, path: str, source: PartSource) -> Part:
        key, store = self._key(path, source), self._store
        name = store.catalogue.part(key)
        if name is not None:
            part = Part(store.layout.parts / name, source, mode=store.write_mode)
            can_trust = bool(source.blob or source.sha256 or source.validator)
            if can_trust and part.resume():
                return part
            part.close()
            store.discard_part(name)
        directory = store.layout.new_part(key)
        part = Part(directory, source, mode=store.write_mode)
        store.catalogue.put_part(directory.name, key)
        try:
            part.create()
        except OSError as error:
            part.close()
            store.discard_part(directory.name)
            if error.errno in (28, 122):
                raise DiskFull(f"the store's file system: {error.strerror}", need=source.size) from None
            raise
        if part.is_allocated:
            store.ledger.allocated(self._token, source.size)
        return part

    def _ask_leaves(self, part: Part, feeds: list[Feed]) -> bytes | None:
        """The blob's chunk list from the part itself (a damaged blob kept its own) or from any source that has it."""
        source = part.source
        for read in [part.leaves, *(_asker(feed.origin, source) for feed in feeds)]:
            try:
                leaves = read()
                check_leaves(source.blob, source.size, source.chunk_bytes, leaves)
            except HerderError:
                continue
            return leaves
        return None

    def _publish_blob(self, task: Task) -> str:
        part, store = task.part, self._store
        blob, leaves = part.seal()
        if part.source.blob and blob != part.source.blob:
            raise DigestMismatch(
                f"{task.path}: what came is not the blob of the manifest",
                path=task.path,
                expected=part.source.blob,
                actual=blob,
            )
        part.close()
        with store.changing:
            row = publish.publish_blob(store.layout, part.directory / "data", blob, leaves, part.chunk_bytes)
            store.catalogue.put_blob(msgspec.structs.replace(row, sha256=task.sha256))
            store.discard_part(part.directory.name)
        del self._parts[task.path]
        return blob

    def _publish(self, rows: tuple[ManifestFile, ...], given: Manifest | None) -> Manifest:
        self.check_cancelled()
        self.progress.state = "syncing"
        return self._store.publish(self.request.model, self.request.revision, rows, given)

    def _key(self, path: str, source: PartSource) -> str:
        """Finds a part again: by blob, or by what is being fetched."""
        if source.blob:
            return hex_of(source.blob)
        name = "\0".join((self.request.model, self.request.revision, path))
        return "new-" + blake3(name.encode()).hexdigest()[:32]

    def _put_away(self, error: BaseException) -> None:
        """Keeps or removes the open parts, by what ended the fetch."""
        is_useless = isinstance(error, HerderError) and not error.is_retryable and not isinstance(error, Cancelled)
        if isinstance(error, Cancelled):
            is_useless = self._discards
        if isinstance(error, SourceChanged):
            is_useless = True
        for part in self._parts.values():
            part.close()
            if is_useless and not (part.has_list and isinstance(error, DigestMismatch)):
                self._store.discard_part(part.directory.name)
            else:
                self._store.keep_part(part.directory.name)
        self._parts.clear()
        self._store.ledger.release(self._token)

    def _close(self) -> None:
        for part in self._parts.values():
            part.close()
        self._parts.clear()


def _asker(origin: Origin, source: PartSource) -> Callable[[], bytes]:
    return lambda: origin.leaves(source.blob, source.size, source.chunk_bytes)


def _clone(part: Part, path: str, feeds: list[Feed]) -> None:
    """Takes the bytes of a file:// source on the store's own file system without copying them, where that works.

    Whatever is wrong with the source is left for the fetch to find.
    """
    for feed in feeds:
        if isinstance(feed.origin, FileOrigin) and path in feed.files:
            connection = feed.origin.connect()
            try:
                if part.clone(feed.name, connection.descriptor(feed.files[path])):
                    return
            except (HerderError, SourceChanged, OSError):
                continue
            finally:
                connection.close()


def _first_final(errors: list[HerderError]) -> HerderError:
    return next(error for error in errors if not error.is_retryable)


def _size_error(file: RemoteFile, expected: int) -> SizeMismatch:
    return SizeMismatch(
        f"{file.path}: the manifest says {expected} bytes, the source has {file.size}",
        path=file.path,
        expected=expected,
        actual=file.size,
    )
