"""People who measure: benchmarks of every shape, cancelled and deleted at random, and what must hold of them.

What the machines really did is compared with what is believed: at every moment the generators of one benchmark are of
one point, and at rest nothing of any benchmark is left but its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.bench.recipe import BenchmarkRecipe, convert
from head.core import events as ev
from head.core.benchmark_facts import points_of, recipe_of
from head.core.effects import Reply
from head.core.objects import Benchmark
from head.core.state import BENCHMARK_ENDED, POINT_ENDED
from tests.sim.history import ANY
from tests.sim.people import People
from tests.sim.sim_judge import CAPACITY

_SLO = {"ttft": 500, "attainment": 0.9}


class Measurers:
    """Asks for benchmarks through the same door as everybody."""

    def __init__(self, people: People) -> None:
        self.people = people
        self.world = people.world
        self.head = people.head

    def random_request(self) -> None:
        """One more benchmark, mostly."""
        if not self.head.state.nodes:
            return
        what = self.world.rng.choice([self.create, self.create, self.create, self.create, self.cancel, self.delete])
        what()

    def create(self) -> None:
        """A benchmark, at times asked for again under one key, at times cancelled."""
        rng, people = self.world.rng, self.people
        recipe = convert(self._document())
        fact = {f"benchmark:id-{people.asked + 1}": "there"}
        if rng.random() < 0.3:
            people.insist(ev.CreateBenchmarkRequested, {}, recipe=recipe, api_key="engines")
        else:
            people.submit(ev.CreateBenchmarkRequested, fact, recipe=recipe, api_key="engines")
        if rng.random() < 0.2:
            self.world.after(rng.randint(10, 40_000), "cancel benchmark", self.cancel)

    def cancel(self) -> None:
        """Somebody has seen enough."""
        live = list(self.head.state.live_benchmarks)
        if live:
            self.people.submit(ev.CancelBenchmarkRequested, benchmark=self.world.rng.choice(live))

    def delete(self) -> None:
        """An old result is thrown away; one that goes on is not."""
        known = list(self.head.state.benchmarks)
        if known:
            name = self.world.rng.choice(known)
            self.people.submit(ev.DeleteBenchmarkRequested, {f"benchmark:{name}": ANY}, benchmark=name)

    # recipes
    def _document(self) -> dict[str, Any]:
        rng = self.world.rng
        nodes = list(self.people.nodes)
        document: dict[str, Any] = {
            "name": f"measure-{rng.randint(0, 99)}",
            "server": self._server(),
            "load": {
                "rate": 5,
                "duration": rng.choice([2, 2, 5, 5, 10, 10, 100]),
                "drain": 2,
                "nodes": rng.choice([1, 1, 2, 2, 3, tuple(rng.sample(nodes, 2))]),
            },
            "monitor": {"enabled": rng.random() < 0.7, "on": rng.choice(["server", "load", "both"])},
            "repetitions": rng.choice([1, 1, 2]),
            "pause": rng.choice([0, 0, 3]),
            "timeout": rng.choice([600, 600, 60]),
        }
        shape = rng.choice(["one", "sweep", "search"])
        if shape == "sweep":
            document["sweep"] = {"rate": [2, 5, 20]}
        elif shape == "search":
            over = rng.choice(["rate", "concurrency"])
            document |= {
                "slo": _SLO,
                "search": {"over": over, "start": 2, "most": 40, "precision": 0.2, "max_points": 8},
            }
            if over == "concurrency":
                del document["load"]["rate"]
                document["load"]["concurrency"] = 2
        return document

    def _server(self) -> dict[str, Any]:
        rng = self.world.rng
        services = [name for name, one in self.head.state.services.items() if one.desired == "running"]
        kind = rng.choice(["service", "service", "serve", "serve", "urls"])
        timeout = {"ready_timeout": rng.choice([30, 120])}
        if kind == "urls" or (kind == "service" and not services):
            return {"urls": ["http://elsewhere:8000"]} | timeout
        if kind == "service":
            return {"service": rng.choice(services), "via": rng.choice(["engine", "gateway"])} | timeout
        serve = {"model": rng.choice(self.people.models), "recipe": "sim-cpu", "replicas": rng.choice([1, 2])}
        if rng.random() < 0.4:
            serve["recipe"] = "sim-share"
        return {"serve": serve | {"keep": rng.random() < 0.1}} | timeout

    # what must hold
    def complaints(self) -> Iterator[str]:
        """At this moment, of the machines: two points of one benchmark never load the server together."""
        sending: dict[str, set[str]] = {}
        for node in self.people.nodes.values():
            for run, process in node.machine.runs.items():
                if process.order.kind == "load" and process.state == "running":
                    point = run.rpartition(".")[0]
                    sending.setdefault(point.rpartition(".")[0], set()).add(point)
        for benchmark, points in sending.items():
            if len(points) > 1:
                yield f"{benchmark} sends {sorted(points)} at the same time"

    def wrong(self) -> Iterator[str]:
        """At rest."""
        state = self.head.state
        for benchmark in state.benchmarks.values():
            yield from self._wrong_of(benchmark)
        for run in state.runs:
            yield f"run {run} is still there"
        for name, node in self.people.nodes.items():
            if node.is_gone:
                continue
            for run, process in node.machine.runs.items():
                yield f"{name} still has {run}, which is {process.state}"
            for run in node.state.runs:
                yield f"the agent of {name} still knows {run}"
        for what, table in (("judging_ms", state.judging_ms), ("clocks", state.clocks.keys() - state.nodes.keys())):
            if table:
                yield f"the head's {what} still has {list(table)[:5]}"

    def _wrong_of(self, benchmark: Benchmark) -> Iterator[str]:
        state, recipe = self.head.state, recipe_of(benchmark)
        if benchmark.state not in BENCHMARK_ENDED:
            yield f"{benchmark.id} rests in {benchmark.state}: {benchmark.note}"
            return
        points = points_of(state, benchmark.id)
        for point in points:
            if point.state not in POINT_ENDED:
                yield f"{point.key} rests in {point.state}"
        service = state.services.get(benchmark.service)
        keeps = recipe.server.serve is not None and recipe.server.serve.keep
        if benchmark.is_own_service and service is not None and not keeps:
            yield f"{benchmark.id} has ended and its service is {service.desired}"
        is_one_server = not any("server_changed" in point.reasons for point in points)
        if benchmark.state == "completed" and recipe.search is not None and is_one_server:
            yield from _wrong_best(benchmark, recipe)
        left = [key for key in state.keys if key.startswith(f"{benchmark.id}-")]
        if left:
            yield f"the keys {left} of {benchmark.id} still open the gateway"

    def made(self) -> int:
        """How many were taken."""
        answers = self.head.answers.values()
        return sum(isinstance(one, Reply) and one.reference.startswith("benchmark:") for one in answers)


def _wrong_best(benchmark: Benchmark, recipe: BenchmarkRecipe) -> Iterator[str]:
    """A search that came to its end has found what the server bears."""
    load, why = benchmark.best.get("load"), benchmark.best.get("why", "")
    if load is not None and load > CAPACITY:
        yield f"{benchmark.id} found {load}: the server bears {CAPACITY}"
    assert recipe.search is not None
    is_whole = why.startswith("it failed at")
    narrow = max(1.0, recipe.search.precision * (load or 0))
    if is_whole and load is not None and load + narrow < CAPACITY:
        yield f"{benchmark.id} found {load} and ended because {why}; the server bears {CAPACITY}"
