"""Layouts for training: recommend, pareto, compare, autotune, validate, sharding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.errors import HerderError, InvalidValue
from head.planner.endpoints.about import ArchitectureView, architecture_view
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import (
    TOP,
    Goal,
    Recommendation,
    SearchedView,
    SearchQuestion,
    TopologySummary,
    base_of,
    machine_of,
    recommendations,
    remedy_text,
    require,
    searched_view,
    topology_summary,
)
from head.planner.endpoints.layouts import GB, LayoutQuestion, layout_name, machine_and_layout
from head.planner.endpoints.questions import Desk, Name, architecture_for, architecture_named
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.checks import Check, check_layout, is_valid
from head.planner.training.layout import TrainingLayout
from head.planner.training.search import Choice, SearchResult, remedies, search

COMPARED_MODELS = 16
PARETO_GPUS = 512


class RecommendQuestion(SearchQuestion, frozen=True, kw_only=True):
    """Which layout to train with; without training, how to serve."""

    goal: Annotated[Goal, Meta(description="What counts: throughput, latency, memory, efficiency (cost).")] = (
        "throughput"
    )
    training: Annotated[bool, Meta(description="Training; otherwise inference.")] = False


class ModelBlock(msgspec.Struct, frozen=True, kw_only=True):
    """The model of an answer."""

    name: str
    architecture: ArchitectureView


class RecommendParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    batch_size: int
    seq_length: int
    goal: str
    is_training: bool
    global_batch: int


class RecommendAnswer(Answer, frozen=True, kw_only=True):
    """The best layouts, best first; `best_strategy` and `best` are the first."""

    model: ModelBlock
    topology: TopologySummary
    parameters: RecommendParameters
    recommendations: tuple[Recommendation, ...]
    best_strategy: Recommendation
    best: Recommendation
    searched: SearchedView
    pareto: tuple[str, ...]


class AutotuneQuestion(SearchQuestion, frozen=True, kw_only=True):
    """The best layout of everything that can be tried. Nothing runs: the tuner measures."""

    training: Annotated[bool, Meta(description="Training; inference is what /inference and /vllm are for.")] = True


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """One layout that was tried."""

    config: str
    memory_gb: float
    throughput_tps: float
    score: float


class AutotuneAnswer(Answer, frozen=True, kw_only=True):
    """The best layout by throughput as far as memory probably suffices."""

    model: str
    best_config: dict[str, Any]
    best_score: float
    best: Recommendation
    evaluated_configs: tuple[Evaluated, ...]
    search_statistics: dict[str, int]
    recommendations: tuple[str, ...]
    searched: SearchedView
    topology: TopologySummary


class CompareQuestion(SearchQuestion, frozen=True, kw_only=True):
    """Several models on one machine."""

    models: Annotated[list[Name], Meta(min_length=1, max_length=COMPARED_MODELS, description="Names.")]
    training: Annotated[bool, Meta(description="Training; inference is what /inference is for.")] = True


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a comparison; `error` where nothing fits or the name is not known."""

    model: str
    params_b: float = 0.0
    active_b: float = 0.0
    best_config: str = ""
    memory_per_gpu_gb: float = 0.0
    throughput_tps: float = 0.0
    cost_per_million_tokens_usd: float = 0.0
    mfu: float = 0.0
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

    gpu_cost: Annotated[float, Meta(ge=0, le=1e6, description="Dollars per GPU and hour.")] = 4.0
    training: Annotated[bool, Meta(description="Training; inference is what /inference is for.")] = True
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


class ValidateQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """Whether one layout can run."""


class ValidateSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of checks."""

    passed: int
    failed: int
    warnings: int
    total: int


class ValidateAnswer(Answer, frozen=True, kw_only=True):
    """Every check. The search of /recommend drops what fails here, by the same checks."""

    model: str
    valid: bool
    status: Literal["valid", "invalid"]
    summary: ValidateSummary
    checks: tuple[Check, ...]
    can_proceed: bool
    recommendation: str
    remedies: tuple[str, ...]
    layout: str
    topology: TopologySummary


def found_layouts(
    arch: Architecture, topology: Topology, question: SearchQuestion, goal: Goal, top: int = TOP, **more: Any
) -> SearchResult:
    """A search whose every outcome is usable. Raises: NothingFits with what dropped the rest and what would help."""
    base = base_of(question, topology)
    result = search(arch, topology, base, goal=goal, stack=question.stack, top=top, **more)
    require(result)
    return result


def recommend(question: RecommendQuestion, desk: Desk) -> Answer:
    """The layouts that a search finds best."""
    if not question.training:
        from head.planner.endpoints.serving import recommend_serving

        return recommend_serving(question, desk)
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    result = found_layouts(arch, topology, question, question.goal)
    rows = recommendations(arch, topology, result.choices, question.stack)
    return RecommendAnswer(
        model=ModelBlock(name=arch.name, architecture=architecture_view(arch)),
        topology=topology_summary(topology),
        parameters=RecommendParameters(
            batch_size=question.batch_size,
            seq_length=question.seq_length,
            goal=question.goal,
            is_training=True,
            global_batch=base_of(question, topology).global_batch,
        ),
        recommendations=rows,
        best_strategy=rows[0],
        best=rows[0],
        searched=searched_view(result),
        pareto=tuple(layout_name(choice.layout) for choice in result.pareto[:20]),
    )


def autotune(question: AutotuneQuestion, desk: Desk) -> AutotuneAnswer:
    """As recommend by throughput, with more of what was tried."""
    if not question.training:
        raise InvalidValue(
            "training: autotune searches training layouts", field="training", hint="ask /plan/inference or /plan/vllm"
        )
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    result = found_layouts(arch, topology, question, "throughput", top=10)
    best = recommendations(arch, topology, result.choices[:1], question.stack)[0]
    top = result.choices[0].score
    layout = result.choices[0].layout
    return AutotuneAnswer(
        model=arch.name,
        best_config={
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "cp": layout.cp,
            "ep": layout.ep,
            "micro_batch": layout.micro_batch,
            "recompute": layout.recompute,
            "sharding": layout.sharding,
        },
        best_score=100.0,
        best=best,
        evaluated_configs=tuple(
            Evaluated(
                config=f"{layout_name(choice.layout)} mb{choice.layout.micro_batch} {choice.layout.recompute}"
                f" {choice.layout.sharding}",
                memory_gb=choice.memory.parts.total / GB,
                throughput_tps=choice.tokens_per_s,
                score=100.0 * choice.score / top,
            )
            for choice in result.choices
        ),
        search_statistics={"total_iterations": result.examined, "feasible": result.feasible},
        recommendations=best.optimizations or ("this is the best layout of the space; measure it",),
        searched=searched_view(result),
        topology=topology_summary(topology),
    )


def compare(question: CompareQuestion, desk: Desk) -> CompareAnswer:
    """The best layout of each model, and which trains fastest."""
    topology = machine_of(question, desk)
    rows: dict[str, Compared] = {}
    for name in dict.fromkeys(question.models):
        try:
            arch = architecture_named(name, desk)
            result = found_layouts(arch, topology, question, "throughput", top=1)
        except HerderError as error:
            rows[name] = Compared(model=name, error=f"{error.code}: {error.message}")
            continue
        best = recommendations(arch, topology, result.choices[:1], question.stack)[0]
        view = architecture_view(arch)
        rows[name] = Compared(
            model=arch.name,
            params_b=view.total_params_billion,
            active_b=view.active_params_billion,
            best_config=best.strategy.name,
            memory_per_gpu_gb=best.analysis.memory_per_gpu_gb,
            throughput_tps=best.analysis.estimated_throughput_tps,
            cost_per_million_tokens_usd=best.analysis.cost_per_million_tokens_usd,
            mfu=best.analysis.mfu.value,
        )
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


def pareto(question: ParetoQuestion, desk: Desk) -> ParetoAnswer:
    """The front over powers of two of GPUs, the best in each thing named."""
    if not question.training:
        raise InvalidValue(
            "training: pareto searches training layouts", field="training", hint="ask /plan/inference for serving"
        )
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    most = question.max_gpus or topology.gpus
    if most > topology.gpus and topology.source in ("preset", "given"):
        topology = topology.with_gpus(most)
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    base = msgspec.structs.replace(
        base_of(question, topology), global_batch=question.global_batch or question.batch_size * most
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
    points = [_point(choice) for choice in result.pareto]
    return ParetoAnswer(
        model=arch.name,
        analysis={
            "gpu_hourly_cost": question.gpu_cost,
            "num_configurations": result.examined,
            "gpu_counts": counts,
            "global_batch": base.global_batch,
            "extremes": {
                "cheapest": min(points, key=lambda point: point.cost_per_m_tokens).name,
                "fastest": max(points, key=lambda point: point.throughput_tps).name,
            },
        },
        pareto_frontier=tuple(sorted(points, key=lambda point: point.cost_per_m_tokens)),
        recommendations=(
            _best("lowest cost", min(points, key=lambda point: point.cost_per_m_tokens)),
            _best("highest throughput", max(points, key=lambda point: point.throughput_tps)),
            _best("shortest step", min(points, key=lambda point: point.latency_ms)),
            _best("most memory left", max(points, key=lambda point: point.memory_headroom_gb)),
        ),
        visualization={
            "x_axis": "throughput_tps",
            "y_axis": "cost_per_m_tokens",
            "pareto_line": [[point.throughput_tps, point.cost_per_m_tokens] for point in points],
        },
        searched=searched_view(result),
        topology=topology_summary(topology),
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


def validate(question: ValidateQuestion, desk: Desk) -> ValidateAnswer:
    """The checks of the search on one layout; a misfit is an answer, not an error."""
    arch = architecture_for(question, desk)
    topology, layout = machine_and_layout(question, desk)
    checks = check_layout(arch, topology, layout, stack=question.stack)
    failed = [check for check in checks if check.status == "failed"]
    warnings = [check for check in checks if check.status == "warning"]
    helped = remedies(arch, topology, _unplaced(layout, topology), stack=question.stack) if failed else ()
    return ValidateAnswer(
        model=arch.name,
        valid=is_valid(checks),
        status="valid" if is_valid(checks) else "invalid",
        summary=ValidateSummary(
            passed=len(checks) - len(failed) - len(warnings),
            failed=len(failed),
            warnings=len(warnings),
            total=len(checks),
        ),
        checks=tuple(checks),
        can_proceed=not failed,
        recommendation=_advice(failed, warnings),
        remedies=tuple(remedy_text(remedy) for remedy in helped),
        layout=layout_name(layout),
        topology=topology_summary(topology),
    )


def _unplaced(layout: TrainingLayout, topology: Topology) -> TrainingLayout:
    """The layout without its degrees, as a search starts."""
    return msgspec.structs.replace(layout, tp=1, pp=1, cp=1, ep=1, virtual_stages=1, dp=topology.gpus)


def _advice(failed: list[Check], warnings: list[Check]) -> str:
    if failed:
        return "does not run: " + "; ".join(check.message for check in failed)
    if warnings:
        return "runs, with care: " + "; ".join(check.message for check in warnings)
    return "runs"


_CODES = ("model_not_found", "not_found", "nothing_fits")
_MODEL = ("model", "llama-3.1-70b")
_MACHINE = (("gpu", "H100"), ("gpus", 64))

ENDPOINTS = (
    Endpoint(
        "recommend",
        "recommend",
        RecommendQuestion,
        RecommendAnswer,
        recommend,
        "The best layouts for a model on a machine",
        example=(_MODEL, *_MACHINE, ("training", True), ("seq_length", 4096)),
        codes=_CODES,
    ),
    Endpoint(
        "pareto",
        "pareto",
        ParetoQuestion,
        ParetoAnswer,
        pareto,
        "Cost against throughput",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("gpus", 32), ("gpu_cost", 3.5)),
        codes=_CODES,
    ),
    Endpoint(
        "compare",
        "compare",
        CompareQuestion,
        CompareAnswer,
        compare,
        "Several models on one machine",
        example=(("models", ["llama-3.1-8b", "qwen3-8b"]), ("gpu", "H100"), ("gpus", 8)),
        codes=("not_found",),
    ),
    Endpoint(
        "validate",
        "validate",
        ValidateQuestion,
        ValidateAnswer,
        validate,
        "Whether a layout can run, check by check",
        example=(_MODEL, ("gpu", "H100"), ("tp", 8), ("pp", 4), ("dp", 2)),
        codes=_CODES,
    ),
    Endpoint(
        "autotune",
        "auto-tune",
        AutotuneQuestion,
        AutotuneAnswer,
        autotune,
        "The best layout of all that can be tried",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("gpus", 8)),
        codes=_CODES,
    ),
)
