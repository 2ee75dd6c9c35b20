"""What this machine is. Signatures first; the body follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.probe.nvml import Nvml
from common.wire import Inventory


def read_inventory(
    store: Path,
    nvml: Nvml,
    *,
    find_engines: Callable[[], dict[str, str]] = dict,
    dram_budget_bytes: int | None = None,
    disk_budget_bytes: int | None = None,
    root: Path = Path("/"),
) -> Inventory:
    """This machine; a budget of None is the default one. `root`: where proc, sys and etc are (tests)."""
    raise NotImplementedError
