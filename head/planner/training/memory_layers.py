"""What one layer holds: parameters on one rank, and bytes kept per token for its backward pass.

Everything is per layer kind, from dimensions. Activations are split by how parallelism divides them: `split` over the
tensor ranks always, `whole` only under sequence parallelism, `score` (the s x s matrix) times the sequence length.
Source: Korthikanti et al. 2022, section 4; operator by operator for gated, GQA, MLA and expert layers.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.parameters import count
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory_stack import MemoryStack

_EIGHT_BITS = ("fp8", "mxfp8", "nvfp4", "int8")


class LayerParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one layer: divided by tp, replicated, keys and values (divided by at most kv heads), experts.

    lora_width: sum over adapted matrices of input plus output width; a LoRA of rank r has r times as many parameters.
    """

    split: int
    replicated: int
    kv: int
    kv_heads: int
    experts: int
    lora_width: int
    lora_attention_width: int

    def on_rank(self, layout: TrainingLayout) -> tuple[float, float]:
        """Parameters on one rank: (dense, routed experts)."""
        kv_ways = min(layout.tp, self.kv_heads) if self.kv_heads else layout.tp
        dense = self.split / layout.tp + self.kv / max(kv_ways, 1) + self.replicated
        return dense, self.experts / (layout.ep * expert_tensor_ways(layout))


class LayerActivations(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per token (of the micro-batch, of one context rank) kept by one layer; `input` is its checkpoint."""

    split: float
    whole: float
    score: float  # per token and per token of the sequence, when attention is not fused
    stats: float  # row sums of a fused softmax, divided as `split`
    routed: float  # of routed copies; divided by the ways an expert is split
    input: float
    backward: float  # temporaries of the backward pass, divided as `split`
    selective_split: float  # kept when operators are chosen
    selective_whole: float
    routed_selective: float


class LayerKind(msgspec.Struct, frozen=True, kw_only=True):
    """One group of equal layers."""

    layers: int
    is_prefix: bool
    params: LayerParams


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What memory needs of a model, computed once."""

    kinds: tuple[LayerKind, ...]
    layers: int
    first_params: float  # input embedding and positions
    head_params: float  # the output matrix, also when it is a copy of the input table
    is_tied: bool
    has_head: bool
    replicated_params: float  # outside layers and embeddings
    mtp_params: float
    total: int


def expert_tensor_ways(layout: TrainingLayout) -> int:
    """GPUs that share one expert's matrices."""
    return layout.expert_tp or (layout.tp if layout.ep == 1 else 1)


def expert_replicas(layout: TrainingLayout) -> int:
    """Copies of one expert shard: n / (pp * ep * expert_tp), at least 1."""
    return max(1, layout.tp * layout.cp * layout.dp // (layout.ep * expert_tensor_ways(layout)))


@lru_cache(maxsize=128)
def model_facts(arch: Architecture) -> ModelFacts:
    """Parameters by part. A first group of dense layers before expert layers is a prefix: the first stage has it."""
    counted = count(arch)
    kinds = []
    for index, (group, params) in enumerate(zip(arch.groups, counted.groups, strict=True)):
        feed, mixer = group.feed_forward, group.attention
        is_prefix = index == 0 and len(arch.groups) > 1 and arch.is_moe and feed.kind != "moe" and group.count <= 4
        kv = 0
        if mixer.kind in ("full", "sliding", "chunked") and not mixer.is_kv_shared:
            width = mixer.head_dim + ((mixer.value_dim or mixer.head_dim) if mixer.has_value else 0)
            kv = arch.hidden * mixer.kv_heads * width
        attention_width = _attention_lora_width(mixer, arch.hidden)
        dense_width = feed.width if feed.kind == "dense" else feed.shared_width
        lora = attention_width + (3 if feed.is_gated else 2) * (arch.hidden + dense_width) * bool(dense_width)
        kinds.append(
            LayerKind(
                layers=group.count,
                is_prefix=is_prefix,
                params=LayerParams(
                    split=params.attention - kv + params.shared_experts + params.dense_feed_forward,
                    replicated=params.norms + params.other + params.router,
                    kv=kv,
                    kv_heads=mixer.kv_heads,
                    experts=params.routed_experts,
                    lora_width=lora,
                    lora_attention_width=attention_width,
                ),
            )
        )
    tied = counted.input_embedding if arch.is_tied and arch.has_head else 0
    return ModelFacts(
        kinds=tuple(kinds),
        layers=arch.layers,
        first_params=counted.input_embedding + counted.positions,
        head_params=counted.head or tied,
        is_tied=arch.is_tied,
        has_head=arch.has_head,
        replicated_params=counted.final,
        mtp_params=counted.mtp,
        total=counted.total,
    )


@lru_cache(maxsize=4096)
def layer_activations(
    hidden: int, group: LayerGroup, operators: str, tuning: str, stack: MemoryStack, precision: str = "bf16"
) -> LayerActivations:
    """Bytes per token of one layer. eager: every operator keeps its own copies, as one HF layer was measured to do.

    Source: planner.md 2.4: copies of the hidden state per eager layer, 4f/h + 8..14 + 4(ad/h).
    """
    mixer, feed = group.attention, group.feed_forward
    is_eager = operators == "eager"
    frozen_inputs = tuning == "lora" and stack.lora_targets == "attention"
    mixed_split, mixed_whole, outputs = _mixer_bytes(hidden, mixer, is_eager)
    fed_split, fed_whole, routed, fed_outputs, widths = _feed_bytes(hidden, feed, is_eager)
    if stack.narrow_inputs and precision in _EIGHT_BITS:  # inputs of products: one byte an element instead of two
        mixed_whole -= hidden
        fed_whole -= hidden * (feed.kind != "none")
        fed_split -= widths
        routed -= feed.active * ((feed.latent or hidden) + feed.width)
    norm_bytes = _norm_bytes(hidden, group, is_eager, is_frozen=tuning != "full")
    whole = norm_bytes + mixed_whole + fed_whole
    split = mixed_split + fed_split
    if stack.has_dropout:
        whole += 2.0 * hidden  # a mask of one byte after the mixer and after the feed-forward part
    if frozen_inputs:  # a product with frozen weights needs no input for its backward pass
        whole -= 2.0 * hidden * (feed.kind != "none")
        split -= 2.0 * widths
        routed *= 0.7
    if tuning != "full" and stack.has_lora_dropout:
        whole += 3.0 * hidden * (1 if frozen_inputs else 3)
        split += 0.0 if frozen_inputs else 3.0 * widths
    if stack.scales_outputs and tuning != "full":
        split += outputs + fed_outputs
    is_softmax = mixer.kind in ("full", "sliding", "chunked", "mla", "sparse_mla")
    attention_out = 2.0 * mixer.heads * (mixer.value_dim or mixer.head_dim)
    return LayerActivations(
        split=split,
        whole=whole,
        score=5.0 * mixer.heads * is_softmax,
        stats=4.0 * mixer.heads * is_softmax,
        routed=routed,
        input=2.0 * hidden,
        backward=2.0 * (3 if feed.is_gated else 2) * widths + 4.0 * hidden,
        selective_split=(outputs + fed_outputs) / 2 + attention_out,
        selective_whole=2.0 * hidden,
        routed_selective=routed / 2,
    )


def copies_per_layer(arch: Architecture, group: LayerGroup) -> float:
    """Copies of the hidden state (16 bits) that one eager layer allocates in its forward pass, no recomputation."""
    kept = layer_activations(arch.hidden, group, "eager", "full", MemoryStack(name="eager", operators="eager"))
    return (kept.split + kept.whole + kept.routed) / (2.0 * arch.hidden)


def _norm_bytes(hidden: int, group: LayerGroup, is_eager: bool, *, is_frozen: bool) -> float:
    """Inputs of norms: the residual stream in 16 bits; an eager RMS norm also keeps it in fp32 and normalised."""
    once = 2.0 * hidden
    if is_eager and group.norm == "rms":
        once += 4.0 * hidden + (0.0 if is_frozen else 2.0 * hidden)
    return once * max(group.norms, 1)


def _mixer_bytes(hidden: int, mixer: Attention, is_eager: bool) -> tuple[float, float, float]:
    """(divided by tp, whole, outputs of products) of attention or what stands for it."""
    if mixer.kind == "none":
        return 0.0, 0.0, 0.0
    if mixer.kind in ("linear", "mamba", "compressed"):
        projected = max(mixer.other_params // max(hidden, 1), 2 * hidden)
        state = 2.0 * mixer.state_elements / 64  # a state every 64 tokens is kept for the backward scan
        return 3.0 * projected + state, 2.0 * hidden, 2.0 * projected
    if mixer.kind in ("mla", "sparse_mla"):
        head = mixer.nope_dim + mixer.rope_dim
        value = mixer.value_dim or mixer.nope_dim
        split = 2.0 * mixer.heads * (2 * head + 2 * value)
        latent = 2.0 * (mixer.q_rank + mixer.kv_rank + mixer.rope_dim) * 2
        return split, 2.0 * hidden + latent, 2.0 * mixer.heads * (2 * head + value) + 2.0 * hidden
    value = mixer.value_dim or mixer.head_dim
    queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    values = mixer.kv_heads * value
    products = 2.0 * (queries + keys + values) + 2.0 * hidden
    if is_eager:  # keys and values are expanded to all query heads
        keys_kept, values_kept = mixer.heads * mixer.head_dim, mixer.heads * value
    else:
        keys_kept, values_kept = keys, values
    split = 2.0 * (queries + keys_kept + values_kept) + 2.0 * mixer.heads * value
    if mixer.qk_norm != "none":
        split += (6.0 if is_eager else 2.0) * (queries + keys)
    if mixer.has_output_gate:
        split += 4.0 * mixer.heads * value
    return split, 2.0 * hidden, products


def _feed_bytes(hidden: int, feed: FeedForward, is_eager: bool) -> tuple[float, float, float, float, float]:
    """(divided by tp, whole, routed copies, outputs of products, width of the last product's input)."""
    if feed.kind == "none":
        return 0.0, 0.0, 0.0, 0.0, 0.0
    # gated: gate, up and their product (eager: the activated gate as well); plain: before and after the activation
    kept = (8.0 if is_eager else 6.0) if feed.is_gated else 4.0
    gates = 2 if feed.is_gated else 1
    if feed.kind == "dense":
        return kept * feed.width, 2.0 * hidden, 0.0, 2.0 * gates * feed.width + 2.0 * hidden, float(feed.width)
    inner = feed.latent or hidden
    shared = feed.shared_width + feed.dense_width
    # fused programs weigh the experts' activations, eager ones their outputs, which they keep for it
    routed = feed.active * (2.0 * inner + kept * feed.width + (2.0 * inner if is_eager else 0.0))
    router = 8.0 * feed.experts  # logits and probabilities in fp32
    return kept * shared, 2.0 * hidden + router, routed, 2.0 * gates * shared + 2.0 * hidden, float(shared)


def _attention_lora_width(mixer: Attention, hidden: int) -> int:
    if mixer.kind in ("mla", "sparse_mla"):
        head = mixer.heads * (mixer.nope_dim + mixer.rope_dim)
        value = mixer.heads * (mixer.value_dim or mixer.nope_dim)
        query = (mixer.q_rank or hidden) + head
        return query + 2 * hidden + mixer.kv_rank + mixer.rope_dim + mixer.kv_rank + head + value + value
    if mixer.kind in ("none", "linear", "mamba", "compressed"):
        return 4 * hidden if mixer.kind != "none" else 0
    queries = mixer.heads * mixer.head_dim
    return 4 * hidden + 2 * queries + 2 * mixer.kv_heads * mixer.head_dim
