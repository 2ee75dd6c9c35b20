"""A suite's figures, logs, tokens and kept files, each by itself."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.suite import figures, reading, results, tokens
from agent.suite.api import LogSource, ServiceFactory, TailerLogCollector
from agent.suite.controller import BaseWorkloadController
from agent.suite.logs import time_of
from agent.suite.orchestrator import _without_secrets, spread_of
from common.bench.histogram import RELATIVE_ERROR, Histogram
from herder.errors import HerderError

NS = 1_000_000_000
samples = st.lists(st.integers(1_000, 10 * NS), min_size=1, max_size=60)


def measured(values: list[int], errors: int = 0, window_s: float = 2.0) -> figures.Figures:
    """Figures of latencies."""
    made = figures.Figures(requests=len(values) + errors, errors=errors, window_s=window_s, threads=1)
    made.latency.add_all(values)
    return made


@settings(max_examples=60)
@given(st.lists(samples, min_size=1, max_size=5))
def test_merged_percentiles_are_those_of_all_samples(parts: list[list[int]]) -> None:
    """However requests are spread over executors, p50, p90 and p99 are the whole's within the histogram's error."""
    whole = figures.merged(measured(part) for part in parts)
    ranked = sorted(value for part in parts for value in part)
    told = figures.in_seconds(whole.latency)
    assert whole.requests == len(ranked)
    assert told["avg"] == pytest.approx(sum(ranked) / len(ranked) / NS)
    for name, share in figures.SHARES.items():
        rank = min(max(int(-(-round(share * len(ranked), 9) // 1)), 1), len(ranked))
        assert told[name] == pytest.approx(ranked[rank - 1] / NS, rel=2 * RELATIVE_ERROR + 1e-9)


@given(samples, st.integers(0, 5))
def test_figures_travel_unchanged(values: list[int], errors: int) -> None:
    """What an executor sends is what the orchestrator reads, through JSON."""
    made = measured(values, errors)
    made.others["ttft"] = Histogram()
    made.others["ttft"].add(5)
    again = figures.Figures.from_wire(json.loads(json.dumps(made.to_wire())))
    assert again.to_wire() == made.to_wire()


@given(samples)
def test_ticks_add_up_to_the_whole(values: list[int]) -> None:
    """Live counts and means are exact; percentiles have the histogram's error."""
    live, whole = figures.Figures(), measured(values)
    for value in values:
        one = measured([value])
        live.add_tick({"measured": 1, "measured_failed": 0, "e2e": one.latency.counts, "e2e_sum_ns": value})
    assert (live.requests, live.latency.count, live.latency.sum) == (len(values), len(values), whole.latency.sum)
    assert figures.in_seconds(live.latency)["p50"] == pytest.approx(
        figures.in_seconds(whole.latency)["p50"], rel=4 * RELATIVE_ERROR
    )


def test_prometheus_text_bears_any_host() -> None:
    """Label values are escaped, counters are whole numbers."""
    text = figures.prometheus("ollama", measured([NS], 1), running=True, elapsed_s=2.5, host='a"b\\c\n')
    assert 'ollama_requests_total{host="a\\"b\\\\c\\n"} 2\n' in text
    assert "ollama_workload_running" in text
    assert re.search(r"^ollama_throughput_rps\{.*\} 0\.5$", text, re.M)
    assert re.search(r"^ollama_request_latency_quantile_seconds_sum\{.*\} 1$", text, re.M)
    assert re.search(r"^ollama_request_latency_quantile_seconds_count\{.*\} 1$", text, re.M)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")
def test_promtool_has_nothing_to_say() -> None:
    """Prometheus' own check of what it scrapes finds no mistake and no bad habit."""
    text = figures.prometheus("ollama", measured([NS], 1), running=True, elapsed_s=2.5, host="h")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_prometheus_text_bears_any_service() -> None:
    """A service may be called what no metric may be."""
    text = figures.prometheus("2my-service.v1", measured([NS], 0), running=True, elapsed_s=1.0, host="h")
    assert re.search(r"^_2my_service_v1_requests_total\{", text, re.M)
    assert "my-service" not in text


def test_a_client_whose_generator_failed_is_lost() -> None:
    """What it counted before is no whole measurement, even where it cannot say why it failed."""
    controller = BaseWorkloadController(["a"], timeout=1)
    said = {"figures": measured([NS]).to_wire(), "is_reachable": True, "running": False, "phase": "failed"}
    controller._judge("a", said, 0.0, {"a": 0.0})
    whole = controller.aggregated({"a": said})
    assert (whole["coverage"], whole["is_valid"]) == ("0/1", False)


def test_tokens_of_servers_do_not_get_into_results() -> None:
    """Results are passed on; what else the environment says is part of the experiment."""
    found = _without_secrets({"environment": {"HF_TOKEN": "hf_x", "OLLAMA_NUM_PARALLEL": "4"}, "scenario": "s"})
    assert found == {"environment": {"HF_TOKEN": "...", "OLLAMA_NUM_PARALLEL": "4"}, "scenario": "s"}


def test_a_lost_client_is_left_out_with_its_share() -> None:
    """Coverage is an exact fraction, and the living clients' figures are not scaled up."""
    controller = BaseWorkloadController(["a", "b", "c"], timeout=1)
    said = {
        name: {"figures": measured([NS, 2 * NS]).to_wire(), "is_valid": True, "is_reachable": True} for name in "ab"
    }
    whole = controller.aggregated(said | {"c": {"error": "no answer", "is_reachable": False}})
    assert (whole["coverage"], whole["is_degraded"], whole["total_requests"]) == ("2/3", True, 4)
    assert whole["clients_lost"] == [{"node": "c", "reason": "no answer", "last_seen": None}]
    assert controller.aggregated(said)["is_valid"]


def test_repetitions_are_told_by_mean_and_spread() -> None:
    """Each value is kept; a mean of percentiles is never called one."""
    runs = [{"client_metrics": {"aggregated": dict.fromkeys(
        ("throughput_rps", "avg_latency", "p50_latency", "p99_latency"), value)}} for value in (1.0, 3.0)]  # fmt: skip
    found = spread_of(runs)
    assert found["throughput_rps"] == {"values": [1.0, 3.0], "mean": 2.0, "stddev": pytest.approx(2**0.5)}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("2024-05-06T07:08:09Z x", "2024-05-06T07:08:09+00:00"),
        ("2024-05-06 07:08:09,123 x", "2024-05-06T07:08:09.123000+00:00"),
        ("time=2024-05-06T07:08:09.123456789+02:00 level=INFO", "2024-05-06T05:08:09.123456+00:00"),
        ("[GIN] 2024/05/06 - 07:08:09 | 200 |", "2024-05-06T07:08:09+00:00"),
        ("no time at all", None),
        ("2024-13-45T99:99:99Z", None),
    ],
)
def test_lines_tell_their_own_time(line: str, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that an engine wrote is the event's; without one it is said that there is none."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    found = time_of(line)
    assert (found.isoformat() if found is not None else None) == told


def test_vllms_lines_have_no_year() -> None:
    """vLLM writes month and day; the year is this one, or the last for a day that is still to come."""
    found = time_of("INFO 01-02 03:04:05 api_server.py:1] ready")
    assert found is not None
    assert (found.month, found.day) in ((1, 2), (1, 1), (1, 3))


def collect(folder: Path, config: dict[str, Any], sources: list[LogSource]) -> dict[str, Any]:
    """Everything that lies there, through a collector."""
    collector = ServiceFactory.create_log_collector("tailer", config, folder)
    assert isinstance(collector, TailerLogCollector)
    assert collector.deploy(sources)
    assert collector.start_collection()
    assert collector.is_ready()
    return collector.stop_collection()


def test_logs_are_collected_whole(tmp_path: Path) -> None:
    """Every line of every file, the last without an end too, once; what is missing is named."""
    (tmp_path / "container_n1.log").write_bytes(b"one\ntwo\xff\n\nlast")
    (tmp_path / "container_n1.err").write_text("trouble\n")
    (tmp_path / "client_n2.log").write_text("".join(f"line {number}\n" for number in range(50_000)))
    said = collect(tmp_path, {}, [LogSource("n1", "server"), LogSource("n2", "client"), LogSource("n3", "client")])
    assert (said["stdout_lines"], said["stderr_lines"], said["jsonl_lines"]) == (50_004, 1, 50_005)
    assert said["missing"] == [str(tmp_path / "client_n3.log")]
    lines = [json.loads(line) for line in (tmp_path / "aggregated.jsonl").read_text().splitlines()]
    assert [line["message"] for line in lines if line["node"] == "n2"] == [f"line {number}" for number in range(50_000)]
    assert {"timestamp", "node", "component", "message"} <= set(lines[0])
    assert "[n1] [server] trouble" in (tmp_path / "stderr.log").read_text()
    assert not (tmp_path / "loggers_ready").exists()


def test_knobs_of_logging_have_effects(tmp_path: Path) -> None:
    """Categories choose sources, distributed gives a file per node, text is no JSON."""
    for name in ("container_n1.log", "client_n1.log", "monitor_n1.log"):
        (tmp_path / name).write_text(f"{name}\n")
    sources = [LogSource("n1", component) for component in ("server", "client", "monitor")]
    said = collect(tmp_path, {"categories": ["infrastructure"], "format": "text"}, sources)
    assert (said["stdout_lines"], said["sources_left_out"]) == (1, 2)
    assert "monitor_n1.log" in (tmp_path / "aggregated.log").read_text()
    said = collect(tmp_path, {"aggregation": "distributed"}, sources)
    assert sorted(Path(name).name for name in said["files_created"]) == [
        "collected_client_n1_stdout.jsonl", "collected_monitor_n1_stdout.jsonl", "collected_server_n1_stdout.jsonl",
    ]  # fmt: skip


def test_output_names_stay_in_the_folder(tmp_path: Path) -> None:
    """A recipe's names of outputs cannot lead elsewhere."""
    config = {"outputs": {"stdout": "../../up.log", "aggregated": "/etc/agg.jsonl"}}
    collector = TailerLogCollector(config, tmp_path)
    assert {path.parent for path in collector.paths.values()} == {tmp_path}


def test_logs_and_samples_go_after_their_retention(tmp_path: Path) -> None:
    """Only what a suite marked, only when its time is over, never results, never outside."""
    recipe = reading.recipe_of(
        {
            "workload": {"service": "dummy", "duration": 1},
            "logging": {"retention": "1d"},
            "monitoring": {"retention": "3d"},
        }
    )
    folder = tmp_path / "experiment"
    (folder / "logs").mkdir(parents=True)
    log, sample, result = folder / "logs" / "a.log", folder / "m.csv", folder / "results.json"
    outside = tmp_path / "outside.log"
    for path in (log, sample, result, outside):
        path.write_text("x")
    results.mark(folder, recipe, [log, outside], [sample])
    marked = json.loads((folder / results.MARK).read_text())
    marked["logs"]["files"].append("../outside.log")
    (folder / results.MARK).write_text(json.dumps(marked))
    assert results.prune(tmp_path) == []
    assert results.prune(tmp_path, now=time.time() + 2 * 86_400) == [log]
    assert results.prune(tmp_path, now=time.time() + 4 * 86_400) == [sample]
    assert result.exists()
    assert outside.exists()


@pytest.mark.parametrize("text", ['{"kind": "herder-suite-experiment", "created": "x"}', "[1]", "[" * 100_000, '{"ki'])
def test_marks_that_make_no_sense_are_passed_over(text: str, tmp_path: Path) -> None:
    """A run does not end with an error because of what lies beside its results."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / results.MARK).write_text(text)
    assert results.prune(tmp_path, now=time.time() + 9e6) == []


def test_only_own_experiments_are_pruned(tmp_path: Path) -> None:
    """In a folder that is open to all, a link to a folder elsewhere is not followed."""
    recipe = reading.recipe_of({"workload": {"service": "dummy", "duration": 1}})
    folder, shared = tmp_path / "home" / "experiment", tmp_path / "shared"
    folder.mkdir(parents=True)
    shared.mkdir()
    (folder / "a.log").write_text("x")
    results.mark(folder, recipe, [folder / "a.log"], [])
    (shared / "link").symlink_to(folder)
    assert results.prune(shared, now=time.time() + 9e8) == []
    assert (folder / "a.log").exists()
    assert results.prune(folder.parent, now=time.time() + 9e8) == [folder / "a.log"]


def test_utilization_is_read_from_samples(tmp_path: Path) -> None:
    """Mean and greatest of each column with numbers; others are left out."""
    path = tmp_path / "m.csv"
    path.write_text("timestamp,cpu_percent,name,empty\n1,10,x,\n2,30,y,\n")
    assert results.utilization(path)["cpu_percent"] == {"mean": 20.0, "max": 30.0}
    assert set(results.utilization(path)) == {"timestamp", "cpu_percent"}


def test_the_token_is_made_once_and_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reader finds the first one's; one that others can read is refused."""
    path = tmp_path / "deep" / "executor.token"
    monkeypatch.setenv(tokens.VARIABLE, str(path))
    assert tokens.path_of() == path
    token, is_new = tokens.read_or_make(path)
    assert is_new
    assert tokens.read_or_make(path) == (token, False)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert len(token) > 40
    path.chmod(0o644)
    with pytest.raises(HerderError, match="readable by others"):
        tokens.read(path)


def test_services_are_registered_by_name() -> None:
    """The three of the toolkit are there; another is known once it is registered, and an unknown one is refused."""
    assert {"dummy", "ollama", "vllm"} <= set(ServiceFactory.list_services())
    name = f"kind-{random.randrange(1 << 30)}"
    with pytest.raises(ValueError, match="unknown service"):
        ServiceFactory.create_server_manager(name, {})
    manager = type(ServiceFactory.create_server_manager("dummy", {}))
    controller = type(ServiceFactory.create_workload_controller("dummy", ["n"], timeout=1))
    kind = type(ServiceFactory.create_workload_executor("dummy", 0))
    ServiceFactory.register_service(name, manager, controller, kind)
    assert ServiceFactory.create_workload_executor(name, 7).get_service_name() == name
    assert ServiceFactory.create_server_manager("vllm", {}).get_health_check_endpoint() == "/health"
    assert ServiceFactory.create_server_manager("ollama", {}).get_health_check_endpoint() == "/api/tags"


def test_controllers_as_the_toolkits_code_has_them_are_taken() -> None:
    """Its own take a fourth argument, and hand it on."""

    class Theirs(BaseWorkloadController):
        def __init__(
            self, client_nodes: list[str], port: int = 5000, timeout: int = 30, health_timeout: int = 120
        ) -> None:
            super().__init__(client_nodes, port, timeout, health_timeout)

    assert Theirs(["n"], 6000, 600).health_timeout == 120
    assert BaseWorkloadController(["n"], timeout=20).health_timeout == 20
