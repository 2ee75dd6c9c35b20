"""The host's readings from a tree that a test writes: shares, rates, devices that go, kernels that lack files."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.monitor.procfs import GROUPS, HostReader

MEMINFO = """MemTotal:       1000 kB
MemFree:         100 kB
MemAvailable:    600 kB
Buffers:          20 kB
Cached:          300 kB
SwapCached:       50 kB
SwapTotal:       200 kB
SwapFree:        150 kB
SReclaimable:     30 kB
"""
NET = """Inter-|   Receive                            |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:  999 1 0 0 0 0 0 0 999 1 0 0 0 0 0 0
  eth0: {rx} 5 {errors} 0 0 0 0 0 {tx} 5 2 0 0 0 0 0
"""


class Machine:
    """A tree with proc and sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("vda", "loop0", "dm-0", "zram0", "nvme0n1"):
            (root / "sys/block" / name).mkdir(parents=True)
        for name in ("eth0", "lo", "veth12", "docker0"):
            (root / "sys/class/net" / name).mkdir(parents=True)
        self.write("proc/meminfo", MEMINFO)
        self.cpu(0, 0, 0)
        self.disk(0, 0, 0)
        self.net(0, 0)
        for resource in ("cpu", "memory", "io"):
            self.pressure(resource, 0, 0)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def cpu(self, busy: int, iowait: int, idle: int) -> None:
        """Ticks, all on the first of two CPUs; the second idles."""
        whole = f"cpu  {busy} 0 0 {2 * idle + busy + iowait} {iowait} 0 0 0 0 0\n"
        first = f"cpu0 {busy} 0 0 {idle} {iowait} 0 0 0 0 0\n"
        second = f"cpu1 0 0 0 {idle + busy + iowait} 0 0 0 0 0 0\n"
        self.write("proc/stat", f"{whole}{first}{second}intr 1 2 3\n")

    def disk(self, reads: int, sectors: int, busy_ms: int) -> None:
        lines = [
            f" 254 0 vda {reads} 0 {sectors} 0 4 0 {2 * sectors} 0 0 {busy_ms} 0 0 0 0 0",
            f" 254 1 vda1 {reads} 0 {sectors} 0 4 0 {2 * sectors} 0 0 {busy_ms} 0 0 0 0 0",
            " 259 0 nvme0n1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        ]
        self.write("proc/diskstats", "\n".join(lines) + "\n")

    def net(self, received: int, errors: int) -> None:
        self.write("proc/net/dev", NET.format(rx=received, tx=2 * received, errors=errors))

    def pressure(self, resource: str, some_us: int, full_us: int) -> None:
        self.write(
            f"proc/pressure/{resource}",
            f"some avg10=0.00 avg60=0.00 avg300=0.00 total={some_us}\n"
            f"full avg10=0.00 avg60=0.00 avg300=0.00 total={full_us}\n",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that has done nothing yet."""
    return Machine(tmp_path)


def test_cpu_is_shares_since_the_look_before(machine: Machine) -> None:
    """The first look has none; then busy and iowait are of the ticks that passed, over all CPUs and by CPU."""
    reader = HostReader(("cpu",), has_cores=True, root=machine.root)
    first = reader.read(10.0).cpu
    assert first is not None
    assert first.busy is None
    assert first.cores == (None, None)
    machine.cpu(busy=60, iowait=20, idle=20)
    cpu = reader.read(11.0).cpu
    assert cpu is not None
    assert cpu.busy == pytest.approx(0.3)
    assert cpu.iowait == pytest.approx(0.1)
    assert list(cpu.cores) == pytest.approx([0.6, 0.0])


def test_cores_are_read_only_when_asked_for(machine: Machine) -> None:
    """Without `has_cores` the line of all CPUs is all that is read."""
    cpu = HostReader(("cpu",), root=machine.root).read(1.0).cpu
    assert cpu is not None
    assert cpu.cores == ()


def test_memory_is_told_apart(machine: Machine) -> None:
    """Used is what is not available; the page cache counts buffers and slabs that can go, and not SwapCached."""
    memory = HostReader(("ram",), root=machine.root).read(1.0).memory
    assert memory is not None
    assert memory.total_bytes == 1000 * 1024
    assert memory.used_bytes == 400 * 1024
    assert memory.available_bytes == 600 * 1024
    assert memory.page_cache_bytes == 350 * 1024
    assert memory.swap_used_bytes == 50 * 1024


def test_disks_have_totals_and_rates(machine: Machine) -> None:
    """Whole disks only, sectors of 512 bytes, busy time as a share."""
    reader = HostReader(("disk",), root=machine.root)
    assert reader.disks == ("nvme0n1", "vda")
    first = {disk.name: disk for disk in reader.read(10.0).disks}["vda"]
    assert first.read_bytes_per_s is None
    machine.disk(reads=10, sectors=4, busy_ms=500)
    disk = {disk.name: disk for disk in reader.read(12.0).disks}["vda"]
    assert disk.read_bytes == 2048
    assert disk.written_bytes == 4096
    assert disk.busy_s == 0.5
    assert (disk.read_bytes_per_s, disk.write_bytes_per_s) == (1024.0, 2048.0)
    assert (disk.read_iops, disk.write_iops) == (5.0, 0.0)
    assert disk.busy == pytest.approx(0.25)


def test_a_disk_that_is_taken_out_has_no_reading(machine: Machine) -> None:
    """It leaves the readings and the others stay."""
    reader = HostReader(("disk",), root=machine.root)
    machine.write("proc/diskstats", " 254 0 vda 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n")
    assert [disk.name for disk in reader.read(1.0).disks] == ["vda"]


def test_interfaces_that_are_no_hardware_are_left_out(machine: Machine) -> None:
    """Loopback, container and bridge interfaces are not counted; errors are."""
    reader = HostReader(("network",), root=machine.root)
    reader.read(1.0)
    machine.net(received=3000, errors=7)
    (nic,) = reader.read(4.0).nics
    assert nic.name == "eth0"
    assert (nic.rx_bytes_per_s, nic.tx_bytes_per_s) == (1000.0, 2000.0)
    assert (nic.rx_errors, nic.tx_errors) == (7, 2)


def test_a_bond_is_not_counted_beside_its_members(machine: Machine) -> None:
    """Where interfaces have hardware, those without are someone else's traffic counted again."""
    for name in ("eth1", "bond0", "br0"):
        (machine.root / "sys/class/net" / name).mkdir()
    assert HostReader(("network",), root=machine.root).nics == ("bond0", "br0", "eth0", "eth1")
    for name in ("eth0", "eth1"):
        (machine.root / "sys/class/net" / name / "device").mkdir()
    assert HostReader(("network",), root=machine.root).nics == ("eth0", "eth1")


def test_devices_that_come_later_are_found_by_another_look(machine: Machine) -> None:
    """A disk that is plugged in appears after `rescan`, and not before."""
    reader = HostReader(("disk",), root=machine.root)
    (machine.root / "sys/block/sdz").mkdir()
    machine.write("proc/diskstats", " 8 0 sdz 1 0 8 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n")
    assert [disk.name for disk in reader.read(1.0).disks] == []
    reader.rescan()
    assert [disk.name for disk in reader.read(2.0).disks] == ["sdz"]


def test_infiniband_ports_count_their_words(machine: Machine) -> None:
    """A port's data counters are in words of four bytes; RDMA shows nowhere else."""
    folder = "sys/class/infiniband/mlx5_0/ports/1/counters"
    for name, value in (
        ("port_rcv_data", 100),
        ("port_xmit_data", 0),
        ("port_rcv_errors", 1),
        ("port_xmit_discards", 0),
    ):
        machine.write(f"{folder}/{name}", f"{value}\n")
    reader = HostReader(("network",), root=machine.root)
    assert reader.interfaces == ("eth0", "mlx5_0_1")
    reader.read(1.0)
    machine.write(f"{folder}/port_rcv_data", "1100\n")
    port = reader.read(2.0).nics[1]
    assert port.name == "mlx5_0_1"
    assert port.rx_bytes_per_s == 4000.0
    assert port.rx_errors == 1


def test_a_counter_that_falls_has_no_rate(machine: Machine) -> None:
    """An interface that was made anew begins at 0: that is no traffic of minus a thousand."""
    reader = HostReader(("network",), root=machine.root)
    machine.net(received=5000, errors=0)
    reader.read(1.0)
    machine.net(received=10, errors=0)
    (nic,) = reader.read(2.0).nics
    assert nic.rx_bytes_per_s is None


def test_pressure_is_seconds_and_shares(machine: Machine) -> None:
    """Totals are seconds; the share is of the time since the look before; CPUs have no `full`."""
    reader = HostReader(("pressure",), root=machine.root)
    reader.read(1.0)
    machine.pressure("io", 500_000, 250_000)
    found = {pressure.resource: pressure for pressure in reader.read(3.0).pressures}
    assert found["io"].some_s == 0.5
    assert found["io"].some == pytest.approx(0.25)
    assert found["io"].full == pytest.approx(0.125)
    assert found["cpu"].full is None


def test_a_kernel_that_lacks_everything_is_survived(tmp_path: Path) -> None:
    """An empty tree gives None and empty lists, twice."""
    reader = HostReader(GROUPS, has_cores=True, root=tmp_path)
    for now_s in (1.0, 2.0):
        sample = reader.read(now_s)
        assert sample.cpu is None
        assert sample.memory is None
        assert (sample.disks, sample.nics, sample.pressures) == ((), (), ())


def test_groups_that_were_not_asked_for_are_not_read(machine: Machine) -> None:
    """Only CPU asked for: nothing else is in the sample."""
    sample = HostReader(("cpu",), root=machine.root).read(1.0)
    assert sample.memory is None
    assert (sample.disks, sample.nics, sample.pressures) == ((), (), ())


def test_long_lists_are_read_whole(machine: Machine) -> None:
    """The real kernel hands diskstats out by the page; a list beyond 64 KiB is read to its end."""
    other = "".join(f" 8 {n} sd{n} 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n" for n in range(2000))
    machine.write("proc/diskstats", other + " 254 0 vda 9 0 8 0 0 0 0 0 0 0 0 0 0 0 0\n")
    (disk,) = [disk for disk in HostReader(("disk",), root=machine.root).read(1.0).disks if disk.name == "vda"]
    assert disk.reads == 9
