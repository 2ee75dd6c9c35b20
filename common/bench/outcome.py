"""A finished run as it is kept and sent: what was asked and what was measured, in one file of a known layout.

The file is msgpack: `{"schema": 1, "asked": {...}, "outcome": {...}}`. Files of the parts of one run, one from each
load node, merge into one outcome: rows behind each other, counts added, so that every figure is made from raw rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from common.bench.metrics import Limit
from common.bench.records import Records
from herder.decoding import UNREADABLE

SCHEMA = 1


@dataclass(slots=True)
class Outcome:
    """What a run left behind."""

    records: Records
    start_wall_s: float = 0.0
    is_interrupted: bool = False
    stopped_ns: int | None = None
    """When it was interrupted, after the start."""
    lost_workers: int = 0
    wall_s: float = 0.0
    said: list[str] = field(default_factory=list)

    def merge(self, other: Outcome) -> None:
        """Adds the outcome of another part of the same run, which had the same start."""
        self.records.merge(other.records)
        self.is_interrupted |= other.is_interrupted
        stops = [at for at in (self.stopped_ns, other.stopped_ns) if at is not None]
        self.stopped_ns = min(stops, default=None)
        self.lost_workers += other.lost_workers
        self.wall_s = max(self.wall_s, other.wall_s)
        self.said += other.said


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run was to be, as far as the report needs it. The same for every part of one run."""

    plan: Mapping[str, Any]
    """Everything that was asked, as plain data."""
    is_open: bool
    warmup_s: float
    until_s: float | None
    """Nothing was to be sent from here on; None: the run ends with its last answer."""
    cooldown_s: float
    due_ns: Sequence[int]
    """The whole schedule, of all parts."""
    limits: Sequence[Limit]
    is_exact: bool
    prepared: int = 0
    """How many conversations were written beforehand."""
    counted_by: str = "words"
    """Who counted the prompts' tokens: words or tokenizer."""
    classes: tuple[str, ...] = ()
    """Names of the classes of requests, by their number in the records."""
    endpoints: tuple[str, ...] = ()
    """The servers that were asked, by their number in the records."""
    is_offline: bool = False
    """Everything was due at the start: nothing of it is ever late."""


def encode(asked: Asked, outcome: Outcome) -> bytes:
    """The file."""
    due = asked.due_ns if isinstance(asked.due_ns, array) else array("q", asked.due_ns)
    return msgspec.msgpack.encode(
        {
            "schema": SCHEMA,
            "asked": {
                "plan": dict(asked.plan),
                "is_open": asked.is_open,
                "warmup_s": asked.warmup_s,
                "until_s": asked.until_s,
                "cooldown_s": asked.cooldown_s,
                "due_ns": due.tobytes(),
                "limits": [[limit.metric, limit.below_ms] for limit in asked.limits],
                "is_exact": asked.is_exact,
                "prepared": asked.prepared,
                "counted_by": asked.counted_by,
                "classes": list(asked.classes),
                "endpoints": list(asked.endpoints),
                "is_offline": asked.is_offline,
            },
            "outcome": {
                "records": outcome.records.to_wire(),
                "start_wall_s": outcome.start_wall_s,
                "is_interrupted": outcome.is_interrupted,
                "stopped_ns": outcome.stopped_ns,
                "lost_workers": outcome.lost_workers,
                "wall_s": outcome.wall_s,
                "said": outcome.said[:100],
            },
        }
    )


def decode(data: bytes) -> tuple[Asked, Outcome]:
    """What `encode` wrote. Raises: ValueError for anything else."""
    try:
        found = msgspec.msgpack.decode(data, strict=False)
        if found["schema"] != SCHEMA:
            raise ValueError(f"a result file of schema {found['schema']}; this version reads {SCHEMA}")
        asked, outcome = found["asked"], found["outcome"]
        due = array("q")
        due.frombytes(asked.pop("due_ns"))
        limits = [Limit(metric, below) for metric, below in asked.pop("limits")]
        classes, endpoints = tuple(asked.pop("classes")), tuple(asked.pop("endpoints", ()))
        records = Records.from_wire(outcome.pop("records"))
        made = Asked(due_ns=due, limits=limits, classes=classes, endpoints=endpoints, **asked)
        return made, Outcome(records, **outcome)
    except (KeyError, TypeError, AttributeError, *UNREADABLE) as error:
        raise ValueError(f"not a result file: {type(error).__name__}: {error}") from None
