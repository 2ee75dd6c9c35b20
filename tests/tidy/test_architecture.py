"""docs/architecture.md, compared with the tree: the map of modules, and the tests that the failure table names."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def chapter(number: int) -> str:
    """The text of a chapter."""
    return TEXT.partition(f"\n## {number}. ")[2].partition("\n## ")[0]


def mapped() -> set[str]:
    """What the map names, as paths: modules, and folders with a '/' at their end."""
    rows = re.findall(r"^\| `([\w/]+/)` \| `([\w/ ]+)` \|", chapter(4), re.MULTILINE)
    return {folder + (name if name.endswith("/") else f"{name}.py") for folder, names in rows for name in names.split()}


def test_the_map_names_what_is_there() -> None:
    """Each module and folder of the map exists, and is named once."""
    rows = re.findall(r"^\| `([\w/]+/)` \| `([\w/ ]+)` \|", chapter(4), re.MULTILINE)
    names = [folder + name for folder, names in rows for name in names.split()]
    assert len(names) == len(set(names))
    assert not [path for path in sorted(mapped()) if not (ROOT / path).exists()]


def test_the_map_misses_nothing() -> None:
    """Each module that git knows stands in the map, by itself or with its folder."""
    listing = subprocess.run(
        ["git", "ls-files", "head", "agent", "common", "herder"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    modules = [path for path in listing.splitlines() if path.endswith(".py") and not path.endswith("__init__.py")]
    whole = tuple(path for path in mapped() if path.endswith("/"))
    assert len(modules) > 100
    missing = [
        path for path in modules if path not in mapped() and not path.startswith(whole) and (ROOT / path).exists()
    ]
    assert not missing, f"not in chapter 4 of docs/architecture.md: {missing}"


def test_later_rooms_are_not_built_yet() -> None:
    """What the map calls later is not there; once it is, it belongs into the rows."""
    later = chapter(4).partition("*Later*:")[2]
    rooms = {
        f"{folder}/{room}"
        for folder, rooms in re.findall(r"in `(head|agent)/` ([^;]+);", later)
        for room in re.findall(r"(\w+)(?: \([^)]*\))?", rooms)
    }
    assert rooms == {"head/launch", "head/tuner", "head/ui"}
    assert not [room for room in sorted(rooms) if (ROOT / room).exists()]


def functions_of(path: Path) -> set[str]:
    """Names of all functions and methods of a file."""
    found = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_the_failure_table_names_real_tests() -> None:
    """Each row of the failure table names tests that are there, as `file::test`."""
    rows = [line for line in chapter(6).splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", row.rpartition(" | ")[2])
        assert named, f"no test is named: {row[:60]}"
        for file, name in re.findall(r"`(test_\w+)::(test_\w+)`", row):
            (path,) = (ROOT / "tests").rglob(f"{file}.py")
            assert name in functions_of(path), f"{file} has no {name}"
