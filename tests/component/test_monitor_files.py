"""What the monitor writes and shows: rotation, files that were there, formats, the command line, the table."""

from __future__ import annotations

import csv
import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from agent.monitor.api import Monitor as SeedMonitor
from agent.monitor.engines import EngineSample, EngineWatch, Target
from agent.monitor.files import JsonSink, LineFile
from agent.monitor.monitor import Monitor, Settings, Stop
from agent.monitor.node import NodeSample
from agent.monitor.procfs import HostSample
from agent.monitor.writer import QUEUE_MAX, Writer
from agent.probe.gpu_sample import GpuProcess, GpuSample
from agent.probe.nvml import GpuInventory
from common.errors import ExtraMissing
from common.wire import Gpu
from herder.cli.monitor_view import render
from tests.doubles.monitor_run import ROOT, until


def sample() -> NodeSample:
    """A sample of nothing."""
    return NodeSample(wall_ms=0, boottime_ms=0, elapsed_s=0.0, host=HostSample())


def herder(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`herder monitor` to its end."""
    start = "from herder.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-P", "-c", start, "monitor", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_file_is_begun_anew_at_its_limit(tmp_path: Path) -> None:
    """Every part has the header and whole lines; the newest parts are kept and the oldest goes."""
    file = LineFile(tmp_path / "x.csv", header="a,b\n", limit_bytes=20, keep=2)
    for number in range(12):
        file.append([f"{number:02d},{number:02d}\n"])
    file.close()
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == ["x.csv", "x.csv.1", "x.csv.2"]
    lines = [line for name in ("x.csv.2", "x.csv.1", "x.csv") for line in (tmp_path / name).read_text().splitlines()]
    assert lines.count("a,b") == 3
    numbers = [int(line.split(",")[0]) for line in lines if line != "a,b"]
    assert numbers == list(range(numbers[0], 12))
    assert all((tmp_path / name).stat().st_size <= 20 for name in parts)


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    """Yesterday's file is moved to FILE.1; an empty one is used."""
    (tmp_path / "x.csv").write_text("precious\n")
    LineFile(tmp_path / "x.csv", header="a\n").close()
    assert (tmp_path / "x.csv.1").read_text() == "precious\n"
    assert (tmp_path / "x.csv").read_text() == "a\n"
    (tmp_path / "y.csv").touch()
    LineFile(tmp_path / "y.csv", header="a\n").close()
    assert not (tmp_path / "y.csv.1").exists()


def test_another_header_is_not_gone_on_with(tmp_path: Path) -> None:
    """A file of another machine's columns is kept apart, also where going on was asked for."""
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    file = LineFile(tmp_path / "x.csv", header="a,c\n", is_resumed=True)
    file.append(["3,4\n"])
    file.close()
    assert (tmp_path / "x.csv").read_text() == "a,c\n3,4\n"
    assert (tmp_path / "x.csv.1").read_text() == "a,b\n1,2\n"


def test_a_write_that_fails_halfway_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a row that the disk still took is taken back, and the next row follows the last whole one."""
    file = LineFile(tmp_path / "x.csv", header="a\n")
    file.append(["1\n"])
    real, room = os.write, [3]

    def write(fd: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(fd, bytes(data)[: room[0]])
        room[0] -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space"):
            file.append(["22222222\n"])
    assert (tmp_path / "x.csv").read_text() == "a\n1\n"
    file.append(["3\n"])
    file.close()
    assert (tmp_path / "x.csv").read_text() == "a\n1\n3\n"


class StuckSink:
    """A disk that does not answer until it may."""

    name, lost = "stuck", 0

    def __init__(self) -> None:
        self.gate = Stop()
        self.taken = 0

    def write(self, samples: Any) -> None:
        self.gate.wait(30.0)
        self.taken += len(samples)

    def close(self) -> None:
        self.taken += 0


def test_a_disk_that_does_not_answer_holds_nobody_up() -> None:
    """Samples are taken without waiting, up to the queue's limit; what is beyond it is counted as lost."""
    sink = StuckSink()
    writer = Writer([sink])
    writer.start()
    writer.take(sample())
    until(lambda: not writer._waiting, "write that hangs")
    for _ in range(QUEUE_MAX + 7):
        writer.take(sample())
    assert writer.lost == 7
    sink.gate.set()
    writer.close()
    assert sink.taken == QUEUE_MAX + 1


def test_it_prints_csv_where_nothing_else_is_asked(tmp_path: Path) -> None:
    """In a pipe `herder monitor` writes seed 002's columns and ours."""
    done = herder("--interval", "0.05s", "--duration", "0.3s", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) >= 1
    assert next(iter(rows[0])) == "timestamp"
    assert float(rows[-1]["ram_used_MB"]) > 0


def test_it_prints_json_lines(tmp_path: Path) -> None:
    """-o json: one object a line, nested, with what was not asked for left empty."""
    done = herder("-o", "json", "--metrics", "cpu,ram", "--interval", "0.05s", "--duration", "0.3s", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert samples[-1]["host"]["memory"]["total_bytes"] > 0
    assert samples[-1]["host"]["disks"] == []


def test_files_by_their_names(tmp_path: Path) -> None:
    """--save takes several files, each by its suffix, and says how it went on stderr."""
    words = ("--save", "a.csv", "--save", "b.jsonl", "--cores", "--interval", "0.05s", "--duration", "0.3s")
    done = herder(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert len(rows) == len(lines)
    assert "cpu0_percent" in rows[0]
    assert f"{len(rows)} samples, " in done.stderr


def test_a_reader_that_leaves_ends_it(tmp_path: Path) -> None:
    """`herder monitor | head` ends without a complaint."""
    start = "from herder.cli.main import main; main()"
    monitor = subprocess.Popen(
        [sys.executable, "-P", "-c", start, "monitor", "--interval", "0.05s"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert monitor.stdout is not None
    assert monitor.stderr is not None
    with monitor:
        assert monitor.stdout.readline().startswith(b"timestamp")
        monitor.stdout.close()
        assert monitor.wait(30) == 0
        assert b"Traceback" not in monitor.stderr.read()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--interval", "0.01s"), 2, "at least 0.05 s"),
        (("--metrics", "gpu,fans"), 2, "fans: not one of"),
        (("--rotate", "much"), 2, "not a size"),
        (("--engine", "ftp://h"), 2, "no http URL"),
        (("--engine", "http://h:99999"), 2, "no http URL"),
        (("--engine", "a=http://h", "--engine", "a=http://i"), 2, "two engines are called a"),
        (("--pushgateway", "http://h:99999"), 2, "no http URL"),
        (("--pushgateway", "http://h", "--label", "a/b=c"), 2, "'a/b' is no name of a label"),
        (("--pushgateway", "http://h", "--job", ""), 2, "job cannot be empty"),
        (("--save", "x.csv", "--save", "./x.csv"), 2, "x.csv: two outputs cannot be one file"),
        (("--save", "x.csv", "--engine-save", "x.csv"), 2, "x.csv: two outputs cannot be one file"),
        (("-o", "json", "--save", "-"), 2, "leave one of them out"),
        (("--save", "x.txt"), 2, "the ending says the form: .csv, .jsonl, .ndjson, .parquet"),
        (("--save", "x"), 2, "the ending says the form"),
        (("--pushgateway", "http://h", "--push-interval", "0.1s"), 2, "at least a second"),
        (("--save", "missing/x.csv"), 1, "missing/x.csv: No such file"),
        (("--listen", "0.0.0.0:0"), 1, "open to everybody"),
        (("-o", "yaml"), 2, "JSON lines"),
        (("--engine-key-file", "none"), 1, "none: No such file"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    """One line that says what is wrong, before anything is sampled."""
    done = herder(*words, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    """The error names the extra, and nothing is left behind."""
    with pytest.raises(ExtraMissing) as caught:
        Monitor(Settings(outputs=(str(tmp_path / "x.parquet"),))).open()
    assert "herder[monitor]" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_parquet_holds_the_same_table(tmp_path: Path) -> None:
    """Columns and values are the CSV's, with types; the timestamp is a moment."""
    pytest.importorskip("pyarrow", reason="the extra herder[monitor] is not installed")
    import pyarrow.parquet

    outputs = (str(tmp_path / "x.csv"), str(tmp_path / "x.parquet"))
    Monitor(Settings(interval_s=0.05, outputs=outputs, stop_after_s=0.3)).run()
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert table.column_names == list(rows[0])
    assert table.num_rows == len(rows)
    last = table.to_pylist()[-1]
    assert last["timestamp"] == datetime.fromisoformat(rows[-1]["timestamp"])
    assert last["ram_used_bytes"] == int(rows[-1]["ram_used_bytes"])
    assert table.to_pylist()[0]["cpu_percent"] is None


@pytest.fixture
def drawn() -> Iterator[Monitor]:
    """A monitor that has seen two GPUs, a process and two engines."""
    monitor = Monitor(Settings(groups=("gpu", "cpu", "ram"), instance="a-node-with-a-name"))
    gpus = tuple(Gpu(index=n, uuid=f"GPU-{n}", name="NVIDIA H200 NVL", memory_bytes=141 << 30) for n in (0, 1))
    monitor.reader.inventory = GpuInventory(gpus, "", "", "")
    first = GpuSample(
        index=0,
        uuid="GPU-0",
        memory_total_bytes=141 << 30,
        memory_used_bytes=120 << 30,
        utilisation=0.97,
        power_w=633.0,
        power_limit_w=700.0,
        temperature_c=71.0,
        sm_clock_mhz=1755,
        throttle=("sw_power_cap", "sw_thermal", "hw_slowdown"),
    )
    monitor.latest = sample()
    monitor.latest.gpus = (first, GpuSample(index=1, uuid="GPU-1", is_lost=True))
    monitor.latest.processes = (
        GpuProcess(gpu=0, pid=4242, memory_bytes=100 << 30, utilisation=0.9, name="vllm\x1b[2J"),
    )
    up, down = (EngineWatch(Target("h:1", name), lambda _: None, interval_s=1.0) for name in ("up", "down"))
    up.latest = EngineSample("up", 0, 0, 0.0, True, 0.01, {"requests_running": 7.0, "kv_cache_used_ratio": 0.5})
    down.latest = EngineSample("down", 0, 0, 0.0, False, 2.0, {}, "no whole answer")
    monitor.watches = (up, down)
    yield monitor
    monitor.close()


def test_the_table_fits_eighty_columns(drawn: Monitor) -> None:
    """Whatever a card, a process or an engine is called, no line is longer and none can drive the terminal."""
    lines = render(drawn)
    assert all(len(line) <= 80 for line in lines), lines
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "97 %" in text
    assert "633/700 W" in text
    assert "sw_power" in text
    assert "lost" in text
    assert "down" in text


def test_the_table_says_why_there_is_no_gpu(drawn: Monitor) -> None:
    """The driver's reason, and its silence, are in the table."""
    assert drawn.latest is not None
    drawn.reader.inventory = GpuInventory((), "no NVIDIA driver", "", "")
    drawn.latest.gpus = ()
    assert "no GPU: no NVIDIA driver" in render(drawn)
    drawn.latest.gpus = None
    assert "GPUs: the driver does not answer" in render(drawn)


def test_a_run_of_the_seeds_monitor_ends_by_itself(tmp_path: Path) -> None:
    """`run()` blocks for max_duration, and export_json writes JSON lines beside the CSV."""
    monitor = SeedMonitor(tmp_path / "m.csv", 0.05, ("cpu",), max_duration=0.25, export_json=True)
    monitor.run()
    assert (tmp_path / "m.csv").read_text().startswith("timestamp,cpu_percent,elapsed_s")
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert len(lines) == monitor.status()["samples"]


def test_a_monitor_runs_once(tmp_path: Path) -> None:
    """A second start would write over the first's parts: it is refused, and the first is not touched."""
    monitor = SeedMonitor(tmp_path / "m.csv", 0.05, ("cpu",))
    monitor.start()
    with pytest.raises(RuntimeError, match="runs once"):
        monitor.start()
    assert monitor.is_running
    monitor.stop()
    assert not monitor.is_running


def test_json_lines_are_whole_samples(tmp_path: Path) -> None:
    """What was taken is what is written."""
    sink = JsonSink(tmp_path / "x.jsonl")
    sink.write([sample(), sample()])
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["boottime_ms"] for line in lines] == [0, 0]
