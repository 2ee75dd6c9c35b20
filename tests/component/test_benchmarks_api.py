"""/benchmarks over real sockets: made, listed, watched, read, fetched, removed, and everything that is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.bench.outcome import encode
from common.wire import RunTick
from head.bench import store as store_module
from head.bench.questions import Judge, Judged, PartFile
from head.core.objects import Benchmark, Point, Run
from herder.client import AsyncClient
from herder.errors import HerderApiError
from herder.settings import Settings
from tests.doubles.api_head import ApiHead, api_head, node, real_step, run, until
from tests.doubles.bench_parts import asked_of, parts_of

DOCUMENT = {
    "name": "plain",
    "server": {"urls": ["http://127.0.0.1:9/"]},
    "load": {"rate": 5, "duration": "3s", "model": "m"},
    "monitor": {"enabled": False},
}
RECIPE_FILE = """
name: nightly
description: every night
server: {urls: ["http://me:secret@10.0.0.1:8000"]}
load: {rate: 2, duration: 30s, nodes: 2, model: m}
sweep: {rate: [1, 2]}
labels: {team: a}
"""


@asynccontextmanager
async def running(tmp_path: Path, *, nodes: int = 2) -> AsyncIterator[ApiHead]:
    """A head with connected nodes and one recipe of its own."""
    recipes = tmp_path / "recipes"
    (recipes / "benchmark").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    (recipes / "benchmark" / "nightly.yaml").write_text(RECIPE_FILE)
    async with api_head(tmp_path / "state", step=real_step, recipes_dir=str(recipes)) as head:
        for number in range(nodes):
            await head.put(node(f"n{number + 1}"))
            head.connect(f"n{number + 1}")
        yield head


def client_of(head: ApiHead, role: str = "operator") -> AsyncClient:
    """The Python client with a token of that role."""
    return AsyncClient(settings=Settings(url=head.url, token=head.tokens[role]), attempts=1)


async def ended(head: ApiHead, key: str = "bench-done", *, points: int = 2, **changes: Any) -> Benchmark:
    """An ended benchmark of some points."""
    values: dict[str, Any] = {"state": "completed", "planned": points, "ended_ms": 9, "load_nodes": ("n1",)} | changes
    recipe = {"name": "old", "server": {"urls": ["http://u:pw@h:1"]}, "load": {"model": "m", "rate": 1}}
    made = Benchmark(key, "old", recipe, "f" * 64, "me", created_ms=5, generation=1, cause="c", **values)
    await head.put(made)
    for number in range(points):
        point = Point(key, number, {"rate": number + 1}, state="completed", is_valid=True, figures={"req_s": 1.5})
        await head.put(point)
    return made


async def judged(head: ApiHead, benchmark: str, number: int) -> None:
    """Has a point's report and merged run written, as the performer does."""
    performer = head.context.benchmarks
    assert performer is not None
    asked = asked_of(60)
    part = performer.store.run(benchmark, f"{benchmark}.{number}.0") / "load.bin"
    await asyncio.to_thread(performer.store.write, part, encode(asked, parts_of(asked, 1)[0]))
    files = (PartFile(0, "n1", f"{benchmark}.{number}.0", str(part)),)
    question = Judge(str(performer.store.point(benchmark, number)), files, about={"point": {"number": number}})
    await performer.judges.ask(question, Judged)


class TestMaking:
    """POST /benchmarks."""

    def test_a_document_makes_a_benchmark(self, tmp_path: Path) -> None:
        """Taken with 202 and its place; defaults are filled in; its point waits."""

        async def test() -> None:
            async with running(tmp_path) as head:
                answer = await head.call("POST", "/benchmarks", {"document": DOCUMENT}, role="operator")
                assert answer.status == 202, answer.body
                made = answer.json
                assert answer.headers["Location"] == f"/api/v1/benchmarks/{made['id']}"
                assert (made["name"], made["model"], made["points_planned"]) == ("plain", "m", 1)
                assert made["recipe"]["load"]["duration"] == 3.0
                assert [point["number"] for point in made["points"]] == [0]
                assert (await head.call("GET", f"/benchmarks/{made['id']}", role="viewer")).json["id"] == made["id"]

        run(test)

    def test_a_recipe_is_taken_changed_and_named(self, tmp_path: Path) -> None:
        """By name, with other values in their places, as YAML as well as JSON."""

        async def test() -> None:
            async with running(tmp_path) as head:
                text = b"recipe: nightly\nname: mine\ndocument: {load: {duration: 10s}, sweep: {rate: [3, 4, 5]}}\n"
                headers = {"Content-Type": "application/yaml"}
                answer = await head.call("POST", "/benchmarks", raw=text, headers=headers)
                assert answer.status == 202, answer.body
                assert (answer.json["name"], answer.json["points_planned"]) == ("mine", 3)
                assert answer.json["recipe"]["load"]["duration"] == 10.0
                assert answer.json["labels"] == {"team": "a"}
                assert answer.json["recipe"]["server"]["urls"] == ["http://me:***@10.0.0.1:8000"]

        run(test)

    def test_a_repeat_is_the_same_benchmark(self, tmp_path: Path) -> None:
        """Under one Idempotency-Key there is one; with another body it is refused."""

        async def test() -> None:
            async with running(tmp_path) as head:
                headers = {"Idempotency-Key": "k1"}
                first = await head.call("POST", "/benchmarks", {"document": DOCUMENT}, headers=headers)
                again = await head.call("POST", "/benchmarks", {"document": DOCUMENT}, headers=headers)
                assert first.json["id"] == again.json["id"]
                assert len(head.state.benchmarks) == 1
                other = await head.call("POST", "/benchmarks", {"recipe": "nightly"}, headers=headers)
                assert other.code == "idempotency_mismatch"

        run(test)

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({}, "invalid_recipe"),
            ({"recipe": "nope"}, "recipe_not_found"),
            ({"recipe": "../../etc/passwd"}, "recipe_not_found"),
            ({"document": DOCUMENT | {"lod": {}}}, "invalid_recipe"),
            ({"document": DOCUMENT | {"load": {"rate": 5}}}, "invalid_recipe"),
            ({"document": DOCUMENT | {"server": {"service": "x", "urls": ["http://h"]}}}, "invalid_recipe"),
            ({"document": DOCUMENT | {"server": {"service": "nope"}}}, "service_not_found"),
            ({"document": DOCUMENT | {"load": DOCUMENT["load"] | {"nodes": ["n9"]}}}, "node_not_found"),  # type: ignore[operator]
            ({"document": DOCUMENT, "name": "No Name"}, "invalid_recipe"),
            ({"documnet": {}}, "invalid_value"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tmp_path: Path, body: dict[str, Any], code: str) -> None:
        """With a stable code, and nothing is made."""

        async def test() -> None:
            async with running(tmp_path) as head:
                answer = await head.call("POST", "/benchmarks", body)
                assert answer.code == code, answer.body
                assert not head.state.benchmarks

        run(test)

    def test_a_schedule_without_end_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A recipe whose drawing takes too long costs a child, not the head, which answers meanwhile."""
        monkeypatch.setattr("head.api.benchmarks.CHECK_S", 1.0)

        async def test() -> None:
            async with running(tmp_path) as head:
                load = {"rate": 5_000, "duration": "3000s", "model": "m"}
                asking = asyncio.create_task(
                    head.call("POST", "/benchmarks", {"document": DOCUMENT | {"load": load, "repetitions": 50}})
                )
                assert (await head.call("GET", "/healthz", role=None)).status == 200
                assert (await asking).code == "invalid_recipe"

        run(test)

    def test_viewers_only_look(self, tmp_path: Path) -> None:
        """Making, cancelling and removing need an operator; agents and inference keys see nothing."""

        async def test() -> None:
            async with running(tmp_path) as head:
                await ended(head)
                for method, path in (
                    ("POST", "/benchmarks"),
                    ("POST", "/benchmarks/bench-done/cancel"),
                    ("DELETE", "/benchmarks/bench-done"),
                ):
                    body = {"document": DOCUMENT} if path == "/benchmarks" else None
                    assert (await head.call(method, path, body, role="viewer")).code == "forbidden"
                for role in ("agent", "inference"):
                    assert (await head.call("GET", "/benchmarks", role=role)).code == "forbidden"

        run(test)


class TestLooking:
    """Lists, one, cancel and removal."""

    def test_the_list_is_newest_first_and_filtered(self, tmp_path: Path) -> None:
        """Paged, by state and name, without what may be long."""

        async def test() -> None:
            async with running(tmp_path) as head:
                for number in range(3):
                    await ended(head, f"bench-{number}", points=1)
                made = (await head.call("POST", "/benchmarks", {"document": DOCUMENT})).json["id"]
                page = (await head.call("GET", "/benchmarks?limit=2")).json
                assert page["items"][0]["id"] == made
                assert (len(page["items"]), page["total"]) == (2, 4)
                rest = (await head.call("GET", f"/benchmarks?limit=2&cursor={page['next']}")).json
                assert len(rest["items"]) == 2
                assert all(item["points"] == [] and item["recipe"] == {} for item in page["items"])
                assert (await head.call("GET", "/benchmarks?state=completed")).json["total"] == 3
                assert (await head.call("GET", "/benchmarks?name=plain")).json["total"] == 1
                assert (await head.call("GET", "/benchmarks?state=odd")).code == "invalid_value"

        run(test)

    def test_one_shows_its_points_and_hides_passwords(self, tmp_path: Path) -> None:
        """Points with figures; addresses without what opens them."""

        async def test() -> None:
            async with running(tmp_path) as head:
                await ended(head)
                exact = Point("bench-done", 1, {"rate": 2}, state="completed", is_valid=True, coverage=0.5,
                              figures={"coverage": 0.51})  # fmt: skip
                await head.put(exact)
                view = (await head.call("GET", "/benchmarks/bench-done")).json
                assert [point["coverage"] for point in view["points"]] == [1.0, 0.51]
                assert [point["changes"] for point in view["points"]] == [{"rate": 1}, {"rate": 2}]
                assert view["is_valid"]
                assert view["points_done"] == 2
                assert "pw" not in json.dumps(view)
                assert (await head.call("GET", "/benchmarks/bench-dome")).code == "benchmark_not_found"

        run(test)

    def test_a_cancelled_benchmark_ends(self, tmp_path: Path) -> None:
        """One that waits for another of the same server has nothing on a node: it has ended when the answer comes."""

        async def test() -> None:
            async with running(tmp_path) as head:
                first = (await head.call("POST", "/benchmarks", {"document": DOCUMENT})).json["id"]
                second = (await head.call("POST", "/benchmarks", {"document": DOCUMENT})).json
                assert first in second["note"]
                answer = await head.call("POST", f"/benchmarks/{second['id']}/cancel?wait=5")
                assert (answer.status, answer.json["status"]) == (200, "cancelled")
                assert [point["status"] for point in answer.json["points"]] == ["cancelled"]
                assert (await head.call("POST", "/benchmarks/nope/cancel")).code == "benchmark_not_found"

        run(test)

    def test_an_ended_benchmark_is_removed_with_its_files(self, tmp_path: Path) -> None:
        """A running one is in use; an ended one goes, and so do its files."""

        async def test() -> None:
            async with running(tmp_path) as head:
                made = (await head.call("POST", "/benchmarks", {"document": DOCUMENT})).json["id"]
                assert (await head.call("DELETE", f"/benchmarks/{made}")).code == "in_use"
                await ended(head)
                await judged(head, "bench-done", 0)
                folder = tmp_path / "state" / "benchmarks" / "bench-done"
                assert folder.is_dir()
                answer = await head.call("DELETE", "/benchmarks/bench-done")
                assert (answer.status, answer.json["is_done"]) == (200, True)
                await until(lambda: not folder.exists())
                assert (await head.call("GET", "/benchmarks/bench-done")).status == 404

        run(test)

    def test_recipes_are_listed_and_shown(self, tmp_path: Path) -> None:
        """By name, with where they were read and their hash; passwords stay here."""

        async def test() -> None:
            async with running(tmp_path) as head, client_of(head, "viewer") as client:
                (only,) = await client.benchmark_recipes().all()
                assert (only.name, only.path, only.description) == ("nightly", "benchmark/nightly.yaml", "every night")
                assert await client.benchmark_recipe("nightly") == only
                assert "secret" not in json.dumps(only.document)
                with pytest.raises(HerderApiError) as caught:
                    await client.benchmark_recipe("nightli")
                assert (caught.value.code, "nightly" in caught.value.hint) == ("recipe_not_found", True)

        run(test)


class TestResults:
    """Reports and files."""

    def test_a_points_report_in_every_format(self, tmp_path: Path) -> None:
        """Our JSON as it is kept, CSV, and the files of two others with every request in them."""

        async def test() -> None:
            async with running(tmp_path) as head, client_of(head, "viewer") as client:
                await ended(head)
                await judged(head, "bench-done", 0)
                ours = json.loads(await client.benchmark_report("bench-done", point=0))
                assert ours["counts"]["sent"] == 60
                assert (await client.benchmark_report("bench-done", point=0, format="csv")).startswith(b"metric,")
                vllm = json.loads(await client.benchmark_report("bench-done", point=0, format="vllm"))
                assert len(vllm["ttfts"]) == 60
                genai = json.loads(await client.benchmark_report("bench-done", point=0, format="genai-bench"))
                assert genai["aggregated_metrics"]["num_requests"] == 60
                folder = tmp_path / "state" / "benchmarks" / "bench-done" / "points" / "0"
                assert sorted(path.name for path in folder.iterdir()) == ["load.bin", "report.json"]

        run(test)

    def test_the_whole_report(self, tmp_path: Path) -> None:
        """All points that were judged beside the benchmark, and the table of all points."""

        async def test() -> None:
            async with running(tmp_path) as head, client_of(head, "viewer") as client:
                await ended(head, points=3)
                await judged(head, "bench-done", 0)
                await judged(head, "bench-done", 2)
                whole = json.loads(await client.benchmark_report("bench-done"))
                assert whole["benchmark"]["id"] == "bench-done"
                assert [report["point"]["number"] for report in whole["points"]] == [0, 2]
                table = (await client.benchmark_report("bench-done", format="csv")).decode()
                assert table.count("\n") == 4

        run(test)

    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ("?point=1", "not_found"), ("?point=7&format=csv", "not_found"), ("?format=html", "not_found"),
            ("?format=vllm", "invalid_value"), ("?point=0&format=html", "invalid_value"),
            ("?format=pdf", "invalid_value"), ("?point=-1", "invalid_value"),
        ],
    )  # fmt: skip
    def test_what_there_is_not(self, tmp_path: Path, query: str, code: str) -> None:
        """Points without a report, pages that are not written, formats that are not of the whole."""

        async def test() -> None:
            async with running(tmp_path) as head:
                await ended(head)
                assert (await head.call("GET", f"/benchmarks/bench-done/report{query}")).code == code

        run(test)

    def test_files_are_listed_and_fetched(self, tmp_path: Path) -> None:
        """Names and bytes; a download appears whole; nothing outside can be named."""

        async def test() -> None:
            async with running(tmp_path) as head, client_of(head, "viewer") as client:
                await ended(head)
                await judged(head, "bench-done", 0)
                files = {file.name: file.bytes for file in await client.benchmark_files("bench-done")}
                assert set(files) == {"points/0/load.bin", "points/0/report.json", "runs/bench-done.0.0/load.bin"}
                target = tmp_path / "new" / "load.bin"
                size = await client.download_benchmark_file("bench-done", "runs/bench-done.0.0/load.bin", target)
                assert size == files["runs/bench-done.0.0/load.bin"] == target.stat().st_size
                for name in ("../../journal.sqlite", "%2e%2e/%2e%2e/journal.sqlite", "runs/..%2f..%2fjournal.sqlite"):
                    answer = await head.call("GET", f"/benchmarks/bench-done/files/{name}")
                    assert (answer.status, b"SQLite" in answer.body) == (404, False)
                page = await head.call("GET", "/benchmarks/bench-done/files/points/0/report.json")
                assert page.headers["Content-Security-Policy"] == "sandbox"
                assert page.headers["Content-Disposition"].startswith("attachment")

        run(test)

    def test_an_export_that_does_not_fit_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The child's disk is full: `disk_full`, and no part of the export is left."""
        assert store_module.FOLDER == "benchmarks"

        async def test() -> None:
            async with running(tmp_path) as head:
                await ended(head)
                await judged(head, "bench-done", 0)
                performer = head.context.benchmarks
                assert performer is not None

                async def full(*_: object, **__: object) -> int:
                    from common.errors import DiskFull

                    raise DiskFull("the head's disk is full")

                monkeypatch.setattr(performer.clerks, "ask", full)
                answer = await head.call("GET", "/benchmarks/bench-done/report?point=0&format=vllm")
                assert (answer.status, answer.code) == (507, "disk_full")

        run(test)


class TestLive:
    """Server-sent seconds."""

    def test_seconds_come_until_the_end(self, tmp_path: Path) -> None:
        """What the load nodes told, added up; the stream ends with the benchmark; /metrics shows the same second."""

        async def test() -> None:
            async with running(tmp_path) as head, client_of(head, "viewer") as client:
                made = await ended(head, "bench-live", state="running")
                for part in range(2):
                    await head.put(
                        Run(f"bench-live.0.{part}", made.id, f"n{part + 1}", "load", 1, "fired", "running", "c", 1, 0,
                            part, 2)
                    )  # fmt: skip
                live = head.context.sessions.live
                stream = client.live_benchmark("bench-live")
                first = asyncio.create_task(anext(stream))
                await until(lambda: live.watched("bench-live") == 1)
                for part in range(2):
                    tick = RunTick(f"bench-live.0.{part}", 1.0, sent=7, done=5, tokens=50, ttft_p99_ms=20.0)
                    live.take(f"n{part + 1}", tick, head.context.clock.now_ms())
                assert msgspec.structs.asdict(await first) | {"ttft_p50_ms": 0} == {
                    "benchmark": "bench-live", "point": 0, "at_s": 1.0, "nodes": 2, "sent": 14, "done": 10,
                    "failed": 0, "in_flight": 0, "tokens": 100, "ttft_p50_ms": 0, "ttft_p99_ms": 20.0,
                }  # fmt: skip
                text = (await head.call("GET", "/metrics", role="viewer")).body.decode()
                assert 'herder_benchmark_sent_per_second{benchmark="bench-live",name="old"} 14.0' in text
                assert 'herder_benchmarks{state="running"} 1.0' in text
                await head.put(msgspec.structs.replace(made, state="completed"))
                assert [tick async for tick in stream] == []
                assert live.watched("bench-live") == 0

        run(test)

    def test_a_head_that_stops_does_not_say_that_it_has_ended(self, tmp_path: Path) -> None:
        """The stream just ends: the reader comes back to the next head."""

        async def test() -> None:
            async with running(tmp_path) as head:
                await ended(head, "bench-live", state="running")
                watching = asyncio.create_task(head.call("GET", "/benchmarks/bench-live/live"))
                live = head.context.sessions.live
                await until(lambda: live.watched("bench-live") == 1)
                live.close()
                assert b"event: end" not in (await watching).body

        run(test)

    def test_an_ended_benchmark_ends_at_once(self, tmp_path: Path) -> None:
        """There is nothing to watch; an unknown one is not found."""

        async def test() -> None:
            async with running(tmp_path) as head:
                await ended(head)
                answer = await head.call("GET", "/benchmarks/bench-done/live")
                assert b'event: end\ndata: {"status":"completed"}' in answer.body
                assert (await head.call("GET", "/benchmarks/nope/live")).code == "benchmark_not_found"

        run(test)
