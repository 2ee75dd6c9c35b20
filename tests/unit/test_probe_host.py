"""The host probe on made-up machines: trees of proc, sys and etc below a temporary root."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.daemon import _mover_config
from agent.probe import host
from agent.probe.nvml import GpuInventory, Nvml
from agent.probe.telemetry import CpuMeter, read_telemetry
from common.wire import GpuReading

GIB = 1024**3


class NoGpus(Nvml):
    """NVML as on a machine without GPUs."""

    def inventory(self) -> GpuInventory:
        return GpuInventory((), "no NVIDIA driver", "", "")

    def readings(self) -> tuple[GpuReading, ...]:
        return ()


def write(root: Path, path: str, text: str) -> None:
    """One file of the made-up machine."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GiB, half of it available, and no cgroup limit."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * 1024**2} kB\nMemAvailable: {32 * 1024**2} kB\n")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    return tmp_path


class TestMemory:
    def test_without_limits_is_the_machines(self, root: Path) -> None:
        """No cgroup limit: what the kernel says."""
        assert host.memory_bytes(root) == 64 * GIB
        assert host.memory_available_bytes(root) == 32 * GIB

    def test_cgroup_v2_limit_counts(self, root: Path) -> None:
        """The limit of our own v2 cgroup is all there is."""
        write(root, "proc/self/cgroup", "0::/slurm/job_7\n")
        write(root, "sys/fs/cgroup/slurm/job_7/memory.max", f"{16 * GIB}\n")
        assert host.memory_bytes(root) == 16 * GIB

    def test_narrowest_ancestor_wins(self, root: Path) -> None:
        """A limit above our cgroup binds too, and `max` is none."""
        write(root, "proc/self/cgroup", "0::/a/b\n")
        write(root, "sys/fs/cgroup/a/b/memory.max", "max\n")
        write(root, "sys/fs/cgroup/a/memory.max", f"{8 * GIB}\n")
        assert host.memory_bytes(root) == 8 * GIB

    def test_cgroup_v1_limit_counts(self, root: Path) -> None:
        """The v1 memory controller's limit counts, and its huge number for `unlimited` does not."""
        write(root, "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/box\n0::/box\n")
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
        write(root, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{4 * GIB}\n")
        assert host.memory_bytes(root) == 4 * GIB

    def test_hidden_cgroup_path_falls_back_to_the_mount(self, root: Path) -> None:
        """A container that sees the host's path finds its own limit at the top of the mount."""
        write(root, "proc/self/cgroup", "4:memory:/kubepods/pod1/abc\n")
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
        assert host.memory_bytes(root) == 2 * GIB

    def test_available_is_what_the_limit_leaves(self, root: Path) -> None:
        """Inside a limit, page cache that can be dropped counts as available."""
        write(root, "proc/self/cgroup", "0::/a\n")
        write(root, "sys/fs/cgroup/a/memory.max", f"{10 * GIB}\n")
        write(root, "sys/fs/cgroup/a/memory.current", f"{7 * GIB}\n")
        write(root, "sys/fs/cgroup/a/memory.stat", f"anon {5 * GIB}\ninactive_file {2 * GIB}\n")
        assert host.memory_available_bytes(root) == 5 * GIB


class TestDisks:
    def test_store_is_first_and_devices_are_listed_once(self, root: Path, tmp_path: Path) -> None:
        """The store's file system leads although another is mounted earlier; bind mounts do not repeat a device."""
        store = tmp_path / "store"
        (tmp_path / "other").mkdir()
        store.mkdir()
        lines = [
            f"1 0 8:1 / {tmp_path}/other rw - xfs /dev/sdb rw",
            f"2 0 8:2 / {store} rw,relatime shared:1 - ext4 /dev/sda1 rw",
            f"3 0 8:1 /sub {tmp_path} rw - xfs /dev/sdb rw",
            "4 0 0:5 / /proc rw - proc proc rw",
        ]
        write(root, "proc/self/mountinfo", "\n".join(lines))
        disks = host.read_disks(store / "not" / "made", root)
        assert [(disk.device, disk.fs_type) for disk in disks] == [("/dev/sda1", "ext4"), ("/dev/sdb", "xfs")]
        assert disks[0].path == str(store / "not" / "made")
        assert disks[0].total_bytes >= disks[0].free_bytes > 0

    def test_network_file_system_only_under_the_store(self, root: Path, tmp_path: Path) -> None:
        """A network mount is never asked unless the store stands on it."""
        (tmp_path / "my nfs").mkdir()
        write(root, "proc/self/mountinfo", f"1 0 0:9 / {tmp_path}/my\\040nfs rw - nfs4 server:/x rw\n")
        assert [disk.fs_type for disk in host.read_disks(Path("/"), root)] == [""]
        assert [disk.fs_type for disk in host.read_disks(tmp_path / "my nfs", root)] == ["nfs4"]


class TestCpus:
    def test_hyperthreads_share_a_core(self, root: Path) -> None:
        """Cores are told apart by package and core id."""
        for cpu, package, core in [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 0, 0)]:
            write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", f"{core}\n")
            write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", f"{package}\n")
        assert host.count_cores({0, 1, 2, 3}, root) == 3
        assert host.count_cores({0, 3}, root) == 1

    def test_unknown_topology_counts_cpus(self, root: Path) -> None:
        """Without topology each CPU is a core."""
        assert host.count_cores({0, 1, 5}, root) == 3

    def test_meter_gives_the_share_since_the_last_look(self, root: Path) -> None:
        """Busy ticks over all ticks, where idle and iowait are not busy and guest is not counted twice."""
        write(root, "proc/stat", "cpu 100 0 50 800 50 0 0 0 40 0\ncpu0 1\n")
        meter = CpuMeter(root)
        write(root, "proc/stat", "cpu 120 0 60 860 60 0 0 0 60 0\ncpu0 1\n")
        assert meter.share() == pytest.approx(0.3)
        assert meter.share() == 0.0


class TestNics:
    def test_speed_from_the_kernel(self, root: Path) -> None:
        """Ethernet says its speed; a link without one is -1."""
        write(root, "sys/class/net/eth0/speed", "25000\n")
        write(root, "sys/class/net/eth1/speed", "-1\n")
        assert host.nic_speed_mbps("eth0", root) == 25_000
        assert host.nic_speed_mbps("eth1", root) == -1
        assert host.nic_speed_mbps("gone", root) == -1

    def test_infiniband_rate_stands_in(self, root: Path) -> None:
        """An IPoIB interface without a speed takes its port's rate."""
        write(root, "sys/class/net/ib0/device/infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)\n")
        assert host.nic_speed_mbps("ib0", root) == 400_000

    def test_loopback_is_no_interface(self) -> None:
        """What cannot leave the machine is not listed."""
        assert "lo" not in [nic.name for nic in host.read_nics()]


class TestInventory:
    def test_names_the_machine(self, root: Path, tmp_path: Path) -> None:
        """Names, counts, default budgets and the reason for no GPUs."""
        write(root, "etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
        write(root, "proc/cpuinfo", "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD  EPYC 9654\n")
        for node in (0, 1):
            (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
        inventory = host.read_inventory(tmp_path, NoGpus(), find_engines=lambda: {"command": ""}, root=root)
        assert inventory.hostname == socket.gethostname()
        assert inventory.os == "Debian GNU/Linux 12 (bookworm)"
        assert inventory.cpu_model == "AMD EPYC 9654"
        assert inventory.cpus == len(os.sched_getaffinity(0))
        assert inventory.numa_nodes == 2
        assert inventory.dram_budget_bytes == 32 * GIB
        assert inventory.disk_budget_bytes == int(inventory.disks[0].total_bytes * host.DISK_SHARE)
        assert inventory.gpu_reason == "no NVIDIA driver"
        assert inventory.engines == {"command": ""}

    def test_budgets_are_capped_by_what_there_is(self, root: Path, tmp_path: Path) -> None:
        """A given budget holds, but not beyond the machine."""
        given = host.read_inventory(tmp_path, NoGpus(), dram_budget_bytes=0, disk_budget_bytes=5, root=root)
        assert (given.dram_budget_bytes, given.disk_budget_bytes) == (0, 5)
        huge = host.read_inventory(tmp_path, NoGpus(), dram_budget_bytes=10**18, disk_budget_bytes=10**18, root=root)
        assert huge.dram_budget_bytes == 64 * GIB
        assert huge.disk_budget_bytes == huge.disks[0].total_bytes

    @pytest.mark.parametrize("given", [None, 5, 10**18])
    def test_the_mover_has_the_budget_of_the_inventory(self, tmp_path: Path, given: int | None) -> None:
        """What placement counts with is what the store refuses by, also with the default."""
        store = tmp_path / "not" / "made" / "yet"
        told = host.read_inventory(store, NoGpus(), disk_budget_bytes=given).disk_budget_bytes
        config = AgentConfig(head_url="http://h:1", store_dir=str(store), disk_budget_bytes=given)
        assert _mover_config(config).disk_budget_bytes == told > 0

    def test_empty_machine_does_not_raise(self, tmp_path: Path) -> None:
        """A machine without /proc, /sys and /etc still has an inventory."""
        inventory = host.read_inventory(tmp_path, NoGpus(), root=tmp_path / "nothing")
        assert inventory.memory_bytes == 0
        assert inventory.numa_nodes == 1


def test_telemetry_of_a_missing_store_has_room_above_it(root: Path, tmp_path: Path) -> None:
    """A store that is not made yet is measured at the nearest folder above; what is passed in stays."""
    reading = read_telemetry(tmp_path / "a" / "b", NoGpus(), disk_reserved_bytes=3, dram_used_bytes=4, root=root)
    assert reading.disk_free_bytes > 0
    assert reading.memory_available_bytes == 32 * GIB
    assert (reading.disk_reserved_bytes, reading.dram_used_bytes) == (3, 4)
