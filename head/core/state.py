"""The head's state: the durable objects by kind and key, the indices over them, and what is volatile.

Durable objects change only through `apply(state, record)`; `undo` takes records back when the journal refused
them. Volatile facts (sessions, lease deadlines, telemetry, progress) are written by the core directly and are
rebuilt from what agents report after a restart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping
from dataclasses import dataclass, field

from common import limits, wire
from common.bench.recipe import BenchmarkRecipe
from common.recipe import Recipe
from head.core import job_table
from head.core.objects import (
    ApiKey,
    Benchmark,
    Check,
    Copy,
    Idempotent,
    Job,
    Meta,
    Model,
    ModelManifest,
    Node,
    Object,
    Point,
    Replica,
    Run,
    Service,
)
from head.core.records import Record


@dataclass(slots=True)
class Live:
    """What is known of a node only while it is connected, or since it was."""

    session_id: str = ""  # "" when no session is open
    lease_until_ms: int = 0
    last_seen_ms: int = 0
    boottime_offset_ms: int = 0  # agent's CLOCK_BOOTTIME minus Herder time, from its last lease
    readings: wire.Telemetry | bytes | None = None  # the latest; as they came until somebody looks
    report_digest: int | None = None
    has_reported: bool = False  # in this session
    interval_ms: int = 0
    opened_ms: int = 0  # when this session was welcomed
    report_seq: int = -1  # of the last report taken in this session; an older one is stale
    report_pages: dict[int, wire.Report] = field(default_factory=dict)  # of a report that is not whole yet
    unknown_copies: tuple[wire.CopyStatus, ...] = ()  # reported, but of no registered model: listed, never touched
    agent_ids: dict[str, int] = field(default_factory=dict)  # agent processes that said hello as this node -> when
    flaps: int = 0  # times a superseded agent process came back: two machines use one node id
    flapped_ms: int = 0  # when it last did

    @property
    def telemetry(self) -> wire.Telemetry | None:
        """The latest readings, decoded at the first look; None when there are none, or they cannot be read."""
        readings = self.readings
        if isinstance(readings, bytes):
            readings = self.readings = wire.readings(readings)
        return readings


@dataclass(slots=True)
class Progress:
    """How far a copy is; volatile."""

    state: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0
    source: str = ""
    changed_ms: int = 0  # when bytes_done last grew
    started_ms: int = 0


@dataclass(slots=True)
class Clock:
    """A node's clock as it was measured in its present session; volatile."""

    session_id: str = ""
    offset_ns: int = 0  # its CLOCK_BOOTTIME minus Herder time
    bound_ns: int = 0
    measured_ms: int = 0  # 0: not yet
    asked_ms: int = 0


@dataclass(slots=True)
class State:
    """Everything the head knows."""

    # durable, by key
    meta: dict[str, Meta] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    manifests: dict[str, ModelManifest] = field(default_factory=dict)
    copies: dict[str, Copy] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    jobs: job_table.JobTable = field(default_factory=job_table.JobTable)
    checks: dict[str, Check] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    points: dict[str, Point] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    keys: dict[str, ApiKey] = field(default_factory=dict)
    idempotents: dict[str, Idempotent] = field(default_factory=dict)
    revision: int = 0

    # indices over the durable objects, kept by apply: sets of keys, as insertion-ordered dicts (deterministic)
    copies_by_model: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    copies_by_node: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    projections: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # replica -> its copies
    replicas_by_service: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    replicas_by_node: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    replicas_by_model: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    active_copies: dict[str, None] = field(default_factory=dict)  # copies on disk or dram that are not at rest
    pinned_copies: dict[str, None] = field(default_factory=dict)
    ready_by_model: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # disk copies
    warm_by_model: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # ready RAM copies
    draining_nodes: dict[str, None] = field(default_factory=dict)  # draining and not drained yet
    live_jobs: dict[str, None] = field(default_factory=dict)  # jobs that have not ended
    waiters: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # "kind:key" -> jobs
    running_steps: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # node -> "job/step"
    queued_steps: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # node -> jobs
    live_benchmarks: dict[str, None] = field(default_factory=dict)  # those that have not ended
    points_by_benchmark: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    runs_by_benchmark: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    runs_by_node: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))

    # volatile
    live: dict[str, Live] = field(default_factory=dict)  # by node
    progress: dict[str, Progress] = field(default_factory=dict)  # by copy key
    last_used_ms: dict[str, int] = field(default_factory=dict)  # by copy key, newer than Copy.last_used_ms
    recipes: dict[str, Recipe] = field(default_factory=dict)
    benchmark_recipes: dict[str, BenchmarkRecipe] = field(default_factory=dict)
    gateway_url: str = ""  # where nodes reach the head's gateway; "": benchmarks cannot go through it
    version: str = ""  # of the head
    clocks: dict[str, Clock] = field(default_factory=dict)  # by node, while a benchmark needs them
    judging_ms: dict[str, int] = field(default_factory=dict)  # points and benchmarks that the shell was asked for
    ticket_secret: bytes = b""
    started_ms: int = 0
    settle_until_ms: int = 0
    is_frozen: bool = False  # most nodes vanished at once: no replacement
    last_tick_ms: int = 0
    commanded_ms: dict[str, int] = field(default_factory=dict)  # "node|op_id|generation" -> when, oldest first
    offered: dict[str, tuple[str, ...]] = field(default_factory=dict)  # fetching copy -> copies it may read from
    readers: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # serving node -> readers
    avoided: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # copy -> nodes that lied
    lost_ms: dict[str, int] = field(default_factory=dict)  # nodes that vanished lately -> when
    measured: dict[str, tuple[int, int]] = field(default_factory=dict)  # replica -> resident and GPU bytes, as reported
    unwell: dict[str, int] = field(default_factory=dict)  # replica -> generation that failed a direct probe
    drain_ms: int = limits.DRAIN_MS  # how long requests may go on when their engine is stopped
    draining: dict[str, int] = field(default_factory=dict)  # replica -> generation that the gateway was asked about
    due_ms: dict[str, int] = field(default_factory=dict)  # "service:name", "job:id" -> next look; absent: now

    @property
    def cluster_id(self) -> str:
        """The cluster's id; empty before the first start was applied."""
        meta = self.meta.get("cluster")
        return meta.cluster_id if meta else ""

    @property
    def head_epoch(self) -> int:
        """This head start's fencing number."""
        meta = self.meta.get("cluster")
        return meta.head_epoch if meta else 0

    def table(self, kind: str) -> MutableMapping[str, Object]:
        """The objects of a kind by key."""
        return getattr(self, _TABLES[kind])  # type: ignore[no-any-return]


_TABLES = {
    "meta": "meta",
    "node": "nodes",
    "model": "models",
    "manifest": "manifests",
    "copy": "copies",
    "service": "services",
    "replica": "replicas",
    "job": "jobs",
    "check": "checks",
    "benchmark": "benchmarks",
    "point": "points",
    "run": "runs",
    "key": "keys",
    "idempotent": "idempotents",
}
JOB_ENDED = job_table.ENDED
BENCHMARK_ENDED = frozenset({"completed", "failed", "cancelled"})
POINT_ENDED = frozenset({"completed", "failed", "cancelled"})
RUN_ENDED = frozenset({"done", "failed", "lost"})
STEP_ENDED = frozenset({"completed", "failed", "cancelled", "skipped"})
HEAVY_ACTIONS = frozenset({"download", "copy", "move", "serve"})  # those that STEPS_RUNNING_PER_NODE counts
COPY_AT_REST = frozenset({"ready", "failed", "asleep"})


def apply(state: State, record: Record) -> Object | None:
    """Puts or deletes the record's object and keeps the indices; returns what stood there before. Total."""
    table = state.table(record.kind)
    before = table.get(record.key)
    if before is not None:
        _unindex(state, before)
    if record.body is None:
        table.pop(record.key, None)
    else:
        table[record.key] = record.body
        _index(state, record.body)
    state.revision = record.revision
    return before


def restore(state: State, thing: Object) -> None:
    """Puts an object that the journal kept, at start-up, when no object stands there before."""
    state.table(thing.KIND)[thing.key] = thing
    _index(state, thing)


def restore_job(state: State, key: str, body: bytes) -> None:
    """As `restore`, for a job as the journal keeps it: what has ended is not decoded. Raises: StateCorrupt."""
    job = state.jobs.load(key, body)
    if job is not None:
        _index(state, job)


def undo(state: State, record: Record, before: Object | None) -> None:
    """Takes back an applied record; call in reverse order."""
    apply(
        state,
        Record(record.revision - 1, record.at_ms, "undone", record.cause, record.kind, record.key, before),
    )


def _index(state: State, thing: Object) -> None:
    match thing:
        case Node() if thing.drain_deadline_ms and not thing.is_drained:
            state.draining_nodes[thing.key] = None
        case Copy():
            state.copies_by_model[thing.model][thing.key] = None
            state.copies_by_node[thing.device.partition(":")[0]][thing.key] = None
            if thing.replica:
                state.projections[thing.replica][thing.key] = None
            if thing.desired == "absent" or thing.state not in COPY_AT_REST:
                state.active_copies[thing.key] = None
            if thing.pins:
                state.pinned_copies[thing.key] = None
            if thing.desired == "present" and thing.state == "ready" and not thing.replica:
                index = state.ready_by_model if thing.device.endswith(":disk") else state.warm_by_model
                index[thing.model][thing.key] = None
        case Replica():
            state.replicas_by_service[thing.service][thing.key] = None
            state.replicas_by_node[thing.node][thing.key] = None
            state.replicas_by_model[thing.model][thing.key] = None
        case Benchmark() if thing.state not in BENCHMARK_ENDED:
            state.live_benchmarks[thing.key] = None
        case Point():
            state.points_by_benchmark[thing.benchmark][thing.key] = None
        case Run():
            state.runs_by_benchmark[thing.benchmark][thing.key] = None
            state.runs_by_node[thing.node][thing.key] = None
        case Job() if thing.state not in JOB_ENDED:
            state.live_jobs[thing.key] = None
            completed = {step.id for step in thing.steps if step.state == "completed"}
            for step in thing.steps:
                node = step.target_device.partition(":")[0]
                if step.state == "running":
                    if step.target:
                        state.waiters[step.target][thing.key] = None
                    if step.action in HEAVY_ACTIONS:
                        state.running_steps[node][f"{thing.key}/{step.id}"] = None
                elif (
                    step.state == "pending" and step.action in HEAVY_ACTIONS and completed.issuperset(step.dependencies)
                ):
                    state.queued_steps[node][thing.key] = None
        case _:
            pass


def _unindex(state: State, thing: Object) -> None:
    match thing:
        case Node():
            state.draining_nodes.pop(thing.key, None)
        case Copy():
            _discard(state.copies_by_model, thing.model, thing.key)
            _discard(state.copies_by_node, thing.device.partition(":")[0], thing.key)
            _discard(state.projections, thing.replica, thing.key)
            state.active_copies.pop(thing.key, None)
            state.pinned_copies.pop(thing.key, None)
            _discard(state.ready_by_model, thing.model, thing.key)
            _discard(state.warm_by_model, thing.model, thing.key)
        case Replica():
            _discard(state.replicas_by_service, thing.service, thing.key)
            _discard(state.replicas_by_node, thing.node, thing.key)
            _discard(state.replicas_by_model, thing.model, thing.key)
        case Benchmark():
            state.live_benchmarks.pop(thing.key, None)
        case Point():
            _discard(state.points_by_benchmark, thing.benchmark, thing.key)
        case Run():
            _discard(state.runs_by_benchmark, thing.benchmark, thing.key)
            _discard(state.runs_by_node, thing.node, thing.key)
        case Job():
            state.live_jobs.pop(thing.key, None)
            for step in thing.steps:
                if step.target:
                    _discard(state.waiters, step.target, thing.key)
                node = step.target_device.partition(":")[0]
                _discard(state.running_steps, node, f"{thing.key}/{step.id}")
                _discard(state.queued_steps, node, thing.key)
        case _:
            pass


def _discard(index: dict[str, dict[str, None]], name: str, key: str) -> None:
    keys = index.get(name)
    if keys is not None:
        keys.pop(key, None)
        if not keys:
            del index[name]
