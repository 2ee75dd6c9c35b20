"""The error table of the shipped calibration: what was measured on rows that the fits had not seen, against the bars.

data/accuracy.json is written by `python -m benchmarks.planner_accuracy --write` and by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import msgspec

ACCURACY_FILE = "accuracy.json"


class AccuracyLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One kind of prediction, tested in one way. Errors are shares of the measured value.

    scheme: what the fits had not seen. inside: share of measured values inside the stated 80 % interval. `figure` is
    what is no error (times, runs out of memory). is_met is None where there is no bar.
    """

    what: str
    scheme: str
    rows: int
    sources: int = 0
    mape: float | None = None
    median: float | None = None
    largest: float | None = None
    inside: float | None = None
    figure: str = ""
    bar: str = ""
    is_met: bool | None = None
    peer: str = ""
    refused: int = 0


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that could not be asked as questions, and why."""

    what: str
    reason: str
    rows: int
    example: str = ""


class AccuracyTable(msgspec.Struct, frozen=True, kw_only=True):
    """The whole table: when it was measured, on which rows, of which calibration."""

    date: str
    row_set: str
    machine: str = ""
    calibrations: dict[str, str] = {}
    lines: tuple[AccuracyLine, ...] = ()
    refused: tuple[Refusal, ...] = ()


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a kind of prediction tested in one way; None: not asked."""

    mape: float | None = None
    median: float | None = None
    largest: float | None = None
    inside: float | None = None
    peer: str = ""

    @property
    def text(self) -> str:
        """In words, as "MAPE 8 %, median 5 %"."""
        parts = [
            (self.mape, "MAPE "),
            (self.median, "median "),
            (self.largest, "every row "),
        ]
        said = [f"{word}{100 * limit:g} %" for limit, word in parts if limit is not None]
        if self.largest == 0:
            said = ["exact"]
        if self.inside is not None:
            said.append(f"{100 * self.inside:g} % inside the interval")
        return ", ".join(said)

    def is_met(self, line: AccuracyLine) -> bool | None:
        """Whether a line keeps to it; None where nothing is asked."""
        checks = [
            line.mape is not None and line.mape <= self.mape if self.mape is not None else None,
            line.median is not None and line.median <= self.median if self.median is not None else None,
            line.largest is not None and line.largest <= self.largest if self.largest is not None else None,
            line.inside is not None and line.inside >= self.inside if self.inside is not None else None,
        ]
        asked = [check for check in checks if check is not None]
        return all(asked) if asked else None


def held(line: AccuracyLine, bar: Bar | None) -> AccuracyLine:
    """The line with its bar's words and verdict. Without rows there is no verdict."""
    if bar is None:
        return line
    met = bar.is_met(line) if line.rows else None
    return msgspec.structs.replace(line, bar=bar.text, is_met=met, peer=bar.peer)


@cache
def shipped_accuracy() -> AccuracyTable:
    """The table that ships."""
    data = resources.files("head.planner").joinpath("data", ACCURACY_FILE).read_bytes()
    return msgspec.json.decode(data, type=AccuracyTable)


def percent(value: float | None) -> str:
    """A share as "4.8 %", small ones with two digits; empty without one."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{100 * value:.1f} %" if abs(value) >= 0.001 else f"{100 * value:.2f} %"


def verdict(line: AccuracyLine) -> str:
    """yes, no, or nothing where there is no bar."""
    return {True: "yes", False: "**no**", None: ""}[line.is_met]


def markdown(table: AccuracyTable) -> str:
    """The table for documents."""
    head = (
        "| what | tested on | rows | sources | MAPE | median | in 80 % interval | figure | bar | met | best peer |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    )
    rows = []
    for line in table.lines:
        counts = f"{line.rows or ''} | {line.sources or ''}"
        errors = f"{percent(line.mape)} | {percent(line.median)} | {percent(line.inside)} | {figure(line)}"
        rows.append(
            f"| {line.what} | {line.scheme} | {counts} | {errors} | {line.bar} | {verdict(line)} | {line.peer} |"
        )
    return "\n".join((*head, *rows))


def figure(line: AccuracyLine) -> str:
    """What a line says beside its errors: the largest error where the bar asks for it, rows that were refused."""
    parts = [line.figure] if line.figure else []
    if line.largest is not None:
        parts.append(f"largest {percent(line.largest)}")
    if line.refused:
        parts.append(f"{line.refused} refused")
    return ", ".join(parts)


def missed(lines: Sequence[AccuracyLine]) -> list[AccuracyLine]:
    """Lines that miss their bar."""
    return [line for line in lines if line.is_met is False]
