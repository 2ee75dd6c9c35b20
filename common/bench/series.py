"""What was sampled beside the load, read from the CSV files of monitors: columns of numbers on wall time.

A file has a line per sample and a column `timestamp` (seconds since the epoch, or ISO 8601; without a zone: UTC). An
engines' file holds several engines: a column `replica` says whose line it is.
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Columns = dict[str, list[float | None]]
TIME = ("timestamp", "time", "t_s")
WHOSE = ("replica", "engine", "endpoint", "url", "target")
MAX_COLUMNS = 400
MAX_ROWS = 2_000_000


def series_of(nodes: Mapping[str, str], engines: Mapping[str, str]) -> dict[str, dict[str, Columns]]:
    """`{"nodes": {node: {"t_s": [...], column: [...]}}, "engines": {replica: ...}}` from the texts of the files.

    nodes: node -> its monitor.csv. engines: node -> its engine.csv. An engine that several nodes sampled is taken from
    the one with the most samples. What cannot be read is left out: a line that was cut off does not spoil the rest.
    """
    found: dict[str, dict[str, Columns]] = {"nodes": {}, "engines": {}}
    for node, text in nodes.items():
        for columns in _read(text).values():
            found["nodes"][node] = columns
            break
    for node, text in engines.items():
        for whose, columns in _read(text).items():
            name = whose or node
            there = found["engines"].get(name)
            if there is None or len(there["t_s"]) < len(columns["t_s"]):
                found["engines"][name] = columns
    return found


def _read(text: str) -> dict[str, Columns]:
    """Columns by whose they are."""
    reader = csv.reader(io.StringIO(text))
    try:
        heads = [head.strip() for head in next(reader)][:MAX_COLUMNS]
    except (StopIteration, csv.Error):
        return {}
    at = next((heads.index(name) for name in TIME if name in heads), None)
    if at is None:
        return {}
    whose_at = next((heads.index(name) for name in WHOSE if name in heads), None)
    rows: dict[str, list[tuple[float, list[float | None]]]] = {}
    for row in _rows(reader):
        when = moment(row[at]) if len(row) > at else None
        if when is None:
            continue
        whose = row[whose_at].strip() if whose_at is not None and len(row) > whose_at else ""
        rows.setdefault(whose, []).append((when, [number(cell) for cell in row[: len(heads)]]))
    return {whose: _columns(heads, {at, whose_at}, part) for whose, part in rows.items()}


def _rows(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    try:
        for count, row in enumerate(reader):
            if count >= MAX_ROWS:
                return
            yield row
    except csv.Error:
        return  # a file that was cut off within quotes: what stands before it counts


def _columns(heads: Sequence[str], left_out: set[int | None], rows: list[tuple[float, list[float | None]]]) -> Columns:
    rows.sort(key=lambda row: row[0])
    columns: Columns = {"t_s": [when for when, _ in rows]}
    for place, head in enumerate(heads):
        if place in left_out or not head or head in columns:
            continue
        values = [cells[place] if place < len(cells) else None for _, cells in rows]
        if any(value is not None for value in values):
            columns[head] = values
    return columns


def moment(text: str) -> float | None:
    """Seconds since the epoch of a timestamp; None for none."""
    value = number(text)
    if value is not None:
        return value / 1000 if value > 1e11 else value  # milliseconds
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def number(text: str) -> float | None:
    """A finite number; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def within(columns: Mapping[str, Sequence[float | None]], begin_s: float, end_s: float) -> dict[str, list[Any]]:
    """The samples of a stretch of time, with times after its begin. Times rise, as `series_of` gives them."""
    times: Sequence[Any] = columns.get("t_s", ())
    first, last = bisect.bisect_left(times, begin_s), bisect.bisect_right(times, end_s)
    cut: dict[str, list[Any]] = {"t_s": [at - begin_s for at in times[first:last]]}
    if first < last:
        cut |= {name: list(values[first:last]) for name, values in columns.items() if name != "t_s"}
    return cut


def bounded(columns: Mapping[str, Sequence[float | None]], most: int) -> dict[str, Any]:
    """At most so many samples: of each stretch its begin, and of each column the least and the greatest in it.

    Columns that are short enough stay as they are; others become `{"min": [...], "max": [...]}`.
    """
    times = columns.get("t_s", ())
    count = len(times)
    if count <= most:
        return {name: list(values) for name, values in columns.items()}
    edges = [bucket * count // most for bucket in range(most + 1)]
    made: dict[str, Any] = {"t_s": [times[edge] for edge in edges[:-1]]}
    for name, values in columns.items():
        if name == "t_s":
            continue
        parts = [
            [value for value in values[begin:end] if value is not None] for begin, end in itertools.pairwise(edges)
        ]
        made[name] = {
            "min": [min(part, default=None) for part in parts],
            "max": [max(part, default=None) for part in parts],
        }
    return made
