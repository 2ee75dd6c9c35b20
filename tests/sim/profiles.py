"""Named kinds of hostility for the simulator.

calm        nothing goes wrong: what is asked and can be had is there soon
network     frames are lost, doubled, late; one- and two-way partitions; websockets cut
crashes     head, agents, movers, holders, machines and engines die
disks       full disks at head and agents, sources that die or lie, a head that stands still
everything  all of the above, each a little less
room        disks and RAM tiers that hold two or three models, and peers that cannot reach each other
engines     engines that hang, die, never get ready, and leave processes and GPU memory behind
heads       heads that crash, are restored from a backup, run on as old processes, find another wall clock; strangers
silence     long partitions, lost results, ledgers that cannot be written for long, a node that never returns
leaving     machines whose time ends and who say so; agents that are away for long, so that shims end engines
wild        all of it on small machines
"""

from __future__ import annotations

from dataclasses import replace

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
ROOM = Faults(
    disk_gib=14, dram_gib=6, source_fails=0.03, peer_cut_per_s=0.01, mover_crash_per_s=0.004, until_ms=300_000
)
ENGINES = Faults(
    engine_crash_per_s=0.01,
    engine_hang_per_s=0.005,
    engine_leaks=0.3,
    models_broken=0.3,
    agent_crash_per_s=0.008,
    reboot_per_s=0.002,
    until_ms=300_000,
)
HEADS = Faults(
    loss=0.01,
    head_crash_per_s=0.02,
    head_clones_per_s=0.006,
    head_restored=1.0,
    strangers=1.0,
    clock_jump_ms=3_600_000,
    disconnect_per_s=0.005,
    until_ms=300_000,
)
SILENCE = Faults(
    partition_per_s=0.006,
    head_crash_per_s=0.006,
    clock_jump_ms=3_600_000,
    agent_crash_per_s=0.004,
    agent_disk_full_per_s=0.003,
    agent_disk_full_ms=90_000,
    result_loss=0.6,
    node_vanishes=0.7,
    until_ms=400_000,
)
WILD = replace(
    EVERYTHING,
    result_loss=0.2,
    peer_cut_per_s=0.004,
    engine_leaks=0.1,
    models_broken=0.15,
    node_vanishes=0.4,
    strangers=0.3,
    head_clones_per_s=0.001,
    head_restored=0.3,
    clock_jump_ms=3_600_000,
    agent_disk_full_ms=60_000,
    disk_gib=24,
    dram_gib=10,
)
LEAVING = Faults(
    loss=0.01,
    leaving_per_s=0.004,
    partition_per_s=0.004,
    agent_crash_per_s=0.004,
    agent_away_ms=200_000,
    agent_disk_full_per_s=0.003,
    agent_disk_full_ms=60_000,
    head_crash_per_s=0.004,
    until_ms=400_000,
)
PROFILES = {
    "calm": CALM,
    "network": NETWORK,
    "crashes": CRASHES,
    "disks": DISKS,
    "everything": EVERYTHING,
    "room": ROOM,
    "engines": ENGINES,
    "heads": HEADS,
    "silence": SILENCE,
    "wild": WILD,
    "leaving": LEAVING,
}
