"""Command lines of inference engines from serving settings: only options that the engine has.

Options and their spelling were read from the engines themselves:
vLLM 0.32.0 (`vllm serve --help=all`), SGLang 0.5.23 (srt/arg_groups/fields), llama.cpp build 10434
(`llama-server --help`), TensorRT-LLM 1.2 (tensorrt_llm/commands/serve.py). What an engine has no option for is said in
`notes`, never written as a made-up flag.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from common.errors import InvalidValue

Engine = Literal["vllm", "sglang", "llamacpp", "tensorrt_llm"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "llamacpp", "tensorrt_llm")
VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.23", "llamacpp": "build 10434", "tensorrt_llm": "1.2"}

# Element types of the KV cache, by engine. llama.cpp's are ggml types.
KV_TYPES: dict[str, dict[str, str]] = {
    "vllm": {"auto": "auto", "bf16": "bfloat16", "fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"},
    "sglang": {"auto": "auto", "bf16": "bfloat16", "fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"},
    "llamacpp": {"auto": "f16", "fp16": "f16", "bf16": "bf16", "int8": "q8_0", "q8_0": "q8_0", "q4_0": "q4_0"},
    "tensorrt_llm": {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8", "nvfp4": "nvfp4"},
}
TEXT_LIMIT = 4_096


class ServingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is served. Zero and empty leave the choice to the engine. Tokens are tokens, memory is a share."""

    model: str
    served_name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False  # experts are split over the GPUs instead of their matrices
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    memory_share: float = 0.0  # of the GPU's memory that the engine may take
    max_model_len: int = 0
    max_sequences: int = 0
    max_batched_tokens: int = 0
    is_chunked_prefill: bool = True
    has_prefix_cache: bool = True
    block_size: int = 0
    kv_dtype: str = "auto"
    dtype: str = "auto"
    quantisation: str = ""  # as the engine names it; empty: as the checkpoint says
    is_eager: bool = False  # no CUDA graphs
    draft_model: str = ""  # speculative decoding
    draft_tokens: int = 0
    draft_method: str = ""  # empty: a draft model; ngram, eagle, eagle3, mtp
    has_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    gpu_layers: int = -1  # llama.cpp: layers on the GPU; -1 all
    flash_attention: Literal["auto", "on", "off"] = "auto"
    has_metrics: bool = True
    role: Literal["both", "prefill", "decode"] = "both"  # of a disaggregated pair
    is_remote_code_trusted: bool = False


class EngineCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The command of one engine process; `files` must lie beside it, by name."""

    engine: Engine
    version: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    files: dict[str, str] = {}
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line for a POSIX shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " ".join([*assignments, shlex.join(self.argv)])


def engine_command(engine: str, settings: ServingSettings) -> EngineCommand:
    """The command of `engine` for the settings.

    Raises: InvalidValue for an unknown engine, or a setting that no engine could take.
    """
    _check(settings)
    match engine:
        case "vllm":
            return _vllm(settings)
        case "sglang":
            return _sglang(settings)
        case "llamacpp" | "llama.cpp" | "llama_cpp":
            return _llamacpp(settings)
        case "tensorrt_llm" | "tensorrt-llm" | "trtllm":
            return _tensorrt_llm(settings)
    raise InvalidValue(f"unknown engine {engine[:40]!r}", hint="one of " + ", ".join(ENGINES), known=list(ENGINES))


def _check(settings: ServingSettings) -> None:
    """Refuse texts that could be read as options or break a line, and numbers out of range."""
    for field in ("model", "served_name", "host", "draft_model", "quantisation", "dtype", "master_addr"):
        text = getattr(settings, field)
        if text.startswith("-") or len(text) > TEXT_LIMIT or any(ord(char) < 32 or ord(char) == 127 for char in text):
            raise InvalidValue(f"{field} must be one line that does not look like an option", field=field)
    if not settings.model:
        raise InvalidValue("model is empty", field="model")
    if not 1 <= settings.port <= 65_535:
        raise InvalidValue("port must be between 1 and 65535", field="port")
    if not 0 <= settings.memory_share <= 1:
        raise InvalidValue("memory_share must be between 0 and 1", field="memory_share")
    for field in ("tp", "pp", "dp", "nodes", "max_loras", "max_lora_rank"):
        if not 1 <= getattr(settings, field) <= 65_536:
            raise InvalidValue(f"{field} must be between 1 and 65536", field=field)
    for field in ("max_model_len", "max_sequences", "max_batched_tokens", "block_size", "draft_tokens", "node_rank"):
        if not 0 <= getattr(settings, field) <= 1 << 40:
            raise InvalidValue(f"{field} must not be negative", field=field)


def _pairs(pairs: Sequence[tuple[str, object]]) -> list[str]:
    """Options with their values, without those that are left to the engine (0, "" and None)."""
    found: list[str] = []
    for option, value in pairs:
        if value not in (0, 0.0, "", None):
            found += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return found


def _kv_type(engine: Engine, settings: ServingSettings, notes: list[str]) -> str:
    """The engine's word for the KV cache's element type; its default with a note where it has none."""
    types = KV_TYPES[engine]
    word = settings.kv_dtype.lower()
    if word not in types:
        notes.append(f"{engine} has no KV cache of {settings.kv_dtype}: left as it is ({', '.join(sorted(types))})")
        return types["auto"]
    return types[word]


def _vllm(settings: ServingSettings) -> EngineCommand:
    """`vllm serve`."""
    notes: list[str] = []
    kv_type = _kv_type("vllm", settings, notes)
    argv = ["vllm", "serve", settings.model, "--host", settings.host, "--port", str(settings.port)]
    argv += _pairs(
        [
            ("--served-model-name", settings.served_name),
            ("--tensor-parallel-size", settings.tp if settings.tp > 1 else 0),
            ("--pipeline-parallel-size", settings.pp if settings.pp > 1 else 0),
            ("--data-parallel-size", settings.dp if settings.dp > 1 else 0),
            ("--gpu-memory-utilization", settings.memory_share),
            ("--max-model-len", settings.max_model_len),
            ("--max-num-seqs", settings.max_sequences),
            ("--max-num-batched-tokens", settings.max_batched_tokens),
            ("--block-size", settings.block_size),
            ("--kv-cache-dtype", "" if kv_type == "auto" else kv_type),
            ("--dtype", "" if settings.dtype == "auto" else _vllm_dtype(settings.dtype)),
            ("--quantization", settings.quantisation),
        ]
    )
    argv += ["--enable-expert-parallel"] if settings.ep else []
    argv += [] if settings.is_chunked_prefill else ["--no-enable-chunked-prefill"]
    argv += ["--enable-prefix-caching" if settings.has_prefix_cache else "--no-enable-prefix-caching"]
    argv += ["--enforce-eager"] if settings.is_eager else []
    argv += ["--trust-remote-code"] if settings.is_remote_code_trusted else []
    argv += [] if settings.has_metrics else ["--disable-log-stats"]
    if settings.has_lora:
        argv += [
            "--enable-lora",
            "--max-loras",
            str(settings.max_loras),
            "--max-lora-rank",
            str(settings.max_lora_rank),
        ]
    if settings.draft_method or settings.draft_model:
        argv += ["--speculative-config", json.dumps(_vllm_draft(settings), sort_keys=True)]
    if settings.role != "both":
        role = "kv_producer" if settings.role == "prefill" else "kv_consumer"
        argv += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": role}, sort_keys=True)]
    if settings.nodes > 1:
        argv += ["--nnodes", str(settings.nodes), "--node-rank", str(settings.node_rank)]
        argv += _pairs([("--master-addr", settings.master_addr)])
        argv += ["--headless"] if settings.node_rank else []
    return EngineCommand(engine="vllm", version=VERSIONS["vllm"], argv=tuple(argv), notes=tuple(notes))


def _vllm_dtype(dtype: str) -> str:
    """vLLM's words are PyTorch's."""
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)


def _vllm_draft(settings: ServingSettings) -> dict[str, Any]:
    """The value of --speculative-config (the older --speculative-model option is gone)."""
    found: dict[str, Any] = {"num_speculative_tokens": settings.draft_tokens or 5}
    if settings.draft_method:
        found["method"] = settings.draft_method
    if settings.draft_model:
        found["model"] = settings.draft_model
    if settings.draft_method == "ngram":
        found["prompt_lookup_max"] = 4
    return found


def _sglang(settings: ServingSettings) -> EngineCommand:
    """`python -m sglang.launch_server`."""
    notes: list[str] = []
    kv_type = _kv_type("sglang", settings, notes)
    argv = ["python", "-m", "sglang.launch_server", "--model-path", settings.model]
    argv += ["--host", settings.host, "--port", str(settings.port)]
    chunk = (settings.max_batched_tokens or 0) if settings.is_chunked_prefill else -1
    argv += _pairs(
        [
            ("--served-model-name", settings.served_name),
            ("--tp-size", settings.tp if settings.tp > 1 else 0),
            ("--pp-size", settings.pp if settings.pp > 1 else 0),
            ("--dp-size", settings.dp if settings.dp > 1 else 0),
            ("--ep-size", settings.tp if settings.ep and settings.tp > 1 else 0),
            ("--mem-fraction-static", settings.memory_share),
            ("--context-length", settings.max_model_len),
            ("--max-running-requests", settings.max_sequences),
            ("--chunked-prefill-size", chunk),
            ("--page-size", settings.block_size),
            ("--kv-cache-dtype", "" if kv_type == "auto" else kv_type),
            ("--dtype", "" if settings.dtype == "auto" else _vllm_dtype(settings.dtype)),
            ("--quantization", settings.quantisation),
        ]
    )
    argv += [] if settings.has_prefix_cache else ["--disable-radix-cache"]
    argv += ["--disable-cuda-graph"] if settings.is_eager else []
    argv += ["--trust-remote-code"] if settings.is_remote_code_trusted else []
    argv += ["--enable-metrics"] if settings.has_metrics else []
    if settings.has_lora:
        argv += ["--enable-lora", "--max-loras-per-batch", str(settings.max_loras)]
        argv += ["--max-lora-rank", str(settings.max_lora_rank)]
    if settings.draft_method or settings.draft_model:
        methods = {"": "STANDALONE", "ngram": "NGRAM", "eagle": "EAGLE", "eagle3": "EAGLE3", "mtp": "NEXTN"}
        argv += ["--speculative-algorithm", methods.get(settings.draft_method, settings.draft_method.upper())]
        argv += _pairs([("--speculative-draft-model-path", settings.draft_model)])
        argv += _pairs([("--speculative-num-draft-tokens", settings.draft_tokens)])
    if settings.role != "both":
        argv += ["--disaggregation-mode", settings.role]
    if settings.nodes > 1:
        argv += ["--nnodes", str(settings.nodes), "--node-rank", str(settings.node_rank)]
        argv += _pairs([("--dist-init-addr", settings.master_addr)])
    return EngineCommand(engine="sglang", version=VERSIONS["sglang"], argv=tuple(argv), notes=tuple(notes))


def _llamacpp(settings: ServingSettings) -> EngineCommand:
    """`llama-server`. Its context is shared by all slots, so it is as long as all of them together."""
    notes: list[str] = []
    kv_type = _kv_type("llamacpp", settings, notes)
    slots = settings.max_sequences or 1
    argv = ["llama-server", "--model", settings.model, "--host", settings.host, "--port", str(settings.port)]
    argv += _pairs(
        [
            ("--alias", settings.served_name),
            ("--ctx-size", settings.max_model_len * slots),
            ("--parallel", settings.max_sequences),
            ("--batch-size", settings.max_batched_tokens),
        ]
    )
    argv += ["--n-gpu-layers", "all" if settings.gpu_layers < 0 else str(settings.gpu_layers)]
    if settings.flash_attention != "auto" or kv_type not in ("f16", "bf16"):
        # a quantised V cache works only with flash attention
        argv += ["--flash-attn", settings.flash_attention if settings.flash_attention != "auto" else "on"]
    if kv_type != "f16":
        argv += ["--cache-type-k", kv_type, "--cache-type-v", kv_type]
    if settings.tp > 1:
        argv += ["--split-mode", "row"]
    elif settings.pp > 1:
        argv += ["--split-mode", "layer"]
    argv += [] if settings.has_prefix_cache else ["--no-cache-prompt"]
    argv += ["--metrics"] if settings.has_metrics else []
    if settings.draft_model:
        argv += ["--spec-draft-model", settings.draft_model]
        argv += _pairs([("--spec-draft-n-max", settings.draft_tokens)])
    for has_it, what in (
        (settings.dp > 1, "data parallelism: start several servers"),
        (settings.ep, "expert parallelism"),
        (settings.nodes > 1, "several nodes by rank: it reaches other machines through --rpc"),
        (bool(settings.quantisation), "a quantisation option: the GGUF file is quantised"),
        (settings.memory_share > 0, "a share of memory: it takes what its context needs"),
        (settings.draft_method not in ("", "draft"), f"drafting by {settings.draft_method} from these settings"),
        (settings.role != "both", "disaggregated prefill"),
        (settings.block_size > 0, "blocks in its KV cache"),
    ):
        if has_it:
            notes.append(f"llama.cpp has no {what}")
    return EngineCommand(engine="llamacpp", version=VERSIONS["llamacpp"], argv=tuple(argv), notes=tuple(notes))


def _tensorrt_llm(settings: ServingSettings) -> EngineCommand:
    """`trtllm-serve`, with the KV cache's settings in a YAML file (JSON is YAML)."""
    notes: list[str] = []
    kv_type = _kv_type("tensorrt_llm", settings, notes)
    argv = ["trtllm-serve", settings.model, "--host", settings.host, "--port", str(settings.port)]
    argv += _pairs(
        [
            ("--tp_size", settings.tp if settings.tp > 1 else 0),
            ("--pp_size", settings.pp if settings.pp > 1 else 0),
            ("--ep_size", settings.tp if settings.ep and settings.tp > 1 else 0),
            ("--max_batch_size", settings.max_sequences),
            ("--max_num_tokens", settings.max_batched_tokens),
            ("--max_seq_len", settings.max_model_len),
            ("--kv_cache_free_gpu_memory_fraction", settings.memory_share),
        ]
    )
    argv += ["--enable_chunked_prefill"] if settings.is_chunked_prefill else []
    argv += ["--trust_remote_code"] if settings.is_remote_code_trusted else []
    cache: dict[str, Any] = {"enable_block_reuse": settings.has_prefix_cache}
    if kv_type != "auto":
        cache["dtype"] = kv_type
    if settings.block_size:
        cache["tokens_per_block"] = settings.block_size
    files = {"trtllm.yaml": json.dumps({"kv_cache_config": cache}, indent=2, sort_keys=True) + "\n"}
    argv += ["--config", "trtllm.yaml"]
    if settings.memory_share:
        notes.append("its memory fraction is of what is free after the weights, not of the whole GPU")
    for has_it, what in (
        (settings.dp > 1, "data parallelism over whole models: start several servers"),
        (bool(settings.served_name), "another name for the model in its API"),
        (
            bool(settings.draft_method or settings.draft_model),
            "speculative decoding: set speculative_config in the YAML",
        ),
        (bool(settings.quantisation), "a quantisation option: the checkpoint says it"),
        (settings.role != "both", "a role on this line: use trtllm-serve disaggregated"),
        (settings.has_lora, "LoRA options on this line: set lora_config in the YAML"),
    ):
        if has_it:
            notes.append(f"trtllm-serve has no {what}")
    return EngineCommand(
        engine="tensorrt_llm", version=VERSIONS["tensorrt_llm"], argv=tuple(argv), files=files, notes=tuple(notes)
    )
