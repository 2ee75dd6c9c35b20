"""The measured training steps that ship with the planner: what they are, how they are read and written.

A row is a question (architecture, topology, layout, stack) and the step time that its source states. Rows that
contradict themselves, by their flags, are kept as examples of what must not be trusted, and never fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture
from head.planner.training.layout import TrainingLayout

ROWS_FILE = "training_rows.json"


class TrainingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One published training step. `step_s` is seconds; `nic_gbit_per_s` is per GPU, 0 when the usual one is meant."""

    id: str
    source: str
    url: str = ""
    model: str
    architecture: Architecture
    stack: str = "unknown"
    accelerator: str
    gpus: int
    nic_gbit_per_s: float = 0.0
    layout: TrainingLayout
    step_s: float
    is_usable: bool = True
    flags: tuple[str, ...] = ()
    provenance: str = ""

    @property
    def is_fitted(self) -> bool:
        """Whether the row may decide constants: it does not contradict itself."""
        return self.is_usable and not self.flags

    def topology(self) -> Topology:
        """Where it ran."""
        return topology_of_preset(self.accelerator, self.gpus, nic_gbit_per_s=self.nic_gbit_per_s or None)


class RunDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a table leaves out and its own configuration files state: lengths are in tokens, batches in sequences."""

    seq: int
    micro_batch: int
    recompute: str
    source: str


class RowsFile(msgspec.Struct, frozen=True, kw_only=True):
    """The shipped document: architectures and sources once, rows that refer to them.

    `aliases` are the names that tables use for architectures; `run_defaults` are by architecture.
    """

    architectures: dict[str, Any]
    aliases: dict[str, str]
    run_defaults: dict[str, RunDefaults]
    sources: list[tuple[str, str]]
    rows: list[dict[str, Any]]


@cache
def _document() -> RowsFile:
    data = resources.files("head.planner").joinpath("data", ROWS_FILE).read_bytes()
    return msgspec.json.decode(data, type=RowsFile)


@cache
def shipped_rows() -> tuple[TrainingRow, ...]:
    """All shipped rows, in order of source."""
    document = _document()
    found = []
    for raw in document.rows:
        values = dict(raw)
        source, url = document.sources[values.pop("source")]
        values |= {"source": source, "url": url, "architecture": document.architectures[values["architecture"]]}
        found.append(msgspec.convert(values, TrainingRow))
    return tuple(found)


def named_architecture(name: str) -> Architecture | None:
    """The architecture that published training tables mean by `name`."""
    document = _document()
    key = document.aliases.get(name, name)
    raw = document.architectures.get(key)
    return None if raw is None else msgspec.convert(raw, Architecture)


def run_defaults(name: str) -> RunDefaults | None:
    """What the runs of an architecture used where their table does not say."""
    document = _document()
    return document.run_defaults.get(document.aliases.get(name, name))


def document_of(
    rows: Iterable[TrainingRow],
    named: dict[str, Architecture],
    aliases: dict[str, str],
    defaults: dict[str, RunDefaults],
) -> bytes:
    """The document that ships `rows`: one row a line."""
    architectures = {key: _sparse(arch) for key, arch in named.items()}
    keys = {arch: key for key, arch in named.items()}
    sources: dict[tuple[str, str], int] = {}
    lines = []
    for row in rows:
        key = keys.get(row.architecture)
        if key is None:
            key = f"{row.architecture.name} #{len(keys)}"
            keys[row.architecture] = key
            architectures[key] = _sparse(row.architecture)
        values = _sparse(row)
        values.pop("url", None)
        values["architecture"] = key
        values["source"] = sources.setdefault((row.source, row.url), len(sources))
        values["step_s"] = float(f"{row.step_s:.6g}")
        lines.append(msgspec.json.encode(values).decode())
    head = {
        "architectures": architectures,
        "aliases": aliases,
        "run_defaults": {key: msgspec.to_builtins(value) for key, value in defaults.items()},
        "sources": list(sources),
    }
    parts = [
        f"{msgspec.json.encode(key).decode()}: {msgspec.json.encode(value).decode()}" for key, value in head.items()
    ]
    return ("{" + ",\n".join(parts) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n").encode()


def _sparse(value: Any) -> Any:
    """Builtins without fields at their defaults."""
    if isinstance(value, msgspec.Struct):
        found = {}
        for field in msgspec.structs.fields(value):
            here = getattr(value, field.name)
            if field.default is not msgspec.NODEFAULT and here == field.default:
                continue
            found[field.name] = _sparse(here)
        return found
    if isinstance(value, tuple):
        return [_sparse(part) for part in value]
    return value
