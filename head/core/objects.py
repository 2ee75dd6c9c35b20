"""The durable objects of the head: what the journal keeps and the state is made of.

Every object is frozen; a change is a new object put under the same (kind, key). Fields may be added with
defaults; none may change its type or meaning, because journals of every released version must load.
Times are Herder time (`common/clock.py`) in milliseconds and end in `_ms`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from common.errors import ErrorInfo
from common.manifest import Manifest
from common.wire import Inventory


class Object(msgspec.Struct, frozen=True, omit_defaults=True):
    """Root of the durable objects."""

    KIND: ClassVar[str] = ""

    @property
    def key(self) -> str:
        """The object's key among its kind."""
        raise AssertionError("each kind names its key")


class Meta(Object, frozen=True):
    """The cluster itself. `head_epoch` grows by one at each head start; agents refuse a lower one."""

    KIND = "meta"
    cluster_id: str
    head_epoch: int
    created_ms: int

    @property
    def key(self) -> str:
        return "cluster"


class Node(Object, frozen=True):
    """A node that has said hello at least once.

    status: online | suspect | unreachable | left. Only transitions are journalled, never heartbeats. `suspect`
    (websocket closed, lease not over) is volatile: the journal keeps it as online.
    """

    KIND = "node"
    id: str
    boot_id: str
    agent_id: str
    version: str
    inventory: Inventory
    first_seen_ms: int
    status: str
    status_since_ms: int
    generation: int
    labels: dict[str, str] = {}  # from the operator; they win over the agent's own
    agent_labels: dict[str, str] = {}
    advertise: str = ""
    data_port: int = 0
    http_port: int = 0
    launch_id: str = ""
    is_cordoned: bool = False
    drain_deadline_ms: int = 0  # 0: not draining
    drain_lead_ms: int = 0  # so long before the deadline engines get no new requests, to finish those they have
    drain_reason: str = ""
    is_drained: bool = False
    leaving_ms: int = 0  # when the agent said it will be gone; 0: not leaving
    identity_sha256: str = ""  # of the secret that the node's sessions must show; "": the next one that comes binds it

    @property
    def key(self) -> str:
        return self.id


class Model(Object, frozen=True):
    """A registered model."""

    KIND = "model"
    name: str
    type: str
    revision: str
    created_ms: int
    updated_ms: int
    sources: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    is_deleting: bool = False  # copies are being dropped; gone when the last one is

    @property
    def key(self) -> str:
        return self.name


class ModelManifest(Object, frozen=True):
    """The verified manifest of a model at a revision, made by the first node that ingested it."""

    KIND = "manifest"
    manifest: Manifest
    made_by: str
    at_ms: int

    @property
    def key(self) -> str:
        return f"{self.manifest.model}@{self.manifest.revision}"


class Pin(msgspec.Struct, frozen=True, omit_defaults=True):
    """Keeps a copy from eviction. `until_ms` 0: until removed."""

    name: str
    until_ms: int = 0


class Copy(Object, frozen=True):
    """One model at a revision on one device: what is desired of it and what was last seen.

    desired: present | absent. state: planned (not commanded or not confirmed yet), waiting (for room or for a
    source), reserved, fetching, verifying, syncing, ready, loading, asleep, failed, dropping. The object is
    deleted once absent is confirmed. Progress (bytes) is volatile and stands in State.progress.
    Copies on gpuN are projections of replicas: `replica` names it.
    """

    KIND = "copy"
    model: str
    revision: str
    device: str  # canonical "node:storage"
    desired: str
    state: str
    generation: int  # of the last change of `desired` or of the order's content
    cause: str
    created_ms: int
    bytes: int = 0
    digest: str = ""
    pins: tuple[Pin, ...] = ()
    is_locked: bool = False
    attempts: int = 0
    not_before_ms: int = 0  # next attempt
    error: ErrorInfo | None = None
    last_used_ms: int = 0
    verified_ms: int = 0
    source: str = ""  # asked for explicitly: a URL or a device
    replica: str = ""

    @property
    def key(self) -> str:
        return copy_key(self.model, self.revision, self.device)


def copy_key(model: str, revision: str, device: str) -> str:
    """Key of a copy."""
    return f"{model}@{revision}|{device}"


class Service(Object, frozen=True):
    """Desired state: recipe + model + config + replica count + placement rule."""

    KIND = "service"
    name: str
    model: str  # "" where the recipe needs none
    revision: str
    recipe: str
    replicas: int
    generation: int
    spec_hash: str
    created_ms: int
    cause: str
    desired: str = "running"  # running | stopped (deleted when its replicas are gone)
    devices: tuple[str, ...] = ()
    port: int = 0
    config: dict[str, Any] = {}
    labels: dict[str, str] = {}
    on_unreachable: str = "keep"
    reason: str = ""  # why it is not fully placed, in words
    api_key: str = ""  # of the engines' own door
    error: ErrorInfo | None = None  # beside `reason`, when waiting cannot help: a person must change something

    @property
    def key(self) -> str:
        return self.name


class Replica(Object, frozen=True):
    """One engine of a service. desired: running | stopped. States as wire.ReplicaStatus, plus `pending`
    (not confirmed by its agent yet) and `draining` (to be stopped, finishing its requests until `drain_until_ms`).
    """

    KIND = "replica"
    id: str  # "<service>-<slot>"
    service: str
    slot: int
    model: str
    revision: str
    node: str
    device: str  # "node:gpu0", "node:dram" or "node:disk"
    generation: int
    desired: str
    state: str
    cause: str
    created_ms: int
    spec_hash: str = ""
    port: int = 0
    host: str = ""
    pid: int = 0
    restarts: int = 0
    started_ms: int = 0
    ready_ms: int = 0
    exit_code: int | None = None
    api_key: str = ""
    memory_bytes: int = 0  # reserved for it by placement
    gpu_memory_bytes: int = 0  # reserved for it by placement, per GPU
    error: ErrorInfo | None = None
    last_log: tuple[str, ...] = ()
    not_before_ms: int = 0
    gpus: tuple[int, ...] = ()  # indices of all its GPUs; `device` names the first
    is_exclusive: bool = False  # its GPUs are reserved whole
    attempts: int = 0  # placements that failed since it was last ready
    avoid: tuple[str, ...] = ()  # nodes where it failed since it was last ready
    drain_until_ms: int = 0  # 0: not draining

    @property
    def key(self) -> str:
        return self.id


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of a job. states: pending | running | completed | failed | cancelled | skipped (terminal: last 4)."""

    id: str
    action: str
    state: str = "pending"
    model: str = ""
    source_device: str = ""
    target_device: str = ""
    source_url: str = ""
    dependencies: tuple[str, ...] = ()
    port: int = 0
    config: dict[str, Any] = {}
    keep_source: bool = False
    is_forced: bool = False
    target_url: str = ""
    timeout_ms: int = 0  # 0: by size and progress
    retries: int = -1  # -1: the default
    attempts: int = 0
    not_before_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    phase: str = ""  # "copy" | "drop" of a move; what the step is at
    target: str = ""  # "kind:key" of the object that it waits on
    target_generation: int = 0
    error: ErrorInfo | None = None
    result: dict[str, Any] = {}
    note: str = ""


class Job(Object, frozen=True):
    """A durable graph of steps."""

    KIND = "job"
    id: str
    name: str
    actor: str
    state: str
    created_ms: int
    steps: tuple[Step, ...]
    description: str = ""
    priority: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    is_cancelling: bool = False
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return self.id


class Check(Object, frozen=True):
    """A health check that was asked of a node and is not answered yet."""

    KIND = "check"
    id: str
    node: str
    generation: int
    cause: str
    asked_ms: int
    replica: str = ""
    url: str = ""
    timeout_s: float = 5.0
    outcome: str = ""  # "" | ok | failed
    error: ErrorInfo | None = None
    detail: dict[str, Any] = {}

    @property
    def key(self) -> str:
        return self.id


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a run, kept when the run itself is forgotten. state: done | failed | lost | cancelled."""

    run: str
    node: str
    state: str
    artifacts: tuple[str, ...] = ()
    error: ErrorInfo | None = None


class Benchmark(Object, frozen=True):
    """A recipe that is performed: point after point, each on all load nodes together.

    state: pending (others use its nodes or its service) | preparing (service, monitors) | running | finishing
    (monitors, logs, report) | completed | failed | cancelled. A benchmark is_degraded when a load node was lost in
    any point. Its points are objects of their own (a record then carries one of them, not all 500): read them by
    `benchmark_facts.points_of(state, id)`, its runs by `benchmark_facts.runs_of(state, id)`, and what it waits for
    in words by `benchmark_facts.note_of(state, benchmark)`.
    """

    KIND = "benchmark"
    id: str
    name: str
    recipe: dict[str, Any]  # common.bench.recipe.BenchmarkRecipe as plain data, defaults included
    recipe_sha256: str
    actor: str
    state: str
    created_ms: int
    generation: int
    cause: str
    planned: int = 0  # points in all, as far as that is known; a search adds to it
    load_nodes: tuple[str, ...] = ()
    server_nodes: tuple[str, ...] = ()
    monitors: tuple[str, ...] = ()  # keys of its monitor Runs
    monitor_parts: tuple[Part, ...] = ()  # what became of them
    service: str = ""
    is_own_service: bool = False
    started_ms: int = 0  # when it left `pending`
    ended_ms: int = 0
    since_ms: int = 0  # when it came to its present state
    not_before_ms: int = 0  # of the next point
    is_cancelling: bool = False
    is_degraded: bool = False
    is_written: bool = False  # its files are whole
    best: dict[str, Any] = {}  # of a search: the most load that met the SLO
    note: str = ""  # what it waits for, in words; see `benchmark_facts.note_of`
    error: ErrorInfo | None = None
    facts: dict[str, Any] = {}  # versions, engine flags, inventory of the nodes: as they were

    @property
    def key(self) -> str:
        return self.id


class Point(Object, frozen=True):
    """One run of a benchmark: the recipe's load with `changes`, for the n-th time.

    state: pending | preparing | armed | running | collecting | judging | completed | failed | cancelled.
    """

    KIND = "point"
    benchmark: str
    number: int  # in the order in which they are run
    changes: dict[str, Any] = {}
    repetition: int = 0
    seed: int = 0
    group: int = 0  # which combination of the sweep; a search runs once in each
    attempt: int = 0  # above 0: again, because the one before says nothing about the server
    state: str = "pending"
    runs: tuple[str, ...] = ()  # keys of its load Runs, by part
    parts: tuple[Part, ...] = ()  # what became of them, once it is being judged
    urls: tuple[str, ...] = ()  # where the load went
    servers: tuple[str, ...] = ()  # the engines' processes at the start
    since_ms: int = 0  # when it came to its present state
    started_ms: int = 0
    fire_ms: int = 0  # when it began, Herder time
    ended_ms: int = 0
    skew_ms: float = 0.0  # bound of how far apart the load nodes began
    coverage: float = 1.0  # share of the load nodes' parts that were really performed; below 1: one was lost
    is_valid: bool = False
    reasons: tuple[str, ...] = ()  # codes of why it is not
    said: tuple[str, ...] = ()  # the same in words
    figures: dict[str, float] = {}  # the main figures of its report
    error: ErrorInfo | None = None
    note: str = ""  # what it waits for, in words

    @property
    def key(self) -> str:
        return point_key(self.benchmark, self.number)


def point_key(benchmark: str, number: int) -> str:
    """Key of a point."""
    return f"{benchmark}.{number}"


class Run(Object, frozen=True):
    """One node's part of a benchmark's point, or its monitor; forgotten once its agent has forgotten it.

    state: as wire.RunStatus, plus `pending` (not confirmed by its agent yet) and `lost`; done, failed and lost stay.
    desired: armed | fired (a monitor from the beginning) | ended | absent.
    """

    KIND = "run"
    id: str  # "<benchmark>.<point>.<part>" or "<benchmark>.monitor.<node>"
    benchmark: str
    node: str
    kind: str  # "load" | "monitor"
    generation: int
    desired: str
    state: str
    cause: str
    created_ms: int
    point: int = -1
    part: int = 0
    parts: int = 1
    digest: str = ""
    start_boottime_ns: int = 0
    late_ms: int = 0  # how long after its moment it really began; it was told too late
    artifacts: tuple[str, ...] = ()  # names of those that the head holds
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return self.id


class ApiKey(Object, frozen=True):
    """A token, stored as the hex sha256 of its secret part (256 random bits, so a plain hash is enough)."""

    KIND = "key"
    id: str
    name: str
    role: str
    secret_sha256: str
    created_ms: int
    expires_ms: int = 0
    is_revoked: bool = False
    revoked_ms: int = 0
    node: str = ""  # role agent: the only node id that this key may say; "": any

    @property
    def key(self) -> str:
        return self.id


class Idempotent(Object, frozen=True):
    """The answer that was given under an Idempotency-Key, for repeats."""

    KIND = "idempotent"
    id: str  # actor + ":" + key
    request_sha256: str
    at_ms: int
    reference: str = ""  # "kind:key" of what the request made; the answer is rendered from it afresh

    @property
    def key(self) -> str:
        return self.id


_ALL = (Meta, Node, Model, ModelManifest, Copy, Service, Replica, Job, Check, Benchmark, Point, Run, ApiKey, Idempotent)
KINDS: dict[str, type[Object]] = {cls.KIND: cls for cls in _ALL}
