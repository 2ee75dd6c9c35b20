"""The API's types: what the control plane takes and what it answers.

Requests forbid unknown fields (a misspelt field is an error, not a silence); answers may grow fields in later
versions. Times end in `_ms` and are milliseconds since the epoch, sizes are bytes, rates bytes per second.
`DeviceName` is `node:disk`, `node:dram` or `node:gpuN`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta, Struct

ModelType = Literal["llm", "embedding", "reranker", "diffusion", "vision", "audio", "multimodal", "other"]
Role = Literal["admin", "operator", "viewer", "agent", "inference"]
Action = Literal["download", "move", "copy", "serve", "stop_serve", "delete", "health_check", "benchmark"]
BenchmarkState = Literal["pending", "preparing", "running", "finishing", "completed", "failed", "cancelled"]
Verdict = Literal["", "valid", "degraded", "invalid"]
PointState = Literal[
    "pending", "preparing", "armed", "running", "collecting", "judging", "completed", "failed", "cancelled"
]
JobState = Literal["pending", "running", "completed", "failed", "cancelled"]
StepState = Literal["pending", "running", "completed", "failed", "cancelled", "skipped"]
CopyState = Literal[
    "planned",
    "waiting",
    "reserved",
    "fetching",
    "verifying",
    "syncing",
    "ready",
    "loading",
    "asleep",
    "failed",
    "dropping",
]
NodeState = Literal["online", "suspect", "unreachable", "left", "unknown"]
ReplicaState = Literal[
    "pending", "waiting_copy", "starting", "ready", "unhealthy", "draining", "stopping", "stopped", "failed"
]
ServiceState = Literal["pending", "starting", "ready", "degraded", "stopping", "stopped", "failed"]

Name = Annotated[str, Meta(min_length=1, max_length=192)]
DeviceName = Annotated[str, Meta(min_length=3, max_length=96)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class Request(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Root of what people send."""


class Answer(Struct, frozen=True):
    """Root of what the API answers."""


# errors
class ErrorDetail(Answer, frozen=True):
    """Why a request failed. `code` is stable; scripts may match on it."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = {}


class ErrorAnswer(Answer, frozen=True):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


# models
class RegisterModel(Request, frozen=True):
    """A model to know. `source_url` is short for one entry of `sources`."""

    name: Name
    type: ModelType = "llm"
    source_url: str | None = None
    sources: tuple[str, ...] = ()
    revision: str = "main"
    metadata: dict[str, Any] = {}


class UpdateModel(Request, frozen=True):
    """What to change of a model; fields left out stay. Metadata is merged; a null value removes its key."""

    type: ModelType | None = None
    sources: tuple[str, ...] | None = None
    revision: str | None = None
    metadata: dict[str, Any] | None = None


class CopyView(Answer, frozen=True):
    """One copy of a model on one device."""

    model: str
    revision: str
    device: str
    state: CopyState
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float | None = None
    eta_s: float | None = None  # only once it means something
    source: str = ""
    pins: tuple[str, ...] = ()
    in_use: int = 0  # leases held on it: transfers, engines
    is_locked: bool = False
    last_used_ms: int | None = None
    verified_ms: int | None = None
    is_node_reachable: bool = True
    error: ErrorDetail | None = None


class ModelView(Answer, frozen=True):
    """A registered model, what its files say, and where it is."""

    name: str
    type: ModelType
    revision: str
    sources: tuple[str, ...]
    metadata: dict[str, Any]
    detected: dict[str, Any]  # architecture, parameters, layers, heads, context, dtype or quantisation, ...
    format: str
    size: int  # bytes; 0 until known
    files: int
    digest: str
    locations: tuple[str, ...]  # devices with a ready copy
    services: dict[str, str]  # device -> URL of the engine there
    copies: tuple[CopyView, ...]
    created_ms: int
    updated_ms: int
    is_deleting: bool = False  # its copies are being dropped; gone when the last one is


class ManifestFileView(Answer, frozen=True):
    path: str
    size: int
    blob: str
    chunk_bytes: int
    sha256: str = ""


class ManifestView(Answer, frozen=True):
    """The files of a model at a revision."""

    model: str
    revision: str
    digest: str
    format: str
    size: int
    files: tuple[ManifestFileView, ...]


# nodes
class DeviceView(Answer, frozen=True, gc=False):
    """One device: bytes in all, in use by copies, reserved for what is on its way, free for new ones."""

    device: str
    kind: Literal["disk", "dram", "gpu"]
    total_bytes: int
    used_bytes: int
    reserved_bytes: int
    free_bytes: int
    name: str = ""  # GPU name
    uuid: str = ""
    utilisation: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    is_lost: bool = False


class NodeView(Answer, frozen=True):
    """A node, its state and what it has."""

    node_id: str
    hostname: str
    state: NodeState
    state_since_ms: int
    last_seen_ms: int | None
    is_cordoned: bool
    drain: str  # "" | "draining" | "drained"
    drain_deadline_ms: int | None
    labels: dict[str, str]
    version: str
    address: str
    gpu_count: int
    gpu_reason: str
    devices: tuple[DeviceView, ...]
    inventory: dict[str, Any]
    telemetry: dict[str, Any] | None
    copies: int
    replicas: int
    unknown_copies: int = 0  # in its store, but of no registered model: Herder leaves them alone; `herder why node`


class DrainNode(Request, frozen=True):
    """Move services away and place nothing new. At the deadline what is left is stopped."""

    deadline_s: Annotated[int, Meta(ge=0, le=604_800)] = 3_600
    reason: str = ""


class UpdateNode(Request, frozen=True):
    """Labels to set; a null value removes one."""

    labels: dict[str, str | None]


# operations (seed field names kept)
class Download(Request, frozen=True):
    """Fetch a model from its source to a device. Without `source_url`: the model's registered sources."""

    model_name: Name
    target_device: DeviceName
    source_url: str | None = None


class Move(Request, frozen=True):
    """Copy to another device, then drop the source unless `keep_source`."""

    model_name: Name
    target_device: DeviceName
    source_device: DeviceName | None = None
    keep_source: bool = False


class Copy(Request, frozen=True):
    """Copy to another device."""

    model_name: Name
    target_device: DeviceName
    source_device: DeviceName | None = None


class Serve(Request, frozen=True):
    """Run one engine for a model on a device. Port 0: chosen by the node.

    `config` may hold: recipe, name (of the service), args (extra engine arguments), env, and what the recipe
    lists under `config`.
    """

    model_name: Name
    device: DeviceName
    port: Port = 0
    config: dict[str, Any] = {}


class StopServe(Request, frozen=True):
    """Stop the engine that serves a model on a device."""

    model_name: Name
    device: DeviceName


class DeleteCopy(Request, frozen=True):
    """Remove a copy. `force` also removes a pinned one or the last copy of a model without a source."""

    model_name: Name
    device: DeviceName
    force: bool = False


class HealthCheck(Request, frozen=True):
    """Ask an engine (by model and device) or a URL, from a node, once."""

    model_name: str | None = None
    device: DeviceName | None = None
    target_url: str | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=300)] = 5.0


class Pin(Request, frozen=True):
    """Keep a copy from eviction, by a name of your choice, until unpinned or `ttl_s` has passed (0: no end)."""

    model_name: Name
    device: DeviceName
    name: Annotated[str, Meta(min_length=1, max_length=64)] = "operator"
    ttl_s: Annotated[int, Meta(ge=0)] = 0


# services
class CreateService(Request, frozen=True):
    """Desired state: so many replicas of a recipe with a model. Devices: where; empty: chosen by placement."""

    name: Name
    model: Name
    recipe: str = ""  # empty: by the model's format
    replicas: Annotated[int, Meta(ge=0, le=256)] = 1
    devices: tuple[DeviceName, ...] = ()
    port: Port = 0
    config: dict[str, Any] = {}
    labels: dict[str, str] = {}  # nodes must have these
    on_unreachable: Literal["keep", "replace"] = "keep"


class ReplicaView(Answer, frozen=True):
    replica: str
    service: str
    model: str
    device: str
    node: str
    state: ReplicaState
    endpoint: str  # "" until it listens
    generation: int
    restarts: int
    pid: int
    started_ms: int | None
    ready_ms: int | None
    memory_bytes: int  # reserved for it by placement
    gpu_memory_bytes: int  # reserved for it by placement, on each GPU
    exit_code: int | None
    error: ErrorDetail | None
    last_log: tuple[str, ...]
    measured_memory_bytes: int | None = None  # resident, of all its processes; None: not measured yet
    measured_gpu_memory_bytes: int | None = None  # on each GPU, by NVML; None: not measured yet, or no GPU


class ServiceView(Answer, frozen=True):
    name: str
    model: str
    revision: str
    recipe: str
    state: ServiceState
    replicas_wanted: int
    replicas_ready: int
    spec_hash: str
    config: dict[str, Any]
    replicas: tuple[ReplicaView, ...]
    created_ms: int
    reason: str  # why it is not ready, in words


# jobs
class JobAction(Request, frozen=True):
    """One step. Both dialects of job files fit in: `action/model/source/from/to/device/port` run in the order
    written; `action_id/action_type/model_name/devices/dependencies` run as the graph says."""

    action: Action | None = None
    action_type: Action | None = None
    action_id: str | None = None
    model: str | None = None
    model_name: str | None = None
    source: str | None = None
    source_url: str | None = None
    target: str | None = None
    from_: str | None = msgspec.field(default=None, name="from")
    to: str | None = None
    device: str | None = None
    devices: tuple[str, ...] = ()
    port: Port = 0
    config: dict[str, Any] = {}
    dependencies: tuple[str, ...] | None = None
    keep_source: bool | None = None
    target_url: str | None = None
    force: bool = False
    timeout_s: Annotated[int, Meta(ge=1, le=604_800)] | None = None
    retries: Annotated[int, Meta(ge=0, le=20)] | None = None


class CreateJob(Request, frozen=True):
    """A job: a graph of steps. Priority: higher first."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    actions: Annotated[tuple[JobAction, ...], Meta(min_length=1, max_length=1000)]
    description: str = ""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0


class StepView(Answer, frozen=True):
    id: str
    action: Action
    model: str
    devices: tuple[str, ...]
    dependencies: tuple[str, ...]
    state: StepState
    attempts: int
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float | None = None
    eta_s: float | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    error: ErrorDetail | None = None
    result: dict[str, Any] = {}
    note: str = ""  # what it is waiting for or doing, in words


class JobView(Answer, frozen=True):
    id: str
    name: str
    description: str
    status: JobState
    priority: int
    actor: str
    created_ms: int
    started_ms: int | None
    ended_ms: int | None
    steps: tuple[StepView, ...]
    error: ErrorDetail | None = None


# benchmarks
class CreateBenchmark(Request, frozen=True):
    """A benchmark from a recipe by name, from a recipe sent along, or from the first changed by the second.

    `document` is a whole recipe (without `recipe`) or what replaces the same places of the named one.
    """

    recipe: str = ""
    document: dict[str, Any] = {}
    name: Annotated[str, Meta(max_length=64)] = ""


class RunView(Answer, frozen=True):
    """One node's part of a point, or its monitor."""

    id: str
    node: str
    kind: Literal["load", "monitor"]
    state: str
    part: int
    parts: int
    artifacts: tuple[str, ...] = ()
    error: ErrorDetail | None = None


class PointView(Answer, frozen=True):
    """One run of a benchmark. figures: main figures of its report by name (ttft_p50_ms, req_s, ...)."""

    number: int
    changes: dict[str, Any]
    repetition: int
    status: PointState
    is_valid: bool
    reasons: tuple[str, ...]
    coverage: float
    skew_ms: float
    figures: dict[str, float]
    started_ms: int | None = None
    ended_ms: int | None = None
    error: ErrorDetail | None = None
    said: tuple[str, ...] = ()
    """The reasons in words, with their numbers, and what servers answered to requests that failed."""


class BenchmarkView(Answer, frozen=True):
    """A benchmark and how far it is. `points` and `runs` are empty in lists."""

    id: str
    name: str
    status: BenchmarkState
    actor: str
    recipe_sha256: str
    model: str
    service: str
    points_done: int
    points_planned: int
    is_valid: bool
    is_degraded: bool
    note: str
    created_ms: int
    started_ms: int | None
    ended_ms: int | None
    load_nodes: tuple[str, ...] = ()
    server_nodes: tuple[str, ...] = ()
    recipe: dict[str, Any] = {}
    points: tuple[PointView, ...] = ()
    runs: tuple[RunView, ...] = ()
    best: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    labels: dict[str, str] = {}
    error: ErrorDetail | None = None
    verdict: Verdict = ""
    """The worst of its points; empty until it is completed."""


class BenchmarkFile(Answer, frozen=True):
    """One file kept with a benchmark's result."""

    name: str
    bytes: int


class BenchmarkTick(Answer, frozen=True):
    """One second of a running point, all load nodes together. Times are milliseconds."""

    benchmark: str
    point: int
    at_s: float
    nodes: int
    sent: int
    done: int
    failed: int
    in_flight: int
    tokens: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None


class BenchmarkRecipeView(Answer, frozen=True):
    """A benchmark recipe of the head."""

    name: str
    description: str
    path: str
    sha256: str
    document: dict[str, Any]


# keys, events, the rest
class CreateKey(Request, frozen=True):
    role: Role
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    ttl_s: Annotated[int, Meta(ge=0)] = 0  # 0: no end
    node: Annotated[str, Meta(max_length=63)] = ""  # role agent: the only node that may use it


class KeyView(Answer, frozen=True):
    id: str
    name: str
    role: Role
    created_ms: int
    expires_ms: int | None
    is_revoked: bool
    token: str | None = None  # only in the answer that created it
    node: str = ""  # the only node that may use it; empty: any


class Event(Answer, frozen=True):
    """One entry of the change feed; `id` is the journal revision, for resume."""

    id: int
    at_ms: int
    what: str  # past tense, as "copy_ready"
    kind: str  # node | model | copy | service | replica | job | key
    key: str
    cause: str
    detail: dict[str, Any] = {}


class StoryLine(Answer, frozen=True):
    at_ms: int
    revision: int
    what: str
    kind: str
    key: str
    cause: str
    detail: dict[str, Any] = {}


class Candidate(Answer, frozen=True):
    """One node that placement looked at, and why it was not taken."""

    node: str
    verdict: str  # "fits" | "refused"
    reason: str
    numbers: dict[str, Any] = {}


class Why(Answer, frozen=True):
    """Why something is as it is, or is not yet."""

    id: str
    kind: str
    state: str
    reason: str
    candidates: tuple[Candidate, ...] = ()


class Health(Answer, frozen=True):
    status: Literal["healthy", "degraded"]
    version: str
    cluster_id: str
    head_epoch: int
    is_settling: bool
    is_read_only: bool
    nodes: int
    nodes_online: int
    models: int
    services: int
    jobs_running: int
    uptime_s: float
    alarms: tuple[str, ...] = ()
    timestamp_ms: int = 0
    timestamp: str = ""  # the same as UTC text


class RecipeView(Answer, frozen=True):
    name: str
    category: str
    runtime: str
    description: str
    model_formats: tuple[str, ...]
    config: dict[str, Any]
    path: str


class Page(Answer, frozen=True):
    """A page of a list. `next` is the cursor of the following page, or null at the end."""

    items: tuple[msgspec.Raw, ...]
    next: str | None = None
    total: int = 0


class Deleted(Answer, frozen=True):
    """What a DELETE did: gone now, or on its way (`is_done` false: its copies are still being dropped)."""

    kind: str
    key: str
    is_done: bool


class About(Answer, frozen=True):
    """What answers at the root: the head's version and where to go from here."""

    name: str
    version: str
    api: str
    docs: str
    openapi: str
    health: str


class TargetGroup(Answer, frozen=True):
    """One entry of Prometheus HTTP service discovery."""

    targets: tuple[str, ...]
    labels: dict[str, str]


class LogEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of a log read as JSON lines: a line, a note, or, without either, only how far its source has come.

    `cursor` says where its source stands after this entry; `?cursor=` with the latest of each source goes on there.
    """

    source: str = ""  # "replica:chat-0", "run:ID", "agent:NODE", "slurm:NODE/JOBID", "head"
    node: str = ""  # "": the head itself
    time_ms: int | None = None  # wall time of the node at which the line came; null when not known
    line: str | None = None  # without its newline
    is_partial: bool = False  # more of this line follows in the next entry of this source
    note: str = ""  # what a reader has to know: bytes that are gone, a node that is away
    lost_bytes: int = 0  # removed before they were read; -1: a whole run
    cursor: str = ""
    is_end: bool = False  # the last entry: there is no more; a stream that ends without it was cut off


class LogsWanted(TypedDict, total=False):
    """Parameters of GET /api/v1/logs, of which docs/logs.md tells."""

    target: str
    service: str
    replica: str
    run: str
    benchmark: str
    job: str
    node: str
    source: str
    since: str
    until: str
    search: str
    regex: bool
    ignore_case: bool
    tail: int | None
    follow: bool
    back: int | None
