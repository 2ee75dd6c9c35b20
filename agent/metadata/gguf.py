"""GGUF headers: key-value pairs and tensor infos, from the front of the file.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from agent.metadata import dimensions
from agent.metadata.limits import (
    GGUF_ARRAY_DEPTH,
    GGUF_ARRAY_ITEMS,
    GGUF_KEY_BYTES,
    GGUF_PAIRS,
    GGUF_STRING_BYTES,
    NUMBER,
    TEMPLATE_CHARS,
    TENSORS,
    BadFile,
    product,
)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class Skipped:
    """An array whose items were not kept; `count` is how many there are."""

    def __init__(self, count: int) -> None:
        self.count = count


class Header:
    """One file's header: pairs by key, elements by tensor type."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._left = path.stat().st_size
        self.pairs: dict[str, Any] = {}
        self.elements: dict[int, int] = {}
        with path.open("rb", buffering=1 << 20) as file:
            self._read(file)

    def _read(self, file: BinaryIO) -> None:
        if self._take(file, 4) != b"GGUF":
            raise BadFile(f"{self.name}: does not begin with GGUF")
        version = self._number(file, "I")
        if version not in (2, 3):
            hint = ", or it is big-endian" if version > 0xFFFF else ""
            raise BadFile(f"{self.name}: GGUF version {version} is not known{hint}")
        tensors, pairs = self._number(file, "Q"), self._number(file, "Q")
        if tensors > TENSORS or pairs > GGUF_PAIRS:
            raise BadFile(f"{self.name}: {tensors} tensors and {pairs} keys are more than there can be")
        for _ in range(pairs):
            key = self._string(file, GGUF_KEY_BYTES)
            self.pairs[key] = self._value(file, self._number(file, "I"), 0)
        for _ in range(tensors):
            name = self._string(file, GGUF_KEY_BYTES)
            count = self._number(file, "I")
            if count > 8:
                raise BadFile(f"{self.name}: {name[:80]}: {count} dimensions")
            shape = [self._number(file, "Q") for _ in range(count)]
            kind = self._number(file, "I")
            self._number(file, "Q")  # its offset
            self.elements[kind] = self.elements.get(kind, 0) + product(f"{self.name}: {name[:80]}", shape)

    def _take(self, file: BinaryIO, count: int) -> bytes:
        if count > self._left:
            raise BadFile(f"{self.name}: is cut off in its header")
        self._left -= count
        data = file.read(count)
        if len(data) != count:
            raise BadFile(f"{self.name}: is cut off in its header")
        return data

    def _number(self, file: BinaryIO, code: str) -> int:
        return int(struct.unpack(f"<{code}", self._take(file, struct.calcsize(f"<{code}")))[0])

    def _string(self, file: BinaryIO, limit: int) -> str:
        length = self._number(file, "Q")
        if length > limit:
            raise BadFile(f"{self.name}: a string of {length} bytes")
        return self._take(file, length).decode(errors="replace")

    def _value(self, file: BinaryIO, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string(file, GGUF_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(file, depth)
        code = _SCALARS.get(kind)
        if code is None:
            raise BadFile(f"{self.name}: value type {kind} is not known")
        return struct.unpack(f"<{code}", self._take(file, struct.calcsize(f"<{code}")))[0]

    def _array(self, file: BinaryIO, depth: int) -> Any:
        kind, count = self._number(file, "I"), self._number(file, "Q")
        if count > GGUF_ARRAY_ITEMS or depth >= GGUF_ARRAY_DEPTH:
            raise BadFile(f"{self.name}: an array of {count} items at depth {depth}")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            data = self._take(file, struct.calcsize(code))
            return list(struct.unpack(code, data)) if count <= 4_096 else Skipped(count)
        for _ in range(count):
            if kind == _STRING:
                self._take(file, min(self._number(file, "Q"), self._left + 1))
            else:
                self._value(file, kind, depth + 1)
        return Skipped(count)


def describe(paths: list[Path]) -> dict[str, Any]:
    """What the first file says, with the parameters of all its splits. Raises: BadFile, OSError."""
    headers = [Header(path) for path in paths]
    models = [header for header in headers if header.pairs.get("general.type") != "mmproj" and _is_model(header)]
    first = (models or headers)[0]
    detected = _pairs(first.pairs)
    elements: dict[int, int] = {}
    for header in models or headers[:1]:
        if header is first or header.pairs.get("split.count"):
            for kind, count in header.elements.items():
                elements[kind] = elements.get(kind, 0) + count
    if elements:
        detected["parameters"] = sum(elements.values())
        most = max(sorted(elements), key=lambda kind: elements[kind])
        detected.setdefault("quantisation", TENSOR_TYPES.get(most, f"type{most}"))
    return detected


def _is_model(header: Header) -> bool:
    return header.pairs.get("general.architecture") != "clip"


def _pairs(pairs: dict[str, Any]) -> dict[str, Any]:
    detected: dict[str, Any] = {}
    architecture = pairs.get("general.architecture")
    if isinstance(architecture, str):
        detected["architecture"] = architecture[:100]
    for key, suffix in {
        "layers": "block_count",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "hidden": "embedding_length",
        "context": "context_length",
        "vocab": "vocab_size",
        "experts": "expert_count",
    }.items():
        value = pairs.get(f"{architecture}.{suffix}")
        if isinstance(value, list):
            value = max((item for item in value if isinstance(item, int)), default=None)  # differs by layer
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < NUMBER:
            detected[key] = value
    if isinstance(architecture, str) and (kept := dimensions.pairs(pairs, architecture)):
        detected["gguf"] = kept
    tokens = pairs.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Skipped | list):
        detected.setdefault("vocab", tokens.count if isinstance(tokens, Skipped) else len(tokens))
    if "heads" in detected:
        detected.setdefault("kv_heads", detected["heads"])
    file_type = pairs.get("general.file_type")
    if isinstance(file_type, int) and file_type in FILE_TYPES:
        detected["quantisation"] = FILE_TYPES[file_type]
    template = pairs.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        detected["chat_template"] = template if len(template) <= TEMPLATE_CHARS else True
    return detected
