"""What an engine will take of a node's memory and of each of its GPUs, by part: what placement reserves.

llama.cpp allocates all of its cache when it starts, so its need is a sum. vLLM and SGLang take a share of each GPU
whatever the model is: their need is that share, and the model has to fit into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from head.planner.model.architecture import Architecture, Attention
from head.planner.model.kv_cache import layer_bytes_per_token, layer_state_bytes
from head.planner.model.parameters import count as count_parameters
from head.planner.serving.engine_step import ServingLayout, precision_of
from head.planner.serving.memory import (
    CONTEXT_BYTES,
    MemorySettings,
    activation_peak_bytes,
    ggml_kv_bits,
    kv_budget_bytes,
    kv_bytes_of_sequence,
    llama_cpp_buffers,
)

MIB = 1 << 20
# llama-server without model, cache and buffers: 41 MiB with a vocabulary of 49,152 (20 MiB of its libraries' pages,
# 21 MiB of its own, most of that the tokenizer's tables). Measured: docs/planner.md, "Memory of llama.cpp, measured".
LLAMACPP_CODE_BYTES = 24 * MIB
LLAMACPP_TOKEN_BYTES = 360  # for each vocabulary entry
LLAMACPP_GPU_HOST_BYTES = 256 * MIB  # the CUDA runtime in host memory; not measured here
MASK_BYTES = 2  # of one token of a micro-batch and one cell of its slot's cache (flash attention, f16)
# Without flash attention: scores of a micro-batch against a slot's cache in f32, and what is made of them, in scores.
SCORES_COPIES = 1.4
CELLS = 256  # slots' caches are padded to this many tokens
USUAL_SLOTS = 4  # llama-server's own choice
# Models whose sliding layers llama.cpp keeps in a cache of the window's size; for others every layer's is whole.
_WINDOWED = ("gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss", "cohere2", "llama4")
_DEFAULT_SHARE: dict[str, float] = {"vllm": 0.9, "sglang": 0.88}
LARGEST = 1 << 40  # of a setting


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by part. `host`: of the node's memory, `gpu`: of each GPU. `share`: of each GPU the engine takes whatever
    the model is (0: only what the parts say); the parts must fit into it."""

    rule: str
    host: dict[str, int] = {}
    gpu: dict[str, int] = {}
    share: float = 0.0

    @property
    def host_bytes(self) -> int:
        """Of the node's memory; 0: not estimated."""
        return sum(self.host.values())

    @property
    def gpu_bytes(self) -> int:
        """Of each GPU; 0: not estimated."""
        return sum(self.gpu.values())


class LlamaCppSettings(msgspec.Struct, frozen=True, kw_only=True):
    """llama-server's settings that memory depends on. Zeros: as the server chooses."""

    context: int = 0  # tokens over all slots; 0: what the model was made for
    slots: int = 0
    gpu_layers: int = -1  # -1: all
    key_type: str = "f16"
    value_type: str = "f16"
    micro_batch: int = 512
    has_flash_attention: bool = True
    prompt_cache_bytes: int = 0


class SharedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of an engine that takes a share of each GPU. Zeros: as the engine chooses."""

    engine: Literal["vllm", "sglang"]
    share: float = 0.0
    context: int = 0
    kv_type: str = ""
    tp: int = 1
    pp: int = 1


def llama_cpp_settings(config: dict[str, Any], words: Sequence[str]) -> LlamaCppSettings:
    """From a service's configuration, as the agent's adapter reads it, and the words of its command line, which win."""
    given = _options(words, _LLAMACPP_OPTIONS)
    context, slots = _whole(config.get("context")), _whole(config.get("parallel"))
    layers = config.get("gpu_layers", -1)
    cache = _whole(config.get("prompt_cache_mib"))
    return LlamaCppSettings(
        context=_whole(given.get("context"), context),
        slots=_whole(given.get("slots"), slots),
        gpu_layers=_whole(given.get("gpu_layers"), layers if isinstance(layers, int) and layers >= 0 else -1),
        key_type=given.get("key_type", "f16")[:8],
        value_type=given.get("value_type", "f16")[:8],
        micro_batch=min(_whole(given.get("micro_batch"), 512) or 512, 1 << 16),
        has_flash_attention=given.get("flash", "auto").lower() not in ("off", "0", "false", "disabled"),
        prompt_cache_bytes=_whole(given.get("cache"), cache) * MIB,
    )


def shared_settings(words: Sequence[str], gpus: int) -> SharedSettings | None:
    """Those of the vLLM or SGLang server that the words of a command start; None when they start another program."""
    plain = [word.rpartition("/")[2] for word in words[:8]]
    if "vllm" in plain[:1] or any(word.startswith("vllm.entrypoints") for word in plain):
        engine: Literal["vllm", "sglang"] = "vllm"
    elif "sglang" in plain[:1] or "sglang.launch_server" in plain:
        engine = "sglang"
    else:
        return None
    given = _options(words, _SHARED_OPTIONS)
    try:
        share = float(given.get("share", ""))
    except ValueError:
        share = 0.0
    pp = max(1, _whole(given.get("pp"), 1))
    return SharedSettings(
        engine=engine,
        share=share if 0 < share <= 1 else _DEFAULT_SHARE[engine],
        context=_whole(given.get("context")),
        kv_type="fp8" if given.get("kv_type", "").startswith("fp8") else "",
        tp=max(1, _whole(given.get("tp"), max(1, gpus // pp))),
        pp=pp,
    )


def llama_cpp_need(arch: Architecture, stored_bytes: int, settings: LlamaCppSettings, gpus: int) -> MemoryNeed:
    """llama-server's need, with its model on the CPU (`gpus` 0, or no layers on them) or split by layers over GPUs.

    stored_bytes: of the weight files. They are mapped: all of them are resident on a CPU after the first token.
    """
    slots = settings.slots or USUAL_SLOTS
    slot = _padded((settings.context or arch.context or 4_096) / (slots if settings.slots else 1))
    cells = slot * (slots if settings.slots else 1)
    layers = 0 if not gpus else arch.layers + 1 if settings.gpu_layers < 0 else settings.gpu_layers
    buffers = llama_cpp_buffers(
        arch,
        weight_bits=8 * stored_bytes / max(1, count_parameters(arch).total),
        context=cells,
        slots=slots,
        gpu_layers=layers,
        micro_batch=settings.micro_batch,
    )
    cache = _llama_cpp_cache(arch, settings, slot=slot, cells=cells, slots=slots)
    compute = math.ceil(buffers.compute_bytes + _attention_bytes(arch, settings, slot))
    process = LLAMACPP_CODE_BYTES + LLAMACPP_TOKEN_BYTES * arch.vocab
    kinds = (
        settings.key_type if settings.key_type == settings.value_type else f"{settings.key_type}/{settings.value_type}"
    )
    rule = f"llama.cpp, {cells} tokens of {kinds} cache over {slots} slots"
    host = {"weights": stored_bytes, "kv_cache": math.ceil(cache), "buffers": compute, "process": process}
    if settings.prompt_cache_bytes:
        host["prompt_cache"] = settings.prompt_cache_bytes
    if layers == 0:
        return MemoryNeed(rule=rule, host=host)
    offloaded = min(layers, arch.layers) / max(1, arch.layers)
    fullest = math.ceil(arch.layers * offloaded / gpus) / max(1, arch.layers)  # of one GPU, of all layers
    table = arch.vocab * arch.hidden * 8 * stored_bytes / max(1, count_parameters(arch).total) / 8
    head = table if layers > arch.layers else 0.0
    on_gpus = max(0.0, buffers.gpu_weights_bytes - head)
    host |= {
        # the input embedding stays with the CPU, also where it is the head as well
        "weights": math.ceil(max(table, stored_bytes - on_gpus - (0.0 if arch.is_tied else head))),
        "kv_cache": math.ceil(cache * (1 - offloaded)),
        "process": process + LLAMACPP_GPU_HOST_BYTES,
    }
    gpu = {
        "weights": math.ceil(on_gpus * fullest / offloaded + head),
        "kv_cache": math.ceil(cache * fullest),
        "buffers": compute,
        "process": math.ceil(CONTEXT_BYTES),
    }
    return MemoryNeed(rule=f"{rule}, {min(layers, arch.layers)} layers on {gpus} GPU", host=host, gpu=gpu)


def _llama_cpp_cache(arch: Architecture, settings: LlamaCppSettings, *, slot: int, cells: int, slots: int) -> float:
    """Bytes of keys, values and recurrent states of all layers."""
    total = 0.0
    for group in arch.groups:
        attention = group.attention
        kept = cells
        if attention.window and attention.kind in ("sliding", "chunked") and _is_windowed(arch):
            kept = min(cells, slots * min(slot, _padded(attention.window + settings.micro_batch)))
        total += group.count * (
            layer_bytes_per_token(attention, size=1.0) * _element_bytes(attention, settings) * kept
            + layer_state_bytes(attention) * slots
        )
    return total


def _attention_bytes(arch: Architecture, settings: LlamaCppSettings, slot: int) -> float:
    """Buffers that grow with a slot's context: the mask, and the scores where they are not made block by block."""
    cells = settings.micro_batch * min(slot, arch.context or slot)
    if settings.has_flash_attention:
        return MASK_BYTES * cells
    heads = max((group.attention.heads for group in arch.groups), default=0)
    return 4.0 * cells * (1 + SCORES_COPIES * heads)


def _element_bytes(attention: Attention, settings: LlamaCppSettings) -> float:
    keys, values = ggml_kv_bits(settings.key_type), ggml_kv_bits(settings.value_type)
    return (keys if attention.kind in ("mla", "sparse_mla") else (keys + values) / 2) / 8


def _is_windowed(arch: Architecture) -> bool:
    return arch.family.replace("-", "_").startswith(_WINDOWED)


def shared_need(arch: Architecture, stored_bytes: int, settings: SharedSettings) -> MemoryNeed:
    """The need of vLLM or SGLang on each of its GPUs: their share, into which the parts with one full sequence fit.

    The host's memory is not estimated here.
    """
    layout = ServingLayout(tp=settings.tp, pp=settings.pp)
    precision = precision_of(arch, "", settings.kv_type)
    context = settings.context or arch.context or 4_096
    _, parts = kv_budget_bytes(arch, layout, precision, settings.engine, MemorySettings(), visible_bytes=0.0)
    peak = activation_peak_bytes(arch, layout, batched_tokens=min(8_192, max(2_048, context)), sequences=256)
    gpu = {
        "weights": math.ceil(max(parts.weights_bytes, stored_bytes / layout.gpus)),
        "kv_cache": math.ceil(kv_bytes_of_sequence(arch, layout, precision, context)),
        "process": math.ceil(parts.context_bytes),
    }
    if settings.engine == "vllm":  # SGLang's activations live beside its share
        gpu["buffers"] = math.ceil(peak)
    rule = f"{settings.engine}, {settings.share:g} of each GPU, one sequence of {context} tokens at least"
    return MemoryNeed(rule=rule, gpu=gpu, share=settings.share)


_LLAMACPP_OPTIONS = {
    "-c": "context", "--ctx-size": "context", "-np": "slots", "--parallel": "slots",
    "-ngl": "gpu_layers", "--gpu-layers": "gpu_layers", "--n-gpu-layers": "gpu_layers",
    "-ctk": "key_type", "--cache-type-k": "key_type", "-ctv": "value_type", "--cache-type-v": "value_type",
    "-fa": "flash",
    "--flash-attn": "flash",
    "-ub": "micro_batch", "--ubatch-size": "micro_batch", "-cram": "cache", "--cache-ram": "cache",
}  # fmt: skip
_SHARED_OPTIONS = {
    "--gpu-memory-utilization": "share", "--mem-fraction-static": "share",
    "--max-model-len": "context", "--context-length": "context", "--kv-cache-dtype": "kv_type",
    "--tensor-parallel-size": "tp", "-tp": "tp", "--tp": "tp", "--tp-size": "tp",
    "--pipeline-parallel-size": "pp", "-pp": "pp", "--pp-size": "pp",
}  # fmt: skip


def _options(words: Sequence[str], names: dict[str, str]) -> dict[str, str]:
    """The values of the options in `names` (flag to setting), the last of each; `--flag value` and `--flag=value`."""
    found: dict[str, str] = {}
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        setting = names.get(flag)
        if setting is not None and (equals or index + 1 < len(words)):
            found[setting] = value if equals else words[index + 1]
    return found


def _whole(value: Any, default: int = 0) -> int:
    """A whole number of a configuration or of a command line, bounded; the default for anything else."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= 15:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return default
    return min(value, LARGEST)


def _padded(tokens: float) -> int:
    return max(1, math.ceil(tokens / CELLS)) * CELLS
