"""`herder suite`: recipes checked, made, submitted over ssh; executors of a program's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.suite.asking import ask_json
from tests.doubles.suite_servers import Stub, herder, serving, until

DUMMY = Path(__file__).resolve().parents[2] / "recipes" / "suite" / "dummy.yaml"
PROGRAM = """
import time
from agent.suite.api import BaseWorkloadExecutor

class OwnWorkloadExecutor(BaseWorkloadExecutor):
    def _run_benchmark(self, workload_config, thread_id):
        ends = time.monotonic() + self._parse_duration(workload_config["duration"])
        while self.workload_running and time.monotonic() < ends:
            time.sleep(0.01)
            self.record(0.01, is_good=thread_id == 0)

if __name__ == "__main__":
    OwnWorkloadExecutor(port=0).run()
"""


def script(path: Path, text: str) -> None:
    """A program."""
    path.write_text(f"#!{shutil.which('sh')}\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm_host(tmp_path: Path) -> dict[str, str]:
    """A PATH where ssh runs what it is told in another folder, and sbatch keeps the script that it gets."""
    programs, there = tmp_path / "bin", tmp_path / "there"
    programs.mkdir()
    there.mkdir()
    script(
        programs / "ssh",
        f'while [ "$1" != -- ]; do shift; done; echo "$2" >> {tmp_path}/hosts; cd {there} && exec sh -c "$3"',
    )
    script(programs / "sbatch", f'echo "$@" > {there}/words; cat > {there}/script; echo "77;cluster"')
    script(programs / "squeue", "echo RUNNING")
    return {"PATH": f"{programs}:{os.environ['PATH']}", "XDG_STATE_HOME": str(tmp_path / "state")}


def test_validate_tells_everything(tmp_path: Path) -> None:
    """Every mistake on a line of its own and exit code 1; warnings alone are no failure unless asked."""
    path = tmp_path / "bad.yaml"
    path.write_text("scenario: x\nworkload: {service: vllm, duration: 1x, prompt_lenn: 3}\n")
    done = herder("suite", "validate", "bad.yaml", folder=tmp_path)
    assert done.returncode == 1
    for said in ("partition: is missing", "workload.duration: '1x'", "did you mean prompt_len?"):
        assert said in done.stderr
    done = herder("suite", "validate", str(DUMMY), "-o", "json", folder=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["benchmarks"]) == (0, ["benchmark"])
    document = yaml.safe_load(DUMMY.read_text())
    document["workload"]["warmup"] = "1s"
    path.write_text(yaml.safe_dump(document))
    assert herder("suite", "validate", "bad.yaml", folder=tmp_path).returncode == 0
    assert herder("suite", "validate", "bad.yaml", "--strict", folder=tmp_path).returncode == 1


def test_create_makes_what_validate_takes(tmp_path: Path) -> None:
    """Without a terminal flags and defaults make the recipe; a file that is there is not written over."""
    words = ("suite", "create", "--kind", "vllm-distributed", "--model", "m", "--servers", "2", "--out", "r.yaml")
    assert herder(*words, folder=tmp_path).returncode == 0
    assert herder("suite", "validate", "r.yaml", folder=tmp_path).returncode == 0
    assert herder(*words, folder=tmp_path).returncode == 1
    listed = herder("suite", "list", "--dir", ".", "-o", "json", folder=tmp_path)
    assert json.loads(listed.stdout)[0]["service"] == "vllm"


def test_a_suite_is_submitted_over_ssh(tmp_path: Path, slurm_host: dict[str, str]) -> None:
    """The script goes to sbatch on the host word for word, and the job is remembered with its state and logs."""
    words = ("suite", "run", str(DUMMY), "--host", "me@login.example", "--chdir", "run dir")
    done = herder(*words, "-o", "json", folder=tmp_path, variables=slurm_host)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    there = tmp_path / "there"
    assert (job["job_id"], job["host"]) == ("77", "me@login.example")
    assert job["folder"] == str(there / "run dir" / "experiments" / "dummy-suite-77")
    assert (there / "words").read_text() == "--parsable --chdir=run dir\n"
    printed = herder("suite", "script", str(DUMMY), folder=tmp_path).stdout
    assert (there / "script").read_text() == printed
    assert (tmp_path / "hosts").read_text().split() == ["me@login.example"] * 3
    assert "running" in herder("suite", "jobs", folder=tmp_path, variables=slurm_host).stdout
    logs = Path(job["folder"]) / "logs"
    logs.mkdir(parents=True)
    (logs / "client_n1.log").write_text("one\nan Error\n")
    (logs / "aggregated.jsonl").write_text("{}\n")
    read = herder("suite", "logs", "--job-id", "77", folder=tmp_path, variables=slurm_host)
    assert read.stdout == "client_n1.log: one\nclient_n1.log: an Error\n"
    counted = herder("suite", "logs", "--summary", "-o", "json", folder=tmp_path, variables=slurm_host)
    assert json.loads(counted.stdout) == {"client_n1.log": [2, 1, 0]}


@pytest.mark.parametrize("host", ["-oProxyCommand=touch pwned", "a b", "h;touch pwned", "$(touch pwned)"])
def test_a_host_is_a_name_and_nothing_else(tmp_path: Path, slurm_host: dict[str, str], host: str) -> None:
    """What ssh could take for an option or a shell for a command is refused."""
    done = herder("suite", "run", str(DUMMY), f"--host={host}", folder=tmp_path, variables=slurm_host)
    assert (done.returncode, "is not a host" in done.stderr) == (1, True)
    assert not (tmp_path / "hosts").exists()
    assert not list(tmp_path.rglob("pwned"))


def test_sbatch_that_refuses_is_told(tmp_path: Path, slurm_host: dict[str, str]) -> None:
    """What Slurm says is in the error, and no job is remembered."""
    script(tmp_path / "bin" / "sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1")
    done = herder("suite", "run", str(DUMMY), folder=tmp_path, variables=slurm_host)
    assert (done.returncode, "E008" in done.stderr, "invalid account" in done.stderr) == (1, True, True)
    assert "No job" in herder("suite", "jobs", folder=tmp_path, variables=slurm_host).stdout


def test_a_program_with_its_own_executor(tmp_path: Path) -> None:
    """`MyExecutor(port).run()` serves the contract, and its threads' `record` is what is measured."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"HERDER_EXECUTOR_TOKEN_FILE": str(tmp_path / "executor.token")}
    with (
        serving(Stub("vllm")) as stub,
        subprocess.Popen(
            [sys.executable, "program.py"], stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        ) as process,
    ):
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line
            found = re.search(r"executor for own on (\S+)", line)
        token = (tmp_path / "executor.token").read_text().strip()

        def call(method: str, path: str, body: Any = None) -> dict[str, Any]:
            assert found is not None
            return ask_json(method, f"{found[1]}{path}", body=body, token=token, timeout_s=30)[1]

        try:
            config = {"server_url": stub.url, "duration": "2s", "num_threads": 2}
            assert call("POST", "/start", config)["threads"] == 2
            assert until(lambda: (said := call("GET", "/metrics"))["requests_total"] and said)["running"]
            done = until(lambda: not (said := call("GET", "/metrics"))["running"] and said)
        finally:
            process.terminate()
            process.wait(20)
    assert done["error"] is None
    assert done["errors_total"] > 20
    assert done["requests_total"] > done["errors_total"]
    assert done["latency"]["p50"] == pytest.approx(0.01, rel=0.01)
