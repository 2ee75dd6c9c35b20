"""A Slurm batch script that starts ONE torchrun on each node and resumes from the newest complete checkpoint.

Versions: Slurm 22.05 and newer (checked with `sbatch --test-only` and a real run).
"""

from __future__ import annotations

import shlex

from head.planner.export.job import TrainingJob, exports
from head.planner.export.launchers import process_environment

SIGNAL_BEFORE_END_S = 120  # long enough to write a sharded checkpoint
MASTER_PORT_FIRST = 20_000
MASTER_PORT_COUNT = 20_000


def script(job: TrainingJob, extra: tuple[str, ...] = ()) -> str:
    """The batch script. `extra` are arguments after the script's own; the newest checkpoint comes last."""
    parts = [_directives(job), _preparation(job), _rendezvous(job), _resume(job), _launch(job, extra)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _directives(job: TrainingJob) -> list[str]:
    """The #SBATCH lines. Their values are words that need no quoting (see `job.check`)."""
    found = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_gpu * job.gpus_per_node}",
        "--mem=0",
        f"--time={job.time_limit}",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:TERM@{SIGNAL_BEFORE_END_S}",
        "--output=%x-%j.out",
        "--error=%x-%j.err",
    ]
    if job.has_gpu_resources and not job.is_cpu:
        found.insert(3, f"--gres=gpu:{job.gpus_per_node}")
    for option, value in (("account", job.account), ("partition", job.partition), ("qos", job.qos)):
        if value:
            found.append(f"--{option}={value}")
    return ["#!/bin/bash", *(f"#SBATCH {line}" for line in found)]


def _preparation(job: TrainingJob) -> list[str]:
    """Environment modules, conda, variables."""
    found = ["set -eo pipefail"]  # not yet -u: modules and conda read variables that nobody set
    if job.modules:
        found += ["module purge", *(f"module load {shlex.quote(module)}" for module in job.modules)]
    if job.conda_env:
        found += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(job.conda_env)}"]
    # since Slurm 22.05 srun does not take over --cpus-per-task by itself
    found += ["set -u", 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"', *exports(process_environment(job))]
    return found + [shlex.join(["srun", "--ntasks-per-node=1", *argv]) for argv in job.setup]


def _rendezvous(job: TrainingJob) -> list[str]:
    """The first node is the meeting point; the port follows the job's number, so that two jobs do not meet."""
    return [
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT=$(({MASTER_PORT_FIRST} + SLURM_JOB_ID % {MASTER_PORT_COUNT}))",
        "export MASTER_ADDR MASTER_PORT",
        'echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"',
    ]


def _resume(job: TrainingJob) -> list[str]:
    """The newest folder step-N that has its metadata, i.e. was written to its end."""
    return [
        f"checkpoints={shlex.quote(job.checkpoint_dir)}",
        'mkdir -p -- "$checkpoints"',
        "resume=()",
        "while IFS= read -r folder; do",
        '    if [ -e "$folder/.metadata" ]; then',
        f'        resume=({shlex.quote(job.resume_flag)} "$folder")' if job.resume_flag else "        resume=()",
        "    fi",
        "done < <(find \"$checkpoints\" -mindepth 1 -maxdepth 1 -type d -name 'step-*' | sort -V)",
    ]


def _launch(job: TrainingJob, extra: tuple[str, ...]) -> list[str]:
    """srun starts one torchrun per node; a signal to the batch shell is handed on, so that a checkpoint is written."""
    fixed = ["srun", "--kill-on-bad-exit=1", f"--nodes={job.nodes}", "--ntasks-per-node=1", "torchrun"]
    fixed += [f"--nnodes={job.nodes}", f"--nproc-per-node={job.gpus_per_node}", "--rdzv-backend=c10d"]
    rest = [job.script, *job.script_args, *extra]
    line = (
        f'{shlex.join(fixed)} --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" {shlex.join(rest)}'
    )
    return [
        f'{line} "${{resume[@]}}" &',
        "step=$!",
        "trap 'kill -TERM \"$step\" 2>/dev/null || true' TERM",
        "status=0",
        'wait "$step" || status=$?',
        "# a trap ends `wait` early: wait again for as long as srun lives",
        'while kill -0 "$step" 2>/dev/null; do status=0; wait "$step" || status=$?; done',
        'exit "$status"',
    ]
