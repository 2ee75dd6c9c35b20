"""Two or more results side by side: how far apart each figure is, and whether that is more than the noise.

The noise is what repetitions of the same load differ by. With two and more valid repetitions on both sides a difference
counts when the interval of Welch's t-test at 95 % leaves out 0; of twenty figures that do not differ, one will seem to.
With one repetition nothing can be said of the noise, and that is what is said. Points that must not be believed are
left out. Results of different loads answer different questions: `differences` names everything that was not the same.
Source: B. L. Welch, The generalization of "Student's" problem (Biometrika 34, 1947).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from common.bench.figures import FIGURES, changes_told
from common.bench.html_rows import Row, groups_of, rows_of

CONFIDENCE = 0.95
SHOWN = (
    *("req_s", "output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "e2e_p50_ms", "e2e_p99_ms"),
    *("goodput_req_s", "slo_attainment", "error_rate"),
)
SERIOUS = ("load",)
"""What makes a comparison meaningless when it differs."""
_ASKED = ("sweep", "slo", "search", "mlperf")
_NOT_LOAD = (
    *("seed", "nodes", "workers", "url", "urls", "model", "host", "tokenizer", "headers", "spread"),
    *("planned_requests", "prepared", "is_cut_short"),  # of a drawn schedule they follow from the seed
)
_CHANGES_BY_ITSELF = ("--port", "--host", "-p")


class Difference(msgspec.Struct, frozen=True):
    """Something that was not the same. is_serious: figures must not be compared for it."""

    what: str
    values: tuple[str, ...]
    is_serious: bool = False


class Value(msgspec.Struct, frozen=True):
    """A figure of one result at one load: the mean of its valid repetitions."""

    repetitions: int
    mean: float | None = None
    stddev: float | None = None


class Figure(msgspec.Struct, frozen=True):
    """A figure at one load, of all results in order. Lists of changes are against the first result.

    change: relative, -0.1 is 10 % less; None where there is nothing to divide by. interval: of the relative change at
    95 %; None with fewer than two repetitions on a side. verdict: same (within the noise), more, less, unknown (of the
    noise), missing. is_better: None where the verdict is not more or less, or where neither is better.
    """

    name: str
    unit: str
    values: tuple[Value, ...]
    change: tuple[float | None, ...]
    interval: tuple[tuple[float, float] | None, ...]
    verdict: tuple[str, ...]
    is_better: tuple[bool | None, ...]


class Load(msgspec.Struct, frozen=True):
    """One load that all results have."""

    changes: dict[str, Any]
    figures: tuple[Figure, ...]


class Comparison(msgspec.Struct, frozen=True):
    """The whole. names: of the results, the first is what the others are compared with."""

    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]
    loads: tuple[Load, ...]
    confidence: float = CONFIDENCE

    @property
    def is_serious(self) -> bool:
        """Whether figures must not be compared."""
        return any(difference.is_serious for difference in self.differences)


class Result(msgspec.Struct, frozen=True):
    """One of the results: its name, a BenchmarkView as plain data (or what stands for one), reports where at hand."""

    name: str
    benchmark: dict[str, Any]
    reports: tuple[dict[str, Any], ...] = ()


def result_of(document: Any, name: str) -> Result:
    """A result from a file: a run's report, a benchmark's view, or both together. Raises: ValueError."""
    if not isinstance(document, dict):
        raise ValueError(f"{name} is no report")
    if document.get("kind") == "herder-bench":
        from common.bench.html import of_run

        benchmark, reports = of_run(document)
        return Result(name, benchmark, tuple(reports))
    if isinstance(document.get("benchmark"), dict):
        return Result(name, document["benchmark"])
    if isinstance(document.get("points"), list) and "status" in document:
        return Result(name, document)
    raise ValueError(f"{name} is neither a report of `herder bench` nor of `herder benchmarks export`")


def compare(results: Sequence[Result]) -> Comparison:
    """The comparison. Raises: ValueError for fewer than two results."""
    if len(results) < 2:
        raise ValueError("a comparison needs two results or more")
    rows = [rows_of(result.benchmark, result.reports) for result in results]
    remarks = [text for result, part in zip(results, rows, strict=True) for text in _remarks(result, part)]
    by_load = [
        {json.dumps(group.changes, sort_keys=True, default=str): group for group in groups_of(part)} for part in rows
    ]
    shared = [key for key in by_load[0] if all(key in found for found in by_load[1:])]
    left_out = sorted({key for found in by_load for key in found} - set(shared))
    if left_out:
        named = "; ".join(changes_told(json.loads(key)) or "the load as asked" for key in left_out[:5])
        remarks.append(f"not in all results: {named}{' ...' if len(left_out) > 5 else ''}")
    loads = []
    for key in shared:
        samples = [[row.figures for row in found[key].rows if row.word == "valid"] for found in by_load]
        figures = _figures(samples)
        if figures:
            loads.append(Load(by_load[0][key].changes, tuple(figures)))
        else:
            remarks.append(
                f"{changes_told(by_load[0][key].changes) or 'the load as asked'}: no valid repetition anywhere"
            )
    if any(value.repetitions == 1 for load in loads for figure in load.figures for value in figure.values):
        remarks.append("with one repetition nothing is known of the noise: differences may be chance")
    if not shared:
        remarks.append("the results have no load in common")
    return Comparison(
        tuple(result.name for result in results), tuple(differences(results)), tuple(remarks), tuple(loads)
    )


def _remarks(result: Result, rows: Sequence[Row]) -> list[str]:
    said = []
    for word in ("invalid", "degraded"):
        numbers = [str(row.number) for row in rows if row.word == word]
        if numbers:
            points = f"point{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:12])}"
            more = f" and {len(numbers) - 12} more" if len(numbers) > 12 else ""
            said.append(f"{result.name}: {word} and left out: {points}{more}")
    status = result.benchmark.get("status", "completed")
    return [*said, f"{result.name} is {status}"] if status != "completed" else said


def _figures(samples: Sequence[Sequence[Mapping[str, float]]]) -> list[Figure]:
    made = []
    for name in FIGURES:
        if name not in SHOWN:
            continue
        values = [[figures[name] for figures in part if name in figures] for part in samples]
        if any(values):
            made.append(_figure(name, values))
    return made


def _figure(name: str, samples: Sequence[Sequence[float]]) -> Figure:
    known = FIGURES[name]
    base = samples[0]
    changes: list[float | None] = [None]
    intervals: list[tuple[float, float] | None] = [None]
    verdicts: list[str] = [""]
    better: list[bool | None] = [None]
    for part in samples[1:]:
        change, interval, verdict = difference(base, part)
        changes.append(change)
        intervals.append(interval)
        verdicts.append(verdict)
        is_real = verdict in ("more", "less") and known.is_more_better is not None
        better.append((verdict == "more") is known.is_more_better if is_real else None)
    values = tuple(
        Value(
            len(part), statistics.fmean(part) if part else None, statistics.stdev(part) if len(part) > 1 else None
        )
        for part in samples
    )  # fmt: skip
    return Figure(name, known.unit, values, tuple(changes), tuple(intervals), tuple(verdicts), tuple(better))


def difference(base: Sequence[float], other: Sequence[float]) -> tuple[float | None, tuple[float, float] | None, str]:
    """(relative change of the mean, its interval, verdict) of one figure."""
    if not base or not other:
        return None, None, "missing"
    middle = statistics.fmean(base)
    gap = statistics.fmean(other) - middle
    change = gap / abs(middle) if middle else 0.0 if not gap else None
    bound = welch_bound(base, other)
    if bound is None:
        return change, None, "unknown"
    interval = ((gap - bound) / abs(middle), (gap + bound) / abs(middle)) if middle else None
    # Sums of the same numbers in another order differ in their last digit.
    if abs(gap) <= bound or math.isclose(gap, 0.0, abs_tol=1e-12 * max(abs(middle), 1e-300)):
        return change, interval, "same"
    return change, interval, "more" if gap > 0 else "less"


def welch_bound(base: Sequence[float], other: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the difference of the means; None with fewer than two samples in one."""
    if len(base) < 2 or len(other) < 2:
        return None
    parts = [statistics.variance(part) / len(part) for part in (base, other)]
    total = sum(parts)
    if total == 0:
        return 0.0
    weights = sum(part**2 / (len(of) - 1) for part, of in zip(parts, (base, other), strict=True))
    return t_975(total**2 / weights if weights else math.inf) * math.sqrt(total)


@functools.lru_cache(maxsize=4096)
def t_975(freedom: float) -> float:
    """Student's t below which 97.5 % lie, for 1 and more (also fractional) degrees of freedom, within 1e-4.

    With t = sqrt(v) tan(a) the density becomes cos(a)^(v - 1): integrated by Simpson's rule, solved by Newton's.
    """
    freedom = max(freedom, 1.0)
    z = 1.959963985
    if freedom > 200:
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    power = freedom - 1
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    low, high = 0.0, math.pi / 2
    angle = math.atan(z / math.sqrt(freedom))
    for _ in range(60):
        over = _integral(power, angle) - CONFIDENCE * whole
        low, high = (low, angle) if over > 0 else (angle, high)
        step = angle - over / max(math.pow(math.cos(angle), power), 1e-12)
        following = step if low < step < high else (low + high) / 2
        if abs(following - angle) < 1e-12:
            break
        angle = following
    return math.sqrt(freedom) * math.tan(angle)


def _integral(power: float, to: float, parts: int = 200) -> float:
    width = to / parts
    inner = sum((4 if place % 2 else 2) * math.pow(math.cos(place * width), power) for place in range(1, parts))
    return width / 3 * (1 + inner + math.pow(math.cos(to), power))


# what was not the same
def differences(results: Sequence[Result]) -> list[Difference]:
    """Everything that is known to differ between the results."""
    facts = [identity_of(result) for result in results]
    found = []
    for what in dict.fromkeys(name for part in facts for name in part):
        values = [part.get(what, "") for part in facts]
        told = [value for value in values if value]
        # What one result does not tell cannot differ from what another tells.
        if len(set(told)) > 1:
            found.append(Difference(what, tuple(value or "not known" for value in values), what in SERIOUS))
    return found


def identity_of(result: Result) -> dict[str, str]:
    """What a result was made with, as far as it tells, each as a text that can be compared and shown."""
    benchmark = result.benchmark
    recipe, facts = benchmark.get("recipe") or {}, benchmark.get("facts") or {}
    report: Mapping[str, Any] = result.reports[0] if result.reports else {}
    service = facts.get("service") or {}
    nodes = facts.get("nodes") or {}
    servers = [nodes[name] for name in benchmark.get("server_nodes") or () if isinstance(nodes.get(name), dict)]
    senders = [nodes[name] for name in benchmark.get("load_nodes") or () if isinstance(nodes.get(name), dict)]
    plan = report.get("plan") or {}
    versions = report.get("versions") or {}
    return {
        "load": _load_told(recipe, plan),
        "recipe": str(benchmark.get("recipe_sha256") or "")[:16],
        "model": str(benchmark.get("model") or (recipe.get("load") or {}).get("model") or plan.get("model") or ""),
        "model digest": str(service.get("digest") or ""),
        "engine recipe": str(service.get("recipe") or ""),
        "engine flags": _flags_told(facts.get("engines") or ()),
        "replicas": str(service.get("replicas") or ""),
        "server hardware": _hardware_told(servers),
        "load hardware": _hardware_told(senders) or _machine_told(report.get("machine") or {}),
        "load nodes": str(len(benchmark.get("load_nodes") or ()) or ""),
        "drivers": _unique(f"{node.get('driver_version')} {node.get('cuda_version')}" for node in servers),
        "engines": _unique(json.dumps(node.get("engines"), sort_keys=True, default=str) for node in servers),
        "herder": str(facts.get("head") or versions.get("herder") or ""),
    }


def _load_told(recipe: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    load = recipe.get("load")
    if isinstance(load, dict):
        asked = {name: value for name, value in load.items() if name not in _NOT_LOAD}
        asked |= {name: recipe.get(name) for name in _ASKED if recipe.get(name)}
    elif plan:
        asked = {name: value for name, value in plan.items() if name not in _NOT_LOAD}
    else:
        return ""
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12] + " " + (text if len(text) <= 400 else text[:399] + "…")


def _flags_told(engines: Sequence[Any]) -> str:
    lines = set()
    for engine in engines:
        words, is_skipped = [], False
        for word in (engine.get("argv") or ()) if isinstance(engine, dict) else ():
            if is_skipped:
                is_skipped = False
            elif word in _CHANGES_BY_ITSELF:
                is_skipped = True  # and the word after it
            else:
                words.append(str(word))
        lines.add(" ".join(words))
    return "; ".join(sorted(line for line in lines if line))


def _hardware_told(nodes: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for node in nodes:
        gpus = [str(gpu) for gpu in node.get("gpus") or ()]
        named = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
        told.append(f"{node.get('cpus', '?')} x {node.get('cpu_model', '?')}{f', {named}' if named else ''}")
    return _unique(told)


def _machine_told(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpus']} CPUs, {machine.get('kernel', '')}" if machine.get("cpus") else ""


def _unique(texts: Any) -> str:
    return "; ".join(sorted({text for text in texts if text.strip() and "None" not in text}))
