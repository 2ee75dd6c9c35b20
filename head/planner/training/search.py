"""Search over layouts: exact within its stated space, and able to say why each other layout was dropped.

Every layout of the space is checked (checks.py, the same checks as `validate`), then its memory, then its time; nothing
is sampled. What is left is ranked by the goal, with throughput discounted by the probability that memory suffices: a
run that dies is worth nothing. When nothing is left, remedies that the same model finds to fit are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from common.errors import NothingFits
from head.planner.hardware.accelerators import GIB, all_accelerators
from head.planner.hardware.topology import GPUS_LIMIT, Topology
from head.planner.model.architecture import Architecture
from head.planner.training import step_time
from head.planner.training.checks import first_failure, memory_check
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import TrainingMemory, estimate_memory
from head.planner.training.search_space import Space, layouts, suited

Goal = Literal["throughput", "latency", "memory", "efficiency"]
StepSeconds = Callable[[Architecture, Topology, TrainingLayout], float]
LAYOUTS_LIMIT = 50_000
EXPLAINED = 20  # choices that get reasons: each is compared with all others
USD_PER_HOUR = 2.0  # of a device whose table states no price; said in the notes


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One layout that can run. cost_usd is per million tokens; score is what the goal ranked it by (more is better)."""

    layout: TrainingLayout
    gpus: int
    step_s: float
    tokens_per_s: float
    cost_usd: float
    memory: TrainingMemory
    score: float
    rationale: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """Layouts that one check dropped first: how many, and one of them with the check's words."""

    reason: str
    count: int
    example: TrainingLayout
    message: str


class Remedy(msgspec.Struct, frozen=True, kw_only=True):
    """A change after which something fits, by the same memory model. accelerator: another than was asked for."""

    name: str
    message: str
    layout: TrainingLayout
    gpus: int
    total_bytes: float
    fit_probability: float
    accelerator: str = ""


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the search found. `examined` counts every layout of the space: examined = feasible + dropped."""

    choices: tuple[Choice, ...]
    pareto: tuple[Choice, ...]
    examined: int
    feasible: int
    dropped: tuple[Dropped, ...]
    remedies: tuple[Remedy, ...]
    space: Space
    notes: tuple[str, ...]

    @property
    def best(self) -> Choice | None:
        """The first choice."""
        return self.choices[0] if self.choices else None

    def require(self) -> Choice:
        """The first choice. Raises: NothingFits with what dropped the others and what would help."""
        if self.choices:
            return self.choices[0]
        raise NothingFits(
            "no layout of the space fits",
            hint="; ".join(remedy.message for remedy in self.remedies[:3]) or "more GPUs or a smaller model",
            examined=self.examined,
            dropped={drop.reason: drop.count for drop in self.dropped},
            remedies=[{"name": r.name, "message": r.message, "gpus": r.gpus} for r in self.remedies],
        )


def search(
    arch: Architecture,
    topology: Topology,
    base: TrainingLayout,
    *,
    space: Space | None = None,
    goal: Goal = "throughput",
    stack: str = "",
    gpu_counts: Sequence[int] = (),
    top: int = 5,
    allow_uneven: bool = True,
    usd_per_gpu_hour: float | None = None,
    step_seconds: StepSeconds | None = None,
) -> SearchResult:
    """The best layouts for `arch` on `topology`; `base` gives batch, sequence, precision, optimizer and tuning.

    gpu_counts: numbers of GPUs to try, all of the topology when empty (a front of cost against time needs several).
    allow_uneven: stages may differ by a layer; the time of the fullest stage counts. A space of more than LAYOUTS_LIMIT
    layouts is cut there, and the notes say so.
    """
    timed = step_seconds or (lambda a, t, lay: step_time.step_seconds(a, t, lay, stack or "unknown"))
    state = _Found(goal=goal, price=_price(topology, usd_per_gpu_hour), allow_uneven=allow_uneven)
    wanted = space or Space()
    filled = wanted
    for count in gpu_counts or (topology.gpus,):
        part = topology if count == topology.gpus else topology.with_gpus(count)
        filled = suited(arch, part, base, wanted)
        for layout in layouts(arch, part, base, filled):
            if state.examined >= LAYOUTS_LIMIT:
                state.notes.append(
                    f"the space holds over {LAYOUTS_LIMIT} layouts: only the first so many were examined"
                )
                break
            state.examine(arch, part, layout, stack, timed)
    ranked = sorted(state.choices, key=lambda choice: (-choice.score, _order(choice.layout)))
    front = pareto_front(ranked)
    helped = () if ranked else remedies(arch, topology, base, stack=stack)
    chosen = (*(_explained(choice, ranked) for choice in ranked[: min(top, EXPLAINED)]), *ranked[EXPLAINED:top])
    if usd_per_gpu_hour is None and not topology.accelerator.usd_per_hour:
        state.notes.append(f"no price is known for {topology.accelerator.name}: {USD_PER_HOUR} USD an hour taken")
    return SearchResult(
        choices=chosen,
        pareto=tuple(front),
        examined=state.examined,
        feasible=len(ranked),
        dropped=tuple(sorted(state.dropped.values(), key=lambda drop: (-drop.count, drop.reason))),
        remedies=helped,
        space=filled,
        notes=tuple(state.notes),
    )


def pareto_front(choices: Sequence[Choice]) -> list[Choice]:
    """Choices that no other beats or equals in cost, throughput, step time and memory headroom at once.

    Of choices that are equal in all four, the first is kept.
    """
    ordered = sorted(choices, key=lambda choice: (-choice.tokens_per_s, choice.cost_usd, -choice.memory.headroom_bytes))
    front: list[Choice] = []
    for choice in ordered:  # whoever dominates comes earlier in this order
        if not any(_dominates(other, choice) for other in front):
            front.append(choice)
    return front


def remedies(arch: Architecture, topology: Topology, base: TrainingLayout, *, stack: str = "") -> tuple[Remedy, ...]:
    """What would fit: each change is tried alone, in the order of how little it asks, with the leanest layouts."""
    found: list[Remedy] = []
    host = topology.cpu_memory_bytes
    for name, words, changed in _changes(base):
        if name == "qlora_short" and any(one.name == "qlora" for one in found):
            continue
        best = _leanest(arch, topology, changed, stack)
        if best is not None:
            moved = best[1].host_bytes * min(topology.gpus, topology.gpus_per_node)
            note = f" ({moved / GIB:.0f} GiB of host memory per node)" if moved else ""
            if moved and host and moved > host:
                continue
            found.append(_remedy(name, f"{words}{note}", best, topology.gpus))
    for factor in (2, 4, 8, 16, 32, 64, 128):
        if topology.gpus * factor > GPUS_LIMIT:
            break
        more = topology.with_gpus(topology.gpus * factor)
        best = _leanest(arch, more, base, stack)
        if best is not None:
            found.append(_remedy("more_gpus", f"use {more.gpus} GPUs instead of {topology.gpus}", best, more.gpus))
            break
    larger = _larger_card(arch, topology, base, stack)
    return (*found, larger) if larger is not None else tuple(found)


class _Found(msgspec.Struct, kw_only=True):
    """What a search has seen so far."""

    goal: Goal
    price: float
    allow_uneven: bool
    examined: int = 0
    choices: list[Choice] = []
    dropped: dict[str, Dropped] = {}
    notes: list[str] = []

    def examine(
        self, arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str, timed: StepSeconds
    ) -> None:
        """Checks one layout and keeps it, or the reason against it."""
        self.examined += 1
        failed = first_failure(arch, topology, layout)
        if failed is not None:
            self._drop(failed.name, failed.message, layout)
            return
        slots = arch.layers + (2 if layout.partition == "layers_and_embedding" else 0)
        if not self.allow_uneven and slots % layout.pp:
            self._drop("pp_uneven", f"{arch.layers} layers do not divide into {layout.pp} equal stages", layout)
            return
        memory = estimate_memory(arch, topology, layout, stack=stack)
        if memory.verdict == "does_not_fit":
            self._drop("memory_fit", memory_check(memory).message, layout)
            return
        seconds = timed(arch, topology, layout)
        tokens = layout.global_batch * layout.seq / seconds
        cost = layout.gpus * self.price / 3600 / tokens * 1e6
        self.choices.append(
            Choice(
                layout=layout,
                gpus=layout.gpus,
                step_s=seconds,
                tokens_per_s=tokens,
                cost_usd=cost,
                memory=memory,
                score=_score(self.goal, seconds, tokens, cost, memory),
            )
        )

    def _drop(self, reason: str, message: str, layout: TrainingLayout) -> None:
        known = self.dropped.get(reason)
        if known is None:
            self.dropped[reason] = Dropped(reason=reason, count=1, example=layout, message=message)
        else:
            self.dropped[reason] = msgspec.structs.replace(known, count=known.count + 1)


def _score(goal: Goal, seconds: float, tokens: float, cost: float, memory: TrainingMemory) -> float:
    """Higher is better. Throughput, step time and cost count as far as memory probably suffices."""
    if goal == "memory":
        return memory.headroom_bytes / memory.capacity_bytes
    gain = {"throughput": tokens, "latency": 1.0 / seconds, "efficiency": 1.0 / cost if cost else tokens}[goal]
    return gain * memory.fit_probability


def _price(topology: Topology, given: float | None) -> float:
    return given if given is not None else topology.accelerator.usd_per_hour or USD_PER_HOUR


def _order(layout: TrainingLayout) -> tuple[int, ...]:
    """Simpler layouts first among equals."""
    return (layout.pp, layout.tp, layout.cp, layout.ep, layout.virtual_stages, layout.micro_batch)


def _dominates(one: Choice, other: Choice) -> bool:
    return (
        one.tokens_per_s >= other.tokens_per_s
        and one.cost_usd <= other.cost_usd
        and one.step_s <= other.step_s
        and one.memory.headroom_bytes >= other.memory.headroom_bytes
    )


_COMPARED = ("tp", "pp", "cp", "ep", "virtual_stages", "micro_batch", "recompute", "sharding")


def _explained(choice: Choice, ranked: Sequence[Choice]) -> Choice:
    """Why this one: for each dimension, what the best feasible layout with another value of it would lose."""
    reasons = []
    mine = choice.layout
    for field in _COMPARED:
        value = getattr(mine, field)
        other = next((one for one in ranked if getattr(one.layout, field) != value and one.gpus == choice.gpus), None)
        if other is None:
            continue
        change = other.step_s / choice.step_s - 1
        word = "slower" if change >= 0 else "faster"
        room = (other.memory.total.value - choice.memory.total.value) / GIB
        reasons.append(
            f"{field}={value}: the best layout with {field}={getattr(other.layout, field)} is {abs(change):.0%} {word} "
            f"and takes {abs(room):.1f} GiB {'more' if room >= 0 else 'less'} per GPU"
        )
    check = memory_check(choice.memory)
    warnings = () if check.status == "passed" else (check.message,)
    return msgspec.structs.replace(choice, rationale=(check.message, *reasons), warnings=warnings)


def _changes(base: TrainingLayout) -> list[tuple[str, str, TrainingLayout]]:
    """Single changes to the question, smallest first."""
    replace = msgspec.structs.replace
    found: list[tuple[str, str, TrainingLayout]] = []
    if base.tuning == "full":
        if base.optimizer in ("adamw", "adam"):
            found.append(
                (
                    "optimizer_8bit",
                    "8-bit optimizer states and no fp32 master copy",
                    replace(base, optimizer="adamw_8bit"),
                )
            )
        found.append(("offload_optimizer", "optimizer states on the host", replace(base, offload="optimizer")))
        found.append(
            ("offload_all", "weights and optimizer on the host", replace(base, offload="optimizer_and_weights"))
        )
        found.append(("lora", "LoRA instead of full training", replace(base, tuning="lora")))
    if base.precision in ("fp32", "tf32"):
        found.append(("precision", "bf16 instead of fp32", replace(base, precision="bf16")))
    if base.tuning != "qlora":
        found.append(("qlora", "QLoRA: 4-bit frozen weights", replace(base, tuning="qlora")))
    if base.seq > 1024:
        half = base.seq // 2
        found.append(("shorter_sequence", f"sequences of {half} tokens", replace(base, seq=half)))
        small = replace(base, seq=1024, tuning="qlora")
        found.append(("qlora_short", "QLoRA with sequences of 1,024 tokens", small))
    return found


def _larger_card(arch: Architecture, topology: Topology, base: TrainingLayout, stack: str) -> Remedy | None:
    """The smallest known card on as many of which the question itself fits."""
    best = _least(arch, topology, base, stack)
    if best is None:
        return None
    layout = best[0]
    for device in sorted(all_accelerators(), key=lambda one: (one.visible_bytes, one.name)):
        if device.visible_bytes <= topology.accelerator.visible_bytes:
            continue
        there = estimate_memory(arch, msgspec.structs.replace(topology, accelerator=device), layout, stack=stack)
        if there.verdict == "fits":
            words = f"{topology.gpus} x {device.name} instead of {topology.accelerator.name}"
            found = _remedy("larger_gpu", words, (layout, there), topology.gpus)
            return msgspec.structs.replace(found, accelerator=device.name)
    return None


def _leanest(
    arch: Architecture, topology: Topology, base: TrainingLayout, stack: str
) -> tuple[TrainingLayout, TrainingMemory] | None:
    """The layout that needs least memory, if that fits."""
    best = _least(arch, topology, base, stack)
    return best if best is not None and best[1].verdict == "fits" else None


def _least(
    arch: Architecture, topology: Topology, base: TrainingLayout, stack: str
) -> tuple[TrainingLayout, TrainingMemory] | None:
    """The sound layout that needs least memory: micro-batch 1, everything recomputed and sharded."""
    lean = Space(
        micro_batches=(1,),
        recomputes=("full",),
        shardings=("fsdp", "zero1"),
        virtual_stages=(1,),
        offloads=(base.offload,),
    )
    best: tuple[TrainingLayout, TrainingMemory] | None = None
    for layout in layouts(arch, topology, base, suited(arch, topology, base, lean)):
        if first_failure(arch, topology, layout) is not None:
            continue
        memory = estimate_memory(arch, topology, layout, stack=stack)
        if best is None or memory.total.value < best[1].total.value:
            best = (layout, memory)
    return best


def _remedy(name: str, message: str, best: tuple[TrainingLayout, TrainingMemory], gpus: int) -> Remedy:
    layout, memory = best
    return Remedy(
        name=name,
        message=f"{message}: {memory.total.value / GIB:.1f} of {memory.capacity_bytes / GIB:.1f} GiB per GPU",
        layout=layout,
        gpus=gpus,
        total_bytes=memory.total.value,
        fit_probability=memory.fit_probability,
    )
