"""How wrong the planner's training step times are: `python -m benchmarks.planner_training [--truth DIR]`.

Refits the constants with rows left out (5 folds; whole models; whole sources) and prints the errors. With --truth it
reads DIR/training_runs.json instead and asks the shipped constants, which never saw rows that are not shipped: those
are printed apart. With --refit it writes the constants that ship.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import msgspec

from head.planner.calibration.training_accuracy import ErrorLine, accuracy, line_of
from head.planner.calibration.training_features import distance_to, position_of
from head.planner.calibration.training_fit import Residual, calibrate
from head.planner.calibration.training_rows import TrainingRow, shipped_rows
from head.planner.calibration.training_truth import rows_of
from head.planner.training.constants import CONSTANTS_FILE, shipped
from head.planner.training.step_time import estimate, known_groups

_TITLES = {
    "folds": "5-fold cross-validation",
    "models": "whole models left out (10 groups)",
    "sources": "whole sources left out, intervals without them",
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--truth", type=Path, help="folder with training_runs.json")
    parser.add_argument("--refit", action="store_true", help="write the constants that ship")
    arguments = parser.parse_args()
    if arguments.truth:
        _ask_shipped(arguments.truth)
        return
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    rows = shipped_rows()
    fitted, held = calibrate(rows, name=f"published training runs, fitted {date}", date=date)
    print(f"{fitted.rows} rows of {len(fitted.sources)} sources, {date}")
    for name, lines in accuracy(held).items():
        _print(_TITLES[name], lines)
    if arguments.refit:
        path = Path(__file__).parent.parent / "head" / "planner" / "data" / CONSTANTS_FILE
        path.write_bytes(msgspec.json.format(msgspec.json.encode(fitted), indent=1) + b"\n")
        print(f"written: {path.name}")


def _ask_shipped(folder: Path) -> None:
    """Errors of the shipped constants on a folder of truth rows, apart for rows that were and were not fitted."""
    raw: list[dict[str, Any]] = msgspec.json.decode((folder / "training_runs.json").read_bytes())
    rows, refused = rows_of(raw)
    known = {row.id for row in shipped_rows()}
    for title, chosen in (
        ("rows that ship (fitted)", [row for row in rows if row.id in known and row.is_fitted]),
        ("rows that do not ship (never seen)", [row for row in rows if row.id not in known and row.is_fitted]),
    ):
        groups = {"all": chosen}
        for row in chosen:
            groups.setdefault(row.source, []).append(row)
        _print(title, [_shipped_line(name, members) for name, members in groups.items() if members])
    print(f"\n{len(refused)} rows that are no step times or lack dimensions:")
    for reason in sorted(set(refused.values())):
        print(f"  {sum(why == reason for why in refused.values()):4d}  {reason}")


def _shipped_line(name: str, rows: list[TrainingRow]) -> ErrorLine:
    residuals, intervals = [], []
    fitted = shipped()
    for row in rows:
        topology = row.topology()
        found = estimate(row.architecture, topology, row.layout, row.stack)
        known = known_groups(row.architecture, topology, row.layout, row.stack, fitted)
        position = position_of(row.architecture, topology, row.layout, row.stack)
        distance = distance_to(position, row.stack)
        residuals.append(
            Residual(
                row=row,
                predicted_s=found.step_s.value,
                distance=distance,
                is_generation_known=known["generation"],
            )
        )
        intervals.append((found.step_s.low, found.step_s.high))
    return line_of(name, residuals, intervals)


def _print(title: str, lines: list[ErrorLine]) -> None:
    print(f"\n{title}")
    print("   rows   MAPE  median    bias  within 20 %  inside  half width")
    for line in lines:
        print(
            f"  {line.rows:5d} {line.mape:6.1%} {line.median:7.1%} {line.bias:+7.1%} {line.within_20:12.0%}"
            f" {line.covered:7.0%} {line.width:11.0%}  {line.group[:70]}"
        )


if __name__ == "__main__":
    main()
