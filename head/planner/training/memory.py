"""Bytes on the most loaded GPU of a training layout, part by part, and whether that fits.

Every pipeline stage that can be the fullest is computed at both moments that can be its peak: the loss (all kept
activations and the logits) and the first layer of the backward pass (kept activations, one recomputed layer, gradients
of its products). The parts of an answer sum to its total. The few constants are multipliers with priors near 1, fitted
to measured peaks (calibration/memory_fit.py); the interval is what leaving a whole source out of the fit costs.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from typing import Literal

import msgspec

from head.planner.calibration.quantity import Quantity
from head.planner.hardware.accelerators import GIB
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.layout import Recompute, TrainingLayout
from head.planner.training.memory_layers import ModelFacts, expert_tensor_ways, model_facts
from head.planner.training.memory_stack import Measure, MemoryStack, program_of
from head.planner.training.memory_stages import Stage, StageActivations, stage_activations, stages
from head.planner.training.memory_states import States, frozen_states, states_of

Verdict = Literal["fits", "tight", "does_not_fit"]
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "context", "fragmentation")
FITS_AT = 0.975  # probability from which a layout is called a fit: the 95 % interval lies under the capacity
MISFIT_AT = 0.025  # and under which it is called none: the interval lies over it
_Z80 = 1.2815515655446004  # half width of a central 80 % interval of a normal distribution, in standard deviations
_SHARDED = ("zero3", "fsdp", "hsdp")


class MemoryConstants(msgspec.Struct, frozen=True, kw_only=True):
    """What was fitted, each with the prior it started from in memory_fit.PRIORS.

    fragmentation: share of everything that the allocator holds in vain. sigma: of the logarithm of measured over
    predicted, for programs and models like the fitted ones; sigma_unseen: with the whole source left out.
    """

    activations: float = 1.0
    logits: float = 1.0
    gathered: float = 1.0
    fragmentation: float = 0.08
    context_gib: float = 1.0
    communicator_gib: float = 0.3
    sigma: float = 0.08
    sigma_unseen: float = 0.15
    calibration: str = "priors"


class MemoryParts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one GPU."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    context: float = 0.0
    fragmentation: float = 0.0

    @property
    def total(self) -> float:
        """All of it: what the driver shows."""
        return self.reserved + self.context

    @property
    def reserved(self) -> float:
        """What the allocator holds."""
        return self.allocated + self.fragmentation

    @property
    def allocated(self) -> float:
        """What tensors hold."""
        return self.states + self.activations + self.logits + self.buffers

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    def measured(self, measure: Measure) -> float:
        """The bytes that a peak of this kind counts."""
        return {"device": self.total, "reserved": self.reserved, "allocated": self.allocated}[measure]


class TrainingMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `fit_probability` is the share of the interval's distribution that is under the capacity."""

    parts: MemoryParts
    total: Quantity
    capacity_bytes: float
    headroom_bytes: float  # capacity minus the central estimate; negative when it is over
    fit_probability: float
    verdict: Verdict
    stage: str  # first, middle, last or whole
    peak: str  # loss or backward
    host_bytes: float  # per GPU, of what was offloaded
    stack: str


@cache
def constants() -> MemoryConstants:
    """The shipped constants."""
    text = resources.files("head.planner").joinpath("data", "memory_constants.json").read_bytes()
    return msgspec.json.decode(text, type=MemoryConstants)


def estimate_memory(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    *,
    stack: MemoryStack | str | None = None,
    fitted: MemoryConstants | None = None,
) -> TrainingMemory:
    """Peak memory of one step on the most loaded GPU, in bytes, against what the device shows a process.

    stack: the program, by name or as facts; the usual one for the layout when it is not given or not known.
    """
    stack, fitted = program_of(stack, layout), fitted or constants()
    parts, stage, peak, host = peak_parts(arch, layout, stack, fitted, topology.gpus_per_node)
    capacity = float(topology.accelerator.visible_bytes)
    sigma = fitted.sigma_unseen
    value = parts.total
    probability = fit_probability(value, capacity, sigma)
    return TrainingMemory(
        parts=parts,
        total=Quantity(
            value=value,
            unit="bytes",
            low=value * math.exp(-_Z80 * sigma),
            high=value * math.exp(_Z80 * sigma),
            convention="peak of the most loaded GPU as the driver shows it, context and fragmentation included",
            calibration=fitted.calibration,
        ),
        capacity_bytes=capacity,
        headroom_bytes=capacity - value,
        fit_probability=probability,
        verdict=verdict_of(probability),
        stage=stage,
        peak=peak,
        host_bytes=host,
        stack=stack.name,
    )


def with_least_recompute(
    arch: Architecture, topology: Topology, layout: TrainingLayout, *, stack: MemoryStack | str | None = None
) -> TrainingLayout:
    """`layout` with the least recomputation that may fit, for questions that leave it open; full when none does."""
    choices: tuple[Recompute, ...] = ("none", "selective", "full")
    for recompute in choices:
        changed = msgspec.structs.replace(layout, recompute=recompute)
        if estimate_memory(arch, topology, changed, stack=stack).verdict != "does_not_fit":
            return changed
    return msgspec.structs.replace(layout, recompute="full")


def fit_probability(value: float, capacity: float, sigma: float) -> float:
    """Probability that a peak predicted as `value` stays under `capacity`: log-normal, standard deviation `sigma`."""
    if value <= 0:
        return 1.0
    if capacity <= 0:
        return 0.0
    return 0.5 * (1.0 + math.erf(math.log(capacity / value) / (sigma * math.sqrt(2.0))))


def verdict_of(probability: float) -> Verdict:
    """fits, tight or does_not_fit."""
    if probability >= FITS_AT:
        return "fits"
    return "tight" if probability >= MISFIT_AT else "does_not_fit"


def peak_parts(
    arch: Architecture, layout: TrainingLayout, stack: MemoryStack, fitted: MemoryConstants, gpus_per_node: int
) -> tuple[MemoryParts, str, str, float]:
    """(parts, fullest stage, moment of its peak, bytes moved to the host)."""
    facts = model_facts(arch)
    best: tuple[MemoryParts, str, str, float] | None = None
    for stage in stages(facts, layout):
        found = _stage_parts(arch, facts, layout, stack, fitted, stage, gpus_per_node)
        if best is None or found[0].total > best[0].total:
            best = found
    assert best is not None, "a layout has at least one stage"
    return best


def state_parts(
    facts: ModelFacts, layout: TrainingLayout, stack: MemoryStack, stage: Stage, gpus_per_node: int
) -> tuple[States, float, float]:
    """(states of one rank, its parameters gathered whole, the largest unit that is gathered at once, in parameters)."""
    dense = experts = lora = largest = 0.0
    for kind, layers in zip(facts.kinds, stage.layers, strict=True):
        one_dense, one_experts = kind.params.on_rank(layout)
        dense, experts = dense + one_dense * layers, experts + one_experts * layers
        width = kind.params.lora_width if stack.lora_targets == "all" else kind.params.lora_attention_width
        lora += layers * width * layout.lora_rank / layout.tp
        largest = max(largest, (one_dense + one_experts) if layers else 0.0)
    tables = facts.first_params / layout.tp * stage.has_first
    if stage.has_head and not (facts.is_tied and stage.has_first):
        tables += facts.head_params / layout.tp
    small = facts.replicated_params * stage.has_head
    mtp = facts.mtp_params * stage.has_head / layout.tp
    if facts.kinds and layout.ep > 1:
        mtp /= min(layout.ep, 8)
    if layout.tuning == "full":
        states = states_of(layout, stack, dense + tables + small + mtp, experts, gpus_per_node)
    else:
        states = frozen_states(layout, dense + experts + mtp, tables + small, lora, stack, gpus_per_node)
    return states, dense + experts + tables + small + mtp, largest


def _stage_parts(
    arch: Architecture,
    facts: ModelFacts,
    layout: TrainingLayout,
    stack: MemoryStack,
    fitted: MemoryConstants,
    stage: Stage,
    gpus_per_node: int,
) -> tuple[MemoryParts, str, str, float]:
    states, gathered_all, largest = state_parts(facts, layout, stack, stage, gpus_per_node)
    kept = stage_activations(arch, layout, stack, stage)
    tokens = layout.micro_batch * layout.seq / layout.cp
    logits = 0.0
    if stage.has_head and arch.has_head:
        elements = tokens * arch.vocab / layout.tp
        logits = elements * stack.loss_bytes * fitted.logits * (1 + 0.5 * bool(arch.mtp_layers))
        if stack.keeps_stage_outputs and layout.pp > 1:
            logits += 2.0 * elements * (layout.microbatches - 1)
    working = kept.working * fitted.activations
    peak = "loss" if logits > working else "backward"
    activations = kept.kept * fitted.activations + max(0.0, working - logits)
    gathered = _gathered(arch, facts, layout, stack, stage, gathered_all, largest, states)
    buffers = gathered * fitted.gathered + _buffers(arch, layout, stack, kept, tokens)
    # The allocator's waste grows with what comes and goes; states are laid out once and stay.
    waste = fitted.fragmentation * (
        states.weights + states.gradients + states.optimizer + activations + logits + buffers
    )
    context = (fitted.context_gib + fitted.communicator_gib * _communicators(layout)) * GIB
    parts = MemoryParts(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=activations,
        logits=logits,
        buffers=buffers,
        context=context,
        fragmentation=waste,
    )
    return parts, stage.name, peak, states.host + kept.host


def _gathered(
    arch: Architecture,
    facts: ModelFacts,
    layout: TrainingLayout,
    stack: MemoryStack,
    stage: Stage,
    held: float,
    largest: float,
    states: States,
) -> float:
    """Bytes of weights gathered for use and of gradients not yet reduced, when weights are sharded."""
    each = 2.0 if layout.precision not in ("fp32", "tf32") else 4.0
    table = max(facts.first_params * stage.has_first, facts.head_params * stage.has_head) / layout.tp
    is_frozen = layout.tuning != "full"
    if stack.releases_gradients and not is_frozen:
        return each * max(largest, table)
    is_cut = layout.sharding in _SHARDED and layout.dp * layout.cp > 1
    if not is_cut and layout.offload != "optimizer_and_weights":
        return 0.0
    if is_frozen and stack.keeps_gathered:
        return each * (held + 2.0 * largest)
    if stack.keeps_gathered_in_pipeline and layout.pp > 1:
        # gathered once and kept, gradients summed whole in fp32 until the last micro-batch
        return held * (each + (0.0 if is_frozen else 4.0))
    narrow = 0.5625 if layout.tuning == "qlora" else each
    blocks = stack.gathered_blocks * largest * narrow + table * each
    if layout.tuning == "qlora":
        blocks += largest * each / 4  # the matrix in use, unpacked
    # the gradient of what ran last, and its sum over ranks in fp32 unless the run is in 16 bits throughout
    reduced = (
        0.0
        if is_frozen
        else max(largest, table) * each + largest * (4.0 if stack.reduces_in_fp32 and stack.states != "pure" else each)
    )
    return blocks + reduced


def _buffers(
    arch: Architecture, layout: TrainingLayout, stack: MemoryStack, kept: StageActivations, tokens: float
) -> float:
    """Bytes of buffers that exchange tokens or gradients."""
    found = 0.0
    hidden_bytes = 2.0 * tokens * arch.hidden
    if layout.tp > 1:
        found += 3.0 * hidden_bytes  # gathered input, whole output before its reduction, gathered gradient
    if layout.pp > 1:
        found += 2.0 * hidden_bytes / (layout.tp if layout.has_sequence_parallel else 1)
    if layout.cp > 1:
        width = max((2 * part.attention.kv_heads * part.attention.head_dim for part in arch.groups), default=0)
        found += 2.0 * 2.0 * tokens * width / layout.tp
    if layout.ep > 1:
        active = max(part.feed_forward.active for part in arch.groups)
        found += (
            2.0 * active * hidden_bytes * layout.expert_imbalance / (layout.tp if layout.has_sequence_parallel else 1)
        )
    if layout.sharding in ("zero1", "zero2") and layout.dp * layout.cp > 1:
        found += 2.0 * stack.bucket_elements * 2.0
    return found


def _communicators(layout: TrainingLayout) -> int:
    """Groups of GPUs that exchange data with one GPU, each with buffers of its own."""
    tensor = expert_tensor_ways(layout)
    expert = layout.ep > 1 or (tensor > 1 and tensor != layout.tp)
    return sum(ways > 1 for ways in (layout.tp, layout.pp, layout.cp, layout.dp)) + expert
