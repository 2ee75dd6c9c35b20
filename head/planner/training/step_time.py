"""Time of one training step, its parts, tokens per second, MFU and HFU, with an interval.

`step_work` counts the work at full speed, `constants` says how far from full speed each part runs, `combine` adds up.
Three things overlap instead of adding: kernel launches on the host with the GPU's work, the gathers of sharded
parameters with computing, and (inside its constant) gradient exchange with the backward pass. Overlap of a and b takes
(a^3 + b^3)^(1/3): the longer of the two, and a quarter more when they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from head.planner.calibration.intervals import band_for
from head.planner.calibration.near import nearest
from head.planner.calibration.quantity import NearRow, Quantity
from head.planner.calibration.training_features import FAR, neighbours, position_of
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.constants import Constants, current, family_of, groups_of, resolve
from head.planner.training.layout import TrainingLayout
from head.planner.training.step_work import StepWork, step_work

MFU_CONVENTION = (
    "model FLOPs (forward and twice that backward, causal attention halved, windows counted as windows, "
    "head counted, no recomputation) over time, GPUs and dense peak of the precision of the products"
)
HFU_CONVENTION = "as MFU, with recomputed FLOPs counted"
_OVERLAP_POWER = 3.0
_LOGITS_PRODUCT = 1.35  # the head's product at 16 bits: one large product, priced like the best measured ones
_NEAR_ROWS = 3

# What `combine` returns, in order: the parts of a step.
PARTS = (
    "linear",
    "experts",
    "attention",
    "logits",
    "memory_traffic",
    "kernel_gaps",
    "launch_wait",
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "pipeline_messages",
    "sharded_parameters",
    "bubble",
    "data_parallel",
    "optimizer",
    "step_overhead",
)
_COMPUTE = ("linear", "experts", "attention", "logits")


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """One training step. `parts` are seconds that sum to `step_s.value`; `roofline_s` is a lower bound of it.

    `calibrated_for` says which of accelerator, generation and stack had rows; `local_factor` is the correction that
    near rows of the same stack made.
    """

    step_s: Quantity
    parts: dict[str, float]
    tokens_per_s: Quantity
    tokens_per_s_per_gpu: Quantity
    mfu: Quantity
    hfu: Quantity
    model_flops: float
    hardware_flops: float
    roofline_s: float
    bottleneck: str
    stack: str
    local_factor: float = 1.0
    calibrated_for: dict[str, bool] = {}
    notes: tuple[str, ...] = ()


def combine(work: Mapping[str, Any], constant: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each part from full-speed `work` and resolved constants.

    Only sums, products and powers, so that the fit can pass arrays of rows for every number.
    """
    product = constant["product"] * work["density"] ** constant["power"]
    parts: dict[str, Any] = {
        "linear": (work["linear_s"] - work["recompute_s"] * (1.0 - constant["recompute"])) * product
        + work["linear_traffic_s"] * constant["operands"],
        "experts": work["expert_s"] * product * constant["experts"]
        + work["expert_tiles_s"] * constant["tiles"]
        + work["expert_traffic_s"] * constant["operands"],
        "attention": work["attention_s"] * constant["attention"] + work["score_traffic_s"] * constant["scores"],
        "logits": work["logits_s"] * _LOGITS_PRODUCT + work["logits_traffic_s"] * constant["logits"],
        "memory_traffic": work["hidden_traffic_s"] * constant["hidden"]
        + work["mixer_traffic_s"] * constant["mixer"]
        + work["width_traffic_s"] * constant["width"]
        + work["cast_traffic_s"] * constant["casts"]
        + work["permute_traffic_s"] * constant["permute"],
        "kernel_gaps": work["kernels"] * constant["kernel_s"],
        "tensor_parallel": (work["tp_link_s"] + work["tp_nic_s"]) * constant["tensor"],
        "context_parallel": (work["cp_link_s"] + work["cp_nic_s"]) * constant["context"],
        "expert_parallel": work["ep_link_s"] * constant["expert_link"] + work["ep_nic_s"] * constant["expert_nic"],
    }
    busy = sum(parts.values())
    launches = work["kernels"] + work["moe_kernels"] * (constant["launch_moe"] - 1.0)
    parts["launch_wait"] = _longer(busy, launches * constant["launch_s"]) - busy
    parts["pipeline_messages"] = (work["pp_link_s"] + work["pp_nic_s"]) * constant["pipeline"]
    busy = sum(parts.values())
    gathers = (work["shard_link_s"] + work["shard_nic_s"]) * constant["shards"]
    parts["sharded_parameters"] = _longer(busy, gathers) - busy
    busy = busy + parts["sharded_parameters"]
    idle = work["idle_rounds"] * work["mean_over_max"] / work["microbatches"]
    parts["bubble"] = busy * idle * constant["bubble"]
    parts["data_parallel"] = (work["dp_link_s"] + work["dp_nic_s"]) * constant["replicas"]
    parts["optimizer"] = work["optimizer_s"] * constant["optimizer"] + work["offload_s"]
    parts["step_overhead"] = constant["step_s"] + 0.0 * work["linear_s"]
    return {name: parts[name] * constant["all"] for name in PARTS}


def _longer(one: Any, other: Any) -> Any:
    return (one**_OVERLAP_POWER + other**_OVERLAP_POWER) ** (1.0 / _OVERLAP_POWER)


def work_of(work: StepWork, topology: Topology) -> dict[str, float]:
    """The numbers that `combine` reads: the work, and the chip's peak per watt."""
    found = {name: float(getattr(work, name)) for name in StepWork.__struct_fields__}
    found["density"] = power_density(topology)
    return found


def power_density(topology: Topology) -> float:
    """Peak 16-bit TFLOP/s per watt: 0.8 on A100, 1.4 on H100, 2.2 on B200. Cards that state no power count as 1."""
    device = topology.accelerator
    if not device.tdp_w:
        return 1.0
    return device.peak_flops("fp16") / 1e12 / device.tdp_w


def step_seconds(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    stack: str = "unknown",
    fitted: Constants | None = None,
) -> float:
    """Seconds of a step: `estimate(...).step_s.value` without what surrounds it. For searches."""
    fitted = fitted or current()
    parts, _, _ = _parts(arch, topology, layout, stack, fitted)
    return math.fsum(parts.values())


def estimate(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    stack: str = "unknown",
    fitted: Constants | None = None,
) -> StepTime:
    """One step of `layout` for `arch` on `topology` by the software `stack`, optionally with a release
    ("megatron-bridge@26.04"). An unknown stack or device is answered with the global constants and a wider interval.
    """
    fitted = fitted or current()
    parts, work, factor = _parts(arch, topology, layout, stack, fitted)
    seconds = math.fsum(parts.values())
    position = position_of(arch, topology, layout, stack)
    known = known_groups(arch, topology, layout, stack, fitted)
    distance, is_own = _nearest_of_stack(position, stack, fitted)
    band = band_for(
        fitted.bands,
        distance,
        is_generation_known=known["generation"],
        site_spread=0.0 if is_own else fitted.site_spread,
    )
    low, high = max(work.roofline_s, seconds * math.exp(band.low)), seconds * math.exp(band.high)
    low = min(low, seconds)
    near = _near(position, stack, fitted)
    tokens = float(layout.global_batch * layout.seq)
    rate = topology.accelerator.peak_flops(layout.precision) * layout.gpus

    def quantity(scale: float, unit: str, convention: str = "", limit: float = math.inf) -> Quantity:
        bounds = [min(scale / time, limit) for time in (seconds, high, low)]
        return Quantity(
            value=bounds[0],
            unit=unit,
            low=bounds[1],
            high=bounds[2],
            convention=convention,
            calibration=fitted.name,
        )

    return StepTime(
        step_s=Quantity(
            value=seconds,
            unit="s",
            low=low,
            high=high,
            convention="one optimizer step, steady state, without checkpoints and failures",
            calibration=fitted.name,
            near=near,
        ),
        parts=parts,
        tokens_per_s=quantity(tokens, "tokens/s"),
        tokens_per_s_per_gpu=quantity(tokens / layout.gpus, "tokens/s/GPU"),
        mfu=quantity(work.step_flops / rate, "1", MFU_CONVENTION, 1.0),
        hfu=quantity(work.hardware_flops / rate, "1", HFU_CONVENTION, 1.0),
        model_flops=work.step_flops,
        hardware_flops=work.hardware_flops,
        roofline_s=work.roofline_s,
        bottleneck=_bottleneck(parts),
        stack=stack,
        local_factor=factor,
        calibrated_for=known,
        notes=_notes(known, stack, topology),
    )


def _parts(
    arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str, fitted: Constants
) -> tuple[dict[str, float], StepWork, float]:
    """Corrected parts, the work they come from, and the local factor that is in them."""
    work = step_work(arch, topology, layout)
    groups = groups_of(arch, topology.accelerator, layout.precision, stack)
    parts = combine(work_of(work, topology), resolve(fitted, groups))
    factor = local_factor(arch, topology, layout, stack, fitted)
    total = math.fsum(parts.values()) * factor
    # Nothing runs above the roofline of all its FLOPs, recomputed ones included.
    scale = factor * max(1.0, work.roofline_s / total)
    return {name: max(0.0, value) * scale for name, value in parts.items()}, work, factor


def local_factor(
    arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str, fitted: Constants
) -> float:
    """The factor that measured rows of the same stack near this configuration ask for; 1 far from all of them."""
    local = fitted.local
    if local is None:
        return 1.0
    position = position_of(arch, topology, layout, stack)
    total = 0.0
    for row_id, distance in neighbours(position, family_of(stack), fitted.extra_rows):
        weight = local.weights.get(row_id)
        if weight is not None:
            total += weight * math.exp(-distance / local.length)
    return math.exp(max(-0.7, min(0.7, local.amplitude**2 * total)))


def known_groups(
    arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str, fitted: Constants
) -> dict[str, bool]:
    """Which of generation, device, precision and stack had rows."""
    groups = groups_of(arch, topology.accelerator, layout.precision, stack)
    product = fitted.constants["product"].groups
    return {
        "generation": groups["generation"] in product["generation"],
        "precision": groups["generation_width"] in product["generation_width"],
        "device": groups["device"] in product["device"],
        "stack": groups["stack"] in product["stack"],
    }


def _nearest_of_stack(position: tuple[float, ...], stack: str, fitted: Constants) -> tuple[float, bool]:
    """Distance to the nearest row of the stack, and whether it is one of this cluster's own."""
    found = neighbours(position, family_of(stack), fitted.extra_rows)
    row_id, distance = min(found, key=lambda pair: pair[1], default=("", FAR))
    return distance, any(row.id == row_id for row in fitted.extra_rows)


def _near(position: tuple[float, ...], stack: str, fitted: Constants) -> tuple[NearRow, ...]:
    found = nearest(position, family_of(stack), _NEAR_ROWS, fitted.extra_rows)
    return tuple(
        NearRow(
            id=row.id,
            source=row.source,
            measured=row.step_s,
            predicted=fitted.predicted.get(row.id, 0.0),
            distance=round(distance, 3),
        )
        for row, distance in found
        if row.id in fitted.predicted
    )


def _bottleneck(parts: Mapping[str, float]) -> str:
    """compute, memory_traffic, communication, bubble, launch or optimizer: the largest sum of parts."""
    sums = {
        "compute": math.fsum(parts[name] for name in _COMPUTE),
        "memory_traffic": parts["memory_traffic"],
        "launch": parts["launch_wait"] + parts["kernel_gaps"] + parts["step_overhead"],
        "communication": math.fsum(value for name, value in parts.items() if name.endswith("_parallel"))
        + parts["pipeline_messages"]
        + parts["sharded_parameters"],
        "bubble": parts["bubble"],
        "optimizer": parts["optimizer"],
    }
    return max(sums, key=lambda name: sums[name])


def _notes(known: Mapping[str, bool], stack: str, topology: Topology) -> tuple[str, ...]:
    notes = []
    if not known["stack"]:
        notes.append(f"no measured rows of the stack {stack!r}: constants of all stacks, wider interval")
    if not known["generation"]:
        notes.append(f"no measured rows on {topology.accelerator.generation!r}: constants of other devices")
    return tuple(notes)
