"""The client against the real head: its journal, core and application on a loopback socket."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from head.api.app import ROUTES
from head.planner.endpoints.table import ENDPOINTS
from herder import AsyncClient, HerderApiError, HerderJobError, types
from herder.settings import Settings
from tests.doubles.api_head import ApiHead, api_head


@asynccontextmanager
async def connected(tmp_path: Path, role: str = "admin") -> AsyncIterator[tuple[ApiHead, AsyncClient]]:
    """A head and a client with a token of a role."""
    async with api_head(tmp_path) as head:
        async with AsyncClient(settings=Settings(url=head.url, token=head.tokens[role]), attempts=1) as client:
            yield head, client


async def test_a_model_from_first_to_last(tmp_path: Path) -> None:
    """Register, show, list, change, story and delete, under a name with a slash."""
    async with connected(tmp_path) as (_, client):
        made = await client.register_model("org/name", source="https://host/a.gguf", metadata={"a": 1})
        assert (made.name, made.sources) == ("org/name", ("https://host/a.gguf",))
        assert [found.name async for found in client.models(search="NAME")] == ["org/name"]
        changed = await client.update_model("org/name", metadata={"a": None, "b": [2]}, revision="v2")
        assert (changed.metadata, changed.revision) == ({"b": [2]}, "v2")
        assert await client.model_locations("org/name").all() == []
        assert (await client.story("org/name").all())[0].what == "model_registered"
        assert (await client.why("model", "org/name")).kind == "model"
        assert (await client.delete_model("org/name")).is_done
        with pytest.raises(HerderApiError) as caught:
            await client.model("org/name")
    assert caught.value.code == "model_not_found"


async def test_a_job_is_followed_to_its_end(tmp_path: Path) -> None:
    """A wait ends when the job is cancelled by somebody else, with its code."""
    async with connected(tmp_path) as (_, client):
        job = await client.create_job_from_text("name: x\nactions: [{action: download, model: a, to: 'n1:disk'}]\n")
        waiting = asyncio.create_task(client.wait_job(job.id, timeout_s=30))
        assert [found.id async for found in client.jobs()] == [job.id]
        assert (await client.cancel_job(job.id)).status == "cancelled"
        with pytest.raises(HerderJobError) as caught:
            await waiting
    assert caught.value.code == "cancelled"


async def test_events_resume_where_they_were(tmp_path: Path) -> None:
    """The feed from an id on holds what came after it, and goes on."""
    async with connected(tmp_path) as (_, client):
        await client.register_model("a")
        seen = []
        async for event in client.events(after=0, kind="model"):
            seen.append((event.what, event.key))
            if event.key == "a":
                await client.register_model("b")
            if event.key == "b":
                break
    assert seen == [("model_registered", "a"), ("model_registered", "b")]


async def test_keys(tmp_path: Path) -> None:
    """A key opens the door until it is revoked; its token is shown once."""
    async with connected(tmp_path) as (head, client):
        key = await client.create_key("viewer", "grafana", ttl_s=3_600)
        assert key.token
        async with AsyncClient(settings=Settings(url=head.url, token=key.token)) as viewer:
            assert (await viewer.health()).status == "healthy"
            with pytest.raises(HerderApiError) as caught:
                await viewer.register_model("a")
            assert (caught.value.status, caught.value.code) == (403, "forbidden")
            assert (await client.revoke_key(key.id)).is_revoked
            with pytest.raises(HerderApiError) as caught:
                await viewer.health()
        assert caught.value.status == 401
        assert all(found.token is None for found in await client.keys().all())


async def test_the_same_key_twice(tmp_path: Path) -> None:
    """One Idempotency-Key with two bodies is a conflict."""
    async with connected(tmp_path) as (_, client):
        first = await client.register_model("a", idempotency_key="k")
        again = await client.register_model("a", idempotency_key="k")
        assert first == again
        with pytest.raises(HerderApiError) as caught:
            await client.register_model("b", idempotency_key="k")
    assert (caught.value.status, caught.value.code) == (409, "idempotency_mismatch")


async def test_a_backup_is_a_database(tmp_path: Path) -> None:
    """What the client saves opens as the journal that it is."""
    async with connected(tmp_path) as (_, client):
        await client.register_model("a")
        await client.backup(tmp_path / "saved.sqlite")
    database = sqlite3.connect(tmp_path / "saved.sqlite")
    try:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    finally:
        database.close()


async def test_lists_and_documents(tmp_path: Path) -> None:
    """Everything else that can be read is read as its type."""
    async with connected(tmp_path) as (_, client):
        assert await client.nodes().all() == []
        assert await client.devices().all() == []
        assert await client.copies().all() == []
        assert await client.services().all() == []
        assert await client.replicas().all() == []
        assert {recipe.name async for recipe in client.recipes()} >= {"llamacpp", "command"}
        assert (await client.openapi())["openapi"].startswith("3.1")
        assert isinstance(await client.prometheus_targets(), list)
        with pytest.raises(HerderApiError) as caught:
            await client.model_manifest("none")
        assert caught.value.code == "model_not_found"


async def test_no_path_is_without_a_method(tmp_path: Path) -> None:
    """Each path of the API is asked by some method of the client, and the client asks no other."""
    asked: set[tuple[str, str]] = set()

    class Recorder:
        """Stands where the transport stands and notes what would be sent."""

        async def request(self, method: str, path: str, *_: object, **rest: object) -> object:
            asked.add((method, path if rest.get("prefix") == "" else f"/api/v1{path}"))
            raise HerderApiError("recorded", "")

        def stream(self, method: str, path: str, **_: object) -> object:
            asked.add((method, path))
            raise HerderApiError("recorded", "")

        timeout_s = 1.0

    client = AsyncClient(settings=Settings())
    client._http = Recorder()  # type: ignore[assignment]
    service = types.CreateService(name="X", model="X")
    job = types.CreateJob(name="X", actions=(types.JobAction(action="download"),))
    calls = [
        client.health(), client.openapi(), client.prometheus_targets(), client.backup(tmp_path / "b"),
        client.register_model("X"), client.model("X"), client.update_model("X"), client.delete_model("X"),
        client.model_manifest("X"), client.download("X", "X"), client.move("X", "X"), client.copy("X", "X"),
        client.serve("X", "X"), client.stop("X", "X"), client.delete_copy("X", "X"), client.health_check("X", "X"),
        client.pin("X", "X"), client.unpin("X", "X"), client.node("X"), client.label_node("X", {}),
        client.remove_node("X"), client.reset_node_identity("X"), client.cordon("X"), client.uncordon("X"),
        client.drain("X"),
        client.create_service(service), client.service("X"), client.delete_service("X"), client.create_job(job),
        client.job("X"), client.cancel_job("X"), client.why("X", "X"), client.create_key("viewer", "X"),
        client.revoke_key("X"), client.gateway_models(),
        client.create_benchmark("X"), client.benchmark("X"), client.cancel_benchmark("X"), client.delete_benchmark("X"),
        client.benchmark_report("X"), client.benchmark_files("X"), client.benchmark_recipe("X"),
        client.download_benchmark_file("X", "X", tmp_path / "c"),
        *(listing.page() for listing in (
            client.models(), client.model_locations("X"), client.copies(), client.nodes(), client.devices(),
            client.services(), client.replicas(), client.jobs(), client.story("X"), client.keys(), client.recipes(),
            client.benchmarks(), client.benchmark_recipes(),
        )),
        *(client.plan(endpoint.path) for endpoint in ENDPOINTS),
        *(anext(stream) for stream in (client.events(resume=False), client.logs("X"), client.chat("X", "X"))),
        anext(client.live_benchmark("X")), anext(client.log_entries(target="X")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(HerderApiError):
            await call
    routes = {(route.method, _plain(route.openapi_path)) for route in ROUTES}
    # What programs use otherwise: the agents' and the event websocket, the short form of stop, and pages for people.
    others = {
        "/api/v1/agent",
        "/api/v1/agent/runs/X/artifacts/X",
        "/api/v1/events/ws",
        "/api/v1/stop/X/X",
        "/",
        "/healthz",
        "/metrics",
        "/docs",
        "/api/v1/docs",
    }
    theirs = {(method, path) for method, path in routes if path not in others and not path.startswith("/docs")}
    gateway = {("POST", "/v1/chat/completions"), ("GET", "/v1/models")}
    longer = {("POST", "/api/v1/logs")}  # as GET, which the client takes unless it is too long for a query
    assert asked - gateway == theirs - longer


def _plain(path: str) -> str:
    import re

    return re.sub(r"\{\w+\}", "X", path)


def test_requests_are_those_of_the_api() -> None:
    """What the client sends is decoded by the same types, unknown fields forbidden."""
    body = msgspec.json.encode(types.Download(model_name="a", target_device="n1:disk"))
    assert msgspec.json.decode(body, type=types.Download).model_name == "a"
