"""A server that answers each request by a script: bytes, waits for the test, ends. One thread per connection."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

EVENT = 'data: {{"choices":[{{"index":0,"delta":{{"content":"{}"}},"finish_reason":null}}]}}\n\n'
USAGE = 'data: {{"choices":[],"usage":{{"prompt_tokens":{},"completion_tokens":{}}}}}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
Step = bytes | threading.Event | None
"""Bytes to send, an event to wait for, None to close."""


def chunk(text: str) -> bytes:
    """An HTTP chunk."""
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(tokens: int = 3, prompt: int = 5) -> list[Step]:
    """A good streamed answer."""
    role = 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    events = [chunk(EVENT.format(f"t{number}")) for number in range(tokens)]
    return [STREAM, chunk(role), *events, chunk(USAGE.format(prompt, tokens)), chunk("data: [DONE]\n\n"), END]


def whole(body: bytes, status: str = "200 OK") -> list[Step]:
    """An answer in one piece."""
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return [head % (status.encode(), len(body)) + body]


@dataclass
class Server:
    """What it saw."""

    port: int
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    sent_ns: list[tuple[int, int]] = field(default_factory=list)
    """(before, after) each send, on CLOCK_MONOTONIC."""
    closed: threading.Event = field(default_factory=threading.Event)
    """A client has closed a connection."""


@contextmanager
def serving(script: Callable[[int], Sequence[Step]], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Serves on loopback; script(number) is the answer to the number-th request."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = Server(listener.getsockname()[1])
    lock, open_sockets = threading.Lock(), []

    def talk(sock: socket.socket) -> None:
        try:
            with tls.wrap_socket(sock, server_side=True) if tls is not None else sock as link:
                link.settimeout(30)
                buffer = b""
                while (request := _request(link, buffer)) is not None:
                    asked, buffer = request
                    with lock:
                        number = len(server.requests)
                        server.requests.append(asked)
                    for step in script(number):
                        if step is None:
                            return
                        if isinstance(step, threading.Event):
                            step.wait(30)
                            continue
                        before = time.monotonic_ns()
                        link.sendall(step)
                        server.sent_ns.append((before, time.monotonic_ns()))
        except OSError:
            pass  # the client has gone
        finally:
            server.closed.set()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.connections += 1
            open_sockets.append(sock)
            threading.Thread(target=talk, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for sock in open_sockets:
            sock.close()
        thread.join(10)


def _request(link: socket.socket, buffer: bytes) -> tuple[bytes, bytes] | None:
    """(the next request, what came behind it); None at the end."""
    while True:
        head, blank, rest = buffer.partition(b"\r\n\r\n")
        if blank:
            found = re.search(rb"content-length: *(\d+)", head.lower())
            length = int(found[1]) if found else 0
            if len(rest) >= length:
                return head + blank + rest[:length], rest[length:]
        data = link.recv(65_536)
        if not data:
            return None
        buffer += data
