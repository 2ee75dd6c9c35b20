"""Fitting of the serving calibration: multipliers, TTFT factors, the memory of residuals, the intervals.

Runs offline (benchmarks/planner_serving.py) and for `herder plan calibrate`; needs numpy, which estimates do not.
Errors are measured by serving_validation.py.
"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from head.planner.calibration import serving_near as near
from head.planner.calibration import serving_step as step
from head.planner.calibration.serving_rows import (
    ServingRow,
    architecture_of_row,
    cache_dtype_of,
    offline_question_of,
    question_of,
    topology_of,
)
from head.planner.serving.engine_step import device_of, precision_of
from head.planner.serving.memory import SLOTS_AT_MOST, MemorySettings, running_limit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

NOISE_SD = 0.03  # of repeated measurements, most of them; those that differ more lose weight
SIGMA = 0.12  # of the physics' residuals; beyond ROBUST they count linearly
ROBUST = 0.25
GROUP_SD = {"format": 0.3, "generation": 0.15, "mode": 0.5}


class Prepared(msgspec.Struct):
    """A row with what the physics needs of it. `values` are the elements for each token of a sequence."""

    row: ServingRow
    block: near.Block
    values: tuple[float, ...]
    prompt_values: tuple[float, ...]  # of the engine that prefills
    sequences: float
    offered: float
    groups: float
    floor_s: float

    @property
    def key(self) -> tuple[near.Block, int, int, int]:
        """Rows with one key measured the same thing."""
        r = self.row
        return (self.block, round(r.sequences), r.isl, r.osl)

    @property
    def point(self) -> Hashable:
        """As `key`, whatever the version: tables repeat a measurement and some leave its version out."""
        b = self.block
        return (b.dimensions, b.backend, b.device, b.format, b.mode, b.degrees, self.key[1:])


def read_rows(truth: Path) -> list[ServingRow]:
    """All usable serving rows of a truth folder."""
    silicon = msgspec.json.decode((truth / "inference_silicon.json").read_bytes())
    tables = msgspec.json.decode((truth / "inference.json").read_bytes())
    rows = [question_of(row) for row in silicon["rows"]]
    rows += [offline_question_of(r) for r in tables if r["kind"] == "offline_max_throughput" and r.get("usable", True)]
    return rows


def prepare(row: ServingRow) -> Prepared:
    """The row's work at data-sheet rates."""
    arch, topology = architecture_of_row(row), topology_of(row)
    device = device_of(topology)
    precision = precision_of(arch, row.weights, cache_dtype_of(row.weights, arch), device)
    limit = running_limit(
        arch,
        row.layout,
        precision,
        "trtllm" if row.mode == "offline" else row.backend,  # type: ignore[arg-type]
        MemorySettings(max_num_batched_tokens=8192),
        visible_bytes=device.memory_bytes,
        prompt=row.isl,
        output=row.osl,
    )
    offered = row.sequences or SLOTS_AT_MOST * row.layout.dp
    sequences = min(offered, limit) if limit > 1.0 else offered
    load = step.Load(sequences=sequences, prompt=row.isl, output=row.osl, has_prefill=not row.mode.startswith("disagg"))
    values = step.element_values(arch, row.layout, precision, device, load)
    alone = step.Load(sequences=1, prompt=row.isl, output=1, has_decode=False)
    prefill = row.prefill_layout or row.layout
    prompt_values = step.element_values(arch, prefill, precision, device, alone)
    if row.mode == "offline":  # measured as GPU-seconds a token: per token of a sequence it is that times sequences
        row = msgspec.structs.replace(row, tpot_s=row.tpot_s * sequences / row.layout.gpus, sequences=sequences)
    block = near.Block(
        dimensions=near.dimensions_of(arch),
        backend=row.backend,
        version=row.version,
        device=topology.accelerator.name,
        generation=device.generation,
        format=step.format_of(precision),
        mode=row.mode,
        degrees=near.degrees_of(row.layout),
    )
    return Prepared(
        row=row,
        block=block,
        values=values,
        prompt_values=prompt_values,
        sequences=sequences,
        offered=offered,
        groups=float(prefill.dp * prefill.pp),
        floor_s=step.floor_s(values),
    )


class Fitted(msgspec.Struct):
    """One fit: what ships, and the training rows' residuals."""

    multipliers: step.Multipliers
    ttft: dict[str, tuple[float, ...]]
    points: list[tuple[near.Block, near.Point]]


def base_tpot(multipliers: step.Multipliers, p: Prepared) -> float:
    """The physics' seconds for each token of a sequence."""
    own = step.factors_of(multipliers, p.block.format, p.block.generation, p.row.mode)
    return max(sum(step.combine(p.values, own).values()), p.floor_s)


def base_ttft(multipliers: step.Multipliers, ttft: dict[str, tuple[float, ...]], p: Prepared) -> float:
    """The physics' seconds to a first token."""
    parts = _ttft_parts(multipliers, p)
    own = ttft.get(f"{p.row.mode}/{p.row.backend}") or ttft[p.row.mode]
    return sum(part * factor for part, factor in zip(parts, own, strict=True))


def _ttft_parts(multipliers: step.Multipliers, p: Prepared) -> tuple[float, ...]:
    own = step.factors_of(multipliers, p.block.format, p.block.generation, p.row.mode)
    parts = step.combine(p.values, own)
    prompt_s = sum(step.combine(p.prompt_values, own).values())
    decode_s = sum(value for name, value in parts.items() if not step.is_prefill(name))
    return step.ttft_parts(
        prompt_s=prompt_s,
        decode_s=decode_s,
        output=p.row.osl,
        sequences=p.row.prompts if p.row.mode.startswith("disagg") else p.sequences,
        prompt=p.row.isl,
        groups=p.groups,
        offered=p.row.prompts if p.row.mode.startswith("disagg") else p.offered,
    )


def fit_multipliers(rows: Sequence[Prepared]) -> step.Multipliers:
    """Maximum a posteriori of the multipliers over aggregated and offline rows; models count by the root of their rows.

    Gauss-Newton with a pseudo-Huber loss on log TPOT. The gradient of a sum's logarithm with regard to an element's
    log multiplier is that element's share of the sum.
    """
    import numpy as np

    x = np.array([p.values for p in rows])
    y = np.log([p.row.tpot_s for p in rows])
    formats = sorted({p.block.format for p in rows})
    generations = sorted({p.block.generation for p in rows})
    modes = sorted({p.row.mode for p in rows} - {"agg"}) or ["offline"]
    which = [np.array([formats.index(p.block.format) for p in rows])]
    which.append(np.array([generations.index(p.block.generation) for p in rows]))
    which.append(np.array([modes.index(p.row.mode) if p.row.mode in modes else len(modes) for p in rows]))
    masks = [np.array([n in step.BY_FORMAT for n in step.NAMES])]
    masks.append(np.array([n in step.BY_GENERATION for n in step.NAMES]))
    masks.append(np.ones(len(step.NAMES), dtype=bool))
    weights = _model_weights(rows)
    count = len(step.NAMES)
    sizes = [len(formats), len(generations), len(modes)]
    offsets = [count, count * (1 + sizes[0]), count * (1 + sizes[0] + sizes[1])]
    total = count * (1 + sum(sizes))
    sds = np.array([item[2] for item in step.ELEMENTS])
    spread = [sds]
    for size, mask, sd in zip(sizes, masks, GROUP_SD.values(), strict=True):
        spread.append(np.tile(np.where(mask, sd, 1e-4) * np.minimum(sds / 0.5, 1.2), size))
    precision = 1.0 / np.concatenate(spread) ** 2
    start = np.array([step.first_guess(i) for i in range(count)])

    def logs(values: Array) -> Array:
        found: Array = start + values[:count] + np.zeros((len(rows), 1))
        for offset, size, group in zip(offsets, sizes, which, strict=True):
            own = np.vstack([values[offset : offset + size * count].reshape(size, count), np.zeros(count)])
            found = found + own[group]
        return found

    def objective(values: Array) -> tuple[float, Array, Array, Array]:
        predicted, shares = _sums(x, logs(values))
        residual: Array = (np.log(predicted) - y) / SIGMA
        delta = ROBUST / SIGMA
        root = np.sqrt(1 + (residual / delta) ** 2)
        loss = float((weights * 2 * delta * delta * (root - 1)).sum() + (precision * values**2).sum())
        return loss, residual, shares, weights / root

    def jacobian(shares: Array) -> Array:
        found = np.zeros((len(rows), total))
        found[:, :count] = shares
        for offset, size, group in zip(offsets, sizes, which, strict=True):
            for index in range(size):
                chosen = group == index
                found[chosen, offset + index * count : offset + (index + 1) * count] = shares[chosen]
        return found / SIGMA

    theta = _descend(objective, jacobian, precision)

    def block(offset: int, index: int) -> tuple[float, ...]:
        return _rounded(theta[offset + index * count : offset + (index + 1) * count])

    return step.Multipliers(
        common=_rounded(start + theta[:count]),
        formats=tuple((name, block(offsets[0], i)) for i, name in enumerate(formats)),
        generations=tuple((name, block(offsets[1], i)) for i, name in enumerate(generations)),
        modes=tuple((name, block(offsets[2], i)) for i, name in enumerate(modes)),
    )


def _descend(
    objective: Callable[[Array], tuple[float, Array, Array, Array]],
    jacobian: Callable[[Array], Array],
    precision: Array,
) -> Array:
    """Damped Gauss-Newton from zero. objective: loss, residuals, shares of the elements, weights of the rows."""
    import numpy as np

    theta: Array = np.zeros(len(precision))
    loss, residual, shares, importance = objective(theta)
    damping = 1e-2
    for _ in range(40):
        slopes = jacobian(shares)
        normal = slopes.T @ (slopes * importance[:, None]) + np.diag(precision)
        slope = -(slopes.T @ (importance * residual) + precision * theta)
        while True:
            change = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
            trial = objective(theta + change)
            if trial[0] < loss or damping > 1e6:
                break
            damping *= 4
        gain = loss - trial[0]
        if gain > 0:
            theta = theta + change
            loss, residual, shares, importance = trial
        damping = max(damping / 4, 1e-6)
        if gain < 1e-4 * abs(loss):
            break
    return theta


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(0.0 if abs(v) < 1e-4 else round(float(v), 5) for v in values)


def _model_weights(rows: Sequence[Prepared]) -> Array:
    import numpy as np

    counts = Counter((p.block.dimensions, p.row.mode) for p in rows)
    mean = len(rows) / len(counts)
    return np.array([math.sqrt(mean / counts[(p.block.dimensions, p.row.mode)]) for p in rows])


def _sums(x: Array, logs: Array) -> tuple[Array, Array]:
    """Predicted sums, and each element's share of the sum's logarithm's gradient."""
    import numpy as np

    at_roofline = np.array([item[3] for item in step.ELEMENTS])
    grown = np.exp(logs)
    values = x * np.where(at_roofline, 1 + grown, grown)
    shares = values.copy()
    total = values.sum(1)
    for one, other in step.PAIRS:
        i, j = step.NAMES.index(one), step.NAMES.index(other)
        a, b = values[:, i], values[:, j]
        powered = a**step.POWER + b**step.POWER
        whole = powered ** (1 / step.POWER)
        safe = np.where(powered > 0, powered, 1.0)
        total += whole - a - b
        shares[:, i], shares[:, j] = whole * a**step.POWER / safe, whole * b**step.POWER / safe
    shares = shares * np.where(at_roofline, grown / (1 + grown), 1.0)
    return total, shares / total[:, None]


def fit_ttft(rows: Sequence[Prepared], multipliers: step.Multipliers) -> dict[str, tuple[float, ...]]:
    """Factors of the TTFT parts by mode, and by mode and backend shrunk to them."""
    import numpy as np
    from scipy.optimize import least_squares

    found: dict[str, tuple[float, ...]] = {}
    guesses = np.log([guess for _, guess in step.TTFT_PARTS])
    for mode in sorted({p.row.mode for p in rows if p.row.ttft_s > 0}):
        chosen = [p for p in rows if p.row.mode == mode and p.row.ttft_s > 0]
        x = np.array([_ttft_parts(multipliers, p) for p in chosen])
        y = np.log([p.row.ttft_s for p in chosen])
        backends = np.array([p.row.backend for p in chosen])

        def factors(x: Array, y: Array, centre: Array, sd: float) -> Array:
            def residuals(theta: Array) -> Array:
                total = (x * np.exp(centre + theta)).sum(1)
                return np.concatenate([(np.log(total) - y) / 0.25, theta / sd])

            solved: Array = (
                centre + least_squares(residuals, np.zeros(len(centre)), loss="soft_l1", f_scale=2.0, max_nfev=60).x
            )
            return solved

        common = factors(x, y, guesses, 1.0)
        found[mode] = tuple(round(float(v), 6) for v in np.exp(common))
        for backend in sorted(set(backends)):
            mine = backends == backend
            if mine.sum() >= 20:
                own = factors(x[mine], y[mine], common, 0.5)
                found[f"{mode}/{backend}"] = tuple(round(float(v), 6) for v in np.exp(own))
    return found


def kernel(rows: Sequence[Prepared], others: Sequence[Prepared]) -> tuple[Array, Array]:
    """The residual process's covariance of two sets of rows, and the part of it that is of the neighbourhood."""
    import numpy as np

    def indexed(items: Sequence[Prepared]) -> tuple[list[near.Block], Any, Array]:
        blocks: dict[near.Block, int] = {}
        positions = np.array([blocks.setdefault(p.block, len(blocks)) for p in items])
        loads = np.array([near.load_of(p.sequences, p.row.isl, p.row.osl) for p in items])
        return list(blocks), positions, loads

    one_blocks, i, one = indexed(rows)
    other_blocks, j, other = indexed(others)
    stack = np.zeros((len(one_blocks), len(other_blocks)))
    local = np.zeros_like(stack)
    for a, left in enumerate(one_blocks):
        for b, right in enumerate(other_blocks):
            stack[a, b], local[a, b] = near.outer(left, right)
    away = np.abs(one[:, None, 0] - other[None, :, 0]) / near.SEQUENCES_LENGTH
    for axis in (1, 2):
        away += np.abs(one[:, None, axis] - other[None, :, axis]) / near.LENGTHS_LENGTH
    near_part: Array = local[i][:, j] * np.exp(-away)
    return stack[i][:, j] + near_part, near_part


def unique(rows: Sequence[Prepared]) -> list[Prepared]:
    """One row for each measured point: repeated ones become their geometric mean."""
    groups: dict[Hashable, list[Prepared]] = {}
    for p in rows:
        groups.setdefault(p.key, []).append(p)
    found = []
    for same in groups.values():
        row = same[0].row
        if len(same) > 1:
            tpot = math.exp(sum(math.log(p.row.tpot_s) for p in same) / len(same))
            timed = [math.log(p.row.ttft_s) for p in same if p.row.ttft_s > 0]
            ttft = math.exp(sum(timed) / len(timed)) if timed else 0.0
            row = msgspec.structs.replace(row, tpot_s=tpot, ttft_s=ttft)
        found.append(msgspec.structs.replace(same[0], row=row))
    return found


def fit(rows: Sequence[Prepared]) -> Fitted:
    """Everything that ships, from `rows`."""
    import numpy as np
    from scipy.linalg import cho_factor, cho_solve

    rows = unique(rows)
    multipliers = fit_multipliers([p for p in rows if p.row.mode in ("agg", "offline")])
    ttft = fit_ttft(rows, multipliers)
    bases = np.array([base_tpot(multipliers, p) for p in rows])
    firsts = np.array([base_ttft(multipliers, ttft, p) if p.row.ttft_s > 0 else 0.0 for p in rows])
    residual = np.log([p.row.tpot_s for p in rows]) - np.log(bases)
    is_timed = np.array([p.row.ttft_s > 0 for p in rows])
    late = np.zeros(len(rows))
    late[is_timed] = np.log([p.row.ttft_s for p in rows if p.row.ttft_s > 0]) - np.log(firsts[is_timed])
    covariance, _ = kernel(rows, rows)

    def solved(values: Array, noise: Array) -> Array:
        weights: Array = np.asarray(cho_solve(cho_factor(covariance + np.diag(noise)), values))
        return weights

    def robust(values: Array, noise_sd: float, clip: float, usable: Array) -> Array:
        clipped = np.clip(values, -clip, clip)
        noise = np.where(usable, noise_sd**2, 1e3)
        first = solved(clipped, noise)
        left = np.abs(clipped - covariance @ first)
        return solved(clipped, noise * np.maximum(1.0, left / (2.5 * noise_sd)))

    tpot_weights = robust(residual, NOISE_SD, 1.0, np.ones(len(rows), dtype=bool))
    ttft_weights = robust(late, 2 * NOISE_SD, 1.5, is_timed)
    points = []
    for index, p in enumerate(rows):
        point = near.Point(
            id=p.row.id,
            sequences=round(p.sequences, 2),
            isl=p.row.isl,
            osl=p.row.osl,
            tpot_s=_short(p.row.tpot_s),
            base_tpot_s=_short(bases[index]),
            tpot_weight=_short(tpot_weights[index]),
            ttft_s=_short(p.row.ttft_s),
            base_ttft_s=_short(firsts[index]),
            ttft_weight=_short(ttft_weights[index]) if is_timed[index] else 0.0,
        )
        points.append((p.block, point))
    return Fitted(multipliers=multipliers, ttft=ttft, points=points)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def write(
    folder: Path,
    fitted: Fitted,
    spread: dict[str, list[tuple[float, float, float]]],
    source: dict[str, str],
    errors: Sequence[step.Accuracy],
) -> None:
    """Writes serving_constants.json and serving_rows.json.gz into `folder`."""
    constants = step.Constants(
        multipliers=fitted.multipliers, ttft=fitted.ttft, spread=spread, provenance=source, accuracy=tuple(errors)
    )
    (folder / "serving_constants.json").write_bytes(msgspec.json.encode(constants) + b"\n")
    curves: dict[near.Block, list[near.Point]] = {}
    for block, point in fitted.points:
        curves.setdefault(block, []).append(point)
    memory = near.Memory(source=source, curves=list(curves.items()))
    packed = gzip.compress(msgspec.json.encode(memory), mtime=0)
    (folder / "serving_rows.json.gz").write_bytes(packed)
