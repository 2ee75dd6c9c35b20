"""A mover process and the agent's side of its socket, for tests and benchmarks: real process, real store."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agent.mover import protocol
from agent.mover.config import MoverConfig
from common import tickets
from common.clock import boottime_ms
from common.wire import Source

ROOT = Path(__file__).resolve().parents[2]


class MoverClient:
    """Starts a mover on a store and asks it. Use as a context manager."""

    def __init__(self, store: Path, *, env: dict[str, str] | None = None, **settings: Any) -> None:
        settings.setdefault("reserve_bytes", 0)
        settings.setdefault("retry_base_ms", 20)
        settings.setdefault("retry_cap_ms", 200)
        self.store = store
        config = MoverConfig(store_dir=str(store), **settings)
        with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
            file.write(msgspec.json.encode(config))
        mine, theirs = socket.socketpair()
        self._config_file = Path(file.name)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "agent.mover", "--fd", str(theirs.fileno()), "--config", file.name],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self._channel = mine
        self._stream = mine.makefile("rb")
        self._tokens = itertools.count(1)
        self._lock = threading.Condition()
        self._done: dict[str, protocol.Done] = {}
        self.moving: dict[str, list[protocol.Moving]] = {}
        self._is_closed = False
        first = self._read()
        assert isinstance(first, protocol.Ready) or first is None, first
        self.ready = first
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def __enter__(self) -> MoverClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """peer:// address of its blob server."""
        assert self.ready is not None
        return f"peer://{self.ready.host}:{self.ready.port}"

    def close(self) -> None:
        """Stops the mover in order, or cuts it off when it does not answer."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._cleanup()

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._cleanup()

    def _cleanup(self) -> None:
        self._thread.join(timeout=5)
        self._stream.close()
        self._channel.close()
        if self.process.stderr is not None:
            self.process.stderr.close()
        self._config_file.unlink(missing_ok=True)

    def send(self, make: Callable[[str], protocol.Request]) -> str:
        """Sends a request made with a fresh token; returns the token."""
        token = f"t{next(self._tokens)}"
        self._channel.sendall(protocol.frame(make(token)))
        return token

    def wait(self, token: str, timeout_s: float = 60.0) -> protocol.Done:
        """The end of a request."""
        with self._lock:
            assert self._lock.wait_for(lambda: token in self._done or self._is_closed, timeout_s), "no answer"
            return self._done[token]

    def ask(self, make: Callable[[str], protocol.Request], timeout_s: float = 60.0) -> protocol.Done:
        """Sends and waits."""
        return self.wait(self.send(make), timeout_s)

    def fetch(self, model: str, *sources: str | Source, timeout_s: float = 60.0, **more: Any) -> protocol.Done:
        """Fetches a model at revision "r1"."""
        return self.wait(self.start_fetch(model, *sources, **more), timeout_s)

    def start_fetch(self, model: str, *sources: str | Source, **more: Any) -> str:
        """Begins to fetch."""
        rows = tuple(Source(source) if isinstance(source, str) else source for source in sources)
        return self.send(lambda token: protocol.Fetch(token, model, more.pop("revision", "r1"), rows, **more))

    def configure(self, node_id: str, key: bytes) -> None:
        """Gives the ticket key."""
        done = self.ask(lambda token: protocol.Configure(token, node_id, base64.b64encode(key).decode()))
        assert done.error is None

    def last_moving(self, token: str) -> protocol.Moving | None:
        """The latest progress of a request."""
        rows = self.moving.get(token)
        return rows[-1] if rows else None

    def _pump(self) -> None:
        while (answer := self._read()) is not None:
            with self._lock:
                if isinstance(answer, protocol.Moving):
                    self.moving.setdefault(answer.token, []).append(answer)
                elif isinstance(answer, protocol.Done):
                    self._done[answer.token] = answer
                self._lock.notify_all()
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()

    def _read(self) -> protocol.AnyAnswer | None:
        try:
            head = self._stream.read(4)
            if len(head) < 4:
                return None
            answer: protocol.AnyAnswer = protocol.answers.decode(self._stream.read(protocol.LENGTH.unpack(head)[0]))
        except (OSError, ValueError):
            return None
        return answer


def ticket(key: bytes, node_id: str, digest: str, *, ttl_ms: int = 60_000, reader: str = "reader") -> str:
    """A ticket as the head issues it."""
    return tickets.issue(tickets.Ticket("c1", node_id, reader, digest, boottime_ms() + ttl_ms), key)
