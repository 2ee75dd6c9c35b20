"""Named kinds of hostility for the simulator."""

from __future__ import annotations

from tests.sim.world import Faults

CALM = Faults(until_ms=120_000)
NETWORK = Faults(
    loss=0.02, duplicate=0.02, reorder=0.05, partition_per_s=0.004, disconnect_per_s=0.005, until_ms=240_000
)
CRASHES = Faults(
    head_crash_per_s=0.02,
    agent_crash_per_s=0.008,
    mover_crash_per_s=0.006,
    holder_crash_per_s=0.002,
    reboot_per_s=0.002,
    engine_crash_per_s=0.004,
    engine_hang_per_s=0.002,
    until_ms=240_000,
)
DISKS = Faults(
    head_disk_full_per_s=0.02,
    agent_disk_full_per_s=0.01,
    source_fails=0.1,
    source_lies=0.1,
    head_stall_per_s=0.02,
    until_ms=240_000,
)
EVERYTHING = Faults(
    loss=0.02,
    duplicate=0.02,
    reorder=0.05,
    partition_per_s=0.003,
    disconnect_per_s=0.004,
    head_crash_per_s=0.012,
    head_stall_per_s=0.01,
    head_disk_full_per_s=0.008,
    agent_crash_per_s=0.005,
    agent_disk_full_per_s=0.004,
    mover_crash_per_s=0.004,
    holder_crash_per_s=0.002,
    reboot_per_s=0.001,
    engine_crash_per_s=0.003,
    engine_hang_per_s=0.002,
    source_fails=0.05,
    source_lies=0.05,
    until_ms=300_000,
)
PROFILES = {"calm": CALM, "network": NETWORK, "crashes": CRASHES, "disks": DISKS, "everything": EVERYTHING}
