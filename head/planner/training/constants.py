"""The constants of the step-time model: what each means, what is believed of it before data, and where it may differ.

A constant is a global value in logarithm with a prior, and deviations of groups (levels) that are pulled towards zero:
generation of the accelerator, precision of the products, device, software stack, release of the stack. A group that no
row has seen has deviation zero, so an unknown stack gets the global value. Fitted by `calibration.training_fit`,
shipped in data/training_constants.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources

import msgspec

from head.planner.calibration.active import active
from head.planner.calibration.training_rows import TrainingRow
from head.planner.hardware.accelerators import Accelerator, canonical_precision
from head.planner.model.architecture import Architecture

CONSTANTS_FILE = "training_constants.json"


class Prior(msgspec.Struct, frozen=True, kw_only=True):
    """`value` is believed within a factor exp(`spread`); each level may deviate by a factor exp(its spread)."""

    value: float
    spread: float
    levels: tuple[tuple[str, float], ...] = ()
    meaning: str = ""


PRIORS: dict[str, Prior] = {
    "all": Prior(
        value=1.0,
        spread=1e-6,
        levels=(("stack", 0.10), ("stack_generation", 0.08), ("release_moe", 0.12)),
        meaning="whole step of a stack against the rest",
    ),
    "product": Prior(
        value=1 / 0.75,
        spread=0.10,
        levels=(
            ("generation", 0.06),
            ("generation_width", 0.10),
            ("generation_precision", 0.05),
            ("stack", 0.06),
            ("device", 0.05),
        ),
        meaning="time of large matrix products over that at peak",
    ),
    "power": Prior(
        value=0.2, spread=0.5, meaning="exponent of (peak TFLOP/s per watt): denser chips clock down under load"
    ),
    "operands": Prior(value=0.8, spread=0.3, meaning="HBM passes over operands of products that do not overlap"),
    "experts": Prior(value=1.3, spread=0.3, meaning="grouped products of experts against dense ones"),
    "tiles": Prior(value=1.0, spread=0.5, meaning="cost of half-empty tiles when an expert has few rows"),
    "attention": Prior(
        value=1 / 0.40,
        spread=0.25,
        levels=(("generation", 0.1), ("stack", 0.25)),
        meaning="time of attention over that at the 16-bit peak",
    ),
    "scores": Prior(value=6.0, spread=0.4, meaning="passes over the scores matrix when attention is not fused"),
    "logits": Prior(value=1.0, spread=0.3, meaning="passes over the logits, of those counted"),
    "hidden": Prior(value=2.0, spread=0.15, levels=(("stack", 0.1),), meaning="HBM passes of norms and residuals"),
    "mixer": Prior(value=2.0, spread=0.15, levels=(("stack", 0.1),), meaning="HBM passes over queries, keys, values"),
    "width": Prior(value=2.0, spread=0.15, levels=(("stack", 0.1),), meaning="HBM passes of activations in the MLP"),
    "permute": Prior(value=2.0, spread=0.4, levels=(("release_moe", 0.1),), meaning="HBM passes over routed tokens"),
    "casts": Prior(value=2.0, spread=0.4, meaning="HBM passes of quantizing operands"),
    "kernel_s": Prior(value=3e-6, spread=0.4, levels=(("generation", 0.1),), meaning="gap on the GPU per kernel"),
    "launch_s": Prior(
        value=8e-6,
        spread=0.5,
        levels=(("stack", 0.25), ("release_moe", 0.3)),
        meaning="host time per kernel; hidden while the GPU is behind",
    ),
    "launch_moe": Prior(value=3.0, spread=0.5, meaning="host time of a kernel of routing against others"),
    "tensor": Prior(
        value=1.4,
        spread=0.15,
        levels=(("stack", 0.2), ("generation", 0.1)),
        meaning="exposed tensor-parallel exchange over that at line rate",
    ),
    "context": Prior(value=0.6, spread=0.5, meaning="exposed context-parallel exchange over line rate"),
    "expert_link": Prior(value=1.2, spread=0.4, meaning="exposed all-to-all over line rate, scale-up links"),
    "expert_nic": Prior(value=1.2, spread=0.4, meaning="exposed all-to-all over line rate, network cards"),
    "pipeline": Prior(value=0.5, spread=0.5, levels=(("stack", 0.3),), meaning="exposed stage-to-stage messages"),
    "shards": Prior(
        value=1.4, spread=0.3, levels=(("stack", 0.2),), meaning="gathers of FSDP over line rate, before overlap"
    ),
    "replicas": Prior(
        value=0.5, spread=0.5, levels=(("stack", 0.4),), meaning="exposed gradient exchange over line rate"
    ),
    "optimizer": Prior(value=1.3, spread=0.3, meaning="optimizer's bytes at HBM rate"),
    "bubble": Prior(value=1.0, spread=0.15, meaning="pipeline idle time over the schedule's formula"),
    "recompute": Prior(value=0.9, spread=0.1, meaning="recomputed products against first ones"),
    "step_s": Prior(value=0.01, spread=0.7, meaning="host time once a step"),
}


class Levels(msgspec.Struct, frozen=True, kw_only=True):
    """A fitted constant: logarithm of the global value, and deviations by level and group."""

    log_value: float
    groups: dict[str, dict[str, float]] = {}


class LocalCorrection(msgspec.Struct, frozen=True, kw_only=True):
    """What remains at the measured rows of a stack, spread to configurations near them.

    A Gaussian process on residuals in logarithm: kernel amplitude^2 exp(-distance/length), rows of the same stack only.
    """

    amplitude: float
    length: float
    noise: float
    weights: dict[str, float]  # by row id


class Band(msgspec.Struct, frozen=True, kw_only=True):
    """Residuals in logarithm (measured over predicted) of rows whose nearest row is at most `distance` away."""

    distance: float
    low: float
    high: float
    rows: int


class Constants(msgspec.Struct, frozen=True, kw_only=True):
    """All that was fitted, and on what."""

    name: str
    date: str
    rows: int
    sources: tuple[str, ...]
    constants: dict[str, Levels]
    local: LocalCorrection | None = None
    bands: tuple[Band, ...] = ()
    site_spread: float = 0.0  # half width in logarithm that a cluster without rows of its own gets at least
    predicted: dict[str, float] = {}  # seconds by row id, when the row was left out of the fit
    extra_rows: tuple[TrainingRow, ...] = ()  # rows of this cluster, beside the shipped ones


@cache
def shipped() -> Constants:
    """The constants that ship."""
    data = resources.files("head.planner").joinpath("data", CONSTANTS_FILE).read_bytes()
    return msgspec.json.decode(data, type=Constants)


def current() -> Constants:
    """The constants that count now: those with the cluster's own rows while its calibration is in use."""
    own = active()
    return (own.training if own is not None else None) or shipped()


def family_of(stack: str) -> str:
    """The stack's name without its release: "megatron-bridge@26.04" is "megatron-bridge"."""
    return stack.partition("@")[0]


def groups_of(arch: Architecture, device: Accelerator, precision: str, stack: str) -> dict[str, str]:
    """The group of each level that a question belongs to."""
    kind = canonical_precision(precision)
    width = {"fp4": "4", "fp8": "8", "int8": "8", "fp32": "32", "tf32": "32"}.get(kind, "16")
    family = family_of(stack)
    return {
        "generation": device.generation,
        "generation_width": f"{device.generation} {width}",
        "generation_precision": f"{device.generation} {precision.lower()}",
        "device": device.name,
        "stack": family,
        "stack_generation": f"{family} {device.generation}",
        "release_moe": stack if arch.is_moe else "",
    }


def resolve(fitted: Constants, groups: Mapping[str, str]) -> dict[str, float]:
    """Values of all constants for one question: the global value times the deviations of its groups."""
    found: dict[str, float] = {}
    for name, levels in fitted.constants.items():
        total = levels.log_value
        for level, deviations in levels.groups.items():
            total += deviations.get(groups[level], 0.0)
        found[name] = math.exp(total)
    return found
