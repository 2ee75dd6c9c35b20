"""Wrote `journal_v2.sqlite`: the objects of version 1, and a benchmark with a point and a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from head.core import objects
from head.core.records import Record

_spec = importlib.util.spec_from_file_location("make_journal_v1", Path(__file__).with_name("make_journal_v1.py"))
assert _spec is not None
assert _spec.loader is not None
first = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(first)

TARGET = Path(__file__).with_name("journal_v2.sqlite")
T = first.T
RECIPE = {
    "name": "tiny",
    "server": {"urls": ["http://10.0.0.9:8000"]},
    "load": {"rate": 5.0, "duration": 10.0},
    "slo": {"ttft": 300.0},
    "search": {"max_points": 8},
}
OBJECTS: tuple[objects.Object, ...] = (
    *first.OBJECTS,
    objects.Benchmark(
        "bench-1", "tiny", RECIPE, "c" * 64, "admin(key-1)", "running", T, 9, "req-4", 2, ("n1",), (),
        ("bench-1.monitor.n1",), (objects.Part("bench-1.monitor.n1", "n1", "lost", ("monitor.csv",), first.ERROR),),
        "chat", started_ms=T, is_degraded=True, best={"over": "rate", "load": 4.0}, note="waits",
        facts={"head": "0.1.0"},
    ),
    objects.Point(
        "bench-1", 0, {"rate": 4.0}, 1, 7, 0, 1, "completed", ("bench-1.0.0",),
        (objects.Part("bench-1.0.0", "n1", "done", ("load.bin",)),), urls=("http://10.0.0.9:8000",),
        servers=("chat-0@n1/7/0/42",), since_ms=T, started_ms=T, fire_ms=T, ended_ms=T, skew_ms=0.4, coverage=0.5,
        reasons=("degraded",), figures={"req_s": 3.9},
    ),
    objects.Run(
        "bench-1.1.0", "bench-1", "n1", "load", 10, "fired", "running", "req-4", T, 1, 0, 2, "d" * 64, 5_000_000_000, 3,
        ("generator.log",),
    ),
)  # fmt: skip


def records() -> list[Record]:
    """As version 1."""
    made: list[Record] = first.records(OBJECTS)
    return made


if __name__ == "__main__":
    first.write(TARGET, records())
