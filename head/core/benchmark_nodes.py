"""Which nodes send a benchmark's load, and where it is watched. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from common import limits
from common.bench.recipe import BenchmarkRecipe
from common.errors import NodeNotFound, NodeUnreachable, NothingFits
from head.core import benchmark_facts, node_facts, replica_facts
from head.core.objects import Benchmark
from head.core.state import State

_NAMED = 20


def check(state: State, recipe: BenchmarkRecipe, now_ms: int) -> tuple[str, ...]:
    """The load nodes as far as the recipe names them.

    Raises: NodeNotFound, NodeUnreachable for one that is named; NothingFits when there are too few to choose from.
    """
    wanted = recipe.load.nodes
    if isinstance(wanted, int):
        _require(state, wanted, _free(state, now_ms), now_ms)
        return ()
    for name in wanted:
        if name not in state.nodes:
            known = ", ".join(sorted(state.nodes)[:_NAMED])
            raise NodeNotFound(f"no node {name[:80]!r}", hint=f"known nodes: {known or 'none'}", node=name)
        seen = node_facts.node_state(state, name, now_ms)
        if seen != "online":
            raise NodeUnreachable(f"{name} shall send the load and is {seen}", hint="is its agent running?", node=name)
    return tuple(wanted)


def choose(state: State, benchmark: Benchmark, recipe: BenchmarkRecipe, now_ms: int) -> tuple[str, ...]:
    """The load nodes: those that are named, else those without engines of the service first, then the idlest, by id.

    Raises: NothingFits, NodeUnreachable when there are too few now, NodeNotFound.
    """
    wanted = recipe.load.nodes
    if not isinstance(wanted, int):
        return check(state, recipe, now_ms)
    free = _free(state, now_ms)
    _require(state, wanted, free, now_ms)
    serving = set(server_nodes(state, benchmark))
    held = taken(state)
    full = limits.RUNS_PER_NODE - 2
    ordered = sorted(free, key=lambda name: (held.get(name, 0) > full, name in serving, held.get(name, 0), name))
    return tuple(sorted(ordered[:wanted]))


def server_nodes(state: State, benchmark: Benchmark) -> tuple[str, ...]:
    """Where the engines of its service are."""
    if not benchmark.service:
        return ()
    held = replica_facts.of_service(state, benchmark.service)
    return tuple(sorted({replica.node for replica in held if replica.desired == "running"}))


def watched(recipe: BenchmarkRecipe, load: Iterable[str], server: Iterable[str]) -> tuple[str, ...]:
    """The nodes that get a monitor."""
    if not recipe.monitor.enabled:
        return ()
    on = recipe.monitor.on
    chosen = {*(load if on in ("load", "both") else ()), *(server if on in ("server", "both") else ())}
    return tuple(sorted(chosen))


def full_node(state: State, load: Iterable[str], monitored: Iterable[str]) -> str:
    """A node that has no room for what the benchmark would run there; "" when all have."""
    needs: dict[str, int] = {}
    for name in (*load, *monitored):
        needs[name] = needs.get(name, 0) + 1
    held = taken(state)
    return next((name for name in sorted(needs) if held.get(name, 0) + needs[name] > limits.RUNS_PER_NODE), "")


def taken(state: State) -> dict[str, int]:
    """The places of each node that benchmarks hold, whether their runs are there now or not."""
    held: dict[str, int] = {}
    for key in state.live_benchmarks:
        other = state.benchmarks[key]
        if other.state in ("running", "finishing"):
            recipe = benchmark_facts.recipe_of(other)
            for name in (*other.load_nodes, *watched(recipe, other.load_nodes, other.server_nodes)):
                held[name] = held.get(name, 0) + 1
    return held


def _free(state: State, now_ms: int) -> list[str]:
    return [name for name in state.nodes if node_facts.is_placeable(state, name, now_ms)[0]]


def _require(state: State, wanted: int, free: list[str], now_ms: int) -> None:
    if len(free) >= wanted:
        return
    reasons: list[str] = []
    for name in sorted(state.nodes):
        is_placeable, reason = node_facts.is_placeable(state, name, now_ms)
        if not is_placeable and len(reasons) < _NAMED:
            reasons.append(f"{name}: {reason}")
    raise NothingFits(
        f"{wanted} nodes shall send the load; {len(free)} of {len(state.nodes)} may be used now",
        hint="; ".join(reasons) or "fewer load.nodes, or more agents",
        wanted=wanted,
        usable=len(free),
        known=len(state.nodes),
    )
