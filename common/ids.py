"""Names and ids: what a model, node, device, revision and token may be called, and how each is parsed.

Everything that people or machines send passes through here before it becomes a path, a key or a label, so
this is also where path tricks (`..`, absolute paths, NUL) end.
"""

from __future__ import annotations

import re
import secrets

import msgspec

from common import limits
from common.errors import InvalidDevice, InvalidName, InvalidPath

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_MODEL = re.compile(rf"{_PART}(?:/{_PART})?")
_NODE = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,63})")
_SERVICE = _NODE
_STORAGE = re.compile(r"(disk|dram|gpu):?([0-9]{1,3})?")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")


class Device(msgspec.Struct, frozen=True, order=True):
    """Where bytes can be on a node: `n1:disk`, `n1:dram`, `n1:gpu0`."""

    node: str
    kind: str  # "disk" | "dram" | "gpu"
    index: int = 0

    @property
    def storage(self) -> str:
        """The part after the colon: `disk`, `dram`, `gpu0`."""
        return f"gpu{self.index}" if self.kind == "gpu" else self.kind

    def __str__(self) -> str:
        return f"{self.node}:{self.storage}"


def parse_device(text: str) -> Device:
    """`node:disk`, `node:dram`, `node:gpu0`, `node:gpu:0`; `node:gpu` is gpu0.

    Raises: InvalidDevice.
    """
    node, colon, storage = text.partition(":")
    match = _STORAGE.fullmatch(storage)
    if not colon or not _NODE.fullmatch(node) or not match:
        raise InvalidDevice(
            f"{text[:80]!r} is not a device",
            hint="write NODE:disk, NODE:dram or NODE:gpu0; `herder nodes` lists the nodes",
        )
    kind, index = match[1], match[2]
    if kind != "gpu" and (index is not None or storage.endswith(":")):
        raise InvalidDevice(f"{text[:80]!r}: {kind} has no index", hint=f"write {node}:{kind}")
    if kind == "gpu" and storage.endswith(":"):
        raise InvalidDevice(f"{text[:80]!r}: the index after the colon is missing", hint=f"write {node}:gpu0")
    return Device(node, kind, int(index or 0))


def check_model_name(text: str) -> str:
    """A model name: `name` or `org/name`. Raises: InvalidName."""
    if len(text) > limits.MODEL_NAME_CHARS or not _MODEL.fullmatch(text) or ".." in text:
        raise InvalidName(
            f"{text[:80]!r} is not a model name",
            hint="letters, digits, '.', '_' and '-', with at most one '/', as in org/name",
        )
    return text


def check_node_id(text: str) -> str:
    """A node id: lower-case letters, digits, '.' and '-'. Raises: InvalidName."""
    if not _NODE.fullmatch(text) or ".." in text:
        raise InvalidName(
            f"{text[:80]!r} is not a node id",
            hint="lower-case letters, digits, '.' and '-', at most 63, as in a host name",
        )
    return text


def check_service_name(text: str) -> str:
    """A service name follows the rule of node ids. Raises: InvalidName."""
    if not _SERVICE.fullmatch(text) or ".." in text:
        raise InvalidName(f"{text[:80]!r} is not a service name", hint="lower-case letters, digits, '.' and '-'")
    return text


def check_revision(text: str) -> str:
    """A model revision: a branch, tag, commit or version word. Raises: InvalidName."""
    if not _REVISION.fullmatch(text) or ".." in text:
        raise InvalidName(f"{text[:80]!r} is not a revision", hint="letters, digits, '.', '_' and '-', at most 64")
    return text


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Node labels. Raises: InvalidName."""
    if len(labels) > limits.LABELS_PER_NODE:
        raise InvalidName(f"{len(labels)} labels; at most {limits.LABELS_PER_NODE}")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or len(value) > limits.LABEL_CHARS or not value.isprintable():
            raise InvalidName(f"label {key[:80]!r} is not usable", hint="letters, digits, '.', '_', '/', '-'")
    return labels


def check_relative_path(text: str) -> str:
    """A file's path inside a model: relative, no `.`/`..`, no empty part, no backslash or control characters.

    Raises: InvalidPath.
    """
    parts = text.split("/")
    if (
        not text
        or len(text) > limits.MANIFEST_PATH_CHARS
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or "\\" in text
        or any(ord(char) < 32 or ord(char) == 127 for char in text)
    ):
        raise InvalidPath(f"{text[:80]!r} is not a path inside a model", hint="relative, without '..'")
    return text


def model_directory(model: str, revision: str) -> str:
    """A copy's directory below `models/`: `name@rev` or `org/name@rev`.

    Injective: a name has at most one '/', no '@', and every last part ends in '@rev'.
    """
    return f"{model}@{revision}"


def new_id(prefix: str) -> str:
    """A fresh id, as `job-3f9a1c7e20b4`: 48 random bits."""
    return f"{prefix}-{secrets.token_hex(6)}"
