"""Command lines of torchrun and the environment of its processes.

Versions: torchrun of PyTorch 2.13 (options unchanged since 2.0).
Source: pytorch.org/docs, "torchrun (Elastic Launch)"; environment variables of NCCL from its user guide.
"""

from __future__ import annotations

from head.planner.advice.nccl import nccl_environment
from head.planner.export.job import Command, TrainingJob, environment

RENDEZVOUS_TIMEOUT_S = 900
NODES_SHOWN = 64  # as commands of their own; they differ in the rank only


def torchrun(job: TrainingJob, *, node_rank: int | None = None, extra: tuple[str, ...] = ()) -> Command:
    """torchrun on one node; over several nodes, the line for `node_rank`, with every node meeting at the master.

    `extra` are arguments added after the script's own.
    """
    argv = ["torchrun"]
    if job.nodes == 1:
        argv += ["--standalone", "--nnodes=1"]
    else:
        rank = 0 if node_rank is None else node_rank
        argv += [f"--nnodes={job.nodes}", f"--node-rank={rank}"]
        argv += [f"--master-addr={job.master_addr}", f"--master-port={job.master_port}"]
    argv += [f"--nproc-per-node={job.gpus_per_node}", job.script, *job.script_args, *extra]
    return Command(argv=tuple(argv), env=process_environment(job))


def torchrun_nodes(job: TrainingJob, extra: tuple[str, ...] = ()) -> list[Command]:
    """One command for each node, in order of rank, of the first NODES_SHOWN."""
    return [torchrun(job, node_rank=rank, extra=extra) for rank in range(min(job.nodes, NODES_SHOWN))]


def skeleton_args(job: TrainingJob) -> tuple[str, ...]:
    """The layout as arguments of the exported training script (`train_script.py`)."""
    layout = job.layout
    argv = [
        *("--tp", str(layout.tp)),
        *("--sharding", layout.sharding),
        *("--micro-batch", str(layout.micro_batch)),
        *("--accumulation", str(job.accumulation)),
        *("--seq", str(layout.seq)),
        *("--precision", layout.precision),
        *("--recompute", layout.recompute),
        *("--learning-rate", repr(job.learning_rate)),
        *("--weight-decay", repr(job.weight_decay)),
        *("--gradient-clipping", repr(job.gradient_clipping)),
        *("--steps", str(job.train_steps)),
        *("--save-interval", str(job.save_interval)),
        *("--checkpoint-dir", job.checkpoint_dir),
    ]
    if layout.sharding == "hsdp":
        argv += ["--shard-group", str(layout.shard_group or job.gpus_per_node)]
    if layout.offload != "none":
        argv.append("--offload")
    if job.is_cpu:
        argv.append("--cpu")
    return tuple(argv)


def process_environment(job: TrainingJob) -> dict[str, str]:
    """Variables of every training process; those that torchrun sets itself (ranks, world size) are left to it."""
    found = {"OMP_NUM_THREADS": str(job.cpus_per_gpu), "TOKENIZERS_PARALLELISM": "false"}
    if not job.is_cpu:
        found |= {entry.name: entry.value for entry in nccl_environment(job.topology, tp=job.layout.tp)}
        if job.layout.sharding in ("zero2", "zero3", "fsdp", "hsdp"):
            found.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # sharded data parallelism overlaps on several queues
        if job.topology.accelerator.vendor == "NVIDIA":
            found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return environment(found | job.env)


def documented_environment(job: TrainingJob) -> dict[str, str]:
    """As the seed's export showed it: with the rendezvous variables, for launchers that set none."""
    rendezvous = {
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
        "WORLD_SIZE": str(job.layout.gpus),
    }
    return rendezvous | process_environment(job)
