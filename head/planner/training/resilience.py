"""Checkpoints and failures of long runs: sizes, how often to save, failures per day, and the goodput that is left.

Conventions: failures are independent and exponential; the mean time between failures is stated per GPU and falls as 1/n
with n GPUs; it counts everything that stops the job (GPU, memory, network, host, software). A failure costs the
detection and restart time and, on average, half of a checkpoint interval of work.
Sources: Young 1974; Daly 2006 (higher-order estimate); Llama 3 report, section 3.3.4 (419 unexpected interruptions in
54 days on 16,384 GPUs: one in 3.1 h, 50,700 GPU hours each).
"""

from __future__ import annotations

import math

import msgspec

from common.errors import InvalidValue
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory_states import MOMENT_BYTES

GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419  # Llama 3 report
RESTART_S = 600.0  # find the fault, replace a node, start, read the checkpoint back
STORAGE_BYTES_PER_S_PER_NODE = 2e9  # to a shared file system
MTBF_CONVENTION = "GPU hours per interruption of the job, all causes; failures exponential and independent"


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one checkpoint. `weights` alone is what serving needs; the whole restarts training."""

    weights_bytes: int
    optimizer_bytes: int
    total_bytes: int
    bytes_per_param: float
    per_gpu_bytes: float  # when every GPU writes its own part


class Resilience(msgspec.Struct, frozen=True, kw_only=True):
    """A run's failures and what they cost. Shares are in [0, 1]; goodput_share is useful time over wall time."""

    gpus: int
    mtbf_s: float  # of the whole job
    failures_per_day: float
    checkpoint: Checkpoint
    write_s: float  # that training stands still for one checkpoint
    interval_s: float  # between checkpoints, Daly's estimate
    interval_young_s: float
    restart_s: float
    checkpoint_share: float
    lost_work_share: float
    restart_share: float
    goodput_share: float
    checkpoints_per_day: float
    convention: str


def checkpoint_of(arch: Architecture, layout: TrainingLayout) -> Checkpoint:
    """16-bit weights, an fp32 master copy and the moments of the optimizer: 2 + 4 + 8 bytes for AdamW.

    LoRA saves its adapters only. Source: BigScience tr11 (2.3 TB for 176B parameters at 14 bytes).
    """
    params = count(arch).total
    if layout.tuning != "full":
        from head.planner.training.memory_layers import model_facts

        kinds = model_facts(arch).kinds
        params = sum(kind.layers * kind.params.lora_width for kind in kinds) * layout.lora_rank
    wide = layout.precision in ("fp32", "tf32")
    weights = params * (4 if wide else 2)
    optimizer = int(params * ((0.0 if wide else 4.0) + MOMENT_BYTES.get(layout.optimizer, 8.0)))
    total = weights + optimizer
    return Checkpoint(
        weights_bytes=weights,
        optimizer_bytes=optimizer,
        total_bytes=total,
        bytes_per_param=total / params if params else 0.0,
        per_gpu_bytes=total / layout.gpus,
    )


def young_interval_s(write_s: float, mtbf_s: float) -> float:
    """Young's first-order optimum, sqrt(2 write mtbf). Source: Young 1974."""
    return math.sqrt(2.0 * write_s * mtbf_s)


def daly_interval_s(write_s: float, mtbf_s: float) -> float:
    """Daly's higher-order optimum of the compute time between checkpoints; the MTBF when writing takes over half of it.

    Source: Daly 2006, equation 37.
    """
    if write_s >= mtbf_s / 2:
        return mtbf_s
    ratio = write_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * write_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - write_s


def resilience(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    *,
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE,
    restart_s: float = RESTART_S,
    storage_bytes_per_s: float = 0.0,
    interval_s: float = 0.0,
    is_asynchronous: bool = False,
) -> Resilience:
    """Failures, checkpoints and goodput of `layout`.

    storage_bytes_per_s: of all nodes together; 0: 2 GB/s a node. interval_s: 0: the optimum. is_asynchronous: training
    waits only for the copy to host memory. Raises: InvalidValue for numbers that are not positive.
    """
    if not (gpu_hours_per_failure > 0 and restart_s >= 0 and storage_bytes_per_s >= 0 and interval_s >= 0):
        raise InvalidValue("times and rates must be positive", field="gpu_hours_per_failure")
    gpus = layout.gpus
    mtbf = gpu_hours_per_failure * 3600.0 / gpus
    saved = checkpoint_of(arch, layout)
    nodes = math.ceil(gpus / topology.gpus_per_node)
    rate = storage_bytes_per_s or STORAGE_BYTES_PER_S_PER_NODE * nodes
    write = saved.total_bytes / rate
    if is_asynchronous:
        host = topology.pcie_bytes_per_s or topology.accelerator.pcie_bytes_per_s or 16e9
        write = min(write, saved.per_gpu_bytes / host)
    young = young_interval_s(write, mtbf)
    interval = interval_s or max(daly_interval_s(write, mtbf), 1.0)
    # Per second of useful work: write/interval for saving; each failure (one per mtbf of wall time) loses half a period
    # and the restart. Wall = useful (1 + saving) / (1 - failures' share).
    period = interval + write
    failing = min((period / 2 + restart_s) / mtbf, 1.0)
    useful = (1.0 - failing) * interval / period
    lost = min(period / 2 / mtbf, failing)
    return Resilience(
        gpus=gpus,
        mtbf_s=mtbf,
        failures_per_day=86_400.0 / mtbf,
        checkpoint=saved,
        write_s=write,
        interval_s=interval,
        interval_young_s=young,
        restart_s=restart_s,
        checkpoint_share=(1.0 - failing) * write / period,
        lost_work_share=lost,
        restart_share=failing - lost,
        goodput_share=useful,
        checkpoints_per_day=86_400.0 / period * (1.0 - failing),
        convention=MTBF_CONVENTION,
    )
