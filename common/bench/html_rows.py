"""A benchmark's points as a report shows them: joined with their reports, grouped by changes, in order of load."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.bench.figures import changes_told, figures_of, is_number

LOADS = ("rate", "concurrency")
SERVER_REASONS = frozenset({"no_success", "drain_timeout"})
"""Why a run is invalid when that is the server's doing: it could not answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One point. report: None where none was written."""

    number: int
    changes: dict[str, Any] = field(default_factory=dict)
    repetition: int = 0
    status: str = ""
    is_valid: bool = False
    reasons: tuple[str, ...] = ()
    coverage: float = 1.0
    skew_ms: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    error: str = ""

    @property
    def is_judged(self) -> bool:
        """Whether there is something to believe or not."""
        return self.report is not None or self.status == "completed"

    @property
    def is_degraded(self) -> bool:
        """Whether a part of the load was not performed."""
        return self.is_judged and (self.coverage < 1 or "degraded" in self.reasons)

    @property
    def word(self) -> str:
        """valid, degraded, invalid, or the state of what was not judged."""
        if not self.is_judged:
            return self.status or "pending"
        others = set(self.reasons) - {"degraded"}
        if not self.is_valid and (others or not self.is_degraded):
            return "invalid"
        return "degraded" if self.is_degraded else "valid"


@dataclass(frozen=True, slots=True)
class Group:
    """The repetitions of one point."""

    changes: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def is_valid(self) -> bool:
        """Whether any repetition may be believed."""
        return any(row.word == "valid" for row in self.rows)

    @property
    def believed(self) -> tuple[Row, ...]:
        """The valid repetitions; all judged ones when none is valid."""
        return tuple(row for row in self.rows if row.word == "valid") or tuple(
            row for row in self.rows if row.is_judged
        )

    def figure(self, name: str) -> float | None:
        """The median over the repetitions that are believed."""
        values = [row.figures[name] for row in self.believed if name in row.figures]
        return statistics.median(values) if values else None

    @property
    def title(self) -> str:
        """What it varies."""
        return changes_told(self.changes) or "the load as asked"


def rows_of(benchmark: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """All points, those without a report as well."""
    written: dict[int, Mapping[str, Any]] = {}
    points: dict[int, Mapping[str, Any]] = {}
    for place, report in enumerate(reports):
        told = report.get("point")
        point = told if isinstance(told, Mapping) else {"number": told}
        number = _whole(point.get("number"), place)
        written[number] = report
        points[number] = point
    for place, point in enumerate(benchmark.get("points") or ()):
        points[_whole(point.get("number"), place)] = point
    return [_row(number, points[number], written.get(number)) for number in sorted(points)]


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _row(number: int, point: Mapping[str, Any], report: Mapping[str, Any] | None) -> Row:
    reasons = [str(code) for code in point.get("reasons") or ()]
    is_valid = bool(point.get("is_valid"))
    if report is not None:
        reasons += [str(said.get("code")) for said in report.get("reasons") or ()]
        is_valid = bool(point.get("is_valid", report.get("is_valid"))) and bool(report.get("is_valid"))
    error = point.get("error") or {}
    given = {str(name): float(value) for name, value in (point.get("figures") or {}).items() if is_number(value)}
    coverage, skew = point.get("coverage", 1.0), point.get("skew_ms", 0.0)
    return Row(
        number=number,
        changes=dict(point.get("changes") or {}),
        repetition=_whole(point.get("repetition"), 0),
        status=str(point.get("status") or ("completed" if report is not None else "")),
        is_valid=is_valid,
        reasons=tuple(dict.fromkeys(reasons)),
        coverage=float(coverage) if is_number(coverage) else 1.0,
        skew_ms=float(skew) if is_number(skew) else 0.0,
        figures=given | (figures_of(report) if report is not None else {}),
        report=report,
        error=": ".join(str(error[key]) for key in ("code", "message") if error.get(key)) if error else "",
    )


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Rows with the same changes together, in the order of their first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(row.changes, sort_keys=True, default=str), []).append(row)
    return [Group(rows[0].changes, tuple(rows)) for rows in found.values()]


def load_axis(groups: Sequence[Group], search_over: str = "") -> str:
    """Which field is how much load; empty where the points do not differ in one."""
    for name in (search_over, *LOADS):
        values = {group.changes[name] for group in groups if is_number(group.changes.get(name))}
        if len(values) > 1:
            return name
    return ""


def families_of(groups: Sequence[Group], axis: str) -> dict[str, list[Group]]:
    """Groups that differ only in how much load, each in order of load; by what the others vary."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        rest = {name: value for name, value in group.changes.items() if name != axis}
        found.setdefault(changes_told(rest), []).append(group)
    if axis:
        for part in found.values():
            part.sort(key=lambda group: load_of(group, axis))
    return found


def load_of(group: Group, axis: str) -> float:
    """Its place on the load axis."""
    value = group.changes.get(axis)
    return float(value) if is_number(value) else 0.0


def meets(row: Row, slo: Mapping[str, Any]) -> bool | None:
    """Whether the server met the SLO in a point; None where the point says nothing about the server."""
    if row.word == "invalid" and row.reasons and SERVER_REASONS.issuperset(row.reasons):
        return False
    attainment, failed = row.figures.get("slo_attainment"), row.figures.get("error_rate")
    has_limits = any(slo.get(name) is not None for name in ("ttft", "tpot", "e2e"))
    if row.word != "valid" or failed is None or (attainment is None and has_limits):
        return None
    is_met = attainment is None or attainment >= float(slo.get("attainment", 0.99))
    return is_met and failed <= float(slo.get("error_rate", 0.01))


def bracket_of(groups: Sequence[Group], axis: str, slo: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(the most load that met the SLO, the least above it that did not), of points that may be believed.

    A load met it when most of its repetitions did.
    """
    judged: list[tuple[float, bool]] = []
    for group in groups:
        votes = [vote for row in group.rows if (vote := meets(row, slo)) is not None]
        if votes and axis in group.changes:
            judged.append((load_of(group, axis), sum(votes) * 2 > len(votes)))
    failed = [load for load, is_met in judged if not is_met]
    most = max((load for load, is_met in judged if is_met and load < min(failed, default=float("inf"))), default=None)
    least = min((load for load in failed if most is None or load > most), default=None)
    return most, least


def best_of(groups: Sequence[Group]) -> tuple[Group | None, str]:
    """The load with the most goodput, without limits the one with the highest throughput; and by which figure."""
    for name in ("goodput_req_s", "output_tok_s", "req_s"):
        if any(group.figure(name) for group in groups):
            return max(groups, key=lambda group: group.figure(name) or 0.0), name
    return None, ""
