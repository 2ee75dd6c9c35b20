"""What the agent's ledger keeps: what the head asked for, how far it is, and results not yet acknowledged.

Frozen objects by (kind, key), one JSON document each. Volatile facts (bytes moved, probes, sessions) are in State.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from common import wire
from common.errors import ErrorInfo
from common.manifest import Manifest


class Object(msgspec.Struct, frozen=True, omit_defaults=True):
    """Root of the durable objects."""

    KIND: ClassVar[str] = ""

    @property
    def key(self) -> str:
        """The object's name within its kind."""
        raise TypeError(f"{type(self).__name__} has no key")


class Meta(Object, frozen=True):
    """What the agent remembers of its cluster and its boot. `key` is always "agent"."""

    KIND = "meta"
    boot_id: str = ""
    cluster_id: str = ""
    max_head_epoch: int = 0

    @property
    def key(self) -> str:
        return "agent"


class CopyTask(Object, frozen=True):
    """One copy that shall or shall not exist here.

    desired: present | absent. state: fetching | verifying | loading | ready | failed | dropping; while work is under
    way the mover's finer word stands in State.progress. generation 0: found in the store, not asked for.
    """

    KIND = "copy"
    model: str
    revision: str
    storage: str
    desired: str
    state: str
    generation: int = 0
    op_id: str = ""
    cause: str = ""
    sources: tuple[wire.Source, ...] = ()
    manifest: Manifest | None = None
    directory: str = ""
    size_bytes: int = 0
    digest: str = ""
    is_locked: bool = False
    deadline_ms: int = 0  # Herder time; 0: none
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return copy_key(self.model, self.revision, self.storage)


def copy_key(model: str, revision: str, storage: str) -> str:
    """Key of a copy task."""
    return f"{model}@{revision}|{storage}"


class ReplicaTask(Object, frozen=True):
    """One engine that shall or shall not run here.

    desired: running | stopped. States as wire.ReplicaStatus. `run` counts processes of this replica for ever; a run's
    files are in its own directory, so that a crash between spawning and writing this down loses nothing.
    """

    KIND = "replica"
    order: wire.EnsureReplica
    generation: int
    op_id: str
    cause: str
    desired: str
    state: str
    run: int = 0
    host: str = ""
    port: int = 0
    pid: int = 0
    start_ticks: int = 0
    restarts: int = 0
    not_before_ms: int = 0  # next start, Herder time
    started_ms: int = 0
    ready_ms: int = 0
    exit_code: int | None = None
    grace_s: float = 10.0
    is_answered: bool = False  # the command's result was given for this generation
    needs_replacing: bool = False  # the process runs an older order and is ended first
    is_cancelled: bool = False  # stopped by CancelOp: the result says so
    halted: str = ""  # why the agent stopped it by itself (no head for too long)
    error: ErrorInfo | None = None
    last_log: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.order.replica


class RunTask(Object, frozen=True):
    """One part of a benchmark that shall or shall not run here.

    desired: present | finished | absent. States as wire.RunStatus. Of `order` the spec and the token are kept only
    until a process has them.
    """

    KIND = "run"
    order: wire.EnsureRun
    generation: int
    op_id: str
    cause: str
    desired: str
    state: str
    ordered_ms: int
    pid: int = 0
    start_ticks: int = 0
    digest: str = ""
    fire_boottime_ns: int = 0  # the start that was ordered
    start_boottime_ns: int = 0  # when it began
    late_ms: int = 0  # how long after the ordered start
    ended_ms: int = 0
    artifacts: tuple[str, ...] = ()  # names of what the head holds
    end_op_id: str = ""  # of the EndRun that waits for it to be gone
    end_generation: int = 0
    is_answered: bool = False
    error: ErrorInfo | None = None
    last_log: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.order.run


class Outcome(Object, frozen=True):
    """How a command ended; kept until acknowledged, then as a fence where no task holds the generation."""

    KIND = "outcome"
    result: wire.Result
    at_ms: int
    is_acked: bool = False

    @property
    def key(self) -> str:
        return self.result.op_id


KINDS: dict[str, type[Object]] = {cls.KIND: cls for cls in (Meta, CopyTask, ReplicaTask, RunTask, Outcome)}


class Record(msgspec.Struct, frozen=True):
    """One change of the ledger: puts a whole object, or deletes it (`body` None). `what` is in the past tense."""

    at_ms: int
    what: str
    cause: str
    kind: str
    key: str
    body: Object | None
