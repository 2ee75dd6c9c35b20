"""From work at data-sheet rates to seconds: the fitted constants of serving, and how they combine.

An estimate is a sum of elements, each an amount of work (engine_step.py) times one multiplier. Elements that overlap
(an operator's bytes and its FLOPs) combine as a smooth maximum. Multipliers of work at a roofline are never below one.
The multipliers are global; those of matrix work may differ by number format and those of launches by GPU generation,
both shrunk to the global ones. No multiplier depends on a model or a row.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from importlib import resources

import msgspec

from head.planner.model.architecture import Architecture
from head.planner.serving.engine_step import Device, Precision, ServingLayout, step_work

# name, first guess (seconds for counts, else a factor on the roofline), prior sd of its logarithm, at a roofline?
ELEMENTS: tuple[tuple[str, float, float, bool], ...] = (
    ("dense_memory", 1.3, 0.25, True),
    ("dense_flop", 1.6, 0.4, True),
    ("expert_memory", 1.4, 0.4, True),
    ("expert_flop", 2.0, 0.6, True),
    ("kv_memory", 1.4, 0.4, True),
    ("attention_flop", 2.0, 0.2, True),
    ("state_memory", 1.5, 0.6, True),
    ("elementwise", 1.5, 0.6, False),
    ("routing", 1.5, 0.6, False),
    ("reduce_latency", 6e-6, 0.8, False),
    ("reduce_bytes", 1.5, 0.6, True),
    ("exchange_latency", 15e-6, 0.6, False),
    ("exchange_bytes", 2.0, 0.6, False),
    ("kernels", 2e-6, 0.7, False),
    ("expert_kernels", 2e-6, 0.8, False),
    ("step", 5e-4, 0.6, False),
    ("sequence", 8e-6, 0.6, False),
    ("prompt_dense_flop", 1.6, 0.3, True),
    ("prompt_expert_flop", 2.0, 0.4, True),
    ("prompt_expert_memory", 1.3, 0.3, True),
    ("prompt_attention_flop", 2.0, 0.3, True),
    ("prompt_reduce_bytes", 1.5, 0.6, False),
    ("prompt_exchange_bytes", 2.0, 0.6, False),
    ("prompt_elementwise", 1.5, 0.6, False),
    ("prompt_routing", 1.5, 0.6, False),
    ("prompt_kernels", 4e-6, 0.6, False),
    ("prompt_host", 1e-3, 0.6, False),
)
NAMES = tuple(item[0] for item in ELEMENTS)
PAIRS = (
    ("dense_memory", "dense_flop"),
    ("expert_memory", "expert_flop"),
    ("kv_memory", "attention_flop"),
    ("prompt_expert_memory", "prompt_expert_flop"),
)
POWER = 4.0  # of the smooth maximum: at equal parts 19 % above either
BY_FORMAT = frozenset(
    {"dense_memory", "dense_flop", "expert_memory", "expert_flop", "prompt_dense_flop", "prompt_expert_flop"}
    | {"prompt_expert_memory"}
)
BY_GENERATION = frozenset({"kernels", "expert_kernels", "reduce_latency", "exchange_latency", "step", "sequence"})

# TTFT: parts in seconds and their first guesses; multipliers differ by backend.
TTFT_PARTS: tuple[tuple[str, float], ...] = (
    ("fixed", 1.0),
    ("own", 1.0),
    ("burst", 0.05),
    ("decode", 1.0),
    ("queue", 1.0),
    ("tokens", 5.0),
    ("waiting", 0.5),
)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine works on at once. `sequences` are in flight in all of its attention groups together."""

    sequences: float
    prompt: float
    output: float
    computed_prompt: float = -1.0  # tokens of the prompt that are not in a prefix cache; -1: all
    chunk: float = 8192.0
    has_prefill: bool = True
    has_decode: bool = True
    query_tokens: float = 1.0  # tokens of one sequence in a step: 1, or 1 + drafted
    tokens_per_step: float = 1.0  # that a sequence gains in a step


class Multipliers(msgspec.Struct, frozen=True, kw_only=True):
    """Logarithms: global, and what a format or generation adds. At a roofline the factor is 1 + exp(sum)."""

    common: tuple[float, ...]
    formats: tuple[tuple[str, tuple[float, ...]], ...] = ()
    generations: tuple[tuple[str, tuple[float, ...]], ...] = ()
    modes: tuple[tuple[str, tuple[float, ...]], ...] = ()  # offline: nothing waits for a client


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Out-of-sample errors of one group of rows, shares of one. scheme: what the fits had not seen."""

    scheme: str
    mode: str
    quantity: str
    rows: int
    mape: float
    median: float
    within_20: float
    bias: float
    inside_80: float  # share of measured values inside the stated 80 % interval


class Constants(msgspec.Struct, frozen=True, kw_only=True):
    """What the fit wrote: data/serving_constants.json."""

    multipliers: Multipliers
    ttft: dict[str, tuple[float, ...]]  # factors by mode and backend ("agg/vllm"; "agg" and "disagg" for any other)
    spread: dict[str, list[tuple[float, float, float]]]  # by quantity[/mode]: nearness at least, log quantiles
    provenance: dict[str, str] = {}
    accuracy: tuple[Accuracy, ...] = ()


def first_guess(index: int) -> float:
    """The prior mean of an element's parameter."""
    _, guess, _, is_roofline = ELEMENTS[index]
    return math.log(max(guess - 1.0, 0.05)) if is_roofline else math.log(guess)


def format_of(precision: Precision) -> str:
    """The number format that most of the matrix work has: as it is stored and as it is multiplied."""
    bits = min(precision.expert_bits, precision.dense_bits)
    if bits >= 16:
        return "bf16"
    if precision.name in ("mxfp4", "quark"):
        return "mxfp4"
    if precision.product == "bf16":
        return "weight4" if bits < 7 else "weight8"
    return {"fp8_block": "block8", "nvfp4": "fp4"}.get(precision.product, "fp8")


def element_values(
    arch: Architecture, layout: ServingLayout, precision: Precision, device: Device, load: Load
) -> tuple[float, ...]:
    """Amounts of work for each decoded token of a sequence in steady state, in the order of ELEMENTS.

    While a sequence gains one token, `sequences`/`output` new prompts are prefilled: their share is in each token.
    """
    prompt = load.prompt if load.computed_prompt < 0 else max(load.computed_prompt, 1.0)
    gain = max(load.tokens_per_step, 1e-9)
    decode = (0.0,) * 17
    if load.has_decode:
        w = step_work(
            arch,
            layout,
            precision,
            device,
            decodes=max(load.sequences / layout.pp, 1.0),
            context=load.prompt + load.output / 2,
            query_tokens=load.query_tokens,
        )
        hops = math.log2(layout.tp + 1)
        decode = (
            w.dense_memory_s,
            w.dense_flop_s,
            w.expert_memory_s,
            w.expert_flop_s,
            w.kv_memory_s,
            w.attention_flop_s,
            w.state_memory_s,
            w.elementwise_s,
            w.routing_s,
            w.reduces * hops,
            w.reduce_s,
            w.exchanges,
            w.exchange_s,
            w.kernels,
            w.expert_kernels,
            float(layout.pp),
            w.sequences * load.query_tokens,
        )
    # For each step. The stages of a pipeline prefill different prompts at once.
    prompts = load.sequences / load.output * gain / layout.pp if load.has_prefill else 0.0
    values = (*decode, *_prefill_values(arch, layout, precision, device, load, prompt, prompts))
    return values if gain == 1.0 else tuple(value / gain for value in values)


def _prefill_values(
    arch: Architecture,
    layout: ServingLayout,
    precision: Precision,
    device: Device,
    load: Load,
    prompt: float,
    prompts: float,
) -> tuple[float, ...]:
    """The elements of prefilling `prompts` prompts of which `prompt` tokens are computed.

    Prompts that arrive within one step share a chunk, and with it the reading of the experts.
    """
    if prompts <= 0:
        return (0.0,) * 10
    p = step_work(
        arch,
        layout,
        precision,
        device,
        decodes=0,
        context=0,
        prefill_tokens=prompt,
        prefill_context=load.prompt - prompt / 2,
    )
    joined = max(1.0, min(prompts / layout.dp, load.chunk / prompt))
    tokens = min(prompt, load.chunk) * joined * layout.dp
    chunk = step_work(arch, layout, precision, device, decodes=0, context=0, prefill_tokens=tokens, prefill_context=1)
    chunks = prompts / layout.dp / joined * max(1.0, prompt / load.chunk)
    return (
        p.dense_flop_s * prompts,
        p.expert_flop_s * prompts,
        chunk.expert_memory_s * chunks,
        p.attention_flop_s * prompts,
        p.reduce_s * prompts,
        p.exchange_s * prompts,
        p.elementwise_s * prompts,
        p.routing_s * prompts,
        prompts / layout.dp * (p.kernels + p.expert_kernels) * math.ceil(prompt / load.chunk),
        prompts,
    )


@lru_cache(maxsize=256)
def factors_of(multipliers: Multipliers, format_name: str, generation: str, mode: str = "agg") -> tuple[float, ...]:
    """The multiplier of every element for a number format on a generation of GPUs."""
    own = dict(multipliers.formats).get(format_name)
    era = dict(multipliers.generations).get(generation)
    way = dict(multipliers.modes).get(mode)
    found = []
    for index, (_, _, _, is_roofline) in enumerate(ELEMENTS):
        total = multipliers.common[index] + (own[index] if own else 0.0) + (era[index] if era else 0.0)
        total += way[index] if way else 0.0
        found.append(1.0 + math.exp(total) if is_roofline else math.exp(total))
    return tuple(found)


def combine(values: tuple[float, ...], multipliers: tuple[float, ...]) -> dict[str, float]:
    """Seconds by element; of each overlapping pair both get their share of the pair's smooth maximum."""
    parts = {name: value * factor for name, value, factor in zip(NAMES, values, multipliers, strict=True)}
    for one, other in PAIRS:
        a, b = parts[one], parts[other]
        top = max(a, b)
        if top <= 0:
            continue
        x, y = (a / top) ** POWER, (b / top) ** POWER
        whole = top * (x + y) ** (1 / POWER)
        parts[one], parts[other] = whole * x / (x + y), whole * y / (x + y)
    return parts


def floor_s(values: tuple[float, ...]) -> float:
    """No token can take less: all bytes at the memory's rate, or all FLOPs at their peaks, whichever is longer."""
    v = dict(zip(NAMES, values, strict=True))
    moved = v["dense_memory"] + v["expert_memory"] + v["kv_memory"] + v["state_memory"]
    computed = v["dense_flop"] + v["expert_flop"] + v["attention_flop"]
    prompt = v["prompt_dense_flop"] + v["prompt_expert_flop"] + v["prompt_attention_flop"]
    return max(moved, computed + prompt, prompt)


def interval(
    spread: dict[str, list[tuple[float, float, float]]], name: str, mode: str, similarity: float
) -> tuple[float, float]:
    """Logarithms of the 80 % interval's bounds over the value, at this nearness to measured points of the mode."""
    rows = spread.get(f"{name}/{mode}") or spread.get(name) or [(0.0, -0.7, 0.7)]
    for least, low, high in rows:
        if similarity >= least and low < high:  # too few rows were so near: as for those a step farther
            return low, high
    return rows[-1][1], rows[-1][2]


@cache
def shipped() -> Constants:
    """The shipped calibration."""
    text = resources.files("head.planner").joinpath("data", "serving_constants.json").read_bytes()
    return msgspec.json.decode(text, type=Constants)


def ttft_parts(
    *, prompt_s: float, decode_s: float, output: float, sequences: float, prompt: float, groups: float, offered: float
) -> tuple[float, ...]:
    """What a first token waits for, seconds, in the order of TTFT_PARTS, before the fitted factors.

    prompt_s: the engine's time for one prompt (all groups of attention work in parallel: one prompt in one group takes
    `groups` times that). In a closed loop the engine prefills a share of the time, so prompts queue for each other
    (M/D/1); part of the requests arrive together, as after a start (burst); the running step has to end (decode);
    what is offered beyond the `sequences` that run waits for a whole life each (waiting).
    """
    life = prompt_s + output * (decode_s + sequences / output * prompt_s)
    busy = min(sequences * prompt_s / life, 0.97) if life > 0 else 0.0
    return (
        0.02,
        prompt_s * groups,
        sequences * prompt_s,
        decode_s,
        busy * prompt_s / (2 * (1 - busy)),
        prompt * 1e-6,
        max(offered / max(sequences, 1.0) - 1.0, 0.0) * life,
    )


def is_prefill(name: str) -> bool:
    """Whether an element belongs to prompts."""
    return name.startswith("prompt_")
