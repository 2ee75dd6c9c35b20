"""A DeepSpeed configuration and command line for a layout.

Versions: DeepSpeed 0.19 (field names as its pydantic schema, runtime/zero/config.py and runtime/config.py, has them).
"""

from __future__ import annotations

import json
from typing import Any

from head.planner.export.job import Command, TrainingJob
from head.planner.export.launchers import process_environment

CONFIG_NAME = "ds_config.json"
STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3, "hsdp": 3}
BUCKET_ELEMENTS = 500_000_000


def config(job: TrainingJob) -> dict[str, Any]:
    """The configuration: batch sizes that multiply up, precision, optimizer, ZeRO stage, offload, recompute."""
    layout = job.layout
    found: dict[str, Any] = {
        "train_batch_size": layout.micro_batch * job.accumulation * layout.dp,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": job.gradient_clipping,
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(job),
    }
    found |= _precision(job)
    if optimizer := _optimizer(job):
        found["optimizer"] = optimizer
    elif STAGES[layout.sharding]:
        found["zero_allow_untested_optimizer"] = True
    if layout.tp > 1:
        found["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.recompute != "none":
        found["activation_checkpointing"] = {
            "partition_activations": layout.tp > 1 and layout.has_sequence_parallel,
            "cpu_checkpointing": layout.offload == "activations",
            "contiguous_memory_optimization": False,
        }
    return found


def notes(job: TrainingJob) -> list[str]:
    """What DeepSpeed cannot say in its configuration, in words."""
    layout, found = job.layout, []
    if layout.pp > 1:
        found.append(
            f"pp={layout.pp}: DeepSpeed takes its stages from a PipelineModule in the script "
            "(and ZeRO 2 and 3 do not go with it)"
        )
    if layout.cp > 1:
        found.append(f"cp={layout.cp}: build the sequence-parallel group in the script (DeepSpeed-Ulysses)")
    if layout.sharding in ("fsdp", "hsdp"):
        found.append(
            f"{layout.sharding} is ZeRO stage 3 over all data-parallel ranks (MiCS groups left with DeepSpeed 0.19)"
        )
    if layout.precision not in ("bf16", "fp16", "fp32", "tf32"):
        found.append(f"{layout.precision} products need Transformer Engine layers in the script; weights are bf16")
    if layout.recompute != "none":
        found.append("recompute takes effect where the script calls deepspeed.checkpointing.checkpoint")
    return found


def command(job: TrainingJob, extra: tuple[str, ...] = ()) -> Command:
    """The launcher's line and its files: the configuration, and a hostfile when there are several nodes."""
    files = {CONFIG_NAME: json.dumps(config(job), indent=2) + "\n"}
    argv = ["deepspeed"]
    if job.nodes > 1:
        names = job.topology.node_ids or tuple(f"node{index}" for index in range(job.nodes))
        files["hostfile"] = "".join(f"{name} slots={job.gpus_per_node}\n" for name in names[: job.nodes])
        argv += ["--hostfile", "hostfile", "--num_nodes", str(job.nodes), "--master_addr", job.master_addr]
    argv += ["--num_gpus", str(job.gpus_per_node), "--master_port", str(job.master_port)]
    argv += [job.script, *job.script_args, *extra, "--deepspeed_config", CONFIG_NAME]
    return Command(argv=tuple(argv), env=process_environment(job), files=files)


def _zero(job: TrainingJob) -> dict[str, Any]:
    """The ZeRO section."""
    stage = STAGES[job.layout.sharding]
    found: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        found |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": BUCKET_ELEMENTS}
    if stage == 3:
        found |= {
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if job.layout.offload in ("optimizer", "optimizer_and_weights") and stage >= 1:
        found["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if job.layout.offload == "optimizer_and_weights" and stage == 3:
        found["offload_param"] = {"device": "cpu", "pin_memory": True}
    return found


def _precision(job: TrainingJob) -> dict[str, Any]:
    """bf16 or fp16 section and the gradients' type; nothing for fp32."""
    layout = job.layout
    if layout.precision in ("fp32", "tf32"):
        return {}
    if layout.precision == "fp16":
        return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}}
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32" if layout.grad_bytes == 4 else "bf16"}}


def _optimizer(job: TrainingJob) -> dict[str, Any] | None:
    """The optimizer section, where DeepSpeed has it; others are made by the script."""
    names = {"adam": "Adam", "adamw": "AdamW", "lion": "Lion", "sgd": "SGD"}
    name = names.get(job.layout.optimizer)
    if name is None:
        return None
    params: dict[str, Any] = {"lr": job.learning_rate, "weight_decay": job.weight_decay}
    if name in ("Adam", "AdamW"):
        params |= {"betas": [0.9, 0.95], "eps": 1e-8}
    return {"type": name, "params": params}
