"""The planner's API for hostile and for many callers: roles, sizes, bombs, crowds, and a search that hangs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from head.planner.endpoints.table import ENDPOINTS
from herder.client import AsyncClient
from herder.client_sync import Client
from herder.errors import HerderApiError
from tests.doubles.api_head import ApiHead, api_head, run, until


def test_who_may_ask(tmp_path: Path) -> None:
    """People who may look may ask; tokens of agents and of inference may not, and nobody without one."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for role, status in (
                ("viewer", 200),
                ("operator", 200),
                ("admin", 200),
                ("agent", 403),
                ("inference", 403),
            ):
                found = await head.call("POST", "/plan/analyze", {"model": "llama-3.1-8b"}, role=role)
                assert found.status == status, role
                assert (await head.call("GET", "/plan/presets", role=role)).status == status
            assert (await head.call("POST", "/plan/analyze", {"model": "llama-3.1-8b"}, role=None)).status == 401

    run(body)


def test_wrong_methods_and_paths(tmp_path: Path) -> None:
    """GET where a question is asked is 405, an endpoint that is not there 404."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            assert (await head.call("GET", "/plan/recommend")).status == 405
            assert (await head.call("POST", "/plan/presets", {})).status == 405
            assert (await head.call("POST", "/plan/recomend", {})).status == 404
            unknown = await head.call("GET", "/plan/topology?mok=b200")
            assert (unknown.status, unknown.code) == (422, "invalid_value")

    run(body)


LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
BOMBS: list[bytes] = [
    b'{"config":' + b"[" * 200_000,
    b'{"config":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001,
    msgspec.json.encode({"config": {f"key{number}": number for number in range(50_000)}}),
    json.dumps({"config": {**LAYERS, "num_hidden_layers": 10**40}}).encode(),
    json.dumps({"config": {**LAYERS, "num_hidden_layers": -1}}).encode(),
    json.dumps({"config": {**LAYERS, "num_hidden_layers": 1e308}}).encode(),
    json.dumps({"config": {**LAYERS, "hidden_size": "64"}}).encode(),
    json.dumps({"config": {**LAYERS, "layer_types": ["full_attention"] * 100_000}}).encode()[: 1 << 20],
    json.dumps({"config": {**LAYERS, "text_config": {"text_config": {"text_config": {}}}}}).encode(),
    json.dumps({"dimensions": {"hidden": 1, "layers": 10_001, "heads": 1, "ffn": 1, "vocab": 1}}).encode(),
    json.dumps({"model": "x" * 100_000}).encode(),
    json.dumps({"model": "../../etc/passwd"}).encode(),
    b'{"model": "llama-3.1-8b", "batch_size": NaN}',
    b'{"model": "llama-3.1-8b", "batch_size": 1e999}',
    b'{"model": "llama-3.1-8b"} {"model": "llama-3.1-8b"}',
    b'{"model": "\xff"}',
    b"\x00" * 1_000,
]


def test_bombs_are_refused(tmp_path: Path) -> None:
    """Nesting, huge numbers, a crowd of keys, bytes that are no text: refused soundly, and the next is served."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for bomb in BOMBS:
                found = await head.call(
                    "POST", "/plan/analyze", raw=io.BytesIO(bomb), headers={"Content-Type": "application/json"}
                )
                assert found.status in (200, 400, 404, 413, 422), (bomb[:60], found.body[:300])
                assert found.status == 200 or found.code != "internal", found.body[:300]
                assert b"Traceback" not in found.body
            big = json.dumps({"model": "llama-3.1-8b", "config": {"pad": "x" * (1 << 20)}}).encode()
            found = await head.call(
                "POST", "/plan/analyze", raw=io.BytesIO(big), headers={"Content-Type": "application/json"}
            )
            assert found.status == 413
            assert (await head.call("POST", "/plan/analyze", {"model": "llama-3.1-8b"})).status == 200

    run(body)


def test_each_of_a_crowd_gets_its_own_answer(tmp_path: Path) -> None:
    """Questions at the same time are answered one after the other, each with what it asked for."""

    async def body() -> None:
        async with api_head(tmp_path) as head:

            async def ask(batch: int) -> None:
                question = {"model": "llama-3.1-8b", "gpu": "H100", "gpus": 8, "training": True, "batch_size": batch}
                found = await head.call("POST", "/plan/recommend", question)
                assert found.status == 200
                assert found.json["parameters"]["global_batch"] == 8 * batch

            await asyncio.gather(*(ask(batch) for batch in range(1, 17)))

    run(body)


def worker() -> psutil.Process | None:
    """The planner's process, a child of this one; other tests' children may be ending meanwhile."""
    for child in psutil.Process().children():
        try:
            if "head.planner.worker" in child.cmdline():
                return child
        except (psutil.ZombieProcess, psutil.NoSuchProcess):
            continue
    return None


async def stop_worker(head: ApiHead) -> psutil.Process:
    """Starts the planner's process and stops it, as if it searched for ever."""
    assert (await head.call("GET", "/plan/health")).status == 200
    found = worker()
    assert found is not None
    os.kill(found.pid, signal.SIGSTOP)
    return found


def test_a_search_does_not_hold_up_the_head(tmp_path: Path) -> None:
    """While a question waits for a stopped process the head answers others; it goes on where the process does."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            process = await stop_worker(head)
            asked = asyncio.ensure_future(head.call("POST", "/plan/analyze", {"model": "llama-3.1-8b"}))
            for _ in range(20):
                assert (await head.call("GET", "/health")).status == 200
            assert (await head.call("GET", "/nodes")).status == 200
            assert not asked.done()
            os.kill(process.pid, signal.SIGCONT)
            assert (await asked).json["architecture"]["num_layers"] == 32

    run(body)


def test_a_caller_who_leaves_takes_no_other_s_answer(tmp_path: Path) -> None:
    """A connection that is closed in the middle of a question does not shift the answers of those behind it."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            process = await stop_worker(head)
            left = asyncio.ensure_future(head.call("POST", "/plan/analyze", {"model": "llama-3.1-70b"}))
            await until(lambda: bool(left.get_stack()))
            behind = asyncio.ensure_future(head.call("POST", "/plan/analyze", {"model": "llama-3.1-8b"}))
            assert (await head.call("GET", "/health")).status == 200
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            if process.is_running():
                os.kill(process.pid, signal.SIGCONT)
            assert (await behind).json["architecture"]["num_layers"] == 32

    run(body)


def test_clients_ask(tmp_path: Path) -> None:
    """Client.plan, async and sync: the answer as data, errors with their code and details."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            async with AsyncClient(head.url, token=head.tokens["viewer"]) as client:
                found = await client.plan("recommend", {"model": "llama-3.1-8b", "gpu": "h100", "training": True})
                assert found["best"]["strategy"]["world_size"] == 8
                assert (await client.plan("topology", {"gpu": "b200", "gpus": 4}))["topology"]["num_gpus"] == 4
                assert "recommend" in (await client.plan(""))["endpoints"]
                for endpoint in ENDPOINTS:
                    if endpoint.method == "GET":
                        assert await client.plan(endpoint.path)
                with pytest.raises(HerderApiError) as caught:
                    await client.plan("recommend", {"model": "llama-3.1-405b", "gpus": 8, "training": True})
                assert (caught.value.status, caught.value.code) == (409, "nothing_fits")
                assert caught.value.details["remedies"]

            def ask() -> dict[str, Any]:
                with Client(head.url, token=head.tokens["viewer"]) as client:
                    return client.plan("estimate", {"model": "llama-3.1-8b", "gpus": 8})

            assert (await asyncio.to_thread(ask))["num_gpus"] == 8

    run(body)
