"""Vector search: queries of drawn or given vectors for Qdrant (HTTP) and pgvector (PostgreSQL), written before the run.

Drawn vectors are even in the cube from -1 to 1, with four digits; stored points are drawn alike, from another seed.
Sources: Qdrant's REST reference (collections, points, query); pgvector's README.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from agent.loadgen.apis import APIS, Api
from agent.loadgen.postgres import query
from agent.loadgen.target import Target
from agent.loadgen.workload import MAX_PREPARED_BYTES, Item, Workload
from common.bench.spec import LoadSpec
from herder.decoding import UNREADABLE

MAX_PREPARED = 10_000  # queries; a longer run sends them again
MAX_FILE = 2 << 30
MAX_LINE = 4 << 20
MAX_ROWS = 100_000
OPERATORS = {"l2": "<->", "cosine": "<=>", "dot": "<#>"}
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)?")
_LEVELS = [round((number - 32_768) / 32_768, 4) for number in range(65_536)]


def api_of(asked_for: LoadSpec) -> Api:
    """The API with the collection in its path."""
    api = APIS[asked_for.api or ""]
    if api.name == "pgvector":
        return api
    path = f"/collections/{asked_for.collection}/points/query"
    return replace(api, path=path, tail=path)


def statement_of(asked_for: LoadSpec) -> str:
    """The query that every connection prepares."""
    table, column = quoted(asked_for.collection), quoted(asked_for.vector_column)
    order = OPERATORS[asked_for.distance]
    return f"SELECT id FROM {table} ORDER BY {column} {order} $1 LIMIT {asked_for.top_k}"  # noqa: S608  # checked names


def quoted(name: str) -> str:
    """A name of one or two parts, as SQL writes it; the spec has been checked."""
    return ".".join(f'"{part}"' for part in name.split("."))


def settings_of(asked_for: LoadSpec) -> tuple[tuple[str, str], ...]:
    """Parameters of a pgvector run: settings of its sessions, as hnsw.ef_search. Raises: ValueError."""
    for name in asked_for.parameters:
        if not _SETTING.fullmatch(name) or name in ("user", "database", "replication", "options"):
            raise ValueError(f"{name!r} is not a setting of PostgreSQL")
    texts = ((name, str(value)) for name, value in asked_for.parameters.items())
    return tuple((name, text) for name, text in texts if "\0" not in text)


def drawn(seed: str, dim: int) -> Iterator[list[float]]:
    """Vectors without an end, the same for the same seed."""
    rng = Random(seed)
    while True:
        yield [_LEVELS[number] for number in array("H", rng.randbytes(2 * dim))]


def read(path: Path) -> list[list[float]]:
    """Vectors of a file of JSON lines, all of one length. Raises: ValueError with the line; OSError."""
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path.name} is larger than 2 GiB")
    decoder = msgspec.json.Decoder(list[float])
    found: list[list[float]] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if not line.strip():
                continue
            try:
                vector = decoder.decode(line)
            except UNREADABLE as error:
                raise ValueError(f"{path.name}, line {number}: not a vector: {error}") from None
            if not vector or len(vector) != len(found[0] if found else vector):
                raise ValueError(f"{path.name}, line {number}: {len(vector)} numbers; all vectors have one length")
            found.append(vector)
            if len(found) >= MAX_ROWS:
                break
    if not found:
        raise ValueError(f"{path.name} has no vectors")
    return found


def prepare(asked_for: LoadSpec, target: Target, count: int) -> Workload:
    """The queries of a run; count: how many it may need. Raises: ValueError; OSError."""
    given = read(Path(asked_for.vectors)) if asked_for.vectors else None
    if given is not None and asked_for.vector_dim not in (0, len(given[0])):
        raise ValueError(f"vectors of {len(given[0])} numbers, and vector_dim is {asked_for.vector_dim}")
    source = iter(given) if given is not None else drawn(f"herder vectors {asked_for.seed}", asked_for.vector_dim)
    items: list[Item] = []
    held = 0
    for vector in source:
        wire = _query(asked_for, target, vector)
        items.append(Item(wire, 0, 0, 0))
        held += len(wire) + 150
        if len(items) >= min(count, MAX_PREPARED) or held > MAX_PREPARED_BYTES:
            break
    return Workload(tuple(items), (str(asked_for.api),), "words", len(items) < count)


def _query(asked_for: LoadSpec, target: Target, vector: list[float]) -> bytes:
    if target.login is not None:
        return query(msgspec.json.encode(vector).decode())
    body: dict[str, Any] = {"query": vector, "limit": asked_for.top_k, "with_payload": False}
    return target.request("POST", msgspec.json.encode(body | dict(asked_for.parameters)))
