"""The monitor as a child of an agent: a real process on a double of NVML, engines that hang, disks that fill."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.monitor.engines import EngineWatch, Target
from agent.monitor.web import WebError, ask
from agent.runs.directory import RunDirectory
from tests.doubles import fake_nvml
from tests.doubles.monitor_run import ROOT, Engine, Process, free_port, run_order, until

LLAMA = b"llamacpp:requests_processing 2\nllamacpp:tokens_predicted_total 340\n"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver of today."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that answers."""
    made = Engine()
    yield made
    made.close()


def status(folder: Path) -> dict[str, Any]:
    """status.json; empty while there is none."""
    path = folder / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def test_a_run_writes_its_files_and_ends_well(tmp_path: Path, driver: Path, engine: Engine) -> None:
    """Rows at the interval, seed 002's columns first, engines beside them; SIGTERM leaves all of it complete."""
    engine.page = LLAMA
    order = {"interval": 0.1, "engines": [{"replica": "r1", "url": engine.url, "api_key": "k1"}], "stop_after_s": 0}
    facts = f"count 2\ngpu 1 util=77 used_mib=2048\nprocess 1 {os.getpid()} 500\n"
    with run_order(tmp_path, order, library=driver, facts=facts) as monitor:
        until(lambda: len(monitor.rows()) >= 12, "dozen of rows")
        until(lambda: len(monitor.rows("engine.csv")) >= 2, "second look at the engine")
        until(lambda: status(tmp_path).get("state") == "running", "word that it runs")
        assert monitor.end() == 0
        rows = monitor.rows()
        header = (tmp_path / "monitor.csv").read_text().splitlines()[0]
        assert header.startswith("timestamp,gpu0_util,gpu0_mem_used,gpu1_util,gpu1_mem_used,cpu_percent,ram_used_MB,")
        assert {row["gpu1_util"] for row in rows} - {""} == {"77"}  # empty where the machine was too slow
        assert {row["gpu1_mem_used"] for row in rows} - {""} == {"2048"}
        moments = len(rows) - 1 + int(rows[-1]["missed_ticks"])
        assert abs(moments - float(rows[-1]["elapsed_s"]) / 0.1) <= 1  # each moment is a row or missed
        assert all(float(row["cpu_percent"]) >= 0 for row in rows[1:] if row["cpu_percent"])
        looks = monitor.rows("engine.csv")
        assert looks[0]["replica"] == "r1"
        assert looks[0]["up"] == "1"
        assert looks[0]["requests_running"] == "2"
        assert looks[1]["generation_tokens_per_s"] == "0"
        assert engine.asked[0]["authorization"] == "Bearer k1"
        (process,) = monitor.rows("processes.csv")[:1]
        own = Path("/proc/self/comm").read_text().strip()
        assert (process["gpu"], process["mem_used_bytes"], process["name"]) == ("1", str(500 << 20), own)
    end = status(tmp_path)
    assert end["state"] == "ended"
    assert end["samples"] == len(rows)
    assert end["engines"][0]["failures"] == 0
    told = RunDirectory(tmp_path).status()  # as the agent reads it
    assert told is not None
    assert (told.state, told.error) == ("ended", None)


def test_it_ends_by_itself_when_told_so(tmp_path: Path) -> None:
    """`stop_after_s` ends the run without anybody's help, should the agent be gone."""
    with run_order(tmp_path, {"interval": 0.05, "stop_after_s": 0.3}) as monitor:
        assert monitor.wait() == 0
        assert 1 <= len(monitor.rows()) <= 7
    assert status(tmp_path)["state"] == "ended"


def test_a_machine_without_a_driver_is_watched_all_the_same(tmp_path: Path) -> None:
    """No libnvidia-ml: the reason is told, and the host's columns are there."""
    if Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").exists():
        pytest.skip("this machine has the driver")
    with run_order(tmp_path, {"interval": 0.05, "stop_after_s": 0.2}) as monitor:
        assert monitor.wait() == 0
        assert all(float(row["ram_used_MB"]) > 0 for row in monitor.rows())
    assert "libnvidia-ml.so.1 is not on this machine" in status(tmp_path)["gpu_reason"]


def test_a_lost_gpu_does_not_end_it(tmp_path: Path, driver: Path) -> None:
    """Its cells are empty and `lost` is 1 from then on; the other card's go on under the same header."""
    with run_order(tmp_path, {"interval": 0.05}, library=driver, facts="count 2\n") as monitor:
        until(lambda: [row for row in monitor.rows() if row["gpu1_util"]], "reading of GPU 1")
        monitor.describe("count 2\nlost 1\n")
        until(lambda: [row for row in monitor.rows() if row["gpu1_lost"] == "1"], "loss of GPU 1")
        assert monitor.end() == 0
        last = [row for row in monitor.rows() if row["gpu1_lost"] == "1"][-1]
        assert (last["gpu1_util"], last["gpu1_mem_used"], last["gpu1_power_w"]) == ("", "", "")
        assert last["gpu0_util"] == "10"


def test_a_hung_driver_delays_no_tick(tmp_path: Path, driver: Path) -> None:
    """While NVML hangs, rows of the host go on at their moments with empty cells for GPUs, and it is counted."""
    with run_order(tmp_path, {"interval": 0.1}, library=driver, facts="count 1\n") as monitor:
        until(lambda: [row for row in monitor.rows() if row["gpu0_util"]], "reading of the GPU")
        monitor.describe("count 1\nhang nvmlDeviceGetPowerUsage\n")
        until(lambda: sum(not row["gpu0_util"] for row in monitor.rows()) >= 8, "rows without the GPU")
        monitor.describe("count 1\n")
        until(lambda: monitor.rows()[-1]["gpu0_util"] == "10", "GPU again")
        assert monitor.end() == 0
        silent = [row for row in monitor.rows() if not row["gpu0_util"]]
        assert all(row["ram_used_MB"] for row in silent)
    assert status(tmp_path)["gpu_silent"] >= len(silent)


def test_an_engine_that_hangs_delays_nothing(tmp_path: Path, engine: Engine) -> None:
    """Rows come at their moments while one engine never answers; the other's looks go on, and its own say down."""
    hung = Engine()
    hung.page = None
    engine.page = LLAMA
    engines = [{"replica": "hung", "url": hung.url}, {"replica": "well", "url": engine.url}]
    try:
        with run_order(tmp_path, {"interval": 0.1, "engines": engines}) as monitor:
            until(
                lambda: [row for row in monitor.rows("engine.csv") if row["replica"] == "hung"], "look at the hung one"
            )
            assert monitor.end() == 0
            rows, looks = monitor.rows(), monitor.rows("engine.csv")
            assert len(rows) + int(rows[-1]["missed_ticks"]) >= 15  # its look takes two seconds
            assert {row["up"] for row in looks if row["replica"] == "hung"} == {"0"}
            assert {row["up"] for row in looks if row["replica"] == "well"} == {"1"}
    finally:
        hung.close()
    assert "no whole answer within 2 s" in json.dumps(status(tmp_path)["engines"])


def test_an_answer_that_drips_is_cut_off(engine: Engine) -> None:
    """A byte now and then keeps nobody beyond the deadline, which is of the whole answer."""
    engine.drips = True
    with pytest.raises(WebError, match=r"no whole answer within 0\.3 s"):
        ask("GET", engine.url, timeout_s=0.3)


def test_what_an_engine_answers_else_is_told(engine: Engine) -> None:
    """A status is the reason; nobody there is one, too; the next look that succeeds is up, with rates from then on."""
    watch = EngineWatch(Target(engine.url), lambda sample: None, interval_s=1.0)
    engine.page = 503
    assert watch.look().error == "HTTP 503"
    engine.page = b"llamacpp:tokens_predicted_total 100\n"
    first = watch.look()
    engine.page = b"llamacpp:tokens_predicted_total 300\n"
    second = watch.look()
    assert first.is_up
    assert "generation_tokens_per_s" not in first.values
    assert second.values["generation_tokens_per_s"] > 0
    engine.page = b"llamacpp:tokens_predicted_total 5\n"
    assert "generation_tokens_per_s" not in watch.look().values  # it was started anew
    gone = EngineWatch(Target(f"http://127.0.0.1:{free_port()}"), lambda sample: None, interval_s=1.0)
    assert "refused" in gone.look().error


def test_an_answer_without_an_end_is_refused(engine: Engine) -> None:
    """A page beyond the limit is an error and not the node's memory."""
    engine.page = b"x" * 100_000
    with pytest.raises(WebError, match="larger than 50000 bytes"):
        ask("GET", engine.url, timeout_s=5, max_bytes=50_000)


def test_it_goes_on_in_its_files(tmp_path: Path) -> None:
    """A monitor that was killed and is started again appends below the one header, and half a line is cut off."""
    with run_order(tmp_path, {"interval": 0.05}) as monitor:
        until(lambda: len(monitor.rows()) >= 3, "third row")
        monitor.end(signal.SIGKILL)
        before = len(monitor.rows())
    with (tmp_path / "monitor.csv").open("a") as file:
        file.write("2026-01-01T00:00:00.000Z,12.5,17")
    with run_order(tmp_path, {"interval": 0.05, "stop_after_s": 0.2}) as monitor:
        assert monitor.wait() == 0
        rows = monitor.rows()
        assert len(rows) > before
        assert all(row["ram_used_MB"] and None not in row for row in rows)
        assert (tmp_path / "monitor.csv").read_text().count("timestamp") == 1


@pytest.mark.parametrize(
    "text", ["", "{", '{"interval": "fast"}', '{"interval": 0.001}', '{"engines": [{"url": "ftp://x"}]}']
)
def test_an_order_that_is_none_is_said(tmp_path: Path, text: str) -> None:
    """The status tells the agent why, and the exit status is 1."""
    (tmp_path / "order.json").write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "agent.monitor", "--run", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    told = RunDirectory(tmp_path).status()
    assert told is not None
    assert told.state == "failed"
    assert told.error is not None
    assert told.error.code == "invalid_config"


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from agent.monitor.__main__ import main
sys.exit(main(["--run", sys.argv[1]]))
"""


def test_a_disk_that_fills_is_told_and_survived(tmp_path: Path) -> None:
    """No more room: whole rows up to there, what is lost is counted and said once, and the run ends well."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    (tmp_path / "order.json").write_text(json.dumps({"interval": 0.05}))
    monitor = Process(tmp_path, "-c", LIMITED, str(tmp_path), "6000")
    until(lambda: status(tmp_path).get("rows_lost", 0) > 20, "loss of rows")
    assert monitor.end() == 0
    rows = monitor.rows()  # whole lines: it asserts so
    assert 0 < len(rows) < status(tmp_path)["samples"]
    assert all(None not in row and None not in row.values() for row in rows)
    assert status(tmp_path)["state"] == "ended"
    assert monitor.said().count("samples cannot be written and are lost") == 1


@pytest.mark.engine
def test_a_real_engine_is_understood(tmp_path: Path) -> None:
    """A real llama-server behind an API key: its tokens and requests arrive in the columns."""
    server, gguf = os.environ.get("HERDER_TEST_LLAMA_SERVER", ""), os.environ.get("HERDER_TEST_GGUF", "")
    if not server or not gguf:
        pytest.skip("HERDER_TEST_LLAMA_SERVER and HERDER_TEST_GGUF name no engine and model; scripts/test sets them")
    port = free_port()
    words = ("-m", gguf, "--port", str(port), "--metrics", "--api-key", "k1", "-c", "256", "-t", "1")
    with (tmp_path / "engine.log").open("wb") as log:
        process = subprocess.Popen([server, *words], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    key = {"Authorization": "Bearer k1", "Content-Type": "application/json"}
    try:
        watch = EngineWatch(Target(f"{url}/v1", "r1", "k1"), lambda sample: None, interval_s=1.0)
        assert EngineWatch(Target(f"{url}/v1", "r1", "other"), lambda sample: None, interval_s=1.0).look().error
        until(lambda: process.poll() is not None or watch.look().is_up, "engine that is ready")
        assert process.poll() is None, (tmp_path / "engine.log").read_text()
        before = watch.look().values
        body = json.dumps({"prompt": "One two three", "max_tokens": 5, "temperature": 0}).encode()
        status_code, answer = ask("POST", f"{url}/v1/completions", headers=key, body=body, timeout_s=60)
        assert status_code == 200, answer
        after = watch.look().values
        tokens = json.loads(answer)["usage"]["completion_tokens"]
        assert after["generation_tokens_total"] - before["generation_tokens_total"] == tokens
        assert after["prompt_tokens_total"] > before["prompt_tokens_total"]
        assert after["decodes_total"] > before["decodes_total"]
        assert after["requests_running"] == 0
        assert after["generation_tokens_per_s"] > 0
    finally:
        process.terminate()
        process.wait(30)
