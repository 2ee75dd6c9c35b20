"""Effects: what the core asks the shell to do once the records of the same turn are durable."""

from __future__ import annotations

import msgspec

from agent import holder_protocol
from agent.mover import protocol as mover_protocol
from common import wire
from common.manifest import Manifest


class Effect(msgspec.Struct, frozen=True):
    """Root of the effects."""


class AskMover(Effect, frozen=True):
    """Answered by MoverMoved and MoverDone with the request's token; dropped when no mover runs."""

    request: mover_protocol.Request


class AskHolder(Effect, frozen=True):
    """Answered by HolderMoved and HolderDone with the request's token; dropped when no holder runs."""

    request: holder_protocol.Request


class SpawnReplica(Effect, frozen=True):
    """Start an engine. Answered by ReplicaStarted or ReplicaSpawnFailed, later by ReplicaExited.

    directory: of the model's files, "" when it needs none.
    """

    run: int
    order: wire.EnsureReplica
    directory: str = ""
    manifest: Manifest | None = None


class AttachReplica(Effect, frozen=True):
    """Find a process of an agent before us again. Answered as SpawnReplica."""

    run: int
    order: wire.EnsureReplica
    pid: int
    start_ticks: int
    host: str
    port: int


class SignalReplica(Effect, frozen=True):
    """SIGTERM, or SIGKILL when `is_kill`, to the whole process group. Leads to ReplicaExited."""

    replica: str
    run: int
    is_kill: bool


class ProbeReplica(Effect, frozen=True):
    """Ask the engine whether it is well, and for one token when `with_canary`. Answered by ReplicaProbed."""

    run: int
    order: wire.EnsureReplica
    host: str
    port: int
    with_canary: bool


class ForgetReplica(Effect, frozen=True):
    """The replica is gone for good; its secrets are removed, its logs kept for a while."""

    replica: str


class RunHealthCheck(Effect, frozen=True):
    """Ask once. `order` is None for a URL. Answered by HealthChecked."""

    op_id: str
    generation: int
    url: str
    timeout_s: float
    order: wire.EnsureReplica | None = None
    host: str = ""
    port: int = 0


class RunEffect(Effect, frozen=True):
    """What concerns a run, a part of a benchmark."""


class SpawnRun(RunEffect, frozen=True):
    """Make a run's directory and process. Answered by RunStarted, then RunSaid, and by RunEnded in the end."""

    order: wire.EnsureRun
    generation: int


class AttachRun(RunEffect, frozen=True):
    """Find a process of an agent before us again. Answered as SpawnRun."""

    run: str
    generation: int
    kind: str
    pid: int
    start_ticks: int


class StartRun(RunEffect, frozen=True):
    """Tell an armed load generator when to begin; said again it changes nothing."""

    run: str
    generation: int
    start_boottime_ns: int


class SignalRun(RunEffect, frozen=True):
    """Tell a run to finish, or kill all its processes when `is_kill`. Leads to RunEnded."""

    run: str
    generation: int
    is_kill: bool


class UploadRun(RunEffect, frozen=True):
    """Send a run's artifacts to the head until it has taken them. Answered by RunUploaded."""

    run: str
    generation: int
    kind: str


class ForgetRun(RunEffect, frozen=True):
    """Kill a run's processes, delete its directory. Answered by RunForgotten."""

    run: str


class SendMessage(Effect, frozen=True):
    """To the head, in this session; dropped when that has ended."""

    session_id: str
    message: wire.Message


class CloseSession(Effect, frozen=True):
    """End the session: this head is not ours, or an older one."""

    session_id: str
    code: str
    reason: str


class NoteLease(Effect, frozen=True):
    """Write down until when the head's lease holds, for the next agent process on this boot (no fsync)."""

    until_ms: int
