"""What measured points say about a question like theirs.

The physics leaves residuals that belong to a stack (engine, version, kernels of a format on a device) and to shapes.
They are remembered as a Gaussian process over configurations: its kernel decays with the distance of dimensions,
layouts and loads, and drops with another engine, device, format or version. Far from every measured point the
correction vanishes and the interval is the widest one. Models are compared by their dimensions, never by name.
"""

from __future__ import annotations

import gzip
import math
from functools import cache, lru_cache
from importlib import resources

import msgspec

from head.planner.calibration.active import active
from head.planner.calibration.quantity import NearRow
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.serving.engine_step import ServingLayout

# Kernel: variances of the residual that is common to a model on an engine, and of that of one configuration's
# neighbourhood; lengths in natural logarithms (dimensions, load) and doublings (degrees). Chosen by leaving out whole
# models and whole curves; the errors are flat around them.
STACK_SD = 0.15
LOCAL_SD = 0.25
DIMENSIONS_LENGTH = 0.8
DEGREES_LENGTH = 2.0
SEQUENCES_LENGTH = 4.0
LENGTHS_LENGTH = 4.0
OTHER_BACKEND = 0.3
OTHER_FORMAT = 0.6
OTHER_VERSION = 0.6
OTHER_MODE = 0.3
OTHER_DEVICE = 0.7
OTHER_GENERATION = 0.3
# Variance that all points of a mode share: whole tables were taken in their own way, and disaggregated rows of unknown
# numbers of workers are read as one worker.
MODE_SD = {"offline": 0.15, "disagg": 0.15, "disagg?": 0.5}
LEAST = 0.01  # kernels below this share of the largest are left out


class Block(msgspec.Struct, frozen=True, array_like=True):
    """What the points of one measured curve share."""

    dimensions: tuple[float, ...]
    backend: str
    version: str
    device: str
    generation: str
    format: str
    mode: str
    degrees: tuple[float, ...]  # log2 of tp, dp, ep, pp


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One measured point and what the physics alone says there; weights are the process's solved coefficients."""

    id: str
    sequences: float
    isl: float
    osl: float
    tpot_s: float
    base_tpot_s: float
    tpot_weight: float
    ttft_s: float
    base_ttft_s: float
    ttft_weight: float


class Memory(msgspec.Struct, frozen=True):
    """The shipped points: data/serving_rows.json.gz."""

    source: dict[str, str]
    curves: list[tuple[Block, list[Point]]]


class Nearness(msgspec.Struct, frozen=True, kw_only=True):
    """Correction factors (measured over physics), how near the nearest point is (0 to 1), and the nearest points."""

    tpot: float
    ttft: float
    similarity: float
    near: tuple[tuple[float, Block, Point], ...]


@lru_cache(maxsize=512)
def dimensions_of(arch: Architecture) -> tuple[float, ...]:
    """A model as a point: logarithms of its sizes, and which kinds of layers it has, scaled to matter alike."""
    whole = count(arch)
    kinds = {group.attention.kind for group in arch.groups}
    return (
        math.log(max(arch.hidden, 1)),
        math.log(max(arch.layers, 1)),
        math.log(max(whole.active_no_embeddings, 1)),
        math.log(max(whole.non_embedding, 1)),
        2.0 if arch.is_moe else 0.0,
        2.0 if kinds & {"mla", "sparse_mla"} else 0.0,
        1.5 if kinds & {"sparse_mla", "compressed"} else 0.0,
        2.0 if kinds & {"linear", "mamba"} else 0.0,
        1.0 if kinds & {"sliding", "chunked"} else 0.0,
    )


def degrees_of(layout: ServingLayout) -> tuple[float, ...]:
    """A layout as a point."""
    return tuple(math.log2(max(degree, 1)) for degree in (layout.tp, layout.dp, layout.ep, layout.pp))


def outer(one: Block, other: Block) -> tuple[float, float]:
    """The kernel's parts that do not depend on the load: of the stack, and of the configuration."""
    common = MODE_SD.get(one.mode, 0.0) ** 2 if one.mode == other.mode else 0.0
    distance = sum(abs(a - b) for a, b in zip(one.dimensions, other.dimensions, strict=True))
    shared = math.exp(-distance / DIMENSIONS_LENGTH)
    if shared < 1e-4:
        return common, 0.0
    if one.backend != other.backend:
        shared *= OTHER_BACKEND
    if one.device != other.device:
        shared *= OTHER_DEVICE if one.generation == other.generation else OTHER_GENERATION
    if one.mode != other.mode:
        shared *= OTHER_MODE
    local = shared
    if one.format != other.format:
        local *= OTHER_FORMAT
    if one.version != other.version:
        local *= OTHER_VERSION
    apart = sum(abs(a - b) for a, b in zip(one.degrees, other.degrees, strict=True))
    return common + STACK_SD**2 * shared, LOCAL_SD**2 * local * math.exp(-apart / DEGREES_LENGTH)


def load_of(sequences: float, isl: float, osl: float) -> tuple[float, float, float]:
    """A load as a point."""
    return math.log(max(sequences, 1.0)), math.log(max(isl, 1.0)), math.log(max(osl, 1.0))


@cache
def shipped_memory() -> Memory:
    """The shipped points."""
    packed = resources.files("head.planner").joinpath("data", "serving_rows.json.gz").read_bytes()
    return msgspec.json.decode(gzip.decompress(packed), type=Memory)


@cache
def _prepared() -> list[tuple[Block, list[tuple[tuple[float, float, float], float, float]], float, float]]:
    """Curves with their points' loads and weights, and the sums of the weights."""
    found = []
    for block, points in shipped_memory().curves:
        rows = [(load_of(p.sequences, p.isl, p.osl), p.tpot_weight, p.ttft_weight) for p in points]
        found.append((block, rows, sum(r[1] for r in rows), sum(r[2] for r in rows)))
    return found


@lru_cache(maxsize=512)
def _relevant(block: Block) -> tuple[float, float, tuple[tuple[float, int], ...]]:
    """The stack's part of both corrections, and the curves near enough to matter, with their kernels."""
    tpot = ttft = 0.0
    curves = []
    for index, (other, _, tpot_sum, ttft_sum) in enumerate(_prepared()):
        stack, local = outer(block, other)
        tpot += stack * tpot_sum
        ttft += stack * ttft_sum
        if local > LEAST * LOCAL_SD**2:
            curves.append((local, index))
    curves.sort(reverse=True)
    return tpot, ttft, tuple(curves)


def nearness(block: Block, sequences: float, isl: float, osl: float, *, near: int = 3) -> Nearness:
    """Corrections and nearest points for a question."""
    tpot, ttft, curves = _relevant(block)
    load = load_of(sequences, isl, osl)
    best: list[tuple[float, int, int]] = []
    top = 0.0
    prepared = _prepared()
    sequences_at, isl_at, osl_at = load
    for local, index in curves:
        rows = prepared[index][1]
        for position, (other, tpot_weight, ttft_weight) in enumerate(rows):
            away = abs(isl_at - other[1]) + abs(osl_at - other[2])
            kernel = local * math.exp(-abs(sequences_at - other[0]) / SEQUENCES_LENGTH - away / LENGTHS_LENGTH)
            tpot += kernel * tpot_weight
            ttft += kernel * ttft_weight
            if len(best) < near or kernel > best[-1][0]:
                best.append((kernel, index, position))
                best.sort(reverse=True)
                del best[near:]
        top = max(top, best[0][0] if best else 0.0)
    memory = shipped_memory()
    found = [
        (kernel / LOCAL_SD**2, memory.curves[index][0], memory.curves[index][1][position])
        for kernel, index, position in best
    ]
    if (own := active()) is not None and own.curves:
        tpot, ttft, found = _with_own(own.curves, block, load, (tpot, ttft, found[:near]))
        found, top = found[:near], max([top, *(LOCAL_SD**2 * kernel for kernel, _, _ in found)])
    return Nearness(
        tpot=math.exp(max(-0.7, min(0.7, tpot))),
        ttft=math.exp(max(-1.2, min(1.2, ttft))),
        similarity=top / LOCAL_SD**2,
        near=tuple(found),
    )


# What all points of one engine on one device share on a cluster of its own: its hosts, its network, its power limits.
CLUSTER_SD = 0.10
OWN_LIMIT = 0.6  # in logarithm: a cluster's own points move an estimate by less than a factor of two
OWN = "own:"  # ids of a cluster's own points begin with this


@lru_cache(maxsize=4096)
def own_outer(one: Block, other: Block) -> tuple[float, float]:
    """As `outer`, with what the cluster's points share."""
    stack, local = outer(one, other)
    if one.backend == other.backend and one.device == other.device:
        stack += CLUSTER_SD**2
    return stack, local


def load_likeness(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """The kernel's part of the load, 1 for equal ones."""
    away = abs(one[1] - other[1]) + abs(one[2] - other[2])
    return math.exp(-abs(one[0] - other[0]) / SEQUENCES_LENGTH - away / LENGTHS_LENGTH)


Near = tuple[float, Block, Point]


def _with_own(
    curves: tuple[tuple[Block, tuple[Point, ...]], ...],
    block: Block,
    load: tuple[float, float, float],
    shipped: tuple[float, float, list[Near]],
) -> tuple[float, float, list[Near]]:
    """The corrections and the nearest points of the shipped points, with those of the cluster's own."""
    tpot = ttft = 0.0
    found = list(shipped[2])
    for other, points in curves:
        stack, local = own_outer(block, other)
        for point in points:
            kernel = local * load_likeness(load, load_of(point.sequences, point.isl, point.osl))
            tpot += (stack + kernel) * point.tpot_weight
            ttft += (stack + kernel) * point.ttft_weight
            found.append((kernel / LOCAL_SD**2, other, point))
    found.sort(key=lambda item: -item[0])
    limited = [max(-OWN_LIMIT, min(OWN_LIMIT, value)) for value in (tpot, ttft)]
    return shipped[0] + limited[0], shipped[1] + limited[1], found


def near_rows(found: Nearness, quantity: str) -> tuple[NearRow, ...]:
    """The nearest points as they are shown: what was measured, and what the planner says there without them."""
    source = shipped_memory().source.get("title", "")
    rows = []
    for kernel, _, point in found.near:
        measured, base = (point.tpot_s, point.base_tpot_s) if quantity == "tpot" else (point.ttft_s, point.base_ttft_s)
        if measured <= 0:
            continue
        distance = round(-math.log(max(min(kernel, 1.0), 1e-9)), 4)
        where = "this cluster" if point.id.startswith(OWN) else source
        rows.append(NearRow(id=point.id, source=where, measured=measured, predicted=round(base, 9), distance=distance))
    return tuple(rows)
