"""Serving a model: inference, vllm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import TopologySummary, topology_summary
from head.planner.endpoints.layouts import GB
from head.planner.endpoints.questions import Desk, PlacedQuestion, architecture_for, topology_for
from head.planner.endpoints.serving_search import (
    InFlight,
    ServedTokens,
    ServingChoice,
    ServingDropped,
    ServingQuestion,
    choice_view,
    chosen,
    dropped_views,
    search_for,
    slo_of,
    views,
    workload_of,
)
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.second_opinion import SecondOpinion, second_opinion
from head.planner.serving.batching import LoadPoint
from head.planner.serving.engine_flags import EngineCommand, ServingSettings, engine_command
from head.planner.serving.estimate import ServingEstimate, Workload, estimate_serving
from head.planner.serving.search import Choice, Slo, largest_load, load_curve
from head.planner.serving.speculative import Speculative, acceptance_of

_ENGINES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt_llm", "llamacpp": "llamacpp"}
_CURVE_REQUESTS = 200


class VllmQuestion(PlacedQuestion, frozen=True, kw_only=True):
    """A configuration of vLLM."""

    batch_size: Annotated[InFlight, Meta(description="Requests in flight.")] = 64
    seq_length: Annotated[ServedTokens, Meta(description="Tokens of a prompt.")] = 1024
    max_tokens: Annotated[ServedTokens, Meta(description="Tokens of an answer.")] = 512
    request_rate: Annotated[float, Meta(ge=0, le=1e6, description="Requests per second; 0: batch_size in flight.")] = (
        0.0
    )
    prefix_hit: Annotated[float, Meta(ge=0, le=1, description="Share of prompts found in the prefix cache.")] = 0.0
    latency_target_ms: Annotated[float, Meta(ge=0, le=1e9, description="Limit on the time between tokens.")] | None = (
        None
    )
    ttft_target_ms: Annotated[float, Meta(ge=0, le=1e9, description="Limit on the first token.")] | None = None
    throughput_target: Annotated[float, Meta(ge=0, le=1e12, description="Output tokens per second.")] | None = None
    weights: Annotated[str, Meta(max_length=16, description="bf16, fp8, nvfp4, awq, ...; empty: as the model is.")] = ""
    kv_dtype: Annotated[str, Meta(max_length=16, description="bf16 or fp8; empty: the engine's default.")] = ""
    port: Annotated[int, Meta(ge=1, le=65_535, description="Where it listens.")] = 8000


class SloAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """Whether targets are met, and the most requests in flight at which they are."""

    ttft_met: bool | None
    itl_met: bool | None
    throughput_met: bool | None
    max_concurrency: int
    output_tokens_per_s_there: float
    adjustments: tuple[str, ...]


class LoadCurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """Latency at one request rate, simulated; seconds."""

    offered_per_s: float
    requests_per_s: float
    in_flight: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    is_stable: bool


class InferenceAnswer(Answer, frozen=True, kw_only=True):
    """The best configurations, the engine's command, and latency against load."""

    model: dict[str, Any]
    best: ServingChoice
    options: tuple[ServingChoice, ...]
    quantization: dict[str, Any]
    kv_cache: dict[str, Any]
    speculative_decoding: dict[str, Any]
    engine: dict[str, Any]
    launch_command: str
    slo: SloAnalysis | None
    load_curve: tuple[LoadCurvePoint, ...]
    summary: dict[str, float]
    dropped: tuple[ServingDropped, ...]
    topology: TopologySummary
    second_opinion: SecondOpinion | None = None


class VllmAnswer(Answer, frozen=True, kw_only=True):
    """vLLM's settings, its command, and what to expect."""

    optimization_goal: str
    config: dict[str, Any]
    launch_command: str
    argv: tuple[str, ...]
    vllm_version: str
    expected_performance: dict[str, Any]
    best: ServingChoice
    sla_analysis: SloAnalysis | None
    recommendations: tuple[str, ...]
    topology: TopologySummary
    second_opinion: SecondOpinion | None = None


def command_of(choice: Choice, model: str, context: int, *, port: int = 8000) -> EngineCommand:
    """The engine's command line for a configuration."""
    settings, layout = choice.settings, choice.settings.layout
    weights = settings.weights if settings.weights in ("fp8", "awq", "gptq") else ""
    return engine_command(
        _ENGINES[settings.backend],
        ServingSettings(
            model=model,
            port=port,
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            ep=layout.ep > 1,
            memory_share=settings.memory.utilization or 0.9,
            max_model_len=context,
            max_sequences=settings.memory.max_num_seqs,
            max_batched_tokens=settings.memory.max_num_batched_tokens,
            kv_dtype=settings.kv_dtype or "auto",
            quantisation=weights,
        ),
    )


def analysis_of(
    arch: Architecture, topology: Topology, choice: Choice, workload: Workload, slo: Slo, throughput: float | None
) -> SloAnalysis | None:
    """Which targets are met, and how far the load can grow until they are not."""
    if not (slo.ttft_s or slo.tpot_s or throughput):
        return None
    most, there = largest_load(arch, topology, choice.settings, workload, slo, limit=8_192)
    found = choice.estimate
    met = None if throughput is None else choice.output_tokens_per_s >= throughput
    advice = []
    if slo.tpot_s and found.tpot_s.value > slo.tpot_s:
        advice.append(f"at most {most * choice.replicas} requests in flight, or more GPUs for each engine")
    if slo.ttft_s and found.ttft_s.value > slo.ttft_s:
        advice.append("shorter prompts, prefix caching, smaller chunks or more replicas for the first token")
    if met is False:
        need = -(-(throughput or 0.0) // max(1.0, choice.output_tokens_per_s / choice.gpus))
        advice.append(f"about {need:.0f} GPUs for {throughput:.0f} tokens/s")
    return SloAnalysis(
        ttft_met=found.ttft_s.value <= slo.ttft_s if slo.ttft_s else None,
        itl_met=found.tpot_s.value <= slo.tpot_s if slo.tpot_s else None,
        throughput_met=met,
        max_concurrency=most * choice.replicas,
        output_tokens_per_s_there=there.output_tokens_per_s.value * choice.replicas,
        adjustments=tuple(advice),
    )


def inference(question: ServingQuestion, desk: Desk) -> InferenceAnswer:
    """The search, the chosen configuration in detail, its command and its curve."""
    arch = architecture_for(question, desk)
    topology = topology_for(question, desk)
    workload, slo = workload_of(question), slo_of(question)
    result = search_for(arch, topology, question, workload, slo)
    best = chosen(result, slo, question.throughput_target)
    share = msgspec.structs.replace(workload, concurrency=max(1.0, workload.concurrency / best.replicas))
    context = workload.isl + workload.osl
    command = command_of(best, arch.name, context)
    plain = 2.0 * count(arch).total
    unquantised = _unquantised(arch, topology, best, share)
    return InferenceAnswer(
        model={"name": arch.name, "parameters_billions": count(arch).total / 1e9},
        best=choice_view(best, "chosen"),
        options=views(result, best),
        quantization=_quantization(arch, best, plain, unquantised),
        kv_cache=_kv(best),
        speculative_decoding=_speculation(arch, topology, best, share),
        engine={
            "engine": command.engine,
            "version": command.version,
            "performance": {
                "throughput_tps": best.output_tokens_per_s,
                "latency_ms": 1e3 * best.estimate.e2e_s.value,
                "memory_gb": best.estimate.memory.total_bytes / GB,
            },
            "config": _settings(best),
            "features": ["paged attention", "chunked prefill", "prefix caching"],
            "limitations": list(best.estimate.notes),
            "launch_command": command.text,
            "argv": list(command.argv),
            "files": command.files,
            "notes": list(command.notes),
            "step_parts_s": best.estimate.step_parts_s,
        },
        launch_command=command.text,
        slo=analysis_of(arch, topology, best, share, slo, question.throughput_target),
        load_curve=tuple(
            _curve_point(point) for point in load_curve(arch, topology, best.settings, share, requests=_CURVE_REQUESTS)
        ),
        summary={
            "original_memory_gb": plain / GB,
            "optimized_memory_gb": best.estimate.memory.weights_bytes * best.settings.layout.gpus / GB,
            "memory_reduction_pct": _reduction(best, plain),
            "expected_speedup": best.estimate.requests_per_s / unquantised.requests_per_s if unquantised else 1.0,
        },
        dropped=dropped_views(result),
        topology=topology_summary(topology),
        second_opinion=_second_opinion(arch, topology, best, share, question.config),
    )


def _settings(best: Choice) -> dict[str, Any]:
    layout, memory = best.settings.layout, best.settings.memory
    return {
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.pp,
        "data_parallel_size": layout.dp,
        "max_num_seqs": memory.max_num_seqs,
        "max_num_batched_tokens": memory.max_num_batched_tokens,
        "replicas": best.replicas,
    }


def _second_opinion(
    arch: Architecture, topology: Topology, best: Choice, share: Workload, config: dict[str, Any] | None
) -> SecondOpinion | None:
    """Of one engine at the load it has; None without the package."""
    load = msgspec.structs.replace(share, concurrency=best.estimate.concurrency, request_rate=0.0)
    return second_opinion(arch, topology, best.settings, load, config)


def _reduction(best: Choice, plain: float) -> float:
    """How much smaller the weights are than in 16 bits, per cent."""
    held = best.estimate.memory.weights_bytes * best.settings.layout.tp * best.settings.layout.pp
    return 100 * max(0.0, 1 - held / plain)


def _quantization(arch: Architecture, best: Choice, plain: float, plain_one: ServingEstimate | None) -> dict[str, Any]:
    """The weights' format, and what it does against the weights as they are on the same machine."""
    chosen_by_us = best.settings.weights
    method = chosen_by_us or arch.quantisation or arch.weights_dtype
    held = best.estimate.memory.weights_bytes * best.settings.layout.tp * best.settings.layout.pp
    other = plain_one if chosen_by_us else None
    return {
        "method": method,
        "bits": round(16 * held / plain, 1),
        "memory_reduction_pct": _reduction(best, plain),
        "throughput_change_pct": 100 * (best.estimate.requests_per_s / other.requests_per_s - 1) if other else 0.0,
        "latency_change_pct": 100 * (best.estimate.e2e_s.value / other.e2e_s.value - 1) if other else 0.0,
        "accuracy_impact": "evaluate it against the 16-bit model" if chosen_by_us else "none",
        "config": {"quantization": chosen_by_us} if chosen_by_us else {},
        "requirements": [f"an accelerator with units for {chosen_by_us}"] if chosen_by_us else [],
        "rationale": "the search tried it beside the weights as they are" if chosen_by_us else "as the model is",
    }


def _unquantised(arch: Architecture, topology: Topology, best: Choice, share: Workload) -> ServingEstimate | None:
    """The same engine at the same load with the weights as they are; None where the search left them so or no room."""
    if not best.settings.weights:
        return None
    found = estimate_serving(arch, topology, msgspec.structs.replace(best.settings, weights=""), share)
    return found if found.fits else None


def _kv(best: Choice) -> dict[str, Any]:
    found, memory = best.estimate.kv, best.settings.memory
    return {
        "paged_attention": True,
        "kv_cache_dtype": best.settings.kv_dtype or "auto",
        "block_size": found.block_tokens,
        "blocks": found.blocks,
        "max_num_seqs": memory.max_num_seqs,
        "max_model_len": found.context,
        "max_concurrent_at_context": found.max_sequences * best.settings.layout.dp,
        "memory": {
            "per_token_bytes": found.bytes_per_token,
            "reserved_per_token_bytes": found.reserved_bytes_per_token,
            "total_kv_cache_gb": found.bytes / GB,
        },
        "config": {"gpu_memory_utilization": memory.utilization or 0.9, "block_size": found.block_tokens},
    }


def _speculation(arch: Architecture, topology: Topology, best: Choice, workload: Workload) -> dict[str, Any]:
    """What drafting would do at this load: multi-token prediction where the model has it, else n-grams."""
    kind: Literal["mtp", "ngram"] = "mtp" if arch.mtp_layers else "ngram"
    drafting = Speculative(kind=kind, drafted=1 if kind == "mtp" else 3)
    settings = msgspec.structs.replace(best.settings, speculative=drafting)
    found: ServingEstimate = estimate_serving(arch, topology, settings, workload)
    speedup = best.estimate.tpot_s.value / found.tpot_s.value
    return {
        "enabled": speedup > 1.05,
        "method": kind,
        "draft_model": None,
        "draft_model_params_b": None,
        "drafted_tokens": drafting.drafted,
        "acceptance_rate": acceptance_of(drafting),
        "expected_speedup": speedup,
        "tpot_s": found.tpot_s.value,
        "config": {"method": kind, "num_speculative_tokens": drafting.drafted},
        "trade_offs": ["at the kind's usual acceptance: measure it on your prompts", "pays at small batches"],
    }


def _curve_point(point: LoadPoint) -> LoadCurvePoint:
    return LoadCurvePoint(
        offered_per_s=point.offered_per_s,
        requests_per_s=point.requests_per_s,
        in_flight=point.mean_in_flight,
        ttft_p50=point.ttft_s.p50,
        ttft_p99=point.ttft_s.p99,
        tpot_p50=point.tpot_s.p50,
        tpot_p99=point.tpot_s.p99,
        is_stable=point.is_stable,
    )


def vllm(question: VllmQuestion, desk: Desk) -> VllmAnswer:
    """The search with vLLM, as its own settings."""
    asked = ServingQuestion(
        **{field: getattr(question, field) for field in _SHARED_FIELDS},
        max_output_length=question.max_tokens,
        engine="vllm",
    )
    arch = architecture_for(asked, desk)
    topology = topology_for(asked, desk, gpus=question.gpus or 1)
    workload, slo = workload_of(asked), slo_of(asked)
    result = search_for(arch, topology, asked, workload, slo)
    has_limit = bool(slo.tpot_s or slo.ttft_s)
    goal = "sla" if has_limit else "throughput" if question.throughput_target or question.batch_size > 8 else "latency"
    best = chosen(result, slo, question.throughput_target, goal="" if goal != "latency" else "latency")
    context = workload.isl + workload.osl
    command = command_of(best, arch.name, context, port=question.port)
    share = msgspec.structs.replace(workload, concurrency=max(1.0, workload.concurrency / best.replicas))
    found, layout = best.estimate, best.settings.layout
    return VllmAnswer(
        optimization_goal=goal,
        config={
            "model": arch.name,
            "tensor_parallel_size": layout.tp,
            "pipeline_parallel_size": layout.pp,
            "data_parallel_size": layout.dp,
            "enable_expert_parallel": layout.ep > 1,
            "gpu_memory_utilization": best.settings.memory.utilization or 0.9,
            "max_model_len": context,
            "block_size": found.kv.block_tokens,
            "kv_cache_dtype": best.settings.kv_dtype or "auto",
            "enable_prefix_caching": True,
            "max_num_batched_tokens": best.settings.memory.max_num_batched_tokens,
            "max_num_seqs": best.settings.memory.max_num_seqs,
            "enable_chunked_prefill": True,
            "quantization": best.settings.weights or None,
            "enforce_eager": False,
            "speculative_model": None,
            "num_speculative_tokens": 0,
            "enable_lora": False,
            "max_loras": None,
            "max_lora_rank": None,
            "disable_log_stats": False,
            "replicas": best.replicas,
        },
        launch_command=command.text,
        argv=command.argv,
        vllm_version=command.version,
        expected_performance={
            "throughput_tokens_per_second": best.output_tokens_per_s,
            "time_to_first_token_ms": 1e3 * found.ttft_s.value,
            "inter_token_latency_ms": 1e3 * found.tpot_s.value,
            "max_concurrent_requests": found.kv.max_sequences * layout.dp * best.replicas,
            "memory_efficiency": min(1.0, found.memory.total_bytes / topology.accelerator.visible_bytes),
        },
        best=choice_view(best, goal),
        sla_analysis=analysis_of(arch, topology, best, share, slo, question.throughput_target),
        recommendations=tuple(_advice(best, command)),
        topology=topology_summary(topology),
        second_opinion=_second_opinion(arch, topology, best, share, question.config),
    )


_SHARED_FIELDS = (
    *(field.name for field in msgspec.structs.fields(PlacedQuestion)),
    "batch_size",
    "seq_length",
    "request_rate",
    "prefix_hit",
    "latency_target_ms",
    "ttft_target_ms",
    "throughput_target",
    "weights",
    "kv_dtype",
)


def _advice(best: Choice, command: EngineCommand) -> Iterator[str]:
    yield from command.notes
    if best.replicas > 1:
        yield f"start {best.replicas} engines and spread requests over them"
    if best.settings.weights == "fp8":
        yield "fp8: vLLM quantises 16-bit weights as it loads them; a checkpoint in fp8 loads faster"
    if best.estimate.is_saturated:
        yield "the load is more than the engine can run at once: requests wait"
    yield from best.estimate.notes


_CODES = ("model_not_found", "not_found", "nothing_fits")
ENDPOINTS = (
    Endpoint(
        "inference",
        "inference",
        ServingQuestion,
        InferenceAnswer,
        inference,
        "How an engine would serve a model",
        example=(
            ("model", "llama-3.1-8b"),
            ("gpu", "H100"),
            ("gpus", 1),
            ("batch_size", 32),
            ("latency_target_ms", 100.0),
        ),
        codes=_CODES,
    ),
    Endpoint(
        "vllm",
        "vllm",
        VllmQuestion,
        VllmAnswer,
        vllm,
        "A configuration of vLLM",
        example=(("model", "qwen3-32b"), ("gpu", "H200"), ("gpus", 2), ("throughput_target", 10000.0)),
        codes=_CODES,
    ),
)
