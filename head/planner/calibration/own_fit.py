"""From a cluster's own measurements to a correction of the shipped constants, and what it would have said of each row.

What remains at the rows (measured over the shipped estimate, in logarithm) is taken as a Gaussian process: what all
rows of a stack on a generation of accelerators share, and what neighbours share. Few rows are believed less. No row
can do much harm: what remains is clipped, a row that disagrees with the others loses weight, one that is absurd is set
aside, and the correction itself is bounded. Plain Python: a few hundred rows take a second.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from operator import mul

import msgspec

from head.planner.calibration.active import using
from head.planner.calibration.own import Correction, OwnRows, ServingPoint
from head.planner.calibration.serving_near import (
    Block,
    Point,
    degrees_of,
    dimensions_of,
    load_likeness,
    load_of,
    own_outer,
)
from head.planner.calibration.serving_step import format_of
from head.planner.calibration.training_features import position_of
from head.planner.calibration.training_rows import TrainingRow
from head.planner.hardware.topology import topology_of_preset
from head.planner.serving.engine_step import device_of, precision_of
from head.planner.serving.estimate import (
    EngineSettings,
    ServingEstimate,
    Workload,
    default_kv_dtype,
    estimate_serving,
)
from head.planner.training.constants import family_of, groups_of, shipped
from head.planner.training.step_time import estimate

ENOUGH = 5  # with fewer rows of a kind, rows count as noisier in proportion
SITE_SD = 0.15  # of what a stack on a generation shares on one site: two clusters of one machine differ by 12 %
NOISE_SD = 0.05  # of a repeated measurement
CLIP = 0.9  # what remains at one row counts as at most a factor of 2.5
LIMIT = 0.7  # of what rows say of another one: a factor of two
ABSURD = math.log(3.0)  # alone or among few: a row that is this far from the estimate is set aside
STRAY = 0.5  # among at least four: one that is this far from their median is set aside


class RowErrors(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity of one row: measured, estimated before, and estimated after from the other rows."""

    id: str
    what: str
    measured: float
    before: float
    after: float
    is_used: bool = True
    reason: str = ""


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A correction and the errors of every row without it."""

    correction: Correction
    errors: tuple[RowErrors, ...] = ()


class Solved(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients by row (0 for those set aside), and what the others say of each row, in logarithm."""

    weights: tuple[float, ...]
    others: tuple[float, ...]
    reasons: tuple[str, ...]


Kernel = Callable[[int, int], float]


def fit(rows: OwnRows) -> Fit:
    """The correction of the shipped constants by `rows`. Deterministic."""
    with using(None):
        steps, told, step_errors = _fit_steps(rows.training)
        curves, serving_errors = _fit_points(rows.serving)
    correction = msgspec.structs.replace(steps, step_told=told, curves=curves)
    return Fit(correction=correction, errors=(*step_errors, *serving_errors))


def _fit_steps(rows: Sequence[TrainingRow]) -> tuple[Correction, dict[str, float], list[RowErrors]]:
    if not rows:
        return Correction(), {}, []
    fitted = shipped()
    local = fitted.local
    amplitude, length = (local.amplitude, local.length) if local is not None else (0.15, 4.0)
    before = [estimate(row.architecture, row.topology(), row.layout, row.stack, fitted).step_s.value for row in rows]
    places = [position_of(row.architecture, row.topology(), row.layout, row.stack) for row in rows]
    families = [family_of(row.stack) for row in rows]
    groups = [
        groups_of(row.architecture, row.topology().accelerator, row.layout.precision, row.stack)["stack_generation"]
        for row in rows
    ]

    def kernel(one: int, other: int) -> float:
        if families[one] != families[other]:
            return 0.0
        shared = SITE_SD**2 if groups[one] == groups[other] else 0.0
        return shared + amplitude**2 * math.exp(-math.dist(places[one], places[other]) / length)

    left = [math.log(row.step_s / ours) for row, ours in zip(rows, before, strict=True)]
    solved = solve(left, kernel, groups)
    weights = {row.id: weight for row, weight in zip(rows, solved.weights, strict=True) if weight}
    shifts: dict[str, float] = {}
    for group, weight in zip(groups, solved.weights, strict=True):
        shifts[group] = shifts.get(group, 0.0) + SITE_SD**2 * weight
    shifts = {group: round(shift, 6) for group, shift in sorted(shifts.items()) if shift}
    after = [ours * math.exp(shift) for ours, shift in zip(before, solved.others, strict=True)]
    told = {row.id: value for row, value in zip(rows, after, strict=True) if row.id in weights}
    errors = _errors(
        "training step time", [row.id for row in rows], [row.step_s for row in rows], before, after, solved
    )
    return Correction(step_weights=weights, step_shifts=shifts), told, errors


Curves = tuple[tuple[Block, tuple[Point, ...]], ...]


def _fit_points(rows: Sequence[ServingPoint]) -> tuple[Curves, list[RowErrors]]:
    if not rows:
        return (), []
    blocks, answers = [block_of(row) for row in rows], [shipped_answer(row) for row in rows]
    loads = [load_of(answer.running, row.isl, row.osl) for row, answer in zip(rows, answers, strict=True)]

    def kernel(one: int, other: int) -> float:
        stack, local = own_outer(blocks[one], blocks[other])
        return stack + local * load_likeness(loads[one], loads[other])

    groups = [f"{block.backend} {block.device}" for block in blocks]
    weights: dict[str, dict[int, float]] = {}
    errors: list[RowErrors] = []
    for what, measured, ours in (
        ("TPOT", [row.tpot_s for row in rows], [answer.tpot_s.value for answer in answers]),
        ("TTFT", [row.ttft_s for row in rows], [answer.ttft_s.value for answer in answers]),
    ):
        here = [index for index, value in enumerate(measured) if value > 0]
        left = [math.log(measured[index] / ours[index]) for index in here]
        solved = solve(left, _picked(kernel, here), [groups[index] for index in here])
        weights[what] = dict(zip(here, solved.weights, strict=True))
        before = [ours[index] for index in here]
        after = [value * math.exp(shift) for value, shift in zip(before, solved.others, strict=True)]
        ids = [rows[index].id for index in here]
        errors += _errors(what, ids, [measured[index] for index in here], before, after, solved)
    curves: dict[Block, list[Point]] = {}
    for index, (row, block, answer) in enumerate(zip(rows, blocks, answers, strict=True)):
        point = Point(
            id=row.id,
            sequences=answer.running,
            isl=float(row.isl),
            osl=float(row.osl),
            tpot_s=row.tpot_s,
            base_tpot_s=answer.tpot_s.value,
            tpot_weight=weights["TPOT"].get(index, 0.0),
            ttft_s=row.ttft_s,
            base_ttft_s=answer.ttft_s.value,
            ttft_weight=weights["TTFT"].get(index, 0.0),
        )
        if point.tpot_weight or point.ttft_weight:
            curves.setdefault(block, []).append(point)
    return tuple((block, tuple(points)) for block, points in curves.items()), errors


def _picked(kernel: Kernel, rows: Sequence[int]) -> Kernel:
    """The kernel of some rows, by their place among those."""
    return lambda one, other: kernel(rows[one], rows[other])


def _errors(
    what: str,
    ids: Sequence[str],
    measured: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    solved: Solved,
) -> list[RowErrors]:
    return [
        RowErrors(id=row, what=what, measured=real, before=one, after=other, is_used=not reason, reason=reason)
        for row, real, one, other, reason in zip(ids, measured, before, after, solved.reasons, strict=True)
    ]


# serving rows as questions
def settings_of(row: ServingPoint) -> EngineSettings:
    """The engine of a row."""
    return EngineSettings(
        backend=row.engine, version=row.version, weights=row.weights, kv_dtype=row.kv_dtype, layout=row.layout
    )


def shipped_answer(row: ServingPoint) -> ServingEstimate:
    """What the shipped calibration says of a row."""
    topology = topology_of_preset(row.accelerator, row.layout.gpus)
    load = Workload(isl=row.isl, osl=row.osl, concurrency=row.concurrency)
    return estimate_serving(row.architecture, topology, settings_of(row), load)


def block_of(row: ServingPoint) -> Block:
    """Where a row stands among measured curves."""
    topology = topology_of_preset(row.accelerator, row.layout.gpus)
    device = device_of(topology)
    kv_dtype = row.kv_dtype or default_kv_dtype(row.engine, row.weights, row.architecture)
    precision = precision_of(row.architecture, row.weights, kv_dtype, device)
    return Block(
        dimensions=dimensions_of(row.architecture),
        backend=row.engine,
        version=row.version,
        device=topology.accelerator.name,
        generation=device.generation,
        format=format_of(precision),
        mode="agg",
        degrees=degrees_of(row.layout),
    )


# the process
def solve(left: Sequence[float], kernel: Kernel, groups: Sequence[str]) -> Solved:
    """Coefficients of the process that explains `left`, and what each row is told by the others.

    groups: rows that should agree; strays among them are set aside.
    """
    alike: dict[str, list[float]] = {}
    for value, group in zip(left, groups, strict=True):
        alike.setdefault(group, []).append(value)
    reasons = [_why_aside(value, alike[group]) for value, group in zip(left, groups, strict=True)]
    used = [index for index, reason in enumerate(reasons) if not reason]
    clipped = [max(-CLIP, min(CLIP, left[index])) for index in used]
    noise_sd = NOISE_SD * max(1.0, ENOUGH / max(len(used), 1))
    covariance = [[kernel(a, b) for b in used] for a in used]
    noise = [noise_sd**2] * len(used)
    first, _ = _solved(covariance, noise, clipped)
    for place, row in enumerate(covariance):  # those that disagree with their neighbours count as noisier
        away = abs(clipped[place] - sum(map(mul, row, first)))
        noise[place] *= max(1.0, away / (2.5 * noise_sd)) ** 2
    found, told = _solved(covariance, noise, clipped)
    weights, others = [0.0] * len(left), [0.0] * len(left)
    for place, index in enumerate(used):
        weights[index], others[index] = float(f"{found[place]:.6g}"), told[place]
    for index, reason in enumerate(reasons):
        if reason:
            others[index] = sum(kernel(index, other) * weights[other] for other in used)
    bounded = tuple(max(-LIMIT, min(LIMIT, value)) for value in others)
    return Solved(weights=tuple(weights), others=bounded, reasons=tuple(reasons))


def _why_aside(value: float, group: Sequence[float]) -> str:
    """Why a row is not believed, or nothing."""
    if len(group) >= 4:
        middle = statistics.median(group)
        spread = 1.4826 * statistics.median(abs(other - middle) for other in group)
        if abs(value - middle) > max(STRAY, 4.0 * spread):
            return f"{math.exp(value - middle):.2g} times what the other rows of its kind say"
        return ""
    if abs(value) > ABSURD:
        return f"{math.exp(value):.2g} times the estimate, and too few rows to confirm it"
    return ""


def _solved(
    covariance: Sequence[Sequence[float]], noise: Sequence[float], values: Sequence[float]
) -> tuple[list[float], list[float]]:
    """(coefficients, each value as the others predict it) of a Gaussian process, by Cholesky."""
    size = len(values)
    factor: list[list[float]] = []
    for i in range(size):
        row: list[float] = []
        for j in range(i):
            row.append((covariance[i][j] - sum(map(mul, row, factor[j]))) / factor[j][j])
        row.append(math.sqrt(max(covariance[i][i] + noise[i] - sum(map(mul, row, row)), 1e-12)))
        factor.append(row)
    # rows of the inverse factor: the inverse of the covariance is its transpose times itself
    inverse: list[list[float]] = []
    for i in range(size):
        line = [0.0] * (i + 1)
        for k in range(i):
            scale = factor[i][k]
            if scale:
                for j, value in enumerate(inverse[k]):
                    line[j] -= scale * value
        line[i] = 1.0
        inverse.append([value / factor[i][i] for value in line])
    halves = [sum(map(mul, line, values)) for line in inverse]
    weights, diagonal = [0.0] * size, [0.0] * size
    for line, half in zip(inverse, halves, strict=True):
        for j, value in enumerate(line):
            weights[j] += value * half
            diagonal[j] += value * value
    return weights, [value - weight / d for value, weight, d in zip(values, weights, diagonal, strict=True)]
