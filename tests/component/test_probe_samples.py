"""A GPU's readings in full and its processes, against the double of the NVML library in a fresh process each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles import fake_nvml
from tests.doubles.fake_nvml import probe

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3
MIB = 1024**2
SAMPLES = "show(samples=Nvml().samples())"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver of today."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def old_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver that lacks the newer functions."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml_old"), is_old=True)


def test_a_sample_holds_everything(driver: Path, tmp_path: Path) -> None:
    """Every reading arrives in our units, and counters as bytes and joules."""
    facts = (
        "count 1\n"
        "gpu 0 util=37 used_mib=2048 temp=61 power_mw=512345 ecc=3 corrected=8 energy_mj=2500 sm_mhz=1755 mem_mhz=2619"
        " throttle=0x24 nvlink_tx_kib=10 nvlink_rx_kib=20 pcie_tx=3000 pcie_rx=4000\n"
    )
    (sample,) = probe(driver, tmp_path / "machine", facts, SAMPLES)["samples"]
    rates = {name: sample.pop(name) for name in list(sample) if name.endswith("_per_s")}
    assert len(rates) == 4
    assert set(rates.values()) == {None}  # a rate needs two samples
    assert sample == {
        "index": 0,
        "uuid": "GPU-00000000-aaaa-bbbb-cccc-000000000000",
        "is_lost": False,
        "memory_total_bytes": 141 * GIB,
        "memory_used_bytes": 2 * GIB,
        "memory_free_bytes": 141 * GIB - 2 * GIB - 500 * MIB,
        "utilisation": 0.37,
        "memory_utilisation": 0.18,
        "power_w": 512.345,
        "power_limit_w": 700.0,
        "energy_j": 2.5,
        "temperature_c": 61.0,
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "throttle": ["sw_power_cap", "sw_thermal"],
        "ecc_corrected": 8,
        "ecc_uncorrected": 3,
        "nvlink_tx_bytes": 10 * 1024,
        "nvlink_rx_bytes": 20 * 1024,
        "pcie_tx_bytes": 3000,
        "pcie_rx_bytes": 4000,
    }


def test_a_card_without_links_has_none(driver: Path, tmp_path: Path) -> None:
    """Counters whose own return code says `not supported` are None, and the rest is read all the same."""
    (sample,) = probe(driver, tmp_path / "machine", "count 1", SAMPLES)["samples"]
    assert sample["nvlink_tx_bytes"] is None
    assert sample["pcie_rx_bytes"] is None
    assert sample["energy_j"] == 1000.0
    assert sample["throttle"] == []


@pytest.mark.parametrize(
    "field", ["throttle", "energy_j", "sm_clock_mhz", "power_limit_w", "temperature_c", "ecc_corrected"]
)
def test_each_reading_may_be_missing(driver: Path, tmp_path: Path, field: str) -> None:
    """A function that a card does not support costs its own value and no other."""
    functions = {
        "throttle": ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
        "energy_j": ("nvmlDeviceGetFieldValues", "nvmlDeviceGetTotalEnergyConsumption"),
        "sm_clock_mhz": ("nvmlDeviceGetClockInfo",),
        "power_limit_w": ("nvmlDeviceGetEnforcedPowerLimit",),
        "temperature_c": ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"),
        "ecc_corrected": ("nvmlDeviceGetTotalEccErrors",),
    }[field]
    facts = "count 1\n" + "".join(f"fail {function} 3\n" for function in functions)
    (sample,) = probe(driver, tmp_path / "machine", facts, SAMPLES)["samples"]
    assert sample[field] is None
    assert sample["utilisation"] == 0.1
    assert sample["memory_used_bytes"] == GIB


def test_an_old_driver_is_asked_the_old_way(old_driver: Path, tmp_path: Path) -> None:
    """Throttle reasons and energy come from the older functions where the newer are not there."""
    facts = "count 1\ngpu 0 throttle=0x80 energy_mj=7000\n"
    (sample,) = probe(old_driver, tmp_path / "machine", facts, SAMPLES)["samples"]
    assert sample["throttle"] == ["hw_power_brake"]
    assert sample["energy_j"] == 7.0
    assert sample["nvlink_tx_bytes"] is None
    assert sample["ecc_corrected"] is None


def test_instances_have_what_they_have(driver: Path, tmp_path: Path) -> None:
    """A MIG instance has its memory; power, clocks and links belong to the card."""
    samples = probe(driver, tmp_path / "machine", "count 1\nmig 0 2\n", SAMPLES)["samples"]
    assert [sample["index"] for sample in samples] == [0, 100, 101]
    assert samples[1]["memory_total_bytes"] == 18 * GIB
    assert samples[1]["power_w"] is None
    assert samples[1]["sm_clock_mhz"] is None
    assert samples[0]["power_w"] == 70.0


def test_a_lost_gpu_says_so(driver: Path, tmp_path: Path) -> None:
    """A GPU that is lost between two samples is marked in the second, without readings, and others go on."""
    script = """
        nvml = Nvml()
        before = nvml.samples()
        swap("count 2\\nlost 1\\n")
        show(before=before, lost=nvml.samples())
    """
    shown = probe(driver, tmp_path / "machine", "count 2", script)
    assert [sample["is_lost"] for sample in shown["lost"]] == [False, True]
    assert shown["lost"][1]["memory_used_bytes"] is None
    assert shown["lost"][1]["uuid"] == shown["before"][1]["uuid"]


def test_a_reset_gpu_is_found_again_by_who_watches(driver: Path, tmp_path: Path) -> None:
    """A driver gives a GPU back only once the library was let go by all of the process: the reader sees to that."""
    script = """
        from agent.monitor import node
        node.LOST_EVERY_S, node.REOPEN_S = 0.1, 0.05
        reader = node.NodeReader(("gpu", "processes"), processes_every_s=0.05)
        reader.open()
        swap("count 2\\nlost 1\\n")
        lost = reader.read().gpus
        swap("count 2\\n")
        deadline = time.monotonic() + 30
        while True:
            gpus = reader.read().gpus
            if gpus and not gpus[1].is_lost or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        reader.close()
        show(lost=lost, gpus=gpus)
    """
    shown = probe(driver, tmp_path / "machine", "count 2", script)
    assert shown["lost"][1]["is_lost"] is True
    assert shown["gpus"][1]["is_lost"] is False
    assert shown["gpus"][1]["utilisation"] == 0.11


def test_a_hung_driver_answers_none_in_the_time_given(driver: Path, tmp_path: Path) -> None:
    """A caller that cannot wait gets None within its own timeout, and readings again once the call returns."""
    script = """
        nvml = Nvml(timeout_s=30.0)
        nvml.inventory()
        swap("count 1\\nhang nvmlDeviceGetPowerUsage\\n")
        silent = [nvml.samples(timeout_s=0.05), nvml.samples(timeout_s=0.05)]
        swap("count 1\\n")
        deadline = time.monotonic() + 30
        while not (later := nvml.samples(timeout_s=0.05)) and time.monotonic() < deadline:
            time.sleep(0.01)
        show(silent=silent, later=later)
    """
    shown = probe(driver, tmp_path / "machine", "count 1", script)
    assert shown["silent"] == [None, None]
    assert shown["later"][0]["power_w"] == 70.0


def test_processes_carry_memory_and_use(driver: Path, tmp_path: Path) -> None:
    """A process's use is its newest sample since the last question; who used nothing since has none."""
    facts = """
        count 2
        process 0 42 1000
        process 1 43 500
        use 0 42 30 5 1000
        use 0 42 55 10 2000
    """
    script = "n = Nvml(); show(first=n.processes(), second=n.processes())"
    shown = probe(driver, tmp_path / "machine", facts, script)
    first, other = shown["first"]
    assert first["gpu"] == 0
    assert first["memory_bytes"] == 1000 * MIB
    assert (first["utilisation"], first["memory_utilisation"]) == (0.55, 0.1)
    assert other["utilisation"] is None
    assert shown["second"][0]["utilisation"] is None


def test_pcie_rates_are_bytes(driver: Path, tmp_path: Path) -> None:
    """The measured PCIe rates are bytes a second by card; instances have none of their own."""
    facts = "count 2\nmig 1 1\ngpu 0 pcie_tx_kbs=1500 pcie_rx_kbs=7\n"
    rates = probe(
        driver, tmp_path / "machine", facts, "show(rates={str(k): v for k, v in Nvml().pcie_rates().items()})"
    )["rates"]
    assert rates == {"0": [1_500_000.0, 7_000.0], "1": [0.0, 0.0]}
