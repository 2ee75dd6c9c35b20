"""Metadata readers: what they find in good files, and that no file can hurt them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.metadata import inspect
from agent.metadata.gguf import Header
from agent.metadata.limits import BadFile
from agent.metadata.safetensors import read_header


def safetensors(tensors: dict[str, Any], data: int) -> bytes:
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(pairs: dict[str, tuple[int, bytes]], tensors: list[tuple[str, list[int], int]]) -> bytes:
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, (kind, value) in pairs.items():
        body += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind in tensors:
        body += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        body += struct.pack("<IQ", kind, 0)
    return body


def u32(value: int) -> tuple[int, bytes]:
    return 4, struct.pack("<I", value)


GOOD_GGUF = gguf(
    {
        "general.architecture": (8, text("llama")),
        "llama.block_count": u32(2),
        "llama.attention.head_count": u32(4),
        "llama.attention.head_count_kv": (9, struct.pack("<IQ2I", 4, 2, 1, 2)),
        "llama.embedding_length": u32(64),
        "llama.context_length": u32(2_048),
        "general.file_type": u32(15),
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 3) + text("a") + text("b") + text("c")),
        "tokenizer.chat_template": (8, text("{{ messages }}")),
    },
    [("token_embd.weight", [64, 3], 0), ("blk.0.w", [64, 64], 12)],
)


def test_sharded_safetensors_with_config(tmp_path: Path) -> None:
    """Parameters are summed over shards by dtype, and config.json gives the rest."""
    one = {"a": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, "__metadata__": {"format": "pt"}}
    two = {"b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(safetensors(one, 64))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(safetensors(two, 12))
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "hidden_size": 576, "max_position_embeddings": 8192, "vocab_size": 49152,
        "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "awq", "bits": 4},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    format_name, detected = inspect(tmp_path)
    kept = detected.pop("config")
    assert format_name == "safetensors"
    assert kept == {key: value for key, value in config.items() if key != "architectures"}
    assert detected == {
        "architecture": "LlamaForCausalLM", "parameters": 35, "parameters_by_dtype": {"BF16": 32, "F32": 3},
        "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 576, "context": 8192, "vocab": 49152, "dtype": "bfloat16",
        "quantisation": "awq-4bit", "chat_template": "{{ x }}", "format": "safetensors",
    }  # fmt: skip


def test_gguf(tmp_path: Path) -> None:
    """A GGUF header gives architecture, sizes, quantisation, vocabulary and template."""
    (tmp_path / "m.gguf").write_bytes(GOOD_GGUF)
    format_name, detected = inspect(tmp_path)
    kept = detected.pop("gguf")
    assert (kept["general.architecture"], kept["llama.block_count"]) == ("llama", 2)
    assert all(key.startswith("llama.") for key in kept if key != "general.architecture")
    assert (format_name, detected) == (
        "gguf",
        {
            "architecture": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 64, "context": 2_048,
            "vocab": 3, "quantisation": "Q4_K_M", "chat_template": "{{ messages }}", "parameters": 64 * 3 + 64 * 64,
            "format": "gguf",
        },
    )  # fmt: skip


@pytest.mark.skipif("HERDER_TEST_GGUF" not in os.environ, reason="HERDER_TEST_GGUF names no real model")
def test_real_gguf(tmp_path: Path) -> None:
    """SmolLM2-135M is read as what it is."""
    (tmp_path / "m.gguf").symlink_to(os.environ["HERDER_TEST_GGUF"])
    _, detected = inspect(tmp_path)
    assert (detected["architecture"], detected["layers"], detected["vocab"]) == ("llama", 30, 49_152)
    assert detected["parameters"] == 134_515_008


@pytest.mark.parametrize(
    "header",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (200).to_bytes(8, "little") + b"{}",
        b"\x02",
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, 4),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, 4),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, 4),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4),
        safetensors({"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}, 4),
        safetensors({"a": [1, 2, 3]}, 4),
        (8).to_bytes(8, "little") + b"[[[[[[[[",
    ],
)
def test_bad_safetensors(tmp_path: Path, header: bytes) -> None:
    """A header that lies about lengths, shapes, offsets or types is refused, and the model is still described."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(header)
    with pytest.raises(BadFile):
        read_header(path)
    format_name, detected = inspect(tmp_path)
    assert format_name == "safetensors"
    assert detected["problems"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"GGML" + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 40),
        gguf({"a": (9, struct.pack("<IQ", 4, 1 << 50))}, []),
        gguf({"a": (9, struct.pack("<IQ", 8, 3_000_000))}, []),
        gguf({"a": (9, struct.pack("<IQ", 9, 1) * 10)}, []),
        gguf({"a": (77, b"")}, []),
        gguf({}, [("t", [1 << 40, 1 << 40], 0)]),
        gguf({}, [("t", [1] * 9, 0)]),
        GOOD_GGUF[:-30],
    ],
)
def test_bad_gguf(tmp_path: Path, body: bytes) -> None:
    """Huge counts, cut files, deep arrays and unknown types are refused without being believed."""
    path = tmp_path / "m.gguf"
    path.write_bytes(body)
    with pytest.raises(BadFile):
        Header(path)
    assert inspect(tmp_path)[1]["problems"]


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(GOOD_GGUF) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD_GGUF)))
def test_any_damage_is_survived(tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int) -> None:
    """Whatever byte is changed and wherever the file is cut, inspect answers."""
    directory = tmp_path_factory.mktemp("gguf")
    body = bytearray(GOOD_GGUF)
    body[at] = value
    (directory / "m.gguf").write_bytes(bytes(body[:cut]))
    assert inspect(directory)[0] == "gguf"


@pytest.mark.parametrize("config", ["[" * 100_000, "[]", "{", '{"num_hidden_layers": -3, "vocab_size": 1e400}', "\xff"])
def test_bad_config(tmp_path: Path, config: str) -> None:
    """A config.json that is not one gives no numbers and no exception."""
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    format_name, detected = inspect(tmp_path)
    assert format_name == "other"
    assert "layers" not in detected


def test_pickle_is_flagged(tmp_path: Path) -> None:
    """A model of pickled weights is said to be one."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert inspect(tmp_path)[0] == "pickle"
