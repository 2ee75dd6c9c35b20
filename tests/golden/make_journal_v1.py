"""Wrote `journal_v1.sqlite`: a journal of schema version 1 with one object of every kind and a short history.

The file stays as it is for ever: every later version must open it (tests/unit/test_journal_golden.py). This script
tells how it came to be and is the pattern for the file of the next version; it refuses to overwrite one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile
from common.wire import Disk, Gpu, Inventory
from head.core import objects
from head.core.records import Record
from head.journal import Journal, encode

TARGET = Path(__file__).with_name("journal_v1.sqlite")
T = 1_700_000_000_000
ERROR = ErrorInfo("source_failed", "the source closed the connection", "try again", {"bytes": 5}, True)
MANIFEST = Manifest(
    "org/tiny",
    "main",
    (ManifestFile("model.gguf", 1_000, "b3:" + "0" * 64, 1_048_576, "a" * 64),),
    "b3:" + "1" * 64,
    "gguf",
    {"architecture": "llama"},
)
INVENTORY = Inventory(
    hostname="n1",
    addresses=("10.0.0.1",),
    cpus=8,
    memory_bytes=1 << 34,
    disks=(Disk("/var/lib/herder", "ext4", 1 << 40, 1 << 39),),
    gpus=(Gpu(0, "GPU-1", "NVIDIA H100", 80 << 30, "9.0"),),
)
OBJECTS: tuple[objects.Object, ...] = (
    objects.Meta("cluster-1", 7, T),
    objects.Node("n1", "boot-1", "agent-1", "0.1.0", INVENTORY, T, "online", T, 2, {"rack": "r1"}, is_cordoned=True),
    objects.Model("org/tiny", "llm", "main", T, T, ("file:///models/tiny",), {"owner": "me"}),
    objects.ModelManifest(MANIFEST, "n1", T),
    objects.Copy(
        "org/tiny", "main", "n1:disk", "present", "ready", 5, "req-1", T, 1_000, MANIFEST.digest,
        (objects.Pin("operator", T + 1_000),), attempts=1, error=ERROR,
    ),
    objects.Service("chat", "org/tiny", "main", "llamacpp", 1, 6, "h1", T, "req-2", config={"args": ["-c", "512"]}),
    objects.Replica(
        "chat-0", "chat", 0, "org/tiny", "main", "n1", "n1:gpu0", 7, "running", "ready", "req-2", T, "h1",
        port=20_000, host="10.0.0.1", pid=42, last_log=("ready",),
    ),
    objects.Job(
        "job-1", "night", "admin(key-1)", "running", T,
        (objects.Step("s1", "download", "completed", result={"bytes": 1_000}),
         objects.Step("s2", "serve", "running", dependencies=("s1",), target="service:chat", target_generation=6)),
    ),
    objects.Check("check-1", "n1", 8, "req-3", T, "chat-0"),
    objects.ApiKey("key-1", "first-admin", "admin", "f" * 64, T),
    objects.Idempotent("admin:abc", "e" * 64, T, "job:job-1"),
)  # fmt: skip


def records(objects_made: tuple[objects.Object, ...] = OBJECTS) -> list[Record]:
    """What the golden journal was told, in order; the last record deletes a model again."""
    made = [
        Record(
            number, T + number, f"{thing.KIND}_made", f"req-{number}", thing.KIND, thing.key, thing, {"number": number}
        )
        for number, thing in enumerate(objects_made, 1)
    ]
    number = len(made) + 1
    gone = objects.Model("gone", "llm", "main", T, T)
    made.append(Record(number, T + number, "model_registered", "req-x", "model", "gone", gone))
    made.append(Record(number + 1, T + number + 1, "model_deleted", "req-y", "model", "gone", None))
    return made


def write(target: Path, told: list[Record]) -> None:
    """Writes the file of a version."""
    if target.exists():
        sys.exit(f"{target.name} exists and must not change")
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.open(Path(folder) / "journal.sqlite")
        asyncio.run(journal.commit([encode(record) for record in told]))
        journal.call(lambda: journal._connection.execute("VACUUM"))
        journal.close()
        os.replace(journal.path, target)
    target.chmod(0o644)


if __name__ == "__main__":
    write(TARGET, records())
