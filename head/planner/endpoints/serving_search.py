"""What endpoints about serving share: the question, the search that it asks for, and how its choices are shown."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
from head.planner.calibration.quantity import Quantity
from head.planner.endpoints.layouts import GB
from head.planner.endpoints.questions import PlacedQuestion
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.serving.estimate import SEQUENCES_LIMIT, TOKENS_LIMIT, Workload
from head.planner.serving.search import Choice, SearchResult, SearchSpace, Slo, search_serving

_SHOWN = 8
ENGINE_GPUS = 256  # of one engine, at most: more are replicas

ServedTokens = Annotated[int, Meta(ge=1, le=TOKENS_LIMIT)]
InFlight = Annotated[int, Meta(ge=1, le=SEQUENCES_LIMIT)]


class ServingQuestion(PlacedQuestion, frozen=True, kw_only=True):
    """What is served to whom."""

    batch_size: Annotated[InFlight, Meta(description="Requests in flight, unless request_rate is given.")] = 1
    seq_length: Annotated[ServedTokens, Meta(description="Tokens of a prompt.")] = 2048
    max_output_length: Annotated[ServedTokens, Meta(description="Tokens of an answer.")] = 512
    request_rate: Annotated[float, Meta(ge=0, le=1e6, description="Requests per second; 0: batch_size in flight.")] = (
        0.0
    )
    prefix_hit: Annotated[float, Meta(ge=0, le=1, description="Share of prompts found in the prefix cache.")] = 0.0
    latency_target_ms: Annotated[float, Meta(ge=0, le=1e9, description="Limit on the time between tokens.")] | None = (
        None
    )
    ttft_target_ms: Annotated[float, Meta(ge=0, le=1e9, description="Limit on the first token.")] | None = None
    throughput_target: Annotated[float, Meta(ge=0, le=1e12, description="Output tokens per second.")] | None = None
    engine: Annotated[
        Literal["vllm", "sglang", "trtllm", "llamacpp"], Meta(description="Which engine to plan for.")
    ] = "vllm"
    engine_version: Annotated[str, Meta(max_length=64, description="Its release, where it matters.")] = ""
    weights: Annotated[str, Meta(max_length=16, description="bf16, fp8, nvfp4, awq, ...; empty: tried.")] = ""
    kv_dtype: Annotated[str, Meta(max_length=16, description="bf16 or fp8; empty: the engine's default.")] = ""
    tp: Annotated[int, Meta(ge=0, le=1_024, description="Tensor parallelism; 0: searched.")] = 0


class ServingChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration and how it would serve the load."""

    name: str
    objective: str
    tp: int
    pp: int
    dp: int
    ep: int
    replicas: int
    gpus: int
    weights: str
    kv_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    ttft_s: Quantity
    tpot_s: Quantity
    e2e_s: Quantity
    output_tokens_per_s: float
    output_tokens_per_s_per_gpu: Quantity
    requests_per_s: float
    concurrency: float
    bottleneck: str
    roofline_share: float
    memory_gb: float
    weights_gb: float
    kv_gb: float
    kv_tokens: int
    max_concurrent: float
    usd_per_million_tokens: float | None
    misses: tuple[str, ...]
    rationale: str
    notes: tuple[str, ...]


class ServingDropped(msgspec.Struct, frozen=True, kw_only=True):
    """Configurations left out for one reason."""

    reason: str
    count: int
    example: str


def weights_to_try(arch: Architecture, topology: Topology, given: str) -> tuple[str, ...]:
    """As the model is, and 8-bit where the accelerator multiplies it, unless one is given."""
    if given:
        return (given,)
    if arch.quantisation or not topology.accelerator.has_units_for("fp8"):
        return ("",)
    return ("", "fp8")


def search_for(
    arch: Architecture, topology: Topology, question: ServingQuestion, workload: Workload, slo: Slo
) -> SearchResult:
    """All configurations of the engine on the machine. Raises: NothingFits."""
    most = min(topology.gpus, ENGINE_GPUS)
    least = question.tp or 1
    if least > topology.gpus:
        raise InvalidValue(f"tp: {question.tp} of {topology.gpus} GPUs", field="tp")
    sizes = tuple(least << power for power in range(most.bit_length()) if least << power <= max(most, least))
    is_light = question.batch_size <= 4 and not question.request_rate
    space = SearchSpace(
        backend=question.engine,
        version=question.engine_version,
        weights=weights_to_try(arch, topology, question.weights),
        kv_dtypes=(question.kv_dtype,),
        engine_gpus=sizes,
        tps=(question.tp,) if question.tp else (),
        max_num_seqs=(64,) if is_light else (64, 256, 1_024),
    )
    return search_serving(arch, topology, workload, space, slo)


def workload_of(question: ServingQuestion) -> Workload:
    """The load of a question."""
    return Workload(
        isl=question.seq_length,
        osl=question.max_output_length,
        concurrency=0.0 if question.request_rate else float(question.batch_size),
        request_rate=question.request_rate,
        prefix_hit=question.prefix_hit,
    )


def slo_of(question: ServingQuestion) -> Slo:
    """The limits of a question, in seconds."""
    return Slo(ttft_s=(question.ttft_target_ms or 0.0) / 1e3, tpot_s=(question.latency_target_ms or 0.0) / 1e3)


def choice_view(choice: Choice, objective: str = "") -> ServingChoice:
    """One configuration as it is shown."""
    found, settings = choice.estimate, choice.settings
    layout, memory = settings.layout, settings.memory
    return ServingChoice(
        name=f"TP{layout.tp}_PP{layout.pp}_DP{layout.dp}_EP{layout.ep} x{choice.replicas}",
        objective=objective,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        replicas=choice.replicas,
        gpus=choice.gpus,
        weights=settings.weights or "as the model is",
        kv_dtype=settings.kv_dtype or "the engine's default",
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=memory.max_num_batched_tokens,
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        e2e_s=found.e2e_s,
        output_tokens_per_s=choice.output_tokens_per_s,
        output_tokens_per_s_per_gpu=found.output_tokens_per_s_per_gpu,
        requests_per_s=found.requests_per_s * choice.replicas,
        concurrency=found.concurrency * choice.replicas,
        bottleneck=found.bottleneck,
        roofline_share=found.roofline_share,
        memory_gb=found.memory.total_bytes / GB,
        weights_gb=found.memory.weights_bytes / GB,
        kv_gb=found.memory.kv_bytes / GB,
        kv_tokens=found.kv.tokens,
        max_concurrent=found.kv.max_sequences * layout.dp * choice.replicas,
        usd_per_million_tokens=choice.usd_per_million_tokens,
        misses=choice.misses,
        rationale=choice.rationale,
        notes=found.notes,
    )


def chosen(result: SearchResult, slo: Slo, throughput_target: float | None, *, goal: str = "") -> Choice:
    """By the limits where there are any, else by throughput; among those that meet all, the cheapest."""
    good = [
        choice
        for choice in result.front
        if not choice.misses and choice.output_tokens_per_s >= (throughput_target or 0.0)
    ]
    if goal in ("latency", "memory"):
        return result.best[goal]
    has_limit = bool(slo.ttft_s or slo.tpot_s or throughput_target)
    if has_limit and good:
        return min(good, key=lambda choice: choice.gpus / choice.output_tokens_per_s)
    return result.best["throughput"]


def views(result: SearchResult, best: Choice) -> tuple[ServingChoice, ...]:
    """The chosen one, the best by each objective, then the rest of the front."""
    rows = [choice_view(best, "chosen")]
    names = {rows[0].name + rows[0].weights + str(rows[0].max_num_batched_tokens) + str(rows[0].max_num_seqs)}
    for objective, choice in [*result.best.items(), *(("", choice) for choice in result.front)]:
        view = choice_view(choice, objective)
        key = view.name + view.weights + str(view.max_num_batched_tokens) + str(view.max_num_seqs)
        if key not in names and len(rows) < _SHOWN:
            names.add(key)
            rows.append(view)
    return tuple(rows)


def dropped_views(result: SearchResult) -> tuple[ServingDropped, ...]:
    """Why configurations were left out."""
    return tuple(ServingDropped(reason=d.reason, count=d.count, example=d.example) for d in result.dropped)
