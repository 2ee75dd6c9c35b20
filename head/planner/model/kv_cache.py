"""Bytes that a sequence keeps on each rank while it is served: keys and values, latents, states.

`bytes_per_token` and friends are per tensor-parallel rank. Heads are split over ranks and repeated when there are fewer
heads than ranks; latents (MLA) and shared key/value heads are repeated on every rank.
"""

from __future__ import annotations

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Architecture, Attention
from head.planner.model.dtypes import bytes_per_element

_INDEX_SCALE_BYTES = 4  # fp32 scale of each 128 elements of an indexer's fp8 key


class KvCache(msgspec.Struct, frozen=True, kw_only=True):
    """What one sequence of `tokens` tokens keeps on one rank, in bytes.

    `theory` counts each layer's own reach; `reserved` is what engines reserve that give every attention layer pages for
    every token. `state` does not grow with the sequence and is contained in both.
    """

    tokens: int
    dtype: str
    theory: float
    reserved: float
    state: float
    bytes_per_token: float  # of `reserved`, without the state: the engine's page size per token
    growing_bytes_per_token: float  # of `theory`: what one more token costs when every window is full


def kv_cache(
    architecture: Architecture, tokens: int, *, dtype: str = "", tp: int = 1, pp: int = 1, state_dtype: str = ""
) -> KvCache:
    """The cache of one sequence on the fullest rank.

    dtype: of keys and values (default: the architecture's, else bf16); state_dtype: of recurrent states (default fp32).
    pp: layers are spread over this many stages; the fullest one is meant.
    Raises: InvalidValue for values below 1 and unknown formats.
    """
    for name, value in (("tokens", tokens + 1), ("tp", tp), ("pp", pp)):
        if value < 1:
            raise InvalidValue(f"{name} is too small", field=name)
    dtype = dtype or architecture.kv_dtype or "bf16"
    size = bytes_per_element(dtype)
    theory = reserved = state = per_token = growing = 0.0
    share = -(-architecture.layers // pp) / max(1, architecture.layers)
    for group in architecture.groups:
        layers = group.count * share
        mixer = group.attention
        one = layer_bytes_per_token(mixer, size=size, tp=tp)
        index = layers * index_bytes_per_token(mixer)
        theory += layers * one * kept_entries(mixer, tokens) + index * tokens / (mixer.compress_ratio or 1)
        growing += layers * one * growing_entries(mixer) + index / (mixer.compress_ratio or 1)
        if mixer.kind == "compressed":
            reserved += layers * one * kept_entries(mixer, tokens) + index * tokens / (mixer.compress_ratio or 1)
            per_token += layers * one * growing_entries(mixer) + index / (mixer.compress_ratio or 1)
        else:
            reserved += (layers * one + index) * tokens
            per_token += layers * one + index
        state += layers * layer_state_bytes(mixer, tp=tp, dtype=state_dtype or "fp32", conv_size=2.0)
    return KvCache(
        tokens=tokens,
        dtype=dtype,
        theory=theory + state,
        reserved=reserved + state,
        state=state,
        bytes_per_token=per_token,
        growing_bytes_per_token=growing,
    )


def bytes_per_token(architecture: Architecture, *, dtype: str = "", tp: int = 1) -> float:
    """Bytes per token and rank with pages in every attention layer: 2 L ceil(k/t) d b, or L (r + d_r) b for MLA."""
    return kv_cache(architecture, 0, dtype=dtype, tp=tp).bytes_per_token


def state_bytes(architecture: Architecture, *, tp: int = 1, dtype: str = "fp32") -> float:
    """Bytes per sequence and rank that do not depend on its length."""
    return kv_cache(architecture, 0, tp=tp, state_dtype=dtype).state


def layer_bytes_per_token(attention: Attention, *, size: float, tp: int = 1) -> float:
    """One layer's entry for one token, `size` bytes an element; 0 when the layer keeps none of its own."""
    if attention.kind in ("linear", "mamba", "none") or attention.is_kv_shared:
        return 0.0
    if attention.kind in ("mla", "sparse_mla"):
        return (attention.kv_rank + attention.rope_dim) * size
    if attention.kind == "compressed":
        return attention.head_dim * size
    heads = -(-attention.kv_heads // tp)
    return heads * (attention.head_dim + (attention.value_dim or attention.head_dim)) * size


def index_bytes_per_token(attention: Attention) -> float:
    """An indexer's key for one token (or block): fp8 with a scale for each 128 elements."""
    if not attention.index_heads:
        return 0.0
    return attention.index_dim + _INDEX_SCALE_BYTES * -(-attention.index_dim // 128)


def kept_entries(attention: Attention, tokens: float) -> float:
    """Entries that a layer needs for a sequence of `tokens`."""
    window = attention.window
    match attention.kind:
        case "linear" | "mamba" | "none":
            return 0.0
        case "sliding" | "chunked":
            return min(tokens, window) if window else tokens
        case "compressed":
            far = tokens / attention.compress_ratio if attention.compress_ratio else 0.0
            return min(tokens, window) + far
        case _:
            return tokens


def growing_entries(attention: Attention) -> float:
    """Entries that one more token adds once every window is full."""
    match attention.kind:
        case "linear" | "mamba" | "none":
            return 0.0
        case "sliding" | "chunked":
            return 0.0 if attention.window else 1.0
        case "compressed":
            return 1 / attention.compress_ratio if attention.compress_ratio else 0.0
        case _:
            return 1.0


def layer_state_bytes(attention: Attention, *, tp: int = 1, dtype: str = "fp32", conv_size: float = 2.0) -> float:
    """A recurrent layer's state and the tail of its short convolution (kept in 16 bits), per sequence and rank."""
    parts = max(1, min(tp, attention.heads))
    return (attention.state_elements * bytes_per_element(dtype) + attention.conv_elements * conv_size) / parts
