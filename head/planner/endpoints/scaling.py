"""More GPUs: scaling, largescale."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import InvalidValue, NothingFits
from head.planner.calibration.quantity import Quantity
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import (
    Recommendation,
    SearchedView,
    SearchQuestion,
    TopologySummary,
    base_of,
    recommendations,
    require,
    searched_view,
    topology_summary,
)
from head.planner.endpoints.layouts import GB, LayoutView, layout_name, layout_view
from head.planner.endpoints.questions import Batch, Count, Desk, architecture_for, topology_for
from head.planner.endpoints.training_time import shares
from head.planner.export import kubernetes, slurm
from head.planner.export.job import TrainingJob
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.resilience import Resilience, resilience
from head.planner.training.scaling import ScalingPoint, scale
from head.planner.training.search import Choice, search
from head.planner.training.step_time import StepTime
from head.planner.training.step_time import estimate as estimate_step

# What the old planner called kinds of clusters: accelerator, GPUs of a node, Gbit/s of network per GPU, network.
# Source: the vendors' instance descriptions (p5: 3,200 Gbit/s EFA for 8 H100; p4d: 400 for 8 A100; a3-high: 1,000 for
# 8 H100; ND H100 v5 and DGX: 400 per GPU).
CLUSTERS: dict[str, tuple[str, int, float, str]] = {
    "nvlink_h100": ("H100-SXM-80GB", 8, 400.0, "infiniband"),
    "dgx_cloud": ("H100-SXM-80GB", 8, 400.0, "infiniband"),
    "aws_p5": ("H100-SXM-80GB", 8, 400.0, "efa"),
    "aws_p4d": ("A100-SXM-40GB", 8, 50.0, "efa"),
    "gcp_a3": ("H100-SXM-80GB", 8, 125.0, "ethernet"),
    "azure_nd": ("H100-SXM-80GB", 8, 400.0, "infiniband"),
}


_BOTTLENECKS = (("compute", "compute"), ("memory", "memory_access"), ("communication", "communication"))


class ScalingQuestion(SearchQuestion, frozen=True, kw_only=True):
    """Throughput over numbers of GPUs: the same batch (strong) and a batch that grows along (weak)."""

    batch_size: Annotated[Batch, Meta(description="Sequences of a step on each GPU's share; see global_batch.")] = 8
    base_gpus: Annotated[Count, Meta(description="Where the curve starts.")] = 8
    target_gpus: Annotated[Count, Meta(description="Where it ends.")] = 64


class ScalingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One number of GPUs."""

    gpus: int
    throughput_tps: float
    per_gpu_throughput: float
    efficiency: float
    step_s: float
    communication_share: float
    layout: str
    problem: str = ""


class ScalingAnswer(Answer, frozen=True, kw_only=True):
    """Both curves from the best layout of the base."""

    model: str
    current_gpus: int
    current_throughput: float
    layout: LayoutView
    scaling_projections: tuple[ScalingRow, ...]
    weak_projections: tuple[ScalingRow, ...]
    strong_scaling_efficiency: float
    weak_scaling_efficiency: float
    optimal_gpu_count: int
    optimal_efficiency: float
    scaling_recommendations: tuple[str, ...]
    topology: TopologySummary


class LargescaleQuestion(SearchQuestion, frozen=True, kw_only=True):
    """A long run on many nodes: layout, failures, checkpoints, cost."""

    batch_size: Annotated[Batch, Meta(description="Sequences of a step on each GPU's share; see global_batch.")] = 8
    num_nodes: Annotated[Count, Meta(description="Nodes.")] = 16
    cluster_type: Annotated[
        str, Meta(max_length=32, description="nvlink_h100, dgx_cloud, aws_p5, aws_p4d, gcp_a3, azure_nd, custom.")
    ] = "nvlink_h100"
    gpu_cost: Annotated[float, Meta(ge=0, le=1e6, description="Dollars per GPU and hour.")] = 4.0
    gpu_hours_per_failure: Annotated[
        float, Meta(ge=0, le=1e9, description="GPU-hours between failures; 0: as published for Llama 3.")
    ] = 0.0
    storage_gb_per_s: Annotated[float, Meta(ge=0, le=1e6, description="Of all nodes together; 0: 2 per node.")] = 0.0


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """The machines."""

    num_nodes: int
    total_gpus: int
    total_memory_gb: float
    cluster_type: str
    topology: TopologySummary


class LargescaleAnswer(Answer, frozen=True, kw_only=True):
    """A layout, what failures leave of it, the scripts that run it."""

    model: str
    cluster: ClusterView
    config: dict[str, Any]
    best: Recommendation
    efficiency: dict[str, Any]
    resilience: Resilience
    goodput_tokens_per_s: float
    days_per_trillion_tokens: Quantity
    slurm_script: str
    kubernetes_config: dict[str, Any]
    recommendations: tuple[str, ...]
    searched: SearchedView


def scaling(question: ScalingQuestion, desk: Desk) -> ScalingAnswer:
    """The best layout of the base on more and more GPUs."""
    if question.target_gpus < question.base_gpus:
        raise InvalidValue("target_gpus: fewer than base_gpus", field="target_gpus")
    arch = architecture_for(question, desk)
    topology = topology_for(msgspec.structs.replace(question, gpus=question.target_gpus), desk)
    start = topology.with_gpus(question.base_gpus)
    batch = question.global_batch or question.batch_size * question.target_gpus
    base = msgspec.structs.replace(base_of(question, start), global_batch=batch)
    choice = _best_choice(arch, start, base, question)
    counts = [question.base_gpus]
    while counts[-1] * 2 <= question.target_gpus:
        counts.append(counts[-1] * 2)
    if counts[-1] != question.target_gpus:
        counts.append(question.target_gpus)
    found = scale(arch, topology, choice.layout, counts, stack=question.stack)
    strong, weak = tuple(map(_row, found.strong)), tuple(map(_row, found.weak))
    optimal = next(row for row in strong if row.gpus == found.optimal_gpus)
    return ScalingAnswer(
        model=arch.name,
        current_gpus=question.base_gpus,
        current_throughput=strong[0].throughput_tps,
        layout=layout_view(choice.layout),
        scaling_projections=strong,
        weak_projections=weak,
        strong_scaling_efficiency=strong[-1].efficiency,
        weak_scaling_efficiency=weak[-1].efficiency,
        optimal_gpu_count=found.optimal_gpus,
        optimal_efficiency=optimal.efficiency,
        scaling_recommendations=_scaling_advice(strong, weak, found.optimal_gpus, found.efficiency_floor),
        topology=topology_summary(topology),
    )


def _best_choice(arch: Architecture, topology: Topology, base: Any, question: SearchQuestion) -> Choice:
    return require(search(arch, topology, base, stack=question.stack, top=1))


def _row(point: ScalingPoint) -> ScalingRow:
    return ScalingRow(
        gpus=point.gpus,
        throughput_tps=point.tokens_per_s,
        per_gpu_throughput=point.tokens_per_s / point.gpus,
        efficiency=point.efficiency,
        step_s=point.step_s,
        communication_share=point.communication_share,
        layout=layout_name(point.layout) if point.layout else "",
        problem=point.problem,
    )


def _scaling_advice(
    strong: tuple[ScalingRow, ...], weak: tuple[ScalingRow, ...], optimal: int, floor: float
) -> tuple[str, ...]:
    found = [f"with this batch, {optimal} GPUs are the most that keep {floor:.0%} of the efficiency of the base"]
    last, wide = strong[-1], weak[-1]
    if not last.problem and not wide.problem and wide.efficiency > last.efficiency + 0.05:
        found.append(
            f"a batch that grows with the GPUs keeps {wide.efficiency:.0%} on {wide.gpus} instead of"
            f" {last.efficiency:.0%}: raise the global batch as far as training allows"
        )
    found += [f"{row.gpus} GPUs: {row.problem}" for row in strong if row.problem]
    return tuple(found)


def largescale(question: LargescaleQuestion, desk: Desk) -> LargescaleAnswer:
    """The best layout, and the run around it."""
    arch = architecture_for(question, desk)
    topology = _cluster(question, desk)
    base = base_of(question, topology)
    result = search(arch, topology, base, stack=question.stack, top=3, usd_per_gpu_hour=question.gpu_cost)
    choice = require(result)
    best = recommendations(arch, topology, result.choices[:1], question.stack)[0]
    step = estimate_step(arch, topology, choice.layout, question.stack or "unknown")
    more: dict[str, Any] = {"storage_bytes_per_s": question.storage_gb_per_s * 1e9}
    if question.gpu_hours_per_failure:
        more["gpu_hours_per_failure"] = question.gpu_hours_per_failure
    survived = resilience(arch, topology, choice.layout, **more)
    goodput = step.tokens_per_s.value * survived.goodput_share
    if goodput <= 0:
        raise NothingFits(
            f"{topology.gpus} GPUs fail every {86_400 / survived.failures_per_day:.0f} s: no checkpoint is done before",
            hint="faster storage (storage_gb_per_s), fewer GPUs, or fewer failures (gpu_hours_per_failure)",
            failures_per_day=survived.failures_per_day,
            checkpoint_share=survived.checkpoint_share,
        )
    days = 1e12 / goodput / 86_400
    gpu_hours = days * 24 * topology.gpus
    job = TrainingJob(layout=choice.layout, topology=topology, architecture=arch, name="train")
    found = shares(step.parts)
    return LargescaleAnswer(
        model=arch.name,
        cluster=ClusterView(
            num_nodes=topology.nodes,
            total_gpus=topology.gpus,
            total_memory_gb=topology.gpus * topology.accelerator.visible_bytes / GB,
            cluster_type=question.cluster_type,
            topology=topology_summary(topology),
        ),
        config={
            "parallelism": {
                "tp": choice.layout.tp,
                "pp": choice.layout.pp,
                "dp": choice.layout.dp,
                "cp": choice.layout.cp,
                "ep": choice.layout.ep,
            },
            "mapping": {
                "tp_within_node": choice.layout.tp <= topology.local_gpus,
                "pp_across_nodes": choice.layout.pp > 1 and topology.nodes > 1,
                "dp_hierarchical": choice.layout.dp > 1 and topology.nodes > 1,
            },
            "fault_tolerance": {
                "strategy": "restart from the newest checkpoint",
                "checkpoint_strategy": "sharded",
                "checkpoint_interval_minutes": survived.interval_s / 60,
                "failures_per_day": survived.failures_per_day,
            },
            "communication": {
                "overlap_communication": True,
                "hierarchical_allreduce": topology.nodes > 1,
                "gradient_compression": False,
            },
        },
        best=best,
        efficiency={
            **_efficiency(step, found, choice, gpu_hours, question.gpu_cost),
            "mfu": step.mfu.value,
            "communication_efficiency": 1.0 - found["communication"],
            "memory_efficiency": min(1.0, choice.memory.parts.total / choice.memory.capacity_bytes),
            "compute_pct": 100 * found["compute"],
            "memory_pct": 100 * found["memory_access"],
            "communication_pct": 100 * found["communication"],
            "goodput_share": survived.goodput_share,
            "gpu_hours_per_trillion_tokens": gpu_hours,
            "cost_per_trillion_tokens": gpu_hours * question.gpu_cost,
        },
        resilience=survived,
        goodput_tokens_per_s=goodput,
        days_per_trillion_tokens=Quantity(
            value=days,
            unit="days",
            low=1e12 / (step.tokens_per_s.high * survived.goodput_share) / 86_400,
            high=1e12 / (step.tokens_per_s.low * survived.goodput_share) / 86_400,
            convention="wall time, checkpoints, failures and repeated work included",
            calibration=step.step_s.calibration,
        ),
        slurm_script=slurm.script(job),
        kubernetes_config=kubernetes.pytorch_job(job),
        recommendations=(*best.optimizations, *_survival(survived)),
        searched=searched_view(result),
    )


def _efficiency(
    step: StepTime, found: dict[str, float], choice: Choice, gpu_hours: float, gpu_cost: float
) -> dict[str, dict[str, float]]:
    """The same numbers in the blocks in which the replaced planner answered them."""
    return {
        "efficiency": {
            "mfu": step.mfu.value,
            "communication_efficiency": 1.0 - found["communication"],
            "memory_efficiency": min(1.0, choice.memory.parts.total / choice.memory.capacity_bytes),
        },
        "bottleneck": {f"{name}_pct": 100 * found[part] for name, part in _BOTTLENECKS},
        "cost": {
            "gpu_hours_per_trillion_tokens": gpu_hours,
            "cost_per_trillion_tokens": gpu_hours * gpu_cost,
        },
    }


def _survival(found: Resilience) -> tuple[str, ...]:
    """What failures ask for."""
    said = [
        f"checkpoint every {found.interval_s / 60:.0f} minutes ({found.convention});"
        f" {found.failures_per_day:.2g} failures a day are to be expected"
    ]
    if found.checkpoint_share > 0.02:
        said.append("write checkpoints in the background: training stands still for them for over a fiftieth")
    return tuple(said)


def _cluster(question: LargescaleQuestion, desk: Desk) -> Topology:
    """The nodes that are named; `custom` and a named accelerator are taken as they are."""
    per_node = question.gpus_per_node or 8
    if question.gpu or question.mock_topology or question.cluster_type == "custom":
        gpus = question.gpus or question.num_nodes * per_node
        return topology_for(msgspec.structs.replace(question, gpus=gpus, gpus_per_node=per_node), desk)
    known = CLUSTERS.get(question.cluster_type.lower())
    if known is None:
        raise InvalidValue(
            f"cluster_type: {question.cluster_type!r} is not known",
            field="cluster_type",
            known=[*CLUSTERS, "custom"],
            hint="one of " + ", ".join([*CLUSTERS, "custom"]),
        )
    name, usual, nic, _ = known
    each = question.gpus_per_node or usual
    asked = msgspec.structs.replace(
        question, gpu=name, gpus=question.num_nodes * each, gpus_per_node=each, nic_gbit=question.nic_gbit or nic
    )
    return topology_for(asked, desk)


_CODES = ("model_not_found", "not_found", "nothing_fits")
ENDPOINTS = (
    Endpoint(
        "scaling",
        "scaling",
        ScalingQuestion,
        ScalingAnswer,
        scaling,
        "Throughput over numbers of GPUs",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("base_gpus", 8), ("target_gpus", 64)),
        codes=_CODES,
    ),
    Endpoint(
        "largescale",
        "large-scale",
        LargescaleQuestion,
        LargescaleAnswer,
        largescale,
        "A long run on many nodes",
        example=(("model", "llama-3.1-70b"), ("num_nodes", 32), ("seq_length", 4096)),
        codes=_CODES,
    ),
)
