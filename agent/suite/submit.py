"""Jobs of suites: submitted with sbatch here or on a host over ssh, remembered, followed.

Every command is a list of words. Over ssh, whose far end is a shell, the words are quoted. Slurm's commands hang when
its controller is down, so each has a deadline.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from agent.suite.errors import SuiteError

COMMAND_S = 60.0
MAX_JOBS = 1_000
_HOST = re.compile(r"(?:[A-Za-z0-9_.-]+@)?[A-Za-z0-9][A-Za-z0-9_.-]*")
_JOB = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job."""

    job_id: str
    name: str
    recipe: str
    folder: str
    """Where its results are, on its host."""
    host: str
    """Empty: this machine."""
    submitted: float


def run(words: Sequence[str], *, host: str = "", text: str = "", limit_s: float = COMMAND_S) -> str:
    """What a command here, or on a host, says. Raises: SuiteError E008."""
    command = list(words)
    if host:
        if not _HOST.fullmatch(host):
            raise SuiteError("E006", f"{host!r} is not a host")
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "--", host, shlex.join(words)]
    if shutil.which(command[0]) is None:
        raise SuiteError("E008", f"the command {command[0]} is not on PATH", hint="--host names a host that has it")
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise SuiteError("E007", f"{words[0]} said nothing for {limit_s:g} s") from None
    if done.returncode:
        raise SuiteError("E008", f"{words[0]}: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout


def submit(script: str, *, name: str, recipe: str, output: str, host: str = "", folder: str = "") -> Job:
    """Submits a script; its job. folder: where the job begins. Raises: SuiteError."""
    words = ["sbatch", "--parsable"]
    if folder:
        run(["mkdir", "-p", folder], host=host)
        words.append(f"--chdir={folder}")
    said = run(words, host=host, text=script).strip()
    job_id = said.partition(";")[0].partition("+")[0].splitlines()[-1] if said else ""
    if not _JOB.fullmatch(job_id):
        raise SuiteError("E008", f"sbatch said {said[:200]!r} instead of a job's number")
    place = output.replace("{experiment_id}", f"{name}-{job_id}")
    base = run(["pwd"], host=host).strip() if host else os.getcwd()
    job = Job(job_id, name, recipe, str(PurePosixPath(base) / folder / place), host, time.time())
    _remember(job)
    return job


def _book() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "herder" / "suite-jobs.jsonl"


def _remember(job: Job) -> None:
    path = _book()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a") as file:
        file.write(json.dumps(asdict(job)) + "\n")


def jobs() -> list[Job]:
    """Jobs that were submitted from here, the newest last."""
    try:
        lines = _book().read_text().splitlines()[-MAX_JOBS:]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Job(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def job_of(job_id: str) -> Job:
    """One of them; empty: the newest. Raises: SuiteError E006."""
    for job in reversed(jobs()):
        if not job_id or job.job_id == job_id:
            return job
    raise SuiteError("E006", f"no job {job_id or ''} was submitted from here", hint="`herder suite jobs` lists them")


def state_of(job: Job) -> str:
    """What Slurm says of a job, as long as it knows it; else what its results say."""
    try:
        said = run(["squeue", "--noheader", f"--jobs={job.job_id}", "--format=%T"], host=job.host, limit_s=20.0)
        if said.split():
            return said.split()[0].lower()
    except SuiteError as error:
        if "Invalid job id" not in error.said:
            return "unknown"
    try:
        run(["test", "-e", f"{job.folder}/results/benchmark_suite.summary.json"], host=job.host, limit_s=20.0)
    except SuiteError:
        return "ended without results"
    return "completed"


def log_lines(job: Job, *, tail: int = 200) -> Iterator[tuple[str, str]]:
    """(file, line) of the last lines of each log of a job. Raises: SuiteError."""
    if not _HOST.fullmatch(job.host or "here"):
        raise SuiteError("E006", f"{job.host!r} is not a host")
    listed = run(["find", f"{job.folder}/logs", "-maxdepth", "1", "-name", "*.*", "-size", "+0"], host=job.host)
    gathered = ("aggregated.", "collected_", "stdout.log", "stderr.log")
    for path in sorted(listed.splitlines()):
        name = PurePosixPath(path).name
        if name.startswith(gathered) or name == "loggers_ready":
            continue
        for line in run(["tail", "-n", str(tail), "--", path], host=job.host).splitlines():
            yield name, line
