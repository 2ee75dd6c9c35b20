"""A suite against a real engine: llama-server answers where the recipe says vLLM, as both speak OpenAI's API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.doubles.suite_servers import executor, herder

ENGINE = os.environ.get("HERDER_TEST_LLAMA_SERVER", "")
GGUF = os.environ.get("HERDER_TEST_GGUF", "")
pytestmark = pytest.mark.skipif(
    not (ENGINE and GGUF), reason="HERDER_TEST_LLAMA_SERVER and HERDER_TEST_GGUF are not set"
)


def test_a_suite_measures_a_real_engine(tmp_path: Path) -> None:
    """The orchestrator waits until the engine is ready; tokens are counted by the engine itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    recipe = {
        "scenario": "real",
        "workload": {"service": "vllm", "model": "smol", "duration": "10s", "warmup": "2s", "gen_tokens": 4,
                     "prompt_len": 16, "api": "completions",
                     "benchmark_suite": [{"name": "closed", "num_threads": 2}, {"name": "open", "target_rps": 1}]},
        "servers": {"health_check": {"timeout": 60, "interval": 0.2}},
        "reporting": {"formats": ["json", "html"]},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    engine = subprocess.Popen(
        [ENGINE, "-m", GGUF, "--host", "127.0.0.1", "--port", str(port), "--alias", "smol", "-c", "2048", "-np", "2",
         "-t", "2", "--device", "none"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with executor(tmp_path) as one:
            done = herder(
                "orchestrate", "--server-nodes", "127.0.0.1", "--server-port", str(port), "--client-nodes", one.node,
                "--workload-config-file", "recipe.yaml", folder=tmp_path,
            )  # fmt: skip
            text = one.text("/metrics/prometheus")
    finally:
        engine.terminate()
        engine.wait(20)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results" / "closed.metrics.json").read_text())
    whole = found["client_metrics"]["aggregated"]
    assert whole["total_requests"] >= 1
    assert whole["total_errors"] == 0
    assert found["client_metrics"][one.node]["plan"]["api"] == "completions"
    assert whole["output_tokens"] >= 4
    assert 0 < whole["latency_seconds"]["ttft"]["p50"] < whole["p50_latency"]
    assert 'vllm_errors_total{host="' in text
    assert (tmp_path / "out" / "results" / "benchmark_suite.html").stat().st_size > 10_000
