"""config.json and tokenizer_config.json as Hugging Face models have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from agent.metadata.dimensions import dimensions
from agent.metadata.limits import JSON_BYTES, NUMBER, TEMPLATE_CHARS, BadFile
from herder.decoding import UNREADABLE

_NUMBERS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "context": ("max_position_embeddings", "n_positions", "seq_length", "n_ctx", "max_seq_len"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "head_dim": ("head_dim",),
}


def describe(directory: Path) -> dict[str, Any]:
    """What the JSON files say; nothing when there are none. Raises: BadFile, OSError."""
    detected = _from_config(_read(directory / "config.json"))
    template = _template(directory)
    if template is not None:
        detected["chat_template"] = template
    return detected


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config") or config.get("llm_config") or config.get("language_config")
    layered = {**config, **inner} if isinstance(inner, dict) else config
    detected: dict[str, Any] = {}
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        detected["architecture"] = names[0][:100]
    elif isinstance(config.get("model_type"), str):
        detected["architecture"] = config["model_type"][:100]
    for key, candidates in _NUMBERS.items():
        for candidate in candidates:
            value = layered.get(candidate)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < NUMBER:
                detected[key] = value
                break
    if "heads" in detected:
        detected.setdefault("kv_heads", detected["heads"])
    dtype = layered.get("torch_dtype") or layered.get("dtype")
    if isinstance(dtype, str):
        detected["dtype"] = dtype.removeprefix("torch.")[:40]
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict):
        detected["quantisation"] = _quantisation(quantisation)
    if "hidden" in detected and (kept := dimensions(layered)):
        detected["config"] = kept
    return detected


def _quantisation(config: dict[str, Any]) -> str:
    method = config.get("quant_method")
    text = method if isinstance(method, str) else "unknown"
    bits = config.get("bits") or config.get("w_bit")
    if isinstance(bits, int) and not isinstance(bits, bool) and 0 < bits <= 64:
        return f"{text[:40]}-{bits}bit"
    return text[:40]


def _template(directory: Path) -> str | bool | None:
    for name in ("chat_template.jinja",):
        path = directory / name
        if path.is_file():
            return _short(path.read_bytes()[: 4 * TEMPLATE_CHARS + 1].decode(errors="replace"))
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read(directory / name).get("chat_template")
        if isinstance(template, str) and template:
            return _short(template)
        if isinstance(template, list) and template:
            return True  # several named templates
    return None


def _short(template: str) -> str | bool:
    return template if len(template) <= TEMPLATE_CHARS else True


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            body = file.read(JSON_BYTES + 1)
    except FileNotFoundError:
        return {}
    if len(body) > JSON_BYTES:
        raise BadFile(f"{path.name}: larger than {JSON_BYTES} bytes")
    try:
        document = msgspec.json.decode(body)
    except UNREADABLE as error:
        raise BadFile(f"{path.name}: {str(error)[:120]}") from None
    if not isinstance(document, dict):
        raise BadFile(f"{path.name}: not an object")
    return document
