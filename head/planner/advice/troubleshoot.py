"""What went wrong, from the words of an error, and what to do about it.

Topics and their patterns are `head/planner/data/troubleshooting.json`. A pattern is anchored in the wording of a
program (a class name, a prefix, numbers in their place), never in a word of the language: "some info about finance"
matches nothing. Patterns have no unbounded repetition, lines are cut, and the text has a limit, so that the time is
linear in the length of the text.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import resources
from typing import Any, Literal

import msgspec

from common.errors import BodyTooLarge, NotFound

TEXT_LIMIT_BYTES = 256 * 1024  # of one error text
LINE_LIMIT = 2_000  # characters looked at in one line
EVIDENCE_LIMIT = 300  # characters of a line that are shown
ISSUES_LIMIT = 8  # in one answer
_COLOUR = re.compile(r"\x1b\[[0-9;]{0,16}m")

Severity = Literal["critical", "high", "medium", "low"]
_ORDER: dict[str, int] = {"critical": 0, "high": 1, "medium": 2, "low": 3}


class Topic(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of trouble. `also` must be found beside a pattern; `hides` names what this one explains better."""

    id: str
    category: str
    severity: Severity
    title: str
    description: str
    symptoms: tuple[str, ...]
    root_causes: tuple[str, ...]
    solutions: tuple[str, ...]
    code_fix: str = ""
    aliases: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    source: str = ""


class Issue(msgspec.Struct, frozen=True, kw_only=True):
    """A topic found in a text: the line that says so (numbered from 1), and in how many lines it stands."""

    topic: Topic
    line: int
    evidence: str
    count: int


@cache
def topics() -> tuple[Topic, ...]:
    """All topics, in the order of the table."""
    text = resources.files("head.planner").joinpath("data", "troubleshooting.json").read_bytes()
    document: dict[str, Any] = msgspec.json.decode(text)
    return tuple(msgspec.convert(row, Topic) for row in document["topics"])


def topic(name: str) -> Topic:
    """A topic by id or alias; case, spaces and dashes do not matter.

    Raises: NotFound with the ids that are known and the nearest.
    """
    wanted = re.sub(r"[\s-]+", "_", name.strip().lower())[:80]
    known = {alias: found for found in topics() for alias in (found.id, *found.aliases)}
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.5)
    raise NotFound(
        f"no topic {name[:80]!r}",
        hint=f"did you mean {', '.join(near)}?" if near else "see available_topics",
        near=near,
        available_topics=[found.id for found in topics()],
    )


def diagnose(text: str) -> list[Issue]:
    """Topics that the text speaks of: the gravest first, among equals the one that stands first.

    Raises: BodyTooLarge beyond `TEXT_LIMIT_BYTES`.
    """
    if len(text) > TEXT_LIMIT_BYTES:
        raise BodyTooLarge(
            f"an error text may have {TEXT_LIMIT_BYTES} characters",
            hint="send the first error and the lines around it",
            limit=TEXT_LIMIT_BYTES,
        )
    lines = [_COLOUR.sub("", line)[:LINE_LIMIT] for line in text.splitlines()]
    found: dict[str, Issue] = {}
    for entry, pattern, also in _compiled():
        if also is not None and not any(also.search(line) for line in lines):
            continue
        hits = [number for number, line in enumerate(lines) if pattern.search(line)]
        if hits:
            evidence = lines[hits[0]].strip()[:EVIDENCE_LIMIT]
            found[entry.id] = Issue(topic=entry, line=hits[0] + 1, evidence=evidence, count=len(hits))
    hidden = {name for issue in found.values() for name in issue.topic.hides}
    kept = [issue for issue in found.values() if issue.topic.id not in hidden]
    return sorted(kept, key=lambda issue: (_ORDER[issue.topic.severity], issue.line))[:ISSUES_LIMIT]


def troubleshoot(error_message: str = "", topic_name: str = "") -> dict[str, Any]:
    """The seed's /troubleshoot answer: a diagnosis, one topic, or the list of topics.

    Raises: NotFound for an unknown topic, BodyTooLarge for too long a text.
    """
    if error_message.strip():
        issues = diagnose(error_message)
        answer: dict[str, Any] = {"issues_found": len(issues), "issues": [_shown(issue) for issue in issues]}
        if not issues:
            answer["hint"] = "no known message in it: give the first lines of the error as the program printed them"
        return {"diagnosis": answer}
    if topic_name.strip():
        found = topic(topic_name)
        return {"topic": found.id, "info": _described(found)}
    return {"topics": [{"id": one.id, "title": one.title, "category": one.category} for one in topics()]}


@cache
def _compiled() -> tuple[tuple[Topic, re.Pattern[str], re.Pattern[str] | None], ...]:
    """Each topic with its patterns as one alternation, and what must stand beside it."""
    return tuple(
        (one, re.compile("|".join(one.patterns)), re.compile("|".join(one.also)) if one.also else None)
        for one in topics()
    )


def _described(one: Topic) -> dict[str, Any]:
    """A topic as the API answers it."""
    return {
        "id": one.id,
        "category": one.category,
        "severity": one.severity,
        "title": one.title,
        "description": one.description,
        "symptoms": list(one.symptoms),
        "root_causes": list(one.root_causes),
        "solutions": list(one.solutions),
        "code_fix": one.code_fix,
        "source": one.source,
    }


def _shown(issue: Issue) -> dict[str, Any]:
    """An issue as the API answers it."""
    return _described(issue.topic) | {"line": issue.line, "evidence": issue.evidence, "count": issue.count}
