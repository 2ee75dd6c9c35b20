"""Measured serving points in the planner's words.

A published row says its parallelism in the words of the tool that wrote it; `question_of` turns them into one engine's
layout and the number of requests in flight, by rules that hold for whole sources, never for single rows or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from head.planner.hardware.accelerators import accelerator
from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture
from head.planner.model.presets import lookup
from head.planner.serving.engine_step import ServingLayout, bits_of

_WEIGHTS = {"fp4": "nvfp4", "float16": "bf16", "bfloat16": "bf16", "fp16": "bf16"}


class ServingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One measured point. mode: agg, disagg (decode engine's layout, prefill's beside it) or offline (all queued)."""

    id: str
    source: str
    model: str
    system: str
    mode: str  # "disagg?": numbers of workers not known
    backend: str
    version: str
    weights: str
    layout: ServingLayout
    prefill_layout: ServingLayout | None
    sequences: float  # offered to one decode engine; 0: as many as fit
    prompts: float  # offered to one prefill engine
    isl: int
    osl: int
    tpot_s: float
    ttft_s: float  # 0: not measured
    prefill_workers: int = 0  # of a disaggregated row; 0: not known
    decode_workers: int = 0


def layout_of(conditions: Mapping[str, Any], prefix: str = "") -> ServingLayout:
    """The engine's layout.

    Four habits of the sources: a tensor degree above eight with whole experts counts the GPUs of a wide deployment,
    whose attention is data-parallel and whose experts are spread; equal moe_tp and moe_ep whose product is tp*dp name
    the same ranks twice; tp equal to attention_dp with moe_ep their product likewise (attention is then
    data-parallel); a missing attention_dp follows from the experts' degrees.
    """

    def degree(name: str, default: int = 1) -> int:
        return int(conditions.get(prefix + name) or default)

    tp, dp, pp = degree("tp_size"), degree("attention_dp_size", 0), degree("pp_size")
    expert_tp, ep = degree("moe_tp_size"), degree("moe_ep_size")
    if tp > 8 and ep == 1 and expert_tp == tp:
        return ServingLayout(tp=1, dp=tp, ep=tp, pp=pp)
    if expert_tp == ep > 1 and tp * max(dp, 1) == expert_tp * ep:
        return ServingLayout(tp=1 if dp > 1 else ep, dp=ep if dp > 1 else 1, ep=ep, pp=pp)
    if tp == dp > 1 and ep == tp * dp:
        return ServingLayout(tp=1, dp=dp, ep=dp, pp=pp)
    dp = dp or max(1, expert_tp * ep // tp)
    return ServingLayout(tp=tp, dp=dp, ep=max(1, min(ep, tp * dp)), pp=pp)


def weights_of(conditions: Mapping[str, Any]) -> str:
    """The number format: as stated, else as the checkpoint's name ends, else 16 bits."""
    stated = conditions.get("gemm_quant_mode") or conditions.get("precision") or conditions.get("weights")
    if not stated:
        name = str(conditions.get("model_path", "")).upper()
        stated = "nvfp4" if "FP4" in name else "fp8" if "FP8" in name else "bf16"
    return _WEIGHTS.get(str(stated).lower(), str(stated).lower())


def cache_dtype_of(weights: str, arch: Architecture) -> str:
    """Published runs of quantised checkpoints keep an 8-bit cache, as their recipes say; mxfp4 ones a 16-bit one."""
    return "bf16" if bits_of(arch, weights) >= 16 or arch.quantisation == "mxfp4" else "fp8"


def question_of(row: Mapping[str, Any]) -> ServingRow:
    """A row of the serving truth set (aggregated or disaggregated).

    Requests in flight: the row's batch size, or its concurrency when attention is data-parallel; a disaggregated row
    without worker counts is read as one worker of each kind.
    """
    c = row["conditions"]
    source = str(row.get("source", ""))
    found = re.search(r"silicon_concurrency=(\d+)", source)
    offered = float(found[1]) if found else 0.0
    is_disagg = c.get("mode") == "disagg"
    layout = layout_of(c, "decode_" if is_disagg else "")
    prefill = layout_of(c, "prefill_") if is_disagg else None
    if is_disagg:
        workers = float(c.get("decode_num_workers") or 1)
        sequences = max(1.0, (offered or float(c.get("decode_batch_size") or 1) * workers) / workers)
        prompts = max(1.0, (offered or sequences * workers) / float(c.get("prefill_num_workers") or 1))
    else:
        batch = float(c.get("batch_size") or 0)
        sequences = (offered or batch * layout.dp) if layout.dp > 1 else (batch or offered)
        sequences = prompts = max(1.0, sequences)
    return ServingRow(
        id=str(row["id"]),
        source=source.split(";")[0],
        model=str(c["model_path"]),
        system=str(c["system"]),
        mode=("disagg" if c.get("decode_num_workers") else "disagg?") if is_disagg else "agg",
        backend=str(c["backend"]),
        version=str(c.get("backend_version") or ""),
        weights=weights_of(c),
        layout=layout,
        prefill_layout=prefill,
        sequences=sequences,
        prompts=prompts,
        isl=int(c["isl"]),
        osl=int(c["osl"]),
        tpot_s=float(row["expected"]["tpot_ms"]) / 1e3,
        ttft_s=float(row["expected"]["ttft_ms"]) / 1e3,
        prefill_workers=int(c.get("prefill_num_workers") or 0),
        decode_workers=int(c.get("decode_num_workers") or 0),
    )


def offline_question_of(row: Mapping[str, Any]) -> ServingRow:
    """A row of an offline maximum-throughput table; tpot_s then holds GPU-seconds for each output token.

    The tables say how attention is split; experts are read as spread over the same ranks.
    """
    c = row["conditions"]
    parallel = str(c["parallel"])
    degrees = {key: int(value) for key, value in re.findall(r"(DEP|TEP|TP|PP|EP)(\d+)", parallel)}
    if wide := degrees.get("DEP"):
        layout = ServingLayout(dp=wide, ep=wide)
    else:
        tp = degrees.get("TP", degrees.get("TEP", 1))
        layout = ServingLayout(tp=tp, pp=degrees.get("PP", 1), ep=tp if lookup(str(c["model"])).is_moe else 1)
    return ServingRow(
        id=str(row["id"]),
        source=str(row["source"]["title"]),
        model=str(c["model"]),
        system=str(c["gpu"]),
        mode="offline",
        backend="trtllm",
        version="1.0" if "output_tokens_per_s_total" in row["expected"] else "newer",
        weights=weights_of(c),
        layout=layout,
        prefill_layout=None,
        sequences=0.0,
        prompts=0.0,
        isl=int(c["isl"]),
        osl=int(c["osl"]),
        tpot_s=1.0 / float(row["expected"]["output_tokens_per_s_per_gpu"]),
        ttft_s=0.0,
    )


def topology_of(row: ServingRow) -> Topology:
    """The machine of a row: its system's usual one, with as many GPUs as one engine has."""
    return topology_of_preset(accelerator(row.system).name, max(row.layout.gpus, 1))


def architecture_of_row(row: ServingRow) -> Architecture:
    """The row's model, without its checkpoint's own format (the row says it)."""
    return lookup(row.model)
