"""Special cases: experts, long sequences, post-training."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
from head.planner.calibration.quantity import Quantity
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
from head.planner.endpoints.questions import (
    Batch,
    Desk,
    Name,
    PlacedQuestion,
    architecture_for,
    architecture_named,
    topology_for,
)
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.model.kv_cache import kv_cache
from head.planner.training.layout import TrainingLayout
from head.planner.training.post_training import RECIPES, PostTrainingPlan, plan
from head.planner.training.search import Choice, search
from head.planner.training.step_time import estimate as estimate_step

UPCYCLED_EXPERTS, UPCYCLED_ACTIVE = 8, 2  # of a dense model that is to become one, unless said


class MoeQuestion(SearchQuestion, frozen=True, kw_only=True):
    """How to spread experts. num_experts and experts_per_token are for a dense model that is to become one."""

    batch_size: Annotated[Batch, Meta(description="Sequences of a step on each GPU's share; see global_batch.")] = 8
    num_experts: Annotated[
        int, Meta(ge=0, le=65_536, description="Of a dense model that is to become one; 0: 8. A MoE model has its own.")
    ] = 0
    experts_per_token: Annotated[int, Meta(ge=0, le=65_536, description="As num_experts; 0: 2.")] = 0


class MoeAnswer(Answer, frozen=True, kw_only=True):
    """The best layout that uses expert parallelism, and the best of all."""

    model: str
    num_experts: int
    experts_per_token: int
    experts_per_rank: int
    expert_parallel_size: int
    tensor_parallel_size: int
    data_parallel_size: int
    capacity_factor: float
    load_balancing_loss_weight: float
    memory_per_gpu_gb: float
    communication_volume_gb: float
    expected_mfu: float
    best: Recommendation
    by_expert_parallelism: dict[str, float]
    warnings: tuple[str, ...]
    searched: SearchedView
    topology: TopologySummary


class LongContextQuestion(SearchQuestion, frozen=True, kw_only=True):
    """How to train with long sequences."""

    seq_length: Annotated[int, Meta(ge=1_024, le=1 << 26, description="Tokens of a sequence.")] = 32_768


class LongContextAnswer(Answer, frozen=True, kw_only=True):
    """The best layout, and what context parallelism changes."""

    model: str
    method: str
    sequence_length: int
    context_parallel_size: int
    memory_savings_pct: float
    communication_overhead_pct: float
    expected_throughput_tokens_s: float
    kv_cache_memory_gb: float
    attention_share_of_flops: float
    launch_args: tuple[str, ...]
    best: Recommendation
    by_context_parallelism: dict[str, float]
    warnings: tuple[str, ...]
    searched: SearchedView
    topology: TopologySummary


class RlQuestion(PlacedQuestion, frozen=True, kw_only=True):
    """One step of post-training: which models are held, which phases there are, what it takes."""

    algorithm: Annotated[str, Meta(max_length=32, description="ppo, grpo, rloo, reinforce, dpo, ipo, kto, orpo.")] = (
        "ppo"
    )
    ref_model_strategy: Annotated[
        str,
        Meta(
            max_length=32, description="separate, full_gpu, cpu_offload, quantized, vllm_server, shared_weights, none."
        ),
    ] = "separate"
    batch_size: Annotated[int, Meta(ge=1, le=1 << 20, description="Answers of a step on each GPU.")] = 8
    seq_length: Annotated[int, Meta(ge=2, le=1 << 26, description="Tokens of prompt and answer.")] = 2048
    tuning: Annotated[str, Meta(max_length=8, description="full, lora, qlora.")] = "full"
    tp: Annotated[int, Meta(ge=0, le=1_024, description="Tensor parallelism; 0: searched.")] = 0
    reward_model: Annotated[Name, Meta(description="Another model; empty: as the actor.")] = ""
    critic_model: Annotated[Name, Meta(description="Another model; empty: as the actor.")] = ""


class RlAnswer(Answer, frozen=True, kw_only=True):
    """The models' memory, the phases' time, and the algorithms beside each other. GB are 1e9 bytes per GPU."""

    model: str
    algorithm: str
    actor_memory_gb: float
    critic_memory_gb: float
    reference_memory_gb: float
    reward_memory_gb: float
    optimizer_memory_gb: float
    activation_memory_gb: float
    total_memory_gb: float
    total: Quantity
    capacity_gb: float
    fits_single_gpu: bool
    fits: bool
    verdict: str
    recommended_tp: int
    recommended_offload: bool
    layout: str
    step_s: Quantity
    samples_per_s: float
    memory_plan: PostTrainingPlan
    training_config: dict[str, Any]
    comparison: tuple[dict[str, Any], ...]
    optimizations: tuple[str, ...]
    topology: TopologySummary


def moe(question: MoeQuestion, desk: Desk) -> MoeAnswer:
    """A search in which every degree of expert parallelism takes part."""
    arch = _with_experts(architecture_for(question, desk), question)
    part = next(group.feed_forward for group in arch.groups if group.feed_forward.kind == "moe")
    topology = machine_of(question, desk)
    result = search(arch, topology, base_of(question, topology), stack=question.stack, top=50_000)
    choice = require(result)
    by_degree = _best_by(result.choices, "ep")
    best = recommendations(arch, topology, [choice], question.stack)[0]
    layout = choice.layout
    tokens = layout.micro_batch * layout.seq * layout.microbatches / layout.cp
    layers = sum(group.count for group in arch.groups if group.feed_forward.kind == "moe") / layout.pp
    moved = 4 * 2 * tokens * part.active * arch.hidden * layers * (1 - 1 / layout.ep)
    warnings = []
    if part.experts % layout.ep:
        warnings.append(f"{part.experts} experts do not divide over {layout.ep} ranks")
    if layout.ep > topology.local_gpus:
        warnings.append("expert parallelism leaves the node: the exchange crosses the network")
    warnings.append("balanced routing is assumed; a busiest rank with 1.3 times the mean takes 1.3 times as long there")
    return MoeAnswer(
        model=arch.name,
        num_experts=part.experts,
        experts_per_token=part.active,
        experts_per_rank=-(-part.experts // layout.ep),
        expert_parallel_size=layout.ep,
        tensor_parallel_size=layout.tp,
        data_parallel_size=layout.dp,
        capacity_factor=1.25,
        load_balancing_loss_weight=0.01,
        memory_per_gpu_gb=choice.memory.parts.total / GB,
        communication_volume_gb=moved / GB,
        expected_mfu=best.analysis.compute_efficiency,
        best=best,
        by_expert_parallelism={f"ep{ep}": row.tokens_per_s for ep, row in by_degree.items()},
        warnings=tuple(warnings),
        searched=searched_view(result),
        topology=topology_summary(topology),
    )


def _with_experts(arch: Architecture, question: MoeQuestion) -> Architecture:
    """The model, or, for a dense one, its upcycled form: every feed-forward part `num_experts` times."""
    if arch.is_moe:
        return arch
    experts, active = question.num_experts or UPCYCLED_EXPERTS, question.experts_per_token or UPCYCLED_ACTIVE
    if active > experts:
        raise InvalidValue("experts_per_token: more than num_experts", field="experts_per_token")
    groups = []
    for group in arch.groups:
        part = msgspec.structs.replace(group.feed_forward, kind="moe", experts=experts, active=active)
        groups.append(msgspec.structs.replace(group, feed_forward=part))
    return msgspec.structs.replace(arch, name=f"{arch.name} x{experts}", groups=tuple(groups))


def _best_by(choices: tuple[Choice, ...], field: str) -> dict[int, Choice]:
    """The best choice for each value of a degree; choices are best first."""
    found: dict[int, Choice] = {}
    for choice in choices:
        found.setdefault(getattr(choice.layout, field), choice)
    return dict(sorted(found.items()))


def long_context(question: LongContextQuestion, desk: Desk) -> LongContextAnswer:
    """A search over layouts with and without context parallelism."""
    arch = architecture_for(question, desk)
    topology = machine_of(question, desk)
    result = search(arch, topology, base_of(question, topology), stack=question.stack, top=50_000)
    choice = require(result)
    best = recommendations(arch, topology, [choice], question.stack)[0]
    by_degree = _best_by(result.choices, "cp")
    layout = choice.layout
    step = estimate_step(arch, topology, layout, question.stack or "unknown")
    alone = by_degree.get(1)
    saved = 1 - choice.memory.parts.activations / alone.memory.parts.activations if alone and layout.cp > 1 else 0.0
    total = sum(step.parts.values())
    return LongContextAnswer(
        model=arch.name,
        method="context_parallel" if layout.cp > 1 else "flash_attention",
        sequence_length=question.seq_length,
        context_parallel_size=layout.cp,
        memory_savings_pct=100 * max(0.0, saved),
        communication_overhead_pct=100 * step.parts["context_parallel"] / total,
        expected_throughput_tokens_s=step.tokens_per_s.value,
        kv_cache_memory_gb=kv_cache(arch, question.seq_length).theory / GB,
        attention_share_of_flops=step.parts["attention"] / total,
        launch_args=(f"--context-parallel-size={layout.cp}", f"--tensor-model-parallel-size={layout.tp}"),
        best=best,
        by_context_parallelism={f"cp{cp}": row.tokens_per_s for cp, row in by_degree.items()},
        warnings=(f"{arch.name} was made for {arch.context} tokens",)
        if arch.context and question.seq_length > arch.context
        else (),
        searched=searched_view(result),
        topology=topology_summary(topology),
    )


def rl(question: RlQuestion, desk: Desk) -> RlAnswer:
    """The plan for one algorithm, and what the others would take on the same machine."""
    arch = architecture_for(question, desk)
    topology = topology_for(question, desk)
    if question.algorithm.lower() not in RECIPES:
        raise InvalidValue(
            f"algorithm: {question.algorithm!r} is not known",
            field="algorithm",
            known=list(RECIPES),
            hint="one of " + ", ".join(RECIPES),
        )
    more: dict[str, Any] = {
        "critic": architecture_named(question.critic_model, desk) if question.critic_model else None,
        "reward": architecture_named(question.reward_model, desk) if question.reward_model else None,
    }
    found = _plan(arch, topology, question, question.algorithm.lower(), question.ref_model_strategy, more)
    held = {model.role: model for model in found.models}

    def size(role: str) -> float:
        return held[role].weights / GB if role in held else 0.0

    rows = []
    for name, recipe in RECIPES.items():
        other = _plan(arch, topology, question, name, question.ref_model_strategy, more)
        rows.append(
            {
                "algorithm": name,
                "memory_gb_per_gpu": other.total.value / GB,
                "memory_multiplier": other.total.value / found.total.value,
                "verdict": other.verdict,
                "step_s": other.step_s.value,
                "samples_per_s": other.samples_per_s,
                "models": len(other.models),
                "generates": recipe.generates,
                "source": recipe.source,
            }
        )
    working = max(phase.working_bytes for phase in found.phases)
    alone = topology.with_gpus(1)
    return RlAnswer(
        model=arch.name,
        algorithm=found.algorithm,
        actor_memory_gb=size("actor"),
        critic_memory_gb=size("critic"),
        reference_memory_gb=size("reference"),
        reward_memory_gb=size("reward"),
        optimizer_memory_gb=sum(model.gradients + model.optimizer for model in found.models) / GB,
        activation_memory_gb=working / GB,
        total_memory_gb=found.total.value / GB,
        total=found.total,
        capacity_gb=found.capacity_bytes / GB,
        fits_single_gpu=_plan(arch, alone, question, found.algorithm, question.ref_model_strategy, more).verdict
        == "fits",
        fits=found.verdict != "does_not_fit",
        verdict=found.verdict,
        recommended_tp=found.layout.tp,
        recommended_offload=found.verdict != "fits" and found.host_bytes_per_node == 0,
        layout=layout_name(found.layout),
        step_s=found.step_s,
        samples_per_s=found.samples_per_s,
        memory_plan=found,
        training_config={
            "algorithm": found.algorithm,
            "parallelism": {
                "actor_tp": found.layout.tp,
                "actor_pp": found.layout.pp,
                "critic_tp": found.layout.tp,
                "critic_pp": found.layout.pp,
                "dp": found.layout.dp,
            },
            "reference_strategy": found.reference_strategy,
            "use_peft": found.layout.tuning != "full",
            "peft_config": {"r": found.layout.lora_rank} if found.layout.tuning != "full" else None,
            "micro_batch_size": found.layout.micro_batch,
            "global_batch_size": found.layout.global_batch,
        },
        comparison=tuple(rows),
        optimizations=found.notes,
        topology=topology_summary(topology),
    )


def _plan(
    arch: Architecture, topology: Topology, question: RlQuestion, algorithm: str, reference: str, more: dict[str, Any]
) -> PostTrainingPlan:
    """The plan with the least tensor parallelism that fits, or with the most when none does."""
    if question.tuning not in ("full", "lora", "qlora"):
        raise InvalidValue(f"tuning: {question.tuning!r} is not known", field="tuning", known=["full", "lora", "qlora"])
    degrees = [question.tp] if question.tp else [1 << power for power in range(4) if 1 << power <= topology.local_gpus]
    last: PostTrainingPlan | None = None
    for tp in degrees:
        if topology.gpus % tp:
            continue
        dp = topology.gpus // tp
        layout = TrainingLayout(
            tp=tp,
            dp=dp,
            sharding="fsdp" if dp > 1 else "none",
            global_batch=question.batch_size * topology.gpus,
            micro_batch=1,
            seq=question.seq_length,
            recompute="full",
            tuning=question.tuning,  # type: ignore[arg-type]
        )
        last = plan(arch, topology, layout, algorithm, reference=reference, **more)
        if last.verdict == "fits":
            return last
    if last is None:
        raise InvalidValue(f"tp: {question.tp} does not divide {topology.gpus} GPUs", field="tp")
    return last


_CODES = ("model_not_found", "not_found", "nothing_fits")
_RL = (("model", "llama-3.1-8b"), ("gpu", "H100"), ("gpus", 16), ("algorithm", "ppo"))
ENDPOINTS = (
    Endpoint(
        "moe",
        "moe",
        MoeQuestion,
        MoeAnswer,
        moe,
        "How to spread experts",
        example=(("model", "mixtral-8x7b"), ("gpu", "H100"), ("gpus", 16), ("batch_size", 8)),
        codes=_CODES,
    ),
    Endpoint(
        "long-context",
        "long-context",
        LongContextQuestion,
        LongContextAnswer,
        long_context,
        "How to train with long sequences",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("gpus", 16), ("seq_length", 131_072)),
        codes=_CODES,
    ),
    Endpoint("rlhf", "rlhf", RlQuestion, RlAnswer, rl, "Memory and time of RLHF", example=_RL, codes=_CODES),
    Endpoint("rl", "rl", RlQuestion, RlAnswer, rl, "Post-training, algorithm by algorithm", example=_RL, codes=_CODES),
)
