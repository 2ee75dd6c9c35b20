"""The head's shell of benchmarks in the simulator: judges points against what the generators really did.

The server bears a known load, so that the result of a search can be compared with the truth. Answers are lost with the
head's process, and sometimes there is only an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import errors
from head.core import events as ev
from head.core.effects import JudgePoint, RemoveBenchmark, WriteBenchmark
from head.core.objects import Point, point_key

if TYPE_CHECKING:
    from tests.sim.machine import RunProcess
    from tests.sim.sim_head import SimHead
    from tests.sim.sim_node import SimNode

CAPACITY = 11.0  # requests per second, or requests on their way, that meet the SLO


class SimJudge:
    """One head's. `nodes` is given by the cluster to the head whose word counts."""

    def __init__(self, head: SimHead) -> None:
        self.head = head
        self.nodes: dict[str, SimNode] = {}
        self.strangers: list[SimNode] = []
        self.judged = 0
        self.removed: set[str] = set()

    def perform(self, effect: JudgePoint | WriteBenchmark | RemoveBenchmark) -> None:
        """Begins it; the answer comes after a while, unless the process ends before."""
        world = self.head.world
        match effect:
            case JudgePoint():
                self.head.later(world.rng.randint(10, 3_000), "judge", lambda: self._judge(effect))
            case WriteBenchmark():
                self.head.later(world.rng.randint(10, 3_000), "write", lambda: self._write(effect))
            case RemoveBenchmark():
                self.removed.add(effect.benchmark)

    def _failed(self) -> bool:
        return self.head.world.chance(self.head.world.faults.judge_fails)

    def _judge(self, effect: JudgePoint) -> None:
        point = self.head.state.points.get(point_key(effect.benchmark, effect.point))
        if point is None:
            return
        if self._failed():
            error = errors.Internal("the judge has died").info()
            self.head.take(ev.PointJudged(effect.benchmark, effect.generation, effect.point, error=error))
            return
        if point.state == "judging" and self.nodes:
            self._compare(point)
            self.judged += 1
        load = float(point.changes.get("rate", point.changes.get("concurrency", 5.0)))
        attainment = 1.0 if load <= CAPACITY else 0.5
        figures = {"slo_attainment": attainment, "error_rate": 0.0, "req_s": min(load, CAPACITY), "asked_rate": load}
        is_valid = point.coverage == 1
        reasons = () if is_valid else ("degraded",)
        self.head.take(ev.PointJudged(effect.benchmark, effect.generation, effect.point, is_valid, reasons, figures))

    def _write(self, effect: WriteBenchmark) -> None:
        error = errors.DiskFull("no room for the report").info() if self._failed() else None
        self.head.take(ev.BenchmarkWritten(effect.benchmark, effect.generation, error))

    def _compare(self, point: Point) -> None:
        """What is said to have been done was done, together and alike."""
        done = [part for part in point.parts if part.state == "done"]
        assert point.coverage == len(done) / len(point.runs), f"{point.key} covers {point.coverage}: {point.parts}"
        processes = [self._process(part.node, part.run) for part in done]
        for part, process in zip(done, processes, strict=True):
            assert process.state == "ended", f"{part.run} is said to be done and {process.state}"
            assert process.began_ms, f"{part.run} is said to be done and never began"
            assert part.artifacts == ("generator.log", "load.bin"), f"{part.run} handed in {part.artifacts}"
        if processes:
            began = [process.began_ms for process in processes]
            apart_ms = max(began) - min(began)
            assert apart_ms <= point.skew_ms + 2, f"{point.key} began {apart_ms} ms apart, said {point.skew_ms}"
            assert len({process.digest for process in processes}) == 1, f"{point.key}: the parts differ"

    def _process(self, node: str, run: str) -> RunProcess:
        """The newest of that name on the machine, or on another that uses the node's id."""
        twins = [stranger.machine for stranger in self.strangers if stranger.node_id == node]
        for machine in (self.nodes[node].machine, *twins):
            for process in (*machine.runs.values(), *reversed(machine.past_runs)):
                if process.order.run == run:
                    return process
        raise AssertionError(f"{node} never had {run}")
