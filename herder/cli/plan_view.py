"""Answers of the planner for people: one way to show any of them, made for reading down a terminal of 80 columns."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal

import msgspec

from herder.cli import output
from herder.cli.command import Globals
from herder.cli.table import Column, clean, safe

ROWS = 40  # of one table; -o json shows all
COLUMNS = 9
MATRIX = 16  # rows and columns of a matrix
WIDTH = 100  # of a pipe
_QUANTITY = {"value", "unit", "low", "high"}
_SCALES = {"bytes": ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))}
_SECONDS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


# fields of questions, for options
def kind_of_field(type_: Any) -> tuple[Any, tuple[str, ...], bool]:
    """(int, float, str, bool or None; choices; whether it is a list) of a field's type."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is Annotated:
        return kind_of_field(arguments[0])
    if origin in (UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return kind_of_field(inner[0]) if len(inner) == 1 else (None, (), False)
    if origin is Literal:
        return str, tuple(str(choice) for choice in arguments if choice), False
    if origin in (list, tuple):
        kind, choices, _ = kind_of_field(arguments[0])
        return kind, choices, True
    return (type_ if type_ in (int, float, str, bool) else None), (), False


def description_of(type_: Any) -> str:
    """The description of a field, wherever in its type it stands."""
    if typing.get_origin(type_) is Annotated:
        for meta in type_.__metadata__:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    for argument in typing.get_args(type_):
        found = description_of(argument)
        if found:
            return found
    return ""


# answers
def render(answer: Mapping[str, Any], options: Globals) -> str:
    """The whole answer as text."""
    width = output.line_width() or WIDTH
    return "\n".join(_section(answer, options, width, 0)).rstrip()


def _section(value: Mapping[str, Any], options: Globals, width: int, depth: int) -> list[str]:
    """Plain values first, as `name  value`; then what has parts, each under its name."""
    plain = [(name, item) for name, item in value.items() if _is_plain(item) and not _is_empty(item)]
    longest = max((len(_title(name)) for name, _ in plain), default=0)
    pad = "  " * depth
    lines = []
    for name, item in plain:
        lead = f"{pad}{_title(name).ljust(longest)}  "
        lines += _wrapped(lead, _text(item, name), width)
    for name, item in value.items():
        if _is_plain(item) or _is_empty(item):
            continue
        if lines and depth == 0:
            lines.append("")
        lines.append(f"{pad}{_title(name)}")
        lines += _block(name, item, options, width, depth + 1)
    return lines


def _block(name: str, item: Any, options: Globals, width: int, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(item, str):
        return [pad + line for line in safe(item).rstrip("\n").split("\n")]
    if isinstance(item, Mapping):
        return _section(item, options, width, depth)
    if all(isinstance(row, Mapping) and not _is_quantity(row) for row in item):
        return _rows(item, options, width, depth)
    if all(_is_plain(row) for row in item):
        if any(isinstance(row, str) for row in item):
            return [line for row in item for line in _wrapped(f"{pad}- ", _text(row, name), width)]
        return _wrapped(pad, ", ".join(_text(row, name) for row in item), width)
    return [pad + line for line in _matrix([row for row in item if isinstance(row, Sequence)])]


def _matrix(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of numbers or yes and no, in columns of one width."""
    words = {True: "x", False: "."}
    cells = [[words[cell] if isinstance(cell, bool) else _text(cell) for cell in row[:MATRIX]] for row in rows[:MATRIX]]
    longest = max((len(cell) for row in cells for cell in row), default=0)
    lines = [" ".join(cell.rjust(longest) for cell in row) for row in cells]
    return [*lines, f"... the first {MATRIX}; -o json shows all"] if len(rows) > MATRIX else lines


def _rows(rows: Sequence[Mapping[str, Any]], options: Globals, width: int, depth: int) -> list[str]:
    """A list of objects: as a table where the objects are flat, else one after the other.

    What is too long for a cell stands below its row.
    """
    flat = [_flat(row) for row in rows[:ROWS]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    is_deep = any(not _is_plain(cell) for row in flat for cell in row.values())
    wordy = [name for name in names if any(_is_long(row.get(name)) for row in flat)]
    pad = "  " * depth
    lines: list[str] = []
    if is_deep or len(rows) == 1 or len(wordy) == len(names):
        for number, row in enumerate(rows[:ROWS], 1):
            lines += [*([""] if number > 1 else []), *_section(row, options, width, depth)]
    else:
        names = [name for name in names if name not in wordy][:COLUMNS]
        cells = [[_text(row.get(name, ""), name, is_brief=True) for name in names] for row in flat]
        columns = [
            Column(
                _title(name).upper(),
                is_number=all(isinstance(row.get(name, 0), int | float | Mapping) for row in flat),
                shrinks_to=24 if position == 0 else 0,
                rank=position if position > 1 else 0,
            )
            for position, name in enumerate(names)
        ]
        table = output.render_table(options, columns, cells, width=max(40, width - 2 * depth)).split("\n")
        lines.append(pad + table[0])
        for row, line in zip(flat, table[1:], strict=True):
            lines.append(pad + line)
            for name in wordy:
                lines += _wrapped(f"{pad}    ", _text(row.get(name, "")), width) if row.get(name) else []
    if len(rows) > ROWS:
        lines.append(f"{pad}... {len(rows) - ROWS} more; -o json shows all")
    return lines


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """An object's plain fields, and those of the objects right inside of it."""
    found: dict[str, Any] = {}
    for name, item in row.items():
        if _is_empty(item):
            continue
        if _is_plain(item):
            found[name] = item
        elif isinstance(item, Mapping):
            found |= {inner: value for inner, value in item.items() if _is_plain(value) and inner not in found}
        else:
            found[name] = item
    return found


def _is_quantity(item: Any) -> bool:
    return isinstance(item, Mapping) and item.keys() >= _QUANTITY


def _is_plain(item: Any) -> bool:
    if isinstance(item, str):
        return "\n" not in item
    return item is None or isinstance(item, bool | int | float) or _is_quantity(item)


def _is_empty(item: Any) -> bool:
    return item is None or (isinstance(item, str | Sequence | Mapping) and not item)


def _is_long(cell: Any) -> bool:
    return not _is_plain(cell) or (isinstance(cell, str) and len(cell) > 48)


def _title(name: str) -> str:
    """A field's name as words; names of variables and files stay as they are."""
    is_name = "." in name or name != name.lower()
    return clean(name if is_name else name.replace("_", " "))


def _wrapped(lead: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, len(lead) + 20),
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead.rstrip()]


def _text(item: Any, name: str = "", *, is_brief: bool = False) -> str:
    """A plain value as words."""
    if _is_quantity(item):
        shown = amount(item["value"], item["unit"])
        if is_brief:
            return shown
        note = f"  ({item['convention']})" if item.get("convention") else ""
        return f"{shown} [{amount(item['low'], item['unit'])} .. {amount(item['high'], item['unit'])}]{note}"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return f"{item:,}" if abs(item) >= 10_000 and not name.endswith(("port", "seed")) else str(item)
    if isinstance(item, float):
        return number(item)
    return clean(str(item)) if item is not None else ""


def number(value: float) -> str:
    """Four significant digits, thousands apart, no exponent between a millionth and a thousand billion."""
    if value == 0:
        return "0"
    if not 1e-6 <= abs(value) < 1e15:
        return f"{value:.3e}"
    if abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.6f}".rstrip("0")


def amount(value: float, unit: str) -> str:
    """A value with its unit in a size that reads well."""
    if unit == "bytes":
        scale, word = next(((s, w) for s, w in _SCALES["bytes"] if abs(value) >= s), (1, "B"))
        return f"{value / scale:.4g} {word}"
    if unit in ("s", "seconds"):
        size, word = next(((s, w) for s, w in _SECONDS if abs(value) >= s), (1.0, "s"))
        return f"{value / size:.4g} {word}"
    if unit in ("ratio", "1", ""):
        return number(value)
    return f"{number(value)} {unit}"
