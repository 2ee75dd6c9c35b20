"""The public estimate asked the questions of published rows, and what cross-validation said of its errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from head.planner.calibration.serving_rows import (
    ServingRow,
    architecture_of_row,
    cache_dtype_of,
    offline_question_of,
    question_of,
    topology_of,
)
from head.planner.calibration.serving_step import Accuracy, shipped
from head.planner.serving.disaggregated import Disaggregated
from head.planner.serving.estimate import EngineSettings, ServingEstimate, Workload, estimate_serving


def settings_of(row: ServingRow) -> EngineSettings:
    """The engine of a published row."""
    arch = architecture_of_row(row)
    plan = None
    if row.prefill_layout is not None:
        plan = Disaggregated(
            prefill_layout=row.prefill_layout,
            prefill_workers=row.prefill_workers,
            decode_workers=row.decode_workers,
        )
    return EngineSettings(
        backend=row.backend,  # type: ignore[arg-type]
        version=row.version,
        weights=row.weights,
        kv_dtype=cache_dtype_of(row.weights, arch),
        layout=row.layout,
        disaggregated=plan,
        is_offline=row.mode == "offline",
    )


def estimate_of_row(row: Mapping[str, Any]) -> ServingEstimate:
    """What `estimate_serving` answers to a row of the serving truth set (its conditions and source)."""
    is_offline = row.get("kind") == "offline_max_throughput"
    question = offline_question_of(row) if is_offline else question_of(row)
    load = Workload(
        isl=question.isl, osl=question.osl, concurrency=question.sequences * max(1, question.decode_workers)
    )
    return estimate_serving(architecture_of_row(question), topology_of(question), settings_of(question), load)


def cross_validated() -> tuple[Accuracy, ...]:
    """The error table that the shipped calibration carries."""
    return shipped().accuracy
