"""What of a step's communication can hide behind its computation, and which switches make it hide.

The step's parts are given (seconds of one step on the slowest rank); this module adds volumes and judgement. Nothing
here predicts a step time: the parts' sums are only compared.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from common.errors import InvalidValue
from head.planner.training.layout import TrainingLayout

Kind = Literal["tp", "sp", "dp", "fsdp", "pp", "ep", "cp"]

# Share of each kind of communication that can run beside computation at best, and what limits it. tp: measured gains
# of asynchronous tensor parallelism are 4 to 16 % of the step (torchtitan, docs/performance.md), i.e. about half of the
# exposed time. dp: all but the last bucket. pp: everything but warm-up and flush.
REACH: dict[Kind, float] = {"tp": 0.5, "sp": 0.5, "dp": 0.9, "fsdp": 0.9, "pp": 0.8, "ep": 0.6, "cp": 0.9}
_NAMES: dict[Kind, str] = {
    "tp": "TP AllReduce",
    "sp": "TP AllGather/ReduceScatter (sequence parallel)",
    "dp": "DP gradient AllReduce/ReduceScatter",
    "fsdp": "FSDP AllGather/ReduceScatter",
    "pp": "PP P2P",
    "ep": "EP AllToAll",
    "cp": "CP ring exchange",
}
_SWITCHES: dict[Kind, dict[str, str]] = {
    "tp": {"megatron": "--tp-comm-overlap", "pytorch": "torch._inductor.config._micro_pipeline_tp = True"},
    "sp": {"megatron": "--tp-comm-overlap", "pytorch": "torch._inductor.config._micro_pipeline_tp = True"},
    "dp": {"megatron": "--overlap-grad-reduce --overlap-param-gather", "deepspeed": "overlap_comm: true"},
    "fsdp": {"pytorch": "fully_shard prefetches by itself; set_modules_to_forward_prefetch for more than one block"},
    "pp": {"megatron": "--num-virtual-stages-per-pipeline-rank (P2P overlap is on when interleaved)"},
    "ep": {"megatron": "--overlap-moe-expert-parallel-comm, or --moe-shared-expert-overlap"},
    "cp": {"megatron": "--cp-comm-type p2p (ring, hidden behind attention) or a2a for few heads apart"},
}


class StepPart(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of communication in a step: its whole time, what of it is not hidden now, and its bytes per GPU."""

    kind: Kind
    time_s: float
    exposed_s: float
    volume_bytes: float = 0.0


def overlap_advice(layout: TrainingLayout, compute_s: float, parts: tuple[StepPart, ...]) -> dict[str, Any]:
    """The seed's /comm-overlap answer from a step's parts.

    compute_s: seconds of computation of the step. What can be hidden is bounded by `REACH` and by the computation that
    is there to hide behind, shared out to the largest part first.
    Raises: InvalidValue for times that are negative, not finite, or more exposed than whole.
    """
    if not 0 <= compute_s < 1e9:
        raise InvalidValue("compute_s must be finite and not negative", field="compute_s")
    for part in parts:
        if not 0 <= part.exposed_s <= part.time_s < 1e9:
            raise InvalidValue(f"{part.kind}: exposed time must lie between 0 and the whole", field=part.kind)
    total = sum(part.time_s for part in parts)
    exposed = sum(part.exposed_s for part in parts)
    step = compute_s + exposed
    room = max(0.0, compute_s - (total - exposed))
    rows: list[dict[str, Any]] = []
    gained = 0.0
    for part in sorted(parts, key=lambda part: (-part.exposed_s, part.kind)):
        floor = part.time_s * (1 - REACH[part.kind])
        hideable = min(max(0.0, part.exposed_s - floor), room)
        room -= hideable
        gained += hideable
        rows.append(_row(part, hideable, step))
    return {
        "opportunities": rows,
        "overlap_analysis": {
            "compute_time_ms": compute_s * 1e3,
            "communication_time_ms": total * 1e3,
            "exposed_communication_ms": exposed * 1e3,
            "overlap_potential_ms": gained * 1e3,
            "overlap_potential": gained / step if step > 0 else 0.0,
            "communication_share": exposed / step if step > 0 else 0.0,
            "step_time_ms": step * 1e3,
            "step_time_overlapped_ms": (step - gained) * 1e3,
        },
        "overlap_configs": _configs(layout, parts),
        "recommendations": _recommendations(layout, rows, compute_s, exposed),
        "parallelism": {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "ep": layout.ep, "dp": layout.dp},
    }


def _row(part: StepPart, hideable_s: float, step_s: float) -> dict[str, Any]:
    """One kind of communication."""
    share = hideable_s / step_s if step_s > 0 else 0.0
    word = "high" if share >= 0.05 else "medium" if share >= 0.01 else "low"
    return {
        "type": _NAMES[part.kind],
        "kind": part.kind,
        "volume_mb": part.volume_bytes / 1e6,
        "time_ms": part.time_s * 1e3,
        "exposed_ms": part.exposed_s * 1e3,
        "hideable_ms": hideable_s * 1e3,
        "gain": share,
        "overlap_potential": word,
        "switches": _SWITCHES[part.kind],
    }


def _configs(layout: TrainingLayout, parts: tuple[StepPart, ...]) -> dict[str, str]:
    """Environment that overlapping needs. NCCL_LAUNCH_MODE and NCCL_ASYNC_ERROR_HANDLING of old guides are gone."""
    kinds = {part.kind for part in parts}
    if kinds & {"tp", "sp", "cp"} and (layout.tp > 1 or layout.cp > 1):
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return {}


def _recommendations(
    layout: TrainingLayout, rows: list[dict[str, Any]], compute_s: float, exposed_s: float
) -> list[str]:
    """What to do, the largest gain first."""
    found = []
    for row in rows:
        if row["gain"] >= 0.01:
            switch = next(iter(row["switches"].values()))
            found.append(f"{row['type']}: up to {row['hideable_ms']:.1f} ms ({row['gain']:.0%} of the step): {switch}")
    if not found and exposed_s > 0.1 * (compute_s + exposed_s):
        found.append("communication is exposed, but there is too little computation to hide it behind: larger batches")
    if layout.pp > 1 and layout.virtual_stages == 1 and layout.microbatches < 4 * layout.pp:
        found.append(
            f"{layout.microbatches} micro-batches for {layout.pp} stages: the bubble outweighs what overlap gains"
        )
    return found or ["nothing to gain: less than 1 % of the step is exposed communication that could be hidden"]
