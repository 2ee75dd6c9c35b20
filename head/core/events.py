"""Events: everything that can happen to the head, in the past tense. Ids and time arrive in the event.

Events that came through the API carry `request_id` (the core answers each exactly once, by Reply or Refuse) and
`actor`. `fresh_id` is an id that the shell drew, for what the event makes.
"""

from __future__ import annotations

import msgspec

from common import limits, wire
from common.bench.recipe import BenchmarkRecipe
from common.errors import ErrorInfo
from common.recipe import Recipe
from herder import types as api


class Event(msgspec.Struct, frozen=True):
    """Root of the events."""


# the daemon's own
class HeadStarted(Event, frozen=True):
    """First event of a process. `cluster_id` is fresh and used only if the journal has none."""

    cluster_id: str
    ticket_secret: bytes  # root of the per-node ticket keys, volatile per head process
    recipes: dict[str, Recipe] = {}
    drain_ms: int = limits.DRAIN_MS  # how long requests may go on when their engine is stopped; 0: not at all
    benchmark_recipes: dict[str, BenchmarkRecipe] = {}
    gateway_url: str = ""  # where nodes reach the head's gateway, as https://head:8443; "": nowhere
    version: str = ""  # of the head


class Ticked(Event, frozen=True):
    """About once a second. `stall_ms`: how much later than planned our own loop got here."""

    stall_ms: int = 0


class RecipesLoaded(Event, frozen=True):
    """The recipe folder was read again. `benchmark_recipes` None: those stay as they are."""

    recipes: dict[str, Recipe]
    benchmark_recipes: dict[str, BenchmarkRecipe] | None = None


# sessions
class AgentSaidHello(Event, frozen=True):
    session_id: str
    hello: wire.Hello
    peer: str  # address the connection came from


class AgentReported(Event, frozen=True):
    node: str
    session_id: str
    report: wire.Report


class LeaseRenewed(Event, frozen=True):
    node: str
    session_id: str
    lease: wire.Lease


class TelemetryReceived(Event, frozen=True):
    node: str
    session_id: str
    telemetry: wire.Telemetry | bytes  # as it came, to be decoded when somebody looks


class ProgressReceived(Event, frozen=True):
    node: str
    session_id: str
    progress: wire.Progress


class ResultReceived(Event, frozen=True):
    node: str
    session_id: str
    result: wire.Result


class AgentLeaving(Event, frozen=True):
    node: str
    session_id: str
    leaving: wire.Leaving


class SessionClosed(Event, frozen=True):
    node: str
    session_id: str
    reason: str


# the gateway
class ModelsUsed(Event, frozen=True):
    """Which replicas answered requests since the last time; at most one a second."""

    replicas: dict[str, int]  # replica id -> requests


class ReplicaProbed(Event, frozen=True):
    """The gateway asked a replica directly (its node is suspect, or requests failed)."""

    replica: str
    generation: int
    is_healthy: bool


class ReplicaIdle(Event, frozen=True):
    """No request is on its way to this draining replica any more; answers the effect `Drain`."""

    replica: str
    generation: int


# benchmarks
class ClockMeasured(Event, frozen=True):
    """The shell has asked a node's clock: node boottime = Herder time x 1e6 + offset_ns, to within bound_ns."""

    node: str
    session_id: str
    offset_ns: int
    bound_ns: int


class ArtifactStored(Event, frozen=True):
    """A file of a run is with the head, whole and synced."""

    run: str
    generation: int
    name: str
    bytes: int


class PointJudged(Event, frozen=True):
    """Answers JudgePoint: a point's parts were merged and its report is written, or why not."""

    benchmark: str
    generation: int
    point: int
    is_valid: bool = False
    reasons: tuple[str, ...] = ()
    figures: dict[str, float] = {}
    error: ErrorInfo | None = None
    said: tuple[str, ...] = ()  # the reasons in words


class BenchmarkWritten(Event, frozen=True):
    """Answers WriteBenchmark: logs are collected and the whole report is written, or why not."""

    benchmark: str
    generation: int
    error: ErrorInfo | None = None


# requests
class RequestEvent(Event, frozen=True, kw_only=True):
    """Root of what comes through the API. `idempotency_key` "" when the caller gave none."""

    request_id: str
    actor: str = ""
    fresh_id: str = ""
    idempotency_key: str = ""
    request_sha256: str = ""


class RegisterModelRequested(RequestEvent, frozen=True, kw_only=True):
    body: api.RegisterModel


class UpdateModelRequested(RequestEvent, frozen=True, kw_only=True):
    model: str
    body: api.UpdateModel


class DeleteModelRequested(RequestEvent, frozen=True, kw_only=True):
    model: str
    force: bool = False


class PinRequested(RequestEvent, frozen=True, kw_only=True):
    body: api.Pin


class UnpinRequested(RequestEvent, frozen=True, kw_only=True):
    body: api.Pin


class CordonRequested(RequestEvent, frozen=True, kw_only=True):
    node: str
    is_cordoned: bool


class DrainRequested(RequestEvent, frozen=True, kw_only=True):
    node: str
    body: api.DrainNode


class UpdateNodeRequested(RequestEvent, frozen=True, kw_only=True):
    node: str
    body: api.UpdateNode


class RemoveNodeRequested(RequestEvent, frozen=True, kw_only=True):
    node: str
    force: bool = False


class ResetIdentityRequested(RequestEvent, frozen=True, kw_only=True):
    node: str


class CreateJobRequested(RequestEvent, frozen=True, kw_only=True):
    """A job file, or a one-step job that /download, /move, /serve, ... make. Answered with "job:<id>"."""

    body: api.CreateJob


class CancelJobRequested(RequestEvent, frozen=True, kw_only=True):
    job: str


class CreateServiceRequested(RequestEvent, frozen=True, kw_only=True):
    body: api.CreateService
    api_key: str  # drawn by the shell for the engines' own door


class DeleteServiceRequested(RequestEvent, frozen=True, kw_only=True):
    service: str


class CreateBenchmarkRequested(RequestEvent, frozen=True, kw_only=True):
    """Answered with "benchmark:<id>". `recipe` is checked already as far as that needs no cluster."""

    recipe: BenchmarkRecipe
    api_key: str  # drawn by the shell for the engines of a service that is made for it


class CancelBenchmarkRequested(RequestEvent, frozen=True, kw_only=True):
    benchmark: str


class DeleteBenchmarkRequested(RequestEvent, frozen=True, kw_only=True):
    """Removes an ended benchmark and its result."""

    benchmark: str


class CreateKeyRequested(RequestEvent, frozen=True, kw_only=True):
    body: api.CreateKey
    secret_sha256: str


class RevokeKeyRequested(RequestEvent, frozen=True, kw_only=True):
    key: str


class WhyRequested(RequestEvent, frozen=True, kw_only=True):
    """Answered with an api.Why value; changes nothing."""

    kind: str
    key: str
