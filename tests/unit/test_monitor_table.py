"""The monitor's rows: seed 002's columns first, cells that fit the header, CSV that any reader reads back."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.monitor.columns import NodeTable, csv_line, timestamp
from agent.monitor.node import GROUPS, NodeReader, NodeSample
from agent.monitor.procfs import Cpu, HostSample, Memory
from agent.monitor.push import group_url
from agent.monitor.server import address_of
from agent.probe.gpu_sample import GpuSample, throttle_names
from agent.probe.nvml import GpuInventory
from common.wire import Gpu


def reader(folder: Path, gpus: int, groups: tuple[str, ...] = GROUPS) -> NodeReader:
    """A reader of an empty machine that has found so many GPUs."""
    made = NodeReader(groups, root=folder)
    found = tuple(Gpu(index=n, uuid=f"GPU-{n}", name="NVIDIA H200", memory_bytes=1) for n in range(gpus))
    made.inventory = GpuInventory(found, "", "", "")
    return made


def sample(**changes: Any) -> NodeSample:
    """A sample of a machine at half its CPUs."""
    host = HostSample(cpu=Cpu(0.5, 0.01), load1=1.0, memory=Memory(8 << 30, 3 << 30, 5 << 30, 1 << 30, 0))
    fields: dict[str, Any] = {"wall_ms": 1_704_110_400_250, "boottime_ms": 77, "elapsed_s": 1.5, "host": host}
    return NodeSample(**{**fields, **changes})


def test_the_header_begins_as_in_seed_002(tmp_path: Path) -> None:
    """Its columns, in its order; ours follow."""
    names = NodeTable(reader(tmp_path, 2)).names
    assert ",".join(names).startswith(
        "timestamp,gpu0_util,gpu0_mem_used,gpu1_util,gpu1_mem_used,cpu_percent,ram_used_MB,elapsed_s,"
    )
    assert len(set(names)) == len(names)


def test_without_gpus_the_header_has_none(tmp_path: Path) -> None:
    """A machine without GPUs has the seed's other columns."""
    assert NodeTable(reader(tmp_path, 0)).names[:3] == ("timestamp", "cpu_percent", "ram_used_MB")


def test_only_what_was_asked_for_has_columns(tmp_path: Path) -> None:
    """`metrics=("gpu",)` has no column of the host."""
    names = NodeTable(reader(tmp_path, 1, ("gpu",))).names
    assert not [name for name in names if name.startswith(("cpu", "ram", "disk", "net", "psi"))]


def test_values_carry_the_seeds_units(tmp_path: Path) -> None:
    """Percent, and megabytes of 2**20 as seed 002 counted them."""
    table = NodeTable(reader(tmp_path, 1))
    gpu = GpuSample(index=0, uuid="GPU-0", utilisation=0.855, memory_used_bytes=10_240 << 20, throttle=("sw_thermal",))
    row = dict(zip(table.names, table.row(sample(gpus=(gpu,))), strict=True))
    assert row["timestamp"] == "2024-01-01T12:00:00.250Z"
    assert row["gpu0_util"] == pytest.approx(85.5)
    assert row["gpu0_mem_used"] == 10_240
    assert row["cpu_percent"] == 50.0
    assert row["ram_used_MB"] == 3072
    assert row["gpu0_throttle"] == "sw_thermal"
    assert row["gpu0_power_w"] is None


@pytest.mark.parametrize("gpus", [None, (), (GpuSample(index=1, uuid="GPU-1", is_lost=True),)])
def test_a_row_always_fits_the_header(tmp_path: Path, gpus: tuple[GpuSample, ...] | None) -> None:
    """A silent driver, no answer for a card, a lost card, a host without anything: as many cells as columns."""
    table = NodeTable(reader(tmp_path, 2))
    for one in (sample(gpus=gpus), sample(gpus=gpus, host=HostSample())):
        row = table.row(one)
        assert len(row) == len(table.names)
        assert row[1:5] == [None] * 4


def test_cells_fit_when_cpus_leave(tmp_path: Path) -> None:
    """A CPU that is taken offline leaves its cell empty and moves no other."""
    made = reader(tmp_path, 0)
    table = NodeTable(made, cores=3)
    row = dict(zip(table.names, table.row(sample(host=HostSample(cpu=Cpu(0.5, 0.0, (0.1, 0.2))))), strict=True))
    assert (row["cpu0_percent"], row["cpu1_percent"], row["cpu2_percent"]) == (10.0, 20.0, None)


def test_no_reason_to_throttle_is_told_apart_from_no_word(tmp_path: Path) -> None:
    """`none` where the card says that nothing holds it back, empty where it does not say."""
    table = NodeTable(reader(tmp_path, 1))
    for throttle, cell in (((), "none"), (None, None), (("a", "b"), "a|b")):
        gpu = GpuSample(index=0, uuid="GPU-0", throttle=throttle)
        assert table.row(sample(gpus=(gpu,)))[table.names.index("gpu0_throttle")] == cell


values = st.one_of(st.none(), st.integers(), st.floats(-1e12, 1e12), st.text(st.characters(exclude_categories=["Cs"])))


@given(st.lists(values, min_size=1, max_size=8))
def test_lines_are_read_back_by_a_csv_reader(row: list[Any]) -> None:
    """Commas, quotes and line ends in names (of processes) stay in their cell; None is empty, never zero."""
    (cells,) = csv.reader(io.StringIO(csv_line(row), newline="")) if row != [None] and row != [""] else [[""]]
    assert len(cells) == len(row)
    for cell, value in zip(cells, row, strict=True):
        if value is None:
            assert cell == ""
        elif isinstance(value, float):
            assert float(cell) == pytest.approx(value, abs=0.0006)
        elif isinstance(value, int):
            assert int(cell) == value
        else:
            assert cell == value


@given(st.integers(0, 4_102_444_800_000))
def test_timestamps_are_iso_and_exact(wall_ms: int) -> None:
    """A timestamp is read back to its millisecond."""
    moment = datetime.fromisoformat(timestamp(wall_ms))
    assert moment.tzinfo == UTC
    assert round(moment.timestamp() * 1000) == wall_ms


def test_throttle_bits_have_names() -> None:
    """Every known bit by name, an unknown one by its number."""
    assert throttle_names(0) == ()
    assert throttle_names(0x1 | 0x40) == ("gpu_idle", "hw_thermal")
    assert throttle_names(0x4 | 0x8000) == ("sw_power_cap", "0x8000")


@pytest.mark.parametrize(
    ("labels", "path"),
    [
        ({"instance": "n1", "job": "j"}, "/metrics/job/j/instance/n1"),
        ({"job": "a/b"}, "/metrics/job@base64/YS9i"),
        ({"job": "j", "slurm_job_id": ""}, "/metrics/job/j/slurm_job_id@base64/="),
        ({"job": "j", "instance": ".."}, "/metrics/job/j/instance@base64/Li4"),
        ({"job": "spä ce?"}, "/metrics/job/sp%C3%A4%20ce%3F"),
    ],
)
def test_group_addresses_follow_the_gateways_rules(labels: dict[str, str], path: str) -> None:
    """The job first; slashes, dots alone and empty values in base64; the rest escaped."""
    assert group_url("http://g:9091/", labels) == f"http://g:9091{path}"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        (":9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:9", ("::1", 9)),
    ],
)
def test_addresses_default_to_loopback(text: str, address: tuple[str, int]) -> None:
    """A port alone is on this machine only."""
    assert address_of(text) == address


@pytest.mark.parametrize("text", ["", "h", "h:x", "h:99999"])
def test_addresses_that_are_none_are_refused(text: str) -> None:
    """No port, no number, or one that is too large."""
    with pytest.raises(ValueError, match="HOST:"):
        address_of(text)
