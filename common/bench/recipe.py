"""A benchmark: what serves, what load is put on it, what is watched, what is varied, and what counts as good.

One YAML or JSON document, from `recipes/benchmark/` or sent with the request. Strict: an unknown key is an error with
its place. Times are seconds or written as `90s`, `15m`, `2h`. Everything that is not set has its default here, so that
the document kept with a result says all that was done.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from common.bench import spec as spec_of
from common.bench.documents import endless
from common.bench.spec import LoadSpec
from common.errors import InvalidRecipe

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_TIMES = frozenset(
    (
        *("duration", "warmup", "cooldown", "think", "stagger", "turn_think", "drain", "timeout", "first_timeout"),
        *("peak_at", "peak_for", "period", "interval", "pause", "ready_timeout"),
    )
)
SWEPT = (
    *("rate", "concurrency", "arrivals", "burstiness", "scenarios", "prefix_tokens", "turns", "model", "parameters"),
)
MAX_POINTS = 500
MAX_REPETITIONS = 50
MAX_LOAD_NODES = 256
MAX_URLS = 1_024
_LONGEST_S = 7 * 86_400.0


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Root of a recipe's parts."""


class Serve(Part, frozen=True, kw_only=True):
    """A service that is made for the benchmark and removed after it. Fields as in `herder.types.CreateService`."""

    model: str = ""
    recipe: str = ""
    replicas: int = 1
    devices: tuple[str, ...] = ()
    config: dict[str, Any] = {}
    keep: bool = False
    """Left running afterwards."""


class Server(Part, frozen=True, kw_only=True):
    """What is asked: exactly one of `service` (that is there already), `serve` (made for it) and `urls`."""

    service: str = ""
    serve: Serve | None = None
    urls: tuple[str, ...] = ()
    """Addresses that Herder does not manage; never given one of its tokens."""
    via: Literal["engine", "gateway"] = "engine"
    """A service's replicas themselves, or the head's gateway."""
    spread: Literal["round-robin", "random", "all-to-all", "static"] = "round-robin"
    """How requests of the load nodes go to several endpoints. static: load node i asks endpoint i alone."""
    ready_timeout: float = 900.0


class Load(LoadSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The load, and from where. `model` empty: the service's model."""

    nodes: int | tuple[str, ...] = 1
    """How many nodes send, or which. They together do the one schedule."""


class Monitor(Part, frozen=True, kw_only=True):
    """What is sampled beside the load."""

    enabled: bool = True
    interval: float = 1.0
    on: Literal["server", "load", "both"] = "both"
    engine: bool = True
    """The engines' own metrics, too."""


class Slo(Part, frozen=True, kw_only=True):
    """What counts as good enough: limits in milliseconds, met by at least `attainment` of the requests."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    attainment: float = 0.99
    error_rate: float = 0.01

    @property
    def texts(self) -> tuple[str, ...]:
        """As LoadSpec.slos."""
        named = (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
        return tuple(f"{name}:{value:g}" for name, value in named if value is not None)


class Search(Part, frozen=True, kw_only=True):
    """Saturation: the most load that meets the SLO, by doubling and then bisection of `over`."""

    over: Literal["rate", "concurrency"] = "rate"
    start: float = 1.0
    most: float = 1_000.0
    precision: float = 0.05
    """Ends when the bracket is this narrow, as a share of its lower end (concurrency: or 1)."""
    max_points: int = 20


class BenchmarkRecipe(Part, frozen=True, kw_only=True):
    """One benchmark."""

    name: str
    category: Literal["benchmark"] = "benchmark"
    description: str = ""
    server: Server
    load: Load
    monitor: Monitor = Monitor()
    sweep: dict[str, list[Any]] = {}
    """Fields of `load` (SWEPT) and the values that each takes; several fields: every combination."""
    repetitions: int = 1
    slo: Slo | None = None
    search: Search | None = None
    mlperf: Literal["", "server", "offline"] = ""
    """MLPerf's scenario with its validity rules: see docs."""
    logs: bool = True
    """Engines' and generators' logs of the time are kept with the result."""
    pause: float = 0.0
    """Between two points."""
    timeout: float = 86_400.0
    """Of the whole benchmark."""
    labels: dict[str, str] = {}


def parse(text: str | bytes, *, where: str = "benchmark") -> BenchmarkRecipe:
    """A recipe from YAML (JSON is YAML). Raises: InvalidRecipe with the place of the mistake."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRecipe(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None
    return convert(document, where=where)


def convert(document: Any, *, where: str = "benchmark", is_drawn: bool = True) -> BenchmarkRecipe:
    """A recipe from plain data, checked as far as that needs no file and no cluster. Raises: InvalidRecipe.

    A check draws every schedule; without `is_drawn` it is left to the load nodes, which say it just as well.
    """
    try:
        if (place := endless(document)) is not None:
            hint = "; arrivals: constant has equal gaps" if place.endswith("burstiness") else ""
            raise ValueError(f"{place}: numbers are finite{hint}")
        recipe = msgspec.convert(_with_seconds(document), BenchmarkRecipe)
        _check(recipe, is_drawn=is_drawn)
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidRecipe(f"{where}: {error}", hint=_nearest_field(str(error))) from None
    return recipe


def _nearest_field(said: str) -> str:
    """A hint for a field that is not there: where it stands, or what is written nearly so; empty for other faults."""
    found = _UNKNOWN_FIELD.search(said)
    part = _PARTS.get(found[2]) if found is not None else None
    if found is None or part is None:
        return ""
    for place, other in _PARTS.items():
        if found[1] in other.__struct_encode_fields__:
            return f"it is a field of {(place or 'the recipe itself').removeprefix('$.')}"
    near = difflib.get_close_matches(found[1], part.__struct_encode_fields__, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def load_benchmarks(root: Path) -> dict[str, tuple[BenchmarkRecipe, str]]:
    """All benchmark recipes below a folder by name, each with its path relative to it. Raises: InvalidRecipe."""
    found: dict[str, tuple[BenchmarkRecipe, str]] = {}
    for path in sorted(root.rglob("*.y*ml")):
        relative = str(path.relative_to(root))
        recipe = parse(path.read_text(), where=relative)
        if recipe.name in found:
            raise InvalidRecipe(f"{relative}: {recipe.name!r} is also in {found[recipe.name][1]}")
        found[recipe.name] = (recipe, relative)
    return found


def sha256_of(recipe: BenchmarkRecipe) -> str:
    """Of the recipe with its defaults in, in one order: the same for every way of writing the same."""
    return hashlib.sha256(msgspec.json.encode(msgspec.to_builtins(recipe), order="sorted")).hexdigest()


def load_of(recipe: BenchmarkRecipe, changes: Mapping[str, Any], seed: int, *, is_checked: bool = False) -> LoadSpec:
    """The run of one point: the recipe's load with the point's changes, the SLO as limits, and its own seed.

    `is_checked`: it was before, and is not again: a check draws the whole schedule. Raises: ValueError.
    """
    plain = msgspec.to_builtins(recipe.load)
    plain.pop("nodes", None)
    plain |= dict(changes)
    if "concurrency" in changes:
        plain |= {"rate": None}
    elif "rate" in changes:
        plain |= {"concurrency": None}
    if recipe.slo is not None and recipe.slo.texts:
        plain["slos"] = recipe.slo.texts
    made = msgspec.convert(_with_seconds(plain) | {"seed": seed}, LoadSpec)
    if not is_checked:
        spec_of.check(made)
    return made


def points_of(recipe: BenchmarkRecipe) -> list[dict[str, Any]]:
    """The changes of every point of the sweep, in order, repetitions not counted; one without changes for none."""
    points: list[dict[str, Any]] = [{}]
    for name, values in recipe.sweep.items():
        points = [point | {name: value} for point in points for value in values]
    return points


def _with_seconds(document: Any, depth: int = 0) -> Any:
    """Times written as text become seconds."""
    if depth > 20 or not isinstance(document, dict):
        return document
    made = {}
    for name, value in document.items():
        if name in _TIMES and isinstance(value, str):
            found = _TIME.fullmatch(value)
            if found is None:
                raise ValueError(f"{name}: {value!r} is no time; write 90s, 15m or 2h")
            made[name] = float(found[1]) * _SECONDS[found[2]]
        elif name in ("parameters", "class_parameters", "config", "sweep", "labels"):
            made[name] = value
        else:
            made[name] = _with_seconds(value, depth + 1)
    return made


_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`(?: - at `([^`]*)`)?")
_PARTS: dict[str | None, type[msgspec.Struct]] = {
    None: BenchmarkRecipe,
    "$.server": Server,
    "$.server.serve": Serve,
    "$.load": Load,
    "$.monitor": Monitor,
    "$.slo": Slo,
    "$.search": Search,
}
_SCHEMES = {
    "": ("https?", "http://10.0.0.7:8000"),
    "pgvector": ("postgres(?:ql)?", "postgresql://USER@HOST:PORT/DATABASE"),
}


def _check(recipe: BenchmarkRecipe, *, is_drawn: bool) -> None:
    if not _NAME.fullmatch(recipe.name):
        raise ValueError(f"name {recipe.name!r}: lower-case letters, digits and '-'")
    server = recipe.server
    if sum((bool(server.service), server.serve is not None, bool(server.urls))) != 1:
        raise ValueError("server: give one of service, serve and urls")
    if server.urls and server.via == "gateway":
        raise ValueError("server: via gateway needs a service of Herder")
    if len(server.urls) > MAX_URLS:
        raise ValueError(f"server.urls: at most {MAX_URLS}")
    scheme, example = _SCHEMES["pgvector" if recipe.load.api == "pgvector" else ""]
    for url in server.urls:
        if not re.fullmatch(scheme + "://[!-~]{1,2000}", url):
            told = re.sub(r"//[^/@]*@", "//***@", url)[:200]
            raise ValueError(f"server.urls: {told!r} is no URL that load can go to, as {example}")
    if recipe.search is not None and recipe.slo is None:
        raise ValueError("search needs an slo: what the most load must still meet")
    if recipe.search is not None and recipe.search.over in recipe.sweep:
        raise ValueError(f"{recipe.search.over} is searched already and cannot be swept")
    if unknown := set(recipe.sweep) - set(SWEPT):
        raise ValueError(f"sweep: {sorted(unknown)[0]!r} cannot be varied; one of {', '.join(SWEPT)}")
    if any(not values for values in recipe.sweep.values()):
        raise ValueError("sweep: a field without values")
    if not 1 <= recipe.repetitions <= MAX_REPETITIONS:
        raise ValueError(f"repetitions is 1 to {MAX_REPETITIONS}")
    count = recipe.repetitions
    for values in recipe.sweep.values():
        count *= len(values)
    if count > MAX_POINTS:
        raise ValueError(f"{count} runs; at most {MAX_POINTS}")
    nodes = recipe.load.nodes
    if not 1 <= (nodes if isinstance(nodes, int) else len(nodes)) <= MAX_LOAD_NODES:
        raise ValueError(f"load.nodes is 1 to {MAX_LOAD_NODES}")
    if not isinstance(nodes, int) and len(set(nodes)) != len(nodes):
        raise ValueError("load.nodes: a node is named twice")
    if not 0 < recipe.timeout <= _LONGEST_S or not 0 <= server.ready_timeout <= _LONGEST_S:
        raise ValueError("timeout and ready_timeout are at most 7 days")
    if not 0 <= recipe.pause <= _LONGEST_S:
        raise ValueError("pause is 0 to 7 days")
    search = recipe.search
    if search is not None and not (0 < search.start <= search.most and 0 < search.precision < 1):
        raise ValueError("search: 0 < start <= most, and precision is a share above 0 and below 1")
    if search is not None and not 1 <= search.max_points <= MAX_POINTS:
        raise ValueError(f"search.max_points is 1 to {MAX_POINTS}")
    if not 0.05 <= recipe.monitor.interval <= 3600:
        raise ValueError("monitor.interval is 0.05 s to 1 h")
    start = {recipe.search.over: recipe.search.start} if recipe.search is not None else {}
    if recipe.search is not None and recipe.search.over == "concurrency":
        start = {"concurrency": max(1, int(recipe.search.start))}
    for point in points_of(recipe):
        load_of(recipe, point | start, recipe.load.seed, is_checked=not is_drawn)
