"""Cross-validated errors of the serving estimates, and the refit of their calibration.

    python -m benchmarks.planner_serving [--truth DIR] [--write] [--quick]

Without --truth the shipped points are only counted: their measured values, what the shipped calibration says there in
sample, and the cross-validated intervals that it carries. With it, every row of the truth folder is predicted by fits
that did not see it: five folds of measured points (repeated measurements of a point stay in one fold; the same point in
two published tables is one point), whole curves left out (a model on a layout, engine, version and device), whole
models left out. --write puts the fit of all rows and the intervals into head/planner/data. Needs numpy and scipy.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from head.planner.calibration import serving_fit as fitting
from head.planner.calibration import serving_near as near
from head.planner.calibration import serving_step as step
from head.planner.calibration import serving_validation as validation

Outcome = validation.Outcome
DATA = Path(__file__).resolve().parent.parent / "head" / "planner" / "data"
MODES = ("agg", "disagg", "disagg?", "offline")


def errors(logs: Iterable[float]) -> str:
    """MAPE, median, share within 20 % and bias of predicted over measured."""
    found = [math.expm1(value) for value in logs]
    if not found:
        return "no rows"
    sizes = [abs(value) for value in found]
    inside = sum(size < 0.2 for size in sizes) / len(sizes)
    mean, middle = 100 * statistics.fmean(sizes), 100 * statistics.median(sizes)
    size = f"{len(found):5d} rows  MAPE {mean:5.1f} %  median {middle:5.1f} %"
    return f"{size}  within 20 %: {100 * inside:3.0f} %  bias {100 * statistics.median(found):+5.1f} %"


def shipped() -> None:
    """What ships, without a truth folder."""
    logs: dict[str, list[float]] = {}
    curves = near.shipped_memory().curves
    for block, points in curves:
        for point in points:
            found = near.nearness(block, point.sequences, point.isl, point.osl, near=1)
            logs.setdefault(block.mode, []).append(math.log(point.base_tpot_s * found.tpot / point.tpot_s))
    print(f"{sum(len(points) for _, points in curves)} points on {len(curves)} curves; in sample:")
    for mode in MODES:
        print(f"  TPOT {mode:8s} {errors(logs.get(mode, []))}")
    for name, rows in step.shipped().spread.items():
        print(f"80 % intervals of {name} (measured / predicted) by nearness:")
        for least, low, high in rows:
            print(f"  nearness >= {least:4.2f}: {math.exp(low):.2f} .. {math.exp(high):.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true", help="five folds only")
    options = parser.parse_args(arguments)
    if options.truth is None:
        shipped()
        return
    validate(options.truth, is_quick=options.quick, has_write=options.write)


def validate(truth: Path, *, is_quick: bool, has_write: bool) -> None:
    """Cross-validates over `truth`; writes the calibration when asked."""
    started = time.monotonic()
    rows = [fitting.prepare(row) for row in fitting.read_rows(truth)]
    print(f"{len(rows)} rows, {len(fitting.unique(rows))} measured points ({time.strftime('%Y-%m-%d', time.gmtime())})")
    outcomes: dict[str, list[validation.Outcome]] = {}
    schemes: list[tuple[str, Callable[[fitting.Prepared], Hashable], int]] = [("five folds", lambda p: p.point, 5)]
    if not is_quick:
        schemes.append(("curve left out", lambda p: p.block, 5))
        schemes.append(("model left out", lambda p: p.block.dimensions, 0))
    for name, group, folds in schemes:
        outcomes[name] = validation.cross_validate(rows, group, folds)
        print(f"\n{name}  ({time.monotonic() - started:.0f} s)", flush=True)
        report(outcomes[name])
    pooled = [outcome for found in outcomes.values() for outcome in found]
    spread = {}
    for quantity in ("tpot", "ttft"):
        for mode in MODES:
            mine = [outcome for outcome in pooled if outcome.row.mode == mode]
            spread[quantity if mode == "agg" else f"{quantity}/{mode}"] = validation.spreads(mine, quantity)
    spread = {name: rows for name, rows in spread.items() if any(high > low for _, low, high in rows)}
    table = [row for name, found in outcomes.items() for row in validation.accuracy(name, found, spread)]
    print("\nmeasured values inside the stated 80 % interval")
    for row in table:
        print(f"  {row.scheme:16s} {row.mode:8s} {row.quantity}: {100 * row.inside_80:.0f} % of {row.rows}")
    if has_write:
        source = {
            "title": "aiconfigurator-core 0.12.0 silicon_sample.csv; TensorRT-LLM perf-overview tables",
            "url": "pypi:aiconfigurator-core==0.12.0; github.com/NVIDIA/TensorRT-LLM",
            "license": "Apache-2.0",
        }
        fitting.write(DATA, fitting.fit(rows), spread, source, table)
        sizes = [(DATA / name).stat().st_size for name in ("serving_constants.json", "serving_rows.json.gz")]
        print(f"\nwrote serving_constants.json ({sizes[0]} bytes), serving_rows.json.gz ({sizes[1]} bytes)")


def report(found: Sequence[Outcome]) -> None:
    """TPOT, its physics alone, and TTFT, by mode; TPOT and TTFT of aggregated rows by engine and by model."""
    for mode in MODES:
        mine = [outcome for outcome in found if outcome.row.mode == mode]
        if not mine:
            continue
        label = "GPU-s/token" if mode == "offline" else "TPOT"
        print(f"  {label:11s} {mode:8s} {errors(o.tpot for o in mine)}")
        print(f"  {'  physics':11s} {mode:8s} {errors(o.tpot_physics for o in mine)}")
        if timed := [o.ttft for o in mine if o.ttft is not None]:
            print(f"  {'TTFT':11s} {mode:8s} {errors(timed)}")
    mine = [outcome for outcome in found if outcome.row.mode == "agg"]
    for backend in sorted({o.row.backend for o in mine}):
        part = [o for o in mine if o.row.backend == backend]
        print(f"    {backend:26s} TPOT {errors(o.tpot for o in part)}")
        print(f"    {'':26s} TTFT {errors(o.ttft for o in part if o.ttft is not None)}")
    for model in sorted({o.row.model for o in mine}):
        print(f"    {model[-26:]:26s} TPOT {errors(o.tpot for o in mine if o.row.model == model)}")


if __name__ == "__main__":
    main()
