"""Tables of text that fit a width: columns shrink, then leave, before a line would wrap.

Names may be anything that others wrote: they stay on their line, take the cells that they are counted with, and as a
last resort are cut in columns that are not cut otherwise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GAP = 2
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_HARMLESS = "\n\t\u200c\u200d"  # and the joiners of scripts and emoji
_WITHOUT_WIDTH = ("Mn", "Me", "Cf")  # marks on the letter before, joiners, directions
_LEAST = 4  # cells that a text keeps when nothing else makes the table fit
Paint = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    shrinks_to: narrowest width it may be cut to (0: never cut). rank: when room is short, the column of the highest
    rank leaves first; rank 0 always stays. is_number: right-aligned.
    """

    title: str
    is_number: bool = False
    shrinks_to: int = 0
    rank: int = 0


def width_of(text: str) -> int:
    """Cells that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(char) in _WITHOUT_WIDTH else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def clean(text: str) -> str:
    """The text on one line, without control characters that could drive the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def safe(text: str) -> str:
    """What an engine or a model wrote, for a terminal: its lines and tabs, nothing that could drive the terminal."""
    plain = _COLOURS.sub("", text).replace("\r", "")
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() or char in _HARMLESS else "\ufffd" for char in plain)


def cut(text: str, width: int) -> str:
    """At most so many cells; what is cut off shows as `…`."""
    if width_of(text) <= width:
        return text
    kept, used = "", 0
    for char in text:
        used += width_of(char)
        if used > width - 1:
            break
        kept += char
    return kept + "…"


def render(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None,
    paint: Callable[[str, str], str] | None = None,
) -> str:
    """The table, a heading and one line per row. width: cells of a line; None: no limit.

    paint: (column title, cell) -> coloured cell, applied after the layout.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    shown = list(range(len(columns)))
    widths = [
        max(width_of(column.title), *(width_of(row[index]) for row in cells)) if cells else width_of(column.title)
        for index, column in enumerate(columns)
    ]
    if width is not None:
        shown, widths = _fit(columns, widths, width)
    lines = [_line([columns[i].title for i in shown], [columns[i] for i in shown], [widths[i] for i in shown], None)]
    for row in cells:
        lines.append(_line([row[i] for i in shown], [columns[i] for i in shown], [widths[i] for i in shown], paint))
    return "\n".join(lines)


def _fit(columns: Sequence[Column], widths: list[int], width: int) -> tuple[list[int], list[int]]:
    shown = list(range(len(columns)))
    while True:
        fitted = list(widths)
        over = sum(fitted[i] for i in shown) + GAP * (len(shown) - 1) - width
        while over > 0:
            # The widest that can still shrink gives way first.
            able = [i for i in shown if 0 < columns[i].shrinks_to < fitted[i]]
            if not able:
                break
            widest = max(able, key=lambda i: fitted[i])
            fitted[widest] -= 1
            over -= 1
        droppable = [i for i in shown if columns[i].rank]
        if over <= 0:
            return shown, fitted
        if not droppable:
            return shown, _squeezed(columns, shown, fitted, over)
        shown.remove(max(droppable, key=lambda i: columns[i].rank))


def _squeezed(columns: Sequence[Column], shown: list[int], widths: list[int], over: int) -> list[int]:
    """Nothing shrinks or leaves any more, since a name is too long: the widest texts give way, whatever they are."""
    fitted = list(widths)
    while over > 0:
        able = [i for i in shown if not columns[i].is_number and fitted[i] > _LEAST]
        if not able:
            break
        fitted[max(able, key=lambda i: fitted[i])] -= 1
        over -= 1
    return fitted


def _line(
    cells: Sequence[str],
    columns: Sequence[Column],
    widths: Sequence[int],
    paint: Callable[[str, str], str] | None,
) -> str:
    parts = []
    for position, (cell, column, width) in enumerate(zip(cells, columns, widths, strict=True)):
        text = cell if column.is_number else cut(cell, width)
        pad = " " * max(0, width - width_of(text))
        shown = paint(column.title, text) if paint else text
        is_last = position == len(cells) - 1
        parts.append(pad + shown if column.is_number else shown + ("" if is_last else pad))
    return (" " * GAP).join(parts).rstrip()
