"""Fits the step-time constants to measured rows, and tells how wrong they are on rows left out.

Maximum a posteriori in logarithm: residuals of the step time with a soft-L1 loss against the priors of
`training.constants`, whose levels are pulled to their parents. Sources with many rows count less per row. Then a local
correction (a Gaussian process on what remains) for configurations next to measured ones.

Needs numpy (the `planner` extra); estimates do not.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from common.errors import ExtraMissing
from head.planner.calibration.intervals import bands_of, quantile
from head.planner.calibration.training_features import FAR, position_of
from head.planner.calibration.training_rows import TrainingRow, shipped_rows
from head.planner.training.constants import (
    PRIORS,
    Band,
    Constants,
    Levels,
    LocalCorrection,
    family_of,
    groups_of,
    shipped,
)
from head.planner.training.step_time import combine, work_of
from head.planner.training.step_work import step_work

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

_NOISE = 0.08  # spread of a good row's residual in logarithm: repeated releases of one configuration differ by as much
_SOURCE_ROWS = 20  # a source with more rows than this is weighted down by the square root of the excess
_LOCAL = (0.15, 4.0, 0.05)  # amplitude, length, noise of the local correction; chosen by 5-fold cross-validation
_FOLDS = 5
_COVERAGE = 0.80
# Residuals of left-out rows are what future rows will show only if those are alike; half of the missing tenth is kept.
_COVERAGE_FITTED = 0.86
EDGES = (0.6, 1.5, 3.0, 6.0, FAR)


class Residual(msgspec.Struct, frozen=True, kw_only=True):
    """A row left out of a fit: what the fit said, and how far the nearest fitted row of its stack was."""

    row: TrainingRow
    predicted_s: float
    distance: float
    is_generation_known: bool = True
    low_s: float = 0.0
    high_s: float = 0.0

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_s / self.row.step_s - 1.0

    @property
    def log_ratio(self) -> float:
        """Measured over predicted, in logarithm."""
        return math.log(self.row.step_s / self.predicted_s)


class Table:
    """Rows as arrays: work at full speed, measured times, groups, positions."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        np = _numpy()
        self.rows = list(rows)
        works, self.groups, positions = [], [], []
        for row in rows:
            topology = row.topology()
            works.append(work_of(step_work(row.architecture, topology, row.layout), topology))
            self.groups.append(groups_of(row.architecture, topology.accelerator, row.layout.precision, row.stack))
            positions.append(position_of(row.architecture, topology, row.layout, row.stack))
        self.work: dict[str, Array] = {name: np.array([work[name] for work in works]) for name in works[0]}
        self.roofline: Array = self.work["roofline_s"]
        self.log_measured: Array = np.log(np.array([row.step_s for row in rows]))
        self.positions: Array = np.array(positions)
        self.families = np.array([family_of(row.stack) for row in rows])

    def take(self, chosen: Array) -> Table:
        """The rows where `chosen` is true."""
        other = object.__new__(Table)
        index = [number for number, is_chosen in enumerate(chosen) if is_chosen]
        other.rows = [self.rows[number] for number in index]
        other.groups = [self.groups[number] for number in index]
        other.work = {name: values[index] for name, values in self.work.items()}
        other.roofline = self.roofline[index]
        other.log_measured = self.log_measured[index]
        other.positions = self.positions[index]
        other.families = self.families[index]
        return other


class _Layout:
    """Where each constant and each of its deviations stands in the vector of parameters."""

    def __init__(self, table: Table) -> None:
        np = _numpy()
        self.index: dict[tuple[str, str, str], int] = {}
        means: list[float] = []
        spreads: list[float] = []
        for name, prior in PRIORS.items():
            self.index[name, "", ""] = len(means)
            means.append(math.log(prior.value))
            spreads.append(prior.spread)
            for level, spread in prior.levels:
                for group in sorted({groups[level] for groups in table.groups} - {""}):
                    self.index[name, level, group] = len(means)
                    means.append(0.0)
                    spreads.append(spread)
        self.means: Array = np.array(means)
        self.spreads: Array = np.array(spreads)

    def design(self, table: Table) -> dict[str, Any]:
        """For each constant, the parameters that each row adds up; -1 where it adds none."""
        np = _numpy()
        found = {}
        for name, prior in PRIORS.items():
            columns = [[self.index[name, "", ""]] * len(table.rows)]
            for level, _ in prior.levels:
                columns.append([self.index.get((name, level, groups[level]), -1) for groups in table.groups])
            found[name] = np.array(columns)
        return found

    def constants(self, theta: Array) -> dict[str, Levels]:
        """The vector as shipped constants."""
        found = {}
        for name, prior in PRIORS.items():
            groups: dict[str, dict[str, float]] = {}
            for level, _ in prior.levels:
                groups[level] = {
                    group: round(float(theta[place]), 5)
                    for (of, at, group), place in self.index.items()
                    if of == name and at == level
                }
            found[name] = Levels(log_value=round(float(theta[self.index[name, "", ""]]), 5), groups=groups)
        return found


def fit(rows: Sequence[TrainingRow], *, name: str, date: str) -> Constants:
    """Constants fitted to `rows` (those that may decide constants), without intervals: see `calibrate`."""
    return fit_table(Table([row for row in rows if row.is_fitted]), name=name, date=date)


def fit_table(table: Table, *, name: str = "", date: str = "") -> Constants:
    """As `fit`, for rows that are already arrays."""
    np = _numpy()
    layout = _Layout(table)
    theta = _solve(table, layout)
    predicted = _log_predicted(table, theta, layout.design(table))
    amplitude, length, noise = _LOCAL
    kernel = _kernel(table, table)
    weights = np.linalg.solve(
        amplitude**2 * kernel + noise**2 * np.eye(len(table.rows)), table.log_measured - predicted
    )
    return Constants(
        name=name,
        date=date,
        rows=len(table.rows),
        sources=tuple(sorted({row.source for row in table.rows})),
        constants=layout.constants(theta),
        local=LocalCorrection(
            amplitude=amplitude,
            length=length,
            noise=noise,
            weights={row.id: round(float(weight), 4) for row, weight in zip(table.rows, weights, strict=True)},
        ),
    )


def _solve(table: Table, layout: _Layout) -> Array:
    """Gauss-Newton on the soft-L1 loss with the priors as extra residuals."""
    np = _numpy()
    design = layout.design(table)
    counts = Counter(row.source for row in table.rows)
    weight = np.array([min(1.0, _SOURCE_ROWS / counts[row.source]) ** 0.25 for row in table.rows]) / _NOISE
    theta = layout.means.copy()
    for _ in range(30):
        base, jacobian = _linearized(table, theta, design)
        residual = weight * (base - table.log_measured)
        soft = (1.0 + residual**2) ** -0.25  # square root of the soft-L1 weight
        rows = np.vstack([jacobian * (weight * soft)[:, None], np.diag(1.0 / layout.spreads)])
        right = np.concatenate([residual * soft, (theta - layout.means) / layout.spreads])
        step = np.clip(np.linalg.lstsq(rows, -right, rcond=None)[0], -0.5, 0.5)
        theta = theta + step
        if np.abs(step).max() < 1e-4:
            break
    return theta


def _values(theta: Array, design: dict[str, Any]) -> dict[str, Array]:
    np = _numpy()
    padded = np.append(theta, 0.0)
    return {name: np.exp(padded[places].sum(0)) for name, places in design.items()}


def _log_total(table: Table, values: dict[str, Array]) -> Array:
    np = _numpy()
    total: Array = np.log(np.maximum(sum(combine(table.work, values).values()), table.roofline))
    return total


def _log_predicted(table: Table, theta: Array, design: dict[str, Any]) -> Array:
    return _log_total(table, _values(theta, design))


def _linearized(table: Table, theta: Array, design: dict[str, Any]) -> tuple[Array, Array]:
    """Predictions in logarithm, and their derivatives by every parameter."""
    np = _numpy()
    values = _values(theta, design)
    base = _log_total(table, values)
    jacobian = np.zeros((len(table.rows), len(theta)))
    every = np.arange(len(table.rows))
    for name, places in design.items():
        moved = dict(values)
        moved[name] = values[name] * math.exp(1e-5)
        slope = (_log_total(table, moved) - base) / 1e-5
        for column in places:
            has = column >= 0
            jacobian[every[has], column[has]] += slope[has]
    return base, jacobian


def _kernel(one: Table, other: Table) -> Array:
    """Likeness of rows of the same stack, 1 for equal configurations."""
    np = _numpy()
    _, length, _ = _LOCAL
    likeness: Array = np.exp(-_distances(one, other) / length) * (one.families[:, None] == other.families[None, :])
    return likeness


def _distances(one: Table, other: Table) -> Array:
    np = _numpy()
    gaps = one.positions[:, None, :] - other.positions[None, :, :]
    distances: Array = np.sqrt((gaps**2).sum(-1))
    return distances


def left_out(table: Table, parts: Sequence[str]) -> list[Residual]:
    """Predictions of every row by a fit that saw no row with the same value of `parts` (one value a row)."""
    np = _numpy()
    found: list[Residual | None] = [None] * len(table.rows)
    for part in sorted(set(parts)):
        is_out = np.array([value == part for value in parts])
        train, test = table.take(~is_out), table.take(is_out)
        for number, residual in zip(np.flatnonzero(is_out), _predict(train, test), strict=True):
            found[number] = residual
    return [residual for residual in found if residual is not None]


def _predict(train: Table, test: Table) -> list[Residual]:
    np = _numpy()
    layout = _Layout(train)
    theta = _solve(train, layout)
    residual = train.log_measured - _log_predicted(train, theta, layout.design(train))
    amplitude, _, noise = _LOCAL
    covariance = amplitude**2 * _kernel(train, train) + noise**2 * np.eye(len(train.rows))
    local = amplitude**2 * _kernel(test, train) @ np.linalg.solve(covariance, residual)
    predicted = np.exp(_log_predicted(test, theta, layout.design(test)) + np.clip(local, -0.7, 0.7))
    predicted = np.maximum(predicted, test.roofline)
    same = test.families[:, None] == train.families[None, :]
    nearest = np.where(same, _distances(test, train), FAR).min(1)
    generations = {groups["generation"] for groups in train.groups}
    return [
        Residual(
            row=row,
            predicted_s=float(value),
            distance=float(distance),
            is_generation_known=groups["generation"] in generations,
        )
        for row, value, distance, groups in zip(test.rows, predicted, nearest, test.groups, strict=True)
    ]


def folds(
    rows: Sequence[TrainingRow], count: int = _FOLDS, key: Callable[[TrainingRow], str] | None = None
) -> list[str]:
    """A fold for each row, the same every time; rows of one `key` are in one fold."""
    np = _numpy()
    names = [key(row) if key else row.id for row in rows]
    order = sorted(set(names))
    shuffled = np.random.RandomState(0).permutation(len(order))
    place = {name: str(int(number) % count) for name, number in zip(order, shuffled, strict=True)}
    return [place[name] for name in names]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The three ways of leaving rows out."""

    folds: list[Residual]
    models: list[Residual]
    sources: list[Residual]


def hold_out(table: Table) -> Held:
    """Every row predicted by fits without its fold, without its model (in groups), without its source."""
    return Held(
        folds=left_out(table, folds(table.rows)),
        models=left_out(table, folds(table.rows, 10, lambda row: row.architecture.name)),
        sources=left_out(table, [row.source for row in table.rows]),
    )


def bands(held: Held, without_source: str = "") -> tuple[Band, ...]:
    """Bands of the interval from all rows left out, but those of one source."""
    pairs = [
        (residual.distance, residual.log_ratio)
        for residuals in (held.folds, held.models, held.sources)
        for residual in residuals
        if residual.row.source != without_source
    ]
    return bands_of(pairs, EDGES, _COVERAGE_FITTED)


def site_spread(held: Held, without_source: str = "") -> float:
    """How far a whole source lies from what all the others say of it, in logarithm, for four sources in five.

    Whoever asks runs on a cluster of their own: however near a published row is, its site is not theirs.
    """
    ratios: dict[str, list[float]] = {}
    for residual in held.sources:
        if residual.row.source != without_source:
            ratios.setdefault(residual.row.source, []).append(residual.log_ratio)
    return quantile([abs(statistics.fmean(values)) for values in ratios.values()], _COVERAGE) if ratios else 0.0


def calibrate(rows: Sequence[TrainingRow], *, name: str, date: str) -> tuple[Constants, Held]:
    """Constants with intervals and with what each row would have been told without it."""
    table = Table([row for row in rows if row.is_fitted])
    fitted = fit_table(table, name=name, date=date)
    held = hold_out(table)
    predicted = {residual.row.id: float(f"{residual.predicted_s:.5g}") for residual in held.folds}
    found = msgspec.structs.replace(
        fitted, bands=bands(held), site_spread=round(site_spread(held), 4), predicted=predicted
    )
    return found, held


def refit(own: Sequence[TrainingRow], *, name: str, date: str) -> Constants:
    """The shipped constants moved by this cluster's own rows, which the answer then names as near rows.

    Intervals stay those of the published rows, but without the spread between sites where an own row is the nearest.
    """
    published, mine = [row for row in shipped_rows() if row.is_fitted], [row for row in own if row.is_fitted]
    table = Table([*published, *mine])
    names = {row.id for row in mine}
    parts = [part if row.id in names else "" for row, part in zip(table.rows, folds(table.rows), strict=True)]
    predicted = dict(shipped().predicted)
    for part in sorted(set(parts) - {""}):
        is_out = _numpy().array([value == part for value in parts])
        for residual in _predict(table.take(~is_out), table.take(is_out)):
            predicted[residual.row.id] = residual.predicted_s
    return msgspec.structs.replace(
        fit_table(table, name=name, date=date),
        bands=shipped().bands,
        site_spread=shipped().site_spread,
        predicted=predicted,
        extra_rows=tuple(mine),
    )


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        raise ExtraMissing("fitting needs numpy", hint="pip install 'herder[planner]'") from None
    return numpy
