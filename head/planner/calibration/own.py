"""The calibration of a cluster of its own: measured rows, what they correct, and the file they are kept in.

A calibration corrects the shipped constants and keeps the rows it was made of, who measured them, when and where. The
file is JSON; its rows are hashed. When Herder comes with other constants than those it corrects, it is made anew from
its rows as it is read, so that a correction never meets constants it was not made for.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from importlib import resources
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
from head.planner.calibration.active import Active
from head.planner.calibration.serving_near import Block, Point
from head.planner.calibration.training_rows import TrainingRow
from head.planner.model.architecture import Architecture
from head.planner.serving.engine_step import Backend, ServingLayout
from head.planner.training.constants import Constants, LocalCorrection, family_of, shipped
from herder.decoding import UNREADABLE

FORMAT = "herder-planner-calibration-1"
FILE_BYTES = 8 << 20
ROWS = 250  # of each kind: their fit takes seconds
_BASES = ("training_constants.json", "serving_constants.json", "serving_rows.json.gz")
_LOCAL = LocalCorrection(amplitude=0.15, length=4.0, noise=0.05, weights={})  # when the shipped constants have none
OFFSET_LIMIT = 0.5  # in logarithm, of what all rows of a stack on a generation of accelerators share

Text = Annotated[str, Meta(max_length=200)]
Positive = Annotated[float, Meta(gt=0, lt=1e9)]


class ServingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One measured load of one engine. Seconds; 0: not measured. `concurrency` requests are kept in flight."""

    id: str
    source: str
    architecture: Architecture
    accelerator: str
    engine: Backend
    version: str = ""
    weights: str = ""
    kv_dtype: str = ""
    layout: ServingLayout = ServingLayout()
    isl: Annotated[int, Meta(ge=1, le=10_000_000)]
    osl: Annotated[int, Meta(ge=1, le=10_000_000)]
    concurrency: Positive
    ttft_s: Annotated[float, Meta(ge=0, lt=1e9)] = 0.0
    tpot_s: Annotated[float, Meta(ge=0, lt=1e9)] = 0.0


class OwnRows(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured."""

    training: tuple[TrainingRow, ...] = ()
    serving: tuple[ServingPoint, ...] = ()


class Correction(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows say of the shipped constants.

    Weights of training rows by id, the shift that a stack on a generation of accelerators has in all (in logarithm),
    step times that each row was told without it, and serving points with their weights by curve.
    """

    step_weights: dict[str, float] = {}
    step_shifts: dict[str, float] = {}
    step_told: dict[str, float] = {}
    curves: tuple[tuple[Block, tuple[Point, ...]], ...] = ()


class OwnCalibration(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    format: Literal["herder-planner-calibration-1"] = "herder-planner-calibration-1"
    name: Text
    who: Text = ""
    when: Text = ""
    machine: Text = ""
    versions: tuple[Text, ...] = ()
    rows_sha256: str
    base: str  # the shipped constants that it corrects
    rows: OwnRows
    correction: Correction


class Rows(tuple[TrainingRow, ...]):
    """Training rows that are hashed once: estimates look up by them thousands of times in a search."""

    _hash: int

    def __new__(cls, rows: Any) -> Rows:
        """As a tuple."""
        made = super().__new__(cls, rows)
        made._hash = hash(tuple(row.id for row in made))
        return made

    def __hash__(self) -> int:
        return self._hash


def hash_of(rows: OwnRows) -> str:
    """SHA-256 of the rows in their one form."""
    return hashlib.sha256(msgspec.json.encode(rows, order="deterministic")).hexdigest()


@cache
def base() -> str:
    """Which shipped constants and points these are, in twelve digits."""
    found = hashlib.sha256()
    for name in _BASES:
        found.update(resources.files("head.planner").joinpath("data", name).read_bytes())
    return found.hexdigest()[:12]


@lru_cache(maxsize=4)
def read(data: bytes) -> Active:
    """A calibration file, ready for use. Raises: InvalidValue for what is none, or was changed by hand."""
    if len(data) > FILE_BYTES:
        raise InvalidValue(f"a calibration file is at most {FILE_BYTES >> 20} MiB")
    try:
        found = msgspec.json.decode(data, type=OwnCalibration)
    except UNREADABLE as error:
        raise InvalidValue(f"not a calibration file: {str(error)[:200]}", hint="herder plan calibrate") from None
    rows = found.rows
    if max(len(rows.training), len(rows.serving)) > ROWS:
        raise InvalidValue(f"a calibration file has at most {ROWS} rows of a kind")
    if hash_of(rows) != found.rows_sha256:
        raise InvalidValue("the calibration file's rows are not those that it was made of", hint="calibrate again")
    note = ""
    if found.base != base():
        from head.planner.calibration.own_fit import fit

        note = f"made anew from its rows: it corrected the constants {found.base}, these are {base()}"
        found = msgspec.structs.replace(found, correction=fit(rows).correction, base=base())
    return active_of(found, note)


def active_of(found: OwnCalibration, note: str = "") -> Active:
    """What estimates take of a calibration."""
    return Active(
        name=found.name,
        training=constants_of(found) if found.rows.training else None,
        curves=found.correction.curves,
        note=note,
    )


def constants_of(found: OwnCalibration) -> Constants:
    """The shipped constants with the cluster's rows beside the shipped ones."""
    return corrected(shipped(), found.rows.training, found.correction, f"{shipped().name}; {found.name}")


def corrected(fitted: Constants, rows: tuple[TrainingRow, ...], correction: Correction, name: str) -> Constants:
    """`fitted` with shifts of stacks and with rows that pull the configurations near them."""
    used = Rows(row for row in rows if row.id in correction.step_weights)
    levels = dict(fitted.constants)
    whole = levels["all"]
    shifts = dict(whole.groups.get("stack_generation", {}))
    for group, shift in correction.step_shifts.items():
        shifts[group] = shifts.get(group, 0.0) + max(-OFFSET_LIMIT, min(OFFSET_LIMIT, shift))
    levels["all"] = msgspec.structs.replace(whole, groups={**whole.groups, "stack_generation": shifts})
    product = levels["product"]  # where a stack stands among those with rows
    stacks = {family_of(row.stack): 0.0 for row in used} | product.groups.get("stack", {})
    levels["product"] = msgspec.structs.replace(product, groups={**product.groups, "stack": stacks})
    local = fitted.local or _LOCAL
    return msgspec.structs.replace(
        fitted,
        name=name,
        rows=fitted.rows + len(used),
        constants=levels,
        local=msgspec.structs.replace(local, weights={**local.weights, **correction.step_weights}),
        predicted={**fitted.predicted, **correction.step_told},
        extra_rows=used,
    )
