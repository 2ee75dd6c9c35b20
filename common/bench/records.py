"""What is kept of a run: one row of whole numbers per request, histograms of gaps, counts per 10 ms.

Rows are exact and small (no text), gaps between tokens are too many to keep and go into histograms. Everything here
merges: rows are put behind each other, counts are added.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.bench.histogram import Histogram

COLUMNS = (
    "index",
    "class_id",
    "turn",
    "scheduled",  # when it was to be sent; all times are ns after the start of the run, -1: never
    "acted",  # when the generator turned to it
    "sent",  # just before its last byte was handed to the kernel
    "first",  # first output, reasoning included
    "first_output",  # first output that is not reasoning
    "last",  # last output; for an answer in one piece, its end
    "end",  # end of the body
    "connect",  # how long a new connection took, TLS included; 0 on a kept one
    "chunks",  # pieces of output
    "stall",  # longest gap between two of them
    "input",  # prompt tokens as the server counted, -1: it did not
    "counted_input",  # prompt tokens as counted here
    "output",  # answer tokens as the server counted, else by the tokenizer, else -1
    "first_tokens",  # tokens of the first piece, 1 where unknown
    "asked",  # answer tokens asked for
    "outcome",
    "status",
    "bytes",
    "source",  # who counted `output`
    "endpoint",  # number of the server that was asked
)
WIDTH = len(COLUMNS)
AT = {name: number for number, name in enumerate(COLUMNS)}
OUTCOMES = (
    "ok",
    "connect",
    "tls",
    "no_socket",  # this machine had no descriptor or port left: the generator's own limit
    "timeout_connect",
    "timeout_ttft",
    "timeout_idle",
    "timeout_total",
    "http_4xx",
    "http_429",
    "http_5xx",
    "http_other",
    "stream_error",  # an error inside an answer that began with 200
    "truncated",  # the stream ended without [DONE] or a finish reason
    "empty",  # a good end, and no output
    "reset",  # the connection ended before the answer did
    "protocol",
    "cancelled",
    "query_error",  # a database refused the query, or found nothing
)
OUTCOME = {name: number for number, name in enumerate(OUTCOMES)}
SOURCES = ("server", "tokenizer", "chunks", "none")
GRID_NS = 10_000_000
MAX_ERROR_SAMPLES = 5


@dataclass(slots=True)
class Records:
    """The rows and counts of one process, or of all."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    icl: Histogram = field(default_factory=Histogram)
    """Gaps between pieces, of requests of the window."""
    itl: Histogram = field(default_factory=Histogram)
    """The same, spread over tokens."""
    lag: Histogram = field(default_factory=Histogram)
    """Time between the kernel's stamp of a read and the read, over the whole run."""
    grid: dict[int, int] = field(default_factory=dict)
    """Output tokens by GRID_NS of their arrival."""
    errors: dict[str, list[str]] = field(default_factory=dict)
    """A few messages of each kind of failure."""
    facts: dict[str, int] = field(default_factory=dict)
    """Counts that add up: reads, connections, tokens that came several in one read, ..."""
    workers: list[dict[str, Any]] = field(default_factory=list)
    """What each process used."""

    def count(self, fact: str, number: int = 1) -> None:
        """Adds to a fact."""
        self.facts[fact] = self.facts.get(fact, 0) + number

    def note_error(self, outcome: str, message: str) -> None:
        """Keeps a message, the first few of each kind."""
        kept = self.errors.setdefault(outcome, [])
        if len(kept) < MAX_ERROR_SAMPLES and message and message not in kept:
            kept.append(message[:300])

    def merge(self, other: Records) -> None:
        """Adds another process's records."""
        self.rows.extend(other.rows)
        self.icl.merge(other.icl)
        self.itl.merge(other.itl)
        self.lag.merge(other.lag)
        for at, tokens in other.grid.items():
            self.grid[at] = self.grid.get(at, 0) + tokens
        for outcome, messages in other.errors.items():
            for message in messages:
                self.note_error(outcome, message)
        for fact, number in other.facts.items():
            self.count(fact, number)
        self.workers.extend(other.workers)

    def __len__(self) -> int:
        """Requests."""
        return len(self.rows) // WIDTH

    def column(self, name: str) -> array[int]:
        """One column."""
        return self.rows[AT[name] :: WIDTH]

    def columns(self, *names: str) -> Iterable[tuple[int, ...]]:
        """Several columns, row by row."""
        return zip(*(self.column(name) for name in names), strict=True)

    def add(self, row: Sequence[int]) -> None:
        """Keeps a request."""
        assert len(row) == WIDTH
        self.rows.extend(row)

    def to_wire(self) -> dict[str, Any]:
        """As plain data for a pipe; its rows are these, not copies."""
        return {
            "rows": memoryview(self.rows).cast("B"),
            "icl": self.icl.to_wire(),
            "itl": self.itl.to_wire(),
            "lag": self.lag.to_wire(),
            "grid": self.grid,
            "errors": self.errors,
            "facts": self.facts,
            "workers": self.workers,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Records:
        """What `to_wire` wrote."""
        rows = array("q")
        rows.frombytes(data["rows"])
        return cls(
            rows,
            Histogram.from_wire(data["icl"]),
            Histogram.from_wire(data["itl"]),
            Histogram.from_wire(data["lag"]),
            {int(at): tokens for at, tokens in data["grid"].items()},
            data["errors"],
            data["facts"],
            data["workers"],
        )
