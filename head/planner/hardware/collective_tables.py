"""Completing the collective tables: what NCCL would take for the combinations that nobody has measured yet.

A Gaussian process over (system, operation, GPUs, message size) on the logarithm of time, around a latency-plus-volume
mean: systems of one generation are alike, an all-gather is like a reduce-scatter, counts and sizes vary smoothly.
Its few constants are fitted by marginal likelihood on the measured curves alone; `benchmarks/planner_collectives.py`
prints its errors when a point, a curve or a system is left out, and writes the shipped table.
Needs numpy (extra `planner`); estimates read the finished table and do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = tuple[str, str, int]  # system, operation, GPUs

SIZES = tuple(512 * 4**power for power in range(11))
COUNTS = (2, 4, 8)
TABLE_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
GENERATION = {
    "a100_sxm": "ampere",
    "h100_sxm": "hopper",
    "h200_sxm": "hopper",
    "b200_sxm": "blackwell",
    "b300_sxm": "blackwell",
    "gb200": "blackwell",
    "gb300": "blackwell",
    "rtx_pro_6000_server": "pcie",
}
LINK_BYTES_PER_S = {"ampere": 300e9, "hopper": 450e9, "blackwell": 900e9, "pcie": 63e9}


class Likeness(msgspec.Struct, frozen=True, kw_only=True):
    """How alike curves are: variances of log time by what they share, and correlations between unlike ones."""

    variance_shared: float
    variance_system: float
    variance_op_count: float
    variance_system_op: float
    variance_system_count: float
    variance_own: float
    reach_sizes: float  # in steps of 4x
    reach_counts: float  # in doublings
    same_generation: float  # correlation of systems of one generation
    other_generation: float
    gather_scatter: float  # correlation of all-gather with reduce-scatter
    other_op: float
    noise: float  # relative, of one measured point


# Fitted by `benchmarks/planner_collectives.py --fit` on the 61 measured curves of the shipped file.
FITTED = Likeness(
    variance_shared=0.015,
    variance_system=0.023,
    variance_op_count=0.010,
    variance_system_op=0.016,
    variance_system_count=0.019,
    variance_own=0.017,
    reach_sizes=1.887,
    reach_counts=1.006,
    same_generation=0.991,
    other_generation=0.064,
    gather_scatter=0.989,
    other_op=0.189,
    noise=0.060,
)


def complete(
    measured: Mapping[Key, Sequence[float | None]], wanted: Sequence[Key], likeness: Likeness = FITTED
) -> dict[Key, list[float]]:
    """Microseconds at `SIZES` for each wanted curve, from the measured ones (None: that point is not known)."""
    import numpy as np

    keys = list(measured)
    known = np.array([value is not None for key in keys for value in measured[key]])
    mean = np.concatenate([_mean(key) for key in keys])
    logs = np.array([math.log(value) if value is not None else 0.0 for key in keys for value in measured[key]])
    covariance = _covariance(keys, keys, likeness)[np.ix_(known, known)]
    covariance[np.diag_indices_from(covariance)] += likeness.noise**2
    weights = np.linalg.solve(covariance, (logs - mean)[known])
    cross = _covariance(list(wanted), keys, likeness)[:, known]
    predicted = np.concatenate([_mean(key) for key in wanted]) + cross @ weights
    rows = np.exp(predicted).reshape(len(wanted), len(SIZES))
    return {key: [float(value) for value in row] for key, row in zip(wanted, rows, strict=True)}


def fit(measured: Mapping[Key, Sequence[float]], start: Likeness = FITTED) -> Likeness:
    """The constants that make the measured curves most likely, with a weak pull towards `start`. Needs scipy."""
    import numpy as np
    from scipy.optimize import minimize

    keys = list(measured)
    residual = np.log(np.array([value for key in keys for value in measured[key]]))
    residual -= np.concatenate([_mean(key) for key in keys])
    origin = _packed(start)

    def cost(packed: Any) -> float:
        likeness = _unpacked(packed)
        covariance = _covariance(keys, keys, likeness)
        covariance[np.diag_indices_from(covariance)] += likeness.noise**2
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            return 1e9
        whitened = np.linalg.solve(factor, residual)
        pull = 0.5 * float(np.sum(((packed - origin) / 2) ** 2))
        return float(0.5 * whitened @ whitened + np.log(np.diag(factor)).sum()) + pull

    found = minimize(cost, origin, method="L-BFGS-B", options={"maxiter": 40})
    return _unpacked(found.x)


def left_out(measured: Mapping[Key, Sequence[float]], likeness: Likeness = FITTED) -> dict[str, dict[Key, list[float]]]:
    """Relative errors (predicted / measured - 1) per curve when each `point`, `curve` or `system` is left out."""
    import numpy as np

    keys = list(measured)
    errors: dict[str, dict[Key, list[float]]] = {"point": {}, "curve": {}, "system": {}}
    mean = np.concatenate([_mean(key) for key in keys])
    residual = np.log(np.array([value for key in keys for value in measured[key]])) - mean
    covariance = _covariance(keys, keys, likeness)
    covariance[np.diag_indices_from(covariance)] += likeness.noise**2
    inverse = np.linalg.inv(covariance)
    weights = inverse @ residual
    width = len(SIZES)
    points = np.exp(-weights / np.diag(inverse)) - 1
    for index, key in enumerate(keys):
        block = slice(index * width, (index + 1) * width)
        errors["point"][key] = [float(value) for value in points[block]]
        shift = np.linalg.solve(inverse[block, block], weights[block])
        errors["curve"][key] = [float(value) for value in np.exp(-shift) - 1]
    for system in dict.fromkeys(key[0] for key in keys):
        held = [key for key in keys if key[0] == system]
        rest = {key: list(measured[key]) for key in keys if key[0] != system}
        for key, row in complete(rest, held, likeness).items():
            errors["system"][key] = [said / real - 1 for said, real in zip(row, measured[key], strict=True)]
    return errors


def _mean(key: Key) -> NDArray[Any]:
    """Log microseconds of a plain latency-plus-volume model: what the process deviates from."""
    import numpy as np

    system, op, gpus = key
    generation = GENERATION[system]
    turns = 2 if op == "all_reduce" else 1
    volume = turns * (gpus - 1) / gpus * np.array(SIZES, dtype=float)
    rate = LINK_BYTES_PER_S[generation] * (0.3 if generation == "pcie" else 0.75)
    latency_us = 4.0 * math.sqrt(gpus) * (1.3 if turns == 2 else 1.0)
    logs: NDArray[Any] = np.log(latency_us + volume / rate * 1e6)
    return logs


def _covariance(some: Sequence[Key], others: Sequence[Key], likeness: Likeness) -> NDArray[Any]:
    """Covariance of the deviations at all sizes of `some` with all sizes of `others`."""
    import numpy as np

    def systems(one: Key, other: Key) -> float:
        if one[0] == other[0]:
            return 1.0
        is_kin = GENERATION[one[0]] == GENERATION[other[0]]
        return likeness.same_generation if is_kin else likeness.other_generation

    def ops(one: Key, other: Key) -> float:
        if one[1] == other[1]:
            return 1.0
        is_twin = {one[1], other[1]} == {"all_gather", "reduce_scatter"}
        return likeness.gather_scatter if is_twin else likeness.other_op

    def of(one: Key, other: Key) -> float:
        system, op = systems(one, other), ops(one, other)
        count = math.exp(-0.5 * (math.log2(one[2] / other[2]) / likeness.reach_counts) ** 2)
        return (
            likeness.variance_shared
            + likeness.variance_system * system
            + likeness.variance_op_count * op * count
            + likeness.variance_system_op * system * op
            + likeness.variance_system_count * system * count
            + likeness.variance_own * system * op * count
        )

    steps = np.arange(len(SIZES), dtype=float)
    distance = math.sqrt(3) * np.abs(steps[:, None] - steps) / likeness.reach_sizes
    sizes = (1 + distance) * np.exp(-distance)
    curves = np.array([[of(one, other) for other in others] for one in some])
    product: NDArray[Any] = np.kron(curves, sizes)
    return product


_SHARES = ("same_generation", "other_generation", "gather_scatter", "other_op")


def _packed(likeness: Likeness) -> NDArray[Any]:
    """Free parameters: logarithms of scales, logits of correlations."""
    import numpy as np

    values = msgspec.structs.asdict(likeness)
    return np.array(
        [math.log(value / (1 - value)) if name in _SHARES else math.log(value) for name, value in values.items()]
    )


def _unpacked(packed: Any) -> Likeness:
    """The inverse of `_packed`."""
    names = Likeness.__struct_fields__
    return Likeness(
        **{
            name: 1 / (1 + math.exp(-value)) if name in _SHARES else math.exp(value)
            for name, value in zip(names, packed, strict=True)
        }
    )
