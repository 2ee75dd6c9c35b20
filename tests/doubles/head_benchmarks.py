"""The small world of `head_engines` with agents that hold runs, and a shell that measures clocks and judges."""

from __future__ import annotations

from typing import Any

from common import wire
from common.bench.recipe import convert
from common.errors import ErrorInfo
from head.core import benchmark_facts
from head.core.effects import Effect, JudgePoint, MeasureClock, RemoveBenchmark, Reply, WriteBenchmark
from head.core.events import (
    AgentReported,
    ArtifactStored,
    BenchmarkWritten,
    CancelBenchmarkRequested,
    ClockMeasured,
    CreateBenchmarkRequested,
    DeleteBenchmarkRequested,
    Event,
    PointJudged,
)
from head.core.objects import Benchmark, Point, Run
from tests.doubles.head_core import START_MS
from tests.doubles.head_engines import EngineWorld

LOAD = {"rate": 5, "duration": 10, "drain": 2}
URLS = {"urls": ["http://there:8000"]}
GOOD = {"slo_attainment": 1.0, "error_rate": 0.0, "req_s": 5.0}
BOOTED_MS = START_MS - 500  # what `lease` says: each machine booted then


class BenchWorld(EngineWorld):
    """Nodes hold what runs they were told to, as `runs` says; commands and effects are kept by name."""

    def __init__(self, *nodes: str) -> None:
        self.orders: list[tuple[str, wire.Command]] = []
        self.asked: list[Effect] = []
        super().__init__()
        self.runs: dict[str, dict[str, wire.RunStatus]] = {}
        for node in nodes:
            self.add_node(node)

    def step(self, event: Event) -> list[Effect]:
        """As the world does; what agents and the shell are told is kept."""
        effects = super().step(event)
        self.orders += self.sent_commands()
        kinds = MeasureClock | JudgePoint | WriteBenchmark | RemoveBenchmark
        self.asked += [effect for effect in effects if isinstance(effect, kinds)]
        return effects

    # requests
    def measure(self, **document: Any) -> Any:
        """A benchmark of a document (by default of an address outside); its id, or the ErrorInfo of the refusal."""
        extra = {key: document.pop(key) for key in ("idempotency_key", "request_sha256", "fresh_id") if key in document}
        recipe = convert({"name": "try", "server": URLS, "load": LOAD, "monitor": {"enabled": False}} | document)
        answer = self.request(CreateBenchmarkRequested, recipe=recipe, api_key="engines", **extra)
        return answer.reference.partition(":")[2] if isinstance(answer, Reply) else answer

    def cancel_benchmark(self, benchmark: str) -> Any:
        """Cancels it."""
        return self.request(CancelBenchmarkRequested, benchmark=benchmark)

    def delete_benchmark(self, benchmark: str) -> Any:
        """Deletes it."""
        return self.request(DeleteBenchmarkRequested, benchmark=benchmark)

    # looking
    def benchmark(self, key: str) -> Benchmark:
        """The benchmark now."""
        return self.state.benchmarks[key]

    def point(self, benchmark: str, number: int = 0) -> Point:
        """One of its points now."""
        return self.state.points[f"{benchmark}.{number}"]

    def run(self, key: str) -> Run:
        """A run now."""
        return self.state.runs[key]

    def point_states(self, benchmark: str) -> list[str]:
        """The states of its points."""
        return [point.state for point in benchmark_facts.points_of(self.state, benchmark)]

    def told(self, body: type[wire.CommandBody], run: str = "") -> list[wire.Command]:
        """The commands of a kind so far, of one run or of all."""
        return [
            command
            for _, command in self.orders
            if isinstance(command.body, body) and run in ("", getattr(command.body, "run", ""))
        ]

    def count(self, kind: type[Effect]) -> int:
        """How often the shell was asked for it."""
        return sum(isinstance(effect, kind) for effect in self.asked)

    # agents
    def says(self, key: str, state: str, *, digest: str = "same", **fields: Any) -> None:
        """The agent of a run reports this of it."""
        run = self.run(key)
        digest = digest if state not in ("preparing",) and run.kind == "load" else ""
        fields.setdefault("generation", run.generation)
        status = wire.RunStatus(key, state=state, digest=digest, **fields)
        self.runs.setdefault(run.node, {})[key] = status
        self.tell(run.node)

    def forgets(self, node: str, key: str) -> None:
        """The agent reports without this run."""
        self.runs.get(node, {}).pop(key, None)
        self.tell(node)

    def tell(self, node: str) -> None:
        """A report with all runs and engines of a node."""
        self._seqs += 1
        engines = tuple(
            self.status(key, replica.state, port=replica.port)
            for key in self.state.replicas_by_node.get(node, ())
            if (replica := self.state.replicas[key]).state == "ready"
        )
        runs = tuple(self.runs.get(node, {}).values())
        report = wire.Report(seq=self._seqs, replicas=engines, runs=runs, digest=self._seqs)
        self.step(AgentReported(node=node, session_id=self.session(node), report=report))

    def clocks(self, *nodes: str, bound_ns: int = 200_000) -> None:
        """The shell has measured these clocks."""
        for node in nodes:
            offset_ns = -BOOTED_MS * 1_000_000
            self.step(ClockMeasured(node, self.session(node), offset_ns, bound_ns))

    def fire(self, benchmark: str, number: int = 0) -> list[str]:
        """Takes the present point to running; its runs."""
        keys = list(self.point(benchmark, number).runs)
        for key in keys:
            self.says(key, "armed")
        self.clocks(*(self.run(key).node for key in keys))
        for key in keys:
            self.says(key, "running", start_boottime_ns=self.run(key).start_boottime_ns)
        return keys

    def fire_in_vain(self, benchmark: str, number: int = 0) -> None:
        """Everybody is ready for a point that is given up then."""
        for key in self.point(benchmark, number).runs:
            self.says(key, "armed")
        self.forget_all()

    def hand_in(self, key: str, *names: str) -> None:
        """A run's files come, and its result."""
        run = self.run(key)
        for name in names or ("load.bin", "generator.log"):
            self.step(ArtifactStored(key, run.generation, name, 1_000))
        detail = {"start_boottime_ns": run.start_boottime_ns}
        self.answer(f"run:{key}", node=run.node, generation=run.generation, detail=detail)

    def fails(self, key: str, error: ErrorInfo) -> None:
        """A run has failed."""
        run = self.run(key)
        self.answer(f"run:{key}", "failed", node=run.node, generation=run.generation, error=error)

    def forget_all(self) -> None:
        """Every agent does what it is told of runs that shall be gone."""
        for run in list(self.state.runs.values()):
            if run.desired == "absent":
                self.runs.get(run.node, {}).pop(run.id, None)
                if run.id in self.state.runs:
                    self.answer(f"end:{run.id}", node=run.node, generation=run.generation + 1)

    # the shell
    def judge(self, benchmark: str, number: int = 0, reasons: tuple[str, ...] = (), **figures: float) -> None:
        """The shell has judged a point."""
        found = GOOD | figures
        generation = self.benchmark(benchmark).generation
        self.step(PointJudged(benchmark, generation, number, not reasons, reasons, found))

    def write(self, benchmark: str, error: ErrorInfo | None = None) -> None:
        """The shell has written the whole."""
        self.step(BenchmarkWritten(benchmark, self.benchmark(benchmark).generation, error))

    def perform(self, benchmark: str, number: int = 0, **figures: float) -> None:
        """A whole point, from preparing to forgotten."""
        for key in self.fire(benchmark, number):
            self.hand_in(key)
        self.judge(benchmark, number, (), **figures)
        self.forget_all()
        self.pass_s(1, alive=tuple(self.state.nodes))


def loads(benchmark: str, point: int, parts: int) -> list[str]:
    """The names of a point's runs."""
    return [f"{benchmark}.{point}.{part}" for part in range(parts)]


def finished(world: BenchWorld, benchmark: str) -> None:
    """Takes a benchmark whose points are over to its end."""
    for key in world.benchmark(benchmark).monitors:
        world.hand_in(key, "monitor.csv")
    world.write(benchmark)
    world.forget_all()
