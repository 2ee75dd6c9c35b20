"""Load spread over several servers: who gets which request, and what the report says of each."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter

import pytest
from msgspec.structs import replace

from agent.loadgen import order
from agent.loadgen.spread import SPREADS, chooser
from common.bench.spec import LoadSpec
from tests.doubles.herder_program import HERDER
from tests.doubles.scripted_server import END, EVENT, STREAM, USAGE, Step, chunk, serving, stream, whole


def test_requests_and_conversations_are_spread() -> None:
    """Every server gets its share under its own name and path, and both turns of a conversation stay on one."""
    with serving(lambda number: stream()) as one, serving(lambda number: stream()) as other:
        urls = (f"http://127.0.0.1:{one.port}", f"http://127.0.0.1:{other.port}/below/v1")
        asked_for = LoadSpec(model="m", concurrency=3, requests=10, turns=2)
        made = order.order_of(asked_for, order.Aim(urls))
        report, outcome = order.perform(made)
    assert (len(one.requests), len(other.requests)) == (10, 10)
    assert all(f"Host: 127.0.0.1:{one.port}\r\n".encode() in asked for asked in one.requests)
    opening = f"POST /below/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{other.port}\r\n".encode()
    assert all(asked.startswith(opening) for asked in other.requests)
    bodies = {asked.partition(b"\r\n\r\n")[2] for asked in one.requests + other.requests}
    assert bodies == {body.partition(b"\r\n\r\n")[2] for item in made.workload.items[:10] for body in turns(item)}
    assert {row[1] for row in outcome.records.columns("index", "endpoint") if row[0] % 2 == 0} == {0}
    assert [report.endpoints[url]["sent"] for url in made.asked.endpoints] == [10, 10]
    assert one.connections <= 3
    assert (report.counts["good"], report.counts["failed"]) == (20, 0)


def test_live_replies_are_what_the_server_said() -> None:
    """The next turn holds the answer's content and not its reasoning; with prepared replies it does not."""
    think = chunk('data: {"choices":[{"index":0,"delta":{"reasoning_content":"hm"}}]}\n\n')

    def script(number: int) -> list[Step]:
        said = chunk(EVENT.format(f"a{number}")) + chunk(EVENT.format(" and"))
        return [STREAM, think, said, chunk(USAGE.format(5, 3)), chunk("data: [DONE]\n\n"), END]

    with serving(script) as server:
        aim = order.Aim((f"http://127.0.0.1:{server.port}",))
        asked_for = LoadSpec(model="m", concurrency=1, requests=2, turns=3, live_replies=True, scenarios=("D(9,3)",))
        report, outcome = order.perform(order.order_of(asked_for, aim))
        live = [json.loads(asked.partition(b"\r\n\r\n")[2])["messages"] for asked in server.requests]
        server.requests.clear()
        order.perform(order.order_of(replace(asked_for, live_replies=False), aim))
        prepared = [json.loads(asked.partition(b"\r\n\r\n")[2])["messages"] for asked in server.requests]
    assert report.counts["good"] == 6
    assert [len(messages) for messages in live] == [1, 3, 5] * 2
    assert [message["content"] for message in live[5] if message["role"] == "assistant"] == ["a3 and", "a4 and"]
    assert live[5][:3] == live[4][:3]
    assert [m["content"] for m in live[2] if m["role"] == "user"] == [
        m["content"] for m in prepared[2] if m["role"] == "user"
    ]
    assert all(" and" not in message["content"] for message in prepared[2] if message["role"] == "assistant")
    assert list(outcome.records.column("counted_input")) == [9, 9 + 2 + 9, 9 + 2 + 9 + 2 + 9] * 2


def turns(item: object) -> list[bytes]:
    """The requests of a conversation."""
    from agent.loadgen.workload import Item

    found = []
    while isinstance(item, Item):
        found.append(item.wire)
        item = item.follow
    return found


def test_a_server_that_fails_is_told_apart() -> None:
    """Failures and times are counted for the server that they came from."""

    def broken(number: int) -> list[Step]:
        return whole(b"", "503 Service Unavailable")

    with serving(lambda number: stream()) as one, serving(broken) as other:
        words = [
            f"127.0.0.1:{one.port}",
            f"127.0.0.1:{other.port}",
            "--model",
            "m",
            "--rate",
            "200",
            "--requests",
            "40",
        ]
        command = [*HERDER, "bench", *words, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    report = json.loads(done.stdout)
    good, bad = (report["endpoints"][url] for url in report["plan"]["urls"])
    assert (good["sent"], good["failed"], good["e2e"]["count"]) == (20, 0, 20)
    assert (bad["sent"], bad["failed"], bad["e2e"]["count"]) == (20, 20, 0)
    assert report["plan"]["spread"] == "round-robin"


def test_the_tables_tell_servers_and_classes_apart() -> None:
    """One line each, and nothing wider than a terminal."""
    with serving(lambda number: stream()) as one, serving(lambda number: stream()) as other:
        words = [f"127.0.0.1:{one.port}", f"127.0.0.1:{other.port}", "--model", "m", "--concurrency", "2", "--requests",
                 "8", "--scenario", "D(1,3)", "--scenario", "D(9,3)"]  # fmt: skip
        command = [*HERDER, "bench", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for port in (one.port, other.port):
        assert re.search(rf"^http://127.0.0.1:{port}\S* +4 +0 +\d", done.stdout, re.MULTILINE), done.stdout
    counts = [int(found) for found in re.findall(r"^D\(\d,3\) +(\d) +0", done.stdout, re.MULTILINE)]
    assert (len(counts), sum(counts)) == (2, 8)
    assert "and 1 more, round-robin" in done.stdout


@pytest.mark.parametrize("spread", SPREADS)
def test_spreads(spread: str) -> None:
    """Each is even over a run of four processes on two nodes, in its own way."""
    count, processes = 6_000, 4
    found: Counter[int] = Counter()
    by_process = []
    for process in range(processes):
        choose = chooser(spread, 3, seed=5, part=process // 2, process=process)
        mine = [choose(index, begun) for begun, index in enumerate(range(process, count, processes))]
        by_process.append(mine)
        found.update(mine)
    if spread == "static":
        assert [set(mine) for mine in by_process] == [{0}, {0}, {1}, {1}]
        return
    assert set(found) == {0, 1, 2}
    assert all(number == pytest.approx(2_000, abs=150 if spread == "random" else 0) for number in found.values())
    if spread == "all-to-all":
        assert [mine[:4] for mine in by_process] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2], [0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("aim", "said"),
    [
        (order.Aim(("http://a", "http://a:80/v1")), "twice"),
        (order.Aim(("http://a",), "elsewhere"), "round-robin"),
        (order.Aim(()), "URLs"),
    ],
)
def test_aims_that_make_no_sense(aim: order.Aim, said: str) -> None:
    """Refused with what to change."""
    with pytest.raises(ValueError, match=said):
        order.order_of(LoadSpec(model="m", concurrency=1, requests=1), aim)


def test_parts_agree_on_where_requests_go() -> None:
    """The digest holds the servers and the way of spreading."""
    asked_for = LoadSpec(model="m", rate=5, requests=5)
    digests = {
        order.order_of(asked_for, order.Aim(urls, spread)).digest
        for urls in (("http://a", "http://b"), ("http://a", "http://c"))
        for spread in ("random", "all-to-all")
    }
    assert len(digests) == 4
