"""The load generator's benchmark at its smallest size: that it runs and finds what it looks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles the stub")
def test_the_benchmark_measures() -> None:
    """Every figure is there."""
    command = [sys.executable, "-m", "benchmarks.loadgen", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    for row in (r"aiohttp / ours.* \d", r"TTFT error.* \d.*\([1-9]\d* requests\)", r"lateness.* \d", r"4-token.* \d",
                r"memory.* \d+ MB"):  # fmt: skip
        assert re.search(row, done.stdout), row
