"""What a node's agent runs on: the store, the RAM tier, the GPUs and the engines. It survives the agent.

`Machine.complaints()` is the machine's own word on what must never be: the cores' books do not enter into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from agent import holder_protocol as holder
from agent.core.objects import Object
from agent.mover import protocol as mover
from common import wire
from common.manifest import Manifest, ManifestFile

GIB = 1 << 30
GPU_BYTES = 80 * GIB
MEMORY_BYTES = 80 * GIB


def origin_manifest(model: str, revision: str) -> Manifest:
    """What the origin serves for a model: always the same bytes, sized by the name's number."""
    size = (1 + int("0" + "".join(char for char in model if char.isdigit())) % 7) * GIB
    file = ManifestFile("model.gguf", size, _digest(f"{model}@{revision}"), 1 << 22)
    return Manifest(model, revision, (file,), _digest(f"manifest of {model}@{revision}"), "gguf")


def held_copy(manifest: Manifest) -> mover.HeldCopy:
    """A whole copy of it in a store."""
    directory = f"/models/{manifest.model}@{manifest.revision}"
    return mover.HeldCopy(
        manifest.model, manifest.revision, directory, manifest.size_bytes, manifest.digest, "gguf", manifest=manifest
    )


def _digest(text: str) -> str:
    return f"b3:{hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}"


@dataclass
class EngineProcess:
    """A running engine, or what its SIGKILL has left of it."""

    order: wire.EnsureReplica
    run: int
    pid: int
    port: int
    ready_ms: int
    is_hung: bool = False
    ignores_term: bool = False
    leak_ms: int = 0  # how long something of it stays after its end
    leaks_until_ms: int = 0  # set when it has ended
    lease_until_ms: int = 0  # as its shim knew it at the start, in world time

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs it runs on."""
        return tuple(part for part in self.order.storage.split(",") if part.startswith("gpu"))

    @property
    def gpu_bytes(self) -> int:
        """What it takes of each of its GPUs."""
        declared = self.order.config.get("gpu_memory_bytes", 0)
        return declared if isinstance(declared, int) and declared > 0 else GPU_BYTES


@dataclass
class RunProcess:
    """A load generator or a monitor, or what is left of it. Times are the world's."""

    order: wire.EnsureRun
    generation: int
    state: str = "preparing"  # preparing | armed | running | ended | failed | died
    digest: str = ""
    start_boottime_ns: int = 0
    late_ms: int = 0
    began_ms: int = 0  # 0: it never sent
    ended_ms: int = 0

    @property
    def is_alive(self) -> bool:
        """Whether there is a process."""
        return self.state in ("preparing", "armed", "running")


@dataclass
class Machine:
    """What survives the agent. A reboot clears RAM and engines."""

    name: str
    gpus: int
    disk_bytes: int
    dram_bytes: int
    boot: int = 1
    store: dict[tuple[str, str], mover.HeldCopy] = field(default_factory=dict)
    parts: dict[tuple[str, str], int] = field(default_factory=dict)
    holdings: dict[str, holder.Holding] = field(default_factory=dict)
    is_holder_up: bool = False
    engines: dict[str, EngineProcess] = field(default_factory=dict)
    runs: dict[str, RunProcess] = field(default_factory=dict)
    past_runs: list[RunProcess] = field(default_factory=list)
    spawned: set[tuple[str, int]] = field(default_factory=set)  # runs and generations that ever had a process
    ledger: dict[tuple[str, str], Object] = field(default_factory=dict)
    lease_until_ms: int = 0  # as the agent noted it, in world time
    pids: int = 100

    @property
    def used_bytes(self) -> int:
        """Bytes of the store."""
        return sum(copy.size_bytes for copy in self.store.values())

    def complaints(self) -> Iterator[str]:
        """What must never be on a machine."""
        if self.used_bytes > self.disk_bytes:
            yield f"{self.name} stores {self.used_bytes} bytes of {self.disk_bytes}"
        locked = sum(holding.bytes for holding in self.holdings.values())
        if locked > self.dram_bytes:
            yield f"{self.name} locks {locked} bytes of {self.dram_bytes}"
        used: dict[str, int] = {}
        for engine in self.engines.values():
            for gpu in engine.gpus:
                used[gpu] = used.get(gpu, 0) + engine.gpu_bytes
        for gpu, count in used.items():
            if count > GPU_BYTES:
                names = [name for name, engine in self.engines.items() if gpu in engine.gpus]
                yield f"{self.name}:{gpu} is oversubscribed by {names}"
            if int(gpu[3:]) >= self.gpus:
                yield f"{self.name} has no {gpu}"
