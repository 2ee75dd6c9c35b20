"""The work of one training step on the GPU that has most of it, as seconds at full speed.

Each field of `StepWork` is what one part would take if it ran alone at the peak of the unit that limits it: dense peak
of the precision, HBM rate, link or network card at line rate, or a count of kernel launches. Nothing here is fitted;
`step_time.combine` turns these into a time with the fitted constants.
"""

from __future__ import annotations

import math

import msgspec

from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.bubble import Stages, idle_rounds, stages_of
from head.planner.training.collective_volumes import (
    Exchange,
    all_to_all,
    gather,
    group_of,
    neighbour,
    reduce,
)
from head.planner.training.layer_work import LayerWork, layer_work
from head.planner.training.layout import TrainingLayout

_FP8 = ("fp8", "mxfp8", "nvfp4", "fp4", "mxfp4", "int8")


class StepWork(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds at full speed on the fullest stage for one step; `kernels` are counts.

    Forward, backward and recomputation are all in. `idle_rounds` and `stage_ratio` describe the pipeline.
    """

    linear_s: float = 0.0
    linear_traffic_s: float = 0.0
    expert_s: float = 0.0
    expert_tiles_s: float = 0.0
    expert_traffic_s: float = 0.0
    attention_s: float = 0.0
    score_traffic_s: float = 0.0
    logits_s: float = 0.0
    logits_traffic_s: float = 0.0
    hidden_traffic_s: float = 0.0
    mixer_traffic_s: float = 0.0
    width_traffic_s: float = 0.0
    cast_traffic_s: float = 0.0  # quantizing operands to 8 bits or fewer
    permute_traffic_s: float = 0.0
    recompute_s: float = 0.0  # the part of linear_s that is recomputation
    kernels: float = 0.0
    moe_kernels: float = 0.0
    tp_link_s: float = 0.0
    tp_nic_s: float = 0.0
    cp_link_s: float = 0.0
    cp_nic_s: float = 0.0
    ep_link_s: float = 0.0
    ep_nic_s: float = 0.0
    pp_link_s: float = 0.0
    pp_nic_s: float = 0.0
    shard_link_s: float = 0.0  # ZeRO-3 and FSDP: parameters and gradients of every micro-batch
    shard_nic_s: float = 0.0
    dp_link_s: float = 0.0  # once a step
    dp_nic_s: float = 0.0
    optimizer_s: float = 0.0
    offload_s: float = 0.0
    microbatches: float = 1.0
    idle_rounds: float = 0.0
    mean_over_max: float = 1.0  # work of the mean stage over the fullest
    step_flops: float = 0.0  # model FLOPs (no recomputation) of the whole step, all GPUs
    hardware_flops: float = 0.0  # with recomputation
    roofline_s: float = 0.0  # all FLOPs at peak, evenly over all GPUs


class _Factors(msgspec.Struct, frozen=True, kw_only=True):
    """How often the forward pass's work is done in a step."""

    linear: float
    attention: float
    traffic: float
    kernels: float
    collectives: float
    recompute: float


def _factors(layout: TrainingLayout) -> _Factors:
    """Multiples of the forward pass: 1 forward, 2 backward (1 when weights are frozen), and what is recomputed.

    Fused attention's backward does 5 products for the forward's 2 (Dao 2023, section 3.1.2); it recomputes the scores.
    """
    recompute = {"none": 0.0, "selective": 0.0, "full": 1.0}[layout.recompute]
    selective = 1.0 if layout.recompute != "none" else 0.0
    backward = 2.0 if layout.tuning == "full" else 1.0
    attention_backward = 2.5 if layout.has_flash_attention else 2.0
    return _Factors(
        linear=1.0 + backward + recompute,
        attention=1.0 + attention_backward + (selective if not layout.has_flash_attention else recompute),
        traffic=1.0 + 1.5 + recompute,
        kernels=1.0 + (2.0 if layout.tuning == "full" else 1.6) + recompute,
        collectives=2.0 + recompute,
        recompute=recompute,
    )


def step_work(arch: Architecture, topology: Topology, layout: TrainingLayout) -> StepWork:
    """The work of one step of `layout` for `arch` on `topology`."""
    stages = stages_of(arch.layers + arch.mtp_layers, layout)
    layers = [(group.count / max(arch.layers, 1), layer_work(arch, group, layout)) for group in arch.groups]
    mean_layer = {
        field: sum(share * getattr(work, field) for share, work in layers) for field in LayerWork.__struct_fields__
    }
    mtp = float(arch.mtp_layers)
    device = topology.accelerator
    peak, peak16 = device.peak_flops(layout.precision), _sixteen_bit_peak(topology, layout)
    hbm = device.memory_bytes_per_s
    factors = _factors(layout)
    head = _head(arch, layout)
    head = (head[0] * (1.0 + mtp), head[1] * (1.0 + mtp), head[2])
    on_stage, has_head = _fullest_stage(mean_layer, head, stages, layout, peak, peak16)
    batches = float(layout.microbatches)
    count = on_stage * batches
    share = {name: value * count for name, value in mean_layer.items()}
    head_share = batches * has_head
    cast = (share["linear_bytes"] + share["expert_bytes"]) / 4 if layout.precision in _FP8 else 0.0
    total = _model_flops(arch, layout, mean_layer, head)
    return StepWork(
        linear_s=share["linear_flops"] * factors.linear / peak + share["scan_flops"] * factors.linear / peak16,
        linear_traffic_s=share["linear_bytes"] * factors.linear / hbm,
        expert_s=share["expert_flops"] * factors.linear / peak,
        expert_tiles_s=share["small_rows_flops"] * factors.linear / peak,
        expert_traffic_s=share["expert_bytes"] * factors.linear / hbm,
        attention_s=share["attention_flops"] * factors.attention / peak16,
        score_traffic_s=share["score_bytes"] * factors.attention / hbm,
        logits_s=head_share * head[0] * 3.0 / peak16,
        logits_traffic_s=head_share * head[1] * 3.0 / hbm,
        hidden_traffic_s=(share["hidden_bytes"] + share["whole_hidden_bytes"]) * factors.traffic / hbm,
        mixer_traffic_s=share["mixer_bytes"] * factors.traffic / hbm,
        width_traffic_s=share["width_bytes"] * factors.traffic / hbm,
        cast_traffic_s=cast * factors.traffic / hbm,
        permute_traffic_s=share["permute_bytes"] * factors.traffic / hbm,
        recompute_s=(share["linear_flops"] + share["expert_flops"]) * factors.recompute / peak,
        kernels=share["kernels"] * factors.kernels,
        moe_kernels=share["moe_kernels"] * factors.kernels,
        microbatches=batches,
        idle_rounds=idle_rounds(layout),
        mean_over_max=_mean_over_max(arch, stages, on_stage, has_head, mean_layer, head, layout, peak, peak16),
        step_flops=total[0],
        hardware_flops=total[1],
        roofline_s=total[2] / peak / layout.gpus + total[3] / peak16 / layout.gpus,
        **_communication(arch, topology, layout, mean_layer, count, factors),
        **_states(arch, topology, layout, mean_layer, stages, head),
    )


def _sixteen_bit_peak(topology: Topology, layout: TrainingLayout) -> float:
    """Peak of attention and logits, which stay in 16 bits (or wider) whatever the products use."""
    wide = layout.precision if layout.precision in ("fp32", "tf32", "fp16", "bf16") else "bf16"
    return topology.accelerator.peak_flops(wide)


def _head(arch: Architecture, layout: TrainingLayout) -> tuple[float, float, float]:
    """FLOPs, bytes and parameters of the output head, forward, one micro-batch, one GPU."""
    if not arch.has_head:
        return 0.0, 0.0, 0.0
    tokens = layout.micro_batch * layout.seq / layout.cp
    width = arch.vocab / layout.tp
    flops = 2.0 * tokens * arch.hidden * width
    # The product writes 2-byte logits; the loss reads them, keeps an fp32 copy and writes the gradient.
    traffic = 2.0 * (tokens * arch.hidden + arch.hidden * width) + tokens * width * (2 + 4 + 4)
    return flops, traffic, arch.hidden * width


def _layer_roofline(layer: dict[str, float], peak: float, peak16: float) -> float:
    products = (layer["linear_flops"] + layer["expert_flops"]) / peak
    return products + (layer["attention_flops"] + layer["scan_flops"]) / peak16


def _fullest_stage(
    layer: dict[str, float],
    head: tuple[float, float, float],
    stages: Stages,
    layout: TrainingLayout,
    peak: float,
    peak16: float,
) -> tuple[float, float]:
    """Layers on the stage that works longest, and 1.0 when that one has the head."""
    if layout.pp == 1:
        return stages.layers_mean, 1.0
    one = _layer_roofline(layer, peak, peak16)
    with_head = stages.layers_last * one + head[0] / peak16
    if with_head >= stages.layers_max * one:
        return stages.layers_last, 1.0
    return stages.layers_max, 0.0


def _mean_over_max(
    arch: Architecture,
    stages: Stages,
    on_stage: float,
    has_head: float,
    layer: dict[str, float],
    head: tuple[float, float, float],
    layout: TrainingLayout,
    peak: float,
    peak16: float,
) -> float:
    """Work of the mean stage over that of the fullest, at full speed."""
    if layout.pp == 1:
        return 1.0
    one = _layer_roofline(layer, peak, peak16)
    fullest = on_stage * one + has_head * head[0] / peak16
    mean = stages.layers_mean * one + head[0] / peak16 / layout.pp
    return min(1.0, mean / fullest) if fullest else 1.0


def _model_flops(
    arch: Architecture, layout: TrainingLayout, layer: dict[str, float], head: tuple[float, float, float]
) -> tuple[float, float, float, float]:
    """Model FLOPs and hardware FLOPs of the whole step, and the latter's parts: at the products' precision, at 16 bits.

    Model FLOPs: forward and twice that backward, attention causal-halved; recomputation is in the second only. The
    whole step is what all tp*pp*cp*dp GPUs do, so a per-GPU count is multiplied by the GPUs of a stage and by stages.
    """
    per_layer = layout.tp * layout.cp * layout.dp * float(layout.microbatches) * (arch.layers + arch.mtp_layers)
    products = (layer["linear_flops"] + layer["expert_flops"] / layout.expert_imbalance) * per_layer
    attention = (
        layer["attention_flops"] * per_layer * (1.0 if layout.has_flash_attention or not arch.is_causal else 0.5)
    )
    scan = layer["scan_flops"] * per_layer
    logits = head[0] * layout.tp * layout.cp * layout.dp * layout.microbatches
    backward = 2.0 if layout.tuning == "full" else 1.0
    factors = _factors(layout)
    model = (products + logits) * (1.0 + backward) + (attention + scan) * 3.0
    again = factors.recompute if layout.has_flash_attention else factors.attention - 3.0
    narrow = products * (1.0 + backward + factors.recompute)
    wide = logits * (1.0 + backward) + scan * 3.0 + attention * (3.0 + again)
    return model, narrow + wide, narrow, wide


def _communication(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    layer: dict[str, float],
    count: float,
    factors: _Factors,
) -> dict[str, float]:
    """Seconds at line rate of tensor, context, expert and pipeline parallelism; `count` layers x micro-batches."""
    tokens = layout.micro_batch * layout.seq / layout.cp
    found: dict[str, float] = {}
    tensor = context = expert = pipeline = Exchange()
    if layout.tp > 1:
        # Two all-reduces a layer and pass (or as many gather and scatter pairs), of the hidden state in 2 bytes.
        group = group_of(topology, layout.tp, 1)
        tensor = reduce(group, 2.0 * tokens * arch.hidden).times(2.0 * factors.collectives * count)
    if layout.cp > 1:
        group = group_of(topology, layout.cp, layout.tp)
        passes = 1.0 + 2.0 + factors.recompute
        context = gather(group, 2.0 * tokens * layout.cp * layer["kv_width"]).times(passes * count)
    if layout.ep > 1 and layer["routed_tokens"]:
        width = layer["routed_width"] / _moe_share(arch)
        expert_tp = layout.expert_tp or 1
        group = group_of(topology, layout.ep, expert_tp)
        active = max(part.feed_forward.active for part in arch.groups)
        sent = 2.0 * layer["routed_tokens"] * width * layout.expert_imbalance
        expert = all_to_all(group, sent, float(max(active, 1))).times(2.0 * factors.collectives * count)
    if layout.pp > 1:
        boundary = neighbour(topology, layout.tp * layout.cp * layout.dp, 2.0 * tokens * arch.hidden / layout.tp)
        pipeline = boundary.times(2.0 * layout.microbatches * layout.virtual_stages)
    for name, exchange in (("tp", tensor), ("cp", context), ("ep", expert), ("pp", pipeline)):
        found[f"{name}_link_s"], found[f"{name}_nic_s"] = exchange.link_s, exchange.nic_s
    return found


def _moe_share(arch: Architecture) -> float:
    """Share of the layers that choose experts."""
    chosen = sum(group.count for group in arch.groups if group.feed_forward.kind == "moe")
    return max(chosen, 1) / max(arch.layers, 1)


def _state_exchanges(layout: TrainingLayout, one: Exchange, trained: float) -> tuple[Exchange, Exchange]:
    """What parameters and gradients take once a step and for each micro-batch; `one` gathers 2-byte parameters."""
    gradients = trained * layout.grad_bytes / 2.0
    if layout.sharding == "none":
        return one.times(2.0 * gradients), Exchange()
    if layout.sharding == "zero1":
        return one.times(trained + gradients), Exchange()
    if layout.pp > 1:
        # Stages keep gathered parameters for all micro-batches: a gather for each would not hide (FSDP2 with PP).
        return one.times(1.0 + gradients), Exchange()
    return Exchange(), one.times((1.0 if layout.sharding == "zero2" else 2.0) + gradients)


def _states(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    layer: dict[str, float],
    stages: Stages,
    head: tuple[float, float, float],
) -> dict[str, float]:
    """Seconds of data parallelism, of sharded parameters, of the optimizer and of offload."""
    dense = (layer["params"] - layer["expert_params"]) * stages.layers_max
    dense += head[2] * (1.0 if arch.is_tied or layout.pp > 1 else 2.0)
    experts = layer["expert_params"] * stages.layers_max
    replicas = layout.dp * layout.cp
    expert_tp = layout.expert_tp or (layout.tp if layout.ep == 1 else 1)
    expert_replicas = max(1, round(layout.tp * replicas / (layout.ep * expert_tp)))
    found: dict[str, float] = {}
    trained = 1.0 if layout.tuning == "full" else 0.01
    shard, expert_shard = replicas, expert_replicas
    once, often = Exchange(), Exchange()
    if layout.sharding == "hsdp":
        # States are split inside a group (a node unless told otherwise); groups add their gradient shards up.
        wanted = layout.shard_group or max(1, topology.local_gpus // layout.tp)
        shard, expert_shard = math.gcd(replicas, wanted), math.gcd(expert_replicas, wanted)
        across = group_of(topology, replicas // shard, layout.tp * shard)
        once = reduce(across, trained * layout.grad_bytes * dense / shard)
    group = group_of(topology, shard, layout.tp)
    expert_group = group_of(topology, expert_shard, layout.ep * expert_tp)
    for held, members in ((dense, group), (experts, expert_group)):
        at_end, per_batch = _state_exchanges(layout, gather(members, held * 2.0), trained)
        once, often = once.plus(at_end), often.plus(per_batch)
    often = often.times(float(layout.microbatches))
    found["dp_link_s"], found["dp_nic_s"] = once.link_s, once.nic_s
    found["shard_link_s"], found["shard_nic_s"] = often.link_s, often.nic_s
    sharded = 1.0 if layout.sharding == "none" else 1.0 / shard
    expert_sharded = 1.0 if layout.sharding == "none" else 1.0 / expert_shard
    state_bytes = {"adamw_8bit": 12.0, "sgd": 18.0, "adafactor": 14.0}.get(layout.optimizer, 30.0)
    own = (dense * sharded + experts * expert_sharded) * trained
    found["optimizer_s"] = own * state_bytes / topology.accelerator.memory_bytes_per_s
    if layout.offload != "none":
        host = topology.pcie_bytes_per_s or topology.accelerator.pcie_bytes_per_s or 16e9
        moved = {"optimizer": 6.0 * own, "optimizer_and_weights": 10.0 * own}.get(layout.offload, 0.0)
        if layout.offload == "activations":
            tokens = layout.micro_batch * layout.seq / layout.cp
            moved = 4.0 * tokens * arch.hidden * stages.layers_max * layout.microbatches
        found["offload_s"] = moved / host
    return found
