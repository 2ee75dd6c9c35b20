"""Serving in the words of recommend, compare, pareto and autotune: the same blocks as for training.

What training has and serving has not (a step, MFU) is null; `serving` beside them has everything of the engine.
"""

from __future__ import annotations

import math

import msgspec

from head.planner.calibration.quantity import Quantity
from head.planner.endpoints.layout_search import (
    TOP,
    ChoiceAnalysis,
    DroppedView,
    Goal,
    Recommendation,
    SearchedView,
    SearchQuestion,
)
from head.planner.endpoints.layouts import GB, LayoutView, MemoryBreakdown, precision_of
from head.planner.endpoints.questions import PlacedQuestion
from head.planner.endpoints.serving_search import ServingQuestion, choice_view, search_for, workload_of
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.serving.search import Choice, SearchResult, Slo

_EXCHANGES = ("all-reduce latency", "all-reduce bytes", "all-to-all latency", "all-to-all bytes")
_PLACED = tuple(field.name for field in msgspec.structs.fields(PlacedQuestion))


def serving_of(question: SearchQuestion) -> ServingQuestion:
    """The same question about serving: batch_size requests in flight, seq_length tokens of prompt."""
    precision = precision_of(question.precision or "bf16")
    return ServingQuestion(
        **{name: getattr(question, name) for name in _PLACED},
        batch_size=question.batch_size,
        seq_length=question.seq_length,
        weights="" if precision in ("bf16", "fp16") else precision,
    )


def search_to_serve(arch: Architecture, topology: Topology, question: SearchQuestion) -> SearchResult:
    """Every configuration of the engine on the machine. Raises: NothingFits."""
    asked = serving_of(question)
    return search_for(arch, topology, asked, workload_of(asked), Slo())


def ranked(result: SearchResult, goal: Goal) -> list[tuple[float, Choice]]:
    """The front with scores by the goal (more is better), best first."""
    rows = [(_score(choice, goal), choice) for choice in result.front]
    return sorted(rows, key=lambda row: (-row[0], row[1].gpus, row[1].settings.layout.tp))


def _score(choice: Choice, goal: Goal) -> float:
    if goal == "latency":
        return 1.0 / choice.estimate.e2e_s.value
    if goal == "memory":
        return choice.headroom
    if goal == "efficiency":
        return choice.output_tokens_per_s / choice.gpus
    return choice.output_tokens_per_s


def serving_recommendations(
    topology: Topology, result: SearchResult, question: SearchQuestion, goal: Goal, top: int = TOP
) -> tuple[Recommendation, ...]:
    """The best of the front as recommendations, the first with 100 points."""
    rows = ranked(result, goal)[:top]
    best = rows[0][0]
    return tuple(
        _recommendation(topology, choice, question, 100.0 * score / best if best > 0 else 0.0) for score, choice in rows
    )


def _recommendation(topology: Topology, choice: Choice, question: SearchQuestion, score: float) -> Recommendation:
    view = choice_view(choice)
    return Recommendation(
        strategy=_layout(choice, question),
        tp=view.tp,
        pp=view.pp,
        dp=view.dp * view.replicas,
        analysis=_analysis(topology, choice),
        score=score,
        rationale=(choice.rationale,) if choice.rationale else (),
        warnings=tuple(choice.estimate.notes),
        serving=view,
    )


def _layout(choice: Choice, question: SearchQuestion) -> LayoutView:
    layout = choice.settings.layout
    return LayoutView(
        name=serving_name(choice),
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp * choice.replicas,
        cp=1,
        ep=layout.ep,
        sp=False,
        virtual_stages=1,
        world_size=choice.gpus,
        global_batch=question.batch_size,
        micro_batch_size=math.ceil(question.batch_size / (layout.dp * choice.replicas)),
        num_micro_batches=1,
        gradient_accumulation=1,
        effective_batch_size=question.batch_size,
        seq_length=question.seq_length,
        precision=choice.settings.weights or "bf16",
        sharding="none",
        optimizer="none",
        activation_checkpointing="none",
        schedule="none",
        offload="none",
    )


def serving_name(choice: Choice) -> str:
    """`TP2_PP1_DP4`, where dp counts engines and their attention groups."""
    layout = choice.settings.layout
    name = f"TP{layout.tp}_PP{layout.pp}_DP{layout.dp * choice.replicas}"
    return f"{name}_EP{layout.ep}" if layout.ep > 1 else name


def _analysis(topology: Topology, choice: Choice) -> ChoiceAnalysis:
    found, memory = choice.estimate, choice.estimate.memory
    capacity = topology.accelerator.visible_bytes
    total = math.fsum(found.step_parts_s.values())
    exchange = math.fsum(found.step_parts_s.get(name, 0.0) for name in _EXCHANGES)
    return ChoiceAnalysis(
        memory_per_gpu_gb=memory.total_bytes / GB,
        peak_memory_gb=memory.total_bytes / GB,
        memory_headroom_gb=(capacity - memory.total_bytes) / GB,
        fits_in_memory=found.fits,
        fit_probability=None,
        estimated_throughput_tps=choice.output_tokens_per_s,
        throughput=_times(found.output_tokens_per_s, choice.replicas),
        estimated_latency_ms=1e3 * found.e2e_s.value,
        step_s=None,
        mfu=None,
        compute_efficiency=found.roofline_share,
        communication_overhead=exchange / total if total > 0 else 0.0,
        pipeline_bubble_fraction=0.0,
        bottleneck=found.bottleneck,
        cost_per_million_tokens_usd=choice.usd_per_million_tokens,
        memory=MemoryBreakdown(
            parameters=memory.weights_bytes / GB,
            gradients=0.0,
            optimizer_states=0.0,
            activations=memory.activation_bytes / GB,
            logits=0.0,
            communication=0.0,
            context=(memory.context_bytes + memory.graphs_bytes) / GB,
            fragmentation=0.0,
            kv_cache=(memory.kv_bytes + memory.state_bytes) / GB,
            total=memory.total_bytes / GB,
        ),
    )


def _times(one: Quantity, factor: int) -> Quantity:
    return msgspec.structs.replace(one, value=one.value * factor, low=one.low * factor, high=one.high * factor)


def serving_searched(result: SearchResult) -> SearchedView:
    """What was looked through."""
    gone = sum(drop.count for drop in result.dropped)
    return SearchedView(
        examined=result.evaluated + gone,
        feasible=result.evaluated,
        dropped=tuple(
            DroppedView(reason=drop.reason, count=drop.count, message=drop.example) for drop in result.dropped
        ),
        notes=(),
    )
