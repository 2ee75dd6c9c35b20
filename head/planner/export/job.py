"""What an export is made from: a script, a layout, a topology and where they are to run.

Every text that reaches a shell, a batch file or a YAML document goes through `plain` here first; commands are argv
lists, and their text form is made by shlex and nothing else.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

import msgspec

from common.errors import InvalidValue
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout

TEXT_LIMIT = 4_096  # characters of one field
ARGS_LIMIT = 256  # arguments of the script

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@%+=,/-]{0,255}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]{0,253}[A-Za-z0-9])?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TIME = re.compile(r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A program and its arguments; `files` are those that must lie beside it, by name."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    files: dict[str, str] = {}

    @property
    def text(self) -> str:
        """One line for a POSIX shell: every word quoted as needed, the environment in front."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " ".join([*assignments, shlex.join(self.argv)])


class TrainingJob(msgspec.Struct, frozen=True, kw_only=True):
    """A training run to be exported. Empty texts and zeros leave the choice to the tool."""

    layout: TrainingLayout
    topology: Topology
    architecture: Architecture | None = None
    script: str = "train.py"
    script_args: tuple[str, ...] = ()
    name: str = "train"
    master_addr: str = "localhost"
    master_port: int = 29500
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    train_steps: int = 1000
    save_interval: int = 100
    checkpoint_dir: str = "checkpoints"
    resume_flag: str = "--resume"
    is_cpu: bool = False  # gloo instead of NCCL: a rehearsal without GPUs
    # Slurm
    account: str = ""
    partition: str = ""
    qos: str = ""
    time_limit: str = "24:00:00"
    cpus_per_gpu: int = 8
    conda_env: str = ""
    modules: tuple[str, ...] = ()
    setup: tuple[tuple[str, ...], ...] = ()  # argv lists run on every node before the training
    has_gpu_resources: bool = True  # False: the cluster has no GRES, do not ask for GPUs
    # Kubernetes
    image: str = "pytorch/pytorch:latest"
    namespace: str = "default"
    shared_memory_gib: int = 64
    # environment of every process
    env: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Refuse what no tool could run; see `check`."""
        check(self)

    @property
    def nodes(self) -> int:
        """Nodes that take part."""
        return self.topology.nodes

    @property
    def gpus_per_node(self) -> int:
        """Processes on each node."""
        return self.topology.gpus_per_node

    @property
    def accumulation(self) -> int:
        """Micro-batches of each data-parallel rank in a step."""
        return self.layout.microbatches


def check(job: TrainingJob) -> None:
    """Refuse a job whose parts do not fit together, or whose texts could be read as something else.

    Raises: InvalidValue naming the field.
    """
    layout, topology = job.layout, job.topology
    if layout.gpus != topology.gpus:
        raise InvalidValue(
            f"tp*pp*cp*dp = {layout.tp}*{layout.pp}*{layout.cp}*{layout.dp} = {layout.gpus}, "
            f"the machines have {topology.gpus} GPUs",
            hint=f"make the product {topology.gpus}, e.g. with another dp",
            product=layout.gpus,
            gpus=topology.gpus,
        )
    if topology.gpus % topology.gpus_per_node:
        raise InvalidValue(
            f"{topology.gpus} GPUs are not whole nodes of {topology.gpus_per_node}",
            gpus=topology.gpus,
            gpus_per_node=topology.gpus_per_node,
        )
    samples = layout.micro_batch * layout.dp
    if layout.global_batch % samples:
        raise InvalidValue(
            f"global_batch {layout.global_batch} is not a multiple of micro_batch*dp = {samples}",
            hint=f"e.g. {max(1, round(layout.global_batch / samples)) * samples}",
            global_batch=layout.global_batch,
        )
    if not 1024 <= job.master_port <= 65535:
        raise InvalidValue("master_port must be between 1024 and 65535", field="master_port")
    if len(job.script_args) > ARGS_LIMIT:
        raise InvalidValue(f"at most {ARGS_LIMIT} script arguments", field="script_args")
    for field in ("script", "checkpoint_dir", "conda_env", "resume_flag"):
        plain(field, getattr(job, field))
    if job.script.startswith("-") or not job.script:
        raise InvalidValue("script must be a path, and not look like an option", field="script")
    for argument in job.script_args:
        plain("script_args", argument)
    for module in job.modules:
        matching("modules", module, _WORD)
    for field in ("account", "partition", "qos"):
        if value := getattr(job, field):
            matching(field, value, _WORD)
    matching("name", job.name, _WORD)
    matching("master_addr", job.master_addr, _HOST)
    matching("image", job.image, _WORD)
    matching("namespace", job.namespace, _LABEL)
    matching("time_limit", job.time_limit, _TIME)
    environment(job.env)
    for argv in job.setup:
        for word in argv:
            plain("setup", word)


def plain(field: str, text: str) -> str:
    """The text, when it is one line without control characters and of sane length.

    Raises: InvalidValue.
    """
    if len(text) > TEXT_LIMIT or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise InvalidValue(f"{field} must be one line of at most {TEXT_LIMIT} characters", field=field)
    return text


def matching(field: str, text: str, pattern: re.Pattern[str]) -> str:
    """The text, when it is wholly of the pattern. Raises: InvalidValue."""
    if not pattern.fullmatch(text):
        raise InvalidValue(f"{field} {text[:60]!r} has characters that do not belong there", field=field)
    return text


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with names and values that a shell takes as they are. Raises: InvalidValue."""
    for name, value in values.items():
        matching("env", name, _VARIABLE)
        plain("env", value)
    return dict(values)


def label(name: str) -> str:
    """A Kubernetes name like the given one."""
    found = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:50].strip("-")
    return found or "train"


def exports(values: Mapping[str, str]) -> list[str]:
    """`export` lines for a shell, sorted by name."""
    return [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment(values).items())]


def script_of(commands: Sequence[Sequence[str]]) -> str:
    """A POSIX shell script that runs the commands one after the other and stops at the first failure."""
    return "\n".join(["#!/bin/sh", "set -eu", *(shlex.join(argv) for argv in commands), ""])
