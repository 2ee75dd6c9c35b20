"""The threads that move chunks: who fetches what from whom, and what happens when a source lies, stalls or dies.

A `Round` has tasks (files to complete) and feeds (sources that can give them). Each feed has a few threads with a
connection each; a thread claims a run of up to 16 consecutive missing chunks, opens one range for it, and for every
chunk receives, hashes and writes it from the same buffer. A chunk that does not match its digest is claimed again
from another feed; a feed with three bad chunks of one file gives no more of it; a feed that fails `attempts` times in
a row without one good chunk is dead, and the next one in order takes its place. A server that ignores ranges is read
as one stream by one thread, chunks that are here already being compared and not written.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable

import msgspec
from blake3 import blake3

from agent.mover.config import MoverConfig
from agent.mover.part import Part
from agent.mover.sources import Connection, Origin, RemoteFile, SourceChanged, Stream
from common import backoff, fsio, limits
from common.errors import Cancelled, DigestMismatch, DiskFull, HerderError, SourceFailed

RUN_CHUNKS = 16
RUN_BYTES = 64 << 20  # so that a run of large chunks is not a second of work that a failure loses
PIECE_BYTES = 4 << 20
TICK_S = 0.2


class Task:
    """One file to complete. Guarded by its round's lock, except the part, whose chunks have one writer each."""

    def __init__(self, path: str, part: Part, sha256: str = "") -> None:
        self.path, self.part, self.sha256 = path, part, sha256
        self.claimed = bytearray(part.count)
        self.left = len(part.bitmap.missing())
        self.bad: dict[int, set[str]] = {}  # chunk -> names of feeds that gave wrong bytes
        self.cursor = 0

    def claim(self, feed: Feed) -> tuple[int, int] | None:
        """(first, count) of a run that this feed may fetch, marked as claimed."""
        share = self.left // (2 * feed.origin.connections)  # so that a small file still keeps every connection busy
        limit = 1 << 60 if self in feed.streams else max(1, min(RUN_CHUNKS, RUN_BYTES // self.part.chunk_bytes, share))
        first = next((index for index in range(self.cursor, self.part.count) if self._is_free(index, feed)), None)
        if first is None:
            return None
        count = 1
        while count < limit and first + count < self.part.count and self._is_free(first + count, feed):
            count += 1
        for index in range(first, first + count):
            self.claimed[index] = 1
        while self.cursor < self.part.count and self.part.bitmap.has(self.cursor):
            self.cursor += 1
        return first, count

    def _is_free(self, index: int, feed: Feed) -> bool:
        return not self.claimed[index] and not self.part.bitmap.has(index) and feed.name not in self.bad.get(index, ())


class Feed:
    """One source in a round."""

    def __init__(self, origin: Origin, files: dict[str, RemoteFile]) -> None:
        self.origin, self.files, self.name = origin, files, origin.name
        self.error: HerderError | None = None  # set: dead
        self.landed = 0
        self.strikes: dict[str, int] = {}
        self.streams: set[Task] = set()  # files for which it ignores ranges
        self.streaming: dict[Task, int] = {}  # of those, being read now, by which thread

    def may_give(self, task: Task) -> bool:
        """Whether this feed has the file and is still believed for it."""
        return task.path in self.files and self.strikes.get(task.path, 0) < limits.CHUNK_STRIKES


class Round:
    """Completes tasks from feeds. One use."""

    def __init__(
        self,
        tasks: list[Task],
        feeds: list[Feed],
        config: MoverConfig,
        *,
        slots: threading.Semaphore,
        cancelled: threading.Event,
        landed: Callable[[int, str], None],
    ) -> None:
        self.tasks, self.feeds = tasks, feeds
        self._config, self._slots, self._cancelled, self._landed = config, slots, cancelled, landed
        self.lock = threading.Condition()
        self.error: BaseException | None = None
        self.changed: tuple[Feed, Task, SourceChanged] | None = None
        self._workers: list[_Worker] = []
        self._active: list[Feed] = []
        self._trail: threading.Thread | None = None
        self._trailed = 0

    def run(self) -> None:
        """Ends when all tasks are complete (and their sha256 agree), or raises why not.

        Raises: Cancelled, DiskFull, DigestMismatch, SourceChanged, or the error of the last source.
        """
        peers = [feed for feed in self.feeds if feed.origin.is_peer]
        if any(task.sha256 for task in self.tasks):
            self._trail = threading.Thread(target=self._hash_trail, name="sha256", daemon=True)
            self._trail.start()
        try:
            for feed in peers or self.feeds[:1]:
                self._start(feed)
            self._watch()
        finally:
            self._end()
        if self.error is not None:
            raise self.error

    def _watch(self) -> None:
        checkpointed = time.monotonic()
        while not self._is_over():
            with self.lock:
                self.lock.wait(TICK_S)
            if self._cancelled.is_set():
                self.fail(Cancelled("stopped on request"))
                return
            now = time.monotonic()
            unsynced = sum(task.part.unsynced_bytes for task in self.tasks)
            if now - checkpointed >= self._config.checkpoint_s or unsynced >= self._config.checkpoint_bytes:
                for task in self.tasks:
                    if task.part.unsynced_bytes:
                        task.part.checkpoint()
                checkpointed = time.monotonic()
            for worker in list(self._workers):
                worker.break_if_stuck(now)
            self._replace_dead()

    def _is_over(self) -> bool:
        with self.lock:
            if self.error is not None or self.changed is not None:
                return True
            hashed = self._trailed == sum(1 for task in self.tasks if task.sha256)
            return hashed and all(task.left == 0 for task in self.tasks)

    def _replace_dead(self) -> None:
        """Starts the next feed when what is left cannot come from the ones that run; fails when there is none."""
        with self.lock:
            alive = [feed for feed in self._active if feed.error is None]
            stuck = [task for task in self.tasks if task.left and not self._can_finish(task, alive)]
            if not stuck:
                return
            rest = [feed for feed in self.feeds if feed not in self._active]
            hopeless = [task for task in stuck if not any(feed.may_give(task) for feed in alive)]
            if not rest and not hopeless:
                for task in stuck:  # nobody else has it: whoever gave a wrong chunk may try again, up to its strikes
                    task.bad.clear()
                self.lock.notify_all()
                return
        if rest:
            self._start(rest[0])
        else:
            self.fail(self._why(hopeless[0]))

    def _can_finish(self, task: Task, alive: list[Feed]) -> bool:
        givers = [feed for feed in alive if feed.may_give(task)]
        if not givers:
            return False
        names = {feed.name for feed in givers}
        return all(names - given for given in task.bad.values())

    def _why(self, task: Task) -> HerderError:
        errors = [feed.error for feed in self.feeds if feed.error is not None]
        final = [error for error in errors if not error.is_retryable]
        if not final and any(feed.strikes.get(task.path) for feed in self.feeds):
            return DigestMismatch(f"{task.path}: every source gave wrong bytes", path=task.path)
        if errors:
            return (final or errors)[-1]
        return SourceFailed(f"{task.path}: no source has it", path=task.path)

    def _start(self, feed: Feed) -> None:
        runs = sum(task.left for task in self.tasks)
        with self.lock:
            self._active.append(feed)
        for index in range(max(1, min(feed.origin.connections, runs))):
            is_free = self._slots.acquire(blocking=False)
            if not is_free and index:
                break  # the first thread of a feed always runs, so no fetch starves
            worker = _Worker(self, feed, self._slots if is_free else None)
            self._workers.append(worker)
            worker.thread.start()

    def _end(self) -> None:
        with self.lock:
            if self.error is None and any(task.left for task in self.tasks) and self.changed is None:
                self.error = Cancelled("stopped")
            self.lock.notify_all()
        for worker in self._workers:
            worker.interrupt()
        for worker in self._workers:
            worker.thread.join()
        if self._trail is not None:
            self._trail.join()

    def fail(self, error: BaseException) -> None:
        """Ends the round with an error; the first one stays."""
        with self.lock:
            if self.error is None:
                self.error = error
            self.lock.notify_all()

    def is_ending(self) -> bool:
        """Whether workers are to stop."""
        return self.error is not None or self.changed is not None or self._cancelled.is_set()

    # what workers call
    def claim(self, feed: Feed) -> tuple[Task, int, int] | None:
        """The next run for this feed; None when there will be no more."""
        with self.lock:
            while not self.is_ending() and feed.error is None:
                if all(task.left == 0 for task in self.tasks):
                    return None
                for task in self.tasks:
                    if not task.left or not feed.may_give(task) or task in feed.streaming:
                        continue
                    run = task.claim(feed)
                    if run is not None:
                        if task in feed.streams:
                            feed.streaming[task] = threading.get_ident()
                        return task, *run
                self.lock.wait(TICK_S)
        return None

    def give_up(self, feed: Feed, task: Task, indices: list[int]) -> None:
        """Chunks that were claimed and did not arrive."""
        with self.lock:
            if feed.streaming.get(task) == threading.get_ident():
                del feed.streaming[task]
            for index in indices:
                task.claimed[index] = 0
                task.cursor = min(task.cursor, index)
            self.lock.notify_all()

    def land(self, feed: Feed, task: Task, index: int, digest: bytes) -> None:
        """A chunk's bytes are written and have this digest."""
        if task.part.land(index, digest):
            with self.lock:
                task.left -= 1
                task.bad.pop(index, None)
                feed.landed += 1
                if task.left == 0 or self._trail is not None:  # nobody else waits for a single chunk
                    self.lock.notify_all()
            self._landed(task.part.length(index), feed.name)
            return
        with self.lock:
            task.bad.setdefault(index, set()).add(feed.name)
            feed.strikes[task.path] = feed.strikes.get(task.path, 0) + 1
            task.claimed[index] = 0
            task.cursor = min(task.cursor, index)
            self.lock.notify_all()

    def bury(self, feed: Feed, error: HerderError) -> None:
        """The feed is of no use any more."""
        with self.lock:
            feed.error = feed.error or error
            self.lock.notify_all()

    def note_change(self, feed: Feed, task: Task, error: SourceChanged) -> None:
        """The file at the source is another one now: the round ends, its owner decides."""
        with self.lock:
            if self.changed is None:
                self.changed = (feed, task, error)
            self.lock.notify_all()

    def pause(self, seconds: float) -> None:
        """Waits, unless the round ends."""
        deadline = time.monotonic() + seconds
        with self.lock:
            while not self.is_ending() and (left := deadline - time.monotonic()) > 0:
                self.lock.wait(min(left, TICK_S))

    def _hash_trail(self) -> None:
        """sha256 over each file's contiguous prefix while the rest arrives."""
        try:
            for task in [task for task in self.tasks if task.sha256]:
                if not self._hash_file(task):
                    return
                with self.lock:
                    self._trailed += 1
                    self.lock.notify_all()
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits for the round
            self.fail(error)

    def _hash_file(self, task: Task) -> bool:
        running = hashlib.sha256()
        buffer = fsio.aligned_buffer(task.part.chunk_bytes)
        for index in range(task.part.count):
            with self.lock:
                while not task.part.bitmap.has(index) and not self.is_ending():
                    self.lock.wait(TICK_S)
                if self.is_ending():
                    return False
            with task.part.read_chunk(index, buffer) as data:
                running.update(data)
        if running.hexdigest() != task.sha256:
            raise DigestMismatch(
                f"{task.path}: its sha256 is not the published one",
                path=task.path,
                expected=task.sha256,
                actual=running.hexdigest(),
            )
        return True


class ClonedChunk:
    """A chunk of a part that shares its source's blocks, as a stream."""

    def __init__(self, part: Part, index: int) -> None:
        self._part, self._at = part, index * part.chunk_bytes

    def readinto(self, view: memoryview) -> int:
        """Some bytes; 0 at the end. Raises: SourceFailed."""
        try:
            count = os.preadv(self._part.data_fd, [view], self._at)
        except OSError as error:
            raise SourceFailed(f"the clone cannot be read: {error.strerror}") from None
        self._at += count
        return count


class _Worker:
    """One thread with one connection to one feed."""

    def __init__(self, owner: Round, feed: Feed, slots: threading.Semaphore | None) -> None:
        self._round, self._feed, self._slots = owner, feed, slots
        self._connection: Connection | None = None
        self._opening_since = 0.0
        self._rng = random.Random()
        self._view = memoryview(b"")
        self.thread = threading.Thread(target=self._run, name=f"fetch-{feed.name[:40]}", daemon=True)

    def interrupt(self) -> None:
        """Breaks a blocked read."""
        connection = self._connection
        if connection is not None:
            connection.interrupt()

    def break_if_stuck(self, now: float) -> None:
        """A request whose answer does not begin is broken off; headers can drip for ever otherwise."""
        since = self._opening_since
        if since and now - since > 2 * self._round._config.read_timeout_s:
            self._opening_since = 0.0
            self.interrupt()

    def _run(self) -> None:
        try:
            self._loop()
        except OSError as error:
            full = DiskFull(f"the store's file system: {error.strerror}") if error.errno in (28, 122) else error
            self._round.fail(full)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits for the round
            self._round.fail(error)
        finally:
            if self._connection is not None:
                self._connection.close()
            if self._slots is not None:
                self._slots.release()

    def _loop(self) -> None:
        attempts, landed_before = 0, 0
        while (claim := self._round.claim(self._feed)) is not None:
            task, first, count = claim
            try:
                self._transfer(task, first, count)
                attempts = 0
            except SourceChanged as error:
                self._round.note_change(self._feed, task, error)
                return
            except SourceFailed as error:
                self._reconnect()
                attempts = 1 if self._feed.landed != landed_before else attempts + 1
                landed_before = self._feed.landed
                if attempts >= self._round._config.attempts:
                    self._round.bury(self._feed, error)
                    return
                self._round.pause(self._delay_s(attempts, error))
            except HerderError as error:
                self._round.bury(self._feed, error)
                return

    def _delay_s(self, attempts: int, error: SourceFailed) -> float:
        config = self._round._config
        delay_ms = backoff.full_jitter_ms(
            attempts, base_ms=config.retry_base_ms, cap_ms=config.retry_cap_ms, rng=self._rng
        )
        return max(delay_ms / 1000, float(error.details.get("retry_after_s", 0.0)))

    def _reconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _transfer(self, task: Task, first: int, count: int) -> None:
        waiting = list(range(first, first + count))
        try:
            if self._connection is None:
                self._connection = self._feed.origin.connect()
            part, remote = task.part, self._feed.files[task.path]
            offset = first * part.chunk_bytes
            length = min((first + count) * part.chunk_bytes, part.size) - offset
            is_stream = task in self._feed.streams
            self._opening_since = time.monotonic()
            stream = self._connection.open(remote, 0 if is_stream else offset, -1 if is_stream else length)
            self._opening_since = 0.0
            try:
                self._adopt_validator(task, remote, stream)
                if stream.offset == offset and not is_stream:
                    self._receive(stream, task, waiting)
                elif self._becomes_stream(task):
                    self._receive_all(stream, task, waiting)
            finally:
                stream.close()
        finally:
            self._opening_since = 0.0
            self._round.give_up(self._feed, task, waiting)

    def _becomes_stream(self, task: Task) -> bool:
        """Ranges are ignored: one thread reads the whole file, the others leave it."""
        with self._round.lock:
            if task in self._feed.streams:
                return self._feed.streaming.get(task) == threading.get_ident()
            self._feed.streams.add(task)
            self._feed.streaming[task] = threading.get_ident()
            return True

    def _adopt_validator(self, task: Task, remote: RemoteFile, stream: Stream) -> None:
        with self._round.lock:
            known = self._feed.files[task.path]
            if not known.validator and stream.validator:
                self._feed.files[task.path] = msgspec.structs.replace(known, validator=stream.validator)
            elif known.validator != stream.validator and known.validator[:1] == stream.validator[:1]:
                raise SourceChanged(f"{remote.path}: the source has another file now")

    def _receive(self, stream: Stream, task: Task, waiting: list[int]) -> None:
        view = self._buffer(task.part.chunk_bytes)
        for index in list(waiting):
            # What was cloned is read from the clone, which nobody can change any more, and needs no writing; but where
            # a chunk was bad, whoever gave it has written over it.
            is_here = task.part.cloned_from == self._feed.name and not task.bad.get(index)
            given = ClonedChunk(task.part, index) if is_here else stream
            digest = self._chunk(given, task.part, index, view, writes=not is_here)
            waiting.remove(index)
            self._round.land(self._feed, task, index, digest)

    def _receive_all(self, stream: Stream, task: Task, waiting: list[int]) -> None:
        """The whole file in order. What is here is compared: a difference means that the source has changed."""
        part = task.part
        view = self._buffer(part.chunk_bytes)
        for index in range(part.count):
            is_mine = self._take(task, index, waiting)
            digest = self._chunk(stream, part, index, view, writes=is_mine)
            if is_mine:
                waiting.remove(index)
                self._round.land(self._feed, task, index, digest)
            elif part.bitmap.has(index) and not part.agrees(index, digest):
                raise SourceChanged(f"{task.path}: the source gives other bytes than before")
            if task.left == 0 and not task.sha256:
                return

    def _buffer(self, chunk_bytes: int) -> memoryview:
        """This thread's aligned buffer; freed with the thread (an error's traceback may hold slices of it)."""
        size = min(PIECE_BYTES, chunk_bytes)
        if len(self._view) < size:
            self._view = memoryview(fsio.aligned_buffer(size))
        return self._view

    def _take(self, task: Task, index: int, waiting: list[int]) -> bool:
        if index in waiting:
            return True
        with self._round.lock:
            if not task._is_free(index, self._feed):
                return False
            task.claimed[index] = 1
            waiting.append(index)
            return True

    def _chunk(self, stream: Stream | ClonedChunk, part: Part, index: int, view: memoryview, *, writes: bool) -> bytes:
        """Receives one chunk and returns its digest."""
        hasher = blake3()
        offset, left = index * part.chunk_bytes, part.length(index)
        while left:
            size = min(left, len(view), PIECE_BYTES)
            filled = 0
            while filled < size:
                if self._round.is_ending():
                    raise SourceFailed("stopped")
                count = stream.readinto(view[filled:size])
                if count == 0:
                    raise SourceFailed(f"the source ended at byte {offset + filled} of {part.size}")
                filled += count
            hasher.update(view[:size])
            if writes:
                part.write_piece(offset, view, size)
            offset, left = offset + size, left - size
        return hasher.digest()
