"""The spec of a load run: one document that the command line, recipes, the head and the load nodes share.

Times are seconds. `check` says what cannot be; it needs no file and no network, so the head refuses a bad spec at its
border. What needs files (datasets, traces, tokenizers) is checked where they are.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import msgspec

from common.bench import scenario, schedule
from common.bench.metrics import Limit
from common.bench.schedule import Profile, Schedule

APIS = (
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "speech",
    "ollama",
    "ollama-generate",
    "ollama-embed",
    "http",
    "qdrant",
    "pgvector",
)
VECTOR_APIS = ("qdrant", "pgvector")
DISTANCES = ("cosine", "l2", "dot")
MAX_DIM = 65_536
MAX_POINTS = 10_000_000
ARRIVALS = ("poisson", "constant", "gamma", "burst", "ramp", "steps", "spike", "sine", "trace", "offline")
MAX_WORKERS = 256
MAX_SLOTS = 100_000
SLO_METRICS = ("ttft", "tpot", "e2e")
_COLLECTION = {
    "qdrant": re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}"),
    "pgvector": re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}(?:\.[A-Za-z_][A-Za-z0-9_]{0,62})?"),
}
_STEP = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What load is put on a server. Defaults are those of `herder bench`."""

    model: str = ""
    """Its name in requests."""
    api: str | None = None
    """One of APIS; None: what the scenarios need."""
    rate: float | None = None
    """Open loop: requests per second."""
    arrivals: str = "poisson"
    burstiness: float | None = None
    burst_size: int | None = None
    """Arrivals burst: so many together, every burst_size / rate seconds."""
    peak: float | None = None
    peak_at: float | None = None
    peak_for: float | None = None
    period: float | None = None
    steps: tuple[str, ...] = ()
    """RATExTIME, one after the other."""
    trace: str | None = None
    """A file."""
    speed: float = 1.0
    concurrency: int | None = None
    """Closed loop: requests kept on their way."""
    in_flight: int | None = None
    """Open loop: the most requests on their way, over all processes; what is due beyond it waits."""
    think: float = 0.0
    stagger: float = 0.0
    duration: float | None = None
    """How long is measured; warm-up and cool-down come on top."""
    requests: int | None = None
    warmup: float = 0.0
    cooldown: float = 0.0
    scenarios: tuple[str, ...] = ()
    dataset: str | None = None
    """A file, or FILE:kind."""
    tokenizer: str | None = None
    """`server` or `server:URL`, whose /tokenize is asked; else a tokenizer.json."""
    prefix_tokens: int = 0
    prefix_groups: int = 1
    turns: int = 1
    turn_think: float = 0.0
    live_replies: bool = False
    """The next turn holds what the server really answered, not what was prepared."""
    batch: int = 1
    stream: bool = True
    exact: bool = True
    chunk_usage: bool = False
    parameters: dict[str, Any] = {}
    """Fields of the body."""
    class_parameters: dict[str, dict[str, Any]] = {}
    """More of them for the requests of one scenario, by its text."""
    path: str | None = None
    method: str = "POST"
    body: str | None = None
    """Plain HTTP: a file."""
    collection: str = ""
    """Vector search: Qdrant's collection, or a table of PostgreSQL."""
    vector_dim: int = 0
    vectors: str | None = None
    """A file of query vectors, JSON lines; None: drawn."""
    vector_column: str = "embedding"
    top_k: int = 10
    distance: str = "cosine"
    points: int = 0
    """Vector search: the collection is made with so many points before the run, and removed after it."""
    vector_index: str = "hnsw"
    slos: tuple[str, ...] = ()
    """METRIC:MILLISECONDS."""
    seed: int = 0
    workers: int = 1
    """Processes on each load node."""
    drain: float = 60.0
    timeout: float = 900.0
    first_timeout: float = 300.0

    @property
    def is_open(self) -> bool:
        """Whether requests are sent on a schedule, whatever came back."""
        return self.concurrency is None

    @property
    def is_offline(self) -> bool:
        """Whether everything is due at the start, for throughput."""
        return self.arrivals == "offline"

    @property
    def until_s(self) -> float | None:
        """How long is sent; None where the number of requests ends the run."""
        return None if self.duration is None else self.warmup + self.duration + self.cooldown


def check(spec: LoadSpec) -> None:
    """Raises: ValueError that says what to change."""
    is_trace = spec.arrivals == "trace" or spec.trace is not None
    if spec.arrivals not in ARRIVALS:
        raise ValueError(f"arrivals {spec.arrivals!r}: one of {', '.join(ARRIVALS)}")
    if spec.api is not None and spec.api not in APIS:
        raise ValueError(f"api {spec.api!r}: one of {', '.join(APIS)}")
    if not spec.is_open and (spec.rate is not None or is_trace or spec.steps):
        raise ValueError("concurrency is a closed loop, rate, steps and trace an open one; take one")
    if spec.is_offline:
        _check_offline(spec)
    elif spec.is_open and spec.rate is None and not is_trace and not spec.steps:
        raise ValueError("say how much load: rate (open loop) or concurrency (closed loop)")
    if spec.duration is None and spec.requests is None and not is_trace:
        raise ValueError("say how long: duration or requests")
    if spec.arrivals == "trace" and not spec.trace:
        raise ValueError("arrivals trace needs a trace file")
    _check_pace(spec, is_trace)
    if spec.is_open and (spec.think or spec.stagger):
        raise ValueError("think and stagger belong to the closed loop (concurrency)")
    if not spec.is_open and spec.in_flight is not None:
        raise ValueError("in_flight is for open loops; concurrency itself limits a closed one")
    bounds = {
        "concurrency": MAX_SLOTS,
        "in_flight": MAX_SLOTS,
        "burst_size": MAX_SLOTS,
        "requests": schedule.MAX_ARRIVALS,
        "workers": MAX_WORKERS,
        "turns": 1000,
        "batch": 10_000,
        "prefix_groups": 100_000,
    }
    for name, most in bounds.items():
        value = getattr(spec, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} is 1 to {most:,}")
    for name in ("think", "stagger", "warmup", "cooldown", "turn_think", "drain", "timeout", "first_timeout"):
        if not 0 <= getattr(spec, name) <= 7 * 86_400:
            raise ValueError(f"{name} is 0 to 7 days")
    if spec.duration is not None and not 0 < spec.duration <= 7 * 86_400:
        raise ValueError("duration is more than 0 and at most 7 days")
    if (spec.burst_size is not None) != (spec.arrivals == "burst"):
        raise ValueError("arrivals burst and burst_size go together")
    if spec.burst_size is not None and not spec.is_open:
        raise ValueError("bursts are an open loop; concurrency has none")
    if spec.in_flight is not None and spec.workers > spec.in_flight:
        raise ValueError("more workers than in_flight")
    if spec.concurrency is not None and spec.workers > spec.concurrency:
        raise ValueError("more workers than concurrency")
    _check_vectors(spec)
    if spec.live_replies and (spec.turns < 2 or spec.parameters.get("n", 1) != 1):
        raise ValueError("live_replies is for conversations: turns of 2 or more, and one answer to each (n)")
    if not re.fullmatch(r"[A-Z]{1,20}", spec.method) or spec.method in ("HEAD", "CONNECT"):
        raise ValueError(f"method {spec.method!r}: GET, POST, PUT, PATCH, DELETE or OPTIONS")
    for text in spec.scenarios:
        scenario.parse(text)
    if len(set(spec.scenarios)) < len(spec.scenarios):
        raise ValueError("a scenario is named twice; x2 behind it gives it twice the weight")
    if unknown := set(spec.class_parameters) - set(spec.scenarios):
        raise ValueError(f"class_parameters: {sorted(unknown)[0]!r} is none of the scenarios")
    limits_of(spec)
    if spec.is_open and spec.trace is None:
        schedule_of(spec)


def _check_pace(spec: LoadSpec, is_trace: bool) -> None:
    """What would say nothing about the arrivals that were asked for is refused, not passed over."""
    if is_trace:
        names = ("rate", "peak", "steps", "burstiness")
        if named := next((name for name in names if getattr(spec, name)), None):
            raise ValueError(f"{named} has no meaning for a trace, which has its own arrivals; speed plays it faster")
    elif spec.speed != 1.0:
        raise ValueError("speed is for a trace")
    if spec.steps and spec.rate is not None:
        raise ValueError("steps have their own rates; leave rate out")
    if spec.arrivals != "sine" and spec.period is not None:
        raise ValueError("period is for arrivals sine")
    if spec.arrivals != "spike" and (spec.peak_at is not None or spec.peak_for is not None):
        raise ValueError("peak_at and peak_for are for arrivals spike")


def _check_vectors(spec: LoadSpec) -> None:
    if spec.api not in VECTOR_APIS:
        own = ("collection", "vector_dim", "vectors", "points")
        if named := next((name for name in own if getattr(spec, name)), None):
            raise ValueError(f"{named} is for the APIs {' and '.join(VECTOR_APIS)}")
        return
    names = ("scenarios", "dataset", "trace", "tokenizer", "prefix_tokens", "live_replies", "body", "path")
    if named := next((name for name in names if getattr(spec, name)), None):
        raise ValueError(f"{named} has no meaning for vector search")
    if spec.turns != 1 or spec.batch != 1:
        raise ValueError("a vector search asks one thing at a time: no turns, no batch")
    if not _COLLECTION[spec.api].fullmatch(spec.collection):
        raise ValueError(f"collection {spec.collection!r} is not a name; a vector search needs one")
    if not _COLLECTION["pgvector"].fullmatch(spec.vector_column) or "." in spec.vector_column:
        raise ValueError(f"vector_column {spec.vector_column!r} is not a name")
    if not (1 <= spec.vector_dim <= MAX_DIM or (spec.vectors and not spec.vector_dim)):
        raise ValueError(f"vector_dim is 1 to {MAX_DIM:,}, the numbers of each vector")
    if not 1 <= spec.top_k <= 10_000 or not 0 <= spec.points <= MAX_POINTS:
        raise ValueError(f"top_k is 1 to 10,000, points at most {MAX_POINTS:,}")
    if spec.distance not in DISTANCES or spec.vector_index not in ("hnsw", "none"):
        raise ValueError(f"distance is one of {', '.join(DISTANCES)}; vector_index hnsw or none")
    if spec.points and not spec.vector_dim:
        raise ValueError("points are drawn: say their vector_dim")


def _check_offline(spec: LoadSpec) -> None:
    if not spec.is_open or spec.rate is not None or spec.trace is not None or spec.steps:
        raise ValueError("arrivals offline sends everything at once: no rate, concurrency, steps or trace")
    if spec.requests is None or spec.duration is not None:
        raise ValueError("arrivals offline needs requests, and no duration")
    if spec.warmup or spec.cooldown:
        raise ValueError("arrivals offline has no warm-up or cool-down: everything is due at its start")


def limits_of(spec: LoadSpec) -> list[Limit]:
    """The limits for goodput. Raises: ValueError."""
    found = []
    for text in spec.slos:
        name, _, value = text.partition(":")
        if name not in SLO_METRICS or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise ValueError(f"{text!r} is not a limit; write ttft:500, tpot:50 or e2e:10000 (milliseconds)")
        found.append(Limit(name, float(value)))
    return found


def schedule_of(spec: LoadSpec) -> Schedule:
    """The whole schedule of an open loop without a trace: the same wherever it is drawn. Raises: ValueError."""
    if spec.is_offline:
        return schedule.all_at_once(spec.requests or 0)
    profile, kind = _profile(spec), spec.arrivals
    burstiness = spec.burstiness
    if burstiness is None:
        if kind == "gamma":
            raise ValueError("arrivals gamma needs burstiness")
        burstiness = schedule.EVEN if kind in ("constant", "burst") else 1.0
    elif kind in ("poisson", "constant", "burst"):
        raise ValueError(f"burstiness is for arrivals gamma and the rates that change, not {kind}")
    most = schedule.MAX_ARRIVALS // spec.turns
    if (spec.requests or 0) > most:
        raise ValueError(f"{spec.requests:,} conversations of {spec.turns} turns; at most {most:,}")
    drawn = schedule.draw(
        profile,
        burstiness=burstiness,
        together=spec.burst_size or 1,
        seed=spec.seed,
        duration_s=spec.until_s,
        requests=spec.requests,
    )
    if not len(drawn.times_ns):
        raise ValueError("no request falls into this time; a longer duration or a higher rate")
    return drawn


def trace_schedule(spec: LoadSpec, times_s: list[float], format_: str) -> Schedule:
    """The schedule of recorded arrivals. Raises: ValueError."""
    name = f"{format_} trace {PurePath(spec.trace or '').name} at {spec.speed:g} times its speed"
    drawn = schedule.from_times(times_s[: spec.requests], speed=spec.speed, name=name, limit_s=spec.until_s)
    if not len(drawn.times_ns):
        raise ValueError("no request falls into this time; a longer duration or a higher speed")
    return drawn


def _profile(spec: LoadSpec) -> Profile:
    kind, rate, peak, until_s = spec.arrivals, spec.rate, spec.peak, spec.until_s
    if spec.steps or kind == "steps":
        if not spec.steps:
            raise ValueError("arrivals steps needs steps, each as RATExTIME")
        return schedule.Steps(tuple(_step(text) for text in spec.steps))
    if rate is None:
        raise ValueError(f"arrivals {kind} needs a rate")
    if kind in ("ramp", "spike", "sine"):
        if peak is None or until_s is None:
            raise ValueError(f"arrivals {kind} needs peak and duration")
        if kind == "ramp":
            return schedule.Ramp(rate, peak, until_s)
        if kind == "spike":
            at_s = spec.peak_at if spec.peak_at is not None else until_s / 3
            return schedule.spike(rate, peak, at_s, spec.peak_for or until_s / 6)
        return schedule.Sine(rate, peak - rate, spec.period or until_s)
    if peak is not None:
        raise ValueError("peak is for arrivals ramp, spike and sine")
    return schedule.Flat(rate)


def _step(text: str) -> tuple[float, float]:
    found = _STEP.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a step; write 10x30s")
    return float(found[1]), float(found[2]) * _SECONDS[found[3]]
