"""The blob server: other nodes read published blobs from here, each request with a ticket of the head.

HTTP/1.1 with keep-alive, GET only: /manifest (the ticketed one), /chunks/HEX (a blob's digest list), /blobs/HEX with an
optional single range. A path is one of these words and 64 hex digits, so it cannot leave the store; and a ticket
opens only the blobs of the manifest that it names. One thread per connection, at most 64; bytes leave by sendfile from
the page cache and past it from the disk (agent/mover/blob_reader.py).
Every wait has a limit: 10 s for a request to arrive, 30 s between requests, 60 s for a send to make progress.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
import time
from typing import BinaryIO

import msgspec

from agent.mover.blob_reader import BlobReader
from agent.mover.source_peer import TICKET_HEADER
from agent.store.digests import is_hex
from agent.store.disk import DiskStore
from common import limits, tickets
from common.clock import boottime_ms
from common.errors import Forbidden
from common.manifest import Manifest

REQUEST_BYTES = 16_384
REQUEST_S = 10.0
IDLE_S = 30.0
SEND_S = 60

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
_REASONS = {200: "OK", 206: "Partial Content", 400: "Bad Request", 403: "Forbidden", 404: "Not Found"}
_REASONS |= {405: "Method Not Allowed", 416: "Range Not Satisfiable", 503: "Service Unavailable"}


class _Refuse(Exception):
    """An answer without a body; `closes` when the connection cannot be used further."""

    def __init__(self, status: int, *, closes: bool = False, headers: str = "") -> None:
        self.status, self.closes, self.headers = status, closes, headers


class BlobServer:
    """Listens from `start` to `stop`."""

    def __init__(self, store: DiskStore, host: str, port: int) -> None:
        self._store = store
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._key, self._node = b"", ""
        self._blobs = BlobReader()
        self._slots = threading.BoundedSemaphore(limits.MOVER_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="serve", daemon=True)

    def start(self) -> None:
        """Begins to accept."""
        self._thread.start()

    def configure(self, node_id: str, key: bytes) -> None:
        """From now on tickets for this node, signed with this key, are good. Before: none is."""
        self._node, self._key = node_id, key

    def stop(self) -> None:
        """Stops accepting and cuts what is open."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._stopping.is_set():
                    return
                time.sleep(0.1)  # out of descriptors: those that are open will end
                continue
            if not self._slots.acquire(blocking=False):
                with contextlib.suppress(OSError):
                    connection.settimeout(1.0)
                    connection.sendall(_head(503, 0, "Retry-After: 1\r\nConnection: close\r\n"))
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="serve-blob", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # kernel timeouts keep the descriptor blocking, as sendfile needs it
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
            while not self._stopping.is_set() and self._answer(connection):
                pass
        except OSError:
            pass  # the reader went away; it will ask again
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
            self._slots.release()

    def _answer(self, connection: socket.socket) -> bool:
        """Answers one request; False when the connection ends."""
        try:
            request = _read_request(connection)
            if request is None:
                return False
            method, path, headers = request
            if method != "GET":
                raise _Refuse(405, closes=True, headers="Allow: GET\r\n")
            self._route(connection, path, headers)
        except _Refuse as refusal:
            closing = "Connection: close\r\n" if refusal.closes else ""
            connection.sendall(_head(refusal.status, 0, refusal.headers + closing))
            return not refusal.closes
        return headers.get("connection", "").lower() != "close"

    def _route(self, connection: socket.socket, path: str, headers: dict[str, str]) -> None:
        manifest = self._ticketed(headers.get(TICKET_HEADER.lower(), ""))
        kind, _, digits = path.removeprefix("/").partition("/")
        if kind == "manifest" and not digits:
            body = msgspec.json.encode(manifest)
            connection.sendall(_head(200, len(body), "Content-Type: application/json\r\n") + body)
            return
        if kind not in ("blobs", "chunks") or not is_hex(digits):
            raise _Refuse(404)
        blob = f"b3:{digits}"
        row = self._store.catalogue.blob(blob)
        if row is None or row.state != "good" or all(file.blob != blob for file in manifest.files):
            raise _Refuse(404)
        place = self._store.layout.blob(blob) if kind == "blobs" else self._store.layout.leaves(blob)
        try:
            file = place.open("rb", buffering=0)
        except FileNotFoundError:
            raise _Refuse(404) from None
        with file:
            _send_file(connection, file, headers.get("range", ""), digits, self._blobs)

    def _ticketed(self, text: str) -> Manifest:
        """The manifest that the ticket opens. Fails closed: without a key from the head nothing is served."""
        if not self._key or not text:
            raise _Refuse(403)
        try:
            ticket = tickets.check(text, self._key, node_id=self._node, now_boottime_ms=boottime_ms())
        except (Forbidden, ValueError):
            raise _Refuse(403) from None
        manifest = self._store.catalogue.copy_by_digest(ticket.digest)
        if manifest is None:
            raise _Refuse(404)
        return manifest


def _read_request(connection: socket.socket) -> tuple[str, str, dict[str, str]] | None:
    """(method, path, headers); None when the other side is done. A slow or long request is refused."""
    connection.settimeout(IDLE_S)
    data, deadline = b"", 0.0
    while b"\r\n\r\n" not in data:
        try:
            piece = connection.recv(REQUEST_BYTES)
        except TimeoutError:
            if data:
                raise _Refuse(400, closes=True) from None
            return None
        if not piece:
            return None
        data += piece
        deadline = deadline or time.monotonic() + REQUEST_S
        left = deadline - time.monotonic()
        if len(data) > REQUEST_BYTES or left <= 0:
            raise _Refuse(400, closes=True)
        connection.settimeout(left)
    connection.settimeout(None)
    head, _, rest = data.partition(b"\r\n\r\n")
    try:
        first, *lines = head.decode("ascii").split("\r\n")
        method, path, version = first.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    except ValueError:
        raise _Refuse(400, closes=True) from None
    if version != "HTTP/1.1" or rest or headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise _Refuse(400, closes=True)  # no bodies, no pipelining: nothing to smuggle
    return method, path, headers


def _send_file(connection: socket.socket, file: BinaryIO, range_text: str, etag: str, blobs: BlobReader) -> None:
    size = os.fstat(file.fileno()).st_size
    first, last, status, extra = 0, size - 1, 200, f'ETag: "{etag}"\r\nAccept-Ranges: bytes\r\n'
    match = _RANGE.fullmatch(range_text)
    if match is not None:
        first = int(match[1])
        last = min(int(match[2]), size - 1) if match[2] else size - 1
        if first > last:
            raise _Refuse(416, headers=f"Content-Range: bytes */{size}\r\n")
        status, extra = 206, f"{extra}Content-Range: bytes {first}-{last}/{size}\r\n"
    left = last - first + 1
    connection.sendall(_head(status, left, extra), socket.MSG_MORE if left else 0)
    with blobs.begin(connection, file) as sending:
        while left:
            count = sending.send(first, left)
            first, left = first + count, left - count


def _head(status: int, length: int, extra: str) -> bytes:
    return f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Length: {length}\r\n{extra}\r\n".encode()
