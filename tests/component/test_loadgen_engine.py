"""The load generator's loop against a server that does exactly what a script says."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.loadgen import order
from agent.loadgen.apis import APIS, Api
from agent.loadgen.clocks import Stamps
from agent.loadgen.connection import Call, Connection, Endpoint
from agent.loadgen.engine import Engine, Limits, Share
from agent.loadgen.workload import Item
from common.bench import schedule
from common.bench.records import COLUMNS, OUTCOMES, Records
from common.bench.spec import LoadSpec
from tests.doubles.herder_program import HERDER
from tests.doubles.scripted_server import END, EVENT, STREAM, Server, Step, chunk, serving, stream, whole

WIRE = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
ITEM = Item(WIRE, 0, 4, 3)
QUICK = Limits(connect_s=5, first_s=20, idle_s=20, total_s=20, drain_s=20)


def there(server: Server, tls: ssl.SSLContext | None = None, opening: bytes = b"") -> Endpoint:
    """Where a server is."""
    return Endpoint(socket.AF_INET, ("127.0.0.1", server.port), "localhost", tls, opening)


def share(server: Server, count: int = 1, **given: Any) -> Share:
    """A share of `count` requests that are all due at once."""
    base: dict[str, Any] = {
        "api": APIS["chat"], "endpoints": (there(server, given.pop("tls", None)),), "items": (ITEM,),
        "indices": range(count), "times_ns": array("q", [0] * count), "limits": QUICK,
    }  # fmt: skip
    return Share(**base | given)


@contextmanager
def engine(made: Share, **given: Any) -> Iterator[Engine]:
    """An engine that is closed at the end."""
    one = Engine(made, **given)
    try:
        yield one
    finally:
        one.close()


def run(made: Share, **given: Any) -> Records:
    """The records of a share."""
    with engine(made, **given) as one:
        one.open_connections()
        return one.run(time.monotonic_ns())


def rows(records: Records) -> list[dict[str, Any]]:
    """Rows by name, outcomes by word."""
    return [
        dict(zip(COLUMNS, row, strict=True)) | {"outcome": OUTCOMES[row[COLUMNS.index("outcome")]]}
        for row in records.columns(*COLUMNS)
    ]


def test_a_streamed_answer() -> None:
    """Tokens counted by the server, times in their order, gaps in both histograms, tokens on the grid."""
    with serving(lambda number: stream(tokens=4, prompt=9)) as server:
        (row,) = rows(records := run(share(server)))
    assert (row["outcome"], row["input"], row["output"], row["chunks"], row["status"]) == ("ok", 9, 4, 4, 200)
    assert 0 <= row["scheduled"] <= row["acted"] <= row["sent"] <= row["first"] <= row["last"] <= row["end"]
    assert row["first"] == row["first_output"]
    assert records.icl.count == records.itl.count == 3
    assert sum(records.grid.values()) == 4


def test_connections_are_kept() -> None:
    """One slot of a closed loop uses one connection for all its requests, one after the other."""
    with serving(lambda number: stream()) as server:
        made = run(share(server, 0, slots=1, slots_in_all=1, requests=5, connections=1))
    found = rows(made)
    assert [row["outcome"] for row in found] == ["ok"] * 5
    assert server.connections == 1
    assert all(later["scheduled"] >= earlier["end"] for earlier, later in itertools.pairwise(found))


def test_an_open_loop_does_not_wait() -> None:
    """All requests are on their way before the first answer has come."""
    release, count = threading.Event(), 20

    def script(number: int) -> list[Step]:
        if number == count - 1:
            release.set()
        return [release, *stream()]

    with serving(script) as server:
        made = rows(run(share(server, count)))
    assert [row["outcome"] for row in made] == ["ok"] * count
    assert server.connections == count


def stale(number: int) -> list[Step]:
    """The second answer is that its kept connection is closed."""
    return [None] if number == 1 else stream()


def test_a_stale_connection_is_replaced() -> None:
    """A kept connection that the server closes as it is used costs a second try, no failure."""
    with serving(stale) as server:
        records = run(share(server, 0, slots=1, slots_in_all=1, requests=3))
    assert [row["outcome"] for row in rows(records)] == ["ok"] * 3
    assert records.facts["stale_connections"] == 1


TOKEN = chunk(EVENT.format("x"))
FAILURES: list[tuple[str, list[Step]]] = [
    ("http_4xx", whole(b'{"error": "no such model"}', "404 Not Found")),
    ("http_429", whole(b"slow down", "429 Too Many Requests")),
    ("http_5xx", whole(b"", "503 Service Unavailable")),
    ("http_other", whole(b"", "302 Found")),
    ("stream_error", [STREAM, TOKEN, chunk('data: {"error": {"message": "boom"}}\n\n'), END]),
    ("stream_error", [STREAM, chunk("data: {nonsense\n\n"), END]),
    ("truncated", [STREAM, TOKEN, END]),
    ("truncated", [STREAM, TOKEN, None]),
    ("empty", [STREAM, chunk("data: [DONE]\n\n"), END]),
    ("reset", [None]),
    ("reset", [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", None]),
    ("protocol", [b"SSH-2.0-OpenSSH_9.2\r\n"]),
    ("protocol", [STREAM, b"zz\r\n"]),
]


@pytest.mark.parametrize(("outcome", "answer"), FAILURES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(FAILURES)])
def test_errors_by_kind(outcome: str, answer: list[Step]) -> None:
    """Each failure has its name; the next request is not harmed by it."""
    with serving(lambda number: answer if number == 0 else stream()) as server:
        found = rows(run(share(server, 0, slots=1, slots_in_all=1, requests=2)))
    assert [row["outcome"] for row in found] == [outcome, "ok"]


@pytest.mark.parametrize(
    ("outcome", "answer", "limits"),
    [
        ("timeout_ttft", [threading.Event()], Limits(first_s=0.2)),
        ("timeout_ttft", [STREAM, chunk(": ping\n\n"), threading.Event()], Limits(first_s=0.2)),
        ("timeout_idle", [STREAM, TOKEN, threading.Event()], Limits(idle_s=0.2)),
        ("timeout_total", [STREAM, TOKEN, threading.Event()], Limits(total_s=0.2)),
        ("cancelled", [STREAM, TOKEN, threading.Event()], Limits(drain_s=0.2)),
    ],
)
def test_what_takes_too_long(outcome: str, answer: list[Step], limits: Limits) -> None:
    """Ends with the name of the limit that it passed, and the server sees the connection closed."""
    with serving(lambda number: answer) as server:
        (row,) = rows(run(share(server, limits=limits)))
        for step in answer:
            if isinstance(step, threading.Event):
                step.set()
        assert server.closed.wait(20)
    assert row["outcome"] == outcome


def test_nobody_listens() -> None:
    """A refused connection is a failure by name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (row,) = rows(run(share(Server(port))))
    assert (row["outcome"], row["sent"]) == ("connect", -1)


def test_cancelling_ends_what_is_on_its_way() -> None:
    """A cancelled run keeps a row for every request that was sent, and sends no more."""
    asked, held = threading.Event(), threading.Event()

    def script(number: int) -> list[Step]:
        asked.set()
        return [STREAM, TOKEN, held]

    read_fd, write_fd = os.pipe()
    with serving(script) as server:
        later = array("q", [0, 10**15])

        def cancel(one: Engine) -> None:
            os.read(read_fd, 1)
            one.cancel()

        made = share(server, indices=range(2), times_ns=later, limits=Limits(drain_s=60))
        threading.Thread(target=lambda: (asked.wait(20), os.write(write_fd, b"x")), daemon=True).start()
        records = run(made, control_fd=read_fd, on_control=cancel)
        held.set()
    os.close(read_fd)
    os.close(write_fd)
    assert [row["outcome"] for row in rows(records)] == ["cancelled"]
    assert records.facts["not_sent"] == 1


def test_turns_follow_their_answers() -> None:
    """The second turn is sent when the first was answered, on the same connection; a failed turn ends the talk."""
    talk = Item(WIRE, 0, 4, 3, follow=Item(WIRE, 0, 8, 3))
    with serving(lambda number: stream() if number < 2 else whole(b"", "500 Oops")) as server:
        first = rows(run(share(server, items=(talk,))))
        second = rows(run(share(server, items=(talk,))))
    assert [(row["turn"], row["outcome"]) for row in first] == [(0, "ok"), (1, "ok")]
    assert first[1]["scheduled"] >= first[0]["end"]
    assert [(row["turn"], row["outcome"]) for row in second] == [(0, "http_5xx")]


@pytest.mark.parametrize(
    ("name", "answer", "output"),
    [
        (
            "chat",
            whole(b'{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":5,"completion_tokens":7}}'),
            7,
        ),
        ("embeddings", whole(b'{"data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":5}}'), -1),
        ("rerank", whole(b'{"results":[{"index":0}],"usage":{"total_tokens":5}}'), -1),
        ("ollama-generate", whole(b'{"response":"x","done":true,"prompt_eval_count":5,"eval_count":7}'), 7),
        ("ollama-embed", whole(b'{"embeddings":[[0.1]],"prompt_eval_count":5}'), -1),
        ("http", whole(b"anything"), -1),
    ],
)
def test_answers_in_one_piece(name: str, answer: list[Step], output: int) -> None:
    """They have an end and no first token."""
    with serving(lambda number: answer) as server:
        (row,) = rows(run(share(server, api=APIS[name])))
    assert (row["outcome"], row["output"], row["first"]) == ("ok", output, -1)
    assert row["last"] == row["end"]


def test_tokens_that_come_together_are_told() -> None:
    """Three pieces in one write: counted, with the number of those whose gap nobody can know."""
    together = STREAM + TOKEN * 3 + chunk("data: [DONE]\n\n") + END
    with serving(lambda number: [together]) as server:
        records = run(share(server))
    assert (rows(records)[0]["chunks"], records.facts["coalesced"]) == (3, 2)


def test_a_tokenizer_counts_where_the_server_does_not() -> None:
    """Tokens of the pieces by the given counter; a piece of several tokens is spread over them."""
    answer = [STREAM, chunk(EVENT.format("a b")), chunk(EVENT.format("c d e")), chunk("data: [DONE]\n\n"), END]
    with serving(lambda number: answer) as server:
        records = run(share(server, keeps_text=True), count_tokens=lambda text: len(text.split()))
    (row,) = rows(records)
    assert (row["output"], row["first_tokens"], records.icl.count, records.itl.count) == (5, 2, 1, 3)


class Desk:
    """An owner of a connection that only listens."""

    def __init__(self) -> None:
        self.api: Api = APIS["chat"]
        self.epoll = select.epoll()
        self.stamps, self.lags, self.reads, self.coalesced = Stamps(), list[int](), 0, 0
        self.is_open = False

    def opened(self, connection: Connection) -> None:
        self.is_open = True

    def answered(self, connection: Connection, call: Call, at_ns: int) -> None: ...

    def failed(self, connection: Connection, call: Call | None, outcome: str, said: str, at_ns: int) -> None: ...


def test_the_kernel_stamps_what_is_read_late() -> None:
    """A token that is read long after it came has the time at which it came, and the delay is known as lag."""
    go = threading.Event()
    desk = Desk()
    with serving(lambda number: [STREAM, TOKEN, go, TOKEN]) as server:
        connection = Connection(desk, there(server))
        while not desk.is_open:
            for _, mask in desk.epoll.poll(10):
                connection.on_event(mask)
        call = Call(0, ITEM, 0, 0, -1, keeps_text=False)
        connection.send(call, WIRE)
        while not call.stamps:
            for _, mask in desk.epoll.poll(10):
                connection.on_event(mask)
        go.set()
        while len(server.sent_ns) < 3:
            time.sleep(0.001)
        before, after = server.sent_ns[2]
        while time.monotonic_ns() < after + 50_000_000:
            time.sleep(0.001)
        desk.stamps.refresh()
        read_from = time.monotonic_ns()
        for _, mask in desk.epoll.poll(10):
            connection.on_event(mask)
        connection.close()
    assert len(call.stamps) == 2
    assert before - 1_000_000 <= call.stamps[1] < read_from - 25_000_000
    assert desk.lags[-1] > 25_000_000


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(tmp_path: Path) -> None:
    """Several requests over one TLS connection; an unknown certificate is refused by name."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(tmp_path / "k"),
         "-out", str(tmp_path / "c")],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(tmp_path / "c", tmp_path / "k")
    ours = ssl.create_default_context(cafile=str(tmp_path / "c"))
    with serving(lambda number: stream(tokens=200), theirs) as server:
        good = rows(run(share(server, 0, slots=1, slots_in_all=1, requests=3, tls=ours)))
        bad = rows(run(share(server, tls=ssl.create_default_context())))
    assert [(row["outcome"], row["output"]) for row in good] == [("ok", 200)] * 3
    assert server.connections == 2
    assert bad[0]["outcome"] == "tls"


def command(*words: str) -> list[str]:
    """A `herder bench` process."""
    return [*HERDER, "bench", *words]


def test_a_stalled_generator_is_invalid() -> None:
    """A worker that is stopped for a while sends late: the run says so and exits with 1."""
    begun = threading.Event()

    def script(number: int) -> list[Step]:
        begun.set()
        return stream()

    with serving(script) as server:
        words = command(f"127.0.0.1:{server.port}", "--model", "m", "--rate", "100", "--duration", "2s", "-o", "json")
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert begun.wait(60)
            (worker,) = psutil.Process(process.pid).children()
            worker.send_signal(signal.SIGSTOP)
            held_until = time.monotonic() + 0.5
            while time.monotonic() < held_until:
                time.sleep(0.01)
            worker.send_signal(signal.SIGCONT)
            out, _ = process.communicate(timeout=60)
    report = json.loads(out)
    assert "late" in [reason["code"] for reason in report["reasons"]]
    assert not report["is_valid"]
    assert report["counts"]["sent"] == report["plan"]["planned_requests"]
    assert process.returncode == 1


def test_interrupting_prints_what_was_measured() -> None:
    """SIGINT: nothing more is sent, answers end, the report is marked, two workers are merged, the exit code is 130."""
    enough = threading.Event()

    def script(number: int) -> list[Step]:
        if number == 20:
            enough.set()
        return stream()

    with serving(script) as server:
        words = command(f"127.0.0.1:{server.port}", "--model", "m", "--rate", "50", "--duration", "10m",
                        "--workers", "2", "-o", "json")  # fmt: skip
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert enough.wait(60)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
    report = json.loads(out)
    assert "interrupted" in [reason["code"] for reason in report["reasons"]]
    assert report["counts"]["sent"] == len(server.requests) >= 20
    assert len(report["generator"]["workers"]) == 2
    assert process.returncode == 130


@pytest.mark.parametrize("kind", ["json", "csv", "vllm", "genai-bench"])
def test_saved_reports(kind: str, tmp_path: Path) -> None:
    """Each format is written, and says how many requests there were."""
    with serving(lambda number: stream()) as server:
        words = command(f"127.0.0.1:{server.port}", "--model", "m", "--concurrency", "2", "--requests", "8", "--save",
                        str(tmp_path / "r"), "--format", kind, "-q")  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    text = (tmp_path / "r").read_text()
    if kind == "csv":
        assert "\ne2e,ms,8," in text
        return
    report = json.loads(text)
    found = {
        "json": lambda: report["counts"]["good"],
        "vllm": lambda: report["completed"],
        "genai-bench": lambda: report["aggregated_metrics"]["num_completed_requests"],
    }[kind]()
    assert found == 8


@pytest.mark.engine
def test_a_real_engine() -> None:
    """llama.cpp's server with a small model: every answer is good and as long as asked, and so are the prompts."""
    server, gguf = os.environ.get("HERDER_TEST_LLAMA_SERVER", ""), os.environ.get("HERDER_TEST_GGUF", "")
    if not (server and gguf):
        pytest.skip("HERDER_TEST_LLAMA_SERVER and HERDER_TEST_GGUF name no engine and model; scripts/test sets them")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    engine_words = [server, "-m", gguf, "--host", "127.0.0.1", "--port", str(port), "-c", "1024", "-np", "2", "-t", "2"]
    with subprocess.Popen(engine_words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _await_health(port)
            words = command(f"http://127.0.0.1:{port}", "--model", "m", "--concurrency", "2", "--requests", "4",
                            "--scenario", "D(20,8)", "--tokenizer", "server", "--turns", "2", "--live-replies",
                            "-o", "json", "--detail")  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
        finally:
            process.kill()
    report = json.loads(done.stdout)
    assert report["counts"]["good"] == 8, report["error_samples"]
    assert (report["token_source"], report["output_tokens"]) == ("server", 64)
    assert report["latency"]["ttft"]["count"] == 8
    asked = report["plan"]["tokenizer"]
    assert asked["exact"] == asked["checked"] == 16
    # What the template adds is the same for every prompt of as many turns.
    added = [
        {row["input"] - row["counted_input"] for row in report["requests"] if row["turn"] == turn} for turn in (0, 1)
    ]
    assert len(added[0]) == 1
    assert max(added[1]) - min(added[1]) <= 2


def _await_health(port: int) -> None:
    import http.client

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            link.request("GET", "/health")
            if link.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            link.close()
        time.sleep(0.05)
    raise AssertionError("the engine did not get healthy")


def test_an_offline_run_is_never_late() -> None:
    """Everything is due at the start and sent as answers come; what waits here is no fault of the generator."""
    pause = threading.Event()

    def script(number: int) -> list[Step]:
        pause.wait(0.02)
        return stream()

    with serving(script) as server:
        words = command(f"127.0.0.1:{server.port}", "--model", "m", "--arrivals", "offline", "--requests", "12",
                        "--in-flight", "2", "--slo", "ttft:60000", "-o", "json")  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    report = json.loads(done.stdout)
    codes = {finding["code"] for finding in report["reasons"] + report["warnings"]}
    assert not codes & {"late", "rate_missed", "held_back"}
    assert (report["counts"]["good"], report["goodput"]["good"], server.connections) == (12, 12, 2)
    assert report["latency"]["send_lag"]["max"] > 50


def test_a_run_keeps_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed loop whose number nobody knew ends at the most rows of a run, and says so."""
    monkeypatch.setattr(schedule, "MAX_ARRIVALS", 20)
    with serving(lambda number: stream()) as server:
        asked_for = LoadSpec(model="m", concurrency=4, duration=600.0, workers=2)
        report, outcome = order.perform(order.order_of(asked_for, order.Aim((f"127.0.0.1:{server.port}",))))
    assert report.counts["sent"] == len(server.requests) >= 20
    assert "too_many" in [reason.code for reason in report.reasons]
    assert "interrupted" not in [reason.code for reason in report.reasons]
    assert report.window["end_s"] <= max(outcome.records.column("end")) / 1e9 + 0.01


def test_no_more_on_their_way_than_allowed() -> None:
    """An open loop with a limit holds requests back, sends them as others end, and counts that it did."""
    with serving(lambda number: stream()) as server:
        records = run(share(server, 10, limits=Limits(in_flight=2)))
    assert [row["outcome"] for row in rows(records)] == ["ok"] * 10
    assert server.connections == 2
    assert records.facts["held_back"] >= 4
