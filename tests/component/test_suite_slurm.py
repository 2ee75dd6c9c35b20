"""A suite as a real Slurm job: sbatch starts servers, clients and orchestrator, and whatever fails ends them all."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.doubles import private_slurm
from tests.doubles.herder_program import HERDER
from tests.doubles.suite_servers import until

pytestmark = pytest.mark.skipif(not private_slurm.is_possible(), reason="no Slurm, or not root")
DUMMY = Path(__file__).resolve().parents[2] / "recipes" / "suite" / "dummy.yaml"


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Three nodes. Their folder's name is short, as the path of munged's socket must be."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/run"))
    folder.chmod(0o755)
    try:
        with private_slurm.cluster(folder) as environment:
            yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def port() -> int:
    """One that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def submitted(folder: Path, slurm: dict[str, str], *, ports: tuple[int, int], **parts: Any) -> dict[str, Any]:
    """The job of the dummy's recipe, small, with parts of it replaced."""
    document = yaml.safe_load(DUMMY.read_text())
    document["partition"] = "gpu"
    document["workload"] |= {"duration": "1s", "warmup": "1s"}
    document["monitoring"] = {"metrics": [{"type": "system", "scrape_interval": "200ms", "targets": ["all"]}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document | parts))
    herder = folder / "herder"
    herder.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "from herder.cli.main import main; main()" "$@"\n')
    herder.chmod(0o755)
    done = subprocess.run(
        [*HERDER, "suite", "run", "recipe.yaml", "--herder", str(herder), "--server-port", str(ports[0]),
         "--client-port", str(ports[1]), "--timeout", "40", "-o", "json"],
        cwd=folder, env=slurm | {"XDG_STATE_HOME": str(folder / "state")}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ended(slurm: dict[str, str], job_id: str) -> str:
    """The job's last state, once it is over."""

    def state() -> str:
        said = subprocess.run(
            ["scontrol", "show", "job", job_id], env=slurm, capture_output=True, text=True, timeout=20, check=False
        ).stdout
        name = next((word for word in said.split() if word.startswith("JobState=")), "").partition("=")[2]
        return name if name and name not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") else ""

    return str(until(state, 120))


def left_of(folder: Path) -> list[str]:
    """Command lines of processes that still name the folder or its wrapper."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        variables = process.info["environ"] or {}
        if str(folder) in " ".join(process.info["cmdline"] or ()) or variables.get("OUTPUT_DIR", "").startswith(
            str(folder)
        ):
            found.append(" ".join(process.info["cmdline"] or ()))
    return found


def test_a_job_runs_a_whole_suite(slurm: dict[str, str], tmp_path: Path) -> None:
    """One heterogeneous job: results, samples of both nodes and logs of every part are in its folder."""
    job = submitted(tmp_path, slurm, ports=(port(), port()))
    state = ended(slurm, job["job_id"])
    folder = Path(job["folder"])
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert state == "COMPLETED", logs
    summary = json.loads((folder / "results" / "benchmark_suite.summary.json").read_text())
    assert summary["total_requests"] > 20
    assert (summary["total_errors"], summary["is_degraded"]) == (0, False)
    assert summary["experiment"]["slurm_job_id"]
    samples = sorted((folder / "monitoring").glob("*.csv"))
    assert [path.name for path in samples] == ["clients_n2.csv", "servers_n1.csv"]
    assert all(path.read_text().endswith("\n") and path.read_text().count("\n") > 2 for path in samples)
    assert any(json.loads(line)["component"] == "server" for line in logs["aggregated.jsonl"].splitlines())
    assert (folder / "executor.token").stat().st_mode & 0o077 == 0
    until(lambda: not left_of(tmp_path))
    said = subprocess.run(
        [*HERDER, "suite", "jobs"], env=slurm | {"XDG_STATE_HOME": str(tmp_path / "state")}, capture_output=True,
        text=True, timeout=60, check=False,
    ).stdout  # fmt: skip
    assert "completed" in said


def test_a_server_that_dies_ends_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    """The job fails at once instead of waiting for the server, and leaves no process behind."""
    job = submitted(
        tmp_path, slurm, ports=(port(), port()), servers={"service_config": {"command": ["sh", "-c", "exit 3"]}}
    )
    assert ended(slurm, job["job_id"]) == "FAILED"
    shown = subprocess.run(["scontrol", "show", "job", job["job_id"]], env=slurm, capture_output=True, text=True,
                           timeout=20, check=True).stdout  # fmt: skip
    begun, over = (datetime.fromisoformat(re.findall(f"{name}=(\\S+)", shown)[0]) for name in ("StartTime", "EndTime"))
    assert (over - begun).total_seconds() < 14, "steps that were just being launched are ended, too, not waited for"
    errors = next(tmp_path.glob("*.err")).read_text()
    assert "a step ended before the orchestrator" in errors
    until(lambda: not left_of(tmp_path))


def test_a_cancelled_job_leaves_nothing(slurm: dict[str, str], tmp_path: Path) -> None:
    """scancel ends servers, executors, monitors and orchestrator."""
    workload = yaml.safe_load(DUMMY.read_text())["workload"] | {"duration": "10m"}
    job = submitted(tmp_path, slurm, ports=(port(), port()), workload=workload)
    log = Path(job["folder"]) / "logs" / "orchestrator_local.err"
    until(lambda: log.exists() and "benchmark: starts" in log.read_text(), 60)
    assert left_of(tmp_path)
    subprocess.run(["scancel", job["job_id"]], env=slurm, timeout=20, check=True)
    assert ended(slurm, job["job_id"]) == "CANCELLED"
    until(lambda: not left_of(tmp_path), 60)
