"""Runs of load nodes as they would come: rows of a schedule, told apart by who did them."""

from __future__ import annotations

import random
from array import array
from typing import Any

from common.bench.metrics import MS, NS, Limit
from common.bench.outcome import Asked, Outcome
from common.bench.records import COLUMNS, GRID_NS, OUTCOME, Records


def asked_of(
    requests: int = 400,
    *,
    rate: float = 100.0,
    workers: int = 1,
    limits: tuple[Limit, ...] = (),
    **changes: Any,
) -> Asked:
    """An open loop of even arrivals, measured whole."""
    due = array("q", (round(number * NS / rate) for number in range(requests)))
    plan = {
        "model": "m", "loop": "open", "arrivals": "poisson", "rate": rate, "workers": workers, "api": "chat",
        "planned_requests": requests, "url": "http://127.0.0.1:1/v1/chat/completions", "scenarios": ["D(10,5)"],
        "batch": 1, "nodes": 1,
    }  # fmt: skip
    plan |= changes.pop("plan", {})
    values: dict[str, Any] = {
        "plan": plan, "is_open": True, "warmup_s": 0.0, "until_s": requests / rate, "cooldown_s": 0.0, "due_ns": due,
        "limits": limits, "is_exact": False, "prepared": requests, "counted_by": "words", "classes": ("a",),
    }  # fmt: skip
    return Asked(**(values | changes))


def row_of(index: int, scheduled: int, rng: random.Random, *, outcome: str = "ok", tokens: int = 5) -> list[int]:
    """One request, answered after some milliseconds."""
    acted = scheduled + rng.randrange(50_000)
    sent = acted + rng.randrange(100_000)
    first = sent + rng.randrange(5 * MS, 80 * MS)
    last = first + rng.randrange(1 * MS, 200 * MS)
    values = dict.fromkeys(COLUMNS, 0) | {
        "index": index, "scheduled": scheduled, "acted": acted, "sent": sent, "first": first, "first_output": first,
        "last": last, "end": last + 1_000, "chunks": tokens, "stall": 10 * MS, "input": 10, "counted_input": 10,
        "output": tokens, "first_tokens": 1, "asked": tokens, "outcome": OUTCOME[outcome],
        "status": 200 if outcome == "ok" else 500, "bytes": 100, "source": 0,
    }  # fmt: skip
    return [values[name] for name in COLUMNS]


def outcome_of(rows: list[list[int]], rng: random.Random, gaps: list[int]) -> Outcome:
    """What a node that did these rows left behind, gaps and tokens included. gaps: each gap is added to it."""
    records = Records()
    for row in rows:
        records.add(row)
        first, last = row[COLUMNS.index("first")], row[COLUMNS.index("last")]
        for _ in range(4):
            gap = rng.randrange(100_000, 90_000_000)
            records.icl.add(gap)
            records.itl.add(gap)
            gaps.append(gap)
        for number in range(5):
            at = (first + (last - first) * number // 4) // GRID_NS
            records.grid[at] = records.grid.get(at, 0) + 1
        records.lag.add(rng.randrange(1_000, 60_000))
    records.count("reads", len(rows))
    records.workers.append({"cpu_s": 0.01, "wall_s": 1.0})
    return Outcome(records, start_wall_s=1_700_000_000.0 + rng.random(), wall_s=5.0)


def parts_of(
    asked: Asked, parts: int, *, seed: int = 1, failing: float = 0.0, gaps: list[int] | None = None
) -> list[Outcome]:
    """The whole schedule as so many load nodes do it: every n-th request, by worker. gaps: takes every raw gap."""
    rng = random.Random(seed)
    workers = int(asked.plan["workers"])
    everywhere = parts * workers
    rows: list[list[list[int]]] = [[] for _ in range(parts)]
    for index, at in enumerate(asked.due_ns):
        kind = "http_5xx" if rng.random() < failing else "ok"
        rows[index % everywhere // workers].append(row_of(index, at, rng, outcome=kind))
    return [outcome_of(part, rng, [] if gaps is None else gaps) for part in rows]
