"""The session protocol between head and agent: JSON over one websocket that the agent dials.

Every frame is an `Envelope {kind, body}`; the body is decoded only after the kind is known, and an unknown kind
is counted and ignored, so that version N talks to N-1. Machine messages tolerate unknown fields; new fields
need defaults; a field never changes its type. Lost, repeated or reordered frames cost time, never correctness:
the head repeats what is desired until the agent reports it, and `(op_id, generation)` dedupes.

agent -> head   hello, report, lease, telemetry, progress, result, leaving, log_chunk, run_tick, clock_told
head  -> agent  welcome, refused, ack, command, result_ack, log_request, clock_ask
"""

from __future__ import annotations

from functools import lru_cache
from sys import intern
from typing import Annotated, Any

import msgspec
from msgspec.structs import force_setattr

from common.errors import ErrorInfo
from common.manifest import Manifest
from herder.decoding import UNREADABLE

FEATURE_REPORT_PAGES = "report_pages"
BYTES_MAX = 1 << 60  # sums and ratios of what agents say stay numbers that can be computed with
Int = Annotated[int, msgspec.Meta(ge=-BYTES_MAX, le=BYTES_MAX)]
Digest = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Envelope(msgspec.Struct, frozen=True):
    """One frame."""

    kind: str
    body: msgspec.Raw


class Message(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Root of the bodies."""


# inventory and readings
class Gpu(Message, frozen=True):
    """One GPU or MIG instance as NVML names it. Bytes are bytes; peers are indices linked by NVLink."""

    index: Int
    uuid: str
    name: str
    memory_bytes: Int
    compute_capability: str = ""
    mig_mode: bool = False
    mig_parent: str = ""  # uuid of the parent GPU when this is a MIG instance
    nvlink_peers: tuple[int, ...] = ()
    pci_bus_id: str = ""
    power_limit_w: float | None = None

    def __post_init__(self) -> None:
        """80,000 GPUs of a few kinds: what they have in common is kept once."""
        force_setattr(self, "name", intern(self.name))
        force_setattr(self, "compute_capability", intern(self.compute_capability))
        force_setattr(self, "nvlink_peers", _shared(self.nvlink_peers))


@lru_cache(maxsize=1_024)
def _shared(indices: tuple[int, ...]) -> tuple[int, ...]:
    """The same tuple for equal ones."""
    return indices


class Nic(Message, frozen=True):
    """One network interface; speed is -1 when the kernel does not say."""

    name: str
    addresses: tuple[str, ...] = ()
    speed_mbps: Int = -1


class Disk(Message, frozen=True):
    """A file system that Herder may use; the store's own is first."""

    path: str
    fs_type: str
    total_bytes: Int
    free_bytes: Int
    device: str = ""


class Inventory(Message, frozen=True):
    """What a node is. It changes rarely and travels in hello."""

    hostname: str
    addresses: tuple[str, ...] = ()
    os: str = ""
    kernel: str = ""
    arch: str = ""
    cpu_model: str = ""
    cpus: Int = 0  # logical
    cores: Int = 0  # physical
    numa_nodes: Int = 1
    memory_bytes: Int = 0
    dram_budget_bytes: Int = 0  # what the RAM tier may lock
    disk_budget_bytes: Int = 0  # what the store may use in all
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    gpu_reason: str = ""  # why there are no GPUs, in words, when there are none
    driver_version: str = ""
    cuda_version: str = ""
    engines: dict[str, str] = {}  # runtime name -> version or path, of those found on this node

    def __post_init__(self) -> None:
        """As with GPUs: machines of one kind share their words."""
        for name in ("os", "kernel", "arch", "cpu_model", "driver_version", "cuda_version"):
            force_setattr(self, name, intern(getattr(self, name)))


class GpuReading(Message, frozen=True):
    """Live readings of one GPU; None where the card or driver does not say."""

    index: Int
    uuid: str
    memory_used_bytes: Int
    memory_free_bytes: Int
    utilisation: float | None = None  # 0..1
    memory_utilisation: float | None = None  # 0..1
    temperature_c: float | None = None
    power_w: float | None = None
    ecc_uncorrected: Int | None = None
    is_lost: bool = False


class Telemetry(Message, frozen=True):
    """Latest readings of a node; the latest wins, any may be dropped."""

    cpu: float = 0.0  # 0..1 over all CPUs
    memory_available_bytes: Int = 0
    disk_free_bytes: Int = 0  # of the store's file system
    disk_used_bytes: Int = 0  # by the store
    disk_reserved_bytes: Int = 0
    dram_used_bytes: Int = 0  # by the RAM tier
    gpus: tuple[GpuReading, ...] = ()
    load1: float = 0.0


# session
class Hello(Message, frozen=True):
    """First frame of an agent. `cluster_id` is empty on the very first contact, then what it was told."""

    proto_min: Int
    proto_max: Int
    node_id: str
    boot_id: str
    agent_id: str  # fresh per agent process
    version: str
    inventory: Inventory
    cluster_id: str = ""
    max_head_epoch: Int = 0
    labels: dict[str, str] = {}
    advertise: str = ""  # address under which the head and other nodes reach this node
    data_port: Int = 0  # the mover's blob server
    http_port: Int = 0  # the agent's /metrics
    launch_id: str = ""
    features: tuple[str, ...] = ()
    identity: str = ""  # the node's own secret; the head's shell puts its sha256 here before anybody looks


class Welcome(Message, frozen=True):
    """The head's acceptance. `ticket_key` (base64) is this node's key for checking transfer tickets."""

    proto: Int
    cluster_id: str
    head_epoch: Int
    session_id: str
    lease_ms: Int
    interval_ms: Int
    respread_ms: Int
    ticket_key: str
    features: tuple[str, ...] = ()  # what this head understands beyond the first version, FEATURE_*


class Refused(Message, frozen=True):
    """Sent before the head closes a session it will not have."""

    error: ErrorInfo
    retry_after_ms: Int = 0


class CopyStatus(Message, frozen=True):
    """One copy as the agent sees it.

    state: reserved | fetching | verifying | syncing | ready | loading | asleep | failed | dropping
    """

    model: str
    revision: str
    storage: str  # "disk" | "dram" | "gpuN"
    state: str
    generation: Int = 0
    bytes_done: Int = 0
    bytes_total: Int = 0
    digest: str = ""  # manifest digest, once known
    is_locked: bool = False  # dram: mlock held (else resident only)
    error: ErrorInfo | None = None


class ReplicaStatus(Message, frozen=True):
    """One engine as the agent sees it.

    state: waiting_copy | starting | ready | unhealthy | stopping | stopped | failed
    """

    replica: str
    generation: Int
    state: str
    host: str = ""
    port: Int = 0
    pid: Int = 0
    restarts: Int = 0
    exit_code: Int | None = None
    started_ms: Int = 0
    ready_ms: Int = 0
    memory_bytes: Int = 0  # resident, of the process group
    gpu_memory_bytes: Int = 0  # by NVML, of the process group
    error: ErrorInfo | None = None
    last_log: tuple[str, ...] = ()  # last lines when it failed


class OpStatus(Message, frozen=True):
    """One command that the agent holds: state is running | done | failed | cancelled."""

    op_id: str
    generation: Int
    state: str


class RunStatus(Message, frozen=True):
    """One part of a benchmark as the agent sees it.

    state: preparing | armed | running | uploading | done | failed. armed: everything is written, connections are open,
    it waits for its FireRun. done: every artifact is with the head.
    """

    run: str
    generation: Int
    state: str
    digest: str = ""  # of what will be sent and when, once armed
    start_boottime_ns: Int = 0  # when it began, or will
    error: ErrorInfo | None = None


class Report(Message, frozen=True):
    """Everything this agent holds; replaces what the head observed before.

    A long one comes in pages of one `seq`, in any order; nothing of it counts before all of them are there.
    """

    seq: Int
    copies: tuple[CopyStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    ops: tuple[OpStatus, ...] = ()
    runs: tuple[RunStatus, ...] = ()
    digest: Digest = 0  # as the leases carry it while nothing changes; 0: not said
    page: Int = 0
    pages: Int = 1  # more only to heads that said so in `Welcome.features`


class Lease(Message, frozen=True):
    """The heartbeat. The agent counts its lease from `sent_boottime_ms`, so its view always ends first."""

    seq: Int
    sent_boottime_ms: Int
    digest: Digest = 0  # of the report; a difference from the last full report asks for a new one


class Ack(Message, frozen=True):
    """Answer to a lease."""

    seq: Int
    lease_ms: Int
    interval_ms: Int
    wants_report: bool = False


class Progress(Message, frozen=True):
    """How far a command is. rate 0 when it is not known yet."""

    op_id: str
    generation: Int
    state: str
    bytes_done: Int = 0
    bytes_total: Int = 0
    rate_bytes_per_s: float = 0.0
    source: str = ""


class Result(Message, frozen=True):
    """How a command ended: outcome is ok | failed | cancelled. Kept by the agent until `result_ack`."""

    op_id: str
    generation: Int
    outcome: str
    error: ErrorInfo | None = None
    manifest: Manifest | None = None
    detail: dict[str, Any] = {}


class ResultAck(Message, frozen=True):
    """The head has made the result durable; the agent may forget it."""

    op_id: str
    generation: Int


class Leaving(Message, frozen=True):
    """The agent's allocation or machine is about to end."""

    reason: str
    deadline_ms: Int  # from now


class LogRequest(Message, frozen=True):
    """Asks for a log. `run` 0 is the present run, 1 the one before. offset -1: the last `tail_lines`.

    Without `source` it is a replica's, as text in `LogChunk.data`. With it the answer are lines with their times:
    "replica:ID", "run:ID" (of a benchmark), "agent" or "slurm:JOBID"; all kept runs one after the other (run -1), or
    one. `run_number` and `offset` go on after what was read before; tail_lines -1: everything. The agent sends
    `credit` chunks; further requests of the same id that only say `credit` let it send so many more.
    """

    request_id: str
    replica: str
    run: Int = 0
    offset: Int = -1
    tail_lines: Int = 100
    follow: bool = False
    is_cancelled: bool = False
    source: str = ""
    run_number: Int = -1  # as LogChunk.run; -1: not said
    since_ms: Int = 0  # lines that came at this wall time of the node or later
    until_ms: Int = 0  # and not after this one; 0: no end
    pattern: str = ""  # lines that hold it
    is_regex: bool = False
    ignore_case: bool = False
    credit: Int = 0


class LogLine(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line without its newline. `at_ms`: wall time of its node, 0 when not known. Not whole: more of it follows."""

    offset: Int  # of the byte after it
    at_ms: Int
    text: str
    is_whole: bool = True


class LogChunk(Message, frozen=True):
    """A piece of a log; `is_last` ends the answer. `data` is UTF-8 with replacement.

    A chunk of lines stands for everything up to `offset` of run number `run`, also for what a search left out.
    """

    request_id: str
    offset: Int  # of the byte after this chunk
    data: str
    is_last: bool = False
    error: ErrorInfo | None = None
    lines: tuple[LogLine, ...] = ()
    run: Int = 0  # number of the run, counted over the whole life of the log; 0 in chunks of text: not said
    lost_bytes: Int = 0  # gone before it could be read; -1: a whole run
    is_caught_up: bool = False  # what follows was not written yet when it was asked for


class RunTick(Message, frozen=True):
    """What a load run did in its last second; may be lost. Times are milliseconds."""

    run: str
    at_s: float  # after the start
    sent: Int = 0
    done: Int = 0
    failed: Int = 0
    in_flight: Int = 0
    tokens: Int = 0
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None


class ClockAsk(Message, frozen=True):
    """Asks for the agent's clock; answered at once. `asked_ns` comes back as it is."""

    asked_ns: Int


class ClockTold(Message, frozen=True):
    """The agent's CLOCK_BOOTTIME in nanoseconds, read when it answered."""

    asked_ns: Int
    boottime_ns: Int


# commands
class Source(Message, frozen=True):
    """Where a copy's bytes may come from: a URL (file, http, https, hf, ssh) or another node's mover.

    peer: `url` is "peer://HOST:PORT" and `ticket` authorises exactly this model's blobs.
    """

    url: str
    ticket: str = ""
    node: str = ""


class CommandBody(Message, tag_field="type", frozen=True):
    """Root of what the head can ask for."""


class EnsureCopy(CommandBody, tag="ensure_copy", frozen=True):
    """This copy shall exist. Sources in order of preference. Without a manifest it is made on the way."""

    model: str
    revision: str
    storage: str  # "disk" | "dram"
    sources: tuple[Source, ...] = ()
    manifest: Manifest | None = None
    verify: str = "none"  # "none" | "full": re-hash an existing copy


class DropCopy(CommandBody, tag="drop_copy", frozen=True):
    """This copy shall not exist."""

    model: str
    revision: str
    storage: str


class HealthSpec(Message, frozen=True):
    """How an engine is asked whether it is ready and alive. Empty path: the TCP port answers."""

    path: str = "/health"
    timeout_s: float = 5.0
    period_s: float = 5.0
    ready_timeout_s: float = 900.0
    failures: Int = 3  # in a row before a replica is unhealthy
    canary: dict[str, Any] = {}  # JSON body of a one-token request; empty: none
    canary_path: str = ""


class EnsureReplica(CommandBody, tag="ensure_replica", frozen=True):
    """This engine shall run.

    `argv`, `env` and `files` are already filled in by the head except for what only the agent knows: the
    placeholders {model_path} {model_dir} {port} {host} {api_key_file} {gpu_uuids} {state_dir} {cpus}.
    """

    replica: str
    service: str
    model: str
    revision: str
    storage: str  # the device it runs on or from: "disk" | "dram" | "gpuN[,gpuM]"
    runtime: str  # "llamacpp" | "command"
    argv: tuple[str, ...] = ()
    env: dict[str, str] = {}
    port: Int = 0  # 0: the agent chooses
    gpu_uuids: tuple[str, ...] = ()
    health: HealthSpec = HealthSpec()
    served_name: str = ""
    api_key: str = ""  # the engine's own key; travels only here, stands in a 0600 file at the agent
    max_restarts: Int = 10
    stop_grace_s: float = 10.0
    stop_after_ms: Int = 0  # without a head for so long: stop by itself; 0: never
    config: dict[str, Any] = {}


class StopReplica(CommandBody, tag="stop_replica", frozen=True):
    """This engine shall not run."""

    replica: str
    grace_s: float = 10.0


class CheckHealth(CommandBody, tag="check_health", frozen=True):
    """Ask once: a replica of this node (by its health spec) or a URL that this node can reach."""

    replica: str = ""
    url: str = ""
    timeout_s: float = 5.0


class EnsureRun(CommandBody, tag="ensure_run", frozen=True):
    """This part of a benchmark shall be prepared, and run once it is fired.

    kind "load": `spec` is a common.bench.spec.LoadSpec; this is part `part` of `parts` of one schedule that every part
    draws whole. kind "monitor": `spec` is {"interval": seconds, "engines": [{"replica", "url", "api_key"}, ...]}; it
    starts at once, without FireRun, and goes on until EndRun.
    """

    run: str
    kind: str  # "load" | "monitor"
    spec: dict[str, Any]
    benchmark: str = ""
    part: Int = 0
    parts: Int = 1
    urls: tuple[str, ...] = ()  # where the load goes; requests take them by `spread`
    spread: str = "round-robin"  # "round-robin" | "random" | "all-to-all" | "static"
    token: str = ""  # for the Authorization header; travels only here, stands in a 0600 file at the agent
    stop_after_ms: Int = 0  # ends by itself after so long, whatever the head says


class FireRun(CommandBody, tag="fire_run", frozen=True):
    """An armed load run shall begin at this moment of the agent's own CLOCK_BOOTTIME.

    One that comes when its moment is over begins at once and says when, for the other nodes may have begun without it.
    """

    run: str
    start_boottime_ns: Int


class EndRun(CommandBody, tag="end_run", frozen=True):
    """A run shall end. how: "finish" (send no more, let answers end, send the artifacts), "forget" (kill, delete)."""

    run: str
    how: str = "finish"


class CancelOp(CommandBody, tag="cancel_op", frozen=True):
    """Stop working on another command; its result will be `cancelled` unless it had ended."""

    target_op_id: str
    target_generation: Int


AnyCommand = EnsureCopy | DropCopy | EnsureReplica | StopReplica | CheckHealth | EnsureRun | FireRun | EndRun | CancelOp


class Command(Message, frozen=True):
    """One command. (op_id, generation) names it; repeated until reported. deadline 0: none."""

    op_id: str
    generation: Int
    head_epoch: Int
    cause: str
    body: AnyCommand
    deadline_ms: Int = 0  # from arrival


KINDS: dict[type[Message], str] = {
    Hello: "hello",
    Welcome: "welcome",
    Refused: "refused",
    Report: "report",
    Lease: "lease",
    Ack: "ack",
    Telemetry: "telemetry",
    Progress: "progress",
    Result: "result",
    ResultAck: "result_ack",
    Leaving: "leaving",
    LogRequest: "log_request",
    LogChunk: "log_chunk",
    RunTick: "run_tick",
    ClockAsk: "clock_ask",
    ClockTold: "clock_told",
    Command: "command",
}
TYPES: dict[str, type[Message]] = {kind: cls for cls, kind in KINDS.items()}

_encoder = msgspec.json.Encoder()
_envelopes = msgspec.json.Decoder(Envelope)
_readings = msgspec.json.Decoder(Telemetry)
_decoders: dict[str, msgspec.json.Decoder[Message]] = {kind: msgspec.json.Decoder(cls) for kind, cls in TYPES.items()}


def encode(message: Message) -> bytes:
    """One frame for this message."""
    return b'{"kind":"%s","body":%s}' % (KINDS[type(message)].encode(), _encoder.encode(message))


def decode(frame: bytes | str) -> Message | None:
    """The message in a frame, or None when its kind is not known here.

    Raises: UNREADABLE of herder.decoding when the frame or the body is not what its kind says.
    """
    return body_of(_envelopes.decode(frame))


def envelope(frame: bytes | str) -> Envelope:
    """The frame's kind, and its body as it came. Raises: as `decode`."""
    return _envelopes.decode(frame)


def body_of(envelope: Envelope) -> Message | None:
    """The message in an envelope, or None when its kind is not known here. Raises: as `decode`."""
    decoder = _decoders.get(envelope.kind)
    return None if decoder is None else decoder.decode(envelope.body)


def readings(body: bytes) -> Telemetry | None:
    """The body of a telemetry frame; None when it cannot be read: readings may be lost at any time."""
    try:
        return _readings.decode(body)
    except UNREADABLE:
        return None
