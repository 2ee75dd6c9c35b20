"""Bytes per element of the formats that weights and caches are stored in, scales included.

Source: ggml's block layouts; the OCP microscaling formats; NVFP4 (16 elements share an fp8 scale); vLLM's scale shapes.
"""

from __future__ import annotations

from common.errors import InvalidValue

# ggml: bytes of one block, elements of one block
_BLOCKS = {
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "q5_0": (22, 32),
    "q5_1": (24, 32),
    "q8_0": (34, 32),
    "q8_1": (36, 32),
    "q2_k": (84, 256),
    "q3_k": (110, 256),
    "q4_k": (144, 256),
    "q5_k": (176, 256),
    "q6_k": (210, 256),
    "q8_k": (292, 256),
    "iq1_s": (50, 256),
    "iq1_m": (56, 256),
    "iq2_xxs": (66, 256),
    "iq2_xs": (74, 256),
    "iq2_s": (82, 256),
    "iq3_xxs": (98, 256),
    "iq3_s": (110, 256),
    "iq4_nl": (18, 32),
    "iq4_xs": (136, 256),
    "tq1_0": (54, 256),
    "tq2_0": (66, 256),
    "mxfp4": (17, 32),
    "nvfp4": (36, 64),
    "mxfp8": (33, 32),
}
_PLAIN = {"fp64": 8.0, "fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
_NAMES = {
    "float64": "fp64",
    "f64": "fp64",
    "float32": "fp32",
    "f32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "f16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "f8_e4m3": "fp8",
    "f8_e5m2": "fp8",
    "f8_e8m0": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "float8": "fp8",
    "i8": "int8",
    "u8": "int8",
    "uint8": "int8",
    "q8": "int8",
    "fp4": "nvfp4",
    "q4": "int4",
}


def bytes_per_element(dtype: str) -> float:
    """Bytes of one element, with its share of the block's scales. Raises: InvalidValue for an unknown format."""
    name = dtype.lower().removeprefix("torch.")
    name = _NAMES.get(name, name)
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _BLOCKS:
        size, elements = _BLOCKS[name]
        return size / elements
    raise InvalidValue(f"no number format {dtype[:40]!r}", field="dtype", known=sorted((*_PLAIN, *_BLOCKS)))


def is_dtype(dtype: str) -> bool:
    """Whether the format is known."""
    name = dtype.lower().removeprefix("torch.")
    return _NAMES.get(name, name) in _PLAIN or name in _BLOCKS
