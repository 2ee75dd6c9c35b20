"""The probe against a double of the NVML library, loaded by the real bindings in a fresh process per scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles import fake_nvml
from tests.doubles.fake_nvml import probe

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3
MIB = 1024**2


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver of today."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver that lacks the newer functions."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml_old"), is_old=True)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Where the double reads what the machine is."""
    return tmp_path / "machine"


INVENTORY = "show(found=Nvml().inventory()._asdict())"
READINGS = "show(readings=Nvml().readings())"


def test_inventory_names_each_gpu(driver: Path, machine: Path) -> None:
    """Index, uuid, name, memory, capability, bus id, limits and versions arrive as the library says them."""
    found = probe(driver, machine, "count 2", INVENTORY)["found"]
    assert found["driver_version"] == "570.86.15"
    assert found["cuda_version"] == "12.8"
    assert found["reason"] == ""
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 1]
    assert found["gpus"][1] == {
        "index": 1,
        "uuid": "GPU-00000001-aaaa-bbbb-cccc-000000000000",
        "name": "NVIDIA H200",
        "memory_bytes": 141 * GIB,
        "compute_capability": "9.0",
        "pci_bus_id": "00000000:11:00.0",
        "power_limit_w": 700.0,
    }


def test_readings_carry_live_values(driver: Path, machine: Path) -> None:
    """Utilisation, memory, temperature, power and ECC errors are those of now, in our units."""
    facts = "count 1\ngpu 0 util=37 used_mib=2048 temp=61 power_mw=512345 ecc=3\n"
    (reading,) = probe(driver, machine, facts, READINGS)["readings"]
    assert reading == {
        "index": 0,
        "uuid": "GPU-00000000-aaaa-bbbb-cccc-000000000000",
        "memory_used_bytes": 2 * GIB,
        "memory_free_bytes": 141 * GIB - 2 * GIB - 500 * MIB,
        "utilisation": 0.37,
        "memory_utilisation": 0.18,
        "temperature_c": 61.0,
        "power_w": 512.345,
        "ecc_uncorrected": 3,
    }


def test_old_driver_still_answers(old_driver: Path, machine: Path) -> None:
    """Functions that an old driver lacks are replaced by older ones, or their values left out."""
    script = "n = Nvml(); show(found=n.inventory()._asdict(), readings=n.readings(), held=n.process_memory())"
    shown = probe(old_driver, machine, "count 1\nlink 0 0\nprocess 0 77 100\n", script)
    assert shown["found"]["gpus"][0]["memory_bytes"] == 141 * GIB
    (reading,) = shown["readings"]
    assert reading["temperature_c"] == 40.0
    assert reading["memory_used_bytes"] == GIB + 500 * MIB
    assert "ecc_uncorrected" not in reading
    assert shown["held"] == {"77": 100 * MIB}


def test_unsupported_readings_are_left_out(driver: Path, machine: Path) -> None:
    """A card without power, ECC or utilisation readings is read all the same."""
    facts = """
        count 1
        fail nvmlDeviceGetPowerUsage 3
        fail nvmlDeviceGetTotalEccErrors 3
        fail nvmlDeviceGetUtilizationRates 3
        fail nvmlDeviceGetTemperatureV 3
        fail nvmlDeviceGetTemperature 3
        fail nvmlDeviceGetEnforcedPowerLimit 3
        fail nvmlDeviceGetMigMode 3
    """
    script = "n = Nvml(); show(found=n.inventory()._asdict(), readings=n.readings())"
    shown = probe(driver, machine, facts, script)
    assert set(shown["readings"][0]) == {"index", "uuid", "memory_used_bytes", "memory_free_bytes"}
    assert "power_limit_w" not in shown["found"]["gpus"][0]


def test_mig_instances_are_numbered_apart(driver: Path, machine: Path) -> None:
    """A GPU in MIG mode is listed with its instances, which carry their parent, own memory and numbers from 100."""
    script = "n = Nvml(); show(found=n.inventory()._asdict(), readings=n.readings())"
    shown = probe(driver, machine, "count 2\nmig 1 2\n", script)
    gpus = {gpu["index"]: gpu for gpu in shown["found"]["gpus"]}
    assert sorted(gpus) == [0, 1, 110, 111]
    assert gpus[1]["mig_mode"] is True
    assert "mig_mode" not in gpus[111]
    assert gpus[111]["mig_parent"] == gpus[1]["uuid"]
    assert gpus[111]["memory_bytes"] == 18 * GIB
    assert gpus[111]["uuid"].startswith("MIG-")
    assert gpus[111]["compute_capability"] == "9.0"
    readings = {reading["index"]: reading for reading in shown["readings"]}
    assert sorted(readings) == [0, 1, 110, 111]
    assert "utilisation" not in readings[111]
    assert readings[0]["utilisation"] == 0.1


def test_direct_links_make_peers(driver: Path, machine: Path) -> None:
    """GPUs joined by an NVLink are each other's peers, others are not."""
    found = probe(driver, machine, "count 4\nlink 0 1\nlink 2 0\n", INVENTORY)["found"]
    peers = {gpu["index"]: gpu.get("nvlink_peers", []) for gpu in found["gpus"]}
    assert peers == {0: [1, 2], 1: [0], 2: [0], 3: []}


def test_switch_makes_all_peers(driver: Path, machine: Path) -> None:
    """GPUs whose NVLinks end at a switch reach each other through it."""
    found = probe(driver, machine, "count 4\nswitch 0\nswitch 1\nswitch 3\n", INVENTORY)["found"]
    peers = {gpu["index"]: gpu.get("nvlink_peers", []) for gpu in found["gpus"]}
    assert peers == {0: [1, 3], 1: [0, 3], 2: [], 3: [0, 1]}


def test_gpu_lost_while_running(driver: Path, machine: Path) -> None:
    """A GPU that is lost keeps its place in the readings, marked, leaves the inventory, and can come back."""
    script = """
        nvml = Nvml()
        nvml.inventory()
        swap("count 2\\nlost 1\\n")
        readings = nvml.readings()
        without = nvml.inventory()
        later = nvml.readings()
        swap("count 2\\n")
        back = nvml.inventory()
        show(readings=readings, without=without._asdict(), later=later, back=back._asdict(), held=nvml.process_memory())
    """
    shown = probe(driver, machine, "count 2", script)
    for readings in (shown["readings"], shown["later"]):
        assert [reading.get("is_lost", False) for reading in readings] == [False, True]
        assert readings[1]["uuid"] == "GPU-00000001-aaaa-bbbb-cccc-000000000000"
    assert [gpu["index"] for gpu in shown["without"]["gpus"]] == [0]
    assert shown["without"]["reason"].startswith("GPU 1: it fell off the bus")
    assert [gpu["index"] for gpu in shown["back"]["gpus"]] == [0, 1]
    assert shown["back"]["reason"] == ""


def test_forbidden_gpu_is_left_out_with_its_reason(driver: Path, machine: Path) -> None:
    """One GPU that may not be used does not hide the others."""
    found = probe(driver, machine, "count 2\nfail nvmlDeviceGetUUID 4 0\n", INVENTORY)["found"]
    assert [gpu["index"] for gpu in found["gpus"]] == [1]
    assert found["reason"] == "GPU 0: no permission to talk to the NVIDIA driver"


def test_process_memory_is_summed_over_gpus(driver: Path, machine: Path) -> None:
    """A process that spans GPUs holds the sum; one that computes and draws on a GPU is counted once there."""
    facts = """
        count 2
        process 0 42 1000
        process 1 42 500
        process 0 43 300
        process 0 43 300 graphics
        process 1 44 7 graphics
    """
    script = """
        nvml = Nvml()
        show(held=nvml.process_memory(), together=process_gpu_memory(nvml, {42, 44, 999}))
    """
    shown = probe(driver, machine, facts, script)
    assert shown["held"] == {"42": 1500 * MIB, "43": 300 * MIB, "44": 7 * MIB}
    assert shown["together"] == 1507 * MIB


def test_hanging_call_is_reported_and_costs_one_thread(driver: Path, machine: Path) -> None:
    """While a call hangs every question is answered by silence at once; when it returns, so do the readings."""
    script = """
        import threading, time
        nvml = Nvml(timeout_s=0.2)
        found = nvml.inventory()
        silent = [len(nvml.readings()), nvml.process_memory(), nvml.is_silent]
        threads = sum(thread.name == "nvml" for thread in threading.enumerate())
        swap("count 1\\n")
        deadline = time.monotonic() + 30
        while not (readings := nvml.readings()) and time.monotonic() < deadline:
            time.sleep(0.01)
        show(found=found._asdict(), silent=silent, threads=threads, readings=readings, is_silent=nvml.is_silent)
    """
    shown = probe(driver, machine, "count 1\nhang nvmlDeviceGetName\n", script)
    assert shown["found"]["gpus"] == []
    assert shown["found"]["reason"] == "NVML did not answer within 0.2 s"
    assert shown["silent"] == [0, {}, True]
    assert shown["threads"] == 1
    assert [reading["index"] for reading in shown["readings"]] == [0]
    assert shown["is_silent"] is False


def test_process_ends_although_a_call_hangs(driver: Path, machine: Path) -> None:
    """A hung driver does not keep the agent from stopping."""
    script = "n = Nvml(timeout_s=0.1); n.readings(); n.close(); show(ended=True)"
    assert probe(driver, machine, "hang nvmlInitWithFlags", script) == {"ended": True}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ("fail nvmlInitWithFlags 9", "not loaded"),
        ("fail nvmlInitWithFlags 18", "differ in version"),
        ("fail nvmlInitWithFlags 4", "no permission"),
        ("fail nvmlDeviceGetCount_v2 999", "NVML: "),
        ("count 0", "knows no GPU"),
    ],
)
def test_no_gpu_has_its_reason_in_words(driver: Path, machine: Path, facts: str, reason: str) -> None:
    """A driver that refuses leaves zero GPUs and says why."""
    script = "n = Nvml(); show(found=n.inventory()._asdict(), readings=n.readings(), held=n.process_memory())"
    shown = probe(driver, machine, facts, script)
    assert shown["found"]["gpus"] == []
    assert reason in shown["found"]["reason"]
    assert shown["readings"] == []
    assert shown["held"] == {}


def test_missing_library_has_its_reason(machine: Path) -> None:
    """A machine without the driver has zero GPUs and says so."""
    if Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").exists():
        pytest.skip("this machine has the driver")
    found = probe(None, machine, "", INVENTORY)["found"]
    assert found["gpus"] == []
    assert "libnvidia-ml.so.1 is not on this machine" in found["reason"]


def test_driver_that_loads_later_is_found(driver: Path, machine: Path) -> None:
    """An inventory asks anew although the driver refused a moment ago, and readings follow it."""
    script = """
        nvml = Nvml()
        before = nvml.inventory().gpus
        swap("count 1\\n")
        after = nvml.inventory().gpus
        show(before=before, after=after, readings=nvml.readings())
    """
    shown = probe(driver, machine, "fail nvmlInitWithFlags 9", script)
    assert shown["before"] == []
    assert len(shown["after"]) == len(shown["readings"]) == 1


def test_inventory_of_the_host_carries_the_gpus(driver: Path, machine: Path, tmp_path: Path) -> None:
    """The node's inventory and telemetry hold what NVML found."""
    script = f"""
        from agent.probe.host import read_inventory
        from agent.probe.telemetry import read_telemetry
        store = Path({str(tmp_path)!r})
        nvml = Nvml()
        inventory = read_inventory(store, nvml, find_engines=lambda: {{"llamacpp": "1"}})
        show(inventory=inventory, telemetry=read_telemetry(store, nvml, disk_used_bytes=5))
    """
    shown = probe(driver, machine, "count 2", script)
    assert [gpu["index"] for gpu in shown["inventory"]["gpus"]] == [0, 1]
    assert shown["inventory"]["cuda_version"] == "12.8"
    assert shown["inventory"]["engines"] == {"llamacpp": "1"}
    assert [gpu["index"] for gpu in shown["telemetry"]["gpus"]] == [0, 1]
    assert shown["telemetry"]["disk_used_bytes"] == 5
