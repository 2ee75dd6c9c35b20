"""Layouts of one model on one machine: recommend, autotune, validate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

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
from head.planner.endpoints.questions import Batch, Desk, architecture_for
from head.planner.endpoints.serving_layouts import (
    search_to_serve,
    serving_name,
    serving_recommendations,
    serving_searched,
)
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.checks import Check, check_layout, is_valid
from head.planner.training.layout import TrainingLayout
from head.planner.training.search import SearchResult, remedies, search

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

    training: Annotated[bool, Meta(description="Training; otherwise inference.")] = True


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


class ValidateQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """Whether one layout can run."""

    batch_size: Annotated[Batch, Meta(description="Sequences of one data-parallel rank in a step.")] = 1


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


def recommend(question: RecommendQuestion, desk: Desk) -> RecommendAnswer:
    """The layouts that a search finds best."""
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    if question.training:
        result = found_layouts(arch, topology, question, question.goal)
        rows = recommendations(arch, topology, result.choices, question.stack)
        searched = searched_view(result)
        front = tuple(layout_name(choice.layout) for choice in result.pareto[:20])
        batch = base_of(question, topology).global_batch
    else:
        served = search_to_serve(arch, topology, question)
        rows = serving_recommendations(topology, served, question, question.goal)
        searched = serving_searched(served)
        front = tuple(serving_name(choice) for choice in served.front[:20])
        batch = question.batch_size
    return RecommendAnswer(
        model=ModelBlock(name=arch.name, architecture=architecture_view(arch)),
        topology=topology_summary(topology),
        parameters=RecommendParameters(
            batch_size=question.batch_size,
            seq_length=question.seq_length,
            goal=question.goal,
            is_training=question.training,
            global_batch=batch,
        ),
        recommendations=rows,
        best_strategy=rows[0],
        best=rows[0],
        searched=searched,
        pareto=front,
    )


def autotune(question: AutotuneQuestion, desk: Desk) -> AutotuneAnswer:
    """As recommend by throughput, with more of what was tried."""
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    if not question.training:
        return _autotune_serving(arch, topology, question)
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


def _autotune_serving(arch: Architecture, topology: Topology, question: AutotuneQuestion) -> AutotuneAnswer:
    """The best configurations of an engine by tokens per second."""
    found = search_to_serve(arch, topology, question)
    rows = serving_recommendations(topology, found, question, "throughput", top=10)
    best = rows[0]
    searched = serving_searched(found)
    return AutotuneAnswer(
        model=arch.name,
        best_config={
            "tp": best.tp,
            "pp": best.pp,
            "dp": best.dp,
            "ep": best.strategy.ep,
            "weights": best.strategy.precision,
            "max_num_seqs": best.serving.max_num_seqs if best.serving else 0,
        },
        best_score=best.score,
        best=best,
        evaluated_configs=tuple(
            Evaluated(
                config=f"{row.strategy.name} {row.strategy.precision}",
                memory_gb=row.analysis.memory_per_gpu_gb,
                throughput_tps=row.analysis.estimated_throughput_tps,
                score=row.score,
            )
            for row in rows
        ),
        search_statistics={"total_iterations": searched.examined, "feasible": searched.feasible},
        recommendations=(*best.rationale, "measure it: herder tune"),
        searched=searched,
        topology=topology_summary(topology),
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
