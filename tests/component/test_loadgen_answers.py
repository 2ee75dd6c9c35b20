"""Answers of servers that count, frame or end otherwise than most: what the load generator makes of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import pytest

from agent.loadgen.apis import APIS
from agent.loadgen.connection import Endpoint
from agent.loadgen.engine import Engine, Limits, Share
from agent.loadgen.target import parse_url
from agent.loadgen.workload import Item
from common.bench.records import COLUMNS, OUTCOMES, SOURCES, Records
from tests.doubles.herder_program import HERDER
from tests.doubles.scripted_server import END, STREAM, Step, chunk, serving, stream

WIRE = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
DONE = "data: [DONE]\n\n"
GZIP = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"


def asked(answer: list[Step], api: str = "chat") -> tuple[dict[str, Any], Records]:
    """One request's row, and the records it stands in."""
    with serving(lambda number: answer) as server:
        there = Endpoint(socket.AF_INET, ("127.0.0.1", server.port), "localhost")
        limits = Limits(connect_s=5, first_s=20, idle_s=20, total_s=20, drain_s=20)
        due = array("q", [0])
        one = Engine(Share(APIS[api], (there,), (Item(WIRE, 0, 4, 3),), indices=range(1), times_ns=due, limits=limits))
        try:
            records = one.run(time.monotonic_ns())
        finally:
            one.close()
    (row,) = records.columns(*COLUMNS)
    found: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
    return found | {"outcome": OUTCOMES[found["outcome"]], "source": SOURCES[found["source"]]}, records


def told(pieces: list[int | None], *, role: int | None = None, total: int | None = None) -> list[Step]:
    """A stream whose events say these usages: with the role, with each piece, at the end."""

    def event(delta: dict[str, str], tokens: int | None) -> bytes:
        value: dict[str, Any] = {"choices": [{"index": 0, "delta": delta}]}
        if tokens is not None:
            value["usage"] = {"prompt_tokens": 9, "completion_tokens": tokens}
        return chunk(f"data: {json.dumps(value)}\n\n")

    made: list[Step] = [STREAM, event({"role": "assistant", "content": ""}, role)]
    made += [event({"content": "a"}, tokens) for tokens in pieces]
    if total is not None:
        made.append(event({}, total))
    return [*made, chunk(DONE), END]


@pytest.mark.parametrize(
    ("answer", "source", "output", "first_tokens"),
    [
        (told([3, 5, 6], total=6), "server", 6, 3),
        (told([None, None, None], role=0, total=6), "server", 6, 1),
        (told([None, None, None], role=0), "chunks", 3, 1),
        (told([2, 2, 2], total=6), "server", 6, 1),
        (told([None, None, None, None], total=2), "server", 2, 1),
    ],
    ids=["of-all-so-far", "zero-with-the-role", "zero-and-no-more", "of-each-piece", "fewer-than-pieces"],
)
def test_tokens_are_what_the_server_counted(answer: list[Step], source: str, output: int, first_tokens: int) -> None:
    """The row and the grid, of which throughput is made, hold the same tokens; gaps are given to tokens."""
    row, records = asked(answer)
    assert (row["outcome"], row["source"], row["output"], row["first_tokens"]) == ("ok", source, output, first_tokens)
    assert sum(records.grid.values()) == output
    assert records.itl.count > 0


def test_an_empty_usage_takes_nothing_back() -> None:
    """What was counted stays when a later event has a usage that says nothing."""
    empty = chunk('data: {"choices":[],"usage":{}}\n\n')
    row, _ = asked([*stream(tokens=3, prompt=5)[:-2], empty, chunk(DONE), END])
    assert (row["input"], row["output"], row["source"]) == (5, 3, "server")


@pytest.mark.parametrize(
    ("api", "outcome"), [("http", "ok"), ("speech", "ok"), ("embeddings", "stream_error"), ("qdrant", "stream_error")]
)
def test_events_of_an_api_without_events(api: str, outcome: str) -> None:
    """They are a body like any other, and end no process of the generator."""
    row, _ = asked(stream(), api)
    assert row["outcome"] == outcome
    assert row["chunks"] == 0


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
def test_a_compressed_answer_is_told(kind: bytes) -> None:
    """It was not asked for and is not read; for plain HTTP it is bytes like any other."""
    row, records = asked([GZIP % kind])
    assert row["outcome"] == "protocol"
    assert "compressed (gzip)" in records.errors["protocol"][0]
    assert asked([GZIP % kind], "http")[0]["outcome"] == "ok"


def test_a_redirect_is_told() -> None:
    """It is not followed, as its time would be in every figure; the message says what to do."""
    row, records = asked([b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /v2\r\nContent-Length: 0\r\n\r\n"])
    assert (row["outcome"], row["status"]) == ("http_other", 307)
    assert records.errors["http_other"] == ["307: redirects are not followed, ask where it leads"]


def test_the_address_that_listens_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with several addresses, as localhost often is, goes to the one where the server is."""
    with serving(lambda number: []) as server, socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        found = [(*kind, deaf.getsockname()), (*kind, ("127.0.0.1", server.port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        target = parse_url("http://two-addresses:1", APIS["chat"])
        assert target.resolve() == (socket.AF_INET, ("127.0.0.1", server.port))


def test_a_name_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver's words come with the name they are about."""

    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(OSError, match="nosuchhost") as caught:
        parse_url("http://nosuchhost:1", APIS["chat"]).resolve()
    assert caught.value.strerror == "Name or service not known"


def bench(port: int, *words: str) -> list[str]:
    """The command."""
    return [*HERDER, "bench", f"127.0.0.1:{port}", "--model", "m", *words]


def test_a_signal_to_the_whole_group_loses_nothing() -> None:
    """As from `timeout` or scancel: SIGTERM stops sending, and what was measured is printed."""
    first = threading.Event()

    def script(number: int) -> list[Step]:
        first.set()
        return stream()

    with serving(script) as server:
        words = bench(server.port, "--concurrency", "1", "--duration", "60s", "--think", "0.1s", "-o", "json")
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        assert first.wait(30)
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    report = json.loads(out)
    assert process.returncode == 130
    assert report["counts"]["sent"] >= 1
    assert [reason["code"] for reason in report["reasons"]].count("worker_lost") == 0


def test_a_file_that_cannot_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    """No request goes out for a report that has no place; a check leaves no file."""
    with serving(lambda number: stream()) as server:
        words = bench(server.port, "--concurrency", "1", "--requests", "2", "--save", str(tmp_path / "no" / "r.json"))
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "r.json" in done.stderr
        assert server.requests == []


def test_a_full_disk_costs_the_file_only() -> None:
    """What was measured is printed although it could not be saved."""
    with serving(lambda number: stream()) as server:
        words = bench(server.port, "--concurrency", "1", "--requests", "2", "--save", "/dev/full", "-o", "json")
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["counts"]["good"] == 2
    assert "No space left" in done.stderr


def test_a_closed_stdout_is_no_crash() -> None:
    """Who closes it wants no table; the exit code is still the run's."""
    with serving(lambda number: stream()) as server:
        words = bench(server.port, "--concurrency", "1", "--requests", "2")
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        assert len(server.requests) == 2
    assert "Traceback" not in done.stderr
