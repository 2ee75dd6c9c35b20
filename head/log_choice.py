"""Which logs a view is made of: names and objects of the state in, logs of nodes and files of the head out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from common import limits
from common.errors import (
    BenchmarkNotFound,
    Forbidden,
    InvalidValue,
    JobNotFound,
    NodeNotFound,
    NotFound,
    ServiceNotFound,
    TooMany,
)
from head.core.state import State

AFTER_MS = 60_000  # what an engine still writes after a benchmark or job has ended belongs to it
KINDS = ("replica", "run", "agent", "slurm")
_SLURM = re.compile(r"([^/]+)/(\d{1,12}(?:[_+]\d{1,9})?)")
HINT = "replica:ID, run:ID, agent:NODE, slurm:NODE/JOBID or head"


class Log(NamedTuple):
    """One log of a view. With `place` it is a file of the head, else `asked` names it at its node."""

    source: str
    node: str
    asked: str = ""
    place: Path | None = None
    since_ms: int = 0
    until_ms: int = 0

    @property
    def name(self) -> str:
        """Its name in cursors."""
        return f"{self.source}@{self.node}"


class Wish(NamedTuple):
    """What somebody asks for; any number of these together. `target`: whatever has that name."""

    target: str = ""
    service: str = ""
    replica: str = ""
    run: str = ""
    benchmark: str = ""
    job: str = ""
    node: str = ""
    source: str = ""

    @property
    def benchmark_id(self) -> str:
        """The benchmark whose files at the head may be wanted; "" for none."""
        if self.benchmark:
            return self.benchmark
        run = self.run or (self.source.removeprefix("run:") if self.source.startswith("run:") else "")
        return (run or self.target.removeprefix("run:")).split(".")[0]


def choose(state: State, wish: Wish, *, is_operator: bool, own: Path, kept: Mapping[str, Path]) -> list[Log]:
    """The logs of a wish, each once.

    own: the head's own log. kept: files of the benchmark `wish.benchmark_id` at the head, by source. Daemons' logs and
    Slurm's are for operators. Raises: NotFound and its leaves, InvalidValue, Forbidden, TooMany.
    """
    choice = _Choice(state, is_operator, own, kept)
    found = {log.name: log for log in choice.all(wish)}
    if len(found) > limits.LOG_SOURCES:
        raise TooMany(
            f"these are {len(found)} logs; one view merges at most {limits.LOG_SOURCES}",
            hint="ask for one service, node or replica",
        )
    return list(found.values())


class _Choice:
    def __init__(self, state: State, is_operator: bool, own: Path, kept: Mapping[str, Path]) -> None:
        self._state = state
        self._is_operator = is_operator
        self._own = own
        self._kept = kept

    def all(self, wish: Wish) -> Iterator[Log]:
        if not any(wish):
            raise InvalidValue("no log is named", hint="target=, service=, replica=, run=, benchmark=, job=, node= ...")
        if wish.target:
            yield from self._target(wish.target, wish.node)
        if wish.source:
            yield self._source(wish.source, wish.node)
        if wish.replica:
            yield self._replica(wish.replica, wish.node)
        if wish.run:
            yield self._run(wish.run)
        if wish.service:
            yield from self._service(wish.service)
        if wish.benchmark:
            yield from self._benchmark(wish.benchmark)
        if wish.job:
            yield from self._job(wish.job)
        if wish.node and not (wish.target or wish.source or wish.replica):
            yield from self._node(wish.node)

    def _target(self, name: str, node: str) -> Iterator[Log]:
        state = self._state
        if name == "head" or name.partition(":")[0] in KINDS:
            yield self._source(name, node)
        elif name in state.replicas:
            yield self._replica(name, node)
        elif name in state.services:
            yield from self._service(name)
        elif state.replicas_by_model.get(name):
            yield from self._placed(state.replicas_by_model[name])
        elif name in state.benchmarks:
            yield from self._benchmark(name)
        elif name in state.runs or f"run:{name}" in self._kept:
            yield self._run(name)
        elif name in state.jobs:
            yield from self._job(name)
        elif name in state.nodes:
            yield from self._node(name)
        else:
            raise NotFound(f"nothing with a log is called {name[:80]!r}", hint=self._known())

    def _known(self) -> str:
        known = sorted(self._state.services)[:8]
        return f"services: {', '.join(known)}" if known else "nothing is served; `herder serve` starts an engine"

    def _source(self, source: str, node: str) -> Log:
        kind, _, name = source.partition(":")
        if source == "head":
            self._need_operator()
            return Log("head", "", place=self._own)
        if kind == "replica" and name:
            return self._replica(name, node)
        if kind == "run" and name:
            return self._run(name)
        if kind == "agent" and name:
            self._need_operator()
            return Log(source, self._known_node(name), "agent")
        if kind == "slurm":
            self._need_operator()
            found = _SLURM.fullmatch(name)
            if found is None:
                raise InvalidValue(f"{source[:80]!r} names no Slurm job", hint="slurm:NODE/JOBID, as slurm:n1/4711")
            return Log(source, self._known_node(found[1]), f"slurm:{found[2]}")
        raise InvalidValue(f"{source[:80]!r} names no log", hint=HINT)

    def _replica(self, replica_id: str, node: str) -> Log:
        """A replica where it runs; with a node, what that node has of it, whatever it is now."""
        source = f"replica:{replica_id}"
        if node:
            return Log(source, self._known_node(node), source)
        replica = self._state.replicas.get(replica_id)
        if replica is not None and replica.node:
            return Log(source, replica.node, source)
        if replica is not None:
            raise NotFound(
                f"{replica_id} has no place yet", hint=f"`herder why {replica.service}` says what it waits for"
            )
        if source in self._kept:
            return Log(source, "", place=self._kept[source])
        hint = "GET /api/v1/replicas lists them; with node= the logs of one that is gone are read where it ran"
        raise NotFound(f"no replica {replica_id[:80]!r}", hint=hint)

    def _run(self, run_id: str) -> Log:
        source = f"run:{run_id}"
        if source in self._kept:
            return Log(source, "", place=self._kept[source])
        run = self._state.runs.get(run_id)
        if run is None:
            raise NotFound(f"no run {run_id[:80]!r} of a benchmark", hint="GET /api/v1/benchmarks/{id} names them")
        return Log(source, run.node, source)

    def _service(self, name: str) -> Iterator[Log]:
        if name not in self._state.services:
            raise ServiceNotFound(f"no service {name[:80]!r}", hint=self._known())
        yield from self._placed(self._state.replicas_by_service.get(name, ()))

    def _placed(self, replicas: Iterable[str]) -> Iterator[Log]:
        """Those of the replicas that have a place."""
        for replica_id in replicas:
            replica = self._state.replicas.get(replica_id)
            if replica is not None and replica.node:
                yield self._replica(replica_id, "")

    def _benchmark(self, benchmark_id: str) -> Iterator[Log]:
        """Its load generators and monitors, and the engines while it lasted."""
        benchmark = self._state.benchmarks.get(benchmark_id)
        if benchmark is None:
            raise BenchmarkNotFound(f"no benchmark {benchmark_id[:80]!r}", hint="GET /api/v1/benchmarks lists them")
        runs = {f"run:{run}": None for run in self._state.runs_by_benchmark.get(benchmark_id, ())}
        for source in {**runs, **{name: None for name in self._kept if name.startswith("run:")}}:
            yield self._run(source.removeprefix("run:"))
        since_ms = benchmark.started_ms or benchmark.created_ms
        until_ms = benchmark.ended_ms + AFTER_MS if benchmark.ended_ms else 0
        kept = [name for name in self._kept if name.startswith("replica:")]
        for name in kept:
            yield Log(name, "", place=self._kept[name])
        if not kept:
            for log in self._placed(self._state.replicas_by_service.get(benchmark.service, ())):
                yield log._replace(since_ms=since_ms, until_ms=until_ms)

    def _job(self, job_id: str) -> Iterator[Log]:
        """The engines that its steps have to do with, while it lasted."""
        try:
            job = self._state.jobs[job_id]
        except KeyError:
            raise JobNotFound(f"no job {job_id[:80]!r}", hint="GET /api/v1/jobs lists them") from None
        names: dict[str, None] = {}
        for step in job.steps:
            kind, _, key = step.target.partition(":")
            if kind == "service":
                names.update(dict.fromkeys(self._state.replicas_by_service.get(key, ())))
            elif kind == "replica":
                names[key] = None
        since_ms = job.started_ms or job.created_ms
        until_ms = job.ended_ms + AFTER_MS if job.ended_ms else 0
        found = list(self._placed(names))
        if not found:
            raise NotFound(f"{job_id} has to do with no engine that is there", hint="`herder story` tells what it did")
        for log in found:
            yield log._replace(since_ms=since_ms, until_ms=until_ms)

    def _node(self, node: str) -> Iterator[Log]:
        """Its engines and runs, and its agent for whom it is meant."""
        self._known_node(node)
        yield from self._placed(self._state.replicas_by_node.get(node, ()))
        for run in self._state.runs_by_node.get(node, ()):
            yield Log(f"run:{run}", node, f"run:{run}")
        if self._is_operator:
            yield Log(f"agent:{node}", node, "agent")

    def _known_node(self, node: str) -> str:
        if node not in self._state.nodes:
            raise NodeNotFound(f"no node {node[:80]!r}", hint="GET /api/v1/nodes lists them")
        return node

    def _need_operator(self) -> None:
        if not self._is_operator:
            raise Forbidden("logs of daemons and of Slurm are for operators", hint="viewers read engines and runs")


def kept_of(folder: Path) -> dict[str, Path]:
    """Logs of a benchmark in its folder at the head, by source. Blocks."""
    found: dict[str, Path] = {}
    try:
        for path in sorted(folder.glob("runs/*/generator.log")):
            if path.is_file() and not path.is_symlink():
                found[f"run:{path.parent.name}"] = path
        for path in sorted(folder.glob("logs/*.log")):
            if path.is_file() and not path.is_symlink():
                found[f"replica:{path.stem}"] = path
    except OSError:
        pass  # removed meanwhile
    return found
