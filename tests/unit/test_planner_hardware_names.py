"""Accelerators are found by every name that people and drivers give them, and by no other."""

from __future__ import annotations

import pytest

from common.errors import InvalidValue, NotFound
from head.planner.hardware.accelerators import (
    GIB,
    PRECISIONS,
    accelerator,
    accelerator_names,
    all_accelerators,
    find_accelerator,
    given_accelerator,
)

NAMES = {
    "H100": "H100-SXM-80GB",
    "h100_sxm": "H100-SXM-80GB",
    "NVIDIA H100 80GB HBM3": "H100-SXM-80GB",
    "NVIDIA H100 PCIe": "H100-PCIe-80GB",
    "NVIDIA H100 NVL": "H100-NVL-94GB",
    "H100-96GB-HBM2e-500W (Meta Grand Teton)": "H100-SXM-96GB-HBM2e",
    "NVIDIA H200": "H200-SXM-141GB",
    "NVIDIA H200 NVL": "H200-NVL-141GB",
    "DGX-GB300": "GB300",
    "GB200 NVL72": "GB200",
    "A100-SXM (DGX-A100)": "A100-SXM-80GB",
    "A100-SXM4-40GB": "A100-SXM-40GB",
    "NVIDIA A100 80GB PCIe": "A100-PCIe-80GB",
    "NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB",
    "a100_pcie": "A100-PCIe-80GB",
    "Tesla V100-SXM2-32GB": "V100-SXM-32GB",
    "V100-SXM3-32GB (DGX-2)": "V100-SXM3-32GB",
    "TPU-v5e": "TPU-v5e",
    "TPU v5 lite": "TPU-v5e",
    "NVIDIA GH200 480GB": "GH200-96GB",
    "NVIDIA RTX A6000": "RTX-A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX-6000-Ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000-Blackwell-Server",
    "AMD Instinct MI300X OAM": "MI300X",
    "b300_sxm": "B300-SXM",
    "B200 192GB": "B200-SXM-180GB",
    "L40S 48GB": "L40S",
    "p5.48xlarge": "H100-SXM-80GB",
    "Gaudi 3": "Gaudi3",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_device_is_found_by_its_many_names(name: str, expected: str) -> None:
    """Drivers', clouds', machines' and table names mean the part they stand for."""
    assert accelerator(name).name == expected


@pytest.mark.parametrize("name", ["", "banana", "H1000", "A100 24GB", "GPU", "h100 banana", "memory", "x" * 100_000])
def test_an_unknown_name_is_not_taken_for_something_else(name: str) -> None:
    """A word, a memory size or a family that no part has is unknown, with names that are known."""
    with pytest.raises(NotFound) as caught:
        accelerator(name)
    assert caught.value.status == 404
    assert "H100-SXM-80GB" in caught.value.details["known"]


def test_near_matches_are_offered() -> None:
    """A slip of the finger is answered with what may have been meant."""
    with pytest.raises(NotFound) as caught:
        accelerator("H1O0-SXM")
    assert any(name.startswith("H100") for name in caught.value.details["near"])


def test_every_device_is_found_by_its_own_name_and_aliases() -> None:
    """No alias leads to another device, and no two devices share a name."""
    assert len(set(accelerator_names())) == len(accelerator_names()) >= 43
    for device in all_accelerators():
        for name in (device.name, *device.aliases):
            assert find_accelerator(name) is device, name


def test_the_table_is_physically_sane() -> None:
    """Narrower formats are not slower, measured products stay under the peak, visible memory under the nominal."""
    for device in all_accelerators():
        peaks = device.peak_flops_by_precision
        assert peaks, device.name
        for wide, narrow in (("fp32", "tf32"), ("tf32", "bf16"), ("bf16", "fp8"), ("fp8", "fp4")):
            if wide in peaks and narrow in peaks:
                assert peaks[narrow] >= peaks[wide], (device.name, wide, narrow)
        for precision, measured in device.matmul_flops_by_precision.items():
            assert measured < peaks[precision], device.name
        assert 0.9 * device.memory_bytes < device.visible_bytes <= device.memory_bytes, device.name
        assert 1e11 < device.memory_bytes_per_s < 1e13, device.name
        assert (device.scaleup_bytes_per_s > 0) == (device.scaleup_gpus > 1), device.name
        assert (device.usd_per_hour is None) == (device.price_source == ""), device.name
        assert device.sources, device.name


def test_known_peaks_are_dense_ones() -> None:
    """The marketing figures with sparsity (1979 for H100 bf16, 4500 for B200 bf16) are not used."""
    assert accelerator("h100").peak_flops("bf16") == 989.4e12
    assert accelerator("b200").peak_flops("bf16") == 2250e12
    assert accelerator("a100").peak_flops("bf16") == 312e12


def test_a_precision_without_units_falls_back_to_what_kernels_do() -> None:
    """fp8 on A100 computes in bf16, bf16 on V100 on the fp32 units, nvfp4 on H100 in fp8."""
    assert accelerator("a100").compute_precision("fp8") == "bf16"
    assert not accelerator("a100").has_units_for("fp8")
    assert accelerator("v100").compute_precision("bf16") == "fp32"
    assert accelerator("h100").compute_precision("nvfp4") == "fp8"
    assert accelerator("b200").compute_precision("mxfp8") == "fp8"
    for device in all_accelerators():
        for precision in PRECISIONS:
            assert device.peak_flops(precision) > 0
    with pytest.raises(InvalidValue):
        accelerator("h100").peak_flops("fp7")


def test_a_mig_instance_is_a_share_of_its_card() -> None:
    """3g.20gb of a 40 GB A100: three sevenths of the compute, half the memory, no links."""
    whole, part = accelerator("A100-SXM4-40GB"), accelerator("NVIDIA A100-SXM4-40GB MIG 3g.20gb")
    assert part.peak_flops("bf16") == pytest.approx(whole.peak_flops("bf16") * 3 / 7)
    assert part.memory_bytes == whole.memory_bytes // 2
    assert part.scaleup_gpus == 1
    assert part.link_bytes_per_s == whole.pcie_bytes_per_s


def test_explicit_numbers_make_a_device() -> None:
    """A device that the table does not have is described by its numbers; memory is taken as visible."""
    device = given_accelerator(peak_tflops={"bf16": 500, "fp8": 1000}, memory_gib=64, memory_gb_per_s=3000)
    assert device.peak_flops("fp8") == 1e15
    assert device.visible_bytes == 64 * GIB
    assert device.usd_per_hour is None


@pytest.mark.parametrize("wrong", [{"peak_tflops": 0}, {"memory_gib": -1}, {"memory_gb_per_s": float("nan")}])
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    """Zero, negative and not-a-number are 422."""
    numbers = {"peak_tflops": 100.0, "memory_gib": 16.0, "memory_gb_per_s": 900.0} | wrong
    with pytest.raises(InvalidValue):
        given_accelerator(**numbers)  # type: ignore[arg-type]
