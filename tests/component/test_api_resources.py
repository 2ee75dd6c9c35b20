"""The API's resources over real sockets: what is asked comes back in the promised types, durable and in order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from common import wire
from common.manifest import Manifest, ManifestFile
from head.api.app import ROUTES
from head.api.routes import ListOf, Media, PageOf
from head.core.objects import Benchmark, Copy, Job, Model, ModelManifest, Object, Pin, Replica, Service, Step
from herder import types as api
from tests.doubles.api_head import ApiHead, api_head, node, run, until
from tests.doubles.head_shell import SwitchJournal

MODEL = "org/m"


def copy(model: str, device: str, state: str = "ready", **changes: Any) -> Copy:
    """A copy."""
    made = Copy(model, "main", device, "present", state, 1, "req-0", 1, bytes=100, digest="b3:x")
    return msgspec.structs.replace(made, **changes)


def a_model(name: str, **changes: Any) -> Model:
    """A model."""
    return msgspec.structs.replace(Model(name, "llm", "main", 1, 1), **changes)


def a_service(name: str = "chat", replicas: int = 1) -> Service:
    """A service of the model."""
    return Service(name, MODEL, "main", "llamacpp", replicas, 1, "hash", 1, "req-0")


def a_replica(service: str = "chat", slot: int = 0, state: str = "ready") -> Replica:
    """A replica on n1."""
    return Replica(
        f"{service}-{slot}",
        service,
        slot,
        MODEL,
        "main",
        "n1",
        "n1:gpu0",
        1,
        "running",
        state,
        "req-0",
        1,
        port=20_000,
        api_key="engine-secret",
    )


async def a_little_of_everything(head: ApiHead) -> None:
    """One object of each kind."""
    manifest = Manifest(MODEL, "main", (ManifestFile("a.gguf", 100, "b3:1", 1 << 20),), "b3:m", "gguf", {"layers": 2})
    things: list[Object] = [
        a_model(MODEL),
        ModelManifest(manifest, "n1", 1),
        node("n1", gpus=2),
        copy(MODEL, "n1:disk", pins=(Pin("operator"),)),
        a_service(),
        a_replica(),
        Job("job-1", "j", "x", "completed", 1, (), ended_ms=2),
        Benchmark("bench-1", "b", {}, "f" * 64, "me", "completed", 1, 1, "c"),
    ]
    await head.put(*things)
    assert head.context.benchmarks is not None
    store = head.context.benchmarks.store
    store.write(store.folder("bench-1") / "summary.csv", b"point\n")
    head.connect("n1", wire.Telemetry(cpu=0.5, gpus=(wire.GpuReading(0, "GPU-0", 1 << 30, 79 << 30, 0.5),)))


PATHS = {
    "name": {"models": quote(MODEL, safe=""), "services": "chat", "benchmark-recipes": "smoke"},
    "id": {
        "benchmarks": "bench-1",
        "nodes": "n1",
        "jobs": "job-1",
        "replicas": "chat-0",
        "story": MODEL,
        "why": "chat",
        "keys": "key-viewer",
    },
}


def _path(route: Any) -> str:
    path: str = route.openapi_path
    for parameter in route.parameters:
        kind = path.split("/")[3]
        value = {"kind": "service", "model": MODEL, "device": "n1:gpu0"}.get(parameter) or PATHS[parameter][kind]
        path = path.replace("{" + parameter + "}", value)
    return path


def test_every_get_answers_in_its_declared_type(tmp_path: Path) -> None:
    """Each reading route of the table answers its declared status, and a body of its declared type."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await a_little_of_everything(head)
            checked = 0
            for route in ROUTES:
                if (
                    route.method != "GET"
                    or isinstance(route.answer, Media)
                    or route.openapi_path.startswith("/api/v1/why")
                ):
                    continue
                answer = await head.call("GET", _path(route), role="admin")
                assert answer.status == route.status, (route.path, answer.body)
                match route.answer:
                    case PageOf(item=item):
                        page = msgspec.json.decode(answer.body, type=api.Page)
                        rows = [msgspec.json.decode(row, type=item) for row in page.items]
                        assert rows or "services" in route.path, route.path
                    case ListOf(item=item):
                        assert msgspec.json.decode(answer.body, type=list[item])  # type: ignore[valid-type]
                    case other:
                        msgspec.json.decode(answer.body, type=other)
                checked += 1
            assert checked > 15

    run(body)


def test_model_names_with_a_slash(tmp_path: Path) -> None:
    """`org/name` is reached plainly and percent-encoded, also where more path follows."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            made = await head.call("POST", "/models", {"name": MODEL, "type": "embedding"})
            assert (made.status, made.headers["Location"]) == (201, "/api/v1/models/org/m")
            await head.put(copy(MODEL, "n1:disk"), a_model("org/locations"))
            for name in ("org/m", "org%2Fm", "org%2fm"):
                assert (await head.call("GET", f"/models/{name}")).json["name"] == MODEL
                located = (await head.call("GET", f"/models/{name}/locations")).json
                assert [item["device"] for item in located["items"]] == ["n1:disk"]
                changed = await head.call("PATCH", f"/models/{name}", {"metadata": {"x": name}})
                assert changed.json["metadata"]["x"] == name
                stopped = await head.call("POST", f"/stop/{name}/n1:gpu0")
                assert stopped.status == 202
                step = stopped.json["steps"][0]
                assert (step["model"], step["devices"]) == (MODEL, ["n1:gpu0"])
            assert (await head.call("GET", "/models/org%2Flocations")).json["name"] == "org/locations"
            missing = await head.call("GET", "/models/org/m/manifest")
            assert (missing.status, missing.code) == (404, "not_found")
            assert (await head.call("DELETE", "/models/org%2Flocations")).json["is_done"] is True

    run(body)


def test_duplicates_and_near_matches(tmp_path: Path) -> None:
    """A second registration is 409; a misspelt name gets the nearest names as its hint."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await a_little_of_everything(head)
            again = await head.call("POST", "/models", {"name": MODEL})
            assert (again.status, again.code) == (409, "already_exists")
            for path, code, near in (
                ("/models/org/n", "model_not_found", "'org/m'"),
                ("/models/m", "model_not_found", "'org/m'"),
                ("/models/Org/M", "model_not_found", "'org/m'"),
                ("/nodes/n2", "node_not_found", "'n1'"),
                ("/services/chta", "service_not_found", "'chat'"),
                ("/jobs/job-2", "job_not_found", "GET /api/v1/jobs"),
                ("/models/something-else", "model_not_found", "GET /api/v1/models"),
            ):
                answer = await head.call("GET", path)
                assert (answer.status, answer.code) == (404, code), path
                assert near in answer.json["error"]["hint"], answer.body

    run(body)


async def _walk(head: ApiHead, path: str, limit: int) -> list[dict[str, Any]]:
    """All items of a list, page by page."""
    items: list[dict[str, Any]] = []
    cursor = ""
    joint = "&" if "?" in path else "?"
    while True:
        page = (await head.call("GET", f"{path}{joint}limit={limit}&cursor={cursor}")).json
        assert len(page["items"]) <= limit
        items += page["items"]
        if page["next"] is None:
            assert page["total"] == len(items)
            return items
        cursor = page["next"]


def test_lists_come_in_pages(tmp_path: Path) -> None:
    """Pages follow each other without gaps or repeats, filtered or not, and jobs come newest first."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            models = [a_model(f"m{number:02}", type="llm" if number % 2 else "vision") for number in range(25)]
            await head.put(*models)
            names = [item["name"] for item in await _walk(head, "/models", 10)]
            assert names == sorted(model.name for model in models)
            vision = [item["name"] for item in await _walk(head, "/models?type=vision", 5)]
            assert vision == [name for name in names if int(name[1:]) % 2 == 0]
            assert [item["name"] for item in await _walk(head, "/models?search=M1", 3)] == names[10:20]
            await head.put(
                *(Job(f"job-{number % 7}{number}", "j", "x", "pending", number, ()) for number in range(1, 21))
            )
            jobs = await _walk(head, "/jobs", 6)
            assert [job["created_ms"] for job in jobs] == list(range(20, 0, -1))
            await head.put(node("n1", gpus=2), node("n2"), node("n10"))
            await head.put(*(copy(f"m{n:02}", f"n{1 + n % 2}:disk", "ready" if n % 3 else "failed") for n in range(12)))
            devices = [item["device"] for item in await _walk(head, "/devices", 3)]
            on_n1 = ["n1:disk", "n1:dram", "n1:gpu0", "n1:gpu1"]
            assert devices == [*on_n1, "n10:disk", "n10:dram", "n2:disk", "n2:dram"]
            assert [item["device"] for item in await _walk(head, "/devices?kind=gpu", 1)] == ["n1:gpu0", "n1:gpu1"]
            copies = await _walk(head, "/copies?node=n1", 4)
            assert [item["model"] for item in copies] == ["m00", "m02", "m04", "m06", "m08", "m10"]
            failed = await _walk(head, "/copies?node=n1&state=failed", 1)
            assert [item["model"] for item in failed] == ["m00", "m06"]
            assert [item["device"] for item in await _walk(head, "/copies?model=m03", 4)] == ["n2:disk"]

    run(body)


def test_heavy_rows_make_shorter_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of many steps come fewer to a page, at least one, and still each exactly once."""
    monkeypatch.setattr("head.api.call.PAGE_PARTS", 10)

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for number, count in enumerate((4, 4, 4, 30, 1, 9, 2, 30), 1):
                steps = tuple(Step(str(index), "copy") for index in range(count))
                await head.put(Job(f"job-{number}", "j", "x", "pending", 100 - number, steps))
            first = (await head.call("GET", "/jobs?limit=100")).json
            assert [job["id"] for job in first["items"]] == ["job-1", "job-2"]
            assert first["total"] == 8
            assert [job["id"] for job in await _walk(head, "/jobs", 100)] == [f"job-{number}" for number in range(1, 9)]

    run(body)


def test_a_cursor_survives_changes_and_belongs_to_its_list(tmp_path: Path) -> None:
    """What is added or removed between two pages moves nothing; another list's cursor is refused."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(*(a_model(f"m{number}") for number in range(6)))
            first = (await head.call("GET", "/models?limit=3")).json
            assert [item["name"] for item in first["items"]] == ["m0", "m1", "m2"]
            await head.put(a_model("a-new-one"), a_model("m25"))
            await head.delete(a_model("m2"))
            await head.delete(a_model("m4"))
            second = (await head.call("GET", f"/models?limit=3&cursor={first['next']}")).json
            assert [item["name"] for item in second["items"]] == ["m25", "m3", "m5"]
            wrong = await head.call("GET", f"/nodes?cursor={first['next']}")
            assert (wrong.status, wrong.code) == (422, "invalid_value")

    run(body)


def test_operations_keep_the_names_of_the_model_store(tmp_path: Path) -> None:
    """/download, /move, /copy, /serve, /delete, /health_check and /stop take the old fields and become jobs."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for path, sent, action, devices in (
                (
                    "/download",
                    {"model_name": "m", "source_url": "https://x/y", "target_device": "n1:disk"},
                    "download",
                    ["n1:disk"],
                ),
                (
                    "/move",
                    {"model_name": "m", "source_device": "n1:disk", "target_device": "n1:dram", "keep_source": True},
                    "move",
                    ["n1:disk", "n1:dram"],
                ),
                ("/copy", {"model_name": "m", "target_device": "n2:disk"}, "copy", ["n2:disk"]),
                ("/serve", {"model_name": "m", "device": "n1:gpu0", "port": 8080, "config": {}}, "serve", ["n1:gpu0"]),
                ("/delete", {"model_name": "m", "device": "n1:disk"}, "delete", ["n1:disk"]),
                ("/health_check", {"model_name": "m", "device": "n1:gpu0"}, "health_check", ["n1:gpu0"]),
                ("/stop", {"model_name": "m", "device": "n1:gpu0"}, "stop_serve", ["n1:gpu0"]),
            ):
                answer = await head.call("POST", path, sent, role="operator")
                assert answer.status == 202, (path, answer.body)
                job = msgspec.json.decode(answer.body, type=api.JobView)
                assert answer.headers["Location"] == f"/api/v1/jobs/{job.id}"
                assert [(step.action, step.model, list(step.devices)) for step in job.steps] == [(action, "m", devices)]
                assert job.actor == "operator(key-operator)"
            health = (await head.call("GET", "/health", role="viewer")).json
            assert health["status"] == "healthy"
            assert health["timestamp_ms"] > 0
            assert health["timestamp"].startswith("20")
            assert (await head.call("GET", "/", role=None)).json["version"] == "9.9"

    run(body)


def test_idempotency(tmp_path: Path) -> None:
    """The same key with the same body is the same job; with another body, path or method it is 409."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            key = {"Idempotency-Key": "abc"}
            sent = {"name": "j", "actions": [{"action": "copy"}]}
            first = await head.call("POST", "/jobs", sent, headers=key)
            again = await head.call("POST", "/jobs?wait=0", sent, headers=key)
            assert first.json["id"] == again.json["id"]
            assert len(head.state.jobs) == 1
            other = await head.call("POST", "/jobs", {**sent, "priority": 5}, headers=key)
            assert (other.status, other.code) == (409, "idempotency_mismatch")
            elsewhere = await head.call("POST", "/models", {"name": "m"}, headers=key)
            assert (elsewhere.status, elsewhere.code) == (409, "idempotency_mismatch")
            by_somebody_else = await head.call("POST", "/jobs", sent, headers=key, role="operator")
            assert by_somebody_else.json["id"] != first.json["id"]
            for bad in ("x" * 129, "caf\u00e9"):
                answer = await head.call("POST", "/jobs", sent, headers={"Idempotency-Key": bad})
                assert (answer.status, answer.code) == (422, "invalid_value"), bad

    run(body)


def test_keys_show_their_token_once(tmp_path: Path) -> None:
    """The token works and is never shown again, not even to a repeat under the same Idempotency-Key."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            sent = {"role": "viewer", "name": "dashboard", "ttl_s": 3600}
            first = (await head.call("POST", "/keys", sent, headers={"Idempotency-Key": "k"})).json
            head.tokens["made"] = first["token"]
            assert (await head.call("GET", "/models", role="made")).status == 200
            again = (await head.call("POST", "/keys", sent, headers={"Idempotency-Key": "k"})).json
            assert (again["id"], again["token"]) == (first["id"], None)
            listing = await head.call("GET", "/keys")
            assert first["token"].encode() not in listing.body
            assert b"secret" not in listing.body
            assert [item["id"] for item in (await head.call("GET", "/keys?role=agent")).json["items"]] == ["key-agent"]
            last = await head.call("DELETE", "/keys/key-admin")
            assert (last.status, last.code) == (409, "conflict")

    run(body)


def test_waiting_for_a_job(tmp_path: Path) -> None:
    """?wait answers 200 as soon as the job ends, and 202 with the present state when time is up."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            sent = {"name": "j", "actions": [{"action": "copy"}]}
            waiting = asyncio.create_task(head.call("POST", "/jobs?wait=3000", sent))
            await until(lambda: bool(head.state.jobs))
            job = next(iter(head.state.jobs.values()))
            await head.put(msgspec.structs.replace(job, state="running"))
            assert not waiting.done()
            await head.put(msgspec.structs.replace(job, state="completed", ended_ms=5))
            answer = await waiting
            assert (answer.status, answer.json["status"]) == (200, "completed")
            late = await head.call("POST", "/jobs?wait=0.05", sent)
            assert (late.status, late.json["status"]) == (202, "pending")
            cancelled = await head.call("POST", f"/jobs/{late.json['id']}/cancel?wait=3000")
            assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")

    run(body)


def test_waiting_for_a_service(tmp_path: Path) -> None:
    """Deleting with ?wait answers once the service is gone; a view of it never shows the engine's own key."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await a_little_of_everything(head)
            shown = (await head.call("GET", "/services/chat")).json
            assert (shown["state"], shown["replicas_ready"]) == ("ready", 1)
            assert b"engine-secret" not in (await head.call("GET", "/services")).body
            assert b"engine-secret" not in (await head.call("GET", "/replicas")).body
            waiting = asyncio.create_task(head.call("DELETE", "/services/chat?wait=3000"))
            await until(lambda: head.state.services["chat"].desired == "stopped")
            await head.delete(head.state.replicas["chat-0"])
            assert not waiting.done()
            await head.delete(head.state.services["chat"])
            answer = await waiting
            assert (answer.status, answer.json["state"]) == (200, "stopped")
            gone = await head.call("DELETE", "/services/chat")
            assert (gone.status, gone.code) == (404, "service_not_found")

    run(body)


def test_a_replica_wakes_those_who_wait_for_its_service(tmp_path: Path) -> None:
    """POST /services?wait answers 200 when the last replica becomes ready, which changes no service record."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(node("n1"), a_service(), a_replica(state="starting"))
            waiting = asyncio.create_task(
                head.waiters.until("service:chat", lambda state: state.replicas["chat-0"].state == "ready", 3000)
            )
            await head.put(a_replica(state="starting"))
            assert not waiting.done()
            await head.put(a_replica(state="ready"))
            assert await waiting is True

    run(body)


def test_a_stopping_head_lets_its_waiters_go(tmp_path: Path) -> None:
    """When the feed ends, waiting requests are answered with what is known."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            sent = {"name": "j", "actions": [{"action": "copy"}]}
            waiting = asyncio.create_task(head.call("POST", "/jobs?wait=3000", sent))
            await until(lambda: bool(head.state.jobs))
            head.context.feed.close()
            assert (await waiting).status == 202

    run(body)


def test_nodes_are_cordoned_drained_labelled_and_removed(tmp_path: Path) -> None:
    """What operators ask of nodes shows at once."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(node("n1", gpus=1), node("n2"))
            head.connect("n1")
            assert (await head.call("POST", "/nodes/n1/cordon")).json["is_cordoned"] is True
            assert (await head.call("POST", "/nodes/n1/uncordon")).json["is_cordoned"] is False
            drained = (await head.call("POST", "/nodes/n2/drain", {"deadline_s": 60})).json
            assert drained["drain"] in ("draining", "drained")
            assert (await head.call("POST", "/nodes/n1/drain")).status == 200
            labelled = await head.call("PATCH", "/nodes/n1", {"labels": {"rack": "a"}})
            assert labelled.json["labels"] == {"rack": "a"}
            found = (await head.call("GET", "/nodes?label=rack=a")).json["items"]
            assert [item["node_id"] for item in found] == ["n1"]
            assert (await head.call("GET", "/nodes?label=rack=b")).json["items"] == []
            online = (await head.call("GET", "/nodes?state=online")).json["items"]
            assert [(item["node_id"], item["gpu_count"]) for item in online] == [("n1", 1)]
            refused = await head.call("DELETE", "/nodes/n2", role="operator")
            assert refused.status == 403

    run(body)


def test_pins(tmp_path: Path) -> None:
    """A copy is pinned and unpinned by name."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(a_model(MODEL), node("n1"), copy(MODEL, "n1:disk"))
            head.connect("n1")
            pinned = await head.call("POST", "/pin", {"model_name": MODEL, "device": "n1:disk", "name": "night"})
            assert pinned.json["pins"] == ["night"]
            free = await head.call("POST", "/unpin", {"model_name": MODEL, "device": "n1:disk", "name": "night"})
            assert free.json["pins"] == []
            wrong = await head.call("POST", "/pin", {"model_name": MODEL, "device": "n1:tape"})
            assert (wrong.status, wrong.code) == (422, "invalid_device")

    run(body)


def test_stories_page_back_in_time(tmp_path: Path) -> None:
    """A story shows the latest lines first page first, oldest first within it, and goes back by its cursor."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for number in range(5):
                await head.put(a_model(MODEL, updated_ms=number), what=f"model_put_{number}")
            first = (await head.call("GET", f"/story/{MODEL}?limit=2")).json
            assert [line["what"] for line in first["items"]] == ["model_put_3", "model_put_4"]
            second = (await head.call("GET", f"/story/{MODEL}?limit=2&cursor={first['next']}")).json
            assert [line["what"] for line in second["items"]] == ["model_put_1", "model_put_2"]
            made = await head.call("POST", "/models", {"name": "other"})
            caused = (await head.call("GET", f"/story/{made.headers['X-Request-Id']}")).json
            assert [line["key"] for line in caused["items"]] == ["other"]
            assert (await head.call("GET", "/story/nobody")).code == "not_found"

    run(body)


def test_a_full_disk_refuses_changes_and_shows_nothing_undurable(tmp_path: Path) -> None:
    """While the journal refuses, changes are 507, reads go on without what was taken back, and health says so."""

    async def body() -> None:
        journal = SwitchJournal()
        async with api_head(tmp_path, journal=journal) as head:
            assert (await head.call("POST", "/models", {"name": "before"})).status == 201
            journal.fill_disk()
            refused = await head.call("POST", "/models", {"name": "lost"})
            assert (refused.status, refused.code) == (507, "state_read_only")
            assert [item["name"] for item in (await head.call("GET", "/models")).json["items"]] == ["before"]
            health = (await head.call("GET", "/health")).json
            assert (health["status"], health["is_read_only"]) == ("degraded", True)
            assert health["alarms"]

    run(body)


def test_what_was_taken_back_is_never_shown(tmp_path: Path) -> None:
    """A reader that came while a change was on its way to a full disk does not see it."""

    async def body() -> None:
        journal = SwitchJournal()
        async with api_head(tmp_path, journal=journal) as head:
            journal.gate.clear()
            journal.fill_disk()
            writing = asyncio.create_task(head.call("POST", "/models", {"name": "m"}))
            await until(lambda: "m" in head.state.models)
            reading = [
                asyncio.create_task(head.call("GET", path)) for path in ("/models/m", "/models?search=m", "/health")
            ]
            assert (await reading[2]).json["models"] == 1  # health waits for nothing: it is asked when things are bad
            journal.gate.set()
            assert (await reading[0]).code == "model_not_found"
            assert (await reading[1]).json["items"] == []
            assert (await writing).code == "state_read_only"

    run(body)


def test_reads_wait_for_what_is_on_its_way_to_the_disk(tmp_path: Path) -> None:
    """A reader never sees what a crash could take back."""

    async def body() -> None:
        journal = SwitchJournal()
        async with api_head(tmp_path, journal=journal) as head:
            journal.gate.clear()
            writing = asyncio.create_task(head.call("POST", "/models", {"name": "m"}))
            await until(lambda: "m" in head.state.models)
            reading = asyncio.create_task(head.call("GET", "/models/m"))
            healthy = await head.call("GET", "/healthz", role=None)
            assert healthy.status == 200
            assert not reading.done()
            assert not writing.done()
            journal.gate.set()
            assert (await reading).status == 200
            assert (await writing).status == 201

    run(body)


@pytest.mark.parametrize("kind", ["real", "memory"])
def test_the_journals_double_keeps_the_same_contract(tmp_path: Path, kind: str) -> None:
    """The API behaves alike on the real journal and on the one in memory that other tests use."""

    async def body() -> None:
        async with api_head(tmp_path, journal=SwitchJournal() if kind == "memory" else None) as head:
            made = await head.call("POST", "/models", {"name": "m"}, headers={"Idempotency-Key": "1"})
            again = await head.call("POST", "/models", {"name": "m"}, headers={"Idempotency-Key": "1"})
            assert (made.status, again.status) == (201, 201)
            assert made.json == again.json
            assert (await head.call("POST", "/models", {"name": "m"})).code == "already_exists"
            assert (await head.call("DELETE", "/models/m")).status == 200
            assert (await head.call("GET", "/models/m")).code == "model_not_found"
            assert (await head.call("GET", "/story/m")).status == 200

    run(body)
