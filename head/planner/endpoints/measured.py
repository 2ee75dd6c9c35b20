"""Measured results as they come in: rows of JSON or CSV, checked one by one, each error with its row's number.

A training row is a training layout with the time of its step (or tokens per second); a serving row an engine under a
load with its TTFT and TPOT. A row without `kind` is a serving row when it says isl, osl, ttft_ms or tpot_ms.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.errors import HerderError, InvalidValue
from head.planner.calibration.own import ROWS, OwnRows, ServingPoint
from head.planner.calibration.serving_near import OWN
from head.planner.calibration.training_rows import TrainingRow
from head.planner.endpoints.layouts import LayoutQuestion, machine_and_layout
from head.planner.endpoints.questions import Count, Desk, PlacedQuestion, architecture_for, topology_for
from head.planner.serving.engine_step import ServingLayout
from head.planner.serving.estimate import EngineSettings, Workload, estimate_serving
from head.planner.training.step_time import estimate

ERRORS = 20  # that are told at once
_SERVING_FIELDS = ("isl", "osl", "ttft_ms", "tpot_ms", "engine", "concurrency")
# Published peaks are reached within some per cent; a row further above them is wrong by a factor somewhere.
_ABOVE_ROOFLINE = 0.95

Measured = Annotated[float, Meta(ge=0, lt=1e9)]
Word = Annotated[str, Meta(max_length=200)]


class MeasuredTraining(LayoutQuestion, frozen=True, kw_only=True):
    """A training step that ran: seconds of a step, or tokens per second of all GPUs. `stack`: name or name@release."""

    kind: Literal["training"] = "training"
    id: Word = ""
    step_s: Measured = 0.0
    tokens_per_s: Measured = 0.0


class MeasuredServing(PlacedQuestion, frozen=True, kw_only=True):
    """An engine that ran with `concurrency` requests in flight: mean TTFT and TPOT in milliseconds."""

    kind: Literal["serving"] = "serving"
    id: Word = ""
    engine: Literal["vllm", "sglang", "trtllm", "llamacpp"]
    version: Word = ""
    weights: Annotated[str, Meta(max_length=32)] = ""
    kv_dtype: Annotated[str, Meta(max_length=32)] = ""
    tp: Count = 1
    pp: Count = 1
    dp: Count = 1
    ep: Count = 1
    isl: Annotated[int, Meta(ge=1, le=10_000_000)]
    osl: Annotated[int, Meta(ge=1, le=10_000_000)]
    concurrency: Annotated[float, Meta(gt=0, le=1e6)]
    ttft_ms: Measured = 0.0
    tpot_ms: Measured = 0.0


def rows_of_csv(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV file with a header: cells as numbers where their column is one, empty cells left out.

    Raises: InvalidValue for a file without a header or with cells beyond it.
    """
    reader = csv.DictReader(io.StringIO(text), restkey="", strict=True)
    try:
        if not reader.fieldnames or not all(reader.fieldnames):
            raise InvalidValue("a CSV file begins with the names of its columns")
        found = []
        for number, cells in enumerate(reader, 1):
            if "" in cells:
                raise InvalidValue(f"row {number}: more cells than columns", row=number)
            row = {name.strip(): cell.strip() for name, cell in cells.items() if cell is not None and cell.strip()}
            found.append(_typed(row, number))
    except csv.Error as error:
        raise InvalidValue(f"not a CSV file: {error}") from None
    return found


def _typed(row: dict[str, Any], number: int) -> dict[str, Any]:
    try:
        return {name: value for name, value in msgspec.to_builtins(_decoded(row, is_text=True)).items() if name in row}
    except HerderError as error:
        raise InvalidValue(f"row {number}: {error.message}", row=number, **error.details) from None


def _decoded(row: Mapping[str, Any], *, is_text: bool = False) -> MeasuredTraining | MeasuredServing:
    """A row by its kind. Raises: InvalidValue with the field."""
    kind = row.get("kind") or ("serving" if any(row.get(name) for name in _SERVING_FIELDS) else "training")
    if kind not in ("training", "serving"):
        raise InvalidValue(f"kind: {str(kind)[:40]!r} is neither training nor serving", field="kind")
    cls: Any = MeasuredServing if kind == "serving" else MeasuredTraining
    try:
        found: MeasuredTraining | MeasuredServing = msgspec.convert(dict(row), cls, strict=not is_text)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise InvalidValue(f"{field + ': ' if field else ''}{text}", field=field) from None
    return found


def rows_of(raw: Sequence[Any], source: str, desk: Desk) -> OwnRows:
    """Every row as a question with its measured answer. Raises: InvalidValue that names the rows and what is wrong."""
    training: list[TrainingRow] = []
    serving: list[ServingPoint] = []
    wrong: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, row in enumerate(raw, 1):
        try:
            if not isinstance(row, Mapping):
                raise InvalidValue("a row is an object")
            asked = _decoded(row)
            name = OWN + (asked.id or f"{number}")
            if name in seen:
                raise InvalidValue(f"id: {asked.id!r} was used before", field="id")
            seen.add(name)
            if isinstance(asked, MeasuredTraining):
                training.append(_step(asked, name, source, desk))
            else:
                serving.append(_point(asked, name, source, desk))
        except HerderError as error:
            wrong.append({"row": number, "message": error.message, "field": error.details.get("field", "")})
        except (ArithmeticError, LookupError, ValueError, RecursionError) as error:
            wrong.append({"row": number, "message": f"{type(error).__name__}: {str(error)[:100]}", "field": ""})
    if wrong:
        first = "; ".join(f"row {item['row']}: {item['message']}" for item in wrong[:3])
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InvalidValue(f"{len(wrong)} of {len(raw)} rows cannot be used. {first}{more}", rows=wrong[:ERRORS])
    if max(len(training), len(serving)) > ROWS:
        raise InvalidValue(f"at most {ROWS} rows of a kind", field="rows")
    return OwnRows(training=tuple(training), serving=tuple(serving))


def _names_machine(asked: PlacedQuestion, desk: Desk) -> None:
    if not (asked.gpu or asked.mock_topology or any(kind.gpus for kind in desk.kinds)):
        raise InvalidValue("gpu: say which accelerator it ran on", field="gpu")


def _step(asked: MeasuredTraining, name: str, source: str, desk: Desk) -> TrainingRow:
    _names_machine(asked, desk)
    if bool(asked.step_s) == bool(asked.tokens_per_s):
        raise InvalidValue("step_s or tokens_per_s: give one of them", field="step_s")
    arch = architecture_for(asked, desk)
    topology, layout = machine_and_layout(asked, desk)
    seconds = asked.step_s or layout.global_batch * layout.seq / asked.tokens_per_s
    if not math.isfinite(seconds):
        raise InvalidValue("tokens_per_s: too small", field="tokens_per_s")
    row = TrainingRow(
        id=name,
        source=source,
        model=arch.name,
        architecture=arch,
        stack=asked.stack,
        accelerator=topology.accelerator.name,
        gpus=topology.gpus,
        nic_gbit_per_s=topology.nic_bytes_per_s * 8 / 1e9,
        layout=layout,
        step_s=seconds,
    )
    least = estimate(arch, row.topology(), layout, asked.stack).roofline_s
    if seconds < _ABOVE_ROOFLINE * least:
        raise InvalidValue(
            f"a step of {seconds:.4g} s is faster than the GPUs' peak allows ({least:.4g} s)", field="step_s"
        )
    return row


def _point(asked: MeasuredServing, name: str, source: str, desk: Desk) -> ServingPoint:
    _names_machine(asked, desk)
    if not asked.ttft_ms and not asked.tpot_ms:
        raise InvalidValue("ttft_ms, tpot_ms: give at least one of them", field="tpot_ms")
    arch = architecture_for(asked, desk)
    layout = ServingLayout(tp=asked.tp, pp=asked.pp, dp=asked.dp, ep=asked.ep)
    topology = topology_for(asked, desk, gpus=layout.gpus)
    point = ServingPoint(
        id=name,
        source=source,
        architecture=arch,
        accelerator=topology.accelerator.name,
        engine=asked.engine,
        version=asked.version,
        weights=asked.weights,
        kv_dtype=asked.kv_dtype,
        layout=layout,
        isl=asked.isl,
        osl=asked.osl,
        concurrency=asked.concurrency,
        ttft_s=asked.ttft_ms / 1e3,
        tpot_s=asked.tpot_ms / 1e3,
    )
    settings = EngineSettings(
        backend=point.engine, version=point.version, weights=point.weights, kv_dtype=point.kv_dtype, layout=layout
    )
    load = Workload(isl=point.isl, osl=point.osl, concurrency=point.concurrency)
    least = estimate_serving(arch, topology, settings, load).roofline_tpot_s
    if 0 < point.tpot_s < _ABOVE_ROOFLINE * least and point.osl > 1:
        raise InvalidValue(
            f"a token in {1e3 * point.tpot_s:.4g} ms is faster than the memory allows ({1e3 * least:.4g} ms)",
            field="tpot_ms",
        )
    return point
