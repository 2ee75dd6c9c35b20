"""Where an engine's memory goes on the most loaded rank, and how many tokens its KV cache then holds.

Weights come from the dimensions, element by element; keys and values likewise. What an engine keeps beside them
(CUDA context, communicators, captured graphs, the profiled activation peak) is modelled with the constants below,
each with its source. More memory never makes a fit a misfit: every part but the cache itself is independent of it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import msgspec

from head.planner.model.architecture import Architecture, Attention
from head.planner.model.kv_cache import index_bytes_per_token, kept_entries, layer_bytes_per_token, layer_state_bytes
from head.planner.model.parameters import layer_parameters
from head.planner.model.weights import weight_bytes
from head.planner.serving.engine_step import Backend, Precision, ServingLayout

GIB = 1 << 30

# Bytes that the CUDA context and libraries hold outside the framework's allocator: vLLM's "non-torch" of one GPU
# was 0.01-0.3 GiB on T4, L40S, 3090 and 4090 and 1.79 GiB on an H100 (NVLS buffers); with NCCL on H100 3.58.
# Source: vLLM start-up logs in public issues (truth/inference.json), planner notes 2.4.
CONTEXT_BYTES = 0.3 * GIB
COMMUNICATOR_BYTES = 0.4 * GIB
# A captured decode graph keeps its private pool; vLLM's logs say 0.2-0.7 GiB for its default 67 sizes.
GRAPH_BYTES_PER_LAYER = 8 * (1 << 20)
# Widths of temporary tensors alive at once in one layer, in units of 2-byte elements a token.
ACTIVATION_COPIES = 4.0
# Sequences of one attention group that engines are set to at most; offline tables fit best with it (1024: 9.0 %
# error, 2048: 8.1 %, 4096: 7.5 %, cross-validated).
SLOTS_AT_MOST = 4096
USUAL_SEQUENCES = 256  # sampled at once in the profiling run when nothing is set
LOGITS_BYTES = 6.0  # a 16-bit and a 32-bit copy for each vocabulary entry of each sampled sequence


class MemoryParts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the most loaded rank. `total_bytes` is the sum of the others."""

    weights_bytes: float
    activation_bytes: float
    graphs_bytes: float
    context_bytes: float
    kv_bytes: float
    state_bytes: float
    total_bytes: float


class KvCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What is left for keys and values, and for whom it is enough."""

    bytes: float
    blocks: int
    block_tokens: int
    tokens: int
    bytes_per_token: float
    reserved_bytes_per_token: float
    max_sequences: float  # of `context` tokens at once, per attention group
    context: int


@lru_cache(maxsize=4096)
def weights_bytes(arch: Architecture, layout: ServingLayout, precision: Precision) -> float:
    """Bytes of weights on the most loaded rank: the fullest stage, its share of each matrix and of the experts."""
    found = weight_bytes(arch, dtype=precision.name, tp=layout.tp, pp=layout.pp)
    experts = found.routed_experts * layout.tp / (max(1, layout.ep) * layout.expert_tp)
    return found.per_rank - found.routed_experts + experts


def kv_bytes_per_token(arch: Architecture, layout: ServingLayout, precision: Precision) -> float:
    """Bytes that one token reserves on one rank with pages in every attention layer (windows count as full)."""
    total = 0.0
    for group in arch.groups:
        each = layer_bytes_per_token(group.attention, size=precision.kv_bytes, tp=layout.tp)
        total += group.count * (each + index_bytes_per_token(group.attention))
    return total * _stage_share(arch, layout)


def kv_bytes_of_sequence(
    arch: Architecture, layout: ServingLayout, precision: Precision, context: float, *, has_window_pages: bool = True
) -> float:
    """Bytes of one sequence of `context` tokens on one rank, the recurrent states included.

    has_window_pages: the engine frees what left a window; otherwise every layer reserves the whole context.
    """
    total = 0.0
    for group in arch.groups:
        a = group.attention
        kept = kept_entries(a, context) if has_window_pages else kept_entries_of_all(a, context)
        each = layer_bytes_per_token(a, size=precision.kv_bytes, tp=layout.tp) * kept
        each += index_bytes_per_token(a) * context / (a.compress_ratio or 1)
        total += group.count * (each + layer_state_bytes(a, tp=layout.tp))
    return total * _stage_share(arch, layout)


def kept_entries_of_all(attention: Attention, context: float) -> float:
    """Entries that an engine with one page size for all layers reserves."""
    return context if attention.kind in ("sliding", "chunked") else kept_entries(attention, context)


def _stage_share(arch: Architecture, layout: ServingLayout) -> float:
    return math.ceil(arch.layers / layout.pp) / max(1, arch.layers)


def activation_peak_bytes(arch: Architecture, layout: ServingLayout, *, batched_tokens: int, sequences: int) -> float:
    """Peak of temporary tensors in the profiling run with `batched_tokens` tokens and `sequences` samples.

    The widest layer's tensors of one rank: residual and normed copies of the hidden width, the attention's inputs and
    output, the feed-forward's; of experts each token's `active` rows before and after, which fused kernels bound to
    32,768 tokens at a time. Logits of all sampled sequences are alive at another moment: the larger peak counts.
    """
    tp = layout.tp
    widest = 0.0
    for group in arch.groups:
        a, ff = group.attention, group.feed_forward
        value = a.value_dim or a.head_dim
        mixer = (2 * a.heads * a.head_dim + a.kv_heads * (a.head_dim + value)) / tp
        gates = 3 if ff.is_gated else 2
        if ff.kind == "moe":
            share = layout.expert_tp
            inner = ff.active * (gates * ff.width / share + arch.hidden) / max(1, layout.ep)
        else:
            inner = gates * ff.width / tp
        widest = max(widest, ACTIVATION_COPIES * arch.hidden + max(mixer, inner))
    layer = 2.0 * batched_tokens * widest
    logits = LOGITS_BYTES * sequences * arch.vocab if arch.has_head else 0.0
    return max(layer, logits + 2.0 * batched_tokens * arch.hidden * 2)


def overhead_bytes(layout: ServingLayout, *, is_large_gpu: bool) -> float:
    """Context, libraries and communicators. is_large_gpu: a data-centre part with NVLink switches."""
    base = CONTEXT_BYTES + (1.5 * GIB if is_large_gpu else 0.0)
    groups = (layout.tp > 1) + (layout.pp > 1) + (layout.dp > 1)
    return base + groups * COMMUNICATOR_BYTES * (3.0 if is_large_gpu else 0.5)


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What engines let one choose. `utilization`: vLLM's gpu_memory_utilization, SGLang's mem_fraction_static,
    TensorRT-LLM's free_gpu_memory_fraction; 0: the engine's default. `max_num_seqs`, of one attention group; 0: what
    the load asks for."""

    utilization: float = 0.0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 8192
    max_model_len: int = 0  # tokens; 0: what the workload needs
    block_tokens: int = 16
    has_cuda_graphs: bool = True


_DEFAULT_UTILIZATION = {"vllm": 0.9, "sglang": 0.88, "trtllm": 0.9, "llamacpp": 1.0, "other": 0.9}


def kv_budget_bytes(
    arch: Architecture,
    layout: ServingLayout,
    precision: Precision,
    backend: Backend,
    settings: MemorySettings,
    *,
    visible_bytes: float,
) -> tuple[float, MemoryParts]:
    """Bytes left for keys and values by the engine's own rule, and the parts beside them.

    vLLM: utilization x visible - weights - activation peak - context (graphs come on top of the utilization).
    SGLang: utilization x visible - weights; activations and graphs live in the rest.
    TensorRT-LLM: utilization x what is free after loading and a profiling run. llama.cpp: whatever is left.
    Can be negative: then the weights do not fit.
    """
    utilization = settings.utilization or _DEFAULT_UTILIZATION[backend]
    weights = weights_bytes(arch, layout, precision)
    peak = activation_peak_bytes(
        arch, layout, batched_tokens=settings.max_num_batched_tokens, sequences=settings.max_num_seqs or USUAL_SEQUENCES
    )
    graphs = GRAPH_BYTES_PER_LAYER * arch.layers / layout.pp if settings.has_cuda_graphs else 0.0
    context = overhead_bytes(layout, is_large_gpu=visible_bytes > 70 * GIB)
    if backend == "sglang":
        budget = utilization * visible_bytes - weights - context
    elif backend == "trtllm":
        budget = utilization * (visible_bytes - weights - peak - context)
    elif backend == "llamacpp":
        budget = utilization * visible_bytes - weights - peak - context
    else:
        budget = utilization * visible_bytes - weights - peak - context
    kv = max(budget, 0.0)
    parts = MemoryParts(
        weights_bytes=weights,
        activation_bytes=peak,
        graphs_bytes=graphs,
        context_bytes=context,
        kv_bytes=kv,
        state_bytes=0.0,
        total_bytes=weights + peak + graphs + context + kv,
    )
    return budget, parts


def kv_capacity(
    arch: Architecture,
    layout: ServingLayout,
    precision: Precision,
    budget_bytes: float,
    *,
    context: int,
    block_tokens: int = 16,
    has_window_pages: bool = True,
) -> KvCapacity:
    """Blocks and concurrency that `budget_bytes` give on one rank for sequences of `context` tokens."""
    reserved = kv_bytes_per_token(arch, layout, precision)
    sequence = kv_bytes_of_sequence(arch, layout, precision, context, has_window_pages=has_window_pages)
    blocks = max(0, int(budget_bytes // (block_tokens * reserved))) if reserved else 0
    return KvCapacity(
        bytes=max(0.0, budget_bytes),
        blocks=blocks,
        block_tokens=block_tokens,
        tokens=blocks * block_tokens,
        bytes_per_token=sequence / max(1, context),
        reserved_bytes_per_token=reserved,
        max_sequences=max(0.0, budget_bytes) / sequence if sequence else 0.0,
        context=context,
    )


class LlamaCppBuffers(msgspec.Struct, frozen=True, kw_only=True):
    """llama.cpp's buffers for `gpu_layers` layers on the GPU (-ngl), bytes."""

    gpu_weights_bytes: float
    host_weights_bytes: float
    gpu_kv_bytes: float
    host_kv_bytes: float
    compute_bytes: float
    gpu_total_bytes: float


KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
# Bits for each value of ggml's cache types: 32-value blocks with their scales.
_GGML_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}


def ggml_kv_bits(kind: str) -> float:
    """Bits for each element of a llama.cpp cache type (--cache-type-k and -v)."""
    return _GGML_BITS.get(kind, 4.5 if kind == "iq4_nl" else 16.0)


def llama_cpp_buffers(
    arch: Architecture,
    *,
    weight_bits: float,
    context: int,
    slots: int = 1,
    gpu_layers: int = 999,
    key_type: str = "f16",
    value_type: str = "f16",
    micro_batch: int = 512,
) -> LlamaCppBuffers:
    """Buffers of llama-server: the cache is allocated for `context` tokens in all (all slots share them).

    The last `gpu_layers` layers go to the GPU, the output head when there is room for one more. The compute buffer
    holds a micro-batch's widest tensors and its logits in fp32.
    """
    offloaded = min(gpu_layers, arch.layers)
    share = offloaded / max(1, arch.layers)
    layers = 0.0
    kv = 0.0
    for group in arch.groups:
        a = group.attention
        layers += group.count * layer_parameters(arch, group).total * weight_bits / 8
        both = layer_bytes_per_token(a, size=1.0)
        is_mla = a.kind in ("mla", "sparse_mla")
        bits = ggml_kv_bits(key_type) if is_mla else (ggml_kv_bits(key_type) + ggml_kv_bits(value_type)) / 2
        kv += group.count * (both * bits / 8 * context + layer_state_bytes(a) * slots)
    table = arch.vocab * arch.hidden * weight_bits / 8
    has_head_on_gpu = gpu_layers > arch.layers
    gpu_weights = layers * share + (table if has_head_on_gpu else 0.0)
    host_weights = layers * (1 - share) + (0.0 if arch.is_tied and has_head_on_gpu else table)
    host_weights += 0.0 if has_head_on_gpu or arch.is_tied else table
    widest = max(
        2 * g.attention.heads * g.attention.head_dim + 3 * max(g.feed_forward.width, g.feed_forward.shared_width)
        for g in arch.groups
    )
    compute = 4.0 * micro_batch * (arch.vocab * (1 if has_head_on_gpu else 0) + widest + 4 * arch.hidden)
    gpu_kv = kv * share
    return LlamaCppBuffers(
        gpu_weights_bytes=gpu_weights,
        host_weights_bytes=host_weights,
        gpu_kv_bytes=gpu_kv,
        host_kv_bytes=kv - gpu_kv,
        compute_bytes=compute,
        gpu_total_bytes=gpu_weights + gpu_kv + compute,
    )


def running_limit(
    arch: Architecture,
    layout: ServingLayout,
    precision: Precision,
    backend: Backend,
    settings: MemorySettings,
    *,
    visible_bytes: float,
    prompt: float,
    output: float,
) -> float:
    """Sequences that an engine's cache can run at once, all attention groups together; at least one.

    TensorRT-LLM reserves a request's whole length, vLLM and SGLang pages as they are needed: on average over a
    sequence's life half of the output is there, and a margin keeps preemptions rare (three quarters is counted).
    """
    budget, _ = kv_budget_bytes(arch, layout, precision, backend, settings, visible_bytes=visible_bytes)
    length = prompt + output * (1.0 if backend == "trtllm" else 0.75)
    each = kv_bytes_of_sequence(arch, layout, precision, length)
    if each <= 0:
        return float("1e9")
    return max(1.0, max(budget, 0.0) / each * layout.dp)
