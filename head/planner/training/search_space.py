"""The layouts that a search looks at: every combination of the degrees it names, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.training.layout import Recompute, Sharding, TrainingLayout

CONTEXT_TOKENS = 4096  # tokens per rank under which splitting a sequence is not tried
STAGES_LIMIT = 64
MICRO_BATCH_LIMIT = 16


class Space(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values to try of each dimension; an empty tuple means those that suit the model and the topology."""

    tps: tuple[int, ...] = ()
    pps: tuple[int, ...] = ()
    virtual_stages: tuple[int, ...] = ()
    cps: tuple[int, ...] = ()
    eps: tuple[int, ...] = ()
    micro_batches: tuple[int, ...] = ()
    recomputes: tuple[Recompute, ...] = ()
    shardings: tuple[Sharding, ...] = ()
    offloads: tuple[str, ...] = ("none",)


def suited(arch: Architecture, topology: Topology, base: TrainingLayout, space: Space) -> Space:
    """`space` with its empty dimensions filled in."""
    gpus, domain = topology.gpus, topology.local_gpus
    experts = max((group.feed_forward.experts for group in arch.groups), default=0)
    doubles = tuple(2**power for power in range(21))
    context = [ways for ways in doubles if ways <= gpus and (ways == 1 or base.seq // ways >= CONTEXT_TOKENS)]
    is_long = base.seq > 2 * CONTEXT_TOKENS
    pps = tuple(ways for ways in _divisors(gpus) if ways <= min(arch.layers + 2, STAGES_LIMIT))
    is_adapter = base.tuning != "full"
    # Selective recomputation of fused attention saves nothing: attention does that by itself.
    recomputes: tuple[Recompute, ...] = ("none", "full") if base.has_flash_attention else ("none", "selective", "full")
    shardings: tuple[Sharding, ...] = ("none", "fsdp") if is_adapter else ("zero1", "fsdp")
    return Space(
        tps=space.tps or tuple(ways for ways in _divisors(gpus) if ways <= domain),
        pps=space.pps or pps,
        virtual_stages=space.virtual_stages or (1, 2, 4),
        cps=space.cps or (tuple(context) if is_long else (1,)),
        eps=space.eps or (tuple(ways for ways in _divisors(experts) if ways <= gpus) if experts else (1,)),
        micro_batches=space.micro_batches or tuple(size for size in doubles if size <= MICRO_BATCH_LIMIT),
        recomputes=space.recomputes or recomputes,
        shardings=space.shardings or shardings,
        offloads=space.offloads,
    )


def layouts(arch: Architecture, topology: Topology, base: TrainingLayout, space: Space) -> Iterator[TrainingLayout]:
    """Every layout of a suited `space`. Combinations that mean the same as another are made once.

    dp is what the other degrees leave; those that leave no whole number are not layouts and are not made.
    """
    gpus = topology.gpus
    for tp in space.tps:
        for pp in space.pps:
            for cp in space.cps:
                if gpus % (tp * pp * cp):
                    continue
                yield from _inner(arch, base, space, tp, pp, cp, gpus // (tp * pp * cp))


def _inner(
    arch: Architecture, base: TrainingLayout, space: Space, tp: int, pp: int, cp: int, dp: int
) -> Iterator[TrainingLayout]:
    # embedding and head take the place of a layer each where that makes equal stages and layers alone do not
    is_even_with_both = arch.layers % pp != 0 and (arch.layers + 2) % pp == 0
    partition = "layers_and_embedding" if is_even_with_both else base.partition
    slots = arch.layers + (2 if partition == "layers_and_embedding" else 0)
    for ep in space.eps:
        for virtual in space.virtual_stages:
            if virtual > 1 and (pp == 1 or slots % (pp * virtual)):
                continue
            for sharding in space.shardings:
                for micro in space.micro_batches:
                    for recompute in space.recomputes:
                        for offload in space.offloads:
                            yield msgspec.structs.replace(
                                base,
                                tp=tp,
                                pp=pp,
                                cp=cp,
                                dp=dp,
                                ep=ep,
                                virtual_stages=virtual,
                                sharding=sharding,
                                micro_batch=micro,
                                recompute=recompute,
                                offload=offload,
                                partition=partition,
                                schedule="interleaved" if virtual > 1 else _plain(base),
                            )


def _plain(base: TrainingLayout) -> str:
    return "1f1b" if base.schedule == "interleaved" else base.schedule


def _divisors(number: int) -> tuple[int, ...]:
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return tuple(sorted({*small, *(number // one for one in small)}))
