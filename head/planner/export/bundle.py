"""Everything that is exported for a job, together, with the seed's field names.

Source of the field names: seed 000, POST /export and POST /launch.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

from common.errors import InvalidValue
from head.planner.export import accelerate, deepspeed, kubernetes, launchers, megatron, slurm
from head.planner.export.job import Command, TrainingJob

Framework = Literal["torchrun", "pytorch", "deepspeed", "accelerate", "fsdp", "megatron", "slurm", "kubernetes"]
FRAMEWORKS: tuple[Framework, ...] = (
    "torchrun",
    "pytorch",
    "deepspeed",
    "accelerate",
    "fsdp",
    "megatron",
    "slurm",
    "kubernetes",
)


@cache
def training_script() -> str:
    """The training script that goes with every export; it runs on GPUs and, for a rehearsal, on CPUs."""
    return resources.files("head.planner").joinpath("data", "train_script.txt").read_text(encoding="utf-8")


def export(job: TrainingJob, framework: str = "pytorch") -> dict[str, Any]:
    """All configurations, commands and files of a job. `framework` names the one whose files come first.

    Raises: InvalidValue for a framework that is not known.
    """
    if framework not in FRAMEWORKS:
        raise InvalidValue(
            f"unknown framework {framework[:40]!r}", hint="one of " + ", ".join(FRAMEWORKS), known=list(FRAMEWORKS)
        )
    extra = _own_arguments(job)
    single = launchers.torchrun(job, extra=extra)
    deep = deepspeed.command(job, extra)
    accelerated = accelerate.command(job, extra=extra)
    files = {
        "train.py": training_script(),
        "job.sbatch": slurm.script(job, extra),
        "pytorchjob.yaml": kubernetes.manifest(job, extra),
        **deep.files,
        **accelerated.files,
    }
    return {
        "name": job.name,
        "description": description(job),
        "framework": framework,
        "topology": {"source": job.topology.source, "accelerator": job.topology.accelerator.name},
        "deepspeed_config": deepspeed.config(job),
        "accelerate_config": accelerate.config(job),
        "fsdp_config": accelerate.fsdp(job),
        "megatron_args": megatron.arguments(job),
        "environment_variables": launchers.documented_environment(job),
        "torchrun_command": single.text,
        "torchrun_argv": list(single.argv),
        "multi_node_commands": [command.text for command in launchers.torchrun_nodes(job, extra)],
        "deepspeed_command": deep.text,
        "accelerate_command": accelerated.text,
        "megatron_command": megatron.command(job).text,
        "slurm_script": files["job.sbatch"],
        "kubernetes_config": kubernetes.pytorch_job(job, extra),
        "training_script": files["train.py"],
        "files": files,
        "notes": notes(job),
    }


def launch(job: TrainingJob, framework: str = "") -> dict[str, Any]:
    """The seed's /launch answer: the commands of all four launchers, or of one.

    Raises: InvalidValue for a framework that is not known.
    """
    lines = launchers.torchrun_nodes(job)
    commands: dict[str, Any] = {
        "torchrun": {"command": lines[0].text, "argv": list(lines[0].argv), "multi_node_commands": _texts(lines)},
        "deepspeed": _shown(deepspeed.command(job)) | {"config": deepspeed.config(job), "notes": deepspeed.notes(job)},
        "accelerate": _shown(accelerate.command(job))
        | {"config": accelerate.config(job), "notes": accelerate.notes(job)},
        "megatron": _shown(megatron.command(job))
        | {
            "args": megatron.arguments(job),
            "notes": megatron.notes(job),
            "multi_node_commands": [
                megatron.command(job, node_rank=rank).text for rank in range(min(job.nodes, launchers.NODES_SHOWN))
            ],
        },
    }
    if not framework:
        return {"commands": commands | {"environment": launchers.documented_environment(job)}}
    if framework not in commands:
        known = sorted(commands)
        raise InvalidValue(f"unknown framework {framework[:40]!r}", hint="one of " + ", ".join(known), known=known)
    return {"framework": framework, "commands": commands[framework]}


def description(job: TrainingJob) -> str:
    """The layout in one line."""
    layout = job.layout
    degrees = [f"{name}={value}" for name, value in _degrees(job).items() if value > 1] or ["one GPU"]
    return (
        f"{job.layout.gpus} x {job.topology.accelerator.name} in {job.nodes} node(s): {', '.join(degrees)}, "
        f"sharding {layout.sharding}, {layout.precision}, {layout.global_batch} sequences of {layout.seq} per step "
        f"({layout.micro_batch} at a time, {job.accumulation} accumulated)"
    )


def notes(job: TrainingJob) -> list[str]:
    """What each of the exports cannot express of the layout."""
    found = [f"deepspeed: {note}" for note in deepspeed.notes(job)]
    found += [f"accelerate: {note}" for note in accelerate.notes(job)]
    found += [f"megatron: {note}" for note in megatron.notes(job)]
    layout = job.layout
    if job.nodes > launchers.NODES_SHOWN:
        found.append(f"commands are shown for the first {launchers.NODES_SHOWN} of {job.nodes} nodes")
    if layout.pp > 1 or layout.cp > 1:
        found.append(
            "train.py: has data, sharded and tensor parallelism; pipeline and context parallelism need Megatron"
        )
    if layout.sharding in ("none", "zero1") and layout.tp > 1:
        found.append("train.py: with tensor parallelism it shards gradients and optimizer states over data parallelism")
    return found


def _own_arguments(job: TrainingJob) -> tuple[str, ...]:
    """Arguments of the exported train.py; a script of the user's own gets only what the user gave."""
    is_ours = job.script.rsplit("/", 1)[-1] == "train.py" and not job.script_args
    return launchers.skeleton_args(job) if is_ours else ()


def _degrees(job: TrainingJob) -> dict[str, int]:
    """Degrees of parallelism by name."""
    layout = job.layout
    return {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "ep": layout.ep, "dp": layout.dp}


def _texts(commands: list[Command]) -> list[str]:
    """Lines for a shell."""
    return [command.text for command in commands]


def _shown(command: Command) -> dict[str, Any]:
    """A command as the API answers it."""
    return {"command": command.text, "argv": list(command.argv), "files": command.files}
