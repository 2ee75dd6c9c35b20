"""A point is judged: the parts of its load nodes become one run, and its report says what is missing of it.

Pure but for reading the parts. Every figure is made from all raw rows; nothing is scaled up for parts that are missing,
and the run is not valid then.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from common.bench import mlperf, report
from common.bench.figures import figures_of, is_number
from common.bench.outcome import Asked, Outcome
from common.bench.records import OUTCOMES, SOURCES, WIDTH
from common.bench.report import Report
from common.bench.schedule import MAX_ARRIVALS
from common.bench.spec import MAX_SLOTS, MAX_WORKERS
from common.bench.verdict import Finding
from common.errors import NotFound
from head.bench.questions import PartFile

SKEW_MS = 5.0
RULES = {
    "degraded": "the result of a load node is missing; nothing is scaled up for it",
    "clock_skew_between_nodes": f"load nodes may have begun more than {SKEW_MS:g} ms apart",
    mlperf.CODE: "a rule of the MLPerf scenario is broken",
}
Read = Callable[[str], tuple[Asked, Outcome]]


@dataclass(frozen=True, slots=True)
class Merged:
    """The parts that came, as one run."""

    asked: Asked
    outcome: Outcome
    came: tuple[PartFile, ...]
    missing: tuple[tuple[PartFile, str], ...]
    """Those that did not, and why in words."""


def merge(parts: Sequence[PartFile], read: Read) -> Merged:
    """Reads and merges the parts, one at a time. A part that cannot be read, or was asked for something else, is
    missing. Raises: NotFound when no part came."""
    asked: Asked | None = None
    outcome: Outcome | None = None
    came: list[PartFile] = []
    missing: list[tuple[PartFile, str]] = []
    for part in parts:
        if not part.path:
            missing.append((part, part.error.message if part.error else f"its run is {part.state}"))
            continue
        try:
            its_asked, its_outcome = read(part.path)
            _check(its_asked, its_outcome)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
            missing.append((part, f"its result cannot be read: {error}"[:300]))
            continue
        if asked is None or outcome is None:
            asked, outcome = its_asked, its_outcome
        elif not _is_same(asked, its_asked):
            missing.append((part, "its result is of another schedule"))
            continue
        else:
            outcome.start_wall_s = min(outcome.start_wall_s, its_outcome.start_wall_s)
            outcome.merge(its_outcome)
        came.append(part)
    if asked is None or outcome is None:
        why = "; ".join(f"{part.node}: {text}" for part, text in missing[:5])
        raise NotFound(f"no load node's result came: {why}")
    return Merged(asked, outcome, tuple(came), tuple(missing))


def judge(
    merged: Merged, *, parts: int, skew_ms: float = 0.0, scenario: str = "", about: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """The report of a point as plain data, and its main figures. parts: how many load nodes there were to be."""
    asked, outcome = merged.asked, merged.outcome
    made = report.build(asked, outcome, _due_of(merged, parts))
    coverage = coverage_of(merged, parts)
    found = [*made.reasons, *_more_reasons(merged, parts, coverage, skew_ms)]
    if scenario:
        found += mlperf.findings(scenario, asked, outcome.records, made, asked.limits)
    made = msgspec.structs.replace(made, reasons=found, is_valid=not found, rules=made.rules | RULES)
    plain: dict[str, Any] = msgspec.to_builtins(made)
    nodes = [part.node for part in merged.came]
    plain["machine"] = {"host": ", ".join(nodes), "nodes": nodes}  # what the facts tell more of; not who judged
    plain |= dict(about or {})
    plain |= {
        "coverage": coverage,
        "skew": {"bound_ms": skew_ms, "allowed_ms": SKEW_MS},
        "mlperf": {"scenario": scenario, "rules": mlperf.RULES.get(scenario, "")} if scenario else None,
    }
    return plain, _figures(plain, made, asked, coverage)


def coverage_of(merged: Merged, parts: int) -> dict[str, Any]:
    """How much of the whole schedule belonged to the parts that came, and what they did of it.

    planned: requests of the schedule (conversations, where they have several turns); None where only a time was asked
    for. due: those of the parts that came. performed: those that were begun. share: due / planned, else of the slots.
    """
    plan, asked = merged.asked.plan, merged.asked
    mine, everywhere = _shares(merged, parts)
    planned: int | None
    if asked.is_open:
        planned = len(asked.due_ns)
        due: int | None = sum(len(range(number, planned, everywhere)) for number in mine)
    else:
        planned = plan.get("planned_requests")
        due = None if planned is None else sum(_nth(planned, number, everywhere) for number in mine)
    whole = planned if planned else int(plan.get("concurrency") or 0)
    share = due if planned else sum(_nth(whole, number, everywhere) for number in mine)
    records = merged.outcome.records
    begun = sum(1 for turn, acted in records.columns("turn", "acted") if turn == 0 and acted >= 0)
    return {
        "parts": parts,
        "parts_came": len(merged.came),
        "missing": [
            {"part": part.part, "node": part.node, "run": part.run, "why": why} for part, why in merged.missing
        ],
        "planned": planned,
        "due": due,
        "performed": begun,
        "share": (share or 0) / whole if whole else len(merged.came) / parts,
    }


def _shares(merged: Merged, parts: int) -> tuple[list[int], int]:
    """The numbers of the processes whose parts came, and how many processes there were to be."""
    workers = max(1, int(merged.asked.plan.get("workers") or 1))
    mine = [number for part in merged.came for number in range(part.part * workers, (part.part + 1) * workers)]
    return mine, parts * workers


def _due_of(merged: Merged, parts: int) -> Sequence[int]:
    """The schedule of the parts that came: that a node was lost is no rate that the others have missed."""
    if not merged.missing:
        return merged.asked.due_ns
    mine, everywhere = _shares(merged, parts)
    due = merged.asked.due_ns
    return array("q", (at for number in mine for at in due[number::everywhere]))


def _check(asked: Asked, outcome: Outcome) -> None:
    """That a file of the right form also makes sense: whoever holds an agent's key can send one. Raises: ValueError."""
    plan = asked.plan
    if not isinstance(plan, dict) or len(outcome.records.rows) % WIDTH:
        raise ValueError("its rows or its plan are not whole")
    for name, most in (("workers", MAX_WORKERS), ("concurrency", MAX_SLOTS), ("planned_requests", MAX_ARRIVALS)):
        value = plan.get(name)
        if value is not None and not (isinstance(value, int) and 0 <= value <= most):
            raise ValueError(f"{name} is out of range")
    codes = outcome.records.column("outcome")
    if codes and not 0 <= min(codes) <= max(codes) < len(OUTCOMES):
        raise ValueError("an outcome is none")
    sources = outcome.records.column("source")
    if sources and not 0 <= min(sources) <= max(sources) < len(SOURCES):
        raise ValueError("a source is none")


def _nth(whole: int, number: int, everywhere: int) -> int:
    """One of nearly equal parts, as the load nodes divide it."""
    return whole * (number + 1) // everywhere - whole * number // everywhere


def _is_same(one: Asked, other: Asked) -> bool:
    """Whether two parts are of one run. Their plans may differ in what a node says of itself."""
    return (one.is_open, one.warmup_s, one.until_s, one.cooldown_s, one.classes) == (
        other.is_open,
        other.warmup_s,
        other.until_s,
        other.cooldown_s,
        other.classes,
    ) and memoryview(_bytes(one)) == memoryview(_bytes(other))


def _bytes(asked: Asked) -> bytes:
    return asked.due_ns.tobytes() if isinstance(asked.due_ns, array) else array("q", asked.due_ns).tobytes()


def _more_reasons(merged: Merged, parts: int, coverage: Mapping[str, Any], skew_ms: float) -> Iterable[Finding]:
    if merged.missing:
        nodes = ", ".join(f"{part.node} ({why[:200]})" for part, why in merged.missing[:10])
        yield Finding(
            "degraded", f"{len(merged.missing)} of {parts} parts are missing, {coverage['share']:.2%} of the load "
            f"is there: {nodes}"
        )  # fmt: skip
    if skew_ms > SKEW_MS and parts > 1:
        yield Finding(
            "clock_skew_between_nodes",
            f"load nodes may have begun up to {skew_ms:.1f} ms apart, allowed {SKEW_MS:g} ms",
        )


def _figures(plain: Mapping[str, Any], made: Report, asked: Asked, coverage: Mapping[str, Any]) -> dict[str, float]:
    figures = figures_of(plain)
    lag = made.latency["send_lag"].percentiles.get("p99")
    if lag is not None:
        figures["send_lag_p99_ms"] = lag
    begin_ns, end_ns = round(made.window["begin_s"] * 1e9), round(made.window["end_s"] * 1e9)
    if asked.is_open and asked.until_s is not None and end_ns > begin_ns:
        figures["asked_rate"] = sum(1 for at in asked.due_ns if begin_ns <= at < end_ns) / ((end_ns - begin_ns) / 1e9)
    elif asked.is_open and is_number(asked.plan.get("rate")):
        figures["asked_rate"] = float(asked.plan["rate"])
    figures["coverage"] = float(coverage["share"])
    return figures
