"""What a built wheel holds: our four packages, the recipes, the console scripts, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=100,
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_top_level_names_are_ours(wheel: zipfile.ZipFile) -> None:
    """Only herder, head, agent, common and the metadata stand at the top."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"herder", "head", "agent", "common"}


def test_recipes_and_scripts_travel(wheel: zipfile.ZipFile) -> None:
    """The recipes are inside, and exactly three console scripts are advertised."""
    assert "head/_recipes/inference/llamacpp.yaml" in wheel.namelist()
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    scripts = [line.split("=")[0].strip() for line in wheel.read(entry).decode().splitlines() if "=" in line]
    assert sorted(scripts) == ["herder", "herder-agent", "herder-head"]
