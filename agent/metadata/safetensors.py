"""safetensors headers: parameters by dtype, from the first bytes of each file.

Source: the safetensors format (8 bytes little-endian header length, JSON header, tensor data).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from agent.metadata.limits import HEADER_BYTES, TENSORS, BadFile, product
from herder.decoding import UNREADABLE

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3"}


class Tensor(msgspec.Struct, frozen=True):
    """One entry of a header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_headers = msgspec.json.Decoder(dict[str, msgspec.Raw])
_tensors = msgspec.json.Decoder(Tensor)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises: BadFile, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2 or length > HEADER_BYTES or length > size - 8:
            raise BadFile(f"{path.name}: a header of {length} bytes in a file of {size}")
        body = file.read(length)
    try:
        rows = _headers.decode(body)
        if len(rows) > TENSORS:
            raise BadFile(f"{path.name}: {len(rows)} tensors")
        tensors = {name: _tensors.decode(raw) for name, raw in rows.items() if name != "__metadata__"}
    except UNREADABLE as error:
        raise BadFile(f"{path.name}: {str(error)[:120]}") from None
    for name, tensor in tensors.items():
        _check(f"{path.name}: {name[:80]}", tensor, size - 8 - length)
    return tensors


def describe(paths: list[Path]) -> dict[str, Any]:
    """Parameters in all files of a model, in total and by dtype."""
    by_dtype: dict[str, int] = {}
    seen: set[str] = set()
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in seen:
                continue
            seen.add(name)
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + product(name, tensor.shape)
    if not by_dtype:
        return {}
    most = max(sorted(by_dtype), key=lambda dtype: by_dtype[dtype])
    return {
        "parameters": sum(by_dtype.values()),
        "parameters_by_dtype": by_dtype,
        "dtype": _NAMES.get(most, most.lower()),
    }


def _check(where: str, tensor: Tensor, data_bytes: int) -> None:
    begin, end = tensor.data_offsets
    if not 0 <= begin <= end <= data_bytes:
        raise BadFile(f"{where}: lies outside the file")
    bits = BITS.get(tensor.dtype)
    if bits is None:
        raise BadFile(f"{where}: unknown dtype {tensor.dtype[:20]!r}")
    if -(-product(where, tensor.shape) * bits // 8) != end - begin:
        raise BadFile(f"{where}: its shape and its bytes disagree")
