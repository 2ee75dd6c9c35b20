"""Reports of benchmarks that were never run: rows of a simulated server, judged and reported by the real code.

The server answers `slots` requests at a time; each token takes longer the more of them there are, so that a sweep
bends as that of an engine does.
"""

from __future__ import annotations

import heapq
import random
from typing import Any

import msgspec

from common.bench import report as report_of
from common.bench.metrics import MS, Limit
from common.bench.outcome import Asked, Outcome
from common.bench.records import COLUMNS, GRID_NS, OUTCOME, Records
from common.bench.schedule import Flat, draw

START_S = 1_790_000_000.0


def outcome_of(
    *, rate: float, seconds: float, seed: int = 0, tokens: int = 80, slots: int = 24, late_ms: float = 0.0,
    failing: float = 0.0, said: str = "boom",
) -> tuple[Asked, Outcome]:  # fmt: skip
    """A run of an open loop."""
    rng = random.Random(f"bench {seed}")
    schedule = draw(Flat(rate), seed=seed, duration_s=seconds)
    records = Records()
    busy: list[int] = []
    for index, due in enumerate(schedule.times_ns):
        acted = due + int(rng.expovariate(1 / (0.02 + late_ms)) * MS)
        while busy and busy[0] <= acted:
            heapq.heappop(busy)
        begin = acted if len(busy) < slots else heapq.nsmallest(len(busy) - slots + 1, busy)[-1]
        output = max(2, round(rng.gauss(tokens, tokens / 4)))
        gap = int((8 + 0.6 * min(len(busy), slots)) * MS)
        first = begin + int(rng.lognormvariate(3.2, 0.35) * MS)
        last = first
        row = dict.fromkeys(COLUMNS, 0)
        if rng.random() < failing:
            end = acted + 30 * MS
            row |= {"index": index, "scheduled": due, "acted": acted, "sent": acted, "first": -1, "first_output": -1,
                    "last": end, "end": end, "input": -1, "counted_input": 100, "output": -1, "first_tokens": 1,
                    "asked": tokens, "outcome": OUTCOME["http_5xx"], "status": 503, "source": 3}  # fmt: skip
            records.add([row[name] for name in COLUMNS])
            records.note_error("http_5xx", said)
            continue
        stall = 0
        for _ in range(output - 1):
            step = int(gap * rng.uniform(0.8, 1.25))
            stall = max(stall, step)
            last += step
            records.icl.add(step)
            records.itl.add(step)
            records.grid[last // GRID_NS] = records.grid.get(last // GRID_NS, 0) + 1
        records.grid[first // GRID_NS] = records.grid.get(first // GRID_NS, 0) + 1
        records.lag.add(int(rng.expovariate(1 / 0.03) * MS))
        heapq.heappush(busy, last)
        row |= {"index": index, "scheduled": due, "acted": acted, "sent": acted, "first": first, "first_output": first,
                "last": last, "end": last + MS, "chunks": output, "stall": stall, "input": 100, "counted_input": 100,
                "output": output, "first_tokens": 1, "asked": output, "bytes": output * 60}  # fmt: skip
        records.add([row[name] for name in COLUMNS])
    records.workers.append({"cpu_s": seconds * 0.1, "wall_s": seconds, "rss_bytes": 40_000_000})
    plan = {
        "url": "http://gpu1:8000/v1/chat/completions", "model": "llama-3.1-8b", "api": "chat", "loop": "open",
        "schedule": schedule.name, "seed": seed, "scenarios": ["N(100,20)/(80,20)"], "workers": 1, "rate": rate,
    }  # fmt: skip
    asked = Asked(
        plan, True, min(2.0, seconds / 5), seconds, 0.0, schedule.times_ns, [Limit("ttft", 500.0)], True,
        len(schedule.times_ns),
    )  # fmt: skip
    return asked, Outcome(records, START_S + seed * 100, wall_s=seconds + 1)


def report(**options: Any) -> dict[str, Any]:
    """The report of such a run as plain data."""
    found: dict[str, Any] = msgspec.to_builtins(report_of.build(*outcome_of(**options)))
    return found


def point(number: int, changes: dict[str, Any], made: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A report with its PointView, as `render` and `compare` take it."""
    from common.bench.figures import figures_of

    view = {
        "number": number, "changes": changes, "repetition": 0, "status": "completed", "is_valid": made["is_valid"],
        "reasons": [entry["code"] for entry in made["reasons"]], "coverage": 1.0, "skew_ms": 0.0,
        "figures": figures_of(made), "started_ms": int(made["created"] * 1000), "ended_ms": None, "error": None,
    } | others  # fmt: skip
    return made | {"point": view}


def benchmark(reports: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """A BenchmarkView of these points, as plain data."""
    points = [entry["point"] for entry in reports]
    return {
        "id": "bench-3f9a1c7e20b4", "name": "chat-sweep", "status": "completed", "actor": "key-1",
        "recipe_sha256": "ab" * 32, "model": "llama-3.1-8b", "service": "chat", "points_done": len(points),
        "points_planned": len(points), "is_valid": all(entry["is_valid"] for entry in points),
        "is_degraded": any(entry["coverage"] < 1 for entry in points), "note": "",
        "created_ms": int(START_S * 1000), "started_ms": int(START_S * 1000), "ended_ms": int(START_S * 1000) + 600_000,
        "load_nodes": ["load1", "load2"], "server_nodes": ["gpu1"],
        "recipe": {"slo": {"ttft": 500.0, "attainment": 0.99, "error_rate": 0.01}}, "points": points, "runs": [],
        "best": {}, "labels": {}, "error": None,
        "facts": {"engines": [{"replica": "chat-0", "argv": ["vllm", "serve", "--tensor-parallel-size", "2"]}]},
    } | others  # fmt: skip
