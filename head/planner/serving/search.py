"""Which configuration serves a load best: every one in a stated space, what was dropped and why, the Pareto front.

The space: tensor, pipeline and data-parallel degrees that fill one engine, experts whole or spread, number formats,
sequences at once and chunk sizes. All of it is evaluated by physics; the configurations that lead on any objective are
then asked again with the measured neighbours, and the front is of those answers. Ties are broken by position, so the
same question always gets the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from common.errors import InvalidValue, NothingFits
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.serving.batching import LoadPoint, StepCost, arrivals_at, simulate
from head.planner.serving.engine_step import Backend, ServingLayout
from head.planner.serving.estimate import EngineSettings, ServingEstimate, Workload, estimate_serving
from head.planner.serving.memory import USUAL_SEQUENCES, MemorySettings

REFINED = 48  # configurations asked again with measured neighbours
CONFIGURATIONS_LIMIT = 5_000


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on means, seconds; 0: none."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0

    def misses(self, estimate: ServingEstimate) -> list[str]:
        """Which limits an estimate misses."""
        pairs = [("ttft", self.ttft_s, estimate.ttft_s), ("tpot", self.tpot_s, estimate.tpot_s)]
        pairs.append(("e2e", self.e2e_s, estimate.e2e_s))
        return [name for name, limit, found in pairs if 0 < limit < found.value]


class SearchSpace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be varied; empty tuples mean what is usual."""

    backend: Backend = "vllm"
    version: str = ""
    weights: tuple[str, ...] = ("",)
    kv_dtypes: tuple[str, ...] = ("",)
    engine_gpus: tuple[int, ...] = ()  # 1, 2, 4 ... up to the topology's
    tps: tuple[int, ...] = ()  # any
    max_num_seqs: tuple[int, ...] = (64, 256, 1024)
    chunk_tokens: tuple[int, ...] = (2048, 8192)
    utilization: float = 0.0


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration: `replicas` engines of `settings`, and how one of them serves its share of the load."""

    settings: EngineSettings
    replicas: int
    gpus: int
    estimate: ServingEstimate
    output_tokens_per_s: float  # of all replicas
    usd_per_million_tokens: float | None
    headroom: float  # share of one GPU's memory that no running sequence needs
    misses: tuple[str, ...]
    rationale: str = ""


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """How many configurations were left out for one reason, and one of them."""

    reason: str
    count: int
    example: str


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """`best` by objective name; `front`: no other is at least as good in all objectives and better in one."""

    evaluated: int
    front: tuple[Choice, ...]
    best: dict[str, Choice]
    dropped: tuple[Dropped, ...]


def layouts(arch: Architecture, topology: Topology, sizes: Sequence[int] = ()) -> Iterator[tuple[ServingLayout, str]]:
    """Every layout of the space with a reason why it is left out (empty: it stays)."""
    gpus = topology.gpus
    heads = min((g.attention.heads for g in arch.groups if g.attention.heads), default=1)
    experts = max((g.feed_forward.experts for g in arch.groups), default=0)
    for size in sizes or [1 << k for k in range(gpus.bit_length()) if 1 << k <= gpus]:
        for pp in _powers(size):
            for dp in _powers(size // pp):
                tp = size // pp // dp
                for ep in dict.fromkeys((1, tp * dp) if experts else (1,)):
                    layout = ServingLayout(tp=tp, pp=pp, dp=dp, ep=ep)
                    reason = ""
                    if tp * pp * dp != size:
                        reason = "degrees do not fill the engine"
                    elif heads % tp:
                        reason = "attention heads do not divide by tp"
                    elif tp > max(topology.local_gpus, 1):
                        reason = "tensor parallelism across nodes"
                    elif pp > max(1, arch.layers):
                        reason = "more stages than layers"
                    elif dp > 1 and not experts:
                        reason = "attention groups without experts are replicas"
                    elif ep > 1 and experts % ep:
                        reason = "experts do not divide by ep"
                    elif dp > 1 and pp > 1:
                        reason = "attention groups with pipeline stages are not supported by engines"
                    yield layout, reason


def _powers(limit: int) -> list[int]:
    return [1 << k for k in range(max(limit, 1).bit_length()) if 1 << k <= limit]


def search_serving(
    arch: Architecture, topology: Topology, workload: Workload, space: SearchSpace, slo: Slo | None = None
) -> SearchResult:
    """The best configurations for `workload` on all of `topology`'s GPUs.

    The load is shared evenly by as many replicas as fit. Raises: NothingFits (409) with the reasons when no
    configuration holds the weights, InvalidValue for an empty or too large space.
    """
    slo = slo or Slo()
    dropped: dict[str, tuple[int, str]] = {}
    found: list[Choice] = []
    asked = 0
    for layout, reason in layouts(arch, topology, space.engine_gpus):
        if space.tps and layout.tp not in space.tps:
            continue
        for settings in _variants(space, layout):
            asked += 1
            if asked > CONFIGURATIONS_LIMIT:
                raise InvalidValue("the search space is too large", limit=CONFIGURATIONS_LIMIT)
            choice = None if reason else _choice(arch, topology, settings, workload, slo, has_near=False)
            why = reason or (choice.misses[0] if choice is not None and choice.misses[:1] == ("memory",) else "")
            if choice is None or why:
                text = "the weights leave no room for one sequence" if why == "memory" else why
                count, example = dropped.get(text, (0, _words(settings)))
                dropped[text] = (count + 1, example)
                continue
            found.append(choice)
    gone = tuple(Dropped(reason=text, count=n, example=example) for text, (n, example) in sorted(dropped.items()))
    if not found:
        raise NothingFits(
            f"no configuration of {topology.gpus} x {topology.accelerator.name} holds this model",
            hint="more GPUs, a narrower number format, or a shorter context",
            dropped=msgspec.to_builtins(gone),
        )
    leaders = _leaders(found)
    refined = [_choice(arch, topology, choice.settings, workload, slo, has_near=True) for choice in leaders]
    kept = [choice for choice in refined if not choice.misses] or refined
    front = pareto(kept)
    return SearchResult(evaluated=len(found), front=tuple(front), best=_best(front), dropped=gone)


def _variants(space: SearchSpace, layout: ServingLayout) -> Iterator[EngineSettings]:
    for weights in space.weights:
        for kv_dtype in space.kv_dtypes:
            for places in space.max_num_seqs:
                for chunk in space.chunk_tokens:
                    memory = MemorySettings(
                        utilization=space.utilization, max_num_seqs=places, max_num_batched_tokens=chunk
                    )
                    yield EngineSettings(
                        backend=space.backend,
                        version=space.version,
                        weights=weights,
                        kv_dtype=kv_dtype,
                        layout=layout,
                        memory=memory,
                    )


def _choice(
    arch: Architecture, topology: Topology, settings: EngineSettings, workload: Workload, slo: Slo, *, has_near: bool
) -> Choice:
    replicas = max(1, topology.gpus // settings.layout.gpus)
    share = msgspec.structs.replace(
        workload,
        concurrency=max(1.0, workload.concurrency / replicas) if workload.concurrency else 0.0,
        request_rate=workload.request_rate / replicas,
    )
    estimate = estimate_serving(arch, topology, settings, share, has_near=has_near)
    gpus = replicas * settings.layout.gpus
    tokens = estimate.output_tokens_per_s.value * replicas
    price = topology.accelerator.usd_per_hour
    used = estimate.kv.bytes_per_token * (share.isl + share.osl / 2) * estimate.running / settings.layout.dp
    misses = ["memory"] if not estimate.fits else slo.misses(estimate)
    if estimate.is_saturated and estimate.fits:
        misses.append("rate" if share.request_rate else "places")  # requests would wait without limit, or in turns
    return Choice(
        settings=settings,
        replicas=replicas,
        gpus=gpus,
        estimate=estimate,
        output_tokens_per_s=tokens,
        usd_per_million_tokens=gpus * price / 3600 / tokens * 1e6 if price and tokens > 0 else None,
        headroom=max(0.0, estimate.kv.bytes - used) / topology.accelerator.visible_bytes,
        misses=tuple(misses),
    )


def _objectives(choice: Choice) -> tuple[float, ...]:
    """Smaller is better: cost (GPUs for each token a second), TTFT, TPOT, and memory that is not left over."""
    return (
        choice.gpus / max(choice.output_tokens_per_s, 1e-12),
        choice.estimate.ttft_s.value,
        choice.estimate.tpot_s.value,
        -choice.headroom,
    )


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """Choices that no other dominates, cheapest first; of equal ones the first."""
    found: list[tuple[tuple[float, ...], Choice]] = []
    for objectives, choice in sorted(((_objectives(c), c) for c in choices), key=lambda item: item[0]):
        if not any(all(a <= b for a, b in zip(other, objectives, strict=True)) for other, _ in found):
            found.append((objectives, choice))
    return [choice for _, choice in found]


def _leaders(found: Sequence[Choice]) -> list[Choice]:
    """The physics' front and the best by each objective, those within the limits first, at most REFINED."""
    good = [choice for choice in found if not choice.misses] or list(found)
    front = pareto(good)
    ranked = sorted(good, key=_objectives)
    merged = {id(choice): choice for choice in (*front[: REFINED // 2], *ranked, *front)}
    return list(merged.values())[:REFINED]


def _best(front: Sequence[Choice]) -> dict[str, Choice]:
    def named(choice: Choice, why: str) -> Choice:
        return msgspec.structs.replace(
            choice, rationale=f"{why}: {_words(choice.settings)}, {choice.replicas} replicas"
        )

    keys = {
        "throughput": (0, "most tokens for each GPU"),
        "ttft": (1, "first token soonest"),
        "latency": (2, "tokens fastest"),
        "memory": (3, "most memory left"),
    }
    return {
        name: named(min(front, key=lambda choice, at=at: _objectives(choice)[at]), why)  # type: ignore[misc]
        for name, (at, why) in keys.items()
    }


def _words(settings: EngineSettings) -> str:
    layout = settings.layout
    degrees = f"tp{layout.tp} pp{layout.pp} dp{layout.dp} ep{layout.ep}"
    memory = settings.memory
    return (
        f"{degrees} {settings.weights or 'as shipped'} seqs {memory.max_num_seqs} chunk {memory.max_num_batched_tokens}"
    )


def largest_load(
    arch: Architecture,
    topology: Topology,
    settings: EngineSettings,
    workload: Workload,
    slo: Slo,
    *,
    limit: int = 65536,
) -> tuple[int, ServingEstimate]:
    """The largest concurrency at which every limit holds, and its estimate; (0, the estimate of one) when none does."""

    def at(concurrency: int) -> ServingEstimate:
        load = msgspec.structs.replace(workload, concurrency=float(concurrency), request_rate=0.0)
        return estimate_serving(arch, topology, settings, load)

    one = at(1)
    if slo.misses(one):
        return 0, one
    low, answer = 1, one
    high = 2
    while high <= limit:
        found = at(high)
        if slo.misses(found) or found.is_saturated:
            break
        low, answer = high, found
        high *= 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if slo.misses(found) or found.is_saturated:
            high = middle
        else:
            low, answer = middle, found
    return low, answer


def step_cost_of(
    arch: Architecture, topology: Topology, settings: EngineSettings, workload: Workload
) -> tuple[StepCost, int]:
    """The simulation's costs and places, from estimates at a few batch sizes."""
    points = []
    places = (settings.memory.max_num_seqs or USUAL_SEQUENCES) * settings.layout.dp
    sizes = sorted({1, *(size for size in (4, 16, 64, 256, 1024) if size < places), places})
    prompt_token_s = 0.0
    for size in sizes:
        load = msgspec.structs.replace(workload, concurrency=float(size), request_rate=0.0)
        found = estimate_serving(arch, topology, settings, load)
        prefill = found.step_parts_s.get("prefill", 0.0)
        points.append((float(size), max(found.tpot_s.value - prefill, found.tpot_s.value * 1e-3)))
        tokens = found.running / workload.osl * max(1.0, workload.isl * (1 - workload.prefix_hit))
        prompt_token_s = prefill / tokens
        if found.is_saturated:
            places = min(places, max(1, int(found.running)))
    rising = [points[0]]
    for sequences, seconds in points[1:]:
        rising.append((sequences, max(seconds, rising[-1][1])))
    return StepCost(decode_points=tuple(rising), prompt_token_s=prompt_token_s, ttft_fixed_s=0.01), places


def load_curve(
    arch: Architecture,
    topology: Topology,
    settings: EngineSettings,
    workload: Workload,
    *,
    rates: Sequence[float] = (),
    requests: int = 400,
) -> list[LoadPoint]:
    """Latency against request rate, simulated; by default at ten shares of the engine's own capacity."""
    cost, places = step_cost_of(arch, topology, settings, workload)
    prompt = max(1.0, workload.isl * (1 - workload.prefix_hit))
    full = cost.decode_s(places) + places / workload.osl * prompt * cost.prompt_token_s
    capacity = places / (workload.osl * full)
    shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    found = []
    for rate in rates or [share * capacity for share in shares]:
        times = arrivals_at(rate, requests)
        chunk = float(settings.memory.max_num_batched_tokens)
        found.append(simulate(cost, prompt=prompt, output=workload.osl, places=places, chunk=chunk, arrivals=times))
    return found
