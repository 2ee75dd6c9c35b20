"""The digests of the store, in one place: chunk, blob, manifest.

A chunk's digest is its BLAKE3. A blob's id is BLAKE3 over its length (8 bytes, little-endian) and its chunk
digests in order: a one-level Merkle tree, so a list of digests from anyone can be checked against the id before a
single byte of content is fetched. A manifest's digest is BLAKE3 over the JSON list of (path, size, blob), sorted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
from blake3 import blake3

from common import ids, limits
from common.errors import DigestMismatch, InvalidValue
from common.manifest import Manifest, ManifestFile

DIGEST_BYTES = 32
MANIFEST_NAME = ".manifest.json"

_BLOB = re.compile(r"b3:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{64}")
_FILE_BYTES = 1 << 50  # no file of a model is a petabyte; a larger number is an attack on our arithmetic


def chunk_count(size: int, chunk_bytes: int) -> int:
    """Chunks of a file; none when it is empty."""
    return -(-size // chunk_bytes)


def chunk_digest(data: bytes | memoryview) -> bytes:
    """The leaf for one chunk."""
    return blake3(data).digest()


def blob_id(size: int, leaves: bytes | memoryview) -> str:
    """The blob's id from its length and its chunk digests, concatenated."""
    return "b3:" + blake3(size.to_bytes(8, "little")).update(leaves).hexdigest()


def hex_of(blob: str) -> str:
    """The 64 digits of a blob id, safe as a file name. Raises: InvalidValue."""
    if not _BLOB.fullmatch(blob):
        raise InvalidValue(f"{blob[:80]!r} is not a blob id")
    return blob[3:]


def is_hex(text: str) -> bool:
    """Whether these are the 64 digits of a blob id."""
    return _HEX.fullmatch(text) is not None


def check_leaves(blob: str, size: int, chunk_bytes: int, leaves: bytes) -> None:
    """That this digest list is the blob's. Raises: DigestMismatch."""
    if len(leaves) != DIGEST_BYTES * chunk_count(size, chunk_bytes) or blob_id(size, leaves) != blob:
        raise DigestMismatch(f"the chunk list of {blob[:19]} does not match its id", blob=blob)


def manifest_digest(files: Iterable[ManifestFile]) -> str:
    """The digest over the canonical form of a manifest's files."""
    rows = sorted((file.path, file.size, file.blob) for file in files)
    return "b3:" + blake3(msgspec.json.encode(rows)).hexdigest()


def check_manifest(manifest: Manifest) -> None:
    """That a manifest from outside may be acted on: names, paths, sizes, ids, digest.

    Raises: InvalidName, InvalidPath, InvalidValue, DigestMismatch.
    """
    ids.check_model_name(manifest.model)
    ids.check_revision(manifest.revision)
    check_paths([file.path for file in manifest.files])
    for file in manifest.files:
        hex_of(file.blob)
        if not 0 <= file.size <= _FILE_BYTES:
            raise InvalidValue(f"{file.path}: {file.size} is not a file size", path=file.path)
        if file.chunk_bytes not in _CHUNK_SIZES:
            raise InvalidValue(f"{file.path}: {file.chunk_bytes} is not a chunk size", path=file.path)
        if file.sha256 and not is_hex(file.sha256):
            raise InvalidValue(f"{file.path}: not a sha256", path=file.path)
    if manifest_digest(manifest.files) != manifest.digest:
        raise DigestMismatch("the manifest's digest is not that of its files", digest=manifest.digest)


def check_paths(paths: list[str]) -> None:
    """That these files can stand in one directory: safe, distinct, none below another.

    Raises: InvalidPath, InvalidValue.
    """
    if not paths or len(paths) > limits.MANIFEST_FILES:
        raise InvalidValue(f"{len(paths)} files; a model has 1 to {limits.MANIFEST_FILES}")
    seen = {ids.check_relative_path(path) for path in paths}
    if len(seen) != len(paths):
        raise InvalidValue("the same path stands twice in the file list")
    for path in paths:
        parts = path.split("/")
        above = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if above & seen or parts[0] == MANIFEST_NAME:
            raise InvalidValue(f"{path!r} cannot stand beside the other files", path=path)


_CHUNK_SIZES = frozenset({limits.CHUNK_BYTES_SMALL, limits.CHUNK_BYTES_MEDIUM, limits.CHUNK_BYTES_LARGE})
