"""`herder orchestrate` and its Python face: whole suites over real executors, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.suite.api import Orchestrator, ServiceFactory, SuiteError
from tests.doubles.herder_program import HERDER
from tests.doubles.suite_servers import ExecutorProcess, Stub, executor, herder, serving, until

PLUGIN = """
import json, time, urllib.request
from agent.suite.api import (BaseServerManager, BaseWorkloadController, BaseWorkloadExecutor, ServiceFactory)

class MineServerManager(BaseServerManager):
    def verify_health(self, endpoints, timeout=600):
        return self._verify(endpoints, ["/v1/models"], timeout)
    def prepare_service(self, endpoints, timeout=600):
        return True
    def get_health_check_endpoint(self):
        return "/v1/models"

class MineWorkloadController(BaseWorkloadController):
    pass

class MineWorkloadExecutor(BaseWorkloadExecutor):
    def _prepare_shared_resources(self, workload_config):
        self.shared_resources["path"] = "/v1/models"
    def _run_benchmark(self, workload_config, thread_id):
        ends = time.time() + self._parse_duration(workload_config["duration"])
        latencies, errors = [], 0
        print("what a plugin prints is no message")
        while self.workload_running and time.time() < ends:
            begun = time.time()
            urllib.request.urlopen(workload_config["server_endpoints"][0] + self.shared_resources["path"]).read()
            latencies.append(time.time() - begun)
            time.sleep(0.05)
        return {"thread_id": thread_id, "total_requests": len(latencies), "errors": errors, "latencies": latencies,
                "total_latency": sum(latencies), "elapsed_seconds": 1.0}

ServiceFactory.register_service("mine", MineServerManager, MineWorkloadController, MineWorkloadExecutor)
"""


def recipe(folder: Path, **load: Any) -> Path:
    """A recipe's file; keys beside the workload's under `rest`."""
    rest = load.pop("rest", {})
    base = {"service": "vllm", "model": "m", "duration": "1s", "warmup": 0, "prompt_len": 8, "gen_tokens": 3}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"scenario": "s", "workload": base | load} | rest))
    return path


@pytest.fixture
def vllm() -> Iterator[Stub]:
    """A vLLM that serves m."""
    with serving(Stub("vllm", ["m"])) as stub:
        yield stub


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[ExecutorProcess]]:
    """Two client nodes."""
    with executor(tmp_path) as first, executor(tmp_path) as second:
        yield [first, second]


def orchestrate(folder: Path, servers: list[Stub], clients: list[ExecutorProcess], *more: str, **rest: Any) -> Any:
    """`herder orchestrate` with several values after one flag, as scripts have it."""
    return herder(
        "orchestrate", "--server-nodes", *(f"127.0.0.1:{stub.port}" for stub in servers), "--client-nodes",
        *(client.node for client in clients), "--workload-config-file", "recipe.yaml", "--timeout", "10", *more,
        folder=folder, **rest,
    )  # fmt: skip


def metrics_of(folder: Path, name: str) -> dict[str, Any]:
    """A run's file."""
    found: dict[str, Any] = json.loads((folder / "out" / "results" / f"{name}.metrics.json").read_text())
    return found


def test_a_whole_suite_of_ollama(tmp_path: Path) -> None:
    """The model is pulled, every entry runs as often as asked, every file is there, and the recipe still is."""
    with (
        serving(Stub("ollama")) as stub,
        executor(tmp_path, service="ollama") as first,
        executor(tmp_path, service="ollama") as second,
    ):
        logs = tmp_path / "out" / "logs"
        logs.mkdir(parents=True)
        (logs / "container_127.0.0.1.log").write_text("2024-05-06T07:08:09Z an engine's line\n")
        recipe(
            tmp_path,
            service="ollama",
            benchmark_suite=[
                {"name": "closed", "num_threads": 2, "sleep_seconds": 0.05},
                {"name": "open", "target_rps": 20, "request_distribution": "constant"},
            ],
            rest={
                "repetitions": 2,
                "servers": {"service_config": {"gpu_layers": 5}},
                "metadata": {"seed": 3, "tags": ["t"]},
                "reporting": {
                    "formats": ["json", "csv", "html"],
                    "include": ["metrics_summary", "performance_graphs", "raw_data"],
                },
            },
        )
        done = orchestrate(tmp_path, [stub], [first, second])
    assert done.returncode == 0, done.stderr
    assert "pulling m" in done.stderr
    assert stub.models == ["m:latest"]
    assert (tmp_path / "recipe.yaml").exists()
    results = tmp_path / "out" / "results"
    opened = metrics_of(tmp_path, "open")
    assert (opened["benchmark_name"], opened["overrides"]) == (
        "open", {"target_rps": 20.0, "request_distribution": "constant", "prompt_len": 8, "gen_tokens": 3},
    )  # fmt: skip
    whole = opened["client_metrics"]["aggregated"]
    assert (whole["total_requests"], whole["total_errors"], whole["coverage"]) == (20, 0, "1/1")
    assert [one["requests"] for one in whole["per_client"]] == [10, 10]
    assert set(opened["client_metrics"]) == {first.node, second.node, "aggregated"}
    assert opened["repetitions"]["count"] == 2
    assert {path.name for path in results.glob("open.r*.json")} == {"open.r1.metrics.json", "open.r2.metrics.json"}
    assert len(list(results.glob("*.load.bin"))) == 8
    summary = json.loads((results / "benchmark_suite.summary.json").read_text())
    assert [run["benchmark_name"] for run in summary["benchmarks"]] == ["closed", "closed", "open", "open"]
    assert summary["experiment"]["service"] == "ollama"
    assert summary["experiment"]["metadata"]["tags"] == ["t"]
    with (results / "benchmark_suite.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["total_requests"] for row in rows[2:]] == ["20", "20"]
    assert "<svg" in (results / "benchmark_suite.html").read_text()
    line = json.loads((logs / "aggregated.jsonl").read_text().splitlines()[0])
    assert (line["timestamp"], line["component"], line["time_source"]) == ("2024-05-06T07:08:09.000Z", "server", "line")
    bodies = stub.asked("/api/chat")
    assert bodies[0]["options"] == {"num_gpu": 5, "num_predict": 3, "temperature": 0}
    prompts = {body["messages"][0]["content"] for body in bodies[-40:]}
    assert len(prompts) == 40, "each repetition has prompts of its own"


def test_the_python_face(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path, monkeypatch: Any) -> None:
    """Orchestrator(...).run() gives throughput_rps, and the controller's figures are those of all clients."""
    monkeypatch.setenv("HERDER_EXECUTOR_TOKEN_FILE", str(tmp_path / "executor.token"))
    path = recipe(tmp_path, target_rps=30)
    nodes = [client.node for client in two]
    found = Orchestrator([vllm.url], nodes, path, timeout=10, output_dir=tmp_path / "here").run()
    assert found["throughput_rps"] == pytest.approx(30, rel=0.15)
    controller = ServiceFactory.create_workload_controller("vllm", nodes, port=1, timeout=20)
    assert controller.verify_client_health()
    config = {"server_url": vllm.url, "model": "m", "duration": 60, "clients_per_node": 1, "gen_tokens": 2}
    assert controller.start_workload(config)
    until(lambda: controller.get_metrics()["total_requests"] > 10)
    assert all(said["running"] for said in controller.fetch_metrics().values())
    assert controller.stop_workload()
    whole = controller.get_metrics()
    assert whole["total_requests"] == sum(one["requests"] for one in whole["per_client"])
    assert whole["p99_latency"] >= whole["p50_latency"] > 0
    assert not any(said["running"] for said in controller.fetch_metrics().values())


def test_a_flat_configuration_of_the_toolkit_runs(tmp_path: Path, vllm: Stub) -> None:
    """{service, model, duration, clients_per_node} as JSON, with the documented flags of ports."""
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"service": "vllm", "model": "m", "duration": "1s", "clients_per_node": 3})
    )
    with executor(tmp_path) as one:
        done = herder(
            "orchestrate", "--server-nodes", "127.0.0.1", "--client-nodes", "127.0.0.1", "--workload-config-file",
            "recipe.yaml", "--server-port", str(vllm.port), "--client-port", str(one.port), folder=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path, "benchmark")["client_metrics"]["127.0.0.1"]["num_threads"] == 3


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E001", {"rest": {"servers": {"health_check": {"timeout": 1, "interval": 1}}}}),
        ("E003", {"model": "other"}),
        ("E006", {"duration": "soon"}),
        ("E006", {"target_rps": 3, "concurrency": 2}),
        ("E006", {"service": "triton"}),
    ],
)
def test_failures_have_their_codes(
    vllm: Stub, two: list[ExecutorProcess], tmp_path: Path, code: str, change: dict[str, Any]
) -> None:
    """Each step that fails ends with 1 and its code, and no load was sent."""
    vllm.is_healthy = code != "E001"
    recipe(tmp_path, **change)
    done = orchestrate(tmp_path, [vllm], two)
    assert done.returncode == 1
    assert f"error[{code}]" in done.stderr
    assert not vllm.asked("/v1/completions")


def test_a_model_that_cannot_be_pulled_is_e003(tmp_path: Path) -> None:
    """What Ollama says of the pull is in the error."""
    with serving(Stub("ollama", pull_fails=True)) as stub, executor(tmp_path, service="ollama") as one:
        recipe(tmp_path, service="ollama")
        done = orchestrate(tmp_path, [stub], [one])
    assert done.returncode == 1
    assert "E003" in done.stderr
    assert "no such model" in done.stderr


def test_clients_that_cannot_work_are_e002(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path) -> None:
    """A wrong token, another service's executor and a port where nobody listens are told, node by node."""
    recipe(tmp_path)
    wrong = tmp_path / "wrong.token"
    wrong.write_text("hdx_other\n")
    wrong.chmod(0o600)
    done = orchestrate(tmp_path, [vllm], two, variables={"HERDER_EXECUTOR_TOKEN_FILE": str(wrong)})
    assert (done.returncode, "token is wrong" in done.stderr, "E002" in done.stderr) == (1, True, True)
    with executor(tmp_path, service="ollama") as other:
        done = orchestrate(tmp_path, [vllm], [other])
    assert "its executor is for ollama, not vllm" in done.stderr
    done = herder(
        "orchestrate", "--server-nodes", vllm.url, "--client-nodes", "127.0.0.1:1", "--workload-config-file",
        "recipe.yaml", "--timeout", "2", folder=tmp_path,
    )  # fmt: skip
    assert "connection refused" in done.stderr


def test_a_client_that_is_busy_is_e004_and_the_others_are_stopped(
    vllm: Stub, two: list[ExecutorProcess], tmp_path: Path
) -> None:
    """Nobody goes on sending when one of them could not start, but for the one that works for somebody else."""
    recipe(tmp_path, duration="60s")
    busy = {"server_url": vllm.url, "model": "m", "duration": 60}
    assert two[1].call("POST", "/start", busy)[0] == 200
    done = orchestrate(tmp_path, [vllm], two)
    assert (done.returncode, "E004" in done.stderr, "already running" in done.stderr) == (1, True, True)
    assert two[0].call("GET", "/status")[1]["running"] is False
    assert two[1].call("GET", "/status")[1]["running"] is True


def test_results_that_cannot_be_written_are_e005(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path) -> None:
    """A full disk is told with the folder, nothing half is left, and nobody goes on sending."""
    recipe(tmp_path, benchmark_suite=[{"name": "one"}, {"name": "two"}])
    taken = tmp_path / "out" / "results" / "one.metrics.json" / "x"
    taken.mkdir(parents=True)
    done = orchestrate(tmp_path, [vllm], two)
    assert (done.returncode, "E005" in done.stderr, str(tmp_path / "out") in done.stderr) == (1, True, True)
    assert [path.name for path in taken.parent.parent.iterdir()] == ["one.metrics.json"]
    assert not any(client.call("GET", "/status")[1]["running"] for client in two)


def test_a_dead_client_degrades_the_run_and_does_not_hang(
    vllm: Stub, two: list[ExecutorProcess], tmp_path: Path
) -> None:
    """A client that is killed on the way costs exactly its share; the run ends soon and says which client it was."""
    recipe(tmp_path, target_rps=40, duration="8s")

    def kill() -> None:
        until(lambda: len(vllm.asked("/v1/completions")) > 20)
        two[1].process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    begun = time.monotonic()
    done = orchestrate(tmp_path, [vllm], two)
    took = time.monotonic() - begun
    killer.join()
    assert done.returncode == 1, done.stderr
    assert "DEGRADED: covers 1/2" in done.stderr
    assert took < 60
    whole = metrics_of(tmp_path, "benchmark")["client_metrics"]["aggregated"]
    assert (whole["coverage"], whole["coverage_share"], whole["is_degraded"], whole["is_valid"]) == (
        "1/2", 0.5, True, False
    )  # fmt: skip
    assert whole["total_requests"] == 160, "what the living one was to send, and nothing made up"
    [lost] = whole["clients_lost"]
    assert (lost["node"], "E008" in lost["reason"]) == (two[1].node, True)


def test_a_silent_client_is_given_up(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path, monkeypatch: Any) -> None:
    """A client whose machine hangs answers nothing at all: it is lost after its time, not waited for."""
    monkeypatch.setenv("HERDER_EXECUTOR_TOKEN_FILE", str(tmp_path / "executor.token"))
    controller = ServiceFactory.create_workload_controller("vllm", [client.node for client in two], timeout=20)
    controller.lost_after, controller.request_timeout = 1.0, 0.5
    config = {"server_url": vllm.url, "model": "m", "duration": 2, "warmup": 0, "gen_tokens": 2}
    assert controller.start_workload(config)
    two[0].process.send_signal(signal.SIGSTOP)
    try:
        whole = controller.aggregated(controller.wait(config))
    finally:
        two[0].process.send_signal(signal.SIGCONT)
    assert whole["coverage"] == "1/2"
    assert [lost["node"] for lost in whole["clients_lost"]] == [two[0].node]


def test_an_executor_that_was_started_anew_is_lost(vllm: Stub, tmp_path: Path, monkeypatch: Any) -> None:
    """An executor that has forgotten its workload is idle, which is not the same as done."""
    monkeypatch.setenv("HERDER_EXECUTOR_TOKEN_FILE", str(tmp_path / "executor.token"))
    config = {"server_url": vllm.url, "model": "m", "duration": 30, "gen_tokens": 2}
    with executor(tmp_path) as first:
        controller = ServiceFactory.create_workload_controller("vllm", [first.node], timeout=20)
        assert controller.start_workload(config)
    port = ("--port", str(first.port))
    with executor(tmp_path, arguments=port):
        whole = controller.aggregated(controller.wait(config))
    assert whole["coverage"] == "0/1"
    assert "started anew" in whole["clients_lost"][0]["reason"]


def test_an_interruption_stops_the_clients(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and leaves no client that sends."""
    recipe(tmp_path, duration="60s")
    environment = os.environ | {"HERDER_EXECUTOR_TOKEN_FILE": str(tmp_path / "executor.token"),
                                "OUTPUT_DIR": str(tmp_path / "out")}  # fmt: skip
    process = subprocess.Popen(
        [*HERDER, "orchestrate", "--server-nodes", vllm.url, "--client-nodes", two[0].node, two[1].node,
         "--workload-config-file", "recipe.yaml"],
        env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: len(vllm.asked("/v1/completions")) > 10)
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 130
    assert not any(client.call("GET", "/status")[1]["running"] for client in two)


def test_target_mapping_is_followed(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path) -> None:
    """Servers that no group names get nothing."""
    mapping = [{"client_group": "all", "server_endpoints": [1]}]
    with serving(Stub("vllm", ["m"])) as other:
        recipe(tmp_path, rest={"orchestration": {"node_allocation": {"clients": {"target_mapping": mapping}}}})
        done = orchestrate(tmp_path, [vllm, other], two)
        assert done.returncode == 0, done.stderr
        assert not vllm.asked("/v1/completions")
        assert other.asked("/v1/completions")


def test_a_service_of_a_plugin_runs_from_the_command_line(vllm: Stub, tmp_path: Path) -> None:
    """A kind with threads of its own is registered, served, started, measured and merged."""
    (tmp_path / "my_service.py").write_text(PLUGIN)
    variables = {"PYTHONPATH": str(tmp_path)}
    recipe(tmp_path, service="mine", num_threads=3, warmup="1s", duration="2s", prompt_len=None, gen_tokens=None)
    with executor(tmp_path, service="mine", arguments=("--plugin", "my_service"), variables=variables) as one:
        assert one.call("GET", "/health")[1]["service"] == "mine"
        done = orchestrate(tmp_path, [vllm], [one], "--plugin", "my_service", variables=variables)
        text = one.text("/metrics/prometheus")
    assert done.returncode == 0, done.stderr
    whole = metrics_of(tmp_path, "benchmark")["client_metrics"]["aggregated"]
    assert 30 < whole["total_requests"] <= 130
    assert whole["p99_latency"] >= whole["p50_latency"] > 0
    assert "mine_requests_total" in text
    done = herder("executor", "--service", "mine", "--plugin", "no_such_module", folder=tmp_path)
    assert (done.returncode, "cannot be imported" in done.stderr) == (2, True)
    done = herder("executor", "--service", "theirs", folder=tmp_path)
    assert (done.returncode, "unknown service 'theirs'" in done.stderr) == (2, True)


def test_monitoring_needs_and_uses_the_pushgateway(vllm: Stub, two: list[ExecutorProcess], tmp_path: Path) -> None:
    """Without a gateway it is refused; with one the samples are pushed, kept in the file, and removed there."""
    from aiohttp import web

    seen: list[tuple[str, str]] = []

    class Gateway(Stub):
        def application(self) -> web.Application:
            async def take(request: web.Request) -> web.Response:
                seen.append((request.method, request.path))
                await request.read()
                return web.Response(status=202)

            app = web.Application()
            app.router.add_route("*", "/{rest:.*}", take)
            return app

    recipe(tmp_path, rest={"reporting": {"formats": ["html"], "include": ["resource_utilization"]}})
    refused = orchestrate(tmp_path, [vllm], two, "--enable-monitoring")
    assert (refused.returncode, "needs --pushgateway-node" in refused.stderr) == (1, True)
    with serving(Gateway("gateway")) as gateway:
        done = orchestrate(
            tmp_path, [vllm], two, "--enable-monitoring", "--pushgateway-node", f"127.0.0.1:{gateway.port}",
            "--monitor-interval", "0.2", "--monitor-output", "samples/metrics.csv",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "samples" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    assert {"timestamp", "cpu_percent", "ram_used_MB"} <= set(rows[0])
    summary = json.loads((tmp_path / "out" / "results" / "benchmark_suite.summary.json").read_text())
    assert summary["resource_utilization"]["metrics"]["cpu_percent"]["max"] > 0
    page = (tmp_path / "out" / "results" / "benchmark_suite.html").read_text()
    assert "<svg" not in page, "graphs are not asked for"
    assert "<td>benchmark</td>" in page
    assert {method for method, _ in seen} >= {"DELETE"}
    assert {method for method, _ in seen} & {"PUT", "POST"}
    assert all(path.startswith("/metrics/job") for _, path in seen)


def test_a_recipe_that_is_not_there_is_e006(tmp_path: Path) -> None:
    """The Python face raises with the code."""
    with pytest.raises(SuiteError) as caught:
        Orchestrator(["s"], ["c"], tmp_path / "none.yaml").run()
    assert caught.value.code == "E006"
