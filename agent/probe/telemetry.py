"""How this machine fares. Signatures first; the body follows."""

from __future__ import annotations

from pathlib import Path

from agent.probe.nvml import Nvml
from common.wire import Telemetry


def read_telemetry(
    store: Path,
    nvml: Nvml,
    *,
    disk_used_bytes: int = 0,
    disk_reserved_bytes: int = 0,
    dram_used_bytes: int = 0,
    root: Path = Path("/"),
) -> Telemetry:
    """Readings of now, cheap enough for once a second; what the store uses is known to the mover and passed in."""
    raise NotImplementedError
