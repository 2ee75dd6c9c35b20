"""A benchmark's points as a table: one line each."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import msgspec

_POINT_COLUMNS = ("point", "repetition", "status", "is_valid", "reasons", "coverage", "skew_ms")


def summary_csv(benchmark: Mapping[str, Any]) -> str:
    """One line per point of a benchmark's view: what was varied, how it ended, its figures."""
    points = benchmark.get("points") or []
    changed = list(dict.fromkeys(name for point in points for name in point["changes"]))
    figures = list(dict.fromkeys(name for point in points for name in point["figures"] if name != "coverage"))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_POINT_COLUMNS, *(f"load.{name}" for name in changed), *figures])
    for point in points:
        writer.writerow(
            [
                point["number"],
                point["repetition"],
                point["status"],
                str(point["is_valid"]).lower(),
                " ".join(point["reasons"]),
                _cell(float(point["figures"].get("coverage", point["coverage"]))),
                f"{point['skew_ms']:.3f}",
                *(_cell(point["changes"].get(name)) for name in changed),
                *(_cell(point["figures"].get(name)) for name in figures),
            ]
        )
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
