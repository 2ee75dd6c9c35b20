"""Layouts beside each other: models on one machine (compare), cost against throughput (pareto)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import HerderError, NothingFits
from head.planner.endpoints.about import architecture_view
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import (
    Recommendation,
    SearchedView,
    SearchQuestion,
    TopologySummary,
    base_of,
    machine_of,
    recommendations,
    require,
    searched_view,
    topology_summary,
)
from head.planner.endpoints.layouts import GB, layout_name
from head.planner.endpoints.questions import Batch, Desk, Name, Tokens, architecture_for, architecture_named
from head.planner.endpoints.serving_layouts import (
    search_to_serve,
    serving_name,
    serving_recommendations,
    serving_searched,
)
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.serving.search import Choice as ServingFound
from head.planner.training.search import Choice, search

COMPARED_MODELS = 16
PARETO_GPUS = 512
PARETO_COUNTS = 12  # numbers of GPUs on one front, the largest ones


class CompareQuestion(SearchQuestion, frozen=True, kw_only=True):
    """Several models on one machine; `model`, `config` or `dimensions` is one more."""

    models: Annotated[list[Name], Meta(min_length=1, max_length=COMPARED_MODELS, description="Names.")]
    training: Annotated[bool, Meta(description="Training; otherwise inference.")] = False


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a comparison; `error` where nothing fits or the name is not known."""

    model: str
    params_b: float = 0.0
    active_b: float = 0.0
    best_config: str = ""
    memory_per_gpu_gb: float = 0.0
    throughput_tps: float = 0.0
    cost_per_million_tokens_usd: float | None = None
    mfu: float | None = None
    score: float = 0.0
    error: str = ""


class CompareAnswer(Answer, frozen=True, kw_only=True):
    """Best first; a model that fails is a row with its error."""

    comparison: dict[str, Compared]
    ranking: tuple[str, ...]
    winner: str | None
    topology: TopologySummary


class ParetoQuestion(SearchQuestion, frozen=True, kw_only=True):
    """Cost against throughput over numbers of GPUs."""

    batch_size: Annotated[Batch, Meta(description="Sequences of a step on each GPU, or requests in flight.")] = 8
    seq_length: Annotated[Tokens, Meta(description="Tokens of a sequence, or of a prompt.")] = 4096
    gpu_cost: Annotated[float, Meta(ge=0, le=1e6, description="Dollars per GPU and hour.")] = 4.0
    training: Annotated[bool, Meta(description="Training; otherwise inference.")] = False
    max_gpus: Annotated[int, Meta(ge=0, le=PARETO_GPUS, description="Up to so many GPUs; 0: as the machine has.")] = 0


class ParetoPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One layout on the front, or beside it."""

    name: str
    tp: int
    pp: int
    dp: int
    num_gpus: int
    throughput_tps: float
    latency_ms: float
    memory_per_gpu_gb: float
    memory_headroom_gb: float
    cost_per_m_tokens: float


class ParetoRecommendation(msgspec.Struct, frozen=True, kw_only=True):
    """The point that is best at one thing."""

    objective: str
    config: str
    num_gpus: int
    cost_per_m_tokens: float
    throughput: float


class ParetoAnswer(Answer, frozen=True, kw_only=True):
    """Points that no other beats in cost, throughput, step time and headroom at once."""

    model: str
    analysis: dict[str, Any]
    pareto_frontier: tuple[ParetoPoint, ...]
    recommendations: tuple[ParetoRecommendation, ...]
    visualization: dict[str, Any]
    searched: SearchedView
    topology: TopologySummary


def compare(question: CompareQuestion, desk: Desk) -> CompareAnswer:
    """The best layout of each model, and which trains fastest."""
    topology = machine_of(question, desk)
    rows: dict[str, Compared] = {}
    for name in dict.fromkeys(question.models):
        rows[name] = _row(name, lambda name=name: architecture_named(name, desk), topology, question)  # type: ignore[misc]
    if question.model or question.config is not None or question.dimensions is not None:
        name = question.model or "given"
        rows[name] = _row(name, lambda: architecture_for(question, desk), topology, question)
    fastest = max((row.throughput_tps for row in rows.values()), default=0.0)
    scored = {
        name: msgspec.structs.replace(row, score=100.0 * row.throughput_tps / fastest if fastest else 0.0)
        for name, row in rows.items()
    }
    ranking = tuple(sorted((name for name in scored if not scored[name].error), key=lambda name: -scored[name].score))
    return CompareAnswer(
        comparison=scored,
        ranking=ranking,
        winner=ranking[0] if ranking else None,
        topology=topology_summary(topology),
    )


def _row(name: str, find: Callable[[], Architecture], topology: Topology, question: CompareQuestion) -> Compared:
    """One model's best layout, or why there is none."""
    try:
        arch = find()
        best = _best_of(arch, topology, question)
    except HerderError as error:
        return Compared(model=name, error=f"{error.code}: {error.message}")
    view = architecture_view(arch)
    return Compared(
        model=arch.name,
        params_b=view.total_params_billion,
        active_b=view.active_params_billion,
        best_config=best.strategy.name,
        memory_per_gpu_gb=best.analysis.memory_per_gpu_gb,
        throughput_tps=best.analysis.estimated_throughput_tps,
        cost_per_million_tokens_usd=best.analysis.cost_per_million_tokens_usd,
        mfu=best.analysis.mfu.value if best.analysis.mfu else None,
    )


def _best_of(arch: Architecture, topology: Topology, question: CompareQuestion) -> Recommendation:
    if not question.training:
        found = search_to_serve(arch, topology, question)
        return serving_recommendations(topology, found, question, "throughput", top=1)[0]
    result = search(arch, topology, base_of(question, topology), stack=question.stack, top=1)
    require(result)
    return recommendations(arch, topology, result.choices, question.stack)[0]


def pareto(question: ParetoQuestion, desk: Desk) -> ParetoAnswer:
    """The front over powers of two of GPUs, the best in each thing named."""
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    most = question.max_gpus or topology.gpus
    if most > topology.gpus and topology.source in ("preset", "given"):
        topology = topology.with_gpus(most)
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})[-PARETO_COUNTS:]
    points, searched = (_trained if question.training else _served)(arch, topology, question, counts)
    cheapest = min(points, key=lambda point: point.cost_per_m_tokens)
    fastest = max(points, key=lambda point: point.throughput_tps)
    named = (
        _best("lowest cost", cheapest),
        _best("highest throughput", fastest),
        _best("shortest step" if question.training else "lowest latency", min(points, key=lambda p: p.latency_ms)),
        _best("most memory left", max(points, key=lambda point: point.memory_headroom_gb)),
    )
    by_throughput = sorted(points, key=lambda point: (point.throughput_tps, point.cost_per_m_tokens))
    return ParetoAnswer(
        model=arch.name,
        analysis={
            "gpu_hourly_cost": question.gpu_cost,
            "num_configurations": searched.examined,
            "gpu_counts": counts,
            "is_training": question.training,
            "global_batch": question.global_batch or question.batch_size * (most if question.training else 1),
            "extremes": {"cheapest": cheapest.name, "fastest": fastest.name},
            "recommendations": [msgspec.structs.asdict(row) for row in named],
            "pareto_frontier": {
                "cost_vs_throughput": [[point.cost_per_m_tokens, point.throughput_tps] for point in by_throughput],
                "gpus_vs_throughput": [[point.num_gpus, point.throughput_tps] for point in by_throughput],
            },
        },
        pareto_frontier=tuple(sorted(points, key=lambda point: (point.cost_per_m_tokens, -point.throughput_tps))),
        recommendations=named,
        visualization={
            "x_axis": "throughput_tps",
            "y_axis": "cost_per_m_tokens",
            "scatter_data": [
                [point.throughput_tps, point.cost_per_m_tokens, point.num_gpus] for point in by_throughput
            ],
            "pareto_line": [[point.throughput_tps, point.cost_per_m_tokens] for point in by_throughput],
            "recommendations": [row.config for row in named],
        },
        searched=searched,
        topology=topology_summary(topology),
    )


def _trained(
    arch: Architecture, topology: Topology, question: ParetoQuestion, counts: list[int]
) -> tuple[list[ParetoPoint], SearchedView]:
    """The front of training with one batch for all numbers of GPUs."""
    base = msgspec.structs.replace(
        base_of(question, topology), global_batch=question.global_batch or question.batch_size * counts[-1]
    )
    result = search(
        arch,
        topology,
        base,
        goal="throughput",
        stack=question.stack,
        gpu_counts=counts,
        usd_per_gpu_hour=question.gpu_cost,
        top=1,
    )
    require(result)
    return [_point(choice) for choice in result.pareto], searched_view(result)


def _served(
    arch: Architecture, topology: Topology, question: ParetoQuestion, counts: list[int]
) -> tuple[list[ParetoPoint], SearchedView]:
    """The front of serving over numbers of GPUs, all with the same load. Raises: NothingFits when none suffices."""
    points: list[ParetoPoint] = []
    searched: list[SearchedView] = []
    refused: HerderError | None = None
    for gpus in counts:
        part = topology if gpus == topology.gpus else topology.with_gpus(gpus)
        try:
            result = search_to_serve(arch, part, question)
        except NothingFits as error:
            refused = error
            continue
        searched.append(serving_searched(result))
        points += [_served_point(choice, part, question.gpu_cost) for choice in result.front]
    if refused is not None and not points:
        raise refused
    whole = SearchedView(
        examined=sum(one.examined for one in searched),
        feasible=sum(one.feasible for one in searched),
        dropped=tuple(drop for one in searched for drop in one.dropped),
        notes=(),
    )
    return front_of(points), whole


def front_of(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Points that no other equals or beats in cost, throughput, latency and headroom at once."""
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (-p.throughput_tps, p.cost_per_m_tokens, p.latency_ms)):
        if not any(_dominates(other, point) for other in front):
            front.append(point)
    return front


def _dominates(one: ParetoPoint, other: ParetoPoint) -> bool:
    return (
        one.throughput_tps >= other.throughput_tps
        and one.cost_per_m_tokens <= other.cost_per_m_tokens
        and one.latency_ms <= other.latency_ms
        and one.memory_headroom_gb >= other.memory_headroom_gb
    )


def _served_point(choice: ServingFound, topology: Topology, gpu_cost: float) -> ParetoPoint:
    layout, memory = choice.settings.layout, choice.estimate.memory
    return ParetoPoint(
        name=serving_name(choice),
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp * choice.replicas,
        num_gpus=choice.gpus,
        throughput_tps=choice.output_tokens_per_s,
        latency_ms=1e3 * choice.estimate.e2e_s.value,
        memory_per_gpu_gb=memory.total_bytes / GB,
        memory_headroom_gb=choice.headroom * topology.accelerator.visible_bytes / GB,
        cost_per_m_tokens=choice.gpus * gpu_cost / 3600 / choice.output_tokens_per_s * 1e6,
    )


def _point(choice: Choice) -> ParetoPoint:
    layout = choice.layout
    return ParetoPoint(
        name=layout_name(layout),
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        num_gpus=choice.gpus,
        throughput_tps=choice.tokens_per_s,
        latency_ms=1e3 * choice.step_s,
        memory_per_gpu_gb=choice.memory.parts.total / GB,
        memory_headroom_gb=choice.memory.headroom_bytes / GB,
        cost_per_m_tokens=choice.cost_usd,
    )


def _best(objective: str, point: ParetoPoint) -> ParetoRecommendation:
    return ParetoRecommendation(
        objective=objective,
        config=point.name,
        num_gpus=point.num_gpus,
        cost_per_m_tokens=point.cost_per_m_tokens,
        throughput=point.throughput_tps,
    )


_CODES = ("model_not_found", "not_found", "nothing_fits")
ENDPOINTS = (
    Endpoint(
        "pareto",
        "pareto",
        ParetoQuestion,
        ParetoAnswer,
        pareto,
        "Cost against throughput",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("gpus", 32), ("gpu_cost", 3.5), ("training", True)),
        codes=_CODES,
    ),
    Endpoint(
        "compare",
        "compare",
        CompareQuestion,
        CompareAnswer,
        compare,
        "Several models on one machine",
        example=(("models", ["llama-3.1-8b", "qwen3-8b"]), ("gpu", "H100"), ("gpus", 8), ("training", True)),
        codes=("not_found",),
    ),
)
