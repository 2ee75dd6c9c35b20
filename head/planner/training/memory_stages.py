"""Which pipeline stages can be the fullest, and what activations they keep.

1F1B: stage i of p keeps min(m, p - i) micro-batches; interleaved: 2 (p - i - 1) + (v - 1) p + 1 chunks of a v-th of
its layers, so the first stage keeps L (1 + (p - 1) / (p v)) layers' worth (Korthikanti et al. 2022, section 4.2.3);
GPipe: all m. Zero-bubble H1 keeps as much as 1F1B (Qi et al. 2023, table 2).
"""

from __future__ import annotations

import math

import msgspec

from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory_layers import ModelFacts, expert_tensor_ways, layer_activations
from head.planner.training.memory_stack import MemoryStack


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline stage: layers of each kind, what else it has, micro-batches that it keeps (chunks are parts)."""

    name: str
    layers: tuple[float, ...]
    has_first: bool
    has_head: bool
    in_flight: float


class StageActivations(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes: `kept` from forward to backward, `working` while one layer's backward runs, `host` when moved there."""

    kept: float
    working: float
    host: float = 0.0


def stages(facts: ModelFacts, layout: TrainingLayout) -> list[Stage]:
    """The first, second and last stage: one of them is the fullest. Layers that do not divide go to middle stages."""
    layers = tuple(float(kind.layers) for kind in facts.kinds)
    if layout.pp == 1:
        return [Stage(name="whole", layers=layers, has_first=True, has_head=True, in_flight=1.0)]
    takes_slot = layout.partition == "layers_and_embedding"
    slots = facts.layers + 2 * takes_slot
    most, least = math.ceil(slots / layout.pp), slots // layout.pp
    first = max(most - takes_slot, 0)
    last = max(least - takes_slot, 1)
    found = [
        Stage(
            name="first",
            layers=_composed(facts, first, is_first=True),
            has_first=True,
            has_head=False,
            in_flight=in_flight(layout, 0),
        ),
        Stage(
            name="last",
            layers=_composed(facts, last, is_first=False),
            has_first=False,
            has_head=True,
            in_flight=in_flight(layout, layout.pp - 1),
        ),
    ]
    if layout.pp > 2:
        middle = Stage(
            name="middle",
            layers=_composed(facts, most, is_first=False),
            has_first=False,
            has_head=False,
            in_flight=in_flight(layout, 1),
        )
        found.insert(1, middle)
    return found


def in_flight(layout: TrainingLayout, stage: int) -> float:
    """Micro-batches (of the whole stage's layers) that stage `stage` keeps at most."""
    batches = layout.microbatches
    if layout.schedule == "gpipe":
        return float(batches)
    behind = layout.pp - stage
    if layout.virtual_stages > 1:
        chunks = 2 * (behind - 1) + (layout.virtual_stages - 1) * layout.pp + 1
        return min(chunks, batches * layout.virtual_stages) / layout.virtual_stages
    return float(min(batches, behind))


def stage_activations(arch: Architecture, layout: TrainingLayout, stack: MemoryStack, stage: Stage) -> StageActivations:
    """Bytes of activations of one stage on one GPU, embeddings and logits apart."""
    tokens = layout.micro_batch * layout.seq / layout.cp
    sequence_ways = layout.tp if layout.has_sequence_parallel else 1
    kept = working = host = 0.0
    for group, layers in zip(arch.groups, stage.layers, strict=True):
        if not layers:
            continue
        one = layer_activations(arch.hidden, group, stack.operators, layout.tuning, stack, layout.precision)
        # routed copies live where the experts are: split by their width, and by tokens under sequence parallelism
        routed_ways = max(expert_tensor_ways(layout), sequence_ways if layout.ep > 1 else 1)
        routed = layout.expert_imbalance / routed_ways
        score = one.score * layout.seq / layout.cp if not layout.has_flash_attention else one.stats
        whole_layer = (one.split + score) / layout.tp + one.whole / sequence_ways + one.routed * routed
        backward = one.backward / layout.tp + one.routed * routed / 2
        checkpoint = one.input / sequence_ways
        held, during = whole_layer, backward
        if layout.recompute == "full":
            held, during = checkpoint, whole_layer + backward
        elif layout.recompute == "selective" and stack.selective == "operators":
            held = one.selective_split / layout.tp + one.selective_whole / sequence_ways + one.routed_selective * routed
            during = whole_layer - held + backward
        elif layout.recompute == "selective" and not layout.has_flash_attention:
            held = whole_layer - score / layout.tp
            during = score / layout.tp + backward
        total = held * layers * stage.in_flight
        if layout.offload == "activations":
            moved = max(0.0, total - 2 * held)
            host, total = host + moved * tokens, total - moved
        kept += total
        working = max(working, during)
    if stage.has_first and stack.has_dropout:
        kept += arch.hidden * stage.in_flight / sequence_ways  # the mask after the embedding
    return StageActivations(kept=kept * tokens, working=working * tokens, host=host)


def _composed(facts: ModelFacts, layers: int, *, is_first: bool) -> tuple[float, ...]:
    """`layers` layers as a stage has them: a prefix lies on the first stage, other kinds alternate evenly."""
    prefix = sum(kind.layers for kind in facts.kinds if kind.is_prefix)
    others = max(facts.layers - prefix, 1)
    here = min(prefix, layers) if is_first else 0
    rest = layers - here
    return tuple(float(here) if kind.is_prefix else rest * kind.layers / others for kind in facts.kinds)
