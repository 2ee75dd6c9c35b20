"""What one engine step moves and computes on one rank, operator by operator.

Nothing here is fitted and nothing is slower than physics: each part is an amount of work (bytes, FLOPs, messages,
kernels) on the most loaded rank, turned into seconds by the accelerator's data-sheet rates. calibration/serving_step.py
says how far real engines stay from these rates. Weights are read once per step; of the experts only those that some
token of the batch chose; keys and values of every running sequence.

Source of the closed forms: planner notes 2.1, 2.3 and 2.7; MLA in its absorbed form (DeepSeek-V2, section 2.1.2).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import msgspec

from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.dtypes import bytes_per_element
from head.planner.model.kv_cache import index_bytes_per_token, kept_entries, layer_bytes_per_token
from head.planner.model.parameters import layer_parameters
from head.planner.model.weights import storage_of

Backend = Literal["vllm", "sglang", "trtllm", "llamacpp", "other"]

# Formats whose products run on units of their own; all others below 16 bits are widened before they are multiplied.
_PRODUCTS = {
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "fp8_per_tensor": "fp8",
    "fbgemm_fp8": "fp8",
    "modelopt": "fp8",
    "mxfp8": "fp8",
    "compressed-tensors": "fp8",
    "smoothquant": "fp8",
    "w8a8": "fp8",
    "int8": "fp8",
    "nvfp4": "nvfp4",
    "fp4": "nvfp4",
    "w4a4": "nvfp4",
    "mxfp4": "mxfp4",
    "quark": "mxfp4",
}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What a step needs of one accelerator and the links to its peers. Rates per second, all dense, one direction."""

    name: str
    memory_bytes: float
    memory_bw: float
    bf16_flops: float
    fp8_flops: float = 0.0  # 0: computed as bf16
    fp4_flops: float = 0.0  # 0: computed as fp8
    link_bw: float = 25e9  # to a peer inside the scale-up domain
    link_domain: int = 8
    nic_bw: float = 25e9
    generation: str = "other"

    def flops(self, kind: str) -> float:
        """Peak rate of matrix products whose operands are of `kind`."""
        if kind in ("nvfp4", "fp4", "mxfp4") and self.fp4_flops > 0:
            return self.fp4_flops
        if kind in ("nvfp4", "fp4", "mxfp4", "fp8", "fp8_block", "w8a8", "int8") and self.fp8_flops > 0:
            return self.fp8_flops
        return self.bf16_flops


def device_of(topology: Topology) -> Device:
    """The accelerator and links of `topology` as a step sees them."""
    card = topology.accelerator
    peaks = card.peak_flops_by_precision
    has_scaleup = topology.scaleup_gpus > 1 and topology.scaleup_bytes_per_s > 0
    return Device(
        name=card.name,
        memory_bytes=float(card.visible_bytes),
        memory_bw=card.memory_bytes_per_s,
        bf16_flops=peaks.get("bf16") or peaks.get("fp16") or max(peaks.values()),
        fp8_flops=peaks.get("fp8", 0.0),
        fp4_flops=peaks.get("fp4", 0.0),
        link_bw=topology.scaleup_bytes_per_s if has_scaleup else (topology.pcie_bytes_per_s or 16e9),
        link_domain=topology.scaleup_gpus if has_scaleup else max(1, topology.gpus_per_node),
        nic_bw=topology.nic_bytes_per_s or 1.25e9,
        generation=card.generation or "other",
    )


class ServingLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one engine is spread: `dp` attention groups of `tp` ranks, `pp` stages, experts over `ep` of tp*dp ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of one engine."""
        return self.tp * self.pp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert's weights."""
        return max(1, self.tp * self.dp // max(1, self.ep))


class Precision(msgspec.Struct, frozen=True, kw_only=True):
    """How each part is stored (bits for each weight, scales included) and as what it is multiplied."""

    name: str = "bf16"
    product: str = "bf16"  # of parts stored in fewer than 16 bits: bf16, fp8, fp8_block, nvfp4, mxfp4
    mixer_bits: float = 16.0
    dense_bits: float = 16.0
    expert_bits: float = 16.0
    head_bits: float = 16.0
    kv_bytes: float = 2.0

    def product_of(self, bits: float) -> str:
        """What a part of so many bits is multiplied as."""
        return self.product if bits < 16 else "bf16"


class StepWork(msgspec.Struct, frozen=True, kw_only=True):
    """One step on the most loaded rank at data-sheet rates, seconds; and counts of what has a price for each time.

    *_memory_s and *_flop_s of one operator overlap: the longer one bounds it. all stages of a pipeline are summed.
    """

    dense_memory_s: float
    dense_flop_s: float
    expert_memory_s: float
    expert_flop_s: float
    kv_memory_s: float
    attention_flop_s: float
    state_memory_s: float
    elementwise_s: float
    routing_s: float
    reduce_s: float
    reduces: float
    exchange_s: float
    exchanges: float
    layers: float
    kernels: float
    expert_kernels: float
    sequences: float  # of one attention group


def precision_of(arch: Architecture, weights: str = "", kv: str = "", device: Device | None = None) -> Precision:
    """Storage and products of a checkpoint whose format is `weights` (empty: the architecture's own).

    kv: of keys and values; empty: 16 bits. Four-bit formats run as such where the device has units for them, else they
    are widened to 16 bits. A checkpoint that is mxfp4 by itself stays so whatever narrow format is asked for.
    Raises: InvalidValue for unknown formats.
    """
    if arch.quantisation == "mxfp4" and weights not in ("bf16", "fp16", "fp32"):
        weights = "mxfp4"
    storage = storage_of(arch, weights)
    product = _PRODUCTS.get(storage.name, "bf16")
    if product in ("nvfp4", "mxfp4") and device is not None and device.fp4_flops <= 0:
        product = "bf16"
    return Precision(
        name=storage.name,
        product=product,
        mixer_bits=8 * storage.attention,
        dense_bits=8 * storage.dense,
        expert_bits=8 * storage.experts,
        head_bits=8 * storage.head,
        kv_bytes=bytes_per_element(kv) if kv else 2.0,
    )


def bits_of(arch: Architecture, weights: str) -> float:
    """Bits for each weight of most matrices in the format."""
    storage = storage_of(arch, weights)
    return 8 * (storage.experts if arch.is_moe else storage.dense)


def experts_touched(experts: float, active: float, tokens: float) -> float:
    """Expected number of experts that at least one of `tokens` chooses, of `experts`, `active` each."""
    if experts <= 0 or tokens <= 0:
        return 0.0
    return experts * -math.expm1(tokens * math.log1p(-min(active / experts, 1 - 1e-12)))


def layer_weights(arch: Architecture, group: LayerGroup) -> tuple[float, float, float]:
    """Elements of one layer: the token mixer; what every token uses of the feed-forward part; one routed expert."""
    whole = layer_parameters(arch, group)
    shared = whole.router + whole.shared_experts + whole.dense_feed_forward
    each = whole.routed_experts / group.feed_forward.experts if group.feed_forward.experts else 0.0
    return float(whole.attention), float(shared), each


def mixer_kernels(attention: Attention) -> float:
    """Kernels that engines launch for one layer's token mixer, norm and cache write included.

    Counted from the operators: a plain head needs qkv, rope and write, attention, output, norms; MLA adds the two
    down-projections and their norms and the two absorbed products; an indexer projections, rope, scores, top-k.
    """
    kernels = {"full": 6, "sliding": 6, "chunked": 6, "mla": 11, "sparse_mla": 20, "linear": 9, "mamba": 9, "none": 0}
    kernels["compressed"] = 20
    return float(kernels[attention.kind] + (2 if attention.qk_norm != "none" else 0))


def feed_forward_kernels(ff: FeedForward) -> float:
    """Kernels of one layer's feed-forward part; experts add routing, sorting and combining."""
    if ff.kind == "moe":
        return 9.0 + (3.0 if ff.shared_width else 0.0)
    return 4.0 if ff.kind == "dense" else 0.0


class LayerWork(msgspec.Struct, frozen=True):
    """Sums over all layers of one rank that do not depend on the batch; the batch-dependent part is linear in them."""

    mixer_bytes: float
    mixer_flops: float  # for each token, on one rank
    dense_bytes: float
    dense_flops: float
    head_bytes: float
    head_flops: float
    experts: tuple[tuple[float, float, float, float], ...]  # layers, experts a rank, active share, elements on a rank
    attention: tuple[tuple[float, Attention, float, float], ...]  # layers, mixer, FLOPs a pair in decode and prefill
    state_bytes: float
    layers: float
    expert_layers: float
    kernels: float
    expert_kernels: float
    routed_bytes: float  # for each token of the engine: permuted inputs, inner activations, combined outputs
    hidden: float
    active: float


@lru_cache(maxsize=4096)
def layer_work(arch: Architecture, layout: ServingLayout, precision: Precision) -> LayerWork:
    """The batch-independent sums of `arch` on one rank of `layout`; FLOPs are weighted for `step_work`."""
    tp = layout.tp
    mixer = dense = state = kernels = expert_kernels = routed = 0.0
    experts = []
    attention = []
    for group in arch.groups:
        of_mixer, of_all, each = layer_weights(arch, group)
        ff = group.feed_forward
        mixer += group.count * of_mixer / tp
        dense += group.count * of_all / tp
        kernels += group.count * mixer_kernels(group.attention)
        if ff.kind == "moe":
            expert_kernels += group.count * feed_forward_kernels(ff)
            local = ff.experts / max(1, layout.ep)
            rows = group.count * ff.active / max(1, layout.ep)
            routed += rows * (4 * (ff.latent or arch.hidden) + 4 * ff.width / layout.expert_tp) * 2.0
            experts.append((float(group.count), local, ff.active / ff.experts, each / layout.expert_tp))
        else:
            kernels += group.count * feed_forward_kernels(ff)
        a = group.attention
        state += group.count * a.state_elements / max(1, min(tp, a.heads))
        if layer_bytes_per_token(a, size=1.0, tp=tp) or a.is_kv_shared:
            attention.append((float(group.count), a, *_pair_flops(a, tp)))
    head = arch.vocab * arch.hidden / tp if arch.has_head else 0.0
    return LayerWork(
        mixer_bytes=mixer * precision.mixer_bits / 8,
        mixer_flops=2 * mixer,
        dense_bytes=dense * precision.dense_bits / 8,
        dense_flops=2 * dense,
        head_bytes=head * precision.head_bits / 8,
        head_flops=2 * head,
        experts=tuple(experts),
        attention=tuple(attention),
        state_bytes=state * 4.0,
        layers=float(arch.layers),
        expert_layers=sum(item[0] for item in experts),
        kernels=kernels,
        expert_kernels=expert_kernels,
        routed_bytes=routed,
        hidden=float(arch.hidden),
        active=float(max((g.feed_forward.active for g in arch.groups), default=0)),
    )


def step_work(
    arch: Architecture,
    layout: ServingLayout,
    precision: Precision,
    device: Device,
    *,
    decodes: float,
    context: float,
    prefill_tokens: float = 0.0,
    prefill_context: float = 0.0,
    query_tokens: float = 1.0,
) -> StepWork:
    """Work of one step with `decodes` running sequences of `context` tokens and `prefill_tokens` prompt tokens.

    decodes: of the whole engine, all attention groups together. prefill_tokens: likewise; each sees
    `prefill_context` tokens on average (half of the prompt for a prompt in one piece). query_tokens: that each running
    sequence puts through the step (1, or 1 + drafted tokens to verify).
    """
    work = layer_work(arch, layout, precision)
    groups = layout.dp
    sequences = max(decodes / groups, 1.0) if decodes > 0 else 0.0
    tokens = sequences * query_tokens + prefill_tokens / groups
    all_tokens = tokens * groups
    bw = device.memory_bw
    rate = device.flops(precision.product_of(precision.mixer_bits))
    dense_rate = device.flops(precision.product_of(precision.dense_bits))
    sampled = sequences * query_tokens + (1.0 if prefill_tokens else 0.0)
    dense_flop = work.mixer_flops * tokens / rate + work.dense_flops * tokens / dense_rate
    dense_flop += work.head_flops * sampled / device.flops(precision.product_of(precision.head_bits))
    expert_bytes, expert_flops = _expert_work(work, precision, all_tokens)
    kv_bytes, attention_flops = _attention_work(
        work, layout.tp, precision, sequences, context, (prefill_tokens / groups, prefill_context), query_tokens
    )
    reduces, reduce_bytes = _reductions(work, layout, tokens)
    exchanges, exchange_bytes = _exchanges(work, layout, tokens)
    domain = layout.tp * layout.dp
    link = device.link_bw if domain <= device.link_domain else device.nic_bw
    reduce_link = device.link_bw if layout.tp <= device.link_domain else device.nic_bw
    return StepWork(
        dense_memory_s=(work.mixer_bytes + work.dense_bytes + work.head_bytes) / bw,
        dense_flop_s=dense_flop,
        expert_memory_s=expert_bytes / bw,
        expert_flop_s=expert_flops / device.flops(precision.product_of(precision.expert_bits)),
        kv_memory_s=kv_bytes / bw,
        attention_flop_s=attention_flops / device.bf16_flops,
        state_memory_s=2 * work.state_bytes * sequences / bw,
        elementwise_s=20.0 * work.layers * work.hidden * tokens / bw,
        routing_s=work.routed_bytes * all_tokens / bw,
        reduce_s=reduce_bytes / reduce_link,
        reduces=reduces,
        exchange_s=exchange_bytes / link,
        exchanges=exchanges,
        layers=work.layers,
        kernels=work.kernels,
        expert_kernels=work.expert_kernels,
        sequences=sequences,
    )


def _expert_work(work: LayerWork, precision: Precision, tokens: float) -> tuple[float, float]:
    """Bytes of touched experts and FLOPs of their tokens on one rank."""
    size = precision.expert_bits / 8
    read = flops = 0.0
    for count, local, share, elements in work.experts:
        read += count * experts_touched(local, share * local, tokens) * elements * size
        flops += count * 2.0 * elements * tokens * share * local
    return read, flops


def _pair_flops(attention: Attention, tp: int) -> tuple[float, float]:
    """FLOPs of one query token with one key token on one rank: in decode (MLA absorbed) and in prefill."""
    value = attention.value_dim or attention.head_dim
    heads = attention.heads / tp
    if attention.kind in ("mla", "sparse_mla"):
        decode = 2.0 * heads * (2 * attention.kv_rank + attention.rope_dim)
        return decode, 2.0 * heads * (attention.nope_dim + attention.rope_dim + value)
    pair = 2.0 * heads * (attention.head_dim + value)
    return pair, pair


def _reach(attention: Attention, context: float) -> float:
    """Tokens of a context that one new token's scores are computed over and its values read from."""
    reach = kept_entries(attention, context)
    return min(reach, float(attention.index_top)) if attention.index_top else reach


def _attention_work(
    work: LayerWork,
    tp: int,
    precision: Precision,
    sequences: float,
    context: float,
    prefill: tuple[float, float],
    query_tokens: float,
) -> tuple[float, float]:
    """Bytes of keys and values read, and FLOPs of scores and values, on one rank. prefill: tokens, mean context."""
    read = flops = 0.0
    for count, mixer, pair, prefill_pair in work.attention:
        seen = _reach(mixer, context)
        entry = layer_bytes_per_token(mixer, size=precision.kv_bytes, tp=tp)
        index = index_bytes_per_token(mixer) * context / (mixer.compress_ratio or 1)
        read += count * sequences * (seen * entry + index)
        flops += count * sequences * query_tokens * seen * pair
        flops += count * prefill[0] * _reach(mixer, prefill[1]) * prefill_pair
    return read, flops


def _reductions(work: LayerWork, layout: ServingLayout, tokens: float) -> tuple[float, float]:
    """All-reduces after attention and feed-forward: how many, and bytes through one link."""
    if layout.tp == 1:
        return 0.0, 0.0
    count = 2 * work.layers if layout.dp == 1 else 2 * work.layers - work.expert_layers
    return count, count * 2.0 * (layout.tp - 1) / layout.tp * tokens * work.hidden * 2.0


def _exchanges(work: LayerWork, layout: ServingLayout, tokens: float) -> tuple[float, float]:
    """Dispatch and combine of expert layers between attention groups: how many, and bytes through one link."""
    if layout.dp == 1 or not work.expert_layers:
        return 0.0, 0.0
    ranks = layout.tp * layout.dp
    copies = min(work.active, float(ranks - 1))
    return 2 * work.expert_layers, 2 * work.expert_layers * tokens / layout.tp * work.hidden * copies * 1.5
