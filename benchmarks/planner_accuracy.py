"""The accuracy table of the shipped calibration, all areas: the one command that makes it.

    python -m benchmarks.planner_accuracy [--truth DIR] [--write] [--quick]

Without --truth every area predicts the rows that ship by fits that did not see them (folds; whole models; whole
sources), which takes minutes; --quick leaves the training fits out. --write puts the table into the package
(head/planner/data/accuracy.json), from where `herder plan accuracy` and docs/planner.md take it.

--truth reads a folder in the exchange form (training_runs.json, memory.json, param_counts.json, inference.json,
inference_silicon.json, collectives.json; whichever are there) and asks the shipped calibration, rows that do not ship
apart: those it has never seen. A row that cannot be a question is counted as refused, with the reason.
Needs numpy and scipy (extra `planner`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import planner_accuracy_areas as areas
from benchmarks import planner_accuracy_rows as arithmetic
from head.planner.calibration.accuracy import (
    ACCURACY_FILE,
    AccuracyLine,
    AccuracyTable,
    Bar,
    Refusal,
    figure,
    held,
    missed,
    percent,
)
from head.planner.calibration.memory_rows import shipped_rows as memory_rows
from head.planner.calibration.serving_near import shipped_memory
from head.planner.calibration.training_rows import shipped_rows as training_rows
from head.planner.training.constants import shipped as training_constants
from head.planner.training.memory import constants as memory_constants

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "head" / "planner" / "data"
GOLDEN = ROOT / "tests" / "golden"
Lines = list[AccuracyLine]

# What is asked, by kind of prediction and words of the test; the first that fits. Rows that fits have seen have no bar.
_PEERS = {
    "parameter counts": "llm-analysis 13 %",
    "bytes": "closed forms 0.1-1.2 %",
    areas.TRAINING: "Calculon 10-54 %, llm-analysis 8-23 %",
    areas.MEMORY: "Calculon 39 %, Megatron's report 115 %",
    areas.TPOT: "aiconfigurator 19.9 % / 36.6 %, 26 % refused",
    areas.TTFT: "aiconfigurator 50 %",
    areas.OFFLINE: "aiconfigurator 5.0 % on 36 rows",
    areas.COLLECTIVES: "alpha-beta 13 %",
}
BARS: tuple[tuple[str, str, Bar], ...] = (
    ("parameter counts", "", Bar(largest=0.0, peer=_PEERS["parameter counts"])),
    ("FLOPs and MFU arithmetic", "", Bar(largest=0.02)),
    ("KV cache bytes", "", Bar(largest=0.015, peer=_PEERS["bytes"])),
    ("weight bytes", "", Bar(largest=0.015, peer=_PEERS["bytes"])),
    (areas.TRAINING, "5 folds", Bar(mape=0.08, median=0.05, peer=_PEERS[areas.TRAINING])),
    (areas.TRAINING, "source left out", Bar(mape=0.17, inside=0.80, peer=_PEERS[areas.TRAINING])),
    (areas.TRAINING, "never seen", Bar(mape=0.17, inside=0.80, peer=_PEERS[areas.TRAINING])),
    (areas.MEMORY, "5 folds", Bar(mape=0.08, peer=_PEERS[areas.MEMORY])),
    (areas.MEMORY, "never seen", Bar(mape=0.08, peer=_PEERS[areas.MEMORY])),
    (areas.TPOT, "5 folds", Bar(mape=0.20, median=0.12, peer=_PEERS[areas.TPOT])),
    (areas.TPOT, "model left out", Bar(median=0.18, peer=_PEERS[areas.TPOT])),
    (areas.TPOT, "never seen", Bar(mape=0.20, median=0.12, peer=_PEERS[areas.TPOT])),
    (areas.TTFT, "5 folds", Bar(median=0.25, peer=_PEERS[areas.TTFT])),
    (areas.TTFT, "never seen", Bar(median=0.25, peer=_PEERS[areas.TTFT])),
    (areas.OFFLINE, "5 folds", Bar(mape=0.08, peer=_PEERS[areas.OFFLINE])),
    (areas.OFFLINE, "never seen", Bar(mape=0.08, peer=_PEERS[areas.OFFLINE])),
    (areas.COLLECTIVES, "point left out", Bar(mape=0.05, peer=_PEERS[areas.COLLECTIVES])),
    (areas.COLLECTIVES, "curve left out", Bar(mape=0.05, peer=_PEERS[areas.COLLECTIVES])),
    (areas.COLLECTIVES, "never seen", Bar(mape=0.05, peer=_PEERS[areas.COLLECTIVES])),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without the training fits")
    options = parser.parse_args(arguments)
    if options.write and (options.truth or options.quick):
        parser.error("--write goes with the whole table of the rows that ship")
    table = of_truth(options.truth) if options.truth else of_shipped(is_quick=options.quick)
    show(table)
    if options.write:
        (DATA / ACCURACY_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
        print(f"\nwritten: {ACCURACY_FILE}")


def of_shipped(*, is_quick: bool = False) -> AccuracyTable:
    """Every area by fits that did not see the row."""
    counted = arithmetic.counts([*_golden("planner_counts.json")["published"], *_golden("planner_counts.json")["made"]])
    cache, weights = arithmetic.serving_bytes(_golden("planner_bytes.json"))
    flops = arithmetic.flops_of_golden(_golden("planner_flops.json"))
    errors = (counted, flops, cache, weights)
    lines = [found.line("every row") for found in errors]
    refused = [refusal for found in errors for refusal in found.refusals()]
    if not is_quick:
        lines += areas.shipped_training(_today())
    lines += areas.shipped_memory_lines() + areas.shipped_serving()
    lines += areas.shipped_collectives(json.loads((DATA / "collectives.json").read_bytes())) + areas.speed()
    points = sum(len(points) for _, points in shipped_memory().curves)
    sets = (
        f"{counted.line('').rows} parameter counts, {flops.line('').rows} FLOP rates,"
        f" {len(_golden('planner_bytes.json'))} engine logs, {len(training_rows())} training steps,"
        f" {len(memory_rows())} training peaks, {points} serving points, curves of collectives"
    )
    return _table(f"the rows that ship: {sets}", lines, refused)


def of_truth(folder: Path) -> AccuracyTable:
    """The shipped calibration on a folder of rows."""
    documents = {name: _rows(folder / f"{name}.json") for name in _FILES}
    cache, weights = arithmetic.serving_bytes(documents["inference"])
    counted = arithmetic.counts(documents["param_counts"])
    flops = arithmetic.flops_of_runs(documents["training_runs"])
    errors = (counted, flops, cache, weights)
    lines = [found.line("every row") for found in errors]
    refused = [refusal for found in errors for refusal in found.refusals()]
    curves = json.loads((DATA / "collectives.json").read_bytes())["curves"]
    known = {(row["system"], row["op"], row["gpus"]) for row in curves if row.get("is_measured", True)}
    for more, reasons in (
        areas.truth_training(documents["training_runs"]),
        areas.truth_memory(documents["memory"]),
        areas.truth_serving([*documents["inference_silicon"], *documents["inference"]]),
        areas.truth_collectives(documents["collectives"], known),
    ):
        lines += more
        refused += reasons
    sets = ", ".join(f"{len(rows)} of {name}" for name, rows in documents.items() if rows)
    return _table(f"given rows: {sets or 'none'}", lines, refused)


_FILES = ("param_counts", "training_runs", "memory", "inference", "inference_silicon", "collectives")


def _table(row_set: str, lines: Lines, refused: list[Refusal]) -> AccuracyTable:
    return AccuracyTable(
        date=_today(),
        row_set=row_set,
        machine=f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}",
        calibrations={
            "training step time": training_constants().name,
            "training memory": memory_constants().calibration,
            "serving": shipped_memory().source.get("title", ""),
        },
        lines=tuple(_short(judged(line)) for line in lines),
        refused=tuple(refused),
    )


def judged(line: AccuracyLine) -> AccuracyLine:
    """The line with the first bar that its words fit."""
    for what, words, bar in BARS:
        if line.what == what and words in line.scheme:
            other = line.is_met  # an area's own verdict, as on runs out of memory
            found = held(line, bar)
            return msgspec.structs.replace(found, is_met=False if other is False else found.is_met)
    return line if line.bar else msgspec.structs.replace(line, is_met=None)


def _short(line: AccuracyLine) -> AccuracyLine:
    fields = ("mape", "median", "largest", "inside")
    rounded = {name: None if getattr(line, name) is None else round(getattr(line, name), 5) for name in fields}
    return msgspec.structs.replace(line, **rounded)


def _rows(path: Path) -> list[Any]:
    """The rows of a document: a list, or an object with `rows`. Raises: SystemExit for what is neither."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    found = document.get("rows") if isinstance(document, dict) else document
    if not isinstance(found, list):
        raise SystemExit(f"{path}: no list of rows")
    return found


def _golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_bytes())


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def show(table: AccuracyTable) -> None:
    """The table for a terminal, then the reasons, then what misses its bar."""
    print(f"{table.date}, {table.row_set}\n{table.machine}\n")
    print(f"{'':26}{'rows':>6} {'sources':>7} {'MAPE':>8} {'median':>8} {'inside':>7}  met  tested on; figure; bar")
    what = ""
    for line in table.lines:
        met = {True: "yes", False: "NO", None: ""}[line.is_met]
        words = "; ".join(part for part in (line.scheme, figure(line), line.bar) if part)
        print(
            f"{line.what if line.what != what else '':26}{line.rows or '':>6} {line.sources or '':>7}"
            f" {percent(line.mape):>8} {percent(line.median):>8} {percent(line.inside):>7}  {met:3}  {words}"
        )
        what = line.what
    if table.refused:
        print("\nrefused rows")
    for refusal in table.refused:
        print(f"  {refusal.rows:5d}  {refusal.what}: {refusal.reason} ({refusal.example})")
    for line in missed(table.lines):
        print(f"misses its bar: {line.what}, {line.scheme}")


if __name__ == "__main__":
    main()
