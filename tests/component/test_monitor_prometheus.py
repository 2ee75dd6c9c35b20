"""The monitor's series: a real Prometheus reads them, a real Pushgateway takes them and is left clean."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from agent.monitor import push
from agent.monitor.api import Monitor as SeedMonitor
from agent.monitor.engines import Target
from agent.monitor.monitor import Monitor, Settings
from agent.monitor.series import gpu_series
from agent.monitor.server import CONNECTIONS_MAX
from agent.probe.gpu_sample import GpuSample
from common.errors import InvalidConfig
from common.wire import GpuReading
from tests.doubles import fake_nvml, prometheus_run
from tests.doubles.monitor_run import ROOT, Engine, Process, free_port, until

GLOSSARY = ROOT / "docs" / "metrics.md"
FACTS = "count 2\ngpu 0 util=37 used_mib=2048 throttle=0x4 nvlink_tx_kib=3 nvlink_rx_kib=4 pcie_tx=5 pcie_rx=6\n"
needs_pushgateway = pytest.mark.skipif(
    not shutil.which("prometheus-pushgateway"),
    reason="no prometheus-pushgateway on PATH: apt-get install prometheus-pushgateway (scripts/test does)",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver of today."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


def get(url: str, token: str = "") -> str:
    """A page's text."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def herder(folder: Path, *words: str, library: Path | None = None, facts: str = "", **environ: str) -> Process:
    """`herder monitor` with these words."""
    start = "from herder.cli.main import main; main()"
    return Process(folder, "-P", "-c", start, "monitor", *words, library=library, facts=facts, **environ)


def port_of(process: Process) -> str:
    """Where its /metrics is."""

    def said() -> re.Match[str] | None:
        assert process.process.poll() is None, process.said()
        return re.search(r"/metrics on port (\d+)", process.said())

    match = until(said, "word of the port")
    assert match is not None
    return match[1]


@contextmanager
def gateway(folder: Path) -> Iterator[str]:
    """A Pushgateway that is ready; gives its URL."""
    port = free_port()
    log = folder / "gateway.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=output
        )

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return "OK" in get(f"http://127.0.0.1:{port}/-/ready")
        except urllib.error.URLError:
            return False

    try:
        until(is_ready, "ready Pushgateway")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def pushed(url: str, name: str) -> list[dict[str, str]]:
    """Labels of a series at the gateway, its value among them as `value`."""
    found = []
    for family in text_string_to_metric_families(get(f"{url}/metrics")):
        for sample in family.samples:
            if sample.name == name:
                found.append({**sample.labels, "value": str(sample.value)})
    return found


@prometheus_run.NEEDED
def test_a_real_prometheus_reads_it(tmp_path: Path, driver: Path) -> None:
    """Prometheus scrapes /metrics behind a token, and its answers are what the machine says."""
    secret = tmp_path / "secret"
    secret.write_text("a-word\n")
    secret.chmod(0o600)
    words = ("--listen", "0", "--interval", "0.5s", "--metrics-token-file", str(secret), "--seed-names")
    monitor = herder(tmp_path, *words, library=driver, facts=FACTS)
    try:
        port = port_of(monitor)
        config = tmp_path / "prometheus.yml"
        scrape = {
            "job_name": "nodes",
            "authorization": {"type": "Bearer", "credentials_file": str(secret)},
            "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
        }
        config.write_text(yaml.safe_dump({"global": {"scrape_interval": "300ms"}, "scrape_configs": [scrape]}))
        with prometheus_run.running(tmp_path, config) as address:

            def value(query: str) -> float | None:
                rows = prometheus_run.ask(address, query)
                return float(rows[0]["value"][1]) if rows else None

            until(lambda: value('herder_gpu_utilisation_ratio{gpu="0"}'), "scraped GPU")
            assert value('herder_gpu_utilisation_ratio{gpu="0"}') == 0.37
            assert value('herder_gpu_throttle{gpu="0",reason="sw_power_cap"}') == 1
            assert value('herder_gpu_throttle{gpu="0",reason="hw_thermal"}') == 0
            assert value('herder_gpu_nvlink_receive_bytes_total{gpu="0"}') == 4096
            assert value('gpu_memory_used_megabytes{gpu_id="0"}') == 2048
            until(lambda: value("rate(herder_monitor_samples_total[5s])"), "rate of samples")
            until(lambda: value("herder_node_cpu_ratio") is not None, "CPU")
            assert value("sum(scrape_samples_scraped) > 50")
        assert monitor.end(signal.SIGTERM) == 0
    finally:
        if monitor.process.poll() is None:
            monitor.end(9)


def test_the_text_says_what_the_glossary_explains(tmp_path: Path) -> None:
    """docs/metrics.md names every family that a monitor exports, and every one of its chapter is exported."""
    engine = Engine()
    engine.page = b"llamacpp:requests_processing 2\n"
    settings = Settings(interval_s=0.05, engines=(Target(engine.url, "r1"),), pushgateway=f"127.0.0.1:{free_port()}")
    monitor = Monitor(settings)
    monitor.open()
    try:
        monitor.latest = monitor.reader.read()
        monitor.watches[0].latest = monitor.watches[0].look()
        text = monitor.exposition().decode()
    finally:
        monitor.close()
        engine.close()
    there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) - {"herder_node_copies"}
    chapters = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", GLOSSARY.read_text(), re.MULTILINE | re.DOTALL))
    own = set(re.findall(r"^\| `(herder_\w+)`", chapters["Monitor"], re.MULTILINE))
    shared = set(re.findall(r"^\| `(herder_\w+)`", chapters["Agent"], re.MULTILINE))
    assert there <= own | shared
    assert own <= there


def test_an_agents_series_are_there_before_its_first_full_sample() -> None:
    """Telemetry's readings and full samples give the same families under the same names; the first lack values only."""
    reading = GpuReading(index=0, uuid="GPU-0", memory_used_bytes=5, memory_free_bytes=6, utilisation=0.5)
    full = GpuSample(index=0, uuid="GPU-0", memory_used_bytes=5, memory_free_bytes=6, utilisation=0.5, sm_clock_mhz=9)
    early, late = (
        {family.name: family.samples for family in gpu_series([gpu], {"GPU-0": "H200"})} for gpu in (reading, full)
    )
    assert early.keys() == late.keys()
    assert early["herder_gpu_utilisation_ratio"] == late["herder_gpu_utilisation_ratio"]
    assert early["herder_gpu_clock_hertz"] == []
    assert [sample.value for sample in late["herder_gpu_clock_hertz"]] == [9e6]


def test_an_agent_exports_what_its_gpus_say(tmp_path: Path, driver: Path) -> None:
    """A real agent on a machine with GPUs, without a head: clocks, throttling and links stand in its /metrics."""
    port = free_port()
    (tmp_path / "token").write_text("hdr_agent_none_none\n")
    (tmp_path / "token").chmod(0o600)
    settings = {
        "head_url": f"http://127.0.0.1:{free_port()}",
        "node_id": "n1",
        "token_file": str(tmp_path / "token"),
        "state_dir": str(tmp_path / "agent"),
        "dram_budget_bytes": 0,  # no holder, which would outlive the test
        "disk_reserve_bytes": 0,
        "http": {"port": port},
    }
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(settings))
    words = ("-P", "-m", "agent", "--config", str(tmp_path / "agent.yaml"))
    agent = Process(tmp_path, *words, library=driver, facts=FACTS)

    def clocks() -> dict[str, float]:
        assert agent.process.poll() is None, agent.said()
        try:
            text = get(f"http://127.0.0.1:{port}/metrics")
        except OSError:
            return {}
        return {
            sample.name + str(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("gpu") == "0"
        }

    def of(name: str) -> list[float]:
        return [value for key, value in clocks().items() if key.startswith(f"{name}[")]

    try:
        until(lambda: of("herder_gpu_clock_hertz"), "full sample")
        assert sorted(of("herder_gpu_clock_hertz")) == [1.98e9, 2.619e9]
        assert of("herder_gpu_nvlink_transmit_bytes_total") == [3 * 1024]
        assert sum(of("herder_gpu_throttle")) == 1
        assert of("herder_gpu_utilisation_ratio") == [0.37]
    finally:
        agent.end()


def test_a_lost_gpu_keeps_one_series() -> None:
    """Of a card that is lost there is that it is lost, and no reading of before."""
    lost = GpuSample(index=1, uuid="GPU-1", is_lost=True, power_w=5.0)
    there = {family.name: family.samples for family in gpu_series([lost], {}) if family.samples}
    assert list(there) == ["herder_gpu_lost"]
    assert there["herder_gpu_lost"][0].value == 1.0


def test_metrics_ask_for_their_token(tmp_path: Path) -> None:
    """No token and a wrong one get 401, the right one the text, other paths 404; /healthz is open."""
    secret = tmp_path / "secret"
    secret.write_text("a-word\n")
    secret.chmod(0o600)
    monitor = herder(tmp_path, "--listen", "127.0.0.1:0", "--metrics-token-file", str(secret))
    try:
        url = f"http://127.0.0.1:{port_of(monitor)}"
        for token in ("", "another", "a-word2"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(f"{url}/metrics", token)
        assert "herder_monitor_samples_total" in get(f"{url}/metrics", "a-word")
        assert get(f"{url}/healthz") == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{url}/other", "a-word")
    finally:
        assert monitor.end() == 0


def test_an_open_address_needs_a_token() -> None:
    """Beyond loopback /metrics is served behind a token or not at all."""
    with pytest.raises(InvalidConfig, match="open to everybody"):
        Monitor(Settings(listen=("0.0.0.0", 0))).open()


def test_a_port_that_is_taken_is_said_and_leaves_nothing_open(tmp_path: Path) -> None:
    """The second monitor on a port is refused, after it had opened its files and engines."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = ("127.0.0.1", int(taken.getsockname()[1]))
        settings = Settings(listen=address, engines=(Target("h:1"),), outputs=(str(tmp_path / "x.csv"),))
        before = threading.active_count()
        with pytest.raises(InvalidConfig, match="in use"):
            Monitor(settings).open()
    until(lambda: threading.active_count() <= before, "end of all threads")


def test_silent_connections_shut_nobody_out_for_long(tmp_path: Path) -> None:
    """Connections that say nothing are let go, and the next scrape is answered."""
    monitor = Monitor(Settings(listen=("127.0.0.1", 0), groups=("cpu",)))
    monitor.start()
    try:
        silent = [socket.create_connection(("127.0.0.1", monitor.server.port)) for _ in range(CONNECTIONS_MAX)]

        def answered() -> bool:
            try:
                return "herder_node_load1" in get(f"http://127.0.0.1:{monitor.server.port}/metrics")
            except OSError:
                return False

        until(answered, "answer beside silent connections")
        for connection in silent:
            connection.settimeout(60)
            assert connection.recv(100) == b""  # let go by the monitor, each of them
            connection.close()
    finally:
        monitor.stop()


@needs_pushgateway
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_the_gateway_clean(tmp_path: Path, driver: Path, number: signal.Signals) -> None:
    """What was pushed carries job, instance and the Slurm job, and is gone once the monitor has ended."""
    with gateway(tmp_path) as url:
        words = ("--pushgateway", url, "--push-interval", "1s", "--instance", "n1", "--label", "cluster=a/b")
        monitor = herder(tmp_path, *words, library=driver, facts=FACTS, SLURM_JOB_ID="4711")
        try:
            until(lambda: pushed(url, "herder_gpu_utilisation_ratio"), "pushed GPU")
            first = pushed(url, "herder_gpu_utilisation_ratio")[0]
            assert (first["job"], first["instance"], first["slurm_job_id"]) == ("herder-monitor", "n1", "4711")
            assert first["cluster"] == "a/b"
            assert float(first["value"]) == 0.37
            samples = pushed(url, "herder_monitor_samples_total")[0]["value"]
            until(lambda: pushed(url, "herder_monitor_samples_total")[0]["value"] != samples, "second push")
            assert monitor.end(number) == 0, monitor.said()
            assert pushed(url, "herder_monitor_samples_total") == []
            assert pushed(url, "push_time_seconds") == []
        finally:
            if monitor.process.poll() is None:
                monitor.end(9)


@needs_pushgateway
def test_an_error_leaves_the_gateway_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor that fails in the middle deletes its group, too, and says what failed."""
    with gateway(tmp_path) as url:
        monitor = Monitor(Settings(interval_s=0.05, pushgateway=url, push_interval_s=1.0, groups=("cpu",)))
        monitor.start()
        until(lambda: pushed(url, "herder_monitor_samples_total"), "first push")

        def fail(**_options: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(monitor.reader, "read", fail)
        until(lambda: not monitor.is_running, "end of the monitor")
        assert pushed(url, "herder_monitor_samples_total") == []
        with pytest.raises(RuntimeError, match="a bug"):
            monitor.stop()


@needs_pushgateway
def test_a_gateway_that_comes_back_gets_the_newest(tmp_path: Path) -> None:
    """Sampling goes on while nobody listens; once the gateway is there the next push arrives."""
    port = free_port()
    settings = Settings(
        interval_s=0.05, pushgateway=f"127.0.0.1:{port}", push_interval_s=1.0, groups=("cpu",), instance="n1"
    )
    monitor = Monitor(settings)
    monitor.start()
    until(lambda: monitor.pusher.failures >= 1, "failed push")
    assert "refused" in monitor.error
    before = monitor.samples
    until(lambda: monitor.samples > before + 3, "more samples")
    log = (tmp_path / "gateway.log").open("wb")
    process = subprocess.Popen(
        ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
    )
    try:
        until(lambda: monitor.pusher.pushes >= 1, "push")
        assert pushed(f"http://127.0.0.1:{port}", "herder_node_load1")[0]["instance"] == "n1"
        assert monitor.error == ""
        monitor.stop()
        assert pushed(f"http://127.0.0.1:{port}", "herder_node_load1") == []
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def test_a_gateway_that_hangs_holds_the_end_up_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the push on its way nor the deletion waits for ever; that the group is still there is said."""
    monkeypatch.setattr(push, "TIMEOUT_S", 0.2)
    hung = Engine()
    hung.page = None
    pusher = push.Pusher(hung.url, {"job": "j"}, lambda: b"x 1\n", interval_s=1.0)
    began_s = time.monotonic()
    pusher.start()
    until(lambda: pusher.failures, "push that failed")
    pusher.close()
    assert time.monotonic() - began_s < push.DELETE_END_S
    assert "no whole answer" in pusher.error
    hung.close()


@needs_pushgateway
def test_seed_002s_python_interface(tmp_path: Path) -> None:
    """Its constructor, start, get_latest and stop; its series at the gateway with its labels, gone at the end."""
    os.environ.pop("SLURM_JOB_ID", None)
    with gateway(tmp_path) as url:
        monitor = SeedMonitor(
            output_file=str(tmp_path / "benchmark_metrics.csv"),
            interval=0.1,
            metrics=("gpu", "cpu", "ram"),
            prometheus_pushgateway_url=url,
            prometheus_push_interval=1,
        )
        assert monitor.get_latest() == {}
        monitor.start()
        until(lambda: monitor.get_latest().get("cpu_percent") is not None, "CPU reading")
        latest = monitor.get_latest()
        assert latest["ram_used_MB"] > 0
        until(lambda: pushed(url, "cpu_usage_percent"), "pushed CPU")
        series = pushed(url, "ram_used_megabytes")[0]
        assert series["job"] == "monitor"
        assert series["instance"] == socket.gethostname()
        assert float(pushed(url, "monitor_samples_total")[0]["value"]) >= 1
        assert pushed(url, "monitor_loop_duration_seconds")
        monitor.stop()
        monitor.stop()
        assert pushed(url, "cpu_usage_percent") == []
    header = (tmp_path / "benchmark_metrics.csv").read_text().splitlines()[0]
    assert header.startswith("timestamp,")
    assert ",cpu_percent,ram_used_MB," in header
