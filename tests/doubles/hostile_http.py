"""An HTTP server that serves files rightly except where a test tells it how to go wrong.

Faults are set per path (or "*") and may change while it runs; `requests` tells what was asked. Stdlib threads, so
it can also write half an answer and hang up, which a real framework would not let it do.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Faults:
    """What goes wrong for a path. Counters go down as they are used; -1 never ends."""

    def __init__(self, **values: Any) -> None:
        self.ignores_ranges = False  # 200 and the whole file
        self.no_etag = False
        self.cut_after: int | None = None  # bytes of body, then the connection is reset
        self.cuts = 0  # so many answers are cut
        self.status = 0  # answered instead, `statuses` times
        self.statuses = 0
        self.retry_after = ""
        self.shift = 0  # a 206 that begins so many bytes later than asked
        self.flips: dict[int, int] = {}  # offset -> times the byte there is wrong
        self.lies_size: int | None = None  # total in Content-Range and Content-Length
        self.range_limit: int | None = None  # 416 for ranges that begin at or behind
        self.redirect = ""
        self.change_after: int | None = None  # requests until the file becomes `changed`
        self.changed = b""
        self.drip_s = 0.0  # one byte, then a pause
        self.chunked = False
        self.delay_s = 0.0
        self.rate: int | None = None  # bytes per second of each answer
        for name, value in values.items():
            assert hasattr(self, name), name
            setattr(self, name, value)


class HostileServer:
    """Use as a context manager; `files` maps "/path" to bytes."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files: dict[str, bytes] = dict(files or {})
        self.faults: dict[str, Faults] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent_bytes = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.answer(self)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Cut connections are the point."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HostileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def asked(self, path: str) -> list[dict[str, str]]:
        """Headers of the requests for a path."""
        with self.lock:
            return [headers for place, headers in self.requests if place == path]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        path = handler.path.partition("?")[0]
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self.lock:
            self.requests.append((path, headers))
            faults = self.faults.get(path, self.faults.get("*", Faults()))
            if faults.change_after is not None:
                faults.change_after -= 1
                if faults.change_after < 0:
                    self.files[path] = faults.changed
                    faults.change_after = None
            is_error = faults.statuses != 0
            faults.statuses -= 1 if faults.statuses > 0 else 0
            body = self.files.get(path)
        if faults.delay_s:
            time.sleep(faults.delay_s)
        if is_error:
            extra = {"Retry-After": faults.retry_after} if faults.retry_after else {}
            self._short(handler, faults.status, extra)
        elif faults.redirect:
            self._short(handler, 302, {"Location": faults.redirect})
        elif body is None:
            self._short(handler, 404, {})
        else:
            self._file(handler, headers, body, faults)

    def _short(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            handler.send_header(name, value)
        handler.end_headers()

    def _file(self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes, faults: Faults) -> None:
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        match = None if faults.ignores_ranges else _RANGE.fullmatch(headers.get("range", ""))
        if headers.get("if-range", etag) != etag:
            match = None
        total = faults.lies_size if faults.lies_size is not None else len(body)
        first, last = 0, len(body) - 1
        if match is not None:
            first = int(match[1])
            last = min(int(match[2] or last), last)
            limit = faults.range_limit if faults.range_limit is not None else len(body)
            if first >= limit:
                self._short(handler, 416, {"Content-Range": f"bytes */{total}"})
                return
        data = bytearray(body[first : last + 1])
        with self.lock:
            for offset, times in list(faults.flips.items()):
                if times and first <= offset <= last:
                    data[offset - first] ^= 0x40
                    faults.flips[offset] = times - 1
        handler.send_response(206 if match is not None else 200)
        if match is not None:
            shift = faults.shift
            handler.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{total}")
        if not faults.no_etag:
            handler.send_header("ETag", etag)
        if faults.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(data) if match is not None else total))
        handler.end_headers()
        self._body(handler, bytes(data), faults)

    def _body(self, handler: BaseHTTPRequestHandler, data: bytes, faults: Faults) -> None:
        with self.lock:
            is_cut = faults.cuts != 0 and faults.cut_after is not None and len(data) > faults.cut_after
            if is_cut:
                faults.cuts -= 1 if faults.cuts > 0 else 0
                data = data[: faults.cut_after]
        step = len(data) or 1
        if faults.drip_s:
            step = 1
        elif faults.rate:
            step = max(1, faults.rate // 20)
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            if faults.chunked:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            else:
                handler.wfile.write(piece)
            with self.lock:
                self.sent_bytes += len(piece)
            if faults.drip_s or faults.rate:
                time.sleep(faults.drip_s or 0.05)
        if faults.chunked:
            handler.wfile.write(b"0\r\n\r\n")
        if is_cut or (faults.lies_size is not None and not faults.chunked):
            handler.close_connection = True
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)


def eventually(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
