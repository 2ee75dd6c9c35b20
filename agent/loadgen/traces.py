"""Recorded arrivals with their sizes: Mooncake (JSON lines), BurstGPT (CSV), Azure LLM inference (CSV).

The format is told by the first line. Rows that record a failure (no answer tokens) are left out and counted.
Sources: Mooncake FAST'25 trace (timestamp in ms, input_length, output_length, hash_ids of 512-token blocks);
BurstGPT (Timestamp in s, Request tokens, Response tokens); AzurePublicDataset (TIMESTAMP, ContextTokens,
GeneratedTokens).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TextIO

import msgspec

from herder.decoding import UNREADABLE

Format = Literal["mooncake", "burstgpt", "azure"]
MAX_ROWS = 5_000_000
MAX_LINE = 4 << 20
MAX_TOKENS = 10_000_000
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Arrival:
    """One recorded request."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Ids of its prompt's leading blocks of BLOCK_TOKENS tokens; the same id is the same text."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file holds, in order of time."""

    format: Format
    arrivals: tuple[Arrival, ...]
    left_out: int


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read(path: Path, *, limit: int | None = None) -> Trace:
    """The trace of a file, at most `limit` rows. Raises: ValueError with the line that is wrong; OSError."""
    most = min(limit, MAX_ROWS) if limit is not None else MAX_ROWS
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = file.readline(MAX_LINE)
        file.seek(0)
        kind = _format_of(first, path)
        rows = _mooncake(file) if kind == "mooncake" else _table(file, kind)
        kept: list[Arrival] = []
        left_out = 0
        for number, row in rows:
            if not 0 <= row.at_s < 1e12 or max(row.input_tokens, row.output_tokens) > MAX_TOKENS:
                raise ValueError(f"{path.name}, line {number}: a time or a number of tokens that cannot be")
            if row.output_tokens < 1 or row.input_tokens < 1:
                left_out += 1
                continue
            kept.append(row)
            if len(kept) >= most:
                break
    if not kept:
        raise ValueError(f"{path.name}: no request with an answer in this trace")
    return Trace(kind, tuple(sorted(kept, key=lambda row: row.at_s)), left_out)


def _format_of(first: str, path: Path) -> Format:
    if first.lstrip().startswith("{"):
        return "mooncake"
    names = {name.strip().lower() for name in first.split(",")}
    if {"timestamp", "request tokens", "response tokens"} <= names:
        return "burstgpt"
    if {"timestamp", "contexttokens", "generatedtokens"} <= names:
        return "azure"
    raise ValueError(
        f"{path.name} is no trace: Mooncake's JSON lines have timestamp, input_length and output_length; BurstGPT's "
        "CSV "
        "has Timestamp, Request tokens and Response tokens; Azure's has TIMESTAMP, ContextTokens and GeneratedTokens"
    )


def _mooncake(file: TextIO) -> Iterator[tuple[int, Arrival]]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except UNREADABLE as error:
            raise ValueError(f"line {number}: {error}") from None
        yield number, Arrival(row.timestamp / 1_000, row.input_length, row.output_length, row.hash_ids)


def _table(file: TextIO, kind: Format) -> Iterator[tuple[int, Arrival]]:
    """BurstGPT's times are seconds, Azure's are dates."""
    reader = csv.DictReader(file)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    inputs, outputs = (
        ("request tokens", "response tokens") if kind == "burstgpt" else ("contexttokens", "generatedtokens")
    )
    for row in reader:
        try:
            at_s = float(row["timestamp"]) if kind == "burstgpt" else _date(row["timestamp"])
            yield reader.line_num, Arrival(at_s, int(float(row[inputs])), int(float(row[outputs])))
        except (KeyError, TypeError, ValueError, OverflowError, csv.Error):
            raise ValueError(f"line {reader.line_num}: not a row of a {kind} trace") from None


def _date(text: str) -> float:
    """Seconds of a date with up to seven digits behind the second, as Azure writes them; read as UTC."""
    whole, _, behind = text.strip().partition(".")
    digits = behind.partition("+")[0].rstrip("Z")
    fraction = float(f"0.{digits}") if digits else 0.0
    return datetime.fromisoformat(f"{whole.partition('+')[0].rstrip('Z')}+00:00").timestamp() + fraction
