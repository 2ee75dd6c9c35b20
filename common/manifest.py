"""What a model consists of: files, sizes, digests, and what its own files say about it.

Chunk digests (BLAKE3 of fixed-size chunks) do not travel in the manifest: a blob's id is the BLAKE3 of its
length and its chunk digests (a one-level Merkle tree), so whoever fetches a blob asks any source for the digest
list, checks the list against the id, and then each chunk against the list. A liar can poison neither.
"""

from __future__ import annotations

from typing import Any

import msgspec

from common import limits


class ManifestFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file. `blob` is "b3:" + 64 hex digits; `sha256` is the source's own, or empty when it gave none."""

    path: str
    size: int
    blob: str
    chunk_bytes: int
    sha256: str = ""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model at a revision. `digest` is "b3:" + BLAKE3 over the canonical list of (path, size, blob)."""

    model: str
    revision: str
    files: tuple[ManifestFile, ...]
    digest: str
    format: str = "other"  # "safetensors" | "gguf" | "pickle" | "other"
    detected: dict[str, Any] = {}  # architecture, parameters, layers, heads, context, dtype/quantisation, ...

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class SourceFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file as a source announces it, before any byte was fetched; `size` is -1 when it does not say."""

    path: str
    size: int
    url: str
    sha256: str = ""


def chunk_bytes_for(model_bytes: int) -> int:
    """Chunk size by model size, so that big models have >= 1,000 chunks and small ones are not one chunk."""
    if model_bytes < 1 << 30:
        return limits.CHUNK_BYTES_SMALL
    if model_bytes < 16 << 30:
        return limits.CHUNK_BYTES_MEDIUM
    return limits.CHUNK_BYTES_LARGE
