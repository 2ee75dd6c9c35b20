"""The agent's state: durable objects by kind and key, and what is volatile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agent.core.objects import CopyTask, Meta, Object, Outcome, Record, ReplicaTask, RunTask, copy_key
from common.errors import ErrorInfo
from common.wire import Report

NEVER_MS = 1 << 62


@dataclass(slots=True)
class Ask:
    """A request that the mover or the holder has not ended. verb: fetch | verify | drop | hold | release."""

    token: str
    verb: str
    key: str  # of the copy task
    generation: int
    is_cancelling: bool = False


@dataclass(slots=True)
class Moving:
    """How far a copy is."""

    state: str
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0
    source: str = ""
    sent_ms: int = 0  # when last told to the head


@dataclass(slots=True)
class Engine:
    """What is known of a replica's process.

    phase: none | unknown (looked for) | spawning | alive. Times are Herder time, 0 when not set.
    """

    phase: str = "none"
    is_ending: bool = False
    kill_at_ms: int = 0
    is_probing: bool = False
    probe_at_ms: int = 0
    probes: int = 0
    failures: int = 0  # in a row
    ready_by_ms: int = 0
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0


@dataclass(slots=True)
class RunProcess:
    """What is known of a run's process and files.

    phase: none | unknown (looked for) | spawning | alive | uploading | forgetting.
    """

    phase: str = "none"
    is_told: bool = False  # that it shall finish
    is_rebooted: bool = False  # the machine was, so that only its files can be found
    again_ms: int = 0  # when forgetting is tried again, Herder time; 0: it is under way


@dataclass(slots=True)
class State:
    """Everything the agent knows."""

    # durable, by key
    meta: Meta = field(default_factory=Meta)
    copies: dict[str, CopyTask] = field(default_factory=dict)
    replicas: dict[str, ReplicaTask] = field(default_factory=dict)
    runs: dict[str, RunTask] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    # volatile
    started_ms: int = 0
    models_dir: str = ""
    session_id: str = ""
    is_confirmed: bool = False  # a head has accepted this process; nothing is restarted before
    lease_until_ms: int = 0
    is_mover_up: bool = False
    is_holder_up: bool = False
    mover_error: ErrorInfo | None = None  # why it does not come up
    holder_error: ErrorInfo | None = None
    doubted: set[str] = field(default_factory=set)  # copies that are verified because an engine missed files
    asks: dict[str, Ask] = field(default_factory=dict)  # by token
    ask_of: dict[str, str] = field(default_factory=dict)  # copy key -> token of its open ask
    ask_count: int = 0
    moving: dict[str, Moving] = field(default_factory=dict)  # by copy key
    engines: dict[str, Engine] = field(default_factory=dict)  # by replica
    processes: dict[str, RunProcess] = field(default_factory=dict)  # by run
    checks: dict[str, int] = field(default_factory=dict)  # op_id -> generation, of checks under way
    results_sent_ms: dict[str, int] = field(default_factory=dict)  # op_id -> when last sent in this session
    digest: int = 0
    is_changed: bool = True  # since `digest` was computed
    report_seq: int = 0
    reported_digest: int = -1  # of the last report in this session
    reported_ms: int = 0
    takes_pages: bool = False  # the head understands reports in pages
    pages_left: tuple[Report, ...] = ()  # of the report that is being sent
    wake_ms: int = NEVER_MS  # when the core wants to be asked again
    unknown_events: int = 0

    def copy(self, model: str, revision: str, storage: str) -> CopyTask | None:
        """The copy task of a model at a revision on a device."""
        return self.copies.get(copy_key(model, revision, storage))

    def engine(self, replica: str) -> Engine:
        """What is known of a replica's process."""
        return self.engines.setdefault(replica, Engine())

    def process(self, run: str) -> RunProcess:
        """What is known of a run's process."""
        return self.processes.setdefault(run, RunProcess())


def apply(state: State, record: Record) -> None:
    """Puts or deletes the record's object. Total: a kind of a later version is ignored."""
    match record.body:
        case Meta():
            state.meta = record.body
        case CopyTask():
            state.copies[record.key] = record.body
        case ReplicaTask():
            state.replicas[record.key] = record.body
        case RunTask():
            state.runs[record.key] = record.body
        case Outcome():
            state.outcomes[record.key] = record.body
        case None:
            _DELETE.get(record.kind, _ignore)(state, record.key)
        case _:
            pass
    state.is_changed = True


def load(state: State, objects: list[Object]) -> State:
    """The state with the ledger's objects in it."""
    for thing in objects:
        apply(state, Record(0, "loaded", "ledger", thing.KIND, thing.key, thing))
    return state


def _ignore(state: State, key: str) -> None:
    return None


def _delete_copy(state: State, key: str) -> None:
    state.copies.pop(key, None)
    state.moving.pop(key, None)


def _delete_replica(state: State, key: str) -> None:
    state.replicas.pop(key, None)
    state.engines.pop(key, None)


def _delete_run(state: State, key: str) -> None:
    state.runs.pop(key, None)
    state.processes.pop(key, None)


def _delete_outcome(state: State, key: str) -> None:
    state.outcomes.pop(key, None)
    state.results_sent_ms.pop(key, None)


_DELETE: dict[str, Callable[[State, str], None]] = {
    CopyTask.KIND: _delete_copy,
    ReplicaTask.KIND: _delete_replica,
    RunTask.KIND: _delete_run,
    Outcome.KIND: _delete_outcome,
}
