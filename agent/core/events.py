"""Events: everything that can happen to the agent, in the past tense. Time arrives beside the event."""

from __future__ import annotations

from typing import Any

import msgspec

from agent import holder_protocol
from agent.mover import protocol as mover_protocol
from common import wire
from common.errors import ErrorInfo


class Event(msgspec.Struct, frozen=True):
    """Root of the events."""


# the daemon's own
class AgentStarted(Event, frozen=True):
    """First event of a process, after the ledger was read.

    models_dir: where the store publishes copies. lease_until_ms: end of the last lease that the process before
    noted on this boot, 0 when unknown.
    """

    boot_id: str
    models_dir: str
    lease_until_ms: int = 0


class Ticked(Event, frozen=True):
    """The time that the last turn asked for (`State.wake_ms`) has come."""


# the session with the head
class SessionOpened(Event, frozen=True):
    session_id: str
    node_id: str
    welcome: wire.Welcome


class SessionClosed(Event, frozen=True):
    session_id: str
    reason: str


class CommandReceived(Event, frozen=True):
    command: wire.Command


class ResultAcked(Event, frozen=True):
    op_id: str
    generation: int


class LeaseAcked(Event, frozen=True):
    """The head answered a lease that was sent at `sent_ms`."""

    sent_ms: int
    lease_ms: int
    wants_report: bool = False


# the mover
class MoverReady(Event, frozen=True):
    """A mover runs and has said what the store holds."""

    copies: tuple[mover_protocol.HeldCopy, ...]


class MoverMoved(Event, frozen=True):
    moving: mover_protocol.Moving


class MoverDone(Event, frozen=True):
    done: mover_protocol.Done


class MoverDied(Event, frozen=True):
    reason: str


class MoverFailed(Event, frozen=True):
    """A mover was started and did not come up; it is tried again."""

    error: ErrorInfo


# the holder of the RAM tier
class HolderReady(Event, frozen=True):
    """Connected to a holder that has said what it holds."""

    holdings: tuple[holder_protocol.Holding, ...]


class HolderMoved(Event, frozen=True):
    moving: holder_protocol.Moving


class HolderDone(Event, frozen=True):
    done: holder_protocol.Done


class HolderDied(Event, frozen=True):
    reason: str


class HolderFailed(Event, frozen=True):
    """No holder is there and one that was started did not come up; it is tried again."""

    error: ErrorInfo


# engines; `run` says which process of the replica is meant
class ReplicaStarted(Event, frozen=True):
    """The process runs: just spawned, or found again after a restart of the agent."""

    replica: str
    run: int
    pid: int
    start_ticks: int
    host: str
    port: int


class ReplicaSpawnFailed(Event, frozen=True):
    """No process came to be (again)."""

    replica: str
    run: int
    error: ErrorInfo


class ReplicaExited(Event, frozen=True):
    """The engine ended and its whole process group was looked for and killed.

    exit_code None: not known. `left`: processes that are still there after SIGKILL; `gpu_bytes_left`: memory that
    they still hold. `halted`: why its shim ended it without being told to (no head, and no agent, for too long).
    """

    replica: str
    run: int
    exit_code: int | None = None
    last_log: tuple[str, ...] = ()
    left: tuple[int, ...] = ()
    gpu_bytes_left: int = 0
    halted: str = ""


class ReplicaProbed(Event, frozen=True):
    """The answer to ProbeReplica; `error` None: healthy. Memory is the process group's; 0: not measured."""

    replica: str
    run: int
    error: ErrorInfo | None = None
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0


# runs: parts of benchmarks
class RunStarted(Event, frozen=True):
    """A run's process is there: just made, or found again after a restart of the agent."""

    run: str
    generation: int
    pid: int
    start_ticks: int


class RunSaid(Event, frozen=True):
    """What a run's process writes of itself. state: preparing | armed | running | ended | failed."""

    run: str
    generation: int
    state: str
    digest: str = ""
    start_boottime_ns: int = 0
    late_ms: int = 0
    error: ErrorInfo | None = None


class RunEnded(Event, frozen=True):
    """No process of a run is there (any more). `said`: the last that it wrote of itself.

    exit_code None: not known. was_there: there are traces of a process. `error`: why none could be made.
    """

    run: str
    generation: int
    said: RunSaid | None = None
    exit_code: int | None = None
    last_log: tuple[str, ...] = ()
    was_there: bool = True
    error: ErrorInfo | None = None


class RunUploaded(Event, frozen=True):
    """The head has taken these artifacts, or (`error`) will not take them."""

    run: str
    generation: int
    artifacts: tuple[str, ...] = ()
    error: ErrorInfo | None = None


class RunForgotten(Event, frozen=True):
    """Processes and files of a run are gone. `left`: processes that are still there after SIGKILL."""

    run: str
    left: tuple[int, ...] = ()


class HealthChecked(Event, frozen=True):
    """The answer to RunHealthCheck."""

    op_id: str
    generation: int
    error: ErrorInfo | None = None
    detail: dict[str, Any] = {}
