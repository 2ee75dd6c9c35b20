"""Points for a vector search that has none: a collection that is made, filled and removed again.

Only what was made here is ever removed; a collection that is there already is refused.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from agent.loadgen.http1 import ProtocolError
from agent.loadgen.postgres import _TLS_REQUEST, PgError, Startup, error_text, message, split
from agent.loadgen.target import Target
from agent.loadgen.vectors import drawn, quoted
from common.bench.spec import LoadSpec
from herder.decoding import UNREADABLE

TIMEOUT_S = 60.0
INDEX_S = 3_600.0  # an index over many points takes its time
BATCH_NUMBERS = 250_000  # in one request: a few megabytes
_OPCLASS = {"l2": "vector_l2_ops", "cosine": "vector_cosine_ops", "dot": "vector_ip_ops"}
_QDRANT = {"l2": "Euclid", "cosine": "Cosine", "dot": "Dot"}


class Store(Protocol):
    """A database that can be filled. Everything raises ValueError."""

    def create(self) -> None:
        """Makes the collection."""

    def fill(self) -> None:
        """Puts the points in, and waits until they can be searched well."""

    def remove(self) -> None:
        """Takes the collection away."""

    def close(self) -> None:
        """Ends the connection."""


@contextlib.contextmanager
def filled(asked_for: LoadSpec, target: Target) -> Iterator[list[str]]:
    """The collection is there while this is entered, where the spec says how many points. Gives a list that says at the
    end why it could not be removed: what was measured is not lost for that. Raises: ValueError, before it is entered.
    """
    left: list[str] = []
    if not asked_for.points:
        yield left
        return
    store = _store(asked_for, target)
    try:
        store.create()
        try:
            try:
                store.fill()
            finally:
                # Nothing of it is to be idle, or known to other processes, while the run takes its time.
                store.close()
            yield left
        finally:
            try:
                store = _store(asked_for, target)
                store.remove()
            except ValueError as error:
                left.append(f"{asked_for.collection} was not removed: {error}")
    finally:
        store.close()


def _store(asked_for: LoadSpec, target: Target) -> Store:
    return PgStore(asked_for, target) if target.login is not None else QdrantStore(asked_for, target)


def _batches(asked_for: LoadSpec) -> Iterator[list[list[float]]]:
    each = max(1, BATCH_NUMBERS // asked_for.vector_dim)
    source = itertools.islice(drawn(f"herder points {asked_for.seed}", asked_for.vector_dim), asked_for.points)
    while batch := list(itertools.islice(source, each)):
        yield batch


class QdrantStore:
    """A collection of Qdrant."""

    def __init__(self, asked_for: LoadSpec, target: Target) -> None:
        self._asked_for, self._target = asked_for, target
        self._base = target.path.removesuffix("/points/query")
        host, port, tls = target.host, target.port, target.tls()
        if tls is not None:
            self._link: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, context=tls)
        else:
            self._link = http.client.HTTPConnection(host, port)
        self._link.timeout = TIMEOUT_S

    def create(self) -> None:
        """Refuses one that is there."""
        status, _ = self._ask("GET", "", allowed=(404,))
        if status == 200:
            raise ValueError(f"the collection {self._asked_for.collection} exists; without points it is used as it is")
        vectors = {"size": self._asked_for.vector_dim, "distance": _QDRANT[self._asked_for.distance]}
        self._ask("PUT", "", {"vectors": vectors})

    def fill(self) -> None:
        """In batches; then until the collection is green: its index is built."""
        number = 0
        for batch in _batches(self._asked_for):
            points = [{"id": number + at, "vector": vector} for at, vector in enumerate(batch)]
            self._ask("PUT", "/points?wait=true", {"points": points})
            number += len(batch)
        deadline = time.monotonic() + INDEX_S
        while True:
            _, found = self._ask("GET", "")
            result = found.get("result")
            if isinstance(result, dict) and result.get("status") == "green":
                return
            if time.monotonic() > deadline:
                raise ValueError(f"the collection {self._asked_for.collection} does not get ready")
            time.sleep(0.2)

    def remove(self) -> None:
        """With its points."""
        self._ask("DELETE", "")

    def close(self) -> None:
        """Ends the connection."""
        self._link.close()

    def _ask(
        self, method: str, path: str, body: Any = None, allowed: tuple[int, ...] = ()
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", **dict(self._target.headers)}
        data = msgspec.json.encode(body) if body is not None else None
        try:
            self._link.request(method, self._base + path, data, headers)
            answer = self._link.getresponse()
            text = answer.read(1 << 20)
        except (OSError, http.client.HTTPException) as error:
            self._link.close()
            raise ValueError(f"{self._target.root}: {error}") from None
        if answer.status != 200 and answer.status not in allowed:
            said = text[:200].decode(errors="replace")
            raise ValueError(f"{method} {self._base + path} answered {answer.status} {said}")
        try:
            found = msgspec.json.decode(text)
        except UNREADABLE:
            found = None
        return answer.status, found if isinstance(found, dict) else {}


class PgStore:
    """A table of PostgreSQL, over one blocking connection."""

    def __init__(self, asked_for: LoadSpec, target: Target) -> None:
        self._asked_for, self._target = asked_for, target
        self._rest = b""
        self._link: socket.socket | ssl.SSLSocket
        try:
            self._link = socket.create_connection((target.host, target.port), TIMEOUT_S)
        except OSError as error:
            raise ValueError(f"{target.root}: {error}") from None
        try:
            self._log_in()
        except (OSError, PgError, ProtocolError) as error:
            self._link.close()
            raise ValueError(f"{target.root}: {error}") from None

    def create(self) -> None:
        """With the extension, which stays."""
        table, column = quoted(self._asked_for.collection), quoted(self._asked_for.vector_column)
        self._run("CREATE EXTENSION IF NOT EXISTS vector")
        dim = self._asked_for.vector_dim
        self._run(f"CREATE TABLE {table} (id bigserial PRIMARY KEY, {column} vector({dim}))")

    def fill(self) -> None:
        """By COPY; then the index and its statistics."""
        asked_for = self._asked_for
        table, column = quoted(asked_for.collection), quoted(asked_for.vector_column)
        for batch in _batches(asked_for):
            self._run(f"COPY {table} ({column}) FROM STDIN", b"".join(msgspec.json.encode(v) + b"\n" for v in batch))
        if asked_for.vector_index == "hnsw":
            self._run(f"CREATE INDEX ON {table} USING hnsw ({column} {_OPCLASS[asked_for.distance]})")
        self._run(f"ANALYZE {table}")

    def remove(self) -> None:
        """With its points."""
        self._run(f"DROP TABLE IF EXISTS {quoted(self._asked_for.collection)}")

    def close(self) -> None:
        """Ends the connection."""
        self._link.close()

    def _log_in(self) -> None:
        login, tls = self._target.login, self._target.tls()
        assert login is not None
        if tls is not None:
            self._link.sendall(_TLS_REQUEST)
            if self._link.recv(1) != b"S":
                raise PgError("the server has no TLS")
            self._link = tls.wrap_socket(self._link, server_hostname=self._target.host)
        # The table of the statement is not there yet.
        startup = Startup(replace(login, statement=""), is_private=tls is not None)
        self._link.sendall(startup.first())
        while not startup.is_done:
            for kind, body in self._hear():
                self._link.sendall(startup.take(kind, body))

    def _hear(self) -> list[tuple[int, bytes]]:
        data = self._link.recv(65_536)
        if not data:
            raise PgError("the server closed the connection")
        found, self._rest = split(self._rest + data)
        return found

    def _run(self, sql: str, copied: bytes = b"") -> None:
        """One statement, with the rows that it copies."""
        error = ""
        try:
            self._link.settimeout(INDEX_S)
            self._link.sendall(message(b"Q", sql.encode() + b"\0"))
            while True:
                for kind, body in self._hear():
                    if kind == ord("G"):
                        self._link.sendall(message(b"d", copied) + message(b"c", b""))
                    elif kind == ord("E"):
                        error = error_text(body)
                    elif kind == ord("Z"):
                        if error:
                            raise ValueError(f"{sql[:60]}: {error}")
                        return
        except (OSError, PgError, ProtocolError) as failed:
            raise ValueError(f"{self._target.root}: {error or failed}") from None
