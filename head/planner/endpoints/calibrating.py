"""How right the planner is, and how a cluster's own measurements make it so: accuracy, calibrate."""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
from head.planner.calibration.accuracy import AccuracyLine, Refusal, shipped_accuracy
from head.planner.calibration.active import active
from head.planner.calibration.own import ROWS, OwnCalibration, OwnRows, base, hash_of
from head.planner.calibration.own_fit import ENOUGH, Fit, RowErrors, fit
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.measured import rows_of
from head.planner.endpoints.questions import Desk, Question

Text = Annotated[str, Meta(max_length=200)]


class AccuracyAnswer(Answer, frozen=True, kw_only=True):
    """The error table of the shipped calibration, and what of the bars is met."""

    date: str
    row_set: str
    machine: str
    calibrations: dict[str, str]
    bars_met: int
    bars: int
    lines: tuple[AccuracyLine, ...]
    refused: tuple[Refusal, ...]
    conventions: str = (
        "Errors are shares of the measured value, on rows that the fit had not seen; inside: share of measured values"
        " inside the stated 80 % interval. Best peer measured: on the same kinds of rows, by others or by us."
    )


def accuracy(question: Question, desk: Desk) -> AccuracyAnswer:
    """What `python -m benchmarks.planner_accuracy --write` measured."""
    table = shipped_accuracy()
    judged = [line.is_met for line in table.lines if line.is_met is not None]
    return AccuracyAnswer(
        date=table.date,
        row_set=table.row_set,
        machine=table.machine,
        calibrations=table.calibrations,
        bars_met=sum(judged),
        bars=len(judged),
        lines=table.lines,
        refused=table.refused,
    )


class CalibrateQuestion(Question, frozen=True, kw_only=True):
    """Measured rows: of training (model or config, gpu, gpus, layout, stack, seq_length, batch_size, step_s or
    tokens_per_s) and of serving (model, gpu, engine, version, tp, isl, osl, concurrency, ttft_ms, tpot_ms).
    """

    rows: Annotated[list[dict[str, Any]], Meta(max_length=2 * ROWS, description="Measured rows.")]
    who: Annotated[Text, Meta(description="Who measured.")] = ""
    when: Annotated[Text, Meta(description="When it was measured.")] = ""
    machine: Annotated[Text, Meta(description="Where it was measured.")] = ""


class CalibrateErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of one quantity over the rows that are used: before, and after by the other rows alone."""

    what: str
    rows: int
    set_aside: int
    mape_before: float
    median_before: float
    mape_after: float
    median_after: float


class CalibrateAnswer(Answer, frozen=True, kw_only=True):
    """What the rows change, and the file that keeps it. `rows`: each with what the others say of it."""

    name: str
    training_rows: int
    serving_rows: int
    errors: tuple[CalibrateErrors, ...]
    rows: tuple[RowErrors, ...]
    notes: tuple[str, ...]
    document: OwnCalibration


def calibrate(question: CalibrateQuestion, desk: Desk) -> CalibrateAnswer:
    """Checks the rows, fits their correction of the shipped constants, and tells each row by the others."""
    if not question.rows:
        raise InvalidValue("rows: none", field="rows")
    where = question.machine or "this cluster"
    rows = rows_of(question.rows, f"{question.who + ' on ' if question.who else ''}{where}", desk)
    digest = hash_of(rows)
    found = fit(rows)
    count = len(rows.training) + len(rows.serving)
    name = f"own calibration of {where}{', ' + question.when if question.when else ''}: {count} rows ({digest[:8]})"
    document = OwnCalibration(
        name=name[:200],
        who=question.who,
        when=question.when,
        machine=question.machine,
        versions=_versions(rows),
        rows_sha256=digest,
        base=base(),
        rows=rows,
        correction=found.correction,
    )
    return CalibrateAnswer(
        name=document.name,
        training_rows=len(rows.training),
        serving_rows=len(rows.serving),
        errors=_tables(found),
        rows=found.errors,
        notes=tuple(_notes(rows, found)),
        document=document,
    )


def _versions(rows: OwnRows) -> tuple[str, ...]:
    named = {f"{row.engine} {row.version}".strip() for row in rows.serving} | {row.stack for row in rows.training}
    return tuple(sorted(named))


def _tables(found: Fit) -> tuple[CalibrateErrors, ...]:
    lines = []
    for what in dict.fromkeys(row.what for row in found.errors):
        mine = [row for row in found.errors if row.what == what]
        used = [row for row in mine if row.is_used] or mine
        before = [abs(row.before / row.measured - 1) for row in used]
        after = [abs(row.after / row.measured - 1) for row in used]
        lines.append(
            CalibrateErrors(
                what=what,
                rows=sum(row.is_used for row in mine),
                set_aside=sum(not row.is_used for row in mine),
                mape_before=statistics.fmean(before),
                median_before=statistics.median(before),
                mape_after=statistics.fmean(after),
                median_after=statistics.median(after),
            )
        )
    return tuple(lines)


def _notes(rows: OwnRows, found: Fit) -> list[str]:
    notes = []
    for what, count in (("training", len(rows.training)), ("serving", len(rows.serving))):
        if 0 < count < ENOUGH:
            notes.append(f"{count} {what} rows are few: with fewer than {ENOUGH} they are believed less")
    for line in _tables(found):
        if line.rows > 1 and line.mape_after > line.mape_before:
            notes.append(f"{line.what}: the rows do not tell each other better than the shipped calibration does")
    aside = sum(not row.is_used for row in found.errors)
    if aside:
        notes.append(f"{aside} measurements were set aside: see their reasons")
    notes.append("errors after are those of each row told by the others alone")
    if (own := active()) is not None:
        notes.append(f"{own.name} was not built on: a calibration is made of the rows that are given")
    return notes


ENDPOINTS = (
    Endpoint(
        "accuracy",
        "accuracy",
        Question,
        AccuracyAnswer,
        accuracy,
        "How right the shipped calibration is",
        method="GET",
    ),
    Endpoint(
        "calibrate",
        "calibrate",
        CalibrateQuestion,
        CalibrateAnswer,
        calibrate,
        "A calibration from measured results",
        example=(
            (
                "rows",
                [
                    {
                        "kind": "serving",
                        "model": "llama-3.1-8b",
                        "gpu": "H100",
                        "engine": "vllm",
                        "isl": 1024,
                        "osl": 256,
                        "concurrency": 16,
                        "ttft_ms": 80.0,
                        "tpot_ms": 9.0,
                    }
                ],
            ),
            ("machine", "node-1"),
        ),
        codes=("model_not_found", "not_found", "nothing_fits"),
    ),
)
