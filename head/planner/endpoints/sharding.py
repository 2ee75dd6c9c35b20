"""Ways to shard weights, gradients and optimizer states: sharding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidValue, NothingFits
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import TopologySummary, remedy_view, topology_summary
from head.planner.endpoints.layouts import GB, sharding_of
from head.planner.endpoints.questions import Count, Desk, PlacedQuestion, architecture_for, topology_for
from head.planner.endpoints.training_time import shares
from head.planner.export import accelerate, deepspeed
from head.planner.export.job import TrainingJob
from head.planner.hardware.topology import Topology
from head.planner.model.parameters import count
from head.planner.training.layout import Sharding, TrainingLayout
from head.planner.training.memory import TrainingMemory, estimate_memory
from head.planner.training.search import remedies
from head.planner.training.step_time import estimate as estimate_step


class ShardingQuestion(PlacedQuestion, frozen=True, kw_only=True):
    """Ways to shard weights, gradients and optimizer over dp ranks."""

    dp: Annotated[Count, Meta(description="Data-parallel ranks.")] = 8
    nodes: Annotated[Count, Meta(description="Nodes.")] = 1
    gpus: Annotated[int, Meta(ge=0, le=1_024, description="GPUs of a node; 0: dp / nodes.")] = 0
    batch_size: Annotated[int, Meta(ge=1, le=1 << 20, description="Sequences of a rank.")] = 1
    seq_length: Annotated[int, Meta(ge=1, le=1 << 26, description="Tokens of a sequence.")] = 2048
    checkpointing: Annotated[Literal["none", "selective", "full"], Meta(description="Recomputation.")] = "full"


class ShardingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a strategy sets."""

    strategy: str
    zero_stage: int
    shard_size: int
    replicate_size: int
    sharding_factor: int
    cpu_offload: bool
    nvme_offload: bool = False


class ShardingMemory(msgspec.Struct, frozen=True, kw_only=True):
    """GB of the fullest GPU; other_gb is logits, buffers, context and fragmentation."""

    params_gb: float
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float
    other_gb: float
    total_gb: float


class ShardingExchange(msgspec.Struct, frozen=True, kw_only=True):
    """GB that each rank sends in a step by ring algorithms, and the share of the step that is waited for it."""

    all_gather_gb: float
    reduce_scatter_gb: float
    all_reduce_gb: float
    overhead_pct: float


class ShardingAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes and costs, by the same models as everything else."""

    memory: ShardingMemory
    communication: ShardingExchange
    verdict: str
    fit_probability: float
    headroom_gb: float
    host_memory_gb_per_node: float
    memory_savings_factor: float
    step_s: float
    tokens_per_s: float
    pros: tuple[str, ...]
    cons: tuple[str, ...]


class ShardingOption(msgspec.Struct, frozen=True, kw_only=True):
    """One strategy. Score 100: the fastest that fits; 0: does not fit."""

    config: ShardingConfig
    analysis: ShardingAnalysis
    score: float
    deepspeed_config: dict[str, Any]
    fsdp_config: dict[str, Any]


class ShardingAnswer(Answer, frozen=True, kw_only=True):
    """Every strategy, those that fit first; none is left out."""

    model: str
    result: tuple[ShardingOption, ...]
    best: ShardingOption | None
    remedies: tuple[str, ...]
    topology: TopologySummary


_STRATEGIES: tuple[tuple[str, Sharding, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("none", "none", "none", ("no extra exchange",), ("everything on every GPU",)),
    (
        "ZeRO-1",
        "zero1",
        "none",
        ("optimizer states shared out", "exchange as without"),
        ("weights and gradients whole",),
    ),
    ("ZeRO-2", "zero2", "none", ("gradients shared out too",), ("gradients are reduced in every micro-batch",)),
    ("ZeRO-3", "zero3", "none", ("everything shared out",), ("weights are gathered twice in every micro-batch",)),
    (
        "FSDP",
        "fsdp",
        "none",
        ("everything shared out", "plain PyTorch"),
        ("weights are gathered in every micro-batch",),
    ),
    ("HSDP", "hsdp", "none", ("gathers stay inside a node",), ("one copy of the states per node",)),
    (
        "ZeRO-1 with optimizer offload",
        "zero1",
        "optimizer",
        ("optimizer states in host memory",),
        ("gradients and weights cross PCIe in every step",),
    ),
    (
        "FSDP with offload",
        "fsdp",
        "optimizer_and_weights",
        ("weights and optimizer in host memory",),
        ("everything crosses PCIe in every step",),
    ),
)


def sharding(question: ShardingQuestion, desk: Desk) -> ShardingAnswer:
    """Each strategy with its memory and time on the same machine."""
    arch = architecture_for(question, desk)
    topology = _sharding_machine(question, desk)
    whole: TrainingMemory | None = None
    rows: list[tuple[TrainingLayout, TrainingMemory, float, float, int]] = []
    for index, (_, kind, offload, _, _) in enumerate(_STRATEGIES):
        if kind == "hsdp" and topology.nodes < 2:
            continue
        layout = TrainingLayout(
            dp=question.dp,
            sharding=sharding_of(kind),
            offload=offload,  # type: ignore[arg-type]
            global_batch=question.batch_size * question.dp,
            micro_batch=question.batch_size,
            seq=question.seq_length,
            recompute=question.checkpointing,
            shard_group=topology.gpus_per_node if kind == "hsdp" else 0,
        )
        stack = "fsdp" if kind in ("fsdp", "hsdp") else "deepspeed"
        memory = estimate_memory(arch, topology, layout, stack=stack)
        whole = whole or memory
        step = estimate_step(arch, topology, layout, stack)
        rows.append((layout, memory, step.step_s.value, shares(step.parts)["communication"], index))
    assert whole is not None
    fastest = min((seconds for _, memory, seconds, _, _ in rows if _holds(topology, memory)), default=0.0)
    options = []
    for layout, memory, seconds, share, index in rows:
        name, kind, offload, pros, cons = _STRATEGIES[index]
        job = TrainingJob(layout=layout, topology=topology, architecture=arch)
        shard = {"none": 1, "hsdp": layout.shard_group}.get(kind, layout.dp)
        tokens = layout.global_batch * layout.seq
        options.append(
            ShardingOption(
                config=ShardingConfig(
                    strategy=name,
                    zero_stage={"none": 0, "zero1": 1, "zero2": 2}.get(kind, 3),
                    shard_size=shard,
                    replicate_size=max(1, layout.dp // shard),
                    sharding_factor=shard,
                    cpu_offload=offload != "none",
                ),
                analysis=ShardingAnalysis(
                    memory=_sharded_memory(memory),
                    communication=_exchange(kind, 2.0 * count(arch).total, layout.dp, shard, 100.0 * share),
                    verdict=memory.verdict,
                    fit_probability=memory.fit_probability,
                    headroom_gb=memory.headroom_bytes / GB,
                    host_memory_gb_per_node=memory.host_bytes * topology.local_gpus / GB,
                    memory_savings_factor=whole.parts.total / memory.parts.total,
                    step_s=seconds,
                    tokens_per_s=tokens / seconds,
                    pros=pros,
                    cons=cons,
                ),
                score=100.0 * fastest / seconds * memory.fit_probability if _holds(topology, memory) else 0.0,
                deepspeed_config=deepspeed.config(job),
                fsdp_config=accelerate.fsdp(job),
            )
        )
    options.sort(key=lambda option: (-option.score, -option.analysis.headroom_gb))
    if options[0].score <= 0:
        helped = remedies(arch, topology, rows[0][0])
        raise NothingFits(
            f"{arch.name} does not fit {question.dp} x {topology.accelerator.name} in any way of sharding",
            hint="; ".join(remedy.message for remedy in helped[:3]) or "more GPUs or a smaller model",
            needed_gb={option.config.strategy: round(option.analysis.memory.total_gb, 2) for option in options},
            memory_gb=round(topology.accelerator.visible_bytes / GB, 2),
            remedies=[remedy_view(remedy) for remedy in helped],
        )
    return ShardingAnswer(
        model=arch.name,
        result=tuple(options),
        best=options[0],
        remedies=(),
        topology=topology_summary(topology),
    )


def _holds(topology: Topology, memory: TrainingMemory) -> bool:
    """Whether GPU and host have room; the host's memory counts where it is known."""
    host = memory.host_bytes * topology.local_gpus
    return memory.headroom_bytes >= 0 and (not topology.cpu_memory_bytes or host <= topology.cpu_memory_bytes)


def _sharded_memory(memory: TrainingMemory) -> ShardingMemory:
    parts = memory.parts
    named = parts.weights + parts.gradients + parts.optimizer + parts.activations
    return ShardingMemory(
        params_gb=parts.weights / GB,
        gradients_gb=parts.gradients / GB,
        optimizer_gb=parts.optimizer / GB,
        activations_gb=parts.activations / GB,
        other_gb=(parts.total - named) / GB,
        total_gb=parts.total / GB,
    )


def _exchange(kind: str, weights: float, ranks: int, shard: int, overhead_pct: float) -> ShardingExchange:
    """16-bit weights and gradients over a step of one micro-batch; a ring sends (n-1)/n of the whole."""
    part = (shard - 1) / shard if kind in ("fsdp", "hsdp", "zero3") else (ranks - 1) / ranks
    gathers = {"none": 0.0, "zero1": 1.0, "zero2": 1.0}.get(kind, 2.0)
    copies = ranks // shard if kind == "hsdp" else 1
    reduced = 2.0 * weights * part if kind == "none" else 2.0 * weights / shard * (copies - 1) / copies
    return ShardingExchange(
        all_gather_gb=gathers * weights * part / GB,
        reduce_scatter_gb=(0.0 if kind == "none" else weights * part) / GB,
        all_reduce_gb=reduced / GB,
        overhead_pct=overhead_pct,
    )


def _sharding_machine(question: ShardingQuestion, desk: Desk) -> Topology:
    """As many GPUs as there are ranks, on the nodes that are said. Raises: InvalidValue when they are too few."""
    per_node = question.gpus or question.gpus_per_node or -(-question.dp // question.nodes)
    if per_node * question.nodes < question.dp:
        raise InvalidValue(
            f"dp: {question.dp} ranks on {question.nodes} nodes of {per_node} GPUs",
            field="dp",
            hint="more nodes, or more gpus for each of them",
        )
    nodes = -(-question.dp // per_node)
    if question.dp % nodes:
        raise InvalidValue(f"dp: {question.dp} ranks do not share out over {nodes} nodes", field="dp")
    asked = msgspec.structs.replace(question, gpus=question.dp, gpus_per_node=question.dp // nodes, mock_gpus=0)
    return topology_for(asked, desk)


ENDPOINTS = (
    Endpoint(
        "sharding",
        "sharding",
        ShardingQuestion,
        ShardingAnswer,
        sharding,
        "Ways to shard the states, with memory and time",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("dp", 16), ("nodes", 2)),
        codes=("model_not_found", "not_found", "nothing_fits"),
    ),
)
