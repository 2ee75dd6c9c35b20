"""How pipelines wait: layers on the fullest stage, and the idle share of each schedule.

Formulas: GPipe and 1F1B (p-1)/m, interleaved (p-1)/(v m) (Narayanan et al. 2021, section 2.2); zero bubble H1
(p-1)(F+B-W) against (p-1)(F+B+W) (Qi et al. 2023, table 2), which is a third when F, B and W are equal.
"""

from __future__ import annotations

import math

import msgspec

from head.planner.training.layout import TrainingLayout


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """How layers lie on stages. The fullest stage's layers, and whether it holds the output head too."""

    layers_mean: float
    layers_max: float
    layers_last: float


def stages_of(layers: int, layout: TrainingLayout) -> Stages:
    """Layers per stage when chunks are cut as evenly as whole layers allow.

    `layers_and_embedding`: embedding and head take the place of a layer each, so the first and last stage hold one
    layer less.
    """
    stages = layout.pp
    if stages == 1:
        return Stages(layers_mean=layers, layers_max=layers, layers_last=layers)
    takes_slot = layout.partition == "layers_and_embedding"
    slots = layers + (2 if takes_slot else 0)
    # Left-over layers go to middle stages: the last one, which has the head, gets the smaller share.
    last = slots // stages - (1 if takes_slot else 0)
    first = math.ceil(slots / stages) - (1 if takes_slot and stages == 2 else 0)
    return Stages(layers_mean=layers / stages, layers_max=float(first), layers_last=float(max(last, 0)))


def idle_rounds(layout: TrainingLayout) -> float:
    """Idle time of a stage, in units of one micro-batch's forward and backward on a stage.

    (p-1) for GPipe and 1F1B, over v when interleaved, a third of it for zero-bubble schedules.
    """
    rounds = float(layout.pp - 1)
    if layout.virtual_stages > 1:
        rounds /= layout.virtual_stages
    if layout.schedule == "zero_bubble":
        rounds /= 3.0
    return rounds
