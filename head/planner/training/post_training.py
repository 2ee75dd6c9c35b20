"""Memory and time of post-training: PPO, GRPO, RLOO, REINFORCE, DPO, IPO, KTO, ORPO.

Composed from the training estimates (states, activations, step time) and the serving estimates (weights, KV cache, the
bytes that a decode step reads): no published table states these runs in enough detail to calibrate them as a whole, and
every answer says so. Actor, critic, reference and reward model lie on the same GPUs unless a strategy moves one away;
phases run one after another, so their working memory counts once, at its largest, and their states all the time.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from common.errors import InvalidValue
from head.planner.calibration.quantity import Quantity
from head.planner.hardware.accelerators import GIB
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count
from head.planner.serving.engine_step import ServingLayout, precision_of
from head.planner.serving.memory import kv_bytes_of_sequence, weights_bytes
from head.planner.training import step_time
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import Verdict, estimate_memory, fit_probability, verdict_of
from head.planner.training.memory_states import NF4_BYTES
from head.planner.training.search import StepSeconds

Algorithm = Literal["ppo", "grpo", "rloo", "reinforce", "dpo", "ipo", "kto", "orpo"]
Reference = Literal["full_gpu", "cpu_offload", "quantized", "vllm_server", "shared_weights", "none"]
BASIS = "composed from the training and serving estimates; no published run states enough to check the whole"
# Share of the HBM rate and of the peak that decoding in large batches reaches; widened into the interval below.
_DECODE_SHARE = 0.6
_KV_SHARE = 0.85  # of a server's memory that weights and cache may fill
_COMPOSED_SIGMA = 0.25  # of a composed estimate: what left-out sources cost each part, added up
_Z80 = 1.2815515655446004


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What an algorithm needs. sequences: of one training sample (a pair has two)."""

    has_critic: bool = False
    has_reference: bool = True
    has_reward: bool = False
    generates: bool = False
    group: int = 1  # answers to each prompt
    sequences: int = 1
    source: str = ""


RECIPES: dict[str, Recipe] = {
    "ppo": Recipe(has_critic=True, has_reward=True, generates=True, source="Ouyang et al. 2022"),
    "grpo": Recipe(has_reward=True, generates=True, group=8, source="Shao et al. 2024, section 4.1"),
    "rloo": Recipe(has_reward=True, generates=True, group=4, source="Ahmadian et al. 2024"),
    "reinforce": Recipe(has_reward=True, generates=True, source="Ahmadian et al. 2024"),
    "dpo": Recipe(sequences=2, source="Rafailov et al. 2023"),
    "ipo": Recipe(sequences=2, source="Azar et al. 2023"),
    "kto": Recipe(source="Ethayarajh et al. 2024"),
    "orpo": Recipe(has_reference=False, sequences=2, source="Hong et al. 2024"),
}
# Other words for the same strategies.
_REFERENCES = {"separate": "full_gpu", "gpu": "full_gpu", "offload": "cpu_offload", "shared": "shared_weights"}


class ModelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the set: bytes on each GPU, by part, and on the host for each GPU."""

    role: str
    strategy: str
    params: int
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    host_bytes: float = 0.0
    extra_gpus: int = 0  # servers of its own
    note: str = ""

    @property
    def gpu_bytes(self) -> float:
        """On each GPU, all the time."""
        return self.weights + self.gradients + self.optimizer


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of a step: its time and the working memory that it needs beside the states."""

    name: str
    seconds: float
    working_bytes: float
    note: str = ""


class PostTrainingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A whole step. The parts of `models`, the largest phase and `fixed_bytes` sum to `total.value`."""

    algorithm: str
    reference_strategy: str
    models: tuple[ModelPlan, ...]
    phases: tuple[Phase, ...]
    fixed_bytes: float  # context, fragmentation
    total: Quantity  # bytes per GPU
    capacity_bytes: float
    fit_probability: float
    verdict: Verdict
    step_s: Quantity
    samples_per_s: float
    host_bytes_per_node: float
    extra_gpus: int
    layout: TrainingLayout
    basis: str
    notes: tuple[str, ...]


def reference_strategy(word: str) -> Reference:
    """The strategy that `word` means. Raises: InvalidValue."""
    plain = _REFERENCES.get(word.strip().lower(), word.strip().lower())
    if plain not in ("full_gpu", "cpu_offload", "quantized", "vllm_server", "shared_weights", "none"):
        raise InvalidValue(
            f"unknown reference strategy {word[:40]!r}",
            hint="one of separate, full_gpu, cpu_offload, quantized, vllm_server, shared_weights, none",
        )
    return plain  # type: ignore[return-value]


def plan(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    algorithm: str,
    *,
    reference: str = "full_gpu",
    critic: Architecture | None = None,
    reward: Architecture | None = None,
    has_reward_model: bool | None = None,
    response_tokens: int = 0,
    group: int = 0,
    epochs: int = 1,
    generation_batch: int = 0,
    stack: str = "",
    step_seconds: StepSeconds | None = None,
) -> PostTrainingPlan:
    """A step over `layout.global_batch` samples of `layout.seq` tokens, prompt and response together.

    critic, reward: as the actor when not given. has_reward_model: False for rules as the reward. response_tokens: half
    of the sequence when 0. group: answers to each prompt, the algorithm's usual number when 0; the batch counts
    answers. epochs: passes of training over one batch. generation_batch: sequences that one GPU group decodes at once,
    as many as memory allows when 0. Raises: InvalidValue.
    """
    recipe = RECIPES.get(algorithm.lower())
    if recipe is None:
        raise InvalidValue(f"unknown algorithm {algorithm[:40]!r}", hint="one of " + ", ".join(RECIPES))
    strategy = reference_strategy(reference) if recipe.has_reference else "none"
    if strategy == "shared_weights" and layout.tuning == "full":
        raise InvalidValue(
            "shared_weights needs adapters: without them the actor's weights move away from the reference",
            hint="set tuning to lora or qlora, or choose another strategy",
        )
    timed = step_seconds or (lambda a, t, lay: step_time.step_seconds(a, t, lay, stack or "unknown"))
    trained = msgspec.structs.replace(layout, global_batch=layout.global_batch * recipe.sequences)
    notes = [BASIS]
    models = [_trained("actor", arch, topology, trained, stack)]
    if recipe.has_critic:
        models.append(_trained("critic", critic or arch, topology, trained, stack))
    if recipe.has_reference:
        models.append(_reference(arch, topology, trained, strategy, notes))
    if recipe.has_reward and has_reward_model is not False:
        models.append(_frozen("reward", reward or arch, trained, "full_gpu"))
    actor = estimate_memory(arch, topology, trained, stack=stack)
    fixed = actor.parts.context + actor.parts.fragmentation
    phases: list[Phase] = []
    if recipe.generates:
        free = actor.capacity_bytes - sum(model.gpu_bytes for model in models) - fixed
        response = response_tokens or layout.seq // 2
        phases.append(_generation(arch, topology, trained, response, generation_batch, free, notes))
        if group or recipe.group > 1:
            notes.append(f"{group or recipe.group} answers to each prompt; the batch counts answers")
    scored = _scoring(models, arch, critic, reward, topology, trained, timed, is_policy_scored=recipe.generates)
    phases += [scored] if scored else []
    working = actor.parts.activations + actor.parts.logits + actor.parts.buffers
    phases.append(Phase(name="train_actor", seconds=epochs * timed(arch, topology, trained), working_bytes=working))
    if recipe.has_critic:
        other = critic or arch
        parts = estimate_memory(other, topology, trained, stack=stack).parts
        seconds = epochs * timed(other, topology, trained)
        phases.append(Phase(name="train_critic", seconds=seconds, working_bytes=parts.activations + parts.buffers))
    return _assembled(algorithm.lower(), strategy, models, phases, fixed, actor.capacity_bytes, topology, layout, notes)


def _assembled(
    algorithm: str,
    strategy: str,
    models: list[ModelPlan],
    phases: list[Phase],
    fixed: float,
    capacity: float,
    topology: Topology,
    layout: TrainingLayout,
    notes: list[str],
) -> PostTrainingPlan:
    value = sum(model.gpu_bytes for model in models) + max(phase.working_bytes for phase in phases) + fixed
    seconds = math.fsum(phase.seconds for phase in phases)
    probability = fit_probability(value, capacity, _COMPOSED_SIGMA)
    verdict = verdict_of(probability)
    if verdict != "fits":
        notes.append(
            "to fit: LoRA, a reference that shares weights or lies on the host, smaller micro-batches, more GPUs"
        )

    def composed(middle: float, unit: str, convention: str) -> Quantity:
        return Quantity(
            value=middle,
            unit=unit,
            low=middle * math.exp(-_Z80 * _COMPOSED_SIGMA),
            high=middle * math.exp(_Z80 * _COMPOSED_SIGMA),
            convention=convention,
            calibration=BASIS,
        )

    per_node = min(topology.gpus, topology.gpus_per_node)
    return PostTrainingPlan(
        algorithm=algorithm,
        reference_strategy=strategy,
        models=tuple(models),
        phases=tuple(phases),
        fixed_bytes=fixed,
        total=composed(value, "bytes", "most loaded GPU: all states, and the largest phase"),
        capacity_bytes=capacity,
        fit_probability=probability,
        verdict=verdict,
        step_s=composed(seconds, "s", "phases one after another"),
        samples_per_s=layout.global_batch / seconds if seconds else 0.0,
        host_bytes_per_node=sum(model.host_bytes for model in models) * per_node,
        extra_gpus=sum(model.extra_gpus for model in models),
        layout=layout,
        basis=BASIS,
        notes=tuple(notes),
    )


def _trained(role: str, arch: Architecture, topology: Topology, layout: TrainingLayout, stack: str) -> ModelPlan:
    memory = estimate_memory(arch, topology, layout, stack=stack)
    return ModelPlan(
        role=role,
        strategy=layout.tuning,
        params=count(arch).total,
        weights=memory.parts.weights,
        gradients=memory.parts.gradients,
        optimizer=memory.parts.optimizer,
        host_bytes=memory.host_bytes,
    )


def _frozen(
    role: str, arch: Architecture, layout: TrainingLayout, strategy: str, bytes_per_param: float = 2.0
) -> ModelPlan:
    """A model that only runs forward, spread as the actor is."""
    params = count(arch).total
    ways = layout.tp * layout.pp
    if layout.sharding in ("fsdp", "zero3", "hsdp"):
        ways *= layout.dp * layout.cp
    elif layout.ep > 1:
        experts = count(arch).routed_experts
        each = (params - experts) / ways + experts / (layout.pp * layout.ep)
        return ModelPlan(role=role, strategy=strategy, params=params, weights=each * bytes_per_param)
    return ModelPlan(role=role, strategy=strategy, params=params, weights=params * bytes_per_param / ways)


def _reference(
    arch: Architecture, topology: Topology, layout: TrainingLayout, strategy: str, notes: list[str]
) -> ModelPlan:
    params = count(arch).total
    if strategy == "full_gpu":
        return _frozen("reference", arch, layout, strategy)
    if strategy == "quantized":
        return _frozen("reference", arch, layout, strategy, NF4_BYTES)
    if strategy == "cpu_offload":
        whole = _frozen("reference", arch, layout, strategy)
        streamed = 2.0 * whole.weights / max(arch.layers / layout.pp, 1)  # the layer in use and the next
        return msgspec.structs.replace(
            whole, weights=min(whole.weights, streamed), host_bytes=whole.weights, note="layers stream from the host"
        )
    if strategy == "vllm_server":
        usable = topology.accelerator.visible_bytes * _KV_SHARE
        cards = max(1, math.ceil(2.0 * params / usable))
        cards = 1 << (cards - 1).bit_length()  # tensor parallelism by powers of two
        return ModelPlan(
            role="reference", strategy=strategy, params=params, weights=0.0, extra_gpus=cards, note="on GPUs of its own"
        )
    if strategy == "none":
        notes.append("without a reference model: its log-probabilities are computed before the run, or not used")
    return ModelPlan(role="reference", strategy=strategy, params=params, weights=0.0)


def _generation(
    arch: Architecture,
    topology: Topology,
    layout: TrainingLayout,
    response: int,
    batch: int,
    free: float,
    notes: list[str],
) -> Phase:
    """Decoding `response` tokens for every sample: weights and KV cache are read for each token of the batch."""
    device = topology.accelerator
    precision = precision_of(arch, "bf16")
    tp, capacity = layout.tp, float(device.visible_bytes)
    while weights_bytes(arch, ServingLayout(tp=tp), precision) > 0.5 * capacity and tp < topology.local_gpus:
        tp *= 2
    serving = ServingLayout(tp=tp)
    is_in_place = layout.pp == 1 and layout.tp == tp and layout.sharding in ("none", "zero1", "zero2")
    weights = weights_bytes(arch, serving, precision)
    gathered = 0.0 if is_in_place and layout.tuning != "qlora" else weights
    each = kv_bytes_of_sequence(arch, serving, precision, layout.seq)
    groups = max(1, layout.gpus // tp)
    share = math.ceil(layout.global_batch / groups)
    room = max(1, int((free - gathered) * 0.9 / each)) if each else share
    at_once = max(1, min(share, batch or share, room))
    prompt = layout.seq - response
    mean = kv_bytes_of_sequence(arch, serving, precision, prompt + response / 2)
    active = count(arch).active_no_input_embedding
    read = (weights + at_once * mean) / (device.memory_bytes_per_s * _DECODE_SHARE)
    computed = 2.0 * active * at_once / tp / (device.peak_flops("bf16") * _DECODE_SHARE)
    reductions = 2 * arch.layers * 10e-6 if tp > 1 else 0.0  # an all-reduce of a small message takes about 10 us
    rounds = math.ceil(share / at_once)
    prefill = 2.0 * active * prompt * share / tp / (device.peak_flops("bf16") * _DECODE_SHARE)
    if room < share:
        notes.append(f"{at_once} sequences decode at once: memory for keys and values is the limit")
    return Phase(
        name="generate",
        seconds=rounds * response * (max(read, computed) + reductions) + prefill,
        working_bytes=gathered + at_once * each,
        note=f"{groups} groups of {tp} GPUs, {at_once} sequences at once",
    )


def _scoring(
    models: list[ModelPlan],
    arch: Architecture,
    critic: Architecture | None,
    reward: Architecture | None,
    topology: Topology,
    layout: TrainingLayout,
    timed: StepSeconds,
    *,
    is_policy_scored: bool,
) -> Phase | None:
    """Forward passes of every other model, and of the actor before its update when it generated the batch."""
    scorers = [model for model in models if model.role != "actor"]
    if not scorers and not is_policy_scored:
        return None
    forward = _forward_s(arch, topology, layout, timed)
    seconds = sum(_score_s(model, critic, reward, topology, layout, timed, forward) for model in scorers)
    tokens = layout.micro_batch * layout.seq / layout.cp
    working = 6.0 * tokens * arch.vocab / layout.tp + 8.0 * tokens * arch.hidden
    seconds += forward if is_policy_scored else 0.0
    return Phase(name="score", seconds=seconds, working_bytes=working, note="forward only")


def _forward_s(arch: Architecture, topology: Topology, layout: TrainingLayout, timed: StepSeconds) -> float:
    """A forward pass is a third of a step without recomputation."""
    plain = msgspec.structs.replace(layout, recompute="none", tuning="full")
    return timed(arch, topology, plain) / 3.0


def _score_s(
    model: ModelPlan,
    critic: Architecture | None,
    reward: Architecture | None,
    topology: Topology,
    layout: TrainingLayout,
    timed: StepSeconds,
    forward: float,
) -> float:
    other = {"critic": critic, "reward": reward}.get(model.role)
    if model.role == "reference" and model.strategy in ("none", "vllm_server"):
        return 0.0
    seconds = forward if other is None else _forward_s(other, topology, layout, timed)
    if model.host_bytes and model.role == "reference":
        host = topology.pcie_bytes_per_s or topology.accelerator.pcie_bytes_per_s or 16e9
        seconds = max(seconds, model.host_bytes / host * layout.microbatches)
    return seconds


def describe(found: PostTrainingPlan) -> str:
    """One line for people."""
    return (
        f"{found.algorithm}: {found.total.value / GIB:.1f} of {found.capacity_bytes / GIB:.1f} GiB per GPU "
        f"({found.verdict}), {found.step_s.value:.1f} s a step"
    )
