"""The benchmarks of the control plane at their smallest size: that they run and find what they look for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def measured(*names: str) -> str:
    """What the commands print."""
    command = [sys.executable, "-m", "benchmarks.control_plane", "--small", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("load", r"sessions lost +0 +0"),
        ("reattach", r"judged lost +0 +0"),
        ("api", r"GET a page of 500 nodes, p50 / p99 +\d+\.\d / \d+\.\d ms"),
        ("placements", r"commands that left for agents +\d{2}"),
        ("start", r"start to serving, best / worst of 3 +\d"),
        ("crash", r"writes acknowledged +[1-9]\d*\s+acknowledged and lost +0 +0"),
    ],
)
def test_a_benchmark_measures(name: str, row: str) -> None:
    """Real heads and agents, a few of each."""
    assert re.search(row, measured(name))
