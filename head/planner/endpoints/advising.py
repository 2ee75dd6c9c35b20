"""Advice: whatif, comm-overlap, troubleshoot."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import HerderError
from head.planner.advice.comm_overlap import Kind, StepPart, overlap_advice
from head.planner.advice.troubleshoot import troubleshoot as troubleshooting
from head.planner.advice.whatif import EXAMPLES, apply_scenario, parse_scenario
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import TopologySummary, topology_summary
from head.planner.endpoints.layouts import GB, LayoutQuestion, layout_name, machine_and_layout
from head.planner.endpoints.questions import Desk, Question, architecture_for
from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.training.checks import check_layout
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import estimate_memory
from head.planner.training.step_time import estimate as estimate_step
from head.planner.training.step_work import step_work

STOCK = ("double gpus", "tp=2", "pp=2", "double batch", "halve batch")


class WhatifQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """What a change would do. Without a scenario, some usual ones are answered; current_* are older names of fields."""

    scenario: Annotated[
        str, Meta(max_length=400, description="As double_batch_size, tp=4,dp=2, seq x2, gpu=b200, precision=fp8.")
    ] = ""
    current_tp: Annotated[int, Meta(ge=0, le=1_048_576, description="As tp.")] = 0
    current_pp: Annotated[int, Meta(ge=0, le=1_048_576, description="As pp.")] = 0
    current_dp: Annotated[int, Meta(ge=0, le=1_048_576, description="As dp.")] = 0
    current_batch_size: Annotated[int, Meta(ge=0, le=1 << 24, description="As batch_size.")] = 0


class WhatifState(msgspec.Struct, frozen=True, kw_only=True):
    """One layout as it would run. efficiency is MFU; memory in GB of 1e9 bytes."""

    config: str
    model_params_b: float
    tp: int
    pp: int
    dp: int
    num_gpus: int
    gpu_type: str
    gpu_memory_gb: float
    batch_size: int
    global_batch: int
    seq_length: int
    precision: str
    throughput: float
    step_s: float
    memory_per_gpu: float
    efficiency: float
    fits: bool


class WhatifScenario(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario: what it changes, what comes of it, why it cannot be."""

    scenario: str
    changes: dict[str, Any]
    projected: WhatifState | None
    change_vs_current: dict[str, float]
    is_feasible: bool
    feasibility_issues: tuple[str, ...]
    trade_offs: tuple[str, ...]


class WhatifAnswer(Answer, frozen=True, kw_only=True):
    """Each scenario against the layout as it is, both predicted by the same models."""

    model: str
    model_params_b: float
    current_config: WhatifState
    scenarios: tuple[WhatifScenario, ...]
    summary: dict[str, Any]
    understood: tuple[str, ...]
    topology: TopologySummary


class OverlapQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """What of a step's communication could hide behind its computation."""


class OverlapAnswer(Answer, frozen=True, kw_only=True):
    """Each kind of communication, what of it can hide, and the switches that do it."""

    model: str
    opportunities: tuple[dict[str, Any], ...]
    overlap_analysis: dict[str, float]
    overlap_configs: dict[str, str]
    recommendations: tuple[str, ...]
    parallelism: dict[str, int]
    topology: TopologySummary


class TroubleshootQuestion(Question, frozen=True, kw_only=True):
    """An error text, a topic, or neither for the list of topics."""

    error_message: Annotated[str, Meta(max_length=1 << 20, description="What the program printed.")] | None = None
    topic: Annotated[str, Meta(max_length=200, description="An id or alias, as oom.")] | None = None


class TroubleshootAnswer(Answer, frozen=True, kw_only=True):
    """What is set depends on what was asked."""

    diagnosis: dict[str, Any] | None = None
    topic: str | None = None
    info: dict[str, Any] | None = None
    topics: tuple[dict[str, str], ...] | None = None


def whatif(question: WhatifQuestion, desk: Desk) -> WhatifAnswer:
    """The layout as it is, and after each scenario."""
    arch = architecture_for(question, desk)
    asked = msgspec.structs.replace(
        question,
        tp=question.current_tp or question.tp,
        pp=question.current_pp or question.pp,
        dp=question.current_dp or question.dp,
        batch_size=question.current_batch_size or question.batch_size,
        micro_batch=question.micro_batch or 1,
    )
    topology, layout = machine_and_layout(asked, desk)
    current = _state(arch, topology, layout, asked.stack)
    texts = (question.scenario,) if question.scenario.strip() else STOCK
    rows = tuple(
        _scenario(arch, topology, layout, text, current, asked.stack, is_asked=bool(question.scenario.strip()))
        for text in texts
    )
    feasible = [row for row in rows if row.is_feasible and row.projected is not None]
    return WhatifAnswer(
        model=arch.name,
        model_params_b=count(arch).total / 1e9,
        current_config=current,
        scenarios=rows,
        summary={
            "feasible_scenarios": len(feasible),
            "best_throughput_scenario": _best(feasible, "throughput"),
            "best_efficiency_scenario": _best(feasible, "efficiency"),
        },
        understood=tuple(EXAMPLES),
        topology=topology_summary(topology),
    )


def _best(rows: list[WhatifScenario], field: str) -> str | None:
    return max(rows, key=lambda row: getattr(row.projected, field)).scenario if rows else None


def _state(arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str) -> WhatifState:
    step = estimate_step(arch, topology, layout, stack)
    memory = estimate_memory(arch, topology, layout, stack=stack)
    return WhatifState(
        config=layout_name(layout),
        model_params_b=count(arch).total / 1e9,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        num_gpus=layout.gpus,
        gpu_type=topology.accelerator.name,
        gpu_memory_gb=topology.accelerator.visible_bytes / GB,
        batch_size=layout.global_batch // layout.dp,
        global_batch=layout.global_batch,
        seq_length=layout.seq,
        precision=layout.precision,
        throughput=step.tokens_per_s.value,
        step_s=step.step_s.value,
        memory_per_gpu=memory.parts.total / GB,
        efficiency=min(1.0, step.mfu.value),
        fits=memory.headroom_bytes >= 0,
    )


def _scenario(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    text: str,
    current: WhatifState,
    stack: str,
    *,
    is_asked: bool,
) -> WhatifScenario:
    """One scenario. What a person asked for and cannot be read is refused; a usual one that does not apply says why."""
    changes = parse_scenario(text)
    named = {change.field: change.value if change.factor is None else f"x{change.factor:g}" for change in changes}
    try:
        changed, device = apply_scenario(
            layout, changes, gpus_per_node=topology.gpus_per_node, accelerator=topology.accelerator.name
        )
    except HerderError as error:
        if is_asked:
            raise
        return WhatifScenario(
            scenario=text,
            changes=named,
            projected=None,
            change_vs_current={},
            is_feasible=False,
            feasibility_issues=(error.message,),
            trade_offs=(),
        )
    place = topology if changed.gpus == topology.gpus else topology.with_gpus(changed.gpus)
    if device != topology.accelerator.name:
        place = topology_of_preset(device, changed.gpus)
    checks = [check for check in check_layout(arch, place, changed) if check.status != "passed"]
    failed = tuple(check.message for check in checks if check.status == "failed")
    state = _state(arch, place, changed, stack)
    return WhatifScenario(
        scenario=text,
        changes=named,
        projected=state,
        change_vs_current={
            "throughput_pct": 100 * (state.throughput / current.throughput - 1),
            "memory_pct": 100 * (state.memory_per_gpu / current.memory_per_gpu - 1),
            "efficiency_pct": 100 * (state.efficiency / current.efficiency - 1) if current.efficiency else 0.0,
        },
        is_feasible=not failed,
        feasibility_issues=failed,
        trade_offs=_trade_offs(current, state, tuple(check.message for check in checks if check.status == "warning")),
    )


def _trade_offs(before: WhatifState, after: WhatifState, warnings: tuple[str, ...]) -> tuple[str, ...]:
    found = list(warnings)
    if after.num_gpus != before.num_gpus:
        share = (after.throughput / after.num_gpus) / (before.throughput / before.num_gpus)
        found.append(f"{after.num_gpus} GPUs: {share:.0%} of the tokens per GPU")
    if after.memory_per_gpu > before.memory_per_gpu * 1.05:
        found.append(f"{after.memory_per_gpu - before.memory_per_gpu:.1f} GB more on each GPU")
    return tuple(found)


_KINDS: tuple[tuple[Kind, str, tuple[str, ...]], ...] = (
    ("tp", "tp", ("tensor_parallel",)),
    ("cp", "cp", ("context_parallel",)),
    ("ep", "ep", ("expert_parallel",)),
    ("pp", "pp", ("pipeline_messages",)),
    ("fsdp", "shard", ("sharded_parameters",)),
    ("dp", "dp", ("data_parallel",)),
)


def comm_overlap(question: OverlapQuestion, desk: Desk) -> OverlapAnswer:
    """Whole times at line rate, exposed times as the step-time model predicts them."""
    arch = architecture_for(question, desk)
    topology, layout = machine_and_layout(question, desk)
    step = estimate_step(arch, topology, layout, question.stack)
    work = step_work(arch, topology, layout)
    link = topology.scaleup_bytes_per_s if topology.has_scaleup else topology.pcie_bytes_per_s
    parts = []
    for kind, name, fields in _KINDS:
        on_link, on_nic = getattr(work, f"{name}_link_s"), getattr(work, f"{name}_nic_s")
        exposed = sum(step.parts[field] for field in fields)
        if on_link + on_nic <= 0:
            continue
        shown: Kind = "sp" if kind == "tp" and layout.has_sequence_parallel else kind
        parts.append(
            StepPart(
                kind=shown,
                time_s=max(exposed, on_link + on_nic),
                exposed_s=exposed,
                volume_bytes=on_link * link + on_nic * topology.nic_bytes_per_s,
            )
        )
    exchange = sum(part.exposed_s for part in parts)
    found = overlap_advice(layout, step.step_s.value - exchange, tuple(parts))
    return OverlapAnswer(
        model=arch.name,
        opportunities=tuple(found["opportunities"]),
        overlap_analysis=found["overlap_analysis"],
        overlap_configs=found["overlap_configs"],
        recommendations=tuple(found["recommendations"]),
        parallelism=found["parallelism"],
        topology=topology_summary(topology),
    )


def troubleshoot(question: TroubleshootQuestion, desk: Desk) -> TroubleshootAnswer:
    """A diagnosis by what programs really print, a topic, or the list."""
    found = troubleshooting(question.error_message or "", question.topic or "")
    topics = found.get("topics")
    return TroubleshootAnswer(
        diagnosis=found.get("diagnosis"),
        topic=found.get("topic"),
        info=found.get("info"),
        topics=tuple(topics) if topics is not None else None,
    )


_CODES = ("model_not_found", "not_found", "nothing_fits")
ENDPOINTS = (
    Endpoint(
        "whatif",
        "whatif",
        WhatifQuestion,
        WhatifAnswer,
        whatif,
        "What a change would do",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("dp", 8), ("scenario", "double_batch_size")),
        codes=_CODES,
    ),
    Endpoint(
        "comm-overlap",
        "comm-overlap",
        OverlapQuestion,
        OverlapAnswer,
        comm_overlap,
        "What communication could hide behind computation",
        example=(("model", "llama-3.1-70b"), ("gpu", "H100"), ("tp", 8), ("dp", 8)),
        codes=_CODES,
    ),
    Endpoint(
        "troubleshoot",
        "troubleshoot",
        TroubleshootQuestion,
        TroubleshootAnswer,
        troubleshoot,
        "What an error message means",
        example=(("error_message", "torch.OutOfMemoryError: CUDA out of memory."),),
        codes=("not_found", "body_too_large"),
    ),
)
