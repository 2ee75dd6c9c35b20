"""What the planner is and knows: index, health, presets, topology, analyze."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.questions import (
    Batch,
    Desk,
    ModelQuestion,
    Name,
    PlacedQuestion,
    Question,
    Tokens,
    architecture_for,
    topology_for,
)
from head.planner.hardware.accelerators import all_accelerators
from head.planner.hardware.topology import describe
from head.planner.model.architecture import Architecture
from head.planner.model.dtypes import bytes_per_element
from head.planner.model.flops import DESCRIPTIONS, Convention, training_flops_per_token
from head.planner.model.kv_cache import kv_cache
from head.planner.model.parameters import count
from head.planner.model.presets import lookup, presets
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import estimate_memory

GB = 1e9


class PlanIndex(Answer, frozen=True, kw_only=True):
    """What can be asked."""

    name: str = "Herder planner"
    version: str = "1"
    description: str = "Memory, time, cost and settings of training and serving a model."
    docs: str = "/docs"
    endpoints: dict[str, str]


class PlanHealth(Answer, frozen=True, kw_only=True):
    """The planner's process answers; how much it knows."""

    status: Literal["healthy"] = "healthy"
    models: int
    accelerators: int
    inventory_gpus: int


class PresetsQuestion(Question, frozen=True, kw_only=True):
    """Which presets."""

    search: Annotated[Name, Meta(description="Only models whose name holds this.")] = ""


class PresetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model that is known by name."""

    name: str
    parameters_b: float
    active_b: float
    layers: int
    hidden: int
    context: int
    aliases: tuple[str, ...] = ()


class Presets(Answer, frozen=True, kw_only=True):
    """Models and accelerators that are known by name."""

    presets: list[str]
    count: int
    models: list[PresetRow]
    accelerators: list[str]


class TopologyQuestion(Question, frozen=True, kw_only=True):
    """Which machine; without any field the cluster's own inventory."""

    mock: Annotated[Literal["", "b200", "h100"], Meta(description="As gpu, in the old planner's words.")] = ""
    mock_gpus: Annotated[int, Meta(ge=1, le=1_024, description="How many, beside mock.")] = 4
    gpu: Annotated[Name, Meta(description="Accelerator, as H100-SXM-80GB.")] = ""
    gpus: Annotated[int, Meta(ge=0, le=1_048_576, description="How many; 0: as usual or as there are.")] = 0


class TopologyAnswer(Answer, frozen=True, kw_only=True):
    """`topology.source` says detected, registered, preset or given."""

    topology: dict[str, Any]


class AnalyzeQuestion(ModelQuestion, frozen=True, kw_only=True):
    """A model's size and what it needs."""

    batch_size: Batch = 8
    seq_length: Tokens = 2048


class ArchitectureView(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions and counts, exact. Three counts of what is active for one token: cards quote any of them."""

    name: str
    model_type: Literal["dense", "moe", "hybrid", "hybrid_moe"]
    source: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    num_experts: int
    num_experts_per_token: int
    moe_layer_freq: int
    num_moe_layers: int
    attention_type: str
    total_params: int
    active_params: int
    active_params_no_input_embedding: int
    active_params_no_embeddings: int
    embedding_params: int
    routed_expert_params: int
    mtp_params: int
    total_params_billion: float
    active_params_billion: float
    dtype: str
    dtype_bytes: float
    notes: tuple[str, ...] = ()


class MemoryView(msgspec.Struct, frozen=True, kw_only=True):
    """GB (1e9 bytes) of one accelerator that holds all of it; the parts sum to the total."""

    weights_gb: float
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float
    kv_cache_gb: float
    other_gb: float
    total_gb: float
    convention: str


class Analyze(Answer, frozen=True, kw_only=True):
    """A model's architecture, memory and FLOPs; memory_analysis is memory_training by its older name."""

    model: str
    architecture: ArchitectureView
    memory_inference: MemoryView
    memory_training: MemoryView
    memory_analysis: MemoryView
    kv_bytes_per_token: float
    flops_per_token: dict[str, float]


def architecture_view(arch: Architecture) -> ArchitectureView:
    """An architecture with its exact counts."""
    counted = count(arch)
    attention = next((group.attention for group in arch.groups if group.attention.heads), arch.groups[0].attention)
    dense = max((group.feed_forward.width for group in arch.groups if group.feed_forward.kind == "dense"), default=0)
    moe = next((group.feed_forward for group in arch.groups if group.feed_forward.kind == "moe"), None)
    kinds = {group.attention.kind for group in arch.groups}
    moe_layers = sum(group.count for group in arch.groups if group.feed_forward.kind == "moe")
    is_hybrid = bool(kinds & {"linear", "mamba"})
    kind: Any = ("hybrid_moe" if is_hybrid else "moe") if arch.is_moe else ("hybrid" if is_hybrid else "dense")
    return ArchitectureView(
        name=arch.name,
        model_type=kind,
        source=arch.source,
        hidden_size=arch.hidden,
        num_layers=arch.layers,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv_heads or attention.heads,
        head_dim=attention.head_dim or attention.nope_dim + attention.rope_dim,
        intermediate_size=dense or (moe.width if moe else 0),
        vocab_size=arch.vocab,
        max_position_embeddings=arch.context,
        num_experts=moe.experts if moe else 0,
        num_experts_per_token=moe.active if moe else 0,
        moe_layer_freq=round(arch.layers / moe_layers) if moe_layers else 0,
        num_moe_layers=moe_layers,
        attention_type=_attention_type(kinds, attention.heads, attention.kv_heads),
        total_params=counted.total,
        active_params=counted.active,
        active_params_no_input_embedding=counted.active_no_input_embedding,
        active_params_no_embeddings=counted.active_no_embeddings,
        embedding_params=counted.embedding,
        routed_expert_params=counted.routed_experts,
        mtp_params=counted.mtp,
        total_params_billion=counted.total / 1e9,
        active_params_billion=counted.active / 1e9,
        dtype=arch.weights_dtype,
        dtype_bytes=bytes_per_element(arch.weights_dtype),
        notes=arch.notes,
    )


def _attention_type(kinds: set[Any], heads: int, kv_heads: int) -> str:
    if "mla" in kinds or "sparse_mla" in kinds:
        return "multi_head_latent"
    if kv_heads in (0, heads):
        return "multi_head"
    return "multi_query" if kv_heads == 1 else "grouped_query"


def analyze(question: AnalyzeQuestion, desk: Desk) -> Analyze:
    """Counts, memory on one accelerator, FLOPs by named convention."""
    arch = architecture_for(question, desk)
    cache = kv_cache(arch, question.seq_length)
    weights = 2.0 * count(arch).total
    kv = question.batch_size * cache.theory
    layout = TrainingLayout(
        global_batch=question.batch_size,
        micro_batch=question.batch_size,
        seq=question.seq_length,
        sharding="none",
    )
    training = estimate_memory(arch, topology_for(PlacedQuestion(gpus=1, gpu="B300"), desk), layout)
    parts = training.parts
    named = parts.weights + parts.gradients + parts.optimizer + parts.activations
    trained = MemoryView(
        weights_gb=parts.weights / GB,
        gradients_gb=parts.gradients / GB,
        optimizer_gb=parts.optimizer / GB,
        activations_gb=parts.activations / GB,
        kv_cache_gb=0.0,
        other_gb=(parts.total - named) / GB,
        total_gb=parts.total / GB,
        convention="bf16 with fp32 gradients and AdamW, one accelerator, flash attention, no recomputation",
    )
    return Analyze(
        model=arch.name,
        architecture=architecture_view(arch),
        memory_inference=MemoryView(
            weights_gb=weights / GB,
            gradients_gb=0.0,
            optimizer_gb=0.0,
            activations_gb=0.0,
            kv_cache_gb=kv / GB,
            other_gb=0.0,
            total_gb=(weights + kv) / GB,
            convention="bf16 weights and KV cache only, one accelerator, each layer's own reach",
        ),
        memory_training=trained,
        memory_analysis=trained,
        kv_bytes_per_token=cache.bytes_per_token,
        flops_per_token={
            name: training_flops_per_token(arch, question.seq_length, cast(Convention, name)) for name in DESCRIPTIONS
        },
    )


def index(question: Question, desk: Desk) -> PlanIndex:
    """The endpoints."""
    from head.planner.endpoints.table import ENDPOINTS

    rows = {
        e.path or "index": f"{e.method} /api/v1/plan{'/' + e.path if e.path else ''} - {e.summary}" for e in ENDPOINTS
    }
    return PlanIndex(endpoints=rows)


def health(question: Question, desk: Desk) -> PlanHealth:
    """How much is known."""
    return PlanHealth(
        models=len(presets()),
        accelerators=len(all_accelerators()),
        inventory_gpus=sum(len(kind.gpus) * len(kind.node_ids) for kind in desk.kinds),
    )


def list_presets(question: PresetsQuestion, desk: Desk) -> Presets:
    """All presets whose name or alias holds the words."""
    wanted = question.search.lower()
    rows = []
    for preset in presets():
        if wanted and not any(wanted in name.lower() for name in (preset.id, *preset.aliases)):
            continue
        arch = lookup(preset.id)
        counted = count(arch)
        rows.append(
            PresetRow(
                name=preset.id,
                parameters_b=counted.total / 1e9,
                active_b=counted.active / 1e9,
                layers=arch.layers,
                hidden=arch.hidden,
                context=arch.context,
                aliases=tuple(preset.aliases),
            )
        )
    names = [row.name for row in rows]
    return Presets(presets=names, count=len(names), models=rows, accelerators=[a.name for a in all_accelerators()])


def topology(question: TopologyQuestion, desk: Desk) -> TopologyAnswer:
    """The inventory, or the machine that is named."""
    placed = PlacedQuestion(
        gpu=question.gpu,
        gpus=question.gpus,
        mock_topology=question.mock,
        mock_gpus=question.mock_gpus if question.mock and not question.gpus else 0,
    )
    found = topology_for(placed, desk)
    kinds = [kind for kind in desk.kinds if kind.gpus]
    numa = min((kind.numa_nodes for kind in kinds), default=1) if found.source in ("registered", "detected") else 1
    cpu = kinds[0].cpu_model if kinds and found.source in ("registered", "detected") else ""
    return TopologyAnswer(topology=describe(found, numa, cpu))


ENDPOINTS = (
    Endpoint("", "", Question, PlanIndex, index, "What can be asked", method="GET"),
    Endpoint("health", "health", Question, PlanHealth, health, "Whether the planner answers", method="GET"),
    Endpoint("presets", "presets", PresetsQuestion, Presets, list_presets, "Models known by name", method="GET"),
    Endpoint(
        "topology",
        "topology",
        TopologyQuestion,
        TopologyAnswer,
        topology,
        "The machine that plans are made for",
        method="GET",
        codes=("not_found", "nothing_fits"),
    ),
    Endpoint(
        "analyze",
        "analyze",
        AnalyzeQuestion,
        Analyze,
        analyze,
        "A model's parameters, memory and FLOPs",
        example=(("model", "meta-llama/Llama-3.1-70B"),),
        codes=("model_not_found",),
    ),
)
