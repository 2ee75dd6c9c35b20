"""Errors of the collective tables, and the tool that completes and writes them.

    python benchmarks/planner_collectives.py                 the error table (seconds)
    python benchmarks/planner_collectives.py --fit           refits the constants first (a minute) and prints them
    python benchmarks/planner_collectives.py --write         completes the tables and rewrites the shipped file
    python benchmarks/planner_collectives.py --check FILE    also checks curves of another file (rows with
                                                             `conditions` {op, gpus, nodes} and `points` {bytes, us})

Needs numpy, and scipy for --fit (extra `planner`). Measured curves are those of the shipped file that say so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from head.planner.hardware import collective_tables as tables
from head.planner.hardware.collectives import time_s
from head.planner.hardware.topology import topology_of_preset

DATA = Path(__file__).resolve().parents[1] / "head" / "planner" / "data" / "collectives.json"
DEVICES = (("A100", "a100"), ("H200", "h200"), ("H100", "h100"), ("B200", "b200"), ("L40S", "l40s"))


def main() -> None:
    """Read, optionally refit and write, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = json.loads(DATA.read_text())
    measured: dict[tables.Key, list[float]] = {
        (row["system"], row["op"], row["gpus"]): row["us"] for row in document["curves"] if row.get("is_measured", True)
    }
    likeness = tables.fit(measured) if options.fit else tables.FITTED
    if options.fit:
        print({name: round(value, 4) for name, value in msgspec.structs.asdict(likeness).items()})
    errors = tables.left_out(measured, likeness)
    print(f"{len(measured)} measured curves, {sum(map(len, measured.values()))} points; relative error of the time")
    print(f"{'system':22}" + "".join(f"{'left out: ' + what:>28}" for what in errors))
    systems = list(dict.fromkeys(key[0] for key in measured))
    for system in [*systems, "all"]:
        cells = [
            summary(value for key, row in found.items() if system in (key[0], "all") for value in row)
            for found in errors.values()
        ]
        print(f"{system:22}" + "".join(f"{cell:>28}" for cell in cells))
    if options.write:
        write(document, measured, likeness)
    if options.check:
        check(json.loads(options.check.read_text()))


def summary(errors: Iterable[float]) -> str:
    """Mean and median of the absolute errors."""
    sizes = [abs(error) for error in errors]
    return f"{statistics.fmean(sizes):.1%} (median {statistics.median(sizes):.1%})" if sizes else "-"


def write(document: dict[str, Any], measured: dict[tables.Key, list[float]], likeness: tables.Likeness) -> None:
    """The shipped file again: measured curves as they are, the others completed."""
    grid = [(system, op, gpus) for system in tables.GENERATION for op in tables.TABLE_OPS for gpus in tables.COUNTS]
    completed = tables.complete(measured, [key for key in grid if key not in measured], likeness)
    rows = []
    for key in grid:
        row: dict[str, Any] = {"system": key[0], "op": key[1], "gpus": key[2]}
        row["us"] = measured[key] if key in measured else [round(value, 2) for value in completed[key]]
        rows.append(row if key in measured else row | {"is_measured": False})
    lines = [f'"{name}": {json.dumps(document[name])}' for name in ("source", "nccl", "bytes")]
    body = ",\n".join(json.dumps(row) for row in rows)
    DATA.write_text("{" + ",\n".join(lines) + ',\n"curves": [\n' + body + "\n]}\n")


def check(rows: list[dict[str, Any]]) -> None:
    """Curves of another source against the shipped answer, from 1 MiB up and from 64 MiB up."""
    print(f"\n{'another source':52}{'from 1 MiB':>26}{'from 64 MiB':>26}")
    for row in rows:
        conditions = row["conditions"]
        device = next((name for word, name in DEVICES if word in conditions.get("system", "")), None)
        if device is None or not row.get("points") or not row.get("usable", True):
            continue
        gpus, nodes = conditions["gpus"], conditions.get("nodes", 1)
        network: Any = "efa" if "EFA" in conditions["system"] else "unknown"
        topology = topology_of_preset(device, gpus, gpus_per_node=gpus // nodes, network=network)
        op = {"alltoall": "all_to_all"}.get(conditions["op"], conditions["op"])
        pairs = [(p["bytes"], time_s(op, p["bytes"], gpus, topology) * 1e6 / p["us"] - 1) for p in row["points"]]
        cells = [summary(error for size, error in pairs if size >= least) for least in (1 << 20, 1 << 26)]
        print(f"{row['id'][:50]:52}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
