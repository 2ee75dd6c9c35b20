"""The mover's main loop: reads the agent's requests, gives each a thread, and sends what comes of it.

Answers leave through one outbox thread, so a slow agent never blocks a transfer: of the progress frames only the
latest per request is kept, `Done` frames are never dropped. The number of open requests is bounded.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from agent.mover import protocol, verify
from agent.mover.config import MoverConfig
from agent.mover.fetch import FetchJob, Progress
from agent.mover.protocol import Answer, Done, HeldCopy, Moving, Ready
from agent.mover.serve import BlobServer
from agent.store.disk import DiskStore
from common.errors import CopyNotFound, DigestMismatch, DiskFull, HerderError, Internal, TooMany
from common.manifest import Manifest
from herder.decoding import UNREADABLE

OPEN_REQUESTS = 1_024
REPORT_S = 0.25
RATE_WINDOW_S = 5.0
STOP_S = 15.0
SCAN_BYTES = 12 << 20  # of manifests in one answer; beyond it copies are listed without theirs


class Outbox:
    """Frames on their way to the agent."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._ready = threading.Condition()
        self._certain: deque[Answer] = deque()
        self._latest: dict[str, Moving] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, answer: Answer) -> None:
        """Queues an answer."""
        with self._ready:
            if isinstance(answer, Moving):
                self._latest[answer.token] = answer
            else:
                self._latest.pop(answer.token, None)
                self._certain.append(answer)
            self._ready.notify()

    def close(self) -> None:
        """Sends what is queued, for a moment, then ends."""
        with self._ready:
            self._is_closed = True
            self._ready.notify()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._certain and not self._latest:
                    if self._is_closed:
                        return
                    self._ready.wait()
                answer = self._certain.popleft() if self._certain else self._latest.pop(next(iter(self._latest)))
            try:
                self._channel.sendall(protocol.frame(answer))
            except OSError:
                return  # the agent is gone; the reading side sees it too


class Mover:
    """One mover process."""

    def __init__(self, config: MoverConfig, channel: socket.socket) -> None:
        """Opens and recovers the store. Raises: HerderError."""
        self._config, self._channel = config, channel
        self._store = DiskStore(
            Path(config.store_dir),
            instance=config.instance,
            budget_bytes=config.disk_budget_bytes,
            reserve_bytes=config.reserve_bytes,
            orphan_ttl_s=config.orphan_ttl_s,
            write_mode=config.write_mode,
        )
        try:
            self._server = BlobServer(self._store, config.data_host, config.data_port)
        except OSError as error:
            self._store.close()
            raise Internal(f"cannot listen on {config.data_host}:{config.data_port}: {error.strerror}") from None
        self._outbox = Outbox(channel)
        self._lock = threading.Lock()
        self._open: dict[str, threading.Event | FetchJob] = {}
        self._copies: dict[tuple[str, str], threading.Lock] = {}
        self._threads: set[threading.Thread] = set()
        self._fetches = threading.Semaphore(config.fetches)
        self._slots = threading.Semaphore(config.connections)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until `Stop`, SIGTERM or the end of the agent."""
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGTERM, lambda *_: self._channel.shutdown(socket.SHUT_RD))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._server.start()
        self._spawn("suspects", lambda: verify.check_suspects(self._store, self._stopping))
        self._outbox.put(Ready("", self._server.host, self._server.port, os.getpid()))
        try:
            while (request := self._receive()) is not None and not isinstance(request, protocol.Stop):
                self._dispatch(request)
            self._end()
            if isinstance(request, protocol.Stop):
                self._outbox.put(Done(request.token))
        finally:
            self._outbox.close()

    def _end(self) -> None:
        self._stopping.set()
        self._server.stop()
        with self._lock:
            open_now, threads = list(self._open.values()), list(self._threads)
        for work in open_now:
            _cancel(work, discard=False)
        deadline = time.monotonic() + STOP_S
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._store.close()

    def _receive(self) -> protocol.AnyRequest | None:
        head = self._exactly(protocol.LENGTH.size)
        if head is None:
            return None
        length = protocol.LENGTH.unpack(head)[0]
        if length > protocol.FRAME_BYTES:
            return None
        body = self._exactly(length)
        try:
            return None if body is None else protocol.requests.decode(body)
        except UNREADABLE:
            return None  # not our protocol: end, the agent starts another one

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._channel.recv(min(count - len(data), 1 << 20))
            except OSError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)

    def _dispatch(self, request: protocol.AnyRequest) -> None:
        token = request.token
        match request:
            case protocol.Cancel():
                with self._lock:
                    target = self._open.get(request.target)
                if target is not None:
                    _cancel(target, discard=request.discard)
                self._outbox.put(Done(token))
            case protocol.Configure():
                self._configure(request)
            case _:
                work: threading.Event | FetchJob = threading.Event()
                if isinstance(request, protocol.Fetch):
                    work = FetchJob(request, self._store, self._config, self._slots)
                with self._lock:
                    if len(self._open) >= OPEN_REQUESTS or token in self._open:
                        error = TooMany("too many open requests, or this token is open")
                        self._outbox.put(Done(token, error.info()))
                        return
                    self._open[token] = work
                self._spawn(f"{type(request).__name__.lower()}-{token[:20]}", lambda: self._work(request, work))

    def _configure(self, request: protocol.Configure) -> None:
        try:
            key = base64.b64decode(request.ticket_key, validate=True)
            if len(key) != 32:
                raise ValueError
        except ValueError:
            self._outbox.put(Done(request.token, Internal("the ticket key is not 32 bytes of base64").info()))
            return
        self._server.configure(request.node_id, key)
        self._outbox.put(Done(request.token))

    def _spawn(self, name: str, run: Any) -> None:
        def body() -> None:
            try:
                run()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=body, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _work(self, request: Any, work: threading.Event | FetchJob) -> None:
        token = request.token
        try:
            done = self._answer(request, work)
        except HerderError as error:
            done = Done(token, error.info())
        except OSError as error:
            kind = DiskFull if error.errno in (28, 122) else Internal
            done = Done(token, kind(f"{error.strerror}: {error.filename or 'the store'}").info())
        except Exception as error:  # noqa: BLE001 - the border of a request: it must be answered
            done = Done(token, Internal(f"{type(error).__name__}: {str(error)[:300]}").info())
        with self._lock:
            self._open.pop(token, None)
        self._outbox.put(done)

    def _answer(self, request: Any, work: threading.Event | FetchJob) -> Done:
        token = request.token
        match request:
            case protocol.Fetch():
                assert isinstance(work, FetchJob)
                return Done(token, manifest=self._fetch(work))
            case protocol.Drop():
                with self._alone(request.model, request.revision):
                    freed = self._store.drop(request.model, request.revision)
                return Done(token, detail={"freed_bytes": freed})
            case protocol.Verify():
                assert isinstance(work, threading.Event)
                return self._verify(request, work)
            case protocol.Scan():
                return Done(token, copies=self._held())
            case protocol.Capacity():
                return Done(token, detail=dict(self._store.ledger.capacity()))
        raise Internal(f"{type(request).__name__} is not known here")

    @contextlib.contextmanager
    def _alone(self, model: str, revision: str) -> Any:
        """Requests about one copy wait for each other; the others do not notice."""
        with self._lock:
            lock = self._copies.setdefault((model, revision), threading.Lock())
        with lock:
            yield

    def _fetch(self, job: FetchJob) -> Manifest:
        request, progress = job.request, job.progress
        ended = threading.Event()
        reporter = threading.Thread(target=self._report, args=(request.token, progress, ended), daemon=True)
        reporter.start()
        try:
            while not self._fetches.acquire(timeout=REPORT_S):
                job.check_cancelled()
            try:
                with self._alone(request.model, request.revision):
                    return job.run()
            finally:
                self._fetches.release()
        finally:
            ended.set()
            reporter.join()

    def _report(self, token: str, progress: Progress, ended: threading.Event) -> None:
        """Sends progress while it changes; the rate is over the last five seconds."""
        window: deque[tuple[float, int]] = deque()
        last: tuple[str, int, int] | None = None
        while not ended.wait(REPORT_S):
            now, done = time.monotonic(), progress.bytes_done
            window.append((now, done))
            while now - window[0][0] > RATE_WINDOW_S:
                window.popleft()
            elapsed = now - window[0][0]
            rate = max(0.0, (done - window[0][1]) / elapsed) if elapsed else 0.0
            seen = (progress.state, done, progress.bytes_total)
            if seen != last:
                last = seen
                self._outbox.put(Moving(token, *seen, rate, progress.source))

    def _verify(self, request: protocol.Verify, cancelled: threading.Event) -> Done:
        store = self._store
        manifest = store.present(request.model, request.revision)
        if manifest is None:
            raise CopyNotFound(f"{request.model}@{request.revision} is not on this node")
        progress, ended = Progress(), threading.Event()
        progress.state, progress.bytes_total = "verifying", manifest.size_bytes
        threading.Thread(target=self._report, args=(request.token, progress, ended), daemon=True).start()
        bad = []
        try:
            for file in manifest.files:
                row = store.catalogue.blob(file.blob)
                if row is None or not verify.check_blob(store, row, cancelled, lambda n: progress.add(n, "")):
                    bad.append(file.path)
        finally:
            ended.set()
        if bad:
            raise DigestMismatch(
                f"{request.model}@{request.revision}: {len(bad)} damaged files, the copy was withdrawn",
                hint="copy or download it again: only the damaged chunks are fetched",
                paths=bad[:100],
            )
        return Done(request.token, detail={"bytes": manifest.size_bytes})

    def _held(self) -> tuple[HeldCopy, ...]:
        held, left = [], SCAN_BYTES
        for manifest in self._store.copies():
            left -= len(msgspec.msgpack.encode(manifest))
            held.append(
                HeldCopy(
                    manifest.model,
                    manifest.revision,
                    str(self._store.layout.model(manifest.model, manifest.revision)),
                    manifest.size_bytes,
                    manifest.digest,
                    manifest.format,
                    manifest.detected if left > 0 else {},
                    manifest if left > 0 else None,
                )
            )
        return tuple(held)


def _cancel(work: threading.Event | FetchJob, *, discard: bool) -> None:
    if isinstance(work, FetchJob):
        work.cancel(discard=discard)
    else:
        work.set()
