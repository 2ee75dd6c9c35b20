"""How wrong the training-memory model is: cross-validated, with whole sources left out, and on arithmetic rows.

    python -m benchmarks.planner_memory [--truth FILE] [--write]

Without --truth the shipped rows are used. --truth takes a file of rows in the exchange form (a list with id, kind,
source, conditions, expected): measured peaks among them are predicted with the shipped constants, which is the test
when the constants have not seen them, and arithmetic rows are recomputed. --write (with --truth) refits the constants
to those rows and ships both. Bars: 8 % mean error, every run out of memory caught, no measured run called impossible.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from head.planner.calibration import memory_fit
from head.planner.calibration.memory_analytic import Analytic, analytic
from head.planner.calibration.memory_rows import MemoryRow, encode_rows, shipped_rows
from head.planner.calibration.memory_truth import Unusable, row_of
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.presets import lookup
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import constants, estimate_memory
from head.planner.training.search import search

DATA = Path(__file__).resolve().parents[1] / "head" / "planner" / "data"
HEADER = " rows   MAPE median    bias    max in 80%  OOMs missed wrong no"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.truth is None:
        show(memory_fit.table(shipped_rows(), constants()), "shipped rows, constants fitted without the row")
    else:
        rows, arithmetic, left = read(json.loads(options.truth.read_text()))
        if options.write:
            write(rows)
        show_shipped(rows)
        show(memory_fit.table(rows, constants()), "these rows, constants fitted without the row")
        show_arithmetic(arithmetic)
        for reason in left:
            print("left out:", reason)
    speed()


def read(raw: list[dict[str, Any]]) -> tuple[list[MemoryRow], list[Analytic], list[str]]:
    """(measured rows, arithmetic figures, what was left out and why)."""
    rows, figures, left = [], [], []
    for row in raw:
        try:
            if row["kind"] == "peak_training_memory":
                rows.append(row_of(row))
            else:
                figures += analytic(row)
        except Unusable as exc:
            left.append(f"{row['id']}: {exc}")
    return rows, figures, left


def write(rows: list[MemoryRow]) -> None:
    """Refits the constants and writes them and the rows into the package."""
    sources = len({row.source for row in rows})
    name = f"{len(rows)} published training peaks of {sources} sources (data/memory_rows.json)"
    fitted = memory_fit.calibrated(rows, name)
    (DATA / "memory_constants.json").write_bytes(msgspec.json.format(msgspec.json.encode(fitted)) + b"\n")
    (DATA / "memory_rows.json").write_bytes(encode_rows(tuple(rows)))
    constants.cache_clear()
    shipped_rows.cache_clear()


def show(lines: list[memory_fit.MemoryErrors], title: str) -> None:
    """One line a group."""
    print(f"\n{title}\n{'':62}{HEADER}")
    for line in lines:
        print(
            f"{line.name:62}{line.rows:5d} {line.mape:6.1%} {line.median:6.1%} {line.bias:+7.1%} {line.largest:6.1%} "
            f"{line.covered:6.0%} {line.ooms:5d} {line.oom_missed:6d} {line.called_impossible:8d}"
        )


def show_shipped(rows: list[MemoryRow]) -> None:
    """Errors with the shipped constants, of all rows and of those that do not ship."""
    sigma, known = constants().sigma_unseen, {row.id for row in shipped_rows()}
    every = [(row, constants()) for row in rows]
    lines = [memory_fit.errors("all rows, shipped constants", every, sigma)]
    new = [pair for pair in every if pair[0].id not in known]
    if new:
        lines.append(memory_fit.errors("rows that do not ship, shipped constants", new, sigma))
    show(lines, "shipped constants")


def show_arithmetic(figures: list[Analytic]) -> None:
    """The largest error of each kind of arithmetic row."""
    kinds: dict[str, list[Analytic]] = defaultdict(list)
    for figure in figures:
        kinds[figure.kind].append(figure)
    print(f"\n{'arithmetic rows':48}{'figures':>8} {'largest error':>14}")
    for kind, found in sorted(kinds.items()):
        worst = max(found, key=lambda figure: abs(figure.error))
        print(f"{kind:48}{len(found):8d} {worst.error:+14.2%}  {worst.id}")


def speed() -> None:
    """Time of an estimate and of a search, one core."""
    arch, topology = lookup("llama-3.1-70b"), topology_of_preset("H100-SXM-80GB", 64)
    layout = TrainingLayout(tp=8, pp=2, dp=4, global_batch=256)
    started = time.perf_counter()
    for _ in range(200):
        estimate_memory(arch, topology, layout)
    each = (time.perf_counter() - started) / 200
    started = time.perf_counter()
    found = search(arch, topology, layout)
    searched = (time.perf_counter() - started) / found.examined * 1000
    print(f"\none estimate {each * 1e3:.3f} ms; 1,000 layouts searched in {searched:.2f} s ({found.examined} examined)")


if __name__ == "__main__":
    main()
