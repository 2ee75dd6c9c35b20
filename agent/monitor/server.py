"""The monitor's own /metrics: on loopback unless told otherwise, behind a token everywhere else.

Nothing runs until somebody asks: one thread waits in accept, and the text is made when a scrape comes.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from agent.config import is_loopback
from common.errors import InvalidConfig

log = logging.getLogger(__name__)
CONNECTIONS_MAX = 16
IDLE_S = 5.0
BACKLOG = 32
TEXT = "text/plain; version=0.0.4; charset=utf-8"


def address_of(text: str) -> tuple[str, int]:
    """ "PORT" or "HOST:PORT"; the host is loopback when there is none. Raises: ValueError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not [HOST:]PORT")
    return host, int(port)


class Server:
    """Serves what `text` makes."""

    def __init__(self, host: str, port: int, text: Callable[[], bytes], *, token: str = "") -> None:
        """Listens. Raises: InvalidConfig for an open address without a token, or one that cannot be had."""
        if not token and not is_loopback(host):
            raise InvalidConfig(
                f"/metrics on {host} would be open to everybody who reaches it", hint="give --metrics-token-file"
            )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise InvalidConfig(f"{host}:{port}: {error.strerror or error}") from None
        self.port = int(self._listener.getsockname()[1])
        self.text = text
        self.token = token
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._thread = threading.Thread(target=self._accept, name="monitor-metrics", daemon=True)
        self._is_closing = False

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._is_closing = True
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        except OSError:
            pass  # it was never connected on this system; closing does it
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if self._is_closing:
                    return
                log.warning("a connection could not be taken: %s", error.strerror)
                threading.Event().wait(0.1)  # out of descriptors: let some go
                continue
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection, peer), daemon=True).start()

    def _serve(self, connection: socket.socket, peer: object) -> None:
        try:
            _Handler(connection, peer, self)  # type: ignore[arg-type]
        except OSError:
            pass  # it went away, or sent nothing in time
        finally:
            connection.close()
            self._room.release()


class _Handler(BaseHTTPRequestHandler):
    """One connection. `server` is ours, which has what this needs."""

    timeout = IDLE_S
    server_version = "herder-monitor"
    sys_version = ""
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(HTTPStatus.OK, b"ok\n")
        elif path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"only /metrics and /healthz are here\n")
        elif not self._may_read():
            self._answer(HTTPStatus.UNAUTHORIZED, b"a token is needed\n")
        else:
            self._answer(HTTPStatus.OK, self.server.text())

    def _may_read(self) -> bool:
        if not self.server.token:
            return True
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.encode("utf-8", "replace"), self.server.token.encode()
        )

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", TEXT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: scrapes are no news."""
