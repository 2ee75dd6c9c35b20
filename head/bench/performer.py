"""What the core asks for about benchmarks, done: clocks measured, points judged, results written and removed.

Each effect is a task; its answer is an event. An effect that is asked for again while it is on its way is not begun
twice. Whatever goes wrong is an answer as well, so that no benchmark waits for what will not come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from common import limits
from common.errors import DiskFull, ErrorInfo, HerderError, Internal
from common.tasks import Supervisor
from common.telemetry import fields
from head.api import render_benchmarks
from head.api.render import without_secrets
from head.bench.judge import Judges
from head.bench.live import Live
from head.bench.questions import Judge, Judged, PartFile, Write
from head.bench.store import BENCHMARK_FILE, LOAD_FILE, Store
from head.bench.uploads import Uploads
from head.core import benchmark_facts
from head.core.effects import JudgePoint, MeasureClock, RemoveBenchmark, WriteBenchmark
from head.core.events import BenchmarkWritten, PointJudged
from head.core.objects import Benchmark, Part, Point, point_key
from head.logs_collect import collect

if TYPE_CHECKING:
    from head.driver import BenchEffect, Driver
    from head.sessions import Sessions

log = logging.getLogger(__name__)
LOGS_AT_ONCE = 8
CLERKS = 4
LOG_S = 120.0
CLOCKS_APART_MS = 60_000  # a node's wall clock may be so far behind, and its lines are of the benchmark still
SWEEP_S = 1.0


class Performer:
    """The benchmarks' part of the shell."""

    def __init__(self, driver: Driver, sessions: Sessions, store: Store, judges: Judges | None = None) -> None:
        self.store = store
        self.judges = judges or Judges()
        self.clerks = Judges(at_once=CLERKS)  # for people, who do not wait behind a long judgement
        self.uploads = Uploads(store)
        self._driver = driver
        self._sessions = sessions
        self._tasks = Supervisor("benchmarks")
        self._is_closed = False
        self._running: dict[str, tuple[int, asyncio.Task[None]]] = {}  # what is asked for -> generation, task

    @property
    def live(self) -> Live:
        """What running benchmarks do."""
        return self._sessions.live

    @property
    def busy(self) -> int:
        """How many effects are being performed."""
        return len(self._running)

    async def start(self) -> None:
        """Removes what a crash left behind; from then on effects are performed."""
        gone, strange = await asyncio.to_thread(self.store.remove_leftovers, set(self._driver.state.benchmarks))
        if gone:
            log.warning("what was left of unknown benchmarks was removed", extra=fields(folders=gone))
        if strange:
            log.warning(
                "results of benchmarks that this head does not know are kept; remove them by hand when you want",
                extra=fields(count=len(strange), first=strange[0], folder=str(self.store.root)),
            )
        self._tasks.start("live", self._sweep())

    async def close(self) -> None:
        """Ends what is on its way; the core asks again after the next start."""
        self._is_closed = True
        await self._tasks.close()
        await self._sessions.clocks.close()

    def perform(self, effect: BenchEffect) -> None:
        """Begins what the core asks for. Never blocks."""
        match effect:
            case MeasureClock(node=node, session_id=session_id):
                self._sessions.clocks.measure(node, session_id)
            case JudgePoint():
                self._start(f"{effect.benchmark}/point {effect.point}", effect.generation, lambda: self._judge(effect))
            case WriteBenchmark():
                self._start(f"{effect.benchmark}/write", effect.generation, lambda: self._write(effect))
            case RemoveBenchmark(benchmark=benchmark):
                self._start(f"{benchmark}/remove", 0, lambda: self._remove(benchmark))

    def _start(self, what: str, generation: int, work: Callable[[], Awaitable[None]]) -> None:
        if self._is_closed:
            return  # the core asks again after the next start
        running = self._running.get(what)
        if running is not None and running[0] == generation:
            return
        before = running[1] if running is not None else None

        async def run() -> None:
            if before is not None:  # of an older generation: nobody waits for its answer
                before.cancel()
                await asyncio.wait([before])
            await work()

        task = self._tasks.start(what, run())
        self._running[what] = (generation, task)
        task.add_done_callback(lambda done: self._forget(what, done))

    def _forget(self, what: str, task: asyncio.Task[None]) -> None:
        running = self._running.get(what)
        if running is not None and running[1] is task:
            del self._running[what]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.live.sweep()

    # judging

    async def _judge(self, effect: JudgePoint) -> None:
        judged, error = Judged(False, (), {}), None
        try:
            judged = await self.judges.ask(self.question_of(effect), Judged)
        except Exception as failure:  # noqa: BLE001 - the border: a point that waits for its judge waits for ever
            error = _info(failure, "a point could not be judged")
        self._driver.post(
            PointJudged(
                effect.benchmark,
                effect.generation,
                effect.point,
                judged.is_valid,
                judged.reasons,
                judged.figures,
                error,
                judged.said,
            )
        )

    def question_of(self, effect: JudgePoint) -> Judge:
        """What the child is asked about a point. Raises: Internal when there is no such point."""
        state = self._driver.state
        benchmark = state.benchmarks.get(effect.benchmark)
        point = state.points.get(point_key(effect.benchmark, effect.point))
        if benchmark is None or point is None:
            raise Internal("there is no such point", benchmark=effect.benchmark, point=effect.point)
        parts = point.parts or tuple(
            Part(run.id, run.node, run.state, run.artifacts, run.error)
            for run in benchmark_facts.load_runs(state, point)
        )
        return Judge(
            folder=str(self.store.point(benchmark.id, point.number)),
            parts=tuple(self._part_file(benchmark.id, number, part) for number, part in enumerate(parts)),
            skew_ms=point.skew_ms,
            mlperf=benchmark_facts.recipe_of(benchmark).mlperf,
            about=_about(benchmark, point),
        )

    def _part_file(self, benchmark: str, number: int, part: Part) -> PartFile:
        path = str(self.store.run(benchmark, part.run) / LOAD_FILE) if LOAD_FILE in part.artifacts else ""
        return PartFile(number, part.node, part.run, path, part.state, part.error)

    # writing

    async def _write(self, effect: WriteBenchmark) -> None:
        error: ErrorInfo | None = None
        try:
            benchmark = self._driver.state.benchmarks.get(effect.benchmark)
            if benchmark is None:
                return
            if benchmark_facts.recipe_of(benchmark).logs:
                await self._collect_logs(benchmark)
            await self._write_pages(benchmark)
        except Exception as failure:  # noqa: BLE001 - the border: a benchmark that waits for its report waits for ever
            error = _info(failure, "a benchmark's report could not be written")
        self._driver.post(BenchmarkWritten(effect.benchmark, effect.generation, error))

    async def _write_pages(self, benchmark: Benchmark) -> None:
        view = render_benchmarks.benchmark_view(self._driver.state, benchmark)
        plain = render_benchmarks.as_ended(view, benchmark, self._driver.clock.now_ms())
        folder = self.store.folder(benchmark.id)
        body = await asyncio.to_thread(msgspec.json.encode, plain)
        await asyncio.to_thread(self.store.write, folder / BENCHMARK_FILE, body)
        await self.judges.ask(Write(str(folder), plain), list[str])

    async def _collect_logs(self, benchmark: Benchmark) -> None:
        """The logs of the service's engines of its time; of one that cannot be had, why. Raises: DiskFull."""
        gate = asyncio.Semaphore(LOGS_AT_ONCE)
        state = self._driver.state

        async def one(replica: str, node: str) -> None:
            path = self.store.log(benchmark.id, replica)
            async with gate:
                try:
                    await collect(
                        self._sessions.logs,
                        node,
                        f"replica:{replica}",
                        since_ms=max(0, (benchmark.started_ms or benchmark.created_ms) - CLOCKS_APART_MS),
                        until_ms=0,
                        path=path,
                        max_bytes=limits.LOG_BYTES_PER_REPLICA,
                        timeout_s=LOG_S,
                    )
                except DiskFull:
                    raise
                except HerderError as error:
                    note = f"[herder: the log could not be had: {error.message}]\n".encode()
                    await asyncio.to_thread(self.store.write, path, note)

        keys = sorted(state.replicas_by_service.get(benchmark.service, ()))
        results = await asyncio.gather(
            *(one(key, state.replicas[key].node) for key in keys if key in state.replicas), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # removing

    async def _remove(self, benchmark: str) -> None:
        for what, (_, task) in [*self._running.items()]:
            if what.startswith(f"{benchmark}/") and task is not asyncio.current_task():
                task.cancel()
                await asyncio.wait([task])
        await asyncio.to_thread(self.store.remove, benchmark)


def _about(benchmark: Benchmark, point: Point) -> dict[str, Any]:
    """What stands in a point's report beside what was measured."""
    return {
        "benchmark": {"id": benchmark.id, "name": benchmark.name, "created_ms": benchmark.created_ms},
        "recipe": render_benchmarks.open_recipe(benchmark.recipe),
        "recipe_sha256": benchmark.recipe_sha256,
        "point": {
            "number": point.number,
            "changes": point.changes,
            "repetition": point.repetition,
            "attempt": point.attempt,
            "seed": point.seed,
            "fire_ms": point.fire_ms,
            "coverage": point.coverage,
            "skew_ms": point.skew_ms,
            "urls": [without_secrets(url) for url in point.urls],
        },
        "facts": benchmark.facts,
    }


def _info(error: Exception, what: str) -> ErrorInfo:
    if isinstance(error, HerderError):
        return error.info()
    log.error(what, exc_info=error)
    return Internal(f"{what}; the head's log has the details").info()
