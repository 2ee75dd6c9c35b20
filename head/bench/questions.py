"""What the head asks of a judging child, and what it answers: one question, one answer, both JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from common.errors import ErrorInfo


class PartFile(msgspec.Struct, frozen=True):
    """One load node's part of a point. path "": nothing came of it."""

    part: int
    node: str
    run: str
    path: str = ""
    state: str = "done"
    error: ErrorInfo | None = None


class Question(msgspec.Struct, frozen=True, tag_field="type"):
    """Root of the questions."""


class Judge(Question, frozen=True, tag="judge"):
    """Merge the parts, write `folder`/load.bin and `folder`/report.json, say the figures."""

    folder: str
    parts: tuple[PartFile, ...]
    skew_ms: float = 0.0
    mlperf: str = ""
    about: dict[str, Any] = {}
    """What else stands in the report: benchmark, point, recipe, facts."""


class Export(Question, frozen=True, tag="export"):
    """Write `target`: the merged run at `source` in a format of others."""

    source: str
    report: str
    target: str
    format: str


class Write(Question, frozen=True, tag="write"):
    """Write report.html and summary.csv of a whole benchmark. `benchmark` is its view as plain data."""

    folder: str
    benchmark: dict[str, Any]


class Check(Question, frozen=True, tag="check"):
    """Say a benchmark recipe with its times as numbers, or what is wrong with it."""

    document: Any


AnyQuestion = Judge | Export | Write | Check


class Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer: `value`, or why there is none."""

    value: Any = None
    error: ErrorInfo | None = None


class Judged(msgspec.Struct, frozen=True):
    """What became of a point."""

    is_valid: bool
    reasons: tuple[str, ...]
    figures: dict[str, float]
    said: tuple[str, ...] = ()
    """The reasons in words, each with its numbers."""
