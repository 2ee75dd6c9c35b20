"""Predictions against measurements, area by area, as lines of the accuracy table.

`shipped_*` predict the rows that ship by fits that did not see them, through the areas' own functions. `truth_*` ask
the shipped calibration about rows in the exchange form, those that do not ship apart, and refuse no table for a row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.planner_accuracy_rows import ROW_ERRORS, Errors, id_of, reason_of, refusals, source_of
from common.errors import HerderError
from head.planner.calibration import memory_fit
from head.planner.calibration.accuracy import AccuracyLine, Refusal
from head.planner.calibration.memory_rows import MemoryRow
from head.planner.calibration.memory_rows import shipped_rows as memory_rows
from head.planner.calibration.memory_truth import row_of as memory_row_of
from head.planner.calibration.serving_accuracy import cross_validated, estimate_of_row
from head.planner.calibration.serving_fit import prepare
from head.planner.calibration.serving_near import shipped_memory
from head.planner.calibration.serving_rows import offline_question_of, question_of
from head.planner.calibration.training_accuracy import ErrorLine, accuracy
from head.planner.calibration.training_fit import calibrate
from head.planner.calibration.training_rows import shipped_rows as training_rows
from head.planner.calibration.training_truth import row_of as training_row_of
from head.planner.hardware import collective_tables
from head.planner.hardware.accelerators import accelerator
from head.planner.hardware.collectives import time_s
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.presets import lookup
from head.planner.serving.estimate import EngineSettings, Workload, estimate_serving
from head.planner.serving.search import SearchSpace, search_serving
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import constants as memory_constants
from head.planner.training.memory import estimate_memory
from head.planner.training.search import search
from head.planner.training.step_time import estimate

Lines = list[AccuracyLine]
SEEN, UNSEEN = "rows that ship (fitted)", "rows that do not ship (never seen)"
TRAINING, MEMORY = "training step time", "peak training memory"
TPOT, TTFT, OFFLINE, COLLECTIVES = "decode TPOT", "TTFT", "offline max throughput", "collectives"
MODES = {
    "agg": "aggregated",
    "disagg": "disaggregated",
    "disagg?": "disaggregated, number of workers not stated",
    "offline": "",
}
SCHEMES = {"five folds": "5 folds", "curve left out": "curve left out", "model left out": "model left out"}
_DEVICES = ("GB300", "GB200", "B300", "B200", "H200", "H100", "A100", "L40S", "V100")


# training time
def shipped_training(date: str) -> Lines:
    """Folds, whole models, whole sources left out. Takes minutes."""
    _, left_out = calibrate(training_rows(), name="accuracy", date=date)
    names = {"folds": "5 folds", "models": "model left out", "sources": "source left out"}
    found = []
    for key, lines in accuracy(left_out).items():
        sources = len(lines) - 1
        found += [_training_line(line, names[key], sources) for line in lines if line.group == "all"]
        if key == "sources":
            found += [_training_line(line, f"source left out: {_short(line.group)}", 1) for line in lines[1:]]
    return found


def _training_line(line: ErrorLine, scheme: str, sources: int) -> AccuracyLine:
    return AccuracyLine(
        what=TRAINING,
        scheme=scheme,
        rows=line.rows,
        sources=sources,
        mape=line.mape,
        median=line.median,
        inside=line.covered,
    )


def _short(title: str) -> str:
    return title.split(" (")[0].split(", as ")[0][:60].strip()


def truth_training(rows: Sequence[Any]) -> tuple[Lines, list[Refusal]]:
    """The shipped constants on training runs; by source where they were never seen."""
    known = {row.id for row in training_rows()}
    found: dict[str, list[tuple[str, float, bool]]] = {}
    refused: dict[str, str] = {}
    for position, raw in enumerate(rows, 1):
        name = id_of(raw, position)
        try:
            row = training_row_of(raw)
            if not row.is_fitted:
                refused[name] = "the row contradicts itself"
                continue
            step = estimate(row.architecture, row.topology(), row.layout, row.stack).step_s
            if not row.step_s > 0:
                raise ValueError("the measured time is not positive")
        except ROW_ERRORS as error:
            refused[name] = reason_of(error)
            continue
        is_new = row.id not in known
        result = (row.source, step.value / row.step_s - 1, step.low <= row.step_s <= step.high)
        found.setdefault(UNSEEN if is_new else SEEN, []).append(result)
        if is_new:
            found.setdefault(f"never seen: {_short(row.source)}", []).append(result)
    return [_measured(TRAINING, scheme, results) for scheme, results in found.items()], refusals(TRAINING, refused)


def _measured(what: str, scheme: str, results: Sequence[tuple[str, float, bool]]) -> AccuracyLine:
    sizes = [abs(error) for _, error, _ in results]
    return AccuracyLine(
        what=what,
        scheme=scheme,
        rows=len(sizes),
        sources=len({source for source, _, _ in results}),
        mape=statistics.fmean(sizes) if sizes else None,
        median=statistics.median(sizes) if sizes else None,
        inside=statistics.fmean(inside for _, _, inside in results) if sizes else None,
    )


# training memory
def shipped_memory_lines() -> Lines:
    """Folds and whole sources left out."""
    return [
        _memory_line(line, "5 folds" if "folds" in line.name else "source left out")
        for line in memory_fit.table(memory_rows(), memory_constants())[:2]
    ]


def _memory_line(line: memory_fit.MemoryErrors, scheme: str) -> AccuracyLine:
    said = [f"{line.oom_missed} of {line.ooms} out-of-memory runs called a fit"] if line.ooms else []
    if line.rows:
        said.append(f"{line.called_impossible} measured runs called impossible")
    return AccuracyLine(
        what=MEMORY,
        scheme=scheme,
        rows=line.rows + line.ooms,
        sources=len({row.source for row in memory_rows()}) if scheme in ("5 folds", "source left out") else 0,
        mape=line.mape if line.rows else None,
        median=line.median if line.rows else None,
        inside=line.covered if line.rows else None,
        figure=", ".join(said),
        is_met=not line.oom_missed and not line.called_impossible,
    )


def truth_memory(rows: Sequence[Any]) -> tuple[Lines, list[Refusal]]:
    """The shipped constants on measured peaks."""
    known = {row.id for row in memory_rows()}
    groups: dict[str, list[MemoryRow]] = {}
    refused: dict[str, str] = {}
    fitted = memory_constants()
    for position, raw in enumerate(rows, 1):
        if isinstance(raw, dict) and raw.get("kind") != "peak_training_memory":
            continue
        name = id_of(raw, position)
        try:
            row = memory_row_of(raw)
            memory_fit.errors(name, [(row, fitted)], fitted.sigma_unseen)
        except ROW_ERRORS as error:
            refused[name] = reason_of(error)
            continue
        groups.setdefault(SEEN if row.id in known else UNSEEN, []).append(row)
    lines = [
        _memory_line(memory_fit.errors(scheme, [(row, fitted) for row in some], fitted.sigma_unseen), scheme)
        for scheme, some in groups.items()
    ]
    return lines, refusals(MEMORY, refused)


# serving
def shipped_serving() -> Lines:
    """The cross-validated table that the serving calibration carries."""
    found = []
    for row in cross_validated():
        is_offline = row.mode == "offline"
        what = OFFLINE if is_offline else TPOT if row.quantity == "tpot" else TTFT
        scheme = ", ".join(part for part in (SCHEMES[row.scheme], MODES.get(row.mode, row.mode)) if part)
        found.append(
            AccuracyLine(
                what=what,
                scheme=scheme,
                rows=row.rows,
                mape=row.mape,
                median=row.median,
                inside=row.inside_80,
            )
        )
    return sorted(found, key=lambda line: [TPOT, TTFT, OFFLINE].index(line.what))


def truth_serving(rows: Sequence[Any]) -> tuple[Lines, list[Refusal]]:
    """The shipped calibration on serving points and offline tables, by mode."""
    known = {
        (block, point.sequences, point.isl, point.osl) for block, points in shipped_memory().curves for point in points
    }
    found: dict[tuple[str, str], list[tuple[str, float, bool]]] = {}
    refused: dict[str, str] = {}
    for position, raw in enumerate(rows, 1):
        if isinstance(raw, dict) and raw.get("kind") not in (None, "offline_max_throughput"):
            continue
        name = id_of(raw, position)
        try:
            for what, mode, error, inside in _asked(raw):
                scheme = f"{SEEN if _point(raw) in known else UNSEEN}{', ' if MODES[mode] else ''}{MODES[mode]}"
                found.setdefault((what, scheme), []).append((source_of(raw).split(";")[0], error, inside))
        except ROW_ERRORS as error:
            refused[name] = reason_of(error)
    lines = [_measured(what, scheme, results) for (what, scheme), results in sorted(found.items())]
    return lines, refusals("serving", refused)


def _point(raw: Any) -> tuple[Any, float, float, float]:
    """What was measured: tables repeat a point under several ids."""
    is_offline = raw.get("kind") == "offline_max_throughput"
    found = prepare(offline_question_of(raw) if is_offline else question_of(raw))
    return found.block, round(found.sequences, 2), found.row.isl, found.row.osl


def _asked(raw: Any) -> list[tuple[str, str, float, bool]]:
    """(what, mode, relative error, inside the interval) for each measured quantity of a row."""
    expected, conditions = raw["expected"], raw["conditions"]
    answer = estimate_of_row(raw)
    if raw.get("kind") == "offline_max_throughput":
        measured, ours = float(expected["output_tokens_per_s_per_gpu"]), answer.output_tokens_per_s_per_gpu
        return [(OFFLINE, "offline", ours.value / measured - 1, ours.low <= measured <= ours.high)]
    mode = "agg"
    if conditions.get("mode") == "disagg":
        mode = "disagg" if conditions.get("decode_num_workers") else "disagg?"
    found = []
    for what, field, quantity in ((TPOT, "tpot_ms", answer.tpot_s), (TTFT, "ttft_ms", answer.ttft_s)):
        measured = float(expected.get(field) or 0.0) / 1e3
        if measured > 0:
            found.append((what, mode, quantity.value / measured - 1, quantity.low <= measured <= quantity.high))
    return found


# collectives
def shipped_collectives(document: dict[str, Any]) -> Lines:
    """Measured curves with a point, a curve, a system left out."""
    measured: dict[collective_tables.Key, list[float]] = {
        (row["system"], row["op"], row["gpus"]): row["us"] for row in document["curves"] if row.get("is_measured", True)
    }
    found = []
    for what, by_curve in collective_tables.left_out(measured).items():
        sizes = [abs(error) for errors in by_curve.values() for error in errors]
        found.append(
            AccuracyLine(
                what=COLLECTIVES,
                scheme=f"{what} left out",
                rows=len(sizes),
                sources=len({key[0] for key in measured}),
                mape=statistics.fmean(sizes),
                median=statistics.median(sizes),
            )
        )
    return found


def truth_collectives(rows: Sequence[Any], known: set[tuple[str, str, int]]) -> tuple[Lines, list[Refusal]]:
    """The shipped tables and formula on other curves, from 1 MiB up."""
    seen, unseen = Errors(what=COLLECTIVES), Errors(what=COLLECTIVES)
    refused: dict[str, str] = {}
    for position, raw in enumerate(rows, 1):
        name = id_of(raw, position)
        try:
            conditions, points = raw["conditions"], raw.get("points") or []
            if not points or not raw.get("usable", True):
                continue
            op = {"alltoall": "all_to_all"}.get(conditions["op"], str(conditions["op"]))
            gpus, nodes = int(conditions["gpus"]), int(conditions.get("nodes") or 1)
            words = str(conditions["system"])
            network: Any = "efa" if "EFA" in words else "unknown"
            topology = topology_of_preset(_device(words), gpus, gpus_per_node=max(1, gpus // nodes), network=network)
            errors = [
                time_s(op, float(p["bytes"]), gpus, topology) * 1e6 / float(p["us"]) - 1  # type: ignore[arg-type]
                for p in points
                if float(p["bytes"]) >= 1 << 20
            ]
        except ROW_ERRORS as error:
            refused[name] = reason_of(error)
            continue
        group = seen if (words, op, gpus) in known else unseen
        group.found += [(name, source_of(raw), error) for error in errors]
    lines = [seen.line(f"{SEEN}, from 1 MiB"), unseen.line(f"{UNSEEN}, from 1 MiB")]
    return [line for line in lines if line.rows], refusals(COLLECTIVES, refused)


def _device(words: str) -> str:
    """The accelerator of a system: a known name, else one that the words hold ("4x P6-B200 (8x50 GB/s EFA v4)")."""
    try:
        return accelerator(words).name
    except HerderError:
        upper = words.upper()
        return next((device for device in _DEVICES if device in upper), words)


# speed
def speed() -> Lines:
    """Median milliseconds of one estimate, and seconds of a search for each 1,000 configurations; one core."""
    arch, many = lookup("llama-3.1-70b"), topology_of_preset("H100-SXM-80GB", 64)
    layout = TrainingLayout(tp=8, pp=2, dp=4, global_batch=256)
    few, engine = topology_of_preset("H100-SXM-80GB", 8), EngineSettings()
    work = Workload(isl=1024, osl=256, concurrency=32)
    each: tuple[tuple[str, Callable[[], object]], ...] = (
        ("one training step estimate", lambda: estimate(arch, many, layout, "megatron")),
        ("one training memory estimate", lambda: estimate_memory(arch, many, layout)),
        ("one serving estimate", lambda: estimate_serving(lookup("llama-3.1-8b"), few, engine, work)),
    )
    found = [_timed(name, _median_s(call, 100)) for name, call in each]
    started = time.perf_counter()
    trained = search(arch, many, layout)
    took = (time.perf_counter() - started) / max(trained.examined, 1) * 1000
    found.append(_searched("training search of 1,000", took, trained.examined))
    started = time.perf_counter()
    served = search_serving(arch, few, work, SearchSpace())
    took = (time.perf_counter() - started) / max(served.evaluated, 1) * 1000
    found.append(_searched("serving search of 1,000", took, served.evaluated))
    return found


def _median_s(call: Callable[[], object], times: int) -> float:
    call()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _timed(name: str, seconds: float) -> AccuracyLine:
    return AccuracyLine(
        what="time",
        scheme=name,
        rows=0,
        figure=f"{1e3 * seconds:.2f} ms",
        bar="5 ms",
        is_met=seconds <= 5e-3,
        peer="Calculon 1.8 ms",
    )


def _searched(name: str, seconds: float, examined: int) -> AccuracyLine:
    return AccuracyLine(
        what="time",
        scheme=name,
        rows=0,
        figure=f"{seconds:.2f} s ({examined} examined)" if math.isfinite(seconds) else "",
        bar="1 s",
        is_met=seconds <= 1.0,
        peer="aiconfigurator 1.3-5 s",
    )
