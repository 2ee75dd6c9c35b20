"""Published memory figures in their exchange form, made into questions.

`row_of` turns a measured peak (or an out-of-memory) into a MemoryRow; `analytic` recomputes rows that are arithmetic
themselves (ZeRO's table, Megatron's bytes per parameter, Korthikanti's figures, copies per layer). What a source leaves
out follows rules by the program it used, stated here, never by the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from common.errors import HerderError
from head.planner.calibration.memory_rows import MemoryRow
from head.planner.hardware.accelerators import GIB
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup, NormKind
from head.planner.model.hf_config import architecture_of_config
from head.planner.model.presets import lookup
from head.planner.training.layout import Recompute, TrainingLayout, Tuning

Resolve = Callable[[str], Architecture | None]
_TUNINGS: dict[str, Tuning] = {"lora": "lora", "qlora": "qlora"}


class Unusable(Exception):
    """Why a row cannot be a question."""


@cache
def known_models() -> dict[str, Architecture]:
    """Models that the measured rows name without dimensions, from their public configurations."""
    text = resources.files("head.planner").joinpath("data", "memory_models.json").read_bytes()
    return {name: architecture_of_config(config, name) for name, config in msgspec.json.decode(text).items()}


def row_of(row: Mapping[str, Any], resolve: Resolve | None = None) -> MemoryRow:
    """A measured peak as a question. Raises: Unusable with the reason."""
    if row["kind"] != "peak_training_memory":
        raise Unusable(f"a row of kind {row['kind']} is no measured peak")
    if not row.get("usable", True):
        raise Unusable("the source contradicts itself")
    title, conditions = str(row["source"]["title"]), row["conditions"]
    try:
        if "quant" in conditions:
            return _finetuning_row(row, resolve)
        if "hardware" in conditions and isinstance(conditions["hardware"], str):
            return _recipe_row(row, resolve)
        return _run_row(row, title, resolve)
    except HerderError as exc:
        raise Unusable(exc.message) from exc
    except (KeyError, TypeError, ValueError) as exc:
        raise Unusable(f"{type(exc).__name__}: {exc}") from exc


def gpt(
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocab: int,
    ffn: int = 0,
    kv_heads: int = 0,
    is_gated: bool = False,
    is_tied: bool = True,
    positions: int = 0,
    name: str = "gpt",
) -> Architecture:
    """A GPT block (LayerNorm, biases, plain feed-forward) or a gated one (RMS norm, no biases)."""
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=hidden // heads,
        has_bias=not is_gated,
        has_output_bias=not is_gated,
    )
    feed = FeedForward(width=ffn or 4 * hidden, is_gated=is_gated, has_bias=not is_gated)
    norm: NormKind = "rms" if is_gated else "layer"
    group = LayerGroup(count=layers, attention=attention, feed_forward=feed, norm=norm)
    return Architecture(
        name=name, hidden=hidden, vocab=vocab, groups=(group,), is_tied=is_tied, positions=positions, final_norm=norm
    )


def model_of(model: Any, resolve: Resolve | None) -> Architecture:
    """The architecture that a row means: its dimensions, or the public ones of its name."""
    name = model if isinstance(model, str) else str(model.get("name", ""))
    if isinstance(model, Mapping) and all(model.get(key) for key in ("layers", "hidden", "heads", "vocab")):
        return gpt(
            layers=model["layers"],
            hidden=model["hidden"],
            heads=model["heads"],
            vocab=model["vocab"],
            ffn=model.get("ffn") or 0,
            kv_heads=model.get("kv_heads") or 0,
            is_gated=bool(model.get("gated")),
            is_tied=bool(model.get("tied", True)),
            name=name,
        )
    found = known_models().get(name) or (resolve(name) if resolve else None)
    return found or lookup(name)


def _finetuning_row(row: Mapping[str, Any], resolve: Resolve | None) -> MemoryRow:
    """LitGPT's tables: one process per GPU, bf16, peaks of torch.cuda.max_memory_allocated in 1e9 bytes.

    On several GPUs it shards with FSDP and checkpoints every block; on one it does neither.
    """
    conditions, expected = row["conditions"], row["expected"]
    arch, gpus, method = model_of(conditions["model"], resolve), int(conditions["gpus"]), str(conditions["method"])
    adapter = {"adapter": "litgpt-adapter", "adapter_v2": "litgpt-adapter-v2"}.get(method.split("-")[0], "litgpt")
    quant = str(conditions.get("quant") or "none")
    is_full = method.startswith("full")
    layout = TrainingLayout(
        dp=gpus,
        global_batch=gpus * int(conditions["mbs"]),
        micro_batch=int(conditions["mbs"]),
        seq=int(conditions["longest_seq"]),
        sharding="fsdp" if gpus > 1 else "none",
        recompute="full" if gpus > 1 else "none",
        tuning="full" if is_full else ("lora" if quant == "none" else "qlora"),
        lora_rank=8,
        grad_bytes=2,
        has_sequence_parallel=False,
        has_double_quant=quant.endswith("-dq"),
    )
    return _made(row, arch, layout, adapter, "allocated", str(conditions["gpu"]), expected.get("peak_gpu_ram_gb"), 1e9)


def _recipe_row(row: Mapping[str, Any], resolve: Resolve | None) -> MemoryRow:
    """torchtune's table ("1x A6000"): its recipes checkpoint every block, that for LoRA on one big card does not."""
    conditions, expected = row["conditions"], row["expected"]
    arch, method = model_of(conditions["model"], resolve), str(conditions["method"])
    words = re.match(r"(\d+)x\s*(.+)", conditions["hardware"])
    if words is None:
        raise Unusable("the hardware is not said as NxNAME")
    gpus, device = int(words[1]), {"A100": "A100-SXM-80GB", "A6000": "RTX A6000"}.get(words[2], words[2])
    # full training on one GPU: an 8-bit optimizer that steps in the backward pass, paged to the host on a 4090
    is_single = method == "full" and gpus == 1
    optimizer = ("paged_adamw_8bit" if "4090" in device else "adamw_8bit") if is_single else "adamw"
    is_offloaded = "offload" in str(conditions.get("note", "")).lower()
    layout = TrainingLayout(
        dp=gpus,
        global_batch=gpus * int(conditions["batch"]),
        micro_batch=int(conditions["batch"]),
        seq=int(conditions["seq"]),
        sharding="fsdp" if gpus > 1 else "none",
        recompute="none" if method == "lora" and gpus == 1 and "4090" not in device else "full",
        tuning=_TUNINGS.get(method, "full"),
        lora_rank=8,
        grad_bytes=2,
        optimizer=optimizer,
        offload="optimizer_and_weights" if is_offloaded else "none",
        has_double_quant=method == "qlora",
        has_sequence_parallel=False,
    )
    unit = 1e9 if expected.get("unit") == "GB" else GIB
    return _made(
        row,
        arch,
        layout,
        "torchtune-single" if is_single else "torchtune",
        "allocated",
        device,
        expected.get("peak_mem"),
        unit,
    )


def _run_row(row: Mapping[str, Any], title: str, resolve: Resolve | None) -> MemoryRow:
    """A pre-training run: degrees in `parallel`, batches in `train`."""
    conditions, expected = row["conditions"], row["expected"]
    parallel, train, hardware = conditions["parallel"], conditions["train"], conditions["hardware"]
    arch = model_of(conditions["model"], resolve)
    tp, pp, cp = (int(parallel.get(key) or 1) for key in ("tp", "pp", "cp"))
    gpus = int(hardware["gpus"])
    dp = int(parallel.get("dp") or max(1, gpus // (tp * pp * cp)))
    is_fsdp = bool(parallel.get("fsdp")) or str(parallel.get("sharding", "")).upper() in ("FULL_SHARD", "FSDP")
    zero = parallel.get("zero_stage")
    micro = int(train.get("mbs") or 0) or max(1, int(train.get("local_batch") or 1) // pp)
    batch = int(train.get("gbs") or 0) or dp * int(train.get("local_batch") or micro)
    text = str(train.get("precision", "bf16"))
    sharding = "fsdp" if is_fsdp else {0: "none", 1: "zero1", 2: "zero2", 3: "zero3"}.get(zero or 0, "zero1")
    recompute: Recompute = train["recompute"] if train.get("recompute") in ("none", "selective", "full") else "none"
    is_deepspeed = "bigscience" in title.lower() or "deepspeed" in title.lower()
    layout = TrainingLayout(
        tp=tp,
        pp=pp,
        cp=cp,
        ep=int(parallel.get("ep") or 1),
        dp=dp,
        virtual_stages=int(parallel.get("vp") or 1),
        schedule="interleaved" if int(parallel.get("vp") or 1) > 1 else "1f1b",
        sharding=sharding,  # type: ignore[arg-type]
        global_batch=max(batch, micro * dp),
        micro_batch=micro,
        seq=int(train["seq"]),
        precision=text.split()[0].lower(),
        grad_bytes=2 if "fp16 grad" in text or text == "fp16" else 4,
        recompute=recompute,
        has_flash_attention=not is_deepspeed,
        has_sequence_parallel=not is_deepspeed,
        partition="layers_and_embedding" if "embedding" in str(parallel.get("pp_partition", "")) else "layers",
    )
    stack = "deepspeed" if is_deepspeed else ("fsdp" if is_fsdp else "megatron")
    measure = "device" if is_deepspeed or not is_fsdp else "reserved"
    peak = expected.get("peak_mem_gib", expected.get("peak_mem_gb"))
    return _made(row, arch, layout, stack, measure, _device(str(hardware["gpu"])), peak, GIB)


def _device(name: str) -> str:
    # cards of one cloud with more or slower memory than sold: the plain part with that memory
    return "H100-SXM-96GB" if "96GB" in name else re.sub(r"\s*\(.*\)", "", name)


def _made(
    row: Mapping[str, Any],
    arch: Architecture,
    layout: TrainingLayout,
    stack: str,
    measure: Any,
    device: str,
    peak: Any,
    unit: float,
) -> MemoryRow:
    is_oom = bool(row["expected"].get("oom")) or not isinstance(peak, int | float)
    return MemoryRow(
        id=row["id"],
        source=row["source"]["title"],
        url=row["source"].get("url", ""),
        architecture=arch,
        layout=layout,
        stack=stack,
        measure=measure,
        accelerator=device,
        gpus=layout.gpus,
        peak_bytes=0.0 if is_oom else float(peak) * unit,
        is_oom=is_oom,
        provenance=row.get("provenance", ""),
    )
