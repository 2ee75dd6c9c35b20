"""Published training runs, as their tables state them, made into questions the planner can answer.

`row_of` turns one row of a `training_runs.json` (the exchange form of such rows) into a `TrainingRow`: architecture,
topology, layout, stack and the measured step time. What a source leaves out follows fixed rules stated here, the same
for every source and model; a row that cannot be made into a question is `Unusable`, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from common.errors import HerderError
from head.planner.calibration.training_rows import RunDefaults, TrainingRow, named_architecture, run_defaults
from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.parameters import count
from head.planner.model.presets import lookup
from head.planner.training.layer_work import attention_width
from head.planner.training.layout import Recompute, Sharding, TrainingLayout

Resolve = Callable[[str], Architecture | None]
Defaults = Callable[[str], RunDefaults | None]

# Which software a source's runs used, by words of its title; `family` decides what is pooled.
_STACKS = (
    ("megatron-bridge", "megatron-bridge"),
    ("megatron bridge", "megatron-bridge"),
    ("nemo", "nemo"),
    ("mosaic", "mosaic"),
    ("llm foundry", "mosaic"),
    ("torchtitan", "torchtitan"),
    ("maxtext", "maxtext"),
    ("bigscience", "deepspeed"),
    ("deepspeed", "deepspeed"),
    ("mt-nlg", "deepspeed"),
    ("megatron", "megatron"),
    ("korthikanti", "megatron"),
    ("sc21", "megatron"),
)
# Fused attention is taken for granted except in what ran before it existed (Megatron-LM's papers, BLOOM).
_UNFUSED = ("2205.05198", "2104.04473", "2201.11990", "bigscience", "megatron-lm readme 2020")
_NO_SEQUENCE_PARALLEL = ("2104.04473", "2201.11990", "bigscience", "megatron-lm readme 2020")


class Unusable(Exception):
    """Why a row cannot be a question."""


def stack_of(title: str, section: str = "") -> str:
    """Name of the software, with its release where the source names one ("megatron-bridge@26.04")."""
    lower = title.lower()
    name = next((stack for word, stack in _STACKS if word in lower), "unknown")
    release = re.match(r"(\d\d\.\d\d)", section)
    return f"{name}@{release[1]}" if release and name == "megatron-bridge" else name


def rows_of(raw_rows: Iterable[Mapping[str, Any]]) -> tuple[list[TrainingRow], dict[str, str]]:
    """Rows of a document, and for those that cannot be questions the reason by id."""
    rows, refused = [], {}
    for raw in raw_rows:
        try:
            rows.append(row_of(raw))
        except Unusable as why:
            refused[str(raw.get("id"))] = str(why)
    return rows, refused


def resolve_name(name: str) -> Architecture | None:
    """The architecture of a name in a table: as training tables use it, then as the presets know it."""
    found = named_architecture(name)
    if found is not None:
        return found
    try:
        return lookup(name)
    except HerderError:
        return None


def row_of(raw: Mapping[str, Any], resolve: Resolve = resolve_name, defaults: Defaults = run_defaults) -> TrainingRow:
    """One row of the exchange form as a question with its measured answer.

    Raises: Unusable when dimensions, batch or time are missing, or the row says itself that it contradicts itself.
    """
    if "gpu_hours" in raw["expected"] or raw["expected"].get("oom"):
        raise Unusable("GPU hours and out-of-memory runs say nothing of a step's time")
    source, hardware = raw["source"], raw["hardware"]
    raw = _with_defaults(raw, defaults(str(raw["model"]["name"])))
    arch = _architecture(raw, resolve)
    topology = _topology(hardware, raw["parallel"])
    layout = _layout(raw, arch, topology)
    seconds = _seconds(raw, layout, arch, topology)
    return TrainingRow(
        id=str(raw["id"]),
        source=str(source["title"]),
        url=str(source.get("url") or ""),
        model=str(raw["model"]["name"]),
        architecture=arch,
        stack=stack_of(str(source["title"]), str(source.get("section") or "")),
        accelerator=topology.accelerator.name,
        gpus=topology.gpus,
        nic_gbit_per_s=topology.nic_bytes_per_s * 8 / 1e9,
        layout=layout,
        step_s=seconds,
        is_usable=bool(raw.get("usable", True)),
        flags=tuple(raw.get("flags") or ()),
        provenance=str(raw.get("provenance") or ""),
    )


def _with_defaults(raw: Mapping[str, Any], known: RunDefaults | None) -> Mapping[str, Any]:
    """The row with what its source's own configuration states, where the table leaves it out."""
    if known is None or raw["train"].get("seq"):
        return raw
    train = {**raw["train"], "seq": known.seq, "mbs": known.micro_batch, "recompute": known.recompute}
    train["gbs"] = known.micro_batch * int(raw["hardware"]["gpus"])
    return {**raw, "train": train}


def _architecture(raw: Mapping[str, Any], resolve: Resolve) -> Architecture:
    model = raw["model"]
    needed = ("layers", "hidden", "heads", "ffn", "vocab")
    if all(model.get(field) for field in needed):
        return _of_dimensions(model)
    names = [str(name) for name in (model.get("hf"), model["name"]) if name]
    names += [re.sub(r"\s*\(.*\)", "", name) for name in names]
    for name in names:
        found = resolve(name)
        if found is not None:
            return found
    raise Unusable(f"the dimensions of {model['name']!r} are not known")


def _of_dimensions(model: Mapping[str, Any]) -> Architecture:
    head_dim = model.get("head_dim") or model["hidden"] / model["heads"]
    is_gated = bool(model.get("gated"))
    return Architecture(
        name=str(model["name"]),
        hidden=int(model["hidden"]),
        vocab=int(model["vocab"]),
        is_tied=bool(model.get("tied", False)),
        groups=(
            LayerGroup(
                count=int(model["layers"]),
                attention=Attention(
                    heads=int(model["heads"]),
                    kv_heads=int(model.get("kv_heads") or model["heads"]),
                    head_dim=int(head_dim),
                ),
                feed_forward=FeedForward(width=int(model["ffn"]), is_gated=is_gated),
                norm="rms" if is_gated else "layer",
            ),
        ),
    )


def _topology(hardware: Mapping[str, Any], parallel: Mapping[str, Any]) -> Topology:
    name, gpus = str(hardware["gpu"]), hardware.get("gpus") or parallel.get("gpus")
    if not gpus:
        raise Unusable("the number of GPUs is not stated")
    # An 8-GPU board keeps its form when a table writes only the family (H100, B200, B300).
    per_node = int(hardware.get("gpus_per_node") or 0)
    nic = _nic_gbit(str(hardware.get("internode") or ""), per_node or 8)
    try:
        found = topology_of_preset(name, int(gpus), nic_gbit_per_s=nic)
    except HerderError as error:
        raise Unusable(str(error)) from None
    return found


def _nic_gbit(text: str, gpus_per_node: int) -> float | None:
    """Gbit/s per GPU from words like "4x Omni-Path 100 Gb/s per node" or "1600 Gbps/node RoCE"."""
    if "not stated" in text:
        return None
    if found := re.search(r"(\d+)x\s*\D*?(\d+)\s*Gb/?p?s", text):
        return float(found[1]) * float(found[2]) / gpus_per_node
    if found := re.search(r"(\d+)\s*Gbps/node", text):
        return float(found[1]) / gpus_per_node
    if found := re.search(r"(\d+)\s*Gb/s \S+ per GPU", text):
        return float(found[1])
    return None


def _precision(text: str) -> str:
    lower = text.lower()
    for word, name in (("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("fp8-mx", "mxfp8"), ("fp8", "fp8"), ("bf16", "bf16")):
        if lower.startswith(word) or f"_{word}" in lower:
            return name
    return "fp16" if "fp16" in lower else "bf16"


def _recompute(text: str | None) -> Recompute:
    lower = (text or "none").lower()
    if lower == "full":
        return "full"
    return "selective" if "selective" in lower or "sac" in lower else "none"


def _layout(raw: Mapping[str, Any], arch: Architecture, topology: Topology) -> TrainingLayout:
    parallel, train, source = raw["parallel"], raw["train"], raw["source"]
    words = f"{source['title']} {source.get('url') or ''} {source.get('arxiv') or ''}".lower()
    tp, pp, cp = (int(parallel.get(name) or 1) for name in ("tp", "pp", "cp"))
    ep = int(parallel.get("ep") or 1) if arch.is_moe else 1
    dp = topology.gpus // (tp * pp * cp)
    if tp * pp * cp * dp != topology.gpus:
        raise Unusable("the degrees do not multiply to the number of GPUs")
    seq = train.get("seq")
    if not seq:
        raise Unusable("the sequence length is not stated")
    micro = train.get("mbs") or (1 if pp > 1 else train.get("local_batch"))
    batch = train.get("gbs") or (train.get("local_batch") or 0) * dp
    if not batch:
        raise Unusable("the batch is not stated")
    if not micro:  # not stated: one sequence with a pipeline, otherwise up to 4
        micro = 1 if pp > 1 else max(1, min(4, int(batch) // dp))
    task = str(train.get("task") or "pretrain")
    virtual = int(parallel.get("vp") or 1) if pp > 1 else 1
    schedule = str(parallel.get("schedule") or "")
    if schedule.lower().startswith("interleaved") and virtual == 1:
        virtual = 2
    recompute = _recompute(train.get("recompute"))
    is_unfused = any(word in words for word in _UNFUSED)
    has_sequence = parallel.get("sp") is not False and not any(word in words for word in _NO_SEQUENCE_PARALLEL)
    return TrainingLayout(
        tp=tp,
        pp=pp,
        virtual_stages=virtual,
        cp=cp,
        ep=ep,
        dp=dp,
        has_sequence_parallel=has_sequence,
        sharding=_sharding(parallel, train),
        schedule="interleaved" if virtual > 1 else "1f1b",
        global_batch=int(batch),
        micro_batch=int(micro),
        seq=int(seq),
        precision=_precision(str(train.get("precision") or "bf16")),
        grad_bytes=2 if "fp16 grad" in str(train.get("precision")) or _is_sharded(parallel) else 4,
        recompute=recompute,
        has_flash_attention=not is_unfused,
        tuning="lora" if task == "lora" else "full",
        partition=_partition(parallel, arch, pp * virtual),
    )


def _partition(
    parallel: Mapping[str, Any], arch: Architecture, chunks: int
) -> Literal["layers", "layers_and_embedding"]:
    """As stated; otherwise layers that do not divide evenly were cut with embedding and head counted as layers."""
    stated = str(parallel.get("pp_partition") or "")
    if stated:
        return "layers_and_embedding" if "embedding" in stated else "layers"
    return "layers" if (arch.layers + arch.mtp_layers) % chunks == 0 else "layers_and_embedding"


def _is_sharded(parallel: Mapping[str, Any]) -> bool:
    stage = parallel.get("zero_stage")
    return bool(_fsdp(parallel)) or stage == 3


def _fsdp(parallel: Mapping[str, Any]) -> int:
    found = re.match(r"\d+", str(parallel.get("fsdp") or "0"))
    return int(found[0]) if found else 0


def _sharding(parallel: Mapping[str, Any], train: Mapping[str, Any]) -> Sharding:
    if parallel.get("sharding") == "SHARD_GRAD_OP":
        return "zero2"
    if _fsdp(parallel) > 1 or parallel.get("zero_stage") == 3:
        return "fsdp"
    if parallel.get("zero_stage") == 0:
        return "none"
    return "zero1"


def _seconds(raw: Mapping[str, Any], layout: TrainingLayout, arch: Architecture, topology: Topology) -> float:
    expected = raw["expected"]
    for field in ("iter_time_s", "derived_iter_time_s"):
        if expected.get(field):
            return float(expected[field])
    if expected.get("tokens_per_s_per_gpu"):
        tokens = layout.global_batch * layout.seq
        return float(tokens / (expected["tokens_per_s_per_gpu"] * topology.gpus))
    if expected.get("mfu"):
        # Attention counted whole, as tables did before the causal half became usual.
        flops = 6.0 * count(arch).active + _whole_attention_flops(arch, layout.seq)
        peak = topology.accelerator.peak_flops(layout.precision) * topology.gpus
        return float(flops * layout.global_batch * layout.seq / (expected["mfu"] * peak))
    raise Unusable("no step time and nothing to derive it from")


def _whole_attention_flops(arch: Architecture, seq: int) -> float:
    """Training FLOPs of attention per token, no half masked."""
    return sum(6.0 * group.count * attention_width(group.attention) * seq for group in arch.groups)
