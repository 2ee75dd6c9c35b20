"""The tree keeps its own rules: who may import whom, file sizes, words, and nothing of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("herder", "common", "head", "agent")


def tracked(*suffixes: str) -> list[Path]:
    """Files of the tree that git tracks or would track, by suffix."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    paths = [ROOT / line for line in listing.splitlines()]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


FORBIDDEN = [
    ("herder", ("common", "head", "agent"), "users import herder from any project, without our daemons"),
    ("common", ("head", "agent"), "what is shared knows neither side"),
    ("head", ("agent",), "head and agent meet only on the wire"),
    ("agent", ("head",), "head and agent meet only on the wire"),
    (
        "head/core",
        ("asyncio", "time", "random", "uuid", "secrets", "os", "socket", "aiohttp", "sqlite3"),
        "the core is pure",
    ),
    (
        "agent/core",
        ("asyncio", "time", "random", "uuid", "secrets", "os", "socket", "aiohttp", "sqlite3"),
        "the core is pure",
    ),
    ("agent/mover", ("asyncio", "uvloop"), "the mover is blocking threads; ssh:// runs its own loop in its own thread"),
]
ALLOWED = {
    ("agent/mover/source_ssh.py", "asyncio"),
    *(("herder/cli/plan.py", package) for package in ("common", "head", "agent")),  # the planner, without a daemon
    *(("herder/cli/plan_calibrate.py", package) for package in ("common", "head")),
    *((f"herder/cli/{name}.py", "agent") for name in ("bench", "bench_view")),  # the load generator, likewise
    *((f"herder/cli/{name}.py", "common") for name in ("bench", "bench_view")),
    *((f"herder/cli/{name}.py", "agent") for name in ("monitor", "monitor_view")),  # the monitor, likewise
    ("herder/cli/monitor.py", "common"),
    ("herder/cli/benchmarks.py", "common"),  # documents, figures, comparing: what the head does with them as well
    *((f"herder/cli/benchmarks_{name}.py", "common") for name in ("documents", "live", "results", "view")),
    *((f"herder/cli/{name}.py", "agent") for name in ("suite", "orchestrate", "executor")),  # suites, without a head
}


@pytest.mark.parametrize(("folder", "banned", "reason"), FORBIDDEN, ids=[rule[0] for rule in FORBIDDEN])
def test_imports_follow_the_rules(folder: str, banned: tuple[str, ...], reason: str) -> None:
    """No file imports what its folder must not know."""
    broken = [
        f"{path.relative_to(ROOT)} imports {name}: {reason}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(imports_of(path))
        if name.split(".")[0] in banned and (str(path.relative_to(ROOT)), name.split(".")[0]) not in ALLOWED
    ]
    assert not broken, "\n".join(broken)


def test_every_module_says_its_duty() -> None:
    """Every source file opens with a docstring."""
    silent = [
        str(path.relative_to(ROOT))
        for package in SOURCE
        for path in (ROOT / package).rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, silent


def test_files_stay_readable() -> None:
    """No source file grows past 700 lines."""
    long = {
        str(path.relative_to(ROOT)): count
        for package in SOURCE
        for path in (ROOT / package).rglob("*.py")
        if (count := path.read_text().count("\n")) > 700
    }
    assert not long, long


def test_names_follow_the_style() -> None:
    """No module is named after nothing in particular."""
    vague = {"utils", "util", "helpers", "misc", "manager", "common_utils"}
    assert not [path for path in tracked(".py") if path.stem in vague]


def test_every_test_says_what_it_checks() -> None:
    """Each test function has a docstring."""
    silent = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
                continue
            if not ast.get_docstring(node):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)


_UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b|NotImplemented" r"Error")
_MACHINE = re.compile(r"(?:^|[^\w.])/(?:wo" r"rk|fa" r"rm)/|/ro" r"ot/\.|files\.python" r"hosted|pypi\.o" r"rg/simple")


def test_nothing_is_left_unfinished() -> None:
    """No source file carries a note to finish something later."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in SOURCE
        for path in (ROOT / package).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _UNFINISHED.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_machine_stands_in_the_tree() -> None:
    """No committed text names a path of one machine or a registry's host."""
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if _MACHINE.search(line)
        ]
    assert not found, found


def test_no_shell_and_no_unsafe_loading() -> None:
    """No shell strings, no pickles, no unsafe YAML anywhere in the source."""
    banned = re.compile(r"shell\s*=\s*Tr" r"ue|os\.sys" r"tem\(|pickle\.load|yaml\.load\(|\bev" r"al\(|\bex" r"ec\(")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in SOURCE
        for path in (ROOT / package).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if banned.search(line)
    ]
    assert not found, "\n".join(found)


def test_bytes_from_outside_are_read_with_every_error() -> None:
    """msgspec raises more than DecodeError for bad bytes: one name has them all."""
    found = [
        f"{path.relative_to(ROOT)}: `except UNREADABLE` of herder.decoding"
        for path in tracked(".py")
        if path.relative_to(ROOT).parts[0] in SOURCE
        and path.name != "decoding.py"
        and "msgspec.DecodeError" in path.read_text()
    ]
    assert not found, "\n".join(found)


def test_constraints_are_pinned_by_hash() -> None:
    """Every requirement in the constraints files has an exact version and a hash, and no address."""
    for path in (
        ROOT / "constraints.txt",
        ROOT / "constraints-test.txt",
        ROOT / "scripts" / "constraints-quickstart.txt",
    ):
        text = re.sub(r"\\\n", " ", path.read_text())
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                assert "==" in line, f"{path.name}: {line[:60]}"
                assert "--hash=sha256:" in line, f"{path.name}: {line[:60]}"
        assert "://" not in text
