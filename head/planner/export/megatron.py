"""Arguments of Megatron-LM's pretrain_gpt.py for a layout and an architecture.

Versions: Megatron-LM of Megatron-Core 0.15 and 0.16 (megatron/training/arguments.py and the options made from
TransformerConfig). Only what the architecture says is written; what Megatron-LM cannot build is named in `notes`.
"""

from __future__ import annotations

from head.planner.export.job import Command, TrainingJob
from head.planner.export.launchers import process_environment, torchrun
from head.planner.model.architecture import Architecture, LayerGroup

SCRIPT = "pretrain_gpt.py"
_STRATEGIES = {"zero2": "optim_grads", "zero3": "optim_grads_params", "fsdp": "optim_grads_params"}


def arguments(job: TrainingJob) -> list[str]:
    """The argument list, without the program."""
    layout = job.layout
    found = _parallel(job)
    found += ["--micro-batch-size", str(layout.micro_batch), "--global-batch-size", str(layout.global_batch)]
    found += ["--seq-length", str(layout.seq), "--train-iters", str(job.train_steps)]
    found += ["--lr", repr(job.learning_rate), "--weight-decay", repr(job.weight_decay)]
    found += ["--clip-grad", repr(job.gradient_clipping)]
    found += _precision(job) + _memory(job)
    found += ["--save", job.checkpoint_dir, "--load", job.checkpoint_dir, "--save-interval", str(job.save_interval)]
    if job.architecture is not None:
        found += model_arguments(job.architecture, job.layout.seq)
    return found


def command(job: TrainingJob, *, node_rank: int | None = None) -> Command:
    """torchrun of pretrain_gpt.py on one node (`node_rank` of several)."""
    line = torchrun(job, node_rank=node_rank)
    start = line.argv.index(job.script)
    script = job.script if job.script != "train.py" else SCRIPT
    env = process_environment(job)
    has_order = job.topology.accelerator.generation in ("volta", "ampere", "hopper")
    if has_order and (job.layout.tp > 1 or job.layout.cp > 1) and job.layout.sharding not in _STRATEGIES:
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return Command(argv=(*line.argv[:start], script, *arguments(job), *job.script_args), env=env)


def notes(job: TrainingJob) -> list[str]:
    """What Megatron-LM cannot do of the job, in words."""
    layout, found = job.layout, []
    if layout.schedule in ("zero_bubble", "gpipe"):
        found.append(f"schedule {layout.schedule}: Megatron-LM runs 1F1B or interleaved 1F1B")
    if layout.tuning != "full":
        found.append(f"{layout.tuning}: low-rank adapters are in Megatron-Bridge, not in pretrain_gpt.py")
    if layout.optimizer not in ("adam", "adamw", "sgd"):
        found.append(f"optimizer {layout.optimizer}: Megatron-LM has adam, sgd and muon")
    if layout.sharding == "hsdp":
        found.append("hsdp: written as distributed optimizer instances of one shard group each")
    if job.architecture is None:
        found.append("no model was given: add the network's own arguments")
        return found
    kinds = {group.attention.kind for group in job.architecture.groups}
    strange = kinds - {"full", "mla", "sliding", "none"}
    if strange:
        found.append(f"attention of kind {', '.join(sorted(strange))} is not built by pretrain_gpt.py's arguments")
    found.append("data and tokenizer are yours to add (--data-path, --tokenizer-type, --tokenizer-model)")
    return found


def model_arguments(architecture: Architecture, seq: int) -> list[str]:
    """The network's arguments."""
    groups = architecture.groups
    main = max(groups, key=lambda group: group.count)
    attention = main.attention
    dense = next((group for group in groups if group.feed_forward.kind == "dense"), main)
    gated = main.feed_forward.is_gated
    width = dense.feed_forward.width or main.feed_forward.width
    found = ["--num-layers", str(architecture.layers), "--hidden-size", str(architecture.hidden)]
    found += ["--ffn-hidden-size", str(width), "--max-position-embeddings", str(max(architecture.context, seq))]
    found += ["--num-attention-heads", str(attention.heads)]
    if attention.kind == "mla":
        found += _mla(main)
    else:
        found += ["--kv-channels", str(attention.head_dim)]
        if attention.kv_heads != attention.heads:
            found += ["--group-query-attention", "--num-query-groups", str(attention.kv_heads)]
    if attention.window and attention.kind == "sliding":
        found += ["--window-size", f"{attention.window - 1},0"]
    found += ["--position-embedding-type", "learned_absolute" if architecture.positions else "rope"]
    found += ["--normalization", "LayerNorm" if main.norm == "layer" else "RMSNorm"]
    found += ["--swiglu"] if gated else []
    if not main.feed_forward.has_bias:
        found.append("--disable-bias-linear")
        found += ["--add-qkv-bias"] if attention.has_bias else []
    found += ["--qk-layernorm"] if attention.qk_norm != "none" else []
    found += [] if architecture.is_tied else ["--untie-embeddings-and-output-weights"]
    found += ["--vocab-size", str(architecture.vocab)]
    if architecture.mtp_layers:
        found += ["--mtp-num-layers", str(architecture.mtp_layers)]
    return found + _experts(architecture)


def _parallel(job: TrainingJob) -> list[str]:
    """Degrees of parallelism and their overlap."""
    layout = job.layout
    found = ["--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp)]
    if layout.pp > 1 and layout.virtual_stages > 1:
        found += ["--num-virtual-stages-per-pipeline-rank", str(layout.virtual_stages)]
    if layout.pp > 1 and layout.partition == "layers_and_embedding":
        found += ["--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"]
    if layout.cp > 1:
        found += ["--context-parallel-size", str(layout.cp)]
    if layout.ep > 1:
        found += ["--expert-model-parallel-size", str(layout.ep)]
        found += ["--expert-tensor-parallel-size", str(layout.expert_tp or 1)]
    if layout.has_sequence_parallel and layout.tp > 1:
        found.append("--sequence-parallel")
    if layout.sharding in ("zero1", "hsdp"):
        found += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if layout.sharding == "hsdp":
        group = layout.shard_group or job.gpus_per_node
        found += ["--num-distributed-optimizer-instances", str(max(1, layout.dp * layout.cp // group))]
    if layout.sharding in _STRATEGIES:
        found += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", _STRATEGIES[layout.sharding]]
        found += ["--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor", "--init-model-with-meta-device"]
    if job.is_cpu:
        found += ["--distributed-backend", "gloo"]
    return found


def _precision(job: TrainingJob) -> list[str]:
    """The number formats."""
    layout = job.layout
    if layout.precision in ("fp32", "tf32"):
        return []
    if layout.precision == "fp16":
        return ["--fp16"]
    found = ["--bf16"]
    if layout.precision in ("fp8", "mxfp8"):
        recipe = "mxfp8" if layout.precision == "mxfp8" else "delayed"
        found += ["--fp8-format", "e4m3" if recipe == "mxfp8" else "hybrid", "--fp8-recipe", recipe]
    if layout.precision in ("fp4", "nvfp4"):
        found += ["--fp4-format", "e2m1", "--fp4-recipe", "nvfp4"]
    if layout.grad_bytes == 2:
        found.append("--grad-reduce-in-bf16")
    return found


def _memory(job: TrainingJob) -> list[str]:
    """Recompute, attention kernel and offload."""
    layout = job.layout
    found: list[str] = []
    if layout.recompute == "full":
        found += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    if layout.recompute == "selective":
        found += ["--recompute-granularity", "selective"]
    found += ["--attention-backend", "flash" if layout.has_flash_attention else "unfused"]
    if layout.offload in ("optimizer", "optimizer_and_weights"):
        found.append("--optimizer-cpu-offload")
    if layout.optimizer == "sgd":
        found += ["--optimizer", "sgd"]
    return found


def _mla(group: LayerGroup) -> list[str]:
    """Multi-head latent attention."""
    attention = group.attention
    found = ["--multi-latent-attention", "--kv-lora-rank", str(attention.kv_rank)]
    if attention.q_rank:
        found += ["--q-lora-rank", str(attention.q_rank)]
    found += ["--qk-head-dim", str(attention.nope_dim), "--qk-pos-emb-head-dim", str(attention.rope_dim)]
    return [*found, "--v-head-dim", str(attention.value_dim or attention.head_dim)]


def _experts(architecture: Architecture) -> list[str]:
    """Mixture of experts: counts, widths, and which layers have them."""
    chosen = next((group for group in architecture.groups if group.feed_forward.kind == "moe"), None)
    if chosen is None:
        return []
    part = chosen.feed_forward
    found = ["--num-experts", str(part.experts), "--moe-router-topk", str(part.active)]
    found += ["--moe-ffn-hidden-size", str(part.width), "--moe-token-dispatcher-type", "alltoall", "--moe-grouped-gemm"]
    if part.shared_width:
        found += ["--moe-shared-expert-intermediate-size", str(part.shared_width)]
    pattern = [(1 if group.feed_forward.kind == "moe" else 0, group.count) for group in architecture.groups]
    if any(kind == 0 for kind, _ in pattern):
        text = "+".join(f"[{kind}]*{count}" for kind, count in pattern)
        found += ["--moe-layer-freq", f"({text})"]
    return found
