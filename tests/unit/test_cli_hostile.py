"""What engines, models and agents write, on a person's terminal."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from herder.cli import output, table
from herder.cli.command import Globals

KNOWN = st.text("\x1b[;m\n\r\t\u202e\u0301模ẞ\U0001f680a", max_size=90)  # every edition of Unicode agrees on these


def test_text_of_others_drives_no_terminal() -> None:
    """Escape sequences, C1 controls and direction overrides lose their power; lines, colours' text and emoji stay."""
    hostile = "ok\n\tn\x1b]0;title\x07 \x9b2J \u202eabc \x1b[31mred\x1b[0m \r\nend \U0001f469\u200d\U0001f680"
    shown = table.safe(hostile)
    assert not any(char in shown for char in "\x1b\x07\x9b\u202e\r")
    assert "ok\n\tn" in shown
    assert " red " in shown
    assert shown.endswith("\U0001f469\u200d\U0001f680")


def test_json_on_a_terminal_is_the_same_document() -> None:
    """Characters that a terminal obeys are escaped, and read back as they were."""
    value = {"a": "x\x9b2J\u202e\U000e0001 y"}
    text = output.escaped(json.dumps(value, ensure_ascii=False, indent=2))
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) == value


COLUMNS = (
    table.Column("NAME", shrinks_to=12),
    table.Column("KIND"),
    table.Column("SIZE", is_number=True),
    table.Column("WHERE", shrinks_to=8, rank=1),
)
NAMES = (
    "\x1b[2J\x1b]0;owned\x07model",
    "a\nb\r\nc\x00\x85\u2028d",
    "x" * 5_000,
    "模型" * 60,
    "\u202e\u2066gnisrever\u2069",
    "שלום-مرحبا" * 20,
    "e" + "\u0301" * 500,
    "\U0001f469\u200d\U0001f680" * 40,
    "\ud800lone",
    "",
)


def cells_of(line: str) -> int:
    """Cells that a terminal takes for a line, by rich's tables, which are not ours."""
    return cell_len("".join(char for char in line if not unicodedata.combining(char)))


@given(st.lists(st.tuples(KNOWN, KNOWN, KNOWN), min_size=1, max_size=5))
@example([(name, name, name) for name in NAMES])
@example([(name, "ok", name) for name in NAMES])
@settings(max_examples=200, deadline=None)
def test_tables_stay_tables_at_80_columns(rows: list[tuple[str, str, str]]) -> None:
    """Whatever names say: one line each, no wider than the terminal, in its columns, and nothing drives it."""
    text = table.render(COLUMNS, [(name, kind, "12.5 GiB", where) for name, kind, where in rows], width=80)
    heading, *lines = text.split("\n")
    assert len(lines) == len(rows)
    end = heading.index("SIZE") + len("SIZE")
    for line in lines:
        assert cells_of(line) <= 80
        assert line.isprintable()
        before = line[: line.index("12.5 GiB") + len("12.5 GiB")] if line.count("12.5 GiB") == 1 else ""
        assert not before or cells_of(before) == end, line


@given(st.lists(st.text(max_size=200), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_any_text_is_one_harmless_line(names: list[str]) -> None:
    """Any character at all: one printable line for each row, and the numbers are never cut."""
    text = table.render(COLUMNS, [(name, name, "12.5 GiB", name) for name in names], width=80)
    lines = text.split("\n")
    assert len(lines) == len(names) + 1
    assert all(line.isprintable() and "12.5 GiB" in line for line in lines[1:])


def test_fields_stay_lines() -> None:
    """What `show` prints of a name cannot begin a line of its own or drive the terminal."""
    shown = output.fields(Globals(), [("name", NAMES[0]), ("note", "a\x85b\u2028c\rd"), ("label", "e\u202ef")])
    assert not any(char in shown for char in "\x1b\x07\x85\u2028\u202e\r")
    assert shown.startswith("name ")
