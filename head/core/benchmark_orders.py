"""What agents are told of a benchmark's runs: where the load goes, under which key, for how long; and what is noted."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from blake3 import blake3

from common import limits, wire
from common.bench import recipe as recipes
from common.bench.recipe import BenchmarkRecipe
from common.bench.spec import LoadSpec
from common.errors import Unavailable
from head.core import benchmark_plan, replica_facts, service_specs, service_views
from head.core.benchmark_facts import recipe_of
from head.core.objects import ApiKey, Benchmark, Node, Point, Run, point_key
from head.core.service_views import Route
from head.core.state import State
from head.core.turn import Turn

_FACTS_NODES = 64
_FACTS_ENGINES = 32
_FACTS_WORDS = 200
_WORD_CHARS = 500
_MARGIN_MS = 60_000


def routes(state: State, benchmark: Benchmark) -> list[Route]:
    """The engines of the benchmark's service that requests may go to."""
    if not benchmark.service:
        return []
    return service_views.routes_of_service(state, benchmark.service)


def urls_of(state: State, benchmark: Benchmark, recipe: BenchmarkRecipe) -> tuple[str, ...]:
    """Where the load goes."""
    if recipe.server.urls:
        return recipe.server.urls
    if recipe.server.via == "gateway":
        return (state.gateway_url,) if state.gateway_url else ()
    return tuple(_url(route) for route in routes(state, benchmark))


def servers_of(state: State, benchmark: Benchmark) -> tuple[str, ...]:
    """The engines' processes, named so that another process of the same replica has another name."""
    held = replica_facts.of_service(state, benchmark.service) if benchmark.service else []
    running = [one for one in held if one.desired == "running"]
    return tuple(f"{one.id}@{one.node}/{one.generation}/{one.restarts}/{one.pid}" for one in running)


def _url(route: Route) -> str:
    host = f"[{route.host}]" if ":" in route.host else route.host
    return f"http://{host}:{route.port}"


def load_spec(state: State, benchmark: Benchmark, recipe: BenchmarkRecipe, point: Point) -> LoadSpec:
    """The load of one point. Raises: ValueError."""
    spec = recipes.load_of(recipe, point.changes, point.seed, is_checked=True)
    if spec.model or not benchmark.service:
        return spec
    if recipe.server.via == "gateway":
        return msgspec.structs.replace(spec, model=benchmark.service)
    service = state.services.get(benchmark.service)
    return msgspec.structs.replace(spec, model=(service.model or service.name) if service is not None else "")


def sending_ms(recipe: BenchmarkRecipe, point: Point) -> int:
    """How long a point may send and wait for its last answers, from its start."""
    try:
        spec = recipes.load_of(recipe, point.changes, point.seed, is_checked=True)
    except ValueError:
        return int(recipe.timeout * 1000)
    length_s = benchmark_plan.length_s(spec, recipe.timeout)
    return int((length_s + spec.drain) * 1000)


def ensure_body(turn: Turn, run: Run) -> wire.EnsureRun | None:
    """The command that prepares a run; None when there is nothing to be prepared any more."""
    state = turn.state
    benchmark = state.benchmarks.get(run.benchmark)
    if benchmark is None:
        return None
    recipe = recipe_of(benchmark)
    if run.kind == "monitor":
        return _monitor_body(state, benchmark, recipe, run)
    point = state.points.get(point_key(run.benchmark, run.point))
    if point is None:
        return None
    stop_after_ms = limits.RUN_PREPARE_MS + limits.RUN_LOST_MS + sending_ms(recipe, point) + limits.RUN_COLLECT_MS
    return wire.EnsureRun(
        run=run.id,
        kind="load",
        spec=msgspec.to_builtins(load_spec(state, benchmark, recipe, point)),
        benchmark=benchmark.id,
        part=run.part,
        parts=run.parts,
        urls=point.urls,
        spread=recipe.server.spread,
        token=_token(turn, benchmark, recipe),
        stop_after_ms=stop_after_ms,
    )


def _monitor_body(state: State, benchmark: Benchmark, recipe: BenchmarkRecipe, run: Run) -> wire.EnsureRun:
    engines = [
        {"replica": route.replica, "url": _url(route), "api_key": route.api_key}
        for route in routes(state, benchmark)
        if route.node == run.node and recipe.monitor.engine
    ]
    return wire.EnsureRun(
        run=run.id,
        kind="monitor",
        spec={"interval": recipe.monitor.interval, "engines": engines},
        benchmark=benchmark.id,
        stop_after_ms=int(recipe.timeout * 1000) + limits.RUN_PREPARE_MS + limits.RUN_COLLECT_MS,
    )


# keys
def _token(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> str:
    """What requests of the load carry: nothing to strangers, the engines' own key, or a key for the gateway."""
    if recipe.server.urls:
        return ""
    if recipe.server.via == "gateway":
        return _gateway_token(turn, benchmark, recipe)
    service = turn.state.services.get(benchmark.service)
    return service.api_key if service is not None else ""


def _gateway_token(turn: Turn, benchmark: Benchmark, recipe: BenchmarkRecipe) -> str:
    """An inference key of this benchmark and this head process: made from the process's secret, kept nowhere.

    A head that starts again makes another; the one before opens the door as long as the benchmark lives.
    Raises: Unavailable before the head has its secret.
    """
    state = turn.state
    if len(state.ticket_secret) != 32:
        raise Unavailable("the head has not started yet")
    key_id = f"{benchmark.id}-{state.head_epoch}"[:64]
    name = f"gateway:{state.cluster_id}:{benchmark.id}:{state.head_epoch}"
    secret = blake3(name.encode(), key=state.ticket_secret).hexdigest()
    if key_id not in state.keys:
        key = ApiKey(
            id=key_id,
            name=f"benchmark {benchmark.name}"[:64],
            role="inference",
            secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
            created_ms=turn.now_ms,
            expires_ms=turn.now_ms + int(recipe.timeout * 1000) + _MARGIN_MS,
        )
        turn.put(key, "key_created", role=key.role, benchmark=benchmark.id)
    return f"hdr_inference_{key_id}_{secret}"


def forget_keys(turn: Turn, benchmark: Benchmark) -> None:
    """The keys that were made for a benchmark end with it."""
    if recipe_of(benchmark).server.via != "gateway":
        return
    prefix = f"{benchmark.id}-"[:64]
    for key_id in [key_id for key_id in turn.state.keys if key_id.startswith(prefix)]:
        turn.delete("key", key_id, "key_pruned", benchmark=benchmark.id)


# what is noted with the result
def facts_of(state: State, benchmark: Benchmark) -> dict[str, Any]:
    """Versions, engines' command lines and the machines, as they are when the first point begins."""
    nodes = dict.fromkeys((*benchmark.server_nodes, *benchmark.load_nodes))
    shown = [state.nodes[name] for name in nodes if name in state.nodes][:_FACTS_NODES]
    found: dict[str, Any] = {"head": state.version, "nodes": {node.id: _node_facts(node) for node in shown}}
    if len(nodes) > len(shown):
        found["nodes_left_out"] = len(nodes) - len(shown)
    return found | _service_facts(state, benchmark)


def _node_facts(node: Node) -> dict[str, Any]:
    inventory = node.inventory
    return {
        "version": node.version,
        "hostname": inventory.hostname,
        "os": inventory.os,
        "kernel": inventory.kernel,
        "cpu_model": inventory.cpu_model,
        "cpus": inventory.cpus,
        "memory_bytes": inventory.memory_bytes,
        "gpus": [gpu.name for gpu in inventory.gpus[:16]],
        "driver_version": inventory.driver_version,
        "cuda_version": inventory.cuda_version,
        "engines": inventory.engines,
    }


def _service_facts(state: State, benchmark: Benchmark) -> dict[str, Any]:
    service = state.services.get(benchmark.service)
    if service is None:
        return {}
    recipe = state.recipes.get(service.recipe)
    manifest = state.manifests.get(f"{service.model}@{service.revision}")
    held = [one for one in replica_facts.of_service(state, service.name) if one.node in state.nodes]
    engines: list[dict[str, Any]] = []
    for replica in held[:_FACTS_ENGINES]:
        argv: tuple[str, ...] = ()
        if recipe is not None:
            argv = service_specs.ensure_body(service, recipe, replica, state.nodes[replica.node]).argv
        words = [word[:_WORD_CHARS] for word in argv[:_FACTS_WORDS]]
        engines.append({"replica": replica.id, "device": replica.device, "gpus": list(replica.gpus), "argv": words})
    return {
        "service": {
            "name": service.name,
            "model": service.model,
            "revision": service.revision,
            "digest": manifest.manifest.digest if manifest is not None else "",
            "recipe": service.recipe,
            "replicas": service.replicas,
            "config": {key: value for key, value in service.config.items() if key != "env"},
            "spec_hash": service.spec_hash,
        },
        "engines": engines,
        "engines_left_out": max(0, len(held) - _FACTS_ENGINES),
    }
