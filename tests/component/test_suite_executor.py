"""The executor's HTTP contract, as the toolkit's document has it and as its code had it, against real processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.doubles.suite_servers import ExecutorProcess, Stub, executor, serving, until

QUICK: dict[str, Any] = {"model": "m", "duration": "1s", "clients_per_node": 2, "prompt_len": 8, "gen_tokens": 3}


@pytest.fixture
def vllm() -> Iterator[Stub]:
    """A vLLM that serves m."""
    with serving(Stub("vllm", ["m"])) as stub:
        yield stub


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ExecutorProcess]:
    """An executor for vLLM."""
    with executor(tmp_path) as made:
        yield made


def test_the_contract_of_the_document_and_of_the_code(vllm: Stub, client: ExecutorProcess) -> None:
    """/health /start /status /metrics /metrics/prometheus /stop answer under both sets of names."""
    assert client.call("GET", "/health") == (200, {"status": "ok", "service": "vllm"})
    assert client.call("GET", "/status")[1]["running"] is False
    assert client.call("POST", "/stop")[1] | {"final_metrics": {}} == {
        "status": "stopped", "success": True, "message": "No workload running", "final_metrics": {},
    }  # fmt: skip
    status, said = client.call("POST", "/start", QUICK | {"server_url": vllm.url, "duration": 30, "colour": "red"})
    assert status == 200
    assert (said["status"], said["threads"], said["success"], said["message"]) == (
        "started", 2, True, "Workload started"
    )  # fmt: skip
    assert said["ignored"] == ["colour"]
    status, again = client.call("POST", "/start", QUICK | {"server_url": vllm.url})
    assert (status, again["success"], again["error"]) == (400, False, "Workload already running")
    running = client.call("GET", "/status")[1]
    assert running["running"] is True
    assert running["threads_active"] == 2
    live = until(lambda: (found := client.call("GET", "/metrics")[1])["requests_total"] > 5 and found)
    assert live["running"] is True
    assert live["latency"]["p99"] >= live["latency"]["p50"] > 0.004
    assert live["metrics"]["avg_latency"] == live["latency"]["avg"]
    status, stopped = client.call("POST", "/stop")
    assert (status, stopped["status"], stopped["success"]) == (200, "stopped", True)
    final = stopped["final_metrics"]
    assert final["requests_total"] == final["metrics"]["total_requests"] >= live["requests_total"]
    for name in ("total_requests", "errors", "elapsed_seconds", "avg_latency_seconds", "p50_latency_seconds",
                 "p90_latency_seconds", "p99_latency_seconds", "throughput_rps", "num_threads", "thread_errors",
                 "model", "duration"):  # fmt: skip
        assert name in final["metrics"], name
    assert final["latency_seconds"]["ttft"]["count"] > 5
    text = client.text("/metrics/prometheus")
    for name in ("workload_running", "requests_total", "errors_total", "request_latency_seconds", "throughput_rps",
                 "elapsed_seconds", "threads"):  # fmt: skip
        assert re.search(
            rf'^# TYPE vllm_{name} (counter|gauge)\nvllm_{name}{{host="[^"]+"}} [0-9.e+-]+$', text, re.M
        ), name
    assert client.text("/metrics?format=prometheus") == text
    assert client.call("GET", "/metrics")[1]["running"] is False


def test_prometheus_gets_text_by_its_accept_header(client: ExecutorProcess) -> None:
    """A scraper that asks for text/plain at /metrics gets text, everybody else JSON."""
    import urllib.request

    request = urllib.request.Request(
        client.url("/metrics"), headers={"Accept": "text/plain", "Authorization": f"Bearer {client.token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"vllm_workload_running" in answer.read()


def test_without_the_token_only_health_answers(vllm: Stub, client: ExecutorProcess, tmp_path: Path) -> None:
    """Every other route refuses a missing and a wrong token; the token's file is for its owner alone."""
    assert (tmp_path / "executor.token").stat().st_mode & 0o777 == 0o600
    for method, path in (("POST", "/start"), ("GET", "/status"), ("GET", "/metrics"), ("GET", "/metrics/prometheus"),
                         ("GET", "/result"), ("POST", "/stop")):  # fmt: skip
        for token in ("", "hdx_wrong"):
            status, said = client.call(method, path, token=token)
            assert (status, said["success"]) == (401, False), path
    assert client.call("GET", "/health", token="")[0] == 200


def test_bodies_and_tokens_that_make_no_sense_are_refused(client: ExecutorProcess) -> None:
    """Deep, huge and broken bodies get a 4xx and a token of any bytes a 401; none is an error of the executor's."""
    for body, expected in ((b"[" * 200_000, 400), (b"{" * 200_000, 400), (b"\xff", 400), (b"x" * (2 << 20), 413)):
        assert _raw(client, body, str(client.token).encode()) == expected
    assert _raw(client, b"{}", b"hdx_\xff\xfe") == 401
    assert client.call("GET", "/status")[1]["running"] is False


def _raw(client: ExecutorProcess, body: bytes, token: bytes) -> int:
    """The status of a /start made of bytes."""
    head = b"POST /start HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer " + token
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as made:
        made.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body))
        with contextlib.suppress(OSError):
            made.sendall(body)
        return int(made.recv(1000).split()[1])


def test_a_stop_while_a_workload_starts_is_a_stop(client: ExecutorProcess) -> None:
    """Who gave up waiting for the start leaves no load behind; the next workload is taken."""
    slow = QUICK | {"server_url": "http://127.0.0.1:9", "prompt_len": 1_000_000, "duration": 60}
    answers: list[tuple[int, dict[str, Any]]] = []
    starter = threading.Thread(target=lambda: answers.append(client.call("POST", "/start", slow)))
    starter.start()
    until(lambda: psutil.Process(client.process.pid).children())
    assert client.call("POST", "/stop")[1]["message"] == "Workload stopped"
    starter.join(20)
    [(status, said)] = answers
    assert (status, said["success"], "stopped before it began" in said["error"]) == (400, False, True)
    assert client.call("GET", "/status")[1]["running"] is False
    assert not psutil.Process(client.process.pid).children()


def test_no_auth_is_said_on_purpose(tmp_path: Path) -> None:
    """With --no-auth no token is made and none is asked for."""
    with executor(tmp_path, arguments=("--no-auth",)) as made:
        assert made.token is None
        assert made.call("GET", "/metrics", token="")[0] == 200


def test_without_a_token_no_file_is_read_that_nobody_named(tmp_path: Path) -> None:
    """Whoever reaches the port could have files sent to a server of their own."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "a secret"}\n')
    body = {"server_url": "http://127.0.0.1:9", "model": "m", "duration": 1, "dataset": "own.jsonl"}
    with executor(tmp_path, arguments=("--no-auth",)) as made:
        status, said = made.call("POST", "/start", body)
    assert (status, "--file-root" in said["error"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "No workload configuration provided"),
        ({}, "No workload configuration provided"),
        ([1], "is an object"),
        ({"duration": 1}, "server_endpoints"),
        ({"server_url": "http://h", "model": "m"}, "duration is missing"),
        ({"server_url": "http://127.0.0.1:9", "duration": 1}, "model is missing"),
        (QUICK | {"server_url": "http://127.0.0.1:9", "dataset": "../../etc/passwd", "prompt_len": None}, "may read"),
        (QUICK | {"server_url": "http://127.0.0.1:9", "concurrency": [1, 2]}, "swept by"),
        (QUICK | {"server_url": "http://127.0.0.1:9", "target_rps": 5, "concurrency": 2}, "take one"),
        (QUICK | {"server_url": "http://no.such.host.invalid"}, ""),
        (QUICK | {"server_url": "http://127.0.0.1:9", "sleep_seconds": [1]}, "not 'list'"),
        (QUICK | {"server_url": "http://127.0.0.1:9", "parameters": [1]}, "dictionary"),
        (QUICK | {"server_url": "http://127.0.0.1:9", "path": 3}, "`$.path`"),
        (QUICK | {"server_url": "http://127.0.0.1:9", "clients_per_node": float("inf")}, "infinity"),
        (QUICK | {"server_url": "http://169.254.169.254/latest/meta-data"}, "metadata service"),
        (QUICK | {"server_url": "http://2852039166"}, "metadata service"),
        (QUICK | {"server_url": "http://127.0.0.1:9/x\r\nEvil: 1"}, "not a path"),
    ],
)
def test_a_workload_that_cannot_be_done_is_refused_at_the_start(client: ExecutorProcess, body: Any, said: str) -> None:
    """400 with success false and a sentence, and the executor takes the next workload."""
    status, answer = client.call("POST", "/start", body)
    assert (status, answer["success"]) == (400, False)
    assert said in answer["error"]
    assert client.call("GET", "/status")[1]["running"] is False


@pytest.mark.parametrize("distribution", ["constant", "poisson", "burst"])
def test_the_rate_is_respected(vllm: Stub, client: ExecutorProcess, distribution: str) -> None:
    """target_rps is sent whatever comes back slowly, with gaps as the distribution has them."""
    vllm.answer_s = 0.3  # a closed loop of one client would reach 3 requests per second
    config = QUICK | {"server_url": vllm.url, "target_rps": 50, "request_distribution": distribution, "duration": "3s"}
    assert client.call("POST", "/start", config)[0] == 200
    found = client.wait_over()
    sent = [at for path, _, at in vllm.seen if path == "/v1/completions"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(sent)]
    spread = statistics.stdev(gaps) / statistics.fmean(gaps)
    planned = found["plan"]["planned_requests"]
    assert found["requests_total"] == planned == len(sent)
    assert found["errors_total"] == 0
    if distribution == "constant":
        assert planned == 150
        assert spread < 0.8
    else:
        assert 75 < planned < 225
        assert spread > (1.3 if distribution == "burst" else 0.7)


def test_the_warm_up_is_not_measured(vllm: Stub, client: ExecutorProcess) -> None:
    """Requests of the warm-up are sent, and are in no figure."""
    config = QUICK | {"server_url": vllm.url, "target_rps": 20, "duration": "2s", "warmup": "2s"}
    assert client.call("POST", "/start", config)[0] == 200
    assert client.call("GET", "/metrics")[1]["phase"] == "warmup"
    assert client.call("GET", "/metrics")[1]["requests_total"] == 0
    found = client.wait_over()
    assert found["requests_total"] == 40
    assert len(vllm.asked("/v1/completions")) == 80
    assert found["throughput_rps"] == pytest.approx(20, rel=0.1)


def test_think_time_slows_a_closed_loop(vllm: Stub, client: ExecutorProcess) -> None:
    """sleep_seconds lies between an answer and the next request of the same client."""
    config = QUICK | {"server_url": vllm.url, "num_threads": 1, "sleep_seconds": 0.4, "duration": "2s"}
    assert client.call("POST", "/start", config)[0] == 200
    found = client.wait_over()
    assert 2 <= found["requests_total"] <= 6
    assert found["num_threads"] == 1


def test_endpoints_share_the_load(client: ExecutorProcess) -> None:
    """round-robin goes to both, static of part 1 to the second alone."""
    with serving(Stub("vllm", ["m"])) as first, serving(Stub("vllm", ["m"])) as second:
        config = QUICK | {"server_endpoints": [first.url, second.url], "target_rps": 20, "duration": "2s"}
        assert client.call("POST", "/start", config)[0] == 200
        client.wait_over()
        assert (len(first.asked("/v1/completions")), len(second.asked("/v1/completions"))) == (20, 20)
        config |= {"distribution_strategy": "static", "part": 1, "parts": 2}
        assert client.call("POST", "/start", config)[0] == 200
        assert client.wait_over()["requests_total"] == 20
        assert (len(first.asked("/v1/completions")), len(second.asked("/v1/completions"))) == (20, 40)


def test_ollama_is_asked_in_its_own_way(tmp_path: Path) -> None:
    """Streams of /api/chat, with the options of the recipe and the server's own token counts."""
    with serving(Stub("ollama", ["m:latest"])) as stub, executor(tmp_path, service="ollama") as made:
        config = QUICK | {"server_url": stub.url, "parameters": {"options": {"num_gpu": 3}}}
        assert made.call("POST", "/start", config)[0] == 200
        found = made.wait_over()
        assert found["errors_total"] == 0
        asked = len(stub.asked("/api/chat"))
        assert 3 * (asked - 4) <= found["output_tokens"] <= 3 * asked, "as Ollama counts them; the last may be late"
        assert stub.asked("/api/chat")[0]["options"]["num_gpu"] == 3
        assert stub.asked("/api/chat")[0]["stream"] is True


def test_datasets_of_the_folder_are_prompts(vllm: Stub, client: ExecutorProcess, tmp_path: Path) -> None:
    """A dataset in the executor's folder is sent as it is."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "what a very odd question"}\n')
    config = {"model": "m", "server_url": vllm.url, "target_rps": 5, "duration": "1s", "dataset": "mine.jsonl"}
    assert client.call("POST", "/start", config)[0] == 200
    client.wait_over()
    assert vllm.asked("/v1/completions")[0]["prompt"] == "what a very odd question"


def test_errors_of_the_server_are_counted_by_kind(client: ExecutorProcess) -> None:
    """A server without the route costs no success and gives errors with a name."""
    with serving(Stub("ollama")) as stub:
        assert client.call("POST", "/start", QUICK | {"server_url": stub.url})[0] == 200
        found = client.wait_over()
        assert found["requests_total"] == found["errors_total"] > 0
        assert found["errors_by_kind"] == {"http_4xx": found["errors_total"]}
        assert found["error"] is None


def test_a_generator_that_is_killed_is_told(vllm: Stub, client: ExecutorProcess) -> None:
    """When the sending process dies the executor says so, keeps what was measured live, and takes the next workload."""
    assert client.call("POST", "/start", QUICK | {"server_url": vllm.url, "duration": 60})[0] == 200
    until(lambda: client.call("GET", "/metrics")[1]["requests_total"])
    [generator] = psutil.Process(client.process.pid).children()
    os.kill(generator.pid, signal.SIGKILL)
    found = client.wait_over()
    assert "ended with code -9" in found["error"]
    assert found["requests_total"] > 0
    assert client.call("POST", "/start", QUICK | {"server_url": vllm.url})[0] == 200
    assert client.wait_over()["error"] is None


def test_an_executor_that_ends_takes_its_generator_along(vllm: Stub, tmp_path: Path) -> None:
    """SIGTERM, and even SIGKILL, leave nobody that goes on sending."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with executor(tmp_path) as made:
            assert made.call("POST", "/start", QUICK | {"server_url": vllm.url, "duration": 60})[0] == 200
            family = psutil.Process(made.process.pid).children(recursive=True)
            assert family
            made.process.send_signal(number)
            made.process.wait(30)
            _, alive = psutil.wait_procs(family, timeout=30)
            assert not alive
