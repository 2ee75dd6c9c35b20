"""The jobs by id: those that run as objects, those that have ended packed as the journal keeps them.

A busy head keeps a hundred thousand ended jobs for people to look back at, and hardly any is ever looked at again. As
objects they would take most of its memory and most of its start; so what has ended stays as JSON beside the few
facts that lists, counts and pruning need, and is decoded each time somebody asks for it. For readers this is a mapping
of jobs like any other table; each read of an ended job makes a new, equal object.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping, ValuesView

import msgspec

from common.errors import StateCorrupt
from head.core.objects import Job
from herder.decoding import UNREADABLE

ENDED = frozenset({"completed", "failed", "cancelled"})


class JobFacts(msgspec.Struct, frozen=True, gc=False):
    """What is known of a job without decoding it."""

    name: str
    state: str
    created_ms: int
    ended_ms: int
    step_count: int


class _Outline(msgspec.Struct, gc=False):
    """The fields of a stored job that become its facts; the rest is skipped, but has to be JSON."""

    id: str
    name: str
    state: str
    created_ms: int
    steps: list[msgspec.Raw]
    ended_ms: int = 0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Job)
_outlines = msgspec.json.Decoder(_Outline)


class JobTable(MutableMapping[str, Job]):
    """All jobs by id, in the order in which they were made."""

    __slots__ = ("_facts", "_live", "_packed")

    def __init__(self) -> None:
        self._facts: dict[str, JobFacts] = {}
        self._live: dict[str, Job] = {}
        self._packed: dict[str, bytes] = {}

    @property
    def facts(self) -> dict[str, JobFacts]:
        """The facts of every job by id, in the same order; decodes nothing. To be read only."""
        return self._facts

    def load(self, key: str, body: bytes) -> Job | None:
        """Takes in a stored job. Returns it if it has not ended (the caller indexes it), else None.

        Raises: StateCorrupt.
        """
        try:
            outline = _outlines.decode(body)
            job = None if outline.state in ENDED else _decoder.decode(body)
        except UNREADABLE as error:
            raise StateCorrupt(f"job {key!r} in the journal cannot be read: {error}") from None
        if outline.id != key:
            raise StateCorrupt(f"job {key!r} in the journal calls itself {outline.id!r}")
        self._facts[key] = JobFacts(
            sys.intern(outline.name),  # few names and states are shared by many jobs
            sys.intern(outline.state),
            outline.created_ms,
            outline.ended_ms,
            len(outline.steps),
        )
        if job is None:
            self._packed[key] = body
        else:
            self._live[key] = job
        return job

    def __getitem__(self, key: str) -> Job:
        """The job. Raises: KeyError; StateCorrupt when what the journal kept is no job."""
        job = self._live.get(key)
        if job is not None:
            return job
        body = self._packed[key]
        try:
            return _decoder.decode(body)
        except UNREADABLE as error:
            raise StateCorrupt(f"job {key!r} in the journal cannot be read: {error}") from None

    def __setitem__(self, key: str, job: Job) -> None:
        body = _packed(job) if job.state in ENDED else None
        self._facts[key] = JobFacts(job.name, job.state, job.created_ms, job.ended_ms, len(job.steps))
        if body is None:
            self._packed.pop(key, None)
            self._live[key] = job
        else:
            self._live.pop(key, None)
            self._packed[key] = body

    def __delitem__(self, key: str) -> None:
        del self._facts[key]
        self._live.pop(key, None)
        self._packed.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def values(self) -> ValuesView[Job]:
        """Every job; decodes all that have ended, so only tests and small tables should ask for it."""
        return super().values()


def _packed(job: Job) -> bytes | None:
    """The stored form, or None for a job that cannot be stored: the journal is about to refuse it."""
    try:
        return _encoder.encode(job)
    except (TypeError, ValueError, OverflowError):
        return None
