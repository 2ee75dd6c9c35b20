"""Bounds of the metadata readers, and the error that says a file is not what it claims."""

from __future__ import annotations

HEADER_BYTES = 100_000_000  # safetensors' own bound
TENSORS = 200_000
DIMENSIONS = 8
ELEMENTS = 1 << 60
JSON_BYTES = 16 << 20
GGUF_PAIRS = 65_536
GGUF_KEY_BYTES = 65_535
GGUF_STRING_BYTES = 16 << 20
GGUF_ARRAY_ITEMS = 4_000_000  # largest vocabularies are about 0.3 million
GGUF_ARRAY_DEPTH = 2
TEMPLATE_CHARS = 16_384
CONFIG_BYTES = 16_384  # of a model's dimensions, kept with it
CONFIG_ITEMS = 512  # layers of a list of one entry each
CONFIG_TEXT_CHARS = 512
NUMBER = 1 << 53


class BadFile(Exception):
    """The file is truncated, malformed or beyond a bound; the text says which and where."""


def product(name: str, shape: list[int] | tuple[int, ...]) -> int:
    """Elements of a tensor. Raises: BadFile for shapes that cannot be."""
    if len(shape) > DIMENSIONS:
        raise BadFile(f"{name}: {len(shape)} dimensions")
    total = 1
    for extent in shape:
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 0:
            raise BadFile(f"{name}: a dimension that is not a count")
        total *= extent
        if total > ELEMENTS:
            raise BadFile(f"{name}: more elements than there can be")
    return total
