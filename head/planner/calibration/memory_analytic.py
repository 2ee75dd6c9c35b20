"""Published memory figures that are arithmetic themselves, recomputed by the planner's own functions.

ZeRO's table of model states, Megatron's bytes per parameter, Korthikanti's figures of activations and of states, sizes
of checkpoints, and copies of the hidden state that one eager layer allocates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from head.planner.calibration.memory_truth import Resolve, Unusable, gpt, model_of
from head.planner.hardware.accelerators import GIB
from head.planner.model.parameters import count
from head.planner.model.presets import lookup
from head.planner.training.layout import Sharding, TrainingLayout
from head.planner.training.memory import state_parts
from head.planner.training.memory_layers import copies_per_layer, model_facts
from head.planner.training.memory_stack import STACKS, MemoryStack
from head.planner.training.memory_stages import Stage, stage_activations, stages
from head.planner.training.memory_states import shard_ways, state_bytes

_STAGES: dict[int, Sharding] = {0: "none", 1: "zero1", 2: "zero2", 3: "zero3"}
# What each technique of Korthikanti et al. 2022, figure 7, switches on: (sequence parallelism, recomputation).
_TECHNIQUES: dict[str, tuple[bool, str]] = {
    "none": (False, "none"),
    "seq": (True, "none"),
    "sel": (False, "selective"),
    "seqsel": (True, "selective"),
    "full": (False, "full"),
}


class Analytic(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: what the source states and what we compute, in the source's unit."""

    id: str
    kind: str
    unit: str
    stated: float
    computed: float

    @property
    def error(self) -> float:
        """Computed over stated, less one."""
        return self.computed / self.stated - 1


def analytic(row: Mapping[str, Any], resolve: Resolve | None = None) -> list[Analytic]:
    """Every figure of an analytic row. Raises: Unusable for a row of another kind."""
    kind, conditions, expected = str(row["kind"]), row["conditions"], row["expected"]
    compute = {
        "model_states_analytic": _model_states,
        "bytes_per_param": _bytes_per_param,
        "activation_memory": _activations,
        "weights_grads_optimizer": _layer_states,
        "activation_memory_percent_of_tp_baseline": _percent,
        "checkpoint_size": _checkpoint,
    }.get(kind)
    if kind == "activation_copies_per_layer_measured":
        arch = model_of(conditions["model"], resolve)
        found = [("copies", float(expected["copies"]), copies_per_layer(arch, arch.groups[-1]))]
    elif compute is None:
        raise Unusable(f"no memory is stated in a row of kind {kind}")
    else:
        found = compute(conditions, expected)
    return [Analytic(id=row["id"], kind=kind, unit=unit, stated=stated, computed=ours) for unit, stated, ours in found]


Figures = list[tuple[str, float, float]]


def sharded_bytes_per_param(layout: TrainingLayout, stack: MemoryStack) -> float:
    """Bytes of model states per parameter on one GPU, data-parallel sharding included."""
    each = state_bytes(layout, stack)
    ways = shard_ways(layout, layout.dp * layout.cp, 8)
    return each.weights / ways[0] + each.gradients / ways[1] + (each.optimizer + each.extra_sharded) / ways[2]


def paper_activation_bytes(layout: TrainingLayout, *, layers: int, hidden: int, heads: int) -> float:
    """Activations of the first stage as Korthikanti et al. 2022 count them: no embeddings, no logits."""
    arch = gpt(layers=layers, hidden=hidden, heads=heads, vocab=51200)
    stack = STACKS["megatron-2022"]
    stage = msgspec.structs.replace(stages(model_facts(arch), layout)[0], has_first=False)
    return stage_activations(arch, layout, stack, stage).kept


def _model_states(conditions: Mapping[str, Any], expected: Mapping[str, Any]) -> Figures:
    layout = TrainingLayout(
        dp=int(conditions["dp"]),
        sharding=_STAGES[int(conditions["zero_stage"])],
        global_batch=int(conditions["dp"]),
        grad_bytes=2,
        precision="fp16",
    )
    ours = conditions["params_b"] * sharded_bytes_per_param(layout, STACKS["megatron"])
    return [("GB", float(expected["model_states_gb"]), ours)]


def _bytes_per_param(conditions: Mapping[str, Any], expected: Mapping[str, Any]) -> Figures:
    """fp16 gradients: Megatron keeps them beside an fp32 copy when the optimizer is not distributed."""
    words = str(conditions["dtypes"])
    is_fp32, narrow = words.startswith("fp32"), "fp16 grads" in words or "bf16 grads" in words
    terms = re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*/\s*d\s*", str(expected["distributed"]))
    if terms is None:
        raise Unusable("the distributed bytes are no a+b/d")
    if is_fp32:  # parameters and gradients in fp32; the moments alone are distributed
        base = TrainingLayout(precision="fp32", sharding="zero1", dp=1)
    else:
        base = TrainingLayout(precision="fp16", sharding="zero1", dp=1, grad_bytes=2 if narrow else 4)
    # fp16 gradients are summed in fp16 and copied to fp32 for the optimizer, which shards that copy as well
    stack = msgspec.structs.replace(STACKS["megatron"], fp32_partition_copies=1) if narrow else STACKS["megatron"]
    found: Figures = [("bytes/param", float(expected["non_distributed"]), sharded_bytes_per_param(base, stack))]
    for dp in (4, 64):
        stated = float(terms[1]) + float(terms[2]) / dp
        found.append(
            (
                "bytes/param",
                stated,
                sharded_bytes_per_param(msgspec.structs.replace(base, dp=dp, global_batch=dp), stack),
            )
        )
    return found


def _activations(conditions: Mapping[str, Any], expected: Mapping[str, Any]) -> Figures:
    words = str(conditions["recompute"])
    layout = _paper_layout(conditions, "sp" in words.split("+"), words.split("+")[0])
    ours = paper_activation_bytes(
        layout, layers=conditions["layers"], hidden=conditions["hidden"], heads=conditions["heads"]
    )
    return [("GiB", float(expected["activation_gib"]), ours / GIB)]


def _percent(conditions: Mapping[str, Any], expected: Mapping[str, Any]) -> Figures:
    is_sequence, recompute = _TECHNIQUES[conditions["technique"]]
    dims = {"layers": 1, "hidden": conditions["hidden"], "heads": conditions["heads"]}
    ours = paper_activation_bytes(_paper_layout(conditions, is_sequence, recompute), **dims)
    baseline = paper_activation_bytes(_paper_layout(conditions, False, "none"), **dims)
    return [("%", float(expected["percent"]), 100 * ours / baseline)]


def _paper_layout(conditions: Mapping[str, Any], is_sequence: bool, recompute: str) -> TrainingLayout:
    stages_count, micro = int(conditions.get("pp") or 1), int(conditions.get("mbs") or 1)
    virtual = int(conditions.get("interleave") or 1)
    if recompute not in ("none", "selective", "full"):
        raise Unusable(f"recomputation {recompute!r} is not known")
    return TrainingLayout(
        tp=int(conditions["tp"]),
        pp=stages_count,
        virtual_stages=virtual,
        schedule="interleaved" if virtual > 1 else "1f1b",
        has_sequence_parallel=is_sequence,
        recompute=recompute,  # type: ignore[arg-type]
        has_flash_attention=False,
        micro_batch=micro,
        global_batch=micro * stages_count * 8,
        seq=int(conditions["seq"]),
        sharding="none",
        precision="fp16",
    )


def _layer_states(conditions: Mapping[str, Any], expected: Mapping[str, Any]) -> Figures:
    """Weights, gradients and optimizer of a stage's layers; the figure leaves embeddings out."""
    arch = gpt(
        layers=conditions["layers"],
        hidden=conditions["hidden"],
        heads=conditions.get("heads") or conditions["hidden"] // 128,
        vocab=conditions["vocab"],
    )
    layout = TrainingLayout(tp=conditions["tp"], pp=conditions["pp"], sharding="none")
    stage = Stage(
        name="layers",
        layers=(conditions["layers"] / conditions["pp"],),
        has_first=False,
        has_head=False,
        in_flight=1.0,
    )
    states, _, _ = state_parts(model_facts(arch), layout, STACKS["megatron"], stage, 8)
    return [
        ("GiB", float(expected["params_optimizer_gib"]), (states.weights + states.gradients + states.optimizer) / GIB)
    ]


def _checkpoint(conditions: Mapping[str, Any], expected: Mapping[str, Any]) -> Figures:
    """Printed with two digits and TB for TiB: the nearer of the two is meant."""
    params = count(lookup(str(conditions["model"]))).total
    size = 14.0 * params
    stated = float(expected["size_tb_printed"])
    return [("TB", stated, min(size / 1e12, size / 2**40, key=lambda value: abs(value - stated)))]
