"""From a recipe to the runs that are asked for: suite entries with their overrides, swept lists, repetitions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.suite import times
from agent.suite.schema import Entry, Load, Recipe

WARMUP = "30s"
"""The default of the toolkit's schema."""
SWEPT = ("prompt_len", "gen_tokens", "batch", "concurrency")
MAX_RUNS = 1_000
_CLOSED = ("concurrency", "batch", "sleep_seconds", "num_threads", "clients_per_node")
_OPEN = ("target_rps", "request_distribution", "burstiness")
_INDEX = re.compile(r"(\d+)(?:-(\d+))?")
_LIST = re.compile(r"([A-Za-z][A-Za-z0-9.-]*)\[([0-9,-]+)\]")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark of a suite: a configuration for `/start`, but for endpoints and parts."""

    name: str
    config: dict[str, Any]
    overrides: dict[str, Any]
    """What the suite's entry and the sweep set anew."""

    @property
    def length_s(self) -> float:
        """How long it sends."""
        return times.seconds(self.config["duration"]) + times.seconds(self.config.get("warmup") or 0)


def benchmarks_of(recipe: Recipe) -> list[Benchmark]:
    """Every run of a recipe but for its repetitions. Raises: ValueError for what cannot be combined."""
    base = base_of(recipe)
    found: list[Benchmark] = []
    entries: list[Entry | None] = [*recipe.workload.benchmark_suite] or [None]
    for entry in entries:
        overrides = _given(entry) if entry is not None else {}
        config = _without_other_loop(base, overrides) | overrides
        config.setdefault("warmup", WARMUP)
        name = entry.name if entry is not None else "benchmark"
        for swept in _combinations(config):
            label = "".join(f"-{key}-{value}" for key, value in swept.items() if isinstance(config[key], list))
            found.append(Benchmark(file_name(name + label), config | swept, overrides | swept))
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"workload.benchmark_suite: the name {twice[0]!r} is there twice")
    if len(found) * recipe.repetitions > MAX_RUNS:
        raise ValueError(f"{len(found) * recipe.repetitions:,} runs; at most {MAX_RUNS:,}")
    return found


def base_of(recipe: Recipe) -> dict[str, Any]:
    """The workload's own settings, with what stands elsewhere in the recipe."""
    clients = recipe.orchestration.node_allocation.clients
    base = _given(recipe.workload) | {
        "service": recipe.workload.service,
        "distribution_strategy": clients.distribution_strategy,
        "seed": recipe.metadata.seed,
    }
    if "clients_per_node" not in base:
        base["clients_per_node"] = clients.clients_per_node or recipe.resources.clients.clients_per_node or 1
    if recipe.artifacts.dataset and "dataset" not in base:
        base["dataset"] = recipe.artifacts.dataset
    layers = recipe.servers.service_config.get("gpu_layers")
    if recipe.workload.service == "ollama" and layers is not None:
        parameters = dict(base.get("parameters") or {})
        options = {"num_gpu": layers} | dict(parameters.get("options") or {})
        base["parameters"] = parameters | {"options": options}
    return base


def _given(load: Load | Entry) -> dict[str, Any]:
    """The fields of a Load that are set."""
    names = (field.name for field in msgspec.structs.fields(Load))
    return {name: value for name in names if (value := getattr(load, name)) is not None}


def _without_other_loop(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """An entry that names one kind of loop puts the workload's other kind out of force."""
    if "target_rps" in overrides:
        return {key: value for key, value in base.items() if key not in ("concurrency", "batch", "sleep_seconds")}
    if any(key in overrides for key in _CLOSED):
        left = {key: value for key, value in base.items() if key not in _OPEN}
        if "num_threads" in overrides or "clients_per_node" in overrides:
            left.pop("concurrency", None)
        return left
    return base


def _combinations(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of keys that are lists or may be."""
    keys = [key for key in SWEPT if config.get(key) is not None]
    values = [config[key] if isinstance(config[key], list) else [config[key]] for key in keys]
    if any(not options for options in values):
        raise ValueError(f"{keys[values.index([])]}: an empty list")
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def file_name(name: str) -> str:
    """A name that can be a file's."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", name).strip("._") or "benchmark"


def targets_of(recipe: Recipe, clients: Sequence[str], endpoints: Sequence[str]) -> dict[str, list[str]]:
    """The endpoints of each client by `target_mapping`; empty without one. Raises: ValueError."""
    found: dict[str, list[str]] = {}
    for number, mapping in enumerate(recipe.orchestration.node_allocation.clients.target_mapping):
        place = f"orchestration.node_allocation.clients.target_mapping[{number}]"
        chosen = [url for text in mapping.server_endpoints for url in _servers(text, endpoints, place)]
        if not chosen:
            raise ValueError(f"{place}: server_endpoints is empty")
        for at in _members(mapping.client_group, clients, place):
            found.setdefault(clients[at], []).extend(chosen)
    left = [client for client in clients if found and client not in found]
    if left:
        raise ValueError(f"target_mapping: no group has the client {left[0]}")
    return found


def _members(group: str | int, names: Sequence[str], place: str) -> list[int]:
    """Positions of a group: a number from 0, `1-3`, `node[001-003]`, a name, or `all`."""
    text = str(group)
    if text == "all":
        return list(range(len(names)))
    index = _INDEX.fullmatch(text)
    if index is not None:
        first, last = int(index[1]), int(index[2] or index[1])
        if not first <= last < len(names):
            raise ValueError(f"{place}: {text!r}, but there are {len(names)}, counted from 0")
        return list(range(first, last + 1))
    wanted = expanded(text)
    found = [at for at, name in enumerate(names) if name in wanted or name.partition(":")[0] in wanted]
    if not found:
        raise ValueError(f"{place}: {text!r} names none of {', '.join(names)}")
    return found


def _servers(text: str | int, endpoints: Sequence[str], place: str) -> list[str]:
    """Endpoints of a mapping: numbers, names, or addresses of their own."""
    if isinstance(text, str) and ("://" in text or re.fullmatch(r"[\w.-]+:\d+", text)):
        return [text if "://" in text else f"http://{text}"]
    hosts = [url.partition("://")[2] for url in endpoints]
    return [endpoints[at] for at in _members(text, hosts, place)]


def expanded(text: str) -> list[str]:
    """Names of `node[001-003,7]`; a plain name is itself. Raises: ValueError."""
    found = _LIST.fullmatch(text)
    if found is None:
        return [text]
    names = []
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) - int(first) > 10_000:
            raise ValueError(f"{text!r} is not a range of nodes")
        names += [f"{found[1]}{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return names


def range_size(text: str) -> int:
    """How many nodes `0-2` or `node[001-003]` names. Raises: ValueError."""
    index = _INDEX.fullmatch(text)
    if index is not None:
        size = int(index[2] or index[1]) - int(index[1]) + 1
        if size < 1:
            raise ValueError(f"{text!r} ends before it begins")
        return size
    if not re.fullmatch(r"[A-Za-z0-9.,\[\]_-]+", text):
        raise ValueError(f"{text!r} is not a range of nodes; write 0-2 or node[001-003]")
    return sum(len(expanded(part)) for part in re.split(r",(?![^\[]*\])", text))
