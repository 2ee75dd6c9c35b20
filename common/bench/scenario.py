"""How large requests are: the scenario grammar, read strictly.

    D(in,out)              exactly so many prompt and answer tokens
    N(m,s)/(m,s)           normal, rounded, at least 1 in and 2 out
    U(a,b)/(c,d)           uniform, both ends included
    U(in,out)              uniform from 1
    E(n)                   embeddings, tokens of a document
    R(d,q)                 rerank, tokens of a document and of the query
    A(n)                   speech, characters
    I(w,h[,n])             n images (1) of w x h beside a short text
    dataset                the rows of --dataset as they are

No spaces, whole numbers only. `xN` behind one gives its weight in a mix: `D(100,50)x3`.
Source: genai-bench's scenario strings; weights are ours.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

Task = Literal["text", "embeddings", "rerank", "speech", "image", "dataset"]
MAX_TOKENS = 10_000_000
MAX_SIDE = 16_384
MAX_IMAGES = 64
FORMS = "D(in,out)  N(m,s)/(m,s)  U(a,b)/(c,d)  U(in,out)  E(n)  R(d,q)  A(n)  I(w,h[,n])  dataset"
IMAGE_TEXT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of one request. 0 where the task has no such thing."""

    input_tokens: int = 0
    output_tokens: int = 0
    query_tokens: int = 0
    characters: int = 0
    width: int = 0
    height: int = 0
    images: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One class of requests."""

    text: str
    task: Task
    kind: str
    numbers: tuple[int, ...] = ()
    weight: int = 1

    def sample(self, rng: random.Random) -> Shape:
        """The size of the next request."""
        n = self.numbers
        match self.kind:
            case "D":
                return Shape(n[0], n[1])
            case "N":
                return Shape(max(1, round(rng.gauss(n[0], n[1]))), max(2, round(rng.gauss(n[2], n[3]))))
            case "U":
                return Shape(rng.randint(n[0], n[1]), rng.randint(n[2], n[3]))
            case "E":
                return Shape(n[0])
            case "R":
                return Shape(n[0], query_tokens=n[1])
            case "A":
                return Shape(characters=n[0])
            case "I":
                return Shape(IMAGE_TEXT_TOKENS, 0, width=n[0], height=n[1], images=n[2])
            case _:
                return Shape()


_PATTERNS: tuple[tuple[str, Task, re.Pattern[str]], ...] = (
    ("D", "text", re.compile(r"D\((\d+),(\d+)\)")),
    ("N", "text", re.compile(r"N\((\d+),(\d+)\)/\((\d+),(\d+)\)")),
    ("U", "text", re.compile(r"U\((\d+),(\d+)\)(?:/\((\d+),(\d+)\))?")),
    ("E", "embeddings", re.compile(r"E\((\d+)\)")),
    ("R", "rerank", re.compile(r"R\((\d+),(\d+)\)")),
    ("A", "speech", re.compile(r"A\((\d+)\)")),
    ("I", "image", re.compile(r"I\((\d+),(\d+)(?:,(\d+))?\)")),
    ("dataset", "dataset", re.compile(r"dataset")),
)
_WEIGHT = re.compile(r"(.*?)(?:x(\d+))?", re.DOTALL)


def parse(text: str) -> Scenario:
    """The scenario of a string. Raises: ValueError that says what is wrong and what would be right."""
    found = _WEIGHT.fullmatch(text)
    body, weight = (found[1], found[2]) if found is not None else (text, None)
    if not text.isascii() or len(text) > 100:
        raise ValueError(f"{text[:100]!r} is not a scenario; one of: {FORMS}")
    if any(char.isspace() for char in text):
        raise ValueError(f"{text!r}: a scenario has no spaces; one of: {FORMS}")
    if weight is not None and not 1 <= int(weight) <= 1_000_000:
        raise ValueError(f"{text!r}: a weight is 1 to 1,000,000")
    for kind, task, pattern in _PATTERNS:
        match = pattern.fullmatch(body)
        if match is not None:
            numbers = tuple(int(group) for group in match.groups() if group is not None)
            made = Scenario(text, task, kind, _completed(kind, numbers), int(weight or 1))
            _check(made)
            return made
    hint = next((f"; {body[0]} is written {form}" for form in FORMS.split("  ") if body and form[0] == body[0]), "")
    raise ValueError(f"{text!r} is not a scenario{hint or f'; one of: {FORMS}'}")


def _completed(kind: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """With what short forms leave out."""
    if kind == "U" and len(numbers) == 2:
        return (1, numbers[0], 1, numbers[1])
    if kind == "I" and len(numbers) == 2:
        return (*numbers, 1)
    return numbers


def _check(made: Scenario) -> None:
    n, text = made.numbers, made.text
    if any(number > MAX_TOKENS for number in n):
        raise ValueError(f"{text!r}: no number may exceed {MAX_TOKENS:,}")
    if made.kind in ("D", "E", "R", "A") and 0 in n:
        raise ValueError(f"{text!r}: every number must be at least 1")
    if made.kind == "N" and (n[0] < 1 or n[2] < 1):
        raise ValueError(f"{text!r}: a mean must be at least 1")
    if made.kind == "U" and not (1 <= n[0] <= n[1] and 1 <= n[2] <= n[3]):
        raise ValueError(f"{text!r}: a range goes from at least 1 upwards")
    if made.kind == "I" and not (1 <= n[0] <= MAX_SIDE and 1 <= n[1] <= MAX_SIDE and 1 <= n[2] <= MAX_IMAGES):
        raise ValueError(f"{text!r}: sides are 1 to {MAX_SIDE:,}, images 1 to {MAX_IMAGES}")
