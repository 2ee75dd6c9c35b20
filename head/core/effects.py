"""Effects: what the core asks the shell to do once the records of the same turn are durable."""

from __future__ import annotations

import msgspec

from common.errors import ErrorInfo
from common.wire import Message


class Effect(msgspec.Struct, frozen=True):
    """Root of the effects."""


class Reply(Effect, frozen=True):
    """Answers the request that the event carried: an object of `head/core/objects.py` by reference, or a value.

    `reference` is "kind:key"; the API renders it from the state when it answers.
    """

    request_id: str
    reference: str = ""
    value: object = None


class Refuse(Effect, frozen=True):
    """Answers the request with an error."""

    request_id: str
    error: ErrorInfo


class Send(Effect, frozen=True):
    """A message to an agent's present session; dropped when that session is gone (state is level-triggered)."""

    node: str
    session_id: str
    message: Message


class Drain(Effect, frozen=True):
    """Asks the gateway to say `ReplicaIdle` once no request is on its way to the replica (at once, when none is)."""

    replica: str
    generation: int


class EndDrain(Effect, frozen=True):
    """The time of a drain is over: the gateway cuts what is still on its way to the replica."""

    replica: str
    generation: int


class MeasureClock(Effect, frozen=True):
    """Asks an agent's clock some times in this session; answered by ClockMeasured, or not at all when it has gone."""

    node: str
    session_id: str


class JudgePoint(Effect, frozen=True):
    """Merges the stored artifacts of a point's runs and writes its report; answered by PointJudged."""

    benchmark: str
    generation: int
    point: int


class WriteBenchmark(Effect, frozen=True):
    """Collects logs and writes the whole report; answered by BenchmarkWritten."""

    benchmark: str
    generation: int


class RemoveBenchmark(Effect, frozen=True):
    """Deletes a benchmark's files."""

    benchmark: str


class CloseSession(Effect, frozen=True):
    """Ends a session; `error` is sent before as `Refused`."""

    session_id: str
    error: ErrorInfo | None = None


class Alarm(Effect, frozen=True):
    """Something an operator must know; logged, counted, shown in /health until cleared (`is_on` False)."""

    name: str
    text: str
    is_on: bool = True
