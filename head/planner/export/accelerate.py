"""An Accelerate configuration file, its command, and FSDP settings.

Versions: Accelerate 1.15 (keys as `accelerate launch --config_file` reads them; it refuses unknown ones),
FSDP2 (`torch.distributed.fsdp.fully_shard`) of PyTorch 2.13.
"""

from __future__ import annotations

from typing import Any

import yaml

from head.planner.export.job import Command, TrainingJob
from head.planner.export.launchers import process_environment

CONFIG_NAME = "accelerate.yaml"


def config(job: TrainingJob, *, node_rank: int = 0) -> dict[str, Any]:
    """The file's content for one node."""
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": _kind(job),
        "downcast_bf16": "no",
        "machine_rank": node_rank,
        "main_training_function": "main",
        "mixed_precision": {"bf16": "bf16", "fp16": "fp16", "fp32": "no", "tf32": "no"}.get(
            job.layout.precision, "bf16" if job.is_cpu else "fp8"
        ),
        "num_machines": job.nodes,
        "num_processes": job.layout.gpus,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": job.is_cpu,
    }
    if job.nodes > 1:
        found |= {"main_process_ip": job.master_addr, "main_process_port": job.master_port}
    if found["distributed_type"] == "FSDP":
        found["fsdp_config"] = _fsdp_section(job)
    if not job.is_cpu and (sizes := _parallelism(job)):
        found["parallelism_config"] = sizes
    return found


def notes(job: TrainingJob) -> list[str]:
    """What the file cannot say, in words."""
    layout, found = job.layout, []
    if layout.pp > 1:
        found.append(f"pp={layout.pp}: Accelerate has no pipeline-parallel training; use the Megatron export")
    if layout.sharding in ("zero1", "zero2"):
        found.append(f"{layout.sharding}: written as plain data parallelism; use the DeepSpeed export for ZeRO stages")
    if job.accumulation > 1:
        found.append(f"gradient accumulation of {job.accumulation} is set in the script (Accelerator)")
    return found


def command(job: TrainingJob, *, node_rank: int = 0, extra: tuple[str, ...] = ()) -> Command:
    """`accelerate launch` with the file beside it."""
    text = yaml.safe_dump(config(job, node_rank=node_rank), sort_keys=True)
    argv = ("accelerate", "launch", "--config_file", CONFIG_NAME, job.script, *job.script_args, *extra)
    return Command(argv=argv, env=process_environment(job), files={CONFIG_NAME: text})


def fsdp(job: TrainingJob) -> dict[str, Any]:
    """Settings of `fully_shard` for the layout: the mesh, when weights are dropped again, types, offload."""
    layout = job.layout
    shard, replicas = layout.dp * layout.cp, 1
    if layout.sharding == "hsdp":
        shard = min(shard, layout.shard_group or job.gpus_per_node)
        replicas = layout.dp * layout.cp // shard
    if layout.sharding in ("none", "zero1"):
        shard, replicas = 1, layout.dp * layout.cp
    strategy = "NO_SHARD"
    if shard > 1:
        strategy = {"zero2": "SHARD_GRAD_OP", "hsdp": "HYBRID_SHARD"}.get(layout.sharding, "FULL_SHARD")
    return {
        "fsdp_version": 2,
        "sharding_strategy": strategy,
        "mesh": {"dp_replicate": replicas, "dp_shard": shard, "tp": layout.tp},
        "reshard_after_forward": layout.sharding != "zero2",
        "mp_policy": {
            "param_dtype": {"fp16": "float16", "fp32": "float32", "tf32": "float32"}.get(layout.precision, "bfloat16"),
            "reduce_dtype": "float32" if layout.grad_bytes == 4 else "bfloat16",
        },
        "offload_policy": "cpu" if layout.offload in ("optimizer", "optimizer_and_weights") else "none",
        "activation_checkpointing": layout.recompute,
    }


def _kind(job: TrainingJob) -> str:
    """Accelerate's word for the way processes work together."""
    if job.is_cpu:
        return "MULTI_CPU" if job.layout.gpus > 1 else "NO"
    if job.layout.sharding in ("zero3", "fsdp", "hsdp"):
        return "FSDP"
    return "MULTI_GPU" if job.layout.gpus > 1 else "NO"


def _fsdp_section(job: TrainingJob) -> dict[str, Any]:
    """The `fsdp_config` section, version 2."""
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": job.layout.offload in ("optimizer", "optimizer_and_weights"),
        "fsdp_activation_checkpointing": job.layout.recompute == "full",
    }


def _parallelism(job: TrainingJob) -> dict[str, int]:
    """The `parallelism_config` section: only when more than plain data parallelism is asked for."""
    layout = job.layout
    mesh = fsdp(job)["mesh"]
    if layout.tp == 1 and layout.cp == 1 and layout.sharding != "hsdp":
        return {}
    return {
        "parallelism_config_dp_replicate_size": mesh["dp_replicate"],
        "parallelism_config_dp_shard_size": mesh["dp_shard"] // layout.cp if mesh["dp_shard"] > 1 else 1,
        "parallelism_config_tp_size": layout.tp,
        "parallelism_config_cp_size": layout.cp,
    }
