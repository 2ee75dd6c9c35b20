"""Prompts from files: ShareGPT, HellaSwag, Alpaca, any JSON lines, CSV, plain text.

The kind is told by the fields of the first row unless it is named (`FILE:kind`). Every row becomes the turns of a
conversation: (what the user says, what was answered then). Rows without a prompt are left out and counted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from herder.decoding import UNREADABLE

Kind = Literal["sharegpt", "hellaswag", "alpaca", "jsonl", "csv", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_ROWS = 1_000_000
MAX_BYTES = 2 << 30
MAX_FIELD = 16 << 20
_PROMPT_NAMES = ("prompt", "question", "text", "input", "instruction", "query", "content", "ctx")
_ANSWER_NAMES = ("completion", "answer", "response", "output")
_LENGTH_NAMES = ("output_tokens", "max_tokens", "output_length", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation."""

    turns: tuple[tuple[str, str], ...]
    output_tokens: int | None = None
    """How long the row says that the answer is to be."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of a file, in its order."""

    name: str
    kind: Kind
    rows: tuple[Row, ...]
    left_out: int


def read(spec: str, *, limit: int = MAX_ROWS) -> Dataset:
    """The dataset of `FILE` or `FILE:kind`. Raises: ValueError that names file and line; OSError."""
    name, colon, kind = spec.rpartition(":")
    if not colon or kind not in KINDS:
        name, kind = spec, ""
    path = Path(name)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} is larger than 2 GiB; take a part of it")
    if kind == "text" or (not kind and path.suffix.lower() in (".txt", ".md")):
        return _text(path, limit)
    if kind == "csv" or (not kind and path.suffix.lower() in (".csv", ".tsv")):
        return _gather(path, "csv", _csv_rows(path), limit)
    rows = _json_rows(path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path.name} has no rows")
    told = kind or _kind_of(first)
    return _gather(path, msgspec.convert(told, Kind), _chain(first, rows), limit)


def _chain(first: Mapping[str, Any], rest: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    yield first
    yield from rest


def _kind_of(row: Mapping[str, Any]) -> Kind:
    if isinstance(row.get("conversations"), list):
        return "sharegpt"
    if "ctx" in row and "endings" in row:
        return "hellaswag"
    return "alpaca" if "instruction" in row and "output" in row else "jsonl"


def _gather(path: Path, kind: Kind, rows: Iterable[Mapping[str, Any]], limit: int) -> Dataset:
    kept: list[Row] = []
    left_out = 0
    for row in rows:
        made = _row(kind, row)
        if made is None:
            left_out += 1
            continue
        kept.append(made)
        if len(kept) >= min(limit, MAX_ROWS):
            break
    if not kept:
        raise ValueError(f"{path.name}: no row has a prompt; {_expectation(kind)}")
    return Dataset(path.name, kind, tuple(kept), left_out)


def _expectation(kind: Kind) -> str:
    return {
        "sharegpt": "ShareGPT rows have conversations of {from, value}",
        "hellaswag": "HellaSwag rows have ctx",
        "alpaca": "Alpaca rows have instruction, and maybe input",
    }.get(kind, f"a row's prompt is called one of {', '.join(_PROMPT_NAMES)}, or messages")


def _row(kind: Kind, row: Mapping[str, Any]) -> Row | None:
    """A row's turns; None for one without a prompt."""
    if kind == "sharegpt":
        return _conversation(row.get("conversations"), "from", "value", ("human", "user"))
    if kind == "hellaswag":
        return _single(row.get("ctx"), None, None)
    if kind == "alpaca":
        asked = "\n\n".join(
            part for part in (row.get("instruction"), row.get("input")) if isinstance(part, str) and part
        )
        return _single(asked, row.get("output"), None)
    if isinstance(row.get("messages"), list):
        return _conversation(row["messages"], "role", "content", ("user",))
    prompt = next((row[name] for name in _PROMPT_NAMES if isinstance(row.get(name), str)), None)
    answer = next((row[name] for name in _ANSWER_NAMES if isinstance(row.get(name), str)), None)
    length = next((row[name] for name in _LENGTH_NAMES if row.get(name) not in (None, "")), None)
    return _single(prompt, answer, length)


def _single(prompt: Any, answer: Any, length: Any) -> Row | None:
    if not isinstance(prompt, str) or not prompt.strip():
        return None
    try:
        tokens = int(length) if length is not None else None
    except (TypeError, ValueError):
        tokens = None
    return Row(
        ((prompt, answer if isinstance(answer, str) else ""),), tokens if tokens and 0 < tokens < 10_000_000 else None
    )


def _conversation(said: Any, who: str, what: str, users: tuple[str, ...]) -> Row | None:
    """Turns of a list of messages: each user's message with the answer that follows it."""
    turns: list[tuple[str, str]] = []
    for message in said if isinstance(said, list) else ():
        if not isinstance(message, dict) or not isinstance(message.get(what), str):
            continue
        text = message[what]
        if message.get(who) in users:
            if text.strip():
                turns.append((text, ""))
        elif turns and not turns[-1][1] and message.get(who) != "system":
            turns[-1] = (turns[-1][0], text)
    return Row(tuple(turns)) if turns else None


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of one JSON array, or of lines of JSON."""
    with path.open("rb") as file:
        start = file.read(1_024).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start[:1] == b"[":
            try:
                rows = msgspec.json.decode(file.read().removeprefix(b"\xef\xbb\xbf"))
            except UNREADABLE as error:
                raise ValueError(f"{path.name} is not JSON: {error}") from None
            yield from (row for row in rows if isinstance(row, dict))
            return
        number = 0
        while line := file.readline(MAX_FIELD):
            number += 1
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line.removeprefix(b"\xef\xbb\xbf"))
            except UNREADABLE as error:
                raise ValueError(f"{path.name}, line {number}: not JSON: {error}") from None
            if isinstance(row, dict):
                yield row


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        try:
            yield from reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path.name}, line {reader.line_num}: {error}") from None


def _text(path: Path, limit: int) -> Dataset:
    """Every line is a prompt."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from None
    rows = tuple(Row(((line, ""),)) for line in lines if line)[: min(limit, MAX_ROWS)]
    if not rows:
        raise ValueError(f"{path.name} has no lines")
    return Dataset(path.name, "text", rows, 0)
