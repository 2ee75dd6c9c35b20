"""Plans for other tools: launch, export, slurm, nccl."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from common.errors import InvalidValue
from head.planner.advice.nccl import nccl_advice
from head.planner.endpoints.base import Answer, Endpoint
from head.planner.endpoints.layout_search import TopologySummary, topology_summary
from head.planner.endpoints.layouts import (
    LayoutQuestion,
    layout_name,
    layout_of,
    machine_and_layout,
)
from head.planner.endpoints.questions import (
    Batch,
    Count,
    Desk,
    Name,
    Question,
    architecture_for,
    topology_for,
)
from head.planner.export import bundle, slurm
from head.planner.export.job import TrainingJob
from head.planner.hardware.topology import GPUS_LIMIT


class RunQuestion(LayoutQuestion, frozen=True, kw_only=True):
    """What is run, beside the layout."""

    script: Annotated[str, Meta(max_length=512, description="The training script.")] = "train.py"
    script_args: Annotated[tuple[str, ...], Meta(max_length=100, description="Its arguments.")] = ()
    name: Annotated[str, Meta(max_length=64, description="Of the job.")] = "train"
    learning_rate: Annotated[float, Meta(gt=0, le=100, description="The highest of the schedule.")] = 3e-4
    train_steps: Annotated[int, Meta(ge=1, le=1 << 40, description="Steps of the run.")] = 1_000
    checkpoint_dir: Annotated[str, Meta(max_length=512, description="Where checkpoints go.")] = "checkpoints"
    cpu: Annotated[bool, Meta(description="A rehearsal on CPUs, with gloo.")] = False


class LaunchQuestion(Question, frozen=True, kw_only=True):
    """Commands that start a training. tp x pp x dp must be nodes x gpus."""

    nodes: Annotated[Count, Meta(description="Nodes.")] = 1
    gpus: Annotated[int, Meta(ge=1, le=1_024, description="GPUs of a node.")] = 8
    tp: Annotated[Count, Meta(description="Tensor parallelism.")] = 1
    pp: Annotated[Count, Meta(description="Pipeline stages.")] = 1
    dp: Annotated[int, Meta(ge=0, le=1_048_576, description="Data-parallel ranks; 0: what the GPUs leave.")] = 0
    sharding: Annotated[str, Meta(max_length=16, description="none, zero1, zero2, zero3, fsdp, hsdp.")] = "none"
    micro_batch: Annotated[int, Meta(ge=1, le=1 << 20, description="Sequences at once.")] = 1
    grad_accum: Annotated[int, Meta(ge=1, le=1 << 20, description="Micro-batches of a step.")] = 1
    seq_length: Annotated[int, Meta(ge=1, le=1 << 26, description="Tokens of a sequence.")] = 2048
    master_addr: Annotated[str, Meta(max_length=253, description="The first node.")] = "localhost"
    master_port: Annotated[int, Meta(ge=1024, le=65_535, description="Its port.")] = 29500
    script: Annotated[str, Meta(max_length=512, description="The training script.")] = "train.py"
    framework: Annotated[
        Literal["", "torchrun", "deepspeed", "accelerate", "megatron"] | None, Meta(description="Only this one.")
    ] = None


class LaunchAnswer(Answer, frozen=True, kw_only=True):
    """Commands by launcher; each also as a list of words."""

    commands: dict[str, Any]
    framework: str = ""
    layout: str


class ExportQuestion(RunQuestion, frozen=True, kw_only=True):
    """Configurations, commands and files of a training."""

    batch_size: Annotated[Batch, Meta(description="Sequences of one data-parallel rank in a step.")] = 1
    sharding: Annotated[str, Meta(max_length=16, description="none, zero1, zero2, zero3, fsdp, hsdp.")] = "none"

    framework: Annotated[
        str,
        Meta(max_length=32, description="torchrun, pytorch, deepspeed, accelerate, fsdp, megatron, slurm, kubernetes."),
    ] = "pytorch"


class ExportAnswer(Answer, frozen=True, kw_only=True):
    """The files by name, the commands, and what each tool cannot express of the layout."""

    name: str
    description: str
    framework: str
    topology: TopologySummary
    deepspeed_config: dict[str, Any]
    accelerate_config: dict[str, Any]
    fsdp_config: dict[str, Any]
    megatron_args: list[str]
    environment_variables: dict[str, str]
    torchrun_command: str
    torchrun_argv: list[str]
    multi_node_commands: list[str]
    deepspeed_command: str
    accelerate_command: str
    megatron_command: str
    slurm_script: str
    kubernetes_config: dict[str, Any]
    training_script: str
    files: dict[str, str]
    notes: list[str]


class SlurmQuestion(RunQuestion, frozen=True, kw_only=True):
    """A batch script: one torchrun per node, resumed from the newest checkpoint."""

    partition: Annotated[str, Meta(max_length=256, description="Slurm's --partition.")] = ""
    account: Annotated[str, Meta(max_length=256, description="Slurm's --account.")] = ""
    qos: Annotated[str, Meta(max_length=256, description="Slurm's --qos.")] = ""
    time: Annotated[str, Meta(max_length=32, description="Limit, as Slurm writes it.")] = "24:00:00"
    cpus_per_gpu: Annotated[int, Meta(ge=1, le=1_024, description="CPU cores for each GPU.")] = 8
    conda_env: Annotated[str, Meta(max_length=256, description="A conda environment to activate.")] = ""
    modules: Annotated[tuple[str, ...], Meta(max_length=32, description="Environment modules to load.")] = ()


class SlurmAnswer(Answer, frozen=True, kw_only=True):
    """The script."""

    script: str
    layout: str
    topology: TopologySummary
    notes: list[str]


class NcclQuestion(Question, frozen=True, kw_only=True):
    """Settings of NCCL for a cluster."""

    num_nodes: Annotated[Count, Meta(description="Nodes.")] = 1
    gpus_per_node: Annotated[int, Meta(ge=1, le=1_024, description="GPUs of a node.")] = 8
    network_type: Annotated[str, Meta(max_length=32, description="nvlink, infiniband, roce, ethernet, efa.")] = "nvlink"
    gpu: Annotated[Name, Meta(description="Accelerator.")] = "H100"
    interface: Annotated[str, Meta(max_length=64, description="Network interfaces, in NCCL's words.")] = ""
    hca: Annotated[str, Meta(max_length=128, description="RDMA devices, in NCCL's words.")] = ""
    debug: Annotated[bool, Meta(description="Let NCCL say what it does.")] = False
    tp: Annotated[Count, Meta(description="Tensor parallelism.")] = 1


class NcclAnswer(Answer, frozen=True, kw_only=True):
    """Variables with reasons, and the bandwidth to expect."""

    nccl_config: dict[str, Any]
    topology: dict[str, Any]


def launch(question: LaunchQuestion, desk: Desk) -> LaunchAnswer:
    """The commands for a layout that is given whole."""
    total = question.nodes * question.gpus
    if total > GPUS_LIMIT:
        raise InvalidValue(f"nodes: {question.nodes} x {question.gpus} GPUs are over {GPUS_LIMIT}", field="nodes")
    placed = LayoutQuestion(
        gpus=total,
        gpus_per_node=question.gpus,
        gpu="H100",
        tp=question.tp,
        pp=question.pp,
        dp=question.dp,
        sharding=question.sharding,
        micro_batch=question.micro_batch,
        batch_size=question.micro_batch * question.grad_accum,
        seq_length=question.seq_length,
    )
    topology = topology_for(placed, desk)
    job = TrainingJob(
        layout=layout_of(placed, topology),
        topology=topology,
        script=question.script,
        master_addr=question.master_addr,
        master_port=question.master_port,
    )
    found = bundle.launch(job, question.framework or "")
    return LaunchAnswer(
        commands=found["commands"], framework=found.get("framework", ""), layout=layout_name(job.layout)
    )


def _job(question: RunQuestion, desk: Desk, **more: Any) -> TrainingJob:
    arch = architecture_for(question, desk)
    topology, layout = machine_and_layout(question, desk)
    return TrainingJob(
        layout=layout,
        topology=topology,
        architecture=arch,
        script=question.script,
        script_args=question.script_args,
        name=question.name,
        learning_rate=question.learning_rate,
        train_steps=question.train_steps,
        checkpoint_dir=question.checkpoint_dir,
        is_cpu=question.cpu,
        **more,
    )


def export(question: ExportQuestion, desk: Desk) -> ExportAnswer:
    """Everything for a layout and a script."""
    job = _job(question, desk)
    found = bundle.export(job, question.framework) | {"topology": topology_summary(job.topology)}
    return ExportAnswer(**found)


def slurm_script(question: SlurmQuestion, desk: Desk) -> SlurmAnswer:
    """The batch script for a layout and a script."""
    job = _job(
        question,
        desk,
        partition=question.partition,
        account=question.account,
        qos=question.qos,
        time_limit=question.time,
        cpus_per_gpu=question.cpus_per_gpu,
        conda_env=question.conda_env,
        modules=question.modules,
    )
    return SlurmAnswer(
        script=slurm.script(job),
        layout=layout_name(job.layout),
        topology=topology_summary(job.topology),
        notes=bundle.notes(job),
    )


def nccl(question: NcclQuestion, desk: Desk) -> NcclAnswer:
    """Variables that exist in NCCL, each with its reason."""
    found = nccl_advice(
        question.num_nodes,
        question.gpus_per_node,
        question.network_type,
        accelerator=question.gpu,
        interface=question.interface,
        hca=question.hca,
        has_debug=question.debug,
        tp=question.tp,
    )
    return NcclAnswer(nccl_config=found["nccl_config"], topology=found["topology"])


_CODES = ("model_not_found", "not_found", "nothing_fits")
ENDPOINTS = (
    Endpoint(
        "launch",
        "launch",
        LaunchQuestion,
        LaunchAnswer,
        launch,
        "Commands that start a training",
        example=(("nodes", 2), ("tp", 2), ("pp", 2), ("dp", 4)),
    ),
    Endpoint(
        "export",
        "export",
        ExportQuestion,
        ExportAnswer,
        export,
        "A plan as files of other tools",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("dp", 8), ("framework", "deepspeed")),
        codes=_CODES,
    ),
    Endpoint(
        "slurm",
        "slurm",
        SlurmQuestion,
        SlurmAnswer,
        slurm_script,
        "A Slurm batch script for a plan",
        example=(("model", "llama-3.1-8b"), ("gpu", "H100"), ("dp", 16), ("partition", "gpu")),
        codes=_CODES,
    ),
    Endpoint(
        "nccl",
        "nccl",
        NcclQuestion,
        NcclAnswer,
        nccl,
        "Settings of NCCL with reasons",
        example=(("num_nodes", 4), ("network_type", "infiniband")),
        codes=("not_found",),
    ),
)
