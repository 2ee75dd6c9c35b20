"""Frames of protocol version 1 as they were released: they decode for ever, to what they meant then.

`python tests/golden/test_wire_golden.py` writes frames of kinds that are not in the file yet; a frame that is in it
is never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import wire
from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile

GOLDEN = Path(__file__).with_name("wire_v1.json")
_GPU = wire.Gpu(0, "GPU-0", "NVIDIA H200", 151_397_597_184, "9.0", False, "", (1,), "00000000:10:00.0", 700.0)
_INVENTORY = wire.Inventory(
    "n1",
    ("10.0.0.1",),
    "Debian GNU/Linux 12",
    "6.1",
    "x86_64",
    "AMD EPYC",
    64,
    32,
    2,
    1 << 40,
    1 << 39,
    1 << 43,
    (wire.Disk("/var/lib/herder", "ext4", 1 << 44, 1 << 43, "/dev/nvme0n1"),),
    (wire.Nic("eth0", ("10.0.0.1",), 100_000),),
    (_GPU,),
    "",
    "570.86.15",
    "12.8",
    {"llamacpp": "10068"},
)
_DIGEST = "b3:" + "0" * 64
_MANIFEST = Manifest(
    "org/m",
    "main",
    (ManifestFile("model.gguf", 10, _DIGEST, 1 << 20, "1" * 64),),
    _DIGEST,
    "gguf",
    {"architecture": "llama", "layers": 30},
)
_ERROR = ErrorInfo("disk_full", "no room", "make room", {"need": 10, "free": 1}, True)
_ORDER = wire.EnsureReplica(
    "chat-0",
    "chat",
    "org/m",
    "main",
    "gpu0",
    "llamacpp",
    ("--flash-attn",),
    {"A": "b"},
    20_001,
    ("GPU-0",),
    wire.HealthSpec("/health", 5.0, 5.0, 900.0, 3, {"prompt": "a"}, "/v1/completions"),
    "org/m",
    "key",
    10,
    10.0,
    60_000,
    {"context": 4096},
)


def _command(body: wire.AnyCommand) -> wire.Command:
    return wire.Command("copy:org/m@main|n1:disk", 7, 3, "job-1/a", body, 1000)


FRAMES: dict[str, wire.Message] = {
    "hello": wire.Hello(
        1, 1, "n1", "boot", "agent-1", "0.1.0", _INVENTORY, "cluster", 3, {"rack": "a"}, "10.0.0.1", 1, 2, "l", ("x",)
    ),
    "welcome": wire.Welcome(1, "cluster", 3, "ses-1", 15_000, 5_000, 2_000, "a2V5"),
    "refused": wire.Refused(_ERROR, 500),
    "report": wire.Report(
        4,
        (wire.CopyStatus("org/m", "main", "disk", "fetching", 7, 5, 10, _DIGEST, False, _ERROR),),
        (
            wire.ReplicaStatus(
                "chat-0", 8, "failed", "10.0.0.1", 20_001, 99, 2, 139, 1, 2, 3, 4, _ERROR, ("last words",)
            ),
        ),
        (wire.OpStatus("copy:org/m@main|n1:disk", 7, "running"),),
    ),
    "lease": wire.Lease(5, 123_456, 99),
    "ack": wire.Ack(5, 15_000, 5_000, True),
    "telemetry": wire.Telemetry(
        0.5, 1, 2, 3, 4, 5, (wire.GpuReading(0, "GPU-0", 1, 2, 0.9, 0.5, 60.0, 500.0, 0, True),), 1.5
    ),
    "progress": wire.Progress("copy:org/m@main|n1:disk", 7, "fetching", 5, 10, 1e9, "peer://10.0.0.2:1"),
    "result": wire.Result("copy:org/m@main|n1:disk", 7, "ok", _ERROR, _MANIFEST, {"bytes": 10}),
    "result_ack": wire.ResultAck("copy:org/m@main|n1:disk", 7),
    "leaving": wire.Leaving("slurm", 60_000),
    "log_request": wire.LogRequest("r", "chat-0", 1, 10, 5, True, True),
    "log_chunk": wire.LogChunk("r", 20, "text", True, _ERROR),
    "run_tick": wire.RunTick("b1.0.0", 3.002, 50, 48, 2, 7, 900, 41.5, 120.25),
    "clock_ask": wire.ClockAsk(86_400_000_000_123),
    "clock_told": wire.ClockTold(86_400_000_000_123, 86_400_000_000_456),
    "command ensure_copy": _command(
        wire.EnsureCopy("org/m", "main", "disk", (wire.Source("peer://10.0.0.2:1", "ticket", "n2"),), _MANIFEST, "full")
    ),
    "command drop_copy": _command(wire.DropCopy("org/m", "main", "dram")),
    "command ensure_replica": _command(_ORDER),
    "command stop_replica": _command(wire.StopReplica("chat-0", 5.0)),
    "command check_health": _command(wire.CheckHealth("chat-0", "http://127.0.0.1/", 3.0)),
    "command cancel_op": _command(wire.CancelOp("copy:x", 6)),
    "command ensure_run": _command(
        wire.EnsureRun(
            "b1.0.0",
            "load",
            {"rate": 5.0, "duration": 60.0},
            "b1",
            1,
            2,
            ("http://10.0.0.1:8000",),
            "random",
            "token",
            720_000,
        )
    ),
    "command fire_run": _command(wire.FireRun("b1.0.0", 86_400_000_000_456)),
    "command end_run": _command(wire.EndRun("b1.0.0", "forget")),
}


def golden() -> dict[str, Any]:
    """The frames that were released, by name."""
    return msgspec.json.decode(GOLDEN.read_bytes(), type=dict[str, Any])


@pytest.mark.parametrize("name", FRAMES)
def test_released_frames_decode(name: str) -> None:
    """A frame of version 1 means today what it meant when it was released."""
    assert wire.decode(msgspec.json.encode(golden()[name])) == FRAMES[name]


def test_every_kind_is_kept() -> None:
    """Every kind of message and command stands in the golden file."""
    names = set(golden())
    assert {name.split()[0] for name in names} == set(wire.TYPES)
    tags = {cls.__struct_config__.tag for cls in wire.CommandBody.__subclasses__()}
    assert {name.split()[1] for name in names if " " in name} == tags


def test_newer_frames_do_not_hurt() -> None:
    """Fields and kinds of a later version are passed over."""
    frame = golden()["lease"]
    frame["body"]["field_of_version_2"] = {"x": 1}
    assert wire.decode(msgspec.json.encode(frame)) == FRAMES["lease"]
    assert wire.decode(b'{"kind":"kind_of_version_2","body":{}}') is None


if __name__ == "__main__":
    kept = golden() if GOLDEN.exists() else {}
    for name, message in FRAMES.items():
        kept.setdefault(name, msgspec.json.decode(wire.encode(message)))
    GOLDEN.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
