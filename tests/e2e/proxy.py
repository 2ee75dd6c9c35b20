"""A TCP proxy that stands between an agent and its head, so that a test can cut the wire, or freeze one direction.

Frozen, a direction still takes connections and bytes, as a network does that loses packets: nobody is told.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

PIECE_BYTES = 65_536


class Proxy:
    """Use as a context manager. `target` may change while it runs; connections made before stay where they are."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._flows = {"up": threading.Event(), "down": threading.Event()}
        self._is_refusing = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        for flow in self._flows.values():
            flow.set()
        self._acceptor = threading.Thread(target=self._accept, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        """As a head's address."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it and every connection. May be called again."""
        self._is_closed = True
        # A thread that waits in accept() is not woken by close() alone.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        self.heal()
        self._reset()

    def freeze(self, *directions: str) -> None:
        """Lets nothing more through: "up" (agent to head), "down" (head to agent)."""
        for direction in directions:
            self._flows[direction].clear()

    def cut(self) -> None:
        """Breaks every connection and refuses new ones."""
        self._is_refusing = True
        self._reset()

    def heal(self) -> None:
        """Everything passes again; what was held back is delivered."""
        self._is_refusing = False
        for flow in self._flows.values():
            flow.set()

    def _reset(self) -> None:
        with self._lock:
            ended, self._open = self._open, set()
        for end in ended:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._connect, args=(client,), name="proxy connection", daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            if self._is_refusing:
                raise ConnectionRefusedError
            head = socket.create_connection(self.target, timeout=10)
            head.settimeout(None)
        except OSError:
            client.close()
            return
        with self._lock:
            self._open |= {client, head}
        down = threading.Thread(target=self._pump, args=(head, client, "down"), name="proxy down", daemon=True)
        down.start()
        self._pump(client, head, "up")
        down.join()
        with self._lock:
            self._open -= {client, head}
        client.close()
        head.close()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while piece := source.recv(PIECE_BYTES):
                self._flows[direction].wait()
                sink.sendall(piece)
        except OSError:
            pass  # one end broke: so does the other
        self._flows[direction].wait()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
