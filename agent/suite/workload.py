"""A workload as it is sent to an executor (`POST /start`), and the load run that it becomes.

Every key has an effect or is refused; keys that nobody knows are told in the answer. A service that is not asked by
the load generator but by threads of its own reads the same keys.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec

from agent.loadgen.order import Aim
from agent.suite import times
from agent.suite.schema import Strategy
from common.bench.spec import LoadSpec

PROMPT_TOKENS = 32
"""Without prompt_len and dataset: about what the toolkit's HellaSwag contexts are."""
ANSWER_TOKENS = 100
"""Without gen_tokens: the toolkit's own limit, and then no answer is made longer than the model wants."""
BURSTINESS = 0.25
REQUEST_TIMEOUT_S = 600.0
DRAIN_S = 120.0
SLOTS_PER_PROCESS, RATE_PER_PROCESS = 500, 3_000
SHIPPED_NAMES = ("hellaswag", "sharegpt", "alpaca")
KEYS = (
    *("server_url", "server_endpoints", "service", "name", "model", "duration", "warmup", "clients_per_node"),
    *("num_threads", "sleep_seconds", "concurrency", "batch", "prompt_len", "gen_tokens", "target_rps"),
    *("request_distribution", "burstiness", "dataset", "tokenizer", "api", "path", "streaming", "parameters"),
    *("request_timeout", "distribution_strategy", "seed", "part", "parts"),
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a service is asked when nothing else is said."""

    api: str = "chat"
    path: str | None = None
    method: str = "POST"
    apis: tuple[str, ...] = ("chat", "completions", "ollama", "http")
    """Those that make sense for it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an executor is to do."""

    urls: tuple[str, ...]
    spread: str
    slots: int
    """Requests kept on their way by this executor; 0 in an open loop."""
    duration_s: float
    warmup_s: float
    part: int
    parts: int
    ignored: tuple[str, ...] = ()


def unknown_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a configuration that have no effect here."""
    return tuple(sorted(str(key) for key in config if key not in KEYS))


def plan_of(config: Mapping[str, Any]) -> Plan:
    """What can be said of a workload without its service. Raises: ValueError that says what to change."""
    part, parts = _whole(config, "part", 0, least=0), _whole(config, "parts", 1)
    if part >= parts:
        raise ValueError(f"part {part} of {parts}: parts are counted from 0")
    strategy = config.get("distribution_strategy") or "round-robin"
    if strategy not in get_args(Strategy):
        raise ValueError(f"distribution_strategy {strategy!r}: one of {', '.join(get_args(Strategy))}")
    slots = 0
    if config.get("target_rps") is None:
        slots = _slots(config, parts)
    elif config.get("concurrency") is not None or config.get("batch") is not None:
        raise ValueError("target_rps is an open loop, concurrency and batch belong to the closed one: take one")
    elif config.get("sleep_seconds"):
        raise ValueError("target_rps is an open loop: its schedule says when to send, not sleep_seconds")
    duration = times.seconds(_given(config, "duration"))
    if duration <= 0:
        raise ValueError("duration must be more than 0")
    return Plan(
        _urls(config),
        str(strategy),
        slots,
        duration,
        times.seconds(config.get("warmup") or 0),
        part,
        parts,
        unknown_keys(config),
    )


def _given(config: Mapping[str, Any], name: str) -> Any:
    value = config.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


def _whole(config: Mapping[str, Any], name: str, default: int, *, least: int = 1, most: int = 1_000_000) -> int:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, list):
        raise ValueError(f"{name}: one run takes one value; a list is swept by `herder orchestrate`")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {least} to {most:,}")
    return int(value)


def _slots(config: Mapping[str, Any], parts: int) -> int:
    """Requests that one executor keeps on their way, rounded up where `concurrency` is not a multiple."""
    if config.get("concurrency") is not None:
        whole = _whole(config, "concurrency", 1)
        if whole < parts:
            raise ValueError(f"concurrency {whole} is less than the {parts} clients that share it")
        return math.ceil(whole / parts)
    each = _whole(config, "num_threads", _whole(config, "clients_per_node", 1))
    return each * _whole(config, "batch", 1)


def _urls(config: Mapping[str, Any]) -> tuple[str, ...]:
    given = config.get("server_endpoints") or config.get("server_url")
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given or not all(isinstance(url, str) and url for url in given):
        raise ValueError("server_endpoints (a list of URLs) or server_url is missing")
    urls = [(url if "://" in url else f"http://{url}").rstrip("/") for url in given]
    return tuple(dict.fromkeys(urls))


def spec_of(config: Mapping[str, Any], plan: Plan, style: Style, roots: Sequence[Path]) -> LoadSpec:
    """The load run of a workload. Raises: ValueError that says what to change; OSError for files."""
    api = str(config.get("api") or style.api)
    if api not in style.apis:
        raise ValueError(f"api {api!r}: one of {', '.join(style.apis)}")
    timeout = times.seconds(config.get("request_timeout") or REQUEST_TIMEOUT_S)
    fields: dict[str, Any] = {
        "model": str(config.get("model") or ""),
        "api": api,
        "path": config.get("path") or (style.path if api == style.api else None),
        "method": style.method if api == "http" else "POST",
        "duration": plan.duration_s,
        "warmup": plan.warmup_s,
        "seed": _whole(config, "seed", 0, least=0, most=1 << 60),
        "stream": bool(config.get("streaming", True)),
        "timeout": timeout,
        "first_timeout": timeout,
        "drain": min(timeout, DRAIN_S),
    }
    if config.get("tokenizer"):
        fields["tokenizer"] = str(inside(Path(str(config["tokenizer"])), roots))
    fields |= _arrivals(config, plan)
    if api != "http":
        fields |= _sizes(config, api, roots)
    return msgspec.convert(fields, LoadSpec)


def _arrivals(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The loop: open at `target_rps`, or closed."""
    distribution = config.get("request_distribution") or "constant"
    if distribution not in ("constant", "poisson", "burst"):
        raise ValueError(f"request_distribution {distribution!r}: one of constant, poisson, burst")
    if config.get("burstiness") is not None and distribution != "burst":
        raise ValueError("burstiness belongs to request_distribution burst")
    rate = config.get("target_rps")
    processors = max(1, os.cpu_count() or 1)
    if rate is None:
        if config.get("request_distribution") not in (None, "constant"):
            raise ValueError(f"request_distribution {distribution} needs target_rps: a closed loop has no arrivals")
        whole = config.get("concurrency")
        total = _whole(config, "concurrency", 1) if whole is not None else plan.slots * plan.parts
        workers = min(processors, 1 + plan.slots // SLOTS_PER_PROCESS)
        think = config.get("sleep_seconds") or 0.0
        return {"concurrency": total, "think": float(think), "workers": workers}
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 10_000_000:
        raise ValueError(f"target_rps {rate!r} is not a rate")
    made: dict[str, Any] = {"rate": float(rate), "arrivals": "gamma" if distribution == "burst" else distribution}
    if distribution == "burst":
        made["burstiness"] = float(config.get("burstiness") or BURSTINESS)
    made["workers"] = min(processors, 1 + int(rate / plan.parts) // RATE_PER_PROCESS)
    return made


def _sizes(config: Mapping[str, Any], api: str, roots: Sequence[Path]) -> dict[str, Any]:
    """Prompts and answers."""
    wanted = config.get("gen_tokens")
    answer = _whole(config, "gen_tokens", ANSWER_TOKENS)
    parameters = dict(config.get("parameters") or {})
    made: dict[str, Any] = {"exact": wanted is not None}
    if api == "ollama":
        # A body's `options` replace the generator's: what it would have put there is put back.
        parameters["options"] = {"num_predict": answer, "temperature": 0} | dict(parameters.get("options") or {})
    if config.get("dataset"):
        if config.get("prompt_len") is not None:
            raise ValueError("dataset brings its own prompts: leave prompt_len out")
        made["dataset"] = dataset_path(str(config["dataset"]), roots)
        if api != "ollama":
            sizes = {"max_tokens": answer} | ({"min_tokens": answer} if wanted is not None else {})
            parameters = sizes | parameters
    else:
        made["scenarios"] = [f"D({_whole(config, 'prompt_len', PROMPT_TOKENS)},{answer})"]
    return made | {"parameters": parameters}


def dataset_path(named: str, roots: Sequence[Path]) -> str:
    """`FILE` or `FILE:kind` of a dataset that is named by its path or, for known ones, by its name."""
    if named.lower() in SHIPPED_NAMES:
        for root in roots:
            for suffix in ("jsonl", "json", "csv"):
                for path in sorted(root.glob(f"{named.lower()}*.{suffix}")):
                    return f"{inside(path, roots)}:{named.lower()}"
        places = ", ".join(map(str, roots)) or "a folder named by --file-root"
        raise ValueError(
            f"dataset {named}: no {named.lower()}*.jsonl in {places}; fetch it there, or leave dataset out for the "
            "shipped corpus"
        )
    name, colon, kind = named.rpartition(":")
    path, kind = (Path(name), f":{kind}") if colon and "/" not in kind else (Path(named), "")
    return f"{inside(path, roots)}{kind}"


def inside(path: Path, roots: Sequence[Path]) -> Path:
    """The file, when it lies in a folder that may be read. Raises: ValueError."""
    for root in roots:
        found = (root / path).resolve()
        if found.is_relative_to(root.resolve()):
            if not found.is_file() and not found.is_dir():
                raise ValueError(f"{path}: there is no such file")
            return found
    raise ValueError(f"{path} lies in no folder that this executor may read; name its folder with --file-root")


def aim_of(plan: Plan, headers: Sequence[str], ca_file: str | None = None) -> Aim:
    """Where the load goes."""
    return Aim(plan.urls, plan.spread, tuple(headers), ca_file)
