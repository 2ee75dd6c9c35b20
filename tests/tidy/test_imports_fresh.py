"""Every module imports by itself in a fresh interpreter, and the command line starts lean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHERS = "aiohttp.web, msgspec, sqlite3, ssl, uvloop, yaml"  # what many modules need, loaded once for all of them


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh interpreter with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.mark.parametrize("package", ["herder", "common", "head", "agent"])
def test_modules_import_alone(package: str) -> None:
    """Each module of a package can be the first import of a process."""
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )
    # One interpreter forks a child per module: for our modules as fresh as a new process, at a hundredth of the cost.
    code = (
        f"import os, sys, {OTHERS}\n"
        "ours = {'herder', 'common', 'head', 'agent'} & set(sys.modules)\n"
        "assert not ours, ours\n"
        f"names = {names!r}\n"
        "failed = []\n"
        "for name in names:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n"
        "            __import__(name)\n"
        "        except BaseException as error:\n"
        "            print(f'{name}: {error!r}', file=sys.stderr)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(pid, 0)[1]:\n"
        "        failed.append(name)\n"
        "sys.exit(bool(failed))\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_help_does_not_load_the_heavy_libraries() -> None:
    """`herder --help` loads neither aiohttp nor rich nor our daemons."""
    result = run(
        "import sys\n"
        "sys.argv = ['herder', '--help']\n"
        "from herder.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = [n for n in ('aiohttp', 'rich', 'head', 'agent', 'uvloop') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    assert result.returncode == 0, result.stderr


def test_the_command_is_light_on_its_feet() -> None:
    """The client's types import without aiohttp."""
    result = run("import sys, herder.types\nassert 'aiohttp' not in sys.modules")
    assert result.returncode == 0, result.stderr
