"""What the command line prints: every table at 80 columns against its golden file, and numbers for people.

HERDER_UPDATE_GOLDEN=1 writes the golden files anew; the difference is then reviewed like code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from herder.cli import table, text, views
from herder.cli.output import paint_state
from herder.cli.table import Column
from tests.doubles import cli_views as made
from tests.doubles.api_double import NOW_MS

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "cli"
TABLES: dict[str, tuple[Sequence[Column], list[list[str]]]] = {
    "models": (views.MODELS, [views.model_row(one) for one in made.MODELS]),
    "copies": (views.COPIES, [views.copy_row(one, NOW_MS) for one in made.COPIES]),
    "nodes": (views.NODES, [views.node_row(one, NOW_MS) for one in made.NODES]),
    "devices": (views.DEVICES, [views.device_row(one) for one in made.DEVICES]),
    "services": (views.SERVICES, [views.service_row(one) for one in made.SERVICES]),
    "replicas": (views.REPLICAS, [views.replica_row(one, NOW_MS) for one in made.REPLICAS]),
    "jobs": (views.JOBS, [views.job_row(one, NOW_MS + 4_000) for one in made.JOBS]),
    "steps": (views.STEPS, [views.step_row(one, NOW_MS + 4_000) for one in made.STEPS]),
    "keys": (views.KEYS, [views.key_row(one, NOW_MS) for one in made.KEYS]),
    "recipes": (views.RECIPES, [views.recipe_row(one) for one in made.RECIPES]),
    "story": (views.LINES, [views.line_row(one) for one in made.LINES]),
    "candidates": (views.CANDIDATES, [views.candidate_row(one) for one in made.CANDIDATES]),
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_table_is_as_released(name: str) -> None:
    """Each table at 80 columns is byte for byte what its golden file holds."""
    columns, rows = TABLES[name]
    shown = table.render(columns, rows, width=80) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("HERDER_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(shown)
    assert shown == path.read_text()


@pytest.mark.parametrize("name", sorted(TABLES))
def test_table_fits_eighty_columns(name: str) -> None:
    """No line is wider than 80 cells, however long the names are."""
    columns, rows = TABLES[name]
    lines = table.render(columns, rows, width=80).splitlines()
    assert max(table.width_of(line) for line in lines) <= 80


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_pipe_loses_nothing(name: str) -> None:
    """Without a width every cell is there whole."""
    columns, rows = TABLES[name]
    shown = table.render(columns, rows, width=None)
    assert "…" not in shown
    for row in rows:
        for cell in row:
            assert cell in shown


def test_colours_do_not_move_columns() -> None:
    """Painted cells keep the layout: without escape codes the table is the plain one."""
    columns, rows = TABLES["nodes"]
    plain = table.render(columns, rows, width=80)
    painted = table.render(columns, rows, width=80, paint=lambda title, cell: f"\x1b[32m{cell}\x1b[0m")
    assert painted.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain


def test_states_have_colours() -> None:
    """Good is green, passing yellow, bad red; an unknown word stays plain."""
    assert paint_state("ready").startswith("\x1b[32m")
    assert paint_state("online,draining").startswith("\x1b[32m")
    assert paint_state("verifying").startswith("\x1b[33m")
    assert paint_state("unreachable").startswith("\x1b[31m")
    assert paint_state("novel") == "novel"


def test_wide_characters_keep_the_layout() -> None:
    """Characters of two cells are counted as two, also when a cell is cut."""
    columns = (Column("NAME", shrinks_to=6), Column("X"))
    lines = table.render(columns, [["模型模型模型模型", "x"]], width=12).splitlines()
    assert table.width_of(lines[1]) <= 12
    assert lines[1].endswith("x")


def test_a_cell_cannot_drive_the_terminal() -> None:
    """Escape codes and line ends inside names and messages become blanks."""
    shown = table.render((Column("NAME"),), [["a\x1b[2Jb\nc\r"]], width=80)
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "0.98 KiB"),
        (1_536, "1.50 KiB"),
        (96_468_992, "92.0 MiB"),
        (1023 * 1024, "1.00 MiB"),
        (131 << 30, "131 GiB"),
        (5 << 50, "5.00 PiB"),
        (9_999 << 50, "9999 PiB"),
    ],
)
def test_sizes(count: int | None, shown: str) -> None:
    """Bytes in binary units with about three digits."""
    assert text.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (-1, "0.0s"), (0.44, "0.4s"), (9.97, "10s"), (59.6, "1m00s"), (3_599.6, "1h00m"), (200_000, "2d07h")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    """Spans in their two largest units, without 60s or 60m."""
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(("written", "seconds"), [("90", 90), ("1.5h", 5_400), ("1h30m", 5_400), ("7d", 604_800)])
def test_durations_are_read(written: str, seconds: float) -> None:
    """Durations as people write them."""
    assert text.parse_duration(written) == seconds


@pytest.mark.parametrize("written", ["", "x", "5 parsecs", "-5s", "5s!"])
def test_odd_durations_are_refused(written: str) -> None:
    """What is no duration is refused, not read as its first number."""
    with pytest.raises(ValueError, match="duration"):
        text.parse_duration(written)
