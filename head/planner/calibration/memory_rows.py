"""Measured training peaks: what they are, the ones that ship, and what the planner says of each.

A row is a question (architecture, layout, program, device) and either the peak that its source states or the fact that
the run ended out of memory. The shipped rows are in data/memory_rows.json, each with the title of its source.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import msgspec

from head.planner.hardware.accelerators import accelerator
from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import (
    MemoryConstants,
    MemoryParts,
    Verdict,
    constants,
    fit_probability,
    peak_parts,
    verdict_of,
)
from head.planner.training.memory_stack import Measure, stack_named

MEASURE_BIAS_GPUS_PER_NODE = 8


class MemoryRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One published peak. `peak_bytes` is 0 for a run that ended out of memory."""

    id: str
    source: str
    url: str = ""
    architecture: Architecture
    layout: TrainingLayout
    stack: str
    measure: Measure
    accelerator: str
    gpus: int
    peak_bytes: float = 0.0
    is_oom: bool = False
    provenance: str = ""

    @property
    def capacity_bytes(self) -> float:
        """What a process can see of the device."""
        return float(accelerator(self.accelerator).visible_bytes)


class RowAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's answer to one row: the bytes that its measure counts, and the verdict on the whole."""

    parts: MemoryParts
    predicted: float
    total: float
    probability: float
    verdict: Verdict


class _Shipped(msgspec.Struct, frozen=True):
    models: dict[str, Architecture]
    rows: list[dict[str, object]]


@cache
def shipped_rows() -> tuple[MemoryRow, ...]:
    """The rows that ship with the planner."""
    text = resources.files("head.planner").joinpath("data", "memory_rows.json").read_bytes()
    return decode_rows(text)


def decode_rows(text: bytes) -> tuple[MemoryRow, ...]:
    """Rows of the shipped form: every architecture once, rows naming theirs."""
    shipped = msgspec.json.decode(text, type=_Shipped)
    found = []
    for row in shipped.rows:
        model = shipped.models[str(row["architecture"])]
        found.append(msgspec.convert({**row, "architecture": msgspec.to_builtins(model)}, MemoryRow))
    return tuple(found)


def encode_rows(rows: tuple[MemoryRow, ...]) -> bytes:
    """The shipped form, one row a line."""
    models: dict[str, Architecture] = {}
    lines = []
    for row in rows:
        key = _key(row.architecture, models)
        lines.append(msgspec.json.encode({**msgspec.to_builtins(row), "architecture": key}).decode())
    kept = ",\n".join(f"{msgspec.json.encode(key).decode()}: {_compact(model)}" for key, model in models.items())
    return ('{"models": {\n' + kept + '},\n"rows": [\n' + ",\n".join(lines) + "]}\n").encode()


def answer(row: MemoryRow, fitted: MemoryConstants | None = None) -> RowAnswer:
    """The planner's answer to `row`."""
    fitted = fitted or constants()
    stack = stack_named(row.stack, row.layout)
    parts, _, _, _ = peak_parts(row.architecture, row.layout, stack, fitted, MEASURE_BIAS_GPUS_PER_NODE)
    probability = fit_probability(parts.total, row.capacity_bytes, fitted.sigma_unseen)
    return RowAnswer(
        parts=parts,
        predicted=parts.measured(row.measure),
        total=parts.total,
        probability=probability,
        verdict=verdict_of(probability),
    )


def _compact(model: Architecture) -> str:
    defaults = msgspec.to_builtins(Architecture(name="", hidden=0, vocab=0, groups=()))
    values = {key: value for key, value in msgspec.to_builtins(model).items() if defaults.get(key) != value}
    return msgspec.json.encode(values).decode()


def _key(model: Architecture, models: dict[str, Architecture]) -> str:
    for key, known in models.items():
        if known == model:
            return key
    key, number = model.name, 2
    while key in models:
        key, number = f"{model.name} ({number})", number + 1
    models[key] = model
    return key
