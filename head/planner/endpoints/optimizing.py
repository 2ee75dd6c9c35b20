"""What would make a training faster or smaller: optimize; settings by kind of work: profile."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
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
from head.planner.endpoints.questions import Desk, architecture_for
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import estimate_memory
from head.planner.training.search import search
from head.planner.training.search_space import Space
from head.planner.training.step_time import step_seconds

_COMPLEXITIES = ("low", "medium", "high")
_FIT_SHARE = 0.5  # of certainty that a changed layout must fit to be worth naming


class OptimizeQuestion(SearchQuestion, frozen=True, kw_only=True):
    """What to change, each change computed on the best layout. precision and checkpointing fix what is given."""

    checkpointing: Annotated[
        Literal["", "none", "selective", "full"] | None,
        Meta(description="Activation recomputation; empty: searched."),
    ] = None
    training: Annotated[bool, Meta(description="Training; inference is what /inference is for.")] = True


class Technique(msgspec.Struct, frozen=True, kw_only=True):
    """One change: what it does to memory and time, by the same models as everything else."""

    name: str
    memory_savings_gb: float
    throughput_change_pct: float
    fits: bool
    complexity: str
    how: str


class PrecisionAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """Which numbers to compute with."""

    mode: str
    compute_dtype: str
    param_dtype: str
    memory_savings_pct: float
    throughput_boost_pct: float
    accuracy_impact: str
    rationale: str


class Optimizations(msgspec.Struct, frozen=True, kw_only=True):
    """All advice. `compound` is the changes together that the search found best, against the plain best layout."""

    optimization_goal: str
    techniques: tuple[Technique, ...]
    compound_optimization: dict[str, Any]
    precision: PrecisionAdvice
    kernels: dict[str, Any]
    hardware_features_used: tuple[str, ...]


class OptimizeAnswer(Answer, frozen=True, kw_only=True):
    """The best layout and what would improve it."""

    model: str
    parallelism: Recommendation
    optimizations: Optimizations
    searched: SearchedView
    topology: TopologySummary


class ProfileQuestion(SearchQuestion, frozen=True, kw_only=True):
    """Settings for a kind of work; with a model also the layout."""

    workload: Annotated[
        str,
        Meta(
            max_length=32,
            description="pretraining, finetuning, rlhf, long_context, moe, cost_optimized, inference; empty: list.",
        ),
    ] = ""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of work."""

    name: str
    description: str
    settings: dict[str, Any]
    ask: str


class ProfileAnswer(Answer, frozen=True, kw_only=True):
    """The profiles, or one with the layout it leads to."""

    profiles: tuple[Profile, ...]
    best: Recommendation | None = None
    model: str = ""
    topology: TopologySummary | None = None


PROFILES = (
    Profile(
        name="pretraining",
        description="long runs over trillions of tokens: throughput, large batches, sharded checkpoints",
        settings={"seq_length": 4096, "batch_size": 4, "goal": "throughput", "tuning": "full"},
        ask="recommend, largescale",
    ),
    Profile(
        name="finetuning",
        description="all weights on a few nodes",
        settings={"seq_length": 4096, "batch_size": 1, "goal": "throughput", "tuning": "full"},
        ask="recommend, memory",
    ),
    Profile(
        name="rlhf",
        description="several models and a generation phase",
        settings={"seq_length": 2048, "batch_size": 8, "goal": "memory", "tuning": "full"},
        ask="rl",
    ),
    Profile(
        name="long_context",
        description="sequences of 32 thousand tokens and more: context parallelism",
        settings={"seq_length": 131_072, "batch_size": 1, "goal": "throughput", "tuning": "full"},
        ask="long-context",
    ),
    Profile(
        name="moe",
        description="experts over ranks",
        settings={"seq_length": 4096, "batch_size": 8, "goal": "throughput", "tuning": "full"},
        ask="moe",
    ),
    Profile(
        name="cost_optimized",
        description="few GPUs, adapters, least dollars per token",
        settings={"seq_length": 2048, "batch_size": 1, "goal": "efficiency", "tuning": "lora"},
        ask="pareto, recommend",
    ),
    Profile(
        name="inference",
        description="serving: latency and throughput of an engine",
        settings={"seq_length": 2048, "max_output_length": 512},
        ask="inference, vllm",
    ),
)


def optimize(question: OptimizeQuestion, desk: Desk) -> OptimizeAnswer:
    """The best layout by search, then every change to it alone."""
    if not question.training:
        raise InvalidValue("training: optimize is about training", field="training", hint="ask /plan/inference")
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    base = base_of(question, topology)
    space = Space(recomputes=(question.checkpointing,)) if question.checkpointing else None
    result = search(arch, topology, base, space=space, stack=question.stack, top=1)
    require(result)
    choice = result.choices[0]
    best = recommendations(arch, topology, [choice], question.stack)[0]
    techniques = _techniques(arch, topology, choice.layout, question.stack)
    return OptimizeAnswer(
        model=arch.name,
        parallelism=best,
        optimizations=Optimizations(
            optimization_goal="throughput",
            techniques=techniques,
            compound_optimization=_compound(arch, topology, choice.layout, techniques, question.stack),
            precision=_precision(arch, topology, choice.layout, question.stack),
            kernels={
                "flash_attention": {"enabled": choice.layout.has_flash_attention, "causal": arch.is_causal},
                "fused_kernels": ["RMSNorm", "rotary embedding", "SwiGLU", "cross entropy"],
                "custom_kernels": [],
                "torch_compile": "worth it where launching kernels takes over a tenth of the step",
            },
            hardware_features_used=_features(topology, choice.layout),
        ),
        searched=searched_view(result),
        topology=topology_summary(topology),
    )


def _variants(topology: Topology, layout: TrainingLayout) -> list[tuple[str, str, str, TrainingLayout]]:
    """(name, complexity, how, the layout with it) of what the layout does not do yet."""
    replace = msgspec.structs.replace
    found = []
    device = topology.accelerator
    if layout.precision in ("bf16", "fp16") and device.has_units_for("fp8"):
        kind = "mxfp8" if device.generation == "blackwell" else "fp8"
        found.append((f"{kind} products", "medium", "Transformer Engine or torchao", replace(layout, precision=kind)))
    if layout.precision == "bf16" and device.has_units_for("fp4"):
        found.append(("nvfp4 products", "high", "Transformer Engine", replace(layout, precision="nvfp4")))
    for kind in ("none", "selective", "full"):
        if kind != layout.recompute:
            found.append((f"recomputation: {kind}", "low", "activation checkpointing", replace(layout, recompute=kind)))
    if layout.optimizer == "adamw":
        found.append(
            ("8-bit optimizer states", "low", "bitsandbytes, torchao", replace(layout, optimizer="adamw_8bit"))
        )
    if layout.offload == "none":
        found.append(
            ("optimizer in host memory", "medium", "DeepSpeed ZeRO-Offload", replace(layout, offload="optimizer"))
        )
    for kind in ("zero1", "fsdp"):
        if kind != layout.sharding and layout.dp > 1:
            found.append((f"sharding: {kind}", "medium", "ZeRO or FSDP", replace(layout, sharding=kind)))
    return found


def _techniques(arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str) -> tuple[Technique, ...]:
    before = estimate_memory(arch, topology, layout, stack=stack).parts.total
    slow = step_seconds(arch, topology, layout, stack or "unknown")
    rows = []
    for name, complexity, how, changed in _variants(topology, layout):
        memory = estimate_memory(arch, topology, changed, stack=stack)
        fast = step_seconds(arch, topology, changed, stack or "unknown")
        rows.append(
            Technique(
                name=name,
                memory_savings_gb=(before - memory.parts.total) / GB,
                throughput_change_pct=100 * (slow / fast - 1),
                fits=memory.fit_probability >= _FIT_SHARE,
                complexity=complexity,
                how=how,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.throughput_change_pct))


def _compound(
    arch: Architecture, topology: Topology, layout: TrainingLayout, techniques: tuple[Technique, ...], stack: str
) -> dict[str, Any]:
    """Changes that help and fit, put together one after the other as long as each still helps."""
    slow = step_seconds(arch, topology, layout, stack or "unknown")
    best, now = layout, slow
    names: list[str] = []
    for _ in range(4):
        options = []
        for name, _, _, changed in _variants(topology, best):
            seconds = step_seconds(arch, topology, changed, stack or "unknown")
            fits = estimate_memory(arch, topology, changed, stack=stack).fit_probability >= _FIT_SHARE
            if seconds < now * 0.995 and fits:
                options.append((seconds, name, changed))
        if not options:
            break
        now, name, best = min(options, key=lambda option: option[0])
        names.append(name)
    before, after = (estimate_memory(arch, topology, one, stack=stack).parts.total for one in (layout, best))
    used = [row for row in techniques if row.name in names]
    return {
        "name": " + ".join(names) or "nothing beats the layout as it is",
        "techniques": names,
        "layout": layout_name(best),
        "total_memory_savings_gb": (before - after) / GB,
        "total_throughput_boost_pct": 100 * (slow / now - 1),
        "step_s": now,
        "considered": len(techniques),
        "complexity": max((row.complexity for row in used), key=_COMPLEXITIES.index, default="low"),
        "implementation_steps": [f"{row.name}: {row.how}" for row in used],
        "compatibility_notes": [] if after <= before else ["takes more memory than the plain layout; it fits"],
        "config": {
            "precision": best.precision,
            "recompute": best.recompute,
            "sharding": best.sharding,
            "optimizer": best.optimizer,
            "offload": best.offload,
        },
    }


def _precision(arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str) -> PrecisionAdvice:
    """8-bit products where the accelerator has them and they help."""
    device = topology.accelerator
    kind = "mxfp8" if device.generation == "blackwell" else "fp8"
    if not device.has_units_for("fp8") or layout.precision not in ("bf16", "fp16"):
        return PrecisionAdvice(
            mode=layout.precision,
            compute_dtype=layout.precision,
            param_dtype="bf16",
            memory_savings_pct=0.0,
            throughput_boost_pct=0.0,
            accuracy_impact="none",
            rationale=f"{device.name} has no faster units than those for {device.compute_precision(layout.precision)}",
        )
    changed = msgspec.structs.replace(layout, precision=kind)
    gain = step_seconds(arch, topology, layout, stack or "unknown") / step_seconds(
        arch, topology, changed, stack or "unknown"
    )
    before, after = (estimate_memory(arch, topology, one, stack=stack).parts.total for one in (layout, changed))
    helps = gain > 1.02
    return PrecisionAdvice(
        mode=kind if helps else layout.precision,
        compute_dtype=kind if helps else layout.precision,
        param_dtype="bf16",
        memory_savings_pct=100 * max(0.0, 1 - after / before) if helps else 0.0,
        throughput_boost_pct=100 * (gain - 1) if helps else 0.0,
        accuracy_impact="check the loss curve against bf16 for some thousand steps" if helps else "none",
        rationale=f"{kind} is {100 * (gain - 1):.0f} % faster here, casts included",
    )


def _features(topology: Topology, layout: TrainingLayout) -> tuple[str, ...]:
    found = [f"{topology.accelerator.compute_precision(layout.precision)} matrix units"]
    if topology.has_scaleup and (layout.tp > 1 or layout.ep > 1 or layout.cp > 1):
        found.append(f"scale-up links among {topology.domain_gpus} GPUs")
    if topology.nodes > 1 and topology.network != "none":
        found.append("network between nodes")
    return tuple(found)


def profile(question: ProfileQuestion, desk: Desk) -> ProfileAnswer:
    """All profiles, or one with the layout it leads to."""
    if not question.workload:
        return ProfileAnswer(profiles=PROFILES)
    found = next((row for row in PROFILES if row.name == question.workload.replace("-", "_").lower()), None)
    if found is None:
        known = [row.name for row in PROFILES]
        raise InvalidValue(
            f"workload: {question.workload!r} is not known",
            field="workload",
            known=known,
            hint="one of " + ", ".join(known),
        )
    is_model_given = bool(question.model or question.config or question.dimensions)
    if not is_model_given or found.name == "inference":
        return ProfileAnswer(profiles=(found,))
    fields = {field.name for field in msgspec.structs.fields(SearchQuestion)}
    asked = msgspec.structs.replace(question, **{k: v for k, v in found.settings.items() if k in fields})
    arch = architecture_for(asked, desk)
    topology = machine_of(asked, desk)
    goal = found.settings.get("goal", "throughput")
    result = search(arch, topology, base_of(asked, topology), stack=asked.stack, goal=goal, top=1)
    require(result)
    best = recommendations(arch, topology, result.choices, asked.stack)[0]
    return ProfileAnswer(profiles=(found,), best=best, model=arch.name, topology=topology_summary(topology))


_CODES = ("model_not_found", "not_found", "nothing_fits")
ENDPOINTS = (
    Endpoint(
        "optimize",
        "optimize",
        OptimizeQuestion,
        OptimizeAnswer,
        optimize,
        "What would make a training faster or smaller",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("gpus", 8), ("batch_size", 4)),
        codes=_CODES,
    ),
    Endpoint(
        "profile",
        "profile",
        ProfileQuestion,
        ProfileAnswer,
        profile,
        "Settings by kind of work",
        example=(("model", "llama-3.1-8b"), ("workload", "finetuning"), ("gpu", "H100"), ("gpus", 8)),
        codes=_CODES,
        needs_model=False,
    ),
)
