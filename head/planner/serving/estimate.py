"""How an engine serves a load: TTFT, TPOT, throughput, with intervals, parts, memory and the nearest measurements.

Physics first (calibration/serving_step.py), then what measured points nearby say (calibration/serving_near.py), then
the laws that no calibration may break: no token faster than the roofline, and Little's law between everything that is
returned: concurrency = requests_per_s * (TTFT + (output - 1) * TPOT).
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from common.errors import InvalidValue
from head.planner.calibration import serving_near as near
from head.planner.calibration import serving_step as step
from head.planner.calibration.quantity import NearRow, Quantity
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.serving.disaggregated import Disaggregated, transfer_s
from head.planner.serving.engine_step import (
    Backend,
    Device,
    Precision,
    ServingLayout,
    bits_of,
    device_of,
    precision_of,
)
from head.planner.serving.memory import (
    SLOTS_AT_MOST,
    KvCapacity,
    MemoryParts,
    MemorySettings,
    kv_budget_bytes,
    kv_capacity,
    running_limit,
)
from head.planner.serving.speculative import Speculative, acceptance_of, draft_share_of, expected_tokens

TPOT_CONVENTION = "mean time between a request's tokens after the first: (E2E - TTFT) / (output - 1)"
TTFT_CONVENTION = "from sending to the first token, waiting for a place in the batch included"
CALIBRATION = "serving points of vLLM, SGLang and TensorRT-LLM, 2025-08 to 2026-04; 80 % interval from cross-validation"
TOKENS_LIMIT = 10_000_000
SEQUENCES_LIMIT = 1_000_000


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens in and out of a request, and how many requests: `concurrency` kept in flight, or `request_rate` a second.

    prefix_hit: share of the prompt's tokens found in the prefix cache.
    """

    isl: int = 1024
    osl: int = 256
    concurrency: float = 0.0
    request_rate: float = 0.0
    prefix_hit: float = 0.0


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine. Empty strings mean what the model's files and the engine's defaults say."""

    backend: Backend = "vllm"
    version: str = ""
    weights: str = ""  # bf16, fp8, nvfp4, mxfp4, awq, ...
    kv_dtype: str = ""
    layout: ServingLayout = ServingLayout()
    memory: MemorySettings = MemorySettings()
    speculative: Speculative | None = None
    disaggregated: Disaggregated | None = None
    is_offline: bool = False  # everything queued at once, no client waits: maximum throughput


class ServingEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and tokens per second of the whole engine; per-GPU figures divide by all GPUs that serve."""

    ttft_s: Quantity
    tpot_s: Quantity
    e2e_s: Quantity
    output_tokens_per_s: Quantity
    output_tokens_per_s_per_gpu: Quantity
    total_tokens_per_s: float
    requests_per_s: float
    concurrency: float
    running: float
    step_s: float
    step_parts_s: dict[str, float]
    bottleneck: str
    roofline_tpot_s: float
    roofline_share: float
    is_saturated: bool
    fits: bool
    memory: MemoryParts
    kv: KvCapacity
    layout: ServingLayout
    gpus: int
    similarity: float
    notes: tuple[str, ...] = ()


class _Question(msgspec.Struct, frozen=True):
    """What does not change with the load."""

    arch: Architecture
    settings: EngineSettings
    workload: Workload
    device: Device
    precision: Precision
    block: near.Block
    multipliers: tuple[float, ...]
    ttft: tuple[float, ...]
    limit: float  # sequences at once; 0: the weights do not fit and the limit is not known
    constants: step.Constants
    prompt_s: float = 0.0  # an engine's time for one prompt, its groups and stages all at work
    groups: float = 1.0


class _Point(msgspec.Struct, frozen=True):
    """The physics at one load, and its corrected answers."""

    sequences: float
    offered: float
    is_full: bool  # some requests wait for a place
    ttft: float
    tpot: float
    floor: float
    prompt_s: float
    parts: dict[str, float]
    nearness: near.Nearness


def estimate_serving(
    arch: Architecture,
    topology: Topology,
    settings: EngineSettings,
    workload: Workload,
    *,
    has_near: bool = True,
    constants: step.Constants | None = None,
) -> ServingEstimate:
    """One engine (or one decode engine and its prefill share) under a load. Never refuses what it can compute.

    has_near: without the correction by measured neighbours (searches rank by physics, then ask again).
    Raises: InvalidValue for numbers out of range.
    """
    _check(settings, workload)
    question = _question(arch, topology, settings, workload, constants or step.shipped())
    point = _solve(question, has_near=has_near)
    return _answer(question, point)


def _check(settings: EngineSettings, workload: Workload) -> None:
    bad = []
    if not 1 <= workload.isl <= TOKENS_LIMIT:
        bad.append("isl")
    if not 1 <= workload.osl <= TOKENS_LIMIT:
        bad.append("osl")
    if not 0 <= workload.concurrency <= SEQUENCES_LIMIT:
        bad.append("concurrency")
    if not 0 <= workload.request_rate <= SEQUENCES_LIMIT:
        bad.append("request_rate")
    if not 0 <= workload.prefix_hit <= 1:
        bad.append("prefix_hit")
    layout = settings.layout
    if min(layout.tp, layout.pp, layout.dp, layout.ep) < 1 or layout.gpus > 65536:
        bad.append("layout")
    elif layout.ep > layout.tp * layout.dp or (layout.tp * layout.dp) % layout.ep:
        bad.append("layout.ep")
    if bad:
        raise InvalidValue(
            f"out of range: {', '.join(bad)}", fields=bad, hint="ep divides tp*dp; token counts are >= 1"
        )


def default_kv_dtype(backend: Backend, weights: str, arch: Architecture) -> str:
    """What engines keep keys and values in by default: 16 bits, but TensorRT-LLM follows 8- and 4-bit checkpoints."""
    if arch.kv_dtype:
        return arch.kv_dtype
    is_narrow = bits_of(arch, weights) < 9 and precision_of(arch, weights).product in ("fp8", "fp8_block", "nvfp4")
    return "fp8" if backend == "trtllm" and is_narrow else "bf16"


def _question(
    arch: Architecture, topology: Topology, settings: EngineSettings, workload: Workload, constants: step.Constants
) -> _Question:
    device = device_of(topology)
    kv_dtype = settings.kv_dtype or default_kv_dtype(settings.backend, settings.weights, arch)
    precision = precision_of(arch, settings.weights, kv_dtype, device)
    plan = settings.disaggregated
    mode = "offline" if settings.is_offline else "agg" if plan is None else "disagg" if plan.is_known else "disagg?"
    format_name = step.format_of(precision)
    block = near.Block(
        dimensions=near.dimensions_of(arch),
        backend=settings.backend,
        version=settings.version,
        device=topology.accelerator.name,
        generation=device.generation,
        format=format_name,
        mode=mode,
        degrees=near.degrees_of(settings.layout),
    )
    limit = running_limit(
        arch,
        settings.layout,
        precision,
        settings.backend,
        settings.memory,
        visible_bytes=device.memory_bytes,
        prompt=workload.isl,
        output=workload.osl,
    )
    family = "agg" if plan is None else mode
    question = _Question(
        arch=arch,
        settings=settings,
        workload=workload,
        device=device,
        precision=precision,
        block=block,
        multipliers=step.factors_of(constants.multipliers, format_name, device.generation, mode),
        ttft=constants.ttft.get(f"{family}/{settings.backend}") or constants.ttft[family],
        limit=limit if limit > 1.0 else 0.0,
        constants=constants,
    )
    return _with_prompt(question)


def _point(q: _Question, offered: float, *, has_near: bool, correction: near.Nearness | None = None) -> _Point:
    """The engine with `offered` requests in flight (of the whole deployment)."""
    settings, workload = q.settings, q.workload
    plan = settings.disaggregated
    engines = max(1, plan.decode_workers) if plan else 1
    mine = max(offered / engines, 1.0)
    limit = q.limit or mine
    slots = float(settings.memory.max_num_seqs * settings.layout.dp) or mine
    sequences = max(1.0, min(mine, limit, slots))
    speculative = settings.speculative
    drafted = speculative.drafted if speculative else 0
    gain = expected_tokens(acceptance_of(speculative), drafted) if speculative else 1.0
    load = step.Load(
        sequences=sequences,
        prompt=workload.isl,
        output=workload.osl,
        computed_prompt=max(1.0, workload.isl * (1 - workload.prefix_hit)),
        chunk=float(settings.memory.max_num_batched_tokens),
        has_prefill=plan is None,
        query_tokens=1.0 + drafted,
        tokens_per_step=gain,
    )
    values = step.element_values(q.arch, settings.layout, q.precision, q.device, load)
    parts = step.combine(values, q.multipliers)
    if speculative:
        whole = sum(value for name, value in parts.items() if not step.is_prefill(name))
        parts["drafting"] = whole * drafted * draft_share_of(speculative, q.arch)
    decode_s = sum(value for name, value in parts.items() if not step.is_prefill(name))
    floor = step.floor_s(values)
    prompt_s = q.prompt_s
    prompts = max(1.0, offered / max(1, plan.prefill_workers)) if plan else sequences
    found = correction
    if found is None and has_near:
        found = near.nearness(q.block, sequences, workload.isl, workload.osl)
    found = found or near.Nearness(tpot=1.0, ttft=1.0, similarity=0.0, near=())
    tpot = max(sum(parts.values()) * found.tpot, floor)
    waits = step.ttft_parts(
        prompt_s=prompt_s,
        decode_s=decode_s,
        output=workload.osl,
        sequences=prompts,
        prompt=workload.isl * (1 - workload.prefix_hit),
        groups=q.groups,
        offered=prompts if plan else max(offered, sequences),
    )
    ttft = sum(wait * factor for wait, factor in zip(waits, q.ttft, strict=True)) * found.ttft
    if plan:
        ttft += transfer_s(q.arch, plan, settings.layout, q.precision, q.device, workload.isl)
    # Little: what is in flight beyond the running sequences waits for places that free up at the engine's own rate.
    ttft = max(ttft, (mine / sequences - 1.0) * (workload.osl - 1) * tpot, prompt_s)
    if plan and plan.is_known:  # the prefill engines can finish no more than they can compute
        ttft = max(ttft, offered * prompt_s / max(1, plan.prefill_workers) - (workload.osl - 1) * tpot)
    return _Point(sequences, offered, mine > min(limit, slots) * 1.0001, ttft, tpot, floor, prompt_s, parts, found)


def _with_prompt(q: _Question) -> _Question:
    """The question with the time of one prompt on the engine that prefills."""
    plan = q.settings.disaggregated
    layout = plan.prefill_layout if plan else q.settings.layout
    alone = step.Load(
        sequences=1,
        prompt=q.workload.isl,
        output=1,
        computed_prompt=max(1.0, q.workload.isl * (1 - q.workload.prefix_hit)),
        chunk=float(q.settings.memory.max_num_batched_tokens),
        has_decode=False,
    )
    values = step.element_values(q.arch, layout, q.precision, q.device, alone)
    prompt_s = sum(step.combine(values, q.multipliers).values())
    return msgspec.structs.replace(q, prompt_s=prompt_s, groups=float(layout.dp * layout.pp))


def _solve(q: _Question, *, has_near: bool) -> _Point:
    """The load's point: at a concurrency, or at the concurrency that a request rate brings about."""
    workload = q.workload
    slots = float((q.settings.memory.max_num_seqs or SLOTS_AT_MOST) * q.settings.layout.dp)
    engines = max(1, q.settings.disaggregated.decode_workers) if q.settings.disaggregated else 1
    most = min(q.limit or slots, slots) * engines
    if workload.request_rate <= 0:
        offered = workload.concurrency or (most if q.settings.is_offline else 1.0)
        return _point(q, offered, has_near=has_near)
    most = max(most, 1.0)
    full = _point(q, most, has_near=has_near)
    if workload.request_rate >= _rate(q, full):
        return full
    low, high = 0.0, most
    point = full
    for _ in range(9):
        middle = math.sqrt(max(low, 0.25) * high) if low > 0 or high > 1 else high / 2
        point = _point(q, middle, has_near=has_near, correction=full.nearness)
        if _rate(q, point) < workload.request_rate:
            low = middle
        else:
            high = middle
    # Below one request in flight the rate itself sets the mean number in flight.
    in_flight = workload.request_rate * (point.ttft + (workload.osl - 1) * point.tpot)
    if in_flight < 1.0:
        lone = _point(q, 1.0, has_near=has_near)
        busy = workload.request_rate * (lone.ttft + (workload.osl - 1) * lone.tpot)
        return msgspec.structs.replace(lone, offered=busy)
    solved = _point(q, in_flight, has_near=has_near)
    in_flight = workload.request_rate * (solved.ttft + (workload.osl - 1) * solved.tpot)
    return msgspec.structs.replace(solved, offered=in_flight)


def _rate(q: _Question, point: _Point) -> float:
    return point.offered / (point.ttft + (q.workload.osl - 1) * point.tpot)


_GROUPS = {
    "dense_memory": "weights",
    "dense_flop": "matrix products",
    "expert_memory": "expert weights",
    "expert_flop": "expert products",
    "kv_memory": "kv cache",
    "attention_flop": "attention",
    "state_memory": "recurrent states",
    "elementwise": "elementwise",
    "routing": "expert routing",
    "reduce_latency": "all-reduce latency",
    "reduce_bytes": "all-reduce bytes",
    "exchange_latency": "all-to-all latency",
    "exchange_bytes": "all-to-all bytes",
    "kernels": "kernel launches",
    "expert_kernels": "kernel launches",
    "step": "scheduler",
    "sequence": "scheduler",
    "drafting": "drafting",
}


def _answer(q: _Question, point: _Point) -> ServingEstimate:
    workload, settings = q.workload, q.settings
    raw = sum(point.parts.values())
    scale = point.tpot / raw if raw > 0 else 1.0
    grouped: dict[str, float] = {}
    for name, seconds in point.parts.items():
        label = "prefill" if step.is_prefill(name) else _GROUPS[name]
        grouped[label] = grouped.get(label, 0.0) + seconds * scale
    steps = workload.osl - 1
    tpot = _quantity(q, "tpot", point.tpot, "s", TPOT_CONVENTION, point.nearness, least=point.floor)
    ttft = _quantity(q, "ttft", point.ttft, "s", TTFT_CONVENTION, point.nearness)
    e2e = point.ttft + steps * point.tpot
    e2e_low, e2e_high = ttft.low + steps * tpot.low, ttft.high + steps * tpot.high
    rate = point.offered / e2e
    gpus = settings.disaggregated.gpus(settings.layout) if settings.disaggregated else settings.layout.gpus
    tokens = rate * workload.osl
    bounds = (point.offered / e2e_high * workload.osl, point.offered / e2e_low * workload.osl)
    budget, memory = kv_budget_bytes(
        q.arch, settings.layout, q.precision, settings.backend, settings.memory, visible_bytes=q.device.memory_bytes
    )
    context = settings.memory.max_model_len or workload.isl + workload.osl
    capacity = kv_capacity(
        q.arch, settings.layout, q.precision, budget, context=context, block_tokens=settings.memory.block_tokens
    )
    engines = max(1, settings.disaggregated.decode_workers) if settings.disaggregated else 1
    is_saturated = point.is_full
    if workload.request_rate > 0:
        is_saturated = is_saturated or rate < workload.request_rate * 0.98
    speed = (
        expected_tokens(acceptance_of(settings.speculative), settings.speculative.drafted)
        if settings.speculative
        else 1.0
    )

    def throughput(value: float, low: float, high: float, unit: str) -> Quantity:
        return Quantity(value=value, unit=unit, low=low, high=high, convention="output tokens", calibration=CALIBRATION)

    return ServingEstimate(
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=Quantity(value=e2e, unit="s", low=e2e_low, high=e2e_high, calibration=CALIBRATION),
        output_tokens_per_s=throughput(tokens, *bounds, "tokens/s"),
        output_tokens_per_s_per_gpu=throughput(tokens / gpus, bounds[0] / gpus, bounds[1] / gpus, "tokens/s/GPU"),
        total_tokens_per_s=rate * (workload.osl + workload.isl),
        requests_per_s=rate,
        concurrency=point.offered,
        running=min(point.sequences * engines, point.offered),
        step_s=point.tpot * speed,
        step_parts_s=dict(sorted(grouped.items(), key=lambda item: -item[1])),
        bottleneck=max(grouped, key=lambda label: grouped[label]),
        roofline_tpot_s=point.floor,
        roofline_share=min(1.0, point.floor / point.tpot),
        is_saturated=is_saturated,
        fits=q.limit > 0 and budget > 0,
        memory=memory,
        kv=capacity,
        layout=settings.layout,
        gpus=gpus,
        similarity=round(point.nearness.similarity, 4),
        notes=_notes(q, point, budget, is_saturated),
    )


def _quantity(
    q: _Question,
    name: str,
    value: float,
    unit: str,
    convention: str,
    found: near.Nearness,
    *,
    least: float = 0.0,
) -> Quantity:
    low, high = step.interval(q.constants.spread, name, q.block.mode, found.similarity)
    rows: tuple[NearRow, ...] = near.near_rows(found, name)
    return Quantity(
        value=value,
        unit=unit,
        low=min(value, max(least, value * math.exp(low))),
        high=value * math.exp(high),
        convention=convention,
        calibration=CALIBRATION,
        near=rows,
    )


def _notes(q: _Question, point: _Point, budget: float, is_saturated: bool) -> tuple[str, ...]:
    notes = []
    if budget <= 0 or q.limit <= 0:
        notes.append("the weights leave no room for a cache: latencies are those of an engine that had it")
    elif is_saturated:
        notes.append(f"more is offered than runs at once ({point.sequences:.0f}): requests wait")
    if q.settings.backend in ("llamacpp", "other"):
        notes.append("no measured point of this engine: physics with the constants of others, wide interval")
    elif point.nearness.similarity < 0.2:
        notes.append("no measured point is near: wide interval")
    if q.settings.disaggregated and not q.settings.disaggregated.is_known:
        notes.append("numbers of prefill and decode engines not given: one of each")
    if q.settings.speculative:
        notes.append("speculative decoding by assumed acceptance; measured points may or may not have used it")
    if q.settings.is_offline:
        notes.append("offline: TTFT is not meaningful, throughput is")
    return tuple(notes)


def as_json(estimate: ServingEstimate) -> dict[str, Any]:
    """Plain values; every number is finite."""
    found: dict[str, Any] = msgspec.to_builtins(estimate)
    return found
